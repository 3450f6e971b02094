"""Seconds that the realism score of one scenario takes: `python -m bench.sim_agents --json PATH`.

The scenes are real, cut to 91 steps, each with 32 rollouts at about constant velocity; the record's features are computed with
theirs, as a first update must. With one thread the clock is the process's own time, as in all benches; with `--threads N` it
is wall time, which another program's load makes longer. `peak_megabytes` is of the whole process, torch included.
"""

from __future__ import annotations

import resource
import statistics
import time
from functools import partial

import torch
from torch import Tensor

import compat  # noqa: F401 - lets torchmetrics import torchvision beside a CPU torch
from bench.harness import Row, interleave, one_thread, parser, report
from datamodules.embedded_scenes import load_embedded
from datamodules.scene import FeatureType, Scene
from datamodules.windows import MostTravelled, window
from tasks.baselines import constant_velocity
from tasks.metrics.sim_agents import SimAgents

ROLLOUTS = 32
PREDICTED = 8


def score(scene: Scene, states: Tensor, index: Tensor) -> dict[str, Tensor]:
    """A fresh metric, one update, the result."""
    metric = SimAgents()
    metric.update(scene, states, index)
    return metric.compute()


def measure(rounds: int, threads: int) -> list[Row]:
    rows = []
    for scene in load_embedded():
        cut = window(scene, to_predict=MostTravelled(PREDICTED))
        states, index = constant_velocity(cut, ROLLOUTS)
        call = partial(score, cut, states, index)
        kinds = cut.feature_types.new_tensor([FeatureType.EDGE_BOUNDARY, FeatureType.EDGE_MEDIAN])
        edges = int(torch.isin(cut.feature_types, kinds).sum())
        case = f"{scene.scenario_id} {len(index)} agents, {len(cut.scored())} scored, {edges} edges"
        torch.set_num_threads(1)
        seconds = interleave({"one_thread": call}, rounds=rounds)["one_thread"]
        rows.append(Row("sim_agents", case, "one_thread", "s_per_scenario", statistics.median(seconds), "s"))
        if threads > 1:
            torch.set_num_threads(threads)
            seconds = [_wall(call) for _ in range(rounds + 1)][1:]
            name = f"{threads}_threads"
            rows.append(Row("sim_agents", case, name, "s_per_scenario", statistics.median(seconds), "s"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(Row("sim_agents", "all", "one_thread", "peak_megabytes", peak, "MiB"))
    return rows


def _wall(call: partial[dict[str, Tensor]]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    arguments = parser("The realism score of real scenes with 32 rollouts.")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=1, help="also with this many, by wall time")
    options = arguments.parse_args()
    one_thread()
    report(measure(options.rounds, options.threads), options.json)


if __name__ == "__main__":
    main()
