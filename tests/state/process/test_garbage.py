"""What a process is set up of is no longer looked at for garbage, and garbage of later goes by itself."""

from __future__ import annotations

import subprocess
import sys

LATER = """
import gc, sys, weakref
from state.process.garbage import keep_what_is_there

class Cycle:
    def __init__(self):
        self.itself = self

many = [[number] for number in range(500_000)]
if sys.argv[1] == "kept":
    keep_what_is_there()
# One that has lived for long when it becomes garbage.
cycle = Cycle()
gc.collect()
gone = weakref.ref(cycle)
del cycle
kept, made = [], 0
while gone() is not None and made < 4_000_000:
    kept.append([made])
    made += 1
    # Some stay and some go, as of a process that works.
    if len(kept) > 2000:
        kept.clear()
print(made)
"""


def made_until_gone(how: str) -> int:
    """How many objects are made until a cycle is collected; 4,000,000 at most."""
    done = subprocess.run([sys.executable, "-c", LATER, how], capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


def test_a_cycle_that_is_old_goes_several_times_as_soon() -> None:
    assert 4 * made_until_gone("kept") < made_until_gone("as python does")
