"""Attention that V4 is compared with: grouped-query (Mixtral), latent (DeepSeek-V3), sparse latent (V3.2).

No part of V4, and nothing that its own layers need. These take the place of `Attention` in a block: the same call, the
same records, the same streams, norms and experts around them; no window, no sink, no cache. All of them run through
V4's kernels, in which an entry is key and value at once and documents end a query's range. Shapes: B batch, S tokens,
H heads, G key-value heads, K head width, r latent rank, R rotary dims, N and V head widths of keys without them and of
values.

Positions are rotated as in V4's layers that look far back (`compress_rope_theta`, `rope_scaling`), in adjacent pairs of
a head's last dims. Where a release rotates halves, or the first dims, its columns come in another order; the scores
are the same.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.baseline import refuse_baselines
from dsv4_jax.config import DeepseekV4Config, LayerSpec
from dsv4_jax.kernels.indexer_topk import CANDIDATES, IndexOperands, Search, index_loss, index_topk
from dsv4_jax.kernels.sparse_attention import gather_attention, range_attention
from dsv4_jax.layer_plan import GQA, MLA, MLA_SPARSE
from dsv4_jax.layers.attention import AttentionOptions
from dsv4_jax.layers.indexer import hadamard
from dsv4_jax.layers.layout import Layout
from dsv4_jax.layers.norm import dense, dense_by_group, rms_norm
from dsv4_jax.layers.parameters import normal, parameter
from dsv4_jax.layers.rotary import Rotation, frequencies, rotate, rotation
from dsv4_jax.quantization.policy import INDEX_SCORE, Policy

Attended = tuple[jax.Array, dict[str, Any], None]


class GroupedQueryAttention(nnx.Module):
    """Every query head attends all earlier tokens; H / G heads share keys and values (arXiv 2305.13245)."""

    def __init__(self, config: DeepseekV4Config, spec: LayerSpec, rngs: nnx.Rngs):
        """Parameters wq [D, H*K], wk and wv [D, G*K], wo [H*K, D]."""
        del spec
        c = self.config = config
        heads, groups = (n * c.head_dim for n in (c.num_attention_heads, c.baseline.num_key_value_heads))
        self.wq = parameter(normal(rngs, (c.hidden_size, heads), c), ("embed", "heads"), "muon", "attn")
        self.wk = parameter(normal(rngs, (c.hidden_size, groups), c), ("embed", "kv"), "muon", "attn")
        self.wv = parameter(normal(rngs, (c.hidden_size, groups), c), ("embed", "kv"), "muon", "attn")
        self.wo = parameter(normal(rngs, (heads, c.hidden_size), c), ("heads", "embed"), "muon", "attn")

    def __call__(self, x: jax.Array, layout: Layout, options: AttentionOptions, past: None = None) -> Attended:
        """x [B, S, D] -> ([B, S, D], {}, None)."""
        _refuse_cache(self.config, past)
        c, x = self.config, options.policy("attn_input", x)
        in_heads = lambda y: y.reshape(*y.shape[:2], -1, c.head_dim)  # noqa: E731
        angles = frequencies(c.compress_rope_theta, c.head_dim, c.rope_scaling)
        rope = _for_heads(rotation(layout.positions, angles))
        with jax.named_scope("queries"):
            q = rotate(in_heads(dense(x, self.wq[...])), rope)
        with jax.named_scope("keys"):
            k = rotate(in_heads(dense(x, self.wk[...])), rope)
            v = in_heads(dense(x, self.wv[...]))
        with jax.named_scope("full"):
            out = grouped_attention(q, k, v, *_seen(layout), c.head_dim**-0.5)
        with jax.named_scope("output"):
            return dense(options.policy("attn_input", out.reshape(*x.shape[:2], -1)), self.wo[...]), {}, None


class LatentAttention(nnx.Module):
    """MLA (DeepSeek-V2 report 2.1) over all earlier tokens, or over those that its indexer chooses (V3.2 report 2.1).

    A token leaves one entry for all heads: its normed latent and a rotary key. Queries are multiplied with the keys'
    part of `wkv_b` before they meet the entries, and what they read with the values' part after ("absorbed"): the same
    numbers as with keys and values of each head, which never exist.
    """

    def __init__(self, config: DeepseekV4Config, spec: LayerSpec, rngs: nnx.Rngs):
        """Parameters wq_a [D, rq], wq_b [rq, H*(N+R)], wkv_a [D, r+R], wkv_b [r, H*(N+V)], wo [H*V, D]; norms."""
        c, sizes = config, config.baseline
        self.config, heads, rope = c, c.num_attention_heads, c.qk_rope_head_dim
        make = lambda shape, *axes: parameter(normal(rngs, shape, c), axes, "muon", "attn")  # noqa: E731
        self.wq_a = make((c.hidden_size, c.q_lora_rank), "embed", "q_lora")
        self.q_norm = parameter(jnp.ones(c.q_lora_rank), ("q_lora",), "adamw", "norm")
        self.wq_b = make((c.q_lora_rank, heads * (sizes.qk_nope_head_dim + rope)), "q_lora", "heads")
        self.wkv_a = make((c.hidden_size, sizes.kv_lora_rank + rope), "embed", "kv")
        self.kv_norm = parameter(jnp.ones(sizes.kv_lora_rank), ("kv",), "adamw", "norm")
        self.wkv_b = make((sizes.kv_lora_rank, heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)), "kv", "heads")
        self.wo = make((heads * sizes.v_head_dim, c.hidden_size), "heads", "embed")
        if spec.attention == MLA_SPARSE:
            self.indexer = TokenIndexer(c, rngs)

    def __call__(self, x: jax.Array, layout: Layout, options: AttentionOptions, past: None = None) -> Attended:
        """x [B, S, D] -> ([B, S, D], record, None); the record is that of a CSA layer: "selected", "index_loss"."""
        _refuse_cache(self.config, past)
        c, rank, nope = self.config, self.config.baseline.kv_lora_rank, self.config.baseline.qk_nope_head_dim
        scale, rope, seen = (nope + c.qk_rope_head_dim) ** -0.5, layout.rope["compress"], _seen(layout)
        expand = self.wkv_b[...].reshape(rank, c.num_attention_heads, -1).transpose(1, 0, 2)  # [H, r, N + V]
        with jax.named_scope("queries"):
            rounded = options.policy("attn_input", x)
            qr = rms_norm(dense(rounded, self.wq_a[...]), self.q_norm[...], c.rms_norm_eps)
            qr = options.policy("attn_input", qr)
            q = dense(qr, self.wq_b[...]).reshape(*x.shape[:2], c.num_attention_heads, -1)
            q = rotate(q, _for_heads(rope))
            absorbed = _by_head(q[..., :nope], expand[..., :nope].swapaxes(1, 2))
            q = jnp.concatenate([absorbed, q[..., nope:]], -1)  # [B, S, H, r + R]
        with jax.named_scope("entries"):
            latent, key = jnp.split(dense(rounded, self.wkv_a[...]), [rank], -1)
            entries = jnp.concatenate([rms_norm(latent, self.kv_norm[...], c.rms_norm_eps), key], -1)
            entries = options.policy("kv_entry", rotate(entries, rope))  # [B, S, r + R]
        choice, operands = self._choose(x, qr, rope, seen, options)
        with jax.named_scope("full" if choice is None else "chosen"):
            if choice is None:
                out, lse = range_attention(q, entries, *seen, scale)
            else:
                out, lse = gather_attention(q, entries, choice, scale)
        record: dict[str, Any] = {} if choice is None else {"selected": choice}
        if options.index_loss and operands is not None:
            compared, k = (jnp.stack(seen, -1), c.index_topk) if choice is None else (choice, 0)
            record["index_loss"] = index_loss(operands, q, entries, lse, compared, scale, k)
        with jax.named_scope("output"):
            values = _by_head(out[..., :rank], expand[..., nope:]).reshape(*x.shape[:2], -1)
            return dense(options.policy("attn_input", values), self.wo[...]), record, None

    def _choose(
        self,
        x: jax.Array,
        qr: jax.Array,
        rope: Rotation,
        seen: tuple[jax.Array, jax.Array],
        options: AttentionOptions,
    ) -> tuple[jax.Array | None, IndexOperands | None]:
        """The chosen tokens [B, S, k], or None when all are attended; index operands, where they are needed."""
        # Rows with no more tokens than top-k attend them all: choosing would only reorder them.
        sparse = options.mode != "dense" and x.shape[1] > self.config.index_topk
        if not hasattr(self, "indexer") or not (sparse or options.index_loss):
            return None, None
        with jax.named_scope("index"):
            operands = self.indexer(x, qr, rope, options.policy)
            if not sparse:
                return None, operands
            candidates = CANDIDATES if options.mode == "approximate" else 0
            search = Search(INDEX_SCORE in options.policy.rounding, candidates)
            return index_topk(operands, *seen, self.config.index_topk, search), operands


class TokenIndexer(nnx.Module):
    """V3.2's lightning indexer: a key for every token, where V4's has one for each compressed entry."""

    def __init__(self, config: DeepseekV4Config, rngs: nnx.Rngs):
        """Parameters wq_b [rq, Hi*di], weights_proj [D, Hi], wk [D, di] and a layer norm of the keys."""
        c = config
        self.heads, self.width = c.index_n_heads, c.index_head_dim
        make = lambda shape, *axes: parameter(normal(rngs, shape, c), axes, "muon", "indexer")  # noqa: E731
        self.wq_b = make((c.q_lora_rank, self.heads * self.width), "q_lora", "index_heads")
        self.weights_proj = make((c.hidden_size, self.heads), "embed", "index_heads")
        self.wk = make((c.hidden_size, self.width), "embed", "kv")
        self.k_norm = parameter(jnp.ones(self.width), ("kv",), "adamw", "indexer")
        self.k_norm_bias = parameter(jnp.zeros(self.width), ("kv",), "adamw", "indexer")

    def __call__(self, x: jax.Array, qr: jax.Array, rope: Rotation, policy: Policy) -> IndexOperands:
        """Operands from the layer input x [B, S, D] and the query latent qr [B, S, rq], both detached."""
        x, qr = jax.lax.stop_gradient((x, qr))
        queries = dense(qr, self.wq_b[...]).reshape(*qr.shape[:-1], self.heads, self.width)
        queries = hadamard(rotate(queries, _for_heads(rope)))
        keys = layer_norm(dense(x, self.wk[...]), self.k_norm[...], self.k_norm_bias[...])
        keys = hadamard(rotate(keys, rope))
        weights = dense(x, self.weights_proj[...], jnp.float32) * (self.width**-0.5 * self.heads**-0.5)
        return IndexOperands(policy("index_q", queries), policy("index_k", keys), weights)


BASELINE_LAYERS: dict[str, Any] = {GQA: GroupedQueryAttention, MLA: LatentAttention, MLA_SPARSE: LatentAttention}
"""What takes the place of `Attention` in a block of these kinds."""


def grouped_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lo: jax.Array, hi: jax.Array, scale: float
) -> jax.Array:
    """Attention of q [B, S, H, K] over k and v [B, S, G, K], tokens lo <= i < hi [B, S]: [B, S, H, K].

    Groups become rows, and a token's key and value one entry of 2 K numbers: queries have zeros where the values are,
    and of what they read only the values are kept. That costs twice the products, and no kernel of its own.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    as_rows = lambda y: jnp.moveaxis(y, 2, 1).reshape(batch * groups, length, *y.shape[3:])  # noqa: E731
    queries = as_rows(q.reshape(batch, length, groups, heads // groups, width))
    queries = jnp.concatenate([queries, jnp.zeros_like(queries)], -1)
    entries = as_rows(jnp.concatenate([k, v], -1))
    lo, hi = (jnp.repeat(bound, groups, axis=0) for bound in (lo, hi))
    out = range_attention(queries, entries, lo, hi, scale)[0][..., width:]
    return jnp.moveaxis(out.reshape(batch, groups, length, -1, width), 1, 2).reshape(q.shape)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Layer normalisation over the last axis, in float32, cast once to x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y * weight + bias).astype(x.dtype)


def _seen(layout: Layout) -> tuple[jax.Array, jax.Array]:
    """The tokens lo <= i < hi that each one attends, both [B, S]: its document's, up to itself."""
    index = jnp.arange(layout.positions.shape[1], dtype=jnp.int32)
    return index - layout.positions, jnp.broadcast_to(index + 1, layout.positions.shape)


def _for_heads(rope: Rotation) -> Rotation:
    return Rotation(rope.cos[..., None, :], rope.sin[..., None, :])


def _by_head(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """Each head times its own matrix: [B, S, H, I], [H, I, O] -> [B, S, H, O], in x's dtype."""
    rows = jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[3])
    out = dense_by_group(rows, matrices).astype(x.dtype)
    return jnp.moveaxis(out.reshape(x.shape[2], *x.shape[:2], -1), 0, 2)


def _refuse_cache(config: DeepseekV4Config, past: Any) -> None:
    if past is not None:
        refuse_baselines(config, "a cache")
