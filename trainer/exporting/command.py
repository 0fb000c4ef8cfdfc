"""Exports a version: `springtide export [--version V]`, or with `--tflite FILE` as one file for a device."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from state.config.loading import load
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import RegistryError, SaltMismatch, SettingsError, UnknownVersion
from state.events.identity import ids_in, load_salt, user_id
from state.features.spec import FeatureSpec
from state.layout import VERSIONS
from state.log import Log
from state.process import log_lines
from state.process.commands import parser_of
from state.process.environment import run_in_background
from state.process.part import quiet_stderr, run_child, run_tensorflow_command
from state.process.private_files import keep_private
from state.registry.registry import Registry
from trainer import device

KEPT = 3
"""Number of the newest SavedModels that stay."""


def chosen_version(registry: Registry, wanted: int | None) -> int:
    """The requested version; otherwise the version that serving is pinned to, or the newest of control's epoch."""
    if wanted is not None:
        return registry.manifest(wanted).version
    control = registry.control()
    pinned = None if control is None else control.serving.version
    newest = pinned if pinned is not None else registry.newest(None if control is None else control.epoch)
    if newest is None:
        raise UnknownVersion("there is no version yet", "wait for the trainer's first one")
    return newest


def answers_of(settings: Settings, version: int, users: Path, items: Path | None) -> bytes:
    """Serving's answers about named users and items, computed in a separate process on this host.

    Raises:
        ProgramError, SettingsError: The process failed; the message is its own.
    """
    with tempfile.TemporaryDirectory(prefix="springtide-answers-") as folder:
        path = Path(folder) / "answers.npz"
        words = ["--version", str(version), "--users", str(users), "--to", str(path)]
        words += [] if items is None else ["--items", str(items)]
        run_child("deploy.serving.answers.known_answers", words, os.environ | settings.environment())
        return path.read_bytes()


def run(settings: Settings, args: argparse.Namespace) -> None:
    """Runs the export that the arguments describe."""
    if not (settings.registry_dir / VERSIONS).is_dir():
        raise RegistryError(f"there is no registry at {settings.registry_dir}", "correct paths.state or paths.registry")
    if args.tflite is None and args.quantize != "none":
        raise SettingsError("--quantize is for a device's file", "add --tflite FILE, or leave it out")
    if args.items is not None and (args.tflite is not None or args.users is None):
        raise SettingsError("--items are for a SavedModel with --users", "add --users FILE, or leave --items out")
    if args.rows < 0:
        raise SettingsError(f"--rows {args.rows} is no number of rows", "give 0 or more")
    registry, spec = Registry(settings.registry_dir), FeatureSpec.from_settings(settings)
    number, folder = chosen_version(registry, args.version), settings.exports_dir
    if args.tflite is None and (folder / str(number)).exists():
        saved = folder / str(number)
        print(
            f"saved model  {saved} exists and was left as it is; to write it again, for example with other --users, remove it first"
        )
        return
    users = None if args.users is None else load_salt(settings.salt_path, create=False)
    answers = None if args.users is None or args.tflite else answers_of(settings, number, args.users, args.items)
    with quiet_stderr():
        from trainer.engine.step import Trainer
        from trainer.exporting import exporting, saved_model
        from trainer.exporting.saved_model import KnownAnswers
        from trainer.model.preprocessing import preprocessing_of

        chosen = []
        if users is not None and args.tflite:
            chosen = [user_id(users, plain) for plain in ids_in(args.users, "--users")]
        # The trainer runs at the same time and owns the GPU.
        settings = replace(settings, trainer=replace(settings.trainer, device="cpu"))
        device.prepare(settings.trainer.device, settings.trainer.threads)
        name = registry.specs.bootstrapped(spec.digest, settings.model) or spec.digest
        trainer = Trainer(settings, spec, preprocessing_of(registry.specs.transform(name)))

        compared = exporting.load(registry, number, trainer, spec.digest, Log(settings.kafka))
        if users is not None and users.fingerprint != compared.version.salt:
            raise SaltMismatch.between(f"version {number}", compared.version.salt, users.fingerprint)
        if args.tflite is not None:
            exporting.export_device_file(compared, args.tflite, chosen, args.rows, args.quantize, print)
            return
        known = None if answers is None else KnownAnswers(answers)
        with DirectoryLock(folder):
            saved_model.sweep(folder)
            exporting.export_saved_model(compared, folder, print, known)
            for version in saved_model.keep_newest(folder, KEPT):
                print(f"removed      version {version}: the newest {KEPT} stay")


def main(argv: Sequence[str] | None = None) -> int:
    """Exports one version; returns the exit code."""
    keep_private()
    run_in_background()

    def work(words: Sequence[str], errors: TextIO) -> None:
        args, flags = parser_of("export").parse_known_args(words)
        settings = load(flags, os.environ)
        log_lines.follow(settings.logs)
        run(settings, args)

    return run_tensorflow_command("export", work, argv)


if __name__ == "__main__":
    sys.exit(main())
