"""The datamodule of synthetic families: streams that never meet, epochs that differ, segments that add up to rows."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compat  # noqa: F401  isort: skip
import pytorch_lightning as lightning
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from datamodules.embedded_source import SourceError
from datamodules.synthetic.associative_recall import MQAR
from datamodules.synthetic.chunk_passkey import ChunkPasskey
from datamodules.synthetic.copying import Copy
from datamodules.synthetic.needle import Letters, Needle
from datamodules.synthetic.sample import Sample
from datamodules.synthetic_text import SyntheticText, check_uncut

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def module(rank=0, world=1, family=None, **others):
    family = family or MQAR(4, 256)
    made = SyntheticText(family, family.vocabulary, **{"batch_size": 4, "length": 32, "steps": 6} | others)
    made.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return made


def epoch(loader, number=0):
    loader.batch_sampler.sampler.set_epoch(number)
    return list(loader)


def rows(batches):
    return {row.numpy().tobytes() for batch in batches for row in batch.tokens}


def same(one, other):
    return all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


class Spelled:
    """A problem whose answer is written out: two tokens from the middle of the row on."""

    vocabulary = 10

    def __call__(self, rng, rows, length):
        tokens = rng.integers(0, 10, (rows, length))
        targets = np.full((rows, length), -100)
        targets[:, length // 2 : length // 2 + 2] = 7
        return Sample(tokens, targets, np.zeros(rows, np.float32), tuple((str(i),) for i in range(rows)))


class Rare(Spelled):
    """Seldom asks in the first half, too."""

    def __call__(self, rng, rows, length):
        sample = super().__call__(rng, rows, length)
        sample.targets[rng.random(rows) < 0.02, 0] = 7
        return sample


@pytest.fixture
def composed():
    def one(*overrides):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("train", overrides=["task=lm", *overrides])

    return one


NAMES = ["chunk_passkey", "mqar", "n_back", "copy", "reverse", "associative_retrieval", "selective_copy", "flip_flop"]


@pytest.mark.parametrize("name", [*NAMES, "a5", "s5"])
def test_configs_give_batches(composed, name):
    cfg = composed(f"datamodule={name}", "+context=192", "datamodule.steps=2", "datamodule.eval_batches=1", "seed=3")
    data = instantiate(cfg.datamodule)
    assert cfg.datamodule.bos is None
    assert data.seed == 3
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    assert len(batches) == 3
    assert batches[-1].tokens.shape == (64, 192)
    for batch in batches:
        assert batch.tokens.min() >= 0
        assert batch.tokens.max() < cfg.datamodule.vocabulary
        asked = batch.targets != -100
        assert asked.any(1).all()
        assert batch.targets[asked].max() < cfg.datamodule.vocabulary


def test_batches_say_what_they_are():
    batch = next(iter(module(family=ChunkPasskey(4), length=20).train_dataloader()))
    assert batch.tokens.shape == batch.targets.shape == batch.position.shape == batch.bytes.shape == (4, 20)
    assert batch.tokens.dtype == batch.targets.dtype == batch.position.dtype == batch.bytes.dtype == torch.int64
    assert (batch.position == torch.arange(20)).all()
    assert (batch.targets != -100).sum() == 4
    assert (batch.bytes == 0).all()  # of text, which these tokens aren't
    assert batch.fresh.all()
    assert batch.fresh.dtype == torch.bool
    assert batch.depth.dtype == torch.float32
    assert (batch.depth < 8 / 20).all()
    assert batch.references == ()


def test_targets_of_text_are_a_byte_each():
    (batch,) = module(family=Needle(key=Letters(4)), length=600, eval_batches=1).val_dataloader()
    assert batch.bytes.sum() == 4 * 7
    assert torch.equal(batch.bytes > 0, batch.targets != -100)


def test_lengths_vary_by_batch_alike_on_all_ranks():
    kind = {"length": (16, 64), "multiple": 8, "steps": 60}
    first = [batch.tokens.shape[1] for batch in epoch(module(0, 2, **kind).train_dataloader())]
    second = [batch.tokens.shape[1] for batch in epoch(module(1, 2, **kind).train_dataloader())]
    assert first == second
    assert set(first) == set(range(16, 65, 8))
    assert module(length=[17, 64], multiple=8).lengths == range(24, 65, 8)
    assert module(length=[16, 64]).eval_length == 64


def test_the_same_seed_gives_the_same_epochs_and_nothing_else_does():
    loader = module().train_dataloader()
    again = epoch(module().train_dataloader())
    assert all(same(*pair) for pair in zip(epoch(loader), again, strict=True))
    streams = [rows(epoch(loader)), rows(epoch(loader, 1)), rows(epoch(module(seed=1).train_dataloader()))]
    streams += [rows(epoch(module(1, 2).train_dataloader()))]
    streams += [
        rows(module().val_dataloader()),
        rows(module().test_dataloader()),
        rows(module(eval_seed=1).val_dataloader()),
    ]
    assert [len(stream) for stream in streams] == [24] * 4 + [32] * 3  # no row twice within
    assert len(set().union(*streams)) == 24 * 4 + 32 * 3  # nor among them
    assert rows(module(seed=1).val_dataloader()) == streams[4]


def test_held_out_batches_do_not_depend_on_ranks():
    whole = list(module(eval_batches=5).val_dataloader())
    assert all(same(*pair) for pair in zip(whole, module(eval_batches=5).val_dataloader(), strict=True))
    dealt = [list(module(rank, 2, eval_batches=5).val_dataloader()) for rank in (0, 1)]
    assert [len(part) for part in dealt] == [3, 3]
    padding = dealt[1].pop()
    assert padding.tokens.shape == whole[0].tokens.shape
    assert (padding.targets == -100).all()
    assert (padding.bytes.sum(), padding.references) == (0, ())
    assert all(same(*pair) for part, one in enumerate(dealt) for pair in zip(one, whole[part::2], strict=True))


@pytest.mark.parametrize("segment", [None, 6])
def test_ranks_take_as_many_steps(segment):
    kind = {"family": Spelled(), "length": 24, "eval_batches": 5, "segment": segment}
    ranks = [list(module(rank, 3, **kind).test_dataloader()) for rank in range(3)]
    assert len({len(part) for part in ranks}) == 1
    found = [batch for part in ranks for batch in part if batch.references]
    assert len(found) == 5
    assert sum(int((batch.targets != -100).sum()) for part in ranks for batch in part) == 5 * 4 * 2


@pytest.mark.parametrize("segment", [1, 7, 16, 40, 100])
def test_segments_add_up_to_rows(segment):
    kind = {"family": ChunkPasskey(4), "length": 40, "eval_batches": 3}
    whole = list(module(**kind).test_dataloader())
    parts = list(module(**kind, segment=segment).test_dataloader())
    each = -(-40 // segment)
    assert len(parts) == 3 * each == len(module(**kind, segment=segment).test_dataloader())
    for i, batch in enumerate(whole):
        own = parts[i * each : (i + 1) * each]
        assert all(part.tokens.shape[1] <= segment for part in own)
        for field in ("tokens", "targets", "position", "bytes"):
            assert torch.equal(torch.cat([getattr(part, field) for part in own], 1), getattr(batch, field))
        assert [bool(part.fresh.all()) for part in own] == [True] + [False] * (each - 1)
        assert not any(part.fresh.any() for part in own[1:])
        assert all(torch.equal(part.depth, batch.depth) for part in own)


def test_references_go_with_the_first_target():
    data = module(family=Spelled(), length=24, eval_batches=1)
    (whole,) = data.val_dataloader()
    assert whole.references == (("0",), ("1",), ("2",), ("3",))
    parts = module(family=Spelled(), length=24, eval_batches=1, segment=6).val_dataloader()
    assert [part.references for part in parts] == [(), (), whole.references, ()]


def test_segments_that_cut_answers_are_refused():
    for family, length, segment in ((Spelled(), 24, 13), (Copy(), 24, 20), (MQAR(4, 256), 32, 10)):
        with pytest.raises(
            ValueError, match=rf"datamodule.segment={segment} cuts .* datamodule.eval_length={length}; set "
        ):
            module(family=family, length=length, segment=segment)
    check_uncut(torch.tensor([[-100, 1, 2, -100], [-100, -100, -100, 3], [-100] * 4]), 3)
    with pytest.raises(ValueError, match="cuts answers"):
        check_uncut(torch.tensor([[-100, 1, 2, -100], [-100, -100, 1, 3]]), 3)
    # one row in fifty: what the rows of construction didn't show is refused when it is drawn
    data = module(family=Rare(), length=24, segment=12, eval_batch_size=1, eval_batches=200)
    with pytest.raises(ValueError, match="cuts answers"):
        list(data.val_dataloader())


def test_a_source_that_cannot_be_had_is_named_alone():
    class Gone:
        """Has nothing."""

        vocabulary = 10

        def __call__(self, rng, rows, length):
            raise SourceError("pip could not download x")

    with pytest.raises(SourceError, match=r"^pip could not download x$"):
        SyntheticText(Gone(), 10)


def test_an_interrupted_epoch_goes_on():
    kind = {"length": (16, 64), "multiple": 2}
    whole = epoch(module(**kind).train_dataloader(), 2)
    cut = module(**kind).train_dataloader()
    cut.batch_sampler.sampler.set_epoch(2)
    given = iter(cut)
    for _ in range(4):
        next(given)
    resumed = module(**kind).train_dataloader()
    resumed.load_state_dict(cut.state_dict())
    rest = epoch(resumed, 2)
    assert len(rest) == 2
    assert all(same(*pair) for pair in zip(rest, whole[4:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers):
    one = epoch(module(num_workers=workers).train_dataloader(), 1)
    assert all(same(*pair) for pair in zip(one, epoch(module().train_dataloader(), 1), strict=True))


class Reader(lightning.LightningModule):
    """Notes the tokens that a trainer hands it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, index):
        self.trained.append(batch.tokens.clone())
        return self.weight * 1.0

    def validation_step(self, batch, index):
        self.validated.append(batch.tokens.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_a_trainer_reads_new_rows_each_epoch_and_the_same_held_out(tmp_path):
    family, reader = Copy(), Reader()
    data = SyntheticText(family, family.vocabulary, batch_size=2, length=16, steps=3, eval_batches=2, segment=8)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(reader, datamodule=data)
    assert len(reader.trained) == 6
    assert len(reader.validated) == 8
    assert len({tokens.numpy().tobytes() for tokens in reader.trained}) == 6
    assert all(map(torch.equal, reader.validated[:4], reader.validated[4:]))
    fresh = SyntheticText(family, family.vocabulary, batch_size=2, length=16, steps=3).train_dataloader()
    assert all(map(torch.equal, reader.trained[3:], [batch.tokens for batch in epoch(fresh, 1)]))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"vocabulary": 255}, "datamodule.vocabulary is 255, but MQAR has 256 tokens"),
        ({"bos": 256}, "datamodule.bos is 256, expected null or a token, 0 … 255"),
        ({"batch_size": 0}, "datamodule.batch_size is 0"),
        ({"steps": 1.5}, "datamodule.steps is 1.5"),
        ({"multiple": 0}, "datamodule.multiple is 0"),
        ({"eval_batches": 0}, "datamodule.eval_batches is 0"),
        ({"eval_length": 0}, "datamodule.eval_length is 0"),
        ({"eval_batch_size": -1}, "datamodule.eval_batch_size is -1"),
        ({"segment": 0}, "datamodule.segment is 0"),
        ({"seed": -1}, "datamodule.seed is -1"),
        ({"seed": 2**32}, "datamodule.seed is 4294967296"),
        ({"eval_seed": -1}, "datamodule.eval_seed is -1"),
        ({"num_workers": -1}, "datamodule.num_workers is -1"),
        ({"length": 0}, "datamodule.length is 0"),
        ({"length": (64, 32)}, r"datamodule.length is \(64, 32\)"),
        ({"length": (16, 32, 64)}, r"datamodule.length is \(16, 32, 64\)"),
        ({"length": (33, 47), "multiple": 16}, r"datamodule.length is \(33, 47\), .* datamodule.multiple=16"),
        ({"length": 15}, "datamodule.length of 15 tokens doesn't fit: MQAR of 4 pairs needs 16 tokens"),
        ({"length": (8, 64)}, "datamodule.length of 8 tokens"),
        ({"eval_length": 9}, "datamodule.eval_length of 9 tokens"),
        ({"family": Copy(), "vocabulary": 16, "length": (16, 64)}, "datamodule.length of 17 tokens"),
    ],
)
def test_bad_arguments_are_named(given, says):
    with pytest.raises(ValueError, match=says):
        SyntheticText(**{"family": MQAR(4, 256), "vocabulary": 256} | given)


def test_fewer_batches_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"datamodule.eval_batches is 1, too few for 2 ranks"):
        module(0, 2, eval_batches=1).val_dataloader()
