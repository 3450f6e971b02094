"""Vocabularies of motion tokens by k-disks (SMART, arXiv 2405.15677), from recorded segments or from sampled unicycles."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.agent_tokens import SUBSTEPS
from models.motion_head import BOXES, CLASSES, STEP
from models.poses import box_corners, mirror, relative, unicycle

_FORMAT = "1"


class Vocabulary(NamedTuple):
    """The motions that agents choose from.

    Attributes:
        motions: (3, n, 5, 3) float32 for vehicle, pedestrian, cyclist: five poses, 0.1 s apart, in the frame of the
            start. Token 0 stands still. A class that has fewer than n tokens is filled with zeros.
        counts: (3,) int64 tokens of each class.
        tolerances: metres, for each class, the mean corner distance within which a token stood for segments.
    """

    motions: Tensor
    counts: Tensor
    tolerances: tuple[float, ...]


def build(
    segments: Tensor, type: int, size: int, tolerance: float, generator: torch.Generator, mirrored: bool = False
) -> Tensor:
    """k-disks: takes a segment at random, stores the mean of all within `tolerance` of it, removes them, and so on.

    Args:
        segments: (s, 6, 3) poses of motions with their start, 0.1 s apart, in any frame.
        type: 0 vehicle, 1 pedestrian, 2 cyclist; its box measures distances.
        size: tokens wanted; the segments may run out earlier.
        tolerance: metres between the corners of two end boxes, on average over the four.
        generator: draws the segments; on the CPU.
        mirrored: keep the tokens closed under exchange of left and right, as TrajTok (arXiv 2506.21618) does; one token
            less may come back, where the last would be without its mirror image.

    Returns:
        (n, 5, 3) local poses, n ≤ size, the first exactly still.

    Raises:
        ValueError: an unknown class, a size below one, a tolerance that isn't positive, or segments of another shape.
    """
    if not 0 <= type < len(CLASSES):
        raise ValueError(f"unknown class {type}, expected {', '.join(f'{i} {name}' for i, name in enumerate(CLASSES))}")
    if size < 1 or not tolerance > 0:
        raise ValueError(f"size {size} and tolerance {tolerance} must be positive")
    if segments.ndim != 3 or segments.shape[1:] != (SUBSTEPS + 1, 3):
        raise ValueError(f"segments have shape {tuple(segments.shape)}, expected (s, {SUBSTEPS + 1}, 3)")
    motions = relative(segments[:, :1], segments[:, 1:])
    if mirrored:
        motions = torch.cat((motions, mirror(motions)))
    motions = motions[motions[:, -1, 0].argsort()]
    box = motions.new_tensor(BOXES[type])
    disk = _Disks(motions[:, -1], box, tolerance)
    still = motions.new_zeros(SUBSTEPS, 3)
    tokens = [still]
    remaining = torch.ones(len(motions), dtype=torch.bool)
    remaining[disk(still[-1])] = False
    for index in torch.randperm(len(motions), generator=generator).tolist():
        if len(tokens) == size:
            break
        if not remaining[index]:
            continue
        chosen = motions[index]
        near = _only(disk(chosen[-1]), remaining)
        if not mirrored:
            tokens.append(_mean(motions[near]))
        else:
            reflected = _only(disk(mirror(chosen[-1])), remaining)
            if (near == index).any() and (reflected == index).any():  # within the tolerance of its mirror image
                mean = _mean(motions[torch.cat((near, reflected)).unique()])
                tokens.append((mean + mirror(mean)) / 2)
            elif len(tokens) + 2 <= size:
                mean = _mean(motions[near])
                tokens += [mean, mirror(mean)]
            remaining[reflected] = False
        remaining[near] = False
    return torch.stack(tokens)


class _Disks:
    """Which of poses (s, 3), sorted by x, lie within the tolerance of another pose."""

    def __init__(self, poses: Tensor, box: Tensor, tolerance: float) -> None:
        self.x, self.box, self.tolerance = poses[:, 0].contiguous(), box, tolerance
        self.corners = box_corners(poses, box)  # (s, 4, 2)

    def __call__(self, pose: Tensor) -> Tensor:
        """(3,) → indices (n,). Boxes are at least as far apart as their centres, so only a strip of x is looked at."""
        reach = self.tolerance * 1.001  # more than rounding
        low = int(torch.searchsorted(self.x, pose[:1] - reach))
        high = int(torch.searchsorted(self.x, pose[:1] + reach, right=True))
        away = (self.corners[low:high] - box_corners(pose, self.box)).square().sum(-1).sqrt().mean(-1)
        return (away <= self.tolerance).nonzero().flatten() + low


def _only(indices: Tensor, mask: Tensor) -> Tensor:
    """Those of indices (n,) at which the mask is True."""
    return indices[mask[indices]]


def _mean(motions: Tensor) -> Tensor:
    """(s, 5, 3) → (5, 3), headings by their directions."""
    heading = motions[..., 2]
    direction = torch.atan2(heading.sin().mean(0), heading.cos().mean(0))
    return torch.cat((motions[..., :2].mean(0), direction[:, None]), -1)


def join(classes: list[Tensor], tolerances: tuple[float, ...]) -> Vocabulary:
    """Tokens (n, 5, 3) of vehicle, pedestrian and cyclist, as `build` gives them, as one vocabulary."""
    longest = max(len(tokens) for tokens in classes)
    motions = torch.zeros(len(CLASSES), longest, SUBSTEPS, 3)
    for code, tokens in enumerate(classes):
        motions[code, : len(tokens)] = tokens
    return Vocabulary(motions, torch.tensor([len(tokens) for tokens in classes]), tolerances)


class Family(NamedTuple):
    """How a class moves: what `sampled_segments` draws from.

    Attributes:
        speed: metres a second, at most.
        slowness: speeds are `speed` times a power of a uniform number: 1 spreads them evenly, more prefers low ones.
        reversing: share of motions that go backwards, at a tenth of the speed.
        acceleration: metres a second squared, standard deviation.
        turning: radians a second, at most.
        lateral: metres a second squared, at most, which bounds turning at speed.
        drift: metres a second, standard deviation of the speed across the heading.
        swivelling: share that turns on the spot, at up to four times `turning`.
    """

    speed: float
    slowness: float
    reversing: float
    acceleration: float
    turning: float
    lateral: float
    drift: float
    swivelling: float


FAMILIES = (
    Family(32.0, 1.3, 0.05, 2.0, 0.6, 3.5, 0.05, 0.0),
    Family(4.0, 1.0, 0.05, 0.8, 1.5, 3.0, 0.15, 0.1),
    Family(14.0, 1.2, 0.02, 1.2, 1.0, 3.5, 0.08, 0.0),
)


def sampled_segments(family: Family, count: int, generator: torch.Generator) -> Tensor:
    """(count, 6, 3) motions of a unicycle with some drift, from the origin, drawn from a family by a generator on the CPU."""

    def normal() -> Tensor:
        return torch.randn(count, generator=generator, device="cpu")

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator, device="cpu")

    speed = family.speed * uniform() ** family.slowness
    speed = torch.where(uniform() < family.reversing, speed / -10, speed)
    acceleration = family.acceleration * normal().clamp(-4, 4)
    acceleration = torch.where(
        speed > 0, acceleration.maximum(-2 * speed), acceleration
    )  # brakes to a stop, not past it
    bound = family.lateral / speed.abs().clamp(min=1e-3)
    yaw_rate = (2 * uniform() - 1) * bound.clamp(max=family.turning)
    swivels = uniform() < family.swivelling
    speed, acceleration = (torch.where(swivels, 0.0, x) for x in (speed, acceleration))
    yaw_rate = torch.where(swivels, 4 * family.turning * (2 * uniform() - 1), yaw_rate)
    times = torch.arange(SUBSTEPS + 1, device="cpu") * STEP
    poses = unicycle(speed, acceleration, yaw_rate, times)
    poses[..., 1] += (family.drift * normal() * ~swivels)[:, None] * times
    return poses


def sampled(
    size: int = 512, tolerances: Sequence[float] = (0.15, 0.05, 0.1), seed: int = 0, pool: int = 40_000
) -> Vocabulary:
    """A vocabulary that needs no recording: k-disks, closed under mirroring, over `pool` sampled motions of every class.

    The same arguments give the same tokens. Where a default device is set, the tokens are made on the CPU all the same.

    Args:
        size: tokens of a class, at most.
        tolerances: metres, for vehicle, pedestrian, cyclist.
        seed: of the draws.
        pool: motions to draw.

    Raises:
        ValueError: tolerances aren't three positive numbers, or the size isn't positive.
    """
    if len(tolerances) != len(CLASSES):
        raise ValueError(f"tolerances are {tuple(tolerances)}, expected {len(CLASSES)} numbers")
    return _sampled(size, tuple(tolerances), seed, pool)


@lru_cache(maxsize=4)
def _sampled(size: int, tolerances: tuple[float, ...], seed: int, pool: int) -> Vocabulary:
    classes = []
    with torch.device("cpu"):
        for code, family in enumerate(FAMILIES):
            generator = torch.Generator().manual_seed(seed * len(FAMILIES) + code)
            segments = sampled_segments(family, pool, generator)
            classes.append(build(segments, code, size, tolerances[code], generator, mirrored=True))
        return join(classes, tolerances)


def save(vocabulary: Vocabulary, path: Path | str, source: str) -> None:
    """Writes safetensors with `source` (what it was built from) in the metadata; whole or not at all."""
    path = Path(path)
    metadata = {
        "format": _FORMAT,
        "tolerances": json.dumps(vocabulary.tolerances),
        "counts": json.dumps(vocabulary.counts.tolist()),
        "source": source,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({"motions": vocabulary.motions.contiguous()}, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path | str) -> Vocabulary:
    """Reads what `save` wrote.

    Raises:
        OSError: no such file, or it can't be read.
        ValueError: it isn't a vocabulary; the message names the file and what is wrong.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such vocabulary")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path}: format is {metadata.get('format')!r}, expected a vocabulary of format {_FORMAT}"
                )
            motions = file.get_tensor("motions")
            counts, tolerances = (json.loads(metadata[name]) for name in ("counts", "tolerances"))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a vocabulary: {error}") from error
    for name, values, kind in (("counts", counts, int), ("tolerances", tolerances, int | float)):
        if not isinstance(values, list) or [isinstance(each, kind) for each in values] != [True] * len(CLASSES):
            raise ValueError(f"{path}: {name} are {values}, expected {len(CLASSES)} numbers")
    shape = tuple(motions.shape)
    if motions.ndim != 4 or shape != (len(CLASSES), shape[1], SUBSTEPS, 3) or not motions.is_floating_point():
        raise ValueError(f"{path}: motions have shape {shape}, expected ({len(CLASSES)}, n, {SUBSTEPS}, 3)")
    if not 1 <= min(counts) <= max(counts) <= shape[1]:
        raise ValueError(f"{path}: counts are {counts}, expected {len(CLASSES)} numbers from 1 to {shape[1]}")
    if not motions.isfinite().all():
        raise ValueError(f"{path}: motions hold values that aren't finite")
    return Vocabulary(motions.float(), torch.tensor(counts), tuple(tolerances))
