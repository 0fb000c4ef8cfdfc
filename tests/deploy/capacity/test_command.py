"""`springtide capacity`: what it prints, what it refuses, and the page that it makes."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import fields

import pytest

from deploy.capacity.command import main
from deploy.capacity.measured import MeasuredCosts
from deploy.capacity.page import page
from state.config.settings import Settings
from tests.manifests import ROOT

PAGE = ROOT / "deploy" / "CAPACITY.md"


def test_the_page_is_the_one_that_the_command_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--markdown", "--model.dim", "64"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), "run: springtide capacity --markdown > deploy/CAPACITY.md"


def test_a_load_is_sized_by_part_with_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--clicks", "200", "--users", "2000", "--items", "4000", "--answers", "100", "--retention-h", "24"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "| stream | 1 |" in told and "| **all** |" in told and "partitions    clicks 4" in told
    assert "BEYOND" not in told and told.count("within") >= 7


def test_a_load_beyond_a_limit_says_which_and_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--clicks", "1e6", "--users", "1e9", "-o", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    beyond = {one["name"] for one in found["limits"] if one["share"] > 1}
    assert "one trainer does one step after another" in beyond
    assert found["total"]["cores"] == sum(one["cores"] for one in found["parts"].values())
    assert found["partitions"] == {"clicks": found["partitions"]["clicks"], "training_log": 1}


def test_max_users_max_rows_and_the_form_of_the_stream_count(capsys: pytest.CaptureFixture[str]) -> None:
    def part(name: str, *words: str) -> dict[str, float]:
        main(["--users", "1e7", "-o", "json", *words])
        found: dict[str, float] = json.loads(capsys.readouterr().out)["parts"][name]
        return found

    assert part("trainer", "--trainer.max_rows", "20000000")["memory_gb"] > part("trainer")["memory_gb"]
    assert part("applier", "--serving.max_users", "100000")["memory_gb"] < part("applier")["memory_gb"]
    assert part("stream", "--stream", "flink")["cores"] > part("stream")["cores"]


def test_figures_of_another_machine_and_settings_take_the_place_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def cores(*words: str) -> int:
        main(["--clicks", "30000", "-o", "json", *words])
        return int(json.loads(capsys.readouterr().out)["parts"]["trainer"]["cores"])

    assert cores("--measured", "trainer_us=5") < cores() < cores("--measured", "trainer_us=100")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clicks", "many"], "'many' is no number above 0"),
        (["--clicks", "-1"], "no number above 0"),
        (["--measured", "speed=1"], "there is no figure speed"),
        (["--measured", "stream_us=fast"], "must be a number above 0"),
        (["--use", "1.5"], "--use is at most 1"),
        (["--stream", "spark"], "invalid choice"),
        (["--cliks", "1"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_every_bench_that_a_figure_names_is_there() -> None:
    modules = {one.metadata["bench"].removeprefix("python -m ") for one in fields(MeasuredCosts)}
    assert len(modules) >= 6
    assert [one for one in modules if importlib.util.find_spec(one) is None] == []


def test_the_page_has_every_figure_and_every_figure_is_in_a_formula() -> None:
    text = page(Settings())
    formulas, _, measured = text.partition("## Measured")
    for one in fields(MeasuredCosts):
        assert f"`{one.name}`" in measured
    in_words = {
        "lean_us",
        "full_us",
        "recommend_us",
        "explain_us",
        "validation_us",
        "broker_us",
        "worker_bytes",
        "beside_bytes",
    }
    named = set(re.findall(r"`(\w+)`", formulas)) | in_words | {"load_bytes_s", "transaction_ms"}
    assert {one.name for one in fields(MeasuredCosts)} <= named
