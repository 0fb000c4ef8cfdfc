"""A worker of a trainer, other than its leader: `python -m trainer.worker --index K [--section.name VALUE ...]`.

1. It imports TensorFlow, prepares the kernels and joins the others.
2. It waits for the leader's first call, which comes after the bootstrap, and builds the same trainer as the leader.
3. It repeats the leader's calls until the leader stops it or a worker is lost; see `trainer/group.py`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError, WorkerLost
from state.features.spec import FeatureSpec
from state.kernels import Kernels
from state.log import KERNELS as LOG_KERNELS
from state.metrics import build, serve
from state.process.commands import parser_of
from state.process.log_lines import SaidOnce
from state.process.network import HOST, free_ports
from state.process.part import Work, die_with, own_stderr, quiet_stderr, quiet_tensorflow, run_process
from state.registry.model_fit import environment_differences
from state.registry.registry import Registry
from state.registry.sharing import copying
from trainer import device

if TYPE_CHECKING:
    from trainer.group import Group

SHARED_S, POLL_S = 60.0, 0.1
"""How long a worker on another host waits until its copy of the registry has what the leader names."""
logger = logging.getLogger(__name__)


def waiting(missing: Sequence[int], addresses: Sequence[str]) -> str:
    """What a process logs while it waits for the workers `missing`.

    >>> waiting([1], ["a:7070", "b:7070"])
    'waiting for worker 1 of 2 (b:7070)'
    """
    if not missing:
        return f"joining {len(addresses) - 1} other workers; SIGALRM ends this process if one of them is lost meanwhile"
    return ", ".join(f"waiting for worker {worker} of {len(addresses)} ({addresses[worker]})" for worker in missing)


def without_leading(settings: Settings) -> Settings:
    """The settings of a worker that does not lead: only the leader keeps item lists, churn and interest counts."""
    return replace(
        settings,
        trainer=replace(settings.trainer, item_ranking="engagement", interests="model"),
        churn=replace(settings.churn, days=0.0),
    )


def restore_handlers() -> None:
    """Installs this process's handlers again: joining a group replaces that of SIGTERM. Only in the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.getsignal(number))


def begin(group: Group, settings: Settings) -> None:
    """Waits until all workers call this, and requires that they have the leader's settings, release and type of processor.

    The rows that every worker holds would otherwise not stay equal.

    Raises:
        SettingsError: This worker differs from the leader.
        WorkerLost: Another worker differs, ended or does not answer.
    """
    from trainer.versions import checkpoint

    place = device.prepare(settings.trainer.device, settings.trainer.threads)
    own = checkpoint.environment(settings, place, settings.trainer.engine)
    own |= {"release": build()["version"], "feature spec": FeatureSpec.from_settings(settings).digest}
    group.wait()
    leaders, *others = [json.loads(part) for part in group.gather_bytes(json.dumps(own).encode())]
    for index, other in enumerate(others, 1):
        if differs := environment_differences(leaders, other, "{name} {now!r}, and the leader {then!r}"):
            raise (SettingsError if index == group.index else WorkerLost)(
                f"worker {index} has {differs[0]}",
                "give all workers of the trainer the same settings, release and type of processor",
            )


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
    ports = free_ports(f"worker {index}" for index in range(count)).values()
    addresses, environment = [f"{HOST}:{port}" for port in ports], {**os.environ, **settings.environment()}
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


def wait_for(is_here: Callable[[], bool]) -> None:
    """Waits for what the leader wrote just before: a copy of a shared registry gets it later. Gives up after `SHARED_S`."""
    end_s = time.monotonic() + SHARED_S
    while not is_here() and time.monotonic() < end_s:
        time.sleep(POLL_S)


def run(settings: Settings, addresses: Sequence[str], index: int, metrics_port: int | None = None) -> None:
    """Runs worker `index` until the leader stops it.

    Args:
        settings: All settings.
        addresses: `host:port` of each worker, in order.
        index: Of this process, from 1.
        metrics_port: Of the metrics of this process; None for a worker that uses the leader's port and registry.

    Raises:
        SettingsError: There is no such worker, or its settings differ from the leader's.
        PortTaken: The port is in use.
        WorkerLost: The leader or another worker ended, or does not answer.
        SpringtideError: The registry cannot be read.
    """
    if not 0 < index < len(addresses):
        raise SettingsError(
            f"--index {index} is no worker of {len(addresses)} besides the first",
            "use 1 to trainer.workers - 1, and list every worker in trainer.worker_addresses",
        )
    collected = CollectorRegistry()
    if metrics_port is None:
        _follow(settings, addresses, index, collected)
        return
    serve(collected, metrics_port, settings.metrics.host)
    with copying(settings, collected, first=threading.Event()):
        _follow(settings, addresses, index, collected)


def _follow(settings: Settings, addresses: Sequence[str], index: int, collected: CollectorRegistry) -> None:
    # 1.
    kernels = Kernels(collected, logger, [], [LOG_KERNELS])
    with quiet_stderr():
        from trainer.engine.divided_step import DividedTrainer
        from trainer.engine.step import Trainer
        from trainer.group import Group, await_others
        from trainer.model.preprocessing import preprocessing_of
        from trainer.versions import checkpoint
    kernels.prepare(lambda: False)
    device.prepare(settings.trainer.device, settings.trainer.threads)
    say = SaidOnce(logger.info)
    await_others(addresses, index, lambda missing: say(waiting(missing, addresses)))
    with quiet_stderr():
        group = Group(addresses, index)
    restore_handlers()
    logger.info("joined as worker %d of %d", index, group.size)
    # 2.
    begin(group, settings)
    registry, spec = Registry(settings.registry_dir), FeatureSpec.from_settings(settings)
    wait_for(lambda: registry.specs.bootstrapped(spec.digest, settings.model) is not None)
    name = registry.specs.bootstrapped(spec.digest, settings.model) or spec.digest
    trainer = DividedTrainer(without_leading(settings), spec, preprocessing_of(registry.specs.transform(name)), group)

    def restore(trainer: Trainer, version: int) -> None:
        if version:
            wait_for(lambda: version in registry.versions())
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
        args, flags = parser_of("train-worker").parse_known_args(words)
        settings = load(flags, os.environ)
        if args.parent:
            die_with(args.parent)()
        addresses = args.addresses.split(",") if args.addresses else list(settings.trainer.worker_addresses)
        # A worker that the leader started is on the leader's machine, where the leader has the port.
        port = None if args.parent else settings.trainer.metrics_port
        return settings, lambda: run(settings, addresses, args.index, port)

    return run_process("worker", start, argv, logger, own_stderr())


if __name__ == "__main__":
    sys.exit(main())
