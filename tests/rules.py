"""Reads the rules of deploy/prometheus, and the two cases of each alert beside their tests."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

PROMETHEUS = Path(__file__).parents[1] / "deploy" / "prometheus"
FILES = sorted(PROMETHEUS.glob("rules/*.yml"))
CASES = Path(__file__).parent / "deploy" / "prometheus"


@dataclass(frozen=True)
class Case:
    """What an alert does after some series.

    Attributes:
        at: When it is asked, after the first sample, such as `5m`.
        series: Series in Prometheus's notation -> their values in promtool's.
        interval: Between two samples.
        summary: What it says; None where it does not fire.
        labels: Its labels but the severity, where it fires.
    """

    at: str
    series: Mapping[str, str]
    interval: str = "15s"
    summary: str | None = None
    labels: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        # YAML reads 0x20 without quotes as the number 32.
        assert all(isinstance(values, str) for values in self.series.values()), f"put quotes around {self.series}"


@functools.cache
def read(file: Path) -> Any:
    """The content of a YAML file, by the loader in C."""
    return yaml.load(file.read_text(), yaml.CSafeLoader)


def _rules(file: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for group in read(file)["groups"]:
        yield from ((rule[kind], rule) for rule in group["rules"] if kind in rule)


def _cases(file: Path) -> dict[str, dict[str, Case]]:
    """The cases of a file of rules: alert -> `fires`, `silent` -> case."""
    path = CASES / f"{file.stem}.yml"
    found = read(path) if path.exists() else {}
    return {alert: {name: Case(**case) for name, case in both.items()} for alert, both in found.items()}


ALERTS: dict[str, dict[str, Any]] = {name: rule for file in FILES for name, rule in _rules(file, "alert")}
"""The alerts of all files by their names."""

RECORDED: dict[str, dict[str, Any]] = {name: rule for file in FILES for name, rule in _rules(file, "record")}
"""The recording rules likewise."""

ALERTS_OF: dict[str, dict[str, dict[str, Any]]] = {file.stem: dict(_rules(file, "alert")) for file in FILES}
"""File of rules -> its alerts."""

CASES_OF: dict[str, dict[str, dict[str, Case]]] = {file.stem: _cases(file) for file in FILES}
"""File of rules -> alert -> its cases."""


def found(name: str) -> Path | None:
    """Where Debian's `prometheus` or `promtool` is: where `make debian` puts it, or on the path."""
    beside = Path(sys.executable).parent / name
    on_path = shutil.which(name)
    return beside if beside.exists() else Path(on_path) if on_path else None


def program(name: str) -> Path:
    """That; a test that asks for one that is not here is skipped."""
    here = found(name)
    if here is None:
        pytest.skip(f"{name} is not installed, and `make debian` could not fetch it")
    return here
