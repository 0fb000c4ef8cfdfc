"""Scores the model on a recording, next to simple baselines: `springtide evaluate FILE... | --synthetic news|shoppers`.

It needs no Kafka, and reads and writes nothing of a running loop. Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

import msgspec

from deploy.attributes import files_of
from deploy.formats import parse_time
from deploy.replaying.news import NewsReaders
from deploy.replaying.shoppers import ShopperCrowd
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError
from state.process import log_lines
from state.process.commands import parser_of
from state.process.environment import wall_ms
from state.process.part import quiet_stderr, run_tensorflow_command, stop_on_signals
from state.recordings.files import as_settings, chosen

if TYPE_CHECKING:
    from evaluation.recording import RecordedEvents, RecordLimits

BEGIN_MS = 1_790_000_000_000
"""The time of the first synthetic click; fixed, so that runs are reproducible."""


def settings_of(options: argparse.Namespace, flags: Sequence[str]) -> Settings:
    """Returns the effective settings; raises SettingsError if an option or a setting is invalid."""
    if bool(options.files) == bool(options.synthetic):
        raise SettingsError("name what to evaluate: files or --synthetic, not both", "see `springtide evaluate --help`")
    for name in ("clicks", "record_rows"):
        if getattr(options, name) < 1:
            raise SettingsError(f"--{name.replace('_', '-')} {getattr(options, name)}: write a number above 0")
    if options.requests < 0 or options.seed < 0 or not options.record_s >= 0:
        raise SettingsError("--requests, --seed and --record-s: write 0 or more")
    ranker = [] if options.ranker is None else [f"--model.ranker={options.ranker}"]
    return load([*flags, *as_settings(options), *ranker], os.environ)


def read(options: argparse.Namespace, settings: Settings, limits: RecordLimits, errors: TextIO) -> RecordedEvents:
    """Reads the files, or generates the clicks, that the command line names."""
    from evaluation import recording

    def say(line: str) -> None:
        print(line, file=errors, flush=True)

    if options.files:
        return recording.read_files(settings, chosen(options, settings.events), options.sort, limits, say)
    name = f"synthetic {options.synthetic} (seed {options.seed})"
    if options.synthetic == "news":
        readers = NewsReaders(seed=options.seed, begin_ms=BEGIN_MS, actions=settings.events.actions)
        return recording.synthetic(settings, name, readers.click, options.clicks, limits)
    shoppers = ShopperCrowd.from_settings(settings, options.seed, settings.shoppers.rate, BEGIN_MS)
    return recording.synthetic(settings, name, shoppers.click, options.clicks, limits)


def run(options: argparse.Namespace, flags: Sequence[str], errors: TextIO) -> str:
    """Evaluates, writes the requested files, and returns the output."""
    settings = settings_of(options, flags)
    log_lines.follow(settings.logs)
    begin_ms = None if options.begin is None else parse_time(options.begin, wall_ms())
    for path in (options.json, options.chart):
        if path is not None and not path.absolute().parent.is_dir():
            raise SettingsError(f"{path}: there is no directory {path.absolute().parent}", "create it")
    # TensorFlow and Beam are loaded only after the command line is checked.
    with quiet_stderr():
        from evaluation.recording import RecordLimits
        from evaluation.report import as_text, svg
        from evaluation.run import Wanted, evaluate
    limits = RecordLimits(options.record_rows, options.record_s)
    events = read(options, settings, limits, errors)
    wanted = Wanted(options.last, begin_ms, options.requests, options.seed)
    # The format of the clicks is not that of the attributes.
    of_sides = argparse.Namespace(**{**vars(options), "columns": "", "format": "", "delimiter": ""})
    attribute_files = files_of(of_sides, settings) if options.users or options.items else []
    evaluation = evaluate(settings, events, wanted, errors, stop_on_signals(), attribute_files)
    document = msgspec.json.format(msgspec.json.encode(evaluation), indent=2).decode()
    if options.json is not None:
        options.json.write_text(document + "\n")
    if options.chart is not None:
        options.chart.write_text(svg(evaluation.periods))
    return document if options.output == "json" else as_text(evaluation)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""

    def work(arguments: Sequence[str], errors: TextIO) -> None:
        flags, words = split_settings(arguments)
        print(run(parser_of("evaluate").parse_args(words), flags, errors))

    return run_tensorflow_command("evaluate", work, argv)


if __name__ == "__main__":
    sys.exit(main())
