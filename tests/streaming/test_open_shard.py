"""What a stream process opens: a shard keeps to its partitions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streaming.open_shard import partitions_of


@given(st.integers(2, 5), st.integers(1, 12))
def test_shards_share_all_partitions(shards: int, partitions: int) -> None:
    taken = [one for shard in range(shards) for one in partitions_of(shard, shards, partitions) or []]
    assert sorted(taken) == list(range(partitions))
