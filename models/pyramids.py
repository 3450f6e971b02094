"""Feature pyramids over a plain ViT: ViTDet's of its last block (arXiv 2203.16527), and BEiT's of four (arXiv 2208.06366)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from models.windowed_vit import WindowedViT, valid_cells


def _finer(width: int, times: int, narrow: bool) -> tuple[nn.Sequential, int]:
    """Make a map's cells `times` (1, 2, 4) smaller, each cell by itself; narrowed by as much or of the same width."""
    widths = [width // (2**doubling if narrow else 1) for doubling in range(times.bit_length())]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        if layers:
            layers += [LayerNorm2d(before), nn.GELU()]
        layers.append(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2))
    return nn.Sequential(*layers), widths[-1]


def _without_padding(x: Tensor, valid: Tensor | None, value: float = 0.0) -> Tensor:
    return x if valid is None else x.masked_fill(~valid[:, None], value)


class _Rescale(nn.Module):
    """A map (b, c, …) of cells `stride` → cells of another stride, padding untouched by what is image and image by it."""

    def __init__(self, width: int, stride: int, wanted: int, narrow: bool) -> None:
        super().__init__()
        self.stride, self.wanted, self.halvings = stride, wanted, max(1, wanted // stride).bit_length() - 1
        self.layers, self.width = _finer(width, max(1, stride // wanted), narrow)

    def forward(self, x: Tensor, size: tuple[int, int], valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The cells, and which of them are image; `valid` (b, H, W) tells it of pixels, `size` is (H, W)."""
        cells = None if valid is None else valid_cells(valid, self.wanted)
        if self.halvings:
            x = _without_padding(x, None if valid is None else valid_cells(valid, self.stride), float("-inf"))
            for _ in range(self.halvings):
                x = max_pool2d(x, 2, ceil_mode=True)
            x = _without_padding(x, cells)  # infinity times a gradient of zero is no number
        rows, columns = (-(-side // self.wanted) for side in size)
        return self.layers(x)[..., :rows, :columns], cells


class SimplePyramid(nn.Module):
    """ViTDet's pyramid, all levels of the last block: deconvolved, as it is, max-pooled; 1×1 and 3×3 convolutions with norms.

    A level coarser than twice the patch is every second cell of the level before.

    Args:
        trunk: a `WindowedViT` with one tap.
        channels: of every level.
        strides: of the levels, finest first: of a patch of 16 pixels 4, 8, 16, 32, then doublings of the one before.

    Attributes:
        strides: as given.
        channels: of each level.

    Raises:
        ValueError: the trunk has more taps than one, a stride can't be had, or its width doesn't divide by the refinement.
    """

    def __init__(self, trunk: WindowedViT, channels: int = 256, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        patch, width = trunk.stride, trunk.embed_dim
        wanted = tuple(strides) if strides is not None else (patch // 2, patch, 2 * patch, 4 * patch)
        if len(trunk.taps) != 1:
            raise ValueError(f"SimplePyramid: one tap makes all levels, the trunk has {len(trunk.taps)}")
        single = [patch // parts for parts in (4, 2) if patch % parts == 0] + [patch, 2 * patch]
        made = [stride for stride in single if stride in wanted]
        doubled = [2 ** (2 + step) * patch for step in range(len(wanted) - len(made))]
        if not made or wanted != (*made, *doubled) or (doubled and 2 * patch not in made):
            raise ValueError(
                f"SimplePyramid: strides {list(wanted)} of {patch}-pixel patches; choose, rising, from {single}, and after "
                f"{2 * patch} its doublings without a gap"
            )
        if width % max(1, patch // wanted[0]):
            raise ValueError(
                f"SimplePyramid: width {width} doesn't divide by {patch // wanted[0]} for stride {wanted[0]}"
            )
        self.trunk, self.strides, self.channels = trunk, wanted, (channels,) * len(wanted)
        rescales = [_Rescale(width, patch, stride, narrow=True) for stride in made]
        self.rescales = nn.ModuleList(rescales)
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(rescale.width, channels, 1, bias=False), LayerNorm2d(channels))
            for rescale in rescales
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)) for _ in made
        )

    def forward(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """As `models.dense.Backbone`."""
        (features,) = self.trunk(images, valid)
        size = (images.shape[2], images.shape[3])
        levels: list[Tensor] = []
        for rescale, lateral, output in zip(self.rescales, self.laterals, self.outputs, strict=True):
            rescaled, cells = rescale(features, size, valid)
            level = _without_padding(lateral(rescaled), cells)
            levels.append(_without_padding(output(level), cells))
        while len(levels) < len(self.strides):
            levels.append(levels[-1][..., ::2, ::2])
        return levels


class TapPyramid(nn.Module):
    """BEiT's pyramid for UperNet: four blocks rescaled, ×4, ×2, ×1 and ×½, at the trunk's width.

    The norm between the two deconvolutions is over the channels of a cell (LayerNorm), where BEiT takes batch norm
    synchronised over devices: it depends on no other image and no padding.

    Args:
        trunk: a `WindowedViT` with a tap a stride.
        strides: of the levels, each a quarter of a patch, a half, one, two, four …; a quarter to two patches by default.

    Attributes:
        strides: as given.
        channels: the trunk's width, once a level.

    Raises:
        ValueError: the trunk has another number of taps, or a stride can't be had.
    """

    def __init__(self, trunk: WindowedViT, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        patch, width = trunk.stride, trunk.embed_dim
        self.strides = tuple(strides) if strides is not None else (patch // 4, patch // 2, patch, 2 * patch)
        possible = {patch / 4, patch / 2, *(patch * 2**step for step in range(8))}
        if len(trunk.taps) != len(self.strides) or not possible.issuperset(self.strides):
            raise ValueError(
                f"TapPyramid: strides {list(self.strides)} of {len(trunk.taps)} taps and {patch}-pixel patches; needs one a "
                "tap, each a quarter, a half, one, two, four … patches"
            )
        self.trunk, self.channels = trunk, (width,) * len(self.strides)
        self.rescales = nn.ModuleList(_Rescale(width, patch, stride, narrow=False) for stride in self.strides)

    def forward(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """As `models.dense.Backbone`."""
        taps = self.trunk(images, valid)
        size = (images.shape[2], images.shape[3])
        levels = (rescale(tap, size, valid) for rescale, tap in zip(self.rescales, taps, strict=True))
        return [_without_padding(level, cells) for level, cells in levels]
