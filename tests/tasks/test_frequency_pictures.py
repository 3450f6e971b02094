"""Pictures of frequency use: shares of a model whose heads are known, who is heard and when, and what is written."""

import csv
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from models.memory_lm import MemoryLM
from models.transformer_lm import TransformerLM
from models.turn import Turn
from rotary import Rotary
from rotary.bound import similarity_margin
from rotary.diagnostics import frequency_share
from rotary.frequencies import Geometric
from rotary.scaling import DynamicNTK
from tasks.frequency_pictures import FrequencyPictures, wavelength_name

HEADS, HEAD_DIM, T = 2, 16, 10
WIDTH = HEADS * HEAD_DIM


class Attention(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.qkv, self.turn = nn.Linear(WIDTH, 3 * WIDTH), Turn(rotary)

    def captured(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.captured(x)
        place = torch.arange(x.shape[1])[:, None]
        q, k = self.turn(q, k, query_position=place, key_position=place)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.turn.logit_gain / 4)
        return x + out.transpose(1, 2).flatten(-2)


class Evaluated(pl.LightningModule):
    def __init__(self, *rotaries):
        super().__init__()
        self.model = nn.Sequential(*(Attention(rotary) for rotary in rotaries))

    def step(self, batch, index):
        loss = self.model(batch).square().mean()
        self.log("loss", loss)
        return loss

    training_step = validation_step = test_step = step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def batches():
    data = torch.randn(3, 4, T, WIDTH, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(data), batch_size=None)


@pytest.fixture
def rotary():
    return partial(Rotary, Geometric(1e4), head_dim=HEAD_DIM)


def make(*rotaries):
    torch.manual_seed(0)
    return Evaluated(*rotaries)


def trainer(callback, **options):
    return pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, **options,
    )  # fmt: skip


def table(folder):
    with (folder / "frequency_use.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("run", ["test", "validate"])
def test_an_evaluation_writes_a_picture_and_a_table(run, rotary, batches, tmp_path, capsys):
    task = make(rotary(), rotary())
    callback = FrequencyPictures(tmp_path / "out")
    getattr(trainer(callback), run)(task, batches, verbose=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["frequency_use.csv", "frequency_use.png"]
    assert capsys.readouterr().out.count("frequencies: ") == 1
    picture = np.asarray(Image.open(tmp_path / "out" / "frequency_use.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    rows = table(tmp_path / "out")
    assert [(row["layer"], row["head"]) for row in rows] == [(f"{i}.turn", str(h)) for i in (0, 1) for h in (0, 1)]
    assert all(0 < float(row["centroid"]) < 1 for row in rows)
    assert not any(module._forward_pre_hooks for module in task.modules())


def test_shares_are_those_of_the_first_batches(rotary, batches, tmp_path):
    task = make(rotary())
    layer = task.model[0]
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    phase = rotary()(torch.arange(T)[:, None])

    def expected(x):
        with torch.no_grad():
            q, k, _ = layer.captured(x)
            return frequency_share(q, k, phase, phase, seen).double()

    for count in (1, 2):
        callback = FrequencyPictures(tmp_path, batches=count)
        heard = []
        callback.draw = lambda callback=callback, heard=heard: heard.append(callback.shares()["0.turn"])
        trainer(callback).test(task, batches, verbose=False)
        torch.testing.assert_close(heard[0], expected(torch.cat(list(batches)[:count])), rtol=1e-4, atol=1e-6)


def test_a_call_in_pieces_counts_every_pair_of_tokens_once(rotary, tmp_path):
    """Streams hand over a few queries at a time, by position or by name."""
    model = nn.Sequential(Turn(rotary()))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, HEADS, T, HEAD_DIM, generator=generator)
    place = torch.arange(T)[:, None]
    whole, pieces = FrequencyPictures(tmp_path), FrequencyPictures(tmp_path)
    whole.listen(model)
    model[0](q, k, place, place)
    whole.stop()
    pieces.listen(model)
    for start in range(0, T, 3):
        end = min(start + 3, T)
        model[0](q[..., start:end, :], k[..., :end, :], place[start:end], key_position=place[:end])
    pieces.stop()
    torch.testing.assert_close(pieces.sums["0"], whole.sums["0"], rtol=1e-5, atol=1e-5)
    model[0](q, k, place, place)  # nobody listens any more
    torch.testing.assert_close(pieces.sums["0"], whole.sums["0"], rtol=1e-5, atol=1e-5)


def test_a_head_of_one_slow_pair_shows_in_the_table(rotary, batches, tmp_path):
    task = make(rotary())
    with torch.no_grad():
        kept = torch.zeros(3, HEADS, HEAD_DIM)
        kept[:, 0, 2:4] = 1  # head 0 uses pair 1, head 1 pair 7
        kept[:, 1, 14:16] = 1
        task.model[0].qkv.weight *= kept.flatten()[:, None]
        task.model[0].qkv.bias *= kept.flatten()
    trainer(FrequencyPictures(tmp_path)).test(task, batches, verbose=False)
    rows = table(tmp_path)
    assert [float(row["centroid"]) for row in rows] == pytest.approx([1 / 8, 7 / 8], abs=1e-6)
    for row, pair in zip(rows, (1, 7), strict=True):
        margins = similarity_margin(rotary().scaled()[0, 0, pair, None], torch.arange(20_000))
        assert int(row["first_negative"]) == int((margins < 0).nonzero()[0])


def test_dynamic_scaling_is_judged_as_it_turned(batches, tmp_path):
    rotary = Rotary(Geometric(1e4), DynamicNTK(4.0, 4), head_dim=HEAD_DIM)
    callback = FrequencyPictures(tmp_path)
    trainer(callback).test(make(rotary), batches, verbose=False)
    torch.testing.assert_close(callback.frequencies["0.turn"], rotary.scaled(torch.tensor(T))[:, 0])


def test_pairs_at_rest_are_columns_too(batches, tmp_path):
    callback = FrequencyPictures(tmp_path)
    task = make(Rotary(Geometric(1e4), head_dim=HEAD_DIM, fraction=0.5))
    heard = []
    callback.draw = lambda: heard.append(callback.shares()["0.turn"])
    trainer(callback).test(task, batches, verbose=False)
    assert heard[0].shape == (HEADS, HEAD_DIM // 2)
    assert (heard[0] > 0).all()
    assert callback.frequencies["0.turn"][0, 4:].eq(0).all()


def test_nothing_is_said_without_rotary_or_in_training(rotary, batches, tmp_path, capsys):
    trainer(FrequencyPictures(tmp_path / "a")).test(make(None), batches, verbose=False)
    trainer(FrequencyPictures(tmp_path / "b", batches=0)).test(make(rotary()), batches, verbose=False)
    trainer(FrequencyPictures(tmp_path / "c")).fit(make(rotary()), batches, batches)
    assert not list(tmp_path.iterdir())
    assert "frequencies:" not in capsys.readouterr().out


def test_layers_without_rotary_are_left_out(rotary, batches, tmp_path):
    trainer(FrequencyPictures(tmp_path)).test(make(None, rotary()), batches, verbose=False)
    assert {row["layer"] for row in table(tmp_path)} == {"1.turn"}


def test_results_are_those_of_a_run_without(rotary, batches, tmp_path):
    task = make(rotary(), rotary())
    (plain,) = trainer(pl.Callback()).test(task, batches, verbose=False)
    (heard,) = trainer(FrequencyPictures(tmp_path)).test(task, batches, verbose=False)
    assert plain == heard


def test_bad_counts_are_named(tmp_path):
    with pytest.raises(ValueError, match="rows ≥ 1"):
        FrequencyPictures(tmp_path, rows=0)


@pytest.mark.parametrize(
    "model",
    [partial(MemoryLM, chunk=16, bank=None), partial(TransformerLM, context=128)],
    ids=["memory", "transformer"],
)
def test_language_models_are_heard_layer_by_layer(model, tmp_path):
    torch.manual_seed(0)
    rotary = partial(Rotary, Geometric(1e4))
    built = model(vocabulary=257, bos=256, width=WIDTH, layers=3, heads=HEADS, hidden=64, rotary=rotary)
    callback = FrequencyPictures(tmp_path)
    callback.listen(built)
    with torch.inference_mode():
        built(torch.randint(0, 256, (2, 50)))
    callback.stop()
    callback.draw()
    shares = callback.shares()
    assert [share.shape for share in shares.values()] == [(HEADS, HEAD_DIM // 2)] * 3
    for share in shares.values():
        torch.testing.assert_close(share.sum(-1), torch.ones(HEADS, dtype=torch.float64))
    assert [row["layer"] for row in table(tmp_path)] == [name for name in shares for _ in range(HEADS)]


def test_wavelengths_have_short_names():
    lengths = {6.283: "6.28", 199.4: "199", 1990.0: "2.0k", 19_900.0: "20k", 6.5e6: "6.5M"}
    assert [wavelength_name(2 * np.pi / length) for length in lengths] == list(lengths.values())
    assert wavelength_name(0.0) == "∞"
