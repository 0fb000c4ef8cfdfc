"""Python client for the HTTP API of a Springtide serving host, with typed responses. It imports no server code."""

from springtide_client.answers import (
    Engagement,
    Explanation,
    Interest,
    LeftOutItem,
    Profile,
    RankedItem,
    Ranking,
    Readiness,
    Recommendations,
    RecommendedItem,
    SimilarItem,
    SimilarItems,
    Version,
)
from springtide_client.asynchronous import AsyncClient
from springtide_client.errors import (
    ClientError,
    Overloaded,
    Refused,
    ServerFailed,
    TimedOut,
    UnexpectedAnswer,
    Unreachable,
)
from springtide_client.questions import Cap, Item, User
from springtide_client.retrying import Retries
from springtide_client.synchronous import Client

__all__ = [
    "AsyncClient",
    "Cap",
    "Client",
    "ClientError",
    "Engagement",
    "Explanation",
    "Interest",
    "Item",
    "LeftOutItem",
    "Overloaded",
    "Profile",
    "RankedItem",
    "Ranking",
    "Readiness",
    "Recommendations",
    "RecommendedItem",
    "Refused",
    "Retries",
    "ServerFailed",
    "SimilarItem",
    "SimilarItems",
    "TimedOut",
    "UnexpectedAnswer",
    "Unreachable",
    "User",
    "Version",
]
