"""Rollouts that nothing has learned, to be scored beside a model: constant velocity, and replay of the log."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.scene import Scene
from models.poses import wrapped

STEP = 0.1  # seconds


def constant_velocity(
    scene: Scene, rollouts: int = 32, *, steps: int = 80, spread: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Every agent goes on with its current velocity; z and heading are held.

    Rollout r multiplies velocities by a factor that runs evenly from 1 − spread to 1 + spread, so that rollouts differ as
    the realism score wants; a single rollout takes the factor 1.

    Returns:
        states (a, rollouts, steps, 4) float32, x, y, z in the scene's coordinates and heading in [−π, π); and the agents
        (a,) that they belong to, `scene.simulated()`.

    Raises:
        ValueError: fewer than one rollout or step, or a negative spread.
    """
    if rollouts < 1 or steps < 1 or spread < 0:
        raise ValueError(
            f"constant_velocity: need rollouts ≥ 1, steps ≥ 1, spread ≥ 0; got {rollouts}, {steps}, {spread}"
        )
    index = scene.simulated()
    device = scene.positions.device
    factors = torch.linspace(1 - spread, 1 + spread, rollouts) if rollouts > 1 else torch.ones(1)
    factors = factors.to(device)  # made on the CPU, to be the same on all devices
    seconds = STEP * torch.arange(1, steps + 1, dtype=torch.float64, device=device)
    travelled = factors.double()[:, None] * seconds  # (r, t)
    velocity = scene.velocities[index, scene.current].double()
    states = torch.cat(
        (scene.positions[index, scene.current], wrapped(scene.headings[index, scene.current])[:, None]), dim=-1
    )
    states = states[:, None, None].repeat(1, rollouts, steps, 1)
    moved = states[..., :2].double() + velocity[:, None, None] * travelled[None, ..., None]
    states[..., :2] = moved.float()
    return states, index


def log_replay(scene: Scene, rollouts: int = 1, *, steps: int = 80) -> tuple[Tensor, Tensor]:
    """What was recorded, in every rollout alike; an agent that the log loses stands at its last valid state.

    Returns:
        states (a, rollouts, steps, 4) and agents (a,), as `constant_velocity`.

    Raises:
        ValueError: fewer than one rollout or step, or the scene records fewer future steps, as those of a test split do.
    """
    if rollouts < 1 or steps < 1:
        raise ValueError(f"log_replay: need rollouts ≥ 1 and steps ≥ 1; got {rollouts}, {steps}")
    recorded = scene.steps - scene.current - 1
    if recorded < steps:
        raise ValueError(
            f"log_replay: scene {scene.scenario_id} records {recorded} future steps, {steps} are asked for"
        )
    index, span = scene.simulated(), slice(scene.current, scene.current + steps + 1)
    number = torch.arange(steps + 1, device=index.device).expand(len(index), -1)
    last = torch.where(scene.valid[index, span], number, 0).cummax(dim=1).values[:, 1:]  # the current step is valid
    logged = torch.cat((scene.positions, wrapped(scene.headings)[..., None]), dim=-1)[index, span]
    states = logged.gather(1, last[..., None].expand(-1, -1, 4))
    return states[:, None].repeat(1, rollouts, 1, 1), index
