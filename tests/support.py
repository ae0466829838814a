"""Helpers that tests share: a tiny model with every mechanism, its compiled probe, the fixtures, the oracle's view."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from dsv4_jax import model, weights
from dsv4_jax.checkpoint.huggingface import load_checkpoint
from dsv4_jax.config import CSA, HCA, SLIDING, DeepseekV4Config

FIXTURES = Path(__file__).parent / "fixtures" / "public"

TINY = DeepseekV4Config(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_nextn_predict_layers=1,
    compress_ratios=(0, 4, 6, 0),
    layer_types=(SLIDING, CSA, HCA, SLIDING),
    num_hash_layers=1,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=12,
    o_lora_rank=8,
    o_groups=2,
    sliding_window=5,
    index_n_heads=3,
    index_head_dim=8,
    index_topk=3,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    hc_mult=3,
    swiglu_limit=1.0,
    rope_scaling={
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
    },
)
LENGTH = 41  # a multiple of neither ratio, and far beyond the window


def random_params(config: DeepseekV4Config, seed: int = 0) -> Any:
    """Parameters with no trivial constants: random norms, sinks, ape, mHC maps, router biases and hash tables."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))

    def one(path: Any, leaf: Any) -> jax.Array:
        name, shape = path[-1].key, leaf.shape
        if name == "tid2eid":
            tables = np.argsort(rng.random((*shape[:-1], config.n_routed_experts)), axis=-1)
            return jnp.asarray(tables[..., : shape[-1]], jnp.int32)
        spread = {"bias": 0.1, "base": 1.0, "attn_sink": 1.0, "ape": 1.0, "embed": 1.0}.get(name)
        if name == "scale":
            value = rng.uniform(0.5, 1.5, shape)
        elif spread is not None:
            value = spread * rng.normal(size=shape)
        elif "norm" in name:
            value = 1 + 0.2 * rng.normal(size=shape)
        else:
            value = rng.normal(size=shape) / np.sqrt(shape[-2])
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def blocks_in_order(config: DeepseekV4Config, params: Any) -> list[Any]:
    """The stacked segments as one parameter tree per block."""
    blocks = []
    for i, segment in enumerate(config.segments):
        for r in range(segment.repeats):
            for j in range(len(segment.unit)):
                blocks.append(jax.tree.map(lambda leaf, r=r: leaf[r], params["segments"][str(i)][str(j)]))
    return blocks


def run_oracle(config: DeepseekV4Config, params: Any, tokens: Any, mode: str = "sparse") -> oracle.Result:
    """The float64 oracle on one document."""
    double = lambda x: np.asarray(x, np.float64 if np.issubdtype(x.dtype, np.floating) else None)  # noqa: E731
    tree = jax.tree.map(double, params)
    ends = {name: value for name, value in tree.items() if name != "segments"}
    return oracle.forward(config, ends, blocks_in_order(config, tree), np.asarray(tokens), mode)


@functools.cache
def probe(mode: str, packed: bool, config: DeepseekV4Config = TINY) -> Any:
    """One compiled function (params, tokens, segment_ids, weights) -> (Output, gradients) for most tests of the model.

    `weights` are the cotangents (logits [B, S, V], mtp_hidden [B, S, D], the indexers' KL [B, S], balance []): the
    gradients are those of the weighted sum of these outputs. Compiling dominates, so tests choose what they
    differentiate by the weights. Without `packed` the segment ids are left out: every row is one document.
    """

    def weighted(params: Any, tokens: Any, segment_ids: Any, weights: Any) -> Any:
        out = model.forward(
            config, params, tokens, segment_ids=segment_ids if packed else None, attention=mode, mtp=True,
            index_loss=True, record=True,
        )  # fmt: skip
        kl = sum(layer["index_loss"].kl for layer in out.layers if "index_loss" in layer)
        balance = sum(layer["balance"] for layer in out.layers)
        parts = zip((out.logits, out.mtp_hidden, kl, balance), weights, strict=True)
        return sum((part * weight).sum() for part, weight in parts), out

    return jax.jit(lambda *args: jax.grad(weighted, has_aux=True, allow_int=True)(*args)[::-1])


def weights_for(batch: int, logits: Any = 0.0, mtp: Any = 0.0, kl: Any = 0.0, balance: float = 0.0) -> Any:
    """Cotangents for `probe` on TINY, zeros by default; each is broadcast to its output's shape."""
    shapes = (batch, LENGTH, TINY.vocab_size), (batch, LENGTH, TINY.hidden_size), (batch, LENGTH), ()
    parts = zip((logits, mtp, kl, balance), shapes, strict=True)
    return tuple(jnp.asarray(np.broadcast_to(np.asarray(value, np.float32), shape)) for value, shape in parts)


def random_tokens(batch: int = 2, seed: int = 0, length: int = LENGTH) -> np.ndarray:
    """Token ids [batch, length] of TINY's vocabulary."""
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, length)).astype(np.int32)


def one_document(batch: int = 2) -> np.ndarray:
    """Segment ids of rows that are one document each."""
    return np.ones((batch, LENGTH), np.int32)


def leaves_by_name(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by slash-joined path."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in flat}


def check_gradients(ours: Any, stated: Any, args: Any, tolerance: float = 1e-4, seed: int = 0) -> None:
    """Value and gradients of `ours` (jax, float32) against the float64 numpy statement `stated`.

    Every argument's gradient is compared along random directions with central differences of the statement.
    """
    rng = np.random.default_rng(seed)
    args = [np.asarray(np.asarray(arg, np.float32), np.float64) for arg in args]
    single = [jnp.asarray(arg, jnp.float32) for arg in args]
    expected = stated(*args)
    cotangent = rng.normal(size=expected.shape)

    def weighted(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = ours(*args)
        return (out * jnp.asarray(cotangent, jnp.float32)).sum(), out

    run = jax.jit(jax.grad(weighted, argnums=tuple(range(len(args))), has_aux=True))
    gradients, out = run(*single)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance / 5 * max(1, np.abs(expected).max()))
    for i, gradient in enumerate(gradients):
        for _ in range(3):
            step = rng.normal(size=args[i].shape)
            moved = [[*args[:i], args[i] + sign * 1e-5 * step, *args[i + 1 :]] for sign in (1, -1)]
            slope = ((stated(*moved[0]) - stated(*moved[1])) * cotangent).sum() / 2e-5
            scale = max(np.linalg.norm(gradient) * np.linalg.norm(step) / np.sqrt(step.size), 1e-3)
            assert abs((np.asarray(gradient, np.float64) * step).sum() - slope) < tolerance * scale, f"argument {i}"


def load_fixture(name: str) -> tuple[DeepseekV4Config, Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(config, parameters, forward.npz, grads.npz) of a reference fixture."""
    config, params = load_checkpoint(FIXTURES / name)
    forward, grads = (dict(np.load(FIXTURES / name / f"{part}.npz")) for part in ("forward", "grads"))
    return config, jax.tree.map(jnp.asarray, params), forward, grads


def transformers_names(config: DeepseekV4Config, params: Any) -> dict[str, np.ndarray]:
    """A tree of parameters or gradients under transformers' module names, matrices `[out, in]` as torch has them."""
    head = params["hc_head"]
    named = {
        "model.embed_tokens.weight": params["embed"],
        "lm_head.weight": params["head"].T,
        "model.norm.weight": params["norm"],
        "model.hc_head.hc_fn": head["fn"].T,
        "model.hc_head.hc_base": head["base"],
        "model.hc_head.hc_scale": head["scale"],
    }
    for i, block in enumerate(blocks_in_order(config, params)):
        named |= {f"model.layers.{i}.{name}": value for name, value in _block_names(block).items()}
    return {name: np.asarray(value) for name, value in named.items()}


def _block_names(p: Any) -> dict[str, Any]:
    attn, ffn, stack = p["attn"], p["ffn"], jnp.concatenate
    wo_a = attn["wo_a"].swapaxes(1, 2)
    named = {
        "input_layernorm.weight": p["attn_norm"],
        "post_attention_layernorm.weight": p["ffn_norm"],
        "self_attn.q_a_proj.weight": attn["wq_a"].T,
        "self_attn.q_a_norm.weight": attn["q_norm"],
        "self_attn.q_b_proj.weight": attn["wq_b"].T,
        "self_attn.kv_proj.weight": attn["wkv"].T,
        "self_attn.kv_norm.weight": attn["kv_norm"],
        "self_attn.sinks": attn["attn_sink"],
        "self_attn.o_a_proj.weight": wo_a.reshape(-1, wo_a.shape[-1]),
        "self_attn.o_b_proj.weight": attn["wo_b"].T,
        "mlp.gate.weight": ffn["gate"]["weight"].T,
        "mlp.experts.gate_up_proj": stack([ffn["experts"]["w1"], ffn["experts"]["w3"]], -1).swapaxes(1, 2),
        "mlp.experts.down_proj": ffn["experts"]["w2"].swapaxes(1, 2),
    }
    for site, ours in (("attn_hc", "hc_attn"), ("ffn_hc", "hc_ffn")):
        named |= {f"{site}.fn": p[ours]["fn"].T, f"{site}.base": p[ours]["base"], f"{site}.scale": p[ours]["scale"]}
    for theirs, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        named[f"mlp.shared_experts.{theirs}_proj.weight"] = ffn["shared_experts"][ours].T
    if "compressor" in attn:
        named |= _compressor_names("self_attn.compressor", attn["compressor"])
    if "indexer" in attn:
        prefix, indexer = "self_attn.compressor.indexer", attn["indexer"]
        named |= _compressor_names(prefix, indexer["compressor"])
        named[f"{prefix}.q_b_proj.weight"] = indexer["wq_b"].T
        named[f"{prefix}.scorer.weights_proj.weight"] = indexer["weights_proj"].T
    return named


def _compressor_names(prefix: str, p: Any) -> dict[str, Any]:
    return {
        f"{prefix}.kv_proj.weight": p["wkv"].T,
        f"{prefix}.gate_proj.weight": p["wgate"].T,
        f"{prefix}.position_bias": p["ape"],
        f"{prefix}.kv_norm.weight": p["norm"],
    }
