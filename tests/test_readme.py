"""The README's Python runs as written, and the files it names are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run(index):
    exec(compile(BLOCKS[index], f"README block {index}", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


def test_links_and_experiments_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    others = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").iterdir()]
    told = {name for names in re.findall(r"configs/experiment/\{?([\w,]+)\}?\.yaml", TEXT) for name in names.split(",")}
    told |= {name for path in others for name in re.findall(r"experiment=(\w+)", path.read_text())}
    assert told == {path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")}


def test_every_variant_config_has_a_row():
    table = (ROOT / "docs" / "variants.md").read_text()
    for path in (ROOT / "configs" / "rotary").rglob("*.yaml"):
        if path.stem != "identity":
            assert f"{path.stem}`" in table, f"{path.stem} has no row in docs/variants.md"
