"""The cut-outs for tests, from the usual cache; skips where they are neither there nor to be had."""

from pathlib import Path

import pytest

from datamodules.cutouts import prepare_cutouts
from datamodules.embedded_source import SourceError, cache_folder


def sources_or_skip() -> Path:
    try:
        return prepare_cutouts(cache_folder())
    except SourceError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(f"the cut-outs need the network once: {error}")


def linked(sources: Path, folder: Path) -> Path:
    """A cache in `folder` that has the cut-outs and lacks what is made of them."""
    (folder / "cutouts").mkdir()
    (folder / "cutouts" / sources.name).symlink_to(sources, target_is_directory=True)
    return folder
