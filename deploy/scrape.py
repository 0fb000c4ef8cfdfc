"""Reads what the loop's processes offer on /metrics."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException

from prometheus_client.parser import text_string_to_metric_families

from state.config import Settings

TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Scrape:
    """The series of one process at one moment.

    Attributes:
        values: (name, labels sorted by name) -> value; empty where the process did not answer.
        problem: Why it did not answer; empty where it did.
    """

    values: Mapping[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)
    problem: str = ""

    def value(self, name: str, **labels: str) -> float | None:
        """One series; None where it is absent or not a number.

        >>> Scrape(parsed("held 1")).value("held")
        1.0
        """
        found = self.values.get((name, tuple(sorted(labels.items()))))
        return None if found is None or math.isnan(found) else found

    def total(self, name: str) -> float | None:
        r"""A series summed over its labels; None where it is absent.

        >>> text = 'rows_total{outcome="dead"} 2\nrows_total{outcome="rows"} 3'
        >>> Scrape(parsed(text)).total("rows_total")
        5.0
        """
        found = [value for (series, _), value in self.values.items() if series == name]
        return sum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """A series by one of its labels.

        >>> Scrape(parsed('rows_total{outcome="dead"} 2')).by("rows_total", "outcome")
        {'dead': 2.0}
        """
        return {dict(labels)[label]: value for (series, labels), value in self.values.items() if series == name}


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Prometheus's text form as a mapping.

    >>> parsed('up{job="a"} 1')
    {('up', (('job', 'a'),)): 1.0}
    """
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in text_string_to_metric_families(text + "\n")
        for sample in family.samples
    }


def urls(settings: Settings) -> dict[str, str]:
    """Where each process offers its metrics, in the order of the data.

    >>> urls(Settings())["trainer"]
    'http://127.0.0.1:9102/metrics'
    """
    return {
        "stream": f"http://127.0.0.1:{settings.stream.metrics_port}/metrics",
        "trainer": f"http://127.0.0.1:{settings.trainer.metrics_port}/metrics",
        "applier": f"http://127.0.0.1:{settings.serving.metrics_port}/metrics",
        "worker": f"{serving_url(settings)}/metrics",
    }


def serving_url(settings: Settings) -> str:
    """Where answers are had on this machine.

    >>> serving_url(Settings())
    'http://127.0.0.1:8501'
    """
    host = settings.serving.host
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reached}:{settings.serving.port}"


def fetch(url: str, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """Status and body of a GET; status 0 and the reason where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode("utf-8", "replace")
    # HTTPException: the process died in the middle of its answer.
    except (OSError, ValueError, HTTPException) as problem:
        return 0, str(getattr(problem, "reason", problem))


def scrape(addresses: Mapping[str, str], get: Callable[[str], tuple[int, str]] = fetch) -> dict[str, Scrape]:
    """Reads all processes at once.

    Args:
        addresses: Process -> URL.
        get: Gives status and body of a URL.
    """

    def one(url: str) -> Scrape:
        status, body = get(url)
        if status != 200:
            return Scrape(problem=f"{url} does not answer ({body if status == 0 else f'status {status}'})")
        try:
            return Scrape(parsed(body))
        except ValueError as problem:
            return Scrape(problem=f"{url} answers with no metrics ({problem})")

    with ThreadPoolExecutor(len(addresses)) as pool:
        return dict(zip(addresses, pool.map(one, addresses.values()), strict=True))
