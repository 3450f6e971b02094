"""Learning rate over a run, by timm's schedulers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler


class Schedule(Protocol):
    """Makes a timm scheduler; `by_epoch` says whether it moves at epochs or at optimizer steps."""

    @property
    def by_epoch(self) -> bool: ...
    def __call__(self, optimizer: torch.optim.Optimizer, *, epochs: int, steps: int) -> Scheduler: ...


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `floor` (arXiv 1608.03983).

    Args:
        warmup: epochs, may be a fraction where the schedule moves by steps.
        start: learning rate at the first step.
        floor: learning rate at the last.
        by_epoch: move once an epoch (RoPE-ViT) or at every step (Swin).
        after_warmup: the cosine starts when the warm-up ends, instead of running underneath it.
    """

    warmup: float
    start: float
    floor: float
    by_epoch: bool = False
    after_warmup: bool = False

    def __call__(self, optimizer: torch.optim.Optimizer, *, epochs: int, steps: int) -> Scheduler:
        total = epochs if self.by_epoch else steps
        warmup = round(self.warmup * total / epochs)
        if warmup >= total:
            raise ValueError(
                f"schedule: a warm-up of {self.warmup} epochs leaves none of the {epochs} to train in; set task.schedule.warmup"
            )
        return CosineLRScheduler(
            optimizer,
            t_initial=total - warmup if self.after_warmup else total,
            lr_min=self.floor,
            warmup_t=warmup,
            warmup_lr_init=self.start,
            warmup_prefix=self.after_warmup,
            t_in_epochs=self.by_epoch,
        )
