"""Pyramids over the windowed ViT: levels by their definition, cells of any image size, the padding law, names kept."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, gelu, layer_norm, max_pool2d

from models.convert import load_checkpoint
from models.dense import valid_pixels
from models.pyramids import SimplePyramid, TapPyramid
from models.vit import RopeViT, axial, mixed
from models.windowed_vit import WindowedViT

SIZES = ((21, 50), (41, 13), (8, 8), (33, 32))


def trunk(patch_size=4, **changes):
    arguments = {"img_size": 4 * patch_size, "embed_dim": 24, "depth": 4, "num_heads": 2, "window": 3}
    blocks = {"global_blocks": (1, 3), "init_values": 0.5, "init_std": 0.2, "rotary": mixed}
    return WindowedViT(patch_size=patch_size, **{**arguments, **blocks, **changes})


def simple(patch_size=4, strides=None, **changes):
    return SimplePyramid(trunk(patch_size, **changes), channels=8, strides=strides)


def taps(patch_size=4, strides=None, **changes):
    return TapPyramid(trunk(patch_size, taps=(0, 1, 2, 3), **changes), strides)


def coarser_taps():
    return taps(strides=(2, 4, 8, 16))


def norm(x, weights, start):
    normed = layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weights[f"{start}.weight"], weights[f"{start}.bias"], 1e-6)
    return normed.permute(0, 3, 1, 2)


def deconvolved(x, weights, start):
    return conv_transpose2d(x, weights[f"{start}.weight"], weights[f"{start}.bias"], stride=2)


def test_levels_of_the_simple_pyramid_by_the_definition():
    model = simple(strides=(1, 2, 4, 8, 16, 32)).double()
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    (x,) = model.trunk(images)
    weights = dict(model.named_parameters())
    finest = gelu(norm(deconvolved(x, weights, "rescales.0.layers.0"), weights, "rescales.0.layers.1"))
    finest = deconvolved(finest, weights, "rescales.0.layers.3")
    assert finest.shape[1] == 6  # a quarter of the width at a quarter of the stride
    scaled = [finest, deconvolved(x, weights, "rescales.1.layers.0"), x, max_pool2d(x, 2)]
    expected = []
    for index, level in enumerate(scaled):
        lateral = norm(conv2d(level, weights[f"laterals.{index}.0.weight"]), weights, f"laterals.{index}.1")
        output = conv2d(lateral, weights[f"outputs.{index}.0.weight"], padding=1)
        expected.append(norm(output, weights, f"outputs.{index}.1"))
    expected += [expected[-1][..., ::2, ::2], expected[-1][..., ::4, ::4]]
    torch.testing.assert_close(model(images), expected, atol=1e-10, rtol=1e-10)


def test_levels_of_the_tap_pyramid_by_the_definition():
    model = taps().double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    first, second, third, fourth = model.trunk(images)
    weights = dict(model.named_parameters())
    finest = gelu(norm(deconvolved(first, weights, "rescales.0.layers.0"), weights, "rescales.0.layers.1"))
    finest = deconvolved(finest, weights, "rescales.0.layers.3")
    expected = [finest, deconvolved(second, weights, "rescales.1.layers.0"), third, max_pool2d(fourth, 2)]
    torch.testing.assert_close(model(images), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("size", [(32, 64), (21, 50), (1, 1), (33, 40)])
@pytest.mark.parametrize("make", [simple, taps, coarser_taps])
def test_maps_have_the_cells_that_their_strides_say(make, size):
    model = make()
    maps = model(torch.randn(2, 3, *size))
    assert len(maps) == len(model.strides) == len(model.channels)
    for one, stride, channels in zip(maps, model.strides, model.channels, strict=True):
        assert one.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


def test_strides_follow_the_patch():
    assert simple(16).strides == (8, 16, 32, 64)
    assert simple(14).strides == (7, 14, 28, 56)
    assert taps(16).strides == (4, 8, 16, 32)
    assert simple(16, strides=(16, 32)).strides == (16, 32)


@pytest.mark.parametrize(
    "make",
    [
        simple,
        taps,
        lambda: simple(strides=(1, 4, 8, 16, 32), absolute=True),
        lambda: taps(window=None, class_token=True, rotary=axial),
        coarser_taps,
    ],
    ids=["simple", "taps", "simple_absolute", "taps_global", "coarser_taps"],
)
def test_padding_changes_no_image(make):
    """Values and gradients of images alone are those within a batch whose padding is noise."""
    model = make().double()
    alone = [torch.randn(1, 3, *size, dtype=torch.float64) for size in SIZES]
    batch = torch.full((len(SIZES), 3, 47, 70), 7.0, dtype=torch.float64)
    for image, place in zip(alone, batch, strict=True):
        place[:, : image.shape[2], : image.shape[3]] = image[0]
    together = model(batch, valid_pixels(torch.tensor(SIZES), 47, 70))
    weights = [torch.randn_like(one) for one in together]
    loss_alone = torch.zeros((), dtype=torch.float64)
    for index, image in enumerate(alone):
        for level, own in enumerate(model(image)):
            rows, columns = own.shape[2:]
            here = together[level][index]
            torch.testing.assert_close(here[:, :rows, :columns], own[0], atol=1e-10, rtol=1e-10)
            assert not here[:, rows:].any()
            assert not here[:, :, columns:].any()
            loss_alone = loss_alone + (own[0] * weights[level][index, :, :rows, :columns]).sum()
    loss = sum((one * weight).sum() for one, weight in zip(together, weights, strict=True))
    parameters = list(model.parameters())
    gradients = zip(*(torch.autograd.grad(one, parameters) for one in (loss, loss_alone)), parameters, strict=True)
    for found, expected, parameter in gradients:
        # learned frequencies are float32, so is their gradient
        tolerance = 1e-8 if parameter.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("make", [simple, taps])
def test_an_image_of_padding_alone_poisons_nothing(make):
    model = make()
    maps = model(torch.randn(2, 3, 32, 32), valid_pixels(torch.tensor([[32, 20], [0, 0]]), 32, 32))
    sum(one.square().sum() for one in maps).backward()
    assert all(one.isfinite().all() and not one[1].any() for one in maps)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("make", [simple, taps])
def test_a_mask_of_whole_images_is_no_mask(make):
    model = make()
    images = torch.randn(2, 3, 21, 34)
    whole = torch.ones(2, 21, 34, dtype=torch.bool)
    torch.testing.assert_close(model(images, whole), model(images), atol=0, rtol=0)


@pytest.mark.parametrize("make", [simple, taps])
def test_every_parameter_is_used(make):
    model = make()
    sum(one.square().sum() for one in model(torch.randn(2, 3, 20, 24))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_weights_of_a_classifier_reach_the_trunk(tmp_path):
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "rotary": mixed}
    classifier = RopeViT(**shape, num_classes=5)
    torch.save({"model": classifier.state_dict()}, tmp_path / "last.pth")
    model = simple(init_values=1e-4)
    load_checkpoint(model.trunk, tmp_path / "last.pth", skip=model.trunk.not_pretrained)
    assert torch.equal(model.trunk.rope.freqs, classifier.rope.freqs)
    assert torch.equal(model.trunk.blocks[3].mlp.fc2.weight, classifier.blocks[3].mlp.fc2.weight)


def test_recomputing_blocks_changes_no_gradient():
    plain = simple()
    saving = copy.deepcopy(plain)
    saving.trunk.grad_checkpointing = True
    images = torch.randn(1, 3, 22, 31)
    ours, theirs = (
        torch.autograd.grad(sum(one.square().sum() for one in model(images)), list(model.parameters()))
        for model in (saving, plain)
    )
    torch.testing.assert_close(ours, theirs)


def test_no_norm_looks_at_other_images_or_cells():
    found = {type(module) for make in (simple, taps) for module in make().modules()}
    assert not {one for one in found if issubclass(one, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: simple(strides=(4, 16)), r"strides \[4, 16\] of 4-pixel patches; choose, rising, from \[1, 2, 4, 8\]"),
        (lambda: simple(strides=(8, 4)), "rising"),
        (lambda: simple(strides=()), "strides"),
        (lambda: simple(strides=(8, 16, 64)), "without a gap"),
        (lambda: simple(taps=(0, 3)), "one tap makes all levels, the trunk has 2"),
        (
            lambda: simple(strides=(1,), embed_dim=42, rotary=None, absolute=True),
            "width 42 doesn't divide by 4 for stride 1",
        ),
        (lambda: TapPyramid(trunk()), "of 1 taps and"),
        (lambda: taps(14), "of 4 taps and 14-pixel patches"),
        (lambda: taps(strides=(4, 8, 12, 16)), "each a quarter, a half, one, two"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_compiled_equals_eager_without_a_graph_break():
    model = simple(depth=2, global_blocks=(1,))
    compiled = torch.compile(model, fullgraph=True)
    images = torch.randn(2, 3, 22, 31)
    valid = valid_pixels(torch.tensor([[22, 31], [13, 18]]), 22, 31)
    torch.testing.assert_close(compiled(images, valid), model(images, valid), atol=1e-5, rtol=0)
