"""Where the model asks how its arrays lie on devices. On one device the answer is always: as they are.

`sharding/` implements the questions for meshes; nothing here knows one. A partition is static and hashable, like a
precision policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from dsv4_jax.layers.attention import Attention, AttentionOptions
    from dsv4_jax.layers.kv_cache import LayerCache
    from dsv4_jax.layers.layout import Layout

ExpertFunction = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Partition:
    """Everything on one device, or left to the compiler."""

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """x, laid out by the logical axes of its dimensions ("batch", "seq", ...; None: whole on every device)."""
        del axes
        return x

    def experts(
        self,
        apply: ExpertFunction,
        matrices: Any,
        x: jax.Array,
        expert_ids: jax.Array,
        weights: jax.Array,
        beside: jax.Array | None = None,
        rounding: Any = None,
    ) -> jax.Array:
        """The weighted sum of each token's experts, and of what is computed while tokens travel to them and back.

        Args:
            apply: `(matrices, x [N, D], expert_ids [N, k], weights [N, k]) -> [N, D]`, for any part of the experts: ids
                count within `matrices`, and an id equal to their number means none.
            matrices: [E, ..], arrays or `OfStack`.
            x: [B, S, D].
            expert_ids: [B, S, k].
            weights: [B, S, k] float32.
            beside: [B, S, D], which is added.
            rounding: how x has been rounded (`quantization.rounding.Rounding`), if it has been.

        Returns:
            [B, S, D]; no token is dropped.
        """
        del rounding
        k = expert_ids.shape[-1]
        flat = apply(matrices, x.reshape(-1, x.shape[-1]), expert_ids.reshape(-1, k), weights.reshape(-1, k))
        return flat.reshape(x.shape) if beside is None else flat.reshape(x.shape) + beside

    @property
    def experts_in_place(self) -> bool:
        """Whether `experts` multiplies matrices as they lie: then those of all layers can be given, to use some."""
        return True

    def attention(
        self, layer: Attention, x: jax.Array, layout: Layout, options: AttentionOptions, past: LayerCache | None
    ) -> tuple[jax.Array, dict[str, Any], LayerCache | None]:
        """`layer(x, layout, options, past)`, wherever the tokens of x [B, S, D] lie."""
        return layer(x, layout, options, past)

    def look_up(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """Rows of the embedding, [V, D], [B, S] -> [B, S, D]."""
        return self.token_values(lambda table, tokens: table[tokens], table, tokens)

    def token_sums(self, apply: Callable[..., jax.Array], whole: jax.Array, *tokens: jax.Array) -> jax.Array:
        """A sum over tokens that walks over them in chunks.

        Args:
            apply: `(whole, *arrays [N, ..]) -> array`, a sum over the N tokens.
            whole: what every token needs.
            *tokens: arrays [B, S, ..].
        """
        return apply(whole, *(x.reshape(-1, *x.shape[2:]) for x in tokens))

    def token_values(self, apply: Callable[..., Any], whole: Any, *tokens: jax.Array) -> Any:
        """As `token_sums` for an `apply` that gives values of each token [N, ..]; they come back as [B, S, ..]."""
        values = apply(whole, *(x.reshape(-1, *x.shape[2:]) for x in tokens))
        return jax.tree.map(lambda x: x.reshape(*tokens[0].shape[:2], *x.shape[1:]), values)


ALONE = Partition()
