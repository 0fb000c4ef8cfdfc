"""The budget is divided among the parts, once, and said alike wherever a person reads it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from state.config.loading import load
from state.config.settings import Settings, known_settings
from state.storage import shares

ROOT = Path(__file__).parents[3]


def with_budget(gigabytes: float) -> Settings:
    return load(["--storage.budget_gb", str(gigabytes)], env={})


def test_the_shares_are_the_whole_budget_and_no_more() -> None:
    settings = with_budget(3)
    assert sum(shares.SHARES.values()) == pytest.approx(1.0)
    assert 2_999_999_990 <= sum(shares.limit_bytes(settings, part) for part in shares.SHARES) <= 3_000_000_000


@pytest.mark.parametrize("part", shares._STORES)
def test_the_stores_of_a_part_fit_into_its_share_with_room_for_small_files(part: str) -> None:
    settings = with_budget(1)
    stores = sum(shares.store_bytes(settings, part, store) for store in shares._STORES[part])
    assert stores <= shares.limit_bytes(settings, part)


def test_the_help_and_the_tables_say_the_same_shares() -> None:
    """In the help of the setting, in the documentation and where the shares are."""
    wanted = {part: f"{share:.0%}".replace("%", " %") for part, share in shares.SHARES.items()}
    for text in (shares.__doc__ or "", (ROOT / "docs" / "operate" / "storage.md").read_text()):
        assert dict(re.findall(r"^\| `(\w+)` \| (\d+ %) \|", text, re.MULTILINE)) == wanted
    (budget,) = (one for one in known_settings() if one.name == "storage.budget_gb")
    assert sorted(re.findall(r"\d+ %", budget.help)) == sorted(wanted.values())


def test_a_store_larger_than_its_share_is_opened_with_room_to_become_smaller(tmp_path: Path) -> None:
    small, folder = with_budget(0.5), tmp_path / "attributes"
    share = shares.store_bytes(small, shares.SERVING, "attributes")
    assert shares.map_bytes(small, shares.SERVING, "attributes", folder) == share
    folder.mkdir()
    with (folder / "data.mdb").open("wb") as data:
        data.truncate(share * 3)
    opened = shares.map_bytes(small, shares.SERVING, "attributes", folder)
    assert share * 3 + (60 << 20) < opened < share * 4 + (64 << 20)
