"""Segments of the running loop: who clicks comes in and leaves, and the topic, REST and an export say the same."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet

from deploy.segments import command
from state.events.identity import load_salt, user_id
from state.log import Reader, Topics
from state.segments import key_of, membership_of
from tests.e2e.running import Loop, until

SEGMENT = "collectors"
USER, ERASED = "cora-of-the-stamps", "earl-of-the-stamps@example.org"


def of_user(loop: Loop, user: str, segment: str = SEGMENT) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        status, found = loop.get(f"/v1/segments/{segment}/users/{user}")
        assert status in (0, 200, 503), found
        return found if status == 200 else None

    return until(look, "members are not told")


def last(loop: Loop, user: str) -> tuple[int, bytes | None]:
    """How many records of a member the topic has, and the newest."""
    kafka, topic = loop.settings.kafka, loop.settings.segments.topic
    key = key_of((SEGMENT, user_id(load_salt(loop.settings.salt_path), user)))
    with Topics(kafka) as topics:
        end = topics.ends(topic)[0][1]
    values: list[bytes | None] = []
    with Reader(kafka, topic, [0]) as reader:
        while reader.position(0) < end:
            for batch in reader.poll(0.1):
                values += [value for one, value in zip(batch.keys, batch.values, strict=True) if one == key]
    return len(values), values[-1] if values else None


def segments(loop: Loop, *words: str) -> Any:
    """What `springtide segments` says, without the start of a process each time."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert command.main([*words, "-o", "json", *loop.flags]) == 0
    return json.loads(said.getvalue())


def exported(loop: Loop, file: Path) -> dict[str, Any]:
    """Rows of the export by pseudonym."""
    told = segments(loop, "export", SEGMENT, "--to", str(file))
    rows = pyarrow.parquet.read_table(file).to_pylist()
    assert told == {"segment": SEGMENT, "file": str(file), "users": len(rows)}
    return {row["pseudonym"]: row for row in rows}


def test_who_clicks_comes_in_and_who_buys_leaves(loop: Loop, tmp_path: Path) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    until(lambda: loop.get("/v1/segments")[0] == 200, "the members are not kept")
    assert not of_user(loop, USER)["in"]
    loop.click([(USER, f"stamp-{n}", "stamps", "view") for n in range(4)])
    begin_s = time.monotonic()
    found = until(lambda: (one := of_user(loop, USER))["in"] and one, "the shopper is not in the segment")
    print(f"in the segment {time.monotonic() - begin_s:.2f} s after the clicks")
    # The page, the topic and an export say the same of the member.
    pseudonym = f"{user_id(load_salt(loop.settings.salt_path), USER):016x}"
    page = loop.get(f"/v1/segments/{SEGMENT}?from={pseudonym}&n=1")[1]
    assert page["members"] == [
        {"pseudonym": pseudonym} | {name: found[name] for name in ("since", "since_ms", "version")}
    ]
    written = membership_of(last(loop, USER)[1])
    assert written is not None and [*written] == [found["since_ms"], found["version"]]
    row = exported(loop, tmp_path / "members.parquet")[pseudonym]
    assert (round(1000 * row["since"].timestamp()), row["version"]) == (found["since_ms"], found["version"])
    listed, _ = segments(loop, "list")
    assert listed["size"] >= 1 and listed["expression"] == page["expression"]
    # Bought: out everywhere.
    loop.click([(USER, "stamp-1", "stamps", "purchase")])
    until(lambda: not of_user(loop, USER)["in"], "the shopper is still in the segment")
    records, value = last(loop, USER)
    assert records >= 2 and value is None
    assert pseudonym not in exported(loop, tmp_path / "members.parquet")


def test_churn_of_a_profile_decides(loop: Loop) -> None:
    """Whoever's profile says how probable it is that they leave is in the segment that asks for it."""

    def is_in() -> bool:
        loop.click([("ada-who-stays", "stamp-1", "stamps", "view")])
        profile = loop.profile("ada-who-stays")
        return profile is not None and "churn" in profile and bool(of_user(loop, "ada-who-stays", "asked")["in"])

    until(is_in, "the shopper is not in the segment")
