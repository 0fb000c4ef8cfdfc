"""Every panel of the dashboards shows something on the running loop, but for what only trouble makes."""

from __future__ import annotations

import math

import pytest

from deploy.grafana.queries import queries
from tests import rules
from tests.e2e.running import Loop, until
from tests.e2e.watching import Watching


@pytest.fixture(autouse=True)
def installed() -> None:
    rules.program("prometheus")


def test_every_query_of_a_board_says_something(loop: Loop, watching: Watching) -> None:
    asked = {query.where: query.expr for query in queries("30s") if not query.empty}

    def silent() -> list[str]:
        # Rates are of what comes while it is looked at.
        loop.profile("one-who-is-counted")
        for where, expr in list(asked.items()):
            if any(not math.isnan(float(one["value"][1])) for one in watching.query(expr)):
                del asked[where]
        return list(asked)

    until(lambda: not silent(), lambda: f"nothing is said by {asked}")
