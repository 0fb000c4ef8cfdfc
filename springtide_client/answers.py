"""What is answered: one type for each answer of the HTTP interface, of which its OpenAPI document is made too.

Fields of a later release are passed over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
PublicId = Annotated[str, Meta(pattern="^[0-9a-f]{16}$", description="16 hexadecimal digits.")]
Clock = Annotated[
    Literal["event", "wall", "request"],
    Meta(
        description="Where the moment comes from: the newest click's time and the wall time since, the wall clock, the request."
    ),
]
Reason = Annotated[
    Literal["again", "fresh", "category", "next", "similar", "popular"],
    Meta(
        description="The user clicked it; it is new; of a category of the user; of one that came next over all users; it is near to the user; popular."
    ),
]
Attributes = Annotated[
    dict[str, str | None], Meta(description="Values by name, null where the record has none; empty without a record.")
]


class Version(Struct, frozen=True):
    """The one version that all of an answer is from."""

    number: Annotated[int, Meta(ge=1)]
    epoch: Annotated[int, Meta(ge=1)]
    age_s: Annotated[float, Meta(description="Seconds since it was published.")]
    mask_generation: Annotated[
        int, Meta(ge=0, description="Control generation of the mask that the windows leave out; 0 without one.")
    ]
    sources: (
        Annotated[
            dict[str, int],
            Meta(
                description='"topic id:partition" of the clicks, and the position up to which the version has learned.'
            ),
        ]
        | None
    ) = None


class Interest(Struct, frozen=True):
    """A category that the user's next click may be in."""

    label: Annotated[str, Meta(description="Its name; its id where no click named it yet.")]
    id: PublicId
    probability: Probability


class Engagement(Struct, frozen=True):
    """How probable it is that the user engages with the item that was asked for."""

    item: str
    probability: Probability
    attributes: Attributes


class About(Struct, frozen=True, kw_only=True):
    """Whom and which moment an answer is about."""

    user_id: Annotated[str, Meta(description="As it was asked for.")]
    known: Annotated[bool, Meta(description="The user has a visible click, or a row in this version.")]
    cold_start: Annotated[bool, Meta(description="Not known: the answer is the one for unknown users.")]
    version: Version
    at: Annotated[str, Meta(description="The time that windows and features speak of, ISO 8601 in UTC.")]
    at_ms: Annotated[int, Meta(ge=0, description="The same in milliseconds since 1970.")]
    clock: Clock


class Profile(About, frozen=True, kw_only=True):
    """What is known of one user at one moment."""

    interests: Annotated[
        list[Interest], Meta(description="The most probable first; the probabilities of all of them sum to 1.")
    ]
    churn: (
        Annotated[
            float,
            Meta(
                ge=0.0,
                le=1.0,
                description="That no event of the user comes in the next `churn.days`; absent where that is off or not known.",
            ),
        ]
        | None
    ) = None
    engagement: Engagement | None = None
    vector: Annotated[list[float], Meta(description="The user's vector, float32.")] | None = None
    features: (
        Annotated[dict[str, int], Meta(description="Windowed counts, decayed counts and ages by name.")] | None
    ) = None
    attributes: Attributes | None = None
    arm: (
        Annotated[
            Literal["trial", "live"],
            Meta(
                description="Which arm of a rollout the user is in; of a row of a batch, and absent where none is open."
            ),
        ]
        | None
    ) = None


class BehindIt(Struct, frozen=True):
    """An event that lies behind a reason."""

    at: str
    action: str | None = None
    category: str | None = None
    item: str | None = None


class ReasonFor(Struct, frozen=True):
    """A part of what makes a probability another one than a stranger's."""

    kind: Annotated[
        str,
        Meta(description="What it comes from: windows of a category, counts of an action, the user's row and so on."),
    ]
    about: Annotated[str | None, Meta(description="The category or the action.")]
    share: Annotated[float, Meta(description="What it adds to the probability; negative where it takes away.")]
    words: Annotated[str, Meta(description="What lies behind it.")]
    events: Annotated[list[BehindIt], Meta(description="The newest of the events behind it.")]


class Explanation(About, frozen=True, kw_only=True):
    """Why a probability is what it is: the parts of its difference from what it would be of a stranger."""

    label: Annotated[str | None, Meta(description="The category, where one is explained.")]
    item: Annotated[str | None, Meta(description="The item, where an engagement is explained.")]
    probability: Probability
    cold_start_probability: Probability
    reasons: Annotated[list[ReasonFor], Meta(description="The largest first.")]
    rest: Annotated[float, Meta(description="The sum of all smaller parts.")]


class Profiles(Struct, frozen=True):
    """Profiles in the order they were asked for, all of one version; while a rollout is open those of one arm."""

    profiles: list[Profile]


class RankedItem(Struct, frozen=True, omit_defaults=True):
    """An item that the caller named."""

    item: str
    category: Annotated[str | None, Meta(description="The category that it counts as of; null where none is known.")]
    probability: Probability
    bid: Annotated[float, Meta(ge=0.0, description="The caller's; only where items have bids.")] | None = None
    expected_value: Annotated[float, Meta(ge=0.0, description="Probability × bid; likewise.")] | None = None


class LeftOutItem(Struct, frozen=True):
    """An item that the caller named and that is not ranked."""

    item: str
    reason: Annotated[Literal["cap"], Meta(description="The user saw it as often as its cap allows.")]
    seen: Annotated[int, Meta(ge=1, description="How often within the cap's time.")]


class Ranking(About, frozen=True, kw_only=True, omit_defaults=True):
    """Items that the caller named, the most probable first; with bids, the one of the highest expected value."""

    items: list[RankedItem]
    left_out: Annotated[
        list[LeftOutItem], Meta(description="Those that have reached their caps; only where items have caps.")
    ] = []


class RecommendedItem(Struct, frozen=True):
    """An item that is recommended, and why."""

    item: Annotated[str, Meta(description="As clicks name it; its id where no name is known.")]
    id: PublicId
    category: Annotated[str, Meta(description="The name of its category; its id where no click named it yet.")]
    probability: Probability
    reason: Reason


class Recommendations(About, frozen=True, kw_only=True):
    """Items for one user: what the user comes back to, then the most probable first but for the share of new ones."""

    items: list[RecommendedItem]


class SimilarItem(Struct, frozen=True):
    """An item that is near to a user."""

    item: Annotated[str, Meta(description="As clicks name it; its id where no name is known.")]
    id: PublicId
    category: Annotated[
        str | None,
        Meta(description="The name of its category, its id where no click named it yet; null where none is known."),
    ]
    similarity: Annotated[float, Meta(description="What the item itself adds to the logit of the user's engagement.")]


class SimilarItems(About, frozen=True, kw_only=True):
    """The items that are nearest to one user, the nearest first."""

    items: list[SimilarItem]


class Alive(Struct, frozen=True):
    """The process runs."""

    status: Literal["ok"]


class RefusedVersion(Struct, frozen=True):
    """A version that is newer than the one that answers, and why it does not answer."""

    version: int
    reason: str


class Readiness(Struct, frozen=True):
    """Whether a worker can answer, and what it lacks; `error` and `do` say why and what to do.

    `degraded` has by part (`version`, `histories`) what the host has missed for more than a minute.
    """

    ready: bool
    version: bool = False
    program: bool = False
    histories: bool = False
    refused: RefusedVersion | None = None
    degraded: dict[str, str] = {}
    error: str = ""
    do: str = ""


class Failure(Struct, frozen=True):
    """Why a request was not answered, what to do, and, where it is about a place in the request, which."""

    error: str
    do: str = ""
    where: Annotated[str, Meta(description="A parameter, or a JSON pointer into the body.")] = ""


class ModelFailure(Struct, frozen=True):
    """An error as clients of TensorFlow Serving read it."""

    error: str


class Status(Struct, frozen=True):
    """As TensorFlow Serving has it."""

    error_code: Literal["OK"]
    error_message: str


class ModelVersion(Struct, frozen=True):
    """A version that can be asked for."""

    version: Annotated[str, Meta(pattern="^[0-9]+$")]
    state: Literal["AVAILABLE"]
    status: Status


class ModelStatus(Struct, frozen=True):
    """The versions that can be asked for, the one that answers first."""

    model_version_status: list[ModelVersion]


class ModelSpec(Struct, frozen=True):
    """Which version the metadata is of."""

    name: str
    signature_name: str
    version: Annotated[str, Meta(pattern="^[0-9]+$")]


class ModelMetadata(Struct, frozen=True):
    """The signatures of a version, as TensorFlow Serving has them."""

    model_spec: ModelSpec
    metadata: dict[str, dict[str, Any]]


class ModelPredictions(Struct, frozen=True):
    """Predictions by row: an object each, or the value itself where there is one output."""

    predictions: list[Any]


class ModelOutputs(Struct, frozen=True):
    """Predictions by column: lists by output, or one list where there is one."""

    outputs: dict[str, Any] | list[Any]
