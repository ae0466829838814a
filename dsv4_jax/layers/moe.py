"""Fine-grained mixture of experts: sqrt-softplus or hash routing, clamped SwiGLU, one shared expert (report 2.1)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.layers.experts import Matrices, apply_experts, swiglu
from dsv4_jax.layers.norm import dense
from dsv4_jax.layers.parameters import buffer, normal, parameter
from dsv4_jax.partition import ALONE, Partition
from dsv4_jax.quantization.policy import NONE, Policy


class Routing(NamedTuple):
    """Where tokens go: expert_ids [B, S, k] int32; weights [B, S, k] and all scores [B, S, E], float32."""

    expert_ids: jax.Array
    weights: jax.Array
    scores: jax.Array


class Gate(nnx.Module):
    """The router of one block: learned (a bias balances the experts) or hashed (a table by token id)."""

    def __init__(self, config: DeepseekV4Config, routing: str, rngs: nnx.Rngs):
        """Parameter weight [D, E]; buffer bias [E] (learned routing but for "greedy") or tid2eid [V, k] (hash)."""
        c = self.config = config
        shape = (c.hidden_size, c.n_routed_experts)
        # Every token needs the scores of all experts: "scores" and "token_ids" are axes that no rule spreads.
        self.weight = parameter(normal(rngs, shape, c), ("embed", "scores"), "muon", "router")
        if routing == "hash_moe":
            self.tid2eid = buffer(hash_table(rngs.params(), c), ("token_ids", "experts_per_tok"), "router")
        elif c.topk_method == "noaux_tc":
            self.bias = buffer(jnp.zeros(c.n_routed_experts), ("experts",), "router")

    def __call__(self, x: jax.Array, tokens: jax.Array, given: jax.Array | None = None) -> Routing:
        """Route x [.., D]; `tokens` [..] are the token ids of hash routing. Float32 throughout.

        `given` [.., k] replaces a learned router's choice of experts; their weights are those of x all the same.
        """
        c = self.config
        logits = jnp.dot(
            x.astype(jnp.float32), self.weight[...].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        scores = SCORES[c.scoring_func](logits)
        if c.adaptive_routing_temperature:
            scores = adapt_sharpness(scores, c.adaptive_routing_temperature)
        if hasattr(self, "tid2eid"):
            expert_ids = self.tid2eid[...][tokens]
        elif given is not None:
            expert_ids = given
        else:
            biased = jax.lax.stop_gradient(scores) + (self.bias[...] if hasattr(self, "bias") else 0)
            expert_ids = jax.lax.top_k(biased, c.num_experts_per_tok)[1]
        chosen = jnp.take_along_axis(scores, expert_ids, axis=-1)
        weights = shares(chosen) * c.routed_scaling_factor
        return Routing(expert_ids, weights, scores)


class Experts(nnx.Module):
    """SwiGLU experts with clamped gate and up projections; `count` is None for the single shared expert."""

    def __init__(self, config: DeepseekV4Config, count: int | None, rngs: nnx.Rngs):
        """Parameters w1, w3 [E, D, I] and w2 [E, I, D]; without the expert axis for the shared expert."""
        c = self.config = config
        stack, axes = ((), ()) if count is None else ((count,), ("experts",))
        wide, narrow = (
            (*stack, c.hidden_size, c.moe_intermediate_size),
            (*stack, c.moe_intermediate_size, c.hidden_size),
        )
        self.w1 = parameter(normal(rngs, wide, c), (*axes, "embed", "mlp"), "muon", "experts")
        self.w3 = parameter(normal(rngs, wide, c), (*axes, "embed", "mlp"), "muon", "experts")
        self.w2 = parameter(normal(rngs, narrow, c), (*axes, "mlp", "embed"), "muon", "experts")

    def shared(self, x: jax.Array, policy: Policy) -> jax.Array:
        """The shared expert on every token: [B, S, D] -> [B, S, D]."""
        x = policy("shared_input", x)
        hidden = swiglu(dense(x, self.w1[...]), dense(x, self.w3[...]), self.config.swiglu_limit)
        return dense(policy("shared_input", hidden), self.w2[...])

    def routed(
        self, x: jax.Array, routing: Routing, partition: Partition, policy: Policy, beside: jax.Array | None = None
    ) -> jax.Array:
        """The weighted sum of each token's experts, plus `beside`: [B, S, D] -> [B, S, D]; no token is dropped."""
        # A policy of its own: whatever else the given one does at its hooks cannot be done behind a partition.
        apply = partial(apply_experts, self.config.swiglu_limit, policy=Policy(policy.rounding))
        x = policy("expert_input", x)  # before tokens travel to their experts
        given = x, routing.expert_ids, routing.weights, beside
        return partition.experts(apply, self.matrices(), *given, policy.rounding.get("expert_input"))

    def matrices(self) -> Matrices:
        """The weights of all experts."""
        return Matrices(self.w1[...], self.w3[...], self.w2[...])


class MoE(nnx.Module):
    """Gate, routed experts and, in every V4, the shared expert."""

    def __init__(self, config: DeepseekV4Config, routing: str, rngs: nnx.Rngs):
        """See the parts."""
        self.gate = Gate(config, routing, rngs)
        self.experts = Experts(config, config.n_routed_experts, rngs)
        if config.n_shared_experts:
            self.shared_experts = Experts(config, None, rngs)

    def __call__(
        self,
        x: jax.Array,
        tokens: jax.Array,
        counted: jax.Array,
        given: jax.Array | None = None,
        partition: Partition = ALONE,
        policy: Policy = NONE,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """x [B, S, D], token ids [B, S], experts given to a learned router [B, S, k] -> ([B, S, D], record).

        The record holds the "routing", "expert_ids" [B, S, k], "load" [E] (pairs per expert) and "balance" (the
        sequence-wise loss), the latter two over the tokens that `counted` [B, S] marks (padding is not counted).
        """
        with jax.named_scope("route"):
            # `token_values` calls a function of single tokens on every token: [B, S, ..] as [N, ..] and back, and on a
            # mesh each device on its own tokens. The gate goes in as a plain tree, as arrays must.
            graph, gate = nnx.split(self.gate)
            route = lambda gate, *each: nnx.merge(graph, gate)(*each)  # noqa: E731
            each = (x, tokens) if given is None else (x, tokens, given)
            routing = partition.token_values(route, nnx.to_pure_dict(gate), *each)
        with jax.named_scope("experts"):
            shared = self.shared_experts.shared(x, policy) if hasattr(self, "shared_experts") else None
            out = self.experts.routed(x, routing, partition, policy, shared)
        return out, balance_record(routing, counted) | {"routing": routing}


def sqrt_softplus(x: jax.Array) -> jax.Array:
    """`sqrt(log(1 + exp(x)))` with a finite gradient where softplus underflows: there it is `exp(x / 2)`."""
    small = x < -20.0
    root = jnp.sqrt(jax.nn.softplus(jnp.where(small, 0.0, x)))
    return jnp.where(small, jnp.exp(jnp.where(small, x, 0.0) / 2), root)


SCORES = {"sqrtsoftplus": sqrt_softplus, "sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}
"""Of the router's logits [.., E], by `scoring_func`: V4's, V3's and Mixtral's."""


def shares(scores: jax.Array) -> jax.Array:
    """Non-negative scores [.., E] over their sum; all zero where they are."""
    # The scale cancels; it keeps the square of the sum, which the gradient divides by, from underflowing.
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    scaled = scores / jnp.maximum(largest, jnp.finfo(scores.dtype).tiny)
    return scaled / (scaled.sum(-1, keepdims=True) + (largest == 0))


def adapt_sharpness(scores: jax.Array, strength: float) -> jax.Array:
    """The article's adaptive routing temperature (3.2): flatter scores for ambiguous tokens, sharper for clear ones.

    A token's uncertainty u is the entropy of its normalised scores over log E; scores are raised to `1 / tau` with
    `tau = exp(strength * (2u - 1))`, so u = 1/2 leaves them as they are. No auxiliary loss is involved.
    """
    p = shares(scores)
    uncertainty = -jax.scipy.special.xlogy(p, jnp.maximum(p, 1e-20)).sum(-1, keepdims=True) / jnp.log(scores.shape[-1])
    return jnp.maximum(scores, 1e-20) ** jnp.exp(-strength * (2 * uncertainty - 1))


def hash_table(key: jax.Array, config: DeepseekV4Config) -> jax.Array:
    """tid2eid [V, k]: distinct experts for every token id, each expert as often as any other (to one)."""
    vocab, k, experts = config.vocab_size, config.num_experts_per_tok, config.n_routed_experts
    # Deal a shuffled deck of all experts again and again: k consecutive cards are distinct experts.
    start = jax.random.permutation(key, vocab) * k % experts
    order = jax.random.permutation(jax.random.fold_in(key, 1), experts)
    return order[(start[:, None] + jnp.arange(k)) % experts].astype(jnp.int32)


def balance_record(routing: Routing, counted: jax.Array) -> dict[str, Any]:
    """Load per expert and the sequence-wise balance loss `sum_e f_e P_e` (V3 report eq. 17-20), averaged over rows."""
    batch, length = counted.shape
    experts, k = routing.scores.shape[-1], routing.expert_ids.shape[-1]
    ids = routing.expert_ids.reshape(batch, length * k)
    marks = jnp.repeat(counted.astype(jnp.float32), k, axis=1)
    load = jax.vmap(lambda ids, marks: jnp.zeros(experts).at[ids].add(marks))(ids, marks)  # [B, E]
    tokens = jnp.maximum(counted.sum(1, keepdims=True), 1).astype(jnp.float32)
    mean_share = jnp.where(counted[..., None], shares(routing.scores), 0.0).sum(1) / tokens
    balance = (load * experts / (k * tokens) * mean_share).sum(-1).mean()
    return {
        "expert_ids": routing.expert_ids,
        "load": load.sum(0),
        "balance": balance,
    }
