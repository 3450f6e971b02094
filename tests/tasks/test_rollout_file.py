"""Files of rollouts: what is written is read, in the coordinates of the file; what is damaged is named."""

import pytest
import torch
from safetensors.torch import save_file

from tasks.rollout_file import FORMAT, RolloutFile, Rollouts, save_rollouts


def rollouts(name="a", agents=3, count=4, seed=0):
    states = torch.randn(agents, count, 80, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 6e3
    return Rollouts(name, torch.arange(agents) * 7 + 1, states)


class Place:
    """What `Rollouts` asks of a scene."""

    scenario_id = "a"
    origin = torch.tensor([6100.25, -3000.5, 12.0], dtype=torch.float64)
    agent_ids = torch.tensor([8, 15, 1, 4])


def test_round_trip(tmp_path):
    written = [rollouts("b", seed=1), rollouts("a@10", agents=1, count=32, seed=2), rollouts("c", agents=0)]
    save_rollouts(tmp_path / "deep" / "r.safetensors", iter(written))
    file = RolloutFile(tmp_path / "deep" / "r.safetensors")
    assert file.scenario_ids == ["a@10", "b", "c"]
    assert len(file) == 3
    assert "b" in file
    for one in written:
        read = file[one.scenario_id]
        assert torch.equal(read.states, one.states)
        assert torch.equal(read.agent_ids, one.agent_ids)
    assert [one.scenario_id for one in file] == file.scenario_ids
    with pytest.raises(KeyError, match="no rollouts of scenario d"):
        file["d"]


def test_coordinates_of_the_file():
    local = torch.randn(3, 2, 80, 4, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([2, 0, 1])
    placed = Rollouts.of_scene(Place, local, index)
    assert placed.agent_ids.tolist() == [1, 8, 15]
    torch.testing.assert_close(placed.states[..., :3], local[..., :3].double() + Place.origin, rtol=0, atol=0)
    assert torch.equal(placed.states[..., 3], local[..., 3].double())
    states, back = placed.in_scene(Place)
    assert torch.equal(back, index)
    torch.testing.assert_close(states, local.double(), rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="object 3, which the scenario lacks"):
        placed._replace(agent_ids=torch.tensor([1, 8, 3])).in_scene(Place)
    with pytest.raises(ValueError, match="don't belong to scenario a"):
        placed._replace(scenario_id="other").in_scene(Place)
    with pytest.raises(ValueError, match="scenario a: states"):
        Rollouts.of_scene(Place, local, index[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r._replace(scenario_id="a/b"), "can't name"),
        (lambda r: r._replace(states=r.states.float()), "float64"),
        (lambda r: r._replace(states=r.states[:, :, :79]), "80"),
        (lambda r: r._replace(agent_ids=r.agent_ids[:2]), "expected"),
        (lambda r: r._replace(agent_ids=torch.tensor([1, 1, 2])), "occurs twice"),
        (
            lambda r: r._replace(
                states=r.states.clone().index_put_(
                    tuple(map(torch.tensor, (1, 2, 3, 0))), torch.tensor(float("nan")).double()
                )
            ),
            "object 8, rollout 2, step 3",
        ),
    ],
)
def test_faults_are_named_and_nothing_is_written(tmp_path, change, message):
    path = tmp_path / "r.safetensors"
    save_rollouts(path, [rollouts()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        save_rollouts(path, [rollouts("fine"), change(rollouts())])
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["r.safetensors"]


def test_scenario_twice(tmp_path):
    with pytest.raises(ValueError, match="scenario a occurs twice"):
        save_rollouts(tmp_path / "r", [rollouts(), rollouts()])
    assert not list(tmp_path.iterdir())


def test_damaged_files(tmp_path):
    path = tmp_path / "r.safetensors"
    with pytest.raises(FileNotFoundError, match=r"r\.safetensors"):
        RolloutFile(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a safetensors file"):
        RolloutFile(path)
    save_rollouts(path, [rollouts()])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        RolloutFile(path)
    save_file({"a/ids": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a file of rollouts"):
        RolloutFile(path)
    save_file({"a/ids": torch.zeros(1, dtype=torch.int64)}, path, metadata=FORMAT)
    with pytest.raises(ValueError, match="key a/states"):
        RolloutFile(path)
    save_file({"a/ids": torch.zeros(1, dtype=torch.int64), "a/states": torch.zeros(1, 2, 3)}, path, metadata=FORMAT)
    with pytest.raises(ValueError, match="scenario a: ids"):
        RolloutFile(path)["a"]
