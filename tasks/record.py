"""What a checkpoint and a run folder tell about themselves: the resolved config, the overrides, git hash and versions."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning", "torchmetrics", "hydra-core", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of what a figure depends on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {"git": git_hash(), **found}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def git_hash() -> str:
    """Commit of the tree the code runs from, with `-dirty` where it was changed; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


class Record(pl.Callback):
    """Writes `config.yaml` and `versions.yaml` into the run folder, and the same into every checkpoint under `run`."""

    def __init__(self, folder: str | Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.content = {"config": dict(config), "overrides": list(overrides), "versions": versions()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("config", "versions"):
                (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(self.content[name], sort_keys=False))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["run"] = self.content


def recorded(path: str | Path) -> dict[str, Any]:
    """The `run` entry of a checkpoint file, read without unpickling code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file isn't a checkpoint, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ckpt={path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"ckpt={path}: not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or "run" not in content:
        raise ValueError(f"ckpt={path}: wasn't written by train.py; convert foreign weights with models.convert")
    return content["run"]
