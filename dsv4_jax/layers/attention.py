"""Attention, all kinds: a window branch, a compressed branch and a sink, merged by log-sum-exp (report 2.3)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import CSA, SLIDING, DeepseekV4Config, LayerSpec
from dsv4_jax.kernels.indexer_topk import CANDIDATES, IndexOperands, PagedOperands, Search, index_loss, index_topk
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.sparse_attention import gather_attention, merge, range_attention, window_attention
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.indexer import Indexer
from dsv4_jax.layers.kv_cache import LayerCache
from dsv4_jax.layers.layout import NOBODY, Blocks, Layout, Neighbours
from dsv4_jax.layers.norm import dense, dense_by_group, rms_norm
from dsv4_jax.layers.parameters import normal, parameter
from dsv4_jax.layers.rotary import Rotation, rotate
from dsv4_jax.observer import NOBODY as UNOBSERVED
from dsv4_jax.observer import Attended, Observer
from dsv4_jax.quantization.policy import INDEX_SCORE, Policy

Mode = Literal["dense", "sparse", "approximate"]


class AttentionOptions(NamedTuple):
    """What a forward asks of attention; static.

    mode: "sparse" attends the entries that the indexer chooses, "dense" all visible ones; "approximate" those
        that it chooses in two levels (`indexer_topk.Search`).
    index_loss: also compute the indexer's loss, over the entries that are attended.
    policy: the precision policy.
    observer: sees what the layers computed with.
    """

    mode: Mode
    index_loss: bool
    policy: Policy
    observer: Observer = UNOBSERVED


class Attention(nnx.Module):
    """Shared key-value attention with an optional compressor and an optional indexer."""

    def __init__(self, config: DeepseekV4Config, spec: LayerSpec, rngs: nnx.Rngs):
        """Parameters; matrices are [in, out].

        Queries go through a low rank: wq_a [D, rq], q_norm [rq], wq_b [rq, H*K]. wkv [D, K] and kv_norm [K] make one
        vector per token that is key and value at once, for all heads. attn_sink [H]. Outputs go in o_groups groups G of
        heads: wo_a [G, H/G*K, o_lora_rank], wo_b [G*o_lora_rank, D].
        """
        c = self.config = config
        self.spec = spec
        heads, width, groups = c.num_attention_heads, c.head_dim, c.o_groups
        self.wq_a = parameter(normal(rngs, (c.hidden_size, c.q_lora_rank), c), ("embed", "q_lora"), "muon", "attn")
        self.q_norm = parameter(jnp.ones(c.q_lora_rank), ("q_lora",), "adamw", "norm")
        self.wq_b = parameter(normal(rngs, (c.q_lora_rank, heads * width), c), ("q_lora", "heads"), "muon", "attn")
        self.wkv = parameter(normal(rngs, (c.hidden_size, width), c), ("embed", "kv"), "muon", "attn")
        self.kv_norm = parameter(jnp.ones(width), ("kv",), "adamw", "norm")
        self.attn_sink = parameter(jnp.zeros(heads), ("heads",), "adamw", "attn")
        shape = (groups, heads // groups * width, c.o_lora_rank)
        self.wo_a = parameter(normal(rngs, shape, c), ("o_groups", "heads", "o_lora"), "muon", "attn")
        self.wo_b = parameter(
            normal(rngs, (groups * c.o_lora_rank, c.hidden_size), c), ("o_lora", "embed"), "muon", "attn"
        )
        if spec.attention != SLIDING:
            self.compressor = Compressor(c, spec.ratio, width, spec.attention == CSA, "compressor", rngs)
        if spec.attention == CSA:
            self.indexer = Indexer(c, spec.ratio, rngs)

    def __call__(
        self,
        x: jax.Array,
        layout: Layout,
        options: AttentionOptions,
        past: LayerCache | None = None,
        neighbours: Neighbours = NOBODY,
    ) -> tuple[jax.Array, dict[str, Any], LayerCache | None]:
        """x [B, S, D] -> ([B, S, D], record, what this layer remembers).

        With a cache the tokens follow those of `past`, whose window, tails and pages come back with their rows added.
        Where x is a part of its rows, `neighbours` has what tokens need of others: a window, half blocks, entries.
        The record holds "selected" [B, S, k] in CSA layers that chose (-1 unused) and, when asked for, "index_loss".
        """
        c, scale = self.config, self.config.head_dim**-0.5
        rope = layout.rope["main" if self.spec.attention == SLIDING else "compress"]
        head_rope = Rotation(*(angle[..., None, :] for angle in rope))
        with jax.named_scope("queries"):
            rounded = options.policy("attn_input", x)
            qr = rms_norm(dense(rounded, self.wq_a[...]), self.q_norm[...], c.rms_norm_eps)
            qr = options.policy("attn_input", qr)
            q = dense(qr, self.wq_b[...]).reshape(*x.shape[:2], -1, c.head_dim)  # the heads that this device has
            q = rotate(rms_norm(q, None, c.rms_norm_eps), head_rope)
        with jax.named_scope("window"):
            kv = rotate(rms_norm(dense(rounded, self.wkv[...]), self.kv_norm[...], c.rms_norm_eps), rope)
            kv = options.policy("kv_entry", kv)
            kv, past = self._remember(neighbours.before(kv, c.sliding_window), layout, past)
            positions = layout.positions if kv.shape[1] > x.shape[1] else None
            branches = [window_attention(q, kv, layout.segment_ids, c.sliding_window, scale, positions)]
        entries = choice = operands = None
        blocks = layout.blocks.get(self.spec.compression)
        if blocks is not None:  # else a sliding layer, or a row shorter than one block
            with jax.named_scope("compress"):
                entries, past = self._compress(x, blocks, options, past, neighbours)
            choice, operands, past = self._choose(x, qr, rope, blocks, entries, options, past, neighbours)
            with jax.named_scope("compressed"):
                if choice is None:
                    branches.append(range_attention(q, entries, blocks.lo, blocks.hi, scale))
                else:
                    branches.append(gather_attention(q, entries, choice, scale))
        record: dict[str, Any] = {} if choice is None else {"selected": choice}
        out, lse = merge(branches, self.attn_sink[...])
        if options.index_loss and blocks is not None and isinstance(operands, IndexOperands):
            assert isinstance(entries, jax.Array)
            compared = jnp.stack([blocks.lo, blocks.hi], -1) if choice is None else choice
            k = c.index_topk if choice is None else 0
            record["index_loss"] = index_loss(operands, q, entries, lse, compared, scale, k)
        projected = self._project(out, head_rope, options.policy)
        seen = Attended(self, layout, blocks, q, kv, entries, choice, operands, branches, lse)
        return projected, record | options.observer.attention(seen), past

    def _remember(self, kv: jax.Array, layout: Layout, past: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        """Without a cache kv [B, S, K] itself; else the window before it and kv, as stored: [B, W + S, K]."""
        if past is None or layout.past is None:
            return kv, None
        new = past.storage.encode(kv)
        rows = {name: jnp.concatenate([old, new[name]], axis=1) for name, old in past.window.items()}
        return past.storage.decode(rows, kv.dtype), past._replace(window=rows)

    def _compress(
        self, x: jax.Array, blocks: Blocks, options: AttentionOptions, past: LayerCache | None, neighbours: Neighbours
    ) -> tuple[jax.Array | Pages, LayerCache | None]:
        """The row's entries [B, T, K], or with a cache the pages of all the sequence's entries."""
        if past is None or past.tail is None or past.pages is None or blocks.places is None:
            entries = options.policy("kv_entry", self.compressor(x, blocks, neighbours))
            return neighbours.gather(entries, blocks), None
        entries, tail = self.compressor.extend(x, past.tail, blocks)
        pages = past.pages.write(blocks.places, options.policy("kv_entry", entries))
        return pages, past._replace(tail=tail, pages=pages)

    def _choose(
        self,
        x: jax.Array,
        qr: jax.Array,
        rope: Rotation,
        blocks: Blocks,
        entries: jax.Array | Pages,
        options: AttentionOptions,
        past: LayerCache | None,
        neighbours: Neighbours,
    ) -> tuple[jax.Array | None, IndexOperands | PagedOperands | None, LayerCache | None]:
        """The chosen entries [B, S, k], or None when all visible ones are attended; index operands; the cache."""
        if self.spec.attention != CSA:
            return None, None, past
        # Rows with no more entries than top-k attend them all: choosing would only reorder them.
        count = entries.capacity if isinstance(entries, Pages) else entries.shape[1]
        sparse = options.mode != "dense" and count > self.config.index_topk
        if past is None and not sparse and not options.index_loss:
            return None, None, past
        with jax.named_scope("index"):
            if past is None:
                operands = self.indexer(x, qr, rope, blocks, options.policy, neighbours)
            else:  # keys are remembered even where nothing needs choosing yet
                operands, past = self.indexer.extend(x, qr, rope, blocks, options.policy, past)
            if not sparse:
                return None, operands, past
            candidates = CANDIDATES if options.mode == "approximate" else 0
            search = Search(INDEX_SCORE in options.policy.rounding, candidates)
            return index_topk(operands, blocks.lo, blocks.hi, self.config.index_topk, search), operands, past

    def _project(self, out: jax.Array, rope: Rotation, policy: Policy) -> jax.Array:
        """Rotate the heads' outputs [B, S, H, K] back, project each group of heads, then all groups: [B, S, D]."""
        with jax.named_scope("output"):
            groups, rows = self.wo_a.shape[0], out.shape[0] * out.shape[1]
            # Groups lead: a plain batched product, which every backend has in bfloat16 too. The release rounds the
            # matrices `wo_a`, and not what they multiply.
            grouped = jnp.moveaxis(rotate(out, rope.inverse()).reshape(rows, groups, -1), 1, 0)
            low = dense_by_group(grouped, self.wo_a[...])
            low = jnp.moveaxis(low, 0, 1).astype(out.dtype).reshape(*out.shape[:2], -1)
            return dense(policy("attn_input", low), self.wo_b[...])
