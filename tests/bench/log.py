"""How fast the log is read and loaded, and how soon an acknowledged record is read.

python -m tests.bench.log
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from kafka import KafkaConsumer

from deploy.kafka.broker import Broker
from deploy.kafka.configuration import free_port
from deploy.replay import Sender, ShopperCrowd
from state.config.sections import Kafka
from state.config.settings import Settings
from state.log import Reader, Topics, Writer, client_options
from state.log.bulk import BulkWriter, append_encoded
from tests.bench.report import Figure, report

RECORDS = 200_000


def per_cpu_s(count: int, work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return count / (time.process_time() - start)


def read(settings: Kafka, count: int) -> None:
    with Reader(settings, settings.clicks_topic) as reader:
        found = 0
        while found < count:
            found += sum(len(batch) for batch in reader.poll(1.0))


def read_by_the_client(settings: Kafka, count: int) -> None:
    consumer = KafkaConsumer(settings.clicks_topic, **client_options(settings), auto_offset_reset="earliest")
    found = 0
    while found < count:
        found += sum(map(len, consumer.poll(1000, 10_000).values()))
    consumer.close()


def milliseconds(samples: list[float]) -> tuple[float, float]:
    return float(np.percentile(samples, 50)) * 1000, float(np.percentile(samples, 99)) * 1000


def main() -> None:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as directory, Broker(directory, free_port()) as broker:
        kafka = Kafka(bootstrap_servers=broker.bootstrap_servers)
        settings = Settings(kafka=kafka)
        with Topics(kafka) as topics:
            topics.ensure(kafka.clicks_topic, 4)
            topics.ensure("single", 1)
            topics.ensure("raw", 1)
        shoppers = ShopperCrowd.from_settings(settings, 1, 1000.0, 1_700_000_000_000)
        with Sender(settings) as sender:
            sender.send(shoppers.click(1000))  # compiles the kernels

            def load() -> None:
                for _ in range(RECORDS // 10_000):
                    sender.send(shoppers.click(10_000))

            replayed = per_cpu_s(RECORDS, load)
        keys = [b"user-%d" % (n % 2000) for n in range(10_000)]
        values = [
            b'{"user":"user-%d","item":"i-7","category":"c-3","action":"view","time":17}' % n for n in range(10_000)
        ]
        times, partitions = np.arange(10_000), [0] * 10_000
        with BulkWriter(kafka, "raw") as bulk:

            def append() -> None:
                for _ in range(20):
                    append_encoded(bulk, keys, values, times, partitions)

            appended = per_cpu_s(200_000, append)
        read(kafka, 1000)
        fast = per_cpu_s(RECORDS, lambda: read(kafka, RECORDS))
        slow = per_cpu_s(RECORDS, lambda: read_by_the_client(kafka, RECORDS))
        single = replace(kafka, clicks_topic="single")
        waits, transactions, acknowledged = [], [], []
        with Reader(single, "single") as reader, Writer(single) as writer:
            for _ in range(300):
                start = time.perf_counter()
                writer.send("single", 0, b"k", b"v" * 100)
                writer.flush()
                acked = time.perf_counter()
                while not reader.poll(1.0):
                    pass
                acknowledged.append(acked - start)
                waits.append(time.perf_counter() - acked)
        with Writer(single, "bench") as writer:
            for _ in range(200):
                start = time.perf_counter()
                with writer.transaction():
                    writer.send("single", 0, b"k", b"v" * 100_000)
                transactions.append(time.perf_counter() - start)
        with Topics(single) as topics:
            end = topics.ends("single")[0][1]
        with Reader(single, "single", positions={0: end}) as reader:
            reader.poll(0.5)
            start, cpu = time.perf_counter(), time.process_time()
            while time.perf_counter() - start < 3:
                reader.poll(0.02)
            idle = (time.process_time() - cpu) / 3 * 100
    figures = {
        "records read, whole batches": Figure(fast, "per cpu-s", ">= 500000"),
        "records read, the client's way": Figure(slow, "per cpu-s"),
        "shoppers' clicks made, encoded and sent": Figure(replayed, "per cpu-s"),
        "records appended in whole batches": Figure(appended, "per cpu-s", ">= 500000"),
        "acknowledged to polled p50": Figure(milliseconds(waits)[0], "ms", "<= 5"),
        "acknowledged to polled p99": Figure(milliseconds(waits)[1], "ms"),
        "sent to acknowledged p50": Figure(milliseconds(acknowledged)[0], "ms"),
        "transaction of one 100 kB record p50": Figure(milliseconds(transactions)[0], "ms", "<= 20"),
        "transaction of one 100 kB record p99": Figure(milliseconds(transactions)[1], "ms"),
        "idle reader, poll of 20 ms": Figure(idle, "% of a core", "<= 5"),
    }
    path = report("log", figures)
    print(json.dumps(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
