"""Motion as a control: acceleration and yaw rate of a unicycle, each a categorical distribution (KiGRAS, arXiv 2407.12940)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.agent_tokens import SUBSTEPS, MotionState
from models.motion_head import (
    CLASSES,
    STEP,
    ClassLinear,
    MotionHead,
    arrive,
    boxes_of,
    check_among,
    draw,
    full_precision,
    rows_at_once,
)
from models.poses import box_corners, corner_distance, relative, unicycle

_DURATION = STEP * SUBSTEPS
_AHEAD = 0.25  # seconds for which an error of the end speed counts in `nearest`
# The slope at the last of five equally spaced points of the parabola closest to them, times the spacing.
_END_SLOPE = (26 / 70, -27 / 70, -40 / 70, -13 / 70, 54 / 70)


class KinematicHead(MotionHead):
    """Independent logits over accelerations and yaw rates; the state is integrated by the midpoint rule.

    An action is the flat index acceleration · (number of yaw rates) + yaw rate. Bins are evenly spaced from −limit to
    limit, for every class its own limits; zero is among them as their numbers are odd.

    A chain of motions chosen by their end positions alone would brake and accelerate in turns for ever: an error of the
    speed comes back with the opposite sign. So `nearest` looks for the least root of sum of squares of two distances: the
    sum over the corners, and what the corners would be off in sum after another 0.25 s by the error of the end speed.

    Args:
        dim: width of the features.
        accelerations: number of bins, odd.
        yaw_rates: number of bins, odd.
        acceleration_limits: metres a second squared for vehicle, pedestrian, cyclist.
        yaw_rate_limits: radians a second for vehicle, pedestrian, cyclist.

    Raises:
        ValueError: a number of bins is even or less than three, or limits aren't three positive numbers.
    """

    acceleration: Tensor
    yaw_rate: Tensor

    uniforms = 1

    def __init__(
        self,
        dim: int,
        accelerations: int = 31,
        yaw_rates: int = 31,
        acceleration_limits: Sequence[float] = (8.0, 4.0, 6.0),
        yaw_rate_limits: Sequence[float] = (0.8, 3.0, 1.2),
    ) -> None:
        super().__init__()
        for name, bins, limits in (
            ("acceleration", accelerations, acceleration_limits),
            ("yaw_rate", yaw_rates, yaw_rate_limits),
        ):
            if bins < 3 or bins % 2 == 0:
                raise ValueError(f"{name}s is {bins}, expected an odd number of three or more")
            if len(limits) != len(CLASSES) or not all(limit > 0 for limit in limits):
                raise ValueError(f"{name}_limits are {tuple(limits)}, expected {len(CLASSES)} positive numbers")
            half = bins // 2
            steps = torch.arange(-half, half + 1) / half
            self.register_buffer(name, torch.tensor(list(limits))[:, None] * steps)  # (3, bins)
        self.accelerations, self.yaw_rates = accelerations, yaw_rates
        self.logits = ClassLinear(dim, accelerations + yaw_rates)

    def forward(self, hidden: Tensor, type: Tensor) -> Tensor:
        """(…, c) and (…) → (…, accelerations + yaw rates) logits of the two distributions."""
        logits: Tensor = self.logits(hidden, type)
        return logits

    def joint(self, prediction: Tensor) -> Tensor:
        """(…, accelerations + yaw rates) → (…, accelerations · yaw rates) logits of actions."""
        acceleration, yaw_rate = prediction.split((self.accelerations, self.yaw_rates), -1)
        return (acceleration[..., :, None] + yaw_rate[..., None, :]).flatten(-2)

    @torch.no_grad()
    def nearest(
        self, state: MotionState, future: Tensor, prediction: Tensor | None = None, among: int | None = None
    ) -> Tensor:
        """As the interface says: flat indices (…)."""
        check_among(prediction, among)
        seen = relative(state.pose[..., None, :], future)  # (…, 5, 3)
        shape = seen.shape[:-2]
        seen, type, speed = seen.reshape(-1, SUBSTEPS, 3), state.type.reshape(-1), state.speed.reshape(-1)
        end = seen[:, -1]
        # a sum of products, for autocast would round a contraction to half precision
        velocity = (seen[..., :2] * seen.new_tensor(_END_SLOPE)[:, None]).sum(1) / STEP
        end_speed = velocity[:, 0] * end[:, 2].cos() + velocity[:, 1] * end[:, 2].sin()
        boxes = boxes_of(type, end)
        corners = box_corners(end, boxes)
        candidates: Tensor | None = None
        if prediction is not None and among is not None and among < self.accelerations * self.yaw_rates:
            candidates = self.joint(prediction).reshape(len(end), -1).topk(among, dim=-1).indices
        count = self.accelerations * self.yaw_rates if candidates is None else candidates.shape[1]
        action = type.new_zeros(len(end))
        for rows in torch.arange(len(end), device=end.device).split(rows_at_once(count)):
            acceleration = self.acceleration[type[rows]].to(end.dtype)
            yaw_rate = self.yaw_rate[type[rows]].to(end.dtype)
            if candidates is None:
                acceleration, yaw_rate = acceleration[:, :, None], yaw_rate[:, None, :]  # (r, a, 1), (r, 1, w)
            else:
                acceleration = acceleration.gather(1, candidates[rows] // self.yaw_rates)[:, :, None]  # (r, k, 1)
                yaw_rate = yaw_rate.gather(1, candidates[rows] % self.yaw_rates)[:, :, None]
            now = speed[rows, None, None]
            distance = (now + acceleration * (_DURATION / 2)) * _DURATION
            turn = yaw_rate * _DURATION
            off = corner_distance(
                (distance * (turn / 2).cos(), distance * (turn / 2).sin(), turn.cos(), turn.sin()),
                boxes[rows, None, None],
                corners[rows, None, None],
            )
            late = 4 * _AHEAD * (now + acceleration * _DURATION - end_speed[rows, None, None])
            best = (off.square() + late.square()).flatten(1).argmin(-1)
            action[rows] = best if candidates is None else candidates[rows].gather(1, best[:, None]).squeeze(1)
        return action.view(shape)

    def loss(self, prediction: Tensor, state: MotionState, future: Tensor, smoothing: float = 0.0) -> Tensor:
        """(…) sum of the two cross-entropies."""
        target = self.nearest(state, future)
        precise = full_precision(prediction)
        acceleration, yaw_rate = precise.split((self.accelerations, self.yaw_rates), -1)
        loss = precise.new_zeros(target.shape)
        for logits, bins in ((acceleration, target // self.yaw_rates), (yaw_rate, target % self.yaw_rates)):
            flat = logits.reshape(-1, logits.shape[-1])
            entropy = cross_entropy(flat, bins.reshape(-1), reduction="none", label_smoothing=smoothing)
            loss = loss + entropy.view(target.shape)
        return loss

    @torch.no_grad()
    def sample(
        self, prediction: Tensor, uniforms: Tensor, top_k: int | None = None, temperature: float = 1.0
    ) -> Tensor:
        """As the interface says: flat indices (…), top_k being of pairs of acceleration and yaw rate."""
        return draw(self.joint(prediction), uniforms[..., 0], top_k, temperature)

    def advance(self, state: MotionState, action: Tensor) -> tuple[Tensor, MotionState]:
        """As the interface says."""
        acceleration = self.acceleration[state.type, action // self.yaw_rates].to(state.pose.dtype)
        yaw_rate = self.yaw_rate[state.type, action % self.yaw_rates].to(state.pose.dtype)
        times = torch.arange(1, SUBSTEPS + 1, device=action.device, dtype=state.pose.dtype) * STEP
        motion = unicycle(state.speed, acceleration, yaw_rate, times)
        return motion, arrive(state, motion, state.speed + acceleration * _DURATION)
