"""The drill of a lost disk: a running loop is backed up, killed with all that is on its disk but Kafka's data, restored, and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from state.registry.registry import Registry
from tests.e2e.loop.test_bad_record import balanced
from tests.e2e.loop.test_power_cut import pull_the_plug
from tests.e2e.running import Loop, until

USER = "one-before-the-loss"


def back_up(loop: Loop, to: Path) -> int:
    """Makes a backup beside the running loop, which has learned seven clicks of a user; learns three more that it lacks.

    Returns:
        The version that the backup goes on from.
    """
    loop.answer_trained_on(USER, loop.click([(USER, "tent", "outdoors", "purchase")] * 7))
    made = loop.springtide("backup", str(to), "--with-salt")["made"]
    again = loop.springtide("backup", str(to), "--with-salt")["made"]
    assert again["sent_bytes"] > 0 and again["version"] >= made["version"] > 1
    assert again["positions"]["stream-0"] and set(again["left_out"]) == set()
    loop.answer_trained_on(USER, loop.click([(USER, "tent", "outdoors", "purchase")] * 3))
    return int(again["version"])


def lose(loop: Loop) -> dict[str, bytes]:
    """Kills all of it, and removes what was on the disk; Kafka's data was elsewhere. Returns the files of its versions."""
    pull_the_plug(loop)
    state, registry = loop.settings.state_dir, loop.settings.registry_dir
    files = {
        one.relative_to(registry).as_posix(): one.read_bytes()
        for folder in ("versions", "merged", "bases", "control")
        for one in (registry / folder).rglob("*.*")
        if one.is_file()
    }
    for one in state.iterdir():
        if one != loop.settings.kafka_dir:
            shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
    return files


def same_versions(loop: Loop, lost: dict[str, bytes], version: int) -> None:
    """What was restored is what was there."""
    registry = Registry(loop.settings.registry_dir)
    assert registry.versions()[-1] == version
    for folder in ("versions", "merged", "bases"):
        for one in (registry.path / folder).rglob("*.*"):
            name = one.relative_to(registry.path).as_posix()
            assert lost.get(name, one.read_bytes()) == one.read_bytes()
    newest = registry.manifest(version)
    assert all(registry.folder_of(newest).joinpath(name).exists() for name in newest.files)


def goes_on(loop: Loop, version: int) -> None:
    """All ten clicks are counted once, new ones are learned, accounts balance, and numbers have jumped."""
    control = Registry(loop.settings.registry_dir).control()
    assert control is not None and control.action == "restore"
    after = loop.answer_trained_on(USER, loop.click([(USER, "tent", "outdoors", "purchase")]))
    assert after["version"]["number"] > version + 10_000

    def counted() -> bool:
        answer = loop.profile(USER)
        return answer is not None and answer["features"]["purchase.count_7d"] == 11

    until(counted, "clicks are lost or doubled")
    until(lambda: balanced(loop), "the accounts do not balance")
