"""Optimizers that torch lacks, by timm, under names a config may point at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.optim import Lamb


def lamb(
    groups: Iterable[Mapping[str, Any]], *, lr: float, eps: float = 1e-8, max_grad_norm: float | None = 1.0
) -> torch.optim.Optimizer:
    """LAMB (arXiv 1904.00962): the trust ratio acts on decayed tensors, the global gradient norm is clipped inside."""
    return Lamb([dict(group) for group in groups], lr=lr, eps=eps, max_grad_norm=max_grad_norm)
