"""Rows of evaluation: appended to one CSV by any number of processes, printed as tables, drawn as curves and heat maps.

`python -m results PATH` prints and draws again what a file holds, as the sweeps in `configs/sweep` do at their end.
"""

from __future__ import annotations

import csv
import math
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

Row = Mapping[str, str]
LONG = 12  # more columns than this make no line


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


def rows_of(metrics: Mapping[str, float], column: str = "policy") -> list[dict[str, Any]]:
    """Lightning's metrics as rows: `test/top1` gives one row; `test/PART/NAME` one row a part, which `column` names.

    Where there are both, the column of the row of the whole is empty.
    """
    parted = any(name.count("/") > 1 for name in metrics)
    rows: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        _, *part, metric = name.split("/")
        row = rows.setdefault("/".join(part), {column: "/".join(part)} if parted else {})
        row[metric] = round(value, 6)
    return list(rows.values())


def print_point(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row as a line; a long one, or several that share their point, as a table with a column a row."""
    if len(rows) == 1 and len(rows[0]) <= LONG:
        print("  ".join(f"{key}={value}" for key, value in rows[0].items()))
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shared = [key for key in keys if len(rows) > 1 and len({str(row.get(key, "")) for row in rows}) == 1]
    table = Table(title="  ".join(f"{key}={rows[0][key]}" for key in shared if key in rows[0]) or None)
    first, *others = [key for key in keys if key not in shared]
    for column in (first, *(str(row.get(first, "")) or "all" for row in rows)):
        table.add_column(column, justify="left" if column == first else "right")
    for key in others:
        table.add_row(key, *(str(row.get(key, "")) for row in rows))
    Console(width=None if os.isatty(1) else 140).print(table)


def _pixels(resolution: str) -> float:
    sides = [int(side) for side in resolution.split("x")]
    return math.prod(sides) ** (1 / len(sides))


def drawing() -> Any:
    """pyplot without a screen, imported where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: str | Path, dpi: int = 130) -> None:
    """Write a figure of pyplot as PNG, whole or not at all, and close it."""
    partial = Path(path).with_suffix(".partial.png")
    figure.savefig(partial, dpi=dpi)
    os.replace(partial, path)
    drawing().close(figure)


def _tested(row: Row) -> str:
    """The model, and what was done to it in the test beside scaling."""
    plain = {"average": "False", "ratios": "[1.0]", "flip": "False"}
    others = [f"{name} {row[name]}" for name, value in plain.items() if row.get(name, "") not in ("", value)]
    return ", ".join([row["model"], *others, *_windows(row)])


def _windows(row: Row) -> list[str]:
    """How a test image was read in windows, which may grow with it; nothing where it was read whole."""
    crop, stride = row.get("crop", ""), row.get("stride", "")
    if crop in ("", "None"):
        return []
    if crop == row["resolution"] and stride.isdecimal():
        return [f"windows of the short side, {int(stride) / int(crop):.2f} of it apart"]
    return [f"windows of {crop}" + (f", {stride} apart" if stride else "")]


def curves(rows: Sequence[Row], metric: str) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(model, scaling) → resolution → values of all checkpoints, the last row of each checkpoint counting.

    A model that was trained at several sizes, or tested on several sets or splits, has a line for each.
    """
    latest = {
        (_tested(r), r["scaling"], r["resolution"], r["ckpt"], r["split"], r.get("data")): r
        for r in rows
        if known(r, metric)
    }
    parts = {"trained_at": "trained at", "data": "on", "split": "split"}
    kinds = defaultdict(set)
    for row in latest.values():
        for part in filter(row.get, parts):
            kinds[row["model"], part].add(row[part])
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (model, scaling, resolution, *_), row in latest.items():
        told = [f"{parts[part]} {row[part]}" for part in filter(row.get, parts) if len(kinds[row["model"], part]) > 1]
        found[", ".join([model, *told]), scaling][resolution].append(float(row[metric]))
    return found


def print_table(rows: Sequence[Row], metric: str = "top1") -> None:
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


def draw(rows: Sequence[Row], path: str | Path, metrics: Sequence[str] = ("top1",)) -> None:
    """PNG of metrics against the test resolution, a panel each, one line a model and scaling, the training size marked."""
    pyplot = drawing()
    styles = {"identity": "-", "interpolate": ":", "ntk": "--", "yarn": "-."}
    figure, panels = pyplot.subplots(
        1, len(metrics), figsize=(1 + 6 * len(metrics), 4.5), layout="constrained", squeeze=False
    )
    drawn = {metric: curves(rows, metric) for metric in metrics}
    models = sorted({model for lines in drawn.values() for model, _ in lines})
    colours = {model: f"C{i}" for i, model in enumerate(models)}
    for axes, (metric, lines) in zip(panels[0], drawn.items(), strict=True):
        for (model, scaling), line in sorted(lines.items()):
            order = sorted(line, key=_pixels)
            x, runs = [_pixels(r) for r in order], [[100 * v for v in line[r]] for r in order]
            mean = [sum(values) / len(values) for values in runs]
            name = model if scaling in ("identity", "none") else f"{model}, {scaling}"
            axes.plot(x, mean, styles.get(scaling, "-"), marker="o", markersize=3, color=colours[model], label=name)
            if max(len(values) for values in runs) > 1:
                axes.fill_between(x, [min(v) for v in runs], [max(v) for v in runs], color=colours[model], alpha=0.15)
        for extent in trained_at([row for row in rows if known(row, metric)]):
            axes.axvline(extent, color="0.6", linestyle="--", linewidth=1)
            axes.annotate("training", (extent, axes.get_ylim()[0]), rotation=90, va="bottom", ha="right", color="0.4")
        axes.set(xlabel="test resolution (pixels)", ylabel=f"{metric} (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path, dpi=150)


class Report(Callback):
    """After the last point of a sweep: a table on the terminal, and a figure beside the file, of all rows it is for.

    Attributes:
        needs: what those rows have, in words.
    """

    needs: str

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.report(config.results)

    def report(self, path: str | Path) -> None:
        """Show what a file holds.

        Raises:
            ValueError: it has no rows that belong here.
        """
        rows = self.own(read_rows(path))
        if not rows:
            raise ValueError(f"{path}: no rows with {self.needs}")
        self.show(rows, Path(path))

    def own(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the rows that belong here."""
        raise NotImplementedError

    def show(self, rows: Sequence[Row], path: Path) -> None:
        """Print and draw rows, all of them own, of the file `path`."""
        raise NotImplementedError


class ResolutionFigure(Report):
    """Shares that are right, by resolution and scaling: a table a metric, and `resolution.png`.

    Args:
        metrics: columns to show where rows have them.
    """

    def __init__(self, metrics: Sequence[str] = ("top1",)) -> None:
        self.metrics, self.needs = list(metrics), " or ".join(metrics)

    def own(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row.get("resolution") and any(known(row, metric) for metric in self.metrics)]

    def show(self, rows: Sequence[Row], path: Path) -> None:
        shown = [metric for metric in self.metrics if any(known(row, metric) for row in rows)]
        for metric in shown:
            print_table(rows, metric)
        draw(rows, path.parent / "resolution.png", shown)
        print(f"results: {path}\nfigure: {path.parent / 'resolution.png'}")


def spread(values: Sequence[float]) -> str:
    """The mean, ± half the range where there are several."""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    digits = 0 if abs(mean) >= 1000 else 3
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def known(row: Row, metric: str) -> bool:
    """Whether a row has a value of a metric."""
    return row.get(metric) not in (None, "", "nan")


def line_of(row: Row, by: Sequence[str] = ()) -> str:
    """What a row's line is called: the model or another policy that was scored beside it, values of `by`, the split."""
    policy = row.get("policy", "")
    parts = [row["model"] if policy in ("", "model") else policy]
    parts += [row[column] for column in by if row.get(column) not in (None, "", "identity", "none")]
    return ", ".join(parts) + (f" ({row['split']})" if row.get("split") else "")


class SweepReport(Report):
    """A table of all rows that have `x`, and a figure where x counts something.

    A line is a model, or another policy that was scored beside it; checkpoints that share a line and an x are averaged,
    the last row of each counting. Rows that tell of a part of a point by its `depth` are left to `HeatMap`.

    Args:
        x: the column that was swept.
        metrics: columns to show; the figure has a panel each.
        by: columns whose values, with the model, make a line.
        drawn: name of the figure, sweep_X.png where None.
    """

    def __init__(self, x: str, metrics: Sequence[str], by: Sequence[str] = (), drawn: str | None = None) -> None:
        self.x, self.metrics, self.by = x, list(metrics), list(by)
        self.drawn, self.needs = drawn or f"sweep_{x}.png", x

    def own(self, rows: Sequence[Row]) -> list[Row]:
        return [r for r in rows if r.get(self.x) and not r.get("depth") and any(known(r, m) for m in self.metrics)]

    def points(self, rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[float]]]:
        """(line, x) → metric → one value a checkpoint; the last row of each counts."""
        latest = {(line_of(row, self.by), row[self.x], row["ckpt"]): row for row in self.own(rows)}
        found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for (line, x, _), row in latest.items():
            for metric in self.metrics:
                if known(row, metric):
                    found[line, x][metric].append(float(row[metric]))
        return found

    def show(self, rows: Sequence[Row], path: Path) -> None:
        points = self.points(rows)
        counted = [key for key in points if key[1].isdigit()]
        counted.sort(key=lambda key: (key[0], int(key[1])))
        table = Table(title=f"by {self.x}, {path}")
        for column in ("", self.x, *self.metrics):
            table.add_column(column, justify="left" if column == "" else "right", overflow="fold")
        for key in (*counted, *(key for key in points if not key[1].isdigit())):
            table.add_row(*key, *(spread(points[key][m]) if points[key][m] else "" for m in self.metrics))
        Console(width=None if os.isatty(1) else 160).print(table)
        if counted:
            self._draw(points, counted, trained_at(rows), path.parent / self.drawn)
            print(f"figure: {path.parent / self.drawn}")

    def _draw(
        self, points: Mapping[tuple[str, str], Any], order: Sequence[tuple[str, str]], trained: list[int], path: Path
    ) -> None:
        pyplot = drawing()
        figure, panels = pyplot.subplots(
            1, len(self.metrics), figsize=(3.4 * len(self.metrics), 3.4), layout="constrained", squeeze=False
        )
        names, ticks = list(dict.fromkeys(name for name, _ in order)), sorted({int(x) for _, x in order})
        for axes, metric in zip(panels[0], self.metrics, strict=True):
            for number, line in enumerate(names):
                shown = {
                    int(x): points[line, x][metric] for name, x in order if name == line and points[line, x][metric]
                }
                if shown:
                    means = [sum(values) / len(values) for values in shown.values()]
                    style = f"C{number % 10}o" + ("-", "--", ":", "-.")[number // 10 % 4]  # the cycle has ten colours
                    axes.plot(list(shown), means, style, markersize=3, label=line)
            for extent in trained:
                axes.axvline(extent, color="0.6", linestyle="--", linewidth=1, zorder=0)
            axes.set(xscale="log", xlabel=self.x, title=metric)
            if len(ticks) <= 8:
                axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
                axes.minorticks_off()
            if metric.endswith(("bytes", "_s", "_ms")):
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
        keys = dict(pair for axes in panels[0] for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        panels[0, -1].legend(keys.values(), keys, fontsize=7)
        save_figure(figure, path)


def trained_at(rows: Sequence[Row]) -> list[int]:
    """The extents that the rows' models were trained at, where they say."""
    return sorted({int(row["trained_at"]) for row in rows if row.get("trained_at", "").isdigit()})


class HeatMap(Report):
    """A metric between 0 and 1 by two numbers, say accuracy by length × depth: a table and a picture a line.

    Checkpoints that share a line are averaged, the last row of each counting. Cells are equally wide, so lengths that
    double stand as on a logarithmic axis; a dashed line parts those up to the longest trained at from the others.

    Args:
        x: column of the numbers that go across.
        y: column of those that go down; the smallest is on top.
        metric: column to show.
        by: columns whose values, with the model, make a line.
        drawn: name of the picture.
    """

    def __init__(self, x: str, y: str, metric: str, by: Sequence[str] = (), drawn: str = "sweep_needle.png") -> None:
        self.x, self.y, self.metric, self.by, self.drawn = x, y, metric, list(by), drawn
        self.needs = f"{x}, {y} and {metric}"

    def own(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row.get(self.x, "").isdigit() and row.get(self.y) and known(row, self.metric)]

    def cells(self, rows: Sequence[Row]) -> dict[str, dict[tuple[float, int], float]]:
        """Line → (y, x) → mean over checkpoints."""
        latest = {
            (line_of(row, self.by), float(row[self.y]), int(row[self.x]), row["ckpt"]): float(row[self.metric])
            for row in self.own(rows)
        }
        values: dict[str, dict[tuple[float, int], list[float]]] = defaultdict(lambda: defaultdict(list))
        for (line, y, x, _), value in sorted(latest.items()):
            values[line][y, x].append(value)
        return {line: {at: sum(v) / len(v) for at, v in cells.items()} for line, cells in values.items()}

    def show(self, rows: Sequence[Row], path: Path) -> None:
        maps = self.cells(rows)
        for line, cells in maps.items():
            across, down = sorted({x for _, x in cells}), sorted({y for y, _ in cells})
            table = Table(title=f"{line}: {self.metric} by {self.y} (down) and {self.x} (across)")
            for column in (self.y, *across):
                table.add_column(str(column), justify="right")
            for y in down:
                table.add_row(f"{y:g}", *(f"{cells[y, x]:.2f}" if (y, x) in cells else "" for x in across))
            columns = [[cells[y, x] for y in down if (y, x) in cells] for x in across]
            table.add_section()
            table.add_row("mean", *(f"{sum(column) / len(column):.2f}" for column in columns))
            Console(width=None if os.isatty(1) else 140).print(table)
        self._draw(maps, trained_at(rows), path.parent / self.drawn)
        print(f"figure: {path.parent / self.drawn}")

    def _draw(self, maps: Mapping[str, Mapping[tuple[float, int], float]], trained: list[int], path: Path) -> None:
        across = sorted({x for cells in maps.values() for _, x in cells})
        down = sorted({y for cells in maps.values() for y, _ in cells})
        pyplot, wide = drawing(), min(3, len(maps))
        high = math.ceil(len(maps) / wide)
        figure, panels = pyplot.subplots(
            high, wide, figsize=(4.2 * wide + 0.8, 3.4 * high), layout="constrained", squeeze=False
        )
        for axes, (line, cells) in zip(panels.flat, maps.items(), strict=False):
            axes.set_facecolor("0.9")  # where nothing was measured
            grid = [[cells.get((y, x), math.nan) for x in across] for y in down]
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
            if len(across) * len(down) <= 120:
                for (y, x), value in cells.items():
                    look = {"color": "k" if value > 0.5 else "w", "ha": "center", "va": "center", "fontsize": 7}
                    axes.annotate(f"{value:.2f}", (across.index(x), down.index(y)), **look)
            for axis, values in ((axes.xaxis, across), (axes.yaxis, down)):
                step = math.ceil(len(values) / 12)
                axis.set_ticks(range(0, len(values), step), [f"{value:.10g}" for value in values[::step]], fontsize=7)
            for extent in trained:
                within = sum(x <= extent for x in across)
                if 0 < within < len(across):
                    axes.axvline(within - 0.5, color="0.2", linestyle="--", linewidth=1)
            axes.set(xlabel=self.x, ylabel=self.y, title=line)
        for axes in panels.flat[len(maps) :]:
            axes.set_visible(False)
        figure.colorbar(image, ax=panels, label=self.metric)
        save_figure(figure, path)


def sweep_reports() -> list[Report]:
    """What the sweeps in `configs/sweep` show at their end."""
    files = sorted((Path(__file__).parent / "configs" / "sweep").glob("*.yaml"))
    given = [OmegaConf.select(OmegaConf.load(file), "hydra.callbacks") or {} for file in files]
    return [instantiate(callback) for callbacks in given for callback in callbacks.values()]


def report(path: str | Path) -> None:
    """Every table and figure that a sweep would make of the file.

    Raises:
        ValueError: the file has no rows that a sweep knows.
    """
    rows = read_rows(path)
    found = [each for each in sweep_reports() if each.own(rows)]
    if not found:
        raise ValueError(f"{path}: no rows that a sweep of configs/sweep knows")
    for each in found:
        each.report(path)


if __name__ == "__main__":
    for given in sys.argv[1:] or ["outputs/results.csv"]:
        report(given)
