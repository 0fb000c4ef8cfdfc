"""Broker and disk trouble as the trainer meets it: it stops with one clear line, and goes on with the same bits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from state.errors import CorruptVersion, UnusableRegistry
from state.registry.registry import Registry
from tests import forked
from tests.disks import ROOT, small_disk
from tests.trainer.clicks import microbatch, small_settings
from tests.trainer.logs import bits_of, learner, run_to_end, started, written
from trainer import compactor
from trainer.loop import Scheduled, doubt

RECORDS = [microbatch(number) for number in range(10)]


def test_a_compactor_on_a_full_disk_removes_what_is_old_before_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings("--paths.state", str(tmp_path))
    done: list[str] = []

    def refuse(*_: object) -> None:
        raise UnusableRegistry("full")

    monkeypatch.setattr(compactor, "compact", refuse)
    monkeypatch.setattr(compactor, "thin", lambda *_: done.append("retained"))
    with pytest.raises(UnusableRegistry):
        compactor.run(settings)
    assert done == ["retained"]


def test_a_trainer_that_builds_on_a_damaged_version_ends_when_its_compactor_fails(tmp_path: Path) -> None:
    """Else it would add versions that nobody can restore; started again it sets the damage aside."""
    registry = started(tmp_path / "registry")
    running = learner(registry, written(RECORDS[:5]))
    run_to_end(running)
    running.close()
    expected = bits_of(running)
    damaged, newest = registry.versions()[1], registry.versions()[-1]
    assert damaged < newest == running.place.parent
    file = registry.folder("delta", damaged) / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    now = 0.0
    arguments = ["--paths.state", str(tmp_path)]
    compaction = Scheduled("trainer.compactor", arguments, 1.0, lambda *_: doubt(registry, newest), lambda: now)
    now = 2.0
    compaction.tick()
    assert compaction._child is not None and compaction._child.wait() == 1
    with pytest.raises(CorruptVersion, match=rf"version {damaged}: .*training.safetensors.*start the trainer again"):
        compaction.tick()
    again = learner(Registry(registry.path), written(RECORDS[:5]))
    assert again.place.parent < damaged
    run_to_end(again)
    assert bits_of(again) == expected
    again.close()


@pytest.mark.parametrize(
    "module",
    [
        "trainer.loop",
        "deploy.serving.applier",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("trainer.compactor", "streaming.pipeline")),
    ],
)
def test_on_a_read_only_disk_a_process_ends_with_one_line(tmp_path: Path, module: str) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        disk.remount("ro")
        done = forked.run(
            [sys.executable, "-m", module, "--paths.state", str(disk.path / "state")],
            cwd=ROOT, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert "Read-only file system" in line and "access rights" in line
