"""The drill of a lost disk: a running loop is backed up, killed with all that is on its disk, restored, and goes on.

Kafka's data lay elsewhere, or was lost too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from state.registry.registry import Registry
from tests.e2e.loop.test_restart import balanced, pull_the_plug
from tests.e2e.running import Loop, until


def back_up(loop: Loop, to: Path, user: str) -> int:
    """Makes a backup beside the running loop, which has learned seven clicks of a user; learns three more that it lacks."""
    loop.answer_trained_on(user, loop.click([(user, "tent", "outdoors", "purchase")] * 7))
    made = loop.springtide("backup", str(to), "--with-salt")["made"]
    # Else two that are made within a tenth of a second may be the same.
    loop.answer_trained_on("another", loop.click([("another", "tent", "outdoors", "purchase")]))
    again = loop.springtide("backup", str(to), "--with-salt")["made"]
    assert again["sent_bytes"] > 0 and again["version"] >= made["version"] > 1
    assert again["positions"]["stream-0"] and set(again["left_out"]) == set()
    loop.answer_trained_on(user, loop.click([(user, "tent", "outdoors", "purchase")] * 3))
    return int(again["version"])


def lose(loop: Loop, with_kafka: bool = False) -> None:
    """Kills all of it, and removes what was on the disk, Kafka's data too or not."""
    pull_the_plug(loop)
    for one in loop.settings.state_dir.iterdir():
        if with_kafka or one != loop.settings.kafka_dir:
            shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()


def goes_on(loop: Loop, version: int, user: str) -> None:
    """All ten clicks are counted once, new ones are learned, accounts balance, and numbers have jumped."""
    control = Registry(loop.settings.registry_dir).control()
    assert control is not None and control.action == "restore"
    after = loop.answer_trained_on(user, loop.click([(user, "tent", "outdoors", "purchase")]))
    assert after["version"]["number"] > version + 10_000

    def counted() -> bool:
        answer = loop.profile(user)
        return answer is not None and answer["features"]["purchase.count_7d"] == 11

    until(counted, "clicks are lost or doubled")
    until(lambda: balanced(loop), "the accounts do not balance")


def goes_on_in_a_new_log(loop: Loop, version: int, user: str) -> None:
    """New clicks are learned on top of the version, in an epoch of its own; `test_backup_drill` compares the rest."""
    control = Registry(loop.settings.registry_dir).control()
    assert control is not None and (control.action, control.base) == ("restore", version)
    # Answers are those of the lost system before anybody clicks.
    restored = until(lambda: loop.profile(user), "no answer")
    assert (restored["known"], restored["features"]["purchase.count_7d"]) == (True, 7)
    assert "outdoors" in {interest["label"] for interest in restored["interests"]}
    after = loop.answer_trained_on(user, loop.click([(user, "tent", "outdoors", "purchase")]))
    assert (after["version"]["epoch"], after["known"]) == (control.epoch, True)
    assert after["version"]["number"] > version + 10_000
    until(lambda: balanced(loop), "the accounts do not balance")
