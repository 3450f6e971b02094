"""Scores of written answers by the references they contain, as RULER (arXiv 2404.06654) has them; case doesn't matter."""

from __future__ import annotations

from collections.abc import Sequence


def _found(output: str, references: Sequence[str]) -> list[bool]:
    if isinstance(references, str) or not references:
        raise ValueError(f"references {references!r} must be a sequence of one string or more")
    return [reference.casefold() in output.casefold() for reference in references]


def contained(output: str, references: Sequence[str]) -> float:
    """Share of the references that `output` contains: RULER's score of all tasks but question answering.

    Raises:
        ValueError: there are no references, or they are one string.
    """
    found = _found(output, references)
    return sum(found) / len(found)


def any_contained(output: str, references: Sequence[str]) -> float:
    """1 where `output` contains one of the references, else 0: RULER's score of question answering.

    Raises:
        ValueError: there are no references, or they are one string.
    """
    return float(any(_found(output, references)))
