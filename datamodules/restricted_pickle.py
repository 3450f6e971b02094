"""Reads a pickle that may name only the globals it is given; any other ends the reading before it is imported."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.embedded_source import SourceError

# What numpy writes for an array; newer releases say numpy._core. The function is taken from an array to name neither.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
NUMPY_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _Restricted(pickle.Unpickler):
    def __init__(self, content: bytes, allowed: Mapping[tuple[str, str], Any], name: str) -> None:
        super().__init__(io.BytesIO(content))
        self.allowed = allowed
        self.name = name

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = self.allowed.get((module_name, global_name))
        if found is None:
            raise SourceError(f"{self.name}: pickle names the global {module_name}.{global_name}, which is refused")
        return found


def read_pickle(content: bytes, allowed: Mapping[tuple[str, str], Any], name: str | Path) -> Any:
    """Returns the object of a pickle.

    Args:
        content: the bytes of the file.
        allowed: (module, name) → what stands for that global; nothing is imported.
        name: the file's name, for messages.

    Raises:
        SourceError: if the pickle names another global, or is truncated or otherwise broken.
    """
    try:
        return _Restricted(content, allowed, str(name)).load()
    except SourceError:
        raise
    except Exception as error:  # broken bytes can raise nearly anything
        raise SourceError(f"{name}: not a readable pickle ({type(error).__name__}: {error})") from error
