"""The official scores beside ours: what needs no TensorFlow always, the comparison itself where there is an oracle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datamodules.embedded_source import SourceError
from datamodules.scene import AgentType
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.tfrecord import write_tfrecord
from datamodules.waymo_scenario import write_scenario
from tasks.baselines import constant_velocity
from tasks.metrics.sim_agents import SimAgents
from tasks.rollout_file import Rollouts, save_rollouts
from tools import official_metrics
from tools.official_metrics import disagreements, main, our_scores, table
from tools.scene_source import EMBEDDED, embedded_window, find_scenes

ROOT = Path(__file__).parents[2]


def test_our_scores_are_those_of_the_metric():
    scene = synthetic_scene(1, agents=6)
    assert (scene.agent_types == AgentType.VEHICLE).any()
    states, index = constant_velocity(scene)
    metric = SimAgents()
    metric.update(scene, states.double(), index)  # as a file holds them; 2023 has a bin edge at rest, so rounding tells
    found = our_scores(scene, Rollouts.of_scene(scene, states, index), 2025)
    for name, value in metric.compute().items():
        assert found[name] == pytest.approx(float(value), abs=1e-9), name
    older = our_scores(scene, Rollouts.of_scene(scene, states, index), 2024)
    assert older["metametric"] == pytest.approx(found["metametric_2024"], abs=1e-12)


def test_disagreements_and_table():
    scores = {
        "metametric": {"official": 0.5, "ours": 0.5 + 4e-5},
        "collision_indication_likelihood": {"official": 0.5, "ours": 0.5 - 6e-5},
        "average_displacement_error": {"official": 4.0, "ours": 4.00005},
        "offroad_indication_likelihood": {"official": 0.5, "ours": float("nan")},
    }
    assert disagreements(scores) == ["collision_indication_likelihood", "offroad_indication_likelihood"]
    seconds = {"official": 100.0, "ours": 0.5}
    text = table({"scenario": "a@0", "agents": 3, "rollouts": 32, "year": 2025, "seconds": seconds, "scores": scores})
    assert "| metametric | 0.500000 | 0.500040 | +4.0e-05 |" in text
    assert "a@0" in text


def test_without_tensorflow_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(official_metrics, "ORACLE", ("no_such_module",))
    assert main(["--constant-velocity", "8d3d061e518531d0@20"]) == 2
    error = capsys.readouterr().err
    assert "no_such_module" in error
    assert "pip install" in error
    assert "waymo-open-dataset-tf-2-12-0==1.6.7" in error


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rollouts", "none.safetensors"], "none.safetensors"),
        (["--constant-velocity", "a", "--scenes", "nowhere"], "nowhere"),
    ],
)
def test_missing_files(monkeypatch, capsys, arguments, text):
    monkeypatch.setattr(official_metrics, "ORACLE", ())
    assert main(arguments) == 2
    assert text in capsys.readouterr().err


def test_only_some_of_a_file(monkeypatch, capsys, tmp_path):
    scenes = [synthetic_scene(seed, agents=5) for seed in (1, 2, 3)]
    names = [scene.scenario_id for scene in scenes]
    write_tfrecord(tmp_path / "scenes.tfrecord", map(write_scenario, scenes))
    save_rollouts(tmp_path / "r.safetensors", [Rollouts.of_scene(s, *constant_velocity(s, 2)) for s in scenes])
    monkeypatch.setattr(official_metrics, "ORACLE", ())
    scored = []

    def note(scene, rollouts, year):
        assert rollouts.scenario_id == scene.scenario_id
        scored.append(scene.scenario_id)
        return {}

    monkeypatch.setattr(official_metrics, "official_scores", note)
    command = ["--rollouts", str(tmp_path / "r.safetensors"), "--scenes", str(tmp_path / "scenes.tfrecord")]
    assert main([*command, "--only", names[2], names[0]]) == 0
    assert sorted(scored) == sorted([names[0], names[2]])
    assert main([*command, "--json", str(tmp_path / "new" / "scores.json")]) == 0
    assert sorted(scored[2:]) == sorted(names)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores.json"]  # nothing half-written beside it
    results = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert sorted(result["scenario"] for result in results) == sorted(names)
    assert main([*command, "--only", "feed"]) == 2
    assert "feed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--constant-velocity", names[0], "--only", names[0]])
    assert "--only chooses among --rollouts" in capsys.readouterr().err


def test_embedded_windows():
    try:
        scene = embedded_window("8d3d061e518531d0@20", predict=6)
    except SourceError as error:
        pytest.skip(str(error))
    assert scene.scenario_id == "8d3d061e518531d0@20"
    assert scene.agent_ids[scene.scored()].sort().values.tolist() == [0, 4, 9, 39]
    assert float(scene.headings.abs().max()) < 3.1416
    (found,) = find_scenes(EMBEDDED, [scene.scenario_id], predict=6)
    assert torch.equal(found.positions, scene.positions)
    for wrong in ("8d3d061e518531d0", "8d3d061e518531d0@x", "feed@0", "8d3d061e518531d0@150"):
        with pytest.raises(ValueError, match=wrong.partition("@")[0]):
            embedded_window(wrong, predict=6)


def oracle() -> str:
    """An interpreter that can run the official code."""
    for python in (os.environ.get("ROTALITH_ORACLE"), str(ROOT / ".oracle/bin/python"), sys.executable):
        if python and Path(python).exists():
            probe = f"import importlib.util as u; assert all(u.find_spec(n) for n in {official_metrics.ORACLE})"
            if subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0:
                return python
    pytest.skip("no environment with Waymo's code: run `make oracle`, or point ROTALITH_ORACLE to its python")


@pytest.mark.slow
@pytest.mark.parametrize("year", [2025])
def test_official_code_agrees_on_a_real_scene(tmp_path, year):
    python = oracle()
    try:
        scene = embedded_window("8d3d061e518531d0@20", predict=8)
    except SourceError as error:
        pytest.skip(str(error))
    save_rollouts(tmp_path / "r.safetensors", [Rollouts.of_scene(scene, *constant_velocity(scene))])
    command = [
        python,
        "-m",
        "tools.official_metrics",
        "--rollouts",
        str(tmp_path / "r.safetensors"),
        "--year",
        str(year),
    ]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "scores.json")], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "scores.json").read_text())
    assert result["rollouts"] == 32
    assert len(result["scores"]) >= 19
    assert disagreements(result["scores"]) == []
    # Not ours against ours: the value that Waymo's code is known to give here.
    assert result["scores"]["metametric"]["official"] == pytest.approx(0.458542, abs=1e-5)
