"""The predictor answers as the model does, from exactly one version, without TensorFlow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.program import LoadedProgram
from deploy.serving.answers.query import Query
from deploy.serving.host_files import CONTROL_NOTE, MASK_NOTE, VersionFiles, read_program
from deploy.serving.requests.http import encode
from springtide_client.answers import Profile
from state.errors import CorruptVersion, NotReady, ProgramError, SaltMismatch, SpecMismatch
from state.events.identity import public_id, user_id
from state.features.erased import EVERYTHING, Erased, MaskedUsers
from state.features.spec import FeatureSpec, Mask
from state.history.appends import Appends, numbered
from state.layout import PROGRAMS
from state.ranking import transitions
from state.ranking.transitions import Lists, record
from state.registry.registry import Registry
from tests.deploy.serving.stocked import (
    NOW_MS,
    SALT,
    SOURCE,
    Lowered,
    Stores,
    digest_of,
    manifest,
    model_outputs,
    predictor,
    row_of,
    tensors,
    vector_of,
)


def check(answer: Profile, outputs: dict[str, Any], candidates: list[tuple[str, str, int]]) -> None:
    """Candidates are (name, output, place)."""
    logits = np.array([outputs[output][0, place] for _, output, place in candidates])
    shares = np.exp(logits) / np.exp(logits).sum()
    wanted = {name: share for (name, _, _), share in zip(candidates, shares, strict=True)}
    assert {one.label: pytest.approx(one.probability, abs=1e-5) for one in answer.interests} == wanted
    assert sum(one.probability for one in answer.interests) == pytest.approx(1.0, abs=1e-5)
    given = [one.probability for one in answer.interests]
    assert given == sorted(given, reverse=True)
    np.testing.assert_allclose(vector_of(answer), outputs["vector"][0], atol=1e-5)


def test_a_known_user_is_scored_as_the_model_scores(stores: Stores) -> None:
    """Candidates are the user's labels, newest first, and the popular label that is not among them."""
    answer = predictor(stores).profile("ann", item="i1")
    outputs = model_outputs(stores, "ann", item_row=row_of("item", "i1", 1), category_row=row_of("category", "hats", 1))
    tea = f"{public_id('tea'):016x}"
    check(answer, outputs, [("shoes", "recent_logits", 0), ("hats", "recent_logits", 1), (tea, "popular_logits", 0)])
    assert answer.known and not answer.cold_start
    assert answer.engagement is not None
    assert answer.engagement.probability == pytest.approx(1 / (1 + np.exp(-outputs["engagement_logit"][0])), abs=1e-5)
    assert answer.version.number == 1 and answer.version.age_s == 2.0
    assert answer.version.sources == {f"{SOURCE}": 1001}
    assert answer.features is not None and answer.features["view.count_1h"] == 2


def test_a_user_without_a_row_is_known_by_the_clicks(stores: Stores) -> None:
    answer = predictor(stores).profile("bob")
    outputs = model_outputs(stores, "bob")
    tea = f"{public_id('tea'):016x}"
    check(answer, outputs, [("books", "recent_logits", 0), (tea, "popular_logits", 0), ("shoes", "popular_logits", 1)])
    assert answer.known and answer.engagement is None


def test_a_worker_that_followed_versions_answers_as_one_that_starts_at_the_last(stores: Stores) -> None:
    """What it read of categories and items stays where a version does not change it: rows, lists, weights."""
    lists = Lists.empty(2)
    record(np.ones(9, np.int32), np.array([public_id(name) for name in ("tea", "hats", "tea")] * 3, np.uint64), lists)
    signs = np.zeros((1, transitions.SIGN_BYTES), np.uint8)
    queries = [Query("ann", at_ms=NOW_MS), Query("bob", at_ms=NOW_MS), Query("nobody", item="i1", at_ms=NOW_MS)]
    asked, digest = predictor(stores), digest_of(stores.lowered)

    def documents(one: Predictor, count: int) -> list[bytes]:
        return [encode(answer) for answer in one.profiles(queries[:count])]

    changes: list[dict[str, Any]] = [
        tensors(stores.lowered, 2, {"category": ["hats"]}, ["tea", "shoes"]),
        tensors(stores.lowered, 3, {"user": ["bob"]}, ["books", "hats"])
        | {"category.removed": np.array([public_id("shoes")], np.uint64)},
        tensors(stores.lowered, 4, {"item": ["i1"]}, ["tea"])
        | {"transition.ids": np.array([public_id("hats")], np.uint64)}
        | {"transition.rows": transitions.pack(Lists(lists.counts[1:], lists.ids[1:]), signs)},
        {name: 2 * value for name, value in tensors(stores.lowered, 5, {}, []).items() if name.startswith("dense.")}
        | {"popular": np.array([public_id("tea")], np.uint64)},
    ]
    before = documents(asked, 1)
    for version, content in enumerate(changes, 2):
        stores.rows.apply(manifest(version, digest, version - 1), content, NOW_MS, follow=True)
        # One question, then three: each size of a batch has weights of its own.
        for count in (1, 3):
            answered = documents(asked, count)
            assert answered == documents(predictor(stores), count), (version, count)
        assert answered[:1] != before
        before = answered[:1]


def test_an_unknown_user_gets_the_popular_labels(stores: Stores) -> None:
    answer = predictor(stores).profile("nobody")
    outputs = model_outputs(stores, "nobody")
    tea = f"{public_id('tea'):016x}"
    check(answer, outputs, [(tea, "popular_logits", 0), ("shoes", "popular_logits", 1)])
    assert not answer.known and answer.cold_start


def test_an_items_category_is_the_one_asked_for_or_the_one_remembered(stores: Stores) -> None:
    chances = []
    for category in (None, "hats", "books"):
        engagement = predictor(stores).profile("ann", item="i1", category=category).engagement
        assert engagement is not None
        chances.append(engagement.probability)
    assert chances[0] == chances[1] != chances[2]


def test_masked_clicks_leave_the_answer_at_once(stores: Stores) -> None:
    """A mask in the newest control takes clicks out of windows and candidates, without a new version."""
    served = predictor(stores)
    before = served.profile("ann").features
    assert before is not None and before["view.count_1h"] == 2
    mask = Mask(2, times=((NOW_MS - 10_000, NOW_MS),))
    stores.rows.steer({CONTROL_NOTE: b'{"generation": 2}', MASK_NOTE: json.dumps(mask.to_json()).encode()})
    answer = served.profile("ann")
    assert answer.features is not None and answer.features["view.count_1h"] == 1
    assert answer.version.mask_generation == 2
    assert not served.profile("bob").known


def test_a_masked_user_is_a_cold_start(stores: Stores) -> None:
    mask = Mask(2, users=MaskedUsers.of([user_id(SALT, "bob")]))
    stores.rows.steer({CONTROL_NOTE: b"2", MASK_NOTE: json.dumps(mask.to_json()).encode()})
    assert predictor(stores).profile("bob").cold_start


def test_answers_are_those_of_a_cold_start_until_a_version_has_forgotten_the_user(stores: Stores) -> None:
    served = predictor(stores)
    stranger, known = served.profile("nobody", item="i1"), served.profile("bob")
    until = [(SOURCE.topic, SOURCE.partition, EVERYTHING)]
    gone = Erased.NOBODY.and_also(MaskedUsers.of([user_id(SALT, "ann")]), until, 2, 1)
    stores.rows.steer({CONTROL_NOTE: b"2", MASK_NOTE: Mask(2, erased=gone).to_bytes()})
    found = served.profile("ann", item="i1")
    assert found.cold_start and not found.known
    assert (found.engagement, found.interests) == (stranger.engagement, stranger.interests)
    assert np.array_equal(vector_of(found), vector_of(stranger)) and found.features == stranger.features
    assert served.profile("bob").interests == known.interests
    # Who comes back is known again, by a version that has forgotten the one of before.
    names = {"user": ["ann"]}
    for version, erased, shown in ((2, 0, False), (3, 1, True)):
        made = replace(manifest(version, digest_of(stores.lowered), version - 1), erased=erased)
        stores.rows.apply(made, tensors(stores.lowered, version, names, ["tea"]), NOW_MS, follow=True)
        assert served.profile("ann").known is shown


def test_an_answer_is_from_the_version_that_the_pointer_names(stores: Stores) -> None:
    served = predictor(stores)
    first = served.profile("ann")
    doubled = Lowered(stores.lowered.content, {name: 2 * value for name, value in stores.lowered.weights.items()}, None)
    newer = tensors(doubled, 2, {"user": ["ann"], "category": ["hats"]}, ["books"])
    stores.rows.apply(manifest(2, digest_of(doubled), parent=1), newer, NOW_MS)
    assert served.profile("ann").version.number == 1
    stores.rows.serve(2)
    second = served.profile("ann")
    assert second.version.number == 2
    assert {one.label for one in second.interests} == {"shoes", "hats", "books"}
    assert not np.allclose(vector_of(first), vector_of(second))
    stores.rows.serve(1)
    again = served.profile("ann")
    assert (again.version, again.interests) == (first.version, first.interests)


def test_a_held_moment_answers_from_its_version_whatever_comes_meanwhile(stores: Stores) -> None:
    served = predictor(stores)
    newer = tensors(stores.lowered, 2, {"user": ["ann"], "category": ["hats"]}, ["books"])
    stores.rows.apply(manifest(2, digest_of(stores.lowered), parent=1), newer, NOW_MS)
    with served.reading() as held:
        (before,) = served.profiles([Query("ann")], held)
        stores.rows.steer({MASK_NOTE: Mask(2, times=((0, NOW_MS),)).to_bytes(), CONTROL_NOTE: b"{}"}, 2)
        between = served.profile("ann")
        (after,) = served.profiles([Query("ann")], held)
    assert (between.version.number, between.version.mask_generation) == (2, 2)
    assert (after.version, after.interests) == (before.version, before.interests)
    assert (vector_of(after) == vector_of(before)).all()


def test_context_is_the_mean_over_all_fields(stores: Stores) -> None:
    names = {"context": ["device=phone"]}
    stores.rows.apply(
        manifest(2, digest_of(stores.lowered), parent=1), tensors(stores.lowered, 2, names, []), NOW_MS, follow=True
    )
    served = predictor(stores, context=("device", "country"))
    vectors = [
        vector_of(served.profile("ann", context=context))
        for context in ({}, {"device": "phone"}, {"device": "tv"}, {"x": "y"})
    ]
    assert not np.allclose(vectors[0], vectors[1])
    assert np.allclose(vectors[0], vectors[2]) and np.allclose(vectors[0], vectors[3])


@pytest.mark.parametrize(
    ("clock", "at_ms", "expected"),
    [("wall", None, (NOW_MS, "wall")), ("event", None, (NOW_MS - 4_600, "event")), ("event", 77, (77, "request"))],
)
def test_each_answer_states_its_clock(stores: Stores, clock: str, at_ms: int | None, expected: tuple[int, str]) -> None:
    """The event clock is the newest accepted click, and the time since it was accepted."""
    answer = predictor(stores, clock=clock).profile("ann", at_ms=at_ms)
    assert (answer.at_ms, answer.clock) == expected


def test_what_does_not_fit_is_refused(stores: Stores) -> None:
    """Another salt, another feature spec, missing weights, a damaged program: an error, never a wrong answer."""
    program = digest_of(stores.lowered)
    rows = tensors(stores.lowered, 2, {"user": ["ann"]}, [])
    stores.rows.apply(manifest(2, program, salt="0" * 16), rows, NOW_MS, follow=True)
    with pytest.raises(SaltMismatch, match="version 2"):
        predictor(stores).profile("ann")
    stores.rows.apply(manifest(3, program), rows, NOW_MS, follow=True)
    with pytest.raises(SpecMismatch, match="version 3"):
        predictor(stores, features=replace(stores.settings.features, history=64)).profile("ann")
    stores.rows.apply(manifest(4, program), {"popular": rows["popular"]}, NOW_MS, follow=True)
    with pytest.raises(ProgramError, match="dense_"):
        predictor(stores).profile("ann")
    file = stores.settings.serving_dir / PROGRAMS / f"{program}.tflite"
    file.write_bytes(b"x" + file.read_bytes())
    with pytest.raises(CorruptVersion, match="digest"):
        read_program(file.parent, program)
    with pytest.raises(ProgramError, match="cannot be run"):
        LoadedProgram(b"no program")


def test_a_version_answers_with_its_own_features_whatever_the_settings_say_by_now(
    stores: Stores, tmp_path: Path
) -> None:
    """While an upgrade waits for its first version: same windows, names, actions and bits as before."""
    before = predictor(stores).profile("ann", item="i1")
    features = replace(stores.settings.features, windows_s=(60, 604800), history=64)
    actions = ("wish", *FeatureSpec().actions[::-1])
    other: dict[str, Any] = {"features": features, "events": replace(stores.settings.events, actions=actions)}
    with pytest.raises(SpecMismatch, match="wait for the first version of an upgrade"):
        predictor(stores, **other).profile("ann", item="i1")
    registry = Registry(tmp_path / "registry")
    registry.specs.add_spec(FeatureSpec().digest, {"spec": FeatureSpec().to_json()}, lambda folder: None)
    VersionFiles(stores.settings.serving_dir / PROGRAMS, registry).fetch_spec(FeatureSpec().digest)
    stores.histories.numbering, extra = numbered(None, actions, FeatureSpec().actions)
    stores.histories.commit(Appends.none(), (), extra)
    after = predictor(stores, **other).profile("ann", item="i1")
    assert np.array_equal(vector_of(after), vector_of(before))
    assert (after.features, after.interests) == (before.features, before.interests)
    assert after.engagement == before.engagement
    assert after.features is not None and len(after.features) == len(FeatureSpec().names)


def test_without_a_version_there_is_no_answer(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> None:
    from state.rows.store import RowStore

    empty = replace_rows(stores, RowStore(tmp_path_factory.mktemp("rows"), 1 << 26))
    with pytest.raises(NotReady, match="no version"):
        predictor(empty).profile("ann")


def replace_rows(stores: Stores, rows: Any) -> Stores:
    return Stores(stores.settings, rows, stores.histories, stores.lowered)
