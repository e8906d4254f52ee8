"""Runs the doctor: ``python -m loft_ds.doctor``."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
