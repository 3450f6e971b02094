"""How a model's parameters are divided among learning rates and weight decay: by what they are, and by where they stand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn

Groups = list[dict[str, Any]]
Grouping = Callable[[nn.Module, float], Groups]


def spared_from_decay(model: nn.Module) -> set[str]:
    """Names of all parameters that the model, or a part of it, names in its `no_weight_decay()`."""
    found = set()
    for name, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            found |= {f"{name}.{own}" if name else own for own in module.no_weight_decay()}
    return found


def divided(model: nn.Module, weight_decay: float, scale: Callable[[str], float]) -> Groups:
    """Groups of equal decay and `lr_scale`, which timm's schedulers multiply every learning rate by.

    Biases, other parameters of one axis, and those of `spared_from_decay` take no weight decay.

    Args:
        model: its trained parameters are divided.
        weight_decay: of the others.
        scale: name → factor of the learning rate.
    """
    spared = spared_from_decay(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") or name in spared else weight_decay
            groups[decay, scale(name)].append(parameter)
    return [{"params": p, "weight_decay": decay, "lr_scale": factor} for (decay, factor), p in groups.items()]


def plain(model: nn.Module, weight_decay: float) -> Groups:
    """Spared and decayed, at one learning rate."""
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=tuple(spared_from_decay(model)))


@dataclass(frozen=True)
class BackboneScaled:
    """The trunk of the backbone, as it was pretrained, learns at a fraction of the rate (DETR's 0.1, arXiv 2005.12872).

    Args:
        factor: of the learning rate.
    """

    factor: float = 0.1

    def __call__(self, model: nn.Module, weight_decay: float) -> Groups:
        trunk = _trunk(model)
        return divided(model, weight_decay, lambda name: self.factor if name.startswith(trunk) else 1.0)


@dataclass(frozen=True)
class LayerDecay:
    """Rate^(blocks + 1 − layer) for the trunk: embeddings are layer 0, block i is layer i + 1 (arXiv 2106.08254).

    Learnable frequencies of all blocks are one parameter; it learns at the full rate, as what comes after the blocks.

    Args:
        rate: per layer.
    """

    rate: float

    def __call__(self, model: nn.Module, weight_decay: float) -> Groups:
        trunk = _trunk(model)
        blocks = {int(at) for at in _numbers(model, f"{trunk}blocks.")}
        if not blocks:
            raise ValueError(f"LayerDecay: {trunk}blocks isn't there; only a ViT's layers are counted")
        last = max(blocks) + 2

        def scale(name: str) -> float:
            if not name.startswith(trunk) or name.startswith(f"{trunk}rope."):
                return 1.0
            of_block = name.startswith(f"{trunk}blocks.")
            embeds = name.removeprefix(trunk).split(".")[0] in ("patch_embed", "pos_embed", "cls_token", "reg_token")
            layer = int(name.removeprefix(f"{trunk}blocks.").split(".")[0]) + 1 if of_block else 0 if embeds else last
            return self.rate ** (last - layer)

        return divided(model, weight_decay, scale)


def _numbers(model: nn.Module, prefix: str) -> Iterator[str]:
    return (name.removeprefix(prefix).split(".")[0] for name, _ in model.named_parameters() if name.startswith(prefix))


def _trunk(model: nn.Module) -> str:
    """The beginning of the names of what was pretrained."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"{type(model).__name__} has no backbone to group parameters by")
    return "backbone.trunk." if hasattr(backbone, "trunk") else "backbone."
