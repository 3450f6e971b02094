"""One rotary core: positions → frequencies → phase → rotate. Depends on torch alone."""

from rotary.bound import context_bound, first_negative, safe_base, smallest_base
from rotary.module import Rotary, phase_of
from rotary.rotate import rotate, rotate_reference, unit

__all__ = [
    "Rotary",
    "context_bound",
    "first_negative",
    "phase_of",
    "rotate",
    "rotate_reference",
    "safe_base",
    "smallest_base",
    "unit",
]
