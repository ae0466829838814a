"""Reading, writing and projecting the residual streams on a TPU: every array goes through memory once.

Left to XLA, the streams [N, n, D] are copied into other layouts, converted to float32 in memory and put together from
parts: four to six times the bytes (docs/kernels.md). Here a step of the grid has some tokens with all their streams
side by side, [tokens, n * D]: a stream is a range of whole lanes. Inside, a loop walks over chunks of D.

Factors of a token are float32 columns: pre [N, n]; post and comb of a write side by side, [N, n + n * n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK_BYTES = 2 << 20  # of the streams of a step
CHUNK = 512  # lanes at a time
VMEM_BYTES = 64 << 20
HIGHEST = jax.lax.Precision.HIGHEST


def supports(streams: jax.Array) -> bool:
    """Whether the kernels take streams [.., n, D]: whole lanes, and tokens in whole sublanes."""
    *tokens, _, width = streams.shape
    count = 1
    for size in tokens:
        count *= size
    return width % LANES == 0 and count % 16 == 0 and count > 0 and streams.dtype in (jnp.bfloat16, jnp.float32)


def read(streams: jax.Array, pre: jax.Array, interpret: Any = False) -> jax.Array:
    """See `streams.read`."""
    n, width = streams.shape[-2:]
    out = jax.ShapeDtypeStruct((_count(streams), width), streams.dtype)
    (out,) = _over_tokens(partial(_read, n), [_flat(streams), _columns(pre)], [out], interpret)
    return out.reshape(*streams.shape[:-2], width)


def _read(n, streams, pre, out):
    def chunk(at):
        terms = [_column(pre, i) * _stream(streams, n, i, at) for i in range(n)]
        out[:, at(0)] = sum(terms[1:], terms[0]).astype(out.dtype)

    _chunks(out.shape[1], chunk)


def read_gradients(
    streams: jax.Array, pre: jax.Array, d_out: jax.Array, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Gradients of streams and pre."""
    n = streams.shape[-2]
    flat, factors = _flat(streams), _columns(pre)
    out = [jax.ShapeDtypeStruct(flat.shape, flat.dtype), jax.ShapeDtypeStruct(factors.shape, jnp.float32)]
    operands = [flat, factors, d_out.reshape(len(flat), -1)]
    d_streams, d_pre = _over_tokens(partial(_read_gradients, n), operands, out, interpret, sums=n)
    return d_streams.reshape(streams.shape), d_pre.reshape(pre.shape)


def _read_gradients(n, streams, pre, d_out, d_streams, d_pre, sums):
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

    def chunk(at):
        back = d_out[:, at(0)].astype(jnp.float32)
        for i in range(n):
            _put(d_streams, n, i, at, _column(pre, i) * back)
            sums[i] += _narrow(back * _stream(streams, n, i, at))

    _chunks(d_out.shape[1], chunk)
    d_pre[...] = _totals(sums)


def write(streams: jax.Array, y: jax.Array, post: jax.Array, comb: jax.Array, interpret: Any = False) -> jax.Array:
    """See `streams.write`."""
    n, flat = streams.shape[-2], _flat(streams)
    operands = [flat, y.reshape(len(flat), -1), _factors(post, comb)]
    out = [jax.ShapeDtypeStruct(flat.shape, flat.dtype)]
    (new,) = _over_tokens(partial(_write, n), operands, out, interpret)
    return new.reshape(streams.shape)


def _write(n, streams, y, factors, new):
    def chunk(at):
        own = y[:, at(0)].astype(jnp.float32)
        before = [_stream(streams, n, i, at) for i in range(n)]
        for j in range(n):
            total = _column(factors, j) * own
            for i in range(n):
                total += _column(factors, n + i * n + j) * before[i]
            _put(new, n, j, at, total)

    _chunks(y.shape[1], chunk)


def write_gradients(
    streams: jax.Array, y: jax.Array, post: jax.Array, comb: jax.Array, d_new: jax.Array, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of streams, y, post and comb."""
    n, flat, factors = streams.shape[-2], _flat(streams), _factors(post, comb)
    rows = y.reshape(len(flat), -1)
    shapes = [(flat.shape, flat.dtype), (rows.shape, y.dtype), (factors.shape, jnp.float32)]
    out = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    operands = [flat, rows, factors, _flat(d_new)]
    found = _over_tokens(partial(_write_gradients, n), operands, out, interpret, sums=n + n * n)
    d_streams, d_y, d_factors = found
    d_post, d_comb = d_factors[:, :n].reshape(post.shape), d_factors[:, n:].reshape(comb.shape)
    return d_streams.reshape(streams.shape), d_y.reshape(y.shape), d_post, d_comb


def _write_gradients(n, streams, y, factors, d_new, d_streams, d_y, d_factors, sums):
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

    def chunk(at):
        own = y[:, at(0)].astype(jnp.float32)
        after = [_stream(d_new, n, j, at) for j in range(n)]
        terms = [_column(factors, j) * after[j] for j in range(n)]
        d_y[:, at(0)] = sum(terms[1:], terms[0]).astype(d_y.dtype)
        for j in range(n):
            sums[j] += _narrow(own * after[j])
        for i in range(n):
            before = _stream(streams, n, i, at)
            terms = [_column(factors, n + i * n + j) * after[j] for j in range(n)]
            _put(d_streams, n, i, at, sum(terms[1:], terms[0]))
            for j in range(n):
                sums[n + i * n + j] += _narrow(before * after[j])

    _chunks(y.shape[1], chunk)
    d_factors[...] = _totals(sums)


def project(streams: jax.Array, fn: jax.Array, eps: float, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """`streams.project` and the inverse of the root mean square that it divides by, [.., O] and [.., 1]."""
    flat, lead = _flat(streams), streams.shape[:-2]
    out = [jax.ShapeDtypeStruct((len(flat), size), jnp.float32) for size in (fn.shape[1], 1)]
    mix, inverse = _over_tokens(partial(_project, eps), [flat], out, interpret, whole=[fn.T])
    return mix.reshape(*lead, -1), inverse.reshape(*lead, 1)


def _project(eps, streams, fn, mix, inverse):
    width = streams.shape[1]

    def chunk(at, carry):
        product, squares = carry
        x = streams[:, at(0)].astype(jnp.float32)
        product += jax.lax.dot_general(
            x, fn[:, at(0)], (((1,), (1,)), ((), ())), precision=HIGHEST, preferred_element_type=jnp.float32
        )
        return product, squares + _narrow(x * x)

    start = jnp.zeros(mix.shape, jnp.float32), jnp.zeros((mix.shape[0], LANES), jnp.float32)
    product, squares = _chunks(width, chunk, start)
    scale = jax.lax.rsqrt(squares.sum(1, keepdims=True) / width + eps)
    mix[...], inverse[...] = product * scale, scale


def project_gradients(
    streams: jax.Array, fn: jax.Array, d_scaled: jax.Array, along: jax.Array, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """`d_scaled fn^T - along * streams` and `streams^T d_scaled`: gradients of streams and fn, the latter float32.

    Args:
        streams: [.., n, D].
        fn: [nD, O] float32.
        d_scaled: [.., O], the gradient of the product before it is divided by the root mean square.
        along: [.., 1].
        interpret: False on a TPU; `pltpu.InterpretParams()` elsewhere.
    """
    flat = _flat(streams)
    columns = jnp.concatenate([d_scaled, along], axis=-1).reshape(len(flat), -1)
    out = [jax.ShapeDtypeStruct(flat.shape, flat.dtype), jax.ShapeDtypeStruct(fn.shape[::-1], jnp.float32)]
    found = _over_tokens(_project_gradients, [flat, columns], out, interpret, whole=[fn.T], summed=1)
    return found[0].reshape(streams.shape), found[1].T


def _project_gradients(streams, columns, fn, d_streams, d_fn):
    outputs = fn.shape[0]
    pl.when(pl.program_id(0) == 0)(lambda: _set(d_fn, jnp.zeros(d_fn.shape, d_fn.dtype)))
    d_scaled, along = columns[:, :outputs], columns[:, outputs:]
    product = partial(jax.lax.dot_general, precision=HIGHEST, preferred_element_type=jnp.float32)

    def chunk(at):
        x = streams[:, at(0)].astype(jnp.float32)
        d_streams[:, at(0)] = (product(d_scaled, fn[:, at(0)], (((1,), (0,)), ((), ()))) - along * x).astype(
            d_streams.dtype
        )
        d_fn[:, at(0)] += product(d_scaled, x, (((0,), (0,)), ((), ())))

    _chunks(streams.shape[1], chunk)


def _over_tokens(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
    interpret: Any,
    sums: int = 0,
    whole: Sequence[jax.Array] = (),
    summed: int = 0,
) -> Sequence[jax.Array]:
    """Runs a kernel on some tokens at a time.

    Args:
        kernel: of blocks of the operands, then `whole`, then the results, then memory for `sums`.
        operands: [N, ..].
        out: results; all but the last `summed` ones [N, ..], those added up over all steps.
        interpret: see `project_gradients`.
        sums: numbers of each token that are added up over chunks, 128 lanes apart.
        whole: what every step reads.
        summed: see `out`.
    """
    count, width = operands[0].shape
    tile = _tile(count, width * operands[0].dtype.itemsize)
    by_tokens = lambda x: pl.BlockSpec((tile, x.shape[1]), lambda t: (t, 0))  # noqa: E731
    at_once = lambda x: pl.BlockSpec(x.shape, lambda t: (0, 0))  # noqa: E731
    split = len(out) - summed
    moved = sum(x.size * x.dtype.itemsize for x in (*operands, *whole, *out))
    return pl.pallas_call(
        kernel,
        grid=(count // tile,),
        in_specs=[*map(by_tokens, operands), *map(at_once, whole)],
        out_specs=[*map(by_tokens, out[:split]), *map(at_once, out[split:])],
        out_shape=list(out),
        scratch_shapes=[pltpu.VMEM((sums, tile, LANES), jnp.float32)] if sums else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if summed else "parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(flops=2 * operands[0].size, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name=f"streams{getattr(kernel, 'func', kernel).__name__}",
    )(*operands, *whole)


def _chunks(width: int, chunk: Callable[..., Any], carry: Any = None) -> Any:
    """`chunk(at[, carry])` for every piece of `width` lanes; `at(first)` is the piece that many lanes further."""
    size = next(n for n in range(min(CHUNK, width), 0, -LANES) if width % n == 0)

    def step(i, carry):
        at = lambda first: pl.ds(pl.multiple_of(first + i * size, LANES), size)  # noqa: E731
        return chunk(at) if carry is None else chunk(at, carry)

    return jax.lax.fori_loop(0, width // size, step, carry)


def _stream(streams, n, i, at):
    """A piece of stream i, float32."""
    return streams[:, at(i * (streams.shape[1] // n))].astype(jnp.float32)


def _put(streams, n, i, at, value):
    streams[:, at(i * (streams.shape[1] // n))] = value.astype(streams.dtype)


def _column(factors, i):
    return factors[:, i : i + 1]


def _narrow(x):
    """[tokens, lanes] summed to [tokens, 128]."""
    parts = [x[:, first : first + LANES] for first in range(0, x.shape[1], LANES)]
    return sum(parts[1:], parts[0])


def _totals(sums):
    """[k, tokens, 128] -> [tokens, k]."""
    return jnp.concatenate([sums[i].sum(1, keepdims=True) for i in range(sums.shape[0])], axis=1)


def _flat(streams):
    """[.., n, D] -> [N, nD]."""
    return streams.reshape(-1, streams.shape[-2] * streams.shape[-1])


def _count(streams):
    return _flat(streams).shape[0]


def _columns(factors):
    return factors.reshape(-1, factors.shape[-1])


def _factors(post, comb):
    return jnp.concatenate([_columns(post), comb.reshape(-1, comb.shape[-1] ** 2)], axis=1)


def _tile(count: int, row_bytes: int) -> int:
    """Tokens of a step: a power of two that divides their number, so many that the streams take BLOCK_BYTES at most."""
    most = max(16, BLOCK_BYTES // row_bytes)
    return next(tile for tile in (512, 256, 128, 64, 32, 16) if count % tile == 0 and (tile <= most or tile == 16))


def _set(ref, value):
    ref[...] = value
