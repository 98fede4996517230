"""CONTRIBUTING's picture of the layout names what is there, and nothing else."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def sections() -> dict[str, str]:
    """The lines of the picture by the folder at the top that they are about."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Layout")[1]
    found: dict[str, str] = {}
    folder = ""
    for line in re.search(r"```\n(.*?)```", text, re.DOTALL)[1].splitlines():
        if named := re.match(r"(\w+)/", line):
            folder = named[1]
        found[folder] = found.get(folder, "") + line + "\n"
    return found


@pytest.mark.parametrize("folder", ["epsdpo_kernels", "train", "bench"])
def test_every_file_is_in_the_picture(folder):
    there = {path.name for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"}
    named = set(re.findall(r"\b\w+\.py\b", sections()[folder]))
    tests = {name for name in there if name.startswith("test_") or name == "conftest.py"}
    assert named - there == set() and there - named - tests == set()


def test_every_folder_is_in_the_picture():
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert set(sections()) == there
    for folder, text in sections().items():
        inside = {path.name for path in (ROOT / folder).iterdir() if path.is_dir() and list(path.glob("*.py"))}
        assert inside - {"tests"} == set(re.findall(r"^ +(\w+)/ ", text, re.MULTILINE))
