"""RoPE-Swin against timm's Swin, against its definition written out, and against the laws of rotary positions."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import compat  # noqa: F401

# isort: split
import timm
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch.nn.functional import interpolate

from models.swin import RopeSwin, axial, mixed
from models.window_attention import RotaryWindowAttention
from rotary import Rotary, phase_of, rotate_reference
from rotary.frequencies import Axial, Mixed
from rotary.positions import grid
from rotary.scaling import DynamicNTK, Interpolate, YaRN

SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5, "drop_path_rate": 0.0}
PARAMETERS = {
    "swin_tiny": 28_288_354,
    "swin_small": 49_606_258,
    "swin_base": 87_768_224,
    "swin_rope_axial_tiny": 28_265_032,
    "swin_rope_axial_small": 49_558_600,
    "swin_rope_axial_base": 87_704_680,
    "swin_rope_mixed_tiny": 28_269_448,
    "swin_rope_mixed_small": 49_567_624,
    "swin_rope_mixed_base": 87_716_712,
    "swin_rope_axial_rpb_tiny": 28_288_354,
    "swin_rope_axial_rpb_small": 49_606_258,
    "swin_rope_axial_rpb_base": 87_768_224,
    "swin_rope_mixed_rpb_tiny": 28_288_354 + 4_416,
    "swin_rope_mixed_rpb_small": 49_606_258 + 9_024,
    "swin_rope_mixed_rpb_base": 87_768_224 + 12_032,
}


def small(kind="mixed", **others) -> RopeSwin:
    arguments = {"img_size": 128, **SMALL, **others}
    return timm.create_model(f"swin_rope_{kind}_tiny_patch4_window7_224", **arguments).eval()


def attention(rotary=mixed, bias=False, window=(3, 5)) -> RotaryWindowAttention:
    return RotaryWindowAttention(WindowAttention(16, num_heads=2, window_size=window), rotary, bias).eval()


def attentions(model) -> list[RotaryWindowAttention]:
    return [module for module in model.modules() if isinstance(module, RotaryWindowAttention)]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    with torch.device("meta"):
        model = timm.create_model(f"{name}_patch4_window7_224")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("kind", ["axial", "mixed", "axial_rpb", "mixed_rpb"])
def test_names_are_timms_plus_frequencies(kind):
    names = set(SwinTransformer(img_size=128, window_size=4, **SMALL).state_dict())
    if "rpb" not in kind:
        names = {name for name in names if not name.endswith("relative_position_bias_table")}
    model = small(kind)
    ours = set(model.state_dict())
    frequencies = {name for name, module in model.named_modules() if isinstance(module, RotaryWindowAttention)}
    assert ours == names | ({f"{name}.rope_freqs" for name in frequencies} if "mixed" in kind else set())


@pytest.mark.parametrize(("image", "window"), [((128, 128), 4), ((64, 128), (2, 4)), ((72, 100), 4), ((64, 64), 7)])
def test_at_rest_it_is_timms_swin(image, window):
    theirs = SwinTransformer(img_size=image, window_size=window, **SMALL).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith(("relative_position_bias_table", "qkv.weight", "proj.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    ours = small("mixed_rpb", img_size=image, window_size=window)
    assert all("rope_freqs" in key for key in ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys)
    for module in attentions(ours):
        torch.nn.init.zeros_(module.rope_freqs)
    plain = RopeSwin(rotary=None, bias=True, img_size=image, window_size=window, **SMALL).eval()
    plain.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *image)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() <= 1e-5
        assert (plain(x) - theirs(x)).abs().max() <= 1e-5
        for module in attentions(ours):
            torch.nn.init.normal_(module.rope_freqs)
        assert (ours(x) - theirs(x)).abs().max() > 1e-3


@pytest.mark.parametrize("rotary", [axial, mixed])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_definition(rotary, bias, masked):
    module = attention(rotary, bias)
    n, windows, images = 15, 4, 2
    x = torch.randn(windows * images, n, 16)
    mask = torch.where(torch.rand(windows, n, n) < 0.3, -100.0, 0.0) if masked else None
    if bias:
        torch.nn.init.normal_(module.relative_position_bias_table)
    with torch.no_grad():
        actual = module(x, mask)
        phase = phase_of(grid(3, 5), module.rope_freqs.transpose(0, 1))
        rows, columns = torch.arange(n) // 5, torch.arange(n) % 5
        for i, window in enumerate(x):
            q, k, v = module.qkv(window).view(n, 3, 2, 8).permute(1, 2, 0, 3)
            logits = rotate_reference(q, phase) @ rotate_reference(k, phase).transpose(-2, -1) / 8**0.5
            if bias:
                down, right = rows[:, None] - rows + 2, columns[:, None] - columns + 4
                logits = logits + module.relative_position_bias_table.view(5, 9, 2)[down, right].permute(2, 0, 1)
            if mask is not None:
                logits = logits + mask[i % windows]
            expected = module.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(n, 16))
            torch.testing.assert_close(actual[i], expected, atol=1e-6, rtol=0)


def test_window_and_global_coordinates_agree():
    frequencies = attention().rope_freqs.detach().transpose(0, 1)
    q, k = torch.randn(2, 2, 15, 8, dtype=torch.float64)

    def logits(positions):
        phase = phase_of(positions, frequencies)
        return rotate_reference(q, phase) @ rotate_reference(k, phase).transpose(-2, -1)

    window = grid(3, 5).double()
    there = window + torch.tensor([35.0, 9.0])
    torch.testing.assert_close(logits(window), logits(there), atol=1e-10, rtol=0)


@pytest.mark.parametrize("rotary", [axial, mixed])
def test_logits_see_only_offsets(rotary):
    module = attention(rotary, window=(7, 7))
    q, k = torch.randn(2, 2, 1, 8)
    turn = module.turn().squeeze(1).transpose(0, 1)  # (h|1, n, r)
    turned = [rotate_reference(x.expand(2, 49, 8), turn).view(2, 7, 7, 8) for x in (q, k)]
    logits = torch.einsum("hyxd,hvud->hyxvu", *turned)
    torch.testing.assert_close(logits[:, :4, :5, :4, :5], logits[:, 3:, 2:, 3:, 2:], atol=1e-5, rtol=0)


def test_rolling_the_image_by_a_window_rolls_the_features():
    model = small(depths=(2,), num_heads=(2,))
    x = torch.randn(1, 3, 128, 128)
    block = model.layers[0].blocks[0]
    with torch.no_grad():
        tokens = model.patch_embed(x)
        rolled = block(tokens.roll((4, 8), (1, 2)))
        torch.testing.assert_close(rolled, block(tokens).roll((4, 8), (1, 2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [160, 192, 224, 256, 320, 384, 512])
def test_windows_follow_the_image(side):
    def windows(model):
        return {module.window_size for module in attentions(model)}

    model = small(img_size=side)
    assert windows(model) == {(side // 32, side // 32)}
    model = small(img_size=240)
    model.set_input_size((side, 224))
    assert windows(model) == {(side // 32, 7)}
    assert model(torch.randn(1, 3, side, 224)).shape == (1, 5)


def test_a_window_once_given_stays_in_proportion():
    model = small(img_size=128, window_size=8)
    model.set_input_size((256, 256))
    assert {module.window_size for module in attentions(model)} == {(16, 16)}
    model = small(img_size=128)
    model.set_input_size((128, 128), window_size=8)
    model.set_input_size((64, 64))
    assert {module.window_size for module in attentions(model)} == {(4, 4)}


def test_a_resized_model_equals_one_built_for_that_size():
    resized, built = small("mixed", img_size=128), small("mixed", img_size=192)
    resized.set_input_size((192, 192))
    resized.load_state_dict(built.state_dict())
    x = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        assert torch.equal(resized(x), built(x))


@pytest.mark.parametrize("rotary", [None, axial])
def test_bias_tables_are_resized_bicubically(rotary):
    model = small("axial_rpb", rotary=rotary)
    before = model.layers[0].blocks[1].attn.relative_position_bias_table.detach().clone()
    model.set_input_size((96, 192))
    image = before.t().reshape(1, 2, 7, 7)
    expected = interpolate(image, size=(5, 11), mode="bicubic", align_corners=False).reshape(2, -1).t()
    assert torch.equal(model.layers[0].blocks[1].attn.relative_position_bias_table, expected)
    assert model(torch.randn(1, 3, 96, 192)).shape == (1, 5)


def test_optimisers_are_told_what_not_to_decay():
    model = small("mixed_rpb")
    names = {name for name, _ in model.named_parameters() if name.endswith(("rope_freqs", "position_bias_table"))}
    assert len(names) == 8
    assert model.no_weight_decay() == names
    assert all("rope_freqs" in name for name in small("mixed").no_weight_decay())


def test_a_gradient_reaches_all_frequencies_twice():
    model = small("mixed").train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.randn(2, 3, 128, 128)).square().sum().backward()
        assert all(module.rope_freqs.grad.abs().sum() > 0 for module in attentions(model))
        optimiser.step()


def test_frozen_layers_in_evaluation_still_pass_gradients_to_frequencies():
    module = attention()
    module(torch.randn(1, 15, 16)).sum().backward()
    assert module.rope_freqs.grad is not None


def test_initial_frequencies_are_turned_axial_ones():
    torch.manual_seed(3)
    model = small("mixed")
    x, y = torch.stack([module.rope_freqs for module in attentions(model)[:2]]).detach().double().unbind(1)
    rungs = 10.0 ** (-torch.arange(2) / 2).double().repeat(2)
    torch.testing.assert_close((x**2 + y**2).sqrt(), rungs.expand_as(x))
    torch.testing.assert_close(x[..., :2] * x[..., 2:], -y[..., :2] * y[..., 2:])
    angles = torch.atan2(y[..., 0], x[..., 0]).flatten()
    assert len(angles.unique()) == 4
    torch.manual_seed(3)
    assert torch.equal(attentions(small("mixed"))[3].rope_freqs, attentions(model)[3].rope_freqs)


class TestKeptPhases:
    @pytest.fixture
    def counted(self, monkeypatch):
        builds = []
        build = RotaryWindowAttention._build
        monkeypatch.setattr(RotaryWindowAttention, "_build", lambda self: builds.append(self) or build(self))
        return builds

    @pytest.mark.parametrize("rotary", [axial, mixed])
    def test_evaluation_builds_once(self, counted, rotary):
        module, x = attention(rotary), torch.randn(2, 15, 16)
        with torch.no_grad():
            assert torch.equal(module(x), module(x))
        assert len(counted) == 1
        assert not any("_kept" in key or key == "turn" for key in module.state_dict())

    @pytest.mark.parametrize(
        "change",
        [
            lambda module: module.rope_freqs.mul_(2),
            lambda module: module.load_state_dict({k: 2 * v for k, v in module.state_dict().items()}),
            lambda module: module.load_state_dict({k: 2 * v for k, v in module.state_dict().items()}, assign=True),
            lambda module: setattr(module.rope_freqs, "data", 2 * module.rope_freqs),
            lambda module: torch.optim.AdamW([module.rope_freqs], lr=1.0, foreach=True).step(),
        ],
        ids=["in place", "load", "assign", "data", "foreach"],
    )
    def test_changed_frequencies_are_noticed(self, change):
        module, x = attention(), torch.randn(2, 15, 16)
        module.rope_freqs.grad = torch.ones_like(module.rope_freqs)
        with torch.no_grad():
            before = module.turn().clone()
            change(module)
            assert not torch.equal(before, module.turn())
            fresh = deepcopy(module)
            fresh._kept = None
            assert torch.equal(fresh(x), module(x))

    @pytest.mark.parametrize("training", [False, True])
    def test_fused_optimisers_which_bump_no_version_are_noticed(self, training):
        module, x = attention(), torch.randn(2, 15, 16)
        optimiser = torch.optim.AdamW(module.parameters(), lr=1.0, fused=True)
        with torch.no_grad():
            before = module.turn().clone()
        module.train(training)(x).square().sum().backward()
        optimiser.step()
        with torch.no_grad():
            assert not torch.equal(module.eval().turn(), before)

    def test_window_and_its_shape_are_noticed(self):
        module = attention(window=(2, 8))
        with torch.no_grad():
            before = module.turn()
            module.set_window_size((4, 4))
            assert module.turn().shape == before.shape
            assert not torch.equal(module.turn(), before)

    def test_training_builds_every_step(self, counted):
        module, x = attention().train(), torch.randn(2, 15, 16)
        for step in range(3):
            module(x).sum().backward()
            assert len(counted) == step + 1
        with torch.no_grad():
            module(x)
        assert len(counted) == 4

    def test_training_forgets_what_evaluation_kept(self, counted):
        module, x = attention(), torch.randn(2, 15, 16)
        with torch.no_grad():
            module(x)
            module.train().eval()(x)
        assert len(counted) == 2

    def test_phases_kept_in_inference_mode_serve_autograd(self):
        module = attention(axial)
        with torch.inference_mode():
            module(torch.randn(2, 15, 16))
        x = torch.randn(2, 15, 16, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None

    def test_a_copy_builds_its_own(self):
        module, x = attention(), torch.randn(2, 15, 16)
        with torch.no_grad():
            module(x)
            copy = deepcopy(module)
            copy.rope_freqs.mul_(2)
            assert not torch.equal(copy(x), module(x))


class TestPrecision:
    @pytest.mark.parametrize("rotary", [axial, mixed])
    def test_autocast_leaves_the_phases_alone(self, rotary):
        module, x = attention(rotary, bias=True), torch.randn(2, 15, 16)
        mask = torch.zeros(1, 15, 15)
        with torch.no_grad():
            exact, output = module.turn().clone(), module(x, mask)
            module._kept = None
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(module.turn(), exact)
                rounded = module(x, mask)
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.float(), output, atol=0.02, rtol=0.02)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("rotary", "kept"), [(axial, torch.float64), (mixed, torch.float32)])
    def test_frequencies_keep_their_dtype(self, rotary, kept, dtype):
        module = attention(rotary, bias=True)
        module.rope_freqs.grad = torch.zeros_like(module.rope_freqs) if rotary is mixed else None
        with torch.no_grad():
            before = module.turn().clone()
            module = module.to(dtype)
            assert module.rope_freqs.dtype == kept
            assert module.qkv.weight.dtype == dtype
            assert torch.equal(module.turn(), before)
            assert module(torch.randn(2, 15, 16, dtype=dtype), torch.zeros(1, 15, 15)).dtype == dtype


class TestScaling:
    def test_interpolation_halves_the_angles(self):
        def halved(**layer):
            return Rotary(Axial(base=50.0), Interpolate(2.0), **layer)

        expected = phase_of(grid(3, 5).double() / 2, attention(axial).rope_freqs.transpose(0, 1))
        torch.testing.assert_close(attention(halved).turn().angle().view(15, 4), expected[0].float())

    def test_yarn_sharpens_the_softmax(self):
        def yarn(**layer):
            return Rotary(Mixed(base=10.0), YaRN(factor=2.0, original=7), learnable=True, **layer)

        module = attention(yarn)
        assert module.scale == pytest.approx(8**-0.5 * YaRN(factor=2.0, original=7).logit_gain)
        assert small(rotary=yarn)(torch.randn(1, 3, 128, 128)).shape == (1, 5)

    def test_a_dynamic_scaling_sees_the_window(self):
        def dynamic(**layer):
            return Rotary(Axial(base=50.0), DynamicNTK(factor=2.0, original=7), **layer)

        assert torch.equal(attention(dynamic, window=(7, 7)).turn(), attention(axial, window=(7, 7)).turn())
        assert not torch.equal(attention(dynamic, window=(12, 7)).turn(), attention(axial, window=(12, 7)).turn())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="bag of patches"):
        RopeSwin(rotary=None, bias=False)
    with pytest.raises(ValueError, match="2 axes, the rotary has 3"):
        attention(lambda **layer: Rotary(Axial(base=50.0, axes=3), head_dim=12))
    with pytest.raises(ValueError, match="no hosted weights"):
        timm.create_model("swin_rope_axial_tiny_patch4_window7_224", pretrained=True)


def test_stochastic_depth_rises_linearly():
    model = small(depths=(2, 3), drop_path_rate=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("kind", ["axial_rpb", "mixed"])
def test_a_model_comes_alive_from_the_meta_device(kind):
    with torch.device("meta"):
        model = small(kind)
    model.to_empty(device="cpu").init_weights()
    model.layers.apply(lambda m: m.init_non_persistent_buffers() if hasattr(m, "init_non_persistent_buffers") else None)
    built = small(kind)
    model.load_state_dict(built.state_dict())
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(model(x), built(x))


def test_features_are_maps_of_all_strides():
    model = small("mixed", features_only=True, depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4))
    maps = model(torch.randn(2, 3, 128, 128))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    model.model.set_input_size((64, 128))
    assert model(torch.randn(2, 3, 64, 128))[0].shape == (2, 16, 16, 32)


def test_activation_checkpointing_changes_nothing():
    model, x = small("mixed").train(), torch.randn(2, 3, 128, 128)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("kind", "backend", "depths"),
    [
        ("axial", "aot_eager", (2, 2)),
        ("mixed_rpb", "aot_eager", (2, 2)),
        pytest.param("mixed", "inductor", (2,), marks=pytest.mark.slow),
    ],
)
def test_compiling_changes_nothing(kind, backend, depths):
    torch._dynamo.reset()
    model, x = small(kind, depths=depths, num_heads=(2, 4)[: len(depths)]), torch.randn(2, 3, 128, 128)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        eager = model(x)
        torch.testing.assert_close(compiled(x), eager, atol=1e-5, rtol=0)
        for module in attentions(model):
            module.rope_freqs.mul_(1.5)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=0)
    model.train()
    compiled(x).square().sum().backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-4)
