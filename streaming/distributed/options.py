"""Beam options for each kind of engine: fills in those that a Springtide job needs, and passes all others through.

The values for Flink and Prism were measured; a comment next to each gives its reason. An option on the command line
takes precedence.
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
    # Otherwise a bundle that a checkpoint ends would keep its output until more clicks arrive.
    ("finish_bundle_before_checkpointing", True),
    # Work since the last checkpoint is repeated after a failure; one checkpoint a second costs about 150 ms of little
    # work.
    ("checkpointing_interval", 1000),
    # The default of one second would add one second to the age of every response.
    ("max_bundle_time_mills", 100),
    ("parallelism", 1),
    # A cancelled job without a savepoint is resumed from its last checkpoint.
    ("externalized_checkpoints_enabled", True),
    ("retain_externalized_checkpoints_on_cancellation", True),
)
ON_PRISM = (
    # Splitting an unbounded restriction never ends; an hour without a change is no reason to end the job.
    ("experiments", "prism_disable_sdf_split"),
    ("job_server_timeout", 86400),
    # Workers run in this process: Prism is for tests and experiments.
    ("environment_type", "LOOPBACK"),
)


def take_runner(words: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--runner` off a command line; returns the runner and the remaining words, which are Beam's options.

    >>> take_runner(["--parallelism=2", "--runner", "flink"]), take_runner([])
    (('flink', ['--parallelism=2']), ('local', []))

    Raises:
        SettingsError: The local form does not have such an option.
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
    """Builds the Beam options of a job.

    Args:
        runner: As returned by `take_runner`.
        words: Options from the command line.
        settings: The effective settings.
    """
    filled: list[tuple[str, object]] = [("streaming", True)]
    if runner == FLINK:
        # `PortableRunner` uses a running job server; `FlinkRunner` would download and start its own.
        filled += [("runner", "PortableRunner"), ("job_endpoint", f"127.0.0.1:{settings.flink.job_port}")]
        # JobWorker processes next to the TaskManager, which run this same code.
        filled += [
            ("environment_type", "EXTERNAL"),
            ("environment_config", f"127.0.0.1:{settings.flink.worker_port}"),
            *ON_FLINK,
        ]
    elif runner == PRISM:
        filled += [("runner", "PrismRunner"), *ON_PRISM]
        if place := shutil.which("prism"):
            # Use an installed one; otherwise Beam downloads it.
            filled.append(("prism_location", place))
    else:
        filled.append(("runner", runner))
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    return PipelineOptions([*(_word(name, value) for name, value in filled if name not in given), *words])


def _word(name: str, value: object) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"
