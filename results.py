"""Rows of evaluation: appended to one CSV by any number of processes, printed as a table, drawn against the resolution.

`python -m results PATH` prints and draws again what a file holds.
"""

from __future__ import annotations

import csv
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """All rows of a results file; none if it isn't there."""
    path = Path(path)
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add a row under a lock; columns that are new join the header, and the file is replaced whole, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        rows = [*read_rows(path), {key: str(value) for key, value in row.items()}]
        columns = list(dict.fromkeys(key for each in rows for key in each))
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)


def rows_of(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Lightning's metrics as rows: `test/top1` gives one row; `test/POLICY/NAME` one row a policy, with that column."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        _, *policy, metric = name.split("/")
        row = rows.setdefault("/".join(policy), {"policy": "/".join(policy)} if policy else {})
        row[metric] = round(value, 6)
    return list(rows.values())


def print_point(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row as a line; several, which share their point, as a table with a column a row."""
    if len(rows) == 1:
        print("  ".join(f"{key}={value}" for key, value in rows[0].items()))
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shared = [key for key in keys if len({str(row.get(key, "")) for row in rows}) == 1]
    table = Table(title="  ".join(f"{key}={rows[0][key]}" for key in shared if key in rows[0]))
    first, *others = [key for key in keys if key not in shared]
    for column in (first, *(str(row[first]) for row in rows)):
        table.add_column(column, justify="left" if column == first else "right")
    for key in others:
        table.add_row(key, *(str(row.get(key, "")) for row in rows))
    Console(width=None if os.isatty(1) else 140).print(table)


def _pixels(resolution: str) -> float:
    sides = [int(side) for side in resolution.split("x")]
    product = 1
    for side in sides:
        product *= side
    return product ** (1 / len(sides))


def curves(rows: Sequence[Mapping[str, str]], metric: str) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(model, scaling) → resolution → values of all checkpoints, the last row of each checkpoint counting."""
    latest = {(r["model"], r["scaling"], r["resolution"], r["ckpt"], r["split"]): r for r in rows if r.get(metric)}
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in latest.values():
        found[row["model"], row["scaling"]][row["resolution"]].append(float(row[metric]))
    return found


def print_table(rows: Sequence[Mapping[str, str]], metric: str = "top1") -> None:
    """Models and scalings down, resolutions across; means over checkpoints, in percent."""
    lines = curves(rows, metric)
    resolutions = sorted({r for line in lines.values() for r in line}, key=_pixels)
    table = Table(title=f"{metric} (%) by test resolution")
    for column in ("model", "scaling", *resolutions):
        table.add_column(column, justify="left" if column in ("model", "scaling") else "right")
    for (model, scaling), line in sorted(lines.items()):
        cells = [f"{100 * sum(line[r]) / len(line[r]):.1f}" if r in line else "" for r in resolutions]
        table.add_row(model, scaling, *cells)
    Console(width=None if os.isatty(1) else 140).print(table)


def draw(rows: Sequence[Mapping[str, str]], path: str | Path, metric: str = "top1") -> None:
    """PNG of the metric against the test resolution, one line a model and scaling, the training resolution marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"identity": "-", "interpolate": ":", "ntk": "--", "yarn": "-."}
    lines = curves(rows, metric)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colours = {model: f"C{i}" for i, model in enumerate(sorted({model for model, _ in lines}))}
    for (model, scaling), line in sorted(lines.items()):
        order = sorted(line, key=_pixels)
        x, runs = [_pixels(r) for r in order], [[100 * v for v in line[r]] for r in order]
        mean = [sum(values) / len(values) for values in runs]
        name = model if scaling in ("identity", "none") else f"{model}, {scaling}"
        axes.plot(x, mean, styles.get(scaling, "-"), marker="o", markersize=3, color=colours[model], label=name)
        if max(len(values) for values in runs) > 1:
            axes.fill_between(x, [min(v) for v in runs], [max(v) for v in runs], color=colours[model], alpha=0.15)
    for trained in {row["trained_at"] for row in rows if row.get("trained_at", "").isdigit()}:
        axes.axvline(int(trained), color="0.6", linestyle="--", linewidth=1)
        axes.annotate("training", (int(trained), axes.get_ylim()[0]), rotation=90, va="bottom", ha="right", color="0.4")
    axes.set(xlabel="test resolution (pixels)", ylabel=f"{metric} (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path = Path(path)
    figure.savefig(path.with_suffix(".partial.png"), dpi=150)
    os.replace(path.with_suffix(".partial.png"), path)
    pyplot.close(figure)


class ResolutionFigure(Callback):
    """After the last point of a sweep: the table, and `resolution.png` beside the results, of all rows in the file."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        report(config.results)


def spread(values: Sequence[float]) -> str:
    """The mean, ± half the range where there are several."""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    digits = 0 if abs(mean) >= 1000 else 3
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


class SweepReport(Callback):
    """After the last point of a sweep over `x`: a table of all rows of the file, and a figure where x counts something.

    A line is a model, or another policy that was scored beside it; checkpoints that share a line and an x are averaged.

    Args:
        x: the column that was swept.
        metrics: columns to show; the figure has a panel each.
    """

    def __init__(self, x: str, metrics: Sequence[str]) -> None:
        self.x, self.metrics = x, list(metrics)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.report(config.results)

    def points(self, rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], dict[str, list[float]]]:
        """(line, x) → metric → one value a checkpoint; the last row of each counts."""
        latest = {
            (r.get("policy", ""), r["model"], r.get("split", ""), r[self.x], r["ckpt"]): r
            for r in rows
            if r.get(self.x)
        }
        found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for (policy, model, split, x, _), row in latest.items():
            line = (model if policy in ("", "model") else policy) + (f" ({split})" if split else "")
            for metric in self.metrics:
                if row.get(metric) not in (None, "", "nan"):
                    found[line, x][metric].append(float(row[metric]))
        return found

    def report(self, path: str | Path) -> None:
        """Table on the terminal, and `sweep_X.png` beside the file.

        Raises:
            ValueError: no row of the file has x.
        """
        path, points = Path(path), self.points(read_rows(path))
        if not points:
            raise ValueError(f"{path}: no rows with {self.x}")
        counted = all(x.isdigit() for _, x in points)
        table = Table(title=f"by {self.x}, {path}")
        for column in ("", self.x, *self.metrics):
            table.add_column(column, justify="left" if column == "" else "right", overflow="fold")
        order = sorted(points, key=lambda key: (key[0], int(key[1]))) if counted else list(points)
        for key in order:
            table.add_row(*key, *(spread(points[key][m]) if points[key][m] else "" for m in self.metrics))
        Console(width=None if os.isatty(1) else 160).print(table)
        if counted:
            figure = path.parent / f"sweep_{self.x}.png"
            self._draw(points, order, figure)
            print(f"figure: {figure}")

    def _draw(self, points: Mapping[tuple[str, str], Any], order: Sequence[tuple[str, str]], path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(
            1, len(self.metrics), figsize=(3.4 * len(self.metrics), 3.4), layout="constrained", squeeze=False
        )
        for axes, metric in zip(panels[0], self.metrics, strict=True):
            for line in dict.fromkeys(name for name, _ in order):
                shown = [
                    (int(x), points[name, x][metric]) for name, x in order if name == line and points[name, x][metric]
                ]
                if shown:
                    axes.plot(
                        [x for x, _ in shown], [sum(v) / len(v) for _, v in shown], "o-", markersize=3, label=line
                    )
            axes.set(xscale="log", xlabel=self.x, title=metric)
            if metric.endswith(("bytes", "_s", "_ms")):
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
        panels[0, -1].legend(fontsize=7)
        figure.savefig(path.with_suffix(".partial.png"), dpi=130)
        os.replace(path.with_suffix(".partial.png"), path)
        pyplot.close(figure)


def report(path: str | Path) -> None:
    """Table on the terminal and `resolution.png` beside the file, of all rows with top-1."""
    path = Path(path)
    rows = [row for row in read_rows(path) if row.get("top1")]
    if not rows:
        raise ValueError(f"{path}: no rows with top1")
    print_table(rows)
    draw(rows, path.parent / "resolution.png")
    print(f"results: {path}\nfigure: {path.parent / 'resolution.png'}")


if __name__ == "__main__":
    for given in sys.argv[1:] or ["outputs/results.csv"]:
        report(given)
