"""The noise is a function of key and name alone, and it is normal."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from state.config.loading import load
from state.errors import SettingsError
from trainer.privacy.history import own_key
from trainer.privacy.noise import Noise

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
    assert stats.kstest(found, "norm").pvalue > 1e-4
    assert 4.0 < np.abs(found).max() < 8.6
    # The two of a pair have nothing to do with each other, nor have their squares.
    pairs = found[: COUNT - 1].reshape(-1, 2)
    for one in (pairs, pairs**2):
        assert abs(np.corrcoef(one.T)[0, 1]) < 5 / np.sqrt(len(pairs))


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
