"""Noise and ledger key follow from one digest: the same only for the same records under the same conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from state.features.erased import Erased, MaskedUsers
from state.features.mask import Mask
from state.microbatch.batch import MicroBatch
from state.registry.log_line import WHOLE, turned
from tests.trainer.privacy.batches import labelled, settings
from trainer.privacy import history as history_module
from trainer.privacy.history import History, NoisePlace, environment_digest
from trainer.versions import checkpoint

KEY = bytes(range(32))
Record = tuple[NoisePlace, MicroBatch]
Change = Callable[[NoisePlace], NoisePlace]


def environment(path: Path, *flags: str) -> str:
    return environment_digest(checkpoint.environment(settings(path, *flags), "cpu", "tensorflow"))


def records(path: Path, count: int = 4) -> list[Record]:
    places = [NoisePlace("ab" * 16, 0, 2 * number, 1, WHOLE, Mask.NONE, environment(path)) for number in range(count)]
    return [(place, labelled(number, 12)) for number, place in enumerate(places)]


def told(some: Sequence[Record], history: History | None = None) -> list[tuple[str, bytes]]:
    """The name of each record's noise, and its line."""
    history = history or History(KEY)
    return [(history.take(*record), history.line) for record in some]


SETTINGS = (
    ("privacy.clip", "2"), ("model.dense_learning_rate", "0.05"), ("privacy.epsilon", "4"), ("privacy.delta", "1e-5"),
    ("privacy.updates", "5"), ("privacy.periods", "3"), ("privacy.unit", "example"),
    ("model.learning_rate", "0.03"), ("model.dropout", "0.3"), ("trainer.rows_per_update", "7"),
    ("trainer.max_rows", "5000"),
    ("trainer.expire_s", "7000"), ("events.context", "tab"),
)  # fmt: skip
MASKS = {
    "a masked time": Mask(times=((0, 9),)),
    "a masked position": Mask(offsets=((1, 0, 0, 9),)),
    "a masked user": Mask(users=MaskedUsers.of([7])),
    "an erased user": Mask(erased=Erased.NOBODY.and_also(MaskedUsers.of([7]), [(1, 0, 9)], 3, 5)),
    "another erased user": Mask(erased=Erased.NOBODY.and_also(MaskedUsers.of([8]), [(1, 0, 9)], 3, 5)),
}
PLACES: dict[str, Change] = {
    "topic": lambda place: dataclasses.replace(place, topic_id="cd" * 16),
    "partition": lambda place: dataclasses.replace(place, partition=1),
    "epoch": lambda place: dataclasses.replace(place, epoch=2),
    "line of the log": lambda place: dataclasses.replace(place, line=turned(WHOLE, 1, 2, 0, ())),
    "machine": lambda place: dataclasses.replace(place, environment="0"),
    **{name: lambda place, mask=mask: dataclasses.replace(place, mask=mask) for name, mask in MASKS.items()},  # type: ignore[misc]
}


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("what", [*PLACES, *(name for name, _ in SETTINGS)])
def test_another_condition_makes_other_noise_and_another_line_from_its_record_on(
    tmp_path: Path, what: str, first: int
) -> None:
    some, values = records(tmp_path), dict(SETTINGS)
    if what in PLACES:
        change = PLACES[what]
    else:
        other = environment(tmp_path, f"--{what}", values[what])
        change = lambda place: dataclasses.replace(place, environment=other)  # noqa: E731
    changed = [(change(place) if number >= first else place, batch) for number, (place, batch) in enumerate(some)]
    before, after = told(some), told(changed)
    assert before[:first] == after[:first]
    for number in range(first, len(some)):
        assert before[number][0] != after[number][0] and before[number][1] != after[number][1]


def test_masks_and_settings_that_differ_have_digests_that_differ(tmp_path: Path) -> None:
    digests = {mask.digest for mask in (Mask.NONE, *MASKS.values())}
    assert len(digests) == len(MASKS) + 1
    assert Mask(3, times=((0, 9),)).digest == MASKS["a masked time"].digest, "whichever generation decided it"


def test_code_of_another_format_makes_other_noise_and_another_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = records(tmp_path)
    before = told(some)
    monkeypatch.setattr(history_module, "FORMAT", history_module.FORMAT + 1)
    assert {one for pair in before for one in pair}.isdisjoint(one for pair in told(some) for one in pair)


def test_other_rows_change_the_noise_of_everything_after_them(tmp_path: Path) -> None:
    some = records(tmp_path)
    before = told(some)
    place, batch = some[1]
    label = batch.label.copy()
    label[3] = 1.0 - label[3] if label[3] == label[3] else 1.0
    for other in (dataclasses.replace(batch, label=label), batch.take(batch.user != batch.user[0])):
        after = told([some[0], (place, other), *some[2:]])
        assert after[0] == before[0]
        assert not {name for name, _ in before[1:]} & {name for name, _ in after[1:]}
    # A record that is missing, or at another offset.
    without = told([some[0], *some[2:]])
    moved = told([some[0], (dataclasses.replace(place, offset=99), batch), *some[2:]])
    assert not {name for name, _ in before[1:]} & {name for name, _ in (*without[1:], *moved[1:])}


def test_a_condition_that_begins_at_another_record_is_another_line(tmp_path: Path) -> None:
    some = records(tmp_path)
    change = PLACES["an erased user"]
    late, early = ([(change(place) if number >= at else place, batch) for number, (place, batch) in enumerate(some)] for at in (3, 2))  # fmt: skip
    assert told(late)[3][1] != told(early)[3][1]
    # Settings that were changed and put back do not return to the line that they left.
    between = [some[0], (change(some[1][0]), some[1][1]), *some[2:]]
    assert told(between)[2][1] not in {line for _, line in told(some)}


def test_a_restart_that_reads_the_same_repeats_noise_and_lines_and_another_key_does_not(tmp_path: Path) -> None:
    some = records(tmp_path)
    history = History(KEY)
    first = told(some[:2], history)
    kept = {name: value.copy() for name, value in history.state().items()}
    rest = told(some[2:], history)
    again = History(KEY)
    again.load(kept)
    assert again.line_at(some[2][0]) == rest[0][1], "known before the record is learned"
    assert told(some[2:], again) == rest and [*first, *rest] == told(some)
    assert {one for pair in told(some) for one in pair}.isdisjoint(
        one for pair in told(some, History(KEY[::-1])) for one in pair
    )
