"""Where the design ends: what is asked of each part that there is one of, and the most that one bears. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploy.capacity.load import HOUR_S
from deploy.capacity.sizes import FLINK_BUCKETS, LOCAL, Sizing

MEMORY_BYTES = 1e12
"""Of one machine: larger ones are there, and rare."""
NETWORK_BYTES_S = 1.25e9
"""In and out of one machine: 10 Gbit/s."""
READY_S = HOUR_S
"""How long a new host may take until it answers."""


@dataclass(frozen=True)
class Limit:
    """One bound.

    Attributes:
        name: Of what there is one.
        asked: What this load asks of it.
        most: The most that it bears.
        unit: Of both.
        then: What helps.
    """

    name: str
    asked: float
    most: float
    unit: str
    then: str

    @property
    def share(self) -> float:
        """How much of it is taken; above 1 it breaks.

        >>> Limit("", 3.0, 2.0, "", "").share
        1.5
        """
        return self.asked / self.most


def limits(sizing: Sizing) -> Sequence[Limit]:
    """All of them, the one that is nearest to its end first."""
    return sorted((*_of_work(sizing), *_of_room(sizing), *_of_starts(sizing)), key=lambda one: -one.share)


def _of_work(sizing: Sizing) -> list[Limit]:
    """What one process or one partition does in a second."""
    load, measured, use = sizing.load, sizing.measured, sizing.use
    a_log_row_s = measured.transaction_ms * 1e-3 / sizing.settings.stream.cut_rows
    return [
        Limit(
            "one applier a host takes all clicks and all rows",
            sizing.applier_cores,
            use,
            "cores",
            "the training log in partitions by user, and hosts that hold a share of the users",
        ),
        Limit(
            "one trainer does one step after another",
            sizing.trainer_cores,
            use,
            "cores",
            "rows sharded by id over several trainers, dense weights averaged or trained by one; a GPU was not measured",
        ),
        Limit(
            "the local stream is one process",
            load.clicks_s,
            measured.stream_most * use,
            "clicks/s",
            "`springtide stream --runner flink`",
        )
        if sizing.form == LOCAL
        else Limit(
            f"the stream on Flink has {FLINK_BUCKETS} buckets of users at most",
            sizing.flink_cores,
            FLINK_BUCKETS * use,
            "cores",
            "more buckets (`stream.buckets`)",
        ),
        Limit(
            "one broker leads the training log's partition, and all readers read from it",
            sizing.log_leader_bytes_s,
            NETWORK_BYTES_S,
            "bytes/s",
            "the training log in partitions by user, and hosts that hold a share of the users; a faster network",
        ),
        Limit(
            "the training log is one partition, a transaction after another",
            load.clicks_s * a_log_row_s,
            use,
            "of its time",
            "a partition for each shard of users, and records of more rows (`stream.cut_rows`)",
        ),
    ]


def _of_room(sizing: Sizing) -> list[Limit]:
    """What one machine holds in memory, and what the settings keep."""
    settings, load = sizing.settings, sizing.load
    return [
        Limit(
            "users beyond `max_users` have no history",
            load.users,
            min(settings.stream.max_users, settings.serving.max_users),
            "users",
            "`stream.max_users` and `serving.max_users`, where memory allows it",
        ),
        Limit(
            "users or items beyond `max_rows` have no row",
            max(load.users, load.items),
            settings.trainer.max_rows,
            "rows",
            "`trainer.max_rows`, where memory allows it",
        ),
        Limit(
            "each host holds all histories and rows in memory",
            sizing.host_histories_bytes + sizing.served_bytes,
            MEMORY_BYTES,
            "bytes",
            "hosts that hold a share of the users, asked by the user's hash; or histories on the disk",
        ),
        Limit(
            "the trainer holds all rows in memory",
            sizing.table_bytes,
            MEMORY_BYTES,
            "bytes",
            "rows sharded by id; a lower `trainer.max_rows`, where the least used may leave",
        ),
    ]


def _of_starts(sizing: Sizing) -> list[Limit]:
    """What a start waits for."""
    return [
        Limit(
            "a new host reads all of the training log that is kept",
            sizing.catch_up_s,
            READY_S,
            "s",
            "histories begun from a copy of another host's, as `rebuild-history --from` does for the stream",
        ),
        Limit(
            "a base is loaded whole",
            sizing.base_bytes / sizing.measured.load_bytes_s,
            READY_S,
            "s",
            "bases in shards by id, loaded side by side",
        ),
    ]


def most_clicks_s(sizing: Sizing, name: str) -> float:
    """The clicks a second at which a limit of this name is reached, all else as it is; found by halving, to 1 %.

    Returns:
        Clicks a second; infinite where clicks do not decide.
    """

    def share(clicks_s: float) -> float:
        at = replace(sizing, load=replace(sizing.load, clicks_s=clicks_s))
        return next(one.share for one in limits(at) if one.name == name)

    low, high = 1e-3, 1e9
    if share(high) < 1:
        return float("inf")
    if share(low) >= 1:
        return 0.0
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if share(middle) < 1 else (low, middle)
    return low
