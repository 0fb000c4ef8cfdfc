"""What keeping segments costs, and how good lookalikes are.

Taobao's clicks are learned in one pass; then all users are judged by segments of interests and of deeds, as of the last
click. Of each segment a fifth of the members is held back, and the first k of those who are no given members are compared
with it: ordered by likeness, by clicks, and by chance.

    python -m tests.bench.segments [--steps 82]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from deploy.segments.judging import ProfileJudge, pseudonym
from deploy.segments.lookalikes import UserVectors, precision_curve, vectors_of
from deploy.serving.answers.predictor import Predictor, Stores
from evaluation.recording import SALT
from state.config.sections import SegmentSettings
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.layout import DATA
from state.segments import Membership, PrecisionAt, SegmentStore, segments_of
from tests.bench.recommend import trained_host
from tests.bench.recorded import read_clicks
from tests.bench.report import Figure, Stages, report

DEEDS = ("buyers=purchase.count_7d >= 1", "carters=cart.count_7d >= 2", "busy=view.count_1d >= 20")
CATEGORIES = 10
CUTS = (10, 20, 50, 100, 200)
STAGES = Stages("segments")


def interests(settings: Settings) -> list[str]:
    """A segment of each of the most clicked categories."""
    found, clicks = np.unique(read_clicks().events["category"], return_counts=True)
    best = found[np.argsort(-clicks)[:CATEGORIES]].tolist()
    return [f"fans-{number}=interest['{one:016x}'] > 0.1" for number, one in enumerate(best)]


def curves(found: UserVectors, within: dict[str, set[int]]) -> dict[str, list[PrecisionAt]]:
    """Of each segment that has members to hold back."""
    made = {}
    for name, users in within.items():
        members = np.isin(found.users, np.fromiter(users, np.uint64, len(users)))
        print(f"{name}: {members.sum()} of {len(members)}")
        if curve := precision_curve(found, members, CUTS):
            made[name] = curve
            for one in curve:
                print(f"  {one.k:5d}  {one.lookalikes:.3f}  most clicks {one.most_clicks:.3f}  chance {one.chance:.3f}")
    return made


def main(steps: int) -> None:
    """Prints and writes the figures."""
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as folder:
        settings = Settings()
        settings = replace(settings, paths=replace(settings.paths, state=folder))
        wanted = SegmentSettings((*DEEDS, *interests(settings)))
        spec = FeatureSpec.from_settings(settings)
        host = trained_host(settings, spec, steps, 0).host
        users = host.histories.users()
        recorded = read_clicks()
        last_ms = int(recorded.events["at_ms"][: steps * 1024].max())
        wall = replace(settings, serving=replace(settings.serving, clock="wall"))
        predictor = Predictor(Stores(host.rows, host.histories), wall, SALT, lambda: last_ms, pseudonym)
        STAGES.say("vectors")
        found = vectors_of(predictor, lambda done: STAGES.say("vectors", f"{done:,} of {users:,}"))
        STAGES.say("judging")
        judge = ProfileJudge(segments_of(replace(settings, segments=wanted)))
        begin_s = time.process_time()
        judged = judge.judge(predictor, found.users.tolist())
        judge_us = 1e6 * (time.process_time() - begin_s) / len(judged)
        within: dict[str, set[int]] = {}
        for one in judged:
            for name in one.segments:
                within.setdefault(name, set()).add(one.user)
        made = curves(found, within)
        member_bytes = stored_bytes(Path(folder))
        host.close()
    at = {k: [one for curve in made.values() for one in curve if one.k == k] for k in CUTS}
    figures = {
        f"precision at {k}, {name.replace('_', ' ')}": Figure(
            float(np.mean([getattr(one, name) for one in some])), "ratio"
        )
        for k, some in at.items()
        if some
        for name in ("lookalikes", "most_clicks", "chance")
    }
    report(
        "segments",
        {
            **figures,
            "processor time to judge a user": Figure(judge_us, "us"),
            "a member in the store": Figure(member_bytes, "bytes", "<= 100"),
        },
        {"steps": steps, "users": users, "segments": len(made), "data": "Taobao UserBehavior"},
    )


def stored_bytes(folder: Path, members: int = 200_000) -> float:
    """What a member takes in the store, of so many who came in one after another."""
    store = SegmentStore(folder / "members", 1 << 30)
    users = np.random.default_rng(5).integers(0, 1 << 63, members).tolist()
    for first in range(0, members, 1000):
        store.commit({("sporty", user): Membership(1, 2) for user in users[first : first + 1000]})
    used = (store.path / DATA).stat().st_size
    store.close()
    return used / members


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--steps", type=int, default=82, help="steps of 1,024 rows")
    main(flags.parse_args().steps)
