"""A salt other than that of the stored users is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from state.errors import SaltMismatch
from state.events.identity import Salt
from state.registry.model_fit import require_same_salt
from state.registry.registry import Registry


def test_another_salt_than_that_of_the_registry_is_refused(tmp_path: Path) -> None:
    registry, ours, other = Registry(tmp_path), Salt(b"ours" * 8), Salt(b"other" * 8)
    require_same_salt(registry, ours)
    registry.specs.add_spec("abc", {"salt": ours.fingerprint}, lambda folder: (folder / "transform").mkdir())
    require_same_salt(registry, ours)
    with pytest.raises(SaltMismatch, match=f"{ours.fingerprint}.*{other.fingerprint}"):
        require_same_salt(registry, other)
