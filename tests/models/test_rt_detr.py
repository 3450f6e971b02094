"""RT-DETR: transformers' own model and losses are the oracle; padding, order and emptiness are laws."""

import copy
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import max_pool2d
from torchvision.ops import box_iou, generalized_box_iou

transformers = pytest.importorskip("transformers", reason="pip install -c constraints.txt -e '.[coco]'")
pytest.importorskip("scipy", reason="pip install -c constraints.txt -e '.[coco]'")

from transformers import RTDetrV2ForObjectDetection  # noqa: E402
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss  # noqa: E402
from transformers.modeling_outputs import BackboneOutput  # noqa: E402

from models.detr_losses import LossWeights, Matches, Objects, match, overlap, terms, to_centres, to_corners  # noqa: E402
from models.pyramids import SimplePyramid  # noqa: E402
from models.rt_detr import RTDetr  # noqa: E402
from models.vit import mixed  # noqa: E402
from models.windowed_vit import WindowedViT  # noqa: E402


class Objectlist(NamedTuple):
    boxes: torch.Tensor
    labels: torch.Tensor


class Convolutions(nn.Module):
    """A backbone by the protocol: each map sees its own cells only, so that padding cannot leak in it."""

    def __init__(self, strides=(8, 16, 32), channels=(6, 10, 12)):
        super().__init__()
        self.strides, self.channels = strides, channels
        self.stems = nn.ModuleList(
            nn.Conv2d(3, wide, stride, stride) for stride, wide in zip(strides, channels, strict=True)
        )

    def forward(self, images, valid=None):
        maps = []
        for stem, stride in zip(self.stems, self.strides, strict=True):
            h, w = images.shape[-2:]
            padded = nn.functional.pad(images, (0, -w % stride, 0, -h % stride))
            maps.append(stem(padded).tanh())
            if valid is not None:
                mask = nn.functional.pad(valid[:, None].float(), (0, -w % stride, 0, -h % stride))
                maps[-1] = maps[-1] * max_pool2d(mask, stride)
        return maps


def small(**changes):
    settings = {
        "width": 32, "queries": 12, "decoder_layers": 2, "heads": 4, "points": 2, "feed_forward": 48,
        "denoising": 10, "detections": 20,
    }  # fmt: skip
    return RTDetr(changes.pop("backbone", None) or Convolutions(), 5, **{**settings, **changes})


def lively(model):
    """Draws what starts at zero, else a test of the decoder's boxes and offsets tests nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and "n_points_scale" not in name and "backbone" not in name:
                value.add_(torch.randn_like(value) * 0.1)
    return model


def scenes(*counts, size=96):
    torch.manual_seed(2)
    corners = [torch.rand(n, 2) * size * 0.6 for n in counts]
    sides = [torch.rand(n, 2) * size * 0.3 + 4 for n in counts]
    labels = [torch.randint(5, (n,)) for n in counts]
    return [Objectlist(torch.cat((c, c + s), 1), kind) for c, s, kind in zip(corners, sides, labels, strict=True)]


def batch(*counts, size=96):
    targets = scenes(*counts, size=size)
    return torch.randn(len(counts), 3, size, size), torch.full((len(counts), 2), size), targets


def as_transformers(model):
    """transformers' own detector over the same backbone and the same weights."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.channels = model.backbone, list(model.backbone.channels)

        def forward(self, pixels):
            return BackboneOutput(feature_maps=tuple(self.inner(pixels)))

    config = copy.deepcopy(model.decoder.config)
    config.num_denoising = model.denoising
    config.backbone_config = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )
    theirs = RTDetrV2ForObjectDetection(config)
    theirs.model.backbone.model = Wrapped()
    for level, project in enumerate(model.encoder_input_proj):
        theirs.model.encoder_input_proj[level] = copy.deepcopy(project)
    head = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    missing, unexpected = theirs.model.load_state_dict(head, strict=False)
    assert not unexpected
    assert all(name.startswith("backbone.") for name in missing)
    return theirs


def described(targets, size=96):
    return [{"boxes": to_centres(boxes / size), "class_labels": labels} for boxes, labels in targets]


def test_the_head_is_transformers_own_to_rounding():
    ours = lively(small()).eval()
    theirs = as_transformers(ours).eval()
    images, sizes, _ = batch(1, 1, 1)
    with torch.no_grad():
        said, expected = ours.answer(images, sizes), theirs(images)
    torch.testing.assert_close(said.found.logits[-1], expected.logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(said.found.boxes[-1], expected.pred_boxes, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(said.found.boxes[1], expected.intermediate_reference_points[:, 0], atol=2e-6, rtol=1e-5)


def test_losses_are_those_of_transformers_with_noised_objects():
    ours = lively(small()).train()
    theirs = as_transformers(ours).train()
    images, sizes, targets = batch(3, 0, 5)
    torch.manual_seed(7)
    losses = ours(images, sizes, targets)
    torch.manual_seed(7)
    expected = theirs(images, labels=described(targets)).loss_dict
    assert len(expected) == 3 * (2 + 1 + 2)
    for name, part in {"classes": "loss_vfl", "l1": "loss_bbox", "giou": "loss_giou"}.items():
        total = sum(value for key, value in expected.items() if key.startswith(part) and "_dn_" not in key)
        torch.testing.assert_close(losses[name], total, rtol=2e-5, atol=1e-5)
    noised = sum(value for key, value in expected.items() if "_dn_" in key)
    torch.testing.assert_close(losses["denoising"], noised, rtol=2e-5, atol=1e-5)


def test_evaluation_losses_are_transformers_loss_function():
    ours = lively(small()).eval()
    images, sizes, targets = batch(4, 2)
    said = ours.answer(images, sizes).found
    expected, _, _ = RTDetrForObjectDetectionLoss(
        said.logits[-1], described(targets), images.device, said.boxes[-1], ours.decoder.config,
        said.logits[1:].transpose(0, 1), said.boxes[1:].transpose(0, 1), said.logits[0], said.boxes[0],
    )  # fmt: skip
    torch.testing.assert_close(sum(ours(images, sizes, targets).values()), expected, rtol=2e-5, atol=1e-5)


def test_overlap_is_torchvisions():
    a, b = torch.rand(6, 4) + 0.01, torch.rand(9, 4) + 0.01
    iou, giou = overlap(a[:, None], b)
    torch.testing.assert_close(iou, box_iou(to_corners(a), to_corners(b)))
    torch.testing.assert_close(giou, generalized_box_iou(to_corners(a), to_corners(b)))


def test_overlap_of_empty_boxes_is_finite():
    empty = torch.zeros(1, 4, requires_grad=True)
    iou, giou = overlap(empty, torch.zeros(1, 4))
    (iou + giou).sum().backward()
    assert iou.item() == 0
    assert empty.grad.isfinite().all()


def test_every_object_gets_the_query_that_says_it():
    boxes = torch.rand(2, 3, 8, 4) * 0.3 + 0.2
    logits = torch.full((2, 3, 8, 5), -4.0)
    objects = []
    for image, n in enumerate((3, 0, 8)):
        order = torch.randperm(8)[:n]
        boxes[1, image], labels = boxes[0, image], torch.randint(5, (n,))
        logits[:, image, order, labels] = 4.0
        objects.append(Objects(boxes[0, image, order], labels))
        objects[-1] = Objects(objects[-1].boxes.clone(), labels)
    matches = match(logits, boxes, objects, small().costs)
    wanted = torch.cat([thing.boxes for thing in objects])
    assert len(matches.target) == 2 * 11
    torch.testing.assert_close(boxes[matches.layer, matches.image, matches.query], wanted[matches.target])
    assert set(zip(matches.layer.tolist(), matches.target.tolist(), strict=True)) == {
        (layer, target) for layer in range(2) for target in range(11)
    }


def test_a_prediction_that_is_not_finite_is_matched_last():
    boxes, logits = torch.rand(1, 1, 4, 4), torch.zeros(1, 1, 4, 5)
    boxes[0, 0, 1] = torch.nan
    matches = match(logits, boxes, [Objects(torch.rand(3, 4), torch.tensor([0, 1, 2]))], small().costs)
    assert sorted(matches.query.tolist()) == [0, 2, 3]


@pytest.mark.parametrize("iou", [0.1, 0.9])
def test_matchability_pulls_the_class_of_a_bad_box_harder(iou):
    side = torch.tensor(iou).sqrt() * 0.5
    boxes = torch.tensor([0.5, 0.5, 0.0, 0.0]).add(torch.tensor([0, 0, 1, 1]) * side).view(1, 1, 1, 4)
    objects = [Objects(torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([0]))]
    matches, one = Matches(*torch.zeros(4, 1, dtype=torch.int64)), torch.ones(())
    pulls = {}
    for gamma, minimum in ((None, iou), (1.5, iou**1.5)):
        best = torch.logit(torch.tensor(minimum)).view(1, 1, 1, 1).requires_grad_()
        terms(best, boxes, matches, objects, one, gamma).classes.backward()
        torch.testing.assert_close(best.grad, torch.zeros_like(best), atol=1e-6, rtol=0)
        low = torch.full((1, 1, 1, 1), -30.0, requires_grad=True)
        terms(low, boxes, matches, objects, one, gamma).classes.backward()
        pulls[gamma] = -low.grad.item()
    assert pulls[None] == pytest.approx(iou * iou, rel=1e-4)
    assert pulls[1.5] == pytest.approx(iou**1.5, rel=1e-4)


def test_more_objects_than_queries_train():
    model = small(queries=3)
    losses = model(*batch(8, 1))
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("training", [False, True])
def test_order_of_objects_does_not_matter(training):
    model = lively(small(denoising=0)).train(training)
    images, sizes, targets = batch(6, 4)
    order = [torch.randperm(len(labels)) for _, labels in targets]
    shuffled = [Objectlist(boxes[i], labels[i]) for (boxes, labels), i in zip(targets, order, strict=True)]
    losses, again = model(images, sizes, targets), model(images, sizes, shuffled)
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value)


def test_heads_lookups_and_pointers_are_spared_from_decay():
    spared = small().no_weight_decay()
    assert spared == {name for name, value in lively(small()).named_parameters() if name in spared}
    zero = {
        name
        for name, value in small(prior=0.5).named_parameters()
        if value.ndim == 2 and not value.any() and "backbone" not in name
    }
    assert zero < spared  # what starts at zero has no direction to keep
    assert "denoising_class_embed.weight" in spared
    assert not any("linear" in name or "fc" in name or "proj" in name for name in spared)


def test_weights_scale_their_parts():
    model = lively(small()).train()
    images, sizes, targets = batch(3, 2)
    weights = LossWeights()
    torch.manual_seed(3)
    losses = model(images, sizes, targets)
    model.weights = weights._replace(classes=3 * weights.classes, denoising=2.0)
    torch.manual_seed(3)
    again = model(images, sizes, targets)
    torch.testing.assert_close(again["classes"], 3 * losses["classes"])
    torch.testing.assert_close(again["giou"], losses["giou"])
    assert again["denoising"] > 2 * losses["denoising"]


def test_a_batch_that_comes_twice_has_the_same_losses():
    model = lively(small()).eval()
    images, sizes, targets = batch(5, 2)
    losses = model(images, sizes, targets)
    twice = model(torch.cat((images, images)), torch.cat((sizes, sizes)), targets * 2)
    for name, value in losses.items():
        torch.testing.assert_close(twice[name], value)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0, 4)])
def test_images_without_objects_train_every_parameter(counts):
    model = small().train()
    losses = model(*batch(*counts))
    assert list(losses) == ["classes", "l1", "giou", "denoising"]
    sum(losses.values()).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    assert not without  # else DDP would stop
    assert all(value.grad.isfinite().all() for value in model.parameters())
    if not any(counts):
        assert losses["l1"] == losses["giou"] == losses["denoising"] == 0
        assert losses["classes"] > 0


@pytest.mark.parametrize("size", [(96, 64), (75, 50), (33, 96)])
def test_padding_changes_nothing_an_image_is_answered_with(size):
    model = lively(small()).eval()
    h, w = size
    alone = torch.randn(1, 3, h, w)
    images = torch.zeros(2, 3, 150, 130)
    images[:1, :, :h, :w], images[1] = alone, torch.randn(3, 150, 130)
    target = [Objectlist(torch.tensor([[3.0, 4.0, 30.0, 25.0]]), torch.tensor([2]))]
    with torch.no_grad():
        found = model(alone, torch.tensor([[h, w]]))[0]
        padded = model(images, torch.tensor([[h, w], [150, 130]]))[0]
        losses = model(alone, torch.tensor([[h, w]]), target)
        again = model(images[:1], torch.tensor([[h, w]]), target)
    assert len(found.scores) == 20
    # sampling points are found again from another grid's coordinates: 1e-3 of a pixel is float32's rounding
    torch.testing.assert_close(padded.scores, found.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded.boxes, found.boxes, atol=1e-3, rtol=1e-4)
    assert torch.equal(padded.labels, found.labels)
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value, atol=1e-4, rtol=1e-4)


def test_an_image_with_fewer_cells_than_queries_is_answered_the_same():
    model = lively(small(queries=40)).eval()  # 32 x 32 has 16 + 4 + 1 cells
    alone, images = torch.randn(1, 3, 32, 32), torch.randn(2, 3, 96, 96)
    images[0] = 0
    images[0, :, :32, :32] = alone[0]
    with torch.no_grad():
        model.detections = 500
        found = model(alone, torch.tensor([[32, 32]]))[0]
        padded = model(images, torch.tensor([[32, 32], [96, 96]]))[0]
    assert len(padded.scores) == len(found.scores) == 21 * 5
    torch.testing.assert_close(padded.scores, found.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded.boxes, found.boxes, atol=1e-3, rtol=1e-4)


def test_detections_are_inside_best_first_and_no_box_twice_for_a_class():
    model = lively(small()).eval()
    sizes = torch.tensor([[90, 60], [64, 96]])
    for found, (h, w) in zip(model(torch.randn(2, 3, 96, 96), sizes), sizes.tolist(), strict=True):
        assert found.boxes.shape == (20, 4)
        assert found.scores.dtype == found.boxes.dtype == torch.float32
        assert found.labels.dtype == torch.int64
        assert all(a >= b for a, b in pairwise(found.scores.tolist()))
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 0::2] <= w).all()
        assert (found.boxes[:, 1::2] <= h).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        pairs = [tuple(row) for row in torch.cat((found.boxes, found.labels[:, None]), dim=1).tolist()]
        assert len(set(pairs)) == len(pairs)


def test_bfloat16_finds_what_float32_finds():
    model = lively(small()).train()
    images, sizes, targets = batch(4, 0, 3)
    torch.manual_seed(5)
    exact = model(images, sizes, targets)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images, sizes, targets)
        sum(losses.values()).backward()
        found = model.eval()(images, sizes)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        # 8 bits of mantissa, and other cells may be chosen as queries
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=0.02)
    assert all(value.grad.isfinite().all() for value in model.parameters())
    assert found[0].boxes.dtype == torch.float32


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    model = small().eval()
    images, sizes, targets = batch(2, 1)
    with torch.inference_mode():
        model(images, sizes)
    sum(model.train()(images, sizes, targets).values()).backward()


def test_state_goes_round():
    model, other = lively(small()), small()
    other.load_state_dict(model.state_dict())
    images, sizes, _ = batch(1)
    for a, b in zip(model.eval()(images, sizes)[0], other.eval()(images, sizes)[0], strict=True):
        assert torch.equal(a, b)


def test_a_few_steps_find_two_squares():
    torch.manual_seed(0)
    model = small(backbone=Convolutions(channels=(16, 16, 16)), denoising=20)
    images, sizes = torch.zeros(2, 3, 64, 64), torch.full((2, 2), 64)
    targets = [
        Objectlist(torch.tensor([[8.0, 8.0, 28.0, 28.0]]), torch.tensor([1])),
        Objectlist(torch.tensor([[30.0, 20.0, 60.0, 44.0]]), torch.tensor([3])),
    ]
    images[0, 0, 8:28, 8:28] = images[1, 1, 20:44, 30:60] = 2.0
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(images, sizes, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for found, target in zip(model.eval()(images, sizes), targets, strict=True):
        assert found.labels[0] == target.labels[0]
        assert box_iou(found.boxes[:1], target.boxes).item() > 0.5


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"backbone": Convolutions((8, 32), (4, 4))}, "strides double"),
        ({"width": 30}, "width=30"),
        ({"box_noise": 0.0}, "box_noise"),
    ],
    ids=["strides", "width", "noise"],
)
def test_arguments_that_do_not_suit_are_named(changes, culprit):
    with pytest.raises(ValueError, match=culprit):
        small(**changes)


def test_a_label_that_is_no_class_is_named():
    images, sizes, targets = batch(1, 2)
    targets[1].labels[0] = 5
    with pytest.raises(ValueError, match="0 … 4"):
        small()(images, sizes, targets)


@pytest.mark.parametrize("strides", [(16,), (8, 16), (4, 8, 16, 32)], ids=str)
def test_any_number_of_maps(strides):
    model = small(backbone=Convolutions(strides, (8,) * len(strides)), anchor=0.1)
    sum(model(*batch(2, 0)).values()).backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None]


def test_no_weights_of_another_backbone_come_along():
    model = small()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "backbone", "encoder_input_proj", "encoder", "decoder_input_proj", "denoising_class_embed", "enc_output",
        "enc_score_head", "enc_bbox_head", "decoder",
    }  # fmt: skip
    assert sum(value.numel() for value in model.backbone.parameters()) == sum(
        value.numel() for value in Convolutions().parameters()
    )


def rope_pyramid():
    trunk = WindowedViT(
        rotary=mixed, img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, window=4, global_blocks=[1],
        init_values=None, init_std=0.2,
    )  # fmt: skip
    return SimplePyramid(trunk, channels=16, strides=[8, 16, 32])


@pytest.mark.parametrize("counts", [(0, 0), (3, 1)])
def test_gradient_reaches_the_frequencies_of_the_backbone(counts):
    model = small(backbone=rope_pyramid())
    sum(model(*batch(*counts)).values()).backward()
    missing = [name for name, value in model.named_parameters() if value.grad is None and value.requires_grad]
    assert not missing
    if any(counts):
        frequencies = [value.grad for name, value in model.named_parameters() if "rope" in name]
        assert frequencies
        assert all(grad.abs().max() > 0 for grad in frequencies)


def test_padding_changes_nothing_with_a_rotary_backbone():
    model = lively(small(backbone=rope_pyramid())).eval()
    alone, images = torch.randn(1, 3, 90, 52), torch.zeros(2, 3, 128, 128)
    images[:1, :, :90, :52], images[1] = alone, torch.randn(3, 128, 128)
    with torch.no_grad():
        found = model(alone, torch.tensor([[90, 52]]))[0]
        padded = model(images, torch.tensor([[90, 52], [128, 128]]))[0]
    torch.testing.assert_close(padded.scores, found.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded.boxes, found.boxes, atol=1e-3, rtol=1e-4)
