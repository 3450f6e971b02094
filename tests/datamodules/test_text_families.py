"""Variables, words and stories: the text is executed, counted or acted out, and the answer is what comes out."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from prompt_rows import Licence, read

from datamodules.embedded_source import SourceError
from datamodules.synthetic.babi import (
    OBJECTS,
    PERSONS,
    PLACES,
    Babi,
    where_is_object,
    where_is_person,
    where_was_object,
)
from datamodules.synthetic.needle import Letters, Numbers
from datamodules.synthetic.prompts import Prose, Repeated
from datamodules.synthetic.variable_tracking import VariableTracking
from datamodules.synthetic.word_lists import word_list
from datamodules.synthetic.words import CommonWords, FrequentWords, numbered, numbered_size

PROSE = Prose(Licence())
BABI = {
    "qa1": Babi(where_is_person, 6, False, PROSE),
    "qa2": Babi(where_is_object, 12, True, PROSE),
    "qa3": Babi(where_was_object, 24, True, PROSE),
}
VARIABLES = {
    "variables": VariableTracking(),
    "many_chains": VariableTracking(chains=4, hops=2),
    "no_hops": VariableTracking(hops=0),
    "tiny_variables": VariableTracking(Prose(Licence()), name=Letters(2), value=Numbers(1)),
}
COMMON = {"common": CommonWords(repeats=8), "ruler": CommonWords(), "few": CommonWords(3, 5, 1)}
FREQUENT = {"frequent": FrequentWords(), "flat": FrequentWords(1.5, Letters(3))}
FAMILIES = VARIABLES | COMMON | FREQUENT | BABI


@pytest.fixture(autouse=True)
def words(request):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("name") in COMMON:
        try:
            return [word for part in ("noun", "adjective", "verb") for word in word_list(part)]
        except SourceError as error:
            pytest.skip(f"the word lists cannot be fetched: {error}")


def draw(family, length, rows=8, seed=0):
    return family(np.random.default_rng(seed), rows, length)


def rows_of(family, length, rows=8, seed=0):
    """(prompt, answer, references, depth) of each row, read back from the tokens."""
    sample = draw(family, length, rows, seed)
    texts = read(sample, length)
    return [(*text, *rest) for text, *rest in zip(texts, sample.references, sample.depth.tolist(), strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_length_from_the_least_is_exact_and_one_less_is_refused(name):
    family = FAMILIES[name]
    for length in [*range(family.least, family.least + 80), family.least + 1000, 9000]:
        for prompt, answer, references, _ in rows_of(family, length, rows=1, seed=length):
            assert all(reference in answer for reference in references)
            assert prompt.endswith(" ")
    with pytest.raises(ValueError, match=rf"length {family.least - 1} .* takes {family.least} tokens"):
        draw(family, family.least - 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_generator_gives_the_same_rows(name):
    family = FAMILIES[name]
    length = family.least + 300
    first, again, other = (draw(family, length, seed=seed) for seed in (3, 3, 4))
    assert (first.tokens == again.tokens).all()
    assert first.references == again.references
    assert (first.tokens != other.tokens).any()


@pytest.mark.parametrize(("name", "share"), [("qa1", 0.43), ("qa2", 0.32), ("qa3", 0.16)])
def test_the_last_place_named_is_seldom_the_answer(name, share):
    """The share that the config's header tells; 3 standard errors of 2000 rows."""
    rng, right = np.random.default_rng(0), 0
    for _ in range(2000):
        story, asked = BABI[name]._story(rng)
        right += asked.answer == re.findall("|".join(PLACES), " ".join(story.facts))[-1]
    assert right / 2000 == pytest.approx(share, abs=3 * (share * (1 - share) / 2000) ** 0.5)
    header = Path("configs/datamodule", f"babi_{name}.yaml").read_text().split("_target_")[0]
    assert f"is right in {100 * share:.0f} %" in header


@pytest.mark.parametrize("name", VARIABLES)
def test_executed_assignments_give_the_variables(name):
    family = VARIABLES[name]
    form = re.compile(
        r"Memorize and track the chain\(s\) of variable assignment hidden in the following text\.\n\n(.*)\n"
        r"Question: Find all variables that are assigned the value (\d+) in the text above\. "
        r"Answer: According to the chain\(s\) of variable assignment in the text above, "
        r"(\d+) variables are assgined the value \2, they are: ",
        re.DOTALL,
    )
    for prompt, answer, references, depth in rows_of(family, family.least + 2000):
        text, value, count = form.fullmatch(prompt).groups()
        memory = {}
        for variable, source, number in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", text):
            assert variable not in memory
            memory[variable] = memory[source] if source else number  # a KeyError would be a line out of order
        assert len(memory) == family.chains * (family.hops + 1)
        assert set(Counter(memory.values()).values()) == {family.hops + 1}
        expected = [variable for variable, held in memory.items() if held == value]
        assert list(references) == expected == answer.split(" ")
        assert int(count) == len(expected)
        assert np.isnan(depth)


def test_chains_are_interleaved():
    family = VariableTracking(chains=4, hops=3)
    orders = set()
    for prompt, _, _, _ in rows_of(family, 4000, rows=20):
        roots = {}
        for variable, source, number in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", prompt):
            roots[variable] = roots[source] if source else number
        orders.add(tuple(len(list(run)) for _, run in groupby(roots.values())))
    assert len(orders) > 10


@pytest.mark.parametrize("name", COMMON)
def test_counted_words_are_the_common_ones(name, words):
    family = COMMON[name]
    form = re.compile(
        r"Below is a numbered list of words\. In these words, some appear more often than others\. "
        r"Memorize the ones that appear most often\.\n(.*)\nQuestion: What are the (\d+) most common words in the above "
        r"list\? Answer: The top \2 words that appear most often in the list are: "
    )
    for length in (family.least, family.least + 37, family.least + 4000):
        for prompt, answer, references, _ in rows_of(family, length, rows=3, seed=length):
            listed, count = form.fullmatch(prompt).groups()
            assert int(count) == family.common
            items = re.findall(r"(\d+)\. (\S+)", listed)
            assert " ".join(f"{number}. {word}" for number, word in items) == listed
            assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
            tally = Counter(word for _, word in items)
            expected = [word for word, times in tally.items() if times == max(tally.values())]
            assert list(references) == expected
            assert answer == " ".join(f"{number}. {word}" for number, word in enumerate(expected, 1))
            assert len(expected) == family.common
            assert tally[expected[0]] == family.repeats
            times = Counter(tally[word] for word in tally if word not in expected)
            assert set(times) <= {1, family.rare_repeats}
            if family.rare_repeats > 1:
                assert 1 <= times[1] <= 5
            if length > family.least + 1000:
                assert times[family.rare_repeats] > 50
            assert set(tally) <= set(words)


@pytest.mark.parametrize("name", ["ruler"])
def test_more_than_all_words_fill_is_refused(name):
    with pytest.raises(ValueError, match=r"CommonWords: a list of \d+ bytes takes more than the \d+ words there are"):
        draw(COMMON[name], 500_000, rows=1)


@pytest.mark.parametrize("name", FREQUENT)
def test_counted_coded_words_follow_zipf(name):
    family = FREQUENT[name]
    form = re.compile(
        r"Read the following coded text and track the frequency of each coded word\. Find the three most frequently "
        r"appeared coded words\. (.*)\nQuestion: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. "
        r"What are the three most frequently appeared words in the above coded text\? "
        r"Answer: According to the coded text above, the three most frequently appeared words are: "
    )
    for length in (family.least, family.least + 1, 8000):
        for prompt, answer, references, _ in rows_of(family, length, rows=3):
            text = form.fullmatch(prompt)[1].split(" ")
            tally = Counter(word for word in text if set(word) != {"."})
            assert {len(word) for word in tally} == {family.word.length}
            ranked = tally.most_common()
            assert [word for word, _ in ranked[:3]] == list(references) == answer.split(", ")
            assert ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]
            if length == 8000:  # a floor takes up to one of each count: one of 30 or more
                second = ranked[0][1] / 2**-family.alpha
                shares = [count / second for _, count in ranked[:6]]
                assert shares == pytest.approx([rank**-family.alpha for rank in range(2, 8)], abs=2 / second)
                dots = len(text) - tally.total()
                assert dots == pytest.approx(second, rel=0.05)


def act_out(prose):
    """Trails of persons and objects as a reader of the facts sees them: places in order, and where each fact stands."""
    person_at, holder, lies, trail = {}, {}, {}, {}
    names, places, things = "|".join(PERSONS), "|".join(PLACES), "|".join(OBJECTS)
    form = re.compile(
        rf"({names}) (?:(?:moved|went|travelled|journeyed|went back) to the ({places})"
        rf"|(took|got|grabbed|picked up|dropped|left|discarded|put down) the ({things}) there)\. ?"
    )
    facts = list(form.finditer(prose))
    for fact in facts:
        person, place, verb, thing = fact.groups()
        if place:
            assert person_at.get(person) != place
            person_at[person] = place
            for carried in [thing for thing, by in holder.items() if by == person]:
                trail[carried].append(place)
        elif verb in ("took", "got", "grabbed", "picked up"):
            assert thing not in holder
            assert lies.get(thing, person_at[person]) == person_at[person]
            holder[thing] = person
            trail.setdefault(thing, [person_at[person]])
        else:
            assert holder.pop(thing) == person
            lies[thing] = person_at[person]
    return facts, person_at, trail


@pytest.mark.parametrize("name", BABI)
def test_the_story_acted_out_answers_the_question(name):
    family = BABI[name]
    answers = set()
    for prompt, answer, references, depth in rows_of(family, family.least + 1500, rows=24):
        prose, question = re.fullmatch(r"(.*)\nQuestion: (.*\?) Answer: ", prompt, re.DOTALL).groups()
        facts, person_at, trail = act_out(prose)
        assert len(facts) == family.facts
        if match := re.fullmatch(r"Where is (\w+)\?", question):
            expected = person_at[match[1]]
            told = [fact for fact in facts if fact[1] == match[1]][-1]
            rest = [fact for fact in facts if fact.start() < told.start()]
            before = told.start() - sum(len(fact[0]) for fact in rest)
            # the prose's joints count in `before` and not in the depth
            assert depth == pytest.approx(before / (len(prose) - sum(len(fact[0]) for fact in facts)), abs=0.02)
        elif match := re.fullmatch(r"Where is the (\w+)\?", question):
            expected = trail[match[1]][-1]
        else:
            thing, later = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question).groups()
            assert trail[thing].count(later) == 1
            expected = trail[thing][trail[thing].index(later) - 1]
        assert references == (expected,)
        assert answer == expected
        answers.add(expected)
    assert len(answers) > 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(VariableTracking, chains=0), "chains 0 must be positive"),
        (partial(VariableTracking, hops=-1), "hops -1 not negative"),
        (partial(CommonWords, repeats=3), "rare_repeats 3 from 1 to less than repeats 3"),
        (partial(CommonWords, common=0), "common 0 must be positive"),
        (partial(FrequentWords, 1.0), "alpha 1.0 must be greater than 1"),
        (partial(Babi, facts=0), "facts 0 must be positive"),
        (partial(draw, Babi(where_was_object, 2, True, PROSE), 900), "no question in 1000 stories of 2 facts"),
        (partial(draw, Babi(where_is_object, 9, False, PROSE), 900), "with objects=False"),
        (partial(draw, VariableTracking(chains=3, hops=9, name=Letters(1)), 2000), "30 distinct ones .* there are 26"),
        (partial(draw, VariableTracking(Repeated("")), 433), "length 433 is too short"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("count", [1, 9, 10, 11, 99, 100, 101, 1234])
def test_the_size_of_a_numbered_list(count):
    words = ["ab" * (1 + index % 4) for index in range(count)]
    assert numbered_size(count, sum(map(len, words))) == len(numbered(words))
