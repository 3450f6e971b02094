"""Weights in and out: local checkpoints of other repositories into our models, and ours as safetensors.

    python -m models.convert swin_tiny.pth swin_tiny.safetensors --model swin_tiny_patch4_window7_224

Files are read without running anything that is in them: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoint_sources import State, describe, source_of
from models.tables import Size, guessed_size, resize_table, table_sizes

# DeiT's and Swin's trainings store their options beside the weights; both classes only hold values
_OPTIONS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]


@dataclass(frozen=True)
class Loaded:
    """What `load_checkpoint` did: whose file it was, what network is in it, which tables were resized, which keys skipped."""

    source: str
    network: str
    resized: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        told = {"resized": self.resized, "left out": self.skipped}
        return "; ".join([self.network, *(f"{name}: {', '.join(keys)}" for name, keys in told.items() if keys)])


def read(path: str | Path, entry: str | None = None) -> tuple[State, dict[str, str]]:
    """The tensors of a local file under its own names, and its safetensors metadata.

    Of a training checkpoint, the network's state dict alone is returned: `entry`, or else `model` or `state_dict`.

    Raises:
        ValueError: the file isn't a checkpoint, lacks `entry`, or holds objects that only unpickling them could read.
    """
    if Path(path).suffix == ".safetensors":
        if entry is not None:
            raise ValueError(f"{path} has no weights under {entry!r}; training checkpoints may")
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} isn't a safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals(_OPTIONS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        reason = next(
            (line.strip() for line in str(error).splitlines() if "global" in line.lower()), type(error).__name__
        )
        raise ValueError(f"{path} can't be read as plain tensors: {reason}") from error
    if entry is not None and not (isinstance(content, Mapping) and isinstance(content.get(entry), Mapping)):
        raise ValueError(f"{path} has no weights under {entry!r}")
    for name in ("model", "state_dict") if entry is None else (entry,):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}, {}


def load_checkpoint(
    model: nn.Module, path: str | Path, *, resize: bool = False, skip: Sequence[str] = (), entry: str | None = None
) -> Loaded:
    """Load a local checkpoint of naver-ai, Microsoft, timm, or our own into a model, strictly.

    Args:
        model: a model with timm's parameter names; of a `features_only` model, the network inside is loaded.
        path: .safetensors, or any file of torch.save.
        resize: fit tables of another resolution (bias tables, absolute embeddings) instead of refusing them.
        skip: beginnings of names that stay as they are in the model, as ("head.",) for other classes.
        entry: what to load of a training checkpoint, as "average" for the weights that `StoredAverage` keeps.

    Raises:
        ValueError: the file can't be read, or isn't of this architecture or resolution; the model is then untouched.
    """
    network = _network(model)
    raw, about = read(path, entry)
    source = source_of(raw)
    state = source.rename(raw, network)
    target = {key: value for key, value in network.state_dict().items() if not key.startswith(tuple(skip))}
    skipped = tuple(key for key in state if key.startswith(tuple(skip)))
    state = {key: value for key, value in state.items() if key not in skipped}
    state, resized = _fit_tables(
        path, state, target, table_sizes(network), json.loads(about.get("table_sizes", "{}")), resize
    )
    _check(path, source.name, state, target)
    network.load_state_dict(state, strict=not skip)
    return Loaded(source.name, describe(state), resized, skipped)


def load_backbone(model: nn.Module, path: str | Path) -> Loaded:
    """Load the weights of a classifier into the backbone of a dense model, all but what the classifier alone has.

    Args:
        model: with a `backbone`, whose trunk, or itself, says what is `not_pretrained`: beginnings of names.
        path: as for `load_checkpoint`.

    Raises:
        ValueError: as `load_checkpoint`, or the model has no backbone.
    """
    backbone = getattr(model, "backbone", None)
    trunk = getattr(backbone, "trunk", backbone)
    if not isinstance(trunk, nn.Module):
        raise ValueError(f"pretrained={path}: {type(model).__name__} has no backbone to load it into")
    skip: tuple[str, ...] = getattr(trunk, "not_pretrained", ())
    try:
        return load_checkpoint(trunk, path, resize=True, skip=skip)
    except FileNotFoundError as missing:
        raise FileNotFoundError(f"pretrained={path}: no such file") from missing


def export(model: nn.Module, path: str | Path, architecture: str | None = None) -> None:
    """Write the weights as safetensors, all at once or not at all, in their own dtypes.

    Args:
        model: as for `load_checkpoint`, which reads the file back bit for bit.
        path: the file to write or replace.
        architecture: timm name for the metadata; the model's own if None.
    """
    network, path = _network(model), Path(path)
    name = architecture or getattr(network, "pretrained_cfg", {}).get("architecture") or type(network).__name__
    about = {
        "format": "pt",
        "architecture": name,
        "rotalith_version": _version(),
        "table_sizes": json.dumps(table_sizes(network)),
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, partial, metadata=about)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _version() -> str:
    try:
        return metadata.version("rotalith")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def _network(model: nn.Module) -> nn.Module:
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    inner = getattr(model, "model", None)  # timm's FeatureGetterNet
    return inner if isinstance(inner, nn.Module) else model


def _fit_tables(
    path: str | Path,
    state: State,
    target: State,
    wanted: Mapping[str, Size],
    stored: Mapping[str, Sequence[int]],
    resize: bool,
) -> tuple[State, tuple[str, ...]]:
    fitted, resized = dict(state), []
    for key in (name for name in wanted if name in state and name in target):
        rows, columns = stored.get(key) or guessed_size(state[key].shape[-2], wanted[key]) or (0, 0)
        if (rows, columns) == wanted[key] or rows * columns != state[key].shape[-2]:
            continue  # what doesn't fit at all is reported with the other shapes
        if not resize:
            new = " × ".join(map(str, wanted[key]))
            raise ValueError(
                f"{path}: {key} is a table of {rows} × {columns}, the model's is {new}; resize=True interpolates it"
            )
        fitted[key] = resize_table(state[key], (rows, columns), wanted[key])
        resized.append(key)
    return fitted, tuple(resized)


def _check(path: str | Path, source: str, state: State, target: State) -> None:
    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    reshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
        for key, value in target.items()
        if key in state and state[key].shape != value.shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    faults = [
        f"{len(keys)} {kind}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for kind, keys in groups.items()
        if keys
    ]
    if faults:
        vision = "patch_embed.proj.weight" in target
        kinds = f"seems to be {describe(state)}; the model is {describe(target)}" if vision else "doesn't fit the model"
        raise ValueError(f"{path} ({source}) {kinds}; {'; '.join(faults)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: SOURCE TARGET --model NAME."""
    import compat  # noqa: F401 - before torchvision, which timm imports

    # isort: split
    import timm

    import models.swin
    import models.vit  # noqa: F401

    parser = argparse.ArgumentParser(prog="python -m models.convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="file to write, .safetensors")
    parser.add_argument("--model", required=True, help="timm name of the architecture")
    parser.add_argument("--image-size", type=int, nargs="+", help="side, or height and width, if not the model's own")
    parser.add_argument("--window-size", type=int, help="for timm's own Swins, whose window doesn't follow the image")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--resize", action="store_true", help="interpolate tables of another resolution")
    options = parser.parse_args(arguments)
    if options.target.suffix != ".safetensors":
        parser.error(f"{options.target}: the target must end in .safetensors")
    sizes = {"window_size": options.window_size}
    if options.image_size:
        sizes["img_size"] = options.image_size[0] if len(options.image_size) == 1 else tuple(options.image_size)
    model = timm.create_model(options.model, num_classes=options.classes, **{k: v for k, v in sizes.items() if v})
    try:
        loaded = load_checkpoint(model, options.source, resize=options.resize)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    export(model, options.target)
    count = sum(value.numel() for value in model.state_dict().values())
    print(f"{options.source}: {loaded.source}, {loaded.network}")
    print(f"resized: {', '.join(loaded.resized) or 'nothing'}")
    print(f"{options.target}: {options.model}, {count:,} values")


if __name__ == "__main__":
    main()
