"""Every trained parameter is in one group, with the decay and the share of the learning rate that the recipes give it."""

import pytest
import torch
from torch import nn

from models.pyramids import SimplePyramid
from models.swin import mixed as swin_mixed
from models.swin_stages import SwinStages
from models.vit import mixed
from models.windowed_vit import WindowedViT
from tasks.parameter_groups import BackboneScaled, LayerDecay, plain, spared_from_decay


class Dense(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(8, 3)


@pytest.fixture(scope="module")
def model():
    trunk = WindowedViT(
        rotary=mixed,
        absolute=True,
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        window=2,
        global_blocks=[2],
    )
    return Dense(SimplePyramid(trunk, channels=8, strides=(8, 16)))


def by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(names)
    return found


def test_parts_of_a_model_are_asked_what_to_spare(model):
    assert {"backbone.trunk.rope.freqs", "backbone.trunk.pos_embed"} <= spared_from_decay(model)


@pytest.mark.parametrize("grouping", [plain, BackboneScaled(0.1), LayerDecay(0.5)], ids=["plain", "backbone", "layers"])
def test_vectors_and_spared_names_take_no_decay(model, grouping):
    found = by_name(model, grouping(model, 0.05))
    for name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or name.endswith(("rope.freqs", "pos_embed"))
        assert found[name]["weight_decay"] == (0.0 if free else 0.05), name


def test_what_was_pretrained_learns_at_a_tenth(model):
    found = by_name(model, BackboneScaled(0.1)(model, 0.05))
    for name, group in found.items():
        assert group["lr_scale"] == (0.1 if name.startswith("backbone.trunk.") else 1.0), name


def test_a_swin_is_its_own_trunk():
    model = Dense(
        SwinStages(rotary=swin_mixed, img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 2), stages=(0, 1))
    )
    found = by_name(model, BackboneScaled(0.1)(model, 0.05))
    assert {name for name, group in found.items() if group["lr_scale"] == 1.0} == {"head.weight", "head.bias"}
    assert found["backbone.layers.0.blocks.0.attn.rope_freqs"]["weight_decay"] == 0.0


def test_layers_learn_the_slower_the_earlier_they_are(model):
    found = by_name(model, LayerDecay(0.5)(model, 0.05))
    scales = {
        "backbone.trunk.patch_embed.proj.weight": 0.5**4,
        "backbone.trunk.pos_embed": 0.5**4,
        "backbone.trunk.blocks.0.attn.qkv.weight": 0.5**3,
        "backbone.trunk.blocks.2.mlp.fc2.bias": 0.5,
        "backbone.trunk.rope.freqs": 1.0,
        "backbone.laterals.0.0.weight": 1.0,
        "head.weight": 1.0,
    }
    assert {name: found[name]["lr_scale"] for name in scales} == scales


@pytest.mark.parametrize("grouping", [BackboneScaled(), LayerDecay(0.5)], ids=["backbone", "layers"])
def test_a_model_without_a_backbone_is_refused(grouping):
    with pytest.raises(ValueError, match="Linear has no backbone"):
        grouping(nn.Linear(2, 2), 0.0)


def test_an_optimizer_takes_the_groups(model):
    optimizer = torch.optim.AdamW(LayerDecay(0.5)(model, 0.05), lr=1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}
