"""What a process is set up of is no longer looked at for garbage, garbage of later goes by itself, and holes are given back."""

from __future__ import annotations

import subprocess
import sys

LATER = """
import gc, sys, weakref
from state.process.environment import freeze_objects

class Cycle:
    def __init__(self):
        self.itself = self

many = [[number] for number in range(500_000)]
if sys.argv[1] == "kept":
    freeze_objects()
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


HOLES = """
import re
from pathlib import Path
from state.process.environment import TRIM_EVERY_S, Holes

def megabytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

now_s = [0.0]
holes = Holes(lambda: now_s[0])
# The last one stays, so that nothing is free at the end.
pieces = [bytearray(64_000) for _ in range(2000)]
last = pieces[-1]
pieces.clear()
before = megabytes()
holes.tick()
early = megabytes()
now_s[0] = TRIM_EVERY_S
holes.tick()
print(before - early, early - megabytes())
"""


def test_holes_are_given_back_once_a_minute() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=60)
    early, given_back = map(float, done.stdout.split())
    assert early < 1 < 100 < given_back
