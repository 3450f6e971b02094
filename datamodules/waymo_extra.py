"""The packages of the `waymo` extra, for those who read and write Waymo's formats; where one is missing, the error names the
command that installs it."""

from __future__ import annotations

try:
    import google_crc32c
    from google.protobuf import json_format
    from google.protobuf.message import DecodeError
except ImportError as error:
    raise ImportError(
        f"Waymo's formats need a package that is missing ({error}): pip install -e '.[train,waymo]'", name=error.name
    ) from error

__all__ = ["DecodeError", "google_crc32c", "json_format"]
