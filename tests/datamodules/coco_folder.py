"""Writes small folders laid out like COCO 2017: grey images with one bright rectangle an object."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("ant", "bee", "cat")
CATEGORY_IDS = (7, 90, 3)  # neither contiguous nor sorted: labels are cat 0, ant 1, bee 2


def content(images=4, first_id=100, seed=0):
    """An `instances_*.json` with 0, 1, 2, … objects an image; every third object is a crowd."""
    random = np.random.default_rng(seed)
    rows, annotations = [], []
    for number in range(images):
        height, width = (int(side) for side in random.integers(40, 90, 2))
        image_id = first_id + 3 * (images - number)  # descending
        rows.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width})
        for _ in range(number % 4):
            extent = random.uniform(8, 20, 2).round(2).tolist()
            corner = [
                round(float(random.uniform(0, side - e)), 2) for side, e in zip((width, height), extent, strict=True)
            ]
            crowd = len(annotations) % 3 == 2
            mask = {"size": [height, width], "counts": [height * width]} if crowd else [[*corner, width, 0, 0, height]]
            annotations.append(
                {
                    "id": 5000 - 7 * len(annotations),
                    "image_id": image_id,
                    "category_id": int(random.choice(CATEGORY_IDS)),
                    "bbox": [*corner, *extent],
                    "area": round(0.6 * extent[0] * extent[1], 3),
                    "iscrowd": int(crowd),
                    "segmentation": mask,
                }
            )
    categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, NAMES, strict=True)]
    order = random.permutation(len(annotations))  # COCO's annotations aren't sorted by image
    return {"images": rows, "annotations": [annotations[i] for i in order], "categories": categories}


def write_split(root: Path, split: str, told: dict) -> Path:
    """Writes the annotations and their images; gives the annotation file."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    for row in told["images"]:
        pixels = np.full((row["height"], row["width"], 3), row["id"] % 64, dtype=np.uint8)
        for annotation in told["annotations"]:
            if annotation["image_id"] == row["id"]:
                x, y, width, height = (round(value) for value in annotation["bbox"])
                pixels[y : y + height, x : x + width] = 200
        Image.fromarray(pixels).save(root / split / row["file_name"], quality=95)
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(told))
    return file


def write(root: Path, train=10, val=5) -> Path:
    write_split(root, "train2017", content(train, seed=1))
    write_split(root, "val2017", content(val, first_id=900, seed=2))
    return root
