"""Types of the answers of the HTTP API, for server and client. Fields that a later release adds are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field, json

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
PublicId = Annotated[str, Meta(pattern="^[0-9a-f]{16}$", description="16 hexadecimal digits.")]
Clock = Annotated[
    Literal["event", "wall", "request"],
    Meta(
        description="Where the moment comes from: the newest click's time and the wall time since, the wall clock, the request."
    ),
]
Reason = Annotated[
    Literal["again", "category", "next", "similar", "popular"],
    Meta(
        description="The user clicked it; of a category of the user; it, or its category, came next over all users; it is near to the user; popular."
    ),
]
Sources = Annotated[
    Mapping[str, int],
    Meta(description='"topic id:partition" of the clicks, and the position up to which the version has learned.'),
]
Churn = Annotated[
    float,
    Meta(ge=0.0, le=1.0, description="That no event of the user comes in the next `churn.days`; absent if unknown."),
]
Arm = Annotated[Literal["trial", "live"], Meta(description="Of a row of a batch, while a rollout is open.")]
Attributes = Annotated[
    dict[str, str | None], Meta(description="Values by name, null where the record has none; empty without a record.")
]


class Version(Struct, frozen=True, omit_defaults=True):
    """The model version that the whole response was computed from."""

    number: Annotated[int, Meta(ge=1)]
    epoch: Annotated[int, Meta(ge=1)]
    age_s: Annotated[float, Meta(description="Seconds since it was published.")]
    mask_generation: Annotated[
        int, Meta(ge=0, description="Control generation of the mask that the windows leave out; 0 without one.")
    ]
    sources: Sources | None = None


class Interest(Struct, frozen=True):
    """A category that the user may click next."""

    label: Annotated[str, Meta(description="Its name; its id where no click named it yet.")]
    id: PublicId
    probability: Probability


class Engagement(Struct, frozen=True):
    """The probability that the user engages with the requested item."""

    item: str
    probability: Probability
    attributes: Attributes


class About(Struct, frozen=True, kw_only=True):
    """The user, the model version and the time that a response refers to."""

    user_id: Annotated[str, Meta(description="As it was asked for.")]
    known: Annotated[bool, Meta(description="The user has a visible click, or a row in this version.")]
    cold_start: Annotated[bool, Meta(description="Not known: the answer is the one for unknown users.")]
    version: Version
    at: Annotated[str, Meta(description="The time that windows and features speak of, ISO 8601 in UTC.")]
    at_ms: Annotated[int, Meta(ge=0, description="The same in milliseconds since 1970.")]
    clock: Clock


class Profile(About, frozen=True, kw_only=True, omit_defaults=True):
    """The profile of one user at one time."""

    interests: Annotated[
        list[Interest], Meta(description="The most probable first; the probabilities of all of them sum to 1.")
    ]
    churn: Churn | None = None
    engagement: Engagement | None = None
    vector: Annotated[list[float], Meta(description="The user's vector, float32.")] | None = None
    features: Annotated[dict[str, int], Meta(description="Counts, decayed counts and ages by name.")] | None = None
    attributes: Attributes | None = None
    arm: Arm | None = None


class BehindIt(Struct, frozen=True):
    """An event that contributed to a reason."""

    at: str
    action: str | None = None
    category: str | None = None
    item: str | None = None


class ReasonFor(Struct, frozen=True):
    """One contribution to the difference between the user's probability and that of an unknown user."""

    kind: Annotated[
        str,
        Meta(description="Its source: windows of a category, counts of an action, the user's row and so on."),
    ]
    about: Annotated[str | None, Meta(description="The category or the action.")]
    share: Annotated[float, Meta(description="Its effect on the probability; may be negative.")]
    words: Annotated[str, Meta(description="An explanation in words.")]
    events: Annotated[list[BehindIt], Meta(description="The newest events that it comes from.")]


class Explanation(About, frozen=True, kw_only=True):
    """Why a probability has its value: its difference from that of an unknown user, split into contributions."""

    label: Annotated[str | None, Meta(description="The category, where one is explained.")]
    item: Annotated[str | None, Meta(description="The item, where an engagement is explained.")]
    probability: Probability
    cold_start_probability: Probability
    reasons: Annotated[list[ReasonFor], Meta(description="The largest first.")]
    rest: Annotated[float, Meta(description="The sum of all smaller parts.")]


class Profiles(Struct, frozen=True):
    """Profiles in request order, all of one model version; during a rollout, all of one arm."""

    profiles: list[Profile]


class RankedItem(Struct, frozen=True, omit_defaults=True):
    """An item of the request, ranked."""

    item: str
    category: Annotated[str | None, Meta(description="The category that it counts as of; null where none is known.")]
    probability: Probability
    bid: Annotated[float, Meta(ge=0.0, description="The caller's; only where items have bids.")] | None = None
    expected_value: Annotated[float, Meta(ge=0.0, description="Probability × bid; likewise.")] | None = None


class LeftOutItem(Struct, frozen=True):
    """An item of the request that was not ranked."""

    item: str
    reason: Annotated[Literal["cap"], Meta(description="The user saw it as often as its cap allows.")]
    seen: Annotated[int, Meta(ge=1, description="How often within the cap's time.")]


class Ranking(About, frozen=True, kw_only=True, omit_defaults=True):
    """The items of a request by descending probability or, with bids, by descending expected value."""

    items: list[RankedItem]
    left_out: Annotated[
        list[LeftOutItem],
        Meta(description="Those that have reached their caps, in the order of the request; absent without any."),
    ] = []


class RecommendedItem(Struct, frozen=True):
    """A recommended item and the reason for it."""

    item: Annotated[str, Meta(description="As clicks name it; its id where no name is known.")]
    id: PublicId
    category: Annotated[str, Meta(description="The name of its category; its id where no click named it yet.")]
    probability: Probability
    reason: Reason


class Recommendations(About, frozen=True, kw_only=True):
    """Items for one user: first those the user comes back to, then by probability, except for the share of new ones."""

    items: list[RecommendedItem]


class SimilarItem(Struct, frozen=True):
    """An item that is similar to a user."""

    item: Annotated[str, Meta(description="As clicks name it; its id where no name is known.")]
    id: PublicId
    category: Annotated[
        str | None,
        Meta(description="The name of its category, its id where no click named it yet; null where none is known."),
    ]
    similarity: Annotated[float, Meta(description="What the item itself adds to the logit of the user's engagement.")]


class SimilarItems(About, frozen=True, kw_only=True):
    """The items most similar to one user, in descending order."""

    items: list[SimilarItem]


class SegmentSize(Struct, frozen=True):
    """A segment: its name, its expression, and its number of users."""

    name: str
    expression: str
    size: int


class SegmentSizes(Struct, frozen=True):
    """All segments, in the order of the settings."""

    segments: list[SegmentSize]


class SegmentMember(Struct, frozen=True):
    """A member: the pseudonym, the log time of joining, and the version that decided it."""

    pseudonym: PublicId
    since: str
    since_ms: int
    version: int


class SegmentPage(SegmentSize, frozen=True):
    """A page of members in the order of pseudonyms; `next` is the start of the next page, null on the last page."""

    members: list[SegmentMember]
    next: PublicId | None


class UserSegment(Struct, frozen=True):
    """Whether a user is in a segment, since when, and by which version."""

    segment: str
    user_id: str
    is_member: bool = field(name="in")
    since: str | None
    since_ms: int | None
    version: int | None


class Lookalike(Struct, frozen=True):
    """A lookalike: the pseudonym, and the mean cosine similarity to the members."""

    pseudonym: PublicId
    similarity: float


class ListPrecision(Struct, frozen=True):
    """Precision at k: the share of held-out members in the first k, ranked by similarity, by clicks, and by chance."""

    k: int
    lookalikes: float
    most_clicks: float
    chance: float


class SegmentLookalikes(Struct, frozen=True):
    """The users nearest to the members at the time of listing, nearest first, without users who have joined since."""

    segment: str
    version: int
    at: str
    at_ms: int
    members: int
    users: int
    lookalikes: list[Lookalike]
    precision: list[ListPrecision]


class Alive(Struct, frozen=True):
    """The process is running."""

    status: Literal["ok"]


class RefusedVersion(Struct, frozen=True):
    """A version newer than the one being served, and why it is not served."""

    version: int
    reason: str


class Readiness(Struct, frozen=True):
    """Whether a worker can serve requests, and what it lacks; `error` and `do` give the cause and the remedy.

    `degraded` maps a part (`version`, `histories`) that gets no updates to the reason. Answers continue.
    """

    ready: bool
    version: bool = False
    program: bool = False
    histories: bool = False
    refused: RefusedVersion | None = None
    degraded: dict[str, str] = {}
    error: str = ""
    do: str = ""


class ServingHost(Struct, frozen=True):
    """A serving host, and the shares of users that it holds, 0 to 63, as in `0-15,32`."""

    address: str
    shares: str


class ServingHosts(Struct, frozen=True):
    """The live hosts that hold parts of the users."""

    hosts: list[ServingHost]


class Failure(Struct, frozen=True):
    """Why a request failed, what to do, and, if one part of the request is at fault, which."""

    error: str
    do: str = ""
    where: Annotated[str, Meta(description="A parameter, or a JSON pointer into the body.")] = ""


class ModelFailure(Struct, frozen=True):
    """An error in the format of TensorFlow Serving."""

    error: str


class Status(Struct, frozen=True):
    """The status of a version, in the format of TensorFlow Serving."""

    error_code: Literal["OK"]
    error_message: str


class ModelVersion(Struct, frozen=True):
    """A version that can be requested."""

    version: Annotated[str, Meta(pattern="^[0-9]+$")]
    state: Literal["AVAILABLE"]
    status: Status


class ModelStatus(Struct, frozen=True):
    """The versions that can be requested, starting with the one that is served."""

    model_version_status: list[ModelVersion]


class ModelSpec(Struct, frozen=True):
    """The model and version that the metadata describes."""

    name: str
    signature_name: str
    version: Annotated[str, Meta(pattern="^[0-9]+$")]


class ModelMetadata(Struct, frozen=True):
    """The signatures of a version, in the format of TensorFlow Serving."""

    model_spec: ModelSpec
    metadata: dict[str, dict[str, Any]]


class ModelPredictions(Struct, frozen=True):
    """Predictions by row: one object a row, or the value itself if there is only one output."""

    predictions: list[Any]


class ModelOutputs(Struct, frozen=True):
    """Predictions by column: a list for each output, or the list itself if there is only one output."""

    outputs: dict[str, Any] | list[Any]


# msgspec analyses a type at its first use, and two threads of the user's program that do so at once crash the process.
for _kind in [*vars().values()]:
    if isinstance(_kind, type) and issubclass(_kind, Struct) and _kind is not Struct:
        json.Decoder(_kind)
