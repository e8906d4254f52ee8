"""The deliberate breaks of mutations.py still apply to the code: whether a test notices each, that script shows."""

import pytest
from mutations import BREAKS, ROOT


@pytest.mark.parametrize("mistake", BREAKS, ids=lambda mistake: f"{mistake.file}: {mistake.new.strip()[:40]}")
def test_a_break_finds_what_it_breaks(mistake):
    assert (ROOT / "loft_ds" / mistake.file).read_text().count(mistake.old) == 1
