"""Calculates how large a deployment must be: `springtide capacity`, `python -m deploy.capacity [options]`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from deploy.formats import seconds
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError
from state.process.commands import add_options, amount, parser_of
from state.process.part import run_command
from state.user_shares import SHARES

SOURCE = Path(__file__).with_name("capacity.toml")
RESERVE = 1.25
"""Provisioned memory over used memory, as `storage.memory_dir` requires; the same for disks."""
NAMED = (
    "keys of one stream process",
    "one trainer",
    "memory of one trainer",
    "memory of a host",
    "leader of the training log",
)
"""Limits in the page's table of loads."""
BY_CLICKS = ("cores", "clicks/s", "GB/s")
"""Units of the limits that are proportional to the click rate."""


class Constant(msgspec.Struct, frozen=True, array_like=True):
    """A measured figure, and the command that measures it."""

    value: float
    unit: str
    bench: str
    meaning: str


class LimitFormula(msgspec.Struct, frozen=True, array_like=True):
    """A limit: expressions for the load and the maximum, and what helps beyond it."""

    name: str
    asked: str
    most: str
    unit: str
    remedy: str


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The limits: of every deployment, and of the stream in one process or on Flink."""

    every: tuple[LimitFormula, ...]
    local: LimitFormula
    flink: LimitFormula


@dataclass(frozen=True)
class Load:
    """The load of a deployment; the fields are the options of `springtide capacity`."""

    clicks: float = 10_000.0
    users: float = 1e6
    items: float = 1e5
    answers: float = 1_000.0
    answer: str = "lean"
    versions: float = 5.0
    retention_h: float = 168.0
    click_bytes: float = 100.0
    use: float = 0.6
    host_cores: float = 16
    replication: float = 3
    standbys: float = 0
    stream: str = "auto"


@dataclass(frozen=True)
class Example(Load):
    """A load of the page, with `serving.shares` and `trainer.workers`."""

    shares: str = ""
    workers: int = 1


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`capacity.toml`, which describes its tables."""

    constants: dict[str, Constant]
    formulas: dict[str, str]
    parts: dict[str, tuple[str, str, str, str]]
    limits: Limits
    examples: tuple[Example, ...]
    page: dict[str, str]


DATA = msgspec.toml.decode(SOURCE.read_bytes(), type=Source)
CONSTANTS = DATA.constants
VALUES: Mapping[str, float] = {name: constant.value for name, constant in CONSTANTS.items()}


class Need(NamedTuple):
    """What one instance of a part uses, and how many instances there are."""

    instances: float
    cores: float
    memory_bytes: float
    disk_bytes: float

    def ordered(self, use: float) -> Need:
        """All instances together: whole cores at this utilisation, memory and disk with the reserve."""
        memory_bytes, disk_bytes = (self.instances * RESERVE * size for size in (self.memory_bytes, self.disk_bytes))
        return Need(self.instances, self.instances * math.ceil(self.cores / use), memory_bytes, disk_bytes)


class Limit(NamedTuple):
    """A bound on a part of which there is only one."""

    name: str
    asked: float
    most: float
    unit: str
    remedy: str

    @property
    def share(self) -> float:
        """The load as a share of the limit; above 1 it exceeds the limit."""
        return self.asked / self.most


class Sizing:
    """The answers for one load; `sizing["hosts"]` is the value of a formula."""

    def __init__(self, load: Load, settings: Settings, constants: Mapping[str, float] = VALUES) -> None:
        self.load = load
        sections = ("trainer", "stream", "serving", "features", "registry", "history", "model")
        self._values: dict[str, Any] = {
            **asdict(load),
            **constants,
            **{name: getattr(settings, name) for name in sections},
            "held": sum(1 for _ in settings.serving.user_shares) / SHARES,
            "runner": load.stream,
            "answer_us": constants[f"{load.answer}_us"],
            "min": min,
            "max": max,
            "ceil": math.ceil,
            "changed": self._changed,
            "kept": self._kept,
        }
        most = settings.trainer.max_rows
        self._rows = (min(load.users, settings.trainer.workers * most), min(load.items, most))
        for name, formula in DATA.formulas.items():
            self._values[name] = self._of(formula)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def _of(self, formula: str) -> Any:
        return eval(formula, {"__builtins__": {}}, self._values)

    def _changed(self, seconds: float, held: float = 1.0) -> float:
        """Rows that clicks change in so many seconds, if all users and all items are equally active; of users, a part."""
        users, items = (-count * math.expm1(-self.load.clicks * seconds / count) for count in self._rows)
        return held * users + items

    def _kept(self, span_s: float, every_s: float) -> float:
        version = self["durable_bytes"] + self._changed(every_s) * self["durable_row_bytes"]
        return max(0.0, span_s) / every_s * float(version)

    def parts(self) -> dict[str, Need]:
        """Part -> what an instance uses."""
        return {part: Need(*map(self._of, formulas)) for part, formulas in DATA.parts.items()}

    def orders(self) -> dict[str, Need]:
        """Part -> what to order for all its instances; `all` is the sum."""
        needs = {name: need.ordered(self.load.use) for name, need in self.parts().items()}
        return {**needs, "all": Need(*(sum(column) for column in zip(*needs.values(), strict=True)))}

    def limits(self) -> list[Limit]:
        """All limits, the nearest first."""
        stream = DATA.limits.flink if self["on_flink"] else DATA.limits.local
        reached = (
            Limit(limit.name, self._of(limit.asked), self._of(limit.most), limit.unit, limit.remedy)
            for limit in (stream, *DATA.limits.every)
        )
        return sorted(reached, key=lambda limit: -limit.share)


def constant(text: str) -> tuple[str, float]:
    """Parses `NAME=VALUE`.

    Raises:
        argparse.ArgumentTypeError: There is no constant of this name, or the value is not a number above 0.
    """
    name, _, value = text.partition("=")
    if name not in CONSTANTS:
        raise argparse.ArgumentTypeError(f"there is no constant {name}; they are {', '.join(CONSTANTS)}")
    return name, amount(value)


def parser(settings: Settings) -> argparse.ArgumentParser:
    """Returns the parser of the command: the fields of `Load`, and how to print."""
    command = parser_of("capacity")
    # Versions follow micro-batches.
    most_versions = min(1 / settings.trainer.publish_s, 1000 / settings.stream.cut_ms)
    of_settings = {"versions": most_versions, "retention_h": settings.kafka.retention_h}
    command.set_defaults(**asdict(Load()) | of_settings)
    command.add_argument(
        "--measured",
        type=constant,
        action="append",
        default=[],
        help="a constant that was measured on your machine, as NAME=VALUE; repeatable",
    )
    add_options(command, {"-o --output": {"like": "output"}})
    return command


def _sizing_of(args: argparse.Namespace, settings: Settings) -> Sizing:
    if args.use > 1 or args.host_cores % 1 or args.replication % 1:
        raise SettingsError("--use is at most 1, --host-cores and --replication are whole numbers", "correct them")
    load_asked = Load(**{option.name: getattr(args, option.name) for option in fields(Load)})
    return Sizing(load_asked, settings, {**VALUES, **dict(args.measured)})


def number(value: float) -> str:
    """Three digits.

    >>> [number(value) for value in (0.284, 12.0, 2_345.0)]
    ['0.28', '12', '2,340']
    """
    return f"{value:.2g}" if value < 10 else f"{round(value, min(0, 3 - len(f'{value:.0f}'))):,.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _start(sizing: Sizing) -> str:
    return seconds(sizing["catch_up_s"]) if sizing["read_share"] < 1 else "- (it reads more slowly than clicks arrive)"


def _as_text(sizing: Sizing) -> str:
    parts = [
        [part, f"{need.instances:g}", f"{need.cores:,g}", *(number(size / 1e9) for size in need[2:])]
        for part, need in sizing.orders().items()
    ]
    limits = [
        [
            "BEYOND" if limit.share > 1 else "within",
            limit.name,
            f"{limit.share:.0%} of {number(limit.most)} {limit.unit}",
            f"{number(sizing.load.clicks / limit.share)} clicks/s" if limit.unit in BY_CLICKS else "-",
            limit.remedy,
        ]
        for limit in sizing.limits()
    ]
    return f"""{_table(["part", "instances", "cores", "memory, GB", "disk, GB"], parts)}

The stream is {"a job on Flink" if sizing["on_flink"] else "one local process"}. The clicks topic has {sizing["partitions"]} partitions, the training log 1 with {number(sizing["log_bytes_s"] / 1e6)} MB/s. A new host answers after {_start(sizing)}.

{_table(["", "limit", "share", "ends at", "what helps"], limits)}"""


def _as_document(sizing: Sizing) -> dict[str, object]:
    orders = {part: need._asdict() for part, need in sizing.orders().items()}
    return {
        "total": orders.pop("all"),
        "parts": orders,
        "stream": "flink" if sizing["on_flink"] else "local",
        "partitions": {"clicks": sizing["partitions"], "training_log": 1},
        "hosts": sizing["hosts"],
        "catch_up_s": sizing["catch_up_s"],
        "limits": [limit._asdict() | {"share": limit.share} for limit in sizing.limits()],
    }


def page() -> str:
    """Returns the text of `docs/operate/capacity.md`, for the default settings."""
    settings = Settings()
    roomy = replace(
        settings,
        history=replace(settings.history, max_users=10**9),
        trainer=replace(settings.trainer, max_rows=10**9),
    )
    loads, limits = [], []
    for example in DATA.examples:
        serving = replace(roomy.serving, shares=example.shares)
        trainer = replace(roomy.trainer, workers=example.workers)
        sizing = Sizing(example, replace(roomy, serving=serving, trainer=trainer))
        order, stream = sizing.orders()["all"], "Flink" if sizing["on_flink"] else "local"
        about = [number(example.clicks), number(example.users), example.shares or "all", str(example.workers)]
        sizes = [f"{order.cores:,g}", number(order.memory_bytes / 1e9), number(order.disk_bytes / 1e9)]
        loads.append([*about, f"{example.standbys:g}", number(example.answers), stream, *sizes, str(sizing["hosts"])])
        share_of = {limit.name: f"{limit.share:.0%}" for limit in sizing.limits()}
        limits.append([*about, _start(sizing), *(share_of[name] for name in NAMED)])
    about = ["clicks/s", "users", "`serving.shares`", "`trainer.workers`"]
    head = [*about, "standbys", "answers/s", "stream", "cores", "memory, GB", "disk, GB", "hosts"]
    formulas = [[f"`{name}`", f"`{formula}`"] for name, formula in DATA.formulas.items()]
    constants = [
        [f"`{name}`", f"{number(constant.value)} {constant.unit}", constant.meaning, f"`{constant.bench}`"]
        for name, constant in CONSTANTS.items()
    ]
    return DATA.page["text"].format(
        shown=_as_text(Sizing(Load(answers=20_000), settings)),
        loads=_table(head, loads),
        limits=_table([*about, "a new host answers after", *NAMED], limits),
        formulas=_table(["answer", "formula"], formulas),
        constants=_table(["constant", "value", "meaning", "measured by"], constants),
    )


def _run(argv: Sequence[str]) -> int:
    flags, words = split_settings(argv)
    settings = load(flags)
    args = parser(settings).parse_args(words)
    sizing = _sizing_of(args, settings)
    print(json.dumps(_as_document(sizing)) if args.output == "json" else _as_text(sizing))
    return int(sizing.limits()[0].share > 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command("springtide capacity", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
