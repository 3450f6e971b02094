"""RoPE-ViT: timm's logits on shared weights, the paper's counts and defaults, extrapolation laws, the kept phases."""

import copy
from functools import partial

import pytest
import timm
import torch
from torch.nn.functional import interpolate

from models.phases import PatchPhases
from models.vit import RopeViT, axial, mixed
from rotary import Rotary, rotate, rotate_reference
from rotary.frequencies import Axial, Geometric
from rotary.positions import augment, normalised_grid
from rotary.scaling import YaRN

COUNTS = {
    "ape": (22_059_496, 86_585_320, 304_374_760),
    "rope_axial": (21_984_232, 86_434_792, 304_174_056),
    "rope_mixed": (21_988_840, 86_444_008, 304_198_632),
    "rope_axial_ape": (22_059_496, 86_585_320, 304_374_760),
    "rope_mixed_ape": (22_064_104, 86_594_536, 304_399_336),
}
TIMM = {
    "rope_axial": "rope",
    "rope_mixed": "rope_mixed",
    "rope_axial_ape": "rope_ape",
    "rope_mixed_ape": "rope_mixed_ape",
}


def tiny(rotary=mixed, **changes):
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    return RopeViT(**{**arguments, "rotary": rotary, "init_values": 0.5, **changes})


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize(("size", "index"), [("small", 0), ("base", 1), ("large", 2)])
def test_parameter_counts(kind, size, index):
    with torch.device("meta"):
        model = timm.create_model(f"{kind}_vit_{size}_patch16_224")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[kind][index]


@pytest.mark.parametrize("kind", TIMM)
@pytest.mark.parametrize("size", [224, 384, (160, 256)])
def test_logits_equal_timms_on_shared_weights(kind, size):
    shape = {"img_size": size, "depth": 2, "init_values": 0.5, "num_classes": 10}
    ours = timm.create_model(f"{kind}_vit_small_patch16_224", **shape).eval()
    theirs = timm.create_model(f"vit_small_patch16_{TIMM[kind]}_224", **shape).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


def test_set_input_size_equals_a_model_built_at_that_size():
    grown, built = tiny(), tiny(img_size=(48, 64))
    built.load_state_dict(grown.state_dict())
    grown.set_input_size((48, 64))
    images = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(grown(images), built(images), atol=0, rtol=0)


def test_dynamic_sizes_equal_set_sizes():
    fixed, dynamic = tiny(absolute=True).eval(), tiny(absolute=True, dynamic_img_size=True).eval()
    dynamic.load_state_dict(fixed.state_dict())
    fixed.set_input_size((24, 40))
    images = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(fixed(images), dynamic(images), atol=1e-6, rtol=0)  # resized in another memory order


def test_absolute_embedding_is_resized_bicubically_without_antialiasing():
    model = tiny(rotary=None, absolute=True)
    image = model.pos_embed.detach().reshape(1, 8, 8, 48).permute(0, 3, 1, 2)
    expected = interpolate(image, size=(6, 4), mode="bicubic", align_corners=False, antialias=False)
    model.set_input_size((24, 16))
    torch.testing.assert_close(model.pos_embed.detach(), expected.permute(0, 2, 3, 1).reshape(1, 24, 48))


@pytest.mark.parametrize("size", [30, (32, 18)])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(size):
    with pytest.raises(ValueError, match=r"isn't a multiple of the patch \(4\); the nearest is"):
        tiny(img_size=size)
    with pytest.raises(ValueError, match=r"isn't a multiple of the patch \(4\)"):
        tiny().set_input_size((size, size) if isinstance(size, int) else size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary": None}, "give rotary, absolute=True or both"),
        ({"num_heads": 5}, "embed_dim=48 doesn't divide by num_heads=5"),
        ({"patch_drop_rate": 0.1}, "patch_drop_rate"),
        ({"embed_dim": 54}, r"Mixed: 9 pairs \(head width 18\)"),
        ({"rotary": partial(Rotary, Geometric(100.0))}, "an image has 2 axes, the rotary has 1"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_the_papers_defaults():
    model = timm.create_model("rope_mixed_vit_small_patch16_224", drop_path_rate=0.3)
    assert {block.drop_path1.drop_prob for block in model.blocks} == {0.3}
    assert {block.drop_path2.drop_prob for block in model.blocks} == {0.3}
    for block in model.blocks:
        assert torch.all(block.gamma_1 == 1e-4)
        assert torch.all(block.gamma_2 == 1e-4)
    last = model.blocks[-1]
    for weight in (model.head.weight, last.attn.proj.weight, last.mlp.fc2.weight, last.attn.qkv.weight):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.02)  # 384k samples or more of a truncated normal
    assert "rope.freqs" in model.no_weight_decay()


def test_features_only():
    model = timm.create_model(
        "rope_mixed_vit_small_patch16_224", img_size=(96, 64), features_only=True, depth=3, out_indices=(0, 2)
    )
    first, last = model(torch.randn(1, 3, 96, 64))
    assert first.shape == last.shape == (1, 384, 6, 4)


def test_heads_and_blocks_start_differently_and_repeat_with_the_seed():
    torch.manual_seed(7)
    one = tiny().rope.freqs.detach()
    torch.manual_seed(7)
    assert torch.equal(one, tiny().rope.freqs)
    flat = one.permute(1, 2, 0, 3).flatten(0, 1).flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 1e-3


def test_gradients_reach_every_block_twice():
    model = tiny()
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert (model.rope.freqs.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_the_class_token_is_not_turned():
    phases = PatchPhases(axial, depth=1, heads=2, head_dim=16, prefix=2).get_embed((3, 4))[0]
    assert phases.shape == (14, 1, 1, 8)
    x = torch.randn(1, 14, 2, 2, 16)
    turned = rotate(x, phases)
    assert torch.equal(turned[:, :2], x[:, :2])
    assert not torch.allclose(turned[:, 3:], x[:, 3:])


def test_patches_see_offsets_alone_and_the_class_token_sees_places():
    phases = PatchPhases(mixed, depth=1, heads=2, head_dim=16, prefix=1).double()
    table = phases.get_embed((9, 9))[0].detach()
    q, k = torch.randn(2, 1, 2, 16, dtype=torch.float64).unbind(0)

    def logit(a, b):
        turned = [rotate_reference(x[None, None], table[i : i + 1]) for x, i in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum(-1).flatten()

    patch = lambda x, y: 1 + 9 * y + x  # noqa: E731
    # float32 phases of positions up to 8 err by 2e-7 each
    torch.testing.assert_close(logit(patch(0, 1), patch(2, 3)), logit(patch(5, 4), patch(7, 6)), atol=1e-4, rtol=0)
    assert not torch.allclose(logit(0, patch(1, 1)), logit(0, patch(2, 2)), atol=1e-2)


def test_a_larger_grid_begins_with_the_smaller():
    phases = PatchPhases(mixed, depth=2, heads=2, head_dim=16, prefix=1).eval()
    with torch.no_grad():
        small, large = phases.get_embed((3, 4))[1], phases.get_embed((6, 8))[1]
    assert torch.equal(large[1:].view(6, 8, 1, 2, 8)[:3, :4].flatten(0, 1), small[1:])


class TestKeptPhases:
    def count(self, phases, monkeypatch):
        calls = []
        build = phases._build
        monkeypatch.setattr(phases, "_build", lambda shape: calls.append(shape) or build(shape))
        return calls

    def test_built_once_a_shape(self, monkeypatch):
        model = tiny().eval()
        calls = self.count(model.rope, monkeypatch)
        with torch.no_grad():
            model(torch.randn(1, 3, 32, 32)), model(torch.randn(1, 3, 32, 32))
        assert calls == [(8, 8)]

    def test_equal_counts_of_other_shape_are_not_confused(self):
        phases = PatchPhases(mixed, depth=1, heads=2, head_dim=16, prefix=0).eval()
        with torch.no_grad():
            square, wide = phases.get_embed((4, 4))[0], phases.get_embed((2, 8))[0]
        assert not torch.allclose(square, wide)

    def test_new_frequencies_are_noticed(self):
        model = tiny().eval()
        images = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            before = model(images)
            state = copy.deepcopy(model.state_dict())
            state["rope.freqs"] *= 1.5
            model.load_state_dict(state)
            assert not torch.allclose(model(images), before)

    def test_an_optimizer_step_is_noticed(self):
        model = tiny()
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            model.eval().rope.get_embed((8, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model.train()(images).sum().backward()
        optimizer.step()
        fresh = tiny()
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model.eval()(images), fresh.eval()(images))

    def test_inference_mode_does_not_poison_training(self):
        model = tiny(rotary=axial).eval()
        with torch.inference_mode():
            model(torch.randn(1, 3, 32, 32))
        model(torch.randn(1, 3, 32, 32)).sum().backward()

    def test_evaluation_with_gradients_reaches_the_frequencies(self):
        model = tiny().eval()
        with torch.no_grad():
            model(torch.randn(1, 3, 32, 32))
        model(torch.randn(1, 3, 32, 32)).square().sum().backward()
        assert model.rope.freqs.grad.abs().sum() > 0


def test_half_precision_keeps_the_frequencies_and_the_outputs_dtype():
    model = tiny().bfloat16().eval()
    assert model.rope.freqs.dtype == torch.float32
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    exact = tiny()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        under = model.rope.get_embed((8, 8))[0]
    assert torch.equal(under, exact.rope.get_embed((8, 8))[0])


def test_augmentation_acts_in_training_alone():
    model = tiny(rotary=axial, augmentation=partial(augment, rescale=2.0))
    first, second = model.rope.get_embed((4, 4))[0], model.rope.get_embed((4, 4))[0]
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(model.rope.get_embed((4, 4))[0], tiny(rotary=axial).eval().rope.get_embed((4, 4))[0])


def test_normalised_coordinates_do_not_grow_with_the_image():
    phases = PatchPhases(axial, depth=1, heads=1, head_dim=16, prefix=0, positions=normalised_grid)
    small, large = phases.get_embed((2, 2))[0], phases.get_embed((64, 64))[0]
    assert large.angle().abs().max() <= 1.0
    assert small.angle().abs().max() == pytest.approx(0.5, abs=1e-6)


def test_yarn_reaches_the_softmax_scale():
    scaled = partial(Rotary, Axial(100.0), YaRN(factor=4.0, original=8))
    model = tiny(rotary=scaled)
    assert model.blocks[0].attn.scale == pytest.approx(16**-0.5 * (0.1 * 1.3862943611198906 + 1) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("rotary", [axial, mixed])
def test_compiled_equals_eager_without_a_graph_break(rotary):
    model = tiny(rotary=rotary)
    compiled = torch.compile(model, fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    expected, found = model(images), compiled(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    ours, theirs = (torch.autograd.grad(out.square().sum(), model.parameters()) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)  # sums taken in another order
