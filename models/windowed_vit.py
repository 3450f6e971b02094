"""The ViTDet form of RoPE-ViT: attention in windows, with some global blocks, over images of any size (arXiv 2203.16527).

Logits see only offsets, so one phase table of one window serves all windows, and nothing that was learned is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import AttentionRope
from torch import Tensor
from torch.nn.functional import max_pool2d, pad
from torch.utils.checkpoint import checkpoint as recomputed

from models.phases import PatchPhases
from models.tables import Size, resize_table
from models.vit import RopeViT, RotaryAttention, RotaryFactory


def valid_cells(valid: Tensor, stride: int) -> Tensor:
    """(b, H, W) bool → (b, ceil(H / stride), ceil(W / stride)): the cells that hold any pixel of their image."""
    return max_pool2d(valid[:, None].float(), stride, ceil_mode=True)[:, 0] > 0


def split_windows(x: Tensor, side: int) -> Tensor:
    """(b, rows, columns, *c) → (b · windows, side, side, *c), zeros where a window leaves the grid."""
    rows, columns, rest = x.shape[1], x.shape[2], x.ndim - 3
    down, right = -rows % side, -columns % side
    if down or right:
        x = pad(x, (0, 0) * rest + (0, right, 0, down))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (b, rows / side, side, columns / side, side, *c)
    return x.transpose(2, 3).flatten(0, 2)


def join_windows(x: Tensor, grid: Size) -> Tensor:
    """What `split_windows` made of (b, rows, columns, *c), put back."""
    side = x.shape[1]
    down, across = (-(-length // side) for length in grid)
    x = x.unflatten(0, (-1, down, across)).transpose(2, 3)  # (b, rows / side, side, columns / side, side, *c)
    return x.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]


class WindowAttention(RotaryAttention):
    """Self-attention within windows of a grid (b, rows, columns, c); only queries, keys and values are padded to windows.

    `rope` is the phase of one window (side², 1, h|1, r), `attn_mask` (b · windows, 1, 1, side²) its keys.
    """

    def __init__(self, attention: AttentionRope, logit_gain: float, side: int) -> None:
        super().__init__(attention, logit_gain)
        self.side = side

    def _attend(self, qkv: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        windows = split_windows(qkv, self.side)
        return join_windows(super()._attend(windows, rope, attn_mask, is_causal), (qkv.shape[1], qkv.shape[2]))


class WindowedViT(RopeViT):
    """A headless RoPE-ViT for dense tasks: images of any size → maps of its patches.

    Parameter names are those of `RopeViT`, whose weights come in by

        load_checkpoint(model, path, resize=True, skip=model.not_pretrained)

    There is no final norm, as ViTDet and BEiT have none; what a block gives is what is returned. An absolute embedding stays
    as it was learned, for `img_size`, and is resized in every forward to the extent of each image.

    Args:
        window: patches of a window's side; None makes every block global.
        global_blocks: blocks that see the whole image, counted from 0; unused where `window` is None.
        taps: blocks whose output is returned, rising, the last block among them; that block alone by default.
        class_token: keep the class token, which then attends too and is left out of the maps; only without windows.
        checkpoint: recompute each block in the backward pass, for less memory.
        others: of `RopeViT`; `img_size` is what the absolute embedding was learned for, `num_classes` and `global_pool` mean
            nothing here.

    Attributes:
        stride: pixels of a patch's side.
        taps: as given.
        not_pretrained: beginnings of names that an ImageNet checkpoint has and this network lacks.

    Raises:
        ValueError: a block isn't there or never used, or prefix tokens are asked for within windows.
    """

    def __init__(
        self,
        *,
        window: int | None = 14,
        global_blocks: Sequence[int] = (),
        taps: Sequence[int] | None = None,
        class_token: bool = False,
        checkpoint: bool = False,
        depth: int = 12,
        patch_size: int = 16,
        **others: Any,
    ) -> None:
        last = depth - 1
        self.taps = (last,) if taps is None else tuple(taps)
        if not self.taps or self.taps != tuple(sorted({block for block in self.taps if 0 <= block < depth})):
            raise ValueError(f"WindowedViT: taps {list(self.taps)} must be rising numbers of blocks, 0 … {last}")
        if self.taps[-1] != last:
            raise ValueError(f"WindowedViT: blocks after the last tap, {self.taps[-1]}, are unused; give it {last}")
        if any(not 0 <= block < depth for block in global_blocks):
            raise ValueError(f"WindowedViT: global_blocks {list(global_blocks)} must be numbers of blocks, 0 … {last}")
        if window is not None and window < 1:
            raise ValueError(f"WindowedViT: window must be a number of patches or None, got {window}")
        if window is not None and (class_token or others.get("num_reg_tokens")):
            raise ValueError(
                "WindowedViT: class and register tokens belong to no window; drop them or give window=None"
            )
        self.windows = tuple(None if block in global_blocks else window for block in range(depth))
        fixed = {"num_classes": 0, "global_pool": "", "use_fc_norm": False, "use_post_transformer_norm": False}
        any_size = {"dynamic_img_size": True, "dynamic_img_pad": True}
        super().__init__(depth=depth, patch_size=patch_size, class_token=class_token, **{**others, **fixed, **any_size})
        self.stride = patch_size
        self.grad_checkpointing = checkpoint
        tokens = {"cls_token": self.cls_token, "reg_token": self.reg_token}
        self.not_pretrained = ("head.", "norm.", "fc_norm.", *(name for name, token in tokens.items() if token is None))

    def _phases(self, rotary: RotaryFactory, **layers: Any) -> PatchPhases:
        return PatchPhases(rotary, windows=self.windows, **layers)

    def _attention(self, index: int, attention: AttentionRope, logit_gain: float) -> RotaryAttention:
        side = self.windows[index]
        if side is None:
            return RotaryAttention(attention, logit_gain)
        return WindowAttention(attention, 1.0, side)  # a scaling's gain is for longer contexts, which windows aren't

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Resize the absolute embedding for good; needed by no image, as every forward takes any size.

        Raises:
            ValueError: a side isn't a multiple of the patch, or the patch would change.
        """
        if patch_size is not None and tuple(patch_size) != (self.stride, self.stride):
            raise ValueError(f"WindowedViT: patches are {self.stride} pixels a side, which its maps are made for")
        super().set_input_size(img_size)

    def forward_features(self, *given: Any, **named: Any) -> Tensor:
        """Refused: tokens are in no one row here."""
        raise NotImplementedError("WindowedViT: call it for its maps; it has no row of tokens")

    def forward_intermediates(self, *given: Any, **named: Any) -> Any:
        """Refused: tokens are in no one row here."""
        raise NotImplementedError("WindowedViT: call it for its maps, one a tap")

    def forward(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:  # type: ignore[override]
        """Maps (b, c, ceil(H / stride), ceil(W / stride)) of images (b, 3, H, W), one a tap.

        `valid` (b, H, W) bool tells an image from its padding at the right and below; None means all is image. A patch is
        image if any of its pixels is. What is padding never changes what is image, and is zero in the maps.
        """
        patches: Tensor | None = None
        if valid is not None:
            images = images.masked_fill(~valid[:, None], 0.0)
            patches = valid_cells(valid, self.stride)
            if not torch.compiler.is_compiling() and bool(patches.all()):
                patches = None  # without a mask attention is faster
        x = self.patch_embed(images)  # (b, rows, columns, c)
        grid: Size = (x.shape[1], x.shape[2])
        extents = self._extents(patches)
        if self.pos_embed is not None:
            x = x + self._absolute(grid, extents)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if prefix:
            x = torch.cat([*prefix, x.flatten(1, 2)], dim=1)
        x = self.norm_pre(self.pos_drop(x))
        masks = {side: self._keys(side, patches, grid, len(images)) for side in set(self.windows)}
        maps = []
        for index, (block, phase) in enumerate(zip(self.blocks, self._turns(grid, extents), strict=True)):
            mask = masks[self.windows[index]]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, recomputed(block, x, rope=phase, attn_mask=mask, use_reentrant=False))
            else:
                x = block(x, rope=phase, attn_mask=mask)
            if index in self.taps:
                maps.append(x[:, self.num_prefix_tokens :].unflatten(1, grid) if prefix else x)
        if patches is not None:
            maps = [one.masked_fill(~patches[..., None], 0.0) for one in maps]
        return [one.permute(0, 3, 1, 2) for one in maps]

    def _extents(self, patches: Tensor | None) -> list[Size] | None:
        """Rows and columns that each image fills, where they differ from the grid's and anything depends on them."""
        follows = isinstance(self.rope, PatchPhases) and self.rope.follows_extent and None in self.windows
        if patches is None or not (follows or self.pos_embed is not None):
            return None
        counts = torch.stack((patches.any(2).sum(1), patches.any(1).sum(1)), dim=1).clamp(min=1)
        return [(rows, columns) for rows, columns in counts.tolist()]

    def _absolute(self, grid: Size, extents: list[Size] | None) -> Tensor:
        tables = [
            _on_grid(resize_table(cast(Tensor, self.pos_embed), self.patch_embed.grid_size, own)[0], own, grid)
            for own in extents or [grid]
        ]
        return torch.stack(tables).unflatten(1, grid)

    def _turns(self, grid: Size, extents: list[Size] | None) -> Sequence[Tensor | None]:
        """The phase of every block; of every image too, where positions depend on an image's extent."""
        if not isinstance(self.rope, PatchPhases):
            return [None] * len(self.blocks)
        if extents is None or not self.rope.follows_extent:
            return self.rope.get_embed(grid)
        blocks = zip(*(self.rope.get_embed(own) for own in extents), strict=True)  # each the phases of all images
        return [
            torch.stack([_on_grid(phase, own, grid) for phase, own in zip(phases, extents, strict=True)])
            if side is None
            else phases[0]
            for side, phases in zip(self.windows, blocks, strict=True)
        ]

    def _keys(self, side: int | None, patches: Tensor | None, grid: Size, b: int) -> Tensor | None:
        """The keys that queries may see, (b · windows, 1, 1, n) bool; None for all."""
        if side is None:
            keys = None if patches is None else pad(patches.flatten(1), (self.num_prefix_tokens, 0), value=True)
        elif patches is None and grid[0] % side == grid[1] % side == 0:
            keys = None
        else:
            weight = self.patch_embed.proj.weight
            whole = torch.ones(b, *grid, dtype=torch.bool, device=weight.device) if patches is None else patches
            keys = split_windows(whole, side).flatten(1)
        if keys is None:
            return None
        # what holds no image sees its padding: on a softmax over nothing the kernels differ, and NaN is one of the answers
        return (keys | ~keys.any(1, keepdim=True))[:, None, None]


def _on_grid(rows: Tensor, own: Size, grid: Size) -> Tensor:
    """Rows of a grid, (prefix + own[0] · own[1], *c), as the upper left of a larger grid's, zeros elsewhere."""
    prefix = len(rows) - own[0] * own[1]
    larger = rows.new_zeros(*grid, *rows.shape[1:])
    larger[: own[0], : own[1]] = rows[prefix:].unflatten(0, own)
    return torch.cat((rows[:prefix], larger.flatten(0, 1)))
