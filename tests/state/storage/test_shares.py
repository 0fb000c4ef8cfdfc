"""The budget of the disk: its shares, and what the parts use of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from state import storage
from state.config.loading import load
from state.config.settings import Settings, known_settings


def du(path: Path) -> int:
    files = [one for one in path.rglob("*") if one.is_file()]
    said = subprocess.run(["du", "-c", "--block-size=1", *map(str, files)], capture_output=True, text=True, check=True)
    return int(said.stdout.splitlines()[-1].split()[0])


def test_files_of_all_depths_count_with_their_blocks_and_a_hole_does_not(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "deep").write_bytes(bytes(10_000))
    (tmp_path / "a" / "one").write_bytes(b"1")
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 30)
    (tmp_path / "elsewhere").symlink_to("/usr")
    (tmp_path / "gone").symlink_to("never")
    assert storage.used_bytes([tmp_path]) == du(tmp_path / "a") == 4 * 4096
    assert storage.used_bytes([tmp_path / "a" / "b", tmp_path / "never"]) == 3 * 4096


def test_a_part_is_measured_again_only_after_some_seconds(tmp_path: Path) -> None:
    now_s = 0.0
    use = storage.PartUse([tmp_path], clock=lambda: now_s)
    assert use() == 0
    (tmp_path / "file").write_bytes(bytes(4096))
    now_s = storage.FRESH_S - 0.1
    assert use() == 0
    now_s = storage.FRESH_S
    assert use() == du(tmp_path) > 0


def test_used_and_limit_are_offered_for_the_parts_that_a_process_owns(tmp_path: Path) -> None:
    flags = ["--paths.state", str(tmp_path), "--storage.budget_gb", "1"]
    settings = load(flags, env={})
    folder = tmp_path / "stream-0" / "histories"
    folder.mkdir(parents=True)
    (folder / "data.mdb").write_bytes(bytes(8192))
    collected = CollectorRegistry()
    storage.offer(collected, settings, [storage.STREAM, storage.LOGS])

    def sample(name: str, part: str) -> float | None:
        return collected.get_sample_value(f"springtide_storage_{name}", {"part": part})

    assert (
        (sample("free_bytes", "logs") or 0) <= (sample("disk_bytes", "logs") or 0) == shutil.disk_usage(tmp_path).total
    )
    assert sample("used_bytes", "stream") == du(tmp_path / "stream-0")
    assert sample("limit_bytes", "stream") == 150_000_000
    assert sample("used_bytes", "logs") == 0
    assert sample("limit_bytes", "logs") == 50_000_000
    assert sample("waiting", "logs") == 0
    assert sample("used_bytes", "registry") is None


ROOT = Path(__file__).parents[3]


def with_budget(gigabytes: float) -> Settings:
    return load(["--storage.budget_gb", str(gigabytes)], env={})


def test_the_shares_are_the_whole_budget_and_no_more() -> None:
    settings = with_budget(3)
    assert sum(storage.SHARES.values()) == pytest.approx(1.0)
    assert 2_999_999_990 <= sum(storage.limit_bytes(settings, part) for part in storage.SHARES) <= 3_000_000_000


@pytest.mark.parametrize("part", storage._STORES)
def test_the_stores_of_a_part_fit_into_its_share_with_room_for_small_files(part: str) -> None:
    settings = with_budget(1)
    stores = sum(storage.store_bytes(settings, part, store) for store in storage._STORES[part])
    assert stores <= storage.limit_bytes(settings, part)


def test_the_help_and_the_tables_say_the_same_shares() -> None:
    wanted = {part: f"{share:.0%}".replace("%", " %") for part, share in storage.SHARES.items()}
    for text in (storage.__doc__ or "", (ROOT / "docs" / "operate" / "storage.md").read_text()):
        assert dict(re.findall(r"^\| `(\w+)` \| (\d+ %) \|", text, re.MULTILINE)) == wanted
    (budget,) = (one for one in known_settings() if one.name == "storage.budget_gb")
    assert sorted(re.findall(r"\d+ %", budget.help)) == sorted(wanted.values())


def test_a_store_larger_than_its_share_is_opened_with_room_to_become_smaller(tmp_path: Path) -> None:
    small, folder = with_budget(0.5), tmp_path / "attributes"
    share = storage.store_bytes(small, storage.SERVING, "attributes")
    assert storage.map_bytes(small, storage.SERVING, "attributes", folder) == share
    folder.mkdir()
    with (folder / "data.mdb").open("wb") as data:
        os.posix_fallocate(data.fileno(), 0, share * 3)
    opened = storage.map_bytes(small, storage.SERVING, "attributes", folder)
    assert share * 3 + (60 << 20) < opened < share * 4 + (64 << 20)
