"""UperNet against transformers' on the same weights, its losses against their definition, and the laws of its norm."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, log_softmax, pad

from models.dense import valid_pixels
from models.swin import mixed
from models.swin_stages import SwinStages
from models.uper_net import UperNet, batch_norm, group_norm

CHANNELS = (8, 16, 32, 64)


def backbone() -> SwinStages:
    shape = {"embed_dim": CHANNELS[0], "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "drop_path_rate": 0.0}
    return SwinStages(rotary=mixed, stages=(0, 1, 2, 3), **shape)


def net(**others) -> UperNet:
    return UperNet(backbone(), 5, **{"channels": 32, "auxiliary_channels": 16, **others})


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Weights and statistics, layer by layer in the order of the network."""
    layers = [
        [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
        for model in (ours, theirs)
    ]
    for one, other in zip(*layers, strict=True):
        one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("training", [False, True])
def test_heads_are_transformers(training):
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    config = SimpleNamespace(
        pool_scales=(1, 2, 3, 6),
        hidden_size=32,
        num_labels=5,
        auxiliary_in_channels=None,
        auxiliary_channels=16,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
    )
    decode, auxiliary = upernet.UperNetHead(config, CHANNELS), upernet.UperNetFCNHead(config, CHANNELS)
    for module in (*decode.modules(), *auxiliary.modules()):
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(value)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    ours = net(norm=batch_norm, dropout=0.0).train(training)
    parts = [
        (ours.decode.pools, decode.psp_modules),
        (ours.decode.pooled, decode.bottleneck),
        (ours.decode.lateral, decode.lateral_convs),
        (ours.decode.smooth, decode.fpn_convs),
        (ours.decode.fuse, decode.fpn_bottleneck),
        (ours.classify, decode.classifier),
        (ours.auxiliary, auxiliary),
    ]
    for mine, other in parts:
        copied(mine, other)
    decode.train(training), auxiliary.train(training)
    with torch.no_grad():
        maps = [torch.randn(2, c, 23 // 2**i + 1, 17 // 2**i + 1) for i, c in enumerate(CHANNELS)]
        torch.testing.assert_close(ours.classify(ours.decode(maps)), decode(maps), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.auxiliary(maps[2]), auxiliary(maps), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(64, 96), (70, 93), (20, 20)])
def test_scores_are_those_of_the_heads_at_the_size_of_the_image(size):
    model, images = net().eval(), torch.randn(2, 3, *size)
    height, width = size
    whole = (-(-height // 32) * 32, -(-width // 32) * 32)
    with torch.no_grad():
        scores = model(images)
        padded = pad(images, (0, whole[1] - width, 0, whole[0] - height))
        there = valid_pixels(torch.tensor([size, size]), *whole)
        small = model.classify(model.decode(model.backbone(padded, there)))
        expected = interpolate(small, size=whole, mode="bilinear", align_corners=False)[..., :height, :width]
    assert scores.shape == (2, 5, *size)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(model.activate(scores).sum(1), torch.ones(2, *size))


@pytest.mark.parametrize("size", [(70, 93), (130, 33)])
def test_maps_double_so_that_none_is_stretched(size):
    """Each map's cells say where they lie; enlarged, a coarse one says of every place inside it what the finer one does."""
    model, seen = net(), []
    model.decode.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    model(torch.randn(1, 3, *size))
    places = [
        (torch.arange(x.shape[-1]) + 0.5) * stride for x, stride in zip(seen, model.backbone.strides, strict=True)
    ]
    for fine, coarse in pairwise(places):
        enlarged = interpolate(coarse[None, None], size=len(fine), mode="linear", align_corners=False)[0, 0]
        torch.testing.assert_close(enlarged[1:-1], fine[1:-1])


def test_losses_are_means_over_the_pixels_that_count():
    model, images = net(dropout=0.0).eval(), torch.randn(2, 3, 32, 64)
    targets = torch.randint(0, 5, (2, 32, 64))
    targets[torch.rand(2, 32, 64) < 0.4] = 255
    with torch.no_grad():
        losses = model(images, targets)
        maps = model.backbone(images)
        for name, small, weight in (
            ("cross_entropy", model.classify(model.decode(maps)), 1.0),
            ("auxiliary", model.auxiliary(maps[2]), 0.4),
        ):
            scores = interpolate(small, size=(32, 64), mode="bilinear", align_corners=False)
            told = log_softmax(scores, 1).gather(1, targets.where(targets != 255, 0)[:, None]).squeeze(1)
            torch.testing.assert_close(losses[name], -weight * told[targets != 255].mean())
    assert set(losses) == {"cross_entropy", "auxiliary"}


def test_what_no_pixel_tells_costs_nothing():
    model = net().train()
    losses = model(torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), 255))
    assert {name: loss.item() for name, loss in losses.items()} == {"cross_entropy": 0.0, "auxiliary": 0.0}
    sum(losses.values()).backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_every_parameter_is_trained():
    model = net().train()
    sum(model(torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))).values()).backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0] == []


def test_by_default_images_of_a_batch_are_strangers():
    model, images = net(dropout=0.0).train(), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        together = model(images)
        torch.testing.assert_close(together, torch.cat([model(image[None]) for image in images]), atol=1e-5, rtol=0)
        torch.testing.assert_close(together, model.eval()(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "groups"), [(768, 48), (512, 32), (96, 6), (40, 2), (24, 1), (8, 1), (56, 1)])
def test_groups_divide_channels_and_are_not_small(channels, groups):
    norm = group_norm(channels)
    assert norm.num_groups == groups
    assert norm(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)


def test_scores_are_float32_under_autocast():
    model = net().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 3, 64, 64)).dtype == torch.float32


def test_two_colours_are_soon_told_apart():
    """A picture whose left is dark and whose right is bright, at a place that changes: no head can know it by heart."""
    model = net().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def batch():
        edges = torch.randint(16, 48, (4, 1, 1))
        targets = (torch.arange(64) >= edges).expand(4, 64, 64).long()
        return (targets[:, None] * 2.0 - 1 + 0.3 * torch.randn(4, 3, 64, 64)), targets

    for _ in range(25):
        optimiser.zero_grad()
        sum(model(*batch()).values()).backward()
        optimiser.step()
    images, targets = batch()
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == targets).float().mean() > 0.9


@pytest.mark.parametrize(("index", "wanted"), [(2, (1, 2)), (-1, (0, 1, 2, 3)), (0, (3,))])
def test_maps_that_are_missing_are_told(index, wanted):
    shape = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
    with pytest.raises(ValueError, match="maps of the backbone"):
        UperNet(SwinStages(rotary=mixed, stages=wanted, **shape), 5, channels=32, auxiliary_map=index)
