"""Disks fill up, bits flip, rights are missing, files are locked: seen, named, never taken for something else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from state.disk.lock import DirectoryLock
from state.errors import CorruptVersion, LockHeld, UnusableDisk, UnusableRegistry
from state.positions import Source
from state.registry.control import Control, pin, start
from state.registry.manifest import Draft, Kind, LogRange
from state.registry.registry import SERVING, TRAINING, Registry
from tests.disks import as_nobody, open_folder, small_disk

SOURCE = Source("ab" * 16, 0)


def draft(parent: int | None) -> Draft:
    return Draft(
        kind="base" if parent is None else "delta", epoch=1, parent=parent, log=LogRange("log", "cd" * 16, 0, 4, 9),
        sources=((SOURCE, 7),), steps=3, rows=12, created_at_ms=1000, event_time_ms=900, spec="s", program="p", salt="t",
    )  # fmt: skip


def publish(registry: Registry, parent: int | None, size: int = 40) -> int:
    files = {SERVING: b"%d:" % (parent or 0) + bytes(size), TRAINING: bytes(range(40))}
    return registry.publish(draft(parent), files).version


def started(path: Path, versions: int) -> Registry:
    registry = Registry(path)
    registry.propose(start(actor="ann", reason="because", now_ms=5))
    for parent in range(versions):
        publish(registry, parent or None)
    return registry


# A full disk


def test_a_version_that_does_not_fit_is_absent_and_the_one_before_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        registry = started(disk.path / "registry", 2)
        with pytest.raises(UnusableRegistry, match=r"cannot store version 3 \(.*No space left on device.*free space"):
            publish(registry, 2, size=4 << 20)
        assert Registry(registry.path).newest_good(1) == 2
        assert not list((registry.path / "tmp").iterdir())
        full = disk.fill()
        with pytest.raises(UnusableRegistry, match="cannot store control generation 2"):
            registry.change(lambda control: _pinned(control, 1))
        assert len(registry.controls()) == 1
        full.unlink()
        assert publish(registry, 2) == 3
        assert Registry(registry.path).newest_good(1) == 3


def _pinned(control: Control, version: int) -> Control:
    return pin(control, version, actor="ann", reason="test", now_ms=6)


# Damaged files


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 (base) to 4, and a base of 3 beside its delta."""
    registry = started(tmp_path_factory.mktemp("chain"), 4)
    registry.add_base(registry.manifest(3), {SERVING: b"all", TRAINING: b"all too"})
    return registry.path


FILES = [
    (folder, number, name)
    for folder, numbers in (("versions", (2, 3, 4)), ("bases", (1, 3)))
    for number in numbers
    for name in ("manifest.json", SERVING, TRAINING)
]
# Which version is the newest good one when a file of the first is damaged: the chain of 4 goes base 3, delta 4.
LEFT = {("versions", 2): 4, ("versions", 3): 4, ("versions", 4): 3, ("bases", 1): 4, ("bases", 3): 4}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 8))
def test_a_file_damaged_anywhere_is_never_loaded(
    chain: Path, which: tuple[str, int, str], place: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, number, name = which
    path = shutil.copytree(chain, tmp_path_factory.mktemp("damaged") / "registry")
    file = path / folder / f"{number:012d}" / name
    data = file.read_bytes()
    at = int(place * len(data))
    file.write_bytes(data[:at] if bit == 8 else data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    registry = Registry(path)
    kind: Kind = "delta" if folder == "versions" else "base"
    with pytest.raises(CorruptVersion, match=f"version {number}: .*{name}") as raised:
        registry.verify(registry.manifest(number, kind))
    assert "\n" not in str(raised.value)

    # What is restored is good in every part, and what was needed and bad is set aside.
    newest = registry.newest_good(1)
    assert newest == LEFT[folder, number]
    base, deltas = registry.chain(newest)
    for part in (base, *deltas):
        registry.verify(part)
    needed = (folder, number) in {("versions", 4), ("bases", 3)}
    aside = [one.name for one in (path / folder).iterdir() if ".bad" in one.name]
    assert aside == ([f"{number:012d}.bad"] if needed else [])
    shutil.rmtree(path.parent)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 8))
def test_control_damaged_anywhere_is_no_control_and_no_older_one(
    place: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("control")
    registry = started(path, 1)
    registry.change(lambda control: _pinned(control, 1))
    file = path / "control" / "00000002.json"
    data = file.read_bytes()
    at = int(place * len(data))
    file.write_bytes(data[:at] if bit == 8 else data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    for _ in range(2):
        with pytest.raises(CorruptVersion, match=r"00000002.json is damaged"):
            Registry(path).control()
    shutil.rmtree(path)


def test_a_damaged_program_is_replaced_by_the_one_just_lowered(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    digest = registry.specs.add_program(b"program")
    (tmp_path / "programs" / f"{digest}.tflite").write_bytes(b"progrm")
    with pytest.raises(CorruptVersion, match="digest"):
        registry.specs.program(digest)
    registry.specs.add_program(b"program")
    assert registry.specs.program(digest) == b"program"


# Missing rights


IMPORTS = """
import sys
from pathlib import Path
from state.registry.control import pin
from state.errors import SpringtideError
from state.disk.lock import DirectoryLock
from state.registry.registry import Registry
"""
LOOK = """
registry = Registry(Path(sys.argv[1]))
for use in (registry.control, registry.versions, lambda: registry.newest_good(1), lambda: registry.read(2, "serving.safetensors")):
    try:
        print(use())
    except SpringtideError as error:
        print(type(error).__name__, error)
"""


def open_to_all(registry: Registry) -> Registry:
    """As an operator may open a registry to readers of other users."""
    for path in (registry.path, *registry.path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return registry


@pytest.mark.parametrize(
    ("closed", "says"),
    [
        (".", ["UnusableRegistry"] * 4),
        ("control", ["UnusableRegistry", "[1, 2]", "2", "b'1:"]),
        ("versions", ["Control", "UnusableRegistry", "UnusableRegistry", "UnusableRegistry"]),
        ("versions/000000000002", ["Control", "[1, 2]", "UnusableRegistry", "UnusableRegistry"]),
        ("versions/000000000002/serving.safetensors", ["Control", "[1, 2]", "UnusableRegistry", "UnusableRegistry"]),
    ],
)
def test_what_may_not_be_read_is_neither_empty_nor_corrupt(closed: str, says: list[str]) -> None:
    with open_folder() as folder:
        registry = open_to_all(started(folder / "registry", 2))
        (registry.path / closed).chmod(0)
        done = as_nobody(IMPORTS, LOOK, registry.path)
        (registry.path / closed).chmod(0o755)
        lines = done.stdout.splitlines()
        assert [line[: len(start)] for line, start in zip(lines, says, strict=True)] == says, done.stderr
        assert all("correct its access rights" in line for line in lines if line.startswith("Unusable"))
        assert not list(registry.path.rglob("*.bad"))


TRY = """
path = Path(sys.argv[1])
registry = Registry(path)
print(registry.newest_good(1))
for use in (
    lambda: registry.change(lambda control: pin(control, 1, actor="bob", reason="test", now_ms=6)),
    lambda: registry.specs.add_program(b"program"),
    lambda: registry.set_aside(registry.folder("delta", 2), 2, "test"),
    lambda: registry.remove("delta", 2),
    DirectoryLock(path, "trainer.lock").acquire,
):
    try:
        use()
        print("done")
    except SpringtideError as error:
        print(type(error).__name__, error)
"""


def test_a_registry_that_may_only_be_read_is_read_and_every_change_refused() -> None:
    with open_folder() as folder:
        registry = open_to_all(started(folder / "registry", 2))
        done = as_nobody(IMPORTS, TRY, registry.path)
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["2", *["UnusableRegistry"] * 4, "UnusableDisk"], done.stderr
        assert registry.versions() == [1, 2]
        assert len(registry.controls()) == 1


def test_a_read_only_disk_is_read_and_every_change_refused(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        registry = started(disk.path / "registry", 2)
        disk.remount("ro")
        reader = Registry(registry.path)
        assert reader.newest_good(1) == 2
        with pytest.raises(UnusableRegistry, match="Read-only file system"):
            publish(reader, 2)
        with pytest.raises(UnusableDisk, match="Read-only file system"):
            DirectoryLock(registry.path, "trainer.lock").acquire()


def test_a_full_disk_keeps_nobody_from_the_lock(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        disk.fill()
        with DirectoryLock(disk.path), pytest.raises(LockHeld):
            DirectoryLock(disk.path).acquire()


HOLD = """
import sys
from pathlib import Path
from state.disk.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_lock_names_the_holder(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path / "state"), pytest.raises(LockHeld, match=f"process {os.getpid()} on .*, started 20"):
        DirectoryLock(tmp_path / "state").acquire()
    with DirectoryLock(tmp_path / "state"):
        pass


def test_names_are_locked_on_their_own(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path), DirectoryLock(tmp_path, "other.lock"):
        assert {path.name for path in tmp_path.iterdir()} == {"lock", "other.lock"}


def test_a_killed_holder_leaves_nothing_to_clean_up(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path.cwd()
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockHeld, match=f"process {holder.pid} "):
            DirectoryLock(tmp_path).acquire()
        holder.kill()
        holder.wait()
    with DirectoryLock(tmp_path):
        pass
