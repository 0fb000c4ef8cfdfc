"""Who may ask the console what, and from which page: tokens and origins; what each answer tells a browser.

Nothing is a cookie, so a browser sends nothing by itself that another page
could make use of: whoever changes something carries the token `operate` in a
header. Beside it the request says that it is JSON, which a form cannot, and
comes from this page, where a browser says from where. Where reading needs no
token, the connection checks the host of each request (`deploy/serving/edge/hosts.py`).
"""

from __future__ import annotations

from deploy.serving.edge.tokens import OPERATE, READ, Tokens, are_wanted
from deploy.serving.http_api.endpoints import Endpoint, Headers, Scope, header
from state.config.settings import Settings
from state.errors import BadRequest, Forbidden

READING = ("GET", "HEAD")
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""What the page may load: its own files, and nothing that is written into the page itself."""
TOLD: Headers = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
"""Headers of every answer."""


class RequestGuard:
    """Lets requests through, or says why not.

    Args:
        tokens: Of both roles.
        open_to_read: Whether whoever reaches the port may read.
    """

    def __init__(self, tokens: Tokens, open_to_read: bool) -> None:
        self._tokens, self.open_to_read = tokens, open_to_read

    def require(self, scope: Scope, endpoint: Endpoint) -> None:
        """Lets through who may ask for this.

        Raises:
            Unauthorized: It needs a token, and there is none or none of ours.
            Forbidden: The token is of another role, or the request comes from another page.
            BadRequest: It changes something and is no JSON.
        """
        if scope["method"] not in READING:
            require_own_page(scope)
        if endpoint.role != READ or not self.open_to_read:
            self._tokens.require(header(scope, b"authorization"), endpoint.role)

    def role(self, scope: Scope) -> str:
        """The role of a request's token: `operate`, `read`, or nothing."""
        for role in (OPERATE, READ):
            try:
                self._tokens.require(header(scope, b"authorization"), role)
                return role
            except BadRequest:
                continue
        return ""


def open_to_read(settings: Settings) -> bool:
    """Whether reading needs no token: neither here nor at the answers, which the console looks up.

    >>> open_to_read(Settings())
    True
    """
    return not are_wanted(settings) and not are_wanted(settings, settings.console.host)


def require_own_page(scope: Scope) -> None:
    """Refuses what a browser sends for another page.

    Raises:
        Forbidden: It does.
        BadRequest: The body is not said to be JSON.
    """
    origin, site = header(scope, b"origin"), header(scope, b"sec-fetch-site")
    foreign = origin is not None and origin.partition("://")[2] != header(scope, b"host")
    if foreign or site not in (None, "same-origin", "none"):
        raise Forbidden("the request comes from another page", "ask from the console's own page")
    if (header(scope, b"content-type") or "").partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("the body is not said to be JSON", "send content-type: application/json")
