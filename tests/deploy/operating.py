"""An operator at the command line of a registry with some versions."""

from __future__ import annotations

from pathlib import Path

from deploy import cli
from state.positions import Source
from state.registry.manifest import Draft, LogRange
from state.registry.registry import Registry

NOW_MS = 1_800_000_000_000
TOPIC = "0000002a" + "0" * 24


class Operator:
    """Somebody at the command line of one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.printed: list[str] = []
        self.became: list[tuple[str, list[str]]] = []

    def __call__(self, *words: str) -> str:
        """Gives a command; returns what it printed."""
        self.printed.clear()
        line = [*words, "--paths.state", str(self.state)]
        cli.run(line, lambda module, flags: self.became.append((module, flags)), NOW_MS, self.printed.append)
        return "\n".join(self.printed)

    @property
    def registry(self) -> Registry:
        return Registry(self.state / "registry")


def draft(number: int, parent: int | None, epoch: int = 1) -> Draft:
    return Draft(
        kind="base" if parent is None else "delta",
        epoch=epoch,
        parent=parent,
        log=LogRange("microbatches", "cd" * 16, 0, 10 * (number - 1), 10 * number),
        sources=((Source(TOPIC, 1), 100 * number),),
        steps=number,
        rows=1000 * number,
        created_at_ms=NOW_MS - (10 - number) * 60_000,
        event_time_ms=NOW_MS,
        spec="spec",
        program="program",
        salt="salt",
        metrics={"log_loss": 3.0 - number / 10, "auc": 0.5 if number > 1 else float("nan")},
    )
