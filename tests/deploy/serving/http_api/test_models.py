"""TensorFlow Serving's REST interface: forms, codes and error bodies are its own, answers those of profiles."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.program import LoadedProgram
from deploy.serving.answers.tensor_model import MOST_ROWS
from deploy.serving.host_files import CONTROL_NOTE
from deploy.serving.rest import App
from tests.deploy.serving.http_api.test_app import app_of, ask
from tests.deploy.serving.stocked import NOW_MS, Stores, digest_of, manifest, tensors

MODEL = "/v1/models/profile"


@pytest.fixture
def app(stores: Stores) -> Iterator[App]:
    """Version 3 answers, after 2 and 1, which are here too; the operator's canary is version 1."""
    for version in (2, 3):
        made = tensors(stores.lowered, version, {"user": ["ann"], "category": ["hats"]}, ["tea", "shoes"])
        stores.rows.apply(manifest(version, digest_of(stores.lowered), parent=version - 1), made, NOW_MS, follow=True)
    stores.rows.steer({CONTROL_NOTE: json.dumps({"generation": 1, "labels": {"canary": 1}}).encode()})
    made_app = app_of(stores)
    yield made_app
    made_app.close()


def predict(app: App, body: Any, at: str = MODEL) -> Any:
    response = ask(app, "POST", f"{at}:predict", content=body if isinstance(body, bytes) else json.dumps(body))
    assert response.headers["content-type"] == "application/json"
    assert response.status_code == 200, response.text
    return response.json()


def refused(app: App, method: str, path: str, body: bytes = b"") -> tuple[int, str]:
    """Status and message of an error, whose body has nothing else."""
    response = ask(app, method, path, content=body)
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert list(document) == ["error"]
    return response.status_code, document["error"]


def test_a_row_by_id_is_the_profile(app: App) -> None:
    (given,) = predict(app, {"instances": [{"user_id": "ann", "item": "i1"}]})["predictions"]
    profile = ask(app, "GET", "/v1/profiles/ann?item=i1&fields=vector&top=60").json()
    count = len(profile["interests"])
    assert count >= 3
    for name, field in (("label", "labels"), ("id", "ids"), ("probability", "probabilities")):
        found = given[f"interest_{field}"]
        assert found[:count] == pytest.approx([one[name] for one in profile["interests"]])
        assert set(found[count:]) <= {"", 0.0}
    assert given["engagement"] == pytest.approx(profile["engagement"]["probability"])
    assert given["vector"] == profile["vector"]
    assert (given["known"], given["at"]) == (profile["known"], profile["at_ms"])


def test_rows_and_columns_and_base64_say_the_same(app: App) -> None:
    """A plain list names the one input that must be given; a row may leave out what may be left out."""
    rows = predict(app, {"instances": [{"user_id": "ann", "item": "i1"}, {"user_id": "bob"}]})["predictions"]
    ann = {"b64": base64.b64encode(b"ann").decode()}
    columns = predict(app, {"inputs": {"user_id": [ann, "bob"], "item": ["i1", ""]}})["outputs"]
    assert columns == {name: [row[name] for row in rows] for name in rows[0]}
    assert rows[1]["engagement"] is None
    without_item = [row | {"engagement": None} for row in rows]
    assert predict(app, {"instances": [ann, "bob"]})["predictions"] == without_item
    assert predict(app, {"signature_name": "serving_default", "inputs": ["ann", "bob"]})["outputs"] == {
        name: [row[name] for row in without_item] for name in rows[0]
    }


def test_many_rows_are_answered_in_their_order(app: App) -> None:
    users = ["ann", "bob", "eve"] * 17
    together = predict(app, {"instances": users})["predictions"]
    for user in set(users):
        (alone,) = predict(app, {"instances": [user]})["predictions"]
        for one in (found for name, found in zip(users, together, strict=True) if name == user):
            # Another size of the batch is another order of sums.
            assert one["interest_labels"] == alone["interest_labels"]
            assert one["interest_probabilities"] == pytest.approx(alone["interest_probabilities"], abs=1e-6)


def test_rows_of_users_whom_nobody_knows_are_counted_as_cold_starts(app: App) -> None:
    predict(app, {"instances": ["ann", "nobody", "nobody either"]})
    assert app.metrics.cold_starts._value.get() == 2


def test_raw_inputs_are_the_programs_own(stores: Stores, app: App) -> None:
    """Named and shaped as the metadata says, they give what the program alone gives with the version's weights."""
    document = ask(app, "GET", f"{MODEL}/metadata").json()
    signature = document["metadata"]["signature_def"]["signature_def"]["raw"]
    rng, rows = np.random.default_rng(7), 20
    given: dict[str, Any] = {}
    for name, one in signature["inputs"].items():
        assert one["dtype"] == "DT_FLOAT"
        shape = [int(size["size"]) for size in one["tensor_shape"]["dim"]]
        given[name] = rng.random([rows, *shape[1:]] if shape[0] == -1 else shape, np.float32)
    asked = {"signature_name": "raw", "inputs": {name: value.tolist() for name, value in given.items()}}
    outputs = predict(app, asked)["outputs"]
    program = LoadedProgram(stores.lowered.content)
    program.load(stores.lowered.weights)
    for row in range(rows):
        alone = {
            name: value[row : row + 1] if signature["inputs"][name]["tensor_shape"]["dim"][0]["size"] == "-1" else value
            for name, value in given.items()
        }
        expected = program.predict(alone)
        assert set(expected) == set(outputs) == set(signature["outputs"])
        for name, value in expected.items():
            np.testing.assert_allclose(np.array(outputs[name][row]), value[0], rtol=1e-4, atol=1e-5)


def test_metadata_is_of_tensorflow_servings_form(app: App) -> None:
    document = ask(app, "GET", f"{MODEL}/labels/canary/metadata").json()
    assert document["model_spec"] == {"name": "profile", "signature_name": "", "version": "1"}
    found = document["metadata"]["signature_def"]["signature_def"]
    assert set(found) == {"raw", "serving_default"}
    by_id = found["serving_default"]
    assert by_id["method_name"] == "tensorflow/serving/predict"
    assert by_id["inputs"]["user_id"] == {
        "dtype": "DT_STRING", "name": "user_id",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
    }  # fmt: skip
    assert set(by_id["inputs"]) - set(by_id["defaults"]) == {"user_id"}
    (given,) = predict(app, {"instances": ["ann"]})["predictions"]
    assert set(given) == set(by_id["outputs"])


def test_any_version_that_is_here_answers_and_labels_stand_for_some(app: App) -> None:
    """`stable` is what answers and `previous` what answered before, where nobody set them."""
    by_version = {
        version: predict(app, {"instances": ["ann"]}, f"{MODEL}/versions/{version}")["predictions"]
        for version in (1, 2, 3)
    }
    assert len({json.dumps(one) for one in by_version.values()}) == 3
    for label, version in (("stable", 3), ("previous", 2), ("canary", 1)):
        assert predict(app, {"instances": ["ann"]}, f"{MODEL}/labels/{label}")["predictions"] == by_version[version]
    assert predict(app, {"instances": ["ann"]})["predictions"] == by_version[3]
    status = ask(app, "GET", MODEL).json()["model_version_status"]
    assert [one["version"] for one in status] == ["3", "2", "1"]
    assert status[0] == {"version": "3", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    (one,) = ask(app, "GET", f"{MODEL}/labels/previous").json()["model_version_status"]
    assert one["version"] == "2"


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/v1/models/other", "profile"),
        (f"{MODEL}/versions/9", "3, 2, 1"),
        (f"{MODEL}/versions/9/metadata", "3, 2, 1"),
        (f"{MODEL}/labels/none", "canary, previous, stable"),
    ],
)
def test_what_is_unknown_is_404_with_what_is_known(app: App, path: str, known: str) -> None:
    status, message = refused(app, "GET", path)
    assert status == 404 and known in message
    if not path.endswith("metadata"):
        assert refused(app, "POST", f"{path}:predict", b'{"instances": ["ann"]}') == (404, message)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"{MODEL}:predict", 400), ("POST", MODEL, 400), ("DELETE", f"{MODEL}/metadata", 400),
        ("GET", f"{MODEL}/versions/one", 400), ("GET", f"{MODEL}/versions/{10**30}", 400),
        ("POST", f"{MODEL}:classify", 501), ("POST", f"{MODEL}/versions/1:regress", 501),
    ],
)  # fmt: skip
def test_wrong_methods_and_verbs_have_tensorflow_servings_codes(app: App, method: str, path: str, status: int) -> None:
    assert refused(app, method, path)[0] == status


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"{", "no JSON"), (b"", "no JSON"), (b"[]", "expected `object`"), (b"{}", "required field `instances`"),
        (b'{"instances": ["ann"], "inputs": ["ann"]}', "unknown field `inputs`"), (b'{"instances": []}', "/instances"),
        (b'{"instances": {"user_id": "ann"}}', "/instances"), (b'{"instances": [7]}', "user_id[0]"),
        (b'{"instances": ["ann", null]}', "user_id[1]"), (b'{"instances": [["ann"]]}', "user_id[0]"),
        (b'{"instances": [{"user_id": "ann"}, "bob"]}', "instances[1]"),
        (b'{"instances": ["bob", {"user_id": "ann"}]}', "user_id[1]"),
        (b'{"instances": [{"user_id": "ann"}, {"item": "i1"}]}', "instances[1]"),
        (b'{"instances": [{"user_id": "ann", "itm": "i1"}]}', "itm"),
        (b'{"instances": [{"user_id": "ann", "at": "soon"}]}', "'at'"),
        (b'{"instances": [{"user_id": "ann", "at": -7}]}', "'at'"),
        (b'{"instances": [{"user_id": "ann", "at": 9223372036854775808}]}', "'at'"),
        (b'{"instances": [{"user_id": {"b64": "?"}}]}', "user_id[0]"), (b'{"inputs": {"user_id": {"b64": "YQ=="}}}', "user_id"),
        (b'{"instances": [{"b64": "/w=="}]}', "UTF-8"), (b'{"inputs": {"user_id": ["ann"], "item": []}}', "'item'"),
        (b'{"inputs": {"item": ["i1"]}}', "'user_id'"), (b'{"inputs": {"user_id": []}}', "no row"),
        (b'{"signature_name": "other", "instances": ["ann"]}', "serving_default, raw"),
        (b'{"signature_name": 7, "instances": ["ann"]}', "signature_name"),
        (b'{"signature_name": "raw", "instances": ["ann"]}', "without names"),
        (b'{"signature_name": "raw", "inputs": {"features": [[1], [1, 2]]}}', "'features'"),
        (b'{"signature_name": "raw", "inputs": {"features": [["a"]]}}', "'features'"),
        (b'{"signature_name": "raw", "inputs": {"features": [[1.0]]}}', "shape [1, 1]"),
        (b'{"signature_name": "raw", "inputs": {"popular_mask": [[1, 1, 0, 0]]}}', "is missing"),
        (json.dumps({"instances": ["ann"] * (MOST_ROWS + 1)}).encode(), f"{MOST_ROWS}"),
    ],
)  # fmt: skip
def test_a_malformed_body_is_400_with_the_place(app: App, body: bytes, place: str) -> None:
    status, message = refused(app, "POST", f"{MODEL}:predict", body)
    assert status == 400 and place in message, message
