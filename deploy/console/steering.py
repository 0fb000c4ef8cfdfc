"""Handles the console's requests that change something.

Each call runs one of the operator's commands, with a reason, on control as the page showed it.

    POST /api/plan       what a rollback would do; changes nothing
    POST /api/rollback   executes a plan that was shown
    POST /api/pin /api/follow /api/hold /api/release /api/pause /api/resume /api/unmask

Plans of rollbacks are kept in memory. A rollback executes only a plan that was shown, and only
while control is the same as when it was shown.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from deploy.command_line import parser
from deploy.operate import control, history, rollback, versions
from deploy.operate.commands import Say
from deploy.operate.control import SWITCHES
from deploy.operate.times import parse_time, parse_times
from deploy.operate.versions import open_registry
from deploy.serving.requests.access import OPERATE
from deploy.serving.requests.http import Endpoint, Request, Response, encode
from state.config.settings import Settings
from state.config.sources import UNITS_MS
from state.errors import BadRequest, ControlConflict, RegistryError, SpringtideError
from state.process.actor import acting, actor

MOST, KEEP_S = 32, 900.0
LONGEST_REASON, LONGEST_NAME, MOST_SKIPS = 500, 64, 50
Answer = Callable[[Request], Awaitable[Response]]
Skips = Annotated[list[str], msgspec.Meta(max_length=MOST_SKIPS)]
Number = Annotated[int, msgspec.Meta(ge=1)]


COMMANDS = {
    "versions": versions.versions,
    "history": history.history,
    "masks": history.masks,
    "rollback": rollback.rollback,
    "pin": control.pin,
    "follow": control.follow,
    "unmask": control.unmask,
    **dict.fromkeys(control.SWITCHES, control.switch),
}
"""By command, the function that runs it; the function outputs one JSON document."""


def run_command(settings: Settings, words: Sequence[str], now_ms: int) -> Any:
    """Runs a command and returns its JSON output.

    Args:
        settings: Settings of the system.
        words: The arguments as typed after `springtide`. Pass untrusted values as `--option=VALUE`, so that they are
            never parsed as options.
        now_ms: Wall clock.

    Raises:
        SettingsError: The arguments are invalid.
        SpringtideError: The command failed.
    """
    said: list[str] = []
    say: Say = said.append
    line = [*words, "--output=json"]
    COMMANDS[words[0]](settings, parser(line).parse_args(line), now_ms, say)
    return json.loads(said[-1])


def status_of(error: SpringtideError) -> int:
    """Returns the HTTP status of a command's error: client error, conflict or server error.

    >>> from state.errors import ControlConflict, LogError, SettingsError
    >>> status_of(SettingsError("--minutes x")), status_of(ControlConflict("generation 4")), status_of(LogError("away"))
    (400, 409, 503)
    """
    kinds = {"SettingsError": 400, "UnknownVersion": 404, "ControlConflict": 409, "UnfitVersion": 409, "UnfitMask": 409}
    return kinds.get(type(error).__name__, error.http_status)


class ReadCache:
    """Cache of recently read values; thread-safe.

    Args:
        clock_s: Monotonic seconds.

    >>> now_s = [0.0]
    >>> lately, numbers = ReadCache(lambda: now_s[0]), iter(range(9))
    >>> [lately.of("versions", 2.0, lambda: next(numbers)) for _ in range(2)]
    [0, 0]
    >>> now_s[0] = 3.0
    >>> lately.of("versions", 2.0, lambda: next(numbers))
    1
    >>> lately.forget()
    >>> lately.of("versions", 2.0, lambda: next(numbers))
    2
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._found: dict[Hashable, tuple[float, Any]] = {}

    def of(self, key: Hashable, keep_s: float, read: Callable[[], Any]) -> Any:
        """Returns what `read` returned within the last `keep_s`, or calls it; one thread reads, others wait for it."""
        with self._lock:
            known = self._found.get(key)
            if known is None or self._clock_s() - known[0] > keep_s:
                # Entries older than a minute are dropped, so that the cache stays small.
                self._found = {one: found for one, found in self._found.items() if self._clock_s() - found[0] <= 60.0}
                known = self._found[key] = (self._clock_s(), read())
            return known[1]

    def forget(self) -> None:
        """Clears the cache, after a change."""
        with self._lock:
            self._found.clear()


@dataclass(frozen=True)
class ShownPlan:
    """A rollback as it was shown.

    Attributes:
        words: The command without reason and name, all of its times written out.
        version: The version gone back to.
        shown_s: When, monotonic seconds.
    """

    words: tuple[str, ...]
    version: int
    shown_s: float


class ShownPlans:
    """The plans of the last quarter of an hour, by digest. Only the event loop's thread may ask.

    Args:
        clock_s: Monotonic seconds.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._plans: OrderedDict[str, ShownPlan] = OrderedDict()

    def add(self, words: Sequence[str], plan: Mapping[str, Any]) -> str:
        """Keeps one; returns its digest.

        Args:
            words: See `ShownPlan`.
            plan: The plan's document.

        >>> plans = ShownPlans(lambda: 0.0)
        >>> digest = plans.add(["rollback", "--to=3"], {"to": 3})
        >>> plans.take(digest, 3).words
        ('rollback', '--to=3')
        """
        digest = hashlib.sha256(json.dumps([list(words), plan["to"]]).encode()).hexdigest()
        self._plans[digest] = ShownPlan(tuple(words), int(plan["to"]), self._clock_s())
        self._plans.move_to_end(digest)
        while len(self._plans) > MOST:
            self._plans.popitem(last=False)
        return digest

    def take(self, digest: str, confirmed: int) -> ShownPlan:
        """The plan of a digest.

        Args:
            digest: Of `add`.
            confirmed: The version that the operator types once more.

        Raises:
            ControlConflict: No such plan was shown recently, or it rolls back to another version.
        """
        found = self._plans.get(digest)
        if found is None or self._clock_s() - found.shown_s > KEEP_S:
            raise ControlConflict("no such plan was shown recently", "make the plan again and check it")
        if found.version != confirmed:
            raise ControlConflict(
                f"the plan rolls back to version {found.version}, and {confirmed} was confirmed",
                f"type {found.version} if you want it",
            )
        return found


class PlanWanted(msgspec.Struct, forbid_unknown_fields=True):
    """Where to go back to, and what to leave out, as `springtide rollback` has it."""

    to: Number | None = None
    before: str = ""
    skip: Skips = []
    skip_time: Skips = []
    minutes: Number | None = None
    mode: Literal["fast", "exact"] = "fast"
    follow_when_caught_up: bool = False


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """A change of control: the generation that was shown, why, and who asks."""

    generation: Number
    reason: str
    name: str = ""


class RollbackWanted(msgspec.Struct, forbid_unknown_fields=True):
    """A plan's digest, its version once more, why, and who asks."""

    plan: str
    confirm: Number
    reason: str
    name: str = ""


class PinWanted(Change):
    """Likewise, of one version."""

    version: Number = msgspec.field(default=0)


class UnmaskWanted(Change):
    """Likewise, of some masks."""

    masks: Annotated[list[Number], msgspec.Meta(max_length=1000)] = []


EXAMPLES: dict[type, str] = {
    PlanWanted: '{"to": 7, "skip_time": ["20m..now"], "mode": "fast"}',
    RollbackWanted: '{"plan": "DIGEST", "confirm": 7, "reason": "bots", "name": "ann"}',
    PinWanted: '{"version": 7, "generation": 3, "reason": "odd answers", "name": "ann"}',
    UnmaskWanted: '{"masks": [1], "generation": 3, "reason": "it was a campaign", "name": "ann"}',
    Change: '{"generation": 3, "reason": "look first", "name": "ann"}',
}


class Steering:
    """The endpoints that change something, and the plan.

    Args:
        settings: Of the system.
        lately: Lists read lately, which a change makes old.
        stores: Held while a store is open.
        changed: Called after a change, in the thread that made it.
        now_ms: Wall clock.
    """

    def __init__(
        self,
        settings: Settings,
        lately: ReadCache,
        stores: threading.Lock,
        changed: Callable[[], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._settings, self._lately, self._stores, self._changed = settings, lately, stores, changed
        self._now_ms = now_ms
        self._plans = ShownPlans()

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        bodies: dict[str, type[msgspec.Struct]] = {
            **dict.fromkeys(("follow", *SWITCHES), Change),
            "pin": PinWanted,
            "unmask": UnmaskWanted,
        }
        own: dict[str, tuple[Answer, type[msgspec.Struct]]] = {
            "plan": (self._plan, PlanWanted),
            "rollback": (self._roll_back, RollbackWanted),
        }
        answers = own | {name: (self._change, body) for name, body in bodies.items()}
        return [
            Endpoint(name, ("POST",), f"/api/{name}", answer, body=(body,), example=EXAMPLES[body], role=OPERATE)
            for name, (answer, body) in answers.items()
        ]

    async def _plan(self, request: Request) -> Response:
        """The plan, its digest, and the generation that it is for."""
        wanted: PlanWanted = await request.document()
        generation, words, plan = await asyncio.to_thread(self._planned, wanted)
        digest = self._plans.add([*words, f"--to={plan['to']}"], plan)
        return Response(200, encode({"digest": digest, "generation": generation, "plan": plan}))

    def _planned(self, wanted: PlanWanted) -> tuple[int, list[str], dict[str, Any]]:
        now_ms = self._now_ms()
        found = open_registry(self._settings).control()
        if found is None:
            raise RegistryError("no control yet", "start the trainer first, it writes generation 1")
        words = [*words_of(wanted, now_ms), f"--if-generation={found.generation}"]
        target = [f"--to={wanted.to}"] if wanted.to is not None else []
        if wanted.before:
            target.append(f"--before={parse_time(wanted.before, now_ms)}")
        with self._stores:
            shown = run_command(self._settings, [*words, *target, "--dry-run", "--reason=a plan"], now_ms)
        return found.generation, words, shown["plan"]

    async def _roll_back(self, request: Request) -> Response:
        wanted: RollbackWanted = await request.document()
        plan = self._plans.take(wanted.plan, wanted.confirm)
        return await self._done(plan.words, wanted.reason, wanted.name)

    async def _change(self, request: Request) -> Response:
        wanted: Change = await request.document()
        words = [request.endpoint.name, f"--if-generation={wanted.generation}"]
        if isinstance(wanted, PinWanted):
            words.append(str(wanted.version))
        if isinstance(wanted, UnmaskWanted):
            words += map(str, wanted.masks)
        return await self._done(words, wanted.reason, wanted.name)

    async def _done(self, words: Sequence[str], reason: str, name: str) -> Response:
        line = [*words, f"--reason={checked(reason, 'reason', LONGEST_REASON)}"]
        who = checked(name, "name", LONGEST_NAME) if name.strip() else actor()
        return Response(200, encode(await asyncio.to_thread(self._give, line, f"{who} (console)")))

    def _give(self, line: Sequence[str], who: str) -> Any:
        try:
            with self._stores, acting(who):
                return run_command(self._settings, line, self._now_ms())
        finally:
            # Also after a failure: somebody else may have changed control.
            self._lately.forget()
            self._changed()


def words_of(wanted: PlanWanted, now_ms: int) -> list[str]:
    """A rollback's words without its target, each time written out, so that they mean the same later.

    Args:
        wanted: What is wanted.
        now_ms: Wall clock.

    >>> words_of(PlanWanted(skip=["0:5-9"], minutes=1, mode="exact"), 1_800_000_000_000)
    ['rollback', '--mode=exact', '--skip=0:5-9', '--skip-time=1799999940000..1800000000000']

    Raises:
        SettingsError: It is not a time.
    """
    times = [parse_times(text, now_ms) for text in wanted.skip_time]
    if wanted.minutes is not None:
        times.append((now_ms - wanted.minutes * UNITS_MS["m"], now_ms))
    follow = ["--follow-when-caught-up"] if wanted.follow_when_caught_up else []
    skips = [*(f"--skip={one}" for one in wanted.skip), *(f"--skip-time={first}..{last}" for first, last in times)]
    return ["rollback", f"--mode={wanted.mode}", *follow, *skips]


def checked(text: str, what: str, longest: int) -> str:
    """Returns a text for the audit log, stripped.

    >>> checked(" bots clicked ", "reason", 500)
    'bots clicked'

    Raises:
        BadRequest: It is empty, too long, or has what cannot be shown.
    """
    text = text.strip()
    if not text or len(text) > longest or not text.isprintable():
        raise BadRequest(
            f"the {what} is empty, too long, or has several lines", f"give up to {longest} characters", f"/{what}"
        )
    return text
