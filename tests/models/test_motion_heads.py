"""What every motion head keeps, whatever its actions are: geometry, sampling, losses and closeness to the truth."""

import math

import pytest
import torch

from models.agent_tokens import MotionState
from models.kinematic_head import KinematicHead
from models.mixture_head import MixtureHead
from models.motion_head import BOXES, ClassLinear
from models.poses import box_corners, compose, mirror, relative, unicycle
from models.token_head import TokenHead
from models.vocabulary import Vocabulary, sampled

N = 24


def token_head():
    return TokenHead(8, sampled(96, (0.3, 0.15, 0.2), pool=4000)).double()


def kinematic_head():
    return KinematicHead(8, 15, 13).double()


def mixture_head():
    return MixtureHead(8).double()


@pytest.fixture(params=[token_head, kinematic_head, mixture_head], ids=["token", "kinematic", "gmm"])
def head(request):
    torch.manual_seed(0)
    return request.param()


def scenario(n=N, seed=1):
    """States anywhere and what follows, (n,) and (n, 5, 3) float64: arcs of all classes."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(6, n, generator=generator, dtype=torch.float64)
    type = torch.arange(n) % 3
    pose = torch.stack((200 * random[0] - 100, 200 * random[1] - 100, 20 * random[2] - 10), -1)
    speed = torch.tensor([12.0, 1.5, 4.0], dtype=torch.float64)[type] * random[3]
    motion = unicycle(speed, 2 * random[4] - 1, 0.4 * random[5] - 0.2, 0.1 * torch.arange(1, 6, dtype=torch.float64))
    size = torch.tensor([[4.8, 2.0, 1.6], [1.0, 1.0, 1.8], [2.0, 1.0, 1.7]], dtype=torch.float64)[type]
    return MotionState(pose, speed, type, size), compose(pose[:, None], motion)


def hidden(n=N):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def far(state, action, future, head):
    """Sum of corner distances from where an action leads to the truth."""
    box = torch.tensor(BOXES, dtype=torch.float64)[state.type]
    _, end = head.advance(state, action)
    return (box_corners(end.pose, box) - box_corners(future[:, -1], box)).norm(dim=-1).sum(-1)


# The interface


def test_an_action_goes_from_the_state_to_the_pose_it_says(head):
    state, future = scenario()
    motion, end = head.advance(state, head.nearest(state, future))
    assert motion.shape == (N, 5, 3)
    torch.testing.assert_close(end.pose, compose(state.pose, motion[:, -1]))
    assert ((end.pose[:, 2] >= -math.pi) & (end.pose[:, 2] < math.pi)).all()
    assert end.type is state.type
    assert end.size is state.size
    assert end.speed.shape == (N,)


def test_a_rigid_motion_of_the_scene_changes_no_action(head):
    state, future = scenario()
    frame = torch.tensor([300.0, -70.0, 2.4], dtype=torch.float64)
    moved = state._replace(pose=compose(frame, state.pose))
    action, other = head.nearest(state, future), head.nearest(moved, compose(frame, future))
    torch.testing.assert_close(action, other, atol=1e-9, rtol=0)
    (motion, end), (same, there) = head.advance(state, action), head.advance(moved, other)
    torch.testing.assert_close(motion, same, atol=1e-9, rtol=0)
    torch.testing.assert_close(compose(frame, end.pose), there.pose, atol=1e-9, rtol=0)


def test_whole_turns_of_headings_change_nothing(head):
    state, future = scenario()
    turn = torch.tensor([0.0, 0.0, 2 * math.pi], dtype=torch.float64)
    action = head.nearest(state, future)
    torch.testing.assert_close(head.nearest(state._replace(pose=state.pose - turn), future + 2 * turn), action)


def test_leading_shapes_are_free(head):
    state, future = scenario()
    folded = MotionState(*(each.unflatten(0, (2, 3, 4)) for each in state))
    prediction = head(hidden(), state.type)
    uniforms = torch.rand(N, head.uniforms, dtype=torch.float64)
    for plain, shaped in (
        (head.nearest(state, future), head.nearest(folded, future.unflatten(0, (2, 3, 4)))),
        (
            head.nearest(state, future, prediction, 4),
            head.nearest(folded, future.unflatten(0, (2, 3, 4)), prediction.unflatten(0, (2, 3, 4)), 4),
        ),
        (
            head.loss(prediction, state, future, 0.1),
            head.loss(prediction.unflatten(0, (2, 3, 4)), folded, future.unflatten(0, (2, 3, 4)), 0.1),
        ),
        (
            head.sample(prediction, uniforms),
            head.sample(prediction.unflatten(0, (2, 3, 4)), uniforms.unflatten(0, (2, 3, 4))),
        ),
    ):
        assert shaped.shape[:3] == (2, 3, 4)
        torch.testing.assert_close(shaped.flatten(0, 2), plain)


def test_among_all_actions_is_no_restriction_and_among_one_is_the_most_probable(head):
    state, future = scenario()
    prediction = head(hidden(), state.type)
    uniforms = torch.full((N, head.uniforms), 0.5, dtype=torch.float64)
    certain = head.sample(prediction, uniforms, temperature=0)
    torch.testing.assert_close(head.nearest(state, future, prediction, 1), certain)
    if not isinstance(head, MixtureHead):  # its unrestricted answer is the truth itself, which is no mode
        assert torch.equal(head.nearest(state, future, prediction, 10**6), head.nearest(state, future))


def test_nearest_among_k_lies_between_the_most_probable_and_the_best(head):
    state, future = scenario(96)
    prediction = head(hidden(96), state.type)
    cost = [far(state, head.nearest(state, future, prediction, k), future, head).mean() for k in (1, 4, 12)]
    cost.append(far(state, head.nearest(state, future), future, head).mean())
    assert cost[0] > cost[1] > cost[2] > cost[3]


def test_arguments_that_make_no_sense_are_refused(head):
    state, future = scenario()
    prediction = head(hidden(), state.type)
    uniforms = torch.rand(N, head.uniforms, dtype=torch.float64)
    with pytest.raises(ValueError, match="together"):
        head.nearest(state, future, among=4)
    with pytest.raises(ValueError, match="together"):
        head.nearest(state, future, prediction)
    with pytest.raises(ValueError, match="among is 0"):
        head.nearest(state, future, prediction, 0)
    with pytest.raises(ValueError, match="top_k is 0"):
        head.sample(prediction, uniforms, top_k=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        head.sample(prediction, uniforms, temperature=-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_falls_under_gradient_descent_and_reaches_the_features(head, smoothing):
    state, future = scenario()
    features = hidden().requires_grad_()
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    losses = []
    for _ in range(40):
        loss = head.loss(head(features, state.type), state, future, smoothing)
        assert loss.shape == (N,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    assert losses[-1] < 0.6 * losses[0]
    assert features.grad.isfinite().all()
    assert (features.grad.abs().sum(-1) > 0).all()


def test_only_the_class_of_an_agent_learns_from_it(head):
    state, future = scenario()
    loss = head.loss(head(hidden(), state.type), state, future)
    loss[state.type == 1].sum().backward()
    (maps,) = (module.maps for module in head.modules() if isinstance(module, ClassLinear))
    assert [linear.weight.grad.abs().sum().item() > 0 for linear in maps] == [False, True, False]


def test_padding_of_zeros_gives_finite_numbers(head):
    state = MotionState(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3))
    head.float()
    features = torch.zeros(2, 8, requires_grad=True)
    prediction = head(features, state.type)
    loss = head.loss(prediction, state, torch.zeros(2, 5, 3), 0.1)
    loss.sum().backward()
    motion, end = head.advance(state, head.sample(prediction, torch.full((2, head.uniforms), 0.5), 5))
    for each in (loss, features.grad, motion, end.pose, end.speed):
        assert each.isfinite().all()


def test_float32_and_float64_agree(head):
    state, future = scenario()
    near = state._replace(pose=state.pose * torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64))
    future = compose(near.pose[:, None], relative(state.pose[:, None], future))
    precise = head.loss(head(hidden(), state.type), near, future, 0.1)
    head.float()
    single = MotionState(near.pose.float(), near.speed.float(), near.type, near.size.float())
    loss = head.loss(head(hidden().float(), state.type), single, future.float(), 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), precise, atol=1e-3, rtol=1e-4)


def test_the_weights_carry_what_actions_mean():
    head, other = token_head(), TokenHead(8, sampled(96, (0.3, 0.15, 0.2), seed=5, pool=4000)).double()
    assert not torch.equal(head.motions, other.motions)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head.motions, other.motions)


# Sampling


def test_temperature_to_zero_is_the_most_probable(head):
    prediction = head(hidden(), scenario()[0].type)
    uniforms = torch.rand(N, head.uniforms, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cold, frozen = (head.sample(prediction, uniforms, temperature=t) for t in (1e-9, 0))
    torch.testing.assert_close(cold, frozen, atol=1e-4, rtol=0)


def test_samples_are_functions_of_their_uniforms(head):
    prediction = head(hidden(), scenario()[0].type)
    uniforms = torch.rand(N, head.uniforms, dtype=torch.float64)
    first, again = head.sample(prediction, uniforms, 5), head.sample(prediction, uniforms, 5)
    assert torch.equal(first, again)
    assert not torch.equal(first, head.sample(prediction, 1 - uniforms, 5))


# Tokens


def test_tokens_that_a_class_lacks_are_never_drawn_nor_nearest():
    full = sampled(96, (0.3, 0.15, 0.2), pool=4000)
    head = TokenHead(8, Vocabulary(full.motions, torch.tensor([96, 3, 1]), full.tolerances)).double()
    state, future = scenario(300)
    prediction = head(hidden(300), state.type)
    uniforms = torch.rand(300, 1, dtype=torch.float64)
    limit = torch.tensor([96, 3, 1])[state.type]
    for action in (
        head.nearest(state, future),
        head.nearest(state, future, prediction, 48),
        head.sample(prediction, uniforms),
        head.sample(prediction, uniforms, 48),
    ):
        assert (action < limit).all()
    loss = head.loss(prediction, state, future, 0.1)
    assert loss.isfinite().all()
    assert loss[state.type == 2].abs().max() < 1e-12  # one token only, so it is certain


def test_cat_k_takes_the_nearest_of_the_k_most_probable_tokens():
    head = token_head()
    state, future = scenario()
    prediction = head(hidden(), state.type)
    chosen = head.nearest(state, future, prediction, 7)
    for agent, candidates in enumerate(prediction.topk(7).indices):
        here = MotionState(*(each[agent].expand(7, *each[agent].shape) for each in state))
        cost = far(here, candidates, future[agent].expand(7, 5, 3), head)
        assert chosen[agent] == candidates[cost.argmin()]


def test_nearest_is_the_least_of_all_tokens():
    head = token_head()
    state, future = scenario()
    cost = torch.stack([far(state, torch.full((N,), token), future, head) for token in range(96)], -1)
    assert torch.equal(head.nearest(state, future), cost.argmin(-1))


def test_smoothing_is_that_of_cross_entropy():
    head = token_head()
    state, future = scenario()
    prediction = head(hidden(), state.type)
    expected = torch.nn.functional.cross_entropy(
        prediction, head.nearest(state, future), reduction="none", label_smoothing=0.1
    )
    torch.testing.assert_close(head.loss(prediction, state, future, 0.1), expected)


def test_the_speed_after_a_token_is_signed():
    head = token_head()
    backwards = (head.motions[0, :, -1, 0] < -0.2).nonzero()[0]
    state = MotionState(torch.zeros(1, 3).double(), torch.zeros(1).double(), torch.zeros(1).long(), torch.ones(1, 3))
    assert head.advance(state, backwards)[1].speed < 0


# Controls


def test_the_midpoint_rule_gives_the_worked_numbers():
    head = KinematicHead(4, 9, 9, (4.0, 4.0, 4.0), (0.8, 0.8, 0.8)).double()
    acceleration = int((head.acceleration[0] - 1.0).abs().argmin())
    yaw_rate = int((head.yaw_rate[0] - 0.2).abs().argmin())
    # The bin is stored in float32; the worked numbers hold for 0.2 itself.
    head.yaw_rate[0, yaw_rate] = 0.2
    state = MotionState(
        torch.zeros(1, 3, dtype=torch.float64),
        torch.full((1,), 10.0, dtype=torch.float64),
        torch.zeros(1).long(),
        torch.ones(1, 3),
    )
    motion, end = head.advance(state, torch.tensor([acceleration * 9 + yaw_rate]))
    expected = torch.tensor([5.1185950845, 0.2561432425, 0.1], dtype=torch.float64)
    torch.testing.assert_close(end.pose[0], expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(end.speed[0], torch.tensor(10.5, dtype=torch.float64), atol=1e-9, rtol=0)
    times = 0.1 * torch.arange(1, 6, dtype=torch.float64)
    torch.testing.assert_close(motion[0, :, 2], 0.2 * times, atol=1e-9, rtol=0)
    torch.testing.assert_close(motion[0, :, :2].norm(dim=-1), (10 + times / 2) * times, atol=1e-9, rtol=0)


def test_motions_of_the_bins_are_found_again():
    head = kinematic_head()
    state, _ = scenario(60)
    action = torch.randint(15 * 13, (60,), generator=torch.Generator().manual_seed(0))
    motion, _ = head.advance(state, action)
    found = head.nearest(state, compose(state.pose[:, None], motion))
    # A pedestrian's turn by 1.5 radians bends its way within the half second, so the speed read off it is a little low.
    torch.testing.assert_close(found // 13, action // 13, atol=1, rtol=0)
    assert torch.equal(found % 13, action % 13)
    assert (found == action).float().mean() > 0.9


def test_a_constant_speed_error_dies_out():
    head = KinematicHead(4, 63, 63).double()
    pose, zero = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    state = MotionState(pose, torch.tensor([6.0], dtype=torch.float64), zero, torch.ones(1, 3))
    errors = []
    for motion in range(10):  # the truth drives at 5 metres a second
        times = 0.5 * motion + 0.1 * torch.arange(1, 6, dtype=torch.float64)
        future = torch.stack((5 * times, torch.zeros(5), torch.zeros(5)), -1)[None]
        _, state = head.advance(state, head.nearest(state, future))
        errors.append(abs(float(state.speed) - 5))
    assert max(errors[4:]) < 0.2  # without regard to the speed it would be 1 at every end


def test_bins_must_hold_zero():
    with pytest.raises(ValueError, match="accelerations is 10"):
        KinematicHead(4, accelerations=10)
    with pytest.raises(ValueError, match="yaw_rate_limits"):
        KinematicHead(4, yaw_rate_limits=(1.0, 0.0, 1.0))
    assert (KinematicHead(4).acceleration[:, 15] == 0).all()


# Mixtures


def test_the_mixture_density_is_that_of_torch():
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    head = mixture_head()
    state, future = scenario()
    prediction = head(hidden(), state.type)
    logits, means = head.split(prediction)
    deviation = torch.tensor([1.0, 1.0, 0.1, 0.1], dtype=torch.float64).sqrt()
    mixture = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(means, deviation), 1))
    end = relative(state.pose, future[:, -1])
    target = torch.stack((end[:, 0], end[:, 1], end[:, 2].cos(), end[:, 2].sin()), -1)
    torch.testing.assert_close(head.loss(prediction, state, future), -mixture.log_prob(target))


def test_mixture_samples_have_the_mean_and_spread_they_claim():
    head = MixtureHead(8, modes=1, spread=0.5).double()
    n = 20_000
    prediction = torch.tensor([0.0, 3.0, -1.0, 2.0, 0.0], dtype=torch.float64).expand(n, 5)
    uniforms = torch.rand(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    action = head.sample(prediction, uniforms)
    torch.testing.assert_close(action[:, :2].mean(0), torch.tensor([3.0, -1.0]).double(), atol=0.015, rtol=0)
    torch.testing.assert_close(action[:, :2].std(0), torch.tensor([0.5, 0.5]).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(action[:, 2:].norm(dim=-1), torch.ones(n).double())
    assert head.sample(prediction[:2], torch.tensor([[0.0] * 5, [1.0] * 5])).isfinite().all()


def test_mixture_motions_end_in_the_action_and_go_smoothly():
    head = mixture_head()
    state, future = scenario()
    motion, end = head.advance(state, head.nearest(state, future))
    torch.testing.assert_close(end.pose[:, :2], future[:, -1, :2])
    truth = relative(state.pose[:, None], future)
    assert (motion - truth)[..., :2].norm(dim=-1).max() < 0.05
    assert (motion - truth)[..., 2].abs().max() < 1e-9


def test_a_mixture_needs_modes_and_variance():
    for wrong in ({"modes": 0}, {"position_variance": 0.0}, {"heading_variance": -1.0}, {"spread": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MixtureHead(4, **wrong)


def test_mirrored_agents_take_mirrored_tokens():
    head = token_head()
    state, future = scenario()
    reflected = state._replace(pose=mirror(state.pose))
    motion, _ = head.advance(state, head.nearest(state, future))
    other, _ = head.advance(reflected, head.nearest(reflected, mirror(future)))
    torch.testing.assert_close(mirror(motion), other, atol=1e-6, rtol=0)
