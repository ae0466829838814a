"""Baseline layers against transformers' modules with the same weights: outputs and input gradients, in float32.

Mixtral's attention and routing, DeepSeek-V3's latent attention, V3.2's with its indexer. Ours rotates adjacent pairs of
a head's last dims; where transformers rotates halves, or the first dims, the columns of a head are brought into that
order, which leaves every score as it is. DeepSeek's latent attention has our order already.

Reached at most, of the largest number: outputs 5.5e-7, gradients 7.5e-7.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import torch

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.layer_plan import GQA, MLA, MLA_SPARSE
from dsv4_jax.layers.attention import AttentionOptions
from dsv4_jax.layers.baseline_attention import BASELINE_LAYERS
from dsv4_jax.layers.layout import make_layout
from dsv4_jax.layers.moe import MoE
from dsv4_jax.layers.norm import rms_norm
from dsv4_jax.quantization.policy import NONE

deepseek_v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
deepseek_v32 = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
pytestmark = pytest.mark.reference

RELATIVE = 2e-5  # of the largest output, and of the largest gradient
LENGTHS = (1, 13, 97)
TOPK = 7
SIZES = {"num_key_value_heads": 2, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "v_head_dim": 14}
CONFIG = DeepseekV4Config(
    vocab_size=32, hidden_size=24, num_hidden_layers=3, num_nextn_predict_layers=0, compress_ratios=(0, 0, 0),
    layer_types=(GQA, MLA, MLA_SPARSE), num_hash_layers=0, num_attention_heads=6, head_dim=8, qk_rope_head_dim=6,
    q_lora_rank=18, o_groups=1, index_n_heads=8, index_head_dim=16, index_topk=TOPK, n_routed_experts=5,
    num_experts_per_tok=2, n_shared_experts=0, scoring_func="softmax", topk_method="greedy", routed_scaling_factor=1.0,
    swiglu_limit=0.0, moe_intermediate_size=12, compress_rope_theta=500.0, baseline=SIZES,
)  # fmt: skip
SHARED = {
    "hidden_size": CONFIG.hidden_size, "num_attention_heads": CONFIG.num_attention_heads, "attention_bias": False,
    "attn_implementation": "eager", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
LATENT = {name: SIZES[name] for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim")} | {
    "q_lora_rank": CONFIG.q_lora_rank, "qk_rope_head_dim": CONFIG.qk_rope_head_dim,
    "num_key_value_heads": CONFIG.num_attention_heads,
}  # fmt: skip


def drawn(module, seed):
    """The module with normal weights and norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        draw = torch.randn(value.shape, generator=generator)
        norm = "norm" in name
        value.data = (0.3 * draw if norm else draw / value.shape[-1] ** 0.5) + (norm and name.endswith("weight"))
    return module.float()


def of_weights(module, names):
    """Our names to theirs: matrices transposed to [in, out]."""
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    return {ours: jnp.asarray(state[theirs].T) for ours, theirs in names.items()}


def pairs_from_halves(width, rotated, first=0):
    """Columns of a head of `width` so that its last `rotated` come in adjacent pairs; theirs lie from `first` on."""
    half = first + np.arange(rotated // 2)
    turned = np.stack([half, half + rotated // 2], -1).reshape(-1)
    return np.concatenate([np.setdiff1d(np.arange(width), turned), turned])


def in_heads(matrix, order):
    """A matrix [in, heads * width] with the columns of each head in `order`."""
    return matrix.reshape(*matrix.shape[:-1], -1, len(order))[..., order].reshape(matrix.shape)


def ours(kind, weights, x, options=None):
    """A layer of this kind with these weights on x [B, S, D]: (output, record)."""
    spec = next(spec for spec in CONFIG.layers if spec.attention == kind)
    graph, state = nnx.split(BASELINE_LAYERS[kind](CONFIG, spec, nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, weights)
    layout = make_layout(CONFIG, *x.shape[:2], None)
    return nnx.merge(graph, state)(x, layout, options or AttentionOptions("sparse", False, NONE))[:2]


def theirs(module, rotary, x):
    """Transformers' attention, causal, on x [B, S, D]: the output, with a gradient."""
    length = x.shape[1]
    positions = rotary(x, torch.arange(length)[None])
    future = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    mask = torch.zeros(length, length).masked_fill(future, torch.finfo(torch.float32).min)
    return module(x, position_embeddings=positions, attention_mask=mask.expand(x.shape[0], 1, length, length))[0]


def check(run_ours, run_theirs, x):
    """Output and gradient of the input of both, on the same numbers."""
    cotangent = np.random.default_rng(len(x)).normal(size=x.shape).astype(np.float32)
    given = torch.tensor(x, requires_grad=True)
    expected = run_theirs(given)
    expected.backward(torch.tensor(cotangent))
    out, back = jax.jit(lambda x: jax.vjp(run_ours, x))(x)
    [gradient] = jax.jit(back)(jnp.asarray(cotangent))
    for name, mine, other in (("output", out, expected.detach()), ("gradient", gradient, given.grad)):
        other = other.numpy()
        error = np.abs(np.asarray(mine) - other).max() / np.abs(other).max()
        assert error < RELATIVE, f"{name}: {error:.2g}"


def draw(length, seed=0):
    return np.random.default_rng((length, seed)).normal(size=(2, length, CONFIG.hidden_size)).astype(np.float32)


@pytest.mark.parametrize("length", LENGTHS)
def test_grouped_query_attention_is_mixtrals(length):
    config = mixtral.MixtralConfig(**SHARED, head_dim=CONFIG.head_dim, num_key_value_heads=2, sliding_window=None)
    module = drawn(mixtral.MixtralAttention(config, 0), 0)
    weights = of_weights(module, {name: f"{name[1:]}_proj.weight" for name in ("wq", "wk", "wv", "wo")})
    order = pairs_from_halves(CONFIG.head_dim, CONFIG.head_dim)
    weights |= {name: in_heads(weights[name], order) for name in ("wq", "wk")}
    rotary = mixtral.MixtralRotaryEmbedding(config)
    check(lambda x: ours(GQA, weights, x)[0], lambda x: theirs(module, rotary, x), draw(length))


def latent_weights(module):
    names = {"wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj", "wkv_a": "kv_a_proj_with_mqa"}
    names |= {"kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj"}
    return of_weights(module, {ours: f"{theirs}.weight" for ours, theirs in names.items()})


@pytest.mark.parametrize("length", LENGTHS)
def test_latent_attention_is_that_of_deepseek_v3(length):
    config = deepseek_v3.DeepseekV3Config(**SHARED, **LATENT)
    module = drawn(deepseek_v3.DeepseekV3Attention(config, 0), 1)
    rotary, weights = deepseek_v3.DeepseekV3RotaryEmbedding(config), latent_weights(module)
    check(lambda x: ours(MLA, weights, x)[0], lambda x: theirs(module, rotary, x), draw(length))


def sparse_model(seed):
    """Transformers' layer, its rotation, and our weights."""
    indexer = {f"index_{name}": getattr(CONFIG, f"index_{name}") for name in ("n_heads", "head_dim", "topk")}
    config = deepseek_v32.DeepseekV32Config(**SHARED, **LATENT, **indexer)
    module = drawn(deepseek_v32.DeepseekV32Attention(config, 0), seed)
    names = {"wq_b": "wq_b.weight", "wk": "wk.weight", "k_norm": "k_norm.weight", "k_norm_bias": "k_norm.bias"}
    index = of_weights(module.indexer, names | {"weights_proj": "weights_proj.weight"})
    order = pairs_from_halves(CONFIG.index_head_dim, CONFIG.qk_rope_head_dim)
    index |= {name: in_heads(index[name], order) for name in names}
    return module, deepseek_v32.DeepseekV32RotaryEmbedding(config), latent_weights(module) | {"indexer": index}


def draw_where_the_choice_is_clear(weights, length):
    """Inputs whose last chosen and first refused scores are apart: equal ones, such as zeros, have no right answer."""
    for seed in range(100):
        x = draw(length, seed)
        scores = np.array(jax.jit(lambda x: index_scores(weights, x))(x))
        scores[:, ~np.tri(length, dtype=bool)] = -np.inf
        if length <= TOPK:
            return x
        last, refused = np.sort(scores, -1)[:, TOPK:, [-TOPK, -TOPK - 1]].T
        if (last - refused).min() > 1e-5:
            return x
    raise AssertionError("no clear choice in 100 draws")


def index_scores(weights, x):
    graph, state = nnx.split(BASELINE_LAYERS[MLA_SPARSE](CONFIG, CONFIG.layers[2], nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, weights)
    layer, rope = nnx.merge(graph, state), make_layout(CONFIG, *x.shape[:2], None).rope["compress"]
    return layer.indexer(x, rms_norm(x @ weights["wq_a"], weights["q_norm"], 1e-6), rope, NONE).scores()


@pytest.mark.parametrize("length", LENGTHS)
def test_sparse_latent_attention_is_that_of_v32_in_output_gradient_and_choice(length):
    module, rotary, weights = sparse_model(2)
    chosen = []
    module.indexer.register_forward_hook(lambda *args: chosen.append(args[-1].numpy()))
    x = draw_where_the_choice_is_clear(weights, length)
    check(lambda x: ours(MLA_SPARSE, weights, x)[0], lambda x: theirs(module, rotary, x), x)
    record = jax.jit(lambda x: ours(MLA_SPARSE, weights, x)[1])(x)
    if length <= TOPK:
        assert "selected" not in record
        return
    for mine, other in zip(np.asarray(record["selected"]).reshape(-1, TOPK), chosen[0].reshape(-1, TOPK), strict=True):
        seen = mine[mine >= 0]
        assert set(seen) <= set(other) and (len(seen) == TOPK or len(seen) == seen.max() + 1)


def test_dense_attention_of_the_sparse_layer_is_deepseek_v3():
    """The first stage of V3.2's training: the indexer chooses nothing."""
    _, rotary, weights = sparse_model(3)
    config = deepseek_v3.DeepseekV3Config(**SHARED, **LATENT)
    module = deepseek_v3.DeepseekV3Attention(config, 0)
    module.load_state_dict(sparse_model(3)[0].state_dict(), strict=False)
    dense = AttentionOptions("dense", False, NONE)
    check(lambda x: ours(MLA_SPARSE, weights, x, dense)[0], lambda x: theirs(module, rotary, x), draw(41))


@pytest.mark.parametrize("length", LENGTHS)
def test_top_2_routing_and_its_experts_are_mixtrals(length):
    config = mixtral.MixtralConfig(
        hidden_size=CONFIG.hidden_size, intermediate_size=CONFIG.moe_intermediate_size,
        num_local_experts=CONFIG.n_routed_experts, num_experts_per_tok=2,
    )  # fmt: skip
    module = drawn(mixtral.MixtralSparseMoeBlock(config), 4)
    w1, w3 = np.split(module.experts.gate_up_proj.detach().numpy().swapaxes(1, 2), 2, axis=-1)
    experts = {"w1": w1, "w3": w3, "w2": module.experts.down_proj.detach().numpy().swapaxes(1, 2)}
    weights = {"gate": {"weight": module.gate.weight.detach().numpy().T}, "experts": experts}
    graph, state = nnx.split(MoE(CONFIG, "moe", nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, weights)
    counted = jnp.ones((2, length), bool)
    run = lambda x: nnx.merge(graph, state)(x, jnp.zeros((2, length), jnp.int32), counted)[0]  # noqa: E731
    check(run, module, draw(length))
