"""The whole model in float64 numpy: one document, loops where a loop is the clearest statement of the formula.

It has the model's letters (`dsv4_jax/layers/__init__.py`) and none of its code: no chunks, no scans, no log-sum-exp
merging, no custom gradients. It is compared with the reference fixtures itself, then serves as the oracle of what they
lack: MTP, packing, the indexer's loss, the balance loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4_jax.config import CSA, SLIDING


def rms(x, weight=1.0, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def frequencies(theta, dims, yarn=None):
    """Pair i turns by theta^(-2i/dims) per token; YaRN divides the slow ones by its factor."""
    f = np.array([theta ** (-2 * i / dims) for i in range(dims // 2)])
    if yarn is None:
        return f
    corr = lambda beta: (  # noqa: E731
        dims * np.log(yarn["original_max_position_embeddings"] / (beta * 2 * np.pi)) / (2 * np.log(theta))
    )
    low, high = max(np.floor(corr(yarn["beta_fast"])), 0), min(np.ceil(corr(yarn["beta_slow"])), dims - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip([(i - low) / (high - low) for i in range(dims // 2)], 0, 1)
    return f / yarn["factor"] * ramp + f * (1 - ramp)


def rope(x, angles):
    """Adjacent pairs of the last dims are complex numbers, multiplied by e^(i angle); angles [.., R/2]."""
    dims = 2 * angles.shape[-1]
    z = (x[..., -dims::2] + 1j * x[..., x.shape[-1] - dims + 1 :: 2]) * np.exp(1j * angles)
    out = x.copy()
    out[..., -dims::2], out[..., x.shape[-1] - dims + 1 :: 2] = z.real, z.imag
    return out


def sinkhorn(logits, iters, eps):
    a = softmax(logits) + eps
    a = a / (a.sum(-2, keepdims=True) + eps)
    for _ in range(iters - 1):
        a = a / (a.sum(-1, keepdims=True) + eps)
        a = a / (a.sum(-2, keepdims=True) + eps)
    return a


def hyper_maps(streams, p, c):
    n = c.hc_mult
    z = rms(streams.reshape(len(streams), -1), eps=c.rms_norm_eps) @ p["fn"]
    pre = sigmoid(z[:, :n] * p["scale"][0] + p["base"][:n]) + c.hc_eps
    post = 2 * sigmoid(z[:, n : 2 * n] * p["scale"][1] + p["base"][n : 2 * n])
    comb = (z[:, 2 * n :] * p["scale"][2] + p["base"][2 * n :]).reshape(-1, n, n)
    return pre, post, sinkhorn(comb, c.hc_sinkhorn_iters, c.hc_eps)


def hyper_write(streams, y, post, comb):
    """stream'_j = post_j y + sum_i comb_ij stream_i."""
    return post[..., None] * y[:, None] + np.einsum("sij,sid->sjd", comb, streams)


def hyper_head(streams, p, c):
    z = rms(streams.reshape(len(streams), -1), eps=c.rms_norm_eps) @ p["fn"]
    pre = sigmoid(z * p["scale"] + p["base"]) + c.hc_eps
    return np.einsum("sn,snd->sd", pre, streams)


def compress(x, p, m, overlap, freqs, eps=1e-6):
    """Entries [S // m, K]; with overlap an entry also pools the first half of the channels of the block before."""
    values, scores = x @ p["wkv"], x @ p["wgate"]
    width = p["norm"].shape[0]
    entries = []
    for i in range(len(x) // m):
        own = slice(m * i, m * i + m)
        v, z = values[own], scores[own] + p["ape"]
        if overlap and i:
            before = slice(m * i - m, m * i)
            v = np.concatenate([values[before, :width], v[:, width:]])
            z = np.concatenate([scores[before, :width] + p["ape"][:, :width], z[:, width:]])
        elif overlap:
            v, z = v[:, width:], z[:, width:]
        pooled = (softmax(z, axis=0) * v).sum(0)
        entries.append(rope(rms(pooled, p["norm"], eps), m * i * freqs))
    return np.array(entries).reshape(-1, width)


def index_scores(x, qr, p, c, m, freqs):
    """[S, T], before visibility. The Hadamard rotation is orthogonal: it changes no product, so it is left out."""
    heads, width = c.index_n_heads, c.index_head_dim
    angles = np.arange(len(x))[:, None] * freqs
    q = rope((qr @ p["wq_b"]).reshape(-1, heads, width), angles[:, None])
    keys = compress(x, p["compressor"], m, True, freqs, c.rms_norm_eps)
    w = x @ p["weights_proj"] * (width**-0.5 * heads**-0.5)
    return np.einsum("th,thi->ti", w, np.maximum(np.einsum("thd,id->thi", q, keys), 0))


def attention(x, p, spec, c, mode="sparse"):
    """x [S, D] -> ([S, D], what was seen): joint softmax of window, visible or chosen entries, and sink, per token."""
    m, eps, heads, width = spec.ratio, c.rms_norm_eps, c.num_attention_heads, c.head_dim
    theta, yarn = (c.rope_theta, None) if spec.attention == SLIDING else (c.compress_rope_theta, c.rope_scaling)
    freqs = frequencies(theta, c.qk_rope_head_dim, yarn)
    angles = np.arange(len(x))[:, None] * freqs
    qr = rms(x @ p["wq_a"], p["q_norm"], eps)
    q = rope(rms((qr @ p["wq_b"]).reshape(-1, heads, width), eps=eps), angles[:, None])
    kv = rope(rms(x @ p["wkv"], p["kv_norm"], eps), angles)
    entries = compress(x, p["compressor"], m, spec.attention == CSA, freqs, eps) if m else np.zeros((0, width))
    scores = index_scores(x, qr, p["indexer"], c, m, freqs) if spec.attention == CSA else None
    out, seen = np.zeros((len(x), heads, width)), {"selected": [], "kl": [], "recall": [], "scores": scores}
    seen["mass"] = []  # of each token (window [H, w], entries [H, n], sink [H])
    for t in range(len(x)):
        visible = np.arange((t + 1) // m if m else 0)
        best = visible if scores is None else visible[np.argsort(-scores[t, visible], kind="stable")[: c.index_topk]]
        chosen = best if mode == "sparse" else visible
        window = kv[max(0, t + 1 - c.sliding_window) : t + 1]
        keys = np.concatenate([window, entries[chosen]])
        logits = np.concatenate([q[t] @ keys.T * width**-0.5, p["attn_sink"][:, None]], axis=1)
        everything = softmax(logits)
        probabilities = everything[:, :-1]
        seen["mass"].append((*np.split(probabilities, [len(window)], 1), everything[:, -1]))
        out[t] = rope(probabilities @ keys, -angles[t])
        if scores is not None:
            mass = probabilities[:, len(window) :].sum(0)
            kl, recall = divergence(mass, scores[t, chosen], np.isin(chosen, best))
            for name, value in (("selected", best), ("kl", kl), ("recall", recall)):
                seen[name].append(value)
    grouped = out.reshape(len(x), c.o_groups, -1)
    low = np.stack([grouped[:, g] @ p["wo_a"][g] for g in range(c.o_groups)], 1)
    return low.reshape(len(x), -1) @ p["wo_b"], seen


def divergence(mass, scores, in_topk):
    """(KL(mass / sum(mass) || softmax(scores)), share of the mass in the top k); zeros where nothing is visible."""
    if not len(mass):
        return 0.0, 0.0
    target = mass / mass.sum()
    return (target * (np.log(target) - np.log(softmax(scores)))).sum(), target[in_topk].sum()


def swiglu(x, p, limit):
    g, u = x @ p["w1"], x @ p["w3"]
    g, u = (np.minimum(g, limit), np.clip(u, -limit, limit)) if limit else (g, u)
    return g * sigmoid(g) * u


def moe(x, p, c, tokens):
    """x [S, D] -> ([S, D], expert ids, their weights, scores), token by token and expert by expert."""
    scores = np.sqrt(np.logaddexp(0, x @ p["gate"]["weight"]))
    k, out, ids = c.num_experts_per_tok, np.zeros_like(x), np.zeros((len(x), c.num_experts_per_tok), int)
    weights = np.zeros((len(x), k))
    for t in range(len(x)):
        if "tid2eid" in p["gate"]:
            ids[t] = p["gate"]["tid2eid"][tokens[t]]
        else:
            ids[t] = np.argsort(-(scores[t] + p["gate"]["bias"]), kind="stable")[:k]
        weights[t] = scores[t, ids[t]] / scores[t, ids[t]].sum() * c.routed_scaling_factor
        for e, weight in zip(ids[t], weights[t], strict=True):
            expert = {name: p["experts"][name][e] for name in ("w1", "w2", "w3")}
            out[t] += (weight * swiglu(x[t], expert, c.swiglu_limit)) @ expert["w2"]
    return out + swiglu(x, p["shared_experts"], c.swiglu_limit) @ p["shared_experts"]["w2"], ids, weights, scores


def balance_loss(ids, scores, k):
    """sum_e f_e P_e of one sequence (V3 report, eq. 17-20)."""
    count, experts = scores.shape
    f = np.bincount(ids.ravel(), minlength=experts) * experts / (k * count)
    return (f * (scores / scores.sum(-1, keepdims=True)).mean(0)).sum()


def block(streams, p, spec, c, tokens, mode):
    pre, post, comb = hyper_maps(streams, p["hc_attn"], c)
    x = rms(np.einsum("sn,snd->sd", pre, streams), p["attn_norm"], c.rms_norm_eps)
    attn_out, seen = attention(x, p["attn"], spec, c, mode)
    streams = hyper_write(streams, attn_out, post, comb)
    seen["maps"] = [(pre, post, comb), hyper_maps(streams, p["hc_ffn"], c)]
    pre, post, comb = seen["maps"][1]
    x = rms(np.einsum("sn,snd->sd", pre, streams), p["ffn_norm"], c.rms_norm_eps)
    mlp_out, ids, weights, scores = moe(x, p["ffn"], c, tokens)
    streams = hyper_write(streams, mlp_out, post, comb)
    seen |= {"layer_out": streams, "attn_out": attn_out, "mlp_out": mlp_out, "expert_ids": ids, "weights": weights}
    seen["router_scores"] = scores
    return streams, seen | {"balance": balance_loss(ids, scores, c.num_experts_per_tok)}


@dataclass
class Result:
    """logits [S, V], hidden [S, D], one record per block; the MTP module's block stands last."""

    logits: Any = None
    hidden: Any = None
    mtp_hidden: Any = None
    layers: list = field(default_factory=list)


def forward(c, ends, blocks, tokens, mode="sparse"):
    """One document `tokens` [S]; `blocks` are the parameters of each layer in order, `ends` everything else."""
    result = Result()
    x = ends["embed"][tokens]
    streams = np.repeat(x[:, None], c.hc_mult, axis=1)
    for spec, p in zip(c.layers, blocks, strict=True):
        streams, seen = block(streams, p, spec, c, tokens, mode)
        result.layers.append(seen)
    result.hidden = rms(hyper_head(streams, ends["hc_head"], c), ends["norm"], c.rms_norm_eps)
    result.logits = result.hidden @ ends["head"]
    if "mtp" in ends:
        result.mtp_hidden, seen = mtp(streams, x, ends["mtp"]["0"], c, tokens, mode)
        result.layers.append(seen)
    return result


def mtp(streams, x, p, c, tokens, mode):
    """From the streams BEFORE the head read and the next token's embedding (absent, so zero, at the end)."""
    following = np.concatenate([x[1:], np.zeros_like(x[:1])])
    embedded = rms(following, p["enorm"], c.rms_norm_eps) @ p["e_proj"]
    carried = rms(streams, p["hnorm"], c.rms_norm_eps) @ p["h_proj"]
    streams, seen = block(embedded[:, None] + carried, p["block"], c.mtp_layers[0], c, tokens, mode)
    return rms(hyper_head(streams, p["hc_head"], c), p["norm"], c.rms_norm_eps), seen
