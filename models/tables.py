"""Tables over a grid that are learned for one resolution: relative position bias and absolute embeddings, and their resize.

Both references resize bicubically, without aligned corners or antialiasing (arXiv 2103.14030, 2403.13298).
"""

from __future__ import annotations

from math import isqrt

from torch import Tensor, nn
from torch.nn.functional import interpolate

Size = tuple[int, int]


def resize_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """A table of old[0] · old[1] rows, row-major, read as an image and resized.

    Args:
        table: (*1, old[0] · old[1], c), as `pos_embed` (1, n, d) or `relative_position_bias_table` (n, h).
        old: rows and columns of the grid the table was learned on.
        new: rows and columns wanted.

    Returns:
        (*1, new[0] · new[1], c) in the table's dtype, differentiable; the table itself where the sizes agree.
    """
    if old == new:
        return table
    channels = table.shape[-1]
    image = table.float().reshape(1, *old, channels).permute(0, 3, 1, 2)
    resized = interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=False)
    rows = resized.permute(0, 2, 3, 1).reshape(new[0] * new[1], channels)
    return rows.reshape(*table.shape[:-2], *rows.shape).to(table.dtype)


def bias_size(window: Size) -> Size:
    """Offsets between two tokens of a (height, width) window: rows and columns of its bias table."""
    return 2 * window[0] - 1, 2 * window[1] - 1


def table_sizes(model: nn.Module) -> dict[str, Size]:
    """Parameter name → grid (rows, columns), for every table of the model that belongs to one resolution."""
    sizes = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if getattr(module, "relative_position_bias_table", None) is not None:
            sizes[f"{prefix}relative_position_bias_table"] = bias_size(module.window_size)
        if getattr(module, "pos_embed", None) is not None:
            sizes[f"{prefix}pos_embed"] = tuple(module.patch_embed.grid_size)
    return sizes


def guessed_size(rows: int, wanted: Size) -> Size | None:
    """The grid of a table whose file doesn't tell: square, else the wanted one, else unknown."""
    side = isqrt(rows)
    if side * side == rows:
        return side, side
    return wanted if rows == wanted[0] * wanted[1] else None
