"""Writing on from checkpoints: what comes out is what the model draws, prompts are read by pieces, bad input is one line."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from datamodules.token_files import token_folder
from datamodules.tokens import BPE, Bytes
from launch import register_resolvers
from models.generate import generate, prefill
from tools.generate import load, main, prompt_tokens, write

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The sea, the sea; thalatta! θάλαττα, θάλαττα. " * 8
register_resolvers()


def save(path, *overrides, change=lambda config: None):
    """A checkpoint as train.py writes it, of a model that has learnt nothing; the model too."""
    torch.manual_seed(1)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=["task=lm", *overrides])
    model = instantiate(cfg.model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # so that prompts matter
    config = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("model", "datamodule")}
    change(config)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "run": {"config": config, "overrides": list(overrides)}}, path)
    return model.eval()


SMALL = ("model.width=32", "model.layers=1", "model.heads=2", "model.hidden=32")


@pytest.fixture(scope="module", params=["lm_tiny_transformer", "lm_ci"])
def trained(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "last.ckpt"
    return path, save(path, f"model={request.param}", "datamodule=shakespeare", *SMALL)


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(TEXT.encode())
    return path


def said(capfdbinary, *arguments, status=0):
    assert main([str(argument) for argument in arguments]) == status
    return capfdbinary.readouterr()


def expected(model, text, count, **sampling):
    tokens = torch.tensor([[model.bos, *text]])
    stream = generate(model, *prefill(model, tokens), count, stop=model.bos, **sampling)
    return Bytes().decode(torch.cat(list(stream)).numpy()).decode("utf-8", "replace").encode()


def test_what_comes_out_is_what_the_model_draws(trained, prompt, capfdbinary):
    path, model = trained
    greedy = said(capfdbinary, path, "--prompt", prompt, "--tokens", 30, "--temperature", 0)
    assert greedy.out == expected(model, TEXT.encode(), 30, temperature=0)
    options = ("--tokens", 30, "--seed", 3, "--top-k", 40, "--top-p", 0.9, "--temperature", 0.8)
    sampling = {"top_k": 40, "top_p": 0.9, "temperature": 0.8, "generator": torch.Generator().manual_seed(3)}
    drawn = said(capfdbinary, path, "--prompt", prompt, *options)
    assert drawn.out == expected(model, TEXT.encode(), 30, **sampling)
    assert drawn.out != greedy.out
    told = re.search(rb"read (\d+) tokens at \d+/s, wrote (\d+) at [\d.]+/s; the state has (\d+) bytes", drawn.err)
    assert int(told[1]) == 1 + len(TEXT.encode())
    assert 1 <= int(told[2]) <= 30
    assert int(told[3]) > 1000


def test_the_size_of_the_pieces_changes_nothing(trained, prompt, capfdbinary):
    path, _ = trained
    outputs = {
        said(capfdbinary, path, "--prompt", prompt, "--tokens", 20, "--temperature", 0, "--piece", piece).out
        for piece in (17, 100, 100_000)
    }
    assert len(outputs) == 1


def test_a_prompt_may_come_from_the_command_line_or_stdin(trained, capfdbinary, monkeypatch):
    path, model = trained
    given = said(capfdbinary, path, "--text", TEXT, "--tokens", 20, "--temperature", 0).out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    piped = said(capfdbinary, path, "--prompt", "-", "--tokens", 20, "--temperature", 0).out
    assert given == piped == expected(model, TEXT.encode(), 20, temperature=0)
    assert said(capfdbinary, path, "--tokens", 20, "--seed", 0).out == expected(
        model, b"", 20, generator=torch.Generator().manual_seed(0)
    )


def test_without_a_seed_texts_differ(trained, capfdbinary):
    path, _ = trained
    assert len({said(capfdbinary, path, "--text", "a", "--tokens", 40).out for _ in range(3)}) > 1


class Sized(io.BytesIO):
    """Notes the largest read."""

    largest = 0

    def read(self, size=-1):
        found = super().read(size)
        self.largest = max(self.largest, len(found))
        return found


class Scripted(torch.nn.Module):
    """Writes given tokens one after another behind a prompt of so many tokens, and notes how much it was given at once."""

    vocabulary, bos = 257, 256

    def __init__(self, prompt, script):
        super().__init__()
        self.prompt, self.script, self.largest = prompt, script, 0

    def forward(self, tokens, state):
        self.largest = max(self.largest, tokens.shape[1])
        total = tokens.shape[1] + (0 if state is None else state[0])
        logits = torch.full((*tokens.shape, 257), -50.0)
        logits[:, -1, self.script[max(total - self.prompt, 0)]] = 50.0
        return logits, (total, torch.zeros(1, 7))


def test_a_long_prompt_is_never_held_whole():
    file, model = Sized(b"abcdefgh " * 100_000), Scripted(900_001, [65, 256])
    told = write(model, Bytes(), file, io.BytesIO(), 5, piece=1000)
    assert file.largest == 1000
    assert model.largest <= 1009  # a piece, and the word that the piece before cut
    assert told.startswith("read 900001 tokens")  # a beginning, and the text
    assert told.endswith("the state has 28 bytes")


class Flushes(io.BytesIO):
    """What had come at every flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


def test_characters_come_whole_and_as_soon_as_they_are():
    script = [65, *"θ€".encode(), 0xFF, 66, 0xE2, 0x82]
    out = Flushes()
    write(Scripted(2, [*script, 256]), Bytes(), io.BytesIO(b"x"), out, 99, temperature=0.0)
    assert out.getvalue().decode() == "Aθ€\N{REPLACEMENT CHARACTER}B\N{REPLACEMENT CHARACTER}"
    grown = [out.seen[index].decode() for index in range(9)]  # each decodes, so no character was ever cut
    assert grown == ["A", "A", "Aθ", "Aθ", "Aθ", "Aθ€", "Aθ€�", "Aθ€�B", "Aθ€�B"]


def test_the_beginning_of_a_document_ends_the_text():
    out = io.BytesIO()
    told = write(Scripted(2, [65, 66, 256, 67]), Bytes(), io.BytesIO(b"x"), out, 99, temperature=0.0)
    assert out.getvalue() == b"AB"
    assert ", wrote 3 at" in told
    write(Scripted(2, [65, 66, 256, 67]), Bytes(), io.BytesIO(b"x"), out := io.BytesIO(), 1, temperature=0.0)
    assert out.getvalue() == b"A"


def test_merged_bytes_are_the_same_in_pieces_as_at_once(tmp_path):
    encoder = BPE(size=280).fit([TEXT.encode()], tmp_path)
    text = (TEXT + "\n\n  two  spaces\t \n" + "longword" * 10 + " end ").encode()
    whole = encoder.encode(text)
    for piece in (90, 200, 10_000):
        parts = list(prompt_tokens(io.BytesIO(text), encoder, 256, 280, piece))
        assert parts[0].tolist() == [[256]]
        assert torch.equal(torch.cat(parts[1:], 1)[0], torch.from_numpy(whole))
    cut = torch.cat(list(prompt_tokens(io.BytesIO(text), encoder, None, 280, 3)), 1)[0]
    assert encoder.decode(cut.numpy()) == text  # pieces shorter than words still lose nothing


def test_a_tokenizer_that_was_learnt_is_found_again(tmp_path, capfdbinary):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(TEXT * 4)
    given = (f"datamodule.path={texts}", "datamodule.source.train=a.txt", "tokens@datamodule.tokens=bpe")
    overrides = ("model=lm_tiny_transformer", "datamodule=text_files", *given, "datamodule.tokens.size=280", *SMALL)
    path, cache = tmp_path / "bpe.ckpt", tmp_path / "cache"
    model = save(path, *overrides, change=lambda config: config["datamodule"].update(cache=str(cache)))
    assert model.vocabulary == 280
    assert str(cache) in said(capfdbinary, path, "--text", "The sea", status=2).err.decode()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        source = instantiate(compose("train", overrides=["task=lm", *overrides]).datamodule.source)
    folder = token_folder(source, BPE(size=280), cache)
    folder.mkdir(parents=True)
    fitted = BPE(size=280).fit([TEXT.encode()], folder)
    prompt = torch.from_numpy(np.concatenate(([256], fitted.encode(b"The sea"))))[None]
    ids = torch.cat(list(generate(model, *prefill(model, prompt), 9, temperature=0, stop=256)))
    written = said(capfdbinary, path, "--text", "The sea", "--tokens", 9, "--temperature", 0).out
    assert written == fitted.decode(ids.numpy()).decode("utf-8", "replace").encode()
    (texts / "a.txt").write_text("changed " * 99)  # what the run kept is found all the same
    assert str(cache) in said(capfdbinary, path, "--text", "The sea", status=2).err.decode()
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert said(capfdbinary, path, "--text", "The sea", "--tokens", 9, "--temperature", 0).out == written


def test_models_trained_on_problems_in_bytes_write_too(tmp_path, capfdbinary):
    model = save(tmp_path / "needle.ckpt", "model=lm_ci", "datamodule=needle")
    written = said(capfdbinary, tmp_path / "needle.ckpt", "--text", "What", "--tokens", 8, "--temperature", 0)
    assert written.out == expected(model, b"What", 8, temperature=0)


BAD = {
    "no prompt": (["--prompt", "/nowhere.txt"], "/nowhere.txt"),
    "empty prompt": (["--prompt", os.devnull], f"--prompt {os.devnull}: is empty"),
    "folder": (["--prompt", "/"], "Is a directory"),
    "no tokens": (["--tokens", "0"], "--tokens 0: must be at least 1"),
    "no piece": (["--piece", "-1"], "--piece -1: must be at least 1"),
    "top-p": (["--top-p", "0"], "top_p=0.0 must lie in (0, 1]"),
    "top-k": (["--top-k", "0"], "top_k=0 must be at least 1"),
    "temperature": (["--temperature", "-1"], "temperature=-1.0 must be at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(trained, case, capfdbinary):
    arguments, message = BAD[case]
    done = said(capfdbinary, trained[0], *arguments, status=2)
    assert message in done.err.decode()
    assert done.err.startswith(b"error: ")
    assert done.err.count(b"\n") == 1
    assert done.out == b""


def test_tokens_that_a_model_does_not_know_are_named(tmp_path, capfdbinary):
    path = tmp_path / "ascii.ckpt"
    save(path, "model=lm_tiny_transformer", "datamodule=shakespeare", "model.vocabulary=128", "model.bos=null", *SMALL)
    prompt = b"all is plain " * 9 + "and thén not".encode()
    done = said(capfdbinary, path, "--text", prompt.decode(), "--piece", 50, status=2)
    assert b"prompt: token 195, in bytes 97 to 126, is outside the model's vocabulary of 128" in done.err
    assert b"the prompt has no token" in said(capfdbinary, path, status=2).err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"not a checkpoint", "not a readable checkpoint"),
        ({"state_dict": {}}, "wasn't written by train.py"),
        ({"run": {"config": {"model": {"_target_": "models.swin.Swin"}}}}, "isn't a class of"),
        (
            {"run": {"config": {"model": {"_target_": "models.memory_lm.MemoryLM"}}}},
            "not a checkpoint of a language model",
        ),
    ],
)
def test_what_is_no_checkpoint_of_a_language_model_is_named(tmp_path, content, message, capfdbinary):
    path = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    done = said(capfdbinary, path, "--text", "a", status=2)
    assert str(path) in done.err.decode()
    assert message in done.err.decode()
    assert done.err.count(b"\n") == 1


@pytest.mark.parametrize("target", ["os.system", "models.convert.os.system", "models.convert.export", "builtins.exec"])
def test_a_checkpoint_calls_nothing_but_our_classes(tmp_path, target):
    def change(config):
        config["model"]["feed"] = {"_target_": target, "command": f"touch {tmp_path}/touched"}

    save(tmp_path / "evil.ckpt", "model=lm_tiny_transformer", "datamodule=shakespeare", *SMALL, change=change)
    with pytest.raises(ValueError, match=f"names {target}, which isn't a class of"):
        load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("place", ["value", "key", "list", "source"])
def test_a_checkpoint_resolves_nothing(tmp_path, place):
    call = "${oc.create:'{_target_: pathlib.Path.touch, self: {_target_: pathlib.Path, _args_: [TOUCHED]}}'}"
    call = call.replace("TOUCHED", str(tmp_path / "touched"))

    def change(config):
        model, given = config["model"], {"value": call, "key": {call: 1}, "list": [[call]]}
        (config["datamodule"]["source"] if place == "source" else model)["vocabulary"] = given.get(place, call)

    save(tmp_path / "evil.ckpt", "model=lm_tiny_transformer", "datamodule=shakespeare", *SMALL, change=change)
    with pytest.raises(ValueError, match=r"evil\.ckpt: its config has .*oc\.create.*what was recorded is resolved"):
        load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "touched").exists()


def test_data_without_text_and_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, "model=lm_ci", "datamodule=mqar")
    with pytest.raises(ValueError, match="with tokens that aren't text"):
        load(path)
    save(path, "model=lm_ci", "datamodule=shakespeare", change=lambda config: config["model"].update(hidden=99))
    with pytest.raises(ValueError, match="of another shape"):
        load(path)
    save(path, "model=lm_ci", "datamodule=shakespeare", change=lambda config: config["model"].update(heads=7))
    with pytest.raises(ValueError, match=r"last\.ckpt: its config doesn't build"):
        load(path)


@pytest.mark.slow
def test_the_command_ends_quietly_when_its_reader_has_enough(trained):
    command = [sys.executable, "-m", "tools.generate", str(trained[0]), "--tokens", "3000", "--seed", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout.read(1)
        run.stdout.close()
        assert run.wait(60) == 1
        assert b"Traceback" not in run.stderr.read()
