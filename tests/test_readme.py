"""The Python of README and docs runs as written, and the files they name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").rglob("*.md"))
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in (ROOT / "README.md", ROOT / "docs" / "dense.md")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block):
    exec(compile(block, "block", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


def test_links_and_experiments_exist():
    for path in (ROOT / "README.md", *DOCS):
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
    texts = [TEXT, *(path.read_text() for path in (*DOCS, *(ROOT / "scripts").iterdir()))]
    listed = [names for text in texts for names in re.findall(r"configs/experiment/\{?([\w,]+)\}?\.yaml", text)]
    told = {name for names in listed for name in names.split(",")}
    told |= {name for text in texts for name in re.findall(r"experiment=(\w+)", text)}
    assert told == {path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")}


def test_every_variant_config_has_a_row():
    table = (ROOT / "docs" / "variants.md").read_text()
    for path in (ROOT / "configs" / "rotary").rglob("*.yaml"):
        if path.stem != "identity":
            assert f"{path.stem}`" in table, f"{path.stem} has no row in docs/variants.md"
