"""Segments over HTTP: sizes, pages and memberships are those of the host's copy of the topic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from deploy.serving.rest import App
from state.config.sections import SegmentSettings
from state.events.identity import user_id
from state.layout import LOOKALIKES, SEGMENTS
from state.segments import LookalikeList, Membership, NearUser, PrecisionAt, SegmentStore, write_lookalikes
from tests.deploy.serving.http_api.test_app import app_of, ask
from tests.deploy.serving.stocked import MAP, NOW_MS, SALT, Stores

EXPRESSIONS = ("busy=events.visible > 1", "idle=events.visible == 0")


def with_segments(stores: Stores) -> App:
    """An application with two segments, without a store of members."""
    return app_of(stores, segments=SegmentSettings(EXPRESSIONS))


@pytest.fixture
def app(stores: Stores) -> Iterator[App]:
    with closing(with_segments(stores)) as made:
        yield made


def keep(stores: Stores, *users: str) -> None:
    store = SegmentStore(stores.settings.serving_dir / SEGMENTS, MAP)
    store.commit({("busy", user_id(SALT, user)): Membership(NOW_MS, 7) for user in users})
    store.close()


def test_members_are_listed_page_by_page(app: App, stores: Stores) -> None:
    names = ("ann", "bob", "cem")
    keep(stores, *names)
    assert ask(app, "GET", "/v1/segments").json() == {
        "segments": [
            {"name": "busy", "expression": "events.visible > 1", "size": 3},
            {"name": "idle", "expression": "events.visible == 0", "size": 0},
        ]
    }
    wanted = sorted(f"{user_id(SALT, name):016x}" for name in names)
    first = ask(app, "GET", "/v1/segments/busy?n=2").json()
    assert (first["size"], first["next"]) == (3, wanted[2])
    second = ask(app, "GET", f"/v1/segments/busy?n=2&from={first['next']}").json()
    assert second["next"] is None
    assert [one["pseudonym"] for one in first["members"] + second["members"]] == wanted
    assert first["members"][0] | {"pseudonym": ""} == {
        "pseudonym": "", "since": "2027-01-15T08:00:00.000Z", "since_ms": NOW_MS, "version": 7
    }  # fmt: skip
    assert ask(app, "GET", "/v1/segments/idle").json()["members"] == []


def test_a_user_is_in_or_out(app: App, stores: Stores) -> None:
    keep(stores, "ann")
    found = ask(app, "GET", "/v1/segments/busy/users/ann").json()
    assert (found["user_id"], found["in"], found["since_ms"], found["version"]) == ("ann", True, NOW_MS, 7)
    found = ask(app, "GET", "/v1/segments/busy/users/bob").json()
    assert (found["in"], found["since"], found["since_ms"], found["version"]) == (False, None, None, None)
    # A store that is another one is opened again.
    (stores.settings.serving_dir / SEGMENTS).rename(stores.settings.serving_dir / "before")
    keep(stores, "bob")
    assert [ask(app, "GET", f"/v1/segments/busy/users/{name}").json()["in"] for name in ("ann", "bob")] == [False, True]


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/v1/segments/nobody", 404, "there is no segment 'nobody'"),
        ("/v1/segments/nobody/users/ann", 404, "there is no segment 'nobody'"),
        ("/v1/segments/busy", 503, "cannot be opened"),
        ("/v1/segments", 503, "cannot be opened"),
        ("/v1/segments/busy?from=zz", 400, "parameter from"),
        ("/v1/segments/busy?n=0", 400, "parameter n"),
    ],
)
def test_what_cannot_be_answered_says_why(app: App, path: str, status: int, said: str) -> None:
    answer = ask(app, "GET", path)
    assert answer.status_code == status and said in answer.json()["error"]


def test_lookalikes_are_those_listed_last_without_who_came_in_since(app: App, stores: Stores) -> None:
    keep(stores, "ann")
    path, folder = "/v1/segments/busy/lookalikes", stores.settings.serving_dir / LOOKALIKES
    answer = ask(app, "GET", path)
    assert answer.status_code == 503 and "no lookalikes of busy are listed here" in answer.json()["error"]
    near = tuple(NearUser(f"{user_id(SALT, name):016x}", 0.5 - n / 8) for n, name in enumerate(("bob", "cem", "dan")))
    folder.mkdir()
    write_lookalikes(folder, "busy", LookalikeList(7, NOW_MS, 1, 4, near, (PrecisionAt(1, 0.5, 0.25, 0.125),)))
    found = ask(app, "GET", path).json()
    assert found.pop("lookalikes") == [{"pseudonym": one.pseudonym, "similarity": one.similarity} for one in near]
    assert found == {
        "segment": "busy", "version": 7, "at": "2027-01-15T08:00:00.000Z", "at_ms": NOW_MS, "members": 1, "users": 4,
        "precision": [{"k": 1, "lookalikes": 0.5, "most_clicks": 0.25, "chance": 0.125}],
    }  # fmt: skip
    # One process has a store open once.
    app.host.segments.close()
    keep(stores, "bob")
    assert [one["pseudonym"] for one in ask(app, "GET", f"{path}?n=1").json()["lookalikes"]] == [near[1].pseudonym]
    assert ask(app, "GET", f"{path}?n=0").status_code == 400
    assert ask(app, "GET", "/v1/segments/nobody/lookalikes").status_code == 404
    (folder / "busy.json").write_bytes((folder / "busy.json").read_bytes().replace(b"7", b"8", 1))
    answer = ask(app, "GET", path)
    assert answer.status_code == 503 and "is damaged" in answer.json()["error"]
