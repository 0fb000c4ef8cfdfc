"""The tower: dropout repeats with its seed, and a name of an earlier release still means the default."""

from __future__ import annotations

import tensorflow as tf

from state.registry.model_fit import FORMER_TOWERS
from trainer.model.tower import DenseTower, build, dropped, load_builder


def test_dropout_repeats_with_its_seed_and_keeps_the_expected_share() -> None:
    tower = DenseTower(8, (4096, 4), 0.3)
    x = tf.ones([1, 8])
    one, two = (tower(x, True, tf.constant(seed)).numpy() for seed in ([1, 2], [1, 3]))
    assert (one == tower(x, True, tf.constant([1, 2])).numpy()).all() and (one != two).any()
    kept = dropped(tf.ones([64, 1024]), 0.3, tf.constant([3, 4])).numpy()
    assert abs((kept > 0).mean() - 0.7) < 0.01 and abs(kept.mean() - 1) < 0.01


def test_earlier_names_of_the_default_tower_still_mean_it() -> None:
    assert [load_builder(path) for path in FORMER_TOWERS] == [build] * len(FORMER_TOWERS)
