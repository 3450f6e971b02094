"""Every config composes, and every recipe builds its model with the paper's number of parameters."""

from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launch import extension, papers_resolutions, register_resolvers

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
register_resolvers()


def names(group):
    found = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    assert found, f"configs/{group} is empty"
    return found


def composed(*overrides, config="train"):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(config, overrides=["task=imagenet", *overrides], return_hydra_config=True)
    cfg.hydra.runtime.output_dir = "outputs/test"
    HydraConfig.instance().set_config(cfg)
    return cfg


def built(*overrides):
    with torch.device("meta"):
        return instantiate(composed(*overrides).model)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("experiment", names("experiment"))
def test_recipes_resolve_and_build(experiment):
    cfg = composed(f"experiment={experiment}", "datamodule.path=/data")
    OmegaConf.to_container(cfg.task, resolve=True)
    OmegaConf.to_container(cfg.trainer, resolve=True)
    with torch.device("meta"):
        task = instantiate(cfg.task)
    assert task.model.num_classes == 1000
    instantiate(cfg.callbacks)
    assert task.make_optimizer(task.parameter_groups()).param_groups[0]["lr"] == cfg.task.optimizer.lr
    header = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()
    for promised in ("2403.13298", "Expected", f"python train.py task=imagenet experiment={experiment}"):
        assert promised in header


VIT = {
    "small": {
        "axial": 21_984_232,
        "mixed": 21_988_840,
        "axial_ape": 22_059_496,
        "mixed_ape": 22_064_104,
        "ape": 22_059_496,
    },
    "base": {
        "axial": 86_434_792,
        "mixed": 86_444_008,
        "axial_ape": 86_585_320,
        "mixed_ape": 86_594_536,
        "ape": 86_585_320,
    },
    "large": {
        "axial": 304_174_056,
        "mixed": 304_198_632,
        "axial_ape": 304_374_760,
        "mixed_ape": 304_399_336,
        "ape": 304_374_760,
    },
}
SWIN = {
    "tiny": {"rpb": 28_288_354, "swin_axial": 28_265_032, "swin_mixed": 28_269_448},
    "small": {"rpb": 49_606_258, "swin_axial": 49_558_600, "swin_mixed": 49_567_624},
    "base": {"rpb": 87_768_224, "swin_axial": 87_704_680, "swin_mixed": 87_716_712},
}


@pytest.mark.parametrize(("size", "position"), [(s, p) for s in VIT for p in VIT[s]])
def test_vit_configs_count(size, position):
    model = built(f"model=vit_{size}", f"position={position}", "image_size=224", "model.num_classes=1000")
    assert parameters(model) == VIT[size][position]


@pytest.mark.parametrize(("size", "position"), [(s, p) for s in SWIN for p in SWIN[s]])
def test_swin_configs_count(size, position):
    overrides = (f"experiment=swin_{size}", f"position={position}", "datamodule.path=/data")
    assert parameters(built(*overrides)) == SWIN[size][position]


@pytest.mark.parametrize("position", names("position"))
def test_positions_compose(position):
    model = "model=vit_nano" if position in ("ape", "axial", "mixed", "axial_ape", "mixed_ape") else "model=swin_tiny"
    built(f"position={position}", model, "image_size=224")


@pytest.mark.parametrize("trainer", names("trainer"))
def test_trainers_compose(trainer):
    assert (
        OmegaConf.to_container(composed(f"trainer={trainer}").trainer, resolve=True)["use_distributed_sampler"] is False
    )


@pytest.mark.parametrize("scaling", names("rotary/scaling"))
def test_scalings_are_overridden_from_the_command_line(scaling):
    chosen = composed(f"rotary/scaling={scaling}", "position=axial", "resolution=96", config="evaluate")
    target = yaml.safe_load((CONFIGS / "rotary" / "scaling" / f"{scaling}.yaml").read_text())["_target_"]
    assert chosen.model.rotary.scaling._target_ == target
    assert chosen.extension == 3.0
    assert chosen.original_extent == 8


def test_the_table_of_extensions():
    assert [extension(a, b) for a, b in ((224, 224), (112, 224), (448, 224), ([224, 448], 224))] == [1, 1, 2, 2]


def test_the_papers_resolutions_in_proportion():
    assert papers_resolutions(224, 16) == "96,144,192,224,256,320,384,512"
    assert papers_resolutions([224, 160], 32) == "96,128,192,224,256,320,384,512"
    assert papers_resolutions(32, 4) == "12,20,28,32,36,44,56,72"


@pytest.mark.parametrize("sweep", names("sweep"))
def test_sweeps_compose(sweep):
    assert composed(f"sweep={sweep}", config="evaluate").hydra.sweeper.params


def test_targets_name_only_ours_lightnings_and_torchs_optimizers():
    allowed = {p.stem for p in CONFIGS.parent.glob("*.py")} | {
        p.name for p in CONFIGS.parent.iterdir() if (p / "__init__.py").is_file()
    }
    for path in CONFIGS.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            if "_target_:" in line:
                target = line.split("_target_:")[1].strip()
                fine = target.split(".")[0] in allowed | {"pytorch_lightning"} or target.startswith("torch.optim.")
                assert fine, f"{path.name}: {target}"
