"""The table of all inputs: what a ranker may read, its shape, and its source. Letters of shapes:

B rows of a record, users of a request     D features          K context fields, users' attributes among them
L recent categories, newest first          F windows of each   A attributes of an item
P popular categories                       S successors        N numbers of a transition (`COLUMNS`)
H units of the tower's first layer         E width of the rows of the input's table
T latest events (`features.sequence`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from state.config.sections import Model as ModelSettings
from state.errors import ProgramError
from state.features.spec import FeatureSpec
from state.ranking.transitions import COLUMNS, SUCCESSORS
from state.rows.tables import AVERAGED_IDS, SERVED_IDS, own_input


@dataclass(frozen=True)
class Input:
    """One input of a ranker, float32.

    Attributes:
        name: Its name in `encode`, `score`, `losses` and the program.
        shape: One letter for each dimension.
        source: Its source, in words.
        table: The table of an input of embedding rows; empty for an input of values.
        ids: The ids whose rows it takes. Id 0 and ids without a row get a row of zeros.
        mean: Whether the rows over the last dimension of the ids are averaged.
        attributes: Ids whose mean row in the table `context` is added; empty for none.
        whole: Whether it holds whole numbers from 0 to 65535.
        training: Whether it exists only in training, not in serving's program.
    """

    name: str
    shape: str
    source: str
    table: str = ""
    ids: str = ""
    mean: bool = False
    attributes: str = ""
    whole: bool = False
    training: bool = False


INPUTS = (
    Input("features", "BD", "the user's features before the event, by the feature spec", whole=True),
    Input("user_row", "BE", "the user", "user", "user"),
    Input("context_row", "BE", "mean over context fields and users' attributes", "context", "context", mean=True),
    Input("item_row", "BE", "the item, plus the mean of its attributes", "item", "item", attributes="item_attributes"),
    Input("category_row", "BE", "the item's category", "category", "category"),
    Input("recent_rows", "BLE", "the user's latest categories", "category", "recent"),
    Input("category_windows", "BLF", "windows of each of them, by the feature spec", whole=True),
    Input("recent_next", "BLN", "how often each category followed the newest one", whole=True),
    Input("recent_mask", "BL", "1 where there is a category"),
    Input("popular_rows", "PE", "the popular categories", "category", "popular"),
    Input("popular_mask", "BP", "1 where it is not one of the user's own"),
    Input("popular_next", "BPN", "how often each category followed the newest one", whole=True),
    Input("successor_rows", "BSE", "the categories that came next most often and are neither", "category", "successor"),
    Input("successor_mask", "BS", "1 where there is one"),
    Input("successor_next", "BSN", "how often each category followed the newest one", whole=True),
    Input("cross", "B", "the sum of the pair's crosses, a logit (`state/ranking/crosses.py`)"),
    Input("other_row", "BE", "the category of the last slot (`candidates.py`)", "category", "other", training=True),
    Input("other_mask", "B", "1 where there is one", training=True),
    Input(
        "negative_item_row", "BE", "the item of another row of the record", "item", "negative_item",
        attributes="negative_item_attributes", training=True,
    ),
    Input("negative_category_row", "BE", "its category", "category", "negative_category", training=True),
    Input("tower_kept", "BH", "factor of each unit: 0 where dropout takes it", training=True),
)  # fmt: skip
"""The inputs of the default ranker, in the order of the program's arguments."""

SEQUENCES = (
    Input("sequence_item_rows", "BTE", "items of the user's latest events, newest first", "item", "sequence_items"),
    Input("sequence_category_rows", "BTE", "their categories", "category", "sequence_categories"),
    Input("sequence_actions", "BT", "their actions, 1 and up in the order of `events.actions`; 0 pads", whole=True),
    Input("sequence_ages", "BT", "their ages: eight steps an octave of 1.024 s, 0 to 254", whole=True),
    Input("sequence_mask", "BT", "1 where there is an event"),
)
"""The user's latest events themselves; `features.sequence` sets their number."""

IDS = {
    "user": "B", "item": "B", "category": "B", "context": "BK", "item_attributes": "BA", "recent": "BL",
    "popular": "P", "successor": "BS", "sequence_items": "BT", "sequence_categories": "BT", "sequence_actions": "BT",
    "other": "B", "negative_item": "B", "negative_category": "B", "negative_item_attributes": "BA",
}  # fmt: skip
"""The ids of a record and their shapes. Those not in `SERVED_IDS` exist only in training."""


def own_rows(table: str, *ids: str) -> tuple[Input, ...]:
    """Inputs that are rows of a table of the ranker's own, one for each of `ids`, named `<table>_of_<ids>`.

    >>> [(one.name, one.shape) for one in own_rows("attended", "sequence_items", "context")]
    [('attended_of_sequence_items', 'BTE'), ('attended_of_context', 'BE')]

    Args:
        table: The table's name; `Ranker.tables` has its width.
        ids: Names in `IDS`. For context fields and attributes the input is the mean of the rows.

    Raises:
        ProgramError: There are no such ids.
    """
    if unknown := [name for name in ids if name not in IDS]:
        raise ProgramError(f"own_rows looks up {table!r} by {unknown[0]!r}", f"there are {', '.join(IDS)}")
    return tuple(
        Input(
            own_input(table, name),
            f"{IDS[name][:-1] if name in AVERAGED_IDS else IDS[name]}E",
            f"rows of {name} in a table of the ranker's own",
            table,
            name,
            mean=name in AVERAGED_IDS,
            training=name not in SERVED_IDS,
        )
        for name in ids
    )


def pick(*names: str) -> tuple[Input, ...]:
    """The inputs of these names, for a custom ranker.

    >>> [one.table for one in pick("user_row", "sequence_item_rows")]
    ['user', 'item']

    Raises:
        ProgramError: There is no such input.
    """
    known = {input_.name: input_ for input_ in (*INPUTS, *SEQUENCES)}
    if unknown := [name for name in names if name not in known]:
        raise ProgramError(f"pick names the input {unknown[0]!r}", f"there are {', '.join(known)}")
    return tuple(known[name] for name in names)


def sizes(settings: ModelSettings, spec: FeatureSpec) -> dict[str, int | None]:
    """The size of each letter but E; B is variable."""
    return {
        "B": None,
        "D": len(spec.names),
        "L": spec.recent_categories,
        "F": len(spec.window_names),
        "N": len(COLUMNS),
        "P": settings.popular,
        "S": SUCCESSORS,
        "H": settings.hidden[0],
        "T": spec.sequence,
    }


def shapes(
    inputs: tuple[Input, ...], sizes: Mapping[str, int | None], tables: Mapping[str, int], training: bool = False
) -> dict[str, tuple[int | None, ...]]:
    """The shape of each input of serving, or of training, by name; `tables` has the width of the rows of each table."""
    return {
        input_.name: tuple(tables[input_.table] if letter == "E" else sizes[letter] for letter in input_.shape)
        for input_ in inputs
        if training or not input_.training
    }
