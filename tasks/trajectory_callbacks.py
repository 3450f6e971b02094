"""What an evaluation of trajectories leaves beside its scores: pictures, the rollouts themselves, and what a scene costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.scene import Scene
from tasks.rollout_file import Rollouts, save_rollouts
from tasks.scene_animations import animate_rollouts
from tasks.scene_pictures import draw_rollouts
from tasks.trajectory import Trajectory


def _on_cpu(scene: Scene) -> Scene:
    return Scene(*(value.cpu() if isinstance(value, Tensor) else value for value in scene))


class RolloutPictures(pl.Callback):
    """Draws the rollouts of the first scenes: all of them as PNG, one of them in motion.

    Args:
        folder: where they go.
        scenes: how many.
        extent: metres from the self-driving car to the sides of a picture.
        animate: suffix of the animation, ".gif" or ".mp4" (which needs ffmpeg); None for none.
    """

    def __init__(self, folder: str | Path, scenes: int = 1, extent: float = 60.0, animate: str | None = ".gif") -> None:
        self.folder, self.scenes, self.extent, self.animate = Path(folder), scenes, extent, animate
        self.drawn: list[Path] = []

    def _draw(self, trainer: pl.Trainer, task: Trajectory) -> None:
        if not trainer.is_global_zero:
            return
        for scene, states, index in task.simulated[: self.scenes - len(self.drawn)]:
            scene = _on_cpu(scene)
            path = self.folder / f"{scene.scenario_id}.png"
            draw_rollouts(scene, states.cpu(), index.cpu(), path, extent=self.extent)
            self.drawn.append(path)
            print(f"picture: {path}")
            if self.animate is not None:
                path = path.with_suffix(self.animate)
                animate_rollouts(scene, states.cpu(), index.cpu(), path, extent=self.extent)
                print(f"animation: {path}")

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: Any, *others: Any) -> None:
        self._draw(trainer, pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *others: Any) -> None:
        self._draw(trainer, pl_module)


class RolloutWriter(pl.Callback):
    """Keeps all rollouts in one file, for `tools.submission` and `tools.official_metrics`; one file a rank.

    Args:
        path: ends in .safetensors; rank n > 0 adds `-rankn` to its stem.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.kept: list[Rollouts] = []

    def _keep(self, task: Trajectory) -> None:
        self.kept += [
            Rollouts.of_scene(_on_cpu(scene), states.cpu(), index.cpu()) for scene, states, index in task.simulated
        ]

    def _write(self, trainer: pl.Trainer) -> None:
        rank = trainer.global_rank
        path = self.path if rank == 0 else self.path.with_stem(f"{self.path.stem}-rank{rank}")
        save_rollouts(path, self.kept)
        print(f"rollouts: {path}")

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: Any, *others: Any) -> None:
        self._keep(pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *others: Any) -> None:
        self._keep(pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._write(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._write(trainer)


class SceneCost(pl.Callback):
    """Logs what the first batch costs: bytes kept for the backward pass of a training step, seconds of that step, and
    milliseconds a rollout step of 0.5 s takes, all rollouts of the batch together."""

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx:
            return
        task: Trajectory = pl_module
        with torch.inference_mode(False), torch.enable_grad():
            copy = batch._replace(**{k: v.clone() for k, v in batch._asdict().items() if isinstance(v, Tensor)})
            saved = SavedBytes()
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
                loss = task.negative_log_likelihood(copy)
            if loss.requires_grad:
                loss.backward()
            step = time.perf_counter() - start
        task.zero_grad()
        start = time.perf_counter()
        task.simulate(batch)
        generated = time.perf_counter() - start
        scores = {"saved_bytes": float(saved.total), "train_step_s": step, "rollout_step_ms": 1e3 * generated / 16}
        pl_module.log_dict({f"test/model/{name}": value for name, value in scores.items()})


class SavedBytes:
    """Counts the bytes of the storages that autograd keeps, each once: `pack` is a saved-tensor hook."""

    def __init__(self) -> None:
        self.total = 0
        self.seen: set[int] = set()

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor
