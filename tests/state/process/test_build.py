"""The build names what is installed, and imports none of it."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from state.process.build import build


def test_it_names_what_is_installed() -> None:
    found = build()
    assert found["tensorflow"] == metadata.version("tensorflow")
    assert found["kafka"] == metadata.version("kafka-python")
    assert all(found.values()), found


@pytest.mark.parametrize("heavy", ["tensorflow", "apache_beam"])
def test_nothing_is_imported_for_it(heavy: str) -> None:
    line = f"import sys, state.process.build as one; one.build(); sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line]).returncode == 0
