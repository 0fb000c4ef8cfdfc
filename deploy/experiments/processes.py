"""The processes of experiments, as `springtide up` starts them: only while there is work.

`python -m deploy.experiments.processes` starts them without `springtide up`, as in the trainer's Kubernetes pod; metrics
are on `up.metrics_port` + 5. With the argument `host` it is one of them: it answers users until a rollout is over.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from deploy import serve
from deploy.supervisor import ProcessPlan, Supervisor
from state import layout
from state.config.settings import Settings
from state.config.sources import span_ms
from state.disk import memory_place
from state.errors import SpringtideError
from state.experiments.experiment import Experiments
from state.metrics import SupervisorMetrics, served
from state.process.environment import wall_ms
from state.process.part import run_part, stop_on_signals

EXPERIMENTS, RETRAIN, ROLLOUT_HOST = "experiments", "retrain", "rollout-host"
HOST = "host"
"""The argument of the host's process, and the name of its state directory."""
STOP_S = 30.0
POLL_S = 0.2
_LOOPBACK = re.compile(r"http://(127\.0\.0\.1|localhost|\[::1\]):\d{1,5}")
logger = logging.getLogger(__name__)


def plans(settings: Settings) -> list[ProcessPlan]:
    """Returns the processes; they read settings from their environment. A host runs only at an address of this machine.

    >>> [plan.name for plan in plans(Settings())]
    ['experiments']
    """
    experiments, every_ms = Experiments(settings), span_ms(settings.retrain.every)

    def retrain_wanted() -> bool:
        try:
            schedule = experiments.document().schedule
        except SpringtideError:
            # The process reports the error.
            return True
        return schedule is None or schedule.under_way or schedule.is_due(every_ms or 0.0, wall_ms())

    def host_wanted() -> bool:
        try:
            return hosted(experiments) is not None
        except SpringtideError:
            return False

    processes = [ProcessPlan(EXPERIMENTS, _command("shadow"), STOP_S, wanted=lambda: bool(experiments.open()))]
    if every_ms:
        processes.append(ProcessPlan(RETRAIN, _command("retrain"), wanted=retrain_wanted))
    if is_local(settings.rollout.address):
        processes.append(ProcessPlan(ROLLOUT_HOST, (*_command("processes"), HOST), STOP_S, wanted=host_wanted))
    return processes


def _command(module: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"deploy.experiments.{module}")


def is_local(address: str) -> bool:
    """Returns whether an address is a loopback address with a port.

    >>> is_local("http://127.0.0.1:8601"), is_local("http://trial-host:8501"), is_local("")
    (True, False, False)
    """
    return _LOOPBACK.fullmatch(address) is not None


def hosted(experiments: Experiments) -> str | None:
    """Returns the experiment for which this machine must answer: its rollout is open, and its registry is here.

    Raises:
        RegistryError: The experiments cannot be read.
    """
    experiment = experiments.document().rolled_out
    if experiment is None or not experiments.registry(experiment.name).is_dir():
        return None
    return experiment.name


def run(settings: Settings, registry: CollectorRegistry, stop: threading.Event) -> None:
    """Runs the processes without `springtide up` until `stop` is set; call it from the main thread."""
    from deploy.experiments.status import ExperimentCollector

    registry.register(ExperimentCollector(settings))
    supervisor = Supervisor.of(settings, lambda line: logger.warning("%s", line), SupervisorMetrics(registry))
    # This process has read the settings, so a child that cannot run is restarted.
    supervisor.settled = True
    for plan in plans(settings):
        # Serving hosts are other pods, which do not see the experiments' volume.
        if plan.name != ROLLOUT_HOST:
            supervisor.start(plan)
    try:
        while not stop.is_set():
            supervisor.poll()
            stop.wait(POLL_S)
    finally:
        supervisor.stop_all()


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


def answer(settings: Settings, stopping: Callable[[], bool]) -> None:
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
    """Runs the processes with the settings of `argv` until a signal, or the one for users; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    stop = stop_on_signals()

    def work(settings: Settings) -> None:
        with served(settings.up.experiments_port, settings.metrics.host) as registry:
            run(settings, registry, stop)

    if words[:1] == [HOST]:
        return run_part(ROLLOUT_HOST, lambda settings: answer(settings, stop.is_set), words[1:], logger)
    return run_part("experiments", work, words, logger)


if __name__ == "__main__":
    sys.exit(main())
