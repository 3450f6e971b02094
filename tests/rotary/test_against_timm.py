"""The same angles and the same rotations as timm's rotary embeddings."""

import pytest
import torch

pytest.importorskip("timm")

from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
    apply_rot_embed_cat,
)

from rotary import Rotary, rotate
from rotary.frequencies import Assigned, Axial, Mixed
from rotary.pairing import to_halves, to_interleaved
from rotary.positions import grid, normalised_grid

SHAPES = [(14, 14), (3, 5), (20, 11)]
ATOL = 1e-5


def same_table(phase, table, half=False):
    """Sines and cosines, (…, n, r) against timm's (…, n, 4r) in the layout it repeats them in."""
    for ours, theirs in zip((phase.sin(), phase.cos()), table.chunk(2, -1), strict=True):
        spread = torch.cat((ours, ours), -1) if half else ours.repeat_interleave(2, -1)
        torch.testing.assert_close(spread, theirs, rtol=0, atol=ATOL)


def same_rotation(phase, table, half=False):
    x = torch.randn(2, 3, phase.shape[-2], 2 * phase.shape[-1])
    ours = to_halves(rotate(to_interleaved(x), phase)) if half else rotate(x, phase)
    assert not torch.allclose(ours, x, atol=0.1)
    torch.testing.assert_close(ours, apply_rot_embed_cat(x, table, half=half), rtol=0, atol=ATOL)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("width", "base"), [(64, 100.0), (32, 50.0)])
def test_axial(shape, width, base):
    table = RotaryEmbeddingCat(
        width, temperature=base, in_pixels=False, feat_shape=shape, grid_indexing="xy"
    ).get_embed()
    phase = Rotary(Axial(base), head_dim=width)(grid(*shape))[0]
    same_table(phase, table)
    same_rotation(phase, table)


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_with_copied_frequencies(shape):
    theirs = RotaryEmbeddingMixed(192, depth=2, num_heads=3, temperature=10.0, feat_shape=shape)
    tables = theirs.get_embed()
    for layer in range(2):
        ours = Rotary(Mixed(10), head_dim=64, heads=3, learnable=True)
        with torch.no_grad():
            ours.frequencies.copy_(theirs.freqs[:, layer].transpose(0, 1))
        phase = ours(grid(*shape)).detach()
        same_table(phase, tables[layer].detach())
        same_rotation(phase, tables[layer].detach())


def test_mixed_starts_from_the_same_distribution():
    """A head is a turned ladder there too: copied frequencies have the speeds that ours draw."""
    theirs = RotaryEmbeddingMixed(192, depth=1, num_heads=3, temperature=10.0).freqs[:, 0].transpose(0, 1)
    torch.testing.assert_close(theirs.norm(dim=1).double(), Mixed(10)(32, 3).norm(dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aspect", ["separate", "max"])
def test_dinov3(build, shape, aspect):
    table = RotaryEmbeddingDinoV3(64, feat_shape=shape, normalize_coords=aspect).get_embed()
    phase = build("dinov3")(normalised_grid(*shape, keep_aspect=aspect == "max"))[0]
    same_table(phase, table, half=True)
    same_rotation(phase, table, half=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_interleaved_mrope(shape):
    """timm's M-RoPE cycles time, row, column over the pairs; an image has time 0."""
    theirs = RotaryEmbeddingMRope(72, mrope_section=(12, 12, 12))
    law = Assigned([pair % 3 for pair in range(36)], 10000.0, 3)
    height, width = shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1)
    phase = Rotary(law, head_dim=72)(positions)[0]
    same_table(phase, theirs.get_embed(list(shape)), half=True)
    same_rotation(phase, theirs.get_embed(list(shape)), half=True)
