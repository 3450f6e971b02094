"""Images in one folder a class, `<split>/<class>/*.JPEG`: the layout ImageNet is usually unpacked to."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset


class FolderImages:
    """An `ImageSource` over class folders; labels follow the sorted folder names, ImageNet's usual order.

    Args:
        folder: holds the class folders; images may lie deeper inside them.

    Raises:
        FileNotFoundError: no class folders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.class_names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if not self.class_names:
            raise FileNotFoundError(
                f"path: {folder} holds neither class folders nor .tar shards; "
                f"sort its images into {folder.name}/<class>/, or put the shards there"
            )
        labels = {name: label for label, name in enumerate(self.class_names)}
        files = make_dataset(str(folder), labels, extensions=IMG_EXTENSIONS, allow_empty=True)
        self.labels = np.array([label for _, label in files], dtype=np.int64)
        # One array instead of a million strings: forked workers would copy the strings by counting references to them.
        self._files = np.array([os.fsencode(os.path.relpath(file, folder)) for file, _ in files], dtype=np.bytes_)

    def name(self, index: int) -> str:
        return str(self.folder / os.fsdecode(self._files[index]))

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()
