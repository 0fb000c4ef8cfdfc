"""Beam's options for each kind of engine: what a job of ours needs there is filled in, anything else passes through.

What Flink and Prism are told was measured; each has its reason beside it. An
option that is given wins.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence

from apache_beam.options.pipeline_options import PipelineOptions

from state.config.settings import Settings
from state.errors import SettingsError

LOCAL, FLINK, PRISM = "local", "flink", "prism"

ON_FLINK = (
    # A bundle that a checkpoint ends would keep its output until more clicks come.
    ("finish_bundle_before_checkpointing", True),
    # What is behind a checkpoint is made again after a fault: one a second costs some 150 ms of little work.
    ("checkpointing_interval", 1000),
    # The default of a second is a second of every answer's age.
    ("max_bundle_time_mills", 100),
    ("parallelism", 1),
    # A job that was cancelled is resumed from its last checkpoint, where there is no savepoint.
    ("externalized_checkpoints_enabled", True),
    ("retain_externalized_checkpoints_on_cancellation", True),
)
ON_PRISM = (
    # A split of the endless rest has no end; an hour without a change is no reason to end the job.
    ("experiments", "prism_disable_sdf_split"),
    ("job_server_timeout", 86400),
    # In this process: it is for tests and for trying things out.
    ("environment_type", "LOOPBACK"),
)


def take_runner(words: Sequence[str]) -> tuple[str, list[str]]:
    """The runner that a command line names, and the rest, which are Beam's options.

    >>> take_runner(["--parallelism=2", "--runner", "flink"]), take_runner([])
    (('flink', ['--parallelism=2']), ('local', []))

    Raises:
        SettingsError: The local form has no such option.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--runner", default=LOCAL)
    try:
        asked, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise SettingsError(
            str(error), "write --runner local, flink or prism, or the name of another Beam runner"
        ) from None
    if asked.runner == LOCAL and rest:
        raise SettingsError(
            f"unknown argument {rest[0]}", "options of Beam go with --runner flink, prism or another of its runners"
        )
    return asked.runner, rest


def beam_options(runner: str, words: Sequence[str], settings: Settings) -> PipelineOptions:
    """The options of a job.

    Args:
        runner: As `take_runner` gives it.
        words: Options that were given.
        settings: The effective settings.
    """
    filled: list[tuple[str, object]] = [("streaming", True)]
    if runner == FLINK:
        # The runner of a job server: `FlinkRunner` would fetch and start one of its own.
        filled += [("runner", "PortableRunner"), ("job_endpoint", f"127.0.0.1:{settings.flink.job_port}")]
        # JobWorker processes beside the TaskManager, of this very code.
        filled += [
            ("environment_type", "EXTERNAL"),
            ("environment_config", f"127.0.0.1:{settings.flink.worker_port}"),
            *ON_FLINK,
        ]
    elif runner == PRISM:
        filled += [("runner", "PrismRunner"), *ON_PRISM]
        if place := shutil.which("prism"):
            # One that is installed; else Beam fetches it.
            filled.append(("prism_location", place))
    else:
        filled.append(("runner", runner))
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    return PipelineOptions([*(_word(name, value) for name, value in filled if name not in given), *words])


def _word(name: str, value: object) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"
