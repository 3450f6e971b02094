"""The tables of docs/results/language.md, as Markdown, from the rows that scripts/language_study.sh left.

`python -m tools.language_results [FOLDER]`
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from results import read_rows, spread

TEXT = ("bits_per_byte", "without_memory_bits_per_byte", "perplexity")


def latest(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Overall rows, the last of each checkpoint, context and scaling."""
    whole = [row for row in rows if not row.get("depth")]
    return list({(row["ckpt"], row["context"], row["scaling"]): row for row in whole}.values())


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def by_metric(rows: Sequence[Mapping[str, str]], metrics: Sequence[str]) -> str:
    """Models down, metrics across: the mean over seeds ± half the range."""
    found: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        found[row["model"]].append(row)
    lines = []
    for model, members in found.items():
        values = [[float(row[metric]) for row in members if row.get(metric)] for metric in metrics]
        lines.append([model, str(len(members)), *(spread(each) if each else "" for each in values)])
    return table(("", "seeds", *metrics), lines)


def by_context(rows: Sequence[Mapping[str, str]], metric: str) -> str:
    """Models and scalings down, contexts across: the mean of a metric over seeds ± half the range."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        name = row["model"] if row["scaling"] == "identity" else f"{row['model']}, {row['scaling']}"
        found[name][int(row["context"])].append(float(row[metric]))
    contexts = sorted({context for line in found.values() for context in line})
    lines = [
        [model, str(max(map(len, line.values()))), *(spread(line[c]) if line[c] else "" for c in contexts)]
        for model, line in found.items()
    ]
    return table((metric, "seeds", *map(str, contexts)), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/language"))
    folder = parser.parse_args(arguments).folder
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise SystemExit(f"error: {folder} holds no results; run scripts/language_study.sh first")
    for path in files:
        rows = latest(read_rows(path))
        lengths = rows and all(row["context"].isdigit() for row in rows)
        of_text = rows and rows[0]["data"] == "shakespeare"
        metric = "bits_per_byte" if of_text else "accuracy" if path.stem != "recall" else "token_accuracy"
        print(f"\n{path.stem}\n\n{by_context(rows, metric) if lengths else by_metric(rows, TEXT)}")


if __name__ == "__main__":
    main()
