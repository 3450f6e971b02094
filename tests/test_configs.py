"""Every config composes, and every recipe builds its model with the paper's number of parameters."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launch import extension, papers_resolutions, register_resolvers
from models.vocabulary import Vocabulary, save

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
register_resolvers()


def names(group):
    found = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    assert found, f"configs/{group} is empty"
    return found


def header(experiment):
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def experiments(task):
    """Those whose header says how to train them in a task; each says so for exactly one."""
    commands = re.compile(r"python train\.py task=(\w+) experiment=(\w+)")
    told = {name: set(commands.findall(header(name))) for name in names("experiment")}
    assert all(len(found) == 1 and {of for _, of in found} == {name} for name, found in told.items()), told
    return [name for name, found in told.items() if (task, name) in found]


def composed(*overrides, config="train", task="imagenet"):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(config, overrides=[f"task={task}", *overrides], return_hydra_config=True)
    cfg.hydra.runtime.output_dir = "outputs/test"
    HydraConfig.instance().set_config(cfg)
    return cfg


def built(*overrides):
    with torch.device("meta"):
        return instantiate(composed(*overrides).model)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("experiment", experiments("imagenet"))
def test_recipes_resolve_and_build(experiment):
    cfg = composed(f"experiment={experiment}", "datamodule.path=/data")
    OmegaConf.to_container(cfg.task, resolve=True)
    OmegaConf.to_container(cfg.trainer, resolve=True)
    with torch.device("meta"):
        task = instantiate(cfg.task)
    assert task.model.num_classes == 1000
    instantiate(cfg.callbacks)
    assert task.make_optimizer(task.parameter_groups()).param_groups[0]["lr"] == cfg.task.optimizer.lr
    assert "2403.13298" in header(experiment)
    assert "Expected" in header(experiment)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save(
        Vocabulary(torch.randn(3, 2048, 5, 3), torch.tensor([2048] * 3), (0.05,) * 3),
        path,
        "noise, of the size that counts",
    )
    return path


WOMD = [name for name in experiments("trajectory") if name.startswith("agents_")]


@pytest.mark.parametrize("experiment", experiments("trajectory"))
def test_driving_experiments_resolve_and_build(experiment, tokens):
    files = ["datamodule.path=/data", f"head.vocabulary.path={tokens}"] if experiment in WOMD else []
    cfg = composed(f"experiment={experiment}", *files, task="trajectory")
    OmegaConf.to_container(cfg.trainer, resolve=True)
    task = instantiate(cfg.task)
    instantiate(cfg.callbacks)
    instantiate(cfg.evaluation.callbacks)
    instantiate(cfg.datamodule)
    assert cfg.task.optimizer.lr in {group["lr"] for group in task.make_optimizer(task.parameter_groups()).param_groups}
    assert "2503.15029" in header(experiment)
    assert "Expected" in header(experiment)


@pytest.mark.parametrize("experiment", experiments("lm"))
def test_language_experiments_resolve_and_build(experiment):
    files = [] if experiment == "lm_shakespeare" else ["datamodule.path=/data"]
    cfg = composed(f"experiment={experiment}", *files, task="lm")
    OmegaConf.to_container(cfg.trainer, resolve=True)
    with torch.device("meta"):
        task = instantiate(cfg.task)
    instantiate(cfg.callbacks)
    instantiate(cfg.datamodule)
    assert cfg.task.optimizer.lr in {group["lr"] for group in task.make_optimizer(task.parameter_groups()).param_groups}
    assert cfg.segment == 4 * task.model.chunk
    assert cfg.trainer.limit_train_batches is None  # all of the text
    beside = (
        parameters(task.model) - 2 * task.model.embed.weight.numel()
        if experiment == "lm_base"
        else parameters(task.model)
    )
    assert re.search(r"([\d.]+) M parameters", header(experiment))[1] in (f"{beside / 1e6:.0f}", f"{beside / 1e6:.1f}")
    assert "2507.00453" in header(experiment).replace("\n# ", " ")
    assert "Expected" in header(experiment)


# arXiv 2403.13298 with detrex's DINO, BEiT v2's UperNet and usual values of Mask2Former: learning rate, weight decay, clipping;
# drop path, pixels, images a rank; what divides the rate, its schedule; the published figure of mixed
VIT = ("BackboneScaled", 0.1)
BEIT = ("LayerDecay", 0.75)
DENSE_RECIPES = {
    "coco_dino_swin_tiny": (1e-4, 1e-4, 0.1, 0.1, 800, 2, VIT, {"at": [0.91667], "warmup_steps": 0}, "51.8"),
    "coco_dino_swin_small": (1e-4, 1e-4, 0.1, 0.1, 800, 2, VIT, {"at": [0.91667], "warmup_steps": 0}, "53.3"),
    "coco_dino_swin_base": (1e-4, 1e-4, 0.1, 0.1, 800, 2, VIT, {"at": [0.91667], "warmup_steps": 0}, "54.5"),
    "coco_dino_vit_base": (1e-4, 1e-4, 0.1, 0.1, 800, 2, VIT, {"at": [0.91667], "warmup_steps": 0}, "51.2"),
    "coco_dino_vit_large": (1e-4, 1e-4, 0.1, 0.4, 800, 2, VIT, {"at": [0.8], "warmup_steps": 250}, "52.9"),
    "coco_rt_detr_vit_base": (1e-4, 1e-4, 0.1, 0.1, 800, 2, VIT, {"at": [0.91667], "warmup_steps": 0}, None),
    "ade20k_mask2former_swin_small": (1e-4, 0.05, 0.01, 0.3, 512, 2, VIT, {"power": 0.9, "warmup_steps": 0}, "51.1"),
    "ade20k_mask2former_swin_base": (1e-4, 0.05, 0.01, 0.3, 640, 2, VIT, {"power": 0.9, "warmup_steps": 0}, "52.0"),
    "ade20k_uper_net_vit_base": (5e-5, 0.05, None, 0.15, 512, 2, BEIT, {"power": 1.0, "warmup_steps": 1500}, "49.6"),
    "ade20k_uper_net_vit_large": (5e-5, 0.05, None, 0.15, 512, 2, BEIT, {"power": 1.0, "warmup_steps": 1500}, "51.5"),
}


@pytest.mark.parametrize("experiment", DENSE_RECIPES)
def test_dense_experiments_are_the_recipes(experiment):
    lr, decay, clip, drop_path, pixels, batch, (groups, rate), schedule, figure = DENSE_RECIPES[experiment]
    kind = experiment.split("_")[0]
    cfg = composed(f"experiment={experiment}", "datamodule.path=/data", task=kind)
    scaled = cfg.task.groups
    assert (cfg.task.optimizer.lr, cfg.task.weight_decay, cfg.trainer.get("gradient_clip_val")) == (lr, decay, clip)
    assert cfg.backbone.get("trunk", cfg.backbone).drop_path_rate == drop_path
    assert (cfg.image_size, cfg.datamodule.batch_size) == (pixels, batch)
    assert (scaled._target_.split(".")[-1], scaled.get("factor", scaled.get("rate"))) == (groups, rate)
    assert schedule.items() <= OmegaConf.to_container(cfg.task.schedule).items()
    assert (cfg.epochs, cfg.trainer.get("max_steps", -1)) == ((12, -1) if kind == "coco" else (-1, 160_000))
    if "uper" in experiment:
        assert (cfg.task.crop, cfg.task.stride) == (512, 341)
    if figure is not None:
        assert f"mixed {figure}," in header(experiment)


def test_every_dense_experiment_has_its_recipe_above():
    assert set(experiments("coco") + experiments("ade20k")) == DENSE_RECIPES.keys()


@pytest.mark.parametrize(
    ("pixels", "short", "crop"), [(96, [80, 96, 112], [80, 128]), (192, [160, 192, 224], [160, 256])]
)
def test_the_embedded_scenes_train_at_the_size_that_is_asked(pixels, short, crop):
    made = composed(f"image_size={pixels}", task="coco").datamodule.train_transform
    assert (list(made.short_sides), list(made.crop), made.long_side) == (short, crop, pixels * 7 // 4)


@pytest.mark.parametrize("experiment", experiments("coco") + experiments("ade20k"))
def test_dense_experiments_resolve_and_build(experiment):
    kind = experiment.split("_")[0]
    if "_dino_" in experiment:
        pytest.importorskip("mmdet")
    cfg = composed(f"experiment={experiment}", "datamodule.path=/data", task=kind)
    OmegaConf.to_container(cfg.trainer, resolve=True)
    task = instantiate(cfg.task)
    instantiate(cfg.callbacks)
    instantiate(cfg.evaluation.callbacks)
    instantiate(cfg.datamodule)
    groups = task.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in task.model.parameters())
    assert {0.1, 1.0} == {group["lr_scale"] for group in groups} or "uper" in experiment
    assert task.make_optimizer(groups).param_groups[0]["lr"] == cfg.task.optimizer.lr
    assert "2403.13298" in header(experiment)
    assert "Expected" in header(experiment)


DENSE = [(model, "vitdet_nano") for model in ("rt_detr_nano", "dino_nano")] + [
    (model, "taps_nano") for model in ("uper_net_nano", "mask2former_nano")
]


@pytest.mark.parametrize("position", ["ape", "axial", "mixed", "axial_ape", "mixed_ape"])
@pytest.mark.parametrize(("model", "backbone"), DENSE)
def test_dense_models_take_every_position(model, backbone, position):
    if model.startswith("dino"):
        pytest.importorskip("mmdet")
    kind = "coco" if backbone == "vitdet_nano" else "ade20k"
    cfg = composed(f"model={model}", f"backbone={backbone}", f"position={position}", task=kind)
    trunk = instantiate(cfg.model).backbone.trunk
    assert (trunk.pos_embed is not None) == ("ape" in position)
    assert (trunk.rope is not None) == (position != "ape")


def rates(cfg):
    """The learning rate of every epoch, and the one behind the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.task.optimizer.lr)
    scheduler = instantiate(cfg.task.schedule)(optimizer, epochs=cfg.epochs, steps=100 * cfg.epochs)
    found = []
    for epoch in range(cfg.epochs + 1):
        scheduler.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


# arXiv 2412.05334: from and to which learning rate, the smoothing, K of closest-among-top-K
RECIPES = {
    "agents_nano": (5e-4, 0.01, 0.1, None),
    "agents_mini": (5e-4, 0.01, 0.1, None),
    "agents_tiny": (5e-4, 0.01, 0.1, None),
    "agents_tiny_closed_loop": (5e-5, 0.05, 0.0, 32),
}


def test_every_waymo_experiment_has_its_recipe_below():
    assert set(WOMD) == RECIPES.keys()


@pytest.mark.parametrize("experiment", RECIPES)
def test_waymo_experiments_follow_the_published_recipe(experiment, tokens):
    rate, floor, smoothing, closed_loop = RECIPES[experiment]
    cfg = composed(
        f"experiment={experiment}", "datamodule.path=/data", f"head.vocabulary.path={tokens}", task="trajectory"
    )
    assert cfg.task.optimizer._target_ == "torch.optim.AdamW"
    assert cfg.task.schedule.by_epoch
    found = rates(cfg)
    assert found[0] == pytest.approx(rate)
    assert found[-1] == pytest.approx(floor * rate)
    assert all(later < earlier for earlier, later in pairwise(found))
    assert (cfg.task.smoothing, cfg.task.closed_loop) == (smoothing, closed_loop)
    assert (cfg.trainer.precision, cfg.trainer.gradient_clip_val) == ("32-true", 0.5)
    assert (cfg.datamodule.batch_size, cfg.model.absolute) == (10, False)
    assert cfg.hydra.runtime.choices.pos == "drope_intra"
    assert instantiate(cfg.head).motions.shape[1] == 2048


# With 2048 tokens a class: the layers of SMART (arXiv 2405.15677), whose relation embeddings are gone
AGENTS = {"nano": 1_173_568, "mini": 3_625_792, "tiny": 6_052_224}


@pytest.mark.parametrize("size", AGENTS)
def test_agent_configs_count(size, tokens):
    overrides = (f"model=agents_{size}", "vocabulary@head.vocabulary=recorded", f"head.vocabulary.path={tokens}")
    model = instantiate(composed(*overrides, task="trajectory").model)
    assert parameters(model) == AGENTS[size]
    assert f"{AGENTS[size] / 1e6:.1f} M parameters" in header(f"agents_{size}")


@pytest.mark.parametrize("vocabulary", names("vocabulary"))
def test_vocabularies_are_chosen_from_the_command_line(vocabulary, tokens):
    overrides = [f"vocabulary@head.vocabulary={vocabulary}"]
    overrides += [f"head.vocabulary.path={tokens}"] if vocabulary == "recorded" else ["head.vocabulary.size=64"]
    head = instantiate(composed(*overrides, task="trajectory").head)
    assert head.motions.shape[1] == (2048 if vocabulary == "recorded" else 64)


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


@pytest.mark.parametrize("task", names("task"))
def test_what_a_task_says_of_the_trainer_holds(task):
    """A trainer's config comes after the task's, so a key of both would be the trainer's."""
    said = yaml.safe_load((CONFIGS / "task" / f"{task}.yaml").read_text()).get("trainer", {})
    common = set(said) & set(yaml.safe_load((CONFIGS / "trainer" / "default.yaml").read_text()))
    assert not common
