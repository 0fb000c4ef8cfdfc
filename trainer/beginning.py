"""What a trainer begins with where there is no version to go on from: nothing, or, of some trials, past clicks."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from state.config.settings import Settings
from state.log import LogReader
from state.registry.control import Control
from state.registry.registry import Registry
from state.trials.past import read_past
from trainer.engine.step import Trainer
from trainer.past import PastLearning, from_child
from trainer.place import TrainingPlace
from trainer.resume import OpenLog
from trainer.versions import checkpoint
from trainer.versions.first_version import nothing_learned


class Beginning(NamedTuple):
    """Where a trainer begins.

    Attributes:
        log: The training log, open there.
        place: There.
        tensors: What the first base holds.
    """

    log: LogReader
    place: TrainingPlace
    tensors: Mapping[str, Any]


class Begins(Protocol):
    """Makes a trainer one that may begin."""

    def __call__(
        self, settings: Settings, trainer: Trainer, about: Mapping[str, Any], open_log: OpenLog, control: Control
    ) -> Beginning:
        """The trainer has learned what it begins with when this returns.

        Args:
            settings: All settings.
            trainer: Is cleared first.
            about: What the bootstrap wrote about the feature spec.
            open_log: Opens the training log.
            control: Whose epoch begins.
        """
        ...


def from_nothing(
    settings: Settings, trainer: Trainer, about: Mapping[str, Any], open_log: OpenLog, control: Control
) -> Beginning:
    """Nothing, and the training log from its beginning."""
    log = open_log(None)
    begin = log.position(settings.trainer.partition)
    place = TrainingPlace(control.epoch, parent=0, first=begin, next=begin, durable_first=begin)
    return Beginning(log, place, nothing_learned(trainer, about))


def from_past(
    learning: PastLearning,
    settings: Settings,
    trainer: Trainer,
    about: Mapping[str, Any],
    open_log: OpenLog,
    control: Control,
) -> Beginning:
    """Past clicks, and the training log from the cut on.

    1. The past is learned; a crash here leaves nothing, and it begins again.
    2. The log is opened behind it.

    Raises:
        GapError: The log does not reach back to the cut any more.
        UnknownTopic: The log was made anew since the cut.
        SpringtideError: See `PastLearning.learn`.
    """
    # 1.
    checkpoint.begin(trainer, about)
    place = learning.learn(settings, trainer, str(about["salt"]), control)
    # 2.
    log = learning.open_behind(open_log, control)
    # The next version need not hold again what this one does.
    return Beginning(log, place, checkpoint.changes(trainer) | checkpoint.full(trainer))


def beginning_of(registry: Registry, arguments: Sequence[str], stopping: threading.Event) -> Begins:
    """How a registry's trainer begins.

    Args:
        registry: Its own.
        arguments: The command line of this process.
        stopping: Set where it is to end.

    Raises:
        RegistryError: What it is to learn first cannot be read.
    """
    past = read_past(registry.path)
    if past is None:
        return from_nothing
    return partial(from_past, PastLearning(past, partial(from_child, arguments, stopping)))
