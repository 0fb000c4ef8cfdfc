"""A Python worker of Beam, which the worker pool starts: `python -m deploy.flink.worker CONTROL_ENDPOINT WORKER_ID POOL_PID`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import grpc
from apache_beam.runners.worker.sdk_worker import SdkHarness

from deploy.children.parent_death import die_with
from state.process import log_lines
from state.process.private_files import keep_private


def main(argv: Sequence[str] | None = None) -> int:
    """Works until the TaskManager closes the connection; returns the exit code."""
    control, worker, pool = sys.argv[1:] if argv is None else argv
    die_with(int(pool))()
    keep_private()
    log_lines.begin("worker")
    # Here nobody else says where a step failed.
    logging.getLogger("apache_beam").setLevel(logging.ERROR)

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit

    # What the steps of a job left open is closed at the end of Python, as where the TaskManager has closed the connection.
    signal.signal(signal.SIGTERM, stop)
    # Without a cache of states, as in Beam's own pool: a step that may keep what it read keeps it by itself.
    try:
        SdkHarness(control, worker_id=worker, state_cache_size=0, data_buffer_time_limit_ms=-1).run()
    except grpc.RpcError as closed:
        # Each job ends so, and each TaskManager that dies.
        logging.getLogger(__name__).info("the connection to %s is closed (%s)", control, closed.code().name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
