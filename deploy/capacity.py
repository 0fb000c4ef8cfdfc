"""Calculates how large a deployment must be: `springtide capacity`, `python -m deploy.capacity [options]`.

The sizes follow from measured constants: what each part of the system uses, and which limit the
design meets first. `deploy/CAPACITY.md` prints the expressions below, which are what is computed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from deploy.command_line import RefusingParser
from deploy.watch.messages import seconds
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError, SpringtideError
from state.process.ending import while_read

SOAK = "python -m tests.e2e.soak"
FLINK_BENCH, SERVING_BENCH = "python -m tests.bench.flink", "python -m tests.bench.serving"
RESERVE = 1.25
"""Provisioned memory over used memory, as `storage.memory_dir` requires; the same for disks."""
ANSWERS = ("lean", "full", "recommend", "explain")
STREAM, TRAINER, APPLIER, WORKERS = "stream", "trainer", "applier", "workers"
REST, KAFKA, REGISTRY = "validation and console", "kafka", "registry"


class Constant(NamedTuple):
    """A measured figure, and the command that measures it."""

    value: float
    unit: str
    bench: str
    meaning: str


# Measured on two shared cores (AMD EPYC, 25 GB, Python 3.11) with default settings. The soak has 10,000 clicks/s of
# 20,000 users and 4,000 items; its CPU times are from /proc/PID/stat over 152 s, from the eighth minute on.
CONSTANTS: Mapping[str, Constant] = {
    "stream_us": Constant(33.2, "us/click", SOAK, "CPU time of the stream in one local process"),
    "stream_most": Constant(64_900, "clicks/s", "python -m tests.bench.stream", "throughput of one local stream"),
    "flink_us": Constant(116, "us/click", FLINK_BENCH, "CPU time of TaskManager and Python worker on Flink"),
    "flink_bytes": Constant(4.4e8, "bytes", FLINK_BENCH, "memory of a TaskManager with little state"),
    "flink_worker_bytes": Constant(6.3e8, "bytes", FLINK_BENCH, "memory of a Python worker on Flink"),
    "trainer_us": Constant(26.7, "us/row", SOAK, "CPU time of the trainer without publishing"),
    "publish_ms": Constant(
        7.7, "ms/version", "python -m tests.bench.publish", "stall of steps for 10,000 changed rows"
    ),
    "applier_us": Constant(38.9, "us/click", SOAK, "CPU time of an applier without rows of versions"),
    "history_us": Constant(11.2, "us/row", "python -m tests.bench.new_host", "CPU time of a new host that catches up"),
    "apply_us": Constant(3.4, "us/row", SERVING_BENCH, "CPU time to apply a row of a version"),
    "validation_us": Constant(7, "us/row", SOAK, "CPU time of the validation"),
    "broker_us": Constant(7.8, "us/click", SOAK, "CPU time of a broker"),
    "lean_us": Constant(100, "us/answer", SERVING_BENCH, "CPU time of a worker for a lean profile"),
    "full_us": Constant(219, "us/answer", SERVING_BENCH, "CPU time for a profile with all fields"),
    "recommend_us": Constant(6_830, "us/answer", "python -m tests.bench.recommend", "CPU time for 20 of 1e6 items"),
    "explain_us": Constant(12_000, "us/answer", "python -m tests.bench.explain", "CPU time for an explanation"),
    "log_row_bytes": Constant(288, "bytes/row", SOAK, "training log, compressed"),
    "event_bytes": Constant(60, "bytes/event", SOAK, "event in a store of histories"),
    "user_bytes": Constant(890, "bytes/user", "python -m tests.bench.new_host", "user in a store, without events"),
    "served_row_bytes": Constant(640, "bytes/row", SOAK, "row in serving's store"),
    "base_row_bytes": Constant(260, "bytes/row", "python -m tests.bench.publish", "row in a base"),
    "durable_row_bytes": Constant(208, "bytes/row", SOAK, "changed row in a durable version"),
    "durable_bytes": Constant(1.1e6, "bytes/version", SOAK, "dense weights in a durable version"),
    "stream_bytes": Constant(2.5e8, "bytes", SOAK, "memory of a stream without histories"),
    "trainer_bytes": Constant(5.4e8, "bytes", SOAK, "memory of a trainer without tables"),
    "applier_bytes": Constant(2.2e8, "bytes", SOAK, "memory of an applier without stores"),
    "worker_bytes": Constant(1.05e8, "bytes", SOAK, "memory of a worker without shared stores"),
    "rest_bytes": Constant(1.9e8, "bytes", SOAK, "memory of console and validation"),
}
VALUES: Mapping[str, float] = {name: constant.value for name, constant in CONSTANTS.items()}
FORMULAS: Mapping[str, str] = {
    "rows": "min(users, trainer.max_rows) + min(items, trainer.max_rows)",
    "stream_users": "min(users, stream.max_users)",
    "stream_histories_bytes": "stream_users * (user_bytes + event_bytes * min(features.history, clicks * "
    "features.windows_s[-1] / stream_users))",
    "host_users": "min(users, serving.max_users)",
    "host_histories_bytes": "host_users * (user_bytes + event_bytes * min(features.history, clicks * "
    "features.windows_s[-1] / host_users))",
    "served_bytes": "(rows + changed(registry.durable_s) * serving.keep_s / registry.durable_s) * served_row_bytes",
    "host_bytes": "applier_bytes + host_histories_bytes + served_bytes",
    # A row, its accumulators and its index entry; tables double when they are full.
    "table_bytes": "2 * rows * (model.dim * 8 + 32)",
    "base_bytes": "durable_bytes + rows * base_row_bytes",
    "registry_bytes": "2 * base_bytes + kept(registry.delta_keep_s, registry.durable_s) + "
    "kept(registry.base_keep_h * 3600 - registry.delta_keep_s, 600) + "
    "kept(registry.base_keep_d * 86400 - registry.base_keep_h * 3600, 3600)",
    "local_streams": "clicks / (stream_most * use)",
    "on_flink": "runner == 'flink' or runner == 'auto' and local_streams > 1",
    "stream_cores": "clicks * (flink_us if on_flink else stream_us) / 1e6",
    "streams": "max(1, ceil(stream_cores / (host_cores * use))) if on_flink else 1",
    # On Flink a Python worker a core, and histories twice.
    "stream_memory_bytes": "flink_bytes + ceil(stream_cores / streams / use) * flink_worker_bytes + "
    "2 * stream_histories_bytes / streams if on_flink else "
    "stream_bytes + min(stream.cache_users, users) * features.history * 40 + stream_histories_bytes",
    # On Flink three checkpoints.
    "stream_disk_bytes": "stream_histories_bytes / streams * (3 if on_flink else 1)",
    "trainer_cores": "clicks * trainer_us / 1e6 + versions * publish_ms / 1e3 * changed(1 / versions) / 10_000",
    "applier_cores": "(clicks * applier_us + versions * changed(1 / versions) * apply_us) / 1e6",
    "worker_cores": "answers * answer_us / 1e6",
    "hosts": "max(2, ceil(worker_cores / max(1, host_cores * use - applier_cores)))",
    "workers_bytes": "max(1, ceil(worker_cores / hosts / use)) * worker_bytes",
    "partitions": "max(4, 2 * ceil(local_streams))",
    "log_bytes_s": "clicks * log_row_bytes",
    # The broker that leads the training log: one write, the other copies, trainer, validation and hosts.
    "log_leader_bytes_s": "log_bytes_s * (1 + (replication - 1) + 2 + hosts)",
    "kafka_bytes": "(clicks * click_bytes + log_bytes_s) * retention_h * 3600",
    # A new host reads all of the training log that Kafka keeps.
    "catch_up_s": "retention_h * 3600 * clicks * history_us / 1e6",
}
"""Name -> expression over the options, constants, settings and earlier formulas."""
PARTS: Mapping[str, tuple[str, str, str, str]] = {
    STREAM: ("streams", "stream_cores / streams", "stream_memory_bytes", "stream_disk_bytes"),
    TRAINER: ("1", "trainer_cores", "trainer_bytes + table_bytes", "0"),
    APPLIER: ("hosts", "applier_cores", "host_bytes", "0"),
    WORKERS: ("hosts", "worker_cores / hosts", "workers_bytes", "0"),
    REST: ("1", "clicks * validation_us / 1e6", "rest_bytes", "0"),
    KAFKA: ("replication", "clicks * broker_us / 1e6", "2e9", "kafka_bytes"),
    REGISTRY: ("1", "0", "0", "registry_bytes"),
}
"""Part -> its instances, and cores, memory and disk of one."""
_SHARDS = "hosts with a share of the users (not built)"
LIMITS: Sequence[tuple[str, str, str, str, str]] = (
    ("one trainer", "trainer_cores", "use", "cores", "several trainers (not built)"),
    ("one applier a host", "applier_cores", "use", "cores", _SHARDS),
    ("leader of the training log", "log_leader_bytes_s / 1e9", "1.25", "GB/s", _SHARDS),
    ("catch-up of a new host", "catch_up_s / 3600", "1", "h", "a shorter `kafka.retention_h`"),
    ("`max_users`", "users", "min(stream.max_users, serving.max_users)", "users", "a higher setting"),
    ("`trainer.max_rows`", "max(users, items)", "trainer.max_rows", "rows", "a higher setting"),
    ("memory of a host", "(host_bytes - applier_bytes) / 1e9", "1000", "GB", _SHARDS),
    ("memory of the trainer", "table_bytes / 1e9", "1000", "GB", "a lower `trainer.max_rows`"),
)
"""Name, load, maximum, unit and remedy. One machine has 1 TB of memory and 10 Gbit/s; a new host answers in an hour."""
LOCAL_LIMIT = ("one process of the local stream", "clicks", "stream_most * use", "clicks/s", "`--runner flink`")
FLINK_LIMIT = ("buckets of the stream on Flink", "stream_cores", "64 * use", "cores", "none")
"""`stream.buckets` is at most 64, each on one core."""
BY_CLICKS = ("cores", "clicks/s", "GB/s", "h")
"""Units of the limits that are proportional to the click rate."""


def _option(default: Any, meaning: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": meaning, "choices": choices})


@dataclass(frozen=True)
class Load:
    """What a deployment has to bear; the fields are the options of `springtide capacity`."""

    clicks: float = _option(10_000.0, "clicks per second in the peak hour")
    users: float = _option(1e6, "users who click within the longest window")
    items: float = _option(1e5, "items and categories with a row")
    answers: float = _option(1_000.0, "answers per second, over all hosts")
    answer: str = _option("lean", "kind of the answers", choices=ANSWERS)
    versions: float = _option(5.0, "versions per second")
    retention_h: float = _option(168.0, "Kafka retention in hours")
    click_bytes: float = _option(100.0, "size of a click in Kafka in bytes")
    use: float = _option(0.6, "planned utilisation of a core")
    host_cores: float = _option(16, "cores of a serving host")
    replication: float = _option(3, "Kafka replication factor")
    stream: str = _option(
        "auto", "stream runner; auto: flink if one process is not enough", choices=("local", "flink", "auto")
    )


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
    """A bound on something that there is one of."""

    name: str
    asked: float
    most: float
    unit: str
    remedy: str
    by_clicks: bool
    """Whether it is proportional to clicks a second."""

    @property
    def share(self) -> float:
        """Above 1 the load is beyond the limit."""
        return self.asked / self.most


class Sizing:
    """The answers for one load; `sizing["hosts"]` is the value of a formula.

    Args:
        load: What the deployment has to bear.
        settings: Their bounds and spans count.
        constants: Name -> measured value.
    """

    def __init__(self, load: Load, settings: Settings, constants: Mapping[str, float] = VALUES) -> None:
        self.load = load
        sections = {name: getattr(settings, name) for name in ("trainer", "stream", "serving", "features", "registry")}
        self._values: dict[str, Any] = {
            **asdict(load),
            **constants,
            **sections,
            "model": settings.model,
            "runner": load.stream,
            "answer_us": constants[f"{load.answer}_us"],
            "min": min,
            "max": max,
            "ceil": math.ceil,
            "changed": self._changed,
            "kept": self._kept,
        }
        for name, formula in FORMULAS.items():
            self._values[name] = self._of(formula)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def _of(self, formula: str) -> Any:
        return eval(formula, {"__builtins__": {}}, self._values)

    def _changed(self, seconds: float) -> float:
        """The number of rows that clicks change in this many seconds, if all users and all items are equally active."""
        most: int = self["trainer"].max_rows
        counts = (min(self.load.users, most), min(self.load.items, most))
        return sum(-count * math.expm1(-self.load.clicks * seconds / count) for count in counts)

    def _kept(self, span_s: float, every_s: float) -> float:
        """The bytes of the durable versions of a time span of which one each `every_s` is kept."""
        version = self["durable_bytes"] + self._changed(every_s) * self["durable_row_bytes"]
        return max(0.0, span_s) / every_s * float(version)

    def parts(self) -> dict[str, Need]:
        """Part -> what an instance uses."""
        return {part: Need(*map(self._of, formulas)) for part, formulas in PARTS.items()}

    def orders(self) -> dict[str, Need]:
        """Part -> what to order for all its instances; `all` is the sum."""
        found = {name: need.ordered(self.load.use) for name, need in self.parts().items()}
        return {**found, "all": Need(*(sum(column) for column in zip(*found.values(), strict=True)))}

    def limits(self) -> list[Limit]:
        """All limits, the nearest first."""
        rows = (FLINK_LIMIT if self["on_flink"] else LOCAL_LIMIT, *LIMITS)
        found = [
            Limit(name, self._of(asked), self._of(most), unit, remedy, unit in BY_CLICKS)
            for name, asked, most, unit, remedy in rows
        ]
        return sorted(found, key=lambda limit: -limit.share)


DESCRIPTION = (
    "Report the resources that a deployment needs (cores, memory, disk, partitions) and the limit it reaches first."
)
EPILOG = (
    "These settings, written --section.name VALUE, affect the result: features.history, stream.max_users, serving.max_users, "
    "trainer.max_rows, model.dim, [registry], serving.keep_s. Exit codes: 0 done, 1 the load exceeds a limit, 2 wrong use."
)
EXAMPLES = (
    Load(clicks=200, users=2_000, items=4_000, answers=100),
    Load(clicks=2_000, answers=2_000),
    Load(clicks=10_000, answers=20_000),
    Load(clicks=10_000, users=1e7, items=1e6, answers=20_000),
    Load(clicks=100_000, users=1e8, items=1e7, answers=200_000),
    Load(clicks=1e6, users=1e9, items=1e8, answers=1e6),
)
PAGE = """# Capacity

Written by `springtide capacity --markdown > deploy/CAPACITY.md`. It says what a deployment takes and where the design ends. The measured constants below are from two shared cores. Beyond them the sizes are arithmetic: nobody has run more than 20,000 clicks/s here.

## One load

`springtide capacity --clicks 10000 --users 1e6 --answers 20000` prints the following; settings in force count. `--measured NAME=VALUE` replaces a constant by one of your machine. `-o json` prints the same for a program.

{shown}

Cores are planned for a utilisation of 60 %, memory and disk with a reserve of 25 %. One machine has at most 1 TB of memory and 10 Gbit/s, and a new host answers within an hour. Each limit is on something that there is one of; it "ends at" about the click rate at which it is reached, all else equal.

## Other loads

`max_users` and `max_rows` are at least as large as the load here. Where limits are passed, the sizes are what the work takes, not what one part can do.

{loads}

## Formulas

`springtide capacity` computes these expressions in this order. Their names are options, measured constants and settings; `runner` is `--stream` and `answer_us` the constant of `--answer`. Sizes are linear in clicks, which is more than it takes: larger micro-batches cost less a row. `changed(s)` is the number of rows that clicks change in `s` seconds if all N users, and all N items, are equally active: N (1 - exp(-clicks / N)). Skewed clicks change fewer. `kept(s, every)` is the size of the versions of `s` seconds of which the registry keeps one each `every` seconds: `durable_bytes + changed(every) * durable_row_bytes` each.

{formulas}

## Measured constants

CPU time depends on the machine more than anything else here. A GPU, several machines, an object store under load and Kafka on disks of its own were not measured.

{constants}"""


def amount(text: str) -> float:
    """A number above 0, also written as 1e6.

    Raises:
        argparse.ArgumentTypeError: It is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def constant(text: str) -> tuple[str, float]:
    """`NAME=VALUE`.

    Raises:
        argparse.ArgumentTypeError: There is no constant of this name, or the value is not a number above 0.
    """
    name, _, value = text.partition("=")
    if name not in CONSTANTS:
        raise argparse.ArgumentTypeError(f"there is no constant {name}; they are {', '.join(CONSTANTS)}")
    return name, amount(value)


def parser(settings: Settings) -> argparse.ArgumentParser:
    """The options: the fields of `Load`, and how to print."""
    found = RefusingParser(prog="springtide capacity", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    defaults = {"versions": 1 / settings.trainer.publish_s, "retention_h": settings.kafka.retention_h}
    for option in fields(Load):
        default, choices = defaults.get(option.name, option.default), option.metadata["choices"]
        flag, meaning = f"--{option.name.replace('_', '-')}", f"{option.metadata['help']} ({default})"
        convert = str if choices else amount
        found.add_argument(flag, type=convert, choices=choices, default=default, help=meaning)
    found.add_argument(
        "--measured",
        type=constant,
        action="append",
        default=[],
        help="a constant that was measured on your machine, as NAME=VALUE; repeatable",
    )
    found.add_argument("-o", "--output", choices=("text", "json"), default="text", help="output format (text)")
    found.add_argument("--markdown", action="store_true", help="print deploy/CAPACITY.md")
    return found


def sizing_of(asked: argparse.Namespace, settings: Settings) -> Sizing:
    """The sizing that a command line asks for.

    Raises:
        SettingsError: An option is out of range.
    """
    if asked.use > 1 or asked.host_cores % 1 or asked.replication % 1:
        raise SettingsError("--use is at most 1, --host-cores and --replication are whole numbers", "correct them")
    load_asked = Load(**{option.name: getattr(asked, option.name) for option in fields(Load)})
    return Sizing(load_asked, settings, {**VALUES, **dict(asked.measured)})


def number(value: float) -> str:
    """Three digits.

    >>> [number(value) for value in (0.284, 12.0, 2_345.0)]
    ['0.28', '12', '2,340']
    """
    return f"{value:.2g}" if value < 10 else f"{round(value, min(0, 3 - len(f'{value:.0f}'))):,.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def as_text(sizing: Sizing) -> str:
    """The answer in Markdown: the order of each part, and the limits."""
    parts = [
        [
            part,
            f"{need.instances:g}",
            f"{need.cores:,g}",
            number(need.memory_bytes / 1e9),
            number(need.disk_bytes / 1e9),
        ]
        for part, need in sizing.orders().items()
    ]
    limits = [
        [
            "BEYOND" if limit.share > 1 else "within",
            limit.name,
            f"{limit.share:.0%} of {number(limit.most)} {limit.unit}",
            f"{number(sizing.load.clicks / limit.share)} clicks/s" if limit.by_clicks else "-",
            limit.remedy,
        ]
        for limit in sizing.limits()
    ]
    return f"""{table(["part", "instances", "cores", "memory, GB", "disk, GB"], parts)}

The stream is {"a job on Flink" if sizing["on_flink"] else "one local process"}. The clicks topic has {sizing["partitions"]} partitions, the training log 1 with {number(sizing["log_bytes_s"] / 1e6)} MB/s. A new host answers after {seconds(sizing["catch_up_s"])}.

{table(["", "limit", "share", "ends at", "what helps"], limits)}"""


def as_document(sizing: Sizing) -> dict[str, object]:
    """The answer for a program."""
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


def page(settings: Settings) -> str:
    """The text of `deploy/CAPACITY.md`."""
    roomy = replace(
        settings,
        stream=replace(settings.stream, max_users=10**9),
        serving=replace(settings.serving, max_users=10**9),
        trainer=replace(settings.trainer, max_rows=10**9),
    )
    loads = []
    for sizing in (Sizing(example, roomy) for example in EXAMPLES):
        _, cores, memory_bytes, disk_bytes = sizing.orders()["all"]
        beyond = sum(limit.share > 1 for limit in sizing.limits())
        loads.append(
            [number(value) for value in (sizing.load.clicks, sizing.load.users, sizing.load.answers)]
            + [
                "Flink" if sizing["on_flink"] else "local",
                f"{cores:,g}",
                number(memory_bytes / 1e9),
                number(disk_bytes / 1e9),
            ]
            + [str(sizing["partitions"]), str(sizing["hosts"]), str(beyond)]
        )
    head = ["clicks/s", "users", "answers/s", "stream", "cores", "memory, GB", "disk, GB"]
    head += ["partitions", "hosts", "limits passed"]
    formulas = [[f"`{name}`", f"`{formula}`"] for name, formula in FORMULAS.items()]
    constants = [
        [f"`{name}`", f"{number(one.value)} {one.unit}", one.meaning, f"`{one.bench}`"]
        for name, one in CONSTANTS.items()
    ]
    return PAGE.format(
        shown=as_text(Sizing(EXAMPLES[2], settings)),
        loads=table(head, loads),
        formulas=table(["answer", "formula"], formulas),
        constants=table(["constant", "value", "meaning", "measured by"], constants),
    )


def run(argv: Sequence[str]) -> int:
    """Prints the answer; returns the exit code."""
    try:
        flags, words = split_settings(argv)
        settings = load(flags)
        asked = parser(settings).parse_args(words)
        sizing = sizing_of(asked, settings)
    except SpringtideError as error:
        print(f"springtide capacity: {error}", file=sys.stderr)
        return error.exit_code
    if asked.markdown:
        # The page uses the defaults, whatever is set here.
        print(page(Settings()))
        return 0
    print(json.dumps(as_document(sizing)) if asked.output == "json" else as_text(sizing))
    return int(sizing.limits()[0].share > 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return while_read(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
