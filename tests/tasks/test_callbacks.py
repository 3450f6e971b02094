"""Requeue at a step boundary, the stored average, and what a checkpoint tells about its run."""

import os
import signal
from functools import partial

import pytest
import torch
from quiet_trainer import trainer
from test_classification import batches, loader, task_of, tiny

from datamodules.resumable import ResumableLoader
from models.convert import load_checkpoint
from tasks.ema import StoredAverage
from tasks.record import Record, recorded
from tasks.requeue import EpochCheckpoint, Requeue


def resumable(data):
    sampler = torch.utils.data.distributed.DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=3)
    return ResumableLoader(data, sampler, 1, collate_fn=lambda items: items[0])


class Interrupt(torch.utils.data.Dataset):
    """Raises the signal while the third batch is being fetched, that is, in mid-step."""

    def __init__(self, data):
        self.data, self.fetched = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.fetched += 1
        if self.fetched == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return self.data[index]


def test_a_signal_saves_at_the_step_boundary_and_resuming_is_exact(tmp_path):
    data = batches(6)
    before = signal.getsignal(signal.SIGUSR1)

    def run(source, **changes):
        torch.manual_seed(1)
        task = task_of(tiny())
        fit = trainer(tmp_path, max_epochs=1, callbacks=changes.pop("callbacks", []), enable_checkpointing=True)
        fit.fit(task, resumable(source), **changes)
        return task, fit

    straight, _ = run(data)
    _, stopped = run(Interrupt(data), callbacks=[Requeue(str(tmp_path))])
    saved = tmp_path / "requeue.ckpt"
    assert saved.is_file()
    assert 0 < stopped.global_step < 6
    assert signal.getsignal(signal.SIGUSR1) == before
    resumed, finished = run(data, ckpt_path=saved, weights_only=True)
    assert finished.global_step == 6
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_average_is_stored_and_not_used(tmp_path):
    task, average = task_of(tiny()), StoredAverage(decay=0.5)
    start = task.model.head.weight.detach().clone()
    fit = trainer(tmp_path, max_epochs=1, callbacks=[average])
    fit.fit(task, loader(batches(1)))
    path = tmp_path / "x.ckpt"
    fit.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["average"]["head.weight"]
    torch.testing.assert_close(stored, 0.5 * start + 0.5 * task.model.head.weight.detach())
    for entry, expected in (("average", stored), (None, task.model.head.weight)):
        loaded = tiny()
        load_checkpoint(loaded, path, entry=entry)
        assert torch.equal(loaded.head.weight, expected)


def test_the_average_takes_a_step_of_the_optimizer_at_a_time(tmp_path):
    task, average = task_of(tiny()), StoredAverage(decay=0.5)
    seen = []
    task.on_train_batch_start = lambda *_: seen.append(average.average.module.head.weight.detach().clone())
    trainer(tmp_path, max_epochs=1, callbacks=[average], accumulate_grad_batches=2).fit(task, loader(batches(4)))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])


def test_a_checkpoint_without_an_average_is_named(tmp_path):
    torch.save({"state_dict": tiny().state_dict()}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt has no weights under 'average'"):
        load_checkpoint(tiny(), tmp_path / "x.ckpt", entry="average")


def test_a_checkpoint_tells_its_run(tmp_path):
    task = task_of(tiny())
    record = Record(tmp_path, {"a": {"b": 1}}, ["task=imagenet", "position=axial"])
    fit = trainer(tmp_path, max_epochs=1, callbacks=[record])
    fit.fit(task, loader(batches(1)))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    run = recorded(tmp_path / "x.ckpt")
    assert run["config"] == {"a": {"b": 1}}
    assert run["overrides"] == ["task=imagenet", "position=axial"]
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or run["versions"]["torch"] == torch.__version__
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"garbage", "not a readable checkpoint"),
        ({"state_dict": {}}, "wasn't written by train.py"),
    ],
)
def test_foreign_files_are_named(tmp_path, content, message):
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"x\.ckpt.*{message}"):
        recorded(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"run": partial(print, "pwned")}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        recorded(path)


def test_a_signal_on_the_last_batch_loses_no_epoch(tmp_path):
    data = batches(3)

    def run(source, **changes):
        torch.manual_seed(1)
        task = task_of(tiny())
        last = EpochCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
        callbacks = [last, *changes.pop("callbacks", [])]
        fit = trainer(tmp_path, max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
        fit.fit(task, resumable(source), **changes)
        return task, fit

    straight, _ = run(data)
    (tmp_path / "last.ckpt").unlink()
    _, stopped = run(Interrupt(data), callbacks=[Requeue(str(tmp_path))])  # the third of three
    assert stopped.global_step == 3
    assert not (tmp_path / "last.ckpt").exists()  # the epoch cut short isn't passed off as whole
    resumed, finished = run(data, ckpt_path=tmp_path / "requeue.ckpt", weights_only=True)
    assert finished.global_step == 9
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
