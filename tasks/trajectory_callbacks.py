"""What an evaluation of trajectories leaves beside its scores: pictures, the rollouts themselves, and what a scene costs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.batches import SceneBatch
from datamodules.scene import Scene
from models.agent_tokens import AgentTokens, MapTokens
from models.poses import compose
from models.rollout import STEPS
from tasks.rollout_file import Rollouts, save_rollouts
from tasks.scene_animations import animate_rollouts
from tasks.scene_pictures import draw_rollouts
from tasks.trajectory import Trajectory, map_tokens


def _on_cpu(scene: Scene) -> Scene:
    moved: dict[str, Any] = {name: value.cpu() for name, value in scene._asdict().items() if isinstance(value, Tensor)}
    return scene._replace(**moved)


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
    """Keeps all rollouts in files, for `tools.submission` and `tools.official_metrics`.

    Args:
        path: ends in .safetensors. Of several files the n-th has `-n` after its stem, and that of rank r > 0 `-rankr`.
        most: scenes in a file; so many are held in memory, 80 kB an agent.

    Raises:
        ValueError: `most` isn't positive.
    """

    def __init__(self, path: str | Path, most: int = 500) -> None:
        if most < 1:
            raise ValueError(f"evaluation.callbacks.rollouts.most is {most}, expected at least 1")
        self.path, self.most, self.files = Path(path), most, 0
        self.kept: list[Rollouts] = []

    def _keep(self, trainer: pl.Trainer, task: Trajectory) -> None:
        for scene, states, index in task.simulated:
            if len(self.kept) == self.most:
                self._write(trainer)
            self.kept.append(Rollouts.of_scene(_on_cpu(scene), states.cpu(), index.cpu()))

    def _write(self, trainer: pl.Trainer) -> None:
        rank, number = trainer.global_rank, self.files
        stem = self.path.stem + (f"-{number}" if number else "") + (f"-rank{rank}" if rank else "")
        path = self.path.with_stem(stem)
        save_rollouts(path, self.kept)
        print(f"rollouts: {path}")
        self.files, self.kept = number + 1, []

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: Any, *others: Any) -> None:
        self._keep(trainer, pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *others: Any) -> None:
        self._keep(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._write(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._write(trainer)


class FrameProbe(pl.Callback):
    """Logs the loss where nothing has changed but how poses are written: whole turns added to headings, at random and up to
    two, and the frame turned by half a turn. What is exact about headings and frames doesn't notice."""

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *others: Any) -> None:
        self._probe(pl_module, batch, "test")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *others: Any
    ) -> None:
        self._probe(pl_module, batch, "val")

    def _probe(self, task: Trajectory, batch: SceneBatch, stage: str) -> None:
        recorded, map, trains = task.tokens(batch), map_tokens(batch), batch.agent_trains
        half_turned = recorded._replace(futures=_half_turn(recorded.futures))
        written = {
            "whole_turns": (_with_turns(recorded.tokens), _with_turns(map), recorded),
            "half_turned_frame": (_half_turned(recorded.tokens), _half_turned(map), half_turned),
        }
        for name, (tokens, pieces, truth) in written.items():
            loss = task.cost(tokens, pieces, truth, trains)
            task.log(f"{stage}/model/loss_{name}", loss, on_epoch=True, sync_dist=True, batch_size=task._weight(batch))


Placed = TypeVar("Placed", AgentTokens, MapTokens)


def _with_turns(tokens: Placed) -> Placed:
    turns = torch.randint(-2, 3, tokens.valid.shape, device=tokens.pose.device)
    added = torch.stack((torch.zeros_like(turns), torch.zeros_like(turns), turns), dim=-1)
    return tokens._replace(pose=tokens.pose + 2 * math.pi * added)


def _half_turn(pose: Tensor) -> Tensor:
    return compose(pose.new_tensor([0.0, 0.0, math.pi]), pose)


def _half_turned(tokens: Placed) -> Placed:
    return tokens._replace(pose=_half_turn(tokens.pose))


class SceneCost(pl.Callback):
    """Logs what the first batch costs: bytes kept for the backward pass of a training step, seconds of that step, and
    milliseconds a rollout step of 0.5 s takes, all rollouts of the batch together."""

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not batch_idx:
            self._measure(pl_module, batch, "test")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not batch_idx:
            self._measure(pl_module, batch, "val")

    def _measure(self, task: Trajectory, batch: SceneBatch, stage: str) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            tensors: dict[str, Any] = {k: v.clone() for k, v in batch._asdict().items() if isinstance(v, Tensor)}
            copy = batch._replace(**tensors)
            saved = SavedBytes()
            start = _time(task.device)
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
                loss = task.negative_log_likelihood(copy)
            if loss.requires_grad:
                loss.backward()
            step = _time(task.device) - start
        task.zero_grad()
        start = _time(task.device)
        task.simulate(batch)
        generated = _time(task.device) - start
        scores = {"saved_bytes": float(saved.total), "train_step_s": step, "rollout_step_ms": 1e3 * generated / STEPS}
        task.log_dict({f"{stage}/model/{name}": value for name, value in scores.items()})


def _time(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
