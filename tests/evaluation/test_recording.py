"""What `springtide evaluate` takes of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluation.recording import RecordedEvents, RecordLimits, read_files
from state.config.loading import load
from state.recordings.files import Recording, find

BEGIN_S = 1_600_000_000
HALF_DAY_S = 43_200
ROWS = 730  # a year


def read(folder: Path, rows: list[str], sort: str = "memory") -> tuple[RecordedEvents, list[str]]:
    """The events, and the messages."""
    path, said = folder / "clicks.csv", list[str]()
    path.write_text("\n".join(["user,item,category,action,time", *rows, ""]))
    recording = Recording(find([str(path)]))
    return read_files(load([], env={}), recording, sort, RecordLimits(), said.append), said


def year() -> list[str]:
    return [f"u{n % 9},i{n % 7},c,view,{BEGIN_S + n * HALF_DAY_S}" for n in range(ROWS)]


@pytest.mark.parametrize("sort", ["memory", "assume"])
def test_a_year_of_clicks_is_taken_whole(tmp_path: Path, sort: str) -> None:
    events, said = read(tmp_path, year(), sort)
    assert (len(events), events.refused.total(), said) == (ROWS, 0, [])
    assert np.array_equal(events.column("at_ms"), 1000 * (BEGIN_S + HALF_DAY_S * np.arange(ROWS)))


@pytest.mark.parametrize("sort", ["memory", "assume"])
def test_strays_of_a_year_of_clicks_are_left_out_and_a_warning_says_how_many_rows_are(
    tmp_path: Path, sort: str
) -> None:
    strays = ["u,i,c,view,0", f"u,i,c,view,{BEGIN_S + 420 * 86_400}", "u,i,c,view,4000000000"]
    events, said = read(tmp_path, [*strays[:1], *year(), *strays[1:]], sort)
    assert (len(events), dict(events.refused)) == (ROWS, {"implausible_time": 3})
    assert said == [
        f"WARNING: {tmp_path}/clicks.csv:2 and others: 2 rows of 732 are left out: their times (1970-01-01T00:00:00Z to "
        "2021-11-07T12:26:40Z) are more than 30 days from the rest (2020-09-13T12:26:40Z to 2021-09-13T00:26:40Z); "
        "a larger events.max_age_s takes them",
        "WARNING: 0.41 % of the rows are left out: 3 dead letters (3 implausible_time)",
    ]


def test_no_warning_is_given_for_a_row_in_a_thousand(tmp_path: Path) -> None:
    rows = [f"u{n % 9},i,c,view,{BEGIN_S + n}" for n in range(1999)]
    events, said = read(tmp_path, [*rows, "u,i,c,stare,1600000000"])
    assert (len(events), dict(events.refused), said) == (1999, {"unknown_action": 1}, [])
