"""Runs the main job: ``loft-train``, ``launch/train.py`` or, under a launcher, ``-m loft_ds.training``."""

import importlib.util
import sys

EXTRA = ("datasets", "filelock", "matplotlib")  # imported at once; what else `train` holds, only when it is asked for


def main() -> None:
    """Runs the command line, or says what to install."""
    missing = [package for package in EXTRA if importlib.util.find_spec(package) is None]
    if missing:
        sys.exit(f"train.py: error: it needs {', '.join(missing)}: pip install 'loft_ds[train]'")
    from .train import main as run

    run()


if __name__ == "__main__":
    main()
