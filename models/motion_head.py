"""What an agent does in the next 0.5 s: the interface of the motion heads, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from models.agent_tokens import MotionState
from models.poses import compose

STEP = 0.1  # seconds between the poses of a motion
CLASSES = ("vehicle", "pedestrian", "cyclist")
BOXES = (
    (4.8, 2.0),
    (1.0, 1.0),
    (2.0, 1.0),
)  # length and width of a class: motions are compared by these boxes' corners


class MotionHead(nn.Module, ABC):
    """Turns features of agents into a distribution over their next motion, and motions into poses.

    A motion is five poses, 0.1 s apart. An *action* is what the distribution is over: int64 (…) where actions are
    discrete, floating (…, 4) where they are poses (x, y, cos, sin). All methods take any leading shape (…), the same in
    all arguments. Types are 0 vehicle, 1 pedestrian, 2 cyclist. Padded entries may hold zeros; what comes back for them is
    finite and means nothing.

    Attributes:
        uniforms: how many independent numbers of (0, 1) one `sample` consumes.
    """

    uniforms: int

    @abstractmethod
    def forward(self, hidden: Tensor, type: Tensor) -> Tensor:
        """Features (…, c) and types (…) → prediction (…, k): what the other methods read as `prediction`."""

    @abstractmethod
    def nearest(
        self, state: MotionState, future: Tensor, prediction: Tensor | None = None, among: int | None = None
    ) -> Tensor:
        """The action that ends closest to the truth: least sum of box-corner distances. No gradient.

        Args:
            state: where the motion starts.
            future: (…, 5, 3) the true poses, in the frame that `state.pose` is in.
            prediction: with `among`, the distribution that ranks actions.
            among: choose among this many most probable actions only (CAT-K, arXiv 2412.05334); more than there are is all.

        Raises:
            ValueError: one of `prediction` and `among` is given without the other, or `among` isn't positive.
        """

    @abstractmethod
    def loss(self, prediction: Tensor, state: MotionState, future: Tensor, smoothing: float = 0.0) -> Tensor:
        """(…) negative log likelihood of what is nearest to `future` (…, 5, 3) as seen from `state`; `smoothing` is the
        share of probability that the target spreads evenly over all actions."""

    @abstractmethod
    def sample(
        self, prediction: Tensor, uniforms: Tensor, top_k: int | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Actions drawn by uniforms (…, u), u = `self.uniforms`: a function of its arguments, no generator is involved.

        Args:
            prediction: (…, k).
            uniforms: (…, u) numbers of (0, 1).
            top_k: draw among this many most probable actions only.
            temperature: divides the logits; 0 takes the most probable action.

        Raises:
            ValueError: top_k isn't positive, or temperature is negative.
        """

    @abstractmethod
    def advance(self, state: MotionState, action: Tensor) -> tuple[Tensor, MotionState]:
        """(motion, next): the five poses (…, 5, 3) in the frame of `state.pose`, and the state at the last of them, heading
        in [−π, π)."""


def arrive(state: MotionState, motion: Tensor, speed: Tensor) -> MotionState:
    """The state after `motion` (…, 5, 3), local to `state.pose`, at `speed` (…)."""
    return state._replace(pose=compose(state.pose, motion[..., -1, :]), speed=speed)


def check_among(prediction: Tensor | None, among: int | None) -> None:
    """Raises ValueError unless both are None, or `prediction` is given and `among` is positive."""
    if (prediction is None) != (among is None):
        raise ValueError("nearest() takes prediction and among together, or neither")
    if among is not None and among < 1:
        raise ValueError(f"among is {among}, expected a positive number of actions")


def draw(logits: Tensor, uniform: Tensor, top_k: int | None = None, temperature: float = 1.0) -> Tensor:
    """Indices (…) drawn from softmax(logits (…, n) / temperature), or from its `top_k` largest, by inverting the
    distribution function at `uniform` (…). Temperature 0 takes the largest.

    Raises:
        ValueError: top_k isn't positive, or temperature is negative.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected a positive number of actions")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, expected zero or more")
    if temperature == 0:
        return logits.argmax(-1)
    indices: Tensor | None = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, indices = logits.topk(top_k, dim=-1)
    cumulative = (full_precision(logits) / temperature).softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    chosen = (cumulative <= uniform[..., None].to(total) * total).sum(-1)
    last = (cumulative < total).sum(-1)  # the last index that isn't improbable: rounding can't go past it
    chosen = torch.minimum(chosen, last)
    return chosen if indices is None else indices.gather(-1, chosen[..., None]).squeeze(-1)


class ClassLinear(nn.Module):
    """A linear map of its own for every class of agent."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(in_features, out_features) for _ in CLASSES)

    def forward(self, hidden: Tensor, type: Tensor) -> Tensor:
        """(…, in) and types (…) → (…, out)."""
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.by_class(hidden, type)
        return self.all_classes(hidden, type)

    def all_classes(self, hidden: Tensor, type: Tensor) -> Tensor:
        """The same: all maps are computed and one is kept, so shapes stay static and no device is waited for."""
        result: Tensor = self.maps[0](hidden)
        for code, linear in enumerate(self.maps[1:], start=1):
            result = torch.where((type == code)[..., None], linear(hidden), result)
        return result

    def by_class(self, hidden: Tensor, type: Tensor) -> Tensor:
        """The same: the rows of a class go through its map alone."""
        flat, order = hidden.flatten(0, -2), type.flatten().argsort(stable=True)
        counts = type.flatten().bincount(minlength=len(CLASSES)).tolist()
        rows = flat.index_select(0, order).split(counts)
        result = torch.cat([linear(mine) for linear, mine in zip(self.maps, rows, strict=True)])
        return result.index_select(0, order.argsort()).unflatten(0, type.shape)


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def boxes_of(type: Tensor, like: Tensor) -> Tensor:
    """(…, 2) length and width of the class of types (…), with dtype and device of `like`."""
    return like.new_tensor(BOXES)[type]


def rows_at_once(candidates: int) -> int:
    """How many agents to compare with `candidates` motions each in one go: temporaries stay within a core's cache."""
    return max(1, 2**17 // candidates)
