"""Timing shared by all benches: providers take turns in shuffled rounds, medians are kept, rows go to one flat JSON list.

On a busy machine two programs timed one after the other are compared under different loads. Here every provider runs once a
round, in an order drawn anew, so a ratio is taken within a round and its median over rounds survives slow phases.

Buffers of tens of MB are returned to the system by glibc when freed, and every call then pays page faults for fresh memory:
several times the cost of a copy, the same for all, so that it hides what is measured. `keep_buffers` raises the two
thresholds of malloc, as a training loop's caching allocator would.

On a CPU the clock is the process's own time, which stands still while another program has the core.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Row:
    """One number: `value` in `unit` of `metric`, for one provider in one case of one bench."""

    bench: str
    case: str
    provider: str
    metric: str
    value: float
    unit: str


def keep_buffers(gibibytes: float = 1.9) -> bool:
    """Ask glibc to keep freed buffers mapped (mallopt takes a C int, so below 2 GiB); False where libc has no mallopt."""
    if platform.system() != "Linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    limit = int(gibibytes * 2**30)
    return mallopt is not None and all(mallopt(option, limit) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def one_thread() -> None:
    """One thread, and buffers that stay mapped: how every bench starts."""
    torch.set_num_threads(1)
    keep_buffers()


_clock = time.perf_counter if torch.cuda.is_available() else time.process_time


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = _clock()
    for _ in range(repeats):
        call()
    return (_clock() - start) / repeats


def interleave(
    providers: Mapping[str, Callable[[], object]], *, rounds: int = 15, least: float = 5e-3, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds a call of each provider, one entry a round.

    Args:
        providers: name → call.
        rounds: how often each is timed.
        least: seconds that one timing lasts at least, so that short calls are repeated within it.
        seed: of the order.
    """
    repeats = {}
    for name, call in providers.items():
        call()  # compiles, allocates
        repeats[name] = max(1, round(least / max(min(_seconds(call, 1) for _ in range(3)), 1e-9)))
    names, order = list(providers), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            seconds[name].append(_seconds(providers[name], repeats[name]))
    return seconds


def rows_of(bench: str, case: str, seconds: Mapping[str, list[float]], floor: str | None = None) -> list[Row]:
    """Median milliseconds of each provider and, given a `floor` provider, the median of its ratio to the floor."""
    rows = []
    for name, times in seconds.items():
        rows.append(Row(bench, case, name, "milliseconds", 1e3 * statistics.median(times), "ms"))
        if floor is not None:
            ratios = [own / base for own, base in zip(times, seconds[floor], strict=True)]
            rows.append(Row(bench, case, name, f"x_{floor}", statistics.median(ratios), "ratio"))
    return rows


def table(rows: list[Row]) -> str:
    """One line a provider and case, metrics side by side."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row.case, row.provider), {})[row.metric] = row.value
    wide = max([len(case) for case, _ in cells] + [4]), max([len(provider) for _, provider in cells] + [8])
    lines = [f"{'case':<{wide[0]}}  {'provider':<{wide[1]}}" + "".join(f"  {metric:>14}" for metric in metrics)]
    for (case, provider), values in cells.items():
        numbers = "".join(f"  {values[m]:>14.4g}" if m in values else " " * 16 for m in metrics)
        lines.append(f"{case:<{wide[0]}}  {provider:<{wide[1]}}{numbers}")
    return "\n".join(lines)


def parser(description: str) -> argparse.ArgumentParser:
    """`--json PATH`, to which a bench may add."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    return made


def report(rows: list[Row], path: Path | None) -> None:
    """Print the table and write the rows."""
    print(table(rows))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
