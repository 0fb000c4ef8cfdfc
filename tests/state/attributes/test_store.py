"""The store of attributes: what is committed is there, and what cannot be trusted is begun anew."""

from __future__ import annotations

from pathlib import Path

from state.attributes.store import AttributeStore, TopicPosition, ids_in, pack, texts_in

MAP = 1 << 24
PLACE = TopicPosition("identity", "ab" * 16, {0: 5, 1: 7})
VALUE = pack([3, 4], ["25-34", None])


def test_values_and_the_place_are_committed_together_and_survive(tmp_path: Path) -> None:
    store = AttributeStore(tmp_path / "s", MAP)
    store.commit("user", {1: VALUE, 2: VALUE}, PLACE)
    store.close()
    again = AttributeStore(tmp_path / "s", MAP)
    assert again.read_many("user", [2, 9]) == [VALUE, None]
    assert again.read_many("item", [2]) == [None]
    assert (again.place("user"), again.place("item")) == (PLACE, None)
    again.commit("user", {1: None, 5: None}, PLACE)
    assert (again.read_many("user", [1, 2]), again.count("user")) == ([None, VALUE], 1)
    assert (ids_in(VALUE, 2).tolist(), texts_in(VALUE, 2)) == ([3, 4], ["25-34", None])
    again.close()


def test_a_side_that_is_begun_anew_leaves_the_other(tmp_path: Path) -> None:
    store = AttributeStore(tmp_path / "s", MAP)
    store.commit("user", {1: VALUE}, PLACE)
    store.commit("item", {1: VALUE}, PLACE)
    store.begin_anew("user", TopicPosition("other", "cd" * 16, {0: 0}))
    assert (store.count("user"), store.count("item")) == (0, 1)
    place = store.place("user")
    assert place is not None
    assert place.identity == "other"
    store.close()
