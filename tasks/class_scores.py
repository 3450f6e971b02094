"""The score of every class after an evaluation, as `classes.csv`, best first."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl


class ClassScores(pl.Callback):
    """Writes `class,NAME` rows of what the task's `class_scores` tell; classes without a truth are left out.

    Args:
        folder: where `classes.csv` goes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        names = list(cast(Any, trainer).datamodule.class_names)
        scores = {name: value for name, value in zip(names, pl_module.class_scores, strict=True) if value == value}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "classes.csv"
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", pl_module.class_score])
            writer.writerows((name, round(value, 6)) for name, value in sorted(scores.items(), key=lambda one: -one[1]))
        os.replace(partial, path)
        print(f"classes: {path}")
