"""Every dashboard query returns a number on the running loop, except those that only a fault or an option fills."""

from __future__ import annotations

import math

import pytest

from deploy.grafana.__main__ import load, queries
from tests import rules
from tests.e2e.running import Loop, until
from tests.e2e.watching import Watching


@pytest.fixture(autouse=True)
def installed() -> None:
    rules.program("prometheus")


def test_every_query_of_a_dashboard_returns_a_number(loop: Loop, watching: Watching) -> None:
    asked = {query.where: query.expr for query in queries(load(), "30s") if not query.may_be_empty}

    def silent() -> list[str]:
        # Rates need requests while they are polled.
        loop.profile("one-who-is-counted")
        for where, expr in list(asked.items()):
            if any(not math.isnan(float(one["value"][1])) for one in watching.query(expr)):
                del asked[where]
        return list(asked)

    until(lambda: not silent(), lambda: f"no number from {asked}")
