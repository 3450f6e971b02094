"""Losses, parameter groups, metrics and the guard against NaN of image classification."""

from functools import partial

import pytest
import torch
from quiet_trainer import trainer
from torch.nn import functional
from torch.utils.data import DataLoader

from datamodules.batches import ImageBatch
from models.vit import RopeViT, mixed
from tasks.classification import Classification, hard_binary_cross_entropy, soft_cross_entropy
from tasks.optimizers import muon


def tiny(**changes):
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return RopeViT(**{**arguments, "rotary": mixed, "absolute": True, "init_values": 0.5, **changes})


def task_of(model, **changes):
    return Classification(model, partial(torch.optim.AdamW, lr=1e-2), num_classes=5, weight_decay=0.1, **changes)


def batches(count=4, size=8, classes=5):
    torch.manual_seed(0)
    return [ImageBatch(torch.randn(size, 3, 16, 16), torch.randint(0, classes, (size,))) for _ in range(count)]


def loader(data):
    return DataLoader(data, batch_size=None)


def test_binary_targets_are_hardened():
    logits = torch.randn(2, 4)
    mixture = torch.tensor([[0.3, 0.7, 0, 0], [0, 0, 1.0, 0]])
    hard = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0]])
    expected = functional.binary_cross_entropy_with_logits(logits, hard)
    torch.testing.assert_close(hard_binary_cross_entropy(logits, mixture), expected)
    indices = torch.tensor([1, 2])
    expected = functional.binary_cross_entropy_with_logits(logits, functional.one_hot(indices, 4).float())
    torch.testing.assert_close(hard_binary_cross_entropy(logits, indices), expected)


def test_cross_entropy_of_one_hot_equals_indices():
    logits, indices = torch.randn(6, 5), torch.randint(0, 5, (6,))
    torch.testing.assert_close(
        soft_cross_entropy(logits, functional.one_hot(indices, 5).float()), soft_cross_entropy(logits, indices)
    )


def test_frequencies_positions_and_class_token_take_no_decay():
    task = task_of(tiny())
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    groups = task.parameter_groups()
    spared = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert {"rope.freqs", "pos_embed", "cls_token", "norm.weight", "blocks.0.attn.qkv.bias"} <= spared
    assert {"blocks.0.attn.qkv.weight", "head.weight", "patch_embed.proj.weight"} <= decayed
    assert not spared & decayed
    assert spared | decayed == set(names.values())


def test_training_lowers_the_loss_and_moves_the_frequencies(tmp_path):
    model = tiny()
    before = model.rope.freqs.detach().clone()
    data = batches(1)
    task = task_of(model)
    first = float(task.loss(data[0])["loss"])
    trainer(tmp_path, max_epochs=40).fit(task, loader(data))
    assert float(task.loss(data[0])["loss"]) < 0.2 * first
    assert (model.rope.freqs - before).abs().amax(dim=(0, 2, 3)).min() > 0  # in every block


def test_accuracy_is_counted_over_the_whole_set(tmp_path):
    data = batches(3)
    task = task_of(tiny())
    (metrics,) = trainer(tmp_path).test(task, loader(data), verbose=False)
    task.eval()
    with torch.no_grad():
        right = sum(int((task(b.images).argmax(-1) == b.targets).sum()) for b in data)
        top5 = 1.0
    assert metrics["test/top1"] == pytest.approx(right / 24, abs=1e-6)
    assert metrics["test/top5"] == top5


def test_nan_stops_before_the_weights(tmp_path):
    data = batches(2)
    data[1].images[0, 0, 0, 0] = float("nan")
    task = task_of(tiny())
    with pytest.raises(FloatingPointError, match=r"loss is nan .*step 1"):
        trainer(tmp_path, max_epochs=1).fit(task, loader(data))
    assert all(torch.isfinite(p).all() for p in task.parameters())


def test_other_class_counts_are_refused():
    with pytest.raises(ValueError, match="answers with 7 classes, the data has 5"):
        task_of(tiny(num_classes=7))


def test_muon_turns_matrices_and_leaves_the_spared_to_adamw():
    task = task_of(tiny())
    optimizer = muon(task.parameter_groups(), lr=0.1, other_lr=1e-3)
    rates = {group["weight_decay"] > 0: (group["lr"], group["use_fallback"]) for group in optimizer.param_groups}
    assert rates == {True: (0.1, False), False: (1e-3, True)}
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    task.loss(batches(1)[0])["loss"].backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]) for name, p in task.model.named_parameters()}
    assert 0 < moved["rope.freqs"].abs().max() <= 1.9e-3 * (1 + 1e-3)  # NAdam's first step is (1 + β₁) rates at most

    def stable_rank(matrix):
        singular = torch.linalg.svdvals(matrix)
        return float(singular.square().sum() / singular.max().square())

    weight = "blocks.0.mlp.fc1.weight"
    gradient = dict(task.model.named_parameters())[weight].grad
    assert stable_rank(moved[weight]) > 2 * stable_rank(gradient)  # made orthogonal as far as few steps can
