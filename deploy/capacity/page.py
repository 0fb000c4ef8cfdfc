"""The page of `deploy/CAPACITY.md`, made by `springtide capacity --markdown`: sizes, formulas, figures, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from deploy.capacity.limits import MEMORY_BYTES, NETWORK_BYTES_S, READY_S, limits, most_clicks_s
from deploy.capacity.load import Load
from deploy.capacity.measured import MeasuredCosts
from deploy.capacity.prices import Prices, bills, total
from deploy.capacity.sizes import Sizing
from deploy.capacity.tables import broken, duration, parts, short, size, table, told
from state.config.settings import Settings

EXAMPLES = (
    Load(clicks_s=200, users=2_000, answers_s=100, items=4_000),
    Load(clicks_s=2_000, users=1e6, answers_s=2_000),
    Load(clicks_s=10_000, users=1e6, answers_s=20_000),
    Load(clicks_s=10_000, users=1e7, answers_s=20_000, items=1e6),
    Load(clicks_s=100_000, users=1e8, answers_s=200_000, items=1e7),
    Load(clicks_s=1e6, users=1e9, answers_s=1e6, items=1e8),
)
SHOWN = EXAMPLES[2]

FORMULAS = (
    (
        "stream, cores",
        "clicks/s x `stream_us` in one local process, up to `stream_most` x use clicks/s; beyond that clicks/s x `flink_us`, in "
        "TaskManagers as large as a serving host",
    ),
    (
        "stream, memory",
        "`stream_bytes` + `stream.cache_users` x `features.history` x 40 bytes + its histories; a TaskManager: `flink_bytes` + "
        "`flink_worker_bytes` a core + its histories twice, and three checkpoints of them on the disk",
    ),
    (
        "histories",
        "users, `stream.max_users` or `serving.max_users` at most, x (`user_bytes` + events kept x `event_bytes`); events kept = min(`features.history`, clicks/s x longest window / these users)",
    ),
    ("trainer, cores", "clicks/s x `trainer_us` + versions/s x `publish_ms` x changed rows / 10,000"),
    (
        "trainer, memory",
        "`trainer_bytes` + 2 x (users + items) x (`model.dim` x 4 bytes x 2 + 32); its room doubles when full",
    ),
    (
        "rows",
        "users and items, `trainer.max_rows` of each at most; the sizes above use settings as large as the load",
    ),
    ("changed rows in t seconds", "U (1 - exp(-clicks/s x t / U)) for users U, and likewise for items"),
    (
        "applier, cores",
        "clicks/s x `applier_us` + versions/s x changed rows x `apply_us`, on every host; where the registry is shared, its "
        "requests x `shared_request_us` too",
    ),
    (
        "a shared registry, requests",
        "a host: 2 GET each `registry.look_ms`, less the time that they take, 8 a second at most; the trainer: a PUT and a "
        "DELETE each `registry.share_s`, a GET each `registry.look_ms`, some ten each `registry.durable_s`",
    ),
    (
        "applier, memory",
        "`applier_bytes` + histories + rows x `served_row_bytes`, a row once and once more for each durable version of the "
        "last `serving.keep_s` that changed it",
    ),
    ("workers, cores", "answers/s x the processor time of one; a process for each core x use"),
    ("serving hosts", "max(2, workers' cores / (a host's cores x use - applier's cores))"),
    (
        "a version",
        "`recent_bytes` + changed rows x `recent_row_bytes`; a durable one `durable_bytes` + changed rows x `durable_row_bytes`",
    ),
    (
        "registry, disk",
        "durable versions: each `registry.durable_s` for `delta_keep_s`, each `thin_s` for `base_keep_h`, each `sparse_s` for "
        "`base_keep_d`; and two bases of (users + items) x `base_row_bytes`; `registry.delta_keep_gb` keeps less",
    ),
    (
        "Kafka, disk",
        "clicks/s x (bytes of a click + `log_row_bytes`) x retention, in each of as many brokers as there are copies",
    ),
    (
        "Kafka, network",
        "what is written, once for each copy; clicks read once, the training log by trainer, validation and each host",
    ),
    (
        "Kafka, the leader of the training log",
        "clicks/s x `log_row_bytes` x (1 + the other copies + trainer + validation + hosts)",
    ),
    ("clicks topic, partitions", "two for each `stream_most` x use clicks/s, four at least"),
    ("training log, partitions", "one: its order is the order of the steps"),
    ("a new host, time until it answers", "retention x clicks/s x `history_us`: it reads all of the training log"),
    ("what is ordered", "cores / use, rounded up for each instance; memory and disk with a quarter more"),
)


def page(settings: Settings) -> str:
    """The page, by the settings' defaults and these examples."""
    sizing = Sizing(SHOWN, roomy(settings, SHOWN), MeasuredCosts())
    return "\n".join([*_head(), *_sizes(sizing), *_ends(sizing), *_foot()])


def roomy(settings: Settings, load: Load) -> Settings:
    """The settings with `max_users` and `max_rows` as large as a load asks for."""
    users, rows = int(load.users), int(max(load.users, load.items))
    return replace(
        settings,
        stream=replace(settings.stream, max_users=max(settings.stream.max_users, users)),
        serving=replace(settings.serving, max_users=max(settings.serving.max_users, users)),
        trainer=replace(settings.trainer, max_rows=max(settings.trainer.max_rows, rows)),
    )


def _head() -> list[str]:
    return [
        "# Capacity",
        "",
        "Made by `springtide capacity --markdown > deploy/CAPACITY.md`. It says what a deployment takes, from figures that were "
        "measured on two shared cores, and where it ends. Beyond what was measured it is arithmetic: "
        f"nobody has run more than {short(20_000)} clicks/s here.",
        "",
        "```",
        "$ springtide capacity --clicks 10000 --users 1e6 --answers 20000 --versions 5 --retention-h 168",
        "```",
        "",
        "prints the same for a load of yours; the settings are those in force, `--measured NAME=VALUE` takes a figure of your "
        "machine in place of ours, `--price-core` and its like your prices.",
        "",
    ]


def _sizes(sizing: Sizing) -> list[str]:
    return [
        "## Loads",
        "",
        f"Cores are planned to be used at {sizing.use:.0%}; Kafka keeps {sizing.replication} copies for {SHOWN.retention_h:g} h; a "
        f"click has {SHOWN.click_bytes:g} bytes in Kafka; five versions a second; lean answers. Prices are round numbers and nobody's "
        f"offer: a core {Prices.core:g}, a GB of memory {Prices.memory_gb:g}, of disk {Prices.disk_gb:g} a month, a GB that is "
        f"sent {Prices.network_gb:g}.",
        "",
        *_loads(sizing.settings),
        "",
        "Where a limit is passed, the sizes are what the work takes, not what one part bears (see below). Every host holds all "
        "histories. `max_users` and `max_rows` are at least as large as the load here; the defaults keep "
        f"{short(sizing.settings.stream.max_users)} users and {short(sizing.settings.trainer.max_rows)} rows.",
        "",
        f"## {short(SHOWN.clicks_s)} clicks/s of {short(SHOWN.users)} users, by part",
        "",
        *parts(sizing, Prices()),
        "",
    ]


def _ends(sizing: Sizing) -> list[str]:
    return [
        "## Where it ends",
        "",
        f"Of the load above, what is asked of each part that there is one of. A machine here has at most {size(MEMORY_BYTES)} of memory "
        f"and a network of {size(NETWORK_BYTES_S)}/s, and a start may take {duration(READY_S)}.",
        "",
        *_limits(sizing),
        "",
        *_next(sizing.settings),
        "",
    ]


def _foot() -> list[str]:
    return [
        "## Formulas",
        "",
        *table(["what", "formula"], FORMULAS),
        "",
        "All is linear in the clicks, which is more than it takes: larger micro-batches cost less a row. Users are taken as equally "
        "active; where some click more, fewer rows change.",
        "",
        "## Measured",
        "",
        *_measured(),
        "",
        "The work of a version in the trainer, and of a row in the applier, were measured alone; the rest of what these processes take in "
        "the soak is put on the clicks. A GPU, several machines, an object store under load and Kafka on disks of its own were not "
        "measured.",
    ]


def _loads(settings: Settings) -> list[str]:
    head = [
        "clicks/s",
        "users",
        "answers/s",
        "stream",
        "cores",
        "memory",
        "disk",
        "network",
        "partitions",
        "hosts",
        "cost a month",
    ]
    rows = []
    for load in EXAMPLES:
        sizing = Sizing(load, roomy(settings, load), MeasuredCosts())
        one = total(bills(sizing, Prices()))
        figures = [short(load.clicks_s), short(load.users), short(load.answers_s), f"{one.cores:,}"]
        figures.insert(3, "Flink" if sizing.on_flink else "local")
        figures += [size(one.memory_gb * 1e9), size(one.disk_gb * 1e9), f"{size(one.network_mb_s * 1e6)}/s"]
        rows.append([*figures, str(sizing.partitions), str(sizing.hosts), f"{one.cost:,.0f}", str(len(broken(sizing)))])
    return table([*head, "limits passed"], rows)


def _limits(sizing: Sizing) -> list[str]:
    rows = [
        [one.name, told(one), f"{one.share:.2g}", short(most_clicks_s(sizing, one.name)), one.then]
        for one in limits(sizing)
    ]
    return table(["limit", "asked of it", "share", "ends at clicks/s", "what helps"], rows)


def _next(settings: Settings) -> Sequence[str]:
    first = limits(Sizing(replace(SHOWN, retention_h=1.0), settings, MeasuredCosts()))[0]
    far = Sizing(EXAMPLES[-1], roomy(settings, EXAMPLES[-1]), MeasuredCosts())
    shards = far.applier_cores / far.use
    return [
        f"With an hour of training log, so that a new host is ready soon, the first limit is: {first.name}. At "
        f"{short(far.load.clicks_s)} clicks/s of {short(far.load.users)} users the work of the applier would take {short(shards)} hosts, "
        "each with a share of the users. That is the next step of the design, and not built:",
        "",
        "1. The training log in partitions by the user's hash, a stream's bucket each. Places are already (topic, partition, "
        "offset, bucket, buckets), so that trainer and hosts trim what comes twice as today.",
        "2. A trainer a partition, with the user rows of its share; rows of items, categories and what came next are owned by a hash "
        "and sent as deltas, as they go to serving today; dense weights by one of them, or averaged at log positions, so that weights "
        "stay a function of the logs.",
        "3. A version is then a set of shards with one number, complete when all are there; control and rollback stay as they are.",
        "4. Hosts of a share of the users, asked by the user's hash; rows of items on all.",
        "",
        "Several trainers on one log are trials of other settings, and share nothing.",
    ]


def _measured() -> list[str]:
    now = MeasuredCosts()
    rows = [
        [
            f"`{one.name}`",
            f"{getattr(now, one.name):,.10g} {one.metadata['unit']}",
            one.metadata["means"],
            f"`{one.metadata['bench']}`",
        ]
        for one in fields(MeasuredCosts)
    ]
    return table(["figure", "value", "what it is", "measured by"], rows)
