"""Offers our models under names of timm's registry; their weights are local files, so none is hosted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import nn

_COMMON: Mapping[str, Any] = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "license": "apache-2.0",
}


def offer(
    module: str,
    name: str,
    model: type[nn.Module],
    arguments: Mapping[str, Any],
    *,
    out_indices: Callable[[Mapping[str, Any]], int | tuple[int, ...]],
    features: Mapping[str, Any],
    **own: Any,
) -> None:
    """Make `timm.create_model(name, …)` build `model(**arguments, …)`.

    Args:
        module: `__name__` of the module that holds the model; its `default_cfgs` gets the entry timm wants.
        name: in the registry.
        model: the class.
        arguments: its own, which the caller's override.
        out_indices: the blocks that `features_only` returns by default, from the arguments.
        features: the rest of timm's feature configuration.
        own: default configuration beside what all share.
    """

    def create(pretrained: bool = False, **given: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no hosted weights; load a local file with models.convert")
        merged = {**arguments, **given}
        feature_cfg = {**features, "out_indices": merged.pop("out_indices", out_indices(merged))}
        return build_model_with_cfg(model, name, pretrained=False, feature_cfg=feature_cfg, **merged)

    create.__name__, create.__module__ = name, module
    sys.modules[module].default_cfgs[name] = {**_COMMON, **own}
    register_model(create)
