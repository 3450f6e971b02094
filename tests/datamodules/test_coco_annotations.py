"""COCO annotations: the arrays say what pycocotools says, and each thing that can be wrong is named with its file and id."""

import copy
import json
import logging
import re

import coco_folder
import numpy as np
import pytest

from datamodules.coco_annotations import AnnotationError, read_annotations


@pytest.fixture
def told():
    return coco_folder.content(8)


def read(root, told, **options):
    return read_annotations(coco_folder.write_split(root, "val2017", told), root / "val2017", **options)


def test_equal_to_pycocotools(tmp_path, told):
    coco = pytest.importorskip("pycocotools.coco", reason="the extra coco is not installed")
    ours = read(tmp_path, told)
    theirs = coco.COCO(ours.file)
    assert ours.category_ids.tolist() == sorted(theirs.getCatIds())
    assert (
        ours.class_names
        == [row["name"] for row in theirs.loadCats(ours.category_ids.tolist())]
        == ["cat", "ant", "bee"]
    )
    assert sorted(ours.image_ids.tolist()) == sorted(theirs.getImgIds())
    assert len(ours) == 8
    counts = []
    for index, image_id in enumerate(ours.image_ids.tolist()):
        image = theirs.loadImgs(image_id)[0]
        assert (ours.file_name(index), *ours.sizes[index]) == (image["file_name"], image["height"], image["width"])
        rows = slice(*ours.offsets[index : index + 2])
        expected = {row["id"]: row for row in theirs.loadAnns(theirs.getAnnIds(image_id))}
        counts.append(len(expected))
        assert set(ours.annotation_ids[rows].tolist()) == expected.keys()
        for number in range(*ours.offsets[index : index + 2]):
            row = expected[int(ours.annotation_ids[number])]
            x, y, width, height = row["bbox"]
            assert ours.boxes[number].tolist() == [x, y, x + width, y + height]
            assert ours.category_ids[ours.labels[number]] == row["category_id"]
            assert (ours.areas[number], ours.crowd[number]) == (row["area"], row["iscrowd"])
    assert counts == [0, 1, 2, 3] * 2
    assert ours.crowd.any()
    assert not ours.crowd.all()


def test_no_objects_at_all(tmp_path, told):
    ours = read(tmp_path, told | {"annotations": []})
    assert len(ours) == 8
    assert ours.boxes.shape == (0, 4)
    assert ours.offsets.tolist() == [0] * 9


def test_boxes_past_the_border_by_rounding_are_cut(tmp_path, told, caplog):
    row = told["annotations"][0]
    image = next(each for each in told["images"] if each["id"] == row["image_id"])
    row["bbox"] = [-0.4, 2.0, image["width"] + 0.9, image["height"] - 1.5]
    with caplog.at_level(logging.INFO):
        ours = read(tmp_path, told)
    box = ours.boxes[ours.annotation_ids == row["id"]][0]
    assert box.tolist() == [0.0, 2.0, image["width"], image["height"]]
    assert "cut 1 boxes at the border" in caplog.text
    with pytest.raises(AnnotationError, match=f"annotation {row['id']} .*leaves its image"):
        read(tmp_path, told, border=0.3)


def many(told, count):
    """The annotations again and again, under new ids."""
    rows = told["annotations"]
    copies = [copy.deepcopy(rows[i % len(rows)]) | {"id": 10_000 + i} for i in range(count)]
    return told | {"annotations": copies}


def test_a_few_boxes_without_area_are_left_out_and_told(tmp_path, told, caplog):
    told = many(told, 20_000)
    told["annotations"][7]["bbox"][3] = told["annotations"][19_000]["bbox"][2] = 0.0
    ours = read(tmp_path, told)
    assert len(ours.labels) == ours.offsets[-1] == 19_998
    assert not np.isin([10_007, 29_000], ours.annotation_ids).any()
    assert f"{ours.file}: left out 2 boxes without area, of annotations 10007, 29000" in caplog.text
    assert (ours.boxes[:, 2:] > ours.boxes[:, :2]).all()
    told["annotations"][8]["bbox"][3] = 0
    with pytest.raises(AnnotationError, match=r"annotation 10007 has a box without area, .* \(2 more like it\)"):
        read(tmp_path, told)


def annotation(**changes):
    def change(told):
        told["annotations"][3] |= changes

    return change


def without(part, key):
    return lambda told: told[part][2].pop(key)


def image(**changes):
    def change(told):
        told["images"][2] |= changes

    return change


def first_crowd(told):
    return next(row for row in told["annotations"] if row["iscrowd"])


def other_mask_size(told):
    mask = first_crowd(told)["segmentation"]
    mask["size"] = mask["size"][::-1]


def twice(part, name):
    def change(told):
        told[part][1]["id"] = told[part][2]["id"]

    return change


WRONG = {
    "missing image": (annotation(image_id=77), r"annotation {annotation} is of image 77, which is not there"),
    "unknown category": (annotation(category_id=5), r"annotation {annotation} is of category 5, which is not there"),
    "empty box": (
        annotation(bbox=[1.0, 2.0, 0.0, 4.0]),
        r"annotation {annotation} has a box without area, .*\(1, 2, 0, 4\)",
    ),
    "negative box": (annotation(bbox=[9.0, 9.0, 3, -4]), r"annotation {annotation} has a box of negative size"),
    "box outside": (annotation(bbox=[300, 5.0, 9.0, 9.0]), r"annotation {annotation} has a box .* leaves its image"),
    "box left of it": (annotation(bbox=[-2, 5.0, 9.0, 9.0]), r"annotation {annotation} has a box .* leaves its image"),
    "corners as extents": (annotation(bbox=[30, 30, 89, 89]), r"annotation {annotation} has a box .* leaves its image"),
    "infinite box": (
        annotation(bbox=[1.0, 2.0, float("inf"), 4.0]),
        r"annotation {annotation} has a box that is not finite",
    ),
    "NaN in a box": (
        annotation(bbox=[1.0, 2.0, float("nan"), 4.0]),
        r"annotation {annotation} has a box that is not finite",
    ),
    "area beyond numbers": (annotation(area=10**400), r"annotation id {annotation} .* has 'area' 1000.*; give less"),
    "box beyond numbers": (
        annotation(bbox=[1, 2, -(10**400), 4]),
        r"annotation id {annotation} .* has 'bbox' .*give less",
    ),
    "NaN as area": (annotation(area=float("nan")), r"annotation {annotation} has area nan"),
    "negative area": (annotation(area=-3), r"annotation {annotation} has area -3"),
    "box of three": (annotation(bbox=[1, 2, 3]), r"annotation id {annotation} .* must be x, y, width and height"),
    "box of words": (annotation(bbox=[1, 2, "3", 4]), r"annotation id {annotation} .* must be x, y, width and height"),
    "box null": (annotation(bbox=None), r"annotation id {annotation} .* has 'bbox' None; it must be list"),
    "area null": (annotation(area=None), r"annotation id {annotation} .* has 'area' None; it must be float or int"),
    "crowd 2": (annotation(iscrowd=2), r"annotation {annotation} has iscrowd 2"),
    "id as text": (annotation(id="x"), r"annotation id 'x' \(number 3 of the list\) has 'id' 'x'; it must be int"),
    "huge image id": (annotation(image_id=2**70), r"annotation {annotation} has 'image_id' 1180591620717411303424"),
    "no box": (without("annotations", "bbox"), r"annotation id {second} \(number 2 of the list\) has no 'bbox'"),
    "no id": (without("annotations", "id"), r"annotation \(number 2 of the list\) has no 'id'"),
    "no crowd": (without("annotations", "iscrowd"), r"annotation id {second} .* has no 'iscrowd'"),
    "no file name": (without("images", "file_name"), r"image id {image} \(number 2 of the list\) has no 'file_name'"),
    "no height": (image(height=0), r"image {image} has no pixels: height 0"),
    "mask size": (other_mask_size, r"annotation {crowd} has a mask of size .*, but its image \d+ has \[\d+, \d+\]"),
    "annotation twice": (twice("annotations", "annotation"), r"annotation {second} is there 2 times"),
    "image twice": (twice("images", "image"), r"image {image} is there 2 times"),
    "category twice": (twice("categories", "category"), r"category 3 is there 2 times"),
    "names twice": (lambda told: told["categories"][0].update(name="cat"), r"two categories are called 'cat'"),
    "no images": (lambda told: told.pop("images"), r"has no list 'images'"),
    "empty images": (lambda told: told.update(images=[]), r"the list 'images' is empty"),
    "row of another kind": (
        lambda told: told["annotations"].insert(1, [3]),
        r"annotations\[1\] is \[3\]; it must be an object",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_file_and_id_in_one_line(tmp_path, told, case):
    change, reason = WRONG[case]
    file = coco_folder.write_split(tmp_path, "val2017", told)
    ids = {
        "annotation": told["annotations"][3]["id"],
        "second": told["annotations"][2]["id"],
        "image": told["images"][2]["id"],
        "crowd": first_crowd(told)["id"],
    }
    change(told)
    file.write_text(json.dumps(told))
    with pytest.raises(AnnotationError) as caught:
        read_annotations(file, tmp_path / "val2017")
    message = str(caught.value)
    assert message.startswith(f"{file}")
    assert "\n" not in message
    assert re.search(reason.format(**ids), message), message


def test_missing_files_are_named(tmp_path, told):
    file = coco_folder.write_split(tmp_path, "val2017", told)
    lost = [tmp_path / "val2017" / row["file_name"] for row in told["images"][1:3]]
    for image_file in lost:
        image_file.unlink()
    expected = f"{lost[0]}, image {told['images'][1]['id']} of {file}, is not there (1 more like it)"
    with pytest.raises(FileNotFoundError, match=re.escape(expected)):
        read_annotations(file, tmp_path / "val2017")
    with pytest.raises(FileNotFoundError, match=r"test2017 is no folder; put the images"):
        read_annotations(file, tmp_path / "test2017")
    with pytest.raises(FileNotFoundError, match=r"absent\.json is not there"):
        read_annotations(tmp_path / "absent.json", tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:300], r"corrupt at byte \d+: .*\(char \d+\)"),
        (lambda data: b'"\xc3\xa4", ' + data, r"corrupt at byte 4: Extra data: line 1 column 4 \(char 3\)"),
        (lambda data: data.replace(b'"file_name"', b'"file_n\xffme"', 1), r"corrupt at byte \d+: invalid start byte"),
        (lambda data: data.replace(b"}", b"", 1), r"corrupt at byte"),
        (lambda data: b"", r"corrupt at byte 0"),
        (lambda data: b"[" * 100_000, r"corrupt: brackets without end"),
        (lambda data: b"[1, 2]", r"holds a list where COCO has an object"),
    ],
    ids=["cut off", "text before", "not UTF-8", "bracket lost", "empty", "deep", "a list"],
)
def test_corrupt_json_is_named_with_its_place(tmp_path, told, damage, reason):
    file = coco_folder.write_split(tmp_path, "val2017", told)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(AnnotationError) as caught:
        read_annotations(file, tmp_path / "val2017")
    message = str(caught.value)
    assert message.startswith(f"{file}")
    assert "\n" not in message
    assert re.search(reason, message), message
