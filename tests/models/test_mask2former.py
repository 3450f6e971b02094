"""Mask2Former against transformers' whole model on the same weights, and by what its losses and scores must keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, pad

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from models.dense import valid_pixels
from models.mask2former import Mask2Former, semantic_scores
from models.swin import mixed
from models.swin_stages import SwinStages

TINY = {"hidden": 32, "heads": 4, "queries": 10, "encoder_layers": 1, "decoder_layers": 3, "feed_forward": 64}


def backbone(**others) -> SwinStages:
    shape = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "drop_path_rate": 0.0}
    return SwinStages(rotary=mixed, stages=(0, 1, 2, 3), **{**shape, **others})


def net(**others) -> Mask2Former:
    return Mask2Former(backbone(), 5, **{**TINY, "points": 256, **others})


def regions(b, height, width) -> torch.Tensor:
    """Class maps of a few large pieces, some of them ignored."""
    pieces = torch.tensor([0, 1, 3, 4, 255])[torch.randint(0, 5, (b, 3, 4))]
    return interpolate(pieces[:, None].float(), size=(height, width)).squeeze(1).long()


class Encoder(nn.Module):
    """The encoder of transformers' model, as a backbone of ours."""

    strides = (4, 8, 16, 32)

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.channels = encoder, tuple(encoder.channels)

    def forward(self, images, valid=None):
        return list(self.encoder(images).feature_maps)


@pytest.fixture
def theirs():
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        num_labels=5,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_attention_heads=4,
        num_queries=10,
        encoder_layers=1,
        decoder_layers=4,
        encoder_feedforward_dim=32,
        dim_feedforward=64,
        train_num_points=256,
    )
    return Mask2FormerForUniversalSegmentation(config).eval()


def test_it_is_transformers_model(theirs):
    ours = Mask2Former(Encoder(theirs.model.pixel_level_module.encoder), 5, **TINY, points=256).eval()
    ours.head.pixel_decoder.load_state_dict(theirs.model.pixel_level_module.decoder.state_dict())
    ours.head.transformer.load_state_dict(theirs.model.transformer_module.state_dict())
    ours.head.class_predictor.load_state_dict(theirs.class_predictor.state_dict())
    images, targets = torch.randn(2, 3, 64, 96), regions(2, 64, 96)
    labels = [[label for label in image.unique() if label != 255] for image in targets]
    masks = [
        torch.stack([(image == label).float() for label in mine]) for image, mine in zip(targets, labels, strict=True)
    ]
    with torch.no_grad():
        torch.manual_seed(1)
        expected = theirs(images, mask_labels=masks, class_labels=[torch.stack(mine) for mine in labels])
        torch.manual_seed(1)
        losses = ours(images, targets)
        torch.testing.assert_close(sum(losses.values()), expected.loss.squeeze())
        scores = ours(images)
        enlarged = interpolate(expected.masks_queries_logits, size=(64, 96), mode="bilinear", align_corners=False)
        classes = expected.class_queries_logits.softmax(-1)[..., :-1]
        told = (classes[:, :, :, None, None] * enlarged.sigmoid()[:, :, None]).sum(1)
        torch.testing.assert_close(scores, told)
        assert torch.equal(ours.activate(scores), scores)


def test_it_begins_as_transformers_model_does(theirs):
    """Spread of every parameter; drawn alike, it differs by what so few numbers vary."""
    ours = Mask2Former(Encoder(theirs.model.pixel_level_module.encoder), 5, **TINY, points=256).head
    for mine, other in (
        (ours.pixel_decoder, theirs.model.pixel_level_module.decoder),
        (ours.transformer, theirs.model.transformer_module),
    ):
        wanted = dict(other.named_parameters())
        for name, value in mine.named_parameters():
            if value.numel() > 1:
                torch.testing.assert_close(value.std(), wanted[name].std(), rtol=0.35, atol=0, msg=name)


def test_images_are_taken_to_whole_cells():
    """Scores of an image of any size are those of the image padded and masked, cut; what would be added is ignored."""
    model, images, targets = net().eval(), torch.randn(2, 3, 70, 93), regions(2, 70, 93)
    seen = {}
    backbone = model.backbone.forward
    model.backbone.forward = lambda images, valid=None: (
        seen.update(shape=images.shape, valid=valid) or backbone(images, valid)
    )
    with torch.no_grad():
        scores = model(images)
        assert seen["shape"] == (2, 3, 96, 96)
        assert torch.equal(seen["valid"], valid_pixels(torch.tensor([[70, 93]] * 2), 96, 96))
        model.backbone.forward = lambda images, _: backbone(images, seen["valid"])
        whole = pad(images, (0, 3, 0, 26))
        torch.testing.assert_close(scores, model(whole)[..., :70, :93])
        torch.manual_seed(1)
        losses = model(images, targets)
        torch.manual_seed(1)
        torch.testing.assert_close(losses, model(whole, pad(targets, (0, 3, 0, 26), value=255)))


def test_queries_that_know_all_tell_all():
    """Masks of the regions and their classes give the regions back; what claims to be nothing adds nothing."""
    targets = regions(1, 48, 80)
    labels = [label for label in targets.unique().tolist() if label != 255]
    masks = torch.stack([(targets[0] == label) * 40.0 - 20 for label in labels] + [torch.full((48, 80), 20.0)])[None]
    classes = torch.full((1, len(labels) + 1, 6), -20.0)
    for query, label in enumerate([*labels, 5]):
        classes[0, query, label] = 20.0
    scores = semantic_scores(classes, masks, (48, 80))
    counted = targets != 255
    assert torch.equal(scores.argmax(1)[counted], targets[counted])
    torch.testing.assert_close(scores.sum(1)[counted], torch.ones(int(counted.sum())))


@pytest.mark.parametrize("size", [(64, 96), (70, 93), (33, 41)])
def test_sizes_need_not_be_multiples_of_anything(size):
    model, images = net(), torch.randn(2, 3, *size)
    losses = model.train()(images, regions(2, *size))
    assert set(losses) == {"cross_entropy", "mask", "dice"}
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        scores = model.eval()(images)
    assert scores.shape == (2, 5, *size)
    assert scores.dtype == torch.float32
    assert scores.min() >= 0


def test_every_parameter_is_trained():
    model = net().train()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin at zero, and hold others' gradients there
            parameter.add_(0.02 * torch.randn_like(parameter))
    sum(model(torch.randn(2, 3, 64, 64), regions(2, 64, 64)).values()).backward()
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    # a bias of keys moves all logits of a query alike, and so tells nothing
    assert [name for name in idle if not name.endswith("k_proj.bias")] == []


@pytest.mark.parametrize("empty", [1, 2])
def test_images_of_ignored_pixels_have_no_masks(empty):
    model, targets = net().train(), regions(2, 64, 64)
    targets[:empty] = 255
    losses = model(torch.randn(2, 3, 64, 64), targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (losses["mask"] == 0) == (losses["dice"] == 0) == (empty == 2)


def test_weights_weigh():
    images, targets = torch.randn(2, 3, 64, 64), regions(2, 64, 64)
    # matching weighs too; with one wanted mask of the whole image and one query there is nothing to match
    targets[:] = 3
    losses = []
    for weights in ((2.0, 5.0, 5.0), (1.0, 1.0, 20.0)):
        torch.manual_seed(0)
        names = ("class_weight", "mask_weight", "dice_weight")
        model = net(queries=1, **dict(zip(names, weights, strict=True))).eval()
        with torch.no_grad():
            losses.append(model(images, targets))
    for name, factor in (("cross_entropy", 0.5), ("mask", 0.2), ("dice", 4.0)):
        torch.testing.assert_close(losses[1][name], losses[0][name] * factor)


@pytest.mark.parametrize(("here", "elsewhere", "mean"), [(3, 4, 3.5), (0, 4, 2.0), (0, 1, 1.0)])
def test_masks_are_counted_over_devices(monkeypatch, here, elsewhere, mean):
    criterion = net().criterion
    labels = [torch.zeros(here, dtype=torch.int64)]
    assert criterion.get_num_masks(labels, torch.device("cpu")) == max(1, here)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(elsewhere))
    assert criterion.get_num_masks(labels, torch.device("cpu")) == mean


def test_half_precision_matches_too():
    model = net().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(torch.randn(2, 3, 64, 64), regions(2, 64, 64))
        sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.eval()(torch.randn(1, 3, 64, 64)).dtype == torch.float32


def test_two_colours_are_soon_told_apart():
    """A picture whose left is dark and whose right is bright, at a place that changes."""
    model = net(decoder_layers=2, points=128).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def batch():
        edges = torch.randint(16, 48, (4, 1, 1))
        targets = (torch.arange(64) >= edges).expand(4, 64, 64).long()
        return (targets[:, None] * 2.0 - 1 + 0.3 * torch.randn(4, 3, 64, 64)), targets

    for _ in range(40):
        optimiser.zero_grad()
        sum(model(*batch()).values()).backward()
        optimiser.step()
    images, targets = batch()
    with torch.no_grad():
        accuracy = (model.eval()(images).argmax(1) == targets).float().mean()
    assert accuracy > 0.9


@pytest.mark.parametrize(
    ("wanted", "others", "message"),
    [
        ((1, 2, 3), {}, "strides"),
        ((0, 1, 2, 3), {"hidden": 48}, "multiple of 32"),
        ((0, 1, 2, 3), {"heads": 5}, "multiple of 32"),
    ],
    ids=["three maps", "hidden", "heads"],
)
def test_what_does_not_fit_is_told(wanted, others, message):
    shape = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
    with pytest.raises(ValueError, match=message):
        Mask2Former(SwinStages(rotary=mixed, stages=wanted, **shape), 5, **{**TINY, **others})


def test_embeddings_are_spared_from_decay():
    model = net()
    spared = model.no_weight_decay()
    assert spared <= {name for name, _ in model.named_parameters()}
    assert len(spared) == 4  # of queries their content and place; of levels one in each half
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    assert tables <= spared
