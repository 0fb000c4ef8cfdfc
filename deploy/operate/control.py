"""The operator's commands on control: pin, follow, rollback, history.

A command only writes the next control generation; serving and trainer find it
and converge. Asked twice, it changes nothing the second time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.operate import plan
from deploy.operate.versions import open_registry, readable, table
from state.config.settings import Settings
from state.errors import LogError, RegistryError, SaltMismatch, SettingsError
from state.events.identity import load_salt, user_id
from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.process.actor import actor
from state.registry import control as transitions
from state.registry import control_codec
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.registry import Registry

ASK_KAFKA_S = 5.0
Say = Callable[[str], None]


def pin(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Answers stay at one version; training goes on.

    Raises:
        UnknownVersion: It is not kept, or cannot be put together any more.
        ControlConflict: Somebody else changed control meanwhile.
    """
    registry = open_registry(settings)
    registry.chain(asked.version)
    control = _current(registry)
    new = transitions.pin(control, asked.version, actor=actor(), reason=asked.reason, now_ms=now_ms)
    _put(registry, control, new, f"answers stay at version {asked.version}", asked, say)


def follow(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Answers follow the newest version again.

    Raises:
        ControlConflict: Somebody else changed control meanwhile.
    """
    registry = open_registry(settings)
    control = _current(registry)
    new = transitions.follow(control, actor=actor(), reason=asked.reason, now_ms=now_ms)
    _put(registry, control, new, f"answers follow the newest version of epoch {control.epoch}", asked, say)


def rollback(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """The whole system goes back to a version and trains on without the masked clicks.

    1. The plan is worked out and printed.
    2. Unless it is a dry run, the next control generation is created.

    Raises:
        UnknownVersion: It is not kept, or cannot be put together any more, or lies off the line of the training log.
        LogError: It is to be exact, and Kafka does not answer.
        SettingsError: What to skip is not written as it should be.
        ControlConflict: Somebody else changed control meanwhile.
    """
    registry = open_registry(settings)
    control = _current(registry)
    if asked.before is not None:
        to = plan.newest_before(readable(registry), plan.parse_time(asked.before, now_ms))
    else:
        to = registry.manifest(asked.to)
    registry.chain(to.version)
    newest_number = registry.newest(control.epoch)
    newest = to if newest_number is None else registry.manifest(newest_number)
    mask = mask_of(settings, asked, newest, now_ms)
    # 1.
    end = log_end(settings)
    planned = plan.rollback_plan(
        to,
        newest,
        mask,
        now_ms=now_ms,
        log_end=end,
        topic=settings.kafka.microbatches_topic,
        partition=settings.trainer.partition,
    )
    plan.require_on_line(control, to)
    exactly = None
    if asked.mode == "exact":
        # Not at the top: it loads the window kernel, which no other command needs.
        from deploy.operate.exact import exact_plan

        exactly = exact_plan(settings, control, to)
    document = planned.document() | ({} if exactly is None else {"exact": exactly.document()})
    if asked.output == "text":
        say("\n".join([*planned.lines(), *([] if exactly is None else exactly.lines())]))
    line = None if exactly is None else exactly.line
    new = transitions.roll_back(control, to.version, mask, actor=actor(), reason=asked.reason, now_ms=now_ms, log=line)
    # 2.
    if asked.dry_run:
        say("dry run: nothing was changed" if asked.output == "text" else json.dumps({"plan": document}, indent=2))
        return
    done = f"epoch {new.epoch} starts from version {to.version}"
    _put(registry, control, new, done, asked, say, {"plan": document})


def history(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Lists every control generation: who decided what, when and why.

    Raises:
        RegistryError: There is no registry.
    """
    controls = list(open_registry(settings).controls())
    if asked.output == "json":
        say(json.dumps([control_document(one) for one in controls], indent=2))
        return
    head = ["generation", "at", "actor", "action", "epoch", "from", "answers", "left out", "reason"]
    lines = [
        [
            str(one.generation),
            plan.iso(one.created_at_ms),
            one.actor,
            one.action,
            str(one.epoch),
            "nothing" if one.base is None else str(one.base),
            "newest" if one.serving.version is None else f"version {one.serving.version}",
            plan.describe(one.mask),
            one.reason,
        ]
        for one in controls
    ]
    say(table([head, *lines]) if lines else "no control yet; the trainer writes the first")


def mask_of(settings: Settings, asked: argparse.Namespace, newest: Manifest, now_ms: int) -> Mask:
    """The mask of --skip, --skip-time and --skip-users.

    Raises:
        SettingsError: One of them is not written as it should be.
    """
    topic_ids = {source.topic_id for source, _ in newest.sources}
    return Mask(
        offsets=tuple(plan.parse_place(text, topic_ids) for text in asked.skip),
        times=tuple(plan.parse_times(text, now_ms) for text in asked.skip_time),
        users=MaskedUsers.NOBODY if asked.skip_users is None else users_of(settings, asked.skip_users, newest.salt),
    )


def users_of(settings: Settings, file: Path, fingerprint: str) -> MaskedUsers:
    """The pseudonyms of a file's users, one id a line.

    Args:
        settings: They name the salt.
        file: The file.
        fingerprint: Of the salt that the versions were trained with; another one would mask nobody.

    Raises:
        MissingSalt: The salt file is missing.
        SaltMismatch: It is another one.
        SettingsError: The file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--skip-users {file}: not readable: {error}", "give a UTF-8 file with one user id a line"
        ) from None
    salt = load_salt(settings.salt_path, create=False)
    if salt.fingerprint != fingerprint:
        raise SaltMismatch.between(f"the registry {settings.registry_dir}", fingerprint, salt.fingerprint)
    return MaskedUsers.of(user_id(salt, line.strip()) for line in lines if line.strip())


def log_end(settings: Settings) -> int | None:
    """End offset of the training log; None when Kafka does not answer."""
    from state.log import Topics

    try:
        topics = Topics(replace(settings.kafka, request_timeout_s=min(ASK_KAFKA_S, settings.kafka.request_timeout_s)))
        try:
            return int(topics.ends(settings.kafka.microbatches_topic)[settings.trainer.partition][1])
        finally:
            topics.close()
    except (LogError, KeyError):
        return None


def control_document(control: Control) -> dict[str, Any]:
    """A control generation as JSON values; a mask's users are counted, not listed."""
    document: dict[str, Any] = json.loads(control_codec.encode(control))
    return {**document, "mask": plan.mask_document(control.mask)}


def _current(registry: Registry) -> Control:
    control = registry.control()
    if control is None:
        raise RegistryError(f"{registry.path}: no control yet", "start the trainer first, it writes generation 1")
    return control


def _put(
    registry: Registry,
    old: Control,
    new: Control,
    done: str,
    asked: argparse.Namespace,
    say: Say,
    more: dict[str, Any] | None = None,
) -> None:
    """Creates the generation where it differs, and says so."""
    changed = new is not old
    if changed:
        registry.propose(new)
    if asked.output == "json":
        say(json.dumps({**(more or {}), "changed": changed, "control": control_document(new)}, indent=2))
    elif changed:
        say(f"generation {new.generation}: {done}")
    else:
        say(f"generation {old.generation}: it is so already; nothing was changed")
