"""`springtide attributes`: rows become records that the stream takes, and every other row is named and counted."""

from __future__ import annotations

import gzip
import io
import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.attributes import files_of, main, run, send, summary
from deploy.replaying.sender import Piece, Progress
from state.config.loading import load
from state.errors import SettingsError
from state.log import Reader, Topics
from state.process.commands import parser_of
from tests.conftest import KafkaFactory

FLAGS = [
    "--attributes.user_topic=users",
    "--attributes.user_fields=age,level=memberLevel",
    "--attributes.item_topic=items",
    "--attributes.item_fields=brand,price:10|50",
]
Sent = list[tuple[bytes, bytes]]


def sending(words: list[str], *flags: str) -> tuple[Sent, str, str]:
    """The records of a command line, its last line, and what its progress said."""
    (source,) = files_of(parser_of("attributes").parse_args(words), load([*FLAGS, *flags], env={}))
    sent: Sent = []
    said = io.StringIO()

    def deliver(piece: Piece) -> None:
        sent.extend(zip(piece.keys, piece.values, strict=True))

    progress = Progress(said, lambda: 0.0, f"record of a {source.side}", "refused row")
    outcome = send(source, deliver, progress, threading.Event(), lambda: 5)
    return sent, summary(source, outcome, 2.0), said.getvalue()


def rows_of(folder: Path, kind: str) -> Path:
    """The same two users in a file of some kind."""
    path = folder / f"users.{kind}"
    lines = "user,age,more,memberLevel\nada,30-39,x,gold\n7,,y,\n"
    if kind == "csv":
        path.write_text(lines)
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.zst":
        objects = '{"user": "ada", "age": "30-39", "memberLevel": "gold"}\n{"user": 7, "more": [1]}\n'
        path.write_bytes(pa.compress(objects.encode(), codec="zstd", asbytes=True))
    else:
        table = pa.table({"user": ["ada", "7"], "age": ["30-39", None], "memberLevel": ["gold", None], "more": [1, 2]})
        pq.write_table(table, path)
    return path


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl.zst", "parquet"])
def test_each_format_makes_the_records_of_its_rows(kind: str, tmp_path: Path) -> None:
    sent, said, _ = sending(["--users", str(rows_of(tmp_path, kind))])
    assert [key for key, _ in sent] == [b"ada", b"7"]
    assert json.loads(sent[0][1]) == {"age": "30-39", "memberLevel": "gold"}
    assert [value or None for value in json.loads(sent[1][1]).values()] == [None, None]
    assert said == "sent 2 records of users to users in 2.0 s (1 rows/s), 0 refused rows; complete"


def test_a_row_that_the_stream_would_refuse_is_named_counted_and_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text('sku,brand,price\na,acme,5\n,acme,5\nb,acme,much\nc,"acme\nd,acme,12,more\ne,acme,\n')
    sent, said, progress = sending(["--items", str(path), "--item-id", "sku"])
    assert [key for key, _ in sent] == [b"a", b"e"]
    assert "4 refused rows (2 undecodable, 1 empty_id, 1 wrong_type)" in said
    assert [line.removeprefix(f"{path}:").split(": ")[0] for line in progress.splitlines()] == ["3", "4", "5", "6"]


def test_a_field_without_any_value_is_doubted(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text('{"user": "ada", "age": 3, "member_level": 4}\n')
    _, said, _ = sending(["--users", str(path)])
    assert "no record has a value for level: is the field 'memberLevel' spelled so?; complete" in said


def test_a_wrong_mapping_stops_before_anything_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"id": 1, "brand": "acme"}\n' * 12)
    with pytest.raises(SettingsError, match=r"none of the first 12 rows .*12 missing_field.*--item-id; nothing was"):
        sending(["--items", str(path)])


@pytest.mark.usefixtures("undisturbed_signals")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name what to send"),
        (["--users", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--users", "{csv}", "--attributes.user_topic="], "attributes.user_topic names no topic"),
        (["--users", "{csv}", "--items", "{csv}", "--columns", "a,b"], "--columns is for the files of one side"),
        (["--items", "{csv}", "--events.item="], "name the column of the id with --item-id"),
        (["--users", "{csv}", "--attributes.user_fields=town"], "no column 'town'"),
        (["--users", "{csv}", "--user-id", "visitor"], "no column 'visitor'"),
    ],
)
def test_wrong_use_is_exit_code_2_and_one_line(
    kafka_settings: KafkaFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    path = rows_of(tmp_path, "csv")
    line = [*FLAGS, f"--kafka.bootstrap_servers={kafka_settings().bootstrap_servers}"]
    assert main([*line, *(word.format(csv=path) for word in words)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("springtide attributes: ")
    assert message in said


def test_the_records_are_in_a_compacted_topic_that_is_made_where_it_is_missing(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    kafka = kafka_settings()
    topic = f"{kafka.clicks_topic}.users"
    flags = [*FLAGS, f"--kafka.bootstrap_servers={kafka.bootstrap_servers}", f"--attributes.user_topic={topic}"]
    said: list[str] = []
    words = parser_of("attributes").parse_args(["--users", str(rows_of(tmp_path, "parquet"))])
    run(words, load(flags, env={}), threading.Event(), said.append, io.StringIO())
    assert "sent 2 records" in said[0]
    with Topics(kafka) as topics:
        assert sum(end for _, end in topics.ends(topic).values()) == 2
    with Reader(kafka, topic) as reader:
        (batch,) = reader.poll(10.0)
    assert list(batch.keys) == [b"ada", b"7"]
