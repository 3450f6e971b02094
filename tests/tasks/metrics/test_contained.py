"""Share of references contained, against counts by hand and against its own laws."""

from __future__ import annotations

import pytest

from tasks.metrics.contained import any_contained, contained


@pytest.mark.parametrize(
    ("output", "references", "share", "one"),
    [
        ("The number is 1234567.", ("1234567",), 1.0, 1.0),
        ("The number is 123456.", ("1234567",), 0.0, 0.0),
        ("VAR abcde, then FGHIJ", ("ABCDE", "fghij", "KLMNO"), 2 / 3, 1.0),
        ("1111, 2222, 4444", ("1111", "2222", "3333", "4444"), 0.75, 1.0),
        ("", ("a", "b"), 0.0, 0.0),
        ("in the Kitchen", ("office", "garden"), 0.0, 0.0),
    ],
)
def test_counts_by_hand(output, references, share, one):
    assert contained(output, references) == pytest.approx(share)
    assert any_contained(output, references) == one


def test_case_order_and_surroundings_do_not_matter():
    output, references = "Apple, football and MILK", ["milk", "Apple", "pear"]
    for changed in (output.upper(), output.lower(), f"well: {output}!"):
        assert contained(changed, references[::-1]) == contained(output, references) == pytest.approx(2 / 3)


@pytest.mark.parametrize("score", [contained, any_contained])
@pytest.mark.parametrize("references", [(), [], "1234567"])
def test_no_references_are_refused(score, references):
    with pytest.raises(ValueError, match=r"references .* must be a sequence of one string or more"):
        score("output", references)
