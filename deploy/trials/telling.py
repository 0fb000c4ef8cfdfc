"""Status of trials for `springtide trial list` and `springtide status`, as JSON values and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from deploy.operate.times import iso
from deploy.operate.versions import table
from state import layout
from state.config.settings import Settings
from state.disk.lock import is_held
from state.errors import SpringtideError
from state.registry.control import Control
from state.registry.registry import Registry
from state.registry.sealed import as_values
from state.trials.comparison import figures_in
from state.trials.trial import Trial, Trials

STANDINGS = {"held": "held by its guard", "paused": "paused", "down": "no trainer"}
"""Reasons why a running trial does not train, so that its comparison gets no rows."""

WORDS = {
    "better": "BETTER",
    "worse": "worse",
    "undecided": "undecided",
    "the same": "the same",
}


def look(settings: Settings) -> list[dict[str, Any]]:
    """Returns all trials as JSON values, the newest last.

    Raises:
        RegistryError: The document of a trial is damaged.
    """
    trials = Trials(settings.state_dir)
    return [_document(trials, one) for one in sorted(trials.all(), key=lambda one: one.begun_at_ms)]


def running(settings: Settings) -> list[dict[str, Any]]:
    """Returns the trials that run or are being promoted; none if a document cannot be read."""
    with suppress(SpringtideError):
        return [one for one in look(settings) if one["wanted"] in ("running", "promoting")]
    return []


def _document(trials: Trials, trial: Trial) -> dict[str, Any]:
    newest, held, path = None, None, trials.registry(trial.name)
    standing: str = trial.wanted
    if trial.runs and path.is_dir():
        with suppress(SpringtideError, OSError):
            registry = Registry(path)
            control = registry.control()
            newest = None if control is None else registry.newest(control.epoch)
            held = held_by_guard(control)
            paused = control is not None and not control.training
            down = not is_held(path, layout.TRAINER_LOCK)
            standing = "held" if held else "paused" if paused else "down" if down else trial.wanted
    told = {"newest": newest, "held": held, "standing": standing, "compared": figures_in(trials.folder(trial.name))}
    return as_values(trial) | told


def held_by_guard(control: Control | None) -> str | None:
    """Describes what the guard of a trainer holds; None if it holds nothing."""
    return None if control is None or control.held is None else control.held.in_words()


def as_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Formats trials as a table with one line per trial."""
    if not found:
        return "there was no trial yet: `springtide trial start NAME --reason TEXT` begins one"
    head = ["trial", "is", "since", "by", "from", "with", "rows", "log loss", "live", "difference", "", "reason"]
    return table([head, *(_line(one) for one in found)])


def _line(one: Mapping[str, Any]) -> list[str]:
    compared = one["compared"] or {}
    return [
        one["name"],
        STANDINGS.get(one["standing"], one["wanted"]),
        iso(one["at_ms"]),
        one["actor"],
        one["origin"] if one["version"] is None else str(one["version"]),
        " ".join(f"{name}={value}" for name, value in one["overrides"].items()) or "-",
        f"{compared.get('rows', 0):,}",
        _nats(compared.get("trial_log_loss")),
        _nats(compared.get("live_log_loss")),
        difference(compared),
        "-" if one["held"] else WORDS.get(compared.get("verdict", ""), "-"),
        one["reason"],
    ]


def difference(compared: Mapping[str, Any]) -> str:
    """Formats the mean difference with its interval.

    >>> difference({"difference": -0.02, "low": -0.03, "high": -0.01}), difference({"difference": 0.0, "low": None})
    ('-0.0200 (-0.0300 to -0.0100)', '+0.0000')
    >>> difference({})
    '-'
    """
    if compared.get("difference") is None:
        return "-"
    mean = f"{compared['difference']:+.4f}"
    return mean if compared.get("low") is None else f"{mean} ({compared['low']:+.4f} to {compared['high']:+.4f})"


def as_text(one: Mapping[str, Any]) -> tuple[str, str]:
    """Formats a trial's status: the verdict, or why it does not train, and a description.

    >>> compared = {"rows": 9, "live_log_loss": 2.5, "trial_log_loss": 2.4, "difference": -0.1, "low": -0.2, "high": -0.05,
    ...             "alpha": 0.05, "verdict": "better"}
    >>> word, text = as_text({"name": "wider", "wanted": "running", "held": None, "standing": "running",
    ...                       "overrides": {"model.dim": "64"}, "version": 7, "compared": compared})
    >>> word
    'BETTER'
    >>> for sentence in text.split("; "):
    ...     print(sentence)
    wider runs from version 7 with model.dim 64
    log loss 2.400 against 2.500 of the live trainer on the same 9 rows
    difference -0.1000 (-0.2000 to -0.0500), right at all looks but for 5 % of trials
    """
    begins = one["origin"] if one["version"] is None else f"version {one['version']}"
    tried = ", ".join(f"{name} {value}" for name, value in one["overrides"].items()) or "the same settings"
    said = [f"{one['name']} {'runs' if one['wanted'] == 'running' else 'is promoted'} from {begins} with {tried}"]
    if one["held"]:
        said.append(f"held by its guard: {one['held']}")
    elif one["standing"] == "paused":
        said.append("training is paused by an operator")
    elif one["standing"] == "down":
        said.append(f"its trainer does not run: see logs/trial-{one['name']}.log")
    word = STANDINGS.get(one["standing"])
    compared = one["compared"]
    if not compared or not compared["rows"]:
        return word or "waits", "; ".join([*said, "no row was scored by both yet"])
    said.append(
        f"log loss {_nats(compared['trial_log_loss'])} against {_nats(compared['live_log_loss'])} of the live trainer on "
        f"the same {compared['rows']:,} rows"
    )
    sure = "" if compared["low"] is None else f", right at all looks but for {100 * compared['alpha']:g} % of trials"
    said.append(f"difference {difference(compared)}{sure}")
    return word or WORDS[compared["verdict"]], "; ".join(said)


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
