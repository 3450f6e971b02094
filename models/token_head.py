"""Motion as a token: a categorical distribution over a vocabulary (SMART, arXiv 2405.15677)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from models.agent_tokens import MotionState
from models.motion_head import (
    BOXES,
    CLASSES,
    STEP,
    ClassLinear,
    MotionHead,
    arrive,
    check_among,
    draw,
    full_precision,
    rows_at_once,
)
from models.poses import box_corners, corner_distance, corner_distances, relative
from models.vocabulary import Vocabulary


class TokenHead(MotionHead):
    """Logits over the tokens of an agent's class. Actions are indices of tokens; the vocabulary travels with the weights.

    Args:
        dim: width of the features.
        vocabulary: the motions of every class, as `models.vocabulary.sampled` or `load` gives them.
    """

    motions: Tensor
    absent: Tensor

    uniforms = 1

    def __init__(self, dim: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        size = vocabulary.motions.shape[1]
        self.register_buffer("motions", vocabulary.motions.clone())  # (3, n, 5, 3)
        index = torch.arange(size, device=vocabulary.counts.device)
        self.register_buffer("absent", index >= vocabulary.counts[:, None])  # (3, n)
        self.logits = ClassLinear(dim, size)

    def forward(self, hidden: Tensor, type: Tensor) -> Tensor:
        """(…, c) and (…) → logits (…, n); a token that the class doesn't have gets the least finite number."""
        logits: Tensor = self.logits(hidden, type)
        return logits.masked_fill(self.absent[type], torch.finfo(logits.dtype).min)

    @torch.no_grad()
    def nearest(
        self, state: MotionState, future: Tensor, prediction: Tensor | None = None, among: int | None = None
    ) -> Tensor:
        """As the interface says: indices (…)."""
        check_among(prediction, among)
        end = relative(state.pose, future[..., -1, :])  # (…, 3)
        shape = end.shape[:-1]
        end, type = end.reshape(-1, 3), state.type.expand(shape).reshape(-1)
        boxes = end.new_tensor(BOXES)
        tokens = self.motions[:, :, -1].to(end.dtype)  # (3, n, 3)
        poses = torch.stack((tokens[..., 0], tokens[..., 1], tokens[..., 2].cos(), tokens[..., 2].sin()), -1)
        known = box_corners(tokens, boxes[:, None])  # (3, n, 4, 2)
        candidates: Tensor | None = None
        if prediction is not None and among is not None and among < tokens.shape[1]:
            candidates = prediction.reshape(-1, tokens.shape[1]).topk(among, dim=-1).indices
        action = type.new_zeros(len(end))
        for code in range(len(CLASSES)):
            absent = self.absent[code]
            for rows in (type == code).nonzero().flatten().split(rows_at_once(tokens.shape[1])):
                corners = box_corners(end[rows], boxes[code])  # (r, 4, 2)
                if candidates is None:
                    distance = corner_distances(corners, known[code])
                    action[rows] = distance.masked_fill_(absent, torch.inf).argmin(-1)
                else:
                    chosen = candidates[rows]  # (r, k)
                    distance = corner_distance(poses[code][chosen].unbind(-1), boxes[code], corners[:, None])
                    best = distance.masked_fill_(absent[chosen], torch.inf).argmin(-1, keepdim=True)
                    action[rows] = chosen.gather(-1, best).squeeze(-1)
        return action.view(shape)

    def loss(self, prediction: Tensor, state: MotionState, future: Tensor, smoothing: float = 0.0) -> Tensor:
        """(…) cross-entropy to the nearest token; smoothing reaches the tokens that the class has."""
        target = self.nearest(state, future)
        likelihood = log_softmax(full_precision(prediction), -1)
        loss = -likelihood.gather(-1, target[..., None]).squeeze(-1)
        if smoothing:
            absent = self.absent[state.type]
            even = likelihood.masked_fill(absent, 0.0).sum(-1) / (~absent).sum(-1)
            loss = (1 - smoothing) * loss - smoothing * even
        return loss

    @torch.no_grad()
    def sample(
        self, prediction: Tensor, uniforms: Tensor, top_k: int | None = None, temperature: float = 1.0
    ) -> Tensor:
        """As the interface says: indices (…)."""
        return draw(prediction, uniforms[..., 0], top_k, temperature)

    def advance(self, state: MotionState, action: Tensor) -> tuple[Tensor, MotionState]:
        """As the interface says; the speed is that of the last 0.1 s along the heading."""
        motion = self.motions[state.type, action].to(state.pose.dtype)
        (dx, dy), heading = (motion[..., -1, :2] - motion[..., -2, :2]).unbind(-1), motion[..., -1, 2]
        speed = (dx * heading.cos() + dy * heading.sin()) / STEP
        return motion, arrive(state, motion, speed)
