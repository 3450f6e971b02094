"""python train.py task=imagenet …: compose → instantiate → fit."""

from __future__ import annotations

import compat  # noqa: F401  isort: skip

import sys
from pathlib import Path

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from launch import given_arguments, one_line_errors, prepare, register_resolvers
from models.convert import load_backbone, load_checkpoint
from tasks.base import Task
from tasks.record import Record, recorded

register_resolvers()


@one_line_errors
def run(cfg: DictConfig) -> None:
    if cfg.resume and cfg.ckpt is None:
        raise ValueError("resume=true needs ckpt=PATH")
    pretrained = None if cfg.resume else cfg.get("pretrained")  # a requeued job keeps its command
    if cfg.ckpt is not None and pretrained is not None:
        raise ValueError("ckpt and pretrained both give weights: choose one")
    if cfg.resume:
        recorded(cfg.ckpt)
    prepare(cfg)
    pl.seed_everything(cfg.seed, workers=True)
    folder = Path(HydraConfig.get().runtime.output_dir)

    datamodule: pl.LightningDataModule = instantiate(cfg.datamodule)
    task: Task = instantiate(cfg.task)
    if cfg.ckpt is not None:  # resuming, this only checks that the weights fit
        load_checkpoint(task.model, cfg.ckpt, resize=not cfg.resume)
    if pretrained is not None:
        print(f"pretrained: {load_backbone(task.model, pretrained)}")
    record = Record(folder, OmegaConf.to_container(cfg, resolve=True), HydraConfig.get().overrides.task)  # type: ignore[arg-type]
    callbacks = [*(one for one in instantiate(cfg.callbacks).values() if one is not None), record]
    loggers = [logger for logger in instantiate(cfg.loggers).values() if logger is not None]
    trainer: pl.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    trainer.fit(task, datamodule=datamodule, ckpt_path=cfg.ckpt if cfg.resume else None, weights_only=True)
    if trainer.is_global_zero:
        print(f"run folder: {folder}")


main = hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "configs"), config_name="train")(run)

if __name__ == "__main__":
    # not from __main__, so that a launcher's worker imports this file, compat first
    from train import main as imported

    given_arguments(sys.argv)
    imported()
