"""UperNet (arXiv 1807.10221): the pixel classes of an image, from a pyramid pooling of the coarsest map of a backbone and a
feature pyramid over all of them; and a plain head (arXiv 1411.4038) that helps one map in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from models.dense import Backbone, whole_cells

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Groups of 16 channels or more: the same at any batch size, in training and evaluation, on one device and many."""
    return nn.GroupNorm(gcd(channels, max(1, channels // 16)), channels)


def batch_norm(channels: int) -> nn.Module:
    """As published. A pool of 1 leaves it one value an image, so that it needs a Trainer with `sync_batchnorm=True`."""
    return nn.BatchNorm2d(channels)


class UperNet(nn.Module):
    """Images → class scores of their pixels.

    Args:
        backbone: gives the maps; four in the paper, of strides 4 to 32.
        num_classes: of the pixels, without the ignored one.
        channels: of all inner maps; 512, or 768 with ViT-B, in the published recipes.
        pools: cells a side of the coarsest map's poolings.
        auxiliary_map: index of the map that the auxiliary head reads.
        auxiliary_channels: inside that head.
        auxiliary_weight: of its loss.
        norm: made for a number of channels, after every inner convolution: `group_norm`, which suits the two images a
            device that such training has, or `batch_norm`.
        dropout: probability that a channel is dropped before the classes are told.
        ignore_index: the target of pixels that don't count.

    Raises:
        ValueError: the backbone has fewer than two maps, or none of index `auxiliary_map`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        channels: int = 512,
        pools: Sequence[int] = (1, 2, 3, 6),
        auxiliary_map: int = 2,
        auxiliary_channels: int = 256,
        auxiliary_weight: float = 0.4,
        norm: Norm = group_norm,
        dropout: float = 0.1,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        maps = len(backbone.channels)
        if maps < 2 or not 0 <= auxiliary_map < maps:
            raise ValueError(f"UperNet: {maps} maps of the backbone; needed are two, and one of index {auxiliary_map}")
        self.backbone, self.num_classes, self.ignore_index = backbone, num_classes, ignore_index
        self.auxiliary_map, self.auxiliary_weight = auxiliary_map, auxiliary_weight
        self.decode = UperHead(backbone.channels, channels, pools, norm)
        self.classify = _classifier(channels, num_classes, dropout)
        self.auxiliary = nn.Sequential(
            _convolution(backbone.channels[auxiliary_map], auxiliary_channels, 3, norm),
            _classifier(auxiliary_channels, num_classes, dropout),
        )

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | Mapping[str, Tensor]:
        """Scores, or what is to be minimised.

        Args:
            images: (b, 3, H, W).
            targets: (b, H, W) int64, the class of each pixel; None for scores.

        Returns:
            Logits (b, classes, H, W) in float32; or the weighted losses `cross_entropy` and `auxiliary`, means over the
            pixels that count, 0 where none does.
        """
        height, width = _size(images)
        images, there = whole_cells(images, self.backbone.strides[-1])
        maps = self.backbone(images, there)
        scores = self._upsampled(self.classify(self.decode(maps)), images)[..., :height, :width]
        if targets is None:
            return scores
        auxiliary = self._upsampled(self.auxiliary(maps[self.auxiliary_map]), images)[..., :height, :width]
        return {
            "cross_entropy": self._loss(scores, targets),
            "auxiliary": self.auxiliary_weight * self._loss(auxiliary, targets),
        }

    def activate(self, scores: Tensor) -> Tensor:
        """Probabilities of the classes, which can be averaged over scales; shapes stay."""
        return scores.softmax(1)

    def _upsampled(self, scores: Tensor, images: Tensor) -> Tensor:
        kind = torch.promote_types(scores.dtype, torch.float32)
        return _resized(scores.to(kind), _size(images))

    def _loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        total = cross_entropy(scores, targets, ignore_index=self.ignore_index, reduction="sum")
        return total / (targets != self.ignore_index).sum().clamp(min=1)


class UperHead(nn.Module):
    """Maps → one map of the finest one's size.

    Args:
        channels: of the maps, finest first.
        width: channels of the one map, and inside.
        pools: cells a side of the poolings of the coarsest map.
        norm: made for a number of channels.
    """

    def __init__(self, channels: Sequence[int], width: int, pools: Sequence[int], norm: Norm) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), _convolution(channels[-1], width, 1, norm)) for pool in pools
        )
        self.pooled = _convolution(channels[-1] + len(pools) * width, width, 3, norm)
        self.lateral = nn.ModuleList(_convolution(c, width, 1, norm) for c in channels[:-1])
        self.smooth = nn.ModuleList(_convolution(width, width, 3, norm) for _ in channels[:-1])
        self.fuse = _convolution(len(channels) * width, width, 3, norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(b, width, h, w) of maps (b, channels, h, w) and smaller ones."""
        coarsest = maps[-1]
        pools = [_resized(pool(coarsest), _size(coarsest)) for pool in self.pools]
        merged = [self.pooled(torch.cat([coarsest, *pools], 1))]  # coarsest first
        for lateral, finer in zip(reversed(self.lateral), reversed(maps[:-1]), strict=True):
            merged.append(lateral(finer) + _resized(merged[-1], _size(finer)))
        smooth = [merged[0], *(conv(x) for conv, x in zip(reversed(self.smooth), merged[1:], strict=True))]
        return self.fuse(torch.cat([_resized(x, _size(maps[0])) for x in reversed(smooth)], 1))


def _convolution(inputs: int, outputs: int, kernel: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), norm(outputs), nn.ReLU(inplace=True)
    )


def _classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if _size(x) == size else interpolate(x, size=size, mode="bilinear", align_corners=False)
