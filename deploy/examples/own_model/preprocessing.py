"""A preprocessing_fn: for each column, its logarithm and its quantile among past clicks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_transform as tft

BUCKETS = 8
LEAST_DEVIATION = 0.25


def preprocessing_fn(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns scaled logarithms, and quantile buckets of the raw integers.

    Args:
        inputs: `features`, `[B, D]` float32: the raw integers.

    Returns:
        `features`, `[B, 2 D]` float32.
    """
    counts = inputs["features"]
    logs = tf.math.log1p(counts)
    mean = tft.mean(logs, reduce_instance_dims=False)
    deviation = tf.sqrt(tf.maximum(tft.var(logs, reduce_instance_dims=False), LEAST_DEVIATION**2))
    # [D, BUCKETS - 1]. tft.bucketize has no counterpart in LiteRT; comparing with the boundaries has.
    boundaries = tft.quantiles(counts, BUCKETS, 0.01, reduce_instance_dims=False)
    # Integers are compared, not logarithms: two programs may round a logarithm differently.
    reached = tf.cast(tf.expand_dims(counts, 2) >= tf.expand_dims(boundaries, 0), tf.float32)
    return {"features": tf.concat([(logs - mean) / deviation, tf.reduce_mean(reached, 2)], 1)}
