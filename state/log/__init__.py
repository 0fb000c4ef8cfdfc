"""Access to the log: topics, reads by position, acknowledged writes; in Kafka (`cluster`) or in memory (`memory`).

    contract     the interfaces Log, LogTopics, LogReader, LogWriter; records
    plan         how each topic is created: partitions, retention, largest record
    topics       creates and describes topics; their ends, positions of groups
    reader       partitions as columns, by position; chunks, batch_decoder, hook, plain, truncation, leader_epochs
    writer       acknowledged records, transactions
    bulk         whole record batches, for load generators; batch_encoder
    gaps         losses that an operator accepts; gap_options, accepted_gaps
    failures     one function per kind of error

Only the files of this package import the Kafka client.
"""

from __future__ import annotations

from state.log.bulk import BulkWriter, append_encoded
from state.log.client import client_options
from state.log.cluster import KafkaLog
from state.log.contract import Log, LogReader, LogTopics, LogWriter
from state.log.memory import MemoryLog
from state.log.partitioner import partition_of
from state.log.reader import Reader
from state.log.records import PartitionBatch, TopicInfo
from state.log.topics import Topics
from state.log.writer import Writer

KERNELS = "state.log.batch_decoder"
"""The module with the kernels of a reader; imported late, since it loads the compiler."""

__all__ = [
    "KERNELS",
    "BulkWriter",
    "KafkaLog",
    "Log",
    "LogReader",
    "LogTopics",
    "LogWriter",
    "MemoryLog",
    "PartitionBatch",
    "Reader",
    "TopicInfo",
    "Topics",
    "Writer",
    "append_encoded",
    "client_options",
    "partition_of",
]
