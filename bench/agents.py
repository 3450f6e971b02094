"""Memory and time of attention among agents, and speed of a closed loop: `python -m bench.agents --json PATH`. One thread.

Layer: one attention of 8 heads of 16 channels among N agents, forward and backward, without a mask. `drope_sdpa` turns
queries and keys by poses and calls SDPA; `drope_naive` has the same weights and keeps the softmax; `rpe_dense` adds an MLP of
every pair's relative pose to keys and values (after QCNet, CVPR 2023). `saved_bytes` are the distinct storages that autograd
keeps for the backward pass, weights among them; `growth` is their ratio to those of half as many agents. RPE runs as far as
`--pairs` allows, for it keeps 1.5 KB a pair.

Closed loop: a model of `configs/model/agents_SIZE.yaml` on random scenes, 16 steps of 0.5 s, keys cached or everything
computed anew. `ms` is a step's share of the whole rollout, the map's encoding included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from bench.harness import Row, interleave, one_thread, parser, report
from models.agent_tokens import SUBSTEPS, AgentTokens, MapTokens
from models.agents import AgentModel
from models.kinematic_head import KinematicHead
from models.pairwise_attention import PairwiseAttention, RawPoses
from models.pose_attention import Keys, PosePhases, RotaryAttention, Visible, split_heads
from models.rollout import STEPS, rollout
from rotary import Rotary, rotate
from rotary.frequencies import Directional

HEADS, HEAD_DIM = 8, 16
MODELS = Path(__file__).parents[1] / "configs" / "model"


def drope(**law: object) -> Callable[..., PosePhases]:
    """Phases of poses as `pos=drope_intra` has them."""
    directional = Directional(wavelengths=(4, 800), across_heads=True, **law)  # type: ignore[arg-type]
    return partial(PosePhases, partial(Rotary, directional))


class NaiveAttention(RotaryAttention):
    """`RotaryAttention` with the softmax written out, so that all N² weights are kept."""

    def forward(self, x: Tensor, place: Tensor | None, keys: Keys, seen: Visible | None = None) -> Tensor:
        query = split_heads(self.query(x), self.heads)
        query = query if place is None else rotate(query, place)
        logits = query @ keys.key.mT / query.shape[-1] ** 0.5
        return self.out((logits.softmax(-1) @ keys.value).transpose(-3, -2).flatten(-2))


class Layer(nn.Module):
    """Self-attention among agents at poses (n, 3)."""

    def __init__(
        self, attention: Callable[..., RotaryAttention | PairwiseAttention], phases: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.attention = attention(width=HEADS * HEAD_DIM, heads=HEADS, head_dim=HEAD_DIM)
        self.phases = phases(heads=HEADS, head_dim=HEAD_DIM)

    def forward(self, x: Tensor, pose: Tensor) -> Tensor:
        """(1, n, c), (1, n, 3) → (1, n, c)."""
        place = self.phases(pose)
        return self.attention(x, place, self.attention.keys(x, place), None)


PROVIDERS: dict[str, Callable[[], Layer]] = {
    "drope_sdpa": partial(Layer, RotaryAttention, drope()),
    "drope_naive": partial(Layer, NaiveAttention, drope()),
    "rpe_dense": partial(Layer, PairwiseAttention, RawPoses),
}


def poses(*shape: int, metres: float = 100.0) -> Tensor:
    """(*shape, 3) random x, y within `metres` of the origin, and headings."""
    return (2 * torch.rand(*shape, 3) - 1) * torch.tensor([metres, metres, torch.pi])


def saved_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of `call`, weights among them."""
    kept: dict[int, Tensor] = {}  # holding the tensors keeps addresses from being used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # noqa: F841 - the graph must live until all is counted
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def memory(agents: Sequence[int], pairs: int) -> list[Row]:
    """Bytes and growth of every provider at every number of agents, the dense RPE where there are at most `pairs` pairs."""
    rows: list[Row] = []
    known: dict[tuple[str, int], int] = {}
    for n in agents:
        x, pose = torch.randn(1, n, HEADS * HEAD_DIM, requires_grad=True), poses(1, n)
        for name, layer in _layers(n, pairs).items():
            known[name, n] = count = saved_bytes(partial(layer, x, pose))
            rows.append(Row("agents", f"{n} agents", name, "saved_bytes", count, "bytes"))
            if (name, n // 2) in known and n % 2 == 0:
                rows.append(Row("agents", f"{n} agents", name, "growth", count / known[name, n // 2], "ratio"))
    return rows


def times(agents: Sequence[int], pairs: int, rounds: int) -> list[Row]:
    """Milliseconds of forward and backward of the same."""
    rows = []
    for n in agents:
        x, pose, gradient = torch.randn(1, n, HEADS * HEAD_DIM), poses(1, n), torch.randn(1, n, HEADS * HEAD_DIM)
        x.requires_grad_()  # as from a layer below

        def both(layer: Layer, x: Tensor = x, pose: Tensor = pose, gradient: Tensor = gradient) -> object:
            return torch.autograd.grad(layer(x, pose), (x, *layer.parameters()), gradient)

        calls = {name: partial(both, layer) for name, layer in _layers(n, pairs).items()}
        for name, seconds in interleave(calls, rounds=rounds).items():
            rows.append(Row("agents", f"{n} agents", name, "ms", 1e3 * statistics.median(seconds), "ms"))
    return rows


def _layers(agents: int, pairs: int) -> dict[str, Layer]:
    return {name: make() for name, make in PROVIDERS.items() if name != "rpe_dense" or agents**2 <= pairs}


def model_of(size: str) -> AgentModel:
    """A model of this size with `pos=drope_intra` and the kinematic head, in evaluation mode."""
    sizes = yaml.safe_load((MODELS / f"agents_{size}.yaml").read_text())
    shape = {key: value for key, value in sizes.items() if key != "head" and not key.startswith("_")}
    return AgentModel(
        KinematicHead(shape["width"]),
        attention=RotaryAttention,
        phases=drope(),
        temporal_phases=drope(heading_share=0.25, time_base=1e4),
        **shape,
    ).eval()


def tokens(agents: int, pieces: int) -> tuple[AgentTokens, MapTokens]:
    """A random scene: two tokens of history of vehicles, and map pieces 5 m long."""
    motion = torch.zeros(1, agents, 2, SUBSTEPS, 3)
    motion[..., 0] = torch.arange(1, SUBSTEPS + 1)  # 1 m each 0.1 s
    pose = poses(1, agents, 1).expand(-1, -1, 2, -1).contiguous()
    size = torch.tensor([4.8, 2.0, 1.5]).expand(1, agents, 3)
    kind = torch.zeros(1, agents, dtype=torch.int64)
    speed, valid = torch.full((1, agents, 2), 10.0), torch.ones(1, agents, 2, dtype=torch.bool)
    points = torch.tensor([[2.5, 0.0], [5.0, 0.0]]).expand(1, pieces, 2, 2)
    none = torch.zeros(1, pieces, dtype=torch.int64)
    return AgentTokens(pose, motion, speed, valid, kind, size), MapTokens(
        poses(1, pieces), points, none, none, torch.ones(1, pieces, dtype=torch.bool)
    )


def loops(size: str, agents: int, pieces: int, rollouts: int, rounds: int) -> list[Row]:
    """Milliseconds a step and rollouts of a scene a second, with and without cached keys."""
    model = model_of(size)
    history, lanes = tokens(agents, pieces)
    case = f"{size}, {agents} agents, {pieces} pieces, {rollouts} rollouts"

    def run(cached: bool) -> object:
        return rollout(model, history, lanes, scenario_ids=("random",), rollouts=range(rollouts), cached=cached)

    seconds = interleave({"cached": partial(run, True), "recomputed": partial(run, False)}, rounds=rounds)
    rows = []
    for name, times in seconds.items():
        middle = statistics.median(times)
        rows.append(Row("agents", case, name, "ms", 1e3 * middle / STEPS, "ms a step of 0.5 s"))
        rows.append(Row("agents", case, name, "scene_rollouts_per_s", rollouts / middle, "1/s"))
    return rows


def main() -> None:
    made = parser("Attention among agents: memory, time, and speed of a closed loop.")
    made.add_argument("--agents", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="N of the layer")
    made.add_argument("--pairs", type=int, default=512**2, help="most pairs for the dense RPE, 1.5 KB each (512²)")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--size", default="nano", help="of the model in the closed loop: ci, nano, mini, tiny")
    made.add_argument("--scene", type=int, nargs=2, default=(32, 512), metavar=("AGENTS", "PIECES"))
    made.add_argument("--rollouts", type=int, default=32)
    options = made.parse_args()
    one_thread()
    torch.manual_seed(0)
    counts = sorted(options.agents)
    rows = memory(counts, options.pairs) + times(counts, options.pairs, options.rounds)
    agents, pieces = options.scene
    rows += loops(options.size, agents, pieces, options.rollouts, max(1, options.rounds // 2))
    report(rows, options.json)


if __name__ == "__main__":
    main()
