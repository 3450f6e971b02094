"""A requeue signal ends the run at the next step boundary with a checkpoint, and hands the job back to SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_info


class Requeue(pl.Callback):
    """Waits for a signal, which may come to any rank; after the step in flight all ranks save `requeue.ckpt` and stop.

    Under SLURM (SLURM_JOB_ID is set) rank 0 then calls `scontrol requeue`. Resume with `ckpt=…/requeue.ckpt resume=true`;
    `scripts/train.sbatch` does so by itself. Lightning's own handler, which saves wherever the signal finds it, in
    mid-step too, stays out when it sees this one.
    """

    def __init__(self, folder: str, signal_name: str = "SIGUSR1") -> None:
        self.path = Path(folder) / "requeue.ckpt"
        self.number = signal.Signals[signal_name]
        self.asked = self.stopped = False
        self._before: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._before = signal.signal(self.number, self._ask)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self._before is not None:
            signal.signal(self.number, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        asked = torch.tensor(float(self.asked), device=pl_module.device)
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce(asked, reduce_op="sum")
        if not asked:
            return
        trainer.save_checkpoint(self.path)
        rank_zero_info(f"{self.number.name}: saved {self.path} after step {trainer.global_step}")
        trainer.should_stop = self.stopped = True
        trainer.limit_val_batches = 0
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
        if job and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", job], check=True)


class EpochCheckpoint(ModelCheckpoint):
    """Saves after epochs that ran to their end; one that `Requeue` cut short is in `requeue.ckpt` alone."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(
            isinstance(callback, Requeue) and callback.stopped for callback in getattr(trainer, "callbacks", [])
        ):
            super().on_train_epoch_end(trainer, pl_module)
