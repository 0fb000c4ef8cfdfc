"""Answers users for an experiment until its rollout is over: `python -m deploy.experiments.host`, a child of `up`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from deploy import serve
from deploy.experiments.processes import hosted
from state import layout
from state.config.settings import Settings
from state.disk import memory_place
from state.experiments.experiment import Experiments
from state.process.ending import stop_on_signals
from state.process.part import run_part

HOST = "host"
logger = logging.getLogger(__name__)


def flags_of(settings: Settings, name: str) -> list[str]:
    """Returns the settings that differ for the experiment's host, as flags that override the loop's settings.

    >>> from state.config.loading import load
    >>> flags_of(load(["--rollout.address=http://127.0.0.1:8601"], {}, "/dev/null"), "wider")[:2]
    ['--paths.state=.springtide/experiments/wider/host', '--paths.registry=.springtide/experiments/wider/registry']
    """
    experiments, address = Experiments(settings), urlsplit(settings.rollout.address)
    settings_of_host = {
        "paths.state": experiments.folder(name) / HOST,
        "paths.registry": experiments.registry(name),
        "paths.shared_registry": "",
        "paths.salt_file": settings.salt_path,
        "serving.tokens_dir": settings.tokens_dir,
        "serving.host": address.hostname,
        "serving.port": address.port,
        "serving.grpc_port": 0,
        "serving.metrics_port": 0,
        # Only workers of this machine connect to it.
        "serving.tls_cert": "",
        "serving.tls_key": "",
        "rollout.address": "",
        "history.snapshot_every_s": 0,
    }
    return [f"--{name}={value}" for name, value in settings_of_host.items()]


def run(settings: Settings, stopping: Callable[[], bool]) -> None:
    """Answers for the experiment until its rollout is over, or `stopping` returns True.

    Raises:
        ProcessFailed: Applier or worker ended by itself.
        RegistryError: The experiments cannot be read.
    """
    experiments = Experiments(settings)
    name = hosted(experiments)
    if name is None:
        return

    def is_over() -> bool:
        return hosted(experiments) != name

    logger.info("answering for experiment %s at %s", name, settings.rollout.address)
    stop_s = serve.STOP_S + settings.serving.drain_s
    serve.run(serve.commands(flags_of(settings, name)), os.environ, lambda: stopping() or is_over(), stop_s)
    if is_over():
        remove(experiments.folder(name) / HOST)


def remove(folder: Path) -> None:
    """Removes the host's state; stores in memory are removed first.

    Raises:
        OSError: The operating system reported an error.
    """
    for store in (layout.ROWS, layout.HISTORIES):
        if (link := folder / layout.SERVING / store).is_symlink():
            memory_place.forget(link)
    if folder.is_dir():
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Answers for the experiment with the settings of `argv`; returns the exit code."""
    stopping = stop_on_signals()
    return run_part("rollout-host", lambda settings: run(settings, stopping.is_set), argv, logger)


if __name__ == "__main__":
    sys.exit(main())
