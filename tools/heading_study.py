"""Whether attention knows that a heading plus a whole turn is the same heading: a task to learn, and real scenes to measure.

    python -m tools.heading_study --seeds 3 --out docs/results/heading.md

The task: is the neighbour's heading to the left or to the right of mine, the sign of sin(α_j − α_i)? One attention layer
reads four tokens (me, the neighbour, two bystanders) at random places; tokens know their role alone, so headings come
through the poses or, where poses are features, in the token. Every variant has the same layers and sees the same samples.

The measurement: random queries and keys at the recorded poses of the embedded scenes, whose headings are not wrapped; how
much does a logit change when they are? Nothing is learned there. Written are a Markdown report and a CSV beside it.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import compat  # noqa: F401 - before anything imports torchvision
from datamodules.embedded_scenes import load_embedded
from datamodules.embedded_source import SourceError
from datamodules.scene import Scene
from models.agents import PoseFeatures
from models.pose_attention import PosePhases, RotaryAttention
from models.poses import wrap
from rotary import Rotary, rotate
from rotary.frequencies import Directional

WIDTH, HEADS, HEAD_DIM = 64, 4, 16
METRES = 50.0  # places lie within this of the origin
ROLES = ("me", "neighbour", "bystander", "bystander")


@dataclass(frozen=True)
class Headings:
    """How headings are drawn: mine about a direction, the neighbour's about mine, the bystanders' anywhere; all are wrapped,
    then whole turns are added to each.

    Attributes:
        direction: of mine, radians.
        spread: how far mine lies from it.
        apart: how far the neighbour's lies from mine.
        turns: one of these or their negatives is added.
    """

    direction: float = 0.0
    spread: float = math.pi
    apart: float = math.pi
    turns: tuple[int, ...] = (0,)


ANY = Headings()
TRAINED: dict[str, Headings] = {
    "wrapped": ANY,
    "turned": replace(ANY, turns=(0, 1, 2)),
    "one way": Headings(spread=math.pi / 4, apart=math.pi / 2),
}
TESTED: dict[str, Headings] = {
    "one way": TRAINED["one way"],
    "the opposite way": replace(TRAINED["one way"], direction=math.pi),
    "any, wrapped": ANY,
    "any, ±2 turns": replace(ANY, turns=(0, 1, 2)),
    "any, ±3–6 turns": replace(ANY, turns=(3, 4, 5, 6)),
}


class Sample(NamedTuple):
    """Poses (n, 4, 3) x, y, heading of the tokens in the order of `ROLES`, float64; target (n,), 1 for left."""

    pose: Tensor
    target: Tensor


def draw(count: int, headings: Headings, generator: torch.Generator) -> Sample:
    """Samples of the task."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    angle = math.pi * uniform(count, len(ROLES))
    apart = headings.apart * uniform(count)
    angle[:, 0] = headings.direction + headings.spread * uniform(count)
    angle[:, 1] = angle[:, 0] + apart
    turns = torch.tensor([sign * turn for turn in headings.turns for sign in (1, -1)], dtype=torch.float64)
    chosen = torch.randint(len(turns), angle.shape, generator=generator)
    angle = wrap(angle) + 2 * math.pi * turns[chosen]
    place = METRES * uniform(count, len(ROLES), 2)
    return Sample(torch.cat((place, angle[..., None]), dim=-1), (apart.sin() > 0).float())


class RawFeatures(nn.Module):
    """A pose as three numbers of the order of one, the heading as it comes, not wrapped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(3, width)

    def forward(self, pose: Tensor) -> Tensor:
        """(…, 3) → (…, c)."""
        return self.project((pose / pose.new_tensor([METRES, METRES, math.pi])).float())


class Compare(nn.Module):
    """Roles and poses → the logit of "left": one attention layer and a feed-forward part.

    Args:
        phases: makes from `heads` and `head_dim` what turns queries and keys by poses; None for nothing.
        features: makes from the width what adds poses to tokens; None for nothing.
    """

    def __init__(
        self, phases: Callable[..., nn.Module] | None = None, features: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        names = list(dict.fromkeys(ROLES))
        self.role = nn.Embedding(len(names), WIDTH)
        self.register_buffer("roles", torch.tensor([names.index(role) for role in ROLES]))
        self.phases = None if phases is None else phases(heads=HEADS, head_dim=HEAD_DIM)
        self.features = None if features is None else features(WIDTH)
        self.attention = RotaryAttention(width=WIDTH, heads=HEADS, head_dim=HEAD_DIM)
        self.read = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, 1))

    def forward(self, pose: Tensor) -> Tensor:
        """(n, 4, 3) float64 → (n,)."""
        x = self.role(self.roles).expand(len(pose), -1, -1)
        if self.features is not None:
            x = x + self.features(pose)
        place = None if self.phases is None else self.phases(pose)
        if place is not None:
            place = place.to(torch.complex64)
        x = x + self.attention(x, place, self.attention.keys(x, place))
        return self.read(x[:, 0]).squeeze(-1)


class HalfTurns(PosePhases):
    """Headings counted in half turns, so that no rung of an ordinary ladder turns once in 2π, as its first otherwise does."""

    def forward(self, pose: Tensor) -> Tensor:
        """(*b, n, 3) → (*b, h|1, n, r) unit phases."""
        return super().forward(pose / pose.new_tensor([1, 1, math.pi]))


def _poses(kind: type[PosePhases] = PosePhases, **directional: object) -> Callable[..., nn.Module]:
    law = Directional(wavelengths=(4, 800), across_heads=True, **directional)  # type: ignore[arg-type]
    return partial(kind, partial(Rotary, law))


VARIANTS: dict[str, Callable[[], Compare]] = {
    "drope_intra": partial(Compare, _poses()),
    "drope_head": partial(Compare, _poses(heading_heads=0.5)),
    "drope_harmonic": partial(Compare, _poses(harmonics=(1, 2, 3, 4))),
    "rope": partial(Compare, _poses(heading_base=1e4)),
    "rope (half turns)": partial(Compare, _poses(HalfTurns, heading_base=1e4)),
    "absolute (raw heading)": partial(Compare, None, RawFeatures),
    "absolute (cos, sin)": partial(Compare, None, PoseFeatures),
    "none": Compare,
}


def accuracy(model: Compare, headings: Headings, generator: torch.Generator, count: int) -> float:
    """Share of fresh samples that the model answers rightly."""
    with torch.no_grad():
        pose, target = draw(count, headings, generator)
        return ((model(pose) > 0) == (target > 0.5)).float().mean().item()


def train(variant: str, headings: Headings, seed: int, steps: int, batch: int = 256) -> Compare:
    """One model of the task, with samples that depend on the seed alone."""
    torch.manual_seed(seed)
    model = VARIANTS[variant]()
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        pose, target = draw(batch, headings, generator)
        loss = binary_cross_entropy_with_logits(model(pose), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Row(NamedTuple):
    """One trained model at one test; `accuracy` in [0, 1]."""

    variant: str
    trained: str
    tested: str
    seed: int
    accuracy: float


def learn(seeds: int, steps: int, count: int, tell: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Every variant, way of training and seed, at every test of `count` samples."""
    rows = []
    for trained, headings in TRAINED.items():
        for variant in VARIANTS:
            for seed in range(seeds):
                model = train(variant, headings, seed, steps)
                for tested, other in TESTED.items():
                    generator = torch.Generator().manual_seed(99)  # the same samples for all
                    rows.append(Row(variant, trained, tested, seed, accuracy(model, other, generator, count)))
            tell(f"{trained}: {variant}")
    return rows


class Change(NamedTuple):
    """How much wrapping the headings of a scene changes a logit, for one kind of phases."""

    scenario_id: str
    outside: float
    """share of the valid headings that lie outside [−π, π)."""
    variant: str
    largest: float
    """max |logit(raw) − logit(wrapped)| over all pairs of agents at all steps."""


def logits(phases: nn.Module, pose: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """(h, n, n) of queries and keys (h, n, d) at poses (n, 3)."""
    place = phases(pose)
    return rotate(query, place) @ rotate(key, place).mT / query.shape[-1] ** 0.5


def robustness(scenes: Sequence[Scene], stride: int = 5, seed: int = 0) -> list[Change]:
    """Raw against wrapped headings in float64, with standard normal queries and keys; every `stride`-th step counts."""
    found = []
    kinds = {name: make for name, make in VARIANTS.items() if name.startswith(("drope", "rope"))}
    for scene in scenes:
        raw = scene.headings[scene.valid]
        outside = ((raw < -math.pi) | (raw >= math.pi)).double().mean().item()
        for name, make in kinds.items():
            phases = make().phases
            assert phases is not None
            generator, largest = torch.Generator().manual_seed(seed), 0.0
            for step in range(0, scene.steps, stride):
                here = scene.valid[:, step]
                pose = torch.cat((scene.positions[here, step, :2], scene.headings[here, step, None]), dim=-1).double()
                same = torch.cat((pose[:, :2], wrap(pose[:, 2:])), dim=-1)
                shape = (2, HEADS, len(pose), HEAD_DIM)
                query, key = torch.randn(shape, generator=generator, dtype=torch.float64)
                change = logits(phases, pose, query, key) - logits(phases, same, query, key)
                largest = max(largest, change.abs().amax().item() if change.numel() else 0.0)
            found.append(Change(scene.scenario_id, outside, name, largest))
    return found


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def report(rows: Sequence[Row], changes: Sequence[Change], command: str, steps: int, count: int) -> str:
    """The report, in Markdown."""
    said: Mapping[str, str] = {
        "wrapped": "Trained in any direction with headings in [−π, π).",
        "turned": "Trained in any direction with up to two whole turns added to each heading, as unwrapped logs have them.",
        "one way": "Trained with my heading within 45° of the x-axis, the neighbour's within 90° of mine, none near ±π.",
    }
    seeds = len({row.seed for row in rows})
    parts = [
        "# Headings and whole turns",
        f"Made by `{command}`.",
        "## A task to learn",
        f"Left or right: the sign of sin(α_j − α_i). Accuracy in percent on {count:,} fresh samples, mean and range of {seeds} "
        f"seeds, {steps} steps of 256 samples. Columns are tests: *one way* as in the third table, *the opposite way* the "
        "same about ±π, where wrapped headings jump; then any directions.",
        "The first rung of an ordinary ladder is 1, and a pair that turns by the heading itself is a DRoPE pair: `rope` can "
        "answer with it alone. `rope (half turns)` counts headings in half turns and has no such rung.",
    ]
    for trained, sentence in said.items():
        lines = []
        for variant in VARIANTS:
            cells = [variant]
            for tested in TESTED:
                values = [100 * r.accuracy for r in rows if r[:3] == (variant, trained, tested)]
                cells.append(f"{statistics.fmean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
            lines.append(cells)
        parts += [f"**{sentence}**", markdown_table(["variant", *TESTED], lines)]
    parts.append("## Real headings, wrapped or not")
    if changes:
        names = list(dict.fromkeys(change.variant for change in changes))
        lines = []
        for scenario in dict.fromkeys(change.scenario_id for change in changes):
            mine = {change.variant: change for change in changes if change.scenario_id == scenario}
            share = f"{100 * next(iter(mine.values())).outside:.0f} %"
            lines.append([scenario, share, *(f"{mine[name].largest:.1e}" for name in names)])
        parts += [
            "max |logit(raw) − logit(wrapped)|, standard normal queries and keys in float64, nothing learned.",
            markdown_table(["scenario", "headings outside [−π, π)", *names], lines),
        ]
    else:
        parts.append("Not measured: the embedded scenes couldn't be fetched.")
    return "\n\n".join(parts) + "\n"


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial_name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "w", newline="") as file:
            file.write(text)
        os.chmod(partial_name, 0o644)
        os.replace(partial_name, path)
    finally:
        Path(partial_name).unlink(missing_ok=True)


def csv_text(rows: Sequence[Row], changes: Sequence[Change]) -> str:
    """All numbers, one a line: the measure, what it is of, and its value."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("measure", "variant", "trained", "tested", "seed", "value"))
    writer.writerows(("accuracy", *row[:4], f"{row.accuracy:.6f}") for row in rows)
    writer.writerows(("largest_logit_change", c.variant, "", c.scenario_id, "", f"{c.largest:.6e}") for c in changes)
    return text.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Whether attention knows that headings repeat after a whole turn.")
    parser.add_argument("--seeds", type=int, default=3, help="models a variant (3)")
    parser.add_argument("--steps", type=int, default=400, help="of training (400)")
    parser.add_argument("--samples", type=int, default=8192, help="of each test (8192)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md", help="report; a .csv is put beside it")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.steps, options.samples) < 1:
        parser.error("--seeds, --steps and --samples must be at least 1")
    if options.out.suffix != ".md":
        parser.error(f"--out {options.out}: the report is Markdown, its name must end in .md")
    torch.set_num_threads(1)
    try:
        scenes = load_embedded()
    except SourceError as error:
        print(f"skipping the real scenes: {error}", file=sys.stderr)
        scenes = []
    changes = robustness(scenes)
    rows = learn(options.seeds, options.steps, options.samples, lambda line: print(line, file=sys.stderr))
    command = f"python -m tools.heading_study --seeds {options.seeds} --steps {options.steps} --out {options.out}"
    if options.samples != parser.get_default("samples"):
        command += f" --samples {options.samples}"
    text = report(rows, changes, command, options.steps, options.samples)
    write(options.out, text)
    write(options.out.with_suffix(".csv"), csv_text(rows, changes))
    print(text)


if __name__ == "__main__":
    main()
