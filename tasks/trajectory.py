"""Generation of traffic: next-motion prediction with poses as rotations (DRoPE, arXiv 2503.15029), closed-loop tuning
(CAT-K, arXiv 2412.05334), and evaluation in closed loop beside two policies that learned nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from datamodules.batches import SceneBatch
from datamodules.scene import Scene
from models.agent_tokens import AgentTokens, MapTokens, MotionState
from models.agents import AgentModel
from models.poses import compose, wrapped
from models.rollout import STEPS, ClosestToTruth, Sample, rollout
from models.tokenise import Tokenised, tokenise
from tasks.base import Task
from tasks.baselines import constant_velocity, log_replay
from tasks.metrics.motion_forecasting import MotionForecasting
from tasks.metrics.motion_modes import predictions_of_scene
from tasks.metrics.motion_tracks import MAX_PREDICTIONS, MotionTracks
from tasks.metrics.sim_agents import SimAgents

NOW = 1  # the token that ends at the current step


class Simulated(NamedTuple):
    """Rollouts of one scene in its coordinates: states (a, r, 80, 4) of x, y, z, heading, and the agents (a,) they are of."""

    scene: Scene
    states: Tensor
    index: Tensor  # type: ignore[assignment]  # agents, not tuple.index


def map_tokens(batch: SceneBatch) -> MapTokens:
    """The map of a batch as the model reads it."""
    return MapTokens(batch.map_pose, batch.map_points, batch.map_type, batch.map_light, batch.map_valid)


def first_steps(tokens: AgentTokens, count: int) -> AgentTokens:
    """The first `count` tokens of every agent."""
    part = slice(0, count)
    return tokens._replace(
        pose=tokens.pose[:, :, part],
        motion=tokens.motion[:, :, part],
        speed=tokens.speed[:, :, part],
        valid=tokens.valid[:, :, part],
    )


def until_now(tokens: AgentTokens) -> AgentTokens:
    """The history alone."""
    return first_steps(tokens, NOW + 1)


def states_of(tokens: AgentTokens) -> MotionState:
    """What the motion after each token starts from: (b, a, s, …)."""
    kind = tokens.type[..., None].expand(tokens.valid.shape)
    size = tokens.size[:, :, None].expand(*tokens.valid.shape, 3)
    return MotionState(tokens.pose, tokens.speed, kind, size)


def in_scenes(batch: SceneBatch, poses: Tensor) -> list[Simulated]:
    """Rollouts (b, a, r, 80, 3) in the frames of a batch → states in the coordinates of each scene, padding left out.

    The height of an agent stays that of the current step.
    """
    placed = compose(batch.frame[:, None, None, None], poses.double())  # (b, a, r, 80, 3)
    height = batch.agent_height[:, :, None, None].float().expand(placed.shape[:-1])
    x, y = placed[..., :2].float().unbind(-1)
    states = torch.stack((x, y, height, wrapped(placed[..., 2])), dim=-1)
    found = []
    for scene, mine, index in zip(batch.scenes, states, batch.agent_index, strict=True):
        real = index >= 0
        found.append(Simulated(scene, mine[real], index[real]))
    return found


class Policy(nn.Module):
    """The metrics of one way to drive: realism by the Sim Agents rules, and motion forecasting on the agents to predict."""

    def __init__(self, parity: bool) -> None:
        super().__init__()
        self.realism, self.forecasting = SimAgents(parity=parity), MotionForecasting()

    def update(self, simulated: Simulated) -> None:
        scene, states, index = simulated
        self.realism.update(scene, states, index)
        predictions = predictions_of_scene(scene, states, index, modes=min(MAX_PREDICTIONS, states.shape[1]))
        self.forecasting.update(predictions, MotionTracks.from_scene(scene))

    def compute(self) -> dict[str, Tensor]:
        """Everything of the realism score, and the means of motion forecasting over types and horizons."""
        forecasting = self.forecasting.compute()
        return {**self.realism.compute(), **{name: value for name, value in forecasting.items() if "/" not in name}}


class Trajectory(Task[SceneBatch]):
    """Trains agents to predict their next motion, and evaluates them in closed loop.

    A batch costs the loss of the motion nearest to the recorded one, seen from where the agent is: at its matched record, or
    with `closed_loop` where its own motions led it. Counted are valid tokens of agents that train, with a valid target.

    Args:
        model: an `AgentModel` with its head.
        smoothing: label smoothing of the loss.
        closed_loop: K of closest-among-top-K: unroll with the most probable K motions, keeping the one closest to the record.
            None trains on the record.
        rollouts: futures of a scene in an evaluation; the challenge asks for 32.
        rollouts_at_once: bounds memory; None for all.
        top_k, temperature: how motions are drawn.
        parity: score as the official code does, slips included; see `SimAgents`.
        policies: whether constant velocity and log replay are scored beside the model.
        scored: False only simulates, for scenes without a future, as those of the dataset's test split.
        seed: of the drawn motions, beside the scenario and the number of the rollout.
        others: of `Task`.

    Raises:
        ValueError: a number is out of its range; names it as `task.NAME`.
    """

    model: AgentModel

    def __init__(
        self,
        model: AgentModel,
        *args: Any,
        smoothing: float = 0.1,
        closed_loop: int | None = None,
        rollouts: int = 32,
        rollouts_at_once: int | None = None,
        top_k: int | None = 48,
        temperature: float = 1.0,
        parity: bool = True,
        policies: bool = True,
        scored: bool = True,
        seed: int = 0,
        **others: Any,
    ) -> None:
        super().__init__(model, *args, **others)
        counts = {"closed_loop": closed_loop, "rollouts_at_once": rollouts_at_once, "top_k": top_k}
        for name, count in {"rollouts": rollouts, **{key: n for key, n in counts.items() if n is not None}}.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"task.{name} is {count}, expected a whole number, at least 1")
        for name, value, end in (("smoothing", smoothing, 1.0), ("temperature", temperature, math.inf)):
            if not isinstance(value, int | float) or not 0 <= value < end:
                raise ValueError(f"task.{name} is {value}, expected a number, at least 0 and less than {end:g}")
        self.smoothing, self.closed_loop, self.scored = smoothing, closed_loop, scored
        self.rollouts, self.rollouts_at_once = rollouts, rollouts_at_once
        self.top_k, self.temperature, self.seed = top_k, temperature, seed
        names = ("model", "constant_velocity", "log_replay") if policies else ("model",)
        self.policies = nn.ModuleDict({name: Policy(parity) for name in names})
        self.evaluating = False
        self.simulated: list[Simulated] = []

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in ("32-true", "64-true", "bf16-mixed", "16-mixed"):
            raise ValueError(
                f"trainer.precision={self.trainer.precision} rounds poses to metres; use 32-true or bf16-mixed"
            )

    def tokens(self, batch: SceneBatch) -> Tokenised:
        """The recorded tracks as motions of the head."""
        return tokenise(
            self.model.head,
            batch.agent_pose,
            batch.agent_velocity,
            batch.agent_valid,
            batch.agent_type,
            batch.agent_size,
        )

    def simulate(self, batch: SceneBatch, rollouts: int | None = None) -> list[Simulated]:
        """Closed-loop futures of every scene of a batch, from its first eleven steps alone."""
        seen = 5 * (NOW + 1) + 1
        history = tokenise(
            self.model.head,
            batch.agent_pose[:, :, :seen],
            batch.agent_velocity[:, :, :seen],
            batch.agent_valid[:, :, :seen],
            batch.agent_type,
            batch.agent_size,
        ).tokens
        futures = rollout(
            self.model,
            history,
            map_tokens(batch),
            scenario_ids=[scene.scenario_id for scene in batch.scenes],
            rollouts=range(self.rollouts if rollouts is None else rollouts),
            seed=self.seed,
            top_k=self.top_k,
            temperature=self.temperature,
            rollouts_at_once=self.rollouts_at_once,
        )
        return in_scenes(batch, futures.poses)

    def followed(self, batch: SceneBatch, recorded: Tokenised) -> AgentTokens:
        """Tokens of the model's own motions, kept as close to the record as its most probable ones allow."""
        later = slice(NOW, NOW + STEPS)
        choose = ClosestToTruth(
            self.model.head,
            recorded.futures[:, :, later],
            recorded.target_valid[:, :, later],
            Sample(self.model.head, self.top_k, self.temperature),
            self.closed_loop,
        )
        names = [scene.scenario_id for scene in batch.scenes]
        history = until_now(recorded.tokens)
        seed = self.seed + self.global_step
        return rollout(
            self.model, history, map_tokens(batch), scenario_ids=names, rollouts=[0], seed=seed, choose=choose
        ).tokens

    def negative_log_likelihood(self, batch: SceneBatch) -> Tensor:
        """Mean loss of the counted tokens; zero, with a gradient of zero, where a batch has none."""
        recorded = self.tokens(batch)
        tokens = recorded.tokens if self.closed_loop is None else self.followed(batch, recorded)
        return self.cost(tokens, map_tokens(batch), recorded, batch.agent_trains)

    def cost(self, tokens: AgentTokens, map: MapTokens, recorded: Tokenised, trains: Tensor) -> Tensor:
        """Mean loss of predicting from `tokens` what was recorded, over agents that train (b, a)."""
        last = tokens.valid.shape[2] - 1  # nothing follows the last token, and no other sees it
        tokens, target_valid = first_steps(tokens, last), recorded.target_valid[:, :, :last]
        counted = tokens.valid & target_valid & trains[..., None]
        prediction = self.model(tokens, map, wanted=counted)
        state = MotionState(*(t[counted] for t in states_of(tokens)))
        smoothing = self.smoothing if self.training else 0.0
        each = self.model.head.loss(prediction, state, recorded.futures[:, :, :last][counted], smoothing)
        return each.sum() / max(1, len(each))

    def loss(self, batch: SceneBatch) -> Mapping[str, Tensor]:
        return {"loss": self.negative_log_likelihood(batch)}

    def evaluate_at(self) -> None:
        """From now on held-out batches are simulated and scored, not only their loss is taken."""
        self.evaluating = True

    def measure(self, batch: SceneBatch) -> Mapping[str, Any]:
        if not self.evaluating:
            return {"loss": self.negative_log_likelihood(batch)}
        self.simulated = self.simulate(batch)
        if not self.scored:
            return {}
        for mine in self.simulated:
            self.policy("model").update(mine)
        if "log_replay" in self.policies:
            for scene in batch.scenes:
                for name, drive in (("constant_velocity", constant_velocity), ("log_replay", log_replay)):
                    self.policy(name).update(Simulated(scene, *drive(scene, self.rollouts)))
        return {"model/loss": self.negative_log_likelihood(batch)}

    def on_validation_epoch_end(self) -> None:
        self._log_policies("val")

    def on_test_epoch_end(self) -> None:
        self._log_policies("test")

    def policy(self, name: str) -> Policy:
        """The metrics of one of the policies."""
        return cast(Policy, self.policies[name])

    def _log_policies(self, stage: str) -> None:
        if not (self.evaluating and self.scored):
            return
        for name in self.policies:
            scores = {f"{stage}/{name}/{key}": value.float() for key, value in self.policy(name).compute().items()}
            self.log_dict(scores)
            for metric in self.policy(name).modules():
                if isinstance(metric, Metric):
                    metric.reset()
