"""python evaluate.py task=imagenet ckpt=PATH …: one checkpoint at one point → one row of a table; sweep=… repeats it."""

from __future__ import annotations

import compat  # noqa: F401  isort: skip

import sys
from pathlib import Path
from typing import Any, cast

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from launch import one_line_errors, prepare, register_resolvers, with_overrides_of_checkpoint
from models.convert import load_checkpoint
from results import append_row
from tasks.base import Task
from tasks.record import git_hash

register_resolvers()


@one_line_errors
def run(cfg: DictConfig) -> None:
    if cfg.ckpt is None:
        raise ValueError("evaluate.py needs ckpt=PATH")
    if cfg.split not in ("test", "val"):
        raise ValueError(f"split={cfg.split}: choose test or val")
    scaling = HydraConfig.get().runtime.choices.get("rotary/scaling", "identity")
    if cfg.model.rotary is None and scaling != "identity":
        print(f"{cfg.label} has no rotary to scale: {scaling} is left out")
        return
    prepare(cfg)
    pl.seed_everything(cfg.seed, workers=True)
    datamodule: pl.LightningDataModule = instantiate(cfg.datamodule)
    task: Task = instantiate(cfg.task)
    load_checkpoint(task.model, cfg.ckpt)
    size, model = cfg.resolution, task.model
    cast(Any, model).set_input_size((size, size) if isinstance(size, int) else tuple(size))
    trainer: pl.Trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False)
    measure = trainer.test if cfg.split == "test" else trainer.validate
    (metrics,) = measure(task, datamodule=datamodule, verbose=False)
    row = {
        "model": cfg.label,
        "resolution": str(size) if isinstance(size, int) else "x".join(str(side) for side in size),
        "scaling": scaling,
        **{name.split("/")[-1]: round(value, 6) for name, value in metrics.items()},
        "split": cfg.split,
        "trained_at": cfg.image_size,
        "ckpt": cfg.ckpt,
        "git": git_hash(),
    }
    if trainer.is_global_zero:
        append_row(cfg.results, row)
        print("  ".join(f"{key}={value}" for key, value in row.items()))


main = hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "configs"), config_name="evaluate")(run)

if __name__ == "__main__":
    # not from __main__, so that a launcher's worker imports this file, compat first
    from evaluate import main as imported

    with_overrides_of_checkpoint(sys.argv)
    imported()
