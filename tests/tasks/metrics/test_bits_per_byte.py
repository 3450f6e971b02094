"""Bits a byte and perplexity: the entropy by hand, additive over batches and processes, deaf to ignored targets."""

import compat  # noqa: F401, I001 - spawned processes have no conftest

import math

import pytest
import torch
from torch.nn import functional

from tasks.metrics.bits_per_byte import BitsPerByte
from tasks.metrics.loss_by_position import LossByPosition
from tasks.metrics.recall import Recall


def batch(seed, rows=3, length=40, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, length, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) < 0.3] = -100
    sizes = torch.randint(1, 5, (rows, length), generator=generator)
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return logits, losses, targets, sizes.masked_fill(targets == -100, 0)


def measured(*batches):
    metric = BitsPerByte()
    for _, losses, targets, sizes in batches:
        metric.update(losses, targets, sizes)
    return metric.compute()


def test_bits_are_those_of_the_probabilities():
    logits, losses, targets, sizes = batch(0)
    probabilities = logits.double().softmax(-1)
    told = [
        (probabilities[row, token, targets[row, token]].item(), sizes[row, token].item())
        for row, token in (targets != -100).nonzero().tolist()
    ]
    bits = -sum(math.log2(p) for p, _ in told) / sum(size for _, size in told)
    result = measured((logits, losses, targets, sizes))
    assert result["bits_per_byte"].item() == pytest.approx(bits, rel=1e-6)
    perplexity = math.exp(-sum(math.log(p) for p, _ in told) / len(told))
    assert result["perplexity"].item() == pytest.approx(perplexity, rel=1e-6)
    assert result["loss"].dtype == torch.float64


def test_a_uniform_guess_of_bytes_costs_eight_bits():
    losses = torch.full((2, 50), math.log(256), dtype=torch.float64)
    result = measured((None, losses, torch.zeros(2, 50, dtype=torch.int64), torch.ones(2, 50, dtype=torch.int64)))
    assert result["bits_per_byte"].item() == pytest.approx(8, abs=1e-12)
    assert result["perplexity"].item() == pytest.approx(256, abs=1e-9)


def test_batches_of_unequal_size_weigh_by_their_tokens():
    first, second = batch(1, rows=1, length=7), batch(2, rows=4, length=60)
    joined = [torch.cat((one.flatten(), other.flatten()))[None] for one, other in zip(first, second, strict=True)]
    for name, value in measured(first, second).items():
        assert value.item() == pytest.approx(measured(joined)[name].item(), rel=1e-12)


def test_a_long_stream_loses_no_digits():
    losses, targets = torch.full((1, 1000), 0.1, dtype=torch.float64), torch.zeros(1, 1000, dtype=torch.int64)
    metric = BitsPerByte()
    metric.update(torch.full((1, 1), 2.0**25, dtype=torch.float64), targets[:, :1], targets[:, :1])
    metric.update(losses, targets, targets)  # each 0.1 would vanish in a float32 sum
    assert metric.nats.item() - 2**25 == pytest.approx(100, abs=1e-5)


def test_what_stands_for_no_text_has_no_bits():
    losses, targets = torch.ones(1, 3), torch.tensor([[1, 2, -100]])
    result = measured((None, losses, targets, torch.zeros(1, 3, dtype=torch.int64)))
    assert result["bits_per_byte"].isnan()
    assert result["loss"].item() == 1


@pytest.mark.parametrize("metric", [BitsPerByte, LossByPosition])
def test_a_loss_that_is_not_finite_is_named_unless_ignored(metric):
    losses, targets, others = torch.ones(2, 3), torch.tensor([[5, -100, 7], [8, 9, 6]]), torch.ones(2, 3).long()
    losses[0, 1] = math.nan
    accepting = metric()
    accepting.update(losses, targets, others)
    assert accepting.compute()
    losses[1, 2] = math.inf
    with pytest.raises(FloatingPointError, match=r"inf at row 1, token 2 .*target 6"):
        metric().update(losses, targets, others)


@pytest.mark.parametrize("metric", [BitsPerByte, LossByPosition])
def test_shapes_that_would_broadcast_are_refused(metric):
    with pytest.raises(ValueError, match=r"\(2, 1\).*\(2, 3\)"):
        metric().update(torch.ones(2, 1), torch.ones(2, 3).long(), torch.ones(2, 3).long())
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 3\)"):
        metric().update(torch.ones(2, 3), torch.ones(2, 3).long(), torch.ones(3).long())


def _all_metrics(seeds):
    bits, by_position, recall = BitsPerByte(), LossByPosition(), Recall(bins=4)
    for seed in seeds:
        logits, losses, targets, sizes = batch(seed)
        bits.update(losses, targets, sizes)
        by_position.update(losses, targets, torch.arange(40).expand(3, 40) + 100 * seed)
        # answers of one token, so that some rows are right
        last = torch.full_like(targets, -100)
        last[:, 7] = logits[:, 7].argmax(-1) + torch.tensor([0, 1, 0])
        recall.update(logits.argmax(-1), last, torch.tensor([0.1, 0.2, 0.9]))
    return bits.compute() | by_position.compute() | recall.compute()


def _one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(_all_metrics([1, 2, 3] if rank else [4]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_unequal_shares_compute_what_one_does(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    expected = _all_metrics([1, 2, 3, 4])
    assert 0 < expected["accuracy"] < 1
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-12)
