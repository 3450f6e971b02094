"""An exponential moving average of the weights, stored beside them in every checkpoint, never used in training."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from timm.utils import ModelEmaV3


class StoredAverage(pl.Callback):
    """Keeps timm's `ModelEmaV3` of the model, updated after every step of the optimizer.

    Checkpoints carry it under `average` (RoPE-ViT stores it, decay 0.99996).
    """

    def __init__(self, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"StoredAverage: decay must lie in (0, 1), got {decay}")
        self.decay = decay
        self.average: ModelEmaV3 | None = None
        self._resumed: dict[str, Any] | None = None
        self._step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "StoredAverage can't copy sharded weights: leave it out with ~callbacks.average, or use trainer=ddp"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = ModelEmaV3(pl_module.model, decay=self.decay)
        if self._resumed is not None:
            self.average.module.load_state_dict(self._resumed)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.average is not None and trainer.global_step != self._step:  # gradients may be accumulated
            self.average.update(pl_module.model)
            self._step = trainer.global_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.average is not None:
            checkpoint["average"] = self.average.module.state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = checkpoint.get("average")
