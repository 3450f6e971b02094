"""A tiny image folder of three colours, and the overrides that train a tiny ViT on it without any randomness."""

from pathlib import Path

import numpy as np
from PIL import Image


def write(root: Path, train: int = 16, val: int = 4, classes: int = 3) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index in range(classes):
            folder = root / split / f"class{index}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 80, (24, 24, 3))
                pixels[..., index] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def overrides(root: Path) -> list[str]:
    return [
        "task=imagenet",
        "datamodule=imagenet",
        f"datamodule.path={root}",
        "datamodule.num_classes=3",
        "datamodule.batch_size=8",
        "datamodule.num_workers=0",
        "datamodule.persistent_workers=false",
        "datamodule.mix=null",
        "datamodule.repeats=1",
        "datamodule.train_transform._target_=datamodules.augment.EvalTransform",
        "+datamodule.train_transform.crop_ratio=1.0",
        "image_size=16",
        "epochs=2",
        "optimizer@task.optimizer=adamw",  # Muon's few Newton-Schulz steps would blow rounding up
        "task.optimizer.lr=2e-3",
        "model.embed_dim=48",
        "model.num_heads=3",
        "model.depth=2",
        "trainer.accelerator=cpu",
        "threads=1",
    ]
