"""Reads the rope parameters of a transformers config, the v5 vocabulary and the older spelling, into `Rotary` arguments.

Nothing is defaulted silently: a key that is unknown, missing or without effect is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rotary.frequencies import Geometric
from rotary.scaling import DynamicNTK, Identity, Interpolate, Llama3, LongRoPE, Scaling, Truncate, YaRN

_COMMON = {"rope_theta", "partial_rotary_factor"}
_REQUIRED: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "proportional": {"partial_rotary_factor"},
}
_OPTIONAL: dict[str, set[str]] = {
    "default": set(),
    "linear": set(),
    "dynamic": {"original_max_position_embeddings"},
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor"},
    "llama3": set(),
    "proportional": {"factor"},
}


def read(
    parameters: Mapping[str, Any],
    head_dim: int,
    max_position_embeddings: int | None = None,
    rope_theta: float | None = None,
    layer_type: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `Rotary` for a `rope_parameters` (v5) or `rope_scaling` (v4) dictionary.

    Args:
        parameters: the dictionary; v4 spells `rope_type` as `type` and keeps `rope_theta` outside.
        head_dim: channels of a head.
        max_position_embeddings: of the same config; dynamic and longrope can't do without it.
        rope_theta: of the same config, where the dictionary has none.
        layer_type: which entry of a dictionary nested by layer type.

    Raises:
        ValueError: names the unknown, missing or contradictory key.
    """
    values = dict(parameters)
    if values and all(isinstance(value, Mapping) for value in values.values()):
        if layer_type not in values:
            raise ValueError(
                f"rope_parameters are given per layer type {sorted(values)}; layer_type={layer_type!r} isn't one"
            )
        values = dict(values[layer_type])
    kind = _take_kind(values)
    unknown = set(values) - _COMMON - _REQUIRED[kind] - _OPTIONAL[kind]
    if unknown:
        raise ValueError(f"rope_parameters: {sorted(unknown)} mean nothing to rope_type={kind!r}")
    missing = {key for key in _REQUIRED[kind] if values.get(key) is None}
    if missing:
        raise ValueError(f"rope_parameters: rope_type={kind!r} needs {sorted(missing)}")
    inside = values.get("rope_theta")
    if inside is not None and rope_theta is not None and inside != rope_theta:
        raise ValueError(f"rope_theta is {inside} in the dictionary and {rope_theta} beside it")
    theta = inside if inside is not None else rope_theta
    if theta is None:
        raise ValueError("rope_parameters: rope_theta is missing; it has no default")
    partial = values.get("partial_rotary_factor")
    return {
        "frequencies": Geometric(float(theta)),
        "scaling": _scaling(kind, values, max_position_embeddings),
        "head_dim": head_dim,
        "fraction": 1.0 if partial is None or kind == "proportional" else float(partial),
    }


def _take_kind(values: dict[str, Any]) -> str:
    new, old = values.pop("rope_type", None), values.pop("type", None)
    if new is not None and old is not None and new != old:
        raise ValueError(f"rope_parameters: rope_type={new!r} and type={old!r} disagree")
    kind = new or old
    if kind is None:
        raise ValueError("rope_parameters: rope_type is missing")
    kind = "longrope" if kind == "su" else kind
    if kind not in _REQUIRED:
        raise ValueError(f"rope_parameters: rope_type={kind!r} isn't one of {sorted(_REQUIRED)}")
    return kind


def _scaling(kind: str, values: Mapping[str, Any], longest: int | None) -> Scaling:
    def extent(key: str) -> int:
        if values.get(key) is not None:
            return int(values[key])
        if longest is None:
            raise ValueError(f"rope_parameters: rope_type={kind!r} needs max_position_embeddings of the config")
        return longest

    match kind:
        case "linear":
            return Interpolate(float(values["factor"]))
        case "dynamic":
            return DynamicNTK(float(values["factor"]), extent("original_max_position_embeddings"))
        case "yarn":
            return _yarn(values)
        case "longrope":
            original = int(values["original_max_position_embeddings"])
            factor = values.get("factor")
            factor = extent("max_position_embeddings") / original if factor is None else factor
            short, long = tuple(values["short_factor"]), tuple(values["long_factor"])
            return LongRoPE(short, long, original, float(factor), values.get("attention_factor"))
        case "llama3":
            original = int(values["original_max_position_embeddings"])
            return Llama3(float(values["factor"]), original, values["low_freq_factor"], values["high_freq_factor"])
        case "proportional":
            return Truncate(float(values["partial_rotary_factor"]), _given(values, "factor", 1.0))
        case _:
            return Identity()


def _given(values: Mapping[str, Any], key: str, default: float) -> float:
    return default if values.get(key) is None else float(values[key])  # zero is given


def _yarn(values: Mapping[str, Any]) -> YaRN:
    factor, gain = float(values["factor"]), values.get("attention_factor")
    scales = [float(values[key]) for key in ("mscale", "mscale_all_dim") if values.get(key) is not None]
    if gain is None and len(scales) == 2:
        above, below = (0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0 for scale in scales)
        gain = above / below
    elif gain is None and scales:
        raise ValueError("rope_parameters: mscale and mscale_all_dim only act together; give both or neither")
    return YaRN(
        factor,
        int(values["original_max_position_embeddings"]),
        fast=_given(values, "beta_fast", 32.0),
        slow=_given(values, "beta_slow", 1.0),
        truncate=bool(values.get("truncate", True)),
        gain=gain,
    )
