"""Scenes cut in time, and the rules that say which of their agents are to be predicted."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from datamodules.scene import Scene

STEPS = 91
CURRENT = 10
_BELOW_PI = 3.1415925  # the greatest float32 below π


def window(
    scene: Scene,
    start: int = 0,
    steps: int = STEPS,
    current: int = CURRENT,
    to_predict: Callable[[Scene], Tensor] | None = None,
) -> Scene:
    """Returns steps `start` to `start + steps - 1` of a scene as a scene named `scenario_id@start`.

    Agents that are valid at none of these steps are left out, but for the self-driving car; map and origin stay as they
    are, times begin at zero.

    Args:
        scene: what to cut.
        start: its step that becomes step 0.
        steps: how many.
        current: index of the current step of the window.
        to_predict: window → (k,) indices of its agents to predict, such as `MostTravelled(8)`; None keeps those of the
            scene that are left.

    Raises:
        ValueError: if the scene does not have these steps, or `current` is not one of them.
    """
    if start < 0 or start + steps > scene.steps or not 0 <= current < steps:
        raise ValueError(
            f"scene {scene.scenario_id}: steps {start} to {start + steps - 1} with current step {current} asked for, "
            f"it has {scene.steps}"
        )
    span = slice(start, start + steps)
    keep = scene.valid[:, span].any(1)
    keep[scene.sdc] = True
    place = torch.where(keep, keep.cumsum(0) - 1, -1)  # (a,) index of an agent in the window
    predicted = place[scene.to_predict] >= 0
    interest = place[scene.of_interest]
    cut = scene._replace(
        scenario_id=f"{scene.scenario_id}@{start}",
        times=scene.times[span] - scene.times[start],
        current=current,
        agent_ids=scene.agent_ids[keep],
        agent_types=scene.agent_types[keep],
        positions=scene.positions[keep, span],
        sizes=scene.sizes[keep, span],
        headings=scene.headings[keep, span],
        velocities=scene.velocities[keep, span],
        valid=scene.valid[keep, span],
        sdc=int(place[scene.sdc]),
        to_predict=place[scene.to_predict][predicted],
        difficulties=scene.difficulties[predicted],
        of_interest=interest[interest >= 0],
        light_states=scene.light_states[span],
        light_stops=scene.light_stops[span],
        light_valid=scene.light_valid[span],
    )
    if to_predict is None:
        return cut
    chosen = to_predict(cut)
    return cut._replace(to_predict=chosen, difficulties=torch.zeros_like(chosen))


def most_travelled(scene: Scene, count: int) -> Tensor:
    """Chooses the agents, other than the self-driving car and valid at every step, that end farthest from where they are.

    Returns:
        (k ≤ count,) int64 indices by falling distance between the current and the last step; of equals the smaller
        agent id comes first.
    """
    ends = scene.positions[:, [scene.current, -1]].double()
    distance = (ends[:, 1] - ends[:, 0]).norm(dim=-1)
    candidates = scene.valid.all(1)
    candidates[scene.sdc] = False
    by_id = scene.agent_ids.argsort()
    order = by_id[distance[by_id].argsort(descending=True, stable=True)]
    return order[candidates[order]][:count]


class MostTravelled:
    """`most_travelled` with its count, as a rule for `window`.

    Args:
        count: agents to predict, at most.
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def __call__(self, scene: Scene) -> Tensor:
        """(k,) indices of the agents."""
        return most_travelled(scene, self.count)


def wrap_headings(scene: Scene) -> Scene:
    """Returns the scene with headings in [−π, π)."""
    wrapped = torch.remainder(scene.headings.double() + math.pi, 2 * math.pi) - math.pi
    # Rounding to float32 may leave the interval on either side.
    return scene._replace(headings=wrapped.float().clamp(-_BELOW_PI, _BELOW_PI))


def without_lights(scene: Scene) -> Scene:
    """Returns the scene with no traffic lights."""
    return scene._replace(
        light_lanes=scene.light_lanes[:0],
        light_states=scene.light_states[:, :0],
        light_stops=scene.light_stops[:, :0],
        light_valid=scene.light_valid[:, :0],
    )
