"""The command `springtide segments`, and the users who are like the members of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.segments import command
from deploy.segments.lookalikes import HELD_BACK, UserVectors, nearest, precision_curve, similarities
from state.layout import SEGMENTS, SERVING
from state.segments import Membership, SegmentStore

NAMED = ("--segments.expressions", "busy=events.visible > 1")


@pytest.fixture
def state(tmp_path: Path) -> list[str]:
    """Flags of a state directory in which two users are in a segment."""
    store = SegmentStore(tmp_path / SERVING / SEGMENTS, 1 << 24)
    store.commit({("busy", user): Membership(1_800_000_000_123, 7) for user in (0xAB, 0x1)})
    store.close()
    return ["--paths.state", str(tmp_path), *NAMED]


def test_members_are_listed_and_exported(state: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list", *state]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["busy", "2", "events.visible", ">", "1"]
    file = tmp_path / "members.parquet"
    assert command.main(["export", "busy", "--to", str(file), *state]) == 0
    rows = pyarrow.parquet.read_table(file).to_pylist()
    assert [(row["pseudonym"], row["version"]) for row in rows] == [(f"{user:016x}", 7) for user in (0x1, 0xAB)]
    assert {row["since"].isoformat() for row in rows} == {"2027-01-15T08:00:00.123000+00:00"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["export", "nobody", "--to", "x.parquet"], 2, "there is no segment nobody; name one of busy"),
        (["list"], 1, "cannot be opened"),
        (["lookalikes", "busy"], 1, "cannot be opened"),
        (["export", "busy"], 2, "--to"),
        (["list", "--segments.expressions", "busy=views > 1"], 2, "segment busy, column 1: views is no feature"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([words[0], "--paths.state", str(tmp_path), *NAMED, *words[1:]]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_export_that_fails_leaves_the_file_of_before(tmp_path: Path) -> None:
    def some() -> Iterator[pa.RecordBatch]:
        yield pa.record_batch([pa.array(["0" * 16]), pa.array([0.5], pa.float32())], schema=command.LOOKALIKES)
        raise OSError(28, "No space left on device")

    file = tmp_path / "there.parquet"
    file.write_bytes(b"before")
    with pytest.raises(OSError, match="No space"):
        command.write(file, command.LOOKALIKES, some(), lambda done: None)
    assert [path.name for path in tmp_path.iterdir()] == ["there.parquet"] and file.read_bytes() == b"before"


def made(seed: int, users: int, width: int = 4) -> tuple[UserVectors, Any]:
    """Users whose vectors are drawn, of whom some are members."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(10_000, users, replace=False)).astype(np.uint64)
    vectors = rng.normal(0, 1, (users, width)).astype(np.float32)
    members = rng.random(users) < 0.5
    members[0] = True
    return UserVectors(ids, vectors, rng.integers(0, 9, users), 7), members


def cosine(one: Any, other: Any) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), users=st.integers(2, 30))
def test_a_similarity_is_the_mean_cosine_with_the_members(seed: int, users: int) -> None:
    found, members = made(seed, users)
    vectors = found.vectors.astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    wanted = [np.mean([cosine(one, other) for other in centred[members]]) for one in centred]
    assert np.allclose(similarities(found.vectors, members), wanted, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), users=st.integers(2, 60), most=st.integers(1, 80))
def test_the_nearest_are_no_members_and_in_order(seed: int, users: int, most: int) -> None:
    found, members = made(seed, users)
    near = nearest(found, members, most)
    assert len(near) == min(most, int((~members).sum()))
    assert not {user for user, _ in near} & {*found.users[members].tolist()}
    scores = [score for _, score in near]
    assert scores == sorted(scores, reverse=True)
    others = similarities(found.vectors, members)[~members]
    assert np.allclose(scores, np.sort(others)[::-1][: len(near)])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_precision_curve_counts_members_that_are_held_back(seed: int) -> None:
    found, members = made(seed, 200)
    curve = precision_curve(found, members, (1, 5, 20, 1000))
    held = {user for user, within in zip(found.users.tolist(), members, strict=True) if within and not user % HELD_BACK}
    if len(held) < 10:
        assert curve == []
        return
    given_members = members & ~np.isin(found.users, [*held])
    scores = similarities(found.vectors, given_members)
    order = [place for place in np.argsort(-scores, kind="stable").tolist() if not given_members[place]]
    assert [one.k for one in curve] == [1, 5, 20]
    for one in curve:
        assert one.lookalikes == sum(int(found.users[place]) in held for place in order[: one.k]) / one.k
        assert one.chance == len(held) / len(order)
