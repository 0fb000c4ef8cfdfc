"""Handles the console's requests that change something: each runs one of the operator's commands, with a reason.

Plans are kept in memory. A rollback executes only a plan that was shown, while control is the same as then.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from deploy.command_line import operation, parser
from deploy.formats import parse_time, parse_times
from deploy.operate import control, masking
from deploy.operate.branch import ServingBranch
from deploy.operate.control import SWITCHES
from deploy.operate.versions import open_registry
from deploy.serving.requests.access import OPERATE
from deploy.serving.requests.http import Endpoint, Request, Response, encode
from state.config.settings import Settings
from state.config.sources import UNITS_MS
from state.errors import BadRequest, ControlConflict, SpringtideError
from state.process.environment import acting, actor

MOST, KEEP_S = 32, 900.0
LISTED_S = {"versions": 3.0, "history": 1.0, "masks": 1.0, "jumps": 10.0}
"""How long each list is reused, seconds."""
LONGEST_REASON, LONGEST_NAME, MOST_SKIPS = 500, 64, 50
Answer = Callable[[Request], Awaitable[Response]]
Skips = Annotated[list[str], msgspec.Meta(max_length=MOST_SKIPS)]
Number = Annotated[int, msgspec.Meta(ge=1)]


def status_of(error: SpringtideError) -> int:
    """Returns the HTTP status of a command's error: client error, conflict or server error.

    >>> from state.errors import ControlConflict, LogError, SettingsError
    >>> status_of(SettingsError("--minutes x")), status_of(ControlConflict("generation 4")), status_of(LogError("away"))
    (400, 409, 503)
    """
    kinds = {"SettingsError": 400, "UnknownVersion": 404, "ControlConflict": 409, "UnfitVersion": 409, "UnfitMask": 409}
    return kinds.get(type(error).__name__, error.http_status)


class CommandRunner:
    """Runs the operator's commands for the console, one at a time: LMDB cannot open a store twice in a process.

    `stores` is held while a store is open.
    """

    def __init__(self, settings: Settings, now_ms: Callable[[], int]) -> None:
        self.settings, self.now_ms = settings, now_ms
        self.stores = threading.Lock()
        self._listing = threading.Lock()
        self._lists: dict[tuple[str, ...], tuple[float, Any]] = {}

    def run(self, words: Sequence[str]) -> Any:
        """Runs a command, the arguments as typed after `springtide`, and returns its JSON output.

        Pass untrusted values as `--option=VALUE`, so that they are never parsed as options.

        Raises:
            SettingsError: The arguments are invalid.
            SpringtideError: The command failed.
        """
        printed: list[str] = []
        line = [*words, "--output=json"]
        with self.stores:
            operation(words[0])(self.settings, parser().parse_args(line), self.now_ms(), printed.append)
        return json.loads(printed[-1])

    def listed(self, words: Sequence[str]) -> Any:
        """Returns the output of a listing command, cached for `LISTED_S`; one thread runs it, others wait."""
        key = tuple(words)
        with self._listing:
            read_s, result = self._lists.get(key, (-math.inf, None))
            if time.monotonic() - read_s > LISTED_S[words[0]]:
                # Old entries are dropped, so that the cache stays small.
                recent_s = time.monotonic() - 60.0
                self._lists = {words_read: entry for words_read, entry in self._lists.items() if entry[0] >= recent_s}
                result = self.run(words)
                self._lists[key] = time.monotonic(), result
            return result

    def forget(self) -> None:
        """Forgets the lists, after a change."""
        with self._listing:
            self._lists.clear()


class ShownPlan(NamedTuple):
    """A rollback plan that was shown to an operator.

    `words` are its arguments without reason and name, with absolute times. `shown_s` is monotonic.
    """

    words: tuple[str, ...]
    version: int
    shown_s: float


class PlanWanted(msgspec.Struct, forbid_unknown_fields=True):
    """The target of a rollback and what to exclude, as in `springtide rollback`; `users` are ids as in the clicks."""

    to: Number | None = None
    before: str = ""
    skip: Skips = []
    skip_time: Skips = []
    skip_item: Skips = []
    skip_category: Skips = []
    users: Skips = []
    pseudonyms: Skips = []
    minutes: Number | None = None
    mode: Literal["fast", "exact"] = "fast"
    follow_when_caught_up: bool = False


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """A change of control: the generation that was shown, the reason, and the operator's name."""

    generation: Number
    reason: str
    name: str = ""


class RollbackWanted(msgspec.Struct, forbid_unknown_fields=True):
    """A plan's digest, its version once more, the reason, and the operator's name."""

    plan: str
    confirm: Number
    reason: str
    name: str = ""


class PinWanted(Change):
    """A pin to a version."""

    version: Number = msgspec.field(default=0)


class UnmaskWanted(Change):
    """The removal of masks."""

    masks: Annotated[list[Number], msgspec.Meta(max_length=1000)] = []


EXAMPLES: dict[type, str] = {
    PlanWanted: '{"to": 7, "skip_time": ["20m..now"], "mode": "fast"}',
    RollbackWanted: '{"plan": "DIGEST", "confirm": 7, "reason": "bots", "name": "ann"}',
    PinWanted: '{"version": 7, "generation": 3, "reason": "odd answers", "name": "ann"}',
    UnmaskWanted: '{"masks": [1], "generation": 3, "reason": "it was a campaign", "name": "ann"}',
    Change: '{"generation": 3, "reason": "look first", "name": "ann"}',
}


class Steering:
    """The endpoints that change something; `changed` is called after a change, in the thread that made it."""

    def __init__(self, commands: CommandRunner, changed: Callable[[], None]) -> None:
        self._commands, self._changed = commands, changed
        # By digest. Only the event loop's thread uses them.
        self._plans: dict[str, ShownPlan] = {}

    def endpoints(self) -> list[Endpoint]:
        """Returns the endpoints."""
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
        wanted: PlanWanted = await request.document()
        generation, words, plan = await asyncio.to_thread(self._planned, wanted)
        digest = hashlib.sha256(json.dumps([words, plan["to"]]).encode()).hexdigest()
        self._plans.pop(digest, None)
        self._plans[digest] = ShownPlan((*words, f"--to={plan['to']}"), int(plan["to"]), time.monotonic())
        while len(self._plans) > MOST:
            del self._plans[next(iter(self._plans))]
        return Response(200, encode({"digest": digest, "generation": generation, "plan": plan}))

    def _planned(self, wanted: PlanWanted) -> tuple[int, list[str], dict[str, Any]]:
        now_ms, registry = self._commands.now_ms(), open_registry(self._commands.settings)
        current = control.current(registry)
        if wanted.users:
            # Replaced at once, so that neither plans nor errors contain a user id.
            salt = ServingBranch(registry, current).newest.salt
            users = masking.pseudonyms(self._commands.settings, wanted.users, salt)
            listed = [*wanted.pseudonyms, *(f"{user:016x}" for user in users)]
            wanted = msgspec.structs.replace(wanted, users=[], pseudonyms=listed)
        words = [*words_of(wanted, now_ms), f"--if-generation={current.generation}"]
        target = [f"--to={wanted.to}"] if wanted.to is not None else []
        if wanted.before:
            target.append(f"--before={parse_time(wanted.before, now_ms)}")
        shown = self._commands.run([*words, *target, "--dry-run", "--reason=a plan"])
        return current.generation, words, shown["plan"]

    async def _roll_back(self, request: Request) -> Response:
        wanted: RollbackWanted = await request.document()
        plan = self._plans.get(wanted.plan)
        if plan is None or time.monotonic() - plan.shown_s > KEEP_S:
            raise ControlConflict("no such plan was shown recently", "make the plan again and check it")
        if plan.version != wanted.confirm:
            raise ControlConflict(
                f"the plan rolls back to version {plan.version}, and {wanted.confirm} was confirmed",
                f"type {plan.version} if you want it",
            )
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
        return Response(200, encode(await asyncio.to_thread(self._run, line, f"{who} (console)")))

    def _run(self, line: Sequence[str], who: str) -> Any:
        try:
            with acting(who):
                return self._commands.run(line)
        finally:
            # Also after a failure: another client may have changed control.
            self._commands.forget()
            self._changed()


def words_of(wanted: PlanWanted, now_ms: int) -> list[str]:
    """Returns the words of a rollback without its target; times are written out, so that they mean the same later.

    >>> words_of(PlanWanted(skip=["0:5-9"], minutes=1, mode="exact"), 1_800_000_000_000)
    ['rollback', '--mode=exact', '--skip=0:5-9', '--skip-time=1799999940000..1800000000000']

    Raises:
        SettingsError: A time has an invalid form.
    """
    times = [parse_times(text, now_ms) for text in wanted.skip_time]
    if wanted.minutes is not None:
        times.append((now_ms - wanted.minutes * UNITS_MS["m"], now_ms))
    follow = ["--follow-when-caught-up"] if wanted.follow_when_caught_up else []
    skips = [
        *(f"--skip={offsets}" for offsets in wanted.skip),
        *(f"--skip-time={first}..{last}" for first, last in times),
        *(f"--skip-{column}={name}={first}..{last}" for column, name, first, last in masking.named_in(wanted, now_ms)),
        *(f"--skip-pseudonym={user}" for user in wanted.pseudonyms),
    ]
    return ["rollback", f"--mode={wanted.mode}", *follow, *skips]


def checked(text: str, what: str, longest: int) -> str:
    """Returns a text for the audit log, stripped; raises BadRequest if it is empty, too long, or not printable.

    >>> checked(" bots clicked ", "reason", 500)
    'bots clicked'
    """
    text = text.strip()
    if not text or len(text) > longest or not text.isprintable():
        raise BadRequest(
            f"the {what} is empty, too long, or has several lines", f"give up to {longest} characters", f"/{what}"
        )
    return text
