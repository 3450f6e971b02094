"""The language commands as a user types them: train, be cut off, resume, evaluate, sweep, write on; one line for bad input."""

import csv
import os
import signal
import sys

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from test_commands import ROOT

import evaluate
import launch
import train
from tasks.language import Language
from tools import generate

SMALL = [
    "task=lm",
    "model=lm_ci",
    "model.width=32",
    "model.heads=2",
    "model.layers=1",
    "model.hidden=64",
    "segment=32",
    "datamodule.batch_size=2",
    "datamodule.eval_batch_size=2",
    "trainer.accelerator=cpu",
    "callbacks.progress.refresh_rate=1000",
    "loggers.tensorboard=null",
    "threads=1",
]
STEPS = 8  # of an epoch of `text`


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Overrides that train on three of this repository's own files."""
    folder = tmp_path_factory.mktemp("text")
    for name, source in {"train": "README.md", "val": "LICENSE", "test": "CONTRIBUTING.md"}.items():
        (folder / f"{name}.txt").write_bytes((ROOT / source).read_bytes()[: 1 + STEPS * 64])
    splits = [f"datamodule.source.{split}={split}.txt" for split in ("train", "val", "test")]
    return [*SMALL, "datamodule=text_files", f"datamodule.path={folder}", *splits]


def typed(script, *arguments):
    """What a command does, in this process, for its imports take longer than it; returns its exit status."""
    before, sys.argv = sys.argv, [f"{script.__name__}.py", *arguments]
    try:
        launch.given_arguments(sys.argv)
        if script is evaluate:
            launch.with_overrides_of_checkpoint(sys.argv)
        script.main()
    except SystemExit as ended:
        return ended.code
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    return 0


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    assert typed(train, *text, f"hydra.run.dir={path}") == 0
    return path


def content(path):
    return torch.load(path, weights_only=True)


def rows_in(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def during(monkeypatch, step, do):
    """Call `do` in the middle of a training step, counted from 0."""
    loss = Language.loss

    def interrupted(self, batch):
        if self.global_step == step:
            do()
        return loss(self, batch)

    monkeypatch.setattr(Language, "loss", interrupted)


def test_a_run_ends_with_a_checkpoint_of_all_its_steps(trained):
    saved = content(trained / "last.ckpt")
    assert (saved["epoch"], saved["global_step"]) == (0, STEPS)
    assert not any("state" in name for name in saved["state_dict"])  # what was read is no weight
    with (trained / "csv/version_0/metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert 0 < float(row["val/bits_per_byte"]) < 9
    assert 0 < float(row["val/memory_share_0"]) < 1


def test_epochs_have_the_steps_asked_for_and_a_problem_its_own(text, tmp_path):
    assert typed(train, *text, "steps=3", f"hydra.run.dir={tmp_path / 'text'}") == 0
    assert content(tmp_path / "text/last.ckpt")["global_step"] == 3
    problem = ["datamodule=chunk_passkey", "datamodule.steps=4", "datamodule.eval_batches=1", "steps=3"]
    assert typed(train, *SMALL, *problem, f"hydra.run.dir={tmp_path / 'problem'}") == 0
    assert content(tmp_path / "problem/last.ckpt")["global_step"] == 4


def test_a_signal_in_mid_epoch_loses_no_step(text, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        during(patched, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert typed(train, *text, f"hydra.run.dir={tmp_path / 'cut'}") == 0
    assert not (tmp_path / "cut/last.ckpt").exists()
    assert content(tmp_path / "cut/requeue.ckpt")["global_step"] == 4
    read = []
    with monkeypatch.context() as patched:
        loss = Language.loss
        patched.setattr(Language, "loss", lambda self, batch: read.append(batch) or loss(self, batch))
        resumed = [f"ckpt={tmp_path / 'cut/requeue.ckpt'}", "resume=true", f"hydra.run.dir={tmp_path / 'rest'}"]
        assert typed(train, *text, *resumed) == 0
        assert typed(train, *text, f"hydra.run.dir={tmp_path / 'whole'}") == 0
    rest, whole = read[: STEPS - 4], read[STEPS - 4 :]
    assert len(whole) == STEPS
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(rest, whole[4:], strict=True))  # at the fifth step
    saved = content(tmp_path / "rest/last.ckpt")
    assert saved["global_step"] == STEPS
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_crash_loses_an_epoch_at_most(text, tmp_path, monkeypatch):
    def crash():
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        during(patched, STEPS + 2, crash)
        assert typed(train, *text, "epochs=2", f"hydra.run.dir={tmp_path / 'cut'}") != 0
    last = tmp_path / "cut/last.ckpt"
    assert content(last)["global_step"] == STEPS
    resumed = ["epochs=2", f"ckpt={last}", "resume=true", f"hydra.run.dir={tmp_path / 'rest'}"]
    assert typed(train, *text, *resumed) == 0
    assert typed(train, *text, "epochs=2", f"hydra.run.dir={tmp_path / 'whole'}") == 0
    rest, whole = (content(tmp_path / name / "last.ckpt") for name in ("rest", "whole"))
    assert rest["global_step"] == whole["global_step"] == 2 * STEPS
    assert all(torch.equal(rest["state_dict"][name], value) for name, value in whole["state_dict"].items())


def test_contexts_become_rows_and_scalings_are_left_out_where_nothing_scales(trained, tmp_path, capfd):
    results = tmp_path / "results.csv"
    where = [f"ckpt={trained}/last.ckpt", f"results={results}"]
    points = "hydra.sweeper.params={context: '32,64', rotary/scaling: 'identity,yarn'}"
    assert typed(evaluate, *where, "sweep=context_scalings", points, f"hydra.sweep.dir={tmp_path / 'sweep'}") == 0
    said = " ".join("".join(capfd.readouterr()).split())
    assert said.count("lm_ci turns no further in a longer context, so nothing is scaled: yarn is left out") == 2
    rows = rows_in(results)
    assert [(row["context"], row["scaling"]) for row in rows] == [("32", "identity"), ("64", "identity")]
    assert all(row["trained_at"] == "32" and float(row["bits_per_byte"]) > 0 for row in rows)
    assert (tmp_path / "sweep_context.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_model_whose_distances_grow_is_scaled(text, tmp_path):
    model = ["model=lm_tiny_transformer", "model.width=32", "model.heads=2", "model.layers=1", "model.hidden=64"]
    plain = [word for word in text if not word.startswith("model")]
    assert typed(train, *plain, *model, f"hydra.run.dir={tmp_path}") == 0
    results = tmp_path / "results.csv"
    points = "hydra.sweeper.params={context: '128', rotary/scaling: 'identity,interpolate'}"
    where = [f"ckpt={tmp_path}/last.ckpt", f"results={results}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert typed(evaluate, *where, "sweep=context_scalings", points) == 0
    loss = {row["scaling"]: row["loss"] for row in rows_in(results)}
    assert loss.keys() == {"identity", "interpolate"}
    assert loss["identity"] != loss["interpolate"]


@pytest.mark.slow
def test_text_is_asked_for_needles_and_a_problem_for_its_own(trained, tmp_path, capfd):
    problem = tmp_path / "problem"
    few = ["datamodule=chunk_passkey", "datamodule.steps=2", "datamodule.length=64", "datamodule.eval_batches=1"]
    assert typed(train, *SMALL, *few, f"hydra.run.dir={problem}") == 0
    common = ["sweep=needle", "datamodule.eval_batches=1", "datamodule.eval_batch_size=4"]
    for run, lengths, trained_at in ((trained, "512", "32"), (problem, "64,96", "64")):
        results = tmp_path / f"{trained_at}.csv"
        points = f"hydra.sweeper.params.context='{lengths}'"
        where = [f"ckpt={run}/last.ckpt", f"results={results}", f"hydra.sweep.dir={tmp_path / trained_at}"]
        assert typed(evaluate, *where, *common, points) == 0, capfd.readouterr()
        rows = [row for row in rows_in(results) if row["depth"]]
        assert {row["data"] for row in rows} == {"needle" if run is trained else "chunk_passkey"}
        assert {row["context"] for row in rows} == set(lengths.split(","))
        assert {row["trained_at"] for row in rows} == {trained_at}
        assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
        assert (tmp_path / "sweep_needle.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "sweep_needle.png").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lm_tiny_paper", "lm_tiny_xl", "lm_tiny_local", "lm_tiny_delta", "lm_ci_delta"])
def test_every_variant_trains_and_writes_on(text, tmp_path, model, capfdbinary):
    plain = [word for word in text if not word.startswith("model")]
    sizes = [f"model={model}", "model.layers=1", "steps=2"]
    assert typed(train, *plain, *sizes, f"hydra.run.dir={tmp_path}") == 0
    assert generate.main([str(tmp_path / "last.ckpt"), "--text", "Read me", "--tokens", "5", "--seed", "0"]) == 0
    assert capfdbinary.readouterr().out


@pytest.mark.slow
def test_merged_bytes_are_learnt_from_the_training_text(text, tmp_path, capfdbinary):
    bpe = ["tokens@datamodule.tokens=bpe", "datamodule.tokens.size=260", f"+datamodule.cache={tmp_path / 'cache'}"]
    assert typed(train, *text, *bpe, "steps=2", f"hydra.run.dir={tmp_path}") == 0
    assert generate.main([str(tmp_path / "last.ckpt"), "--text", "Read me", "--tokens", "5", "--seed", "0"]) == 0
    assert b"read " in capfdbinary.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    for split, name in {"train": "Makefile", "val": "LICENSE", "test": "launch.py"}.items():
        (other / f"{split}.txt").write_bytes((ROOT / name).read_bytes()[:2000])
    moved = [f"datamodule.path={other}"]
    results = f"results={tmp_path / 'results.csv'}"
    assert (
        typed(evaluate, "task=lm", f"ckpt={tmp_path / 'last.ckpt'}", *moved, results, f"hydra.run.dir={tmp_path}/e")
        == 0
    )
    told = (tmp_path / "e" / ".hydra" / "overrides.yaml").read_text()
    assert f"datamodule.tokens.path={tmp_path / 'tokenizer.json'}" in told


def files(folder, **texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text)
    return [*SMALL, "datamodule=text_files", f"datamodule.path={folder}"]


PROSE = b"It was the best of times, it was the worst of times. " * 9
BAD = {
    "empty": ({"a": PROSE, "b": b""}, [], "b.txt: b.txt is empty; remove it, or set skip_empty=true"),
    "not text": ({"a": PROSE, "b": b"caf\xe9 noir"}, [], "b.txt"),
    "short": (
        {"a": b"Brief.", "b": PROSE, "c": PROSE},
        [f"datamodule.source.{split}={name}.txt" for split, name in (("train", "a"), ("val", "b"), ("test", "c"))],
        "tokens make no step of 32 tokens on 2 strands",
    ),
    "one document": ({"a": PROSE}, [], "no documents in the"),
    "separator": (
        {"a": PROSE},
        ["datamodule.source.separator='***'"],
        "separator '***' occurs in none of 1 text files",
    ),
    "window": ({"a": PROSE}, ["model.window=17"], "window=17 must lie in 1 … chunk=16"),
    "chunks": ({"a": PROSE}, ["task.backward_chunks=0"], "task.backward_chunks=0"),
    "heads": ({"a": PROSE}, ["model.heads=3"], "3 heads don't divide a width of 32"),
    "no folder": ({"a": PROSE}, ["datamodule.path=/nowhere"], "/nowhere"),
    "vocabulary": ({"a": PROSE}, ["datamodule.vocabulary=300"], "datamodule.vocabulary and bos are 300 and 256"),
    "checkpoint": ({"a": PROSE}, ["ckpt=/nowhere.ckpt", "resume=true"], "ckpt=/nowhere.ckpt: no such file"),
}


def the_error(said):
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_before_training(case, tmp_path, capfd):
    texts, arguments, message = BAD[case]
    assert typed(train, *files(tmp_path / "text", **texts), *arguments, f"hydra.run.dir={tmp_path / 'run'}") == 2
    out, err = capfd.readouterr()
    assert message in the_error(err)
    assert "Epoch 0" not in out + err
    assert not (tmp_path / "run/last.ckpt").exists()


def test_a_checkpoint_of_another_model_is_named(trained, tmp_path, capfd):
    results = tmp_path / "results.csv"
    where = [f"ckpt={trained}/last.ckpt", f"results={results}", f"hydra.run.dir={tmp_path}"]
    assert typed(evaluate, *where, "model.layers=2") == 2
    error = the_error(capfd.readouterr().err)
    assert f"{trained}/last.ckpt" in error
    assert "blocks.1" in error
    assert not results.exists()


def test_a_length_that_holds_no_problem_is_named(trained, tmp_path, capfd):
    where = [f"ckpt={trained}/last.ckpt", f"results={tmp_path / 'results.csv'}", f"hydra.sweep.dir={tmp_path}"]
    assert typed(evaluate, *where, "sweep=needle", "hydra.sweeper.params.context='64'") == 2
    assert "length 64 is too short, the longest problem takes" in the_error(capfd.readouterr().err)


def test_a_prompt_that_is_missing_is_named(trained, tmp_path, capfd):
    assert generate.main([str(trained / "last.ckpt"), "--prompt", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in the_error(capfd.readouterr().err)
