"""`springtide erase`: users are forgotten, and `--status` says what still holds something of them and until when.

1. The users' attributes are taken out of their topic, by the plain id.
2. The place is found: the ends of the clicks' partitions, and all of topics that were read before.
3. The next control generation names pseudonyms and place: one exclusive create.

Serving, stream, trainer and compactor find it and forget. The plain id is
written nowhere else: not in control, a log, or what this command says. A
command that ended early is simply given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.operate import erasure_status, log_view
from deploy.operate.commands import Say, current
from deploy.operate.versions import open_registry
from state.config.settings import Settings
from state.errors import RegistryError, SaltMismatch, SettingsError
from state.events.identity import load_salt, user_id
from state.features.erased import EVERYTHING
from state.features.masked_users import MaskedUsers
from state.log import Log
from state.process import killpoints
from state.process.actor import actor
from state.registry.erasing import erase as erase_users
from state.registry.manifest import Manifest
from state.registry.registry import Registry

STDIN = Path("-")


def erase(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Does one erasure, or shows what still holds something of erased users.

    Raises:
        SettingsError: No users are named, or no reason; or their file cannot be read.
        MissingSalt, SaltMismatch: The salt is gone, or is not the one of the stored pseudonyms.
        RegistryError: There is no registry or no version yet.
        LogError: Kafka does not answer: nothing was changed.
        ControlConflict: Somebody else changed control all the time.
    """
    registry = open_registry(settings)
    if asked.status:
        erasure_status.show(settings, registry, now_ms, asked.output, say)
        return
    plain = _asked_for(asked)
    control = current(registry)
    newest = _newest(registry)
    salt = load_salt(settings.salt_path, create=False)
    if salt.fingerprint != newest.salt:
        raise SaltMismatch.between(f"the registry {settings.registry_dir}", newest.salt, salt.fingerprint)
    users = MaskedUsers.of(user_id(salt, one) for one in plain)
    log = log_view.open_log(settings)
    # 1.
    tombstones = take_attributes(settings, log, plain)
    killpoints.reach("erase.attributes")
    # 2.
    until = places(settings, log, newest)
    # 3.
    made = registry.change(
        lambda now: erase_users(now, users, until, actor=actor(), reason=asked.reason, now_ms=now_ms)
    )
    number = made.erased.last
    if asked.output == "json":
        say(
            json.dumps(
                {"erasure": number, "generation": made.generation, "users": len(users), "tombstones": tombstones}
            )
        )
        return
    say(
        f"generation {made.generation}: erasure {number} of {len(users):,} user{'s' if len(users) > 1 else ''}; answers know "
        f"nobody of them within 2 s where an applier runs (control was at {control.generation})"
    )
    if tombstones:
        say(f"their attributes are taken out of {settings.attributes.user_topic}")
    say("`springtide erase --status` shows what still holds something of them, and until when")


def _asked_for(asked: argparse.Namespace) -> list[str]:
    if (asked.user is None) == (asked.users is None):
        raise SettingsError("say who: --user ID, or --users FILE", "see `springtide erase --help`")
    if not asked.reason:
        raise SettingsError("--reason TEXT is missing", "say why: it is kept with your name in the history")
    found = [asked.user] if asked.users is None else _lines(asked.users)
    found = [one for line in found if (one := line.strip())]
    if not found:
        raise SettingsError("no user is named", "give an id, or a file with one id a line")
    return list(dict.fromkeys(found))


def _lines(file: Path) -> list[str]:
    try:
        text = sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        # Its text would have what was read.
        raise SettingsError(f"--users {file}: it is no UTF-8 text", "give a file with one user id a line") from None
    except OSError as error:
        raise SettingsError(
            f"--users {file}: not readable ({error.strerror})", "give a file with one user id a line"
        ) from None
    return text.splitlines()


def _newest(registry: Registry) -> Manifest:
    versions = registry.versions()
    if not versions:
        raise RegistryError(f"{registry.path}: no version yet", "wait for the trainer's first one")
    return registry.manifest(versions[-1])


def take_attributes(settings: Settings, log: Log, plain: Sequence[str]) -> int:
    """Sends a tombstone for each user into each partition of the attributes' topic: who wrote them chose which; returns how many users.

    Raises:
        LogError: The topic is not there, or Kafka does not take it.
    """
    topic = settings.attributes.user_topic
    if not topic:
        return 0
    with log.topics() as topics:
        partitions = topics.describe(topic).partitions
    with log.writer() as writer:
        for one in plain:
            for partition in range(partitions):
                writer.send(topic, partition, one.encode(), None)
        writer.flush()
    return len(plain)


def places(settings: Settings, log: Log, newest: Manifest) -> list[tuple[int, int, int]]:
    """(topic word, partition, next offset) of the clicks: their ends now, and all of topics that were read before.

    Raises:
        LogError: Kafka does not answer, or the topic is not there.
    """
    topic = settings.kafka.clicks_topic
    with log.topics() as topics:
        word, ends = int(topics.describe(topic).topic_id[:8], 16), topics.ends(topic)
    found = {(source.topic, source.partition): EVERYTHING for source, _ in newest.sources if source.topic != word}
    found |= {(word, partition): end for partition, (_, end) in ends.items()}
    return [(*place, after) for place, after in sorted(found.items())]
