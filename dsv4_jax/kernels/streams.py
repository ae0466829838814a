"""Mixing n residual streams: reads, writes and Sinkhorn, with backward passes written out.

On TPUs kernels do it (`streams_tpu`). Elsewhere XLA does: n is tiny (4) and tokens are many. Automatic differentiation
of per-stream slices leaves chains of pads that XLA fuses into one another and recomputes, and reductions over an axis
of size n do not vectorise; both passes are therefore stated as sums over streams, unrolled, and what several consumers
read is materialised.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from dsv4_jax.kernels import streams_tpu as tpu
from dsv4_jax.kernels.chunks import materialise
from dsv4_jax.kernels.platforms import by_platform


@jax.custom_vjp
def read(streams: jax.Array, pre: jax.Array) -> jax.Array:
    """`sum_i pre_i stream_i`: streams [.., n, D], pre [.., n] float32 -> [.., D] in the streams' dtype."""

    def xla(streams: jax.Array, pre: jax.Array) -> jax.Array:
        return _over_streams(streams, pre[..., None]).astype(streams.dtype)

    return by_platform(streams, pre, xla=xla, tpu=tpu.read if tpu.supports(streams) else None)


def _read_fwd(streams: jax.Array, pre: jax.Array):
    return read(streams, pre), (streams, pre)


def _read_bwd(saved, d_out: jax.Array):
    def xla(streams: jax.Array, pre: jax.Array, d_out: jax.Array):
        d_out = materialise(d_out)
        d_streams = pre[..., None] * d_out[..., None, :].astype(jnp.float32)
        d_pre = jnp.einsum("...d,...id->...i", d_out, streams, preferred_element_type=jnp.float32)
        return d_streams.astype(streams.dtype), d_pre

    return by_platform(*saved, d_out, xla=xla, tpu=tpu.read_gradients if tpu.supports(saved[0]) else None)


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

    def xla(streams: jax.Array, y: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
        new = post[..., None] * y[..., None, :].astype(jnp.float32) + _mix(streams, comb)
        return materialise(new.astype(streams.dtype))

    return by_platform(streams, y, post, comb, xla=xla, tpu=tpu.write if tpu.supports(streams) else None)


def _write_fwd(streams: jax.Array, y: jax.Array, post: jax.Array, comb: jax.Array):
    return write(streams, y, post, comb), (streams, y, post, comb)


def _write_bwd(saved, d_new: jax.Array):
    def xla(streams: jax.Array, y: jax.Array, post: jax.Array, comb: jax.Array, d_new: jax.Array):
        d_new = materialise(d_new)
        d_streams = _mix(d_new, jnp.swapaxes(comb, -1, -2))
        d_y = _over_streams(d_new, post[..., None])
        d_post = jnp.einsum("...d,...jd->...j", y, d_new, preferred_element_type=jnp.float32)
        d_comb = jnp.einsum("...id,...jd->...ij", streams, d_new, preferred_element_type=jnp.float32)
        return d_streams.astype(streams.dtype), d_y.astype(y.dtype), d_post, d_comb

    return by_platform(*saved, d_new, xla=xla, tpu=tpu.write_gradients if tpu.supports(saved[0]) else None)


write.defvjp(_write_fwd, _write_bwd)


def _over_streams(streams: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum_i weights[.., i, :] * streams[.., i, :]` in float32."""
    terms = [weights[..., i, :] * streams[..., i, :].astype(jnp.float32) for i in range(streams.shape[-2])]
    return sum(terms[1:], terms[0])


def _mix(streams: jax.Array, comb: jax.Array) -> jax.Array:
    """`out_j = sum_i comb_ij stream_i` in float32: [.., n, D]."""
    terms = [comb[..., i, :, None] * streams[..., i, None, :].astype(jnp.float32) for i in range(streams.shape[-2])]
    return sum(terms[1:], terms[0])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(streams: jax.Array, fn: jax.Array, eps: float) -> jax.Array:
    """`rms_norm(flatten(streams)) @ fn` without a norm weight, float32: [.., n, D], [nD, O] -> [.., O].

    The norm is applied behind the narrow product, so the normalised streams are never written out.
    """
    return _project_fwd(streams, fn, eps)[0]


def _project_fwd(streams: jax.Array, fn: jax.Array, eps: float):
    def xla(streams: jax.Array, fn: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = streams.reshape(*streams.shape[:-2], -1).astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + eps)
        return jnp.dot(flat, fn, precision=jax.lax.Precision.HIGHEST) * inverse_rms, inverse_rms

    kernel = partial(tpu.project, eps=eps) if tpu.supports(streams) else None
    mix, inverse_rms = by_platform(streams, fn, xla=xla, tpu=kernel)
    return mix, (streams, fn, inverse_rms, mix)


def _project_bwd(eps: float, saved, d_mix: jax.Array):
    del eps
    streams, fn, inverse_rms, mix = saved
    d_scaled = d_mix * inverse_rms
    # d mix / d rms reaches flat along flat itself.
    along = (d_mix * mix).sum(-1, keepdims=True) * jnp.square(inverse_rms) / fn.shape[0]

    def xla(streams: jax.Array, fn: jax.Array, d_scaled: jax.Array, along: jax.Array):
        flat = streams.reshape(*streams.shape[:-2], -1).astype(jnp.float32)
        d_flat = jnp.dot(d_scaled, fn.T, precision=jax.lax.Precision.HIGHEST) - along * flat
        narrow = d_scaled.reshape(-1, fn.shape[1]).T @ flat.reshape(-1, fn.shape[0])
        # Materialised, so that XLA does not turn the product around: its CPU backend is ten times slower on long rows.
        return d_flat.reshape(streams.shape).astype(streams.dtype), materialise(narrow).T

    kernel = tpu.project_gradients if tpu.supports(streams) else None
    return by_platform(streams, fn, d_scaled, along, xla=xla, tpu=kernel)


project.defvjp(_project_fwd, _project_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def sinkhorn(logits: jax.Array, iters: int, eps: float) -> jax.Array:
    """Nearly doubly stochastic matrices from logits [.., n, n], float32.

    Softmax over the last axis plus eps, a column normalisation, then `iters - 1` times rows and columns, each divisor
    plus eps; it ends on columns, as the release does. The gradient flows through every step, in float32.

    Every step scales whole rows or columns, so the matrix stays `u_i K_ij v_j` and only u and v change: a step reads
    one matrix and writes one row of factors. Tokens are the long, contiguous axis of everything inside.
    """
    _, kernel = _kernel(logits, eps)
    start = _first_factors(kernel, eps)
    u, v = jax.lax.fori_loop(0, iters - 1, lambda _, uv: _balance(kernel, uv, eps), start)
    return _matrices(u[:, None] * kernel * v, logits.shape)


def _sinkhorn_fwd(logits: jax.Array, iters: int, eps: float):
    softmax, kernel = _kernel(logits, eps)
    start = _first_factors(kernel, eps)

    def round_(uv: tuple[jax.Array, jax.Array], _: None):
        new = _balance(kernel, uv, eps)
        return new, (uv, new)

    (u, v), rounds = jax.lax.scan(round_, start, length=iters - 1)
    return _matrices(u[:, None] * kernel * v, logits.shape), (softmax, kernel, start, rounds, (u, v))


def _sinkhorn_bwd(iters: int, eps: float, saved, d_out: jax.Array):
    """Adjoints of u and v go back through the rounds; each leaves two outer products in the kernel's gradient."""
    softmax, kernel, (_, first), rounds, (u, v) = saved
    d = _tokens_last(d_out)

    def round_(adjoints: tuple[jax.Array, jax.Array, jax.Array], step):
        (d_kernel, d_u, d_v), ((u, v), (new_u, new_v)) = adjoints, step
        d_columns = -d_v * jnp.square(new_v)  # of the column sums that new_v divides by
        d_u = d_u + _row_sums(kernel * d_columns)
        d_rows = -d_u * jnp.square(new_u)
        d_v = d_v * eps * jnp.square(new_v / v) + _column_sums(kernel * d_rows[:, None])
        d_kernel = d_kernel + new_u[:, None] * d_columns + d_rows[:, None] * v
        return (d_kernel, d_u * eps * jnp.square(new_u / u), d_v), None

    start = u[:, None] * d * v, _row_sums(d * (kernel * v)), _column_sums(d * (kernel * u[:, None]))
    (d_kernel, _, d_v), _ = jax.lax.scan(round_, start, rounds, reverse=True)
    d_kernel = d_kernel - d_v * jnp.square(first)
    d_logits = softmax * (d_kernel - _row_sums(d_kernel * softmax)[:, None])
    return (_matrices(d_logits, d_out.shape),)


sinkhorn.defvjp(_sinkhorn_fwd, _sinkhorn_bwd)


def _kernel(logits: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The softmax over each row and the matrix that is balanced, both [n, n, N]."""
    softmax = jax.nn.softmax(_tokens_last(logits.astype(jnp.float32)), axis=1)
    return softmax, materialise(softmax + eps)


def _first_factors(kernel: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """u and v [n, N] behind the first column normalisation."""
    v = 1 / (_column_sums(kernel) + eps)
    return jnp.ones_like(v), v


def _balance(kernel: jax.Array, uv: tuple[jax.Array, jax.Array], eps: float) -> tuple[jax.Array, jax.Array]:
    """The factors after one normalisation of rows and one of columns."""
    u, v = uv
    u = u / (u * _row_sums(kernel * v) + eps)
    return u, v / (v * _column_sums(kernel * u[:, None]) + eps)


def _row_sums(a: jax.Array) -> jax.Array:
    """[n, n, N] -> [n, N]; written out, because reductions over an axis of size n do not vectorise on CPUs."""
    return sum((a[:, j] for j in range(1, a.shape[1])), a[:, 0])


def _column_sums(a: jax.Array) -> jax.Array:
    """[n, n, N] -> [n, N]."""
    return sum((a[i] for i in range(1, a.shape[0])), a[0])


def _tokens_last(matrices: jax.Array) -> jax.Array:
    """[.., n, n] -> [n, n, N]."""
    return jnp.moveaxis(matrices.reshape(-1, *matrices.shape[-2:]), 0, -1)


def _matrices(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_tokens_last`."""
    return jnp.moveaxis(a, -1, 0).reshape(shape)
