"""The frequencies, gains and rotations of transformers, from its own dictionaries."""

import itertools

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rotary import Rotary, rotate
from rotary.pairing import to_halves, to_interleaved

LONGEST = 1024
WIDTHS, BASES, FACTORS, ORIGINALS = (16, 64, 128), (1e4, 5e5), (2.0, 4.0, 16.0), (256, 4096)


def config_of(parameters, width, longest=LONGEST):
    return LlamaConfig(
        hidden_size=2 * width,
        num_attention_heads=2,
        head_dim=width,
        max_position_embeddings=longest,
        rope_parameters=dict(parameters),
    )


def agree(parameters, width, length=None, longest=LONGEST):
    config = config_of(parameters, width, longest)
    theirs, gain = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    layer = Rotary.from_rope_parameters(parameters, head_dim=width, max_position_embeddings=longest)
    ours = layer.scaled(torch.tensor(longest if length is None else length))
    # theirs are computed in float32, whose powers err by a few units in the last place
    torch.testing.assert_close(ours[0, 0], theirs.double(), rtol=1e-5, atol=1e-6)
    assert layer.logit_gain == pytest.approx(gain**2, abs=1e-6)


GRID = list(itertools.product(WIDTHS, BASES, FACTORS))
GRID_WITH_ORIGINAL = list(itertools.product(WIDTHS, BASES, FACTORS, ORIGINALS))


@pytest.mark.parametrize(("width", "base", "factor"), GRID)
def test_linear(width, base, factor):
    agree({"rope_type": "linear", "rope_theta": base, "factor": factor}, width)


@pytest.mark.parametrize(("width", "base", "factor"), GRID)
@pytest.mark.parametrize("length", [None, 100, 1024, 5000])
def test_dynamic(width, base, factor, length):
    agree({"rope_type": "dynamic", "rope_theta": base, "factor": factor}, width, length)


@pytest.mark.parametrize(("width", "base", "factor", "original"), GRID_WITH_ORIGINAL)
def test_yarn(width, base, factor, original):
    parameters = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for truncate in (True, False):
        agree(parameters | {"truncate": truncate}, width)
    for above, below in ((1.0, 1.0), (0.707, 1.0), (1.0, 0.5)):
        agree(parameters | {"mscale": above, "mscale_all_dim": below}, width)
    agree(parameters | {"beta_fast": 128.0, "beta_slow": 2.0}, width)
    agree(parameters | {"attention_factor": 1.3}, width)


@pytest.mark.parametrize(("width", "base", "factor", "original"), GRID_WITH_ORIGINAL)
@pytest.mark.parametrize("length", [None, 256, 257, 4097])
def test_longrope(width, base, factor, original, length):
    short = torch.linspace(1, 1.5, width // 2).tolist()
    long = torch.linspace(1, factor, width // 2).tolist()
    parameters = {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
    }
    # without a length transformers takes the short factors, whatever the config's longest input
    for extra in ({"factor": factor}, {"factor": factor, "attention_factor": 1.3}):
        agree(parameters | extra, width, original if length is None else length)
    agree(parameters, width, original if length is None else length, longest=int(original * factor))


@pytest.mark.parametrize(("width", "base", "factor", "original"), GRID_WITH_ORIGINAL)
def test_llama3(width, base, factor, original):
    for low, high in ((1.0, 4.0), (2.0, 8.0)):
        parameters = {
            "rope_type": "llama3",
            "rope_theta": base,
            "factor": factor,
            "original_max_position_embeddings": original,
            "low_freq_factor": low,
            "high_freq_factor": high,
        }
        agree(parameters, width)


@pytest.mark.parametrize(("width", "base", "factor"), GRID)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.3, 1.0])
def test_proportional(width, base, factor, share):
    agree({"rope_type": "proportional", "rope_theta": base, "partial_rotary_factor": share, "factor": factor}, width)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_partial_rotation(rope_type):
    agree({"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5}, 64, 3000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_of_half_pairs(dtype):
    """Their queries and keys, permuted into our pairs, turned and permuted back."""
    config = config_of({"rope_type": "default", "rope_theta": 1e4}, 64)
    q, k = torch.randn(2, 4, 50, 64, dtype=dtype), torch.randn(2, 2, 50, 64, dtype=dtype)
    positions = torch.arange(100, 150)[None]
    cosine, sine = LlamaRotaryEmbedding(config)(q, positions)
    theirs = apply_rotary_pos_emb(q, k, cosine, sine)
    layer = Rotary.from_rope_parameters({"rope_type": "default", "rope_theta": 1e4}, head_dim=64)
    phase = layer(positions[..., None])
    for x, turned in zip((q, k), theirs, strict=True):
        ours = to_halves(rotate(to_interleaved(x), phase))
        # their angles are float32 products: at position 150 they err by up to 150 · 2⁻²⁴ = 9e-6 rad
        torch.testing.assert_close(ours, turned, rtol=0, atol=5e-5)


def test_yarn_gain_moves_from_the_tables_to_the_softmax():
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    q, k = torch.randn(2, 1, 2, 30, 64).unbind(0)
    cosine, sine = LlamaRotaryEmbedding(config_of(parameters, 64))(q, torch.arange(30)[None])
    theirs_q, theirs_k = apply_rotary_pos_emb(q, k, cosine, sine)
    layer = Rotary.from_rope_parameters(parameters, head_dim=64)
    ours_q, ours_k = layer.rotate(to_interleaved(q), to_interleaved(k), positions=torch.arange(30)[:, None])
    ours = ours_q @ ours_k.mT * layer.logit_gain / 8
    torch.testing.assert_close(ours.softmax(-1), (theirs_q @ theirs_k.mT / 8).softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 2, 3), (2, 2, 3), (3, 5, 4), (4, 4, 4)])
def test_mrope_positions(frames, height, width):
    """Text, a vision segment, text: up to as many frames as rows or columns, past which transformers 5 differs."""
    qwen = pytest.importorskip("transformers.models.qwen2_vl")
    from rotary.video import Text, Vision, mrope

    config = qwen.Qwen2VLConfig()
    before, after, merged = 3, 2, frames * height * width
    image = frames == 1
    token = config.image_token_id if image else config.video_token_id
    tokens = torch.tensor([[5] * before + [token] * merged + [6] * after])
    kinds = torch.tensor([[0] * before + [1 if image else 2] * merged + [0] * after])
    merge = config.vision_config.spatial_merge_size
    patches = torch.tensor([[frames, height * merge, width * merge]])
    reader = qwen.modeling_qwen2_vl.Qwen2VLModel

    class Stand:
        """The two things `get_rope_index` reads, without weights."""

        def __init__(self):
            self.config = config

        get_vision_position_ids = reader.get_vision_position_ids

    theirs, delta = reader.get_rope_index(
        Stand(),
        tokens,
        mm_token_type_ids=kinds,
        image_grid_thw=patches if image else None,
        video_grid_thw=None if image else patches,
    )
    ours, following = mrope([Text(before), Vision(frames, height, width), Text(after)])
    assert torch.equal(ours.T, theirs[:, 0].float())
    assert following - tokens.shape[1] == delta.item()
