"""DINO (arXiv 2203.03605) as mmdet has it, on any backbone of ours; the one file that knows mmdet, mmcv and mmengine.

They are imported on use. mmcv's operators are compiled code: where it isn't installed, a stand-in is put in its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.dense import Backbone, Boxes, Detections, valid_pixels
from models.mmcv_operators import StandIn

_COMPILED = "mmcv._ext"


class RotalithBackbone(nn.Module):
    """A backbone of ours as mmdet's models take one; `register` lets their configs name it.

    Its weights are left alone by mmdet's `init_weights`.

    Args:
        network: a backbone; or, in a config, what makes one: `type`, a callable or where it is imported from, and its
            arguments, which may be such mappings too.
    """

    def __init__(self, network: Backbone | Mapping[str, Any]) -> None:
        super().__init__()
        self.network: Any = _built(network) if isinstance(network, Mapping) else network

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        """Maps of images (b, 3, H, W), finest first; `valid` as `models.dense.Backbone` has it."""
        return tuple(self.network(images, valid))


def _built(value: Any) -> Any:
    if not (isinstance(value, Mapping) and "type" in value):
        return value
    arguments = {name: _built(part) for name, part in value.items() if name != "type"}
    make = value["type"]
    if isinstance(make, str):
        module, _, name = make.rpartition(".")
        try:
            make = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"RotalithBackbone: type={make!r} can't be imported: {error}") from error
    return make(**arguments)


def register() -> ModuleType:
    """Import mmdet, with a stand-in for mmcv's compiled operators where there are none, and tell it `RotalithBackbone`.

    The first call takes about ten seconds.

    Returns:
        `mmdet.registry`.

    Raises:
        ModuleNotFoundError: mmdet, mmcv or mmengine, or what they need, isn't installed.
        ImportError: OpenCV, which mmcv imports, misses a library of the system.
    """
    import compat  # noqa: F401 - before torchvision, which mmdet imports

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pkg_resources, and of escapes in docstrings, at every import
            importlib.import_module("mmcv")
            if importlib.util.find_spec(_COMPILED) is None:
                sys.modules[_COMPILED] = StandIn(_COMPILED)
            importlib.import_module("mmdet.models")
            registry = importlib.import_module("mmdet.registry")
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"mmdet's models need {missing.name}: pip install -c constraints.txt -e '.[mmdet]'", name=missing.name
        ) from missing
    except ImportError as error:
        if "libGL" not in str(error) and "libgthread" not in str(error):
            raise
        raise ImportError(
            f"mmdet's models need OpenCV, which misses a system library ({error}): apt install libgl1 libglib2.0-0, or "
            "pip uninstall opencv-python && pip install -c constraints.txt opencv-python-headless"
        ) from error
    registry.MODELS.register_module(module=RotalithBackbone, force=True)
    return registry


def compiled_operators() -> bool:
    """Whether mmcv's own compiled operators are in use; call `register` first."""
    return not isinstance(importlib.import_module(_COMPILED), StandIn)


def deformable_attentions() -> dict[str, Callable[..., Tensor]]:
    """mmcv's two ways to deformable attention, "plain" (its own PyTorch) and "operator" (compiled, or the stand-in's).

    Both take value (b, cells, h, d), shapes (levels, 2) int64, locations (b, q, h, levels, points, 2) and weights
    (b, q, h, levels, points), and give (b, q, h · d). The compiled operator is for CUDA alone. Call `register` first.
    """
    attention = importlib.import_module("mmcv.ops.multi_scale_deform_attn")

    def operator(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        starts = F.pad(shapes.prod(1).cumsum(0)[:-1], (1, 0))
        return attention.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    return {"plain": attention.multi_scale_deformable_attn_pytorch, "operator": operator}


class MMDetDino(nn.Module):
    """mmdet's DINO with the settings of its 4-scale configuration, which are detrex's too.

    What comes after the backbone computes in float32 under autocast, since matching and the refinement of boxes need it.
    The norms of mmdet's neck count padding, so that scores depend a little on what an image is batched with.

    Args:
        backbone: its maps are projected to `channels`, with maps of half the size each appended up to `levels`.
        num_classes: of objects.
        queries: boxes an image is answered with; no more than its cells on all levels.
        denoising: noised objects shown in training, about so many of the image that has most.
        encoder_layers, decoder_layers: of the deformable transformer.
        channels: its width, a multiple of 32.
        feedforward: hidden units of its layers.
        levels: maps it attends to.
        max_detections: most boxes told of an image.

    Raises:
        ModuleNotFoundError: the mmdet extra isn't installed.
        ValueError: an argument is out of bounds.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        queries: int = 900,
        denoising: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        channels: int = 256,
        feedforward: int = 2048,
        levels: int = 4,
        max_detections: int = 300,
    ) -> None:
        super().__init__()
        if channels % 32 or channels < 32:
            raise ValueError(
                f"MMDetDino: channels={channels} should be a multiple of 32, for 8 heads and 32 norm groups"
            )
        if levels < len(backbone.channels):
            raise ValueError(f"MMDetDino: levels={levels} are fewer than the backbone's {len(backbone.channels)} maps")
        if min(queries, denoising, num_classes) < 1:
            raise ValueError(
                f"MMDetDino: queries={queries}, denoising={denoising}, num_classes={num_classes} should be positive"
            )
        self.num_classes, self.queries, self.levels = num_classes, queries, levels
        feed = {"embed_dims": channels, "feedforward_channels": feedforward, "ffn_drop": 0.0}
        sampled = {"embed_dims": channels, "num_levels": levels, "dropout": 0.0}
        seen = {"embed_dims": channels, "num_heads": 8, "dropout": 0.0}
        costs = [
            {"type": "FocalLossCost", "weight": 2.0},
            {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
            {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
        ]
        config: dict[str, Any] = {
            "type": "DINO",
            "num_queries": queries,
            "num_feature_levels": levels,
            "with_box_refine": True,
            "as_two_stage": True,
            "backbone": {"type": "RotalithBackbone", "network": backbone},
            "neck": {
                "type": "ChannelMapper",
                "in_channels": list(backbone.channels),
                "kernel_size": 1,
                "out_channels": channels,
                "act_cfg": None,
                "norm_cfg": {"type": "GN", "num_groups": 32},
                "num_outs": levels,
            },
            "encoder": {"num_layers": encoder_layers, "layer_cfg": {"self_attn_cfg": sampled, "ffn_cfg": feed}},
            "decoder": {
                "num_layers": decoder_layers,
                "return_intermediate": True,
                "layer_cfg": {"self_attn_cfg": seen, "cross_attn_cfg": sampled, "ffn_cfg": feed},
                "post_norm_cfg": None,
            },
            "positional_encoding": {"num_feats": channels // 2, "normalize": True, "offset": 0.0, "temperature": 20},
            "bbox_head": {
                "type": "DINOHead",
                "num_classes": num_classes,
                "embed_dims": channels,
                "sync_cls_avg_factor": True,
                "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
                "loss_bbox": {"type": "L1Loss", "loss_weight": 5.0},
                "loss_iou": {"type": "GIoULoss", "loss_weight": 2.0},
            },
            "dn_cfg": {
                "label_noise_scale": 0.5,
                "box_noise_scale": 1.0,
                "group_cfg": {"dynamic": True, "num_groups": None, "num_dn_queries": denoising},
            },
            "train_cfg": {"assigner": {"type": "HungarianAssigner", "match_costs": costs}},
            "test_cfg": {"max_per_img": min(max_detections, queries * num_classes)},
        }
        self.backbone = backbone
        self.detector: Any = _quietly_made(register().MODELS, config, channels)
        del self.detector.backbone  # held here, under its own name, once

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Boxes] | None = None
    ) -> Mapping[str, Tensor] | list[Detections]:
        """Losses where targets are given, in training; else what is found.

        Args:
            images: (b, 3, H, W), each padded at the right and below.
            sizes: (b, 2) int64, height and width of each image inside its padding.
            targets: objects of each image, boxes in pixels.

        Returns:
            Weighted scalars "class", "l1", "giou" (all decoder layers), "proposals" (of the encoder) and "denoising"; or b
            `Detections`.

        Raises:
            ValueError: an image has fewer cells than `queries`, a label isn't a class, or targets come in evaluation.
        """
        height, width = images.shape[-2:]
        shapes = [(int(rows), int(columns)) for rows, columns in sizes.tolist()]
        if targets is not None and not self.training:
            raise ValueError(
                "MMDetDino: mmdet computes losses in training alone; call .train() before, or give no targets"
            )
        samples = self._samples(shapes, (height, width), targets)
        padded = any(shape != (height, width) for shape in shapes)
        maps = self.backbone(images, valid_pixels(sizes, height, width) if padded else None)
        shapes = [(features.shape[-2], features.shape[-1]) for features in maps]
        while len(shapes) < self.levels:
            shapes.append(((shapes[-1][0] + 1) // 2, (shapes[-1][1] + 1) // 2))
        if (cells := sum(rows * columns for rows, columns in shapes)) < self.queries:
            raise ValueError(
                f"MMDetDino: queries={self.queries} are more than the {cells} cells of {height}×{width} images; "
                "take fewer queries or larger images"
            )
        with torch.autocast(images.device.type, enabled=False):
            maps = self.detector.neck(tuple(features.float() for features in maps))
            if targets is None:
                return self._detections(maps, samples)
            head = self.detector.forward_transformer(maps, samples)
            return self._losses(self.detector.bbox_head.loss(**head, batch_data_samples=samples))

    def _samples(
        self, shapes: Sequence[tuple[int, int]], padded: tuple[int, int], targets: Sequence[Boxes] | None
    ) -> list[Any]:
        structures = importlib.import_module("mmdet.structures")
        instances = importlib.import_module("mmengine.structures")
        samples = [
            structures.DetDataSample(metainfo={"img_shape": shape, "batch_input_shape": padded, "pad_shape": padded})
            for shape in shapes
        ]
        for sample, target in zip(samples, targets or (), strict=targets is not None):
            if len(target.labels) and not 0 <= target.labels.min() <= target.labels.max() < self.num_classes:
                labels = target.labels.unique().tolist()
                raise ValueError(f"MMDetDino: labels {labels} of an image aren't all in 0 … {self.num_classes - 1}")
            sample.gt_instances = instances.InstanceData(bboxes=target.boxes.float(), labels=target.labels)
        return samples

    def _losses(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds = {"loss_cls": "class", "loss_bbox": "l1", "loss_iou": "giou"}
        unused = self.detector.dn_query_generator.label_embedding.weight.sum() * 0  # where no image has an object
        losses = {"class": unused, "l1": unused, "giou": unused, "proposals": unused, "denoising": unused}
        for name, value in parts.items():
            kind = name.split(".")[-1]  # "d3.dn_loss_iou" is of decoder layer 3
            group = "denoising" if kind.startswith("dn_") else "proposals" if kind.startswith("enc_") else kinds[kind]
            losses[group] = losses[group] + value.sum()
        return losses

    def _detections(self, maps: Sequence[Tensor], samples: list[Any]) -> list[Detections]:
        head = self.detector.forward_transformer(maps, samples)
        found = self.detector.bbox_head.predict(**head, batch_data_samples=samples, rescale=False)
        return [Detections(image.bboxes, image.scores, image.labels) for image in found]


def _quietly_made(models: Any, config: dict[str, Any], channels: int) -> Any:
    """Build and initialise without mmengine's line for every parameter."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        detector = models.build(config)
        if importlib.import_module("mmdet").__version__ == "3.3.0":
            # which encodes boxes in 4 · 128 numbers whatever the width
            head = detector.decoder.ref_point_head
            detector.decoder.ref_point_head = type(head)(4 * 128, channels, channels, 2)
        detector.init_weights()
    finally:
        logging.disable(disabled)
    return detector
