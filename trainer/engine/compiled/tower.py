"""The default ranker's tower and queries, forward and backward, on a CPU.

Forward, of rows x = [prepared features | user row | mean latest category row | mean context row]:

    h_1 = relu(x K_1 + k_1), h_i = relu(h_(i-1) K_i + k_i), v = the last h
    q   = v W + w + [user row | user row | 0]          the queries
    p   = q [popular rows | 0]^T + b                   the logits of popular categories

With dropout the layers after the first run twice: once without it, for the scores, and once with it, to learn.

Every matrix product is over a fixed block of rows, whose size follows from the shapes and the kind of processor alone, or
over all rows for the derivatives by a weight matrix. So a sum has the same bits however many threads share the products.

Before it multiplies, OpenBLAS copies both matrices into its own layout, a quarter of the time for a block of 64 rows.
For processors with AVX-512 it has kernels for small products that copy nothing. They apply if rows, columns and depth
multiply to at most `SMALL`, and neither matrix is transposed. So on these processors blocks are that small, and the
tower keeps transposed copies of the weights (`transpose`). On other processors the blocks are large.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import scipy.linalg.cython_blas  # loads the BLAS of compiled loops
from threadpoolctl import threadpool_info

from state.compiled import allocating_part_of_sums, compiled_sums, layout, part_of_sums
from trainer.engine.compiled.arrays import F32, I32, I64
from trainer.engine.compiled.threads import Threads, Work, advance, wait_for
from trainer.model.default_model import DefaultModel
from trainer.model.hyperparameters import HYPERPARAMETERS

SMALL = 1_000_000
"""Multiplications of the largest product that OpenBLAS computes without copies."""

_WITH_SMALL = {"SkylakeX", "Cooperlake", "SapphireRapids"}
"""Kinds of processor, as OpenBLAS names them, for which it has those kernels."""

_ROWS = 64
"""Rows of a block where products are not small."""

_TILE = 16


@cache
def _small() -> int:
    # Other libraries of the process, such as faiss, may load their own OpenBLAS, which names the processor differently.
    own = Path(scipy.__file__).parent.with_name("scipy.libs")
    kinds = {library["architecture"] for library in threadpool_info() if Path(library["filepath"]).is_relative_to(own)}
    return SMALL if kinds and kinds <= _WITH_SMALL else 0


def rows_of_block(weights: int) -> int:
    """Rows that are multiplied at once with matrices of at most so many weights."""
    most = _small() // weights
    return min(most - most % 4, _ROWS) or _ROWS


@part_of_sums
def transpose(matrix: F32, out: F32) -> None:
    """Writes the columns of `matrix` as rows of `out`."""
    for begin in range(0, matrix.shape[0], _TILE):
        rows, columns = min(begin + _TILE, matrix.shape[0]), matrix.shape[1] - matrix.shape[1] % 4
        # Moves sixteen numbers at a time in registers, in a third of the time that single moves take.
        whole_rows = rows - (rows - begin) % 4
        for b in range(begin, whole_rows, 4):
            for d in range(0, columns, 4):
                a0, a1, a2, a3 = matrix[b, d], matrix[b, d + 1], matrix[b, d + 2], matrix[b, d + 3]
                b0, b1, b2, b3 = matrix[b + 1, d], matrix[b + 1, d + 1], matrix[b + 1, d + 2], matrix[b + 1, d + 3]
                c0, c1, c2, c3 = matrix[b + 2, d], matrix[b + 2, d + 1], matrix[b + 2, d + 2], matrix[b + 2, d + 3]
                d0, d1, d2, d3 = matrix[b + 3, d], matrix[b + 3, d + 1], matrix[b + 3, d + 2], matrix[b + 3, d + 3]
                out[d, b], out[d, b + 1], out[d, b + 2], out[d, b + 3] = a0, b0, c0, d0
                out[d + 1, b], out[d + 1, b + 1], out[d + 1, b + 2], out[d + 1, b + 3] = a1, b1, c1, d1
                out[d + 2, b], out[d + 2, b + 1], out[d + 2, b + 2], out[d + 2, b + 3] = a2, b2, c2, d2
                out[d + 3, b], out[d + 3, b + 1], out[d + 3, b + 2], out[d + 3, b + 3] = a3, b3, c3, d3
        for b in range(begin, rows):
            for d in range(0 if b >= whole_rows else columns, matrix.shape[1]):
                out[d, b] = matrix[b, d]


LATEST = HYPERPARAMETERS.latest

HEADS, TRANSPOSED, WEIGHTS, FIRST = range(4)
"""Indices in `Passed.progress`: rows that the heads have learned, transposed weights, weight matrices whose derivatives are
begun, and the first of the blocks."""

_ZERO = np.float32(0.0)


@layout("f4[:, ::1], i4[::1], f4[:, ::1], i4[:, ::1], i4[::1], f4[:, ::1], i4[:, ::1]")
class Embedded(NamedTuple):
    """The embedding rows that the tower reads.

    Attributes:
        user: `[u, dim]` float32 distinct rows.
        user_at: `[B]` int32, the row of each user.
        category: `[c, dim]` float32.
        latest_at: `[B, 3]` int32.
        popular_at: `[P]` int32, into `category`.
        context: `[k, dim]` float32.
        context_at: `[B, K]` int32.
    """

    user: F32
    user_at: I32
    category: F32
    latest_at: I32
    popular_at: I32
    context: F32
    context_at: I32


@layout(
    "i8[::1], f4[:, ::1], (f4[:, ::1],) * 2, (f4[:, ::1],) * 2, f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], "
    "f4[:, ::1], f4[:, ::1], f4[:, ::1]"
)
class Passed(NamedTuple):
    """What a forward pass computed of B rows, float32; valid until the next one.

    Attributes:
        progress: Counters by which threads wait for each other.
        x: `[B, width]` input of the tower.
        plain: The hidden layers without dropout, `[B, h]` each.
        learned: The same with dropout; the same arrays where there is none.
        plain_queries: `[B, 2 dim + 1]` without dropout.
        queries: With dropout.
        plain_popular: `[B, P]` without dropout.
        popular: With dropout.
        popular_rows: `[P, 2 dim + 1]`, zero behind the rows.
        user_features: `[B, U]` clipped.
        kept: `[B, h_1]`, factors of dropout; `[0, 0]` without.
    """

    progress: I64
    x: F32
    plain: tuple[F32, ...]
    learned: tuple[F32, ...]
    plain_queries: F32
    queries: F32
    plain_popular: F32
    popular: F32
    popular_rows: F32
    user_features: F32
    kept: F32


@layout("(f4[:, ::1],) * 2, (f4[::1],) * 2, f4[:, ::1], f4[::1], f4[::1]")
class Layers(NamedTuple):
    """Weights of the forward pass.

    Attributes:
        kernels: Of the tower's layers; the first without the part of a context that no row has.
        biases: Likewise.
        query: `[h, 2 dim + 1]`.
        query_bias: `[2 dim + 1]`.
        popular_bias: `[P]`.
    """

    kernels: tuple[F32, ...]
    biases: tuple[F32, ...]
    query: F32
    query_bias: F32
    popular_bias: F32


class Tower:
    """Forward and backward passes over weights that are changed in place elsewhere.

    With several threads, the first one computes the first block forward and then the heads, in which a row depends on
    those before it. Meanwhile the others compute blocks forward before the heads, and backward behind them.

    Attributes:
        block: Rows of a block.

    Args:
        model: The default ranker, with a dense tower.
        weights: Dense weights by name.
        gradients: Receive their derivatives, by name.
        threads: The threads that share its blocks.
    """

    def __init__(
        self, model: DefaultModel, weights: Mapping[str, F32], gradients: Mapping[str, F32], threads: Threads
    ) -> None:
        self._threads = threads
        layers = range(len(model.settings.hidden))
        self._kernels = tuple(weights[f"tower.kernel_{layer}"] for layer in layers)
        self._biases = tuple(weights[f"tower.bias_{layer}"] for layer in layers)
        self._query, self._query_bias = weights["query.kernel"], weights["query.bias"]
        self._popular_bias, self._user_width = weights["interest.popular"], model.user_width
        self._gradients, self._drops = gradients, model.drops
        self.block = rows_of_block(max(kernel.size for kernel in (*self._kernels, self._query)))
        self._dim, self._buffers = model.settings.dim, dict[str, F32]()

    def forward(self, prepared: F32, embedded: Embedded, kept: F32) -> tuple[Passed, Work]:
        """Scores B rows without changing anything, once all threads have done the work, or the counter of a block is 1.

        Args:
            prepared: `[B, D']` float32, of the preprocessing.
            embedded: The rows.
            kept: `[B, h_1]` float32 factors of dropout; not read without dropout.
        """
        count, queries = len(prepared), 2 * self._dim + 1
        parts = 3 if embedded.context_at.shape[1] else 2
        width = prepared.shape[1] + parts * self._dim
        sizes = [kernel.shape[1] for kernel in self._kernels]
        plain = tuple(self._buffer(f"hidden_{i}", count, size) for i, size in enumerate(sizes))
        ranks = len(embedded.popular_at)
        popular_rows = np.zeros((ranks, queries), np.float32)
        popular_rows[:, : self._dim] = embedded.category[embedded.popular_at]
        passed = Passed(
            progress=np.zeros(FIRST + -(-count // self.block), np.int64),
            x=self._buffer("x", count, width),
            plain=plain,
            learned=plain,
            plain_queries=self._buffer("plain_queries", count, queries),
            queries=self._buffer("plain_queries", count, queries),
            plain_popular=self._buffer("plain_popular", count, ranks),
            popular=self._buffer("plain_popular", count, ranks),
            popular_rows=popular_rows,
            user_features=self._buffer("user_features", count, self._user_width),
            kept=kept if self._drops else np.zeros((0, 0), np.float32),
        )
        if self._drops:
            passed = passed._replace(
                learned=tuple(self._buffer(f"dropped_{i}", count, size) for i, size in enumerate(sizes)),
                queries=self._buffer("queries", count, queries),
                popular=self._buffer("popular", count, ranks),
            )
        layers = Layers(
            (self._kernels[0][:width], *self._kernels[1:]),
            self._biases,
            self._query,
            self._query_bias,
            self._popular_bias,
        )
        limit, threads, block = np.float32(HYPERPARAMETERS.user_limit), self._threads.count, self.block
        return passed, lambda thread: _forward(thread, threads, block, prepared, embedded, layers, passed, limit)

    def backward(self, passed: Passed, by_queries: F32, by_popular: F32) -> tuple[F32, F32, Work, Work]:
        """Derivatives by the dense weights into `gradients`, once all threads have done the work.

        The first work follows the heads; the second one begins when all threads have done the first.

        Args:
            passed: The forward pass.
            by_queries: `[B, 2 dim + 1]` float32 derivatives by the queries; what popular logits add is added to it.
            by_popular: `[B, P]` float32, by the logits of popular categories.

        Returns:
            `[B, k dim]` float32 by the embedding rows in x, `[P, 2 dim + 1]` by `popular_rows`, and both works.
        """
        count, width = passed.x.shape
        slopes = tuple(self._buffer(f"slope_{i}", count, layer.shape[1]) for i, layer in enumerate(passed.learned))
        of_rows = self._kernels[0][len(self._kernels[0]) - 3 * self._dim : width]
        by_rows, by_popular_rows = self._buffer("by_rows", count, len(of_rows)), np.empty_like(passed.popular_rows)
        gradients, threads = self._gradients, self._threads.count
        gradients["tower.kernel_0"][width:] = _ZERO
        inputs = (passed.x, *passed.learned, by_popular)
        outputs = (*slopes, by_queries, passed.queries)
        kernels = (
            gradients["tower.kernel_0"][:width],
            *(gradients[f"tower.kernel_{i}"] for i in range(1, len(slopes))),
            gradients["query.kernel"],
        )
        biases = (*(gradients[f"tower.bias_{i}"] for i in range(len(slopes))), gradients["query.bias"])
        weights = (of_rows, *self._kernels[1:], self._query)
        backward = tuple(self._buffer(f"transposed_{i}", *weight.T.shape) for i, weight in enumerate(weights))

        sums = [
            *zip(slopes, biases, strict=False),
            (by_queries, biases[-1]),
            (by_popular, gradients["interest.popular"]),
        ]

        def by_layers(thread: int) -> None:
            if thread == min(1, threads - 1):
                _transposed(passed.progress, weights, backward)
            if thread or threads == 1:
                _slopes(
                    max(thread - 1, 0), max(threads - 1, 1), self.block, passed.progress, by_queries, by_popular,
                    passed.popular_rows, backward, passed.learned, passed.kept, slopes, by_rows,
                )  # fmt: skip

        def by_weights(thread: int) -> None:
            _by_weights(passed.progress, inputs, outputs, (*kernels, by_popular_rows))
            for slope, bias in sums[thread::threads]:
                _by_bias(slope, bias)

        return by_rows, by_popular_rows, by_layers, by_weights

    def _buffer(self, name: str, rows: int, width: int) -> F32:
        """Working memory `[rows, width]`, kept from step to step: fresh pages cost more than a small product."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < rows * width:
            buffer = self._buffers[name] = np.empty(rows * width, np.float32)
        return buffer[: rows * width].reshape(rows, width)


@compiled_sums("i8, i8, i8, f4[:, ::1], Embedded, Layers, Passed, f4")
def _forward(
    thread: int,
    threads: int,
    block: int,
    prepared: F32,
    embedded: Embedded,
    layers: Layers,
    passed: Passed,
    limit: np.float32,
) -> None:
    """One thread's blocks of `block` rows."""
    rows, drops = prepared.shape[0], passed.kept.shape[0] > 0
    # The first of several threads computes the first block only.
    step = max(threads - 1, 1) * block if thread or threads == 1 else rows
    for begin in range(thread * block, rows, step):
        end = min(begin + block, rows)
        _input(begin, end, prepared, embedded, passed.x, passed.user_features, limit)
        _layers(begin, end, 0, passed.x, layers, passed.plain)
        _score(
            begin, end, passed.plain, layers, embedded, passed.popular_rows, passed.plain_queries, passed.plain_popular
        )
        if drops:
            hidden, out = passed.plain[0], passed.learned[0]
            for b in range(begin, end):
                for d in range(hidden.shape[1]):
                    out[b, d] = hidden[b, d] * passed.kept[b, d]
            _layers(begin, end, 1, out, layers, passed.learned)
            _score(begin, end, passed.learned, layers, embedded, passed.popular_rows, passed.queries, passed.popular)
        advance(passed.progress, FIRST + begin // block, 1)


@part_of_sums
def _input(
    begin: int, end: int, prepared: F32, embedded: Embedded, x: F32, user_features: F32, limit: np.float32
) -> None:
    user, user_at, category, latest_at = embedded.user, embedded.user_at, embedded.category, embedded.latest_at
    context, context_at = embedded.context, embedded.context_at
    columns, dim, fields = prepared.shape[1], user.shape[1], context_at.shape[1]
    for b in range(begin, end):
        for d in range(columns):
            x[b, d] = prepared[b, d]
        for d in range(user_features.shape[1]):
            user_features[b, d] = min(max(prepared[b, d], -limit), limit)
        of_user, of_latest, of_context = x[b, columns:], x[b, columns + dim :], x[b, columns + 2 * dim :]
        for d in range(dim):
            of_user[d] = user[user_at[b], d]
        for d in range(dim):
            of_latest[d] = _ZERO
        for j in range(latest_at.shape[1]):
            for d in range(dim):
                of_latest[d] += category[latest_at[b, j], d]
        share = np.float32(1.0) / np.float32(latest_at.shape[1])
        for d in range(dim):
            of_latest[d] *= share
        if fields:
            share = np.float32(1.0) / np.float32(fields)
            for d in range(dim):
                of_context[d] = _ZERO
            for j in range(fields):
                for d in range(dim):
                    of_context[d] += context[context_at[b, j], d]
            for d in range(dim):
                of_context[d] *= share


@allocating_part_of_sums
def _layers(begin: int, end: int, first: int, x: F32, layers: Layers, hidden: tuple[F32, ...]) -> None:
    """Layers `first` and on of rows `begin` to `end`; `x` is the input of layer `first`."""
    for i in range(first, len(layers.kernels)):
        layer_input = x if i == first else hidden[i - 1]
        out, bias = hidden[i][begin:end], layers.biases[i]
        np.dot(layer_input[begin:end], layers.kernels[i], out)
        for b in range(end - begin):
            for d in range(out.shape[1]):
                out[b, d] = max(out[b, d] + bias[d], _ZERO)


@allocating_part_of_sums
def _score(
    begin: int,
    end: int,
    hidden: tuple[F32, ...],
    layers: Layers,
    embedded: Embedded,
    popular_rows: F32,
    queries: F32,
    popular: F32,
) -> None:
    """Queries and logits of popular categories of rows `begin` to `end`."""
    vector, popular_bias = hidden[len(hidden) - 1], layers.popular_bias
    np.dot(vector[begin:end], layers.query, queries[begin:end])
    _add_users(begin, end, embedded.user, embedded.user_at, layers.query_bias, queries)
    np.dot(queries[begin:end], popular_rows.T, popular[begin:end])
    for b in range(begin, end):
        for p in range(popular_bias.shape[0]):
            popular[b, p] += popular_bias[p]


@part_of_sums
def _add_users(begin: int, end: int, user: F32, user_at: I32, bias: F32, queries: F32) -> None:
    """Adds bias and user row to the queries of rows `begin` to `end`."""
    dim = user.shape[1]
    for b in range(begin, end):
        of_engagement = queries[b, dim:]
        for d in range(bias.shape[0]):
            queries[b, d] += bias[d]
        for d in range(dim):
            queries[b, d] += user[user_at[b], d]
        for d in range(dim):
            of_engagement[d] += user[user_at[b], d]


@compiled_sums("i8[::1], (f4[:, ::1],) * 3, (f4[:, ::1],) * 3")
def _transposed(progress: I64, weights: tuple[F32, ...], out: tuple[F32, ...]) -> None:
    """The matrices that `_slopes` multiplies with."""
    for i in range(len(weights)):
        transpose(weights[i], out[i])
    advance(progress, TRANSPOSED, 1)


@compiled_sums(
    "i8, i8, i8, i8[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], (f4[:, ::1],) * 3, (f4[:, ::1],) * 2, f4[:, ::1], "
    "(f4[:, ::1],) * 2, f4[:, ::1]"
)
def _slopes(
    thread: int,
    threads: int,
    block: int,
    progress: I64,
    by_queries: F32,
    by_popular: F32,
    popular_rows: F32,
    backward: tuple[F32, ...],
    hidden: tuple[F32, ...],
    kept: F32,
    slopes: tuple[F32, ...],
    by_rows: F32,
) -> None:
    """Backward through queries and layers: one thread's blocks of `block` rows, each behind the heads.

    backward: transposed weights of embedding rows in x, of each layer behind the first, and of queries.
    """
    rows, last = by_queries.shape[0], len(hidden) - 1
    wait_for(progress, TRANSPOSED, 1)
    for begin in range(thread * block, rows, threads * block):
        end = min(begin + block, rows)
        wait_for(progress, HEADS, end)
        from_popular = np.dot(by_popular[begin:end], popular_rows)
        for b in range(begin, end):
            for d in range(by_queries.shape[1]):
                by_queries[b, d] += from_popular[b - begin, d]
        np.dot(by_queries[begin:end], backward[last + 1], slopes[last][begin:end])
        for back in range(last + 1):
            i = last - back
            if i < last:
                np.dot(slopes[i + 1][begin:end], backward[i + 1], slopes[i][begin:end])
            out, active = slopes[i], hidden[i]
            for b in range(begin, end):
                for d in range(out.shape[1]):
                    out[b, d] = out[b, d] if active[b, d] > _ZERO else _ZERO
            if i == 0 and kept.shape[0] > 0:
                for b in range(begin, end):
                    for d in range(out.shape[1]):
                        out[b, d] *= kept[b, d]
        np.dot(slopes[0][begin:end], backward[0], by_rows[begin:end])


@compiled_sums("i8[::1], (f4[:, ::1],) * 4, (f4[:, ::1],) * 4, (f4[:, ::1],) * 4")
def _by_weights(progress: I64, inputs: tuple[F32, ...], slopes: tuple[F32, ...], out: tuple[F32, ...]) -> None:
    """Derivatives by weight matrices, inputs against slopes of outputs: of those that no other thread has begun."""
    pair = advance(progress, WEIGHTS, 1)
    while pair < len(inputs):
        np.dot(inputs[pair].T, slopes[pair], out[pair])
        pair = advance(progress, WEIGHTS, 1)


@compiled_sums("f4[:, ::1], f4[::1]")
def _by_bias(slopes: F32, out: F32) -> None:
    out[:] = _ZERO
    for b in range(slopes.shape[0]):
        for d in range(slopes.shape[1]):
            out[d] += slopes[b, d]


@compiled_sums("Embedded, f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1]")
def scatter_rows(
    embedded: Embedded, by_rows: F32, by_queries: F32, by_popular_rows: F32, user: F32, category: F32, context: F32
) -> None:
    """Adds the derivatives by what the tower read to those of the distinct rows of users, categories and contexts."""
    dim, latest, fields = embedded.user.shape[1], embedded.latest_at.shape[1], embedded.context_at.shape[1]
    of_latest = np.float32(1.0) / np.float32(latest)
    for b in range(by_rows.shape[0]):
        at = embedded.user_at[b]
        for d in range(dim):
            user[at, d] += by_rows[b, d] + by_queries[b, d] + by_queries[b, dim + d]
        for j in range(latest):
            at = embedded.latest_at[b, j]
            for d in range(dim):
                category[at, d] += by_rows[b, dim + d] * of_latest
        if fields:
            of_fields = np.float32(1.0) / np.float32(fields)
            for j in range(fields):
                at = embedded.context_at[b, j]
                for d in range(dim):
                    context[at, d] += by_rows[b, 2 * dim + d] * of_fields
    for p in range(by_popular_rows.shape[0]):
        at = embedded.popular_at[p]
        for d in range(dim):
            category[at, d] += by_popular_rows[p, d]
