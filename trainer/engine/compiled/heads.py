"""Loss and gradients of both heads for one step: compiled loops over rows, candidates and pairs.

`trainer/model/default_ranker.py` says what the heads are; here the same sums are taken with
their derivatives, some rows at a time, while all of theirs is in the processor's
nearest memory. As some three hundred operations of TensorFlow over
`[B * L, F]` they cost more than the tower. A test holds the two together:
logits and every derivative against TensorFlow's own.

For each row, in the order of the batch:

1. Windows and transitions become logits, a block of rows at a time (`window_net.py`, `transition_net.py`).
2. Candidates are scored, without dropout for the measures: softmax, log loss, rank of the target (`interest.py`).
3. Engagement: the row's own item, and its negative where one was drawn. What its
   crosses add is known before (`trainer/engine/optimizers/crosses.py`).
4. The derivatives of interest, with dropout where there is any.
5. After each `FAST_ROWS` rows the fast weights move, before the next row is scored.

A block has `BLOCK` rows. The blocks between two moves are shared by threads, each
block with sums of its own, which are added in the order of the blocks. Sums have
the same bits for any number of threads, and however rows lie in a table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from state.compiled import compiled_sums, part_of_sums
from trainer.engine.compiled.arrays import F32, I64, Facts, FastWeights, Gradients, HeadInputs, Learned
from trainer.engine.compiled.engagement import engage
from trainer.engine.compiled.interest import learn_interest, measure_interest, score_candidates
from trainer.engine.compiled.softmax import exponentials, highest_of, normaliser_of
from trainer.engine.compiled.threads import Threads, meet
from trainer.engine.compiled.transition_net import transition_net, transition_net_gradients
from trainer.engine.compiled.window_net import LOGARITHMS, user_hidden_of, window_net, window_net_gradients
from trainer.engine.compiled.workspace import BLOCK, Workspace
from trainer.engine.engine import Scores
from trainer.engine.optimizers.crosses import crosses
from trainer.engine.optimizers.fast_weights import FastSlots, move
from trainer.model.hyperparameters import HYPERPARAMETERS

FAST_ROWS = HYPERPARAMETERS.fast_rows

LANES = FAST_ROWS // BLOCK
"""Blocks between two moves of the fast weights: as many threads can share the heads."""

_ZERO = np.float32(0.0)


class Lane(NamedTuple):
    """What the blocks at one position between two moves write: one thread's at a time.

    Attributes:
        workspace: Working memory of a block.
        gradients: Derivatives; those by queries and popular logits are shared by all lanes, which write other rows.
            `gradients.fast` are views of `flat`.
        flat: `[m]` derivatives by the fast weights since the last move.
        to_item_bias: `[1, dim]`, a view of `gradients.item_bias`.
        to_category_bias: Likewise.
    """

    workspace: Workspace
    gradients: Gradients
    flat: F32
    to_item_bias: F32
    to_category_bias: F32


class Biases(NamedTuple):
    """The engagement weights of items and categories, `[1, dim]` float32 each."""

    item: F32
    category: F32


@part_of_sums
def _block(
    begin: int,
    end: int,
    facts: Facts,
    inputs: HeadInputs,
    biases: Biases,
    logarithms: F32,
    crossed: F32,
    scores: Scores,
    weights: FastWeights,
    lane: Lane,
    apart: bool,
) -> None:
    """Scores rows `begin` to `end`, and adds their derivatives to those of the lane."""
    workspace, gradients, category = lane.workspace, lane.gradients, inputs.category
    count = facts.windows.shape[1] + facts.popular_mask.shape[1] + facts.successor_mask.shape[1] + 1
    logits, shares = np.empty(count, np.float32), np.empty(count, np.float32)
    slope, bits = np.empty(count, np.float32), np.empty(count, np.int32)
    powers = bits.view(np.float32)
    # 1.
    user_hidden_of(begin, end, inputs.user_features, weights, workspace)
    window_net(begin, end, facts, weights, logarithms, workspace)
    transition_net(begin, end, facts, weights, logarithms, workspace)
    workspace.window_gradient[:] = _ZERO
    workspace.transition_gradient[:] = _ZERO
    for b in range(begin, end):
        row = b - begin
        # 2.
        score_candidates(
            b, row, facts, weights, inputs.plain_queries, inputs.plain_popular, category, workspace, logits
        )
        highest = highest_of(logits)
        total = exponentials(logits, highest, shares, bits, powers)
        measure_interest(b, facts, logits, total, highest, scores)
        # 3. The last slot was chosen by the row's own event, which serving does not know.
        normaliser = normaliser_of(max(total - shares[count - 1], _ZERO), highest)
        both = (biases.item, biases.category, lane.to_item_bias, lane.to_category_bias)
        engage(b, facts, inputs, weights, both, crossed, logits, normaliser, scores, gradients)
        # 4.
        if facts.target[b] >= 0 and facts.weight[b] != _ZERO:
            if apart:
                score_candidates(
                    b, row, facts, weights, inputs.queries, inputs.popular_logits, category, workspace, logits
                )
                total = exponentials(logits, highest_of(logits), shares, bits, powers)
            learn_interest(b, row, facts, inputs, workspace, shares, total, slope, gradients)
    transition_net_gradients(begin, end, facts, weights, workspace, gradients.fast)
    window_net_gradients(begin, end, facts, inputs.user_features, weights, workspace, gradients.fast)


@compiled_sums
def _heads(
    thread: int,
    threads: int,
    meeting: I64,
    facts: Facts,
    inputs: HeadInputs,
    biases: Biases,
    logarithms: F32,
    crossed: F32,
    scores: Scores,
    weights: FastWeights,
    lanes: tuple[Lane, ...],
    slots: FastSlots,
    total: F32,
    rate: np.float32,
    apart: bool,
) -> None:
    """One thread's part. `weights` are views of what moves; `total` gets the derivatives by it over the whole record."""
    rows = facts.windows.shape[0]
    for first in range(0, rows, FAST_ROWS):
        for number in range(thread, LANES, threads):
            begin = first + number * BLOCK
            if begin < rows:
                end = min(begin + BLOCK, rows)
                _block(begin, end, facts, inputs, biases, logarithms, crossed, scores, weights, lanes[number], apart)
        meet(meeting, threads)
        # 5.
        if thread == 0:
            summed = lanes[0].flat
            for number in range(1, LANES):
                other = lanes[number].flat
                for i in range(summed.shape[0]):
                    summed[i] += other[i]
                    other[i] = _ZERO
            for i in range(summed.shape[0]):
                total[i] += summed[i]
            move(slots, summed, rate, weights.user.size)
        meet(meeting, threads)


class Heads:
    """The heads with their working memory. One caller at a time; gradients are valid until the next call.

    Args:
        threads: That share the blocks of rows.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._workspaces: tuple[Workspace, ...] = ()
        self._buffers = dict[str, F32]()

    def __call__(
        self,
        facts: Facts,
        inputs: HeadInputs,
        slots: FastSlots | None = None,
        rate: float = 0.0,
        apart: bool = True,
    ) -> tuple[Scores, Gradients, Learned]:
        """Scores and gradients of a step, and what was learned within it.

        Args:
            facts: What the host knows.
            inputs: What the tower computed.
            slots: The slots of the fast weights before the step, not changed; its weights are not read. None moves nothing.
            rate: Step size of the fast weights.
            apart: Whether what learns is not what scores, because of dropout.
        """
        if not self._workspaces:
            width = inputs.user_features.shape[1]
            self._workspaces = tuple(Workspace.of(facts, width) for _ in range(LANES))
        flat = inputs.fast.flat()
        moved = FastSlots.of(flat) if slots is None else FastSlots(flat, *(slot.copy() for slot in slots[1:]))
        total = np.zeros_like(flat)
        rows, recent_categories, _ = facts.windows.shape
        ranks, successors = facts.popular_mask.shape[1], facts.successor_mask.shape[1]
        scores = Scores(
            np.empty((rows, recent_categories), np.float32),
            np.empty((rows, ranks), np.float32),
            np.empty((rows, successors), np.float32),
            np.zeros(rows, np.float32),
            np.full(rows, recent_categories + ranks + successors, np.int32),
            np.empty(2 * rows, np.float32),
            np.empty(2 * rows, np.float32),
        )
        lanes = self._lanes(inputs, flat)
        crossed = crosses(
            facts.cross_at, facts.share_at, facts.cross_prior, facts.engaged, inputs.cross, inputs.cross_precision
        )
        biases = Biases(inputs.item_bias[None], inputs.category_bias[None])
        weights, step = FastWeights.of(moved.weights, inputs.fast), np.float32(rate if slots is not None else 0.0)

        def work(thread: int) -> None:
            _heads(
                thread, self._threads.count, self._threads.meeting, facts, inputs, biases, LOGARITHMS, crossed.logits,
                scores, weights, lanes, moved, total, step, apart,
            )  # fmt: skip

        self._threads.run(work)
        found = lanes[0].gradients
        for lane in lanes[1:]:
            for name in ("category", "item", "prior", "item_bias", "category_bias"):
                getattr(found, name)[...] += getattr(lane.gradients, name)
        gradients = found._replace(fast=FastWeights.of(total, inputs.fast))
        return scores, gradients, Learned(crossed.rows, crossed.precision, moved)

    def _lanes(self, inputs: HeadInputs, flat: F32) -> tuple[Lane, ...]:
        shared = {name: self._zeros(name, getattr(inputs, name).shape) for name in ("queries", "popular_logits")}
        lanes = []
        for number, workspace in enumerate(self._workspaces):
            own = {
                name: self._zeros(f"{name}_{number}", getattr(inputs, name).shape)
                for name in ("category", "item", "prior", "item_bias", "category_bias")
            }
            since_move = self._zeros(f"fast_{number}", flat.shape)
            gradients = Gradients(**shared, **own, fast=FastWeights.of(since_move, inputs.fast))
            lanes.append(
                Lane(workspace, gradients, since_move, gradients.item_bias[None], gradients.category_bias[None])
            )
        return tuple(lanes)

    def _zeros(self, name: str, shape: tuple[int, ...]) -> F32:
        """Working memory, kept from call to call: fresh pages cost more than to clear these."""
        size = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.size < size:
            held = self._buffers[name] = np.empty(size, np.float32)
        held[:size] = _ZERO
        return held[:size].reshape(shape)
