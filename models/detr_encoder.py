"""RT-DETR's hybrid encoder (arXiv 2304.08069) that padding doesn't leak through: transformers' layers, our pass over them.

Padding is zeroed before every convolution that sees neighbours, as it is beyond the edge of an unpadded image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def encode(encoder: Any, maps: Sequence[Tensor], cells: Sequence[Tensor]) -> list[Tensor]:
    """Self-attention on the coarsest map, then fusion downwards and upwards.

    Args:
        encoder: transformers' `RTDetrV2HybridEncoder`.
        maps: (b, c, h, w) each, finest first, sides halving; zero in the padding.
        cells: (b, 1, h, w) bool each, which of them are image.

    Returns:
        Maps of the same shapes, zero in the padding.
    """
    down = [_attend(encoder.aifi[0], maps[-1], cells[-1])]  # coarsest first
    for step, (lateral, block) in enumerate(zip(encoder.lateral_convs, encoder.fpn_blocks, strict=True)):
        down[-1] = lateral(down[-1]) * cells[-1 - step]
        raised = interpolate(down[-1], scale_factor=2.0, mode="nearest")
        down.append(_fuse(block, torch.cat((raised, maps[-2 - step]), dim=1), cells[-2 - step]))
    up = [down[-1]]  # finest first
    for step, (shrink, block) in enumerate(zip(encoder.downsample_convs, encoder.pan_blocks, strict=True)):
        up.append(_fuse(block, torch.cat((shrink(up[-1]), down[-2 - step]), dim=1), cells[step + 1]))
    return up


def _attend(attention: Any, x: Tensor, cells: Tensor) -> Tensor:
    away = torch.zeros(cells.shape, device=x.device).masked_fill(~cells, -torch.inf).flatten(2)[:, None]  # (b, 1, 1, n)
    tokens = x.flatten(2).transpose(1, 2)
    height, width = x.shape[-2:]
    positions = attention.position_embedding(width=width, height=height, device=x.device, dtype=x.dtype)
    for layer in attention.layers:
        tokens = layer(tokens, attention_mask=away, spatial_position_embeddings=positions)
    return tokens.transpose(1, 2).reshape(x.shape) * cells


def _fuse(block: Any, x: Tensor, cells: Tensor) -> Tensor:
    kept = block.conv1(x) * cells
    for bottleneck in block.bottlenecks:
        kept = bottleneck(kept) * cells
    return block.conv3(kept + block.conv2(x)) * cells
