"""A worker of a trainer, other than its leader: `python -m trainer.worker --index K [--section.name VALUE ...]`.

1. It imports TensorFlow, prepares the kernels and joins the others.
2. It waits for the leader's first call, which comes after the bootstrap, and builds the same trainer as the leader.
3. It repeats the leader's calls until the leader stops it or a worker is lost; see `trainer/group.py`.

It writes nothing: the leader publishes the rows of all workers. What only versions and metrics need (item lists, counts of
categories, churn) is learned by the leader alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from prometheus_client import CollectorRegistry

from state.compiled.preparing import Kernels
from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.log import KERNELS as LOG_KERNELS
from state.process.part import Work, run_process
from state.process.quiet_stderr import own_stderr, quiet_stderr, quiet_tensorflow
from state.registry.registry import Registry

DESCRIPTION = (
    "Run one of the other workers of a trainer with trainer.workers above 1. It joins the trainer, holds the rows of a part "
    "of the users, and computes their gradients."
)
POLL_S = 0.5
logger = logging.getLogger(__name__)


def end_with(parent: int) -> None:
    """Ends this process when the process `parent`, which started it, has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def restore_handlers() -> None:
    """Installs this process's handlers again: joining a group replaces that of SIGTERM. Only in the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.getsignal(number))


def local_addresses(count: int) -> list[str]:
    """Addresses with free ports for workers on this machine."""
    with ExitStack() as sockets:
        addresses = []
        for _ in range(count):
            socket_ = sockets.enter_context(socket.socket())
            socket_.bind(("127.0.0.1", 0))
            addresses.append(f"127.0.0.1:{socket_.getsockname()[1]}")
    return addresses


@contextmanager
def workers_of(settings: Settings) -> Iterator[tuple[list[str], list[subprocess.Popen[bytes]]]]:
    """The addresses of the workers of a leader, and those that it runs as child processes, which end with the block.

    Without other workers both are empty. Workers whose addresses the settings give run elsewhere.

    Raises:
        SettingsError: The settings give another number of addresses than of workers.
    """
    count, addresses = settings.trainer.workers, list(settings.trainer.worker_addresses)
    if addresses and len(addresses) != count:
        raise SettingsError(
            f"trainer.workers is {count} and trainer.worker_addresses has {len(addresses)} addresses",
            "list one address for each worker, the first for the trainer itself",
        )
    if addresses or count == 1:
        yield addresses if count > 1 else [], []
        return
    addresses, environment = local_addresses(count), {**os.environ, **settings.environment()}
    command = [sys.executable, "-m", "trainer.worker", "--addresses", ",".join(addresses), "--parent", str(os.getpid())]
    children = [
        subprocess.Popen([*command, "--index", str(index)], env=environment) for index in range(1, len(addresses))
    ]
    try:
        yield addresses, children
    finally:
        for child in children:
            child.kill()
            child.wait()


def run(settings: Settings, addresses: Sequence[str], index: int) -> None:
    """Runs worker `index` until the leader stops it.

    Raises:
        SettingsError: There is no such worker.
        WorkerLost: The leader or another worker ended, or does not answer.
        SpringtideError: The registry cannot be read.
    """
    if not 0 < index < len(addresses):
        raise SettingsError(
            f"--index {index} is no worker of {len(addresses)} besides the first",
            "use 1 to trainer.workers - 1, and list every worker in trainer.worker_addresses",
        )
    # 1.
    collected = CollectorRegistry()
    kernels = Kernels(collected, logger, [], [LOG_KERNELS])
    with quiet_stderr():
        from trainer import device
        from trainer.engine.divided_step import DividedTrainer
        from trainer.engine.step import Trainer
        from trainer.group import Group
        from trainer.versions import checkpoint
        from trainer.versions.program import preprocessing_of
    kernels.prepare(lambda: False)
    device.prepare(settings.trainer.device, settings.trainer.threads)
    with quiet_stderr():
        group = Group(addresses, index)
    restore_handlers()
    logger.info("joined as worker %d of %d", index, group.size)
    # 2.
    group.wait()
    registry, spec = Registry(settings.registry_dir), FeatureSpec.from_settings(settings)
    name = registry.specs.bootstrapped(spec.digest, settings.model) or spec.digest
    lighter = replace(
        settings,
        trainer=replace(settings.trainer, item_ranking="engagement", interests="model"),
        churn=replace(settings.churn, days=0.0),
    )
    trainer = DividedTrainer(lighter, spec, preprocessing_of(registry.specs.transform(name)), group)

    def restore(trainer: Trainer, version: int) -> None:
        if version:
            checkpoint.restore(registry, version, trainer, spec.digest)
        else:
            checkpoint.begin(trainer, registry.specs.spec(name))
        logger.info("loaded version %d, %s users", version, f"{len(trainer.tables['user']):,}")

    # 3.
    trainer.follow(restore)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one worker; returns the exit code."""
    quiet_tensorflow(os.environ)
    # A keyboard interrupt reaches all processes of a terminal; the leader ends the others in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        parser = argparse.ArgumentParser(prog="springtide train-worker", allow_abbrev=False, description=DESCRIPTION)
        parser.add_argument("--index", type=int, required=True, help="number of this worker, from 1")
        parser.add_argument(
            "--addresses", default="", help="addresses of all workers; default trainer.worker_addresses"
        )
        parser.add_argument("--parent", type=int, default=0, help="process with which this one ends")
        args, flags = parser.parse_known_args(words)
        settings = load(flags, os.environ)
        if args.parent:
            end_with(args.parent)
        addresses = args.addresses.split(",") if args.addresses else list(settings.trainer.worker_addresses)
        return settings, lambda: run(settings, addresses, args.index)

    return run_process("worker", start, argv, logger, own_stderr())


if __name__ == "__main__":
    sys.exit(main())
