"""python evaluate.py task=imagenet ckpt=PATH …: one checkpoint at one point → one row of a table; sweep=… repeats it."""

from __future__ import annotations

import compat  # noqa: F401  isort: skip

import sys
from pathlib import Path

import hydra
import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from launch import given_arguments, one_line_errors, prepare, register_resolvers, with_overrides_of_checkpoint
from models.convert import load_checkpoint
from results import append_row, print_point, rows_of
from tasks.base import Task
from tasks.record import git_hash

register_resolvers()


@one_line_errors
def run(cfg: DictConfig) -> None:
    if cfg.ckpt is None:
        raise ValueError("evaluate.py needs ckpt=PATH")
    if cfg.split not in ("test", "val"):
        raise ValueError(f"split={cfg.split}: choose test or val")
    columns = OmegaConf.to_container(cfg.evaluation.columns, resolve=True)
    assert isinstance(columns, dict)
    why_not = _unscaled(cfg)
    if why_not is not None and columns.get("scaling") != "identity":
        print(f"{cfg.label} {why_not}: {columns.get('scaling')} is left out")
        return
    prepare(cfg)
    pl.seed_everything(cfg.seed, workers=True)
    datamodule: pl.LightningDataModule = instantiate(cfg.datamodule)
    task: Task = instantiate(cfg.task)
    load_checkpoint(task.model, cfg.weights, entry="average" if cfg.average else None)
    task.evaluate_at(**OmegaConf.to_container(cfg.evaluation.point, resolve=True))  # type: ignore[arg-type]
    callbacks = [callback for callback in instantiate(cfg.evaluation.callbacks).values() if callback is not None]
    trainer: pl.Trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, callbacks=callbacks)
    measure = trainer.test if cfg.split == "test" else trainer.validate
    (metrics,) = measure(task, datamodule=datamodule, verbose=False)
    if trainer.is_global_zero:
        about = {"split": cfg.split, "ckpt": cfg.weights, "git": git_hash()}
        rows = [{**columns, **row, **about} for row in rows_of(metrics, cfg.evaluation.get("rows", "policy"))]
        for row in rows:
            append_row(cfg.results, row)
        if rows:
            print_point(rows)


def _unscaled(cfg: DictConfig) -> str | None:
    """Why scalings are nothing for this model, if they are nothing."""
    if None in (cfg.model.get("rotary", True), cfg.get("position", {}).get("rotary", True)):
        return "has no rotary to scale"
    if cfg.evaluation.get("scaled_with", True) is None:
        return "turns no further in a longer context, so nothing is scaled"
    return None


main = hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "configs"), config_name="evaluate")(run)

if __name__ == "__main__":
    # not from __main__, so that a launcher's worker imports this file, compat first
    from evaluate import main as imported

    given_arguments(sys.argv)
    with_overrides_of_checkpoint(sys.argv)
    imported()
