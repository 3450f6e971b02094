"""COCO's average precision: equal to pycocotools on random boxes, free of order and shards, NaN where nothing was."""

import compat  # noqa: F401, I001 - spawned processes have no conftest

import contextlib
import io
import math
import os

import pytest
import torch

from datamodules.batches import Boxes
from models.dense import Detections

pytest.importorskip("faster_coco_eval", reason="the extra coco is not installed")

from tasks.metrics.average_precision import AveragePrecision

CLASSES = 5
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_100")
STATS = (0, 1, 2, 3, 4, 5, 8)  # where pycocotools' summary has them


def random_boxes(count, generator):
    corners = 400 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    extents = 4 * 100 ** torch.rand(count, 2, generator=generator, dtype=torch.float64)  # 4 to 400 pixels
    return torch.cat((corners, corners + extents), 1)


def random_image(image_id, seed, classes=CLASSES - 1):
    """Truths with crowds and areas of their own; detections are shaken truths, often of the same score, and noise.

    The last class is never there, and found all the same; one image in five is empty, one in five has no detection.
    """
    generator = torch.Generator().manual_seed(1000 * seed + image_id)
    count = 0 if image_id % 5 == 0 else int(torch.randint(1, 30, (), generator=generator))
    boxes = random_boxes(count, generator)
    labels = torch.randint(classes, (count,), generator=generator)
    extents = boxes[:, 2:] - boxes[:, :2]
    areas = extents.prod(1) * torch.rand(count, generator=generator, dtype=torch.float64)
    areas[:1] = 0.0
    truth = Boxes(boxes, labels, areas, torch.rand(count, generator=generator) < 0.15, image_id, (800, 800))
    if image_id % 5 == 1:
        return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)), truth
    # Up to three shots at each truth, so that a class can have over 100 in an image and crowds match more than once.
    aim = torch.randint(max(count, 1), (8 * count,), generator=generator)
    shaken = boxes[aim] + 0.1 * extents[aim].repeat(1, 2) * torch.randn(8 * count, 4, generator=generator)
    shaken[:, 2:] = torch.maximum(shaken[:, 2:], shaken[:, :2] + 1)
    noise = random_boxes(20, generator)
    found = torch.cat((shaken, noise))
    found_labels = torch.cat((labels[aim], torch.randint(CLASSES, (20,), generator=generator)))
    scores = (torch.rand(len(found), generator=generator, dtype=torch.float64) * 50).round() / 50  # many are equal
    return Detections(found, scores, found_labels), truth


def measured(pairs):
    metric = AveragePrecision(CLASSES)
    for pair in pairs:
        metric.update(*pair)
    return metric


def pycocotools(pairs, classes=None):
    coco = pytest.importorskip("pycocotools.coco", reason="the extra coco is not installed")
    from pycocotools.cocoeval import COCOeval

    images = [{"id": truth.image_id, "height": 800, "width": 800} for _, truth in pairs]
    truths, found = [], []
    for detections, truth in pairs:
        for box, label, area, crowd in zip(truth.boxes, truth.labels, truth.areas, truth.crowd, strict=True):
            x1, y1, x2, y2 = box.double().tolist()
            row = {"id": len(truths) + 1, "image_id": truth.image_id, "category_id": int(label)}
            truths.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(area), "iscrowd": int(crowd)})
        for box, score, label in zip(*detections, strict=True):
            x1, y1, x2, y2 = box.double().tolist()
            row = {"image_id": truth.image_id, "category_id": int(label), "score": float(score)}
            found.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco.COCO()
        known.dataset = {
            "info": {},
            "images": images,
            "annotations": truths,
            "categories": [{"id": i} for i in range(CLASSES)],
        }
        known.createIndex()
        judge = COCOeval(known, known.loadRes(found), "bbox")
        if classes is not None:
            judge.params.catIds = classes
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [math.nan if stat == -1 else stat for stat in judge.stats.tolist()]


def assert_same(found, expected, tolerance=0.0):
    assert tuple(found) == NAMES
    for name in NAMES:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=0, abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools(seed):
    pairs = [random_image(image_id, seed) for image_id in range(20)]
    metric = measured(pairs)
    stats = pycocotools(pairs)
    found = metric.compute()
    assert 0.05 < found["ap"] < 0.95  # neither everything nor nothing is right
    assert_same(found, dict(zip(NAMES, (stats[i] for i in STATS), strict=True)), 1e-9)
    by_class = metric.by_class("abcde")
    for label, name in enumerate("abcde"):
        assert by_class[name] == pytest.approx(pycocotools(pairs, [label])[0], rel=0, abs=1e-9, nan_ok=True)
    assert math.isnan(by_class["e"])


def test_float32_as_a_detector_gives_it_equals_pycocotools():
    pairs = [random_image(image_id, 9) for image_id in range(10)]
    pairs = [
        (
            found._replace(boxes=found.boxes.float(), scores=found.scores.float()),
            truth._replace(boxes=truth.boxes.float()),
        )
        for found, truth in pairs
    ]
    stats = pycocotools(pairs)
    assert_same(measured(pairs).compute(), dict(zip(NAMES, (stats[i] for i in STATS), strict=True)), 1e-9)


def test_agrees_with_torchmetrics_as_far_as_float32_goes():
    from torchmetrics.detection import MeanAveragePrecision

    # Its own thresholds are float32, which moves such scores by up to 2e-3.
    ious, recalls = torch.linspace(0.5, 0.95, 10, dtype=torch.float64), torch.linspace(0, 1, 101, dtype=torch.float64)
    theirs = MeanAveragePrecision(
        backend="faster_coco_eval", iou_thresholds=ious.tolist(), rec_thresholds=recalls.tolist()
    )
    theirs.warn_on_many_detections = False
    pairs = [random_image(image_id, 3) for image_id in range(10)]
    for found, truth in pairs:
        areas = truth.areas.clamp(min=1e-6)  # 0 would mean that none is given
        target = {"boxes": truth.boxes, "labels": truth.labels, "iscrowd": truth.crowd.long(), "area": areas}
        theirs.update([found._asdict()], [target])
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")
    expected = theirs.compute()
    assert_same(
        measured(pairs).compute(), {ours: expected[name] for ours, name in zip(NAMES, names, strict=True)}, 1e-6
    )


def test_perfect_boxes_score_one():
    pairs = []
    for image_id in range(10):
        _, truth = random_image(image_id, 0)
        truth = truth._replace(crowd=torch.zeros_like(truth.crowd))
        pairs.append((Detections(truth.boxes, torch.ones(len(truth.labels)), truth.labels), truth))
    metric = measured(pairs)
    assert {name: float(value) for name, value in metric.compute().items()} == dict.fromkeys(NAMES, 1.0)
    assert list(metric.by_class("abcde").values())[:-1] == [1.0] * (CLASSES - 1)


def test_what_is_not_there_is_nan_and_in_no_mean():
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = Boxes(torch.zeros(0, 4), nothing, torch.zeros(0), nothing.bool(), 1, (100, 100))
    box = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    found = Detections(box, torch.ones(1), torch.zeros(1, dtype=torch.int64))
    scores = measured([(found, empty)]).compute()
    assert all(math.isnan(value) for value in scores.values())
    assert all(math.isnan(value) for value in AveragePrecision(CLASSES).compute().values())
    small = empty._replace(
        boxes=box, labels=found.labels, areas=torch.tensor([100.0]), crowd=torch.zeros(1).bool(), image_id=2
    )
    metric = measured([(found._replace(boxes=box[:0], scores=found.scores[:0], labels=nothing), empty), (found, small)])
    scores = metric.compute()
    assert {name for name, value in scores.items() if math.isnan(value)} == {"ap_medium", "ap_large"}
    assert scores["ap"] == scores["ap_small"] == 1
    assert [str(value) for value in metric.by_class("abcde").values()] == ["1.0", "nan", "nan", "nan", "nan"]


def test_nothing_found_is_zero():
    found, truth = random_image(1, 0)
    assert len(found.boxes) == 0
    scores = measured([(found, truth)]).compute()
    assert float(scores["ap"]) == float(scores["ar_100"]) == 0.0


def test_a_crowd_excuses_and_counts_for_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    box = torch.tensor([[0.0, 0.0, 50.0, 50.0], [200.0, 200.0, 400.0, 400.0]])
    labels = torch.zeros(2, dtype=torch.int64)
    truth = Boxes(box, labels, torch.tensor([2500.0, 40000.0]), torch.tensor([False, True]), 1, (500, 500))
    inside = torch.tensor([[210.0, 210.0, 250.0, 250.0], [300.0, 300.0, 340.0, 340.0]])
    found = Detections(torch.cat((inside, box[:1])), torch.tensor([0.9, 0.8, 0.7]), nothing.new_zeros(3))
    assert measured([(found, truth)]).compute()["ap"] == 1.0
    plain = truth._replace(crowd=torch.tensor([False, False]))
    assert measured([(found, plain)]).compute()["ap"] < 0.5


def test_order_and_shards_do_not_matter():
    pairs = [random_image(image_id, 5) for image_id in range(12)]
    whole = measured(pairs).compute()
    assert_same(measured(pairs[::-1]).compute(), whole)
    merged = measured(pairs[:3])
    merged.merge_state(measured(pairs[3:]))
    assert_same(merged.compute(), whole)


def test_reset_forgets():
    pairs = [random_image(image_id, 5) for image_id in range(6)]
    metric = measured(pairs[:3])
    metric.compute()
    metric.reset()
    for pair in pairs[3:]:
        metric.update(*pair)
    assert_same(metric.compute(), measured(pairs[3:]).compute())


def share(rank, rendezvous, results):
    """One of three processes: the first saw eight images, the second two, the third none."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=3)
    ids = (range(8), range(8, 10), range(0))[rank]
    metric = measured([random_image(image_id, 7) for image_id in ids])
    scores = metric.compute()
    torch.save(
        {**scores, **{k: torch.tensor(v, dtype=torch.float64) for k, v in metric.by_class("abcde").items()}},
        f"{results}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_unequal_shares_agree_with_one(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(share, (tmp_path / "rendezvous", tmp_path), nprocs=3)
    metric = measured([random_image(image_id, 7) for image_id in range(10)])
    whole = metric.compute()
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same({name: found.pop(name) for name in NAMES}, whole)
        for name, value in metric.by_class("abcde").items():
            assert float(found[name]) == pytest.approx(value, rel=0, abs=0, nan_ok=True)


def test_bad_input_is_named():
    found, truth = random_image(2, 0)
    metric = measured([(found, truth), (found, truth)])
    with pytest.raises(ValueError, match="image 2 was added 2 times"):
        metric.compute()
    with pytest.raises(ValueError, match="image 2: label 5 with box"):
        measured([(found._replace(labels=found.labels + (found.labels == 4)), truth)]).compute()
    with pytest.raises(ValueError, match=r"image 2: label .* nan;"):
        measured([(found._replace(scores=found.scores * math.nan), truth)]).compute()
    with pytest.raises(ValueError, match=r"image 2: found .* boxes, scores and labels"):
        measured([(found._replace(scores=found.scores[1:]), truth)])
    with pytest.raises(ValueError, match="num_classes=0"):
        AveragePrecision(0)
    with pytest.raises(RuntimeError, match="call compute"):
        AveragePrecision(1).by_class(["a"])
    metric = measured([(found, truth)])
    metric.compute()
    with pytest.raises(ValueError, match="2 names for num_classes=5"):
        metric.by_class(["a", "b"])
