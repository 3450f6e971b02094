"""What is read from a transformers config, and every way of getting it wrong, refused by the name of the key."""

import pytest
import torch

from rotary import Rotary
from rotary.frequencies import Geometric
from rotary.scaling import DynamicNTK, Identity, Interpolate, Llama3, LongRoPE, Truncate, YaRN

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 5e5,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 256,
    "rope_theta": 1e4,
}


def read(parameters, **arguments):
    return Rotary.from_rope_parameters(parameters, **{"head_dim": 16} | arguments)


@pytest.mark.parametrize(
    ("parameters", "arguments", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, {}, Identity()),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, {}, Interpolate(4)),
        (
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            {"max_position_embeddings": 256},
            DynamicNTK(2, 256),
        ),
        (YARN, {}, YaRN(4, 256)),
        (YARN | {"beta_fast": 64, "beta_slow": 2, "truncate": False}, {}, YaRN(4, 256, 64, 2, truncate=False)),
        (YARN | {"attention_factor": 1.5}, {}, YaRN(4, 256, gain=1.5)),
        (YARN | {"attention_factor": 1.5, "mscale": 1, "mscale_all_dim": 2}, {}, YaRN(4, 256, gain=1.5)),
        (YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}, {}, YaRN(40, 256, gain=1.0)),
        (LLAMA3, {}, Llama3(8, 8192, 1, 4)),
        (LONG, {"max_position_embeddings": 1024}, LongRoPE((1.0,) * 8, (4.0,) * 8, 256, 4)),
        (LONG | {"factor": 8.0, "attention_factor": 1.2}, {}, LongRoPE((1.0,) * 8, (4.0,) * 8, 256, 8, gain=1.2)),
        ({"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}, {}, Truncate(0.25)),
    ],
)
def test_each_type(parameters, arguments, scaling):
    layer = read(parameters, **arguments)
    assert layer.scaling == scaling
    assert layer.law == Geometric(parameters["rope_theta"])
    assert layer.pairs == 8


def test_partial_rotation_is_a_narrower_ladder():
    layer = read({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert torch.equal(layer.frequencies, Rotary(Geometric(1e4), head_dim=8).frequencies)


def test_the_older_spelling():
    """`type` for `rope_type`, theta outside, "su" for longrope."""
    older = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    layer = read(older, rope_theta=1e4)
    assert layer.scaling == read(YARN).scaling
    assert torch.equal(layer.frequencies, read(YARN).frequencies)
    su = {key: value for key, value in LONG.items() if key != "rope_type"} | {"type": "su", "factor": 4.0}
    assert read(su).scaling == read(LONG | {"factor": 4.0}).scaling


def test_one_entry_of_a_nested_dictionary():
    nested = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e5}}
    assert read(nested, layer_type="full_attention").scaling == YaRN(4, 256)
    assert read(nested, layer_type="sliding_attention").law == Geometric(1e5)
    nested_truncate = {"full_attention": YARN | {"truncate": False}}
    assert read(nested_truncate, layer_type="full_attention").scaling == YaRN(4, 256, truncate=False)
    for layer_type in (None, "linear_attention"):
        with pytest.raises(ValueError, match=r"\['full_attention', 'sliding_attention'\]; layer_type="):
            read(nested, layer_type=layer_type)


def without(parameters, key):
    return {name: value for name, value in parameters.items() if name != key}


REQUIRED = [
    *((YARN, key) for key in ("factor", "original_max_position_embeddings", "rope_theta", "rope_type")),
    *((LLAMA3, key) for key in without(LLAMA3, "rope_type")),
    *((LONG, key) for key in ("short_factor", "long_factor", "original_max_position_embeddings", "rope_theta")),
    ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "factor"),
    ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "factor"),
    ({"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4}, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("parameters", "key"), REQUIRED)
@pytest.mark.parametrize("spelling", ["absent", "null"])
def test_missing_keys_are_named(parameters, key, spelling):
    broken = without(parameters, key) if spelling == "absent" else parameters | {key: None}
    with pytest.raises(ValueError, match=key):
        read(broken, max_position_embeddings=1024)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_missing_length_of_the_config_is_named(rope_type):
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4} if rope_type == "dynamic" else LONG
    with pytest.raises(ValueError, match=f"{rope_type}.*max_position_embeddings"):
        read(parameters)


UNKNOWN = [
    (YARN, "beta_fats"),
    (YARN, "low_freq_factor"),
    (YARN, "short_factor"),
    (LLAMA3, "beta_fast"),
    (LONG, "truncate"),
    ({"rope_type": "default", "rope_theta": 1e4}, "factor"),
    ({"rope_type": "default", "rope_theta": 1e4}, "attention_factor"),
    ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "original_max_position_embeddings"),
    ({"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4}, "beta_slow"),
]


@pytest.mark.parametrize(("parameters", "key"), UNKNOWN)
def test_keys_without_effect_are_named(parameters, key):
    with pytest.raises(ValueError, match=rf"\['{key}'\] mean nothing to rope_type='{parameters['rope_type']}'"):
        read(parameters | {key: 1.0})


def test_contradictions_are_named():
    with pytest.raises(ValueError, match="rope_type='yarn' and type='linear' disagree"):
        read(YARN | {"type": "linear"})
    with pytest.raises(ValueError, match=r"rope_theta is 10000.0 in the dictionary and 500000.0 beside it"):
        read(YARN, rope_theta=5e5)
    for lonely in ("mscale", "mscale_all_dim"):
        with pytest.raises(ValueError, match="mscale and mscale_all_dim only act together"):
            read(YARN | {lonely: 1.0})
    with pytest.raises(ValueError, match="rope_type='axial' isn't one of"):
        read({"rope_type": "axial", "rope_theta": 1e4})
    assert read(YARN | {"type": "yarn"}, rope_theta=1e4).scaling == YaRN(4, 256)


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow"])
def test_zero_is_a_value_not_an_absence(key):
    with pytest.raises(ValueError, match="must be positive"):
        read(YARN | {key: 0})


def test_an_empty_dictionary_has_no_type():
    with pytest.raises(ValueError, match="rope_type is missing"):
        read({})
