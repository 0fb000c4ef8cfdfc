"""Ends the jobs of a cluster, each after a savepoint that it can be resumed from, or without one."""

from __future__ import annotations

import time
from collections.abc import Callable

from state.errors import FlinkFailed
from state.flink.rest import ENDED, JobManager

SAVEPOINT_S = 120.0
CANCEL_S = 30.0
LOOK_S = 0.2
# Who follows a job asks the JobManager how it ended, some times in two seconds; here it is about to end.
FOLLOWED_S = 2.5


def end_jobs(
    manager: JobManager,
    say: Callable[[str], None],
    savepoint: bool = True,
    hurry: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Ends all jobs and says what each can be resumed from; one that cannot give a savepoint is cancelled all the same.

    Returns once who follows them has had the time to see it.

    Args:
        manager: Of the jobs.
        say: Takes lines for the operator.
        savepoint: Whether to make savepoints.
        hurry: Whether nobody waits any longer.
        clock: Monotonic seconds.
        sleep: Waits.

    Raises:
        FlinkFailed: The JobManager does not answer.
    """
    jobs = manager.running()
    for job in jobs:
        path = ""
        if savepoint:
            say(f"job {job}: a savepoint, then its end")
            try:
                path = _savepoint(manager, job, hurry, clock, sleep)
            except FlinkFailed as failure:
                say(f"{failure}")
        if path:
            say(f"job {job} is in {path}; resume it with --savepoint_path {path}")
        else:
            manager.cancel(job)
            say(f"job {job} ends without a savepoint; its newest checkpoint is kept")
    deadline = clock() + CANCEL_S
    for job in jobs:
        while manager.state(job) not in ENDED and clock() < deadline and not hurry():
            sleep(LOOK_S)
    if jobs and not hurry():
        sleep(FOLLOWED_S)


def _savepoint(
    manager: JobManager, job: str, hurry: Callable[[], bool], clock: Callable[[], float], sleep: Callable[[float], None]
) -> str:
    """Where the savepoint lies.

    Raises:
        FlinkFailed: There is none: it could not be made, or not in time.
    """
    request, deadline = manager.begin_savepoint(job), clock() + SAVEPOINT_S
    while not (path := manager.savepoint(job, request)):
        if hurry():
            raise FlinkFailed(f"job {job} has no savepoint: nobody waits for it any longer")
        if clock() >= deadline:
            raise FlinkFailed(f"job {job} has no savepoint after {SAVEPOINT_S:.0f} s")
        sleep(LOOK_S)
    return path
