"""Recall: answers, tokens and depths, counted apart; segments without targets and rows without depth change nothing."""

import pytest
import torch

from tasks.metrics.recall import Recall

NONE = -100


def measured(*batches, bins=10):
    metric = Recall(bins)
    for predictions, targets, depth in batches:
        metric.update(torch.tensor(predictions), torch.tensor(targets), torch.tensor(depth))
    return {name: value.item() for name, value in metric.compute().items()}


def test_a_row_is_right_only_as_a_whole():
    predictions = [[9, 1, 2], [9, 1, 5], [3, 9, 9]]
    targets = [[NONE, 1, 2], [NONE, 1, 2], [4, NONE, NONE]]
    shares = measured((predictions, targets, [0.0, 0.5, 1.0]))
    assert shares == {
        "accuracy": pytest.approx(1 / 3),
        "token_accuracy": pytest.approx(3 / 5),
        "0.05/accuracy": 1,
        "0.55/accuracy": 0,
        "0.95/accuracy": 0,
    }


def test_bins_close_below_and_the_last_on_both_sides():
    depths = [0.0, 0.24, 0.25, 0.5, 0.75, 1.0]
    shares = measured(([[1]] * 6, [[1], [2], [1], [2], [1], [2]], depths), bins=4)
    by_depth = {name: share for name, share in shares.items() if "/" in name}
    assert by_depth == {"0.125/accuracy": 0.5, "0.375/accuracy": 1, "0.625/accuracy": 0, "0.875/accuracy": 0.5}


def test_rows_without_depth_count_but_in_no_bin():
    nan = float("nan")
    assert measured(([[1], [1]], [[1], [2]], [nan, nan])) == {"accuracy": 0.5, "token_accuracy": 0.5}
    shares = measured(([[1], [1]], [[1], [2]], [nan, 0.3]))
    assert shares == {"accuracy": 0.5, "token_accuracy": 0.5, "0.35/accuracy": 0}


def test_segments_before_the_answer_change_nothing():
    asked = ([[1, 2], [3, 4]], [[1, 2], [3, 9]], [0.1, 0.1])
    haystack = ([[5, 5], [6, 6]], [[NONE, NONE], [NONE, NONE]], [0.1, 0.1])
    assert measured(haystack, asked, haystack) == measured(asked)


def test_nothing_asked_is_nan():
    shares = measured(([[1]], [[NONE]], [0.5]))
    assert list(shares) == ["accuracy", "token_accuracy"]
    assert all(share != share for share in shares.values())


def test_agrees_with_counting_by_hand():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (500, 4), generator=generator)
    targets[torch.rand(500, 4, generator=generator) < 0.5] = NONE
    predictions = torch.where(torch.rand(500, 4, generator=generator) < 0.8, targets, 1).clamp(min=0)
    depth = torch.rand(500, generator=generator)
    found = {}
    for said, wanted, at in zip(predictions.tolist(), targets.tolist(), depth.tolist(), strict=True):
        pairs = [(one, other) for one, other in zip(said, wanted, strict=True) if other != NONE]
        if pairs:
            found.setdefault(int(at * 5), []).append(all(one == other for one, other in pairs))
    shares = measured((predictions.tolist(), targets.tolist(), depth.tolist()), bins=5)
    for index, rows in found.items():
        assert shares[f"0.{2 * index + 1}/accuracy"] == pytest.approx(sum(rows) / len(rows), rel=1e-12)
    every = [row for rows in found.values() for row in rows]
    assert shares["accuracy"] == pytest.approx(sum(every) / len(every), rel=1e-12)
    assert len({round(shares[f"0.{2 * index + 1}/accuracy"], 9) for index in found}) > 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"got \(1, 2\), \(1, 2\), \(2,\)"):
        measured(([[1, 2]], [[1, 2]], [0.5, 0.5]))
    with pytest.raises(ValueError, match="depth must lie in 0 … 1"):
        measured(([[1]], [[1]], [50.0]))
    with pytest.raises(ValueError, match="bins=0"):
        Recall(0)
