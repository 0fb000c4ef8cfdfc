"""A rollback converges whatever happens on its way: killed at each step, and interrupted by another.

What it converges to is a loop that never saw the masked clicks (exact), or one
that was left alone (fast). Histories, accounts and rows are equal bit for bit,
and so are weights if both cut the log into the same records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec import structs

from deploy import cli
from deploy.operate import log_view
from state.events.identity import Salt, load_salt, user_id
from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.history import rewinding
from state.history.store import HistoryStore
from state.positions import Source
from state.registry.control import Control, Decision, follow, roll_back
from state.registry.log_line import turned
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from tests.e2e import small_loop
from tests.e2e.small_loop import BATCH, TOPIC_IDS, Dead, SmallLoop, kill_at, with_masks
from tests.streaming.streams import BEGIN_MS, click

Mode = Literal["fast", "exact"]
GOOD, BAD, LATER = 6 * BATCH, 4 * BATCH, 2 * BATCH
STREAM = (
    "stream.fenced", "back.found", "back.committed", "stream.opened",
    "stream.taken", "stream.sent", "stream.acknowledged", "stream.committed",
)  # fmt: skip
TRAINER = (
    "enter.restored", "enter.opened", "loop.stepped", "publish.file", "publish.written", "publish.checked",
    "publish.renamed", "publish.synced", "caught.written", "caught.followed",
)  # fmt: skip
APPLIER = (
    "apply.steered", "back.found", "back.committed", "apply.read", "apply.applied", "follow.taken", "follow.committed",
)  # fmt: skip
COMMAND = ("control.users", "control.written", "control.linked")


pytestmark = pytest.mark.usefixtures("no_plan")


def clicks(first: int, count: int) -> tuple[list[bytes], list[int]]:
    """Clicks by number; among those after the good ones a bot floods a category."""
    numbers = range(first, first + count)
    values = [
        click(number, user=f"bot-{number % 3}", category="flooded") if number >= GOOD and number % 2 else click(number)
        for number in numbers
    ]
    return values, [BEGIN_MS + number * 1000 for number in numbers]


def bots(salt: Path, *numbers: int) -> Mask:
    secret: Salt = load_salt(salt, create=False)
    return Mask(users=MaskedUsers.of(user_id(secret, f"bot-{number}") for number in numbers))


def offsets(first: int, after: int) -> Mask:
    return Mask(offsets=((Source(TOPIC_IDS[0], 0).topic, 0, first, after),))


def poisoned(folder: Path, salt: Path) -> tuple[SmallLoop, Manifest]:
    """A loop that has learned good clicks and then poison, and the version between them."""
    loop = SmallLoop(folder, salt)
    loop.click(*clicks(0, GOOD))
    loop.settle()
    to = loop.newest
    loop.click(*clicks(GOOD, BAD))
    loop.settle()
    return loop, to


def go_back(loop: SmallLoop, to: Manifest, mask: Mask, mode: Mode, then_follow: bool = True) -> Control:
    """Types the command, again where it is killed."""
    line = loop.line(to) if mode == "exact" else None
    while True:
        try:
            with small_loop.armed_for("command"):
                return Registry(loop.settings.registry_dir).change(
                    lambda now: roll_back(
                        now, to.version, mask, actor="ann", reason="bots", now_ms=5, log=line, then_follow=then_follow
                    )
                )
        except Dead as death:
            loop.deaths.append(str(death))


def finished(loop: SmallLoop) -> dict[str, Any]:
    """More clicks come, answers follow, and everything rests."""
    loop.down.clear()
    loop.settle()
    loop.click(*clicks(GOOD + BAD, LATER))
    loop.registry.change(lambda now: follow(now, actor="ann", reason="good", now_ms=6))
    loop.settle()
    found = {"records": loop.records(), **loop.content()}
    loop.close()
    return found


def never_saw(folder: Path, salt: Path, control: Control, batch: int = BATCH) -> dict[str, Any]:
    """What a loop comes to that has the masks from its beginning; the same clicks, by default in the same batches."""
    loop = SmallLoop(folder, salt, with_masks(control), batch=batch)
    for first, count in ((0, GOOD), (GOOD, BAD)):
        loop.click(*clicks(first, count))
        loop.settle()
    return finished(loop)


def joined(records: Sequence[tuple[Any, Mapping[str, bytes]]]) -> dict[str, bytes]:
    """The rows of all records, by column; here they have one source."""
    return {name: b"".join(columns[name] for _, columns in records) for name in records[0][1]}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory, salt: Path) -> dict[Mode, dict[str, Any]]:
    """By mode what a loop comes to whose rollback nothing disturbs."""
    found: dict[Mode, dict[str, Any]] = {}
    for mode in ("fast", "exact"):
        loop, to = poisoned(tmp_path_factory.mktemp(mode) / "loop", salt)
        go_back(loop, to, bots(salt, 0, 1, 2), mode)
        found[mode] = finished(loop)
        if mode == "exact":
            assert found[mode] == never_saw(tmp_path_factory.mktemp("calm") / "loop", salt, loop.control)
    assert found["fast"]["account"]["masked"] > 0
    assert found["exact"]["stream"] != found["fast"]["stream"]
    return found


@pytest.mark.parametrize("batch", [7, 4 * BATCH])
def test_an_exact_rollback_makes_the_rows_of_a_loop_that_never_saw_the_clicks_also_if_that_polls_at_other_times(
    tmp_path: Path, salt: Path, batch: int
) -> None:
    """Rows with their windows, histories and accounts are equal bit by bit; only weights depend on where records end."""
    loop, to = poisoned(tmp_path / "loop", salt)
    go_back(loop, to, bots(salt, 0, 1, 2), "exact")
    found, expected = finished(loop), never_saw(tmp_path / "calm", salt, loop.control, batch)
    records, other_records = found.pop("records"), expected.pop("records")
    assert [ranges for ranges, _ in records] != [ranges for ranges, _ in other_records]
    assert joined(records) == joined(other_records)
    assert found.pop("weights") != expected.pop("weights")
    assert found == expected


@pytest.mark.parametrize(
    ("mode", "part", "points"),
    [
        ("exact", "command", COMMAND),
        ("exact", "stream", STREAM),
        ("exact", "trainer", TRAINER),
        ("exact", "applier", APPLIER),
        # A fast rollback passes a part of the steps of an exact one.
        pytest.param("fast", "trainer", TRAINER, marks=pytest.mark.nightly),
        pytest.param("fast", "command", COMMAND, marks=pytest.mark.nightly),
        pytest.param("fast", "stream", STREAM, marks=pytest.mark.nightly),
        pytest.param("fast", "applier", APPLIER, marks=pytest.mark.nightly),
    ],
)
def test_killed_at_each_step_and_started_again_it_comes_to_what_it_comes_to_left_alone(
    tmp_path: Path,
    salt: Path,
    left_alone: dict[Mode, dict[str, Any]],
    mode: Mode,
    part: str,
    points: Sequence[str],
) -> None:
    points = [one for one in points if mode == "exact" or not one.startswith("back.")]
    loop, to = poisoned(tmp_path / "loop", salt)
    kill_at(part, *points)
    go_back(loop, to, bots(salt, 0, 1, 2), mode)
    assert finished(loop) == left_alone[mode]
    assert loop.deaths == points
    assert [one.action for one in loop.registry.controls()].count("rollback") == 1


@pytest.mark.parametrize(
    ("modes", "between"),
    [
        pytest.param(("exact", "fast"), 4, id="exact then fast half way"),
        pytest.param(("exact", "fast", "exact"), 4, id="exact, fast, exact half way", marks=pytest.mark.nightly),
        pytest.param(("fast", "exact", "exact"), 0, id="fast, exact, exact at once", marks=pytest.mark.nightly),
        pytest.param(("exact", "exact"), None, id="exact then exact when done", marks=pytest.mark.nightly),
        pytest.param(("fast", "exact"), 4, id="fast then exact half way", marks=pytest.mark.nightly),
        pytest.param(("exact", "exact"), 0, id="exact then exact at once", marks=pytest.mark.nightly),
    ],
)
def test_rollbacks_in_a_row_with_growing_masks_come_to_the_last_one(
    tmp_path: Path, salt: Path, modes: Sequence[Mode], between: int | None
) -> None:
    loop, to = poisoned(tmp_path / "loop", salt)
    masks = (bots(salt, 0), bots(salt, 1, 2), offsets(GOOD + 8, GOOD + 31))
    for mode, mask in zip(modes, masks, strict=False):
        go_back(loop, to, mask, mode)
        if between is None:
            loop.settle()
        for _ in range(between or 0):
            for name in loop.NAMES:
                loop.tick(name)
    control = loop.control
    found = finished(loop)
    assert len(control.masks) == len(modes)
    if modes[-1] == "exact":
        assert found == never_saw(tmp_path / "calm", salt, control)
    else:
        assert found["weights"] == learned_along(loop, tmp_path / "again", salt, control)


def learned_along(loop: SmallLoop, folder: Path, salt: Path, control: Control) -> str:
    """The weights of a trainer that reads the loop's log along control's line from its beginning, with its masks."""
    again = SmallLoop(folder, salt, lambda first: structs.replace(with_masks(control)(first), log=control.log))
    again.log, again.down = loop.log, {"stream", "applier"}
    again.settle()
    training = again.parts["trainer"]
    assert isinstance(training, small_loop.Training)
    found = str(training.content()["weights"])
    again.close()
    return found


@pytest.mark.parametrize("last", ["exact", pytest.param("fast", marks=pytest.mark.nightly)])
def test_an_outcome_is_what_the_plan_said(
    tmp_path: Path, salt: Path, last: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the trainer is behind the stream, after a mask was lifted, and during another rollback."""
    loop, to = poisoned(tmp_path / "loop", salt)
    monkeypatch.setattr(log_view, "open_log", lambda settings: loop.log)
    for name, value in loop.settings.environment().items():
        monkeypatch.setenv(name, value)

    def command(*words: str) -> None:
        cli.run([*words, "--reason", "bots"], lambda *_: None, BEGIN_MS + 10**7, lambda _: None)

    def went(mode: Mode) -> dict[str, tuple[Any, Any]]:
        """By what is counted the plan and the outcome."""
        planned, learned = (
            loop.registry.generations.outcome(loop.control.epoch, part) for part in ("planned", "learned")
        )
        assert planned is not None
        assert learned is not None
        if mode == "exact":
            return {"clicks": (planned["exact"]["clicks"], learned["again"]["clicks"])}
        return {name: (planned[name], learned["again"][name]) for name in ("rows", "masked")}

    back = ("rollback", "--to", str(to.version), "--mode")
    # 1. The stream is ahead of the trainer.
    loop.down = {"trainer"}
    loop.click(*clicks(GOOD + BAD, LATER))
    loop.settle()
    loop.down.clear()
    command(*back, "exact", "--skip", f"0:{GOOD}-{GOOD + 30}")
    loop.settle()
    assert went("exact") == {"clicks": (BAD, BAD)}
    # 2. What was left out comes back.
    command("unmask", "1")
    command(*back, "exact", "--skip", f"0:{GOOD + 40}-{GOOD + 50}")
    # 3. Another one, before all of it is learned again.
    for name in ("stream", "stream", "stream", "trainer"):
        loop.tick(name)
    first = loop.control.epoch
    command(*back, last, "--skip", f"0:{GOOD + 60}-{GOOD + 63}")
    assert loop.registry.generations.outcome(first, "learned") is None, "it was interrupted"
    loop.settle()
    both = went(last)
    assert all(planned == learned for planned, learned in both.values()), both
    assert last == "fast" or both["clicks"][0] == BAD + LATER
    loop.close()


LABELS = ("--labels.impressions", "favorite", "--labels.outcomes", "cart", "--labels.wait_s", "90")
MINUTE_MS = 60_000
MARGIN = 20 * BATCH


def shown(
    first: int, count: int, begin_ms: int, step_ms: int = 1000, who: str = "busy"
) -> tuple[list[bytes], list[int]]:
    """Impressions; each third click is the outcome of one before it. Nobody's clock is wrong."""
    numbers = range(first, first + count)
    times = [begin_ms + at * step_ms for at in range(count)]
    values = [
        click(number - 8 * (number % 3 == 0), user=f"{who}-{number % 3}-{number % 17}", time=at_ms, action="favorite")
        if number % 3
        else click(number - 7, user=f"{who}-{(number - 7) % 3}-{(number - 7) % 17}", time=at_ms, action="cart")
        for number, at_ms in zip(numbers, times, strict=True)
    ]
    return values, times


class LabelledStream:
    """A stream with labels on clicks of two partitions, one of which is quiet for an hour; nothing else runs."""

    def __init__(self, folder: Path, salt: Path, masks: Control | None = None) -> None:
        decided = (lambda first: first) if masks is None else with_masks(masks)
        self.loop = SmallLoop(folder, salt, decided, LABELS, partitions=2)
        self.loop.down = {"trainer", "applier"}
        # 1.
        self.click_before()
        self.offset, self.sources = self.end(), tuple(sorted(self.store().positions().items()))
        # 2. The clicks that are read again.
        self.click_after()

    def click_before(self) -> None:
        """Both partitions have clicks; then only one has, until the place that is gone back to."""
        self.loop.click(*shown(0, 60, BEGIN_MS, 3000, "quiet"), partition=1)
        self.busy(0, MARGIN)
        self.busy(MARGIN, MARGIN)

    def click_after(self) -> None:
        self.busy(2 * MARGIN, MARGIN)
        self.loop.click(*shown(60, 60, BEGIN_MS + 70 * MINUTE_MS, MINUTE_MS, "quiet"), partition=1)
        self.loop.settle()

    def busy(self, first: int, count: int) -> None:
        for at in range(first, first + count, 2 * BATCH):
            self.loop.click(*shown(at, 2 * BATCH, BEGIN_MS + at * 1000))
            self.loop.settle()

    def end(self) -> int:
        return self.loop.log.topics().ends(self.loop.settings.kafka.microbatches_topic)[0][1]

    def store(self) -> HistoryStore:
        stream = self.loop.parts["stream"]
        assert isinstance(stream, small_loop.Stream)
        return stream.store

    def go_back(self, mask: Mask) -> None:
        line = turned(self.loop.control.log, 1, self.offset, self.end(), self.sources)
        who: Decision = {"actor": "ann", "reason": "bots", "now_ms": 5}
        self.loop.registry.change(lambda now: roll_back(now, 1, mask, log=line, **who))

    def content(self) -> dict[str, Any]:
        store = self.store()
        rows = {"records": self.loop.records(), "waiting": dict(store.waiting()), "counts": store.counts()}
        return {**rows, "histories": store.digest()}


def test_with_labels_an_exact_rollback_during_another_makes_the_rows_of_a_run_without_any(
    tmp_path: Path, salt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of each partition goes back, also where its last click is far before the place gone back to."""
    monkeypatch.setattr(rewinding, "BLOCK", 4)
    ours = LabelledStream(tmp_path / "ours", salt)
    for first in (3, 30):
        ours.go_back(offsets(2 * MARGIN + first, 2 * MARGIN + first + 6))
        for _ in range(5):
            ours.loop.tick("stream")
    ours.loop.settle()
    theirs = LabelledStream(tmp_path / "theirs", salt, ours.loop.control)
    found, expected = ours.content(), theirs.content()
    for name, value in expected.items():
        assert found[name] == value, name
    assert expected["waiting"]
    for one in (ours, theirs):
        one.loop.close()


class BurstStream(LabelledStream):
    """A stream in which a new user's clock is an hour ahead, and a burst of this user surrounds the place gone back to.

    In one partition others wait for labels meanwhile.
    """

    def __init__(self, folder: Path, salt: Path, partition: int, masks: Control | None = None) -> None:
        self.partition = partition
        super().__init__(folder, salt, masks)

    def click_before(self) -> None:
        self.busy(0, MARGIN)
        self.loop.click(*self.others(0, "favorite"), partition=self.partition)
        self.burst(0, 0)

    def click_after(self) -> None:
        self.burst(MARGIN, self.partition)

    def label(self) -> None:
        """The others get their labels."""
        self.loop.click(*self.others(30_000, "cart"), partition=self.partition)
        self.loop.settle()

    def others(self, after_ms: int, action: str) -> tuple[list[bytes], list[int]]:
        times = [BEGIN_MS + MARGIN * 1000 + after_ms + number for number in range(BATCH)]
        values = [
            click(number, user=f"other-{number}", item=f"item-{number}", time=at_ms, action=action)
            for number, at_ms in enumerate(times)
        ]
        return values, times

    def burst(self, first: int, partition: int) -> None:
        """`MARGIN` views."""
        self.loop.settle()
        times = [BEGIN_MS + MARGIN * 1000 + 60 * MINUTE_MS + number for number in range(first, first + MARGIN)]
        values = [click(number, user="new", time=at_ms) for number, at_ms in enumerate(times)]
        self.loop.click(values, times, partition)
        self.loop.settle()


@pytest.mark.parametrize(
    ("block", "partition"),
    [
        pytest.param(MARGIN // BATCH, 0, id="others before the nearest block"),
        pytest.param(2, 0, id="others before all blocks that are read"),
        pytest.param(2, 1, id="none of the blocks has the partition"),
    ],
)
def test_a_new_user_whose_burst_fills_what_is_read_does_not_decide_the_clock_of_others(
    tmp_path: Path, salt: Path, monkeypatch: pytest.MonkeyPatch, block: int, partition: int
) -> None:
    monkeypatch.setattr(rewinding, "BLOCK", block)
    monkeypatch.setattr(rewinding, "LARGEST_BLOCK", block)
    ours = BurstStream(tmp_path / "ours", salt, partition)
    # One click behind that place is left out.
    ours.go_back(offsets(2 * MARGIN + 25, 2 * MARGIN + 26))
    ours.loop.settle()
    theirs = BurstStream(tmp_path / "theirs", salt, partition, ours.loop.control)
    for one in (ours, theirs):
        one.label()
    found, expected = ours.content(), theirs.content()
    for name, value in expected.items():
        assert found[name] == value, name
    # Each of the others' impressions got its label.
    assert sum(counts["joined"] for counts in expected["counts"].values() if "joined" in counts) > BATCH
    for one in (ours, theirs):
        one.loop.close()
