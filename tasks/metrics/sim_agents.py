"""Realism of simulated traffic by the rules of the Waymo Open Sim Agents Challenge (arXiv 2305.12032), as a torchmetrics
metric.

The rules are those of the code that Waymo publishes in `waymo_open_dataset/wdl_limited/sim_agents_metrics` under a
BSD-3-Clause licence with an additional, limited grant of patent rights: to process the Waymo Open Dataset for evaluating
entries to the Sim Agents challenge. It names the applications US 18/603,102 and US 63/563,894. This module is written anew
and carries no such grant; whoever uses it for anything else should look at those applications first.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.scene import Scene
from tasks.metrics.realism import CHALLENGE_2025, CHALLENGES, Challenge, likelihoods, weighted
from tasks.metrics.scene_features import FUTURE, SceneFeatures, scene_features

_RATES = ("collision_indication", "offroad_indication", "traffic_light_violation")
_ADDED = (
    "average_displacement_error",
    "min_average_displacement_error",
    "min_future_displacement_error",
    "simulated_collision_rate",
    "simulated_offroad_rate",
    "simulated_traffic_light_violation_rate",
)


class SimAgents(Metric):
    """Means over scenes of the likelihoods of recorded futures under simulations, and the scores made of them.

    `compute()` gives, as float64 scalars named as in Waymo's protos: `metametric`, `kinematic_metrics`,
    `interactive_metrics`, `map_based_metrics` and `<component>_likelihood` of the chosen challenge; `metametric_<year>` of
    every challenge; `average_displacement_error` and `min_average_displacement_error`, over all recorded steps
    including the error-free history, and `min_future_displacement_error`, over future steps alone; the simulated
    collision, offroad and traffic light violation rates; and `scenarios`, the number of scenes.

    Args:
        challenge: whose likelihoods, buckets and `metametric` are given.
        parity: follow the official code to the letter, so that scores compare with published ones. Otherwise its slips are
            put right, and a component that a scene leaves undefined is left out for that scene.
        check: whether `update` looks for NaN, which waits for the device.
        kwargs: of torchmetrics.Metric.
    """

    higher_is_better = True
    full_state_update = False
    likelihood_sums: Tensor
    likelihood_counts: Tensor
    added_sums: Tensor
    added_counts: Tensor
    scenarios: Tensor

    def __init__(
        self, challenge: Challenge = CHALLENGE_2025, parity: bool = True, check: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.challenge, self.parity, self.check = challenge, parity, check
        self.challenges = tuple(dict.fromkeys((challenge, *CHALLENGES)))
        width = max(len(each.components) for each in self.challenges)
        table = torch.zeros(len(self.challenges), width, dtype=torch.float64)
        self.add_state("likelihood_sums", table, dist_reduce_fx="sum")
        self.add_state("likelihood_counts", table.clone(), dist_reduce_fx="sum")
        self.add_state("added_sums", torch.zeros(len(_ADDED), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("added_counts", torch.zeros(len(_ADDED), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("scenarios", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, scene: Scene, states: Tensor, index: Tensor) -> None:
        """Adds one scene.

        Args:
            scene: with 80 steps behind the current one, and the agents to score in `to_predict`.
            states: (a, r, 80, 4) x, y, z in metres in the coordinates of the scene and heading in radians, of r rollouts
                (the challenge asks for 32).
            index: (a,) int64 agents of the scene, in any order: those valid at the current step and no other.

        Raises:
            ValueError: names the scenario, and where there is one the object: wrong shapes, an agent missing, repeated or
                not to be simulated, a scored agent that is not valid at the current step, a state that is not finite;
                with `parity` also a scene whose official score is undefined, such as one without road edges.
        """
        _check(scene, states, index, self.check)
        features = scene_features(scene, states, index, self.parity)
        if self.parity and features.distance_to_road_edge is None:
            raise ValueError(
                f"scenario {scene.scenario_id}: no road edges, so the official score is undefined; "
                "parity=False leaves out what depends on them"
            )
        found = [likelihoods(challenge, features, self.parity) for challenge in self.challenges]
        if self.parity:
            self._refuse_undefined(scene.scenario_id, found)
        rates = (_rate(getattr(features, name), features.valid) for name in _RATES)
        added = torch.stack((*_displacements(features), *rates))
        home = self.scenarios.device
        for row, values in enumerate(each.to(home) for each in found):
            known = ~values.isnan()
            self.likelihood_sums[row, : len(values)] += torch.where(known, values, 0)
            self.likelihood_counts[row, : len(values)] += known
        added = added.to(home)
        known = ~added.isnan()
        self.added_sums += torch.where(known, added, 0)
        self.added_counts += known
        self.scenarios += 1

    def _refuse_undefined(self, scenario_id: str, found: list[Tensor]) -> None:
        for challenge, values in zip(self.challenges, found, strict=True):
            undefined = values.isnan().tolist()
            if any(undefined):
                name = challenge.components[undefined.index(True)].feature
                raise ValueError(
                    f"scenario {scenario_id}: the scored agents have no valid value of {name}, so the official score is "
                    "undefined; parity=False leaves it out"
                )

    def compute(self) -> dict[str, Tensor]:
        """The scores of all scenes so far, see the class; NaN where nothing was measured."""
        means = self.likelihood_sums / self.likelihood_counts
        result: dict[str, Tensor] = {}
        for row, challenge in enumerate(self.challenges):
            values = {part.feature: means[row, column] for column, part in enumerate(challenge.components)}
            scores = weighted(challenge, values)
            if challenge is self.challenge:
                result |= scores
                result |= {f"{name}_likelihood": value for name, value in values.items()}
            if challenge in CHALLENGES:
                result[f"metametric_{challenge.year}"] = scores["metametric"]
        result |= dict(zip(_ADDED, (self.added_sums / self.added_counts).unbind(), strict=True))
        return result | {"scenarios": self.scenarios.clone()}


def _displacements(features: SceneFeatures) -> tuple[Tensor, Tensor, Tensor]:
    """Mean displacement, its minimum over rollouts, and that minimum over future steps alone."""
    error = torch.where(features.valid[:, None], features.displacement, 0).double().sum(-1)  # (e, r)
    official = error / features.valid_with_history.sum(-1)[:, None]
    future = features.valid.sum(-1)[:, None]
    seen = future.flatten() > 0
    own = (error / future)[seen].mean(0) if seen.any() else official.new_full((1,), torch.nan)
    return official.mean(), official.mean(0).amin(), own.amin()


def _rate(happened: Tensor | None, valid: Tensor) -> Tensor:
    """Share of agents and rollouts in which it happened at a step that the record knows; NaN where undefined."""
    if happened is None:
        return torch.tensor(torch.nan, dtype=torch.float64, device=valid.device)
    return (happened[:, 1:] & valid[:, None]).any(-1).double().mean()


def _check(scene: Scene, states: Tensor, index: Tensor, finite: bool) -> None:
    name = f"scenario {scene.scenario_id}"
    if states.ndim != 4 or states.shape[2:] != (FUTURE, 4) or states.shape[1] < 1:
        raise ValueError(f"{name}: states must be (agents, rollouts, {FUTURE}, 4), got {tuple(states.shape)}")
    if states.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: states must be float32 or float64, got {states.dtype}")
    if index.shape != states.shape[:1]:
        raise ValueError(f"{name}: index has shape {tuple(index.shape)}, states have {len(states)} agents")
    if scene.steps != scene.current + 1 + FUTURE:
        raise ValueError(
            f"{name}: needs {FUTURE} steps behind the current step {scene.current}, "
            f"has {scene.steps - scene.current - 1}"
        )
    given = index.tolist()
    outside = [place for place in given if not 0 <= place < scene.agents]
    if outside:
        raise ValueError(f"{name}: index {outside[0]} is not one of its {scene.agents} agents")
    ids, wanted = scene.agent_ids.tolist(), scene.simulated().tolist()
    repeated = [place for place, count in Counter(given).items() if count > 1]
    for places, fault in (
        (repeated, "given twice"),
        (sorted(set(given) - set(wanted)), f"given, but not valid at step {scene.current}"),
        (sorted(set(wanted) - set(given)), "missing from the states"),
        (sorted(set(scene.scored().tolist()) - set(wanted)), f"to be scored, but not valid at step {scene.current}"),
    ):
        if places:
            raise ValueError(f"{name}: object {ids[places[0]]} is {fault}")
    if finite:
        broken = ~states.flatten(1).isfinite().all(1)
        if broken.any():
            raise ValueError(f"{name}: object {ids[given[int(broken.int().argmax())]]} has a state that is not finite")
