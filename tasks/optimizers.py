"""Optimizers that torch lacks, by timm, under names a config may point at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.optim import Lamb, Muon


def lamb(
    groups: Iterable[Mapping[str, Any]], *, lr: float, eps: float = 1e-8, max_grad_norm: float | None = 1.0
) -> torch.optim.Optimizer:
    """LAMB (arXiv 1904.00962): the trust ratio acts on decayed tensors, the global gradient norm is clipped inside."""
    return Lamb([dict(group) for group in groups], lr=lr, eps=eps, max_grad_norm=max_grad_norm)


def muon(
    groups: Iterable[Mapping[str, Any]], *, lr: float, other_lr: float, momentum: float = 0.95
) -> torch.optim.Optimizer:
    """Muon (timm's) on the decayed matrices, AdamW at `other_lr` on all that is spared from decay: biases, frequencies, …

    Updates of a matrix are made orthogonal, which a small model learns from several times faster than from AdamW.
    """
    groups = list(groups)
    if not any(group["weight_decay"] for group in groups):
        raise ValueError("muon turns the decayed matrices: set task.weight_decay above 0, or choose another optimizer")
    divided = [
        {**group, "use_fallback": not group["weight_decay"], "lr": lr if group["weight_decay"] else other_lr}
        for group in groups
    ]
    return Muon(divided, lr=lr, momentum=momentum, nesterov=True)
