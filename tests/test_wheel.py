"""What an index would get; `make release` also installs it into an empty environment and trains from there."""

import configparser
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from launch_helpers import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> ZipFile:
    """Built in a copy: setuptools leaves a folder, and takes into the next wheel what has been deleted since."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "loft_ds", folder / "loft_ds", symlinks=True)  # a build follows the one there is
    shutil.copytree(ROOT / "ds_configs", folder / "ds_configs")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return ZipFile(next((folder / "dist").glob("*.whl")))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [file for folder in ("loft_ds", "loft_ds/ds_configs") for file in (ROOT / folder).rglob("*.*")]
    there = {str(file.relative_to(ROOT)) for file in files if file.is_file() and file.suffix not in {".pyc", ".md"}}
    assert held == there
    assert "loft_ds/ds_configs/zero2.json" in held


def test_its_commands_lead_somewhere(wheel):
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode())
    commands = dict(scripts["console_scripts"])
    assert commands.keys() == {"loft-train", "loft-plan", "loft-doctor"}
    for target in commands.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_importing_loft_ds_imports_no_part_of_the_main_job():
    program = "import sys, loft_ds; print([m for m in sys.modules if m.startswith(('loft_ds.training', 'datasets'))])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_only_the_main_job_needs_its_extra():
    """Whose packages are not there without it, so that nothing else may import them."""
    extra = ("datasets", "filelock", "gguf", "tensorboard", "trl")
    needing = {
        str(file.relative_to(ROOT / "loft_ds"))
        for file in (ROOT / "loft_ds").rglob("*.py")
        for line in file.read_text().splitlines()
        if line.strip().startswith(tuple(f"{word} {package}" for word in ("import", "from") for package in extra))
    }
    assert needing
    assert {Path(name).parts[0] for name in needing} == {"training"}
