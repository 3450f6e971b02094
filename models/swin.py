"""RoPE-Swin (arXiv 2403.13298): timm's Swin Transformer (arXiv 2103.14030) with rotary positions inside its windows.

Parameter names are timm's own, plus `rope_freqs`; `models.convert` reads the released weights. Importing this module
registers swin_rope_{axial,mixed}[_rpb]_{tiny,small,base}_patch4_window7_224 beside timm's swin_*, which are their baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from timm.layers import to_2tuple
from timm.models.swin_transformer import SwinTransformer

from models.registration import offer
from models.sizes import whole_patches
from models.window_attention import FusedWindowAttention, RotaryFactory, RotaryWindowAttention
from rotary import Rotary
from rotary.frequencies import Axial, Mixed

WINDOWS_A_SIDE = 8  # in the first stage: 7 × 7 tokens of 4 × 4 pixels at 224, 12 × 12 at 384


class RopeSwin(SwinTransformer):
    """A Swin Transformer whose positions are rotary, a relative position bias, or both.

    Args:
        rotary: makes the `Rotary` of a block from `head_dim` and `heads`; None for none, as the original Swin.
        bias: keep the relative position bias; the paper drops it.
        img_size: pixels, one number or (height, width).
        patch_size: pixels of a patch's side.
        window_size: tokens of a window's side, or (height, width), or one a stage; if None, image side / 32 (at patch 4),
            here and in `set_input_size`, as the paper evaluates larger images.
        others: timm's `SwinTransformer` arguments; `drop_path_rate` rises linearly with depth (paper: tiny 0.2, small
            0.3, base 0.5).

    Raises:
        ValueError: img_size isn't a multiple of the patch, the width of a head doesn't suit the rotary, or nothing tells
            positions.
    """

    def __init__(
        self,
        *,
        rotary: RotaryFactory | None = None,
        bias: bool = False,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        window_size: int | Sequence[int | tuple[int, int]] | None = None,
        **others: Any,
    ) -> None:
        if rotary is None and not bias:
            raise ValueError("RopeSwin: give rotary, bias=True or both; without positions a window is a bag of patches")
        whole_patches(img_size, patch_size)
        self.follows_image = window_size is None
        if window_size is None:
            window_size = tuple(max(1, side // (patch_size * WINDOWS_A_SIDE)) for side in to_2tuple(img_size))
        windows: Any = window_size
        super().__init__(img_size=img_size, patch_size=patch_size, window_size=windows, **others)
        stage: Any
        for stage in self.layers:
            for block in stage.blocks:
                plain = block.attn
                block.attn = RotaryWindowAttention(plain, rotary, bias) if rotary else FusedWindowAttention(plain)

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
        window_size: int | Sequence[int | tuple[int, int]] | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Take images of (height, width) pixels from now on; windows follow unless they were ever given.

        Rotary frequencies extrapolate as they are; bias tables are resized bicubically. Arguments as timm's.
        """
        if img_size is not None:
            whole_patches(img_size, patch_size or cast(Any, self.patch_embed).patch_size)
        if window_size is not None or window_ratio is not None:
            self.follows_image = False
        elif self.follows_image:
            window_ratio = WINDOWS_A_SIDE
        super().set_input_size(img_size, patch_size, window_size, window_ratio, always_partition)

    def no_weight_decay(self) -> set[str]:
        """Frequencies and bias tables take no weight decay."""
        names = {name for name, _ in self.named_parameters() if name.endswith("rope_freqs")}
        return super().no_weight_decay() | names


def axial(**layer: Any) -> Rotary:
    """RoPE-Axial of the paper for windows: fixed, base 50, shared by heads and blocks."""
    return Rotary(Axial(base=50.0), **layer)


def mixed(**layer: Any) -> Rotary:
    """RoPE-Mixed of the paper: learnable, base 10 at first, per head and block."""
    return Rotary(Mixed(base=10.0), learnable=True, **layer)


_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "axial": {"rotary": axial},
    "mixed": {"rotary": mixed},
    "axial_rpb": {"rotary": axial, "bias": True},
    "mixed_rpb": {"rotary": mixed, "bias": True},
}
default_cfgs: dict[str, Mapping[str, Any]] = {}

for _kind, _position in _KINDS.items():
    for _size, _shape in _SIZES.items():
        offer(
            __name__,
            f"swin_rope_{_kind}_{_size}_patch4_window7_224",
            RopeSwin,
            {**_shape, **_position},
            out_indices=lambda arguments: tuple(range(len(arguments["depths"]))),
            features={"feature_cls": "getter", "flatten_sequential": True},
            pool_size=(7, 7),
            crop_pct=0.875,
            classifier="head.fc",
        )
