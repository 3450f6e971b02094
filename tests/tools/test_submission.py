"""Submission archives: what is built passes, every fault is found and names its scenario and object."""

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from datamodules.embedded_source import SourceError, Wheel, cache_folder, fetch
from datamodules.protos.submission_pb2 import SimAgentsChallengeSubmission
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.tfrecord import write_tfrecord
from datamodules.waymo_scenario import read_scenario, write_scenario
from tasks.baselines import constant_velocity
from tasks.rollout_file import RolloutFile, Rollouts, save_rollouts
from tools import submission_check
from tools.submission import main, scenario_message, write_archive
from tools.submission_check import Simulated, check_archive, delimited

OFFICIAL = Wheel(
    "waymo-open-dataset-tf-2-12-0", "1.6.7", "963462582955fe7c13c559c8fb712c5a7d8f2404486af63b7964b3b8a84872f8"
)
METADATA = {
    "account_name": "somebody@example.org",
    "unique_method_name": "constant velocity",
    "authors": ["Somebody"],
    "affiliation": "Somewhere",
    "description": "All go on as they are.",
    "uses_lidar_data": False,
    "uses_camera_data": False,
    "uses_public_model_pretraining": False,
    "num_model_parameters": "0K",
    "acknowledge_complies_with_closed_loop_requirement": True,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three synthetic scenes as a TFRecord, their rollouts, their metadata and the archive built of them."""
    folder = tmp_path_factory.mktemp("submission")
    records = [write_scenario(synthetic_scene(seed, agents=8, later=2)) for seed in (0, 1, 2)]
    write_tfrecord(folder / "scenes.tfrecord", records)
    scenes = [read_scenario(record) for record in records]
    rollouts = [Rollouts.of_scene(scene, *constant_velocity(scene)) for scene in scenes]
    save_rollouts(folder / "first.safetensors", rollouts[:1])
    save_rollouts(folder / "rest.safetensors", rollouts[1:])
    (folder / "metadata.json").write_text(json.dumps(METADATA))
    code = main(
        [
            *("build", "--rollouts", str(folder / "first.safetensors"), str(folder / "rest.safetensors")),
            *("--metadata", str(folder / "metadata.json"), "--out", str(folder / "submission.tar.gz")),
            *("--scenes", str(folder / "scenes.tfrecord")),
        ]
    )
    assert code == 0
    return folder, scenes, rollouts


def shards_of(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def pack(path, shards, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in shards.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def whole(rollouts):
    message = SimAgentsChallengeSubmission(submission_type=1, **METADATA)
    message.scenario_rollouts.extend(scenario_message(one) for one in rollouts)
    return message


def one_shard(path, message):
    pack(path, {"submission.binproto-00000-of-00001": message.SerializeToString()})
    return path


def faults_of(world, tmp_path, message):
    _, scenes, _ = world
    known = {scene.scenario_id: Simulated.of_scene(scene) for scene in scenes}
    path = one_shard(tmp_path / "a.tar.gz", message)
    return check_archive(path, known.get, set(known), shards=1).faults


def test_built_archive_holds_the_rollouts(world):
    folder, _, rollouts = world
    shards = shards_of(folder / "submission.tar.gz")
    assert list(shards) == [f"submission.binproto-{number:05d}-of-00150" for number in range(150)]
    messages = [SimAgentsChallengeSubmission.FromString(content) for content in shards.values()]
    found = [scenario for message in messages for scenario in message.scenario_rollouts]
    assert [scenario.scenario_id for scenario in found] == sorted(one.scenario_id for one in rollouts)
    expected = {one.scenario_id: one for one in rollouts}
    for scenario in found:
        one = expected[scenario.scenario_id]
        for rollout, joint in enumerate(scenario.joint_scenes):
            for row, path in enumerate(joint.simulated_trajectories):
                assert path.object_id == one.agent_ids[row]
                values = np.array([path.center_x, path.center_y, path.center_z, path.heading], np.float32).T
                assert np.array_equal(values, one.states[row, rollout].numpy().astype(np.float32))
    for message in messages:
        assert message.submission_type == SimAgentsChallengeSubmission.SIM_AGENTS_SUBMISSION
        for name, value in METADATA.items():
            assert message.HasField(name) if name != "authors" else True
            assert getattr(message, name) == value


def test_built_archive_is_the_same_twice(world, tmp_path):
    folder, _, _ = world
    files = [RolloutFile(folder / name) for name in ("rest.safetensors", "first.safetensors")]
    message = SimAgentsChallengeSubmission(submission_type=1, **METADATA)
    write_archive(tmp_path / "again.tar.gz", message, files)
    assert (tmp_path / "again.tar.gz").read_bytes() == (folder / "submission.tar.gz").read_bytes()


def test_validate_passes_and_says_what_it_saw(world, capsys):
    folder, scenes, _ = world
    assert main(["validate", str(folder / "submission.tar.gz"), "--scenes", str(folder / "scenes.tfrecord")]) == 0
    objects = sum(len(scene.simulated()) for scene in scenes)
    assert f"no fault in 3 scenarios, {objects} objects, 150 shards" in capsys.readouterr().out


def scenario(message):
    return message.scenario_rollouts[1]


def joint(message):
    return scenario(message).joint_scenes[5]


def path_of(message):
    return joint(message).simulated_trajectories[2]


FAULTS = {
    "31 rollouts": (lambda m: scenario(m).joint_scenes.pop(), "rollouts", "31 rollouts instead of 32"),
    "33 rollouts": (lambda m: scenario(m).joint_scenes.add().CopyFrom(joint(m)), "rollouts", "33 rollouts"),
    "79 steps": (
        lambda m: [path_of(m).center_y.pop(), path_of(m).heading.pop()],
        "steps",
        "79 of center_y, 79 of heading",
    ),
    "81 steps": (lambda m: path_of(m).center_z.append(1.0), "steps", "81 of center_z"),
    "missing agent": (lambda m: joint(m).simulated_trajectories.pop(2), "missing object", "is missing"),
    "object twice": (
        lambda m: joint(m).simulated_trajectories.add().CopyFrom(path_of(m)),
        "duplicate object",
        "occurs twice",
    ),
    "NaN": (lambda m: path_of(m).heading.__setitem__(7, float("nan")), "not finite", "heading is nan at step 7"),
    "infinite": (lambda m: path_of(m).center_x.__setitem__(0, float("inf")), "not finite", "center_x is inf at step 0"),
    "no object_id": (lambda m: path_of(m).ClearField("object_id"), "object_id", "object_id isn't set"),
    "other coordinates": (
        lambda m: path_of(m).center_x.__setitem__(slice(None), [1e6] * 80),
        "coordinates",
        "m from where it was recorded",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_names_scenario_and_object(world, tmp_path, name):
    change, kind, text = FAULTS[name]
    message = whole(world[2])
    identity = path_of(message).object_id
    change(message)
    faults = faults_of(world, tmp_path, message)
    assert kind in faults.counts, faults.texts
    found = next(each for each in faults.texts if text in each)
    assert f"scenario {scenario(message).scenario_id}" in found
    if kind != "rollouts":
        assert "rollout 5" in found
        assert re.search(rf"object {0 if name == 'no object_id' else identity}\b", found)
    if name not in ("no object_id",):  # without its id the object is also missing, and object 0 too many
        assert faults.total == 1


def test_object_that_is_not_valid_now(world, tmp_path):
    _, scenes, rollouts = world
    message = whole(rollouts)
    scene = scenes[1]
    other = int(scene.agent_ids[~scene.valid[:, scene.current]][0])  # it appears later
    path_of(message).object_id = other
    faults = faults_of(world, tmp_path, message)
    assert faults.counts == {"missing object": 1, "extra object": 1}
    assert any(f"object {other}: isn't to be simulated; it is not valid at step 10" in text for text in faults.texts)


def test_object_that_ended_before_now(tmp_path):
    scene = synthetic_scene(0, agents=8)
    gone = int(scene.simulated()[-1])
    valid = scene.valid.clone()
    valid[gone, scene.current :] = False
    states, index = constant_velocity(scene)
    message = whole([Rollouts.of_scene(scene, states, index)])
    known = {scene.scenario_id: Simulated.of_scene(scene._replace(valid=valid))}
    faults = check_archive(one_shard(tmp_path / "a.tar.gz", message), known.get, shards=1).faults
    assert faults.counts == {"extra object": 32}
    assert f"scenario {scene.scenario_id}, rollout 0, object {int(scene.agent_ids[gone])}" in faults.texts[0]


def test_scenarios(world, tmp_path):
    message = whole(world[2])
    message.scenario_rollouts.add().CopyFrom(scenario(message))
    name = scenario(message).scenario_id
    faults = faults_of(world, tmp_path, message)
    assert faults.counts == {"duplicate scenario": 1}
    assert name in faults.texts[0]

    del message.scenario_rollouts[1], message.scenario_rollouts[-1]
    faults = faults_of(world, tmp_path, message)
    assert faults.texts == [f"scenario {name}: is missing"]

    message.scenario_rollouts[0].scenario_id = "feed"
    faults = faults_of(world, tmp_path, message)
    assert faults.counts == {"unknown scenario": 1, "missing scenario": 2}
    message.scenario_rollouts[0].ClearField("scenario_id")
    assert faults_of(world, tmp_path, message).counts["scenario_id"] == 1


@pytest.mark.parametrize("field", submission_check.REQUIRED)
def test_required_metadata(world, tmp_path, field):
    message = whole(world[2])
    message.ClearField(field)
    faults = faults_of(world, tmp_path, message)
    assert faults.counts == {"metadata": 1}
    assert field in faults.texts[0]


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("submission_type", 0, "submission_type"),
        ("num_model_parameters", "seven million", "metadata"),
        ("account_name", "somebody", "metadata"),
        ("acknowledge_complies_with_closed_loop_requirement", False, "metadata"),
        ("uses_public_model_pretraining", True, "metadata"),
    ],
)
def test_wrong_metadata(world, tmp_path, field, value, kind):
    message = whole(world[2])
    setattr(message, field, value)
    assert faults_of(world, tmp_path, message).counts == {kind: 1}


def test_kinds_of_archive(world, tmp_path):
    folder, _, rollouts = world
    shard = {"submission.binproto-00000-of-00001": whole(rollouts).SerializeToString()}
    pack(tmp_path / "plain.tar.gz", shard, "w")
    pack(tmp_path / "packed.tar", shard)
    (tmp_path / "lone.tar.gz").write_bytes(gzip.compress(next(iter(shard.values()))))
    (tmp_path / "empty.tar.gz").write_bytes(b"")
    (tmp_path / "short.tar.gz").write_bytes((folder / "submission.tar.gz").read_bytes()[:-5000])
    expected = {
        "plain.tar.gz": "uncompressed tar",
        "packed.tar": r"\.tar\.gz",
        "lone.tar.gz": "damaged",
        "empty.tar.gz": "no gzip file",
    }
    for name, text in expected.items():
        faults = check_archive(tmp_path / name, shards=1).faults
        assert faults.counts["archive"] == 1
        assert re.search(text, faults.texts[0]), faults.texts
    assert check_archive(tmp_path / "short.tar.gz").faults.counts["archive"] == 1


def test_names_of_shards(world, tmp_path):
    folder, _, _ = world
    shards = shards_of(folder / "submission.tar.gz")
    content = dict(shards)
    last = content.pop("submission.binproto-00149-of-00150")
    pack(tmp_path / "a.tar.gz", content)
    faults = check_archive(tmp_path / "a.tar.gz").faults
    assert faults.counts == {"shard count": 1}
    assert "the first is number 149" in faults.texts[0]
    for name in ("submission.binproto-00149-of-00151", "folder/submission.binproto-00149-of-00150", "notes.txt"):
        pack(tmp_path / "a.tar.gz", content | {name: last})
        assert check_archive(tmp_path / "a.tar.gz").faults.counts == {"shard name": 1, "shard count": 1}
    pack(
        tmp_path / "a.tar.gz",
        content | {"submission.binproto-00149-of-00150": last, "other.binproto-00149-of-00150": last},
    )
    faults = check_archive(tmp_path / "a.tar.gz").faults
    assert faults.counts["shard name"] == 1
    pack(tmp_path / "a.tar.gz", content | {"submission.binproto-00149-of-00150": last[:-3]})
    faults = check_archive(tmp_path / "a.tar.gz").faults
    assert faults.counts["message"] == 1
    assert "submission.binproto-00149-of-00150" in faults.texts[0]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\x0a\x80\x80\x80\x80\x80\x20abc", "a field of 1099511627776 bytes"),
        (b"\x0a" + b"\xff" * 9 + b"\x7fabc", "a field of 1180591620717411303423 bytes"),
        (delimited(1, delimited(1, b"\xff")), r"scenario_id b'\xff' isn't UTF-8"),
        (delimited(3, b"\xff"), "account_name isn't UTF-8"),
        (delimited(5, b"\xff"), "authors isn't UTF-8"),
        (delimited(7, b"a" * (1 << 20)), "more than 1048576 bytes beside the scenarios"),
    ],
)
def test_hostile_shards(tmp_path, content, text):
    pack(tmp_path / "a.tar.gz", {"submission.binproto-00000-of-00001": content})
    faults = check_archive(tmp_path / "a.tar.gz", shards=1).faults
    assert any("submission.binproto-00000-of-00001" in each and text in each for each in faults.texts), faults.texts


def test_shards_must_agree(world, tmp_path):
    message = whole(world[2])
    shards = {"s.binproto-00000-of-00002": message.SerializeToString()}
    other = SimAgentsChallengeSubmission(submission_type=1, **(METADATA | {"unique_method_name": "another"}))
    pack(tmp_path / "a.tar.gz", shards | {"s.binproto-00001-of-00002": other.SerializeToString()})
    assert check_archive(tmp_path / "a.tar.gz", shards=2).faults.counts == {"metadata": 1}


def test_faults_are_capped_and_counted(world, tmp_path, capsys):
    message = whole(world[2])
    for each in message.scenario_rollouts:
        for scene in each.joint_scenes:
            scene.simulated_trajectories[0].heading.pop()
    path = one_shard(tmp_path / "a.tar.gz", message)
    assert main(["validate", str(path), "--limit", "4"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("fault: ") == 4
    assert "96 × steps" in errors
    assert "not listed" in errors


def test_build_writes_nothing_when_there_are_faults(world, tmp_path, capsys):
    folder, _, rollouts = world
    save_rollouts(tmp_path / "few.safetensors", [one._replace(states=one.states[:, :31]) for one in rollouts])
    out = tmp_path / "out"
    arguments = ["build", "--metadata", str(folder / "metadata.json"), "--out", str(out / "s.tar.gz"), "--rollouts"]
    assert main([*arguments, str(tmp_path / "few.safetensors")]) == 2
    assert "31 rollouts instead of 32" in capsys.readouterr().err
    assert main([*arguments, str(folder / "first.safetensors"), str(folder / "first.safetensors")]) == 2
    assert f"scenario {rollouts[0].scenario_id} is in" in capsys.readouterr().err
    assert main([*arguments[:-2], str(out / "s.zip"), "--rollouts", str(folder / "first.safetensors")]) == 2
    assert ".tar.gz" in capsys.readouterr().err
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("no json", "not metadata"),
        ("[1]", "not metadata"),
        (json.dumps(METADATA | {"parameters": "7M"}), "parameters"),
        (json.dumps(METADATA | {"scenario_rollouts": [{"scenario_id": "a"}]}), "scenario_rollouts"),
        (json.dumps({key: value for key, value in METADATA.items() if key != "uses_camera_data"}), "uses_camera_data"),
    ],
)
def test_metadata_file(world, tmp_path, capsys, content, text):
    (tmp_path / "m.json").write_text(content)
    rollouts = str(world[0] / "first.safetensors")
    assert (
        main(
            [
                "build",
                "--metadata",
                str(tmp_path / "m.json"),
                "--out",
                str(tmp_path / "s.tar.gz"),
                "--rollouts",
                rollouts,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert text in error
    assert "m.json" in error


def test_missing_files(tmp_path, capsys):
    assert main(["validate", str(tmp_path / "none.tar.gz")]) == 2
    assert "none.tar.gz" in capsys.readouterr().err


def test_official_sample():
    """Waymo's own sample, which is from before some metadata became required."""
    try:
        (path,) = fetch([OFFICIAL], cache_folder() / "wheels")
    except SourceError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(path) as wheel:
        content = wheel.read("waymo_open_dataset/utils/sim_agents/testdata/test_submission.binproto")
    message = SimAgentsChallengeSubmission.FromString(content)
    assert message.SerializeToString() == content
    (rollouts,) = message.scenario_rollouts
    assert rollouts.scenario_id == "637f20cafde22ff8"
    assert len(rollouts.joint_scenes) == 32
    ids = [path.object_id for path in rollouts.joint_scenes[0].simulated_trajectories]
    assert len(ids) == 50
    faults = submission_check.Faults()
    places = np.array(
        [[path.center_x[0], path.center_y[0]] for path in rollouts.joint_scenes[0].simulated_trajectories]
    )
    order = np.argsort(ids)
    submission_check.check_scenario(rollouts, "sample", Simulated(np.array(ids)[order], places[order]), faults)
    assert faults.texts == []


def test_command_line(world):
    folder, _, _ = world
    command = [sys.executable, "-m", "tools.submission", "validate", str(folder / "submission.tar.gz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "give --scenes" in done.stdout
