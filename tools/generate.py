"""Writes on from a prompt of any length with a language model that train.py trained; bytes go to stdout as they come.

python -m tools.generate CKPT --text "Now is the winter" --tokens 400 --top-p 0.95
python -m tools.generate CKPT --prompt book.txt --temperature 0
"""

from __future__ import annotations

import compat  # noqa: F401  isort: skip

import argparse
import codecs
import inspect
import os
import pydoc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from datamodules.embedded_source import cache_folder
from datamodules.token_files import token_folder
from datamodules.tokens import FILE, Bytes, Encoder, before_last_word
from launch import newest_checkpoint
from models.convert import load_checkpoint
from models.generate import check_sampling, generate, prefill
from models.states import nbytes
from tasks.record import recorded

OURS = ("models", "rotary", "datamodules")


def load(path: str | Path) -> tuple[nn.Module, Encoder]:
    """The model of a checkpoint with its weights, and how text becomes its tokens.

    Raises:
        OSError: there is no such file, or none of the tokenizer that it was trained with.
        ValueError: it isn't a checkpoint of a language model on text, or names something that isn't ours to build.
    """
    config: Mapping[str, Any] = recorded(path)["config"]
    data = config.get("datamodule", {})
    for part in (config.get("model", {}), data.get("tokens", {}), data.get("source", {})):
        _check_targets(part, path)
    if not {"vocabulary", "bos"} <= config.get("model", {}).keys():
        raise ValueError(f"{path}: not a checkpoint of a language model")
    try:
        encoder = _encoder(data, path)
        model: nn.Module = instantiate(config["model"])
    except InstantiationException as error:
        raise ValueError(f"{path}: its config doesn't build: {error.__cause__ or error}") from error
    load_checkpoint(model, path)
    return model.eval(), encoder


def _check_targets(config: Any, path: str | Path) -> None:
    """A file may come from anyone, and hydra would call whatever it names: only classes of ours may be built."""
    if isinstance(config, Mapping):
        target = config.get("_target_")
        if target is not None:
            found = pydoc.locate(str(target)) if str(target).split(".")[0] in OURS else None
            if not inspect.isclass(found) or found.__module__.split(".")[0] not in OURS:
                raise ValueError(f"{path}: its config names {target}, which isn't a class of {', '.join(OURS)}")
        config = [*config.keys(), *config.values()]
    elif isinstance(config, str) and "${" in config:
        raise ValueError(
            f"{path}: its config has {config!r}; hydra would resolve that, and what was recorded is resolved"
        )
    if isinstance(config, Sequence) and not isinstance(config, str):
        for part in config:
            _check_targets(part, path)


def _encoder(data: Mapping[str, Any], path: str | Path) -> Encoder:
    if "tokens" not in data:
        plain = Bytes()
        if (data.get("vocabulary"), data.get("bos")) != (plain.size, plain.bos):
            raise ValueError(f"{path}: was trained on {data.get('_target_')} with tokens that aren't text")
        return plain
    tokens = instantiate(data["tokens"])
    if hasattr(tokens, "encode"):  # nothing was learnt from the training text
        return tokens
    if Path(path).with_name(FILE).exists():  # what train.py kept beside the checkpoint
        return tokens.load(Path(path).parent)
    cache = Path(data["cache"]) if data.get("cache") else cache_folder()
    return tokens.load(token_folder(instantiate(data["source"], _convert_="all"), tokens, cache))


def prompt_tokens(file: BinaryIO, encoder: Encoder, bos: int | None, vocabulary: int, piece: int) -> Iterator[Tensor]:
    """Tokens of a prompt as it is read, (1, t) int64 each, `bos` first.

    A piece of text ends before the space of a word, where no token does otherwise, if it has any.

    Args:
        piece: bytes that are read at once.

    Raises:
        ValueError: a token is outside the model's vocabulary; names the place.
    """
    if bos is not None:
        yield torch.tensor([[bos]])
    rest, offset = b"", 0
    while True:
        new = file.read(piece)
        text = rest + new
        end = before_last_word(text) if new else len(text)
        if end:
            ids = encoder.encode(text[:end])
            if ids.max() >= vocabulary:
                raise ValueError(
                    f"prompt: token {ids.max()}, in bytes {offset} to {offset + end}, is outside the model's "
                    f"vocabulary of {vocabulary}"
                )
            yield torch.from_numpy(ids)[None]
        if not new:
            return
        rest, offset = text[end:], offset + end


def write(
    model: nn.Module,
    encoder: Encoder,
    prompt: BinaryIO,
    out: BinaryIO,
    count: int,
    *,
    piece: int = 512,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    **sampling: Any,
) -> str:
    """Read a prompt, write on, and tell what it took.

    Args:
        model: a language model.
        encoder: of its tokens.
        prompt: bytes, read by pieces.
        out: gets UTF-8, a character as soon as it is whole; what isn't UTF-8 becomes U+FFFD.
        count: tokens to write, at most; a beginning of a document ends the text.
        piece: bytes, and so tokens at most, that are read in one call.
        sampling: see `models.generate.sample`.

    Raises:
        ValueError: the prompt is empty and no token begins a document, or holds a token that the model doesn't know.
    """
    bos = cast("int | None", model.bos)
    vocabulary = cast(int, model.vocabulary)
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    started, read = time.perf_counter(), 0

    def parts() -> Iterator[Tensor]:
        nonlocal read
        for part in prompt_tokens(prompt, encoder, bos, vocabulary, piece):
            read += part.shape[1]
            yield part.to(device)

    logits, state = prefill(model, parts(), piece=piece)
    begun, written = time.perf_counter(), 0
    stream = generate(model, logits, state, count, generator=generator, stop=bos, **sampling)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        try:
            token = next(stream)
        except StopIteration as ended:
            state = ended.value
            break
        out.write(decoder.decode(encoder.decode(token.cpu().numpy())).encode())
        out.flush()
        written += 1
    out.write(decoder.decode(b"", final=True).encode())
    out.flush()
    reading, writing = begun - started, time.perf_counter() - begun
    return (
        f"read {read} tokens at {read / reading:.0f}/s, wrote {written} at {written / writing:.1f}/s; "
        f"the state has {nbytes(state)} bytes"
    )


@contextmanager
def _prompt(options: argparse.Namespace) -> Iterator[BinaryIO]:
    if options.prompt == "-":
        yield _filled(sys.stdin.buffer, "stdin")
    elif options.prompt is not None:
        with Path(options.prompt).open("rb") as file:
            yield _filled(file, options.prompt)
    else:
        yield BytesIO((options.text or "").encode("utf-8", "surrogateescape"))


def _filled(file: BinaryIO, name: str) -> BinaryIO:
    buffered = BufferedReader(cast(Any, file))
    if not buffered.peek(1):
        raise ValueError(f"--prompt {name}: is empty")
    return buffered


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint of train.py task=lm; 'last' is the newest")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="FILE", help="file to write on from, of any size; '-' is stdin")
    given.add_argument("--text", help="the prompt itself (default: the beginning of a document)")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="to write, at most (default 256)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest of mass P")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 takes the most probable")
    parser.add_argument("--seed", type=int, help="writes the same again (default: another text each time)")
    parser.add_argument("--piece", type=int, default=512, metavar="N", help="bytes of prompt a call (default 512)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    try:
        for name in ("tokens", "piece"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} {getattr(options, name)}: must be at least 1")
        sampling = {"top_k": options.top_k, "top_p": options.top_p, "temperature": options.temperature}
        check_sampling(**sampling)
        chosen = ["task=lm", f"ckpt={options.checkpoint}"]
        newest_checkpoint(chosen)
        with _prompt(options) as prompt:
            model, encoder = load(chosen[1].split("=", 1)[1])
            told = write(
                model.to(options.device),
                encoder,
                prompt,
                sys.stdout.buffer,
                options.tokens,
                piece=options.piece,
                device=options.device,
                seed=options.seed,
                **sampling,
            )
    except BrokenPipeError:  # the reader of stdout has enough; else Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{told}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
