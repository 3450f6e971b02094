"""Closed loop: every agent's motions drawn token by token, in many rollouts of a scene that share its map and its past."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.agent_cache import AgentCache, MapContext
from models.agent_tokens import AgentTokens, MapTokens, MotionState
from models.agents import AgentModel, clean_agents
from models.motion_head import MotionHead
from models.poses import compose

STEPS = 16  # motions of 0.5 s

Choose = Callable[[int, Tensor, MotionState, Tensor], Tensor]
"""(step, prediction (B, a, k), state (B, a), uniforms (B, a, u)) → actions (B, a[, 4]); B counts the scenes' rollouts, those
of one scene side by side."""


class Rollouts(NamedTuple):
    """r futures of b scenes, in the frame of the scene.

    Attributes:
        poses: (b, a, r, 5 · steps, 3) x, y, heading at 10 Hz, heading in [−π, π); zero for agents that aren't simulated.
        actions: (b, a, r, steps) int64, or (b, a, r, steps, 4) for a head whose actions are poses.
        tokens: history and future as (b · r, a, s + steps, …), rollouts of a scene side by side: what `AgentModel.forward`
            reads, with the map of the b scenes, to train in closed loop.
        predictions: (b, a, r, steps, k) what the actions were chosen by, if asked for.
    """

    poses: Tensor
    actions: Tensor
    tokens: AgentTokens
    predictions: Tensor | None


@dataclass(frozen=True)
class Sample:
    """Draw from the head's distribution.

    Attributes:
        head: draws.
        top_k: among this many most probable actions; None for all.
        temperature: of the softmax; 0 takes the most probable action.
    """

    head: MotionHead
    top_k: int | None = None
    temperature: float = 1.0

    def __call__(self, step: int, prediction: Tensor, state: MotionState, uniforms: Tensor) -> Tensor:
        return self.head.sample(prediction, uniforms, self.top_k, self.temperature)


@dataclass(frozen=True)
class ClosestToTruth:
    """Follow the record as closely as the head's actions allow (CAT-K, arXiv 2412.05334).

    Attributes:
        head: knows the actions.
        futures: (b, a, steps, 5, 3) recorded poses of the motions, in the frame of the scene.
        valid: (b, a, steps) bool, where there is a record.
        otherwise: chooses where there is none.
        among: how many most probable actions to choose among; None for all.
    """

    head: MotionHead
    futures: Tensor
    valid: Tensor
    otherwise: Choose
    among: int | None = 32

    def __call__(self, step: int, prediction: Tensor, state: MotionState, uniforms: Tensor) -> Tensor:
        times = len(prediction) // len(self.futures)
        future = self.futures[:, :, step].repeat_interleave(times, 0)
        valid = self.valid[:, :, step].repeat_interleave(times, 0)
        future = torch.where(valid[..., None, None], future, 0)
        ranked = None if self.among is None else prediction
        closest = self.head.nearest(state, future, ranked, self.among)
        other = self.otherwise(step, prediction, state, uniforms)
        return torch.where(valid.view(*valid.shape, *(1,) * (other.ndim - 2)), closest, other)


def rollout_uniforms(
    scenario_ids: Sequence[str], rollouts: Sequence[int], agents: int, steps: int, count: int, seed: int
) -> Tensor:
    """(b, r, a, steps, count) float64 numbers of (0, 1), on the CPU.

    Each rollout of each scenario has a generator of its own, and an agent's numbers follow those of the agents before it:
    neither padding nor what else is in the batch changes them.
    """
    drawn = torch.empty(len(scenario_ids), len(rollouts), agents, steps, count, dtype=torch.float64)
    for scene, scenario_id in enumerate(scenario_ids):
        for row, rollout in enumerate(rollouts):
            digest = hashlib.blake2b(f"{seed}/{scenario_id}/{rollout}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            drawn[scene, row].uniform_(generator=generator)
    return drawn.clamp_(2.0**-53, 1 - 2.0**-53)


@torch.no_grad()
def rollout(
    model: AgentModel,
    history: AgentTokens,
    map: MapTokens | MapContext,
    *,
    scenario_ids: Sequence[str],
    rollouts: Sequence[int] = range(32),
    seed: int = 0,
    steps: int = STEPS,
    top_k: int | None = None,
    temperature: float = 1.0,
    choose: Choose | None = None,
    cached: bool = True,
    rollouts_at_once: int | None = None,
    keep_predictions: bool = False,
) -> Rollouts:
    """Simulate all agents that are valid at the last token of their history.

    The map is encoded and its keys are made once a scene, the history is read once for all rollouts, and a step adds one
    token's keys to each agent's past.

    Args:
        model: in whatever mode it is; no gradient is kept.
        history: (b, a, s, …) tokens up to now, as a rule two.
        map: of the b scenes, encoded or not.
        scenario_ids: b names, which the random numbers depend on.
        rollouts: the numbers of the rollouts wanted, which the random numbers depend on too.
        seed: the third thing that they depend on, and the last.
        steps: motions of 0.5 s.
        top_k, temperature: as in `Sample`.
        choose: chooses actions instead of `Sample`.
        cached: False computes everything anew at every step: the reference, slow.
        rollouts_at_once: of a scene, to bound memory; None for all.
        keep_predictions: return them.

    Raises:
        ValueError: there aren't as many names as scenes, or no rollout or no step is wanted.
    """
    scenes, agents = history.valid.shape[:2]
    if len(scenario_ids) != scenes:
        raise ValueError(f"rollout: {len(scenario_ids)} scenario_ids for {scenes} scenes")
    if not rollouts or steps < 1:
        raise ValueError(f"rollout: {len(rollouts)} rollouts of {steps} steps, expected at least one of each")
    head = model.head
    choose = choose or Sample(head, top_k, temperature)
    history = clean_agents(history)
    uniforms = rollout_uniforms(scenario_ids, rollouts, agents, steps, head.uniforms, seed).to(history.pose.device)
    cache = model.cache() if cached else None
    context = model.encode_map(map) if isinstance(map, MapTokens) and not cached else map
    first = model(history, context, cache)[:, :, -1]  # the same for all rollouts

    parts = []
    for drawn in uniforms.split(rollouts_at_once or len(rollouts), dim=1):
        times = drawn.shape[1]
        past = None if cache is None else cache.repeat(times)

        def follow(tokens: AgentTokens, past: AgentCache | None = past) -> Tensor:
            if past is None:
                return model(tokens, context)[:, :, -1]
            return model(_last(tokens), None, past)[:, :, -1]

        prediction = first.repeat_interleave(times, 0)
        loop = _loop(head, _repeat(history, times), prediction, drawn.flatten(0, 1), choose, follow, keep_predictions)
        parts.append([t.unflatten(0, (scenes, times)) for t in loop])
    columns = [torch.cat(column, dim=1) for column in zip(*parts, strict=True)]  # (b, r, a, …)
    poses, actions, *tokens = columns[: 2 + len(history)]
    return Rollouts(
        poses.transpose(1, 2),
        actions.transpose(1, 2),
        AgentTokens(*(t.flatten(0, 1) for t in tokens)),
        columns[-1].transpose(1, 2) if keep_predictions else None,
    )


def _loop(
    head: MotionHead,
    tokens: AgentTokens,
    prediction: Tensor,
    uniforms: Tensor,
    choose: Choose,
    follow: Callable[[AgentTokens], Tensor],
    keep_predictions: bool,
) -> list[Tensor]:
    """Poses (B, a, 5 · steps, 3), actions (B, a, steps[, 4]), the tokens' fields, and perhaps predictions."""
    alive = tokens.valid[:, :, -1]
    state = MotionState(tokens.pose[:, :, -1], tokens.speed[:, :, -1], tokens.type, tokens.size)
    poses, actions, predictions = [], [], []
    for step in range(uniforms.shape[2]):
        action = choose(step, prediction, state, uniforms[:, :, step])
        motion, following = head.advance(state, action)
        poses.append(torch.where(alive[..., None, None], compose(state.pose[:, :, None], motion), 0))
        actions.append(action)
        if keep_predictions:
            predictions.append(prediction)
        state = following
        tokens = _append(tokens, motion, state, alive)
        if step + 1 < uniforms.shape[2]:
            prediction = follow(tokens)
    kept = [torch.stack(predictions, dim=2)] if keep_predictions else []
    return [torch.cat(poses, dim=2), torch.stack(actions, dim=2), *tokens, *kept]


def _append(tokens: AgentTokens, motion: Tensor, state: MotionState, alive: Tensor) -> AgentTokens:
    pose = torch.where(alive[..., None], state.pose, 0)
    moved = torch.where(alive[..., None, None], motion, 0)
    speed = torch.where(alive, state.speed, 0)
    return tokens._replace(
        pose=torch.cat((tokens.pose, pose[:, :, None]), dim=2),
        motion=torch.cat((tokens.motion, moved[:, :, None]), dim=2),
        speed=torch.cat((tokens.speed, speed[:, :, None]), dim=2),
        valid=torch.cat((tokens.valid, alive[:, :, None]), dim=2),
    )


def _last(tokens: AgentTokens) -> AgentTokens:
    pose, motion, speed, valid, kind, size = tokens
    return AgentTokens(pose[:, :, -1:], motion[:, :, -1:], speed[:, :, -1:], valid[:, :, -1:], kind, size)


def _repeat(tokens: AgentTokens, times: int) -> AgentTokens:
    return AgentTokens(*(t.repeat_interleave(times, 0) for t in tokens))
