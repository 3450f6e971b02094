"""Learning rate over a run, by timm's schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
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


@dataclass(frozen=True)
class Drops:
    """Constant but for drops at fractions of the run, after a linear warm-up (DETR's, arXiv 2005.12872).

    Args:
        at: fractions of the run, rising, each between 0 and 1.
        factor: of the learning rate, at every drop.
        warmup_steps: optimizer steps, counted within the run.
    """

    at: Sequence[float]
    factor: float = 0.1
    warmup_steps: int = 0
    by_epoch: bool = False

    def __call__(self, optimizer: torch.optim.Optimizer, *, epochs: int, steps: int) -> Scheduler:
        if list(self.at) != sorted(self.at) or not all(0 < fraction < 1 for fraction in self.at):
            raise ValueError(f"schedule: drops at {list(self.at)} aren't rising fractions of the run")
        _room(self.warmup_steps, steps)
        return MultiStepLRScheduler(
            optimizer,
            decay_t=[round(fraction * steps) + 1 for fraction in self.at],  # timm looks a step ahead
            decay_rate=self.factor,
            warmup_t=self.warmup_steps,
            warmup_lr_init=0.0,
            warmup_prefix=False,
            t_in_epochs=False,
        )


@dataclass(frozen=True)
class Polynomial:
    """Down to zero as (1 − t)^power over the steps of the run, under a linear warm-up (arXiv 1412.7062).

    Args:
        power: 1 is a line.
        warmup_steps: optimizer steps, counted within the run.
    """

    power: float = 1.0
    warmup_steps: int = 0
    by_epoch: bool = False

    def __call__(self, optimizer: torch.optim.Optimizer, *, epochs: int, steps: int) -> Scheduler:
        _room(self.warmup_steps, steps)
        return PolyLRScheduler(
            optimizer,
            t_initial=steps,
            power=self.power,
            lr_min=0.0,
            warmup_t=self.warmup_steps,
            warmup_lr_init=0.0,
            warmup_prefix=False,
            t_in_epochs=False,
        )


def _room(warmup: int, steps: int) -> None:
    if warmup >= steps:
        raise ValueError(
            f"schedule: a warm-up of {warmup} steps leaves none of the {steps} to train in; set task.schedule.warmup_steps"
        )
