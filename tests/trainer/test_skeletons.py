"""The modules that the how-to pages show pass the checks of `springtide check-model`, and the model's page counts its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from state.config.loading import load
from state.errors import DecodeError
from state.events.decoding import load_decoder
from state.features.spec import FeatureSpec
from streaming.preprocessing import check_preprocessing
from trainer.model.default_ranker import DefaultRanker
from trainer.model_checks import check_own

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes each module to the path that its docstring names."""
    shown = "\n".join((DOCS / "how-to" / f"own-{part}.md").read_text() for part in ("tower", "ranker", "decoder"))
    for block in re.findall(r"^```python\n(.*?)^```$", shown, re.MULTILINE | re.DOTALL):
        (path,) = re.findall(r'^"""(my_package/\w+\.py): ', block)
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("part", ["tower", "ranker"])
def test_the_tower_and_the_ranker_of_the_pages_are_accepted(part: str) -> None:
    settings = load([f"--model.{part}", f"my_package.{part}:build", "--model.hidden", "64"], env={})
    assert f"model.{part} 'my_package.{part}:build'" in check_own(settings, FeatureSpec.from_settings(settings))


def test_the_decoder_of_the_page_reads_a_nested_record() -> None:
    settings = load(["--events.decoder", "my_package.nested:decode_nested"], env={}).events
    read = load_decoder(settings)
    event = read(json.dumps({"payload": {"user": "ann", "item": "lamp"}}).encode())
    assert (event.user, event.item, event.category) == ("ann", "lamp", None)
    for bad in (b"no json", b"[]", b"{}", b'{"payload": 7}'):
        with pytest.raises(DecodeError):
            read(bad)


@pytest.mark.nightly
def test_the_preprocessing_of_the_page_is_accepted() -> None:
    spec = FeatureSpec.from_settings(load([], env={}))
    assert "[B, 128] to [B, 128]" in check_preprocessing("my_package.preprocessing:preprocessing_fn", spec)


def test_the_page_of_the_model_counts_its_weights() -> None:
    settings = load([], env={})
    ranker = DefaultRanker(settings.model, FeatureSpec.from_settings(settings))
    count = sum(weights.size for weights in ranker.weights().values())
    shown = f"{count:,} dense weights, F = {ranker.sizes['F']} and U = {ranker.user_width}."
    assert shown in (DOCS / "model" / "index.md").read_text()
