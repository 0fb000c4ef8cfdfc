"""The live line comes from the real metrics, and the terminal keeps its other lines."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from deploy.live import Screen, live_line, take_pulse
from deploy.scrape import Scrape, fetch, parsed, scrape, urls
from state.config import Settings
from state.metrics import ApplierMetrics, StreamMetrics, TrainerMetrics, serve


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def offered() -> Iterator[tuple[StreamMetrics, ApplierMetrics, TrainerMetrics, int]]:
    """Metrics of all processes, really offered over HTTP."""
    from deploy.kafka.broker import free_port

    registry, port = CollectorRegistry(), free_port()
    made = StreamMetrics(registry), ApplierMetrics(registry), TrainerMetrics(registry), port
    stop = serve(registry, port)
    yield made
    stop()


def test_the_pulse_comes_from_the_metrics_that_the_processes_really_offer(
    offered: tuple[StreamMetrics, ApplierMetrics, TrainerMetrics, int],
) -> None:
    stream, applier, trainer, port = offered
    addresses = dict.fromkeys(("stream", "trainer", "applier"), f"http://127.0.0.1:{port}/metrics")
    stream.events.labels("rows").inc(100)
    first = take_pulse(scrape(addresses), None, now_s=10.0)
    stream.events.labels("rows").inc(390)
    stream.events.labels("dead").inc(10)
    stream.lag_events.set(12)
    applier.version.set(34)
    applier.epoch.set(2)
    applier.pinned.set(1)
    applier.feature_freshness_seconds.set(0.25)
    applier.weight_freshness_seconds.set(0.5)
    trainer.log_loss.set(1.25)
    trainer.steps.inc()
    second = take_pulse(scrape(addresses), first, now_s=12.0)
    assert live_line(second) == (
        "pinned | 200 events/s, lag 12 | version 34, epoch 2 | features 0.2 s, weights 0.5 s old | log loss 1.25"
    )


def test_a_process_that_is_away_is_named_and_the_rest_is_shown() -> None:
    scrapes = {"stream": Scrape(problem="refused"), "applier": Scrape(parsed("springtide_serving_version 3"))}
    line = live_line(take_pulse(scrapes, None, now_s=0.0))
    assert line.startswith("stream away | - events/s, lag - | version 3")


def test_a_restarted_stream_gives_no_negative_rate() -> None:
    before = take_pulse({"stream": Scrape(parsed('springtide_stream_events_total{outcome="rows"} 500'))}, None, 0.0)
    after = take_pulse({"stream": Scrape(parsed('springtide_stream_events_total{outcome="rows"} 5'))}, before, 1.0)
    assert after.events_per_s is None


def test_a_figure_that_is_not_a_number_is_a_dash() -> None:
    assert Scrape(parsed("springtide_trainer_auc NaN")).value("springtide_trainer_auc") is None


def test_a_terminal_sees_one_line_rewritten_and_other_lines_stay() -> None:
    out = Terminal()
    screen = Screen(out, width=lambda: 10)
    screen.live("first live line")
    screen.live("second")
    screen.say("stream died")
    screen.live("third")
    assert out.getvalue() == "\r\x1b[Kfirst liv\r\x1b[Ksecond\r\x1b[Kstream died\n\r\x1b[Kthird"
    assert screen.every_s == 1.0


def test_a_file_sees_whole_lines_and_fewer_of_them() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.live("one")
    screen.live("two")
    assert out.getvalue() == "one\ntwo\n"
    assert screen.every_s == 10.0


def test_nobody_at_the_address_is_status_zero_with_the_reason() -> None:
    from deploy.kafka.broker import free_port

    status, reason = fetch(f"http://127.0.0.1:{free_port()}/metrics")
    assert status == 0
    assert "refused" in reason


def test_workers_that_listen_everywhere_are_reached_on_this_machine() -> None:
    from dataclasses import replace

    settings = Settings()
    everywhere = replace(settings, serving=replace(settings.serving, host="0.0.0.0"))
    assert urls(everywhere)["worker"] == "http://127.0.0.1:8501/metrics"


def test_a_process_that_dies_in_the_middle_of_its_answer_is_one_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_half() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")

        half = threading.Thread(target=answer_half)
        half.start()
        status, reason = fetch(f"http://127.0.0.1:{server.getsockname()[1]}/metrics")
        half.join()
    assert status == 0
    assert "IncompleteRead" in reason
