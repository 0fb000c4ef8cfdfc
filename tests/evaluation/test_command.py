"""`springtide evaluate` over a small recording, and what it refuses."""

from __future__ import annotations

import json
import signal
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.replaying import news
from evaluation.command import main
from evaluation.report import Evaluation

CLICKS, LAST = 6000, 3000
NEWS = ("--readers", "300", "--repeat", "0.1", "--articles-a-day", "150", "--fades-h", "1.5", "--ends-h", "6")
BASELINES = {
    "popular so far",
    "popular now (30m)",
    "popular now (6h)",
    "popular now (1d)",
    "last category",
    "own items",
    "item-kNN",
}


@pytest.fixture(scope="module", autouse=True)
def undisturbed_signals() -> Iterator[None]:
    """Puts back the signal handlers that `main` sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "news.jsonl"
    assert news.main([str(path), "--clicks", str(CLICKS), *NEWS]) == 0
    return path


@pytest.fixture(scope="module")
def evaluated(recording: Path) -> tuple[Evaluation, Path]:
    """The result of one run, and its chart."""
    json_file, chart = recording.with_suffix(".json"), recording.with_suffix(".svg")
    options = ["--last", str(LAST), "--requests", "500", "--json", str(json_file), "--chart", str(chart)]
    assert main([str(recording), *options]) == 0
    return msgspec.json.decode(json_file.read_bytes(), type=Evaluation), chart


def figures(evaluation: Evaluation, task: str, table: int = 0) -> dict[str, dict[str, float | None]]:
    """By predictor and measure the figures of a table."""
    scores = getattr(evaluation, task)[table].scores
    return {score.name: {name: figure.value for name, figure in score.figures.items()} for score in scores}


def test_the_last_clicks_are_evaluated_and_all_are_learned(evaluated: tuple[Evaluation, Path]) -> None:
    found, _ = evaluated
    assert (found.recording["events"], found.evaluated["events"]) == (CLICKS, LAST)
    assert [table.rows for table in found.interests] == [LAST, found.interests[1].rows, CLICKS]
    assert 400 < found.recommendation[0].rows < 600
    assert not found.engagement


def test_each_task_has_its_baselines_and_paired_differences(evaluated: tuple[Evaluation, Path]) -> None:
    found, _ = evaluated
    assert {*figures(found, "interests")} == {
        "springtide",
        "popular so far",
        "popular now (1h)",
        "previous category",
    }
    items = figures(found, "recommendation")
    assert {*items} == {"springtide", *BASELINES}
    ours = items["springtide"]
    for score in found.recommendation[0].scores[1:]:
        for measure, difference in score.difference.items():
            theirs = score.figures[measure].value
            assert theirs is not None and difference.value == pytest.approx((ours[measure] or 0.0) - theirs)
            assert difference.interval is not None and difference.interval >= 0.0


def test_the_model_learns_and_baselines_find_what_is_theirs(evaluated: tuple[Evaluation, Path]) -> None:
    found, _ = evaluated
    top1 = {name: one["top1"] or 0.0 for name, one in figures(found, "interests").items()}
    assert top1["springtide"] > top1["popular so far"]
    abouts = {table.about: number for number, table in enumerate(found.recommendation)}
    unseen = figures(
        found, "recommendation", abouts["clicks on items that are new to the user, with exclude=clicked,shown"]
    )
    # Then no list has an item that the user had before.
    assert unseen["own items"]["recall@20"] == 0.0
    assert (unseen["popular now (6h)"]["recall@20"] or 0.0) > 0.1


def test_recommendations_beat_what_is_popular_now(evaluated: tuple[Evaluation, Path]) -> None:
    found, _ = evaluated
    tables = {table.about: table for table in found.recommendation}
    for about in ("all clicks", "clicks on items that are new to the user, with exclude=clicked,shown"):
        for score in tables[about].scores:
            if score.name.startswith("popular"):
                difference = score.difference["recall@20"]
                assert (difference.value or 0.0) > (difference.interval or 1.0), (about, score)


def test_sources_account_for_all_recommended_items_and_hits(evaluated: tuple[Evaluation, Path]) -> None:
    found, _ = evaluated
    table, recall = found.recommendation[0], figures(found, "recommendation")["springtide"]["recall@20"]
    assert recall is not None
    assert sum(source.hits for source in found.sources.values()) == round(recall * table.rows)
    assert 0 < sum(source.listed for source in found.sources.values()) <= 20 * table.rows


def test_an_ablation_says_what_each_source_adds(evaluated: tuple[Evaluation, Path]) -> None:
    found, _ = evaluated
    abouts = {table.about: number for number, table in enumerate(found.recommendation)}
    about = "all clicks, without one source of candidates and with the same weights"
    recalls = {name: one["recall@20"] or 0.0 for name, one in figures(found, "recommendation", abouts[about]).items()}
    ours = recalls.pop("springtide")
    assert ours == figures(found, "recommendation")["springtide"]["recall@20"]
    # This stream has no context fields.
    assert recalls["without context"] == pytest.approx(ours, abs=0.01)
    assert min(recalls.values()) < ours - 0.02


def test_the_chart_draws_each_predictor(evaluated: tuple[Evaluation, Path]) -> None:
    _, chart = evaluated
    tree = ET.fromstring(chart.read_text())
    texts = {element.text for element in tree.iter() if element.tag.endswith("text")}
    assert {"springtide", *BASELINES, "next item: recall@20 (%)", "next category: top-5 (%)"} <= texts


def test_impressions_with_context_and_attributes_give_tables_of_engagement(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    impressions, items = tmp_path / "shown.jsonl", tmp_path / "items.csv"
    lines = [
        {"user": f"u{n % 30}", "item": f"i{n % 7}", "category": "c", "action": "view", "time": n + 1_700_000_000}
        | {"hit": n % 7 < 3, "tab": n % 2}
        for n in range(900)
    ]
    impressions.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    items.write_text("item,brand\n" + "".join(f"i{number},b{number % 2}\n" for number in range(7)))
    words = ["--events.label", "hit", "--events.context", "tab", "--requests", "30", "-o", "json"]
    words += ["--items", str(items), "--attributes.item_topic", "items", "--attributes.item_fields", "brand"]
    assert main([str(impressions), *words]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    scores = {score["name"]: score["figures"] for score in found["engagement"][0]["scores"]}
    assert scores["click rate of the item (1d)"]["auc"]["value"] > 0.9
    assert scores["springtide"]["log_loss"]["value"] < scores["click rate so far"]["log_loss"]["value"]
    # Only clicked impressions are requests.
    assert 5 < found["recommendation"][0]["rows"] < 60


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([], [], "is a click: the recording is empty"),
        (["u1,i1,c1,view,1700000000"], ["--events.item="], "no click has an item: there is nothing to recommend"),
        (["u1,i1,c1,stare,1700000000"], [], "is a click: 1 dead letter (1 unknown_action)"),
        (["u1,i1,c1,view,1700000000"], ["--from", "2024-01-01"], "is after the last click of the recording"),
        (["u1,i1,c1,view,1700000000"], ["--last", "0"], "--last 0"),
        (["u1,i1,c1,view,1700000000"], ["--synthetic", "news"], "files or --synthetic"),
        (["u1,i1,c1,view,1700000000"], ["--json", "missing/result.json"], "there is no directory"),
        (["u1,i1,c1,view,1700000000"], ["--privacy.epsilon", "2"], "without the noise of privacy.epsilon"),
    ],
)
def test_bad_input_is_refused_with_advice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rows: list[str], words: list[str], message: str
) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join(["user,item,category,action,time", *rows, ""]))
    assert main([str(path), *words]) == 2
    assert message in capfd.readouterr().err


def test_an_unknown_format_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clicks.xls").write_text("")
    assert main([str(tmp_path / "clicks.xls")]) == 2
    assert "its name has no known suffix" in capfd.readouterr().err
