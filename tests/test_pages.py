"""What the pages say that a command made is what the command says now."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BLOCK = re.compile(
    r"<!-- python (?P<command>[^\n]+?) -->\n(?:```text\n)?(?P<text>.*?)(?:```\n)?<!-- end -->", re.DOTALL
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [(page.name, found["command"], found["text"]) for page in PAGES for found in BLOCK.finditer(page.read_text())]


def printed(command: str) -> str:
    return subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(("page", "command", "text"), BLOCKS, ids=[f"{page} {command}" for page, command, _ in BLOCKS])
def test_a_block_is_what_its_command_prints(page, command, text):
    assert text == printed(command)


def test_the_readme_is_short_and_has_its_blocks():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert {command for page, command, _ in BLOCKS if page == "README.md"} == {
        "benchmarks/readme.py results",
        "benchmarks/readme.py cost",
        "benchmarks/readme.py step",
    }


BADGES = ROOT / "docs" / "pictures" / "badges.svg"


def test_badges_say_what_pyproject_says():
    assert BADGES.read_text() == printed("benchmarks/readme.py badges")
    said = re.findall(r">([^<>]+)</text>", BADGES.read_text())
    project = (ROOT / "pyproject.toml").read_text()
    (python,) = re.findall(r'^requires-python = ">=(.+)"', project, re.MULTILINE)
    (torch,) = re.findall(r'^ +"torch>=(.+)"', project, re.MULTILINE)
    (deepspeed,) = re.findall(r'^ +"deepspeed>=(.+)"', project, re.MULTILINE)
    (license,) = re.findall(r'^license = "(.+)"', project, re.MULTILINE)
    newer = [f"{version} or newer" for version in (python, torch, deepspeed)]
    names = ["Python", "torch", "DeepSpeed", "license"]
    assert list(zip(said[::2], said[1::2], strict=True)) == list(zip(names, [*newer, license], strict=True))


LINKING = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_links_to_exist(page):
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def fill() -> None:
    """Puts what the commands print now into the pages: ``python tests/test_pages.py``."""
    for page in PAGES:
        text = page.read_text()
        for found in reversed(list(BLOCK.finditer(text))):
            start, end = found.span("text")
            text = text[:start] + printed(found["command"]) + text[end:]
        Path(page).write_text(text)
    BADGES.write_text(printed("benchmarks/readme.py badges"))


if __name__ == "__main__":
    fill()
