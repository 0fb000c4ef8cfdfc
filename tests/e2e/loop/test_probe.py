"""The whole loop watched from outside and from within: a probe's click comes through, and answers are made of what was trained."""

from __future__ import annotations

from tests.e2e.running import DEADLINE_S, Loop, until


def test_a_probe_says_how_long_features_and_weights_took(loop: Loop) -> None:
    dead = loop.metrics("stream").total("springtide_stream_dead_letters_total")
    found = loop.springtide("probe", "--probe.timeout_s", "120")
    assert not found["reason"]
    assert 0.0 < found["feature_seconds"] < DEADLINE_S
    assert 0.0 < found["weight_seconds"] < DEADLINE_S
    source, offset = found["source"], found["offset"]
    assert loop.ends()[source] > offset
    answer = until(lambda: loop.profile("anyone"), "no answer")
    assert answer["version"]["sources"][source] > offset
    assert loop.metrics("stream").total("springtide_stream_dead_letters_total") == dead


def test_answers_are_made_of_what_was_trained_in_the_running_loop(loop: Loop) -> None:
    def compared() -> dict[str, int] | None:
        rows: dict[str, int] = loop.springtide("status")["parity"] or {}
        return rows if rows.get("equal") or rows.get("differs") else None

    assert until(compared, "no row was compared")["differs"] == 0, loop.logs()
