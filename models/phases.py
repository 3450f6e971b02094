"""The rope seat of a vision transformer: patch grid → one unit phase a block, built per block and kept by shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from models.kept_phases import KeepsPhases
from rotary import Rotary, phase_of, unit
from rotary.module import KeepsDtype
from rotary.positions import grid


class Positions(Protocol):
    """Patch coordinates of a grid: (height · width, 2) columns (x, y)."""

    def __call__(self, height: int, width: int, *, device: torch.device | None = None) -> Tensor: ...


class PatchPhases(KeepsPhases, KeepsDtype):
    """Unit phases (prefix + n, 1, h|1, r) of a patch grid for every block; prefix tokens stand at the origin, unturned.

    Learnable frequencies of all blocks are one parameter `freqs` (2, blocks, h, r), as timm stores them. What a gradient
    doesn't need is kept until the grid, the device or the frequencies change.

    Args:
        rotary: makes the `Rotary` of a block from `head_dim` and `heads`.
        depth: blocks.
        heads: attention heads of a block.
        head_dim: channels of a head.
        prefix: class and register tokens before the patches.
        positions: coordinates of a grid.
        augmentation: random map of the coordinates, used in training; one draw for all blocks.
        windows: side in patches of the windows that each block attends in, whose phase is then that of one window, counted
            from its own corner and never scaled; None for a block that sees the whole grid, as all do by default.

    Attributes:
        follows_extent: the phase of a patch depends on the size of the grid, as with normalised coordinates.
    """

    freqs: nn.Parameter | None

    def __init__(
        self,
        rotary: Callable[..., Rotary],
        *,
        depth: int,
        heads: int,
        head_dim: int,
        prefix: int,
        positions: Positions = grid,
        augmentation: Callable[[Tensor], Tensor] | None = None,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        super().__init__()
        first = rotary(head_dim=head_dim, heads=heads)
        if first.axes != 2:
            raise ValueError(f"an image has 2 axes, the rotary has {first.axes}")
        self.depth, self.prefix, self.positions, self.augmentation = depth, prefix, positions, augmentation
        self.windows = (None,) * depth if windows is None else tuple(windows)
        self.logit_gain = first.logit_gain
        self.follows_extent = positions is not grid or first.scaling.dynamic
        if isinstance(first.frequencies, nn.Parameter):
            layers = [first] + [rotary(head_dim=head_dim, heads=heads) for _ in range(depth - 1)]
            stacked = torch.stack([layer.frequencies.detach() for layer in layers])  # (blocks, h, 2, r)
            self.freqs = nn.Parameter(stacked.permute(2, 0, 1, 3).contiguous())
            self.scaling = first.scaling
        else:
            self.freqs, self.rotary = None, first

    def no_weight_decay(self) -> set[str]:
        """timm's optimizer factories ask."""
        return {"freqs"}

    def get_embed(self, shape: tuple[int, int]) -> list[Tensor]:
        """Unit phases of a (height, width) grid of patches, one tensor a block (timm's protocol)."""
        if self.training and self.augmentation is not None:
            return self._build(shape)
        return self.phases_of(self._frequencies(), tuple(shape), lambda: self._build(shape))

    def _frequencies(self) -> Tensor:
        return self.rotary.frequencies if self.freqs is None else self.freqs

    def _build(self, shape: tuple[int, int]) -> list[Tensor]:
        # one a block: its grid, and whether scalings touch it; a window has the extent it was trained with at any size
        seen = [(shape, True) if side is None else ((side, side), False) for side in self.windows]
        places = self._places(dict.fromkeys(own for own, _ in seen))
        lengths = {own: torch.tensor(max(own), device=where.device) for own, where in places.items()}
        if self.freqs is None:
            tables = {
                (own, scaled): self._with_prefix(
                    phase_of(places[own], self.rotary.scaled(lengths[own]) if scaled else self.rotary.frequencies)
                )
                for own, scaled in set(seen)
            }
            return [tables[each] for each in seen]
        layers = (layer.transpose(0, 1) for layer in self.freqs.unbind(1))  # (h, 2, r) each
        return [
            self._with_prefix(phase_of(places[own], self.scaling(layer, lengths[own]) if scaled else layer))
            for (own, scaled), layer in zip(seen, layers, strict=True)
        ]

    def _places(self, shapes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
        places = {shape: self.positions(*shape, device=self._frequencies().device) for shape in shapes}
        if self.training and self.augmentation is not None:
            moved = self.augmentation(torch.cat(list(places.values())))
            places = dict(zip(places, moved.split([len(where) for where in places.values()]), strict=True))
        return places

    def _with_prefix(self, phase: Tensor) -> Tensor:
        phase = torch.nn.functional.pad(phase, (0, 0, self.prefix, 0))  # (h, prefix + n, r)
        return unit(phase.transpose(0, 1).unsqueeze(1).contiguous())
