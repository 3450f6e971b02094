"""Motion as a mixture of Gaussians over the pose in 0.5 s, with fixed covariance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.agent_tokens import SUBSTEPS, MotionState
from models.motion_head import STEP, ClassLinear, MotionHead, arrive, boxes_of, check_among, draw, full_precision
from models.poses import box_corners, corner_distance, relative

_DURATION = STEP * SUBSTEPS


class MixtureHead(MotionHead):
    """Modes over (x, y, cos, sin) of the next pose in the frame of the agent. Actions are such poses, cos and sin normalised.

    Args:
        dim: width of the features.
        modes: number of Gaussians.
        position_variance: of x and of y, metres squared.
        heading_variance: of cos and of sin.
        spread: `sample` draws with the standard deviations times this: variances wide enough to train by are too wide to
            drive by.

    Raises:
        ValueError: no mode, a variance that isn't positive or a negative spread.
    """

    uniforms = 5

    def __init__(
        self,
        dim: int,
        modes: int = 16,
        position_variance: float = 1.0,
        heading_variance: float = 0.1,
        spread: float = 0.01,
    ) -> None:
        super().__init__()
        if modes < 1 or not position_variance > 0 or not heading_variance > 0 or not spread >= 0:
            raise ValueError(
                f"modes {modes}, position_variance {position_variance} and heading_variance {heading_variance} must be"
                f" positive and spread {spread} not negative"
            )
        self.modes, self.spread = modes, spread
        self.variances = (position_variance, position_variance, heading_variance, heading_variance)
        self.parameters_of = ClassLinear(dim, modes * 5)

    def forward(self, hidden: Tensor, type: Tensor) -> Tensor:
        """(…, c) and (…) → (…, 5 · modes): the logits of all modes, then their means."""
        prediction: Tensor = self.parameters_of(hidden, type)
        return prediction

    def split(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """(…, 5 · modes) → logits (…, m) and means (…, m, 4)."""
        logits, means = prediction.split((self.modes, 4 * self.modes), -1)
        return logits, means.unflatten(-1, (self.modes, 4))

    @torch.no_grad()
    def nearest(
        self, state: MotionState, future: Tensor, prediction: Tensor | None = None, among: int | None = None
    ) -> Tensor:
        """The true end pose (…, 4); or, among K, the mean of the closest of the K most probable modes."""
        check_among(prediction, among)
        end = relative(state.pose, future[..., -1, :])
        if prediction is None or among is None:
            return torch.stack((end[..., 0], end[..., 1], end[..., 2].cos(), end[..., 2].sin()), -1)
        logits, means = self.split(prediction)
        best = logits.topk(min(among, self.modes), dim=-1).indices
        means = _normalised(means.gather(-2, best[..., None].expand(*best.shape, 4)).to(end.dtype))
        boxes = boxes_of(state.type, end)
        distance = corner_distance(means.unbind(-1), boxes[..., None, :], box_corners(end, boxes)[..., None, :, :])
        chosen = distance.argmin(-1)[..., None, None]
        return means.gather(-2, chosen.expand(*chosen.shape[:-1], 4)).squeeze(-2)

    def loss(self, prediction: Tensor, state: MotionState, future: Tensor, smoothing: float = 0.0) -> Tensor:
        """(…) negative log density at the true end pose; smoothing gives that share of the weight evenly to all modes."""
        target = self.nearest(state, future)[..., None, :]  # (…, 1, 4)
        logits, means = self.split(full_precision(prediction))
        variances = means.new_tensor(self.variances)
        density = -0.5 * ((target - means).square() / variances + (2 * math.pi * variances).log()).sum(-1)
        weights = logits.log_softmax(-1)
        if smoothing:
            even = weights.new_tensor(math.log(smoothing / self.modes))
            weights = torch.logaddexp(weights + math.log1p(-smoothing), even)
        return -(weights + density).logsumexp(-1)

    @torch.no_grad()
    def sample(
        self, prediction: Tensor, uniforms: Tensor, top_k: int | None = None, temperature: float = 1.0
    ) -> Tensor:
        """As the interface says: poses (…, 4). The first uniform draws the mode, four the point; temperature widens the
        Gaussians by its square root, and at 0 it is the mean of the most probable mode."""
        logits, means = self.split(prediction)
        mode = draw(logits, uniforms[..., 0], top_k, temperature)[..., None, None]
        mean = means.gather(-2, mode.expand(*mode.shape[:-1], 4)).squeeze(-2)
        mean = full_precision(mean)
        edge = torch.finfo(mean.dtype).eps
        normal = math.sqrt(2) * torch.erfinv((2 * uniforms[..., 1:].to(mean.dtype) - 1).clamp(edge - 1, 1 - edge))
        deviation = mean.new_tensor(self.variances).sqrt() * self.spread * math.sqrt(temperature)
        return _normalised(mean + deviation * normal)

    def advance(self, state: MotionState, action: Tensor) -> tuple[Tensor, MotionState]:
        """As the interface says. The way to the end is a cubic that starts with the speed of the state; the end speed is
        the mean speed along the heading plus half of its change, so that errors of the speed die out."""
        x, y, cos, sin = action.to(state.pose.dtype).unbind(-1)
        turn = torch.atan2(sin, cos)
        # The mean speed is that of the chord, seen along the heading half-way.
        mean = (x * (turn / 2).cos() + y * (turn / 2).sin()) / _DURATION
        speed = mean + (mean - state.speed) / 2
        t = torch.arange(1, SUBSTEPS + 1, device=x.device, dtype=x.dtype) / SUBSTEPS
        leave, arrival, end = t - 2 * t**2 + t**3, t**3 - t**2, 3 * t**2 - 2 * t**3  # cubic Hermite basis
        out, into = state.speed[..., None] * _DURATION * leave, speed[..., None] * _DURATION * arrival
        motion = torch.stack(
            (
                out + into * turn.cos()[..., None] + x[..., None] * end,
                into * turn.sin()[..., None] + y[..., None] * end,
                turn[..., None] * t,
            ),
            -1,
        )
        return motion, arrive(state, motion, speed)


def _normalised(pose: Tensor) -> Tensor:
    """(…, 4) x, y and a direction of any length → a direction of length one; (1, 0) where it has none."""
    angle = torch.atan2(pose[..., 3], pose[..., 2])
    return torch.stack((pose[..., 0], pose[..., 1], angle.cos(), angle.sin()), -1)
