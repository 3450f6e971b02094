"""Stories of persons, places and objects in prose and a question on them, after bAbI (arXiv 1502.05698) as BABILong
(arXiv 2406.10149) hides it: one, two or three facts give the answer. The simulator is our own, so are its figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np

from datamodules.synthetic.prompts import (
    VOCABULARY,
    Haystack,
    Prose,
    Question,
    boundaries,
    haystack_of,
    hide,
    pack,
    room,
)
from datamodules.synthetic.sample import Sample
from datamodules.text_documents import Split

PERSONS = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVES = ("moved to", "went to", "travelled to", "journeyed to", "went back to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "left", "discarded", "put down")


class Asked(NamedTuple):
    """A question on a story.

    Attributes:
        text: the question.
        answer: a place.
        fact: index of the fact that tells the place.
    """

    text: str
    answer: str
    fact: int


@dataclass
class Story:
    """What happened so far.

    Attributes:
        facts: sentences.
        at: where each person is known to be, and the fact that told.
        trail: for each object that was taken, the places it was in and the facts that told; never twice the same in a row.
        holder: who carries each object that is carried.
    """

    facts: list[str] = field(default_factory=list)
    at: dict[str, tuple[str, int]] = field(default_factory=dict)
    trail: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)

    def move(self, person: str, verb: str, place: str) -> None:
        self.at[person] = place, len(self.facts)
        for thing, holder in self.holder.items():
            if holder == person:
                self.trail[thing].append(self.at[person])
        self.facts.append(f"{person} {verb} the {place}.")

    def take(self, person: str, verb: str, thing: str) -> None:
        self.holder[thing] = person
        self.trail.setdefault(thing, [self.at[person]])
        self.facts.append(f"{person} {verb} the {thing} there.")

    def drop(self, person: str, verb: str, thing: str) -> None:
        del self.holder[thing]
        self.facts.append(f"{person} {verb} the {thing} there.")

    def within_reach(self, person: str) -> list[str]:
        """Objects that a person can take: those never met and those that lie where the person is."""
        place, _ = self.at[person]
        free = (thing for thing in OBJECTS if thing not in self.holder)
        return [thing for thing in free if thing not in self.trail or self.trail[thing][-1][0] == place]


def where_is_person(rng: np.random.Generator, story: Story) -> Asked | None:
    """qa1, one fact: where a person went last."""
    person = _one(rng, sorted(story.at))
    place, fact = story.at[person]
    return Asked(f"Where is {person}?", place, fact)


def where_is_object(rng: np.random.Generator, story: Story) -> Asked | None:
    """qa2, two facts: who took the object, and where that person went."""
    if not story.trail:
        return None
    thing = _one(rng, sorted(story.trail))
    place, fact = story.trail[thing][-1]
    return Asked(f"Where is the {thing}?", place, fact)


def where_was_object(rng: np.random.Generator, story: Story) -> Asked | None:
    """qa3, three facts: who took the object, where that person went, and where before. The place named is one where the
    object was once."""
    found = []
    for thing in sorted(story.trail):
        places = [place for place, _ in story.trail[thing]]
        once = (index for index in range(1, len(places)) if places.count(places[index]) == 1)
        found += [(thing, places[index], *story.trail[thing][index - 1]) for index in once]
    if not found:
        return None
    thing, later, place, fact = found[rng.integers(len(found))]
    return Asked(f"Where was the {thing} before the {later}?", place, fact)


def _one(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def tell(rng: np.random.Generator, facts: int, objects: bool) -> Story:
    """Draws a story of so many facts, of moves alone or with objects taken and dropped.

    Persons always move to another place than they are known to be in.
    """
    story = Story()
    while len(story.facts) < facts:
        person = _one(rng, PERSONS)
        if objects and person in story.at and rng.random() < 0.5:
            held = [thing for thing in OBJECTS if story.holder.get(thing) == person]
            reach = story.within_reach(person)
            if reach and (not held or rng.random() < 0.5):
                story.take(person, _one(rng, TAKES), _one(rng, reach))
                continue
            if held:
                story.drop(person, _one(rng, DROPS), _one(rng, held))
                continue
        here = story.at[person][0] if person in story.at else None
        story.move(person, _one(rng, MOVES), _one(rng, [place for place in PLACES if place != here]))
    return story


@dataclass(frozen=True)
class Babi:
    """Facts scattered in order between sentences of prose, and a question at the end; the answer is a place.

    `Sample.depth` is the share of the prose before the fact that tells the place.

    Attributes:
        ask: `where_is_person`, `where_is_object` or `where_was_object`: draws a question, None where a story allows none.
        facts: sentences of the story.
        objects: whether persons take and drop objects.
        haystack: what the facts are scattered in.
    """

    ask: Callable[[np.random.Generator, Story], Asked | None] = where_is_person
    facts: int = 6
    objects: bool = False
    haystack: Haystack = field(default_factory=Prose)
    vocabulary: ClassVar[int] = VOCABULARY
    longest_answer: ClassVar[int] = max(map(len, PLACES))
    tries: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        if self.facts < 1:
            raise ValueError(f"Babi: facts {self.facts} must be positive")

    @property
    def least(self) -> int:
        """Tokens that the longest problem takes, with one byte of haystack."""
        longest = [max(map(len, words)) for words in (PERSONS, [*MOVES, *TAKES, *DROPS], [*PLACES, *OBJECTS])]
        fact = len(self.haystack.joint) + sum(longest) + len("  the  there.")
        question = len("Where was the  before the ?") + longest[2] * 2
        return 1 + 1 + self.facts * fact + len(self._end("")) + question + self.longest_answer

    def _end(self, question: str) -> bytes:
        return f"\nQuestion: {question} Answer: ".encode()

    def _story(self, rng: np.random.Generator) -> tuple[Story, Asked]:
        for _ in range(self.tries):
            story = tell(rng, self.facts, self.objects)
            asked = self.ask(rng, story)
            if asked is not None:
                return story, asked
        raise ValueError(f"Babi: no question in {self.tries} stories of {self.facts} facts with objects={self.objects}")

    def _question(self, rng: np.random.Generator, size: int) -> Question:
        """Draws a problem whose prompt has `size` bytes."""
        story, asked = self._story(rng)
        facts, end = [fact.encode() for fact in story.facts], self._end(asked.text)
        units = self.haystack(rng, size - len(end) - sum(len(fact) + len(self.haystack.joint) for fact in facts))
        places = np.sort(rng.integers(len(units) + 1, size=len(facts))).tolist()
        prompt = self.haystack.joint.join(hide(units, facts, places)) + end
        depth = float(boundaries(units)[places[asked.fact]])
        return Question(prompt, asked.answer.encode(), (asked.answer,), depth)

    def for_split(self, split: Split) -> Babi:
        """The same problem in the haystack of a split."""
        return replace(self, haystack=haystack_of(split, self.haystack))

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw `rows` problems of `length` bytes, BOS included; see `prompts.pack`.

        Raises:
            ValueError: `length` is less than `least`, or stories of so few facts allow no such question.
            OSError: the text of the haystack cannot be had.
        """
        room("Babi", length, self.least)
        size = length - 1 - self.longest_answer
        return pack([self._question(rng, size) for _ in range(rows)], length, self.longest_answer)
