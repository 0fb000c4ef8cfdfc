"""Which host a request may name, where nothing else keeps a foreign page out.

A page of somebody else can have its own name lead to 127.0.0.1 (DNS
rebinding). A browser then sends that page's requests here, with that name as
their host. An address or `localhost` cannot be such a name.
"""

from __future__ import annotations

import ipaddress

from state.errors import Forbidden, NotHttp


def one_host(hosts: list[bytes]) -> str:
    """The host of a request of HTTP/1.1, out of the values of its header `host`.

    >>> one_host([b"localhost"])
    'localhost'

    Raises:
        NotHttp: There is none, or more than one.
    """
    if len(hosts) != 1:
        raise NotHttp(f"the request has {len(hosts)} headers `host`", "send one")
    return hosts[0].decode("latin-1")


def require_own_host(host: str) -> None:
    """Refuses a name that may be anybody's.

    >>> for host in ("127.0.0.1:8502", "localhost", "[::1]:8502"):
    ...     require_own_host(host)
    >>> require_own_host("shop.example:8502")
    Traceback (most recent call last):
    state.errors.Forbidden: the host of the request is 'shop.example:8502', ...

    Raises:
        Forbidden: It is neither an address nor `localhost`.
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() == "localhost":
        return
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        raise Forbidden(
            f"the host of the request is {host[:100]!r}, and without tokens only an address or localhost is answered",
            "ask by the address, or set serving.tokens to on",
        ) from None
