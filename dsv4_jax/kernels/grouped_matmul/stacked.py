"""A layer's experts that stay in the stack of all layers.

A scan over layers slices every layer's weights out of their stacks. What a matrix product reads is sliced on the way
into it, but what goes into a kernel or a loop is written to memory first: in decoding that would be all experts of the
layer, read and written to use the few that the tokens chose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.grouped_matmul.groups import Groups
from dsv4_jax.kernels.platforms import compiled_for
from dsv4_jax.quantization.packed import Packed


@partial(jax.tree_util.register_dataclass, data_fields=["stack", "layer"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class OfStack:
    """Matrices [E, in, out] of one layer. Has no gradient.

    Attributes:
        stack: of all layers, [L, E, in, out], an array or `Packed`.
        layer: which one, int32 [].
    """

    stack: Any
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, in, out]."""
        return self.stack.shape[1:]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """The matrix of an expert; `...` is itself."""
        return self if index is Ellipsis else self.stack[self.layer, index]

    def among(self, groups: Groups, dtype: Any) -> tuple[jax.Array | Packed, Groups]:
        """For rows of `dtype`: the experts of all layers as one row of matrices, and groups that count within it.

        Where a kernel would first convert all that it is given, the layer's own experts are sliced out after all.
        """
        stack, count = self.stack, len(self)
        if isinstance(stack, Packed):
            if stack.tile[1] > 1:
                return stack[self.layer], groups
            flat: Any = replace(stack, values=_flat(stack.values), scales=_flat(stack.scales))
        elif stack.dtype != dtype and compiled_for() == "cuda":
            return stack[self.layer], groups
        else:
            flat = _flat(stack)
        return flat, groups._replace(expert_of_tile=groups.expert_of_tile + self.layer * jnp.int32(count))


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])
