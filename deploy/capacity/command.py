"""Calculates how large a deployment must be: `springtide capacity`, `python -m deploy.capacity.command [options]`.

The sizes follow from measured constants: what each part of the system uses, and which limit the
design meets first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from deploy.command_line import RefusingParser
from deploy.watch.messages import seconds
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError, SpringtideError
from state.process.closed_output import while_read

HOUR_S, DAY_S = 3600.0, 86_400.0
SOAK = "python -m tests.e2e.soak"
FLINK_BENCH, SERVING_BENCH = "python -m tests.bench.flink", "python -m tests.bench.serving"
RESERVE = 1.25
"""Provisioned memory over used memory, as `storage.memory_dir` requires; the same for disks."""
MEMORY_GB, NETWORK_GB_S = 1000.0, 1.25
"""Limits of one machine."""
READY_H = 1.0
"""How long a new host may take until it answers."""
BROKER_BYTES = 2e9
BUCKETS = 64
"""Maximum of `stream.buckets` on Flink, each on one core."""
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

    instances: float = 1
    cores: float = 0.0
    memory_bytes: float = 0.0
    disk_bytes: float = 0.0

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
    by_clicks: bool = True
    """Whether it is proportional to clicks a second."""

    @property
    def share(self) -> float:
        """Above 1 the load is beyond the limit."""
        return self.asked / self.most


@dataclass(frozen=True)
class Sizing:
    """The answers for one load. The docstrings of the properties are the formulas of `deploy/CAPACITY.md`."""

    load: Load
    settings: Settings
    constants: Mapping[str, float] = field(default_factory=lambda: VALUES)

    @property
    def rows(self) -> float:
        """min(users, `trainer.max_rows`) + min(items, `trainer.max_rows`)"""
        most = self.settings.trainer.max_rows
        return min(self.load.users, most) + min(self.load.items, most)

    def changed_rows(self, seconds: float) -> float:
        """Rows that clicks change in this many seconds, if users and items are equally active; skewed clicks change fewer."""
        clicks, most = self.load.clicks * seconds, self.settings.trainer.max_rows
        counts = (min(self.load.users, most), min(self.load.items, most))
        return sum(-count * math.expm1(-clicks / count) for count in counts)

    @property
    def stream_histories_bytes(self) -> float:
        """min(users, `stream.max_users`) x (`user_bytes` + events x `event_bytes`); events = min(`features.history`, clicks/s x longest window / these users)"""
        return self._histories_bytes(self.settings.stream.max_users)

    @property
    def host_histories_bytes(self) -> float:
        """The same with `serving.max_users`, on each host"""
        return self._histories_bytes(self.settings.serving.max_users)

    def _histories_bytes(self, max_users: int) -> float:
        features, users = self.settings.features, min(self.load.users, max_users)
        events = min(float(features.history), self.load.clicks * features.windows_s[-1] / users)
        return users * (self.constants["user_bytes"] + events * self.constants["event_bytes"])

    @property
    def served_bytes(self) -> float:
        """(rows + changed rows of each durable version of the last `serving.keep_s`) x `served_row_bytes`"""
        durable_s, keep_s = self.settings.registry.durable_s, self.settings.serving.keep_s
        return (self.rows + self.changed_rows(durable_s) * keep_s / durable_s) * self.constants["served_row_bytes"]

    @property
    def table_bytes(self) -> float:
        """2 x rows x (`model.dim` x 8 bytes + 32): a row, its accumulators and its index entry; tables double when full"""
        return 2 * self.rows * (8 * self.settings.model.dim + 32)

    @property
    def log_bytes_s(self) -> float:
        """clicks/s x `log_row_bytes`"""
        return self.load.clicks * self.constants["log_row_bytes"]

    @property
    def log_leader_bytes_s(self) -> float:
        """Log bytes/s x (1 write + other copies + trainer + validation + hosts), for the broker that leads the training log"""
        return self.log_bytes_s * (1 + (self.load.replication - 1) + 2 + self.hosts)

    @property
    def base_bytes(self) -> float:
        """`durable_bytes` + rows x `base_row_bytes`"""
        return self.constants["durable_bytes"] + self.rows * self.constants["base_row_bytes"]

    @property
    def registry_bytes(self) -> float:
        """Two bases, and `durable_bytes` + changed rows x `durable_row_bytes` for each durable version: one each `durable_s` for `delta_keep_s`, each `thin_s` for `base_keep_h`, each `sparse_s` for `base_keep_d`"""
        kept, size = self.settings.registry, 2 * self.base_bytes
        newest_s, thin_s, sparse_s = kept.delta_keep_s, kept.base_keep_h * HOUR_S, kept.base_keep_d * DAY_S
        tiers = ((newest_s, kept.durable_s), (thin_s - newest_s, kept.thin_s), (sparse_s - thin_s, kept.sparse_s))
        for span_s, every_s in tiers:
            version = self.changed_rows(every_s) * self.constants["durable_row_bytes"]
            size += max(0.0, span_s) / every_s * (self.constants["durable_bytes"] + version)
        return size

    @property
    def on_flink(self) -> bool:
        """`--stream flink`, or auto and clicks/s > `stream_most` x use"""
        return self.load.stream == "flink" or (self.load.stream == "auto" and self._local_streams > 1)

    @property
    def _local_streams(self) -> float:
        return self.load.clicks / (self.constants["stream_most"] * self.load.use)

    @property
    def stream_cores(self) -> float:
        """clicks/s x `stream_us`, or x `flink_us` on Flink"""
        return self.load.clicks * self.constants["flink_us" if self.on_flink else "stream_us"] * 1e-6

    @property
    def trainer_cores(self) -> float:
        """clicks/s x `trainer_us` + versions/s x `publish_ms` x changed rows / 10,000"""
        stall_s = self.constants["publish_ms"] * 1e-3 * self.changed_rows(1 / self.load.versions) / 10_000
        return self.load.clicks * self.constants["trainer_us"] * 1e-6 + self.load.versions * stall_s

    @property
    def applier_cores(self) -> float:
        """clicks/s x `applier_us` + versions/s x changed rows x `apply_us`, on each host"""
        rows_s = self.load.versions * self.changed_rows(1 / self.load.versions)
        return (self.load.clicks * self.constants["applier_us"] + rows_s * self.constants["apply_us"]) * 1e-6

    @property
    def worker_cores(self) -> float:
        """answers/s x `lean_us`, `full_us`, `recommend_us` or `explain_us`, over all hosts"""
        return self.load.answers * self.constants[f"{self.load.answer}_us"] * 1e-6

    @property
    def hosts(self) -> int:
        """max(2, worker cores / (cores of a host x use - applier cores))"""
        left = max(1.0, self.load.host_cores * self.load.use - self.applier_cores)
        return max(2, math.ceil(self.worker_cores / left))

    @property
    def partitions(self) -> int:
        """Of the clicks topic: max(4, 2 x clicks/s / (`stream_most` x use)); the training log has one"""
        return max(4, 2 * math.ceil(self._local_streams))

    @property
    def catch_up_s(self) -> float:
        """Retention x clicks/s x `history_us`: a new host reads all of the training log that Kafka keeps"""
        return self.load.retention_h * HOUR_S * self.load.clicks * self.constants["history_us"] * 1e-6

    def parts(self) -> dict[str, Need]:
        """Part -> what an instance uses."""
        load, costs, hosts = self.load, self.constants, self.hosts
        host_bytes = costs["applier_bytes"] + self.host_histories_bytes + self.served_bytes
        cores = self.worker_cores / hosts
        workers = max(1, math.ceil(cores / load.use))
        kept_bytes = (load.clicks * load.click_bytes + self.log_bytes_s) * load.retention_h * HOUR_S
        return {
            STREAM: self._flink() if self.on_flink else self._local_stream(),
            TRAINER: Need(1, self.trainer_cores, costs["trainer_bytes"] + self.table_bytes),
            APPLIER: Need(hosts, self.applier_cores, host_bytes),
            WORKERS: Need(hosts, cores, workers * costs["worker_bytes"]),
            REST: Need(1, load.clicks * costs["validation_us"] * 1e-6, costs["rest_bytes"]),
            KAFKA: Need(load.replication, load.clicks * costs["broker_us"] * 1e-6, BROKER_BYTES, kept_bytes),
            REGISTRY: Need(disk_bytes=self.registry_bytes),
        }

    def _local_stream(self) -> Need:
        store = self.stream_histories_bytes
        cache = min(self.settings.stream.cache_users, self.load.users) * self.settings.features.history * 40
        return Need(1, self.stream_cores, self.constants["stream_bytes"] + cache + store, store)

    def _flink(self) -> Need:
        """A TaskManager as large as a serving host: a Python worker a core, histories twice in memory, three checkpoints."""
        count = max(1, math.ceil(self.stream_cores / (self.load.host_cores * self.load.use)))
        cores, store = self.stream_cores / count, self.stream_histories_bytes / count
        workers_bytes = math.ceil(cores / self.load.use) * self.constants["flink_worker_bytes"]
        return Need(count, cores, self.constants["flink_bytes"] + workers_bytes + 2 * store, 3 * store)

    def orders(self) -> dict[str, Need]:
        """Part -> what to order for all its instances; `all` is the sum."""
        found = {name: need.ordered(self.load.use) for name, need in self.parts().items()}
        return {**found, "all": Need(*(sum(column) for column in zip(*found.values(), strict=True)))}

    def limits(self) -> list[Limit]:
        """All limits, the nearest first."""
        use, kept, costs = self.load.use, self.settings, self.constants
        users, max_users = self.load.users, min(kept.stream.max_users, kept.serving.max_users)
        rows, max_rows = max(users, self.load.items), kept.trainer.max_rows
        host_bytes = self.host_histories_bytes + self.served_bytes
        shards = "hosts with a share of the users (not built)"
        if self.on_flink:
            stream = Limit("buckets of the stream on Flink", self.stream_cores, BUCKETS * use, "cores", "none")
        else:
            most = costs["stream_most"] * use
            stream = Limit("one process of the local stream", self.load.clicks, most, "clicks/s", "`--runner flink`")
        found = [
            stream,
            Limit("one trainer", self.trainer_cores, use, "cores", "several trainers (not built)"),
            Limit("one applier a host", self.applier_cores, use, "cores", shards),
            Limit("leader of the training log", self.log_leader_bytes_s / 1e9, NETWORK_GB_S, "GB/s", shards),
            Limit("catch-up of a new host", self.catch_up_s / HOUR_S, READY_H, "h", "a shorter `kafka.retention_h`"),
            Limit("`max_users`", users, max_users, "users", "a higher setting", False),
            Limit("`trainer.max_rows`", rows, max_rows, "rows", "a higher setting", False),
            Limit("memory of a host", host_bytes / 1e9, MEMORY_GB, "GB", shards, False),
            Limit(
                "memory of the trainer", self.table_bytes / 1e9, MEMORY_GB, "GB", "a lower `trainer.max_rows`", False
            ),
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

Sizes are linear in clicks, which is more than it takes: larger micro-batches cost less a row. U users of whom each is equally active change U (1 - exp(-clicks / U)) rows; items likewise.

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

The stream is {"a job on Flink" if sizing.on_flink else "one local process"}. The clicks topic has {sizing.partitions} partitions, the training log 1 with {number(sizing.log_bytes_s / 1e6)} MB/s. A new host answers after {seconds(sizing.catch_up_s)}.

{table(["", "limit", "share", "ends at", "what helps"], limits)}"""


def as_document(sizing: Sizing) -> dict[str, object]:
    """The answer for a program."""
    orders = {part: need._asdict() for part, need in sizing.orders().items()}
    return {
        "total": orders.pop("all"),
        "parts": orders,
        "stream": "flink" if sizing.on_flink else "local",
        "partitions": {"clicks": sizing.partitions, "training_log": 1},
        "hosts": sizing.hosts,
        "catch_up_s": sizing.catch_up_s,
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
                "Flink" if sizing.on_flink else "local",
                f"{cores:,g}",
                number(memory_bytes / 1e9),
                number(disk_bytes / 1e9),
            ]
            + [str(sizing.partitions), str(sizing.hosts), str(beyond)]
        )
    head = ["clicks/s", "users", "answers/s", "stream", "cores", "memory, GB", "disk, GB"]
    head += ["partitions", "hosts", "limits passed"]
    documented = {name: found.__doc__ for name, found in vars(Sizing).items() if isinstance(found, property)}
    formulas = [[f"`{name}`", formula] for name, formula in documented.items() if formula]
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
