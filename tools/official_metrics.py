"""Scores rollouts with Waymo's own Sim Agents code and with ours, and prints both and their difference.

Waymo's code needs TensorFlow, so this runs in an environment of its own (`make oracle`):

    .oracle/bin/python -m tools.official_metrics --rollouts FILE --scenes embedded
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import compat  # noqa: F401 - before anything imports torchvision
from datamodules.scene import Scene
from datamodules.waymo_scenario import write_scenario
from tasks.baselines import constant_velocity
from tasks.metrics.realism import CHALLENGE_2024, CHALLENGE_2025
from tasks.metrics.sim_agents import SimAgents
from tasks.rollout_file import RolloutFile, Rollouts
from tools.scene_source import EMBEDDED, FILES, find_scenes

ORACLE = ("tensorflow", "tensorflow_probability", "tf_keras", "sklearn", "waymo_open_dataset")
INSTALL = """\
python -m pip install tensorflow-cpu==2.21.0 tensorflow-probability==0.25.0 scikit-learn 'numpy<2.3'
python -m pip install --no-deps tf-keras==2.21.0 waymo-open-dataset-tf-2-12-0==1.6.7"""
CHALLENGES = {2024: CHALLENGE_2024, 2025: CHALLENGE_2025}
CONFIGS = {2024: "challenge_2024_config.textproto", 2025: "challenge_2025_sim_agents_config.textproto"}
# Both sides round to float32 in other places: the official code keeps coordinates of kilometres in it, we subtract the
# origin first. A speed on the edge of a bin may so fall on either side of it. Displacements are in metres, all else lies
# in [0, 1].
TOLERANCE = 5e-5
TOLERANCE_METRES = 1e-4


def missing_packages() -> list[str]:
    """Modules of the official code that this environment lacks."""
    return [name for name in ORACLE if importlib.util.find_spec(name) is None]


def official_scores(scene: Scene, rollouts: Rollouts, year: int) -> dict[str, float]:
    """Scores by Waymo's code, all in the coordinates of the file; takes minutes.

    Raises:
        ValueError: what the official code finds wrong with the rollouts.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from google.protobuf import text_format
    from waymo_open_dataset.protos import scenario_pb2, sim_agents_metrics_pb2, sim_agents_submission_pb2
    from waymo_open_dataset.utils.sim_agents import submission_specs
    from waymo_open_dataset.wdl_limited.sim_agents_metrics import metrics

    config = sim_agents_metrics_pb2.SimAgentMetricsConfig()
    # Waymo's own loader looks for the file below the current folder.
    text_format.Parse(Path(metrics.__file__).with_name(CONFIGS[year]).read_text(), config)
    scenario = scenario_pb2.Scenario.FromString(write_scenario(scene))
    submitted = sim_agents_submission_pb2.ScenarioRollouts(scenario_id=scenario.scenario_id)
    for rollout in range(rollouts.states.shape[1]):
        joint = submitted.joint_scenes.add()
        for identity, path in zip(rollouts.agent_ids.tolist(), rollouts.states[:, rollout], strict=True):
            x, y, z, heading = path.T.tolist()
            joint.simulated_trajectories.add(object_id=identity, center_x=x, center_y=y, center_z=z, heading=heading)
    submission_specs.validate_scenario_rollouts(submitted, scenario)
    found = metrics.compute_scenario_metrics_for_bundle(config, scenario, submitted)
    buckets = metrics.aggregate_metrics_to_buckets(config, found)
    scores = {field.name: value for message in (found, buckets) for field, value in message.ListFields()}
    # A field that is zero may be unset, and so isn't listed.
    scores |= {field.name: getattr(found, field.name) for field in found.DESCRIPTOR.fields}
    return {name: float(value) for name, value in scores.items() if name != "scenario_id"}


def our_scores(scene: Scene, rollouts: Rollouts, year: int) -> dict[str, float]:
    """Scores by our metric, in its official-parity mode."""
    metric = SimAgents(challenge=CHALLENGES[year], parity=True)
    metric.update(scene, *rollouts.in_scene(scene))
    return {name: float(value) for name, value in metric.compute().items()}


def compare(scene: Scene, rollouts: Rollouts, year: int) -> dict[str, Any]:
    """Both scores of one scenario with the seconds that they took."""
    began = time.perf_counter()
    ours = our_scores(scene, rollouts, year)
    between = time.perf_counter()
    official = official_scores(scene, rollouts, year)
    ended = time.perf_counter()
    rows = {name: {"official": official[name], "ours": ours[name]} for name in official if name in ours}
    return {
        "scenario": scene.scenario_id,
        "agents": len(rollouts.agent_ids),
        "rollouts": rollouts.states.shape[1],
        "year": year,
        "seconds": {"official": ended - between, "ours": between - began},
        "scores": rows,
    }


def tolerance(name: str) -> float:
    """How far apart both scores may be for rounding alone."""
    return TOLERANCE_METRES if name.endswith("displacement_error") else TOLERANCE


def disagreements(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Names of the scores that differ by more than rounding, or aren't numbers."""
    return [name for name, row in scores.items() if not abs(row["ours"] - row["official"]) <= tolerance(name)]


def table(result: Mapping[str, Any]) -> str:
    """The result of `compare` as a table in Markdown."""
    lines = [
        f"{result['scenario']}, {result['agents']} agents, {result['rollouts']} rollouts, {result['year']} rules: "
        f"official {result['seconds']['official']:.1f} s, ours {result['seconds']['ours']:.1f} s",
        "",
        "| score | official | ours | difference |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["scores"].items():
        lines.append(f"| {name} | {row['official']:.6f} | {row['ours']:.6f} | {row['ours'] - row['official']:+.1e} |")
    return "\n".join(lines)


def _rollouts(arguments: argparse.Namespace) -> Iterator[tuple[Scene, Rollouts]]:
    if arguments.constant_velocity:
        for scene in find_scenes(arguments.scenes, arguments.constant_velocity, arguments.predict):
            yield scene, Rollouts.of_scene(scene, *constant_velocity(scene))
        return
    file = RolloutFile(arguments.rollouts)
    for scene in find_scenes(arguments.scenes, arguments.only or file.scenario_ids, arguments.predict):
        yield scene, file[scene.scenario_id]


def main(arguments: Iterable[str] | None = None) -> int:
    """Returns 0 if all scores agree, 1 if not, 2 if they could not be computed."""
    parser = argparse.ArgumentParser(prog="python -m tools.official_metrics", description=__doc__.split("\n", 1)[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--rollouts", type=Path, help="file that tasks.rollout_file wrote")
    source.add_argument("--constant-velocity", nargs="+", metavar="ID", help="scenarios to simulate so instead")
    parser.add_argument("--only", nargs="+", metavar="ID", help="score these scenarios of --rollouts, not all")
    parser.add_argument("--scenes", default=EMBEDDED, help=f"'embedded', or {FILES}")
    parser.add_argument("--year", type=int, choices=sorted(CONFIGS), default=max(CONFIGS), help="of the rules")
    parser.add_argument("--predict", type=int, default=8, help="agents to predict in embedded scenes (default 8)")
    parser.add_argument("--json", type=Path, help="also write all results here")
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    if chosen.only and not chosen.rollouts:
        parser.error("--only chooses among --rollouts; --constant-velocity names its scenarios itself")
    lacking = missing_packages()
    if lacking:
        print(f"error: this environment lacks {', '.join(lacking)}. `make oracle`, or:\n{INSTALL}", file=sys.stderr)
        return 2
    results = []
    try:
        for scene, rollouts in _rollouts(chosen):
            results.append(compare(scene, rollouts, chosen.year))
            print(table(results[-1]), flush=True)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = chosen.json.with_name(f".{chosen.json.name}.{os.getpid()}")
        temporary.write_text(json.dumps(results, indent=1))
        os.replace(temporary, chosen.json)
    wrong = [f"{result['scenario']}: {name}" for result in results for name in disagreements(result["scores"])]
    print(f"{len(results)} scenarios, " + (f"{len(wrong)} scores differ: {', '.join(wrong)}" if wrong else "all agree"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
