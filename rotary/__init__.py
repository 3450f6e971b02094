"""One rotary core: positions → frequencies → phase → rotate. Depends on torch alone."""

from rotary.module import Rotary, phase_of
from rotary.rotate import rotate, rotate_reference, unit

__all__ = ["Rotary", "phase_of", "rotate", "rotate_reference", "unit"]
