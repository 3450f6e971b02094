"""Positions of text–vision–text streams: each layout walks the segments and returns positions and the next free one.

A layout answers (positions (n, p) float32, next position); generated text goes on from the next position, one a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """A run of text tokens."""

    tokens: int


class Vision(NamedTuple):
    """An image (one frame) or a video of frames × height × width merged patches, in row-major order (t, h, w)."""

    frames: int
    height: int
    width: int

    def indices(self) -> Tensor:
        """(frames · height · width, 3) float32: frame, row and column of each patch."""
        ranges = [torch.arange(n, dtype=torch.float32) for n in self]
        return torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).flatten(0, 2)


def _stream(
    segments: Sequence[Text | Vision],
    streams: int,
    start: float,
    place: Callable[[Vision, float], tuple[Tensor, float]],
) -> tuple[Tensor, float]:
    parts, cursor = [torch.zeros(0, streams)], float(start)
    for segment in segments:
        if isinstance(segment, Text):
            parts.append((cursor + torch.arange(segment.tokens, dtype=torch.float32))[:, None].expand(-1, streams))
            cursor += segment.tokens
        else:
            if min(segment) < 1:
                raise ValueError(f"video: a vision segment needs frames, height and width ≥ 1, got {segment}")
            positions, cursor = place(segment, cursor)
            parts.append(positions)
    return torch.cat(parts), cursor


def mrope(segments: Sequence[Text | Vision], start: float = 0) -> tuple[Tensor, float]:
    """M-RoPE, also called RoPE-3D: columns (t, h, w); text goes on after the largest of them (arXiv 2409.12191)."""

    def place(vision: Vision, cursor: float) -> tuple[Tensor, float]:
        return cursor + vision.indices(), cursor + max(vision)

    return _stream(segments, 3, start, place)


def vrope(segments: Sequence[Text | Vision], start: float = 0, *, released_order: bool = False) -> tuple[Tensor, float]:
    """VRoPE: four streams, one from each corner of the frame, frames laid end to end (arXiv 2502.11664 eq. 6-8).

    Columns are the paper's v1 … v4; with `released_order` they are v1, v4, v2, v3, as in the authors' code.
    """

    def place(vision: Vision, cursor: float) -> tuple[Tensor, float]:
        t, h, w = vision.indices().unbind(-1)
        height, width = vision.height, vision.width
        corners = torch.stack((w + h, w - h + height - 1, height + width - 2 - w - h, h - w + width - 1), dim=-1)
        if released_order:
            corners = corners[:, [0, 3, 1, 2]]
        span = height + width - 1
        return corners + cursor + span * t[:, None], cursor + span * vision.frames

    return _stream(segments, 4, start, place)


def video_rope(
    segments: Sequence[Text | Vision],
    start: float = 0,
    *,
    stride: float | Sequence[float] = 2.0,
    released: bool = True,
) -> tuple[Tensor, float]:
    """VideoRoPE's diagonal layout, columns (t, h, w): frames `stride` apart, their centre on the text's diagonal.

    HoPE (arXiv 2505.20444) is this layout with `stride` drawn for each video and the temporal frequencies at rest.

    Args:
        segments: text and vision, in order.
        start: position of the first token.
        stride: positions between frames, one for all vision segments or one for each (arXiv 2502.05173: 2).
        released: follow the released code, as its checkpoints do: integer centring (n − 1) // 2 and text after the last
            frame + 1. Else the paper: real centring n / 2 and text after stride · frames.
    """
    count = sum(isinstance(segment, Vision) for segment in segments)
    strides = list(stride) if isinstance(stride, Sequence) else [stride] * count
    if len(strides) != count:
        raise ValueError(f"video_rope: {len(strides)} strides for {count} vision segments")
    if any(s <= 0 for s in strides):
        raise ValueError(f"video_rope: strides must be positive, got {strides}")
    remaining = iter(strides)

    def place(vision: Vision, cursor: float) -> tuple[Tensor, float]:
        step = next(remaining)
        t, h, w = vision.indices().unbind(-1)
        centre = cursor + step * t
        middle = [(n - 1) // 2 if released else n / 2 for n in (vision.height, vision.width)]
        positions = torch.stack((centre, centre + h - middle[0], centre + w - middle[1]), dim=-1)
        after = step * (vision.frames - 1) + 1 if released else step * vision.frames
        return positions, cursor + after

    return _stream(segments, 3, start, place)
