"""Needles: an independent reader finds them in the text and recomputes the answers; they lie where the depth says."""

from __future__ import annotations

import re
from string import ascii_lowercase

import numpy as np
import pytest
from prompt_rows import Licence, read

from datamodules.embedded_source import SourceError
from datamodules.synthetic.needle import DEPTHS, Letters, Needle, Needles, Numbers, Uuids, Words, distinct
from datamodules.synthetic.prompts import NOISE, Prose, Question, Repeated, cut, hide, pack
from datamodules.synthetic.word_lists import word_list
from datamodules.synthetic_text import SyntheticText
from datamodules.text_shakespeare import Shakespeare

KEY = Letters(6, ascii_lowercase)
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
ONE = re.compile(
    r"A special magic (\w+) is hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the \1 afterwards\.\n(.*)\n"
    r"What is the special magic \1 for (.+) mentioned in the provided text\? "
    r"The special magic \1 for \3 mentioned in the provided text is ",
    re.DOTALL,
)
MANY = re.compile(
    r"Some special magic (\w+) are hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the \1 afterwards\.\n(.*)\n"
    r"What are all the special magic \1 for (.+) mentioned in the provided text\? "
    r"The special magic \1 for \3 mentioned in the provided text are ",
    re.DOTALL,
)
FAMILIES = {
    "single": Needle(key=KEY),
    "prose": Needle(Prose(Licence()), KEY),
    "uuid": Needle(Prose(Licence()), KEY, Uuids()),
    "multikey": Needle(Prose(Licence()), KEY, needles=4),
    "multikey_words": Needle(Needles(KEY), KEY),
    "multikey_uuids": Needle(Needles(Uuids(), Uuids()), Uuids(), Uuids()),
    "multivalue": Needle(Prose(Licence()), KEY, values=4),
    "multiquery": Needle(Prose(Licence()), KEY, needles=4, queries=4),
    "some_of_many": Needle(Needles(KEY), KEY, needles=5, values=2, queries=3),
    "tiny": Needle(key=Letters(2), value=Numbers(1)),
}


@pytest.fixture(scope="module")
def english():
    try:
        return word_list("noun")
    except SourceError as error:
        pytest.skip(f"the word lists cannot be fetched: {error}")


@pytest.fixture(scope="module")
def plays():
    try:
        return [document.text for document in Shakespeare().documents("train")]
    except SourceError as error:
        pytest.skip(f"Shakespeare's works cannot be fetched: {error}")


def draw(family, length, rows=8, seed=0):
    return family(np.random.default_rng(seed), rows, length)


def parse(prompt):
    """(context, keys asked for, kind) of a prompt, which must be RULER's to the letter."""
    (kind, context, query) = (ONE.fullmatch(prompt) or MANY.fullmatch(prompt)).groups()
    return context, query.replace(", and ", ", ").split(", "), kind


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reader_of_the_text_finds_the_answers(name):
    family = FAMILIES[name]
    length = family.least + 1500
    sample = draw(family, length)
    for (prompt, answer), references in zip(read(sample, length), sample.references, strict=True):
        context, asked, kind = parse(prompt)
        found = [(key, value) for _, key, value in NEEDLE.findall(context)]
        assert {plural for plural, _, _ in NEEDLE.findall(context)} == {family.value.plural}
        assert kind == (family.value.plural if family.answers > 1 else family.value.plural[:-1])
        assert len(asked) == len(set(asked)) == family.queries
        expected = [value for key in asked for other, value in found if other == key]
        assert len(set(expected)) == family.answers or family.queries > 1
        assert list(references) == expected
        assert answer == ", ".join(expected)
        if not isinstance(family.haystack, Needles):
            assert len(found) == family.needles * family.values


@pytest.mark.parametrize("name", FAMILIES)
def test_every_length_from_the_least_is_exact_and_one_less_is_refused(name):
    family = FAMILIES[name]
    for length in [*range(family.least, family.least + 150), 4000]:
        read(draw(family, length, rows=1, seed=length), length)
    with pytest.raises(ValueError, match=rf"Needle: length {family.least - 1} .* takes {family.least} tokens"):
        draw(family, family.least - 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_generator_gives_the_same_rows(name):
    family = FAMILIES[name]
    length = family.least + 300
    first, again, other = (draw(family, length, seed=seed) for seed in (3, 3, 4))
    assert (first.tokens == again.tokens).all()
    assert first.references == again.references
    assert first.references != other.references


@pytest.mark.parametrize(
    "haystack", [Repeated(), Prose(Licence()), Needles(KEY)], ids=lambda haystack: type(haystack).__name__
)
@pytest.mark.parametrize("needles", [1, 4])
@pytest.mark.parametrize("depth", [0, 13.5, 50, 98, 100, None])
def test_the_needle_lies_where_the_depth_says(haystack, needles, depth):
    length, rows = 6000, 6
    sample = draw(Needle(haystack, KEY, needles=needles, depth=depth), length, rows)
    for (prompt, _), told in zip(read(sample, length), sample.depth, strict=True):
        context, (key,), _ = parse(prompt)
        if (
            depth is not None
        ):  # to the nearest place between units: half a line, or half of the pages' longest sentences
            assert told == pytest.approx(depth / 100, abs=0.008 if haystack.joint == b"\n" else 0.06)
        hidden = next(match for match in NEEDLE.finditer(context) if match[2] == key)
        before = hidden.start() / (len(context) - len(hidden[0]))
        # what joins units isn't counted, and each other needle before or after shifts it by 1 %
        assert before == pytest.approx(told, abs=0.003 + 0.011 * (needles - 1))
        if needles == 1 and told in (0, 1):
            assert before == told


@pytest.mark.parametrize("haystack", [Repeated(), Prose(Licence())], ids=lambda haystack: type(haystack).__name__)
def test_in_short_rows_too_the_depth_is_where_the_needle_lies(haystack):
    """Seven lines of noise leave a needle eight places, up to 7 % away from what was asked for."""
    sample = draw(Needle(haystack, KEY), 1024, 200)
    asked = set(np.round(DEPTHS / 100, 4))
    for (prompt, _), told in zip(read(sample, 1024), sample.depth.tolist(), strict=True):
        context, _, _ = parse(prompt)
        hidden = NEEDLE.search(context)
        before, rest = len(context[: hidden.start()].encode()), len(context.encode()) - len(hidden[0])
        assert before / rest == pytest.approx(told, abs=8 / rest)  # joints of the units
    assert not set(np.round(sample.depth, 4)) <= asked


def test_depths_are_forty_and_all_are_drawn():
    sample = draw(Needle(Repeated("a"), KEY), 3000, rows=1000)  # a place every second byte
    nearest = DEPTHS[np.abs(sample.depth[:, None] - DEPTHS / 100).argmin(1)]
    assert set(nearest) == set(DEPTHS)
    assert np.abs(sample.depth - nearest / 100).max() < 0.001
    assert len(set(DEPTHS)) == 40
    assert np.isnan(draw(FAMILIES["multivalue"], 1500).depth).all()


def test_noise_is_one_line_repeated_and_cut_at_the_end():
    for prompt, _ in read(draw(Needle(key=KEY, depth=40), 2000), 2000):
        lines = parse(prompt)[0].split("\n")
        (place,) = [index for index, line in enumerate(lines) if NEEDLE.fullmatch(line)]
        del lines[place]
        assert ("\n".join([NOISE] * len(lines))).startswith("\n".join(lines))
        assert set(lines[:-1]) == {NOISE}


@pytest.mark.parametrize("length", [1000, 12_000])  # the pages have 7,000 bytes: the longer row goes around
def test_prose_is_a_stretch_of_the_documents(length):
    corpus = " ".join(word.decode() for document in Licence().documents("train") for word in document.text.split())
    for prompt, _ in read(draw(Needle(Prose(Licence()), KEY, depth=50), length, rows=3), length):
        context, (key,), _ = parse(prompt)
        prose = re.sub(NEEDLE.pattern.replace(r"(\S+) is", f"{key} is") + " ", "", context)
        assert len(prose) < len(context) - 20
        # a row of bytes may end within a character of several
        assert prose.rstrip("�") in f"{corpus} {corpus} {corpus} {corpus}"


def test_a_haystack_of_needles_never_repeats_a_key():
    for prompt, _ in read(draw(FAMILIES["multikey_words"], 8000), 8000):
        lines = parse(prompt)[0].split("\n")
        assert all(NEEDLE.fullmatch(line) for line in lines[:-2])  # the needle may come after a last line cut short
        keys = [match[2] for line in lines if (match := NEEDLE.fullmatch(line))]
        assert len(keys) == len(set(keys)) > 100


def test_kinds_are_what_they_say():
    rng = np.random.default_rng(0)
    numbers = Numbers(3)(rng, 5000)
    assert {len(number) for number in numbers} == {3}
    assert len(set(numbers)) > 890
    assert set(numbers) <= {str(number) for number in range(100, 1000)}
    form = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert all(re.fullmatch(form, identifier) for identifier in Uuids()(rng, 50))
    assert sorted(distinct(Numbers(1), rng, 8, {"5"})) == ["1", "2", "3", "4", "6", "7", "8", "9"]
    with pytest.raises(ValueError, match=r"Numbers\(digits=1\): 10 distinct ones are asked for, there are 9"):
        distinct(Numbers(1), rng, 9, {"5"})


def test_words_are_adjectives_and_nouns(english):
    family = Needle(value=Words())
    sample = draw(family, 1000, rows=16)
    lengths = set()
    for (prompt, answer), (reference,) in zip(read(sample, 1000), sample.references, strict=True):
        for pair in (parse(prompt)[1][0], answer):
            adjective, noun = pair.split("-")
            assert adjective in word_list("adjective")
            assert noun in english
        assert answer == reference
        lengths.add(len(answer))
    assert len(lengths) > 1  # so rows of one batch end at different columns, and still begin to answer at one
    assert family.value.longest == max(len(f"{a}-") for a in word_list("adjective")) + max(map(len, english))
    assert len(english) > 5000
    assert all(re.fullmatch("[a-z]+", word) for word in english)


def test_prose_of_shakespeare_has_only_plays_for_training(plays):
    corpus = b" ".join(word for play in plays for word in play.split()).decode()
    for prompt, _ in read(draw(Needle(Prose(), KEY, depth=0), 3000), 3000):
        context, _, _ = parse(prompt)
        assert NEEDLE.match(context).end() < 100
        assert NEEDLE.sub("", context, count=1)[1:] in corpus


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_rows_are_hidden_in_held_out_plays(plays, split):
    corpus = b" ".join(word for play in Shakespeare().documents(split) for word in play.text.split()).decode()
    data = SyntheticText(Needle(Prose(), KEY, depth=0), 257, 256, 4, 3000, eval_batches=1)
    (batch,) = data.val_dataloader() if split == "val" else data.test_dataloader()
    trained = b" ".join(word for play in plays for word in play.split()).decode()
    for row in batch.tokens.tolist():
        context, _, _ = parse(bytes(row[1:-7]).decode())
        prose = NEEDLE.sub("", context, count=1)[1:]
        assert prose in corpus
        assert prose not in trained


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Needle(queries=2), "queries 2 from 1 to needles 1"),
        (lambda: Needle(queries=0), "queries 0 from 1"),
        (lambda: Needle(values=0), "values 0 must be positive"),
        (lambda: Needle(depth=101), "depth 101 must be in 0 … 100"),
        (lambda: Needle(depth=50, values=2), "depth 50 .* one answer, not 2"),
        (lambda: Needle(Needles(KEY), Uuids()), "haystack .* has other keys"),
        (lambda: Numbers(0), "digits 0"),
        (lambda: Letters(0), "length must be 1 or more"),
        (lambda: Letters(3, "aab"), "distinct ASCII"),
        (
            lambda: draw(Needle(key=KEY, value=Numbers(1), values=10), 3000),
            "10 distinct ones are asked for, there are 9",
        ),
        (lambda: draw(Needle(Needles(Letters(1)), Letters(1)), 8000), "bytes of haystack, .* are wanted"),
        (lambda: pack([Question(b"abc", b"x", ("x",))], 6, 1), "prompt of 3 bytes and answer of 1, expected 4"),
        (lambda: pack([Question(b"abc", b"xy", ("xy",))], 5, 1), "answer of 2"),
        (lambda: pack([Question(b"abc", b"", ("",))], 5, 1), "answer of 0"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cut_and_hide_by_hand():
    units = [b"one", b"two", b"three"]
    joined = b"one two three"
    for size in range(1, len(joined) + 1):
        assert b" ".join(cut(units, b" ", size)) == joined[:size]
    assert cut(units, b" ", 14) == [b"one", b"two", b"three "]
    with pytest.raises(ValueError, match="fill 13 bytes of haystack, 15 are wanted"):
        cut(units, b" ", 15)
    assert hide(units, [b"a", b"b", b"c"], [0, 2, 3]) == [b"a", b"one", b"two", b"b", b"three", b"c"]
    assert hide(units, [b"a", b"b"], [1, 1]) == [b"one", b"a", b"b", b"two", b"three"]
