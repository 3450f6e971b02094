"""`config` and `scaling_config` run a test over every yaml of configs/rotary; `build` makes one as train.py does."""

from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rotary.frequencies import Assigned, Directional, Subset

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ORIGINAL, EXTENSION = 64, 4


def pytest_generate_tests(metafunc):
    for argument, folder in (("config", "rotary"), ("scaling_config", "rotary/scaling")):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml")))


def widths(factory):
    """(head_dim, heads) of a layer that the config fits: the width it is bound to, else 64 channels and 2 heads."""
    law = factory.keywords["frequencies"]
    if isinstance(law, Assigned):
        return 2 * len(law.axis_of_pair), 2
    if isinstance(law, Subset):
        return 2 * law.rungs, len(law.chosen)
    if isinstance(law, Directional) and law.heading_heads:
        return 64, 2 * law.heading_heads
    return 64, 2


@pytest.fixture(scope="session")
def build():
    @cache
    def compose_and_instantiate(config, scaling):
        overrides = [f"+rotary={config}", f"rotary/scaling={scaling}"]
        overrides += [f"+extension={EXTENSION}", f"+original_extent={ORIGINAL}"]
        with initialize_config_dir(str(CONFIGS), version_base=None):
            return instantiate(compose(overrides=overrides)).rotary

    def make(config, scaling="identity", **arguments):
        factory = compose_and_instantiate(config, scaling)
        head_dim, heads = widths(factory)
        return factory(**{"head_dim": head_dim, "heads": heads} | arguments)

    return make
