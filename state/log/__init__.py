"""The one door to Kafka: topics, reading by position, writing acknowledged.

    Topics        made, described, their ends, positions of groups   log_topics.py
    Reader        partitions as columns, by position                 log_reader.py
    Writer        acknowledged records, transactions                 log_writer.py
    BulkWriter    whole record batches, for load generators          log_writer.py

Only the files state/log*.py import the Kafka client.
"""

from __future__ import annotations

from state.log.batches import encode_batch
from state.log.client import client_options
from state.log.reader import PartitionBatch, Reader
from state.log.topics import TopicInfo, Topics
from state.log.writer import BulkWriter, Writer, append_encoded, partition_of

__all__ = [
    "BulkWriter",
    "PartitionBatch",
    "Reader",
    "TopicInfo",
    "Topics",
    "Writer",
    "append_encoded",
    "client_options",
    "encode_batch",
    "partition_of",
]
