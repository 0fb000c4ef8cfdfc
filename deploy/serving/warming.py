"""Prepares a worker before it reports ready: its kernels, then one answer of each kind, so that the first client waits no longer than the second."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from deploy.serving.answer import FIELDS, Query
from deploy.serving.explaining.explaining import explain
from deploy.serving.host import Host
from deploy.serving.http_api.endpoints import encode
from deploy.serving.program import BATCHES
from deploy.serving.recommending.ranking import NamedItem, rank
from deploy.serving.recommending.recommending import WantedItems, recommend
from deploy.serving.recommending.similar import NearWanted, similar
from state.compiled.preparing import Kernels
from state.errors import SpringtideError
from state.process.garbage import keep_what_is_there

USER = "springtide-warm-up"
"""Whom the answers are about: nobody."""
ITEMS = BATCHES[-1] + 1
"""So many items are scored by the program for many pairs."""
POLL_S = 0.1

_log = logging.getLogger(__name__)


class Warming:
    """Prepares the worker of a host in its event loop.

    The event loop answers meanwhile: the kernels are compiled in a thread. Until they are ready the host answers
    `NotReady`, and until the answers of each kind were computed it is not ready.

    Args:
        host: What answers.
        kernels: Of this process.
    """

    def __init__(self, host: Host, kernels: Kernels) -> None:
        self._host, self._kernels = host, kernels
        host.kernels, host.warm = kernels, False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins; call it in the event loop."""
        # A daemon: a stop does not wait for the compiler.
        threading.Thread(target=self._kernels.prepare, name="kernels", daemon=True).start()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while not self._kernels.done or self._host.missing() != {"program": Host.COLD}:
            await asyncio.sleep(POLL_S)
        began_s = time.monotonic()
        for answer in one_of_each(self._host):
            try:
                answer()
            except SpringtideError as error:
                _log.info("an answer could not be prepared: %s", error)
            except Exception:  # noqa: BLE001 - clients may ask for others
                _log.exception("an answer could not be prepared")
            await asyncio.sleep(0)
        # Modules are 100,000 objects. A full collection that visits them stops all answers for 60 ms.
        keep_what_is_there()
        self._host.warm = True
        _log.info("ready: one answer of each kind prepared in %.1f s", time.monotonic() - began_s)


def one_of_each(host: Host) -> list[Callable[[], Any]]:
    """Computes an answer of each kind, about a user who is not known; none is counted or kept."""
    everything, lean = Query(USER, fields=FIELDS), Query(USER, fields=frozenset(), top=0)
    items = [NamedItem(str(number)) for number in range(ITEMS)]

    def profiles(count: int) -> Any:
        return [encode(answer.document()) for answer in host.predictor().profiles([everything] * count)]

    return [
        *(lambda count=count: profiles(count) for count in BATCHES),
        lambda: encode(_last(rank(host.predictor(), lean, items, host.impressions))),
        lambda: encode(_last(explain(host.predictor(), everything._replace(item="0"), None))),
        lambda: host.sources().turn(),
        lambda: encode(_last(recommend(host.predictor(), host.sources(), everything, WantedItems(1)))),
        lambda: encode(similar(host.predictor(), host.sources().near, lean, NearWanted(1, False))),
    ]


def _last(steps: Generator[None, None, Any]) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
