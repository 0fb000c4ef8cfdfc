"""Claims about the table of slots: it is a dictionary of users."""

from __future__ import annotations

import numpy as np
import pytest

from streaming.profile import ABSENT, SlotTable


@pytest.mark.parametrize("crowded", [False, True])
def test_it_finds_what_a_dictionary_finds(crowded: bool) -> None:
    """Crowded: most users would have one of a few slots of the table, so that gaps must be closed."""
    rng = np.random.default_rng(5)
    spread = rng.integers(0, 1 << 63, 4000).astype(np.uint64)
    users = (np.arange(600, dtype=np.uint64) << np.uint64(32)) + spread[:600] % np.uint64(4) if crowded else spread
    table, known = SlotTable(), dict[int, int]()
    for number in range(60):
        absent = [user for user in rng.permutation(users).tolist() if user not in known][: int(rng.integers(0, 200))]
        table.put(np.array(absent, np.uint64), number + np.arange(len(absent)))
        known |= dict(zip(absent, range(number, number + len(absent)), strict=True))
        gone = rng.permutation(np.array(list(known), np.uint64))[: int(rng.integers(0, len(known) // 2 + 1))].tolist()
        table.remove(gone)
        for user in gone:
            del known[user]
        assert table.find(users).tolist() == [known.get(user, ABSENT) for user in users.tolist()]
        assert len(table) == len(known)
