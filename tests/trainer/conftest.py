"""Fixes TensorFlow's threads before any test runs an operation: bits depend on them."""

from __future__ import annotations

from trainer.device import prepare

prepare("cpu", threads=1)
