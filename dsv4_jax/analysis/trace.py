"""What a model did with some tokens, layer by layer, as one typed record: which experts, which entries, how mixed.

    seen = dsv4.trace(model, tokens)
    seen.layers[1].attention.chosen  # [B, S, k]

The ordinary forward runs, with an observer: what is recorded is what was computed. Shapes: B rows, S tokens, H heads, k
experts per token or chosen entries, T entries, Q queries asked for, n streams, L layers.

Memory, in numbers of four bytes per token: for each layer 3 H + 2 k + 1 of attention and experts and 2 n^2 + 4 n + 8 of
mixing, in layers that choose k' entries 3 k' more; for each query asked for W + N, N being the chosen entries or all T
(times H with `per_head`). Nothing of S x T is held: V4-Flash over 8,192 tokens takes 1.4 GB, of which 1.1 GB are the
chosen entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax import model as _model
from dsv4_jax import weights
from dsv4_jax.analysis.observing import Tracer
from dsv4_jax.analysis.rounding_errors import Measured, relative, weight_sums
from dsv4_jax.analysis.trace_records import AttentionTrace, ExpertTrace, LayerTrace, MixingTrace, QueryTrace
from dsv4_jax.baseline import refuse_baselines
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.layers.attention import Mode
from dsv4_jax.layers.kv_cache import Cache
from dsv4_jax.layers.layout import block_ends, document_positions
from dsv4_jax.partition import ALONE, Partition
from dsv4_jax.quantization.policy import NONE, Policy, precision_policy

if TYPE_CHECKING:
    from dsv4_jax.api import Model


@dataclass(frozen=True)
class Trace:
    """What `trace` returns.

    Attributes:
        config: the architecture.
        layers: one record per block, the MTP block last when it ran.
        queries: the positions of `QueryTrace`.
        output: of the forward, with `hidden` [B, S, D] but without logits; `output.cache` with a cache.
    """

    config: DeepseekV4Config
    layers: list[LayerTrace]
    queries: tuple[int, ...]
    output: _model.Output


def trace(
    model: Model,
    tokens: Any,
    *,
    segment_ids: Any = None,
    cache: Cache | None = None,
    counts: Any = None,
    queries: Sequence[int] = (),
    per_head: bool = False,
    attention: Mode = "sparse",
    policy: str | Policy = NONE,
    mtp: bool = False,
    partition: Partition = ALONE,
) -> Trace:
    """What `model` does with tokens [B, S], compiled apart from the ordinary forward.

    Args:
        model: its `config` and `params` are used; the latter lie on devices as `partition` says.
        tokens: int32 [B, S].
        segment_ids: documents of packed rows, as in `model.forward`.
        cache: what came before; one token then is a decode step. `Trace.output.cache` holds the tokens too.
        counts: with a cache, how many tokens of each row are real.
        queries: positions in their sequences whose whole distributions are wanted; compiled anew for other ones.
        per_head: these distributions for each head.
        attention: "dense" attends all entries and also measures the indexer's recall (without a cache).
        policy: rounds as in `model.forward`, matrices too, and is measured.
        mtp: also run and trace the MTP module.
        partition: how arrays lie on devices.

    Raises:
        UserError: for queries in packed rows or that these tokens do not hold.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    policy = precision_policy(policy, model.config) if isinstance(policy, str) else policy
    queries = tuple(int(query) for query in queries)
    refuse_baselines(model.config, "a trace")
    _check(tokens, segment_ids, cache, queries)
    as_array = lambda x: None if x is None else jnp.asarray(x, jnp.int32)  # noqa: E731
    out, records, weight_parts = _run(
        model.config, model.params, tokens, as_array(segment_ids), cache, as_array(counts),
        queries=queries, per_head=per_head, attention=attention, policy=policy, mtp=mtp, partition=partition,
    )  # fmt: skip
    specs = model.config.layers + model.config.mtp_layers
    spans = {spec.ratio: _spans(spec.ratio, tokens, as_array(segment_ids), cache) for spec in specs if spec.ratio}
    layers, product = [], None
    for spec, record, of_weights in zip(specs, records, weight_parts, strict=False):
        mixing, product = _mixing(record["mixing"], product)
        attended = _attention(record["attention"], len(queries))
        rounding = {role: relative(sums) for role, sums in sorted((record["rounding"] | of_weights).items())}
        layers.append(
            LayerTrace(spec, attended, ExpertTrace(**record["experts"]), mixing, spans.get(spec.ratio), rounding)
        )
    return Trace(model.config, layers, queries, out)


@partial(jax.jit, static_argnums=0, static_argnames=("queries", "per_head", "attention", "policy", "mtp", "partition"))
def _run(
    config: DeepseekV4Config,
    params: Any,
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    cache: Cache | None,
    counts: jax.Array | None,
    *,
    queries: tuple[int, ...],
    per_head: bool,
    attention: Mode,
    policy: Policy,
    mtp: bool,
    partition: Partition,
) -> tuple[_model.Output, list[dict[str, Any]], list[dict[str, jax.Array]]]:
    """The forward's output, and of each block what the tracer saw and the rounding of its matrices."""
    measured = Measured(policy.rounding) if policy.rounding else None
    parts = weight_sums(config, policy, params)
    out = _model.forward(
        config,
        policy.weights(weights.facts(config), params),
        tokens,
        segment_ids=segment_ids,
        cache=cache,
        counts=counts,
        attention=attention,
        logits=False,
        mtp=mtp,
        index_loss=attention == "dense" and cache is None,
        policy=measured or policy,
        partition=partition,
        observer=Tracer(queries, per_head, measured),
    )
    records = [dict(layer["trace"]) for layer in out.layers]
    for record, layer in zip(records, out.layers, strict=True):
        loss = layer.get("index_loss")
        recall = {} if loss is None else {"recall": jnp.where(loss.counts, loss.recall, jnp.nan)}
        record["attention"] = record["attention"] | recall
    kept = [{name: value for name, value in layer.items() if name != "trace"} for layer in out.layers]
    return out._replace(layers=kept), records, parts


def _attention(record: dict[str, Any], queries: int) -> AttentionTrace:
    """The record of a layer; where devices held parts of the rows, each query from the one that held it."""
    found = record.get("queries")
    if found is not None:
        parts = found["found"].reshape(len(found["found"]), -1, queries)  # [B, devices, Q]
        holder = parts.argmax(1)[:, None]

        def own(x: jax.Array) -> jax.Array:
            apart = x.reshape(*parts.shape, *x.shape[2:])
            return jnp.take_along_axis(apart, holder.reshape(*holder.shape, *(1,) * (x.ndim - 2)), axis=1)[:, 0]

        found = QueryTrace(**{name: own(x) for name, x in found.items() if name != "found"})
    optional = {name: record.get(name) for name in ("chosen", "chosen_scores", "chosen_mass", "recall")}
    masses = (record[name] for name in ("window_mass", "entry_mass", "sink_mass"))
    return AttentionTrace(*masses, **optional, queries=found)


def _mixing(maps: dict[str, jax.Array], product: jax.Array | None) -> tuple[MixingTrace, jax.Array]:
    """The maps with their errors and gains; the product [B, S, n, n] of all comb matrices so far."""
    comb, gains = maps["comb"], []
    errors = (jnp.abs(comb.sum(axis) - 1).max(-1) for axis in (-1, -2))
    for site in (0, 1):
        own = comb[:, :, site]
        with jax.default_matmul_precision("highest"):
            product = own if product is None else product @ own
        gains.append(jnp.stack([jnp.abs(product).sum(axis).max(-1) for axis in (-1, -2)], axis=-1))
    assert product is not None
    return MixingTrace(**maps, row_error=next(errors), column_error=next(errors), gain=jnp.stack(gains, 2)), product


def _spans(ratio: int, tokens: jax.Array, segment_ids: jax.Array | None, cache: Cache | None) -> jax.Array:
    """First token and one past the last of every entry of ratio m, [B, T, 2]; -1 for entries that no block fills."""
    rows, length = tokens.shape
    if cache is not None or segment_ids is None:
        count = (length if cache is None else cache.capacity) // ratio
        first = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32) * ratio, (rows, count))
        return jnp.stack([first, first + ratio], axis=-1)
    positions = document_positions(rows, length, segment_ids)
    last, _ = block_ends(positions, ratio, length // ratio, unused=-1)
    unused = last < 0
    return jnp.where(unused[..., None], -1, jnp.stack([last - (ratio - 1), last + 1], axis=-1))


def _check(tokens: jax.Array, segment_ids: Any, cache: Cache | None, queries: tuple[int, ...]) -> None:
    if not queries:
        return
    if segment_ids is not None:
        raise UserError("queries are positions in one document a row: give no segment_ids with them")
    first = 0 if cache is None else int(cache.lengths.min())
    last = tokens.shape[1] - 1 + (0 if cache is None else int(cache.lengths.max()))
    if outside := [query for query in queries if not first <= query <= last]:
        raise UserError(f"queries {outside} are not among these tokens, which stand at positions {first} to {last}")
