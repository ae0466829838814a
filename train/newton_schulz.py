"""Hybrid Newton-Schulz: the nearest (semi-)orthogonal matrix by matmuls alone, for stacks of many matrices.

Source: DeepSeek-V4 report 2.4, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2

# Same-shaped parameters are joined into stacks of up to this many elements, so that a model compiles one
# Newton-Schulz per shape and not one per parameter; the bound keeps the joined copies small beside a large model.
STACK_ELEMENTS = 2**26
# A stack is orthogonalised in pieces. On a CPU a piece should stay in the cache through all ten iterations; an
# accelerator wants many matrices per matmul, bounded by the memory of the intermediate products.
PIECE_ELEMENTS_CPU = 2**15
PIECE_ELEMENTS = 2**27
PIECE_MATRICES = 256


def orthogonalize(x: jax.Array, *, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Nearly U V^T of each matrix U S V^T: hybrid Newton-Schulz, 8 + 2 iterations (report 2.4, Algorithm 1).

    Each iteration is X <- a X + b (X X^T) X + c (X X^T)^2 X on the smaller side, from X = x / |x|_F. A zero matrix
    stays zero.

    Args:
        x: [..., rows, cols]; every leading dimension is a batch of independent matrices.
        dtype: of the factors of each matmul, accumulated in FP32; None: that of x, in full precision.

    Returns:
        [..., rows, cols] in the dtype of x.
    """
    return orthogonalize_all([x], dtype=dtype)[0]


def orthogonalize_all(arrays: Sequence[jax.Array], *, dtype: jax.typing.DTypeLike | None = None) -> list[jax.Array]:
    """`orthogonalize` for each array, with the matrices of equal shape batched into one Newton-Schulz."""
    wide = [_wide(x) for x in arrays]
    results = list(wide)
    for members in _stacks([x.shape for x in wide]):
        stack = jnp.concatenate([wide[i] for i in members]) if len(members) > 1 else wide[members[0]]
        ends = [sum(wide[i].shape[0] for i in members[: k + 1]) for k in range(len(members) - 1)]
        for i, part in zip(members, jnp.split(_in_pieces(stack, dtype), ends), strict=True):
            results[i] = part
    return [_unwide(y, x) for y, x in zip(results, arrays, strict=True)]


def orthogonalize_columns(stack: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """`orthogonalize` of [columns, devices, rows, cols], rows <= cols, column by column.

    The second axis is spread over devices: a piece is some columns of it whole, so that every device works on its own
    matrices.
    """
    matrix = math.prod(stack.shape[2:])
    piece = max(1, min(PIECE_MATRICES, PIECE_ELEMENTS // matrix))
    step = partial(_newton_schulz, dtype=dtype)
    return step(stack) if stack.shape[0] <= piece else jax.lax.map(step, stack, batch_size=_many(piece))


def _wide(x: jax.Array) -> jax.Array:
    """[..., rows, cols] as [matrices, smaller, larger], in FP32 at least."""
    if x.ndim < 2:
        raise ValueError(f"Muon orthogonalises matrices, but got an array of shape {x.shape}; give it to AdamW.")
    x = x.reshape(-1, *x.shape[-2:]).astype(jnp.promote_types(x.dtype, jnp.float32))
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _unwide(y: jax.Array, like: jax.Array) -> jax.Array:
    y = y.mT if like.shape[-2] > like.shape[-1] else y
    return y.reshape(like.shape).astype(like.dtype)


def _stacks(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Indices of equal [*, rows, cols] together, at most STACK_ELEMENTS in a stack of more than one."""
    open_stacks: dict[tuple[int, ...], list[int]] = {}
    used: dict[tuple[int, ...], int] = {}
    stacks = []
    for i, shape in enumerate(shapes):
        size, key = math.prod(shape), shape[1:]
        if key not in open_stacks or used[key] + size > STACK_ELEMENTS:
            open_stacks[key], used[key] = [], 0
            stacks.append(open_stacks[key])
        open_stacks[key].append(i)
        used[key] += size
    return stacks


def _in_pieces(stack: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    """[matrices, rows, cols] orthogonalised in pieces that suit the platform it is compiled for."""
    step = partial(_newton_schulz, dtype=dtype)
    matrix = math.prod(stack.shape[1:])

    def run(elements: int, stack: jax.Array) -> jax.Array:
        piece = max(1, min(PIECE_MATRICES, elements // matrix))
        return step(stack) if stack.shape[0] <= piece else jax.lax.map(step, stack, batch_size=_many(piece))

    return jax.lax.platform_dependent(stack, cpu=partial(run, PIECE_ELEMENTS_CPU), default=partial(run, PIECE_ELEMENTS))


def _many(piece: int) -> int | None:
    return piece if piece > 1 else None  # lax.map without a batch dimension of one is the faster loop


def _newton_schulz(x: jax.Array, *, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    """[..., rows, cols] with rows <= cols."""
    factor = x.dtype if dtype is None else dtype
    # Without an explicit precision TPUs and GPUs would multiply FP32 factors in BF16 or TF32.
    precision = jax.lax.Precision.HIGHEST if dtype is None else None

    def multiply(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(factor), b.astype(factor)
        return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=x.dtype)

    def iterate(x: jax.Array, coefficients: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = coefficients
        gram = multiply("...ij,...kj->...ik", x, x)
        polynomial = b * gram + c * multiply("...ij,...jk->...ik", gram, gram)
        return a * x + multiply("...ij,...jk->...ik", polynomial, x), None

    return jax.lax.scan(iterate, _unit_norm(x), jnp.asarray(COEFFICIENTS, x.dtype))[0]


def _unit_norm(x: jax.Array) -> jax.Array:
    """Each matrix over its Frobenius norm. Its largest element goes first: squares of small gradients underflow."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(largest == 0, 1, largest)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)), 1)
