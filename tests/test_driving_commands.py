"""The driving commands as a user types them: train, resume, evaluate, sweep, from Waymo's files to a submission; and one line
for what can't work."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from test_commands import ROOT, run

import launch
import train
from datamodules.embedded_scenes import load_embedded
from datamodules.embedded_source import SourceError
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.tfrecord import write_tfrecord
from datamodules.waymo_example import write_example
from datamodules.waymo_scenario import read_scenario, write_scenario
from tasks.rollout_file import RolloutFile, save_rollouts

TINY = [
    "model.width=16",
    "model.heads=2",
    "model.head_dim=8",
    "datamodule.batch_size=2",
    "datamodule.max_pieces=128",
    "datamodule.num_workers=0",
    "trainer.accelerator=cpu",
    "threads=1",
]
TOKENS = "head.vocabulary.size=32"
MADE_UP = [
    "task=trajectory",
    "datamodule=scenes_synthetic",
    *(f"datamodule.{split}.{key}" for split in ("train", "val") for key in ("count=4", "agents=4")),
    "task.schedule.warmup=0",
    *TINY,
    TOKENS,
]
POLICIES = {"model", "constant_velocity", "log_replay"}
METADATA = {
    "account_name": "somebody@example.org",
    "unique_method_name": "made up",
    "uses_lidar_data": False,
    "uses_camera_data": False,
    "uses_public_model_pretraining": False,
    "num_model_parameters": "20K",
    "acknowledge_complies_with_closed_loop_requirement": True,
}


def rows_in(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def weights(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def tool(name, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", f"tools.{name}", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A run of one epoch on made-up traffic."""
    path = tmp_path_factory.mktemp("made_up")
    run("train.py", *MADE_UP, "epochs=1", f"hydra.run.dir={path}")
    return path


def test_recordings_are_learned_from_and_driven_in(tmp_path):
    try:
        load_embedded()
    except SourceError as error:
        pytest.skip(f"the embedded scenes cannot be fetched: {error}")
    trained, evaluated, results = tmp_path / "trained", tmp_path / "evaluated", tmp_path / "results.csv"
    few = ["trainer=smoke", "task.schedule.warmup=0", "datamodule.max_agents=24", *TINY, TOKENS]
    done = run("train.py", "task=trajectory", *few, f"hydra.run.dir={trained}")
    assert f"run folder: {trained}" in done.stdout
    with (trained / "csv/version_0/metrics.csv").open() as file:
        assert all(float(row["val/loss"]) > 0 for row in csv.DictReader(file) if row["val/loss"])

    one = ["trainer=smoke", "trainer.limit_test_batches=1", "datamodule.batch_size=1", "task.rollouts=2"]
    where = [f"results={results}", f"hydra.run.dir={evaluated}"]
    done = run("evaluate.py", "task=trajectory", f"ckpt={trained}/last.ckpt", *one, *where)
    rows = {row["policy"]: row for row in rows_in(results)}
    assert rows.keys() == POLICIES
    assert all(0 < float(row["metametric"]) < 1 and float(row["scenarios"]) == 1 for row in rows.values())
    assert rows["log_replay"]["min_ade"] == "0.0"
    assert float(rows["model"]["loss"]) > 0
    assert rows["constant_velocity"]["loss"] == ""
    assert all(name in done.stdout for name in (*POLICIES, "metametric", "min_ade", "miss_rate"))
    (picture,), (animation,) = evaluated.glob("*.png"), evaluated.glob("*.gif")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert animation.read_bytes().startswith(b"GIF8")
    assert str(picture) in done.stdout
    (rollouts,) = RolloutFile(evaluated / "rollouts.safetensors")
    assert rollouts.scenario_id == picture.stem
    assert rollouts.states.shape[1:] == (2, 80, 4)


BAD = {
    "pos": (["pos=polar"], "Could not find 'pos/polar'"),
    "head": (["head=sphere"], "Could not find 'head/sphere'"),
    "key": (["task.policy=false"], "Key 'policy' is not in struct"),
    "head width": (["head.dim=24"], "width=16, but its head reads dim=24"),
    "heads": (["model.heads=0"], "heads=0"),
    "odd head": (["model.head_dim=7"], "head_dim=7"),
    "closed loop": (["task.closed_loop=0"], "task.closed_loop is 0"),
    "half a loop": (["task.closed_loop=2.5"], "task.closed_loop is 2.5"),
    "rollouts": (["task.rollouts=0"], "task.rollouts is 0"),
    "rollouts at once": (["task.rollouts_at_once=0"], "task.rollouts_at_once is 0"),
    "top k": (["task.top_k=0"], "task.top_k is 0"),
    "temperature": (["task.temperature=-1"], "task.temperature is -1"),
    "smoothing": (["task.smoothing=1"], "task.smoothing is 1"),
    "no number": (["task.smoothing=much"], "task.smoothing is much"),
    "stretch": (["datamodule.stretch=0.5"], "datamodule.stretch is 0.5"),
    "agents": (["datamodule.max_agents=0"], "datamodule.max_agents is 0"),
    "batch": (["datamodule.batch_size=0"], "datamodule.batch_size is 0"),
    "large batch": (["datamodule.batch_size=5"], "4 training scenes make no batch of 5"),
    "no scenes": (["datamodule.train.count=0"], "datamodule.train: its source has no scenes"),
    "no range": (["datamodule.train.agents=[9,3]"], "agents=[9, 3]"),
    "tolerances": (["head.vocabulary.tolerances=[0.1]"], "(0.1,), expected 3 numbers"),
    "checkpoint": (["ckpt=/nowhere.ckpt"], "/nowhere.ckpt"),
    "resume what": (["resume=true"], "resume=true needs ckpt=PATH"),
}
WOMD = ["task=trajectory", "datamodule=scenes_womd", "task.schedule.warmup=0", *TINY]
RECORDED = "vocabulary@head.vocabulary=recorded"
BAD_WOMD = {
    "no path": ([], "datamodule.path"),
    "no folder": (["datamodule.path=/nowhere"], "/nowhere/training holds no *.scenes; make shards with"),
    "no tokens named": ([RECORDED, "datamodule.path=/nowhere"], "head.vocabulary.path"),
    "no tokens": (
        [RECORDED, "datamodule.path=/nowhere", "head.vocabulary.path=/no.safetensors"],
        "/no.safetensors: no such vocabulary",
    ),
    "experiment": (["experiment=agents_nano"], "datamodule.path"),
}
CASES = {
    **{name: ([*MADE_UP, *arguments], message) for name, (arguments, message) in BAD.items()},
    **{f"womd, {name}": ([*WOMD, *arguments], message) for name, (arguments, message) in BAD_WOMD.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_line_before_training(case, tmp_path, monkeypatch, capfd):
    """In this process, for its imports take longer than all of the cases; what a user types reaches `train.main` so too."""
    arguments, message = CASES[case]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"hydra.run.dir={tmp_path}"])
    launch.given_arguments(sys.argv)
    try:
        with pytest.raises(SystemExit) as ended:
            train.main()
    finally:
        GlobalHydra.instance().clear()
    said = "".join(capfd.readouterr())
    assert ended.value.code
    assert sum(message in line for line in said.splitlines()) == 1, said
    assert "Traceback" not in said
    assert "Epoch 0" not in said
    assert not (tmp_path / "last.ckpt").exists()


def test_a_checkpoint_of_another_architecture_is_named(made_up, tmp_path):
    results = tmp_path / "results.csv"
    done = run("evaluate.py", f"ckpt={made_up}/last.ckpt", "model.agent_layers=2", f"results={results}", ok=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{made_up}/last.ckpt" in line
    assert "blocks.1" in line
    assert "Traceback" not in done.stderr
    assert not results.exists()


WITHOUT = """
import compat, runpy, sys
sys.modules[{missing!r}] = None
sys.argv = {argv!r}
runpy.run_{how}({target!r}, run_name="__main__")
"""
SCENES = ["train.py", *WOMD, TOKENS, "datamodule.path=/nowhere"]
USERS = {
    "shards": ("google_crc32c", "path", "train.py", [*SCENES, "hydra.run.dir=/dev/null"]),
    "conversion": ("google_crc32c", "module", "tools.waymo_to_shards", ["waymo_to_shards", "in", "out"]),
    "submission": ("google_crc32c", "module", "tools.submission", ["submission", "validate", "x.tar.gz"]),
    "submission, no protobuf": (
        "google.protobuf",
        "module",
        "tools.submission",
        ["submission", "validate", "x.tar.gz"],
    ),
}


@pytest.mark.parametrize("user", USERS)
def test_without_the_extra_its_command_is_named(user, tmp_path):
    missing, how, target, argv = USERS[user]
    argv = [argument.replace("/dev/null", str(tmp_path)) for argument in argv]
    code = WITHOUT.format(missing=missing, how=how, target=target, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "pip install -e '.[train,waymo]'" in last
    assert missing in last


@pytest.mark.slow
def test_resuming_changes_nothing(tmp_path):
    # without a schedule, which would have to know how far the run goes
    common = [*(key for key in MADE_UP if "schedule" not in key), "task.schedule=null"]
    run("train.py", *common, "epochs=2", f"hydra.run.dir={tmp_path / 'whole'}")
    run("train.py", *common, "epochs=1", f"hydra.run.dir={tmp_path / 'half'}")
    ckpt = f"ckpt={tmp_path / 'half' / 'last.ckpt'}"
    run("train.py", *common, "epochs=2", ckpt, "resume=true", f"hydra.run.dir={tmp_path / 'rest'}")
    half, whole, rest = (weights(tmp_path / name) for name in ("half", "whole", "rest"))
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    assert all(torch.equal(rest[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_sweep_of_agents_tells_what_they_cost(made_up, tmp_path):
    results = tmp_path / "results.csv"
    points = "hydra.sweeper.params={agents: '4,16'}"
    where = [f"results={results}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = run("evaluate.py", f"ckpt={made_up}/last.ckpt", "sweep=agents", points, "task.rollouts=2", *where)
    rows = {row["agents"]: row for row in rows_in(results) if row["policy"] == "model"}
    assert rows.keys() == {"4", "16"}
    assert float(rows["4"]["saved_bytes"]) < float(rows["16"]["saved_bytes"])
    assert all(float(row[cost]) > 0 for row in rows.values() for cost in ("train_step_s", "rollout_step_ms"))
    assert (tmp_path / "sweep_agents.png").read_bytes().startswith(b"\x89PNG")
    assert "by agents" in done.stdout


@pytest.mark.slow
def test_a_sweep_of_positions_takes_each_from_its_run(tmp_path):
    for pos in ("drope_intra", "none"):
        run("train.py", *MADE_UP, "epochs=1", f"pos={pos}", f"hydra.run.dir={tmp_path / f'{pos}-seed0'}")
    results = tmp_path / "results.csv"
    points = "hydra.sweeper.params={pos: 'drope_intra,none', seed: '0'}"
    where = [f"results={results}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    few = ["datamodule.test.count=2", "datamodule.test.agents=4", "task.rollouts=2"]
    done = run("evaluate.py", f"ckpt={tmp_path}", "sweep=pos", points, *few, *where)
    rows = {row["pos"]: row for row in rows_in(results) if row["policy"] == "model"}
    assert rows.keys() == {"drope_intra", "none"}
    assert {row["ckpt"] for row in rows.values()} == {f"{tmp_path}/{pos}-seed0/last.ckpt" for pos in rows}
    assert rows["none"]["loss"] != rows["drope_intra"]["loss"]
    assert "by pos" in done.stdout


TWO = ["trainer=ddp", "trainer.devices=2"]


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path):
    """A loss is a mean over the tokens of its batch, of which ranks have different numbers: one process that adds up the
    gradients of the same two batches takes the same step."""
    common = [
        *MADE_UP,
        "datamodule.batch_size=1",
        "optimizer@task.optimizer=adamw",
        "task.optimizer.lr=1e-3",
        "epochs=2",
    ]
    run("train.py", *common, "trainer.accumulate_grad_batches=2", f"hydra.run.dir={tmp_path / 'one'}")
    run("train.py", *common, *TWO, f"hydra.run.dir={tmp_path / 'two'}")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        # Adam divides by the root of the squared gradient: rounding in a small gradient moves its weight
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_two_processes_score_as_one(made_up, tmp_path):
    few = ["datamodule.test.count=3", "datamodule.test.agents=4", "datamodule.batch_size=1", "task.rollouts=3"]
    common = [f"ckpt={made_up}/last.ckpt", *few]
    found = {}
    for name, processes in (("one", ["trainer.accelerator=cpu"]), ("two", [*TWO, "trainer.accelerator=cpu"])):
        results = tmp_path / f"{name}.csv"
        run("evaluate.py", *common, *processes, f"results={results}", f"hydra.run.dir={tmp_path / name}")
        found[name] = rows_in(results)
    assert [row["policy"] for row in found["two"]] == [row["policy"] for row in found["one"]]
    for one, two in zip(found["one"], found["two"], strict=True):
        assert float(two["scenarios"]) == 3
        for key, value in one.items():
            if key in ("ckpt", "git", "model", "head", "policy", "split", "seed") or value == "":
                assert two[key] == value, key
            else:  # sums in another order, rounded to 1e-6 in the file
                assert float(two[key]) == pytest.approx(float(value), rel=1e-5, abs=2e-6), key
    files = [RolloutFile(tmp_path / "two" / f"rollouts{rank}.safetensors") for rank in ("", "-rank1")]
    whole = RolloutFile(tmp_path / "one" / "rollouts.safetensors")
    assert sorted(name for file in files for name in file.scenario_ids) == whole.scenario_ids
    for file in files:
        for rollouts in file:
            assert torch.allclose(rollouts.states, whole[rollouts.scenario_id].states, atol=1e-4)


@pytest.mark.slow
def test_from_waymos_files_to_a_submission(tmp_path):
    """docs/womd.md, with made-up scenes in Waymo's formats."""
    raw, shards = tmp_path / "raw", tmp_path / "shards"
    scenes = {
        split: [synthetic_scene(seed, agents=6, crossings=1, turns=1) for seed in range(first, first + 4)]
        for split, first in (("training", 0), ("validation", 100))
    }
    records = {split: [write_scenario(scene) for scene in made] for split, made in scenes.items()}
    records["training"][2:] = [write_example(scene, rows=4000) for scene in scenes["training"][2:]]
    for split, data in records.items():
        (raw / split).mkdir(parents=True)
        for part in (0, 1):
            name = f"{split}.tfrecord-0000{part}-of-00002"
            write_tfrecord(raw / split / name, data[2 * part : 2 * part + 2])
        done = tool("waymo_to_shards", raw / split, shards / split, "--dataset-version", "1.3.0")
        assert "4 scenes with 24 agents in 2 shards" in done.stdout
    tokens = tmp_path / "tokens.safetensors"
    source = raw / "training" / "training.tfrecord-00000-of-00002"
    tool("vocabulary", "build", "--source", source, "--size", 48, "--tolerance", 0.05, "--out", tokens)

    recipe = [
        f"datamodule.path={shards}",
        f"head.vocabulary.path={tokens}",
        "datamodule.batch_size=2",
        "datamodule.num_workers=1",
        "trainer.accelerator=cpu",
        "threads=1",
    ]
    trained, tuned, evaluated = tmp_path / "trained", tmp_path / "tuned", tmp_path / "evaluated"
    run("train.py", "task=trajectory", "experiment=agents_nano", *recipe, "epochs=1", f"hydra.run.dir={trained}")
    shape = ["experiment=agents_tiny_closed_loop", "model=agents_nano", f"ckpt={trained}/last.ckpt"]
    run("train.py", "task=trajectory", *shape, *recipe, "epochs=1", f"hydra.run.dir={tuned}")
    before, after = weights(trained), weights(tuned)
    assert torch.equal(before["model.head.motions"], after["model.head.motions"])
    assert not torch.equal(before["model.head.logits.maps.0.weight"], after["model.head.logits.maps.0.weight"])
    small = [f"results={tmp_path / 'results.csv'}", f"hydra.run.dir={evaluated}", "datamodule.batch_size=1"]
    run("evaluate.py", "task=trajectory", f"ckpt={tuned}/last.ckpt", *small)
    assert {row["policy"]: float(row["scenarios"]) for row in rows_in(tmp_path / "results.csv")} == dict.fromkeys(
        POLICIES, 4.0
    )

    metadata, rollouts = tmp_path / "metadata.json", evaluated / "rollouts.safetensors"
    metadata.write_text(json.dumps(METADATA))
    archive, lacking = tmp_path / "submission.tar.gz", tmp_path / "lacking.tar.gz"
    build = ("submission", "build", "--metadata", metadata, "--rollouts")
    tool(*build, rollouts, "--out", archive, "--scenes", raw / "validation")
    done = tool("submission", "validate", archive, "--scenes", raw / "validation")
    agents = sum(len(read_scenario(record).simulated()) for record in records["validation"])
    assert f"no fault in 4 scenarios, {agents} objects" in done.stdout

    first, *others = RolloutFile(rollouts)
    gone = int(first.agent_ids[-1])
    fewer = first._replace(agent_ids=first.agent_ids[:-1], states=first.states[:-1].contiguous())
    save_rollouts(tmp_path / "fewer.safetensors", [fewer, *others])
    tool(*build, tmp_path / "fewer.safetensors", "--out", lacking)  # without scenes nobody can tell
    done = tool("submission", "validate", lacking, "--scenes", raw / "validation", code=2)
    assert f"scenario {first.scenario_id}" in done.stderr
    assert f"object {gone}" in done.stderr
    refused = tool(
        *build, tmp_path / "fewer.safetensors", "--out", tmp_path / "no.tar.gz", "--scenes", raw / "validation", code=2
    )
    assert f"object {gone}" in refused.stderr
    assert not (tmp_path / "no.tar.gz").exists()
