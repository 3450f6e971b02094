"""FCOS (arXiv 2006.09214) with torchvision's head, losses and suppression on any backbone of ours.

Every cell learns at every step, so it gets somewhere in minutes, where a set of queries takes hours to part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS, FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList

from models.dense import Backbone, Boxes, Detections, valid_pixels


class _Maps(nn.Module):
    """In the seat of torchvision's backbone, which tells the channels; the maps come from ours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


class Fcos(nn.Module):
    """A detector of one answer a cell: class, box and how central the cell is to its object.

    Norms of the head are over the channels of a cell, so that neither padding nor neighbours in the batch enter them; the
    head's convolutions see the cells beside them, padding too.

    Args:
        backbone: gives the maps. Objects go to the level of their size: up to 8 strides, on the coarsest without bound.
        num_classes: of objects.
        width: channels of the head.
        convolutions: before each answer.
        radius: strides around an object's centre in which cells answer for it.
        score: least score of a detection.
        overlap: IoU with a better one of its class that suppresses a detection.
        detections: most boxes told of an image.

    Raises:
        ValueError: targets have a label that isn't a class.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        width: int = 256,
        convolutions: int = 4,
        radius: float = 1.5,
        score: float = 0.02,
        overlap: float = 0.6,
        detections: int = 100,
    ) -> None:
        super().__init__()
        self.backbone, self.num_classes, self.strides = backbone, num_classes, tuple(backbone.strides)
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in backbone.channels)
        head = FCOSHead(width, 1, num_classes, 0)
        head.classification_head = FCOSClassificationHead(width, 1, num_classes, convolutions, norm_layer=LayerNorm2d)
        head.regression_head = FCOSRegressionHead(width, 1, convolutions, norm_layer=LayerNorm2d)
        self.fcos = FCOS(
            _Maps(width),
            num_classes,
            anchor_generator=AnchorGenerator(
                tuple((stride,) for stride in self.strides), ((1.0,),) * len(self.strides)
            ),
            head=head,
            center_sampling_radius=radius,
            score_thresh=score,
            nms_thresh=overlap,
            detections_per_img=detections,
        )

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Boxes] | None = None
    ) -> Mapping[str, Tensor] | list[Detections]:
        """Losses where targets are given, else what is found.

        Args:
            images: (b, 3, H, W), each padded at the right and below.
            sizes: (b, 2) int64, height and width of each image inside its padding.
            targets: objects of each image, boxes in pixels.

        Returns:
            Scalars "classification", "giou" and "centreness"; or b `Detections`.
        """
        coarsest = self.strides[-1]
        images = pad(images, (0, -images.shape[3] % coarsest, 0, -images.shape[2] % coarsest))
        padded = bool((sizes != sizes.new_tensor(images.shape[-2:])).any())
        maps = self.backbone(images, valid_pixels(sizes, *images.shape[-2:]) if padded else None)
        maps = [lateral(features) for lateral, features in zip(self.laterals, maps, strict=True)]
        answers: dict[str, Tensor] = {name: value.float() for name, value in self.fcos.head(maps).items()}
        extents: list[tuple[int, int]] = [(height, width) for height, width in sizes.tolist()]
        anchors: list[Tensor] = self.fcos.anchor_generator(ImageList(images, extents), maps)
        cells = [features.shape[2] * features.shape[3] for features in maps]
        with torch.autocast(images.device.type, enabled=False):
            if targets is not None:
                return self._losses(answers, anchors, cells, targets)
            by_level = {name: list(value.split(cells, dim=1)) for name, value in answers.items()}
            found = self.fcos.postprocess_detections(by_level, [list(one.split(cells)) for one in anchors], extents)
        return [Detections(one["boxes"], one["scores"], one["labels"]) for one in found]

    def _losses(
        self, answers: dict[str, Tensor], anchors: list[Tensor], cells: list[int], targets: Sequence[Boxes]
    ) -> Mapping[str, Tensor]:
        labels = torch.cat([target.labels for target in targets])
        if ((labels < 0) | (labels >= self.num_classes)).any():
            raise ValueError(
                f"targets have labels {labels.unique().tolist()}, the classes are 0 … {self.num_classes - 1}"
            )
        objects = [{"boxes": target.boxes.float(), "labels": target.labels} for target in targets]
        losses = self.fcos.compute_loss(objects, answers, anchors, cells)
        names = {"classification": "classification", "bbox_regression": "giou", "bbox_ctrness": "centreness"}
        return {names[name]: value for name, value in losses.items()}
