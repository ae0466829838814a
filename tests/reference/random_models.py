"""Random DeepSeek-V4 models of transformers (float32, eager), and what they compute where choices are clear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from dsv4_jax.config import CSA, HCA, SLIDING

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", "5.23")

GAP = 1e-4  # least distance of a kept from a dropped score; float32 noise is about 1e-6, and a flip changes everything
PRIMES = (41, 43, 47, 53, 59, 61)  # lengths that are multiples of no ratio


def draw_shapes(seed: int) -> dict[str, Any]:
    """A configuration in transformers' form.

    Every seed has all three kinds of attention in an order of its own; seeds 0 to 3 have 0 to 3 hash layers, and every
    other seed has YaRN.
    """
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    kinds = [SLIDING, CSA, HCA, *rng.choice([SLIDING, CSA, HCA], rng.integers(0, 3))]
    groups, per_group = pick((1, 3), (2, 1), (2, 2), (3, 2))
    head_dim, rotary = pick((16, 8), (20, 10), (24, 6), (32, 4))
    hashed = seed % 4
    return {
        "vocab_size": int(rng.integers(40, 100)),
        "hidden_size": pick(24, 36, 48),
        "num_hidden_layers": len(kinds),
        "layer_types": [str(kind) for kind in rng.permutation(kinds)],
        "mlp_layer_types": ["hash_moe" if i < hashed else "moe" for i in range(len(kinds))],
        "compress_rates": {CSA: int(rng.integers(2, 7)), HCA: int(rng.integers(5, 17))},
        "num_attention_heads": groups * per_group,
        "head_dim": head_dim,
        "partial_rotary_factor": rotary / head_dim,
        "q_lora_rank": pick(12, 20),
        "o_groups": groups,
        "o_lora_rank": pick(8, 12),
        "sliding_window": int(rng.integers(3, 14)),
        "index_n_heads": pick(6, 9),  # with few heads many scores are exactly 0, and a tie has no right answer
        "index_head_dim": pick(12, 16),
        "index_topk": int(rng.integers(1, 6)),
        "n_routed_experts": int(rng.integers(4, 9)),
        "num_experts_per_tok": int(rng.integers(1, 4)),
        "moe_intermediate_size": pick(12, 20),
        "routed_scaling_factor": pick(1.0, 1.5, 2.5),
        "swiglu_limit": pick(0.7, 1.5, 10.0),
        "hc_mult": int(rng.integers(2, 6)),
        "hc_sinkhorn_iters": pick(1, 2, 5, 20),
        "max_position_embeddings": 128,
        "rope_parameters": _rotary(rotary / head_dim, yarn=seed % 2 == 0),
        "pad_token_id": None,
    }


def _rotary(factor: float, yarn: bool) -> dict[str, Any]:
    main = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    compress = main | {"rope_theta": 160000.0}
    if yarn:
        compress |= {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
        compress |= {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}
    return {"main": main, "compress": compress}


def make_model(shapes: dict[str, Any], seed: int) -> Any:
    """A model with no trivial constants: random norms, sinks, ape, mHC maps, router biases and hash tables."""
    config = transformers.DeepseekV4Config(
        **shapes, attn_implementation="eager", experts_implementation="eager", dtype="float32"
    )
    model = transformers.DeepseekV4ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if (value := _random_value(name, tensor, config.n_routed_experts, generator)) is not None:
                tensor.copy_(value)
    return model


def _random_value(name: str, tensor: Any, experts: int, generator: Any) -> Any:
    """What replaces a parameter or buffer; None keeps it (rotary frequencies)."""
    if "rotary" in name or "inv_freq" in name:
        return None
    if name.endswith("tid2eid"):
        return torch.rand(tensor.shape[0], experts, generator=generator).argsort(-1)[:, : tensor.shape[1]]
    normal = torch.randn(tensor.shape, generator=generator)
    if name.endswith("scale"):
        return torch.rand(tensor.shape, generator=generator) + 0.5
    if name.endswith("e_score_correction_bias"):
        return 0.1 * normal
    if name.endswith(("base", "sinks", "position_bias", "embed_tokens.weight")):
        return normal
    if "norm" in name:
        return 1 + 0.2 * normal
    return normal * tensor.shape[-1] ** -0.5


@dataclass
class Result:
    """What transformers computes on tokens [B, S].

    streams: after each layer, [B, S, n, D]. experts: of each learned-routing layer, sorted [B, S, k].
    gradients: by module name; absent for parameters without one. gap: the narrowest choice.
    """

    tokens: np.ndarray
    logits: np.ndarray
    streams: list[np.ndarray]
    experts: dict[int, np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]
    gap: float


def run(model: Any, tokens: Any) -> Result:
    """Forward and backward of the mean next-token loss, watched by hooks."""
    streams: list[Any] = []
    experts: dict[int, Any] = {}
    gaps: list[float] = []
    hooks = []
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(lambda module, args, out: streams.append(out)))
        if hasattr(layer.mlp.gate, "e_score_correction_bias"):
            hooks.append(layer.mlp.gate.register_forward_hook(_watch_router(i, tokens.shape, experts, gaps)))
        if model.config.layer_types[i] == CSA:
            scorer = layer.self_attn.compressor.indexer.scorer
            hooks.append(scorer.register_forward_hook(_watch_index(model.config, gaps)))
    model.zero_grad()
    out = model(tokens, labels=tokens, use_cache=False)
    out.loss.backward()
    for hook in hooks:
        hook.remove()
    return Result(
        tokens.numpy(),
        out.logits.detach().numpy(),
        [x.detach().numpy() for x in streams],
        experts,
        float(out.loss.detach()),
        {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None},
        min(gaps, default=np.inf),
    )


def run_where_choices_are_clear(model: Any, seed: int, length: int | None = None, tries: int = 40) -> Result:
    """`run` on the first random tokens for which every router and indexer decides by more than `GAP`."""
    rng = np.random.default_rng(seed)
    batch, length = (int(rng.integers(1, 4)), int(rng.choice(PRIMES))) if length is None else (1, length)
    for _ in range(tries):
        tokens = torch.from_numpy(rng.integers(0, model.config.vocab_size, (batch, length)))
        result = run(model, tokens)
        if result.gap > GAP:
            return result
    raise AssertionError(f"no tokens of {tries} draws decide by more than {GAP}: use another seed")


def _watch_router(layer: int, shape: Any, experts: dict[int, Any], gaps: list[float]) -> Any:
    def hook(gate: Any, args: Any, out: Any) -> None:
        biased = torch.sqrt(torch.nn.functional.softplus(out[0])) + gate.e_score_correction_bias
        gaps.append(_narrowest(biased, gate.top_k))
        experts[layer] = out[2].sort(-1).values.reshape(*shape, -1).numpy()

    return hook


def _watch_index(config: Any, gaps: list[float]) -> Any:
    def hook(scorer: Any, args: Any, scores: Any) -> None:
        queries, entries = scores.shape[1:]
        visible = (torch.arange(queries) + 1)[:, None] // config.compress_rates[CSA] > torch.arange(entries)
        gaps.append(_narrowest(scores.masked_fill(~visible, -torch.inf), config.index_topk))

    return hook


def _narrowest(scores: Any, k: int) -> float:
    """Smallest distance of the k-th from the next score, over the rows that have to drop one."""
    if scores.shape[-1] <= k:
        return np.inf
    best = scores.detach().topk(k + 1, dim=-1).values
    dropping = torch.isfinite(best[..., k])
    return float((best[..., k - 1] - best[..., k])[dropping].min()) if dropping.any() else np.inf
