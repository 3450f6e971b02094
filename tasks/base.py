"""`Task`: what every training shares. A task adds two methods, `loss` and `measure`; the model stays a plain module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tasks.parameter_groups import Grouping, Groups, plain
from tasks.schedules import Schedule

Batch = TypeVar("Batch")


class Task(pl.LightningModule, Generic[Batch]):
    """Loss, schedule, logging and the guard against NaN, around a model.

    Args:
        model: the network; its `no_weight_decay()`, and its parts', name parameters spared from decay, beside biases and
            1D ones.
        optimizer: makes the optimizer from parameter groups.
        weight_decay: of the decayed group.
        schedule: learning rate over the run; None keeps it constant.
        groups: model, weight decay → parameter groups, whose `lr_scale` the schedule obeys.
        compile: run the model, or its backbone where it has one, through torch.compile, in place, so that checkpoints
            don't notice.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[Mapping[str, Any]]], torch.optim.Optimizer],
        *,
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        groups: Grouping = plain,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer, self.weight_decay, self.schedule = optimizer, weight_decay, schedule
        self.make_groups = groups
        if compile:
            getattr(model, "backbone", model).compile()

    @abstractmethod
    def loss(self, batch: Batch) -> Mapping[str, Tensor]:
        """Named parts of the loss of a batch, scalars; their sum is minimised."""

    @abstractmethod
    def measure(self, batch: Batch) -> Mapping[str, Any]:
        """Update the metrics with a held-out batch and return those to log."""

    def batch_size(self, batch: Batch) -> int:
        """What a batch weighs in a mean over batches: the length of its first tensor."""
        return len(cast("tuple[Tensor, ...]", batch)[0])

    def evaluate_at(self) -> None:
        """Prepare the model for a point of an evaluation; tasks that take arguments get them from `evaluation.point`."""

    def on_fit_start(self) -> None:
        """Ranks draw their own drop paths and augmentations; weights were made from one seed and stay equal."""
        if self.trainer.world_size > 1:
            pl.seed_everything(torch.initial_seed() % 2**32 + self.global_rank, workers=True, verbose=False)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        parts = self.loss(batch)
        total = torch.stack(list(parts.values())).sum()
        if not torch.isfinite(total):
            values = ", ".join(f"{name}={float(part.detach())}" for name, part in parts.items())
            raise FloatingPointError(
                f"loss is {float(total.detach())} ({values}) at epoch {self.current_epoch}, step {self.global_step}; "
                "stopped before the step: lower task.optimizer.lr, or train in trainer.precision=32-true"
            )
        scores = {f"train/{name}": part for name, part in parts.items()}
        self.log_dict(scores, prog_bar=True, batch_size=self.batch_size(batch))
        return total

    def validation_step(self, batch: Batch, index: int) -> None:
        scores = {f"val/{name}": value for name, value in self.measure(batch).items()}
        self.log_dict(scores, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=self._weight(batch))

    def test_step(self, batch: Batch, index: int) -> None:
        scores = {f"test/{name}": value for name, value in self.measure(batch).items()}
        self.log_dict(scores, on_epoch=True, sync_dist=True, batch_size=self._weight(batch))

    def _weight(self, batch: Batch) -> int:
        # Lightning averages the sum of weights over ranks; of whole numbers it would drop the fraction where ranks differ
        return cast(int, float(self.batch_size(batch)))

    def configure_model(self) -> None:
        """Shard block by block under FSDP2; other strategies need nothing."""
        mesh = self.device_mesh
        if mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        for block in self.blocks():
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def blocks(self) -> list[nn.Module]:
        """The repeated parts of the model, each gathered alone under FSDP2: members of what timm calls `blocks`."""
        groups = [module for name, module in self.model.named_modules() if name.split(".")[-1] == "blocks"]
        return [block for group in groups for block in group.children()]

    def parameter_groups(self) -> Groups:
        """As `groups` divides the model. Frequencies, absolute embeddings and class tokens are spared from decay by name."""
        return self.make_groups(self.model, self.weight_decay)

    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
        optimizer = self.make_optimizer(groups)
        if self.schedule is None:
            if any(group.get("lr_scale", 1.0) != 1.0 for group in groups):
                raise ValueError("task.groups scales learning rates, which only a schedule applies: give task.schedule")
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        if self.trainer.ckpt_path is not None:
            # counting made the loader before Lightning read where it stood; made again, it goes on from there
            self.trainer.fit_loop._combined_loader = None
        scheduler = self.schedule(optimizer, epochs=self.trainer.max_epochs or 1, steps=steps)
        interval = "epoch" if self.schedule.by_epoch else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self.schedule is not None and self.schedule.by_epoch:
            scheduler.step(self.current_epoch + 1)
        else:
            scheduler.step_update(self.global_step)
