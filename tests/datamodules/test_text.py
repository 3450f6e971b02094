"""Strands restore the stream, ranks share it out, windows predict every token once, and an epoch can be resumed."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

import compat  # noqa: F401  isort: skip
import pytorch_lightning as lightning
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from datamodules.text import Text
from datamodules.text_documents import Document
from datamodules.text_files import TextFiles
from datamodules.text_shakespeare import Shakespeare
from datamodules.text_streams import DocumentStream, EvaluationWindows, TrainingStrands
from datamodules.token_files import open_token_files, write_token_files
from datamodules.tokens import BPE, Bytes

LENGTHS = {"train": [40, 3, 170, 1, 25, 90], "val": [30, 2, 61], "test": [7, 100, 12]}
WORDS = np.random.default_rng(0).integers(97, 123, 1000, dtype=np.uint8).tobytes()


class Letters:
    """Made documents of given lengths; each begins with its own number, so that order can be read off."""

    name = "letters"

    def identity(self, cache=None):
        return {"source": self.name}

    def documents(self, split, cache=None):
        return (
            Document(str(n), bytes([48 + n]) + WORDS[n : n + length - 1]) for n, length in enumerate(LENGTHS[split])
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return open_token_files(write_token_files(Letters(), Bytes(), tmp_path_factory.mktemp("cache")))


TABLE = Bytes().bytes_per_token


def strands(files, **changes):
    settings = {"rows": 3, "segment": 8, "seed": 5} | changes
    return TrainingStrands(files["train"], TABLE, settings.pop("rows"), settings.pop("segment"), **settings)


def steps(dataset, epoch=0):
    return [dataset[epoch, step] for step in range(len(dataset))]


def joined(batches, what="tokens"):
    return torch.cat([getattr(batch, what) for batch in batches], 1)  # (rows, all columns)


def stream_by_hand(order):
    """Tokens and targets of documents one after another, as one would write them down."""
    tokens, targets, position = [], [], []
    texts = [document.text for document in Letters().documents("train")]
    for index in order:
        ids = [256, *texts[index]]
        tokens += ids
        targets += [*ids[1:], -100]
        position += range(len(ids))
    return torch.tensor(tokens), torch.tensor(targets), torch.tensor(position)


def test_strands_restore_the_shuffled_stream(files):
    dataset = strands(files)
    batches = steps(dataset, epoch=4)
    columns = len(dataset) * 8
    order = np.random.default_rng([5, 4]).permutation(6)
    tokens, targets, position = stream_by_hand(order)
    assert 0 <= len(tokens) - 3 * columns < 3 * 8  # less than a step is left out
    assert torch.equal(joined(batches).flatten(), tokens[: 3 * columns])
    assert torch.equal(joined(batches, "targets").flatten(), targets[: 3 * columns])
    read = torch.arange(3 * columns) % columns  # since the strand began
    assert torch.equal(joined(batches, "position").flatten(), torch.minimum(position[: 3 * columns], read))
    assert (position[: 3 * columns] > read).any()
    assert torch.equal(joined(batches, "bytes"), (joined(batches, "targets") >= 0).long())
    assert all(batch.tokens.shape == (3, 8) for batch in batches)


def test_rows_begin_anew_with_the_epoch_alone(files):
    batches = steps(strands(files))
    assert batches[0].fresh.all()
    assert not any(batch.fresh.any() for batch in batches[1:])
    assert all(batch.depth.isnan().all() and batch.references == () for batch in batches)


def test_each_epoch_has_an_order_of_its_own(files):
    dataset = strands(files)
    first, again, second = (joined(steps(dataset, epoch)) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, joined(steps(strands(files, seed=6))))


def test_ranks_take_strands_of_their_own(files):
    alone = steps(strands(files, rows=4))
    ranks = [steps(strands(files, rows=2, rank=rank, world=2)) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        for what in ("tokens", "targets", "position", "bytes"):
            assert torch.equal(getattr(whole, what), torch.cat([getattr(part, what) for part in parts]))


def predictions(files, split, rows, segment, context, world, limit=None):
    """Tokens predicted over all ranks, by place in the stream; and the batches of all ranks."""
    stream = DocumentStream(files[split], TABLE, limit=limit)
    found, everything = [], []
    for rank in range(world):
        dataset = EvaluationWindows(stream, rows, segment, context, rank=rank, world=world)
        batches = [dataset[index] for index in range(len(dataset))]
        everything.append(batches)
        for batch in batches:
            assert batch.tokens.shape == batch.targets.shape == batch.position.shape == batch.bytes.shape
            assert batch.tokens.shape[1] <= segment
            assert len(batch.tokens) <= rows
            found += batch.targets[batch.targets >= 0].tolist()
    return found, everything


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("context", [None, 1, 5, 8, 16, 23, 94])
@pytest.mark.parametrize("rows", [1, 4])
def test_every_token_is_predicted_once(files, world, context, rows):
    found, ranks = predictions(files, "val", rows, 8, context, world)
    texts = [document.text for document in Letters().documents("val")]
    assert sorted(found) == sorted(chain(*texts))
    assert len({tuple(tuple(batch.tokens.shape) for batch in batches) for batches in ranks}) == 1
    assert sum(int(batch.bytes.sum()) for batches in ranks for batch in batches) == sum(map(len, texts))


@pytest.mark.parametrize("context", [5, 8, 23])
def test_windows_are_read_in_segments(files, context):
    dataset = EvaluationWindows(DocumentStream(files["test"], TABLE), 3, 8, context)
    tokens = files["test"].read(np.arange(files["test"].starts[-1]))
    starts = files["test"].starts
    windows, row = [], None
    for batch in (dataset[index] for index in range(len(dataset))):
        assert batch.fresh.all() or not batch.fresh.any()
        row = [batch] if batch.fresh.all() else [*row, batch]
        if sum(piece.tokens.shape[1] for piece in row) == context:
            windows += list(zip(joined(row), joined(row, "targets"), joined(row, "position"), strict=True))
    assert len(windows) >= -(-len(tokens) // context)
    for number, (row_tokens, row_targets, row_position) in enumerate(windows):
        for column in range(context):
            place = number * context + column
            if place >= len(tokens):
                assert row_targets[column] == -100
                continue
            document = int(np.searchsorted(starts, place, side="right")) - 1
            assert row_tokens[column] == tokens[place]
            assert row_targets[column] == (tokens[place + 1] if place + 1 < starts[document + 1] else -100)
            assert row_position[column] == place - max(starts[document], number * context)


def test_reading_on_counts_from_where_reading_or_the_document_began(files):
    dataset = EvaluationWindows(DocumentStream(files["test"], TABLE), 4, 8)
    batches = [dataset[index] for index in range(len(dataset))]
    assert [bool(batch.fresh.all()) for batch in batches] == [True] + [False] * (len(batches) - 1)
    position = joined(batches, "position").flatten()
    lengths = [length + 1 for length in LENGTHS["test"]]
    read = torch.arange(sum(lengths)) % dataset.window
    expected = torch.minimum(torch.tensor(list(chain(*map(range, lengths)))), read)
    assert torch.equal(position[: sum(lengths)], expected)
    assert expected.max() < dataset.window < max(lengths)
    assert (joined(batches, "targets").flatten()[sum(lengths) :] == -100).all()


def test_a_limit_takes_the_start_of_a_split(files):
    found, _ = predictions(files, "test", 2, 8, None, 1, limit=60)
    texts = b"".join(document.text for document in Letters().documents("test"))
    assert sorted(found) == sorted(texts[:58])  # two beginnings are of the 60
    dataset = strands(files, limit=43)  # of three documents, the last with its beginning and nothing else
    assert set(joined(steps(dataset)).flatten().tolist()) <= {256, *texts, *WORDS, 48, 49}
    assert len(dataset) == 1


def made(tmp_path, **changes):
    settings = {"source": Letters(), "tokens": Bytes(), "vocabulary": 257, "bos": 256, "batch_size": 2, "segment": 8}
    return Text(**(settings | {"cache": tmp_path} | changes))


def test_an_interrupted_epoch_goes_on_with_the_remaining_batches(tmp_path):
    def loader():
        data = made(tmp_path)
        data.setup("fit")
        found = data.train_dataloader()
        found.batch_sampler.sampler.set_epoch(3)
        return found

    straight = list(loader())
    stopped = loader()
    given = iter(stopped)
    for _ in range(5):
        next(given)
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    assert len(rest) == len(straight) - 5
    for one, other in zip(rest, straight[5:], strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.targets, other.targets)
        assert not one.fresh.any()


def test_worker_processes_give_the_same_batches(tmp_path):
    def batches(workers):
        data = made(tmp_path, num_workers=workers)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.batch_sampler.sampler.set_epoch(1)
        return [*loader, *data.val_dataloader()]

    for one, other in zip(batches(0), batches(1), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.references == other.references == ()


def quiet_trainer(folder, **changes):
    options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **dict.fromkeys(options, False), **changes)


def test_lightning_sets_the_epoch(tmp_path):
    class Notes(lightning.LightningModule):
        """Keeps the batches it is given."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.seen = {}

        def training_step(self, batch, index):
            self.seen.setdefault(self.current_epoch, []).append(batch.tokens)

        def configure_optimizers(self):
            return None

    data, task = made(tmp_path), Notes()
    quiet_trainer(tmp_path, max_epochs=2).fit(task, data)
    expected = TrainingStrands(data.files["train"], TABLE, 2, 8)
    for epoch in range(2):
        assert torch.equal(torch.cat(task.seen[epoch], 1), joined(steps(expected, epoch)))


def test_merged_tokens_count_the_bytes_of_the_text(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text("la la lü. " * (30 + number))
    data = made(tmp_path, source=TextFiles(tmp_path / "text"), tokens=BPE(size=262), vocabulary=262, eval_batch_size=3)
    data.setup()
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        assert sum(int(batch.bytes.sum()) for batch in batches) == data.files[split].text_bytes.sum() > 300
        assert max(int(batch.bytes.max()) for batch in batches) > 1
        for batch in batches:
            assert torch.equal(batch.bytes > 0, batch.targets != -100)


def test_a_run_keeps_what_its_tokens_were_learnt(tmp_path):
    def source(name, text):
        (tmp_path / name).mkdir()
        for split, count in {"train": 30, "val": 8, "test": 9}.items():
            (tmp_path / name / f"{split}.txt").write_text(text * count)
        return TextFiles(tmp_path / name, train="train.txt", val="val.txt", test="test.txt")

    mine, other = source("mine", "the cat sat on the mat. "), source("other", "zwölf Boxkämpfer jagen Viktor. ")
    run, text = tmp_path / "run", b"the cat sat"

    def data(documents, stage, trains=False, **given):
        found = made(tmp_path, source=documents, tokens=BPE(size=264, **given), vocabulary=264)
        found.trainer = quiet_trainer(run) if trains else None
        found.setup(stage)
        return found

    trained = data(mine, "fit", trains=True)
    assert [path.name for path in run.iterdir()] == ["tokenizer.json"]
    refit, kept = data(other, "test"), data(other, "test", path=run / "tokenizer.json")
    ids = trained.encoder.encode(text).tolist()
    assert kept.encoder.encode(text).tolist() == ids != refit.encoder.encode(text).tolist()
    assert sum(int(batch.bytes.sum()) for batch in kept.test_dataloader()) == kept.files["test"].text_bytes.sum()

    kept.load_state_dict(trained.state_dict())
    with pytest.raises(ValueError, match=r"text_files: the checkpoint's tokens aren't those of this text; set .*path"):
        refit.load_state_dict(trained.state_dict())
    with pytest.raises(ValueError, match=r"tokenizer\.json: the run's tokens aren't those of this text; set .*path="):
        data(other, "fit", trains=True)
    assert data(other, "fit", trains=True, path=run / "tokenizer.json").encoder.encode(text).tolist() == ids
    plain = made(tmp_path)
    plain.trainer = quiet_trainer(tmp_path / "plain")
    plain.setup("fit")
    assert (plain.state_dict(), (tmp_path / "plain" / "tokenizer.json").exists()) == ({}, False)


def test_shakespeare_is_predicted_whole():
    data = Text(Shakespeare(), Bytes(), 257, 256)
    try:
        data.setup("test")
    except ValueError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(str(error))
    batches = list(data.test_dataloader())
    assert sum(int(batch.bytes.sum()) for batch in batches) == 387_257
    assert sum(int((batch.targets >= 0).sum()) for batch in batches) == 387_257
    strand = sum(batch.tokens.shape[1] for batch in batches)
    assert max(int(batch.position.max()) for batch in batches) == strand - 1 < data.files["test"].text_bytes.max()


@pytest.mark.parametrize("name", ["shakespeare", "austen", "stdlib", "text_files", "wikitext103", "pg19"])
@pytest.mark.parametrize(("tokens", "size"), [("bytes", 257), ("bpe", 4096)])
def test_configs_build(name, tokens, size):
    changes = [f"+datamodule={name}", f"tokens@datamodule.tokens={tokens}", "+segment=96", "+context=384", "+seed=3"]
    needs_path = ["datamodule.path=/data"] if name in ("text_files", "wikitext103", "pg19") else []
    with initialize_config_dir(str(Path(__file__).resolve().parents[2] / "configs"), version_base="1.3"):
        config = compose(overrides=[*changes, *needs_path])
    data = instantiate(config.datamodule)
    assert (data.vocabulary, data.tokens.size, data.bos, data.tokens.bos) == (size, size, 256, 256)
    assert (data.segment, data.context, data.seed) == (96, 384, 3)
    assert (data.source.name, data.tokens.name) == (name, tokens)
    assert not needs_path or data.source.path == "/data"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 300}, r"datamodule\.vocabulary and bos are 300 and 256, those of bytes tokens are 257 and 256"),
        ({"bos": 0}, r"vocabulary and bos are 257 and 0"),
        ({"segment": 0}, r"datamodule\.segment is 0"),
        ({"context": -1}, r"datamodule\.context is -1"),
        ({"batch_size": 1.5}, r"datamodule\.batch_size is 1\.5"),
        ({"limit_tokens": 0}, r"datamodule\.limit_tokens is 0"),
        ({"num_workers": -1}, r"datamodule\.num_workers is -1, expected a whole number, at least 0"),
        ({"seed": -1}, r"datamodule\.seed is -1"),
        ({"seed": 0.5}, r"datamodule\.seed is 0\.5"),
    ],
)
def test_wrong_numbers_are_refused_by_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **changes)


def test_text_that_is_too_short_is_refused_with_its_sizes(tmp_path):
    data = made(tmp_path, segment=200)
    data.setup()
    with pytest.raises(ValueError, match=r"letters, train split: 335 tokens make no step of 200 tokens on 2 strands"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"letters, val split: 96 tokens are too few for a segment of 200"):
        data.val_dataloader()
    data = made(tmp_path, context=97, eval_batch_size=64)
    data.setup()
    with pytest.raises(ValueError, match=r"letters, val split: 96 tokens are too few for a context of 97"):
        data.val_dataloader()
    data = made(tmp_path, segment=200, context=50)  # segments are cut to the window
    data.setup()
    assert {batch.tokens.shape[1] for batch in data.val_dataloader()} == {50}
    data = made(tmp_path, eval_batch_size=97)
    data.setup()
    with pytest.raises(ValueError, match=r"val split: 96 tokens are too few for 97 rows on each of 1 ranks"):
        data.val_dataloader()


def test_a_split_without_documents_is_refused_when_it_is_needed(tmp_path):
    (tmp_path / "one.txt").write_text("one document " * 20)
    (tmp_path / "two.txt").write_text("another " * 20)
    data = made(tmp_path, source=TextFiles(tmp_path, train="one.txt", val="two.txt"))
    data.setup("fit")
    assert len(data.train_dataloader()) == 261 // 16
    with pytest.raises(ValueError, match=r"text_files: no documents in the test split"):
        data.setup("test")
