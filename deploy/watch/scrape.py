"""Reaches the processes of the loop: their URLs, the token and certificate that a request needs, and their metrics."""

from __future__ import annotations

import math
import socket
import ssl
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from deploy.serving.requests.access import OPERATE, are_wanted, tokens_in, trusting
from state.config.settings import Settings
from state.errors import SettingsError
from state.process import network


class Address(str):
    """A URL with its credentials; their files are read at each request, because they can change.

    Args:
        token_file: File with the token to send; None if none is needed.
        certificate: File with the server's certificate; None without TLS.
    """

    token_file: Path | None
    certificate: Path | None

    def __new__(cls, url: str, token_file: Path | None = None, certificate: Path | None = None) -> Self:
        """Creates the string with its attributes."""
        address = super().__new__(cls, url)
        address.token_file, address.certificate = token_file, certificate
        return address

    def request(self) -> urllib.request.Request:
        """Returns a GET request with the token.

        Raises:
            SettingsError: The token cannot be read.
        """
        headers = {} if self.token_file is None else {"authorization": f"Bearer {tokens_in(self.token_file)[0]}"}
        return urllib.request.Request(self, headers=headers)

    def context(self) -> ssl.SSLContext | None:
        """Returns a context that trusts the server's own certificate, with any issuer and name; None without TLS.

        Raises:
            OSError: The certificate cannot be read.
        """
        return None if self.certificate is None else trusting(self.certificate)


def reached(host: str) -> str:
    """Returns the form of a listening host in a client's URL; wildcard addresses become loopback.

    >>> reached("0.0.0.0"), reached("::1"), reached("stream")
    ('127.0.0.1', '[::1]', 'stream')
    """
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def address(settings: Settings, host: str, port: int, path: str = "") -> Address:
    """Returns the address of a Springtide port on this machine; all ports share the tokens and the certificate.

    >>> address(Settings(), "0.0.0.0", 8502)
    'http://127.0.0.1:8502'
    """
    serving = settings.serving
    scheme, certificate = ("https", Path(serving.tls_cert)) if serving.tls_cert else ("http", None)
    token_file = settings.tokens_dir / OPERATE if are_wanted(settings, host) else None
    return Address(f"{scheme}://{reached(host)}:{port}{path}", token_file, certificate)


def serving_address(settings: Settings, path: str = "") -> Address:
    """Returns the address of serving on this machine."""
    return address(settings, settings.serving.host, settings.serving.port, path)


def console_address(settings: Settings, path: str = "") -> Address:
    """Returns the address of the page on this machine."""
    page = address(settings, settings.console.host, settings.console.port, path)
    # The page shows serving's answers too, so it requires a token if either of them does.
    token_file = settings.tokens_dir / OPERATE if are_wanted(settings) else page.token_file
    return Address(page, token_file, page.certificate)


TIMEOUT_S = 3.0  # a busy machine answers late; a port without a listener refuses at once
UP = "up"
SAMPLE_USER = "shopper-1"  # one of the synthetic shoppers; another user has a cold-start answer
ANY_USER = "USER"  # placeholder if no user id is known
LINE = ("stream", "trainer", "applier")
SEGMENTS = "segments"
ELSEWHERE = (*LINE, SEGMENTS)  # may be on other machines


@dataclass(frozen=True)
class Scrape:
    """The series of one process at one moment.

    Attributes:
        values: By name and labels (sorted by name), the value; empty if the process did not answer.
        problem: Why it did not answer; empty if it did.
    """

    values: Mapping[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)
    problem: str = ""

    def value(self, name: str, **labels: str) -> float | None:
        """Returns one series; None if it is absent."""
        return self.values.get((name, tuple(sorted(labels.items()))))

    def total(self, name: str, **labels: Collection[str]) -> float | None:
        r"""Returns a series summed over its labels; None if it is absent. `labels` restricts the values of a label.

        >>> text = 'rows_total{outcome="dead"} 2\nrows_total{outcome="rows"} 3'
        >>> Scrape(parsed(text)).total("rows_total"), Scrape(parsed(text)).total("rows_total", outcome=["dead"])
        (5.0, 2.0)
        """
        values = [value for _, value in self._matching(name, labels)]
        return sum(values) if values else None

    def buckets(self, name: str, **labels: Collection[str]) -> dict[float, float]:
        r"""Returns a histogram summed over its labels: by upper bound, how many observations were at most that.

        >>> text = 'step_seconds_bucket{le="0.1"} 2\nstep_seconds_bucket{le="+Inf"} 3'
        >>> Scrape(parsed(text)).buckets("step_seconds")
        {0.1: 2.0, inf: 3.0}
        """
        counts: dict[float, float] = {}
        for own_labels, value in self._matching(f"{name}_bucket", labels):
            bound = float(own_labels["le"])
            counts[bound] = counts.get(bound, 0.0) + value
        return counts

    def _matching(self, name: str, wanted: Mapping[str, Collection[str]]) -> Iterator[tuple[dict[str, str], float]]:
        for (series, labels), value in self.values.items():
            if series == name:
                own_labels = dict(labels)
                if all(own_labels.get(label) in values for label, values in wanted.items()):
                    yield own_labels, value

    def by(self, name: str, label: str) -> dict[str, float]:
        """Returns the values of a series by one of its labels.

        >>> Scrape(parsed('rows_total{outcome="dead"} 2')).by("rows_total", "outcome")
        {'dead': 2.0}
        """
        return {dict(labels)[label]: value for (series, labels), value in self.values.items() if series == name}


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Parses the Prometheus text format; leaves out NaN samples, which the process reports as unknown.

    >>> parsed('up{job="a"} 1')
    {('up', (('job', 'a'),)): 1.0}
    >>> parsed("lag NaN")
    {}
    """
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in text_string_to_metric_families(text + "\n")
        for sample in family.samples
        if not math.isnan(sample.value)
    }


def hosts(settings: Settings) -> dict[str, str]:
    """Returns the hosts of processes that `metrics.hosts` names.

    >>> from state.config.sections import MetricsSettings
    >>> hosts(Settings(metrics=MetricsSettings(hosts=("trainer=train-0",))))
    {'trainer': 'train-0'}

    Raises:
        SettingsError: An entry has an invalid form.
    """
    host_of = dict(entry.partition("=")[::2] for entry in settings.metrics.hosts)
    if not (host_of.keys() <= {*ELSEWHERE} and all(host_of.values())):
        raise SettingsError(
            f"metrics.hosts is {','.join(settings.metrics.hosts)}",
            f"write PART=HOST, PART one of {', '.join(ELSEWHERE)}",
        )
    return host_of


def targets(settings: Settings) -> dict[str, str]:
    """Returns the metrics URL of each process that these settings run.

    >>> list(targets(Settings()))
    ['stream', 'trainer', 'applier', 'worker', 'up', 'validation', 'console']

    Raises:
        SettingsError: An entry of `metrics.hosts` has an invalid form.
    """
    ports = {
        "stream": settings.stream.metrics_port,
        "trainer": settings.trainer.metrics_port,
        "applier": settings.serving.metrics_port,
    }
    others = {
        UP: (settings.up.metrics_port, True),
        "validation": (settings.up.validation_port, settings.validation.window_s > 0),
        SEGMENTS: (settings.up.segments_port, bool(settings.segments.expressions)),
        "probe": (settings.up.probe_port, settings.probe.every_s > 0),
    }
    elsewhere = hosts(settings)
    return {
        **{name: _metrics_url(settings, port, elsewhere.get(name)) for name, port in ports.items()},
        "worker": serving_address(settings, "/metrics"),
        **{name: _metrics_url(settings, port, elsewhere.get(name)) for name, (port, runs) in others.items() if runs},
        **({"console": console_address(settings, "/metrics")} if settings.console.port else {}),
    }


def urls(settings: Settings) -> dict[str, str]:
    """Returns the metrics URLs of the processes between a click and an answer, in the order of the data flow."""
    return {name: url for name, url in targets(settings).items() if name in (*LINE, "worker")}


def watched_urls(settings: Settings) -> dict[str, str]:
    """Returns the metrics URLs of processes that must run: the loop, `up`, and the process of segments if there are any."""
    return {name: url for name, url in targets(settings).items() if name in (*LINE, "worker", UP, SEGMENTS)}


def _metrics_url(settings: Settings, port: int, host: str | None = None) -> str:
    return f"http://{reached(host or settings.metrics.host)}:{port}/metrics"


def profile_url(settings: Settings, user: str = SAMPLE_USER) -> Address:
    """Returns the address of a profile on this machine.

    >>> profile_url(Settings())
    'http://127.0.0.1:8501/v1/profiles/shopper-1'
    """
    return serving_address(settings, f"/v1/profiles/{user}")


def fetch(url: str | urllib.request.Request, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """Returns status and body of a request; status 0 and the reason if the server or a credential is unavailable."""
    try:
        if isinstance(url, Address):
            return network.ask(url.request(), timeout_s, url.context())
    # The files with token and certificate cannot be read.
    except (OSError, ValueError, SettingsError) as problem:
        return 0, str(getattr(problem, "reason", problem))
    return network.ask(url, timeout_s)


def scrape_one(settings: Settings, process: str) -> Scrape:
    """Reads the metrics of one process between a click and an answer."""
    return scrape({process: urls(settings)[process]})[process]


def replicas(url: str) -> list[str]:
    """Returns the URLs of all processes behind a URL's host name, such as the pods of a headless service.

    >>> replicas("http://127.0.0.1:9102/metrics")
    ['http://127.0.0.1:9102/metrics']
    """
    parts = urllib.parse.urlsplit(url)
    try:
        infos = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except OSError:
        return [url]
    hosts = dict.fromkeys(f"[{peer[0]}]" if family == socket.AF_INET6 else str(peer[0]) for family, *_, peer in infos)
    return [parts._replace(netloc=f"{host}:{parts.port}").geturl() for host in hosts]


def scrape(addresses: Mapping[str, str], get: Callable[[str], tuple[int, str]] = fetch) -> dict[str, Scrape]:
    """Reads the metrics of all processes in parallel; `get` returns status and body of a URL."""

    def one(name: str, url: str) -> Scrape:
        # A name may resolve to a trainer and its standbys.
        scrapes = [answer(replica) for replica in (replicas(url) if name == "trainer" else (url,))]
        working = [scraped for scraped in scrapes if scraped.values and not scraped.value("springtide_trainer_standby")]
        return (working or [scraped for scraped in scrapes if scraped.values] or scrapes)[0]

    def answer(url: str) -> Scrape:
        status, body = get(url)
        if status != 200:
            return Scrape(problem=f"{url} does not answer ({body if status == 0 else f'status {status}'})")
        try:
            return Scrape(parsed(body))
        except ValueError as problem:
            return Scrape(problem=f"{url} answers with no metrics ({problem})")

    with ThreadPoolExecutor(max(1, len(addresses))) as pool:
        return dict(zip(addresses, pool.map(one, addresses, addresses.values()), strict=True))
