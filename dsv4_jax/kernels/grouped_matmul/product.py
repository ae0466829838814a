"""Grouped matmul: a kernel on TPUs and on Hopper GPUs, elsewhere a loop over tiles, with its gradients.

Both do 1.0x the ideal FLOPs in both directions, but for the padding of each expert's last tile. Native
`jax.lax.ragged_dot` expands densely on CPU and in its weight gradient on TPU and GPU, so it is not used
(docs/kernels-experts.md).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from dsv4_jax.kernels.grouped_matmul import gpu, tpu, xla
from dsv4_jax.kernels.grouped_matmul.groups import Groups
from dsv4_jax.kernels.grouped_matmul.stacked import OfStack
from dsv4_jax.kernels.platforms import by_platform
from dsv4_jax.quantization.packed import Packed


def grouped_matmul(rows: jax.Array, weights: jax.Array | Packed | OfStack, groups: Groups) -> jax.Array:
    """Each row times its expert's matrix.

    Args:
        rows: [R, I], laid out by `groups`; padding rows are zero.
        weights: [E, I, O]; packed ones are undone an expert at a time, on TPUs and Hopper GPUs inside the kernel.
        groups: from `make_groups`.

    Returns:
        [R, O] in the rows' dtype, accumulated in float32; rows of unused tiles are zero.
    """
    if isinstance(weights, OfStack):
        weights, groups = weights.among(groups, rows.dtype)
    return _grouped_matmul(rows, weights, groups)


@jax.custom_vjp
def _grouped_matmul(rows: jax.Array, weights: jax.Array | Packed, groups: Groups) -> jax.Array:
    return multiply(rows, weights, groups)


def _vjp_fwd(rows: jax.Array, weights: jax.Array | Packed, groups: Groups):
    return _grouped_matmul(rows, weights, groups), (rows, weights, groups)


def _vjp_bwd(saved, d_out: jax.Array):
    rows, weights, groups = saved
    d_rows = multiply(d_out, weights, groups, transposed=True)
    if isinstance(weights, Packed):  # integers have no gradient
        return d_rows, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), weights), None
    return d_rows, weight_gradient(rows, d_out, weights, groups), None


_grouped_matmul.defvjp(_vjp_fwd, _vjp_bwd)


def multiply(rows: jax.Array, weights: jax.Array | Packed, groups: Groups, transposed: bool = False) -> jax.Array:
    """See `xla.forward`."""
    kernel: dict[str, Any] = {}
    for name, backend in (("tpu", tpu), ("gpu", gpu)):
        if backend.supports(rows, weights, groups, transposed):
            kernel[name] = partial(backend.forward, transposed=transposed)
    return by_platform(rows, weights, groups, xla=partial(xla.forward, transposed=transposed), **kernel)


def weight_gradient(rows: jax.Array, d_out: jax.Array, weights: jax.Array, groups: Groups) -> jax.Array:
    """See `xla.weight_gradient`."""
    kernel: dict[str, Any] = {}
    if tpu.supports(rows, weights, groups):
        kernel["tpu"] = tpu.weight_gradient
    if gpu.supports_gradient(rows, weights, groups):
        kernel["gpu"] = gpu.weight_gradient
    return by_platform(rows, d_out, weights, groups, xla=xla.weight_gradient, **kernel)
