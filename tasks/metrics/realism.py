"""The realism score of the Sim Agents challenge (arXiv 2305.12032): what it is made of in 2023, 2024 and 2025."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.metrics.kinematics import central_and
from tasks.metrics.likelihood import Bernoulli, Histogram, mean_where
from tasks.metrics.scene_features import SceneFeatures

KINEMATIC = "kinematic_metrics"
INTERACTIVE = "interactive_metrics"
MAP_BASED = "map_based_metrics"
BUCKETS = (KINEMATIC, INTERACTIVE, MAP_BASED)


@dataclass(frozen=True)
class Component:
    """One likelihood: the field of `SceneFeatures` it is about, its bucket, how it is estimated and what it weighs."""

    feature: str
    bucket: str
    estimate: Histogram | Bernoulli
    weight: float


@dataclass(frozen=True)
class Challenge:
    """The components of one year's score."""

    year: int
    components: tuple[Component, ...]


COMPONENTS = (
    "linear_speed",
    "linear_acceleration",
    "angular_speed",
    "angular_acceleration",
    "distance_to_nearest_object",
    "collision_indication",
    "time_to_collision",
    "distance_to_road_edge",
    "offroad_indication",
    "traffic_light_violation",
)


def _challenge(year: int, kinematic: tuple[Histogram, ...], weights: tuple[float, ...]) -> Challenge:
    estimates: tuple[Histogram | Bernoulli, ...] = (
        *kinematic,
        Histogram(-5, 40, 10),
        Bernoulli(),
        Histogram(0, 5, 10),
        Histogram(-20, 40, 10),
        Bernoulli(),
        Bernoulli(),
    )
    buckets = (KINEMATIC,) * 4 + (INTERACTIVE,) * 3 + (MAP_BASED,) * 3
    rows = zip(COMPONENTS, buckets, estimates, weights, strict=False)  # a year may lack the last components
    return Challenge(year, tuple(Component(*row) for row in rows))


_NARROW = (Histogram(0, 25, 10), Histogram(-12, 12, 11), Histogram(-0.628, 0.628, 11), Histogram(-3.14, 3.14, 11))
_WIDE = (Histogram(0, 35, 10), Histogram(-15, 15, 10), Histogram(-31.5, 31.5, 10), Histogram(-31.5, 31.5, 10))
CHALLENGE_2023 = _challenge(2023, _WIDE, (0.09, 0.09, 0.09, 0.09, 0.09, 0.18, 0.09, 0.09, 0.18))
"""Its published weights add up to 0.99, and it has no traffic lights."""
CHALLENGE_2024 = _challenge(2024, _NARROW, (0.05, 0.05, 0.05, 0.05, 0.1, 0.25, 0.1, 0.1, 0.25, 0.0))
CHALLENGE_2025 = _challenge(2025, _NARROW, (0.05, 0.05, 0.05, 0.05, 0.1, 0.25, 0.1, 0.05, 0.25, 0.05))
CHALLENGES = (CHALLENGE_2023, CHALLENGE_2024, CHALLENGE_2025)


def likelihoods(challenge: Challenge, features: SceneFeatures, parity: bool = True) -> Tensor:
    """The likelihood of the recorded future of a scene under its simulations, by component.

    Values that change over time are pooled over rollouts and steps of an object, and log probabilities averaged over
    objects and steps; what only happens or not is pooled over rollouts. The mean is taken to the power of e.

    Args:
        challenge: whose components.
        features: of the recorded future and of the rollouts.
        parity: count undefined simulated values as the greatest, as the official code does, and judge kinematics only
            where the neighbouring steps are in the future.

    Returns:
        (c,) float64 in the order of `challenge.components`; NaN where a component has no valid value in the scene or
        the scene has no road edges.
    """
    return torch.stack([_likelihood(component, features, parity) for component in challenge.components])


def _likelihood(component: Component, features: SceneFeatures, parity: bool) -> Tensor:
    values = getattr(features, component.feature)  # (e, 1 + r, s), the recorded future first
    if values is None:
        return torch.tensor(math.nan, dtype=torch.float64, device=features.valid.device)
    valid = features.valid
    if component.feature in ("time_to_collision", "traffic_light_violation"):
        valid = valid & features.is_vehicle[:, None]
    if isinstance(component.estimate, Bernoulli):
        happened = (values & valid[:, None]).any(-1)  # (e, 1 + r)
        return component.estimate.log_likelihood(happened[:, 0], happened[:, 1:]).mean().exp()
    if component.bucket == KINEMATIC:
        times = 2 if component.feature.endswith("acceleration") else 1
        valid = _neighbours_valid(features, times, parity)
    found = component.estimate.log_likelihood(values[:, 0], values[:, 1:].flatten(1), count_undefined=parity)
    return mean_where(found, valid).exp()


def _neighbours_valid(features: SceneFeatures, times: int, parity: bool) -> Tensor:
    """(e, s) whether the steps that a difference of order `times` looks at are valid."""
    valid = features.valid if parity else features.valid_with_history
    for _ in range(times):
        valid = central_and(valid)
    return valid[:, -features.valid.shape[1] :]


def weighted(challenge: Challenge, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The meta score and its buckets.

    Args:
        challenge: whose weights.
        values: likelihood of each of its components; NaN where it is undefined.

    Returns:
        `metametric`, the sum of the weighted likelihoods, and the weighted mean within each of `BUCKETS`. Components that
        are NaN are left out and the other weights scaled up in their place.
    """
    names = [component.feature for component in challenge.components]
    value = torch.stack([values[name] for name in names])
    weight = value.new_tensor([component.weight for component in challenge.components])
    known = ~value.isnan()
    value, present = torch.where(known, value, 0), weight * known
    # Over all components the mean is scaled back to the published sum of weights, which in 2023 is not 1.
    result = {"metametric": (present * value).sum() * (weight.sum() / present.sum())}
    for bucket in BUCKETS:
        inside = present * weight.new_tensor([component.bucket == bucket for component in challenge.components])
        result[bucket] = (inside * value).sum() / inside.sum()
    return result
