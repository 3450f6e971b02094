"""RoPE-ViT (arXiv 2403.13298): timm's `Eva` with our rotary in its seat, by the paper's recipe where timm's differs.

Parameter names are timm's own, so timm's weights load as they are; `models.convert` reads the released ones. Importing this
module registers ape_, rope_axial_, rope_mixed_, rope_axial_ape_ and rope_mixed_ape_vit_{tiny,small,base,large}_patch16_224.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from timm.layers import AttentionRope, DropPath, to_2tuple
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.phases import PatchPhases, Positions
from models.registration import offer
from models.sizes import whole_patches
from models.tables import resize_table
from rotary import Rotary, rotate
from rotary.frequencies import Axial, Mixed
from rotary.positions import grid

RotaryFactory = Callable[..., Rotary]


class RotaryAttention(nn.Module):
    """Self-attention that turns queries and keys in one call; takes over the projections of timm's `AttentionRope`."""

    def __init__(self, attention: AttentionRope, logit_gain: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.scale = logit_gain * self.head_dim**-0.5
        self.qkv, self.proj = cast(nn.Linear, attention.qkv), attention.proj
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(b, *n, c) → (b, *n, c), n tokens in a row or rows · columns of them.

        `rope` is the unit phase ([b,] n, 1, h|1, r) of every token, prefix tokens included.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return self.proj_drop(self.proj(self._attend(qkv, rope, attn_mask, is_causal)))

    def _attend(self, qkv: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        shape, qkv = qkv.shape[:-3], qkv.flatten(1, -4)  # (b, n, 3, h, d)
        turned = qkv[:, :, :2] if rope is None else rotate(qkv[:, :, :2], rope)  # (b, n, 2, h, d)
        q, k = turned.permute(2, 0, 3, 1, 4)
        v = qkv[:, :, 2].transpose(1, 2)
        dropout = self.attn_drop.p if self.training else 0.0
        x = scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, scale=self.scale)
        return x.transpose(1, 2).reshape(*shape, -1)


class RopeViT(Eva):
    """A ViT whose positions are rotary, absolute, or both.

    Args:
        rotary: makes the `Rotary` of a block from `head_dim` and `heads` (learnable: one a block); None for none.
        absolute: learned absolute embedding of the patches (APE), resized bicubically without antialiasing.
        positions: patch coordinates of a (height, width) grid; integers by default.
        augmentation: a random map of the coordinates in training, as `rotary.positions.augment`.
        img_size: pixels, one number or (height, width).
        init_values: LayerScale at first; None for no LayerScale.
        init_std: of linear weights at first; the paper's suits its widths, a narrow model wants 1 / sqrt(embed_dim).
        drop_path_rate: the same stochastic depth in every block.
        others: timm's `Eva` arguments.

    Raises:
        ValueError: img_size isn't a multiple of patch_size, embed_dim doesn't divide by num_heads, or the head's width
            doesn't suit the rotary.
    """

    def __init__(
        self,
        *,
        rotary: RotaryFactory | None = None,
        absolute: bool = False,
        positions: Positions = grid,
        augmentation: Callable[[Tensor], Tensor] | None = None,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        init_values: float | None = 1e-4,
        init_std: float = 0.02,
        drop_path_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        global_pool: str = "token",
        **others: Any,
    ) -> None:
        if rotary is None and not absolute:
            raise ValueError("RopeViT: give rotary, absolute=True or both; without positions patches are a bag")
        if embed_dim % num_heads:
            raise ValueError(f"RopeViT: embed_dim={embed_dim} doesn't divide by num_heads={num_heads}")
        if patch_drop_rate:
            raise ValueError("RopeViT: patch_drop_rate isn't supported, phases are kept for whole grids")
        for name in ("qk_norm", "scale_attn_inner", "num_kv_heads"):
            if others.get(name):
                raise ValueError(f"RopeViT: {name} isn't supported by its attention")
        whole_patches(img_size, patch_size)
        self.init_std = init_std
        super().__init__(
            img_size=to_2tuple(img_size),
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            attn_type="rope",
            qkv_fused=True,
            qkv_bias=True,
            init_values=init_values,
            global_pool=global_pool,
            use_abs_pos_emb=absolute,
            use_rot_pos_emb=False,
            no_embed_class=True,
            head_init_scale=1.0,
            **others,
        )
        if rotary is not None:
            self.rope = self._phases(
                rotary,
                depth=depth,
                heads=num_heads,
                head_dim=embed_dim // num_heads,
                prefix=self.num_prefix_tokens,
                positions=positions,
                augmentation=augmentation,
            )
            self.rope_mixed = True  # the seat answers with one phase a block
        gain = self.rope.logit_gain if isinstance(self.rope, PatchPhases) else 1.0
        for index, block in enumerate(self.blocks):
            block.attn = self._attention(index, cast(AttentionRope, block.attn), gain)
            if drop_path_rate > 0:
                block.drop_path1, block.drop_path2 = DropPath(drop_path_rate), DropPath(drop_path_rate)

    def _phases(self, rotary: RotaryFactory, **layers: Any) -> PatchPhases:
        return PatchPhases(rotary, **layers)

    def _attention(self, index: int, attention: AttentionRope, logit_gain: float) -> RotaryAttention:
        return RotaryAttention(attention, logit_gain)

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        super()._init_weights(m, needs_reset)
        if isinstance(m, nn.Linear) and self.init_std != 0.02:
            nn.init.trunc_normal_(m.weight, std=self.init_std)

    def fix_init_weight(self) -> None:
        """The paper rescales no projection with depth, timm does."""

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Take images of (height, width) pixels from now on: rotary positions extrapolate, APE is resized.

        Raises:
            ValueError: a side isn't a multiple of the patch.
        """
        whole_patches(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        old, pos_embed, self.pos_embed = self.patch_embed.grid_size, self.pos_embed, None
        super().set_input_size(img_size, patch_size)
        if pos_embed is not None:
            resized = resize_table(pos_embed, old, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resized.detach(), requires_grad=pos_embed.requires_grad)

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Any]:
        shape = (x.shape[1], x.shape[2]) if self.dynamic_img_size else self.patch_embed.grid_size
        x = x.flatten(1, -2) if self.dynamic_img_size else x
        if self.pos_embed is not None:
            x = x + resize_table(self.pos_embed, self.patch_embed.grid_size, shape)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = self.pos_drop(torch.cat([*prefix, x], dim=1))
        return x, self.rope.get_embed(shape) if isinstance(self.rope, PatchPhases) else None


def axial(**layer: Any) -> Rotary:
    """RoPE-Axial of the paper: fixed, base 100, shared by heads and blocks."""
    return Rotary(Axial(base=100.0), **layer)


def mixed(**layer: Any) -> Rotary:
    """RoPE-Mixed of the paper: learnable, base 10 at first, per head and block."""
    return Rotary(Mixed(base=10.0), learnable=True, **layer)


_SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "ape": {"absolute": True},
    "rope_axial": {"rotary": axial},
    "rope_mixed": {"rotary": mixed},
    "rope_axial_ape": {"rotary": axial, "absolute": True},
    "rope_mixed_ape": {"rotary": mixed, "absolute": True},
}
default_cfgs: dict[str, Mapping[str, Any]] = {}

for _kind, _position in _KINDS.items():
    for _size, _shape in _SIZES.items():
        offer(
            __name__,
            f"{_kind}_vit_{_size}_patch16_224",
            RopeViT,
            {**_shape, **_position},
            out_indices=lambda arguments: 3,
            features={"feature_cls": "getter"},
            pool_size=None,
            crop_pct=1.0,
            classifier="head",
        )
