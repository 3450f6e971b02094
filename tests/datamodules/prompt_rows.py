"""Reads rows of text back into prompt and answer, and checks on the way that labels are shifted and nothing else is asked."""

from __future__ import annotations

from pathlib import Path

from datamodules.text_documents import Document

BOS = 256


class Licence:
    """Real prose that needs no download: lines of a text that does not change."""

    name = "licence"

    def identity(self, cache=None):
        return {}

    def documents(self, split, cache=None):
        lines = Path("LICENSE").read_bytes().splitlines()
        yield Document("LICENSE", b"\n".join(line for line in lines if line.strip()))


def read(sample, length):
    """(prompt, answer) of each row as text; the answer by its labels, checked against the tokens."""
    assert sample.tokens.shape == sample.targets.shape
    assert sample.tokens.shape[1] == length
    assert str(sample.tokens.dtype) == str(sample.targets.dtype) == "int64"
    assert str(sample.depth.dtype) == "float32"
    assert len(sample.references) == len(sample.depth) == len(sample.tokens)
    rows, columns = [], set()
    for tokens, targets in zip(sample.tokens.tolist(), sample.targets.tolist(), strict=True):
        labelled = [column for column, target in enumerate(targets) if target != -100]
        first, last = labelled[0], labelled[-1]
        assert labelled == list(range(first, last + 1))
        assert [targets[column] for column in labelled] == tokens[first + 1 : last + 2]
        assert tokens[0] == BOS
        assert BOS not in tokens[1 : last + 2]
        assert set(tokens[last + 2 :]) <= {BOS}
        columns.add(first)
        prompt, answer = bytes(tokens[1 : first + 1]), bytes(tokens[first + 1 : last + 2])
        rows.append((prompt.decode("utf-8", "replace"), answer.decode()))
    assert len(columns) == 1
    return rows
