"""The compiled preprocessing computes what the function that the bootstrap analysed computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from state.config.sections import Model
from state.features.spec import FeatureSpec
from streaming.preprocessing import CLIP, analysed, preprocessing_fn
from trainer.engine.graphs import prepared_by
from trainer.model.preprocessing import preprocessing_of

DEFAULT = Model().preprocessing
WIDTH = len(FeatureSpec().names)


def raw_features(rows: int) -> Any:
    return np.random.default_rng(3).geometric(0.01, (rows, WIDTH)).astype(np.uint16)


def test_the_default_preprocessing_is_the_analysed_one_and_finite_for_a_constant_column(tmp_path: Path) -> None:
    seen = raw_features(500)
    seen[:, 2] = 7
    analysed([seen], preprocessing_fn, tmp_path)
    wanted = preprocessing_of(tmp_path)
    raw = np.concatenate([raw_features(700), np.full((1, WIDTH), 65_535, np.uint16), seen[:1]])
    expected = wanted(tf.constant(raw, tf.float32)).numpy()
    assert abs(expected[-1, 2]) < 1e-4 and np.abs(expected).max() <= CLIP
    found = prepared_by(wanted, WIDTH, DEFAULT)(raw)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_preprocessing_that_mixes_features_is_called_whatever_its_name() -> None:
    def shares(x: Any) -> Any:
        return x / (1.0 + tf.reduce_sum(x, axis=1, keepdims=True))

    raw = raw_features(40)
    for name in (DEFAULT, "mine:shares"):
        np.testing.assert_array_equal(prepared_by(shares, WIDTH, name)(raw), shares(raw.astype(np.float32)).numpy())
