"""RoPE-Swin as a backbone for dense tasks (arXiv 2403.13298, 2103.14030): maps of its stages, from images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint as recompute

from models.swin import RopeSwin

Pair = tuple[int, int]


class SwinStages(RopeSwin):
    """Images → normalised maps of chosen stages: a `models.dense.Backbone`.

    Windows keep their size whatever that of the image, and every second block shifts them even where a map is no larger
    than a window, as is usual in detection; timm calls this `always_partition`. What a window has beyond the image is
    masked. Parameters are named as in `RopeSwin`, plus `norms`; what the stages wanted don't use isn't there.

    Args:
        stages: indices of the stages that give maps, ascending; (1, 2, 3) have strides 8, 16 and 32 at patch 4.
        window_size: tokens of a window's side, or (height, width), or one a stage: 7 for weights of 224 pixels.
        checkpoint: compute blocks anew in the backward pass, which saves the memory of their activations.
        others: `RopeSwin`'s arguments; `img_size` and `num_classes` mean nothing here.

    Attributes:
        not_pretrained: beginnings of names that weights of a classifier and this network don't share: what
            `models.convert.load_checkpoint` is to skip.

    Raises:
        ValueError: stages aren't ascending indices of stages, or as `RopeSwin`.
    """

    layers: Any  # timm's are Sequential, Module and ClassifierHead; what isn't wanted of them goes
    norm: Any
    head: Any

    def __init__(
        self,
        *,
        stages: Sequence[int] = (1, 2, 3),
        window_size: int | Sequence[int | Pair] = 7,
        checkpoint: bool = False,
        **others: Any,
    ) -> None:
        fixed = {"always_partition": True, "strict_img_size": False, "num_classes": 0}
        super().__init__(window_size=window_size, **{**others, **fixed})
        wanted = tuple(stages)
        if not wanted or wanted != tuple(sorted(set(wanted))) or wanted[0] < 0 or wanted[-1] >= self.num_layers:
            raise ValueError(f"SwinStages: stages {list(wanted)} aren't ascending indices below {self.num_layers}")
        about: list[dict[str, Any]] = [self.feature_info[stage] for stage in wanted]
        self.stages, self.checkpoint = wanted, checkpoint
        self.strides = tuple(int(stage["reduction"]) for stage in about)
        self.channels = tuple(int(stage["num_chs"]) for stage in about)
        norm = others.get("norm_layer", nn.LayerNorm)
        unused = tuple(f"layers.{stage}." for stage in range(wanted[-1] + 1, self.num_layers))
        self.not_pretrained = ("norms.", "norm.", "head.", *unused)
        self.layers, self.num_layers = self.layers[: wanted[-1] + 1], wanted[-1] + 1
        self.norm, self.head = nn.Identity(), nn.Identity()
        self.norms = nn.ModuleList(norm(channels) for channels in self.channels)

    def set_input_size(self, *size: Any, **sizes: Any) -> None:
        """Nothing: images of any size are taken as they come, and windows stay."""

    def forward(  # type: ignore[override]  # a backbone, no classifier
        self, images: Tensor, valid: Tensor | None = None
    ) -> list[Tensor]:
        """Maps as `models.dense.Backbone` tells; one for each of `stages`."""
        patch = cast(Any, self.patch_embed).patch_size[0]
        if valid is not None:
            images = images.masked_fill(~valid[:, None], 0.0)
            if not torch.compiler.is_compiling() and bool(valid.all()):
                valid = None  # smaller masks, or none
        height, width = images.shape[2:]
        x = self.patch_embed(pad(images, (0, -width % patch, 0, -height % patch)))  # (b, h, w, c)
        maps: list[Tensor] = []
        for index, stage in enumerate(self.layers):
            x = stage.downsample(x)  # odd sides get a row or column of zeros
            stride = patch * 2**index
            # padding lies at the right and below: a cell has some of the image if its first pixel is of it
            inside = None if valid is None else valid[:, ::stride, ::stride]
            x = self._blocks(stage.blocks, x, inside)
            if index in self.stages:
                maps.append(_cleared(self.norms[len(maps)](x), inside).permute(0, 3, 1, 2))
            x = _cleared(x, inside)  # as the zeros of an odd side are, where the next stage merges
        return maps

    def _blocks(self, blocks: nn.Sequential, x: Tensor, inside: Tensor | None) -> Tensor:
        masks: dict[tuple[Pair, Pair], Tensor | None] = {}
        block: Any
        for block in blocks:
            layout = (block.window_size, block.shift_size)
            if layout not in masks:
                masks[layout] = window_mask(x, inside, *layout)
            if self.checkpoint and torch.is_grad_enabled():
                x = recompute(_block, block, x, masks[layout], use_reentrant=False)
            else:
                x = _block(block, x, masks[layout])
        return x


def window_mask(x: Tensor, inside: Tensor | None, window: Pair, shift: Pair) -> Tensor | None:
    """What is added to the logits within windows, so that tokens see those they lie beside, and never padding.

    Args:
        x: (b, h, w, c); only its size, dtype and device count.
        inside: (b, h, w) bool, the tokens that are of the image; None if all are.
        window: its height and width in tokens.
        shift: how far windows are shifted down and right.

    Returns:
        (windows, n, n), or (b · windows, n, n) where `inside` is given, 0 or −∞, with an entry of 0 in every row; None
        if nothing is to be masked.
    """
    (h, w), (down, right) = x.shape[1:3], (-x.shape[1] % window[0], -x.shape[2] % window[1])
    if inside is None and not (down or right or any(shift)):
        return None
    whole = torch.ones(1, h, w, dtype=torch.bool, device=x.device) if inside is None else inside
    whole = _rolled(pad(whole, (0, right, 0, down)), shift, -1)
    # tokens that rolling brought from the start of an axis to its end meet others there that they don't lie beside
    rolled = [
        torch.arange(-length, 0, device=x.device) >= -by for length, by in zip(whole.shape[1:], shift, strict=True)
    ]
    place = 1 + 2 * rolled[0][:, None] + rolled[1]
    group = window_partition((whole * place)[..., None], window).flatten(1)  # padding is group 0
    apart = group[:, :, None] != group[:, None]
    return x.new_zeros(()).expand_as(apart).masked_fill(apart, float("-inf"))


def _block(block: SwinTransformerBlock, x: Tensor, mask: Tensor | None) -> Tensor:
    x = x + block.drop_path1(_attention(block, block.norm1(x), mask))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def _attention(block: SwinTransformerBlock, x: Tensor, mask: Tensor | None) -> Tensor:
    (_, h, w, c), (rows, columns) = x.shape, block.window_size
    x = _rolled(pad(x, (0, 0, 0, -w % columns, 0, -h % rows)), block.shift_size, -1)
    height, width = x.shape[1:3]
    windows = window_partition(x, (rows, columns)).view(-1, rows * columns, c)
    attended = block.attn(windows, mask=mask).view(-1, rows, columns, c)
    return _rolled(window_reverse(attended, (rows, columns), height, width), block.shift_size, 1)[:, :h, :w]


def _rolled(x: Tensor, shift: Pair, sign: int) -> Tensor:
    return x.roll((sign * shift[0], sign * shift[1]), (1, 2)) if any(shift) else x


def _cleared(x: Tensor, inside: Tensor | None) -> Tensor:
    return x if inside is None else x.masked_fill(~inside[..., None], 0.0)
