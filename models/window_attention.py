"""Window attention with rotary positions, in the seat of timm's Swin `WindowAttention` (arXiv 2403.13298, 2103.14030)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from timm.layers import trunc_normal_
from timm.models.swin_transformer import WindowAttention, get_relative_position_index
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.kept_phases import KeepsPhases
from models.tables import bias_size, resize_table
from rotary import Rotary, phase_of, rotate, unit
from rotary.positions import grid

RotaryFactory = Callable[..., Rotary]


class FusedWindowAttention(nn.Module):
    """timm's attention inside windows through PyTorch's fused kernels, under timm's names, the bias table optional.

    Args:
        attention: the timm module whose projections, and table, are taken over.
        bias: keep the relative position bias.
    """

    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Tensor | None

    def __init__(self, attention: WindowAttention, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.head_dim = attention.qkv.out_features // (3 * self.num_heads)
        self.scale = self.head_dim**-0.5
        self.window_size: tuple[int, int] = attention.window_size
        self.qkv, self.attn_drop = attention.qkv, attention.attn_drop
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        self.relative_position_bias_table = attention.relative_position_bias_table if bias else None
        index = cast(Tensor, attention.relative_position_index) if bias else None
        self.register_buffer("relative_position_index", index, persistent=False)

    def reset_parameters(self) -> None:
        """Write the table and all buffers anew, as after `to_empty` from the meta device."""
        if self.relative_position_bias_table is not None:
            trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Write what no checkpoint holds (timm's protocol)."""
        if self.relative_position_index is not None:
            self.relative_position_index.copy_(get_relative_position_index(*self.window_size))

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Attend within (height, width) tokens from now on; a bias table is resized bicubically."""
        old, self.window_size = self.window_size, window_size
        table = self.relative_position_bias_table
        if table is None or old == window_size:
            return
        resized = resize_table(table, bias_size(old), bias_size(window_size)).detach()
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.relative_position_index = get_relative_position_index(*window_size, device=table.device)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window.

        Args:
            x: (b · windows, n, c), n = height · width in row-major order.
            mask: (windows, n, n) added to the logits, Swin's shift mask.

        Returns:
            (b · windows, n, c).
        """
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim)
        q, k = self._positioned(qkv[:, :, :2]).permute(2, 0, 3, 1, 4)  # (b, h, n, d) each
        v = qkv[:, :, 2].transpose(1, 2)
        added = self._added(b, n, mask)
        dropout = self.attn_drop.p if self.training else 0.0
        x = scaled_dot_product_attention(
            q, k, v, None if added is None else added.to(q.dtype), dropout, scale=self.scale
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, n, -1)))

    def _positioned(self, queries_keys: Tensor) -> Tensor:
        return queries_keys

    def _added(self, b: int, n: int, mask: Tensor | None) -> Tensor | None:
        bias = None
        if self.relative_position_bias_table is not None and self.relative_position_index is not None:
            rows = self.relative_position_bias_table[self.relative_position_index.flatten()]
            bias = rows.view(n, n, -1).permute(2, 0, 1)  # (h, n, n)
        if mask is None:
            return bias
        added = mask[:, None] if bias is None else mask[:, None] + bias  # (windows, 1|h, n, n)
        return added.expand(b // len(mask), -1, -1, -1, -1).flatten(0, 1)


class RotaryWindowAttention(KeepsPhases, FusedWindowAttention):
    """Attention inside windows whose queries and keys turn by their place in the window, in one call.

    Every window counts from (0, 0), since logits see only differences. Frequencies are `rope_freqs` (2, h|1, r), x before
    y: a float32 parameter, as released RoPE-Swin weights store them, if the rotary is learnable; else a float64 buffer
    outside the state dict. The dtype of neither follows the module's.

    Args:
        attention: the timm module to replace.
        rotary: makes a `Rotary` from `head_dim` and `heads`.
        bias: keep the relative position bias, added to the turned logits.

    Raises:
        ValueError: the rotary hasn't two axes, or the width of a head doesn't suit it.
    """

    rope_freqs: Tensor

    def __init__(self, attention: WindowAttention, rotary: RotaryFactory, bias: bool = False) -> None:
        super().__init__(attention, bias)
        made = rotary(head_dim=self.head_dim, heads=self.num_heads).to(self.qkv.weight.device)
        if made.axes != 2:
            raise ValueError(f"a window has 2 axes, the rotary has {made.axes}")
        self.law, self.scaling, self.pairs = made.law, made.scaling, made.pairs
        self.scale *= made.logit_gain
        matrix = made.frequencies.detach().transpose(0, 1).contiguous()  # (2, h|1, r)
        if isinstance(made.frequencies, nn.Parameter):
            self.rope_freqs = nn.Parameter(matrix)
        else:
            self.register_buffer("rope_freqs", matrix, persistent=False)

    def reset_parameters(self) -> None:
        """As in the base class; learnable frequencies are drawn anew."""
        super().reset_parameters()
        self._write_frequencies()

    def init_non_persistent_buffers(self) -> None:
        """Write what no checkpoint holds (timm's protocol)."""
        super().init_non_persistent_buffers()
        if not isinstance(self.rope_freqs, nn.Parameter):
            self._write_frequencies()

    def _write_frequencies(self) -> None:
        with torch.no_grad():
            self.rope_freqs.copy_(self.law(self.pairs, self.num_heads).transpose(0, 1))

    def turn(self) -> Tensor:
        """Unit phases of a window, (n, 1, h|1, r): built anew where a gradient needs them or under `torch.compile`, else
        kept until window, device or frequencies change."""
        return self.phases_of(self.rope_freqs, self.window_size, self._build)

    def _build(self) -> Tensor:
        device = self.rope_freqs.device
        length = torch.tensor(max(self.window_size), device=device) if self.scaling.dynamic else None
        frequencies = self.scaling(self.rope_freqs.transpose(0, 1), length)
        return unit(phase_of(grid(*self.window_size, device), frequencies)).transpose(0, 1).unsqueeze(1)

    def _positioned(self, queries_keys: Tensor) -> Tensor:
        return rotate(queries_keys, self.turn())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own = (self.rope_freqs, self.rope_freqs.grad)

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            changed = moved.dtype != tensor.dtype and any(tensor is one for one in own)
            return tensor.to(moved.device) if changed else moved

        return super()._apply(move, recurse)
