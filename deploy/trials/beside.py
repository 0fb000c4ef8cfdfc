"""Runs trials without `springtide up`, as in the trainer's Kubernetes pod: `python -m deploy.trials.beside`.

While there is a trial to run or to remove, `deploy/trials/process.py` is a child of this process.
`deploy/trials/retraining.py` is one while a scheduled retrain is due or running. Their logs and those of the trials'
trainers are in the directory of logs. Metrics that compare the trials are on `trials.metrics_port`.
"""

from __future__ import annotations

import logging
import sys
import threading

from prometheus_client import CollectorRegistry

from deploy.children.supervisor import Supervisor
from deploy.trials import offered, process_plan
from state.config.settings import Settings
from state.metrics import SupervisorMetrics, served
from state.process.ending import stop_on_signals
from state.process.part import run_part

LOOK_S = 0.2
logger = logging.getLogger(__name__)


def run(settings: Settings, registry: CollectorRegistry, stop: threading.Event) -> None:
    """Runs all trials until `stop` is set; call it from the main thread.

    Args:
        settings: Settings of the loop.
        registry: Where metrics are registered.
        stop: Ends this process and its children.
    """
    offered.offer(registry, settings)
    supervisor = Supervisor.of(settings, lambda line: logger.warning("%s", line), SupervisorMetrics(registry))
    # This process has read the settings, so a child that cannot run is restarted.
    supervisor.settled = True
    for plan in process_plan.plans(settings):
        supervisor.start(plan)
    try:
        while not stop.is_set():
            supervisor.look()
            stop.wait(LOOK_S)
    finally:
        supervisor.stop_all()


def main(argv: list[str] | None = None) -> int:
    """Runs trials with the settings of `argv` until a signal; returns the exit code."""
    stop = stop_on_signals()
    return run_part("trials", lambda settings: _run(settings, stop), argv, logger)


def _run(settings: Settings, stop: threading.Event) -> None:
    with served(settings.trials.metrics_port, settings.metrics.host) as registry:
        run(settings, registry, stop)


if __name__ == "__main__":
    sys.exit(main())
