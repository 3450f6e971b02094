"""The tables of the three challenges and how a score is made of likelihoods."""

import math

import pytest
import torch

from tasks.metrics.likelihood import Bernoulli
from tasks.metrics.realism import (
    BUCKETS,
    CHALLENGE_2023,
    CHALLENGE_2024,
    CHALLENGE_2025,
    CHALLENGES,
    COMPONENTS,
    INTERACTIVE,
    KINEMATIC,
    MAP_BASED,
    weighted,
)


def total(challenge):
    return sum(component.weight for component in challenge.components)


def test_weights_sum_to_one():
    assert total(CHALLENGE_2024) == pytest.approx(1, abs=1e-12)
    assert total(CHALLENGE_2025) == pytest.approx(1, abs=1e-12)
    assert total(CHALLENGE_2023) == pytest.approx(0.99, abs=1e-12)  # as published


def test_components_of_the_years():
    for challenge in CHALLENGES:
        names = tuple(component.feature for component in challenge.components)
        assert names == (COMPONENTS[:-1] if challenge.year == 2023 else COMPONENTS)
        happens = {c.feature for c in challenge.components if isinstance(c.estimate, Bernoulli)}
        assert happens <= {"collision_indication", "offroad_indication", "traffic_light_violation"}
    differing = [
        new.feature for old, new in zip(CHALLENGE_2024.components, CHALLENGE_2025.components, strict=True) if old != new
    ]
    assert differing == ["distance_to_road_edge", "traffic_light_violation"]


def likelihood_of_each():
    return {name: torch.tensor(0.1 + 0.08 * k, dtype=torch.float64) for k, name in enumerate(COMPONENTS)}


def test_the_score_is_the_weighted_sum_and_splits_into_buckets():
    values = likelihood_of_each()
    for challenge in CHALLENGES:
        scores = weighted(challenge, values)
        by_hand = sum(c.weight * values[c.feature].item() for c in challenge.components)
        assert scores["metametric"].item() == pytest.approx(by_hand, abs=1e-12)
        share = {b: sum(c.weight for c in challenge.components if c.bucket == b) for b in BUCKETS}
        assert sum(share[b] * scores[b].item() for b in BUCKETS) == pytest.approx(by_hand, abs=1e-12)
    ones = {name: torch.tensor(1.0, dtype=torch.float64) for name in COMPONENTS}
    assert weighted(CHALLENGE_2025, ones)["metametric"].item() == pytest.approx(1, abs=1e-12)


def test_undefined_components_leave_their_weight_to_the_others():
    values = likelihood_of_each()
    for name in ("distance_to_road_edge", "offroad_indication"):
        values[name] = torch.tensor(math.nan, dtype=torch.float64)
    scores = weighted(CHALLENGE_2025, values)
    left = [c for c in CHALLENGE_2025.components if not values[c.feature].isnan()]
    by_hand = sum(c.weight * values[c.feature].item() for c in left) / sum(c.weight for c in left)
    assert scores["metametric"].item() == pytest.approx(by_hand, abs=1e-12)
    assert scores[MAP_BASED] == values["traffic_light_violation"]
    assert not scores[KINEMATIC].isnan()
    assert not scores[INTERACTIVE].isnan()
