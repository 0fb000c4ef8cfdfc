"""The processes of experiments, as `springtide up` starts them: only while there is work.

`python -m deploy.experiments.processes` starts them without `springtide up`, as in the trainer's Kubernetes pod; metrics
are on `up.metrics_port` + 5.
"""

from __future__ import annotations

import logging
import re
import sys
import threading

from prometheus_client import CollectorRegistry

from deploy.supervisor import ProcessPlan, Supervisor
from state.config.settings import Settings
from state.config.sources import span_ms
from state.errors import SpringtideError
from state.experiments.experiment import Experiments
from state.metrics import SupervisorMetrics, served
from state.process.ending import stop_on_signals
from state.process.part import run_part
from state.process.wall_clock import wall_ms

EXPERIMENTS, RETRAIN, ROLLOUT_HOST = "experiments", "retrain", "rollout-host"
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
        processes.append(ProcessPlan(ROLLOUT_HOST, _command("host"), STOP_S, wanted=host_wanted))
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


def main(argv: list[str] | None = None) -> int:
    """Runs the processes with the settings of `argv` until a signal; returns the exit code."""
    stop = stop_on_signals()

    def work(settings: Settings) -> None:
        with served(settings.up.experiments_port, settings.metrics.host) as registry:
            run(settings, registry, stop)

    return run_part("experiments", work, argv, logger)


if __name__ == "__main__":
    sys.exit(main())
