"""Mixing n residual streams: reads, writes and Sinkhorn, with backward passes written out.

n is tiny (4) and tokens are many. Automatic differentiation of per-stream slices leaves chains of pads that XLA fuses
into one another and recomputes, and reductions over an axis of size n do not vectorise; both passes are therefore
stated as sums over streams, unrolled, and what several consumers read is materialised.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.kernels.chunks import materialise


@jax.custom_vjp
def read(streams: jax.Array, pre: jax.Array) -> jax.Array:
    """`sum_i pre_i stream_i`: streams [.., n, D], pre [.., n] float32 -> [.., D] in the streams' dtype."""
    return _over_streams(streams, pre[..., None]).astype(streams.dtype)


def _read_fwd(streams: jax.Array, pre: jax.Array):
    return read(streams, pre), (streams, pre)


def _read_bwd(saved, d_out: jax.Array):
    streams, pre = saved
    d_out = materialise(d_out)
    d_streams = pre[..., None] * d_out[..., None, :].astype(jnp.float32)
    d_pre = jnp.einsum("...d,...id->...i", d_out, streams, preferred_element_type=jnp.float32)
    return d_streams.astype(streams.dtype), d_pre


read.defvjp(_read_fwd, _read_bwd)


@jax.custom_vjp
def write(streams: jax.Array, y: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
    """`stream'_j = post_j y + sum_i comb_ij stream_i`: the FIRST index of comb is summed.

    Args:
        streams: [.., n, D].
        y: a sublayer's output [.., D].
        post: [.., n] float32.
        comb: [.., n, n] float32.

    Returns:
        [.., n, D] in the streams' dtype, computed in float32.
    """
    new = post[..., None] * y[..., None, :].astype(jnp.float32) + _mix(streams, comb)
    return materialise(new.astype(streams.dtype))


def _write_fwd(streams: jax.Array, y: jax.Array, post: jax.Array, comb: jax.Array):
    return write(streams, y, post, comb), (streams, y, post, comb)


def _write_bwd(saved, d_new: jax.Array):
    streams, y, post, comb = saved
    d_new = materialise(d_new)
    d_streams = _mix(d_new, jnp.swapaxes(comb, -1, -2))
    d_y = _over_streams(d_new, post[..., None])
    d_post = jnp.einsum("...d,...jd->...j", y, d_new, preferred_element_type=jnp.float32)
    d_comb = jnp.einsum("...id,...jd->...ij", streams, d_new, preferred_element_type=jnp.float32)
    return d_streams.astype(streams.dtype), d_y.astype(y.dtype), d_post, d_comb


write.defvjp(_write_fwd, _write_bwd)


def _over_streams(streams: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum_i weights[.., i, :] * streams[.., i, :]` in float32."""
    terms = [weights[..., i, :] * streams[..., i, :].astype(jnp.float32) for i in range(streams.shape[-2])]
    return sum(terms[1:], terms[0])


def _mix(streams: jax.Array, comb: jax.Array) -> jax.Array:
    """`out_j = sum_i comb_ij stream_i` in float32: [.., n, D]."""
    terms = [comb[..., i, :, None] * streams[..., i, None, :].astype(jnp.float32) for i in range(streams.shape[-2])]
    return sum(terms[1:], terms[0])


@jax.custom_vjp
def project(streams: jax.Array, fn: jax.Array, eps: jax.Array) -> jax.Array:
    """`rms_norm(flatten(streams)) @ fn` without a norm weight, float32: [.., n, D], [nD, O] -> [.., O].

    The norm is applied behind the narrow product, so the normalised streams are never written out.
    """
    return _project_fwd(streams, fn, eps)[0]


def _project_fwd(streams: jax.Array, fn: jax.Array, eps: jax.Array):
    flat = streams.reshape(*streams.shape[:-2], -1).astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + eps)
    mix = jnp.dot(flat, fn, precision=jax.lax.Precision.HIGHEST) * inverse_rms
    return mix, (streams, fn, inverse_rms, mix)


def _project_bwd(saved, d_mix: jax.Array):
    streams, fn, inverse_rms, mix = saved
    highest = jax.lax.Precision.HIGHEST
    flat = streams.reshape(*streams.shape[:-2], -1).astype(jnp.float32)
    d_scaled = d_mix * inverse_rms
    # d mix / d rms reaches flat along flat itself.
    along = (d_mix * mix).sum(-1, keepdims=True) * jnp.square(inverse_rms) / flat.shape[-1]
    d_flat = jnp.dot(d_scaled, fn.T, precision=highest) - along * flat
    narrow = d_scaled.reshape(-1, fn.shape[1]).T @ flat.reshape(-1, fn.shape[0])
    # Materialised, so that XLA does not turn the product around: its CPU backend is ten times slower on long rows.
    d_fn = materialise(narrow).T
    return d_flat.reshape(streams.shape).astype(streams.dtype), d_fn, None


project.defvjp(_project_fwd, _project_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def sinkhorn(logits: jax.Array, iters: int, eps: float) -> jax.Array:
    """Nearly doubly stochastic matrices from logits [.., n, n], float32.

    Softmax over the last axis plus eps, a column normalisation, then `iters - 1` times rows and columns, each divisor
    plus eps; it ends on columns, as the release does. The gradient flows through every step, in float32.
    """
    return _sinkhorn_fwd(logits, iters, eps)[0]


def _sinkhorn_fwd(logits: jax.Array, iters: int, eps: float):
    n = logits.shape[-1]
    rows, columns = _sum_matrices(n)
    softmax = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).reshape(-1, n * n).T
    first = _normalise(softmax + eps, columns, eps)

    def round_(a: jax.Array, _: None):
        by_rows = _normalise(a, rows, eps)
        by_columns = _normalise(by_rows[0], columns, eps)
        return by_columns[0], (by_rows, by_columns)

    a, rounds = jax.lax.scan(round_, first[0], length=iters - 1)
    return a.T.reshape(logits.shape), (softmax, first, rounds)


def _sinkhorn_bwd(iters: int, eps: float, saved, d_out: jax.Array):
    softmax, first, rounds = saved
    n = d_out.shape[-1]
    rows, columns = _sum_matrices(n)

    def round_(d: jax.Array, steps):
        by_rows, by_columns = steps
        return _normalise_gradient(_normalise_gradient(d, by_columns, columns), by_rows, rows), None

    d, _ = jax.lax.scan(round_, d_out.reshape(-1, n * n).T, rounds, reverse=True)
    d = _normalise_gradient(d, first, columns)
    d = softmax * (d - _sum(rows, d * softmax))
    return (d.T.reshape(d_out.shape),)


sinkhorn.defvjp(_sinkhorn_fwd, _sinkhorn_bwd)


def _sum_matrices(n: int) -> tuple[np.ndarray, np.ndarray]:
    """0/1 matrices [n*n, n*n] that replace each entry of a flattened n x n matrix by its row's, or column's, sum."""
    row, column = np.divmod(np.arange(n * n), n)
    return tuple((index[:, None] == index[None, :]).astype(np.float32) for index in (row, column))


def _sum(matrix: np.ndarray, a: jax.Array) -> jax.Array:
    """Row or column sums of the matrices a [n*n, N], in place of each entry.

    Tokens are the long, contiguous axis; a product with ones is the one reduction every backend does well.
    """
    return jnp.dot(matrix, a, precision=jax.lax.Precision.HIGHEST)


def _normalise(a: jax.Array, matrix: np.ndarray, eps: float) -> tuple[jax.Array, jax.Array]:
    """a divided by its sums plus eps, and the factor used."""
    factor = 1 / (_sum(matrix, a) + eps)
    return a * factor, factor


def _normalise_gradient(d: jax.Array, step: tuple[jax.Array, jax.Array], matrix: np.ndarray) -> jax.Array:
    out, factor = step
    return factor * (d - _sum(matrix, d * out))
