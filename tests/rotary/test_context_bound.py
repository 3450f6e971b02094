"""Base bounds context: values, searches and their laws, p-RoPE's way out, the warning, and the command that prints it all."""

import math

import pytest
import torch

import rotary
from rotary import Rotary, context_bound, first_negative, safe_base, smallest_base
from rotary.bound import advice, margin_run, padded, similarity_margin
from rotary.frequencies import Assigned, Directional, Geometric, ladder
from rotary.scaling import DynamicNTK, Interpolate, Truncate, YaRN
from tools.context_bound import main


def carries(base, context, head_dim=128):
    """Straight from the definition, one cosine a pair and distance."""
    return bool((similarity_margin(ladder(base, head_dim // 2), torch.arange(context)) >= 0).all())


def test_margin_at_single_distances():
    distances = torch.tensor([0, 1, 10, 100, 1000, 1706, 1707, 4096])
    expected = [64, 62.0937, 42.8200, 30.5435, 10.1777, 0.0686, -0.4989, -3.3826]
    margin = similarity_margin(ladder(1e4, 64), distances)
    assert margin.dtype == torch.float64
    assert margin.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 256), (7, 1000), (2**21 - 300, 300)])
def test_runs_of_distances_equal_the_definition(start, count):
    frequencies = torch.stack((ladder(1e4, 16), ladder(37.0, 16), Truncate(0.5)(ladder(5e5, 16)[None])[0]))
    weights = torch.rand(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = torch.arange(start, start + count)
    for weight in (None, weights):
        run = margin_run(frequencies, start, count, weight)
        # angles of 2²¹ radians are rounded to 5e-10, sixteen of them are added
        torch.testing.assert_close(run, similarity_margin(frequencies, distances, weight), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("base", "head_dim", "bound"),
    [
        (100, 128, 59),
        (500, 128, 171),
        (1e4, 128, 1707),
        (1e5, 128, 7757),
        (2e5, 128, 12122),
        (5e5, 128, 18438),
        (6e5, 128, 21422),
        (1e6, 128, 27115),
        (5e6, 128, 82999),
        (1e7, 128, 144660),
        (5e7, 128, 416715),
        (1e4, 32, 474),
        (5e5, 32, 2089),
        (1e4, 64, 725),
        (5e5, 64, 9937),
        (1e4, 96, 1046),
        (5e5, 96, 14160),
        (1e4, 256, 2653),
        (5e5, 256, 37791),
    ],
)
def test_contexts_of_bases(base, head_dim, bound):
    assert rotary.context_bound(base, head_dim) == bound
    assert rotary.context_bound(base, head_dim, limit=bound) == bound
    assert rotary.context_bound(base, head_dim, limit=50) == 50


def test_the_first_negative_distance_is_the_first():
    for base in (3.0, 100.0, 4321.0, 1e5):
        frequencies = ladder(base, 32)
        negative = (similarity_margin(frequencies, torch.arange(10_000)) < 0).nonzero()
        assert first_negative(frequencies, 10_000) == int(negative[0])
    rows = torch.stack((ladder(1e4, 64), ladder(500.0, 64)))
    assert first_negative(rows, 4000) == 171  # the worst row
    ones = torch.zeros(2, 64)
    ones[:, 0] = 1  # only θ = 1 weighs: cos 2 < 0
    assert first_negative(ladder(1e4, 64), 4000, ones) == 2


@pytest.mark.parametrize(("context", "smallest", "safe"), [(1024, 4.30e3, 6.0e3), (2048, 1.16e4, 2.28e4)])
def test_bases_of_contexts(context, smallest, safe):
    assert smallest_base(context, 128) == pytest.approx(smallest, rel=0.01)
    assert safe_base(context, 128) == pytest.approx(safe, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("context", "smallest", "safe"),
    [
        (4096, 2.70e4, 5.9e4),
        (8192, 8.38e4, 3.9e5),
        (16384, 2.32e5, 1.32e6),  # a grid of 0.2 % misses the island below 2.34e5
        (32768, 6.30e5, 3.33e6),  # a gap of 0.05 % is the last
    ],
)
def test_bases_of_longer_contexts(context, smallest, safe):
    least, most = smallest_base(context, 128), safe_base(context, 128)
    assert least == pytest.approx(smallest, rel=0.01)
    assert most == pytest.approx(safe, rel=0.02)
    assert carries(least, context)
    assert carries(most, context)
    assert not carries(most / 1.002, context)


@pytest.mark.parametrize(("context", "head_dim"), [(1, 128), (2, 128), (3, 6), (300, 32), (1024, 128), (500, 96)])
def test_searches_are_inverses(context, head_dim):
    small, safe = smallest_base(context, head_dim), safe_base(context, head_dim)
    assert small <= safe * 1.002
    assert context_bound(small, head_dim) >= context
    assert context_bound(safe, head_dim) >= context
    for base in torch.logspace(math.log10(safe), math.log10(safe) + 6, 40, dtype=torch.float64).tolist():
        assert carries(base, context, head_dim)
    if context > 2:
        below = torch.logspace(0, math.log10(small / 1.001), 400, dtype=torch.float64).tolist()
        assert not any(carries(base, context, head_dim) for base in below)
        assert not carries(safe / 1.0021, context, head_dim)


def test_the_bases_that_carry_a_context_are_no_interval():
    assert carries(4.3e3, 1024)
    between = torch.linspace(4.3e3, 6.0e3, 200, dtype=torch.float64).tolist()
    assert not all(carries(base, 1024) for base in between)


def test_pairs_at_rest_carry_any_context():
    for base in (100.0, 1e4, 5e5):
        assert first_negative(Truncate(0.5)(ladder(base, 64)[None])[0], 200_000) == 200_000
        assert first_negative(padded(ladder(base, 32), 64), 200_000) == 200_000
    frequencies = ladder(1e4, 64)[None]
    assert first_negative(Truncate(0.7)(frequencies), 200_000) == 200_000
    for fraction, bound in ((0.75, 30_376), (0.8, 9603), (0.9, 1707)):
        assert first_negative(Truncate(fraction)(frequencies), 200_000) == bound
    assert first_negative(Interpolate(4.0)(frequencies), 200_000) > 4 * 1707 - 4


@pytest.mark.parametrize(
    ("fraction", "least"),
    [(0.25, 37.2), (0.5, 16.1), (0.6, 7.57), (0.7, 1.54), (0.75, -3.36), (0.8, -7.21), (0.9, -12.54)],
)
def test_least_margin_of_truncated_ladders(fraction, least):
    run = margin_run(Truncate(fraction)(ladder(1e4, 64)[None]), 0, 200_000)
    assert float(run.amin()) == pytest.approx(least, abs=0.05)


def test_advice():
    plain = Rotary(Geometric(1e4), head_dim=64)
    assert advice(plain, 724) is None
    warning = advice(plain, 725)
    assert "725 tokens" in warning
    assert "distance 725" in warning
    assert f"{safe_base(726, 64):.3g}" in warning
    assert "\n" not in warning
    assert advice(Rotary(Geometric(safe_base(726, 64)), head_dim=64), 725) is None
    assert advice(Rotary(Geometric(1e4), Truncate(0.5), head_dim=64), 50_000) is None
    assert advice(Rotary(Geometric(1e4), head_dim=64, fraction=0.5), 50_000) is None
    assert "distance" in advice(Rotary(Geometric(1e4), YaRN(2.0, 512), head_dim=64), 5000)
    assert advice(Rotary(Geometric(1e4), DynamicNTK(4.0, 512), head_dim=64), 725) is None  # judged as it is at 726
    assert "Truncate" in advice(Rotary(Geometric(1e4), head_dim=4), 100)


def test_no_advice_on_several_axes():
    assert advice(Rotary(Assigned([0] * 8 + [1] * 8, 100.0, 2), head_dim=32), 10_000) is None
    assert advice(Rotary(Directional(base=100.0), head_dim=32), 10_000) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: context_bound(1e4, 63), "head_dim=63"),
        (lambda: context_bound(-1.0, 64), "base must be positive"),
        (lambda: safe_base(0, 64), "context ≥ 1"),
        (lambda: smallest_base(100, 4), "head_dim=4: no base is safe"),
        (lambda: safe_base(100, 64, ratio=1.0), "ratio > 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_command_prints_both_tables(capsys):
    main(["--head-dim", "64", "300", "--base", "10000"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| context | smallest base | safe base |"
    assert lines[2] == f"| 300 | {smallest_base(300, 64):.4g} | {safe_base(300, 64):.4g} |"
    assert lines[-1] == "| 10000 | 725 |"


@pytest.mark.parametrize(("arguments", "message"), [(["--head-dim", "7", "30"], "head_dim=7"), ([], "2")])
def test_the_command_names_what_is_wrong(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)
