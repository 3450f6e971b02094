"""mIoU over a data set: the example that tells it from a mean over images, parity, ranks, and what is left out."""

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional.segmentation import mean_iou

from tasks.metrics.intersection_over_union import IntersectionOverUnion


def two_images():
    """One all of class 0 and right; a smaller one where 9 of 18 and 1 of 1 pixels are right, in padding."""
    targets, predictions = torch.zeros(2, 6, 9, dtype=torch.int64), torch.zeros(2, 6, 9, dtype=torch.int64)
    targets[1] = 255
    targets[1].view(-1)[:18] = 0
    targets[1].view(-1)[18] = 1
    predictions[1].view(-1)[9:19] = 1
    predictions[1].view(-1)[19:] = 1
    return predictions, targets


def test_it_is_over_the_data_set_and_not_over_images():
    predictions, targets = two_images()
    metric = IntersectionOverUnion(2)
    of_images = []
    for prediction, target in zip(predictions, targets, strict=True):
        metric.update(prediction, target)
        known = target != 255
        pair = prediction[known][None], target[known][None]
        of_images.append(mean_iou(*pair, num_classes=2, input_format="index").item())
    assert sum(of_images) / 2 == pytest.approx(0.65)
    scores = metric.compute()
    assert scores["miou"].item() == pytest.approx(0.4875, abs=1e-12)  # (63/72 + 1/10) / 2
    assert metric.per_class().tolist() == pytest.approx([63 / 72, 1 / 10], abs=1e-12)
    assert scores["pixel_accuracy"].item() == pytest.approx(64 / 73, abs=1e-12)
    assert scores["mean_accuracy"].item() == pytest.approx((63 / 72 + 1) / 2, abs=1e-12)


@pytest.mark.parametrize("occurring", [150, 7, 1])
def test_it_equals_torchmetrics(occurring):
    ours = IntersectionOverUnion(150)
    theirs = MulticlassJaccardIndex(150, ignore_index=255, average="macro")
    for size in ((31, 17), (8, 64), (1, 5)):
        targets, predictions = torch.randint(0, occurring, size), torch.randint(0, occurring, size)
        predictions = predictions.where(torch.rand(size) < 0.5, targets)
        targets[torch.rand(size) < 0.2] = 255
        ours.update(predictions, targets)
        theirs.update(predictions, targets)
    # theirs is float32
    assert ours.compute()["miou"].item() == pytest.approx(theirs.compute().item(), abs=1e-6)


def test_absent_classes_are_left_out_and_those_only_predicted_are_not():
    metric = IntersectionOverUnion(4)
    metric.update(torch.tensor([0, 0, 3, 255]), torch.tensor([0, 0, 0, 255]))
    assert metric.per_class().isnan().tolist() == [False, True, True, False]
    scores = metric.compute()
    assert scores["miou"].item() == pytest.approx((2 / 3 + 0) / 2)
    assert scores["mean_accuracy"].item() == pytest.approx(2 / 3)  # class 3 has no pixel of its own


def test_the_order_and_the_cut_into_updates_dont_matter():
    targets, predictions = torch.randint(0, 5, (6, 7, 9)), torch.randint(0, 5, (6, 7, 9))
    whole, parts = IntersectionOverUnion(5), IntersectionOverUnion(5)
    whole.update(predictions, targets)
    for index in torch.randperm(6).tolist():
        parts.update(predictions[index], targets[index])
    assert torch.equal(whole.pixels, parts.pixels)
    assert whole.pixels.dtype == torch.int64


def test_ranks_are_summed():
    ranks = [IntersectionOverUnion(3) for _ in range(2)]
    whole = IntersectionOverUnion(3)
    for rank, metric in enumerate(ranks):
        for _ in range(1 + rank):
            pair = torch.randint(0, 3, (2, 5, 5)).unbind()
            metric.update(*pair)
            whole.update(*pair)

    def gather(tensor, group=None):
        return [metric.pixels.clone() for metric in ranks]

    ranks[0].sync(dist_sync_fn=gather, distributed_available=lambda: True)
    assert torch.equal(ranks[0].pixels, whole.pixels)
    ranks[0].unsync()
    ranks[0].distributed_available_fn = lambda: True
    ranks[0].dist_sync_fn = gather
    assert torch.equal(ranks[0].compute()["miou"], whole.compute()["miou"])
    assert torch.equal(ranks[0].per_class(), whole.per_class())
    assert ranks[0].pixels.sum() == 25  # its own again


def test_nothing_counted_is_nan():
    metric = IntersectionOverUnion(3)
    metric.update(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))
    assert all(value.isnan() for value in (metric.compute()).values())


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        pytest.param([0, 3], [0, 1], "predictions lie in 0 … 3, there are 3 classes", id="prediction"),
        pytest.param([0, 1], [0, 3], "targets lie in 0 … 3", id="target"),
        pytest.param([-1, 1], [0, 1], "predictions lie in -1", id="negative"),
        pytest.param([0], [0, 1], "must have one shape", id="shapes"),
        pytest.param([0.2, 0.9], [0, 1], "must be integers", id="scores"),
    ],
)
def test_what_cant_be_counted_is_refused(predictions, targets, message):
    metric = IntersectionOverUnion(3)
    with pytest.raises(ValueError, match=message):
        metric.update(torch.tensor(predictions), torch.tensor(targets))
    assert metric.pixels.sum() == 0
