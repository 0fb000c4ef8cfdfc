"""How large everything is at the end of a day, and whether it stays so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from state.disk.lmdb_store import LmdbStore
from state.layout import CONTROL, DATA
from tests.bench.year.chain import Chain
from tests.memory_log import MemoryLog

POPULAR = "trainer.popular"


def of(chain: Chain) -> dict[str, float]:
    """All sizes by name; a name that ends in `file` or begins with `process` only grows until it was once enough."""
    trainer, settings = chain.trainer, chain.settings
    found: dict[str, float] = {}
    for name, table in trainer.tables.items():
        found |= {f"table.{name}.rows": len(table), f"table.{name}.pending": table.pending}
        found[f"table.{name}.room"] = table.capacity
    found[POPULAR] = trainer.popular.state()["ids"].size
    state = settings.state_dir
    stores: Mapping[str, LmdbStore] = {
        "stream.histories": chain.stream.context.store,
        "serving.histories": chain.serving.histories,
        "serving.rows": chain.serving.rows,
    }
    for name, store in stores.items():
        found |= {f"{name}.bytes": live_bytes(store), f"{name}.file": (store.path / DATA).stat().st_size}
        found |= {f"{name}.{part}": count for part, count in entries(store).items()}
    found["registry.bytes"] = sum(one.stat().st_size for one in _files(settings.registry_dir))
    found["registry.files"] = len(_files(settings.registry_dir)) - len(_files(settings.registry_dir / CONTROL))
    found["state.files"] = len(_files(state))
    for topic in (settings.kafka.clicks_topic, settings.kafka.microbatches_topic):
        found |= {f"topic.{topic}.{name}": size for name, size in topic_sizes(chain.log, topic).items()}
    return found | process()


def process() -> dict[str, float]:
    """This process: resident bytes that are no file's (the stores' pages are), descriptors and threads."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    resident = 1024 * int(line.split()[1])
    return {
        "process.resident": resident,
        "process.descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "process.threads": len(list(Path("/proc/self/task").iterdir())),
    }


def topic_sizes(log: MemoryLog, topic: str) -> dict[str, float]:
    """Records that are kept, and their bytes."""
    kept = log.records(topic)
    return {"records": len(kept), "bytes": sum(len(one.value or b"") for one in kept)}


def live_bytes(store: LmdbStore) -> int:
    """Bytes of the pages in use: what is free in the file is used again."""
    with store._env.begin() as transaction:
        stats = [transaction.stat(database) for database in store._databases.values()]
    return sum(stat["psize"] * (stat["leaf_pages"] + stat["branch_pages"] + stat["overflow_pages"]) for stat in stats)


def entries(store: LmdbStore) -> dict[str, int]:
    """Entries of each of the store's databases."""
    with store._env.begin() as transaction:
        return {name: transaction.stat(database)["entries"] for name, database in store._databases.items()}


def growth(days: Sequence[Mapping[str, float]], early: slice, late: slice) -> dict[str, float]:
    """By name the mean of the late days over that of the early ones, where there was something; 1 is flat."""
    found = {}
    for name in days[-1]:
        before, after = (float(np.mean([day[name] for day in days[part]])) for part in (early, late))
        if before > 0 or after > 0:
            found[name] = after / before if before > 0 else float("inf")
    return found


def only_grows(name: str) -> bool:
    """Whether a size has a high-water mark of its own, which the flood may raise once.

    So have the pages of a store: they are full at first, and as rows come and go they settle at two thirds.
    """
    of_store = name.endswith(".bytes") and not name.startswith(("topic.", "registry."))
    return of_store or name.endswith((".file", ".room")) or name.startswith("process.")


def _files(path: Path) -> list[Path]:
    return [one for one in path.rglob("*") if one.is_file()]
