"""Serves a trial until its rollout is over: `python -m deploy.rollouts.host`, a child of `springtide up`.

It runs an applier and a worker like `springtide serve`, on the trial's registry, at `rollout.address`. Their state is
in the trial's directory and is removed with the rollout. It ends with status 0 once the rollout is over.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from deploy import serve
from deploy.rollouts.process_plan import hosted
from state import layout
from state.config.settings import Settings
from state.disk import memory_place
from state.process.ending import stop_on_signals
from state.process.part import run_part
from state.rollouts.rollouts import Rollouts
from state.trials.trial import Trials

HOST = "host"
logger = logging.getLogger(__name__)


def flags_of(settings: Settings, name: str) -> list[str]:
    """Returns the settings that differ for the trial's host, as flags that override the loop's settings.

    >>> from state.config.loading import load
    >>> flags_of(load(["--rollout.address=http://127.0.0.1:8601"], {}, "/dev/null"), "wider")[:2]
    ['--paths.state=.springtide/trials/wider/host', '--paths.registry=.springtide/trials/wider/registry']
    """
    trials, address = Trials(settings.state_dir), urlsplit(settings.rollout.address)
    own = {
        "paths.state": trials.folder(name) / HOST,
        "paths.registry": trials.registry(name),
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
    }
    return [f"--{name}={value}" for name, value in own.items()]


def run(settings: Settings, stopping: Callable[[], bool]) -> None:
    """Serves the trial until its rollout is over, or `stopping` returns True.

    Raises:
        ProcessFailed: Applier or worker ended by itself.
        RegistryError: The rollouts cannot be read.
    """
    rollouts, state = Rollouts(settings.registry_dir), settings.state_dir
    begun = rollouts.newest()
    if begun is None or not hosted(begun, state):
        return

    def is_over() -> bool:
        newest = rollouts.newest()
        return not hosted(newest, state) or newest is None or newest.started_ms != begun.started_ms

    logger.info("answering for trial %s at %s", begun.name, settings.rollout.address)
    flags = flags_of(settings, begun.name)
    stop_s = serve.STOP_S + settings.serving.drain_s
    serve.run(serve.commands(flags), os.environ, lambda: stopping() or is_over(), stop_s)
    if is_over():
        remove(Trials(state).folder(begun.name) / HOST)


def remove(folder: Path) -> None:
    """Removes the host's state; stores in memory are removed first.

    Raises:
        OSError: The operating system refused.
    """
    for store in (layout.ROWS, layout.HISTORIES):
        if (link := folder / layout.SERVING / store).is_symlink():
            memory_place.forget(link)
    if folder.is_dir():
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Serves the trial with the settings of `argv`; returns the exit code."""
    stopping = stop_on_signals()
    return run_part("trial-host", lambda settings: run(settings, stopping.is_set), argv, logger)


if __name__ == "__main__":
    sys.exit(main())
