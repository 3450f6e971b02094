"""Swin stages against timm's own, against windows told pixel by pixel, and against the law that padding changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from models.convert import export, load_checkpoint
from models.dense import valid_pixels
from models.swin import RopeSwin, axial, mixed
from models.swin_stages import SwinStages, window_mask

SMALL = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "drop_path_rate": 0.0}
KINDS = {
    "bias": {"rotary": None, "bias": True},
    "axial": {"rotary": axial},
    "mixed": {"rotary": mixed},
    "mixed and bias": {"rotary": mixed, "bias": True},
}


def stages(kind="mixed", wanted=(0, 1, 2, 3), **others) -> SwinStages:
    return loud(SwinStages(**KINDS[kind], stages=wanted, **{**SMALL, **others}).eval())


def loud(model):
    """Weights large enough that attention to a wrong token shows."""
    for name, parameter in model.named_parameters():
        if name.endswith(("relative_position_bias_table", "qkv.weight", "proj.weight", "reduction.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_where_windows_fit_it_is_timms(kind):
    theirs = loud(RopeSwin(**KINDS[kind], window_size=7, always_partition=True, num_classes=0, **SMALL).eval())
    ours = stages(kind)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert all(name.startswith("norms.") for name in missing)
    assert all(name.startswith("norm.") for name in unexpected)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        maps = ours(x)
        expected = theirs.forward_intermediates(x, indices=4, intermediates_only=True)
        for actual, other, channels in zip(maps, expected, ours.channels, strict=True):
            normal = layer_norm(other.permute(0, 2, 3, 1), (channels,)).permute(0, 3, 1, 2)
            # float32 at values of up to 4; −100 in timm's masks is e⁻¹⁰⁰ and no matter
            torch.testing.assert_close(actual, normal, atol=1e-5, rtol=0)
        double = ours.double()(x.double())
        expected = theirs.double().forward_intermediates(x.double(), indices=4, intermediates_only=True)
        for actual, other, channels in zip(double, expected, ours.channels, strict=True):
            normal = layer_norm(other.permute(0, 2, 3, 1), (channels,)).permute(0, 3, 1, 2)
            torch.testing.assert_close(actual, normal, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [7, (3, 5)])
def test_padding_changes_nothing(kind, window):
    model = stages(kind, window_size=window).double()
    sizes = torch.tensor([[70, 93], [128, 40], [33, 130], [4, 1]])
    images = torch.randn(4, 3, 137, 131, dtype=torch.float64)
    valid = valid_pixels(sizes, 137, 131)
    images[(~valid)[:, None].expand_as(images)] = float("nan")
    with torch.no_grad():
        together = model(images, valid)
        for index, (height, width) in enumerate(sizes.tolist()):
            alone = model(images[index : index + 1, :, :height, :width])
            for one, batch, stride in zip(alone, together, model.strides, strict=True):
                h, w = -(-height // stride), -(-width // stride)
                assert one.shape[2:] == (h, w)
                torch.testing.assert_close(batch[index : index + 1, :, :h, :w], one, atol=1e-10, rtol=0)
                assert batch[index, :, h:].abs().sum() + batch[index, :, :, w:].abs().sum() == 0


def test_all_valid_is_no_mask():
    model, x = stages(), torch.randn(2, 3, 50, 61)
    with torch.no_grad():
        for masked, plain in zip(model(x, torch.ones(2, 50, 61, dtype=torch.bool)), model(x), strict=True):
            torch.testing.assert_close(masked, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (0, 2)])
@pytest.mark.parametrize("size", [(3, 5), (7, 9), (6, 10), (1, 1)])
def test_masks_keep_tokens_to_their_window(size, shift):
    h, w = size
    inside = torch.zeros(2, h, w, dtype=torch.bool)
    inside[0, : max(1, h - 2), : max(1, w - 3)] = True
    inside[1] = True
    mask = window_mask(torch.zeros(2, h, w, 4), inside, (3, 5), shift)
    height, width = h + -h % 3, w + -w % 5
    mask = mask.view(2, height // 3, width // 5, 15, 15)
    assert mask.eq(0).any(-1).all()
    for image in range(2):
        seen = torch.zeros(height, width, height, width, dtype=torch.bool)
        for y, x, i, j in torch.cartesian_prod(*map(torch.arange, (height // 3, width // 5, 15, 15))).tolist():
            # token i of the rolled window (y, x) is this one of the map
            p = (y * 3 + i // 5 + shift[0]) % height, (x * 5 + i % 5 + shift[1]) % width
            q = (y * 3 + j // 5 + shift[0]) % height, (x * 5 + j % 5 + shift[1]) % width
            seen[p + q] = mask[image, y, x, i, j] == 0
        for py, px in inside[image].nonzero().tolist():
            for qy, qx in torch.cartesian_prod(torch.arange(height), torch.arange(width)).tolist():
                same = (py - shift[0]) // 3 == (qy - shift[0]) // 3 and (px - shift[1]) // 5 == (qx - shift[1]) // 5
                real = qy < h and qx < w and bool(inside[image, qy, qx])
                assert seen[py, px, qy, qx] == (same and real)


def test_nothing_is_masked_where_nothing_needs_it():
    assert window_mask(torch.zeros(1, 6, 10, 4), None, (3, 5), (0, 0)) is None


@pytest.mark.parametrize("wanted", [(1, 2, 3), (0, 2), (1,)])
def test_imagenet_weights_load(wanted, tmp_path):
    classifier = RopeSwin(rotary=mixed, window_size=7, **SMALL)
    export(classifier, tmp_path / "swin.safetensors")
    model = SwinStages(rotary=mixed, stages=wanted, **SMALL)
    norms = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("norms.")}
    loaded = load_checkpoint(model, tmp_path / "swin.safetensors", skip=model.not_pretrained)
    assert all(name.startswith(model.not_pretrained) for name in loaded.skipped)
    theirs = classifier.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, norms[name] if name.startswith("norms.") else theirs[name])


@pytest.mark.parametrize("wanted", [(1, 2, 3), (0, 2)])
def test_every_parameter_is_used(wanted):
    model = stages(wanted=wanted).train()
    sum(feature.square().mean() for feature in model(torch.randn(1, 3, 60, 64))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.strides == tuple(4 * 2**stage for stage in wanted)
    assert model.channels == tuple(8 * 2**stage for stage in wanted)


def test_recomputing_changes_no_gradient():
    plain, saving = stages().train(), stages(checkpoint=True).train()
    saving.load_state_dict(plain.state_dict())
    x, valid = torch.randn(2, 3, 60, 64), valid_pixels(torch.tensor([[60, 64], [31, 50]]), 60, 64)
    for model in (plain, saving):
        sum(feature.pow(3).mean() for feature in model(x, valid)).backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_windows_stay_whatever_the_size():
    model = stages()
    model.set_input_size((512, 512))
    assert {block.attn.window_size for stage in model.layers for block in stage.blocks} == {(7, 7)}


def test_half_precision_stays_finite_beside_padding():
    model = stages("mixed and bias").train()
    valid = valid_pixels(torch.tensor([[60, 64], [5, 7]]), 60, 64)
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(torch.randn(2, 3, 60, 64), valid)
        sum(feature.float().pow(3).mean() for feature in maps).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("wanted", [(), (2, 1), (1, 1), (-1, 2), (3, 4)])
def test_stages_that_are_none_are_refused(wanted):
    with pytest.raises(ValueError, match="ascending indices below 4"):
        SwinStages(rotary=mixed, stages=wanted, **SMALL)
