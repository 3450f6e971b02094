"""Image sizes that patches can tile."""

from __future__ import annotations

from timm.layers import to_2tuple


def whole_patches(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Refuse an image that patches don't tile.

    Raises:
        ValueError: names the side, and the nearest size that fits.
    """
    for side, pixels, patch in zip(("height", "width"), to_2tuple(img_size), to_2tuple(patch_size), strict=True):
        if pixels % patch or pixels <= 0:
            near = max(patch, round(pixels / patch) * patch)
            raise ValueError(f"image {side} {pixels} isn't a multiple of the patch ({patch}); the nearest is {near}")
