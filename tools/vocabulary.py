"""Builds vocabularies of motion tokens from recorded scenes, and tells how well one covers them.

python -m tools.vocabulary build --source FOLDER --out vocabulary.safetensors
python -m tools.vocabulary inspect --vocabulary vocabulary.safetensors --source embedded --picture tokens.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from datamodules.embedded_scenes import load_embedded
from datamodules.scene import AgentType, Scene
from datamodules.synthetic_scenes import synthetic_scene
from models.agent_tokens import SUBSTEPS, MotionState
from models.motion_head import BOXES, CLASSES, STEP
from models.poses import box_corners
from models.token_head import TokenHead
from models.tokenise import steady_headings, tokenise
from models.vocabulary import FAMILIES, Vocabulary, build, join, load, sampled, sampled_segments, save
from tools.scene_source import EMBEDDED, FILES, scenes_of_files

SYNTHETIC = "synthetic"
_CLASS_OF = {AgentType.VEHICLE: 0, AgentType.PEDESTRIAN: 1, AgentType.CYCLIST: 2}


def open_scenes(source: str, count: int) -> Iterable[Scene]:
    """The embedded scenes, `count` synthetic ones, or those of files."""
    if source == EMBEDDED:
        return load_embedded(extra=True)
    if source == SYNTHETIC:
        return (synthetic_scene(seed) for seed in range(count))
    return scenes_of_files(Path(source))


def tracks(scene: Scene) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """For every class in the scene: its code, poses (a, t, 3) with steady headings, velocities (a, t, 2), valid (a, t) and
    sizes (a, 3)."""
    for type, code in _CLASS_OF.items():
        agents = (scene.agent_types == type).nonzero().flatten()
        if len(agents):
            valid = scene.valid[agents]
            heading = steady_headings(scene.headings[agents], valid)
            pose = torch.cat((scene.positions[agents][..., :2], heading[..., None]), -1)
            yield code, pose, scene.velocities[agents], valid, scene.sizes[agents].amax(1)


def collect(scenes: Iterable[Scene], most: int, generator: torch.Generator) -> list[Tensor]:
    """For every class its motions (s, 6, 3): all six-step stretches that are valid throughout, `most` of them by chance."""
    found: list[list[Tensor]] = [[] for _ in CLASSES]
    for scene in scenes:
        for code, pose, _, valid, _ in tracks(scene):
            stretches = pose.unfold(1, SUBSTEPS + 1, 1).transpose(-1, -2)  # (a, t − 5, 6, 3)
            found[code].append(stretches[valid.unfold(1, SUBSTEPS + 1, 1).all(-1)])
    pools = [torch.cat([torch.zeros(0, SUBSTEPS + 1, 3), *each]) for each in found]
    return [pool[torch.randperm(len(pool), generator=generator)[:most]] for pool in pools]


@dataclass(frozen=True)
class Inspection:
    """How tokens of a class stand for motions; distances in metres, mean over a box's corners.

    Attributes:
        agent: the class.
        tokens: how many there are.
        segments: how many motions they were compared with.
        within: share of motions within the tolerance of a token.
        dead: tokens that are the nearest of no motion.
        matched: motions of tracks that were matched one after another.
        mean, percentile95, most: distance from the recorded to the matched pose along those tracks.

    Where there is no motion, shares and distances are None.
    """

    agent: str
    tokens: int
    segments: int
    within: float | None
    dead: int
    matched: int
    mean: float | None
    percentile95: float | None
    most: float | None


def inspect(vocabulary: Vocabulary, scenes: list[Scene], most: int) -> tuple[list[Inspection], list[Tensor]]:
    """For every class, the inspection and how many motions each token (n,) is the nearest of."""
    head = TokenHead(1, vocabulary)
    pools = collect(scenes, most, torch.Generator().manual_seed(0))
    inspections, uses = [], []
    for code, (pool, errors) in enumerate(zip(pools, reconstruction(head, scenes), strict=True)):
        tokens = int(vocabulary.counts[code])
        type = torch.full((len(pool),), code)
        state = MotionState(pool[:, 0], torch.zeros(len(pool)), type, torch.zeros(len(pool), 3))
        action = head.nearest(state, pool[:, 1:])
        _, end = head.advance(state, action)
        used = torch.bincount(action, minlength=tokens)
        distance = _box_distance(pool[:, -1], end.pose, code)
        inspections.append(
            Inspection(
                CLASSES[code],
                tokens,
                len(pool),
                _summary(distance <= vocabulary.tolerances[code], torch.mean),
                int((used[:tokens] == 0).sum()),
                len(errors),
                _summary(errors, torch.mean),
                _summary(errors, lambda values: values.sort().values[int(0.95 * (len(values) - 1))]),
                _summary(errors, torch.max),
            )
        )
        uses.append(used)
    return inspections, uses


def reconstruction(head: TokenHead, scenes: list[Scene]) -> list[Tensor]:
    """For every class (m,) metres between recorded and matched poses at the ends of all motions, tracks being matched from
    their start to their end."""
    errors: list[list[Tensor]] = [[] for _ in CLASSES]
    for scene in scenes:
        steps = (scene.steps - 1) // SUBSTEPS * SUBSTEPS + 1
        for code, pose, velocity, valid, size in tracks(scene):
            pose, velocity, valid = (each[None, :, :steps] for each in (pose, velocity, valid))
            type = torch.full(pose.shape[:2], code)
            tokens = tokenise(head, pose, velocity, valid, type, size[None]).tokens
            ends = slice(SUBSTEPS, None, SUBSTEPS)
            counts = tokens.valid & valid[:, :, ends]
            errors[code].append(_box_distance(pose[:, :, ends], tokens.pose, code)[counts])
    return [torch.cat([torch.zeros(0), *each]) for each in errors]


def _box_distance(pose: Tensor, other: Tensor, code: int) -> Tensor:
    box = pose.new_tensor(BOXES[code])
    return (box_corners(pose, box) - box_corners(other, box)).norm(dim=-1).mean(-1)


def _summary(values: Tensor, of: Callable[[Tensor], Tensor]) -> float | None:
    return float(of(values.float())) if len(values) else None


def _sentence(each: Inspection, tolerance: float) -> str:
    text = f"{each.agent}: {each.tokens} tokens, {each.segments} motions"
    if each.segments:
        text += f", {each.within:.1%} within {tolerance:g} m, {each.dead} dead"
    if each.matched:
        text += (
            f"; {each.matched} matched in turn: {each.mean:.3f} m off on average, 95 % below {each.percentile95:.3f} m,"
            f" at most {each.most:.3f} m"
        )
    return text


def draw(vocabulary: Vocabulary, uses: list[Tensor], path: Path) -> None:
    """Draws the tokens of every class as PNG: their ways and end headings, dead ones in grey."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.collections import LineCollection

    figure, axes = pyplot.subplots(1, len(CLASSES), figsize=(18, 6), layout="constrained")
    for code, (name, axis) in enumerate(zip(CLASSES, axes, strict=True)):
        motions = vocabulary.motions[code, : vocabulary.counts[code]]
        alive = uses[code][: len(motions)] > 0
        ways = torch.cat((torch.zeros(len(motions), 1, 2), motions[..., :2]), 1)
        for chosen, colour, label in ((~alive, "0.8", "dead"), (alive, "tab:blue", "used")):
            axis.add_collection(LineCollection(list(ways[chosen].numpy()), colors=colour, linewidths=0.3))
            x, y, heading = motions[chosen, -1].unbind(-1)
            axis.quiver(
                x, y, heading.cos(), heading.sin(), color=colour, label=f"{label}: {int(chosen.sum())}",
                width=0.002, scale=40, headwidth=4,
            )  # fmt: skip
        axis.set(title=f"{name}: {len(motions)} tokens of {SUBSTEPS * STEP:g} s", xlabel="forward, m", ylabel="left, m")
        axis.legend(loc="upper left")
        axis.autoscale_view()
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)


def _build(arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(arguments.seed)
    pools = collect(open_scenes(arguments.source, arguments.scenes), arguments.segments, generator)
    tolerances = tuple(arguments.tolerance * (3 // len(arguments.tolerance)))
    classes = []
    for code, pool in enumerate(pools):
        recorded, added = len(pool), arguments.sampled if len(pool) else max(arguments.sampled, 40_000)
        pool = torch.cat((pool, sampled_segments(FAMILIES[code], added, generator)))
        classes.append(build(pool, code, arguments.size, tolerances[code], generator, arguments.mirrored))
        print(f"{CLASSES[code]}: {len(classes[-1])} tokens from {recorded} recorded and {added} sampled motions")
    save(join(classes, tolerances), arguments.out, arguments.source)
    print(arguments.out)


def _inspect(arguments: argparse.Namespace) -> None:
    vocabulary = load(arguments.vocabulary) if arguments.vocabulary else sampled()
    scenes = list(open_scenes(arguments.source, arguments.scenes))
    inspections, uses = inspect(vocabulary, scenes, arguments.segments)
    for each, tolerance in zip(inspections, vocabulary.tolerances, strict=True):
        print(_sentence(each, tolerance))
    if arguments.json:
        temporary = arguments.json.with_name(f".{arguments.json.name}.{os.getpid()}")
        temporary.write_text(json.dumps([asdict(each) for each in inspections], indent=1))
        os.replace(temporary, arguments.json)
    if arguments.picture:
        draw(vocabulary, uses, arguments.picture)
        print(arguments.picture)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.vocabulary", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--source", default=EMBEDDED, help=f"'embedded', 'synthetic', or {FILES}")
    shared.add_argument("--scenes", type=int, default=32, help="number of synthetic scenes (default 32)")
    shared.add_argument("--segments", type=int, default=200_000, help="motions of a class, at most (default 200000)")
    made = commands.add_parser("build", parents=[shared], help="k-disks over recorded motions")
    made.add_argument("--size", type=int, default=2048, help="tokens of a class, at most (default 2048)")
    made.add_argument(
        "--tolerance", type=float, nargs="+", default=[0.05], metavar="M", help="one, or one for each class"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--mirrored", action=argparse.BooleanOptionalAction, default=True, help="left as right")
    made.add_argument(
        "--sampled",
        type=int,
        default=0,
        metavar="N",
        help="add N motions of a unicycle; a class without records gets 40000",
    )
    made.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    made.set_defaults(run=_build)
    seen = commands.add_parser("inspect", parents=[shared], help="coverage, dead tokens, reconstruction error")
    seen.add_argument("--vocabulary", type=Path, help="file that build wrote (default: the sampled one)")
    seen.add_argument("--picture", type=Path, help="PNG to draw")
    seen.add_argument("--json", type=Path, help="also write the numbers here")
    seen.set_defaults(run=_inspect)
    arguments = parser.parse_args(argv)
    if arguments.run is _build and len(arguments.tolerance) not in (1, len(CLASSES)):
        parser.error(f"--tolerance takes one number or {len(CLASSES)}, not {len(arguments.tolerance)}")
    try:
        arguments.run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
