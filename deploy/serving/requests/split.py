"""Splits traffic during a rollout: sends a share of the users to the trial's workers, and records the exposures.

1. Read the user of the query; a keyed hash of the user decides the arm (`state/experiments/evidence.py`).
2. For the arm `trial`, forward the query unchanged to the workers at `rollout.address`.
3. If they do not answer, this worker answers, and the exposure records the failure.
4. The answer names its arm in the header `springtide-arm`, and the exposure is stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

import httpx
import msgspec

from deploy.serving.host_files import ExposureSpool
from deploy.serving.requests.forwarding import (
    MANY,
    ROUTES,
    Forwarder,
    QuestionBatch,
    answered_here,
    rows_of,
    user_in,
    whole,
)
from deploy.serving.requests.http import Request, Response
from deploy.serving.requests.parameters import MOST_PROFILES
from state import layout
from state.config.settings import Settings
from state.errors import BadRequest, RegistryError, SpringtideError
from state.events.identity import Salt, user_id
from state.experiments.evidence import ARMS, LIVE, TRIAL, Arm, Exposure, arm_of, encode_exposure, position_of
from state.experiments.experiment import Experiment, Experiments
from state.process.log_lines import SaidOnce

POLL_S = 0.25
PATIENCE = 10  # the experiment has this part of `serving.timeout_s` to answer; then the live version answers
_log = logging.getLogger(__name__)


class Split:
    """Splits the queries of one worker. Used in its event loop."""

    def __init__(self, settings: Settings, salt: Salt, now_ms: Callable[[], int]) -> None:
        self._salt, self._now_ms = salt, now_ms
        self._experiments = Experiments(settings)
        self._spool = ExposureSpool(settings.serving_dir / layout.EXPOSURES, now_ms, _log.warning)
        self._address = settings.rollout.address
        self._forwarder = Forwarder(settings.serving.timeout_s / PATIENCE)
        self._rolled_out: Experiment | None = None
        self._polled_s = float("-inf")
        self._warn_once = SaidOnce(_log.warning)

    async def answer(self, request: Request) -> Response:
        """Answers a request with its user's arm, or the endpoint if no rollout is open; raises what the endpoint
        raises.
        """
        experiment = self._open_rollout()
        if experiment is None or request.endpoint.name not in (*ROUTES, MANY):
            return await request.endpoint.answer(request)
        at_ms, began_s = self._now_ms(), time.perf_counter()
        body = b"" if request.scope["method"] == "GET" else await request.body()
        request = request._replace(receive=whole(body))
        if request.endpoint.name == MANY:
            batch = QuestionBatch.read(body)
            if batch is None or not 1 <= len(batch.users) <= MOST_PROFILES:
                # The endpoint reports the error.
                return await request.endpoint.answer(request)
            return await self._answer_batch(request, batch, experiment, at_ms)
        user = request.path.get("user_id") or user_in(body)
        if user is None:
            return await request.endpoint.answer(request)
        # 1.
        exposure = self._exposure(experiment, user, at_ms)
        # 2. 3.
        forwarded = await self._ask_trial(request, body) if exposure.arm == TRIAL else None
        failed = exposure.arm == TRIAL and forwarded is None
        try:
            response = forwarded or await request.endpoint.answer(request)
        except SpringtideError as error:
            if error.http_status >= 500:
                self._store([exposure], failed=ARMS, took_us=self._took_us(began_s))
            raise
        # 4. A refused query is not an exposure.
        if response.status < 400:
            self._store([exposure], failed=(TRIAL,) if failed else (), took_us=self._took_us(began_s))
        return response._replace(headers=[*response.headers, (b"springtide-arm", exposure.arm.encode())])

    async def _answer_batch(
        self, request: Request, batch: QuestionBatch, experiment: Experiment, at_ms: int
    ) -> Response:
        """Answers a batch, each row with its user's arm."""
        # 1.
        exposures = [self._exposure(experiment, user, at_ms) for user in batch.users]
        indices = {arm: [index for index, exposure in enumerate(exposures) if exposure.arm == arm] for arm in ARMS}
        try:
            # 2.
            answer = request.endpoint.answer
            trial, live = await asyncio.gather(
                self._trial_rows(request, batch, indices[TRIAL]), answered_here(request, batch, indices[LIVE], answer)
            )
            # 3.
            failed = trial is None
            rows = [*(await answered_here(request, batch, indices[TRIAL], answer) if trial is None else trial), *live]
        except BadRequest:
            # The error names a position in a part of the batch; the whole batch gives the right position.
            return await request.endpoint.answer(request)
        except SpringtideError as error:
            if error.http_status >= 500:
                self._store(exposures, failed=ARMS)
            raise
        # 4.
        self._store(exposures, failed=(TRIAL,) if failed else ())
        row_of = dict(zip([*indices[TRIAL], *indices[LIVE]], rows, strict=True))
        return Response(200, joined((exposure.arm, row_of[index]) for index, exposure in enumerate(exposures)))

    async def _trial_rows(self, request: Request, batch: QuestionBatch, indices: Sequence[int]) -> list[bytes] | None:
        """Returns the rows from the trial's workers; None if they do not answer, or fail."""
        if not indices:
            return []
        return rows_of(await self._ask_trial(request, batch.part(indices)), len(indices))

    def _exposure(self, experiment: Experiment, user: str, at_ms: int) -> Exposure:
        """Builds a user's exposure with what is known before the answer."""
        assert experiment.rollout is not None
        pseudonym, share = user_id(self._salt, user), experiment.share
        arm = arm_of(position_of(self._salt, experiment.name, pseudonym), share)
        return Exposure(f"{pseudonym:016x}", experiment.name, experiment.rollout.step, share, arm, at_ms, None)

    def _store(self, exposures: Sequence[Exposure], failed: Sequence[Arm], took_us: int | None = None) -> None:
        """Stores exposures; those of the arms `failed` are marked as failed."""
        stored = (
            msgspec.structs.replace(exposure, took_us=took_us, failed=exposure.arm in failed) for exposure in exposures
        )
        self._spool.write(b"\n".join(map(encode_exposure, stored)))

    def _took_us(self, began_s: float) -> int:
        return round(1e6 * (time.perf_counter() - began_s))

    def close(self) -> None:
        """Closes the file of exposures."""
        self._spool.close()

    def _open_rollout(self) -> Experiment | None:
        """Returns the experiment with an open rollout, at most `POLL_S` old; the last known one if it cannot be read."""
        now_s = time.perf_counter()
        if now_s - self._polled_s >= POLL_S:
            self._polled_s = now_s
            try:
                self._rolled_out = self._experiments.document().rolled_out
                self._warn_once.clear()
            except RegistryError as error:
                self._warn_once(f"experiments cannot be read: {error}; users keep their arms")
        return self._rolled_out if self._rolled_out is not None and self._rolled_out.is_split else None

    async def _ask_trial(self, request: Request, body: bytes) -> Response | None:
        """Forwards a request to the trial's workers; returns None if they do not answer, or fail."""
        try:
            response = await self._forwarder.send(self._address, request, body)
        except httpx.HTTPError as error:
            self._warn_once(f"the trial does not answer ({type(error).__name__}): {error}")
            return None
        if response.status in (401, 403, 429) or response.status >= 500:
            self._warn_once(f"the trial answers {response.status}")
            return None
        return response


def joined(answers: Iterable[tuple[Arm, bytes]]) -> bytes:
    """Builds the answer to a batch; each row names its arm.

    >>> joined([("live", b'{"a":1}'), ("trial", b'{"a":2}')])
    b'{"profiles":[{"a":1,"arm":"live"},{"a":2,"arm":"trial"}]}'
    """
    return b'{"profiles":[' + b",".join(b'%s,"arm":"%s"}' % (row[:-1], arm.encode()) for arm, row in answers) + b"]}"
