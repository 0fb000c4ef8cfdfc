"""What the stream takes from control: nothing where there is none, and no step back to a registry that knows less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from state import layout
from state.errors import StoreError
from state.features.mask import Mask
from state.registry.control import follow, pin, roll_back, start
from state.registry.controls import Controls
from state.registry.log_line import WHOLE, turned
from streaming.control import POLL_S, ControlWatch

WHO: dict[str, Any] = {"actor": "ann", "reason": "bots", "now_ms": 5}
LINE = turned(WHOLE, 1, 4, 9, ())


class Seconds:
    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def test_without_a_registry_nothing_is_masked_and_the_epoch_stays(tmp_path: Path) -> None:
    watch = ControlWatch(tmp_path / "registry", LINE, Seconds())
    assert (watch.desired.mask, watch.desired.log_epoch, watch.changed()) == (Mask.NONE, 2, False)
    assert not (tmp_path / "registry").exists(), "it is the trainer's to make"


def test_only_a_mask_or_another_line_asks_for_something_else(tmp_path: Path) -> None:
    controls = Controls(tmp_path)
    controls.propose(start(**WHO))
    watch = ControlWatch(tmp_path, WHOLE, Seconds())
    for calm in (
        lambda now: pin(now, 3, **WHO),
        lambda now: follow(now, **WHO),
        lambda now: roll_back(now, 3, Mask.NONE, **WHO),
    ):
        controls.change(calm)
        assert not watch.changed()
    controls.change(lambda now: roll_back(now, 3, Mask(times=((0, 9),)), **WHO))
    assert watch.changed()
    masked = ControlWatch(tmp_path, WHOLE, Seconds())
    assert (masked.desired.mask.times, masked.changed()) == (((0, 9),), False)
    controls.change(lambda now: roll_back(now, 3, Mask.NONE, **WHO, log=LINE))
    assert masked.changed()


def test_it_looks_ten_times_a_second_and_goes_on_where_control_cannot_be_read(tmp_path: Path) -> None:
    controls, looked = Controls(tmp_path), [0.0]
    controls.propose(start(**WHO))
    watch = ControlWatch(tmp_path, WHOLE, lambda: looked[0])
    controls.change(lambda now: roll_back(now, 3, Mask(times=((0, 9),)), **WHO))
    assert watch.changed()
    looked[0] = POLL_S / 2
    assert not watch.changed()
    path = tmp_path / layout.CONTROL / "00000003.json"
    path.write_bytes(b"no control")
    looked[0] = 2 * POLL_S
    assert watch.changed(), "what was seen last still holds"


def test_histories_of_a_later_epoch_than_control_knows_are_refused(tmp_path: Path) -> None:
    Controls(tmp_path).propose(start(**WHO))
    with pytest.raises(StoreError, match=r"epoch 2 of the training log.*another registry"):
        ControlWatch(tmp_path, LINE)
