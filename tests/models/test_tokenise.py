"""Tracks as motions: no drift, gaps, births, headings that jump, and padding that can hold anything."""

import math

import pytest
import torch

from models.agent_tokens import MotionState
from models.kinematic_head import KinematicHead
from models.mixture_head import MixtureHead
from models.poses import compose, wrap
from models.token_head import TokenHead
from models.tokenise import continue_backwards, steady_headings, tokenise
from models.vocabulary import sampled

HEADS = {
    "token": lambda: TokenHead(4, sampled()),
    "kinematic": lambda: KinematicHead(4),
    "gmm": lambda: MixtureHead(4),
}


@pytest.fixture(params=HEADS)
def head(request):
    return HEADS[request.param]()


def arcs(agents=30, steps=91, seed=0):
    """Tracks (1, a, t, …) of all classes on circles, at constant acceleration: pose, velocity, valid, type, size."""
    random = torch.rand(6, agents, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    type = torch.arange(agents) % 3
    times = 0.1 * torch.arange(steps, dtype=torch.float64)
    speed = torch.tensor([6.0, 0.6, 3.0], dtype=torch.float64)[type] * (1 + random[0])
    pull = torch.tensor([1.0, 0.05, 0.2], dtype=torch.float64)[type] * random[1]
    fastest = speed + pull * times[-1]
    bend = (2 / fastest**2).clamp(max=0.2)  # no more than two metres a second squared to the side
    curvature = bend * (2 * random[2] - 1)
    length = speed[:, None] * times + pull[:, None] * times**2 / 2
    turn = curvature[:, None] * length
    chord = length * torch.sinc(turn / (2 * math.pi))
    local = torch.stack((chord * (turn / 2).cos(), chord * (turn / 2).sin(), turn), -1)
    start = torch.stack((100 * random[3] - 50, 100 * random[4] - 50, 20 * random[5] - 10), -1)
    pose = compose(start[:, None], local)
    now = speed[:, None] + pull[:, None] * times
    velocity = torch.stack((now * pose[..., 2].cos(), now * pose[..., 2].sin()), -1)
    valid = torch.ones(1, agents, steps, dtype=torch.bool)
    return pose[None].float(), velocity[None].float(), valid, type[None], torch.ones(1, agents, 3)


def off(found, pose, ends):
    return (found.tokens.pose - pose[:, :, ends])[..., :2].norm(dim=-1)


ENDS = slice(5, None, 5)


def test_eighteen_motions_do_not_drift_from_arcs(head):
    pose, velocity, valid, type, size = arcs()
    found = tokenise(head, pose, velocity, valid, type, size)
    assert found.tokens.pose.shape == (1, 30, 18, 3)
    assert found.tokens.valid.all()
    assert off(found, pose, ENDS)[..., -1].max() < 0.3
    assert off(found, pose, ENDS).max() < 0.3
    assert wrap(found.tokens.pose[..., 2] - pose[:, :, ENDS, 2]).abs().max() < 0.15


def test_motions_join_from_pose_to_pose(head):
    pose, velocity, valid, type, size = arcs()
    tokens = tokenise(head, pose, velocity, valid, type, size).tokens
    start = torch.cat((pose[:, :, :1], tokens.pose[:, :, :-1]), 2)
    joined = compose(start, tokens.motion[..., -1, :])
    assert (joined - tokens.pose)[..., :2].abs().max() < 1e-4
    assert wrap((joined - tokens.pose)[..., 2]).abs().max() < 1e-5


def test_what_a_motion_is_trained_on_is_the_motion_that_follows(head):
    pose, velocity, valid, type, size = arcs()
    found = tokenise(head, pose, velocity, valid, type, size)
    tokens = found.tokens
    before = MotionState(
        tokens.pose, tokens.speed, type[..., None].expand(1, 30, 18), size[:, :, None].expand(1, 30, 18, 3)
    )
    motion, _ = head.advance(before, head.nearest(before, found.futures))
    assert torch.equal(motion[:, :, :-1], tokens.motion[:, :, 1:])
    assert found.target_valid[:, :, :-1].all()
    assert not found.target_valid[:, :, -1].any()
    torch.testing.assert_close(found.futures[:, :, 2], pose[:, :, 16:21])
    assert (found.futures[:, :, -1] == 0).all()


def test_speeds_follow_the_truth(head):
    pose, velocity, valid, type, size = arcs()
    found = tokenise(head, pose, velocity, valid, type, size)
    error = (found.tokens.speed - velocity[:, :, ENDS].norm(dim=-1)).abs()
    assert error.mean() < 0.2
    assert error.max() < 1.5


def test_standing_agents_stand():
    pose, velocity, valid, type, size = arcs(6)
    pose = pose[:, :, :1].expand(1, 6, 91, 3)
    for make in HEADS.values():
        tokens = tokenise(make(), pose, 0 * velocity, valid, type, size).tokens
        torch.testing.assert_close(tokens.pose[..., :2], pose[:, :, ENDS, :2], atol=1e-5, rtol=0)
        assert tokens.motion.abs().max() < 1e-5
        assert tokens.speed.abs().max() < 1e-4
    tokens = tokenise(HEADS["token"](), pose, 0 * velocity, valid, type, size).tokens
    assert (tokens.motion == 0).all()  # token 0 exactly


def test_an_agent_that_reappears_starts_from_the_record(head):
    pose, velocity, valid, type, size = arcs()
    valid[:, :, 23:38] = False
    found = tokenise(head, pose, velocity, valid, type, size)
    # The motions 20-25, 25-30, 30-35 and 35-40 lack an end.
    expected = torch.ones(18, dtype=torch.bool)
    expected[4:8] = False
    assert torch.equal(found.tokens.valid, expected.expand(1, 30, 18))
    target = expected & expected.roll(-1)
    target[-1] = False
    assert torch.equal(found.target_valid, target.expand(1, 30, 18))
    fresh = tokenise(head, *(each[:, :, 40:] for each in (pose, velocity, valid)), type, size)
    torch.testing.assert_close(found.tokens.pose[:, :, 8:], fresh.tokens.pose)


def test_steps_missing_within_a_motion_do_not_break_it(head):
    pose, velocity, valid, type, size = arcs()
    full = tokenise(head, pose, velocity, valid, type, size)
    valid[:, :, 22:24] = False
    found = tokenise(head, pose, velocity, valid, type, size)
    assert found.tokens.valid.all()
    assert off(found, pose, ENDS).max() < 0.3
    assert (found.futures - full.futures)[:, :, 3, :, :2].norm(dim=-1).max() < 0.1  # filled along the chord


@pytest.mark.parametrize("first", [1, 3, 6, 9, 10])
def test_agents_born_late_have_a_motion_that_ends_at_the_current_step(first):
    pose, velocity, valid, type, size = arcs()
    pull_free = compose(pose[:, :, 10:11], torch.tensor([0.0, 0.0, 0.0]))  # constant velocity along a line
    steps = torch.arange(91)[:, None] - 10
    line = torch.cat(
        (pull_free[..., :2] + 0.1 * steps * velocity[:, :, 10:11], pull_free[..., 2:].expand(1, 30, 91, 1)), -1
    )
    constant = velocity[:, :, 10:11].expand(1, 30, 91, 2)
    valid[:, :, :first] = False
    found = tokenise(HEADS["gmm"](), line, constant, valid, type, size)
    whole = tokenise(HEADS["gmm"](), line, constant, torch.ones_like(valid), type, size)
    assert found.tokens.valid[:, :, 1:].all()
    assert (found.tokens.valid[:, :, 0] == (first < 5)).all()
    torch.testing.assert_close(found.tokens.pose[:, :, 1:], whole.tokens.pose[:, :, 1:], atol=1e-4, rtol=0)


def test_a_gap_just_before_the_current_step_is_bridged():
    pose, velocity, valid, type, size = arcs()
    valid[:, :, 2:9] = False
    found = tokenise(HEADS["token"](), pose, velocity, valid, type, size)
    assert found.tokens.valid[:, :, 1:].all()
    assert off(found, pose, ENDS)[..., 1:].max() < 0.3
    filled, _, there = continue_backwards(pose, velocity, valid, 10)
    assert there[0, 0].nonzero().flatten()[:8].tolist() == [0, 1, 5, 6, 7, 8, 9, 10]
    assert torch.equal(filled[:, :, :2], pose[:, :, :2])


def test_the_future_beyond_never_reaches_back(head):
    pose, velocity, valid, type, size = arcs()
    found = tokenise(head, pose, velocity, valid, type, size)
    changed = pose.clone()
    changed[:, :, 51:] += 3
    other = tokenise(head, changed, velocity, valid, type, size)
    for first, second in zip(found.tokens[:4], other.tokens[:4], strict=True):
        assert torch.equal(first[:, :, :10], second[:, :, :10])


def test_what_is_not_valid_is_zero_and_may_have_been_anything(head):
    pose, velocity, valid, type, size = arcs()
    valid[:, ::3] = False
    valid[:, 1::3, 40:] = False
    clean = tokenise(head, pose, velocity, valid, type, size)
    pose[~valid], velocity[~valid] = torch.nan, torch.inf
    found = tokenise(head, pose, velocity, valid, type, size)
    for first, second in zip((*clean.tokens[:4], *clean[1:]), (*found.tokens[:4], *found[1:]), strict=True):
        assert torch.equal(first, second)
    tokens = found.tokens
    assert not tokens.valid[:, ::3].any()
    for each in (tokens.pose, tokens.motion, tokens.speed):
        assert (each[~tokens.valid] == 0).all()
    assert (found.futures[~found.target_valid] == 0).all()


def test_scenes_are_matched_as_if_alone(head):
    pose, velocity, valid, type, size = (torch.cat((a, b)) for a, b in zip(arcs(seed=0), arcs(seed=1), strict=True))
    both = tokenise(head, pose, velocity, valid, type, size)
    alone = tokenise(head, pose[1:], velocity[1:], valid[1:], type[1:], size[1:])
    torch.testing.assert_close(both.tokens.pose[1:], alone.tokens.pose)


def test_unwrapped_headings_are_the_same_headings(head):
    pose, velocity, valid, type, size = (each.double() if each.is_floating_point() else each for each in arcs())
    head.double()
    turned = pose.clone()
    turned[..., 2] += 2 * math.pi * torch.randint(-2, 3, turned.shape[:-1]).double()
    first = tokenise(head, pose, velocity, valid, type, size)
    second = tokenise(head, turned, velocity, valid, type, size)
    assert second.tokens.pose.dtype == torch.float64
    torch.testing.assert_close(first.tokens.motion, second.tokens.motion, atol=1e-9, rtol=0)


def test_headings_that_jump_keep_the_earlier_value():
    heading = torch.tensor([0.1, 0.2, 3.3, 0.3, 0.3 + 2 * math.pi, 2.0, 0.4])
    valid = torch.ones(7, dtype=torch.bool)
    expected = torch.tensor([0.1, 0.2, 0.2, 0.3, 0.3 + 2 * math.pi, 0.3 + 2 * math.pi, 0.4])
    torch.testing.assert_close(steady_headings(heading, valid), expected)
    valid[4] = False  # after a gap any heading holds
    torch.testing.assert_close(steady_headings(heading, valid)[5], heading[5])


def test_headings_of_many_tracks_are_steadied_as_if_alone():
    """Tracks with and without jumps and gaps, against the rule written out."""
    generator = torch.Generator().manual_seed(0)
    heading = 0.2 * torch.randn(40, 30, generator=generator, dtype=torch.float64)
    heading[:20] += 3.0 * (torch.rand(20, 30, generator=generator) > 0.8)
    valid = torch.rand(40, 30, generator=generator) > 0.2
    expected = heading.tolist()
    for track, real in zip(expected, valid.tolist(), strict=True):
        for step in range(1, 30):
            turn = math.remainder(track[step] - track[step - 1], 2 * math.pi)
            if abs(turn) > 1.5 and real[step] and real[step - 1]:
                track[step] = track[step - 1]
    steady = steady_headings(heading.view(2, 20, 30), valid.view(2, 20, 30)).view(40, 30)
    assert steady.tolist() == expected
    assert (steady != heading).any(-1).sum() == (steady != heading)[:20].any(-1).sum() > 10
    assert torch.equal(steady_headings(heading[20:], valid[20:]), heading[20:])


@pytest.mark.parametrize(
    ("steps", "current", "message"), [(90, 10, "90 steps"), (91, 12, "current is 12"), (6, 10, "current")]
)
def test_lengths_that_do_not_fit_are_refused(steps, current, message):
    pose, velocity, valid, type, size = arcs(3, steps)
    with pytest.raises(ValueError, match=message):
        tokenise(HEADS["gmm"](), pose, velocity, valid, type, size, current=current)
