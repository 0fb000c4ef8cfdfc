"""How fast a recording goes into the topic at full speed.

python -m tests.bench.replay
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deploy.kafka.broker import Broker
from deploy.kafka.configuration import free_port
from deploy.replay import main as replay
from tests.bench.report import Figure, report

ROWS = 300_000
BEGIN_S = 1_700_000_000


def clicks(folder: Path) -> dict[str, Path]:
    """The same clicks in three formats."""
    rows = [
        {
            "user": f"user-{n * 7919 % 20_011}",
            "item": f"item-{n * 104_729 % 50_021}",
            "category": f"category-{n % 997}",
            "action": "view",
            "time": BEGIN_S + n // 10,
        }
        for n in range(ROWS)
    ]
    paths = {name: folder / f"clicks.{name}" for name in ("csv", "jsonl", "parquet")}
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows), ""]
    paths["csv"].write_text("\n".join(lines))
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), paths["parquet"])
    return paths


def main() -> None:
    """Takes and reports the figures."""
    logging.disable(logging.CRITICAL)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as directory, Broker(directory, free_port()) as broker:
        paths = clicks(Path(directory))
        where = [f"--kafka.bootstrap_servers={broker.bootstrap_servers}", f"--paths.state={directory}/state"]
        replay([str(paths["csv"]), "--limit", "1000", *where])  # compiles the kernels
        for name, path in paths.items():
            for sort in ("memory", "assume"):
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                words = [str(path), "--sort", sort, "--restart", f"--kafka.clicks_topic={name}-{sort}"]
                assert replay([*words, *where]) == 0
                wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
                figures[f"{name}, --sort {sort}"] = Figure(ROWS / wall_s, "rows/s")
                figures[f"{name}, --sort {sort}, per cpu"] = Figure(ROWS / cpu_s, "rows/cpu-s")
    report("replay", figures, {"rows": ROWS})


if __name__ == "__main__":
    main()
