"""Families against interpreters: every target is recomputed from the tokens alone, one at a time."""

from math import factorial

import numpy as np
import pytest

from datamodules.synthetic.associative_recall import MQAR
from datamodules.synthetic.associative_retrieval import AssociativeRetrieval
from datamodules.synthetic.chunk_passkey import ChunkPasskey
from datamodules.synthetic.copying import Copy
from datamodules.synthetic.distinct import distinct
from datamodules.synthetic.flip_flop import FlipFlop
from datamodules.synthetic.n_back import NBack
from datamodules.synthetic.selective_copy import SelectiveCopy
from datamodules.synthetic.word_problem import WordProblem, group_elements

A5, S5 = WordProblem(5, even=True), WordProblem(5)


def passkey_told(row, family):
    marker = row.index(32)
    assert row.count(32) == row.count(33) == 1
    assert row[-1] == 33
    assert marker + 1 < 2 * family.chunk
    noise = [token for i, token in enumerate(row[:-1]) if i not in (marker, marker + 1)]
    assert all(token < 16 for token in noise)
    return {len(row) - 1: row[marker + 1]}


def pairs_told(row, family):
    context, half = 2 * family.pairs, family.vocabulary // 2
    told = dict(zip(row[:context:2], row[1:context:2], strict=True))
    assert len(told) == len(set(told.values())) == family.pairs  # keys and values are unique
    assert all(1 <= key < half <= value < 2 * half for key, value in told.items())
    return {place: told.get(token) for place, token in enumerate(row) if place >= context and place % 2 == 0}


def n_back_told(row, family):
    history, told = {}, {}
    for place in range(0, len(row), 2):
        values = history.setdefault(row[place], [])
        if len(values) >= family.back:
            told[place] = values[-family.back]
        values.append(row[place + 1])
    assert len(history) <= family.pairs
    assert min(history) >= 1
    assert max(history) < family.vocabulary // 2
    return told


def copy_told(row, family):
    separator = row.index(0)
    assert row.count(0) == 1
    assert separator == len(row) // 2
    symbols = row[:separator][:: -1 if family.reverse else 1]
    assert row[separator + 1 :] == symbols[:-1]  # each is fed after it was asked for
    return {separator + i: symbol for i, symbol in enumerate(symbols)}


def retrieval_told(row, family):
    told = dict(zip(row[:-2:2], row[1:-2:2], strict=True))
    assert row[-2] == 0
    assert len(told) == len(row) // 2 - 1
    assert all(1 <= key < family.vocabulary // 2 <= value for key, value in told.items())
    return {len(row) - 1: told[row[-1]]}


def selective_copy_told(row, family):
    marks = [place for place, token in enumerate(row) if token == family.vocabulary - 1]
    symbols = [token for token in row if 0 < token < family.vocabulary - 1]
    assert marks == list(range(len(row) - family.content, len(row)))
    assert len(symbols) == family.content
    return dict(zip(marks, symbols, strict=True))


def flip_flop_told(row, family):
    told, bit = {}, None
    assert row[0] == 2
    assert row[-2] == 3
    for place in range(0, len(row), 2):
        if row[place] == 2:
            bit = row[place + 1]
        if row[place] == 3:
            told[place] = bit
            assert row[place + 1] == bit
    return told


def products_told(row, family):
    permutations = [tuple(element) for element in family.elements.tolist()]
    where, told = tuple(range(family.points)), {}
    for place, token in enumerate(row):
        where = tuple(permutations[token][point] for point in where)  # what stands at x goes on from where it is
        told[place] = permutations.index(where)
    return told


FAMILIES = [
    (ChunkPasskey(4), 8 + 1, passkey_told),
    (ChunkPasskey(16), 160, passkey_told),
    (NBack(4, 1, 64), 40, n_back_told),
    (NBack(3, 3, 32), 96, n_back_told),
    (Copy(), 30, copy_told),
    (Copy(segments=9, reverse=True), 36, copy_told),
    (AssociativeRetrieval(vocabulary=64), 64, retrieval_told),
    (AssociativeRetrieval(segments=4), 40, retrieval_told),
    (SelectiveCopy(), 64, selective_copy_told),
    (SelectiveCopy(5, 8), 10, selective_copy_told),
    (FlipFlop(), 100, flip_flop_told),
    (FlipFlop(ignore=0.1), 4, flip_flop_told),
    (A5, 33, products_told),
    (S5, 50, products_told),
    (WordProblem(5, moves=2), 1, products_told),
    (WordProblem(3), 64, products_told),
]
NAMED = pytest.mark.parametrize(
    ("family", "length", "told"),
    FAMILIES,
    ids=lambda it: it.__name__ if callable(it) and hasattr(it, "__name__") else repr(it)[:60],
)


@NAMED
def test_targets_follow_from_the_tokens(family, length, told):
    sample = family(np.random.default_rng(5), 40, length)
    assert sample.tokens.shape == sample.targets.shape == (40, length)
    assert sample.tokens.dtype == sample.targets.dtype == np.int64
    assert sample.depth.shape == (40,)
    assert sample.depth.dtype == np.float32
    assert sample.tokens.min() >= 0
    assert sample.tokens.max() < family.vocabulary
    for row, targets in zip(sample.tokens.tolist(), sample.targets.tolist(), strict=True):
        asked = {place: target for place, target in enumerate(targets) if target != -100}
        assert asked
        assert asked == told(row, family)


@NAMED
def test_a_seed_is_a_sample(family, length, told):
    def drawn(seed):
        return family(np.random.default_rng(seed), 40, length)

    for one, same in zip(drawn(1), drawn(1), strict=True):
        np.testing.assert_array_equal(one, same)
    assert not np.array_equal(drawn(1).tokens, drawn(2).tokens)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (16, 4), (512, 64)])
def test_recall_asks_each_key_once_for_its_value(length, pairs, noise):
    family = MQAR(pairs, 1024, noise=noise)
    sample = family(np.random.default_rng(0), 50, length)
    assert sample.tokens.min() >= 0
    assert sample.tokens.max() < 1024
    for row, targets in zip(sample.tokens.tolist(), sample.targets.tolist(), strict=True):
        asked = {place: target for place, target in enumerate(targets) if target != -100}
        told = pairs_told(row, family)
        assert asked == {place: told[place] for place in asked}  # and so at even places after the pairs
        assert sorted(row[place] for place in asked) == sorted(row[: 2 * pairs : 2])
        if not noise:
            assert not any(token for place, token in enumerate(row[2 * pairs :], 2 * pairs) if place not in asked)


def test_gaps_follow_the_power_law():
    # one pair: then no place is taken, and the law holds as it is written
    rows, length = 20000, 42
    for alpha in (0.01, 1.0):
        targets = MQAR(1, 64, alpha)(np.random.default_rng(1), rows, length).targets
        seen = np.bincount((np.nonzero(targets != -100)[1] - 2) // 2, minlength=20)
        law = alpha * np.arange(1.0, 21.0) ** (alpha - 1)
        expected = rows * law / law.sum()
        # 19 degrees of freedom: above 43.8 with a chance of 0.001
        assert ((seen - expected) ** 2 / expected).sum() < 43.8


def test_draws_without_replacement_are_those_of_one_after_another():
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    drawn = distinct(np.random.default_rng(2), 60000, weights, 2)
    expected = np.array(
        [[0 if a == b else p * q / (1 - p) for b, q in enumerate(weights)] for a, p in enumerate(weights)]
    )
    seen = np.zeros((4, 4))
    np.add.at(seen, (drawn[:, 0], drawn[:, 1]), 1)
    off = ~np.eye(4, dtype=bool)
    assert not seen[~off].any()
    # 11 degrees of freedom: above 31.3 with a chance of 0.001
    assert ((seen - 60000 * expected)[off] ** 2 / (60000 * expected)[off]).sum() < 31.3
    assert (np.sort(distinct(np.random.default_rng(3), 10, np.ones(6), 6), axis=1) == np.arange(6)).all()


def test_the_passkey_stands_anywhere_in_two_chunks_and_nowhere_else():
    sample = ChunkPasskey(4)(np.random.default_rng(0), 2000, 20)
    needle = (sample.tokens == 32).argmax(1)
    assert set(needle) == set(range(7))
    np.testing.assert_allclose(sample.depth, needle / 20, rtol=1e-6)  # float32
    assert set(sample.targets[:, -1]) == set(range(16, 32))


def test_retrieval_tells_where_the_pair_stands():
    sample = AssociativeRetrieval(vocabulary=256)(np.random.default_rng(0), 100, 40)
    asked = [row[:-2:2].index(row[-1]) for row in sample.tokens.tolist()]
    np.testing.assert_allclose(sample.depth, np.array(asked) * 2 / 40, rtol=1e-6)  # float32
    assert len(set(asked)) == 19


def test_symbols_are_scattered_over_the_whole_haystack():
    tokens = SelectiveCopy(2, 8)(np.random.default_rng(0), 3000, 12).tokens
    assert np.bincount(np.nonzero(tokens[:, :10])[1]) == pytest.approx(np.full(10, 600), abs=120)  # five deviations


@pytest.mark.parametrize("ignore", [0.0, 0.1, 0.98, 1.0])
def test_instructions_come_as_often_as_told(ignore):
    between = FlipFlop(ignore)(np.random.default_rng(0), 100, 404).tokens[:, 2:-2:2]
    shares = [(between == kind).mean() for kind in (2, 3, 4)]
    assert shares == pytest.approx([(1 - ignore) / 2, (1 - ignore) / 2, ignore], abs=0.02)  # five deviations


@pytest.mark.parametrize(("family", "order"), [(A5, 60), (S5, 120), (WordProblem(4, even=True), 12)])
def test_tables_are_those_of_groups(family, order):
    table, every = family.table, np.arange(order)
    assert family.vocabulary == len(family.elements) == order
    assert table.shape == (order, order)
    assert (np.sort(table, axis=0) == every[:, None]).all()
    assert (np.sort(table, axis=1) == every).all()
    assert (table[0] == every).all()
    assert (table[:, 0] == every).all()
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 5000))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    for first, then in zip(a[:200], b[:200], strict=True):
        product = [family.elements[then][point] for point in family.elements[first]]
        assert (family.elements[table[first, then]] == product).all()


def test_a5_is_the_simple_group_of_order_60():
    assert len({tuple(element) for element in group_elements(5, True)}) == factorial(5) // 2
    table = A5.table
    inverse = (table == 0).argmax(1)
    classes = {tuple(sorted({int(table[table[inverse[g], x], g]) for g in range(60)})) for x in range(60)}
    assert sorted(map(len, classes)) == [1, 12, 12, 15, 20]


def test_moves_leave_elements_that_move_few_points():
    assert len(WordProblem(5, moves=2).drawn) == 1 + 10  # the identity and the swaps
    assert len(WordProblem(5, even=True, moves=3).drawn) == 1 + 20
    sample = WordProblem(5, moves=2)(np.random.default_rng(0), 50, 60)
    moved = (S5.elements[sample.tokens] != np.arange(5)).sum(2)
    assert set(np.unique(moved)) == {0, 2}
    assert len(set(sample.targets.ravel())) == 120


def test_longer_rows_ask_no_more_often():
    for length in (16, 64, 4096):
        targets = MQAR(4, 64)(np.random.default_rng(0), 8, length).targets
        assert ((targets != -100).sum(1) == 4).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ChunkPasskey(0), "ChunkPasskey.chunk is 0"),
        (lambda: ChunkPasskey(4, 33), "ChunkPasskey.vocabulary is 33"),
        (lambda: MQAR(0), "MQAR.pairs is 0"),
        (lambda: MQAR(32, 64), r"MQAR.pairs is 32, expected 1 … 31"),
        (lambda: MQAR(4, alpha=0.0), "MQAR.alpha is 0.0"),
        (lambda: NBack(32, 1, 64), "NBack.pairs is 32"),
        (lambda: NBack(back=0), "NBack.back is 0"),
        (lambda: Copy(0), "Copy.segments is 0"),
        (lambda: Copy(vocabulary=2), "Copy.vocabulary is 2"),
        (lambda: AssociativeRetrieval(0), "AssociativeRetrieval.segments is 0"),
        (lambda: AssociativeRetrieval(vocabulary=3), "AssociativeRetrieval.vocabulary is 3"),
        (lambda: SelectiveCopy(0), "SelectiveCopy.content is 0"),
        (lambda: SelectiveCopy(vocabulary=3), "SelectiveCopy.vocabulary is 3"),
        (lambda: FlipFlop(1.5), "FlipFlop.ignore is 1.5"),
        (lambda: FlipFlop(vocabulary=4), "FlipFlop.vocabulary is 4"),
        (lambda: WordProblem(9), "WordProblem.points is 9"),
        (lambda: WordProblem(5, even=True, moves=2), "WordProblem.moves is 2"),
    ],
)
def test_bad_numbers_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("family", "length"),
    [
        (ChunkPasskey(4), 8),
        (MQAR(4, 64), 15),
        (NBack(4, 2, 64), 16),
        (NBack(4, 2, 64), 21),
        (Copy(), 7),
        (Copy(3), 8),
        (AssociativeRetrieval(vocabulary=64), 66),
        (AssociativeRetrieval(vocabulary=64), 9),
        (SelectiveCopy(), 31),
        (FlipFlop(), 2),
        (FlipFlop(), 9),
        (A5, 0),
    ],
)
def test_lengths_that_cannot_hold_it_are_refused(family, length):
    with pytest.raises(ValueError, match=rf"{type(family).__name__}.*not {length}$"):
        family(np.random.default_rng(0), 1, length)
