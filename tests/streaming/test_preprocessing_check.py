"""A preprocessing of the user's own is checked before anything starts, and refused in the user's terms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from state.config.loading import load
from state.config.sections import Model
from state.errors import ProgramError, SettingsError
from state.features.spec import FeatureSpec
from state.process.part import OPTIONS_READ
from streaming.preprocessing import check_and_keep, check_preprocessing, load_preprocessing, made_up

SPEC = FeatureSpec()
NARROW = FeatureSpec(actions=("view",), windows_s=(3600,), half_lives_s=(1800,))
Inputs = Mapping[str, Any]


def buckets(inputs: Inputs) -> dict[str, Any]:
    import tensorflow_transform as tft

    x = inputs["features"]
    quantiles = tft.quantiles(x, 4, 0.01, reduce_instance_dims=False)
    over = tf.cast(tf.expand_dims(x, 2) >= tf.expand_dims(quantiles, 0), tf.float32)
    return {"features": tf.concat([tf.math.log1p(x), tf.reduce_mean(over, 2)], 1)}


def bucketized(inputs: Inputs) -> dict[str, Any]:
    import tensorflow_transform as tft

    return {"features": tf.cast(tft.bucketize(inputs["features"][:, :1], 4), tf.float32)}


def random(inputs: Inputs) -> dict[str, Any]:
    return {"features": inputs["features"] + tf.random.normal(tf.shape(inputs["features"]))}


def drawn_by_numpy(inputs: Inputs) -> dict[str, Any]:
    return {"features": inputs["features"] * np.float32(np.random.default_rng().random())}


def over_the_batch(inputs: Inputs) -> dict[str, Any]:
    return {"features": inputs["features"] - tf.reduce_mean(inputs["features"], 0, keepdims=True)}


def compared_with_logarithms(inputs: Inputs) -> dict[str, Any]:
    import tensorflow_transform as tft

    x = tf.math.log1p(inputs["features"])
    return {"features": tf.cast(x >= tft.quantiles(x, 8, 0.01, reduce_instance_dims=False)[:, 5], tf.float32)}


def whole_numbers(inputs: Inputs) -> dict[str, Any]:
    return {"features": tf.cast(inputs["features"], tf.int64)}


def one_column(inputs: Inputs) -> dict[str, Any]:
    return {"features": inputs["features"][:, 0]}


def misspelt(inputs: Inputs) -> dict[str, Any]:
    return {"features": inputs["feature"]}


def infinite(inputs: Inputs) -> dict[str, Any]:
    return {"features": tf.math.log(inputs["features"])}


def bare(inputs: Inputs) -> Any:
    return inputs["features"]


REFUSED = {
    "bucketized": r"does not lower to LiteRT: it has no tf\.UpperBound",
    # TensorFlow says it itself where the process has asked for determinism, as a trainer does.
    "random": "the same rows gave two different outputs; leave out randomness|Random ops require a seed",
    "drawn_by_numpy": "two analyses of the same rows gave different graphs",
    "over_the_batch": r"row 0 gives another output alone than in a batch of 256 .*must be a TensorFlow Transform analyzer",
    "compared_with_logarithms": r"LiteRT's output differs from TensorFlow's by .* compare the integers themselves",
    "whole_numbers": r"shape \(None, \d+\) and type int64; wanted is .*float32",
    "one_column": r"shape \(None,\) and type float32; wanted is",
    "misspelt": r"raised KeyError: 'feature' \(test_preprocessing_check\.py:\d+\)",
    "infinite": "column 0 of its output is not finite",
    "bare": r"returned \w*Tensor; wanted is a dictionary",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_preprocessing_is_refused_by_name_with_what_is_wanted(name: str) -> None:
    with pytest.raises(ProgramError, match=REFUSED[name]) as caught:
        check_preprocessing(f"{__name__}:{name}", NARROW)
    assert str(caught.value).startswith(f"model.preprocessing '{__name__}:{name}'")
    assert "\n" not in str(caught.value)


def test_quantile_buckets_pass_and_the_analysed_graph_is_kept(tmp_path: Path) -> None:
    said = check_preprocessing(f"{__name__}:buckets", SPEC, tmp_path)
    assert "[B, 128] to [B, 256], lowers to LiteRT" in said
    graph = tf.saved_model.load(str(tmp_path / "transform_fn"))
    rows = made_up(SPEC)
    found = graph.transform_fn({"features": tf.constant(rows)})["features"].numpy()
    assert set(np.unique(np.round(found[:, 128:] * 3))) == {1, 2, 3}, "3 in 10 integers are 0"


def test_a_module_that_is_not_there_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError, match=r"cannot be loaded \(ModuleNotFoundError.*module:name"):
        check_preprocessing("nowhere:preprocessing_fn", SPEC)


def scaled(inputs: Mapping[str, Any], settings: Model) -> dict[str, Any]:
    return {"features": inputs["features"] * settings.option("scale", 1.0)}


def test_a_preprocessing_of_two_arguments_gets_the_options() -> None:
    function = load_preprocessing(f"{__name__}:scaled", Model(options=("scale=0.5",)))
    assert function({"features": 4.0}) == {"features": 2.0}


def test_the_options_that_it_read_are_kept_next_to_its_graph(tmp_path: Path) -> None:
    settings = load(["--model.preprocessing", f"{__name__}:scaled", "--model.options", "scale=0.5,heads=4"], {})
    check_and_keep(settings, tmp_path)
    assert json.loads((tmp_path / OPTIONS_READ).read_text()) == ["scale"]
