"""The drill of a lost disk: a running loop is backed up, killed with all that is on its disk, restored, and goes on.

Kafka's data lay elsewhere, or was lost too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from state.events.identity import load_salt, user_id
from state.features.spec import FeatureSpec
from state.log import Reader, Topics
from state.microbatch.codec import decode
from state.registry.manifest import sees
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


def lose(loop: Loop, with_kafka: bool = False) -> dict[str, bytes]:
    """Kills all of it, and removes what was on the disk, Kafka's data too or not. Returns the files of its versions."""
    pull_the_plug(loop)
    state, registry = loop.settings.state_dir, loop.settings.registry_dir
    files = {
        one.relative_to(registry).as_posix(): one.read_bytes()
        for folder in ("versions", "merged", "bases", "control")
        for one in (registry / folder).rglob("*.*")
        if one.is_file()
    }
    for one in state.iterdir():
        if with_kafka or one != loop.settings.kafka_dir:
            shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
    return files


def same_versions(loop: Loop, lost: dict[str, bytes], version: int) -> None:
    registry = Registry(loop.settings.registry_dir)
    assert registry.versions()[-1] == version
    for folder in ("versions", "merged", "bases"):
        for one in (registry.path / folder).rglob("*.*"):
            name = one.relative_to(registry.path).as_posix()
            assert lost.get(name, one.read_bytes()) == one.read_bytes()
    newest = registry.manifest(version)
    assert all(registry.folder_of(newest).joinpath(name).exists() for name in newest.files)


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
    """New clicks are learned on top of the version, in an epoch of its own; histories were restored, and accounts own to the loss."""
    registry = Registry(loop.settings.registry_dir)
    control = registry.control()
    assert control is not None and (control.action, control.base) == ("restore", version)
    # Answers are those of the lost system before anybody clicks.
    restored = until(lambda: loop.profile(user), "no answer")
    assert (restored["known"], restored["features"]["purchase.count_7d"]) == (True, 7)
    assert "outdoors" in {interest["label"] for interest in restored["interests"]}
    after = loop.answer_trained_on(user, loop.click([(user, "tent", "outdoors", "purchase")]))
    assert (after["version"]["epoch"], after["known"]) == (control.epoch, True)
    assert after["version"]["number"] > version + 10_000
    account = until(lambda: balanced(loop), "the accounts do not balance")
    # Rows that the histories have and the version had not learned.
    assert account["trainer"]["gap"] >= 0
    learned = registry.manifest(version).log.topic_id
    # A recent version is there before the durable one.
    until(
        lambda: registry.manifest(registry.versions()[-1]).log.topic_id != learned, "no durable version of the new log"
    )
    assert sees(registry.manifest(registry.versions()[-1]).visible, version)
    with Reader(loop.settings.kafka, loop.settings.kafka.microbatches_topic) as reader:
        assert windows_in(reader, loop, user) == [7], "the row of the new click counts the seven of the backup"


def windows_in(reader: Reader, loop: Loop, user: str) -> list[int]:
    """Of each row of a user in the training log the purchases of the 7 days before."""
    own = user_id(load_salt(loop.settings.salt_path, create=False), user)
    column = FeatureSpec.from_settings(loop.settings).names.index("purchase.count_7d")
    with Topics(loop.settings.kafka) as topics:
        end = topics.ends(loop.settings.kafka.microbatches_topic)[0][1]
    found = list[int]()
    while reader.position(0) < end:
        for batch in reader.poll(0.1):
            for made in map(decode, filter(None, batch.values)):
                found += made.features[made.user == own, column].tolist()
    return found
