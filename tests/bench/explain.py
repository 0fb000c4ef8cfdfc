"""How long an explanation takes, of an interest and of an engagement, beside the answer that it explains.

The default model on users with full histories, in one process and one thread.

    python -m tests.bench.explain [--users 200] [--rounds 200]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from deploy.serving.answers.explaining import explain
from deploy.serving.answers.host import Host
from deploy.serving.answers.query import Query
from state.config.settings import Settings
from state.events.identity import load_salt
from state.process.environment import wall_ms
from tests.bench.answers.stores import fill
from tests.bench.report import Figure, report


def took_ms(call: Callable[[str], object], users: int, rounds: int) -> list[float]:
    """Milliseconds of processor time of each call, for one user after another; one thread computes."""
    found = []
    for count in range(rounds):
        began_s = time.process_time()
        call(f"user-{count % users}")
        found.append(1000 * (time.process_time() - began_s))
    return found


def main(users: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as folder:
        settings = Settings()
        settings = replace(settings, paths=replace(settings.paths, state=folder))
        fill(settings, users, events=256, rows=users)
        host = Host(settings, load_salt(settings.salt_path), wall_ms)
        predictor = host.predictor()

        def first(user: str) -> None:
            label = predictor.profiles([Query(user, top=1)])[0].interests[0].label
            list(explain(predictor, Query(user, top=10), label))

        calls: dict[str, Callable[[str], object]] = {
            "answer": lambda user: predictor.profiles([Query(user, top=10)]),
            "of the first interest": first,
            "of an engagement": lambda user: list(
                explain(predictor, Query(user, "item-7", "category-7", top=10), None)
            ),
        }
        figures = {}
        for name, call in calls.items():
            took_ms(call, users, 20)
            taken = took_ms(call, users, rounds)
            goal = "" if name == "answer" else "<= 10"
            figures[f"{name} p50"] = Figure(float(np.percentile(taken, 50)), "cpu-ms", goal)
            figures[f"{name} p99"] = Figure(float(np.percentile(taken, 99)), "cpu-ms")
        host.close()
    report("explain", figures, {"users": users, "events_per_user": 256, "rounds": rounds})


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--users", type=int, default=200)
    flags.add_argument("--rounds", type=int, default=200)
    given = flags.parse_args()
    main(given.users, given.rounds)
