"""Continues training with another model, preprocessing or feature spec: `springtide upgrade`.

1. The newest version is read, and the model of the settings is built.
2. The command reports what is carried over and what starts from scratch; `--dry-run` ends here.
3. The next control generation begins an epoch that continues from the version, by one exclusive create. Nothing else
   is changed.

The command needs the trainer's lock; serving continues.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TextIO, Unpack

from state import layout
from state.config.loading import load
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import RegistryError, SettingsError
from state.features.spec import FeatureSpec
from state.process import log_lines
from state.process.commands import parser_of
from state.process.environment import actor, wall_ms
from state.process.part import quiet_stderr, run_tensorflow_command
from state.process.private_files import keep_private
from state.registry.control import Control, Decision
from state.registry.manifest import Manifest
from state.registry.model_fit import accepted, differences, going_on_to, upgrade, version_to_go_on_from
from state.registry.registry import Registry
from state.rows.tables import OPTIONAL

if TYPE_CHECKING:
    from trainer.engine.step import Trainer
    from trainer.versions.carrying import Carrying

Say = Callable[[str], None]


def run(settings: Settings, dry_run: bool, from_scratch: bool, reason: str, say: Say, now_ms: int) -> Control | None:
    """Does one upgrade; returns the new control, or None if nothing was changed.

    Raises:
        LockHeld: A trainer is running.
        RegistryError: There is no registry, or nothing was learned in it.
        ProgramError: The model cannot be built.
        ControlConflict: Another process changed control meanwhile.
    """
    if not (settings.registry_dir / layout.VERSIONS).is_dir():
        raise RegistryError(
            f"there is no registry at {settings.registry_dir}", "nothing was learned: `springtide up` begins"
        )
    with nullcontext() if dry_run else DirectoryLock(settings.registry_dir, layout.TRAINER_LOCK):
        registry, spec = Registry(settings.registry_dir), FeatureSpec.from_settings(settings)
        control, version = registry.control(), version_to_go_on_from(registry)
        if control is None or version is None:
            raise RegistryError(f"nothing was learned in {registry.path}", "`springtide up` begins")
        # 1. 2.
        if from_scratch:
            lines = [
                f"version {version.version}, epoch {version.epoch}: nothing is carried over",
                "starts from scratch: all tables, weights, counts and measures, from the retained training log",
                f"serving stays at version {version.version} until the trainer has caught up; histories, salt and Kafka are kept",
            ]
            plan = {"carried": {}, "anew": ["everything"]}
        else:
            planned, lines = planning(registry, version, settings, spec)
            plan = planned.document()
            if not differences(registry, version, settings, spec) and not planned.wanting(OPTIONAL):
                say(f"version {version.version} fits these settings: there is nothing to upgrade")
                return None
            if accepted(registry, settings, spec):
                say(f"generation {control.generation}: the upgrade from version {version.version} is decided already")
                return None
        for line in lines:
            say(line)
        if dry_run:
            say("dry run: nothing was changed")
            return None
        # 3.
        decision = Decision(actor=actor(), reason=reason, now_ms=now_ms)
        proposed = propose(registry, settings, None if from_scratch else version, plan, **decision)
        say(
            f"generation {proposed.generation}: epoch {proposed.epoch} begins from "
            f"{'nothing' if proposed.base is None else f'version {proposed.base}'}; start the trainer and the stream with these settings"
        )
        return proposed


def planning(
    registry: Registry, version: Manifest, settings: Settings, spec: FeatureSpec
) -> tuple[Carrying, list[str]]:
    """Plans what the settings' model carries over from a version; also returns the plan as text."""
    with quiet_stderr():
        from trainer.versions.starting import analysed, trainer_of

        name = registry.specs.bootstrapped(spec.digest, settings.model)
        # Without an analysis: the default preprocessing has the same width as logarithms.
        trainer = trainer_of(settings, spec, None if name is None else analysed(registry.specs, name))
    planned = planned_for(registry, version, trainer)
    lines = [f"from version {version.version}, epoch {version.epoch}:"]
    lines += [f"  {subject} {text}" for subject, text in differences(registry, version, settings, spec).items()]
    lines += planned.lines()
    if version.spec != spec.digest:
        lines.append("  every window, computed again out of the histories, which stay; records of the log with the old")
        lines.append("  windows that were not learned yet are passed over and counted")
    if name is None:
        lines.append("  the preprocessing's constants: the bootstrap analyses the clicks that Kafka keeps")
        if settings.model.preprocessing != type(settings.model)().preprocessing:
            lines.append("  parts that read its columns may start from scratch too: their number is known only then")
    return planned, lines


def planned_for(registry: Registry, version: Manifest, trainer: Trainer) -> Carrying:
    """Plans what a trainer's model carries over from a version. Clears the trainer."""
    from trainer.versions import checkpoint
    from trainer.versions.carrying import plan

    _, old = checkpoint.full_state(registry, version.version)
    trainer.clear()
    return plan(old, checkpoint.full(trainer))


def propose(
    registry: Registry, settings: Settings, version: Manifest | None, plan: dict[str, Any], **decision: Unpack[Decision]
) -> Control:
    """Creates control's next generation, which begins the epoch from `version` or from scratch; durable on return.

    Raises:
        ControlConflict: Other processes keep changing control.
    """
    newest = version_to_go_on_from(registry)
    was = {} if newest is None else {"was": newest.spec}
    document = {**going_on_to(settings, FeatureSpec.from_settings(settings).digest), **was, **plan}

    def decided(control: Control) -> Control:
        # An untrained model serves badly, so serving stays at its version until the trainer has caught up.
        stays = control.serving.version or (None if newest is None else newest.version)
        base, answers = (None, stays) if version is None else (version.version, None)
        return upgrade(control, base, document, answers, **decision)

    return registry.change(decided)


def main(argv: Sequence[str] | None = None) -> int:
    """Does one upgrade; returns the exit code."""
    keep_private()

    def work(words: Sequence[str], errors: TextIO) -> None:
        args, flags = parser_of("upgrade").parse_known_args(words)
        if not args.dry_run and not args.reason.strip():
            raise SettingsError("upgrade needs --reason TEXT, or --dry-run to see what it would do")
        settings, now_ms = load(flags, os.environ), wall_ms()
        log_lines.follow(settings.logs)
        run(settings, args.dry_run, args.from_scratch, args.reason, print, now_ms)

    return run_tensorflow_command("upgrade", work, argv)


if __name__ == "__main__":
    sys.exit(main())
