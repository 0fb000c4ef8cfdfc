"""Free ports leave room for the ports that settings derive from them."""

from __future__ import annotations

from itertools import pairwise

from state.config.settings import Settings
from state.process.network import free_ports


def test_no_free_port_is_one_that_a_setting_derives_from_another_one() -> None:
    up = Settings().up
    reach = (
        max(up.probe_port, up.validation_port, up.webhook_port, up.segments_port, up.experiments_port) - up.metrics_port
    )
    # The chance that 200 ports without such room are this far apart is below one in a million.
    ports = sorted(free_ports(map(str, range(200))).values())
    assert all(later - earlier > reach for earlier, later in pairwise(ports))
