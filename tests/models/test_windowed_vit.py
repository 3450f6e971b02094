"""The windowed ViT: a plain reference window by window, the padding law, any size, weights of a classifier, memory saved."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import pad

from models.convert import load_checkpoint
from models.dense import valid_pixels
from models.tables import resize_table
from models.vit import RopeViT, axial, mixed
from models.windowed_vit import WindowedViT, join_windows, split_windows, valid_cells
from rotary import Rotary, rotate_reference
from rotary.frequencies import Axial, Mixed
from rotary.positions import augment, grid, normalised_grid
from rotary.scaling import DynamicNTK, Identity, YaRN

SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}


def double_grid(height, width, *, device=None):
    return grid(height, width, device).double()  # whose phases stay float64


def tiny(rotary=mixed, **changes):
    arguments = {**SHAPE, "window": 3, "global_blocks": (1,), "init_values": 0.5, "init_std": 0.2}
    return WindowedViT(rotary=rotary, **{**arguments, **changes})


def padded(sizes, height, width):
    """Images of noise, each alone, and in one batch whose padding is noise of another kind."""
    alone = [torch.randn(1, 3, *size, dtype=torch.float64) for size in sizes]
    batch = torch.full((len(sizes), 3, height, width), 7.0, dtype=torch.float64)
    for image, place in zip(alone, batch, strict=True):
        place[:, : image.shape[2], : image.shape[3]] = image[0]
    return alone, batch, valid_pixels(torch.tensor(sizes), height, width)


def assert_padding_law(model, sizes, height, width):
    """Each image alone gives the values and gradients that it gives within a padded batch, whose padding is zero."""
    alone, batch, valid = padded(sizes, height, width)
    together = [one.clone() for one in model(batch, valid)]
    weights = [torch.randn_like(one) for one in together]
    parameters = list(model.parameters())
    in_batch = torch.autograd.grad(sum((a * b).sum() for a, b in zip(together, weights, strict=True)), parameters)
    by_itself = [torch.zeros_like(one) for one in parameters]
    for index, image in enumerate(alone):
        maps = model(image)
        for level, own in enumerate(maps):
            rows, columns = own.shape[2:]
            here = together[level][index]
            torch.testing.assert_close(here[:, :rows, :columns], own[0], atol=1e-10, rtol=1e-10)
            assert not here[:, rows:].any()
            assert not here[:, :, columns:].any()
        loss = sum((own[0] * weights[i][index, :, : own.shape[2], : own.shape[3]]).sum() for i, own in enumerate(maps))
        for total, gradient in zip(by_itself, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient
    for found, expected, parameter in zip(in_batch, by_itself, parameters, strict=True):
        # learned frequencies are float32, so is their gradient
        tolerance = 1e-9 if parameter.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("rows", "columns"), [(6, 9), (7, 5), (1, 1), (3, 10)])
def test_windows_are_put_back(rows, columns):
    x = torch.randn(2, rows, columns, 4, 2)
    windows = split_windows(x, 3)
    assert windows.shape == (2 * -(-rows // 3) * -(-columns // 3), 3, 3, 4, 2)
    assert torch.equal(join_windows(windows, (rows, columns)), x)
    assert torch.equal(windows[0, : min(rows, 3), : min(columns, 3)], x[0, :3, :3])


def test_cells_that_hold_a_pixel():
    valid = valid_pixels(torch.tensor([[9, 4], [1, 12]]), 10, 12)
    cells = valid_cells(valid, 4)
    assert cells.shape == (2, 3, 3)
    assert torch.equal(cells, valid_pixels(torch.tensor([[3, 1], [1, 3]]), 3, 3))


def reference_attention(attention, x, positions, layer):
    """(n, c) tokens at (n, 2) positions that see each other, by the definition."""
    q, k, v = attention.qkv(x).view(len(x), 3, attention.num_heads, attention.head_dim).permute(1, 2, 0, 3)
    phase = layer(positions)  # (h|1, n, r)
    logits = rotate_reference(q, phase) @ rotate_reference(k, phase).transpose(1, 2) * attention.scale
    return attention.proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))


def reference_map(model, image, layers, side, global_blocks):
    """One image (3, H, W) through the blocks, looping over windows; all tokens keep the coordinates of the whole grid."""
    image = pad(image, (0, -image.shape[2] % 4, 0, -image.shape[1] % 4))
    x = model.patch_embed.proj(image[None])[0].permute(1, 2, 0)  # (rows, columns, c)
    rows, columns = x.shape[:2]
    where = grid(rows, columns).double().view(rows, columns, 2)
    for index, block in enumerate(model.blocks):
        step = max(rows, columns) if index in global_blocks else side
        normed, attended = block.norm1(x), torch.zeros_like(x)
        for top in range(0, rows, step):
            for left in range(0, columns, step):
                here = (slice(top, top + step), slice(left, left + step))
                tokens, place = normed[here].flatten(0, 1), where[here].flatten(0, 1)
                out = reference_attention(block.attn, tokens, place, layers[index])
                attended[here] = out.view(*normed[here].shape)
        x = x + block.gamma_1 * attended
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
    return x.permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["axial", "mixed"])
@pytest.mark.parametrize("size", [(24, 36), (25, 46), (10, 7)])
def test_equals_a_loop_over_windows_in_global_coordinates(kind, size):
    model = tiny(axial if kind == "axial" else mixed, positions=double_grid).double().eval()
    if kind == "axial":
        layers = [model.rope.rotary] * 3
    else:
        layers = [mixed(head_dim=12, heads=2) for _ in range(3)]
        for index, layer in enumerate(layers):
            layer.frequencies.data = model.rope.freqs.data[:, index].transpose(0, 1)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        (found,) = model(images)
        expected = torch.stack([reference_map(model, image, layers, 3, (1,)) for image in images])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_a_window_of_the_whole_grid_is_a_global_block():
    wide = tiny(window=6, global_blocks=()).double()
    whole = tiny(window=None).double()
    whole.load_state_dict(wide.state_dict())
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(wide(images), whole(images), atol=1e-10, rtol=1e-10)


def test_equals_the_classifier_on_shared_weights():
    classifier = RopeViT(**SHAPE, rotary=mixed, init_values=0.5, init_std=0.2, num_classes=5).double()
    dense = tiny(window=None, class_token=True, taps=(0, 2)).double()
    state = {key: value for key, value in classifier.state_dict().items() if not key.startswith(("head.", "norm."))}
    dense.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = classifier.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    torch.testing.assert_close(dense(images), expected, atol=1e-10, rtol=1e-10)


class TestPadding:
    SIZES = ((21, 50), (41, 13), (8, 8))

    @pytest.mark.parametrize("rotary", [axial, mixed], ids=["axial", "mixed"])
    @pytest.mark.parametrize(
        "changes",
        [{}, {"window": None, "class_token": True}, {"window": 2, "global_blocks": (), "taps": (0, 1, 2)}],
        ids=["windows", "global", "taps"],
    )
    def test_changes_no_image(self, rotary, changes):
        assert_padding_law(tiny(rotary, **changes).double(), self.SIZES, 47, 58)

    @pytest.mark.parametrize(
        "changes",
        [
            {"absolute": True},
            {"absolute": True, "rotary": None},
            {"positions": normalised_grid},
            {"rotary": partial(Rotary, Axial(100.0), DynamicNTK(factor=2.0, original=4))},
            {"window": None, "class_token": True, "positions": normalised_grid},
        ],
        ids=["ape_mixed", "ape", "normalised", "dynamic", "normalised_global"],
    )
    def test_changes_no_image_where_positions_follow_its_extent(self, changes):
        assert_padding_law(tiny(**changes).double(), self.SIZES, 47, 58)

    def test_an_image_of_padding_alone_is_zero_and_poisons_nothing(self):
        model, masks = tiny(), []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda block, x, named: masks.append(named["attn_mask"]), with_kwargs=True)
        valid = valid_pixels(torch.tensor([[24, 24], [0, 0]]), 24, 24)
        (found,) = model(torch.randn(2, 3, 24, 24), valid)
        found.square().sum().backward()
        assert [mask.any(-1).all() for mask in masks] == [True] * 3  # on a softmax over nothing the kernels differ
        assert found.isfinite().all()
        assert not found[1].any()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_nothing_padded_takes_no_mask(self, monkeypatch):
        model = tiny()
        seen = []
        for block in model.blocks:
            plain = block.attn.forward
            watched = lambda x, attn_mask=None, plain=plain, **rest: (  # noqa: E731
                seen.append(attn_mask) or plain(x, attn_mask=attn_mask, **rest)
            )
            monkeypatch.setattr(block.attn, "forward", watched)
        images = torch.randn(1, 3, 24, 36)
        torch.testing.assert_close(model(images, torch.ones(1, 24, 36, dtype=torch.bool)), model(images))
        assert seen == [None] * 6
        model(torch.randn(1, 3, 28, 36))
        assert [mask is None for mask in seen[6:]] == [False, True, False]


class TestAnySize:
    @pytest.mark.parametrize("size", [(16, 16), (5, 33), (1, 1), (30, 47)])
    def test_maps_cover_the_image(self, size):
        model = tiny(taps=(0, 2), absolute=True)
        maps = model(torch.randn(2, 3, *size))
        assert [one.shape for one in maps] == [(2, 24, -(-size[0] // 4), -(-size[1] // 4))] * 2

    def test_nothing_learned_changes_with_the_size(self):
        model = tiny(absolute=True).eval()
        before = copy.deepcopy(model.state_dict())
        first = model(torch.ones(1, 3, 16, 16))[0]
        model(torch.randn(2, 3, 40, 28))
        assert torch.equal(model(torch.ones(1, 3, 16, 16))[0], first)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_the_absolute_table_is_resized_as_tables_are(self):
        model = tiny(None, absolute=True)
        given = torch.randn(1, 3, 24, 20)
        resized = resize_table(model.pos_embed, (4, 4), (6, 5)).view(1, 6, 5, 24)
        seen = []
        handle = model.norm_pre.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model(given)
        handle.remove()
        torch.testing.assert_close(seen[0] - model.patch_embed(given), resized, atol=1e-6, rtol=0)

    def test_a_shifted_image_gives_a_shifted_map_whatever_was_learned(self):
        model = tiny(window=None).double()
        image = torch.randn(1, 3, 12, 12, dtype=torch.float64)
        near, far = pad(image, (8, 0, 4, 0)), pad(image, (0, 8, 0, 4))
        valid_near, valid_far = (x.abs().sum(1) > 0 for x in (near, far))
        moved = model(near, valid_near)[0][..., 1:, 2:]
        # phases of these positions are float32
        torch.testing.assert_close(moved, model(far, valid_far)[0][..., :3, :3], atol=1e-5, rtol=0)

    def test_set_input_size_resizes_the_table_for_good(self):
        model = tiny(absolute=True)
        expected = resize_table(model.pos_embed, (4, 4), (5, 6)).detach()
        model.set_input_size((20, 24))
        assert torch.equal(model.pos_embed, expected)
        assert model(torch.randn(1, 3, 20, 24))[0].shape == (1, 24, 5, 6)
        with pytest.raises(ValueError, match="patches are 4 pixels a side"):
            model.set_input_size((32, 32), (8, 8))


class TestPhases:
    def test_a_block_gets_the_table_it_needs(self):
        model = tiny().eval()
        tables = model.rope.get_embed((7, 5))
        assert [len(table) for table in tables] == [9, 35, 9]
        whole = WindowedViT(**SHAPE, rotary=mixed, window=None)
        whole.load_state_dict(model.state_dict())
        expected = whole.rope.get_embed((7, 5))
        assert torch.equal(tables[1], expected[1])
        assert torch.equal(tables[0], whole.rope.get_embed((3, 3))[0])

    def test_kept_until_the_grid_changes(self, monkeypatch):
        model = tiny(axial).eval()
        calls, build = [], model.rope._build
        monkeypatch.setattr(model.rope, "_build", lambda shape: calls.append(shape) or build(shape))
        for size in ((24, 24), (24, 24), (28, 20)):
            model(torch.randn(1, 3, *size))
        assert calls == [(6, 6), (7, 5)]

    def test_augmentation_draws_once_for_windows_and_grid(self):
        model = tiny(axial, augmentation=partial(augment, rescale=2.0))
        window, whole, _ = model.rope.get_embed((3, 4))
        torch.testing.assert_close(whole.view(3, 4, -1)[:, :3], window.view(3, 3, -1))
        assert not torch.allclose(window, model.rope.get_embed((3, 4))[0])
        model.eval()
        assert torch.equal(model.rope.get_embed((3, 3))[0], tiny(axial).eval().rope.get_embed((3, 3))[0])

    def test_yarn_reaches_the_softmax_scale_of_global_blocks(self):
        model = tiny(partial(Rotary, Axial(100.0), YaRN(factor=4.0, original=8)))
        longer, window = 12**-0.5 * (0.1 * 1.3862943611198906 + 1) ** 2, 12**-0.5
        expected = [longer if side is None else window for side in model.windows]
        assert [block.attn.scale for block in model.blocks] == pytest.approx(expected)


class TestWeights:
    @pytest.mark.parametrize("changes", [{}, {"window": None, "class_token": True}], ids=["windows", "class_token"])
    @pytest.mark.parametrize("naver", [False, True], ids=["ours", "naver"])
    @pytest.mark.parametrize("pool", ["token", "avg"])
    def test_of_a_classifier_come_in(self, tmp_path, changes, naver, pool):
        classifier = RopeViT(**{**SHAPE, "img_size": 24}, rotary=mixed, absolute=True, num_classes=5, global_pool=pool)
        state = dict(classifier.state_dict())
        if naver:
            state["freqs"] = state.pop("rope.freqs").flatten(2)
            state["freqs_t_x"] = state["freqs_t_y"] = torch.arange(36.0)
        torch.save({"model": state}, tmp_path / "last.pth")
        model = tiny(absolute=True, init_values=1e-4, **changes)
        loaded = load_checkpoint(model, tmp_path / "last.pth", resize=True, skip=model.not_pretrained)
        assert loaded.resized == ("pos_embed",)
        kept = {"cls_token"} if not changes else set()
        norm = "norm" if pool == "token" else "fc_norm"
        assert set(loaded.skipped) == {"head.weight", "head.bias", f"{norm}.weight", f"{norm}.bias"} | kept
        theirs = classifier.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(value, theirs[key]) or key == "pos_embed", key
        assert set(theirs) - set(model.state_dict()) == set(loaded.skipped)

    @pytest.mark.parametrize("changes", [{}, {"window": None, "class_token": True}, {"absolute": True}])
    def test_every_parameter_is_used(self, changes):
        model = tiny(**changes)
        sum(one.square().sum() for one in model(torch.randn(2, 3, 20, 24))).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_no_decay_on_tables_and_frequencies(self):
        model = tiny(absolute=True)
        assert {"pos_embed", "rope.freqs"} <= model.no_weight_decay()

    def test_constant_drop_path(self):
        model = tiny(drop_path_rate=0.2)
        assert {block.drop_path1.drop_prob for block in model.blocks} == {0.2}


@pytest.mark.parametrize("valid", [False, True])
def test_recomputing_blocks_changes_no_gradient(valid):
    plain, saving = tiny(absolute=True), tiny(absolute=True, checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 22, 31)
    mask = valid_pixels(torch.tensor([[22, 31], [13, 18]]), 22, 31) if valid else None
    ours, theirs = (
        torch.autograd.grad(model(images, mask)[0].square().sum(), list(model.parameters()))
        for model in (saving, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_stays():
    model = tiny(absolute=True).bfloat16()
    assert model.rope.freqs.dtype == torch.float32
    images = torch.randn(2, 3, 22, 31, dtype=torch.bfloat16)
    (found,) = model(images, valid_pixels(torch.tensor([[22, 31], [13, 18]]), 22, 31))
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": (1,)}, "blocks after the last tap, 1, are unused; give it 2"),
        ({"taps": (2, 0)}, r"taps \[2, 0\] must be rising numbers of blocks, 0 … 2"),
        ({"taps": ()}, "taps"),
        ({"global_blocks": (3,)}, r"global_blocks \[3\] must be numbers of blocks, 0 … 2"),
        ({"window": 0}, "window must be a number of patches or None, got 0"),
        ({"class_token": True}, "belong to no window"),
        ({"num_reg_tokens": 2}, "belong to no window"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [False, True])
def test_compiled_equals_eager_without_a_graph_break(padding):
    model = tiny()
    compiled = torch.compile(model, fullgraph=True)
    images = torch.randn(2, 3, 22, 31)
    valid = valid_pixels(torch.tensor([[22, 31], [13, 18]]), 22, 31) if padding else None
    (expected,), (found,) = model(images, valid), compiled(images, valid)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    ours, theirs = (torch.autograd.grad(out.square().sum(), model.parameters()) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)  # sums taken in another order


@pytest.mark.parametrize("law", [Axial(base=100.0), Mixed(base=10.0)], ids=["axial", "mixed"])
def test_scalings_leave_windows_as_they_were_trained(law):
    def factory(scaling, **layer):
        return Rotary(law, scaling, learnable=isinstance(law, Mixed), **layer)

    def phases(scaling):
        torch.manual_seed(0)
        trunk = WindowedViT(
            rotary=partial(factory, scaling),
            embed_dim=32,
            depth=2,
            num_heads=2,
            patch_size=4,
            window=4,
            global_blocks=[1],
        )
        gains = [block.attn.scale for block in trunk.blocks]
        return trunk.rope.get_embed((4, 4)), gains

    (window, whole), gains = phases(Identity())
    (window_scaled, whole_scaled), gains_scaled = phases(YaRN(factor=4.0, original=16))
    assert torch.equal(window, window_scaled)
    assert not torch.allclose(whole, whole_scaled)
    assert gains_scaled[0] == gains[0]
    assert gains_scaled[1] > gains[1]
