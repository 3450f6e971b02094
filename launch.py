"""What `train.py` and `evaluate.py` share: resolvers for configs, one-line errors, and the path from config to objects."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tasks.record import recorded

# sweeps that bring their own data, where that of the checkpoint doesn't have what they ask for
_OWN_DATA: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "agents": lambda data: True,
    "needle": lambda data: "family" not in data,  # text asks nothing
}
_EXPECTED = (ValueError, OSError, FloatingPointError, InstantiationException, OmegaConfBaseException)


def _longest(size: int | Sequence[int]) -> int:
    return int(size) if isinstance(size, int) else max(int(side) for side in size)


def extension(tested: int | Sequence[int] | None, trained: int | Sequence[int]) -> float:
    """How many times longer the tested extent is than the trained one, at least 1; sizes are numbers or (height, width).

    None is a stream without an end, which no scaling is for: 1.
    """
    return 1.0 if tested is None else max(1.0, _longest(tested) / _longest(trained))


def sides(size: int | Sequence[int]) -> str:
    """224, or 192x256 for (height, width)."""
    return str(size) if isinstance(size, int) else "x".join(str(side) for side in size)


def papers_resolutions(trained: int | Sequence[int], step: int) -> str:
    """The eight resolutions that arXiv 2403.13298 tests a 224-pixel model at, in proportion to `trained`, as a sweep."""
    wanted = [side * _longest(trained) / 224 for side in (96, 144, 192, 224, 256, 320, 384, 512)]
    return ",".join(str(max(1, round(side / step)) * step) for side in wanted)


def shares(size: int, *fractions: float) -> list[int]:
    """size × each, in whole pixels."""
    return [round(int(size) * float(fraction)) for fraction in fractions]


def multiples(base: int, *by: int) -> str:
    """base × each, as a sweep."""
    return ",".join(str(int(base) * int(each)) for each in by)


def register_resolvers() -> None:
    """The functions above, and a few of their kin, for configs: `${extension:…}`, `${multiples:base,1,2,…}`, …"""
    OmegaConf.register_new_resolver("papers_resolutions", papers_resolutions, replace=True)
    OmegaConf.register_new_resolver("extension", extension, replace=True)
    OmegaConf.register_new_resolver("longest", _longest, replace=True)
    OmegaConf.register_new_resolver("multiples", multiples, replace=True)
    OmegaConf.register_new_resolver("shares", lambda *sizes: ListConfig(shares(*sizes)), replace=True)
    OmegaConf.register_new_resolver("share", lambda size, fraction: shares(size, fraction)[0], replace=True)
    OmegaConf.register_new_resolver("sides", sides, replace=True)
    OmegaConf.register_new_resolver("patches", lambda size, patch: _longest(size) // int(patch), replace=True)


def one_line_errors(main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Ends a run on bad input with one line on stderr and exit code 2; ROTALITH_TRACEBACK=1 shows the whole trace."""

    @wraps(main)
    def guarded(cfg: DictConfig) -> Any:
        try:
            return main(cfg)
        except _EXPECTED as error:
            if os.environ.get("ROTALITH_TRACEBACK") == "1":
                raise
            cause: BaseException = error
            where = ""
            while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
                where = next((line for line in str(cause).splitlines() if line.startswith("full_key")), where)
                cause = cause.__cause__
            absent = re.search(r"ModuleNotFoundError\(['\"](.*?pip install .*?)['\"]\)(?:\s|$)", str(cause), re.DOTALL)
            if absent:  # hydra guesses at another reason
                cause = ModuleNotFoundError(absent[1].replace("\\'", "'"))
            lines = [line for line in str(cause).splitlines() if line.strip()]
            # an error of a loader's worker has its whole trace as the message
            from_worker = bool(lines) and lines[0].startswith("Caught")
            message = " ".join((lines[-1].split(": ", 1)[-1] if from_worker else str(cause)).split())
            print(f"error: {message}" + (f" [{where}]" if where else ""), file=sys.stderr)
            raise SystemExit(2) from None

    return guarded


def newest_checkpoint(arguments: list[str], folder: str | Path = "outputs") -> None:
    """Replace `ckpt=last` by the newest `last.ckpt` among the runs of the task, in place.

    Raises:
        ValueError: there is no run of this task.
    """
    if "ckpt=last" not in arguments:
        return
    task = next((argument.split("=", 1)[1] for argument in arguments if argument.startswith("task=")), "*")
    found = sorted(Path(folder).glob(f"{task}/*/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"ckpt=last: no {folder}/{task}/*/last.ckpt; train first, or give a path")
    arguments[arguments.index("ckpt=last")] = f"ckpt={found[-1]}"


def with_overrides_of_checkpoint(arguments: list[str], swept: Sequence[str] = ("pos", "seed")) -> None:
    """Put the overrides that a checkpoint was trained with before the user's own, in place; the user's win key by key.

    Done twice, as for ranks that are started with the arguments of another, it is as if done once.

    Where `ckpt` is a folder of runs, the first of them speaks for all, but for the `swept` keys in which they differ.
    """
    deleted = {argument[1:].split("=", 1)[0] for argument in arguments[1:] if argument.startswith("~")}
    set_anew = (argument.lstrip("+") for argument in arguments[1:] if "=" in argument and not argument.startswith("~"))
    given = dict(argument.split("=", 1) for argument in set_anew)
    path = given.get("ckpt")
    if path is None:
        return
    runs = sorted(Path(path).glob("*/last.ckpt")) if Path(path).is_dir() else []
    of_training = ["ckpt", "pretrained", "resume", "fused_attention", "trainer", "callbacks", "loggers", "hydra"]
    of_training += swept if runs else []
    try:
        run = recorded(runs[0] if runs else path)
    except (ValueError, OSError):
        return
    overrides: list[str] = run["overrides"]
    config: Mapping[str, Any] = run.get("config", {})
    brings_data = _OWN_DATA.get(given.get("sweep", ""), lambda data: False)
    of_training += ["datamodule", "tokens@datamodule"] if brings_data(config.get("datamodule", {})) else []
    kept = [
        override
        for override in overrides
        if (key := override.lstrip("+~").split("=", 1)[0]) not in deleted
        and (override.startswith("~") or key not in given)
        and key.split(".")[0] not in (*of_training, *given)  # a group chosen anew has other keys
    ]
    if "trained_context" in config and "trained_context" not in given:  # other data would tell another
        kept.append(f"trained_context={config['trained_context']}")
    beside, data = Path(runs[0] if runs else path).with_name("tokenizer.json"), config.get("datamodule", {})
    chosen = {"datamodule.tokens.path", "tokens@datamodule.tokens"} & given.keys()
    if beside.is_file() and "path" in data.get("tokens", {}) and not chosen and not brings_data(data):
        kept.append(f"datamodule.tokens.path={beside}")  # ids mean what they meant in training, whatever the text
    arguments[1:1] = kept


def given_arguments(arguments: list[str]) -> None:
    """What both entry scripts do to the command line before hydra reads it: `ckpt=last` becomes a path, in place."""
    try:
        newest_checkpoint(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def prepare(cfg: DictConfig) -> None:
    """Threads, matmul precision and the noise of libraries, before anything is built."""
    for noisy in ("pytorch_lightning", "faster_coco_eval"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator")
    warnings.filterwarnings(
        "ignore", message=".*recommended to use `self.log.*sync_dist=True"
    )  # metrics sync themselves
    if cfg.threads is not None:
        torch.set_num_threads(int(cfg.threads))
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    torch.backends.cuda.enable_flash_sdp(cfg.fused_attention)  # the CPU's fused kernel heeds this switch too
    torch.backends.cuda.enable_mem_efficient_sdp(cfg.fused_attention)
