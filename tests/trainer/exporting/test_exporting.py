"""What is exported answers as serving does, is whole or not there, and says how far a smaller file is off."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from deploy.serving.answers import known_answers
from deploy.serving.answers.program import LoadedProgram
from deploy.serving.answers.query import Query
from deploy.serving.answers.tensor_model import BY_ID, VECTOR, signatures_of, tensors_of
from state.errors import ProgramError, SettingsError, UnknownVersion
from state.events.identity import Salt, ids_in, user_id
from state.layout import REGISTRY
from state.lowering import Quantize
from state.ranking.crosses import with_network_share
from state.registry.control import pin
from state.registry.registry import Registry
from tests.deploy.serving.conftest import lowered as lowered
from tests.deploy.serving.conftest import stores as stores
from tests.deploy.serving.stocked import NOW_MS, Stores, predictor
from tests.trainer.clicks import SMALL, SPEC, microbatch, small_settings
from tests.trainer.logs import ABOUT, learner, run_to_end, started, write_transform, written
from trainer.engine.step import Trainer
from trainer.exporting import command, device_file, exporting, saved_model
from trainer.exporting.device_file import choose
from trainer.exporting.exporting import agreement
from trainer.exporting.saved_model import KnownAnswers
from trainer.model.preprocessing import preprocessing_of
from trainer.versions.lowering import build
from trainer.versions.program import Program

SALT = Salt(b"a salt of the tests only")


class Stocked(NamedTuple):
    """A registry with versions of a real model, one of them loaded to be exported."""

    state: Path
    registry: Registry
    of: exporting.Compared


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Stocked:
    """Twelve records learned; takes some seconds."""
    state = tmp_path_factory.mktemp("state")
    registry = started(state / REGISTRY)
    registry.specs.add_spec(SPEC.digest, ABOUT | {"salt": SALT.fingerprint}, write_transform)
    trainer = Trainer(small_settings(), SPEC, preprocessing_of(registry.specs.transform(SPEC.digest)))
    log = written([microbatch(number, salt=SALT.fingerprint) for number in range(12)])
    about = ABOUT | {"salt": SALT.fingerprint}
    running = learner(
        registry, log, trainer=trainer, program=registry.specs.add_program(build(trainer.ranker())), about=about
    )
    run_to_end(running)
    running.close()
    newest = registry.newest(1) or 0
    of = exporting.load(registry, newest, trainer, SPEC.digest, log)
    return Stocked(state, registry, of)


def said(call: Callable[[exporting.Say], object]) -> str:
    lines: list[str] = []
    call(lines.append)
    return "\n".join(lines)


def test_the_sample_is_of_rows_that_the_version_learned(stocked: Stocked) -> None:
    of = stocked.of
    assert of.ids is not None and of.of == "256 examples of the training log"
    assert all(len(value) == 256 for name, value in of.inputs.items() if name not in of.kept)
    assert set(of.inputs) == set(of.trainer.model.shapes()) and list(of.kept) == ["popular_rows"]
    rows = of.trainer.tables["user"].state()
    place = int(np.searchsorted(rows.ids, of.ids["user"][5]))
    np.testing.assert_array_equal(of.inputs["user_row"][5], rows.rows[place])
    assert np.abs(of.inputs["recent_rows"]).sum() > 0 and np.abs(of.inputs["item_row"]).sum() > 0
    assert np.abs(of.inputs["cross"]).sum() > 0 and of.inputs["recent_next"].any()


def test_a_saved_model_has_servings_signature_and_answers(stocked: Stocked, tmp_path: Path) -> None:
    of = stocked.of
    told = said(lambda say: exporting.export_saved_model(of, tmp_path, say))
    path = tmp_path / str(of.version.version)
    assert str(path) in told and "the same category first in 100.0%" in told and " us an example alone" in told
    worker = LoadedProgram(stocked.registry.specs.program(of.version.program))
    worker.load(of.trainer.model.weights())
    loaded = tf.saved_model.load(str(path))
    raw = loaded.signatures["raw"]
    given = raw.structured_input_signature[1]
    assert {name: tuple(size or -1 for size in one.shape) for name, one in given.items()} == worker.shapes
    assert {
        name: tuple(size or -1 for size in one.shape) for name, one in raw.structured_outputs.items()
    } == worker.outputs
    rows = {name: value if name in of.kept else value[:16] for name, value in of.inputs.items()}
    found = raw(**{name: tf.constant(value) for name, value in rows.items()})
    assert abs(of.ranker.network_share - 1.0) > 1e-4
    wanted = with_network_share(worker.predict(rows), rows, of.ranker.network_share)
    for name, value in wanted.items():
        assert np.abs(found[name].numpy() - value).max() <= 1e-5 * (1 + np.abs(value).max()), name
    read = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    (default,) = read.meta_graphs[0].signature_def["raw"].defaults.items()
    assert default[0] == "popular_rows"
    np.testing.assert_array_equal(tf.make_ndarray(default[1]), of.inputs["popular_rows"])
    # What TensorFlow Serving asks before it says that the version is there.
    asked = list(tf.data.TFRecordDataset(str(path / saved_model.WARM_UP)).as_numpy_iterator())
    assert len(asked) == 2
    for one in asked:
        request = prediction_log_pb2.PredictionLog.FromString(one).predict_log.request
        assert (request.model_spec.name, request.model_spec.signature_name) == ("profile", "raw")
        answered = raw(**{name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()})
        assert np.isfinite(answered["engagement_logit"].numpy()).all()


def test_a_saved_model_that_answers_otherwise_gets_no_place(stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    other = Program(stocked.registry.specs.program(stocked.of.version.program))
    other.load({name: weight * np.float32(1.01) for name, weight in stocked.of.trainer.model.weights().items()})
    with pytest.raises(ProgramError, match="differs from serving's answers by"):
        exporting.export_saved_model(stocked.of._replace(program=other), tmp_path, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_what_is_being_written_has_no_number_and_only_the_newest_stay(stocked: Stocked, tmp_path: Path) -> None:
    of = stocked.of
    for number in (2, 10, 9):
        (tmp_path / str(number)).mkdir()
    (tmp_path / ".writing-11").mkdir()
    (tmp_path / ".writing-11" / "rest of a killed one").touch()
    writing = saved_model.write(tmp_path, 11, of.ranker, of.kept)
    assert not writing.name.isdigit() and "rest of a killed one" not in {one.name for one in writing.iterdir()}
    assert saved_model.publish(writing, 11) == tmp_path / "11" and not writing.exists()
    assert saved_model.keep_newest(tmp_path, 2) == [9, 2]
    (tmp_path / ".writing-12").mkdir()
    saved_model.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]


# Lowering takes seconds for each.
@pytest.mark.parametrize(
    "forms", [("none", "int8"), pytest.param(("none", "float16", "int8"), marks=pytest.mark.nightly)]
)
def test_a_devices_file_has_rows_by_place_and_says_how_far_it_is_off(
    stocked: Stocked, tmp_path: Path, forms: Sequence[Quantize]
) -> None:
    """As it is to rounding; smaller by half and by more with `float16` and `int8`, and a little off."""
    of = stocked.of
    assert of.ids is not None
    users = [*dict.fromkeys(of.ids["user"].tolist())]
    sizes, apart = {}, {}
    for quantize in forms:
        path = tmp_path / f"{quantize}.tflite"
        told = said(partial(exporting.export_device_file, of, path, users, 1000, quantize))
        assert (
            f"{quantize}; rows: " in told and f"{len(users)} of user" in told and "user of 100% of the examples" in told
        )
        sizes[quantize], rows = path.stat().st_size, choose(of.trainer, users, 1000)
        asked = device_file.device_inputs(of.ranker, rows, of.ids, of.inputs, list(of.kept))
        found = Program(path.read_bytes(), device_file.DEVICE).predict(asked)
        apart[quantize] = agreement(found, of.predict(of.inputs))
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert apart["none"].outputs < 1e-4 and apart["none"].first == 1.0
    for quantize, bound in (("float16", 0.01), ("int8", 0.1)):
        assert quantize not in forms or apart[quantize].probability < bound
    with zipfile.ZipFile(io.BytesIO((tmp_path / "none.tflite").read_bytes())) as lists:
        assert lists.read("rows/user.txt").decode().splitlines() == ["-", *(f"{one:016x}" for one in users)]
        about = json.loads(lists.read("version.json"))
    assert (about["version"], about["spec"]) == (of.version.version, SPEC.digest)


def test_only_chosen_rows_are_aboard(stocked: Stocked, tmp_path: Path) -> None:
    """The users of a file in its order, those without a row too; of everything else those seen last."""
    trainer, known = stocked.of.trainer, stocked.of.trainer.tables["user"].state()
    listed = tmp_path / "users"
    listed.write_text("ann\n\n bob \n")
    assert ids_in(listed, "--users") == ["ann", "bob"]
    ann = user_id(SALT, "ann")
    rows = choose(trainer, [ann, int(known.ids[3])], 7)
    assert rows["user"].ids.tolist() == [ann, known.ids[3]] and not rows["user"].rows[0].any()
    np.testing.assert_array_equal(rows["user"].rows[1], known.rows[3])
    items = trainer.tables["item"].state()
    assert len(rows["item"].ids) == 7
    left_out = ~np.isin(items.ids, rows["item"].ids)
    assert items.last_seen_ms[~left_out].min() >= items.last_seen_ms[left_out].max()
    with pytest.raises(SettingsError, match="one id a line"):
        ids_in(tmp_path / "none", "--users")


def test_the_command_exports_what_answers_use(
    stocked: Stocked, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.nice", lambda _: 0)
    away = ["--kafka.bootstrap_servers", "127.0.0.1:1", "--kafka.request_timeout_s", "0.3"]
    flags = [*SMALL, "--paths.state", str(stocked.state), *away]
    newest, exports = stocked.of.version.version, stocked.state / "exports"
    assert command.main(flags) == 0
    told = capfd.readouterr().out
    assert f"saved model  {exports / str(newest)}, " in told and "256 synthetic examples" in told
    assert [path.name for path in sorted(exports.iterdir())] == [str(newest), "lock"]
    assert command.main(flags) == 0
    assert f"{exports / str(newest)} exists and was left as it is; to write it again" in capfd.readouterr().out
    assert command.main([*flags, "--quantize", "int8"]) == 2
    assert "--tflite" in capfd.readouterr().err


def test_the_version_is_the_pinned_one_where_answers_are_pinned(tmp_path: Path, stocked: Stocked) -> None:
    registry = stocked.registry
    newest, control = stocked.of.version.version, registry.control()
    assert control is not None and command.chosen_version(registry, None) == newest
    assert command.chosen_version(registry, 1) == 1
    with pytest.raises(UnknownVersion):
        command.chosen_version(registry, newest + 1)
    first = started(tmp_path)
    with pytest.raises(UnknownVersion, match="no version yet"):
        command.chosen_version(first, None)
    first.change(lambda one: pin(one, 1, actor="ann", reason="odd", now_ms=5))
    assert command.chosen_version(first, None) == 1


KEPT = {"popular_rows": np.zeros((4, 8), np.float32)}


def test_named_users_are_answered_as_serving_answers(stores: Stores, tmp_path: Path) -> None:
    """Under the same signature; everybody else as a user of whom nothing is known."""
    answers, users = predictor(stores), ["ann", "bob"]
    known = KnownAnswers(known_answers.answers(answers, 1, users, ["i1", "i2"]))
    assert (known.users, known.items, known.at_ms) == (2, 2, NOW_MS)
    path = saved_model.publish(saved_model.write(tmp_path, 1, stores.lowered.model, KEPT, known), 1)
    loaded = tf.saved_model.load(str(path))
    assert set(loaded.signatures) == {"raw", "serving_default"}
    by_id = loaded.signatures["serving_default"]
    with answers.reading() as reader:
        offered = signatures_of(answers.load_version(reader), ())[BY_ID]
    kinds = {"O": tf.string, "<i8": tf.int64, "<f4": tf.float32, "|b1": tf.bool}
    for ours, theirs in (
        (by_id.structured_input_signature[1], offered.inputs),
        (by_id.structured_outputs, offered.outputs),
    ):
        assert {name: (one.dtype, len(one.shape)) for name, one in ours.items()} == {
            name: (kinds[one.dtype], len(one.shape)) for name, one in theirs.items()
        }
    asked = ["ann", "stranger", "bob"]
    items = ["i1", "", "i2"]
    given: dict[str, Sequence[object]] = {"user_id": asked, "item": items, "category": [""], "at": [-1]}
    found = by_id(
        **{name: tf.constant(value, tf.int64 if name == "at" else tf.string) for name, value in given.items()}
    )
    queries = [Query(user, item or None, at_ms=NOW_MS, fields=VECTOR) for user, item in zip(asked, items, strict=True)]
    wanted = tensors_of(answers.profiles(queries), offered)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-5, atol=1e-6)
        else:
            assert found[name].numpy().tolist() == value.tolist(), name
    assert from_graph(path, given)["interest_labels"].tolist() == wanted["interest_labels"].tolist()
    for name, wrong, what in (
        ("item", "i9", "items"),
        ("category", "hats", "own category"),
        ("at", 5, "for 1800000000000 ms only"),
    ):
        odd = {"user_id": ["ann"], "item": [""], "category": [""], "at": [-1]} | {name: [wrong]}
        with pytest.raises(tf.errors.InvalidArgumentError, match=what):
            by_id(**{one: tf.constant(value, tf.int64 if one == "at" else tf.string) for one, value in odd.items()})


def from_graph(path: Path, given: Mapping[str, Sequence[object]]) -> dict[str, np.ndarray]:
    """What the graph and its signature alone answer: so TensorFlow Serving loads it, which knows no Python."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        (meta,) = [tf.compat.v1.saved_model.load(session, ["serve"], str(path))]
        signature = meta.signature_def["serving_default"]
        fed = {signature.inputs[name].name: value for name, value in given.items()}
        found: dict[str, np.ndarray] = session.run(
            {name: one.name for name, one in signature.outputs.items()}, feed_dict=fed
        )
    return found


def test_a_host_writes_the_answers_in_a_process_of_its_own(
    stores: Stores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each user once; too many pairs, and a version that is not here, are refused."""
    users, to = tmp_path / "users", tmp_path / "answers.npz"
    users.write_text("ann\n\nann\n bob\n")
    stores.close()
    words = [
        "--users",
        str(users),
        "--to",
        str(to),
        "--paths.state",
        stores.settings.paths.state,
    ]
    words += [word for name in ("dim", "hidden", "popular") for word in (f"--model.{name}", _text(stores, name))]
    assert known_answers.main([*words, "--version", "1"]) == 0, capsys.readouterr().err
    made = KnownAnswers(to.read_bytes())
    assert (made.users, made.items) == (2, 0)
    assert known_answers.main([*words, "--version", "7"]) != 0
    assert "version 7 is not here" in capsys.readouterr().err


def _text(stores: Stores, name: str) -> str:
    value = getattr(stores.settings.model, name)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_too_many_pairs_are_refused(stores: Stores) -> None:
    with pytest.raises(SettingsError, match="more than"):
        known_answers.answers(predictor(stores), 1, ["a"] * 2000, ["b"] * 1000)
