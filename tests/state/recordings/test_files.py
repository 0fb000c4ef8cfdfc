"""Files of clicks: every format gives the same rows, and no damage to one row or file is silent."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from state.config.sections import Events
from state.errors import SettingsError, SpringtideError
from state.recordings.files import RecordedFile, Recording, constants_of, csv_rows, find, json_rows
from state.recordings.rows import RecordedRows

FIELDS = ("user", "item", "time")
CLICKS = [{"user": f"u{number}", "item": f"i{number}", "time": 1_700_000_000 + number} for number in range(50)]


def cells(chunks: list[RecordedRows], fields: tuple[str, ...] = FIELDS) -> list[tuple[Any, ...]]:
    """The rows of all chunks; a broken one is its text."""
    found: list[tuple[Any, ...]] = []
    for rows in chunks:
        for row in range(len(rows)):
            found.append((rows.text(row),) if row in rows.broken else tuple(rows.columns[name][row] for name in fields))
    return found


def read_csv(text: bytes, fields: tuple[str, ...] = FIELDS, **options: Any) -> list[RecordedRows]:
    return list(csv_rows(io.BytesIO(text), RecordedFile(Path("clicks.csv"), "csv"), fields, **options))


def as_csv(header: bool = True, delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    if header:
        writer.writerow(FIELDS)
    writer.writerows(click.values() for click in CLICKS)
    return text.getvalue().encode()


def as_json() -> bytes:
    return b"".join(json.dumps(click | {"like": 1}).encode() + b"\n" for click in CLICKS)


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(CLICKS), sink)
    return sink.getvalue()


WRITTEN: dict[str, bytes] = {
    "clicks.csv": as_csv(),
    "clicks.tsv": as_csv(delimiter="\t"),
    "clicks.csv.gz": gzip.compress(as_csv()),
    # Two members one after another, as `cat a.gz b.gz` makes them.
    "clicks.jsonl.gz": gzip.compress(as_json()[:500]) + gzip.compress(as_json()[500:]),
    "clicks.json": as_json(),
    "clicks.ndjson.zst": zstandard.compress(as_json()[:500]) + zstandard.compress(as_json()[500:]),
    "clicks.jsonl.bz2": bz2.compress(as_json()),
    "clicks.parquet": as_parquet(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_and_compression_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WRITTEN[name])
    chunks = list(Recording(find([str(path)])).rows(0, FIELDS, chunk_rows=7))
    assert [len(rows) for rows in chunks] == [7] * 7 + [1]
    assert [(user, item, int(time)) for user, item, time in cells(chunks)] == [
        tuple(click.values()) for click in CLICKS
    ]
    first_line = 1 if "csv" not in name and "tsv" not in name else 2
    assert [line for rows in chunks for line in rows.lines.tolist()] == list(range(first_line, first_line + 50))


@pytest.mark.parametrize("name", ["clicks.csv.gz", "clicks.ndjson.zst", "clicks.jsonl.bz2", "clicks.parquet"])
def test_a_cut_file_is_named_and_never_taken_for_its_end(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WRITTEN[name][:-40])
    with pytest.raises(SpringtideError, match=name):
        list(Recording(find([str(path)])).rows(0, FIELDS))


def test_a_file_without_a_header_has_the_columns_that_are_named() -> None:
    text = as_csv(header=False)
    assert cells(read_csv(text, columns=FIELDS)) == cells(read_csv(as_csv()))
    # A header that says the same is a header.
    assert cells(read_csv(as_csv(), columns=FIELDS)) == cells(read_csv(as_csv()))
    assert cells(read_csv(text, ("time",), columns=("-", "-", "time")), ("time",))[0] == ("1700000000",)
    with pytest.raises(SettingsError, match="3 columns, but --columns names 2"):
        read_csv(text, columns=("user", "item"))


def test_broken_lines_stay_rows_and_spoil_no_other() -> None:
    text = b'user,item,time\r\na,b,1\r\ncut,off\r\n\r\ntoo,many,2,3\r\nwrong,"quote,4\r\n\xff,bytes,5\r\n"q,1",b,6\r\nlast,row,7'
    (rows,) = read_csv(text)
    assert cells([rows]) == [
        ("a", "b", "1"),
        (b"cut,off",),
        (b"too,many,2,3",),
        (b'wrong,"quote,4',),
        (b"\xff,bytes,5",),
        ("q,1", "b", "6"),
        ("last", "row", "7"),
    ]
    assert rows.lines.tolist() == [2, 3, 5, 6, 7, 8, 9]


def test_a_byte_order_mark_is_no_part_of_a_name() -> None:
    assert cells(read_csv(b"\xef\xbb\xbfuser,item,time\na,b,1\n")) == [("a", "b", "1")]
    (rows,) = json_rows(io.BytesIO(b'\xef\xbb\xbf{"user": 1}\n'), "x", ("user",))
    assert cells([rows], ("user",)) == [(1,)]


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.tuples(CELL.filter(bool), CELL, CELL), max_size=12))
def test_what_a_csv_writer_wrote_is_read_back(rows: list[tuple[str, str, str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(FIELDS)
    writer.writerows(rows)
    assert cells(read_csv(text.getvalue().encode())) == rows


@given(st.binary(max_size=200))
def test_no_bytes_are_an_exception(data: bytes) -> None:
    chunks = read_csv(b"user,item,time\n" + data)
    lines = [line for line in data.split(b"\n") if line.rstrip(b"\r").strip(b" ")]
    # Only a quoted field may take several lines.
    assert sum(map(len, chunks)) == len(lines) or b'"' in data
    chunks = list(json_rows(io.BytesIO(b"{}\n" + data), "x", FIELDS))
    assert sum(map(len, chunks)) == 1 + sum(1 for line in data.split(b"\n") if line.strip())


def test_json_lines_that_are_no_objects_are_broken_rows() -> None:
    text = b'{"user": "a"}\n{"user": \n[1]\n7\n{"user": NaN}\n{"user": {"deep": 1}}\n'
    (rows,) = json_rows(io.BytesIO(text), "x", ("user",))
    assert cells([rows], ("user",)) == [("a",), (b'{"user":',), (b"[1]",), (b"7",), (b'{"user": NaN}',), ({"deep": 1},)]
    with pytest.raises(SettingsError, match="JSON array"):
        list(json_rows(io.BytesIO(b'[{"user": 1}]'), "x", ("user",)))


def parquet(tmp_path: Path, **columns: pa.Array) -> RecordedFile:
    path = tmp_path / "odd.parquet"
    pq.write_table(pa.table(columns), path)
    return find([str(path)])[0]


def test_parquet_types_become_what_json_has(tmp_path: Path) -> None:
    moment = datetime(2022, 4, 25, 1, 2, 3, 456000, tzinfo=UTC)
    file = parquet(
        tmp_path,
        user=pa.array([7.0, None, float("nan")]),
        item=pa.array(["a", "b", "a"]).dictionary_encode(),
        time=pa.array([moment] * 3, pa.timestamp("ns", "UTC")),
    )
    chunks = list(Recording((file,)).rows(0, FIELDS))
    assert cells(chunks) == [(7, "a", moment), (None, "b", moment), (None, "a", moment)]


def test_globs_files_and_formats(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c.tsv", "d.log"):
        (tmp_path / name).touch()
    found = find([str(tmp_path / "*.csv"), str(tmp_path / "a.csv"), str(tmp_path / "c.tsv")])
    assert [file.path.name for file in found] == ["a.csv", "b.csv", "c.tsv"]
    assert [file.delimiter for file in found] == [",", ",", "\t"]
    (log,) = find([str(tmp_path / "d.log")], "json")
    assert log.format == "json"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: find([str(folder / "*.csv")]), "no such file"),
        (lambda folder: find([str(folder)]), "no file; name files"),
        (lambda folder: find([str(folder / "x.log")]), "--format"),
        (lambda _: constants_of(["action"], Events()), "FIELD=VALUE"),
        (lambda _: constants_of(["colour=red"], Events()), "no field 'colour'"),
    ],
)
def test_wrong_use_is_named(tmp_path: Path, call: Callable[[Path], object], message: str) -> None:
    (tmp_path / "x.log").touch()
    with pytest.raises(SettingsError, match=message):
        call(tmp_path)
