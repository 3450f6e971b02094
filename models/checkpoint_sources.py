"""Who wrote a checkpoint, told by its keys, and the way from their names to timm's, which are ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """One writer of checkpoints.

    Args:
        name: for messages.
        wrote: whether the keys of this state dict are the writer's.
        rename: state dict and target model → state dict under timm's names.
    """

    name: str
    wrote: Callable[[State], bool]
    rename: Callable[[State, nn.Module], State]


def _without(state: State, *endings: str) -> State:
    return {key: value for key, value in state.items() if not key.endswith(endings)}


def _is_naver_vit(state: State) -> bool:
    return "freqs" in state or "freqs_t_x" in state


def _from_naver_vit(state: State, model: nn.Module) -> State:
    state = _without(state, "freqs_t_x", "freqs_t_y")
    if "freqs" in state:
        freqs = state.pop("freqs")  # (2, L, h · r)
        seat = model.state_dict().get("rope.freqs")
        alike = seat is not None and seat.shape[:2] == freqs.shape[:2] and seat.numel() == freqs.numel()
        state["rope.freqs"] = freqs.view(seat.shape) if seat is not None and alike else freqs
    return state


def _is_reference_swin(state: State) -> bool:
    return "layers.0.downsample.reduction.weight" in state or (
        "layers.0.blocks.0.attn.qkv.weight" in state and "head.weight" in state
    )


def _from_reference_swin(state: State, model: nn.Module) -> State:
    renamed = {}
    for key, value in _without_swin_buffers(state).items():
        key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda at: f"layers.{int(at[1]) + 1}.downsample.", key)
        renamed[re.sub(r"^head\.", "head.fc.", key)] = value
    return renamed


def _without_swin_buffers(state: State) -> State:
    return _without(state, "attn_mask", "relative_position_index", "rope_t_x", "rope_t_y")


def _is_lightning(state: State) -> bool:
    return any(key.startswith("model.") for key in state)


def _from_lightning(state: State, model: nn.Module) -> State:
    network = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    return {key.removeprefix("_orig_mod."): value for key, value in network.items()}


def _is_ours(state: State) -> bool:
    return True


def _from_timm(state: State, model: nn.Module) -> State:
    return _without_swin_buffers(state)


SOURCES = (
    Source("naver-ai ViT", _is_naver_vit, _from_naver_vit),
    Source("naver-ai or Microsoft Swin", _is_reference_swin, _from_reference_swin),
    Source("Lightning checkpoint of a Rotalith task", _is_lightning, _from_lightning),
    Source("timm or Rotalith weights", _is_ours, _from_timm),
)


def source_of(state: State) -> Source:
    """The first of `SOURCES` whose keys these are."""
    return next(source for source in SOURCES if source.wrote(state))


def describe(state: State) -> str:
    """What network the tensors under timm's names seem to make, in one phrase."""
    if "patch_embed.proj.weight" not in state:
        return f"no vision transformer (it starts with {', '.join(list(state)[:3])})"
    places = {key.split("blocks.")[0]: 0 for key in state if "blocks." in key}  # "" in a ViT, "layers.0." … in a Swin
    depths = [
        sum(re.match(rf"{place}blocks\.\d+\.norm1\.weight$", key) is not None for key in state) for place in places
    ]
    learned = any(key.endswith(("rope_freqs", "rope.freqs")) for key in state)
    tables = any(key.endswith(("relative_position_bias_table", "pos_embed")) for key in state)
    return (
        f"a {'ViT' if '' in places else 'Swin'} of width {state['patch_embed.proj.weight'].shape[0]}"
        f" and depth {'-'.join(map(str, depths))}, {'with' if learned else 'without'} learned frequencies,"
        f" {'with' if tables else 'without'} position tables"
    )
