"""The language task: states of train, validation and test apart, gates at their own rate, scores that add up."""

import math
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from datamodules.batches import TokenBatch
from launch import register_resolvers
from models.states import leaves
from tasks.language import token_losses

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
register_resolvers()


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=["task=lm", "threads=1", *overrides], return_hydra_config=True)
    cfg.hydra.runtime.output_dir = "outputs/test"
    HydraConfig.instance().set_config(cfg)
    pl.seed_everything(0, verbose=False)
    return cfg


def made(*overrides):
    return instantiate(composed("model=lm_ci", *overrides).task)


def batch(tokens=None, *, fresh=True, rows=3, length=40, depth=math.nan):
    tokens = torch.randint(0, 256, (rows, length)) if tokens is None else tokens
    rows, length = tokens.shape
    targets = torch.cat((tokens[:, 1:], torch.full((rows, 1), -100)), 1)
    return TokenBatch(
        tokens,
        targets,
        torch.arange(length).expand(rows, -1),
        (targets != -100).long(),
        torch.full((rows,), fresh),
        torch.full((rows,), depth),
    )


class Steps(pl.LightningDataModule):
    """One stream of batches a split; the first begins anew."""

    def __init__(self, count=3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 256, (count, 3, 40), generator=generator)
        self.batches = [batch(part, fresh=index == 0) for index, part in enumerate(tokens)]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


def trainer(**others):
    given = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**given, **others})


def test_the_state_is_carried_from_batch_to_batch_without_its_graph():
    task, first, second = made(), batch(), batch(fresh=False)
    task.loss(first)
    assert not any(leaf.requires_grad for leaf in leaves(task._states["train"]))
    carried = task.loss(second)["loss"]
    both, _ = task.model(torch.cat((first.tokens, second.tokens), 1))
    expected = token_losses(both[:, 40:], second.targets)[:, :-1].mean()
    torch.testing.assert_close(carried, expected)
    with pytest.raises(ValueError, match="mixes rows"):
        task.loss(first._replace(fresh=torch.tensor([True, False, True])))


def test_training_validation_and_test_have_states_of_their_own():
    seen = []

    class Watching(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(("train", module._states["train"].stream.current.shape[1], "val" in module._states))

        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 0:
                seen.append(("epoch", "train" in module._states))

        def on_validation_epoch_start(self, trainer, module):
            self.before = [leaf.clone() for leaf in leaves(module._states.get("train"))]

        def on_validation_epoch_end(self, trainer, module):
            assert all(map(torch.equal, self.before, leaves(module._states.get("train"))))
            if not trainer.sanity_checking:
                seen.append(("val", module._states["val"].stream.current.shape[1]))

    task = made("task.schedule.warmup=0")
    trainer(callbacks=[Watching()]).fit(task, Steps())
    # 40, 80 and 120 tokens leave 8, 0 and 8 of a chunk of 16; each epoch begins with an empty state
    steps = [("train", 8), ("train", 0), ("train", 8), ("val", 8)]
    assert [event[:2] for event in seen if event[0] != "epoch"] == steps * 2
    assert [event for event in seen if event[0] == "epoch"] == [("epoch", False)] * 2


def test_a_resumed_run_begins_with_an_empty_state(tmp_path):
    task = made("task.schedule.warmup=0")
    run = trainer(max_epochs=1)
    run.fit(task, Steps())
    run.save_checkpoint(tmp_path / "some.ckpt")
    assert "train" in task._states
    held = torch.load(tmp_path / "some.ckpt", weights_only=True)
    assert not any("_states" in name for name in held["state_dict"])
    task.on_load_checkpoint(held)
    assert not task._states


def test_gates_learn_at_their_own_rate_and_what_is_no_matrix_is_spared():
    task = made("optimizer@task.optimizer=adamw", "task.optimizer.lr=1e-3", "task.weight_decay=0.1", "epochs=1")
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    groups = [({names[id(p)] for p in group["params"]}, group) for group in task.parameter_groups()]
    assert sum(len(members) for members, _ in groups) == len(names)
    (gates,) = [members for members, group in groups if group["lr_scale"] == 10]
    assert gates == task.model.gate_parameters()
    for members, group in groups:
        for name in members:
            matrix = dict(task.model.named_parameters())[name].ndim == 2
            spared = name.endswith(("embed.weight", "head.weight", "logits", "null", "age_bias", "pool.query"))
            assert bool(group["weight_decay"]) == (matrix and not spared), name
    optimizer = task.make_optimizer(task.parameter_groups())
    scheduler = task.schedule(optimizer, epochs=1, steps=100)
    scheduler.step_update(10)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert rates[10] == pytest.approx(10 * rates[1.0])
    with pytest.raises(InstantiationException, match="gate_rate"):
        made("task.schedule=null")


def test_a_test_says_what_the_memory_is_worth():
    task = made("datamodule=chunk_passkey")
    for parameter in task.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    (scores,) = trainer().test(task, Passkeys(), verbose=False)
    losses = []
    for reads in (True, False):
        logits, _ = task.model(Passkeys.batch.tokens, reads=reads)
        losses.append(token_losses(logits, Passkeys.batch.targets).sum() / 4)
    assert scores["test/loss"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert scores["test/without_memory_loss"] == pytest.approx(losses[1].item(), rel=1e-5)
    assert scores["test/bits_per_byte"] == pytest.approx(losses[0].item() / math.log(2), rel=1e-5)
    for layer, block in enumerate(task.model.blocks):
        share = block.fusion.logits.softmax(-1)[:, -1].mean().item()
        assert scores[f"test/memory_share_{layer}"] == pytest.approx(share, rel=1e-5)
    assert {"test/accuracy", "test/0.15/accuracy", "test/loss_at_64-127", "test/loss_in_chunk_at_8-15"} <= scores.keys()


class Passkeys(pl.LightningDataModule):
    tokens = torch.randint(0, 40, (4, 80), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(tokens, -100)
    targets[:, -1] = 17
    batch = TokenBatch(
        tokens,
        targets,
        torch.arange(80).expand(4, -1),
        (targets != -100).long(),
        torch.full((4,), True),
        torch.full((4,), 0.15),
    )

    def test_dataloader(self):
        return torch.utils.data.DataLoader([self.batch], batch_size=None)


def test_a_loss_in_pieces_is_the_loss_at_once():
    """Strands given segment by segment, and padded at their end, score as the whole does."""
    task = made()
    whole = batch(length=100)
    pieces = [
        TokenBatch(*(part[:, start : start + 40] for part in whole[:4]), torch.full((3,), start == 0), whole.depth)
        for start in (0, 40, 80)
    ]

    class Data(pl.LightningDataModule):
        def __init__(self, batches):
            super().__init__()
            self.batches = batches

        def test_dataloader(self):
            return torch.utils.data.DataLoader(self.batches, batch_size=None)

    (together,) = trainer().test(task, Data([whole]), verbose=False)
    (apart,) = trainer().test(task, Data(pieces), verbose=False)
    assert together.keys() == apart.keys()
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, rel=1e-5), name


def test_training_past_the_bound_of_the_base_warns_with_a_better_one():
    task = made("model.chunk=64", "rotary.frequencies.base=10", "task.schedule.warmup=0")
    with pytest.warns(UserWarning, match="base"):
        trainer(max_epochs=1).fit(task, Steps())
    task = made("task.schedule.warmup=0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=1).fit(task, Steps())
    assert not any("base" in str(warning.message) for warning in caught)


def test_steps_that_teach_the_memory_nothing_warn():
    with pytest.warns(UserWarning, match="writers learn nothing"):
        trainer(max_epochs=1).fit(made("model.chunk=64", "task.schedule.warmup=0"), Steps())


@pytest.mark.slow
def test_four_kilobytes_are_learned_by_heart():
    torch.manual_seed(0)
    task = made("model.width=64")
    text = (CONFIGS.parent / "LICENSE").read_bytes()[:4096]
    tokens = torch.tensor(list(text)).view(16, 256)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=4e-3)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 20, (300 - step) / 100)
        loss = task.loss(batch(tokens))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() / math.log(2) < 0.5


@pytest.mark.parametrize(
    "model", ["lm_tiny_xl", "lm_tiny_local", "lm_tiny_paper", "lm_tiny_delta", "lm_tiny_transformer"]
)
def test_baselines_have_equal_parameters(model):
    def count(name):
        with torch.device("meta"):
            return sum(p.numel() for p in instantiate(composed(f"model={name}").model).parameters())

    assert abs(count(model) / count("lm_tiny") - 1) < 0.01


@pytest.mark.parametrize(("chunks", "learns"), [(1, False), (2, True)])
def test_gradients_go_back_over_whole_chunks_wherever_the_state_stands(chunks, learns):
    """Batches of 40 tokens with chunks of 16, so that the second begins within a chunk."""
    task = made(f"task.backward_chunks={chunks}")
    expected = made()
    expected.model.load_state_dict(task.model.state_dict())
    torch.testing.assert_close(task.loss(batch(seed_tokens(0)))["loss"], expected.loss(batch(seed_tokens(0)))["loss"])
    task.loss(batch(seed_tokens(1), fresh=False))["loss"].backward()
    gradient = task.model.blocks[0].bank.candidate.weight.grad
    assert (gradient is not None and gradient.abs().max().item() > 0) == learns


def seed_tokens(seed):
    return torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(seed))


def test_what_the_task_cannot_do_is_refused():
    with pytest.raises(InstantiationException, match="backward_chunks=0"):
        made("task.backward_chunks=0")
    with pytest.raises(InstantiationException, match="backward_chunks=2"):
        made("model=lm_tiny_transformer", "task.backward_chunks=2")
    made("model=lm_tiny_transformer", "task.schedule=null")  # no gates, so their rate needs no schedule
    task = made("task.schedule.warmup=0")
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        trainer(max_epochs=1, accumulate_grad_batches=2).fit(task, Steps())


def test_answers_are_looked_for_in_what_the_model_writes():
    """A model that says 'y' whatever it reads finds every reference made of y, and no other."""

    class SaysY(torch.nn.Module):
        def forward(self, tokens, state=None, *, reads=True):
            return torch.nn.functional.one_hot(torch.full_like(tokens, ord("y")), 257).float(), None

    task = made("task.gate_rate=1", "++task.answers._target_=datamodules.tokens.Bytes", "++task.problem=some")
    task.model = SaysY()
    task.shares = torch.nn.ModuleList()
    tokens = torch.randint(0, 256, (2, 30))
    targets = torch.full_like(tokens, -100)
    targets[:, 20:23] = ord("y")
    asked = batch(tokens)._replace(targets=targets, references=(("yyy",), ("yyy", "z")))

    class Data(pl.LightningDataModule):
        def test_dataloader(self):
            return torch.utils.data.DataLoader([asked], batch_size=None)

    (scores,) = trainer().test(task, Data(), verbose=False)
    assert scores["test/contained"] == pytest.approx(0.75)
    assert scores["test/accuracy"] == 1


@pytest.mark.slow
def test_mixed_precision_learns_as_single_does():
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        task = made()
        optimizer = torch.optim.AdamW(task.model.parameters(), lr=2e-3)
        text = (CONFIGS.parent / "LICENSE").read_bytes()[:8192]
        tokens = torch.tensor(list(text)).view(8, 1024)
        for step in range(50):
            piece = tokens[:, 128 * (step % 8) : 128 * (step % 8 + 1)]
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = task.loss(batch(piece, fresh=step % 8 == 0))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


PASSKEY = [
    "datamodule=chunk_passkey",
    "datamodule.length=128",
    "datamodule.batch_size=64",
    "datamodule.steps=250",
    "optimizer@task.optimizer=adamw",
    "task.optimizer.lr=2e-3",
    "task.optimizer.betas=[0.9,0.95]",
    "task.weight_decay=0.01",
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "least", "most"), [("lm_ci", 0.95, 1.0), ("lm_ci_xl", 0.0, 0.15)])
def test_a_value_told_chunks_ago_is_known_with_a_memory_and_only_then(model, least, most):
    """Eight chunks, a bank of four; attention reaches two. Chance is 1/16."""
    cfg = composed(f"model={model}", *PASSKEY)
    task, data = instantiate(cfg.task), instantiate(cfg.datamodule)
    run = trainer(max_epochs=1)
    run.fit(task, data)
    (scores,) = run.test(task, data, verbose=False)
    assert least <= scores["test/accuracy"] <= most
