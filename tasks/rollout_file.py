"""Simulated rollouts of many scenarios in one safetensors file, in the coordinates of the recorded files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.scene import Scene

STEPS = 80
VALUES = 4
FORMAT = {"format": "rollouts", "version": "1"}


class Rollouts(NamedTuple):
    """Rollouts of one scenario.

    Attributes:
        scenario_id: the dataset's name of the scenario.
        agent_ids: (a,) int64, the file's ids of the simulated agents.
        states: (a, r, 80, 4) float64: x, y, z in metres and heading in radians, in the coordinates of the file.
    """

    scenario_id: str
    agent_ids: Tensor
    states: Tensor

    @classmethod
    def of_scene(cls, scene: Scene, states: Tensor, index: Tensor) -> Rollouts:
        """Rollouts in the coordinates of a scene, for its agents `index` (a,), moved to those of its file.

        Raises:
            ValueError: if the shapes disagree.
        """
        if states.shape[:1] != index.shape or index.ndim != 1:
            raise ValueError(
                f"scenario {scene.scenario_id}: states {tuple(states.shape)} and index {tuple(index.shape)} disagree"
            )
        placed = states.detach().cpu().double().clone()
        placed[..., :3] += scene.origin
        return cls(scene.scenario_id, scene.agent_ids[index.cpu()], placed)

    def in_scene(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """States (a, r, 80, 4) float64 in the coordinates of the scene, and the indices (a,) of their agents there.

        Raises:
            ValueError: if the scene is another or lacks one of the agents.
        """
        if scene.scenario_id != self.scenario_id:
            raise ValueError(f"rollouts of scenario {self.scenario_id} don't belong to scenario {scene.scenario_id}")
        place = {identity: index for index, identity in enumerate(scene.agent_ids.tolist())}
        missing = [identity for identity in self.agent_ids.tolist() if identity not in place]
        if missing:
            raise ValueError(f"scenario {scene.scenario_id}: rollouts of object {missing[0]}, which the scenario lacks")
        index = torch.tensor([place[identity] for identity in self.agent_ids.tolist()], dtype=torch.int64)
        local = self.states.clone()
        local[..., :3] -= scene.origin
        return local, index


def _check(rollouts: Rollouts, place: str) -> None:
    identity, agents, states = rollouts
    where = f"{place}: scenario {identity}"
    if not identity or "/" in identity:
        raise ValueError(f"{place}: {identity!r} can't name a scenario")
    if agents.dtype != torch.int64 or states.dtype != torch.float64:
        raise ValueError(f"{where}: ids are {agents.dtype} and states {states.dtype}, expected int64 and float64")
    if states.ndim != 4 or states.shape[2:] != (STEPS, VALUES) or agents.shape != states.shape[:1]:
        raise ValueError(
            f"{where}: ids {tuple(agents.shape)} and states {tuple(states.shape)}, expected (a,) and "
            f"(a, r, {STEPS}, {VALUES})"
        )
    if len(agents.unique()) != len(agents):
        raise ValueError(f"{where}: an object occurs twice")
    finite = states.isfinite().all(-1)
    if not bool(finite.all()):
        agent, rollout, step = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{where}: object {int(agents[agent])}, rollout {rollout}, step {step}: a state isn't finite")


def save_rollouts(path: str | Path, rollouts: Iterable[Rollouts]) -> None:
    """Write the file whole or not at all; all rollouts are held in memory, so split large sets over several files.

    Raises:
        ValueError: if shapes, types or values are wrong or a scenario occurs twice; names scenario and object.
        OSError: if the file can't be written.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for one in rollouts:
        _check(one, str(path))
        if f"{one.scenario_id}/ids" in tensors:
            raise ValueError(f"{path}: scenario {one.scenario_id} occurs twice")
        tensors[f"{one.scenario_id}/ids"] = one.agent_ids.contiguous()
        tensors[f"{one.scenario_id}/states"] = one.states.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=FORMAT)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


class RolloutFile:
    """A file that `save_rollouts` wrote; rollouts are read scenario by scenario, when asked for.

    Args:
        path: the file.

    Raises:
        OSError: if it can't be opened.
        ValueError: if it is no such file or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file of rollouts")
        try:
            self._file = safe_open(self.path, framework="pt")
            metadata = self._file.metadata() or {}
            keys = list(self._file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or cut short ({error})") from error
        if {name: metadata.get(name) for name in FORMAT} != FORMAT:
            raise ValueError(f"{path}: not a file of rollouts, version {FORMAT['version']} (its metadata: {metadata})")
        names = [key.rsplit("/", 1) for key in keys]
        self.scenario_ids = sorted({parts[0] for parts in names})
        expected = {f"{identity}/{part}" for identity in self.scenario_ids for part in ("ids", "states")}
        if set(keys) != expected:
            raise ValueError(f"{path}: key {sorted(expected ^ set(keys))[0]} is missing or unknown")

    def __len__(self) -> int:
        return len(self.scenario_ids)

    def __contains__(self, scenario_id: str) -> bool:
        return scenario_id in self.scenario_ids

    def __getitem__(self, scenario_id: str) -> Rollouts:
        """Rollouts of one scenario.

        Raises:
            KeyError: if the file has none.
            ValueError: if they are damaged; names scenario and object.
        """
        if scenario_id not in self:
            raise KeyError(f"{self.path}: no rollouts of scenario {scenario_id}")
        agents, states = (self._file.get_tensor(f"{scenario_id}/{part}") for part in ("ids", "states"))
        rollouts = Rollouts(scenario_id, agents, states)
        _check(rollouts, str(self.path))
        return rollouts

    def __iter__(self) -> Iterator[Rollouts]:
        return (self[identity] for identity in self.scenario_ids)
