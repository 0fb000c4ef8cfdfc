"""What a GPU's memory takes is told where there is one, and nothing where there is none."""

from __future__ import annotations

import pytest
import tensorflow as tf
from prometheus_client import CollectorRegistry

from state.metrics import TrainerMetrics
from trainer import device

HELD = "springtide_trainer_device_memory_bytes"


def test_a_cpu_has_no_device_metrics() -> None:
    registry = CollectorRegistry()
    device.show("/CPU:0", TrainerMetrics(registry))
    assert registry.get_sample_value(HELD, {"kind": "current"}) is None


@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="TensorFlow finds no GPU here")
def test_the_memory_of_a_gpu_is_shown() -> None:
    registry = CollectorRegistry()
    device.show("/GPU:0", TrainerMetrics(registry))
    with tf.device("/GPU:0"):
        kept = tf.Variable(tf.zeros([1 << 20], tf.float32))
    assert (registry.get_sample_value(HELD, {"kind": "current"}) or 0.0) >= kept.shape[0] * 4
    assert (registry.get_sample_value(HELD, {"kind": "peak"}) or 0.0) >= kept.shape[0] * 4
