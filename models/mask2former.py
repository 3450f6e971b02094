"""Mask2Former (arXiv 2112.01527) for the pixel classes of an image: the pixel decoder, masked attention, matching and losses
of `transformers`, on a backbone of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import interpolate, pad

from models.dense import Backbone, whole_cells

try:
    import scipy.optimize  # noqa: F401 - transformers' matching needs it, and says so only late
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerLoss,
        Mask2FormerPixelDecoder,
        Mask2FormerPreTrainedModel,
        Mask2FormerTransformerModule,
    )
except ImportError as error:
    raise ImportError(f"Mask2Former: {error}; pip install -c constraints.txt -e '.[coco]'") from error


class Mask2Former(nn.Module):
    """Images → class scores of their pixels, by a set of queries each of which finds a mask and a class.

    Args:
        backbone: gives four maps, each of twice the stride of the one before.
        num_classes: of the pixels, without the ignored one.
        hidden: channels of queries and inner maps, a multiple of 32.
        heads: of all attention.
        queries: masks an image can have.
        encoder_layers: of deformable attention among the three coarser maps.
        decoder_layers: of masked attention of the queries.
        feed_forward: channels inside the decoder's layers; half as many inside the encoder's.
        points: at which masks are compared, instead of at all pixels.
        class_weight: of the cross entropy of the queries' classes, in matching and loss; no mask counts a tenth.
        mask_weight: of the masks' binary cross entropy.
        dice_weight: of the masks' dice loss.
        ignore_index: the target of pixels that belong to no mask.

    Raises:
        ValueError: `hidden` isn't a multiple of 32 and of `heads`, or the backbone's maps aren't as described.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        hidden: int = 256,
        heads: int = 8,
        queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
        feed_forward: int = 2048,
        points: int = 12544,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if hidden % 32 or hidden % heads:
            raise ValueError(f"Mask2Former: hidden {hidden} isn't a multiple of 32 and of heads {heads}")
        finest = backbone.strides[0]
        if tuple(backbone.strides) != (finest, 2 * finest, 4 * finest, 8 * finest):
            raise ValueError(f"Mask2Former: strides {backbone.strides} aren't four, each twice the one before")
        self.backbone, self.num_classes, self.ignore_index = backbone, num_classes, ignore_index
        self.weights = {"cross_entropy": class_weight, "mask": mask_weight, "dice": dice_weight}
        settings: dict[str, Any] = {"num_labels": num_classes, "num_attention_heads": heads, "num_queries": queries}
        config = Mask2FormerConfig(
            **settings,
            feature_size=hidden,
            mask_feature_size=hidden,
            hidden_dim=hidden,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers + 1,  # transformers counts the prediction before the first layer
            encoder_feedforward_dim=feed_forward // 2,
            dim_feedforward=feed_forward,
            train_num_points=points,
            class_weight=class_weight,
            mask_weight=mask_weight,
            dice_weight=dice_weight,
            feature_strides=tuple(backbone.strides),
            common_stride=finest,
        )
        self.head = _Head(config, backbone.channels, num_classes)
        self.criterion = _Loss(config, {})

    def no_weight_decay(self) -> set[str]:
        """Names of the embeddings of queries and levels."""
        embeddings = ("level_embed", "level_embed.weight", "queries_embedder.weight", "queries_features.weight")
        return {name for name, _ in self.head.named_parameters(prefix="head") if name.endswith(embeddings)}

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | Mapping[str, Tensor]:
        """Scores, or what is to be minimised.

        Args:
            images: (b, 3, H, W).
            targets: (b, H, W) int64, the class of each pixel; None for scores.

        Returns:
            Scores (b, classes, H, W) in float32, 0 or more: over the queries, the sum of the probability of the class
            times that of the mask at the pixel. Or the weighted losses `cross_entropy`, `mask` and `dice`, summed over
            the predictions before and after every layer of the decoder.
        """
        height, width = images.shape[-2:]
        images, there = whole_cells(images, self.backbone.strides[-1])
        classes, masks = self.head(self.backbone(images, there))
        below, right = images.shape[2] - height, images.shape[3] - width
        with torch.autocast(images.device.type, enabled=False):  # matching needs numbers that numpy knows
            if targets is None:
                scores = semantic_scores(classes[-1], masks[-1], (images.shape[2], images.shape[3]))
                return scores[..., :height, :width]
            targets = pad(targets, (0, right, 0, below), value=self.ignore_index)
            return self._losses([x.float() for x in classes], [x.float() for x in masks], targets)

    def activate(self, scores: Tensor) -> Tensor:
        """The scores themselves, which can be averaged over scales as they are."""
        return scores

    def _losses(self, classes: Sequence[Tensor], masks: Sequence[Tensor], targets: Tensor) -> Mapping[str, Tensor]:
        present = [image.unique() for image in targets]
        present = [labels[labels != self.ignore_index] for labels in present]
        wanted = [(image == labels[:, None, None]).float() for image, labels in zip(targets, present, strict=True)]
        *earlier, last = (
            {"masks_queries_logits": m, "class_queries_logits": c} for m, c in zip(masks, classes, strict=True)
        )
        losses = self.criterion(**last, mask_labels=wanted, class_labels=present, auxiliary_predictions=earlier)
        return {
            part: weight * torch.stack([loss for name, loss in losses.items() if name.startswith(f"loss_{part}")]).sum()
            for part, weight in self.weights.items()
        }


def semantic_scores(classes: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """What queries tell of pixels, as published: masks are enlarged before they become probabilities.

    Args:
        classes: logits (b, queries, classes + 1), the last for no mask.
        masks: logits (b, queries, h, w).
        size: height and width wanted.

    Returns:
        (b, classes, height, width) in float32 or wider.
    """
    kind = torch.promote_types(masks.dtype, torch.float32)
    masks = interpolate(masks.to(kind), size=size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", classes.to(kind).softmax(-1)[..., :-1], masks)


class _Head(Mask2FormerPreTrainedModel):
    """Maps → logits of classes (b, queries, classes + 1) and masks (b, queries, h, w), before and after every layer."""

    def __init__(self, config: Mask2FormerConfig, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=list(channels))
        self.transformer = Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.class_predictor = nn.Linear(config.hidden_dim, num_classes + 1)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: else `post_init` passes over modules without parameters of their own, and over all that they draw."""
        return False

    def forward(self, maps: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        pixels = self.pixel_decoder(list(maps))
        found = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        classes = [self.class_predictor(x.transpose(0, 1)) for x in found.intermediate_hidden_states]
        return classes, found.masks_queries_logits


class _Loss(Mask2FormerLoss):
    """transformers' loss, divided by the masks of a device, averaged over devices as PyTorch knows them."""

    def get_num_masks(self, class_labels: Any, device: torch.device) -> Tensor:
        count = torch.tensor(float(sum(map(len, class_labels))), device=device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(count)
            count /= distributed.get_world_size()
        return count.clamp(min=1)
