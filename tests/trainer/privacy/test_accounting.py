"""What a private update costs, and the noise that it gets: a function of the key, the log and what is learned.

SciPy's statistics are imported where they are used: the import takes a second of each test process.
"""

from __future__ import annotations

import dataclasses
import math
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from state.config.loading import load
from state.errors import SettingsError
from state.features.erased import Erased, MaskedUsers
from state.features.mask import Mask
from state.microbatch.batch import MicroBatch
from state.registry.log_line import WHOLE, turned
from state.registry.privacy_ledger import PrivacyPeriod
from tests.trainer.privacy.batches import labelled, settings
from trainer import privacy
from trainer.engine.private_step import Noise
from trainer.privacy import (
    COUNT_NOISE,
    History,
    NoisePlace,
    environment_digest,
    epsilon_of,
    noise_for,
    own_key,
    spent,
    together,
)
from trainer.versions import checkpoint


def exact(noise: float, delta: float) -> float:
    """Epsilon of normal noise in closed form (Balle and Wang 2018, theorem 8)."""

    from scipy import optimize
    from scipy.stats import norm

    def over(epsilon: float) -> float:
        a, b = 1 / (2 * noise), epsilon * noise
        return float(norm.cdf(a - b) - math.exp(epsilon + norm.logcdf(-a - b))) - delta

    return float(optimize.brentq(over, 0.0, 200.0, xtol=1e-10))


def one_by_one(periods: list[PrivacyPeriod]) -> object:
    """Each update of each period, gradient and counts, as an event of its own."""
    import dp_accounting

    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise), one.updates)
            for one in periods
            for noise in (one.noise, COUNT_NOISE * one.noise)
        ]
    )


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_one_update_costs_what_the_closed_form_says(noise: float, delta: float) -> None:
    assert abs(epsilon_of(noise, delta) - exact(noise, delta)) < 1e-6 * exact(noise, delta)


def test_updates_with_different_noise_cost_the_same_together_as_one_by_one() -> None:
    periods = [PrivacyPeriod(1, 0, 8, 6.0), PrivacyPeriod(1, 1, 8, 6.0), PrivacyPeriod(2, 1, 3, 11.0)]
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    found = spent(periods, 1e-6)
    pld, rdp = PLDAccountant(value_discretization_interval=2e-3), RdpAccountant()
    for accountant in (pld, rdp):
        accountant.compose(one_by_one(periods))
    assert 0.0 <= pld.get_epsilon(1e-6) - found < 0.03
    assert found <= rdp.get_epsilon(1e-6) < 1.3 * found
    assert together([]) == math.inf and spent([], 1e-6) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0, 8.0])
@pytest.mark.parametrize("updates", [1, 240])
def test_the_noise_of_a_budget_spends_exactly_the_budget(epsilon: float, updates: int) -> None:
    noise = noise_for(epsilon, 1e-6, updates)
    found = spent([PrivacyPeriod(1, 0, updates, noise)], 1e-6)
    assert abs(found - epsilon) < 1e-9 * epsilon


KEY = bytes(range(32))
COUNT = 400_001


def test_the_same_key_and_name_make_the_same_bits_for_any_count() -> None:
    first = Noise(KEY).normal("a name", COUNT)
    assert Noise(KEY).normal("a name", COUNT).tobytes() == first.tobytes()
    for count in (1, 2, 7, 1000):
        assert Noise(KEY).normal("a name", count).tobytes() == first[:count].tobytes()


def test_another_key_or_name_makes_noise_that_has_nothing_to_do_with_it() -> None:
    one = Noise(KEY).normal("a name", COUNT)
    for other in (Noise(KEY[::-1]).normal("a name", COUNT), Noise(KEY).normal("another name", COUNT)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(COUNT)


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_is_normal_in_mean_variance_tails_and_shape(seed: int) -> None:
    found = Noise(bytes([seed] * 32)).normal("a name", COUNT)
    assert abs(found.mean()) < 5 / np.sqrt(COUNT)
    assert abs(found.var() - 1.0) < 5 * np.sqrt(2 / COUNT)
    from scipy import stats

    assert stats.kstest(found, "norm").pvalue > 1e-4
    assert 4.0 < np.abs(found).max() < 8.6
    # The two of a pair have nothing to do with each other, nor have their squares.
    pairs = found[: COUNT - 1].reshape(-1, 2)
    for one in (pairs, pairs**2):
        correlations = np.asarray(np.corrcoef(one.T))
        assert abs(correlations[0, 1]) < 5 / np.sqrt(len(pairs))


def test_a_key_is_made_once_for_its_owner_alone_and_is_not_made_again_once_something_was_learned(
    tmp_path: Path,
) -> None:
    settings = load(["--paths.state", str(tmp_path / "state"), "--privacy.epsilon", "8"], {})
    first = own_key(settings)
    path = settings.privacy_key_path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert own_key(settings) == first and len(first) == 32
    settings.privacy_ledger_path.parent.mkdir(parents=True)
    settings.privacy_ledger_path.write_text("{}")
    path.unlink()
    with pytest.raises(SettingsError, match="there is no key of the noise"):
        own_key(settings)


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
    **{name: partial(dataclasses.replace, mask=mask) for name, mask in MASKS.items()},
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
    monkeypatch.setattr(privacy, "FORMAT", privacy.FORMAT + 1)
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
