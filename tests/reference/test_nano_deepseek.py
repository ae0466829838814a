"""The multi-token-prediction module against nano-deepseek-v4 0.2.0 (PyTorch), weights copied through our export.

Its module is the release's in the parts and in their order: enorm, hnorm, e_proj, h_proj, one whole block with learned
routing, its own head read and norm, the shared embedding and output matrix, targets two tokens ahead. Where it is not:

- It reads the normed hidden state after the main head read, and repeats the sum `e_proj(..) + h_proj(..)` on the n
  streams; the release applies hnorm and h_proj to each of the n streams before that head read. The two agree when all
  streams are equal, so the main stack here writes all streams alike, and these are what its module is given.
- Its mHC maps are other functions: post is `sigmoid + eps` (release: `2 sigmoid`), comb is the Sinkhorn limit of
  `sigmoid + eps` from a row step on (release: of a softmax, from a column step on) and mixes by `comb @ streams`
  (release: by the transpose). Here post and comb are constants (scale 0) whose values both can express, and Sinkhorn
  converges; pre, which agrees, stays dynamic. tests/reference/test_transformers.py compares the dynamic maps.
- Its block has the kind of attention of layer 0 (release: the ratio after the last layer's), here sliding in both.
- It leaves out the last position, which has no next token (release: computed, unused).
- In CSA and HCA layers its queries and window keys turn with rope_theta, without YaRN; these kinds are not compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_params, random_tokens

from dsv4_jax import model
from dsv4_jax.checkpoint import save
from dsv4_jax.config import DeepseekV4Config
from train.losses import chunked_cross_entropy, shifted_targets

torch = pytest.importorskip("torch")
nano = pytest.importorskip("nano_deepseek_v4")

pytestmark = pytest.mark.reference

CONFIG = DeepseekV4Config(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, compress_ratios=(0, 0, 0), num_hash_layers=0,
    num_attention_heads=4, head_dim=16, qk_rope_head_dim=8, q_lora_rank=12, o_lora_rank=8, o_groups=2,
    sliding_window=5, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, hc_mult=3,
    hc_sinkhorn_iters=60, swiglu_limit=1.0,
)  # fmt: skip
N = CONFIG.hc_mult
LENGTH = 29
TOLERANCE = 2e-5


def with_constant_maps(site, equal_streams):
    """An mHC site's parameters with constant post (below 1) and comb; equal streams stay equal if post is one."""
    pre, post, comb = np.split(np.array(site["base"]), [N, 2 * N], axis=-1)
    post = -0.1 - np.abs(post)
    post = np.broadcast_to(post[..., :1], post.shape) if equal_streams else post
    scale = np.array(site["scale"]) * [1, 0, 0]
    base = np.concatenate([pre, post, comb], axis=-1)
    return site | {"base": jnp.asarray(base), "scale": jnp.asarray(scale, jnp.float32)}


@pytest.fixture(scope="module")
def params():
    params = random_params(CONFIG)
    block, main = params["mtp"]["0"]["block"], params["segments"]["0"]["0"]
    for site in ("hc_attn", "hc_ffn"):
        block[site] = with_constant_maps(block[site], equal_streams=False)
        main[site] = with_constant_maps(main[site], equal_streams=True)
    return params


def in_nano(params, folder):
    """A tree of ours as nano's model, by way of the files that we write and its own reader of released names."""
    save(folder, CONFIG, params)
    theirs = nano.DeepSeekV4ForCausalLM(nano.DeepSeekV4Config.from_official_json(folder / "config.json"))
    return theirs, nano.load_deepseek_official_checkpoint(theirs, folder)


def express_maps(site):
    """Give nano's mHC site the base with which its formulas give the maps that the release's formulas gave."""
    pre, post, comb = (part.double() for part in site.base.detach().split([N, N, N * N]))
    mixing = comb.view(N, N).T.exp()
    mixing = 0.5 * mixing / mixing.max()  # Sinkhorn's limit does not see a factor; nano's entries are below 1
    bases = pre, torch.logit(2 * torch.sigmoid(post) - site.eps), torch.logit(mixing - site.eps).flatten()
    with torch.no_grad():
        site.base.copy_(torch.cat(bases))


def our_mtp_loss(params, tokens):
    """(mean cross-entropy of the token after next, Output)."""
    out = model.forward(CONFIG, params, tokens, mtp=True, record=True)
    targets, counted = shifted_targets(tokens, jnp.ones_like(tokens), 2)
    flat = out.mtp_hidden.reshape(-1, CONFIG.hidden_size)
    total = chunked_cross_entropy(flat, model.output_matrix(params), targets.reshape(-1), counted.reshape(-1))
    return total / counted.sum(), out


@pytest.fixture(scope="module")
def both(params, tmp_path_factory):
    """(our loss, Output, gradients in the shape of nano's model; nano's loss, logits and model with gradients)."""
    folder = tmp_path_factory.mktemp("nano")
    tokens = random_tokens(batch=2, length=LENGTH)
    (loss, out), gradients = jax.jit(jax.value_and_grad(our_mtp_loss, has_aux=True))(params, tokens)
    theirs = in_nano(params, folder / "params")[0]
    express_maps(theirs.mtp_modules[0].layer.attn_hc)
    express_maps(theirs.mtp_modules[0].layer.ffn_hc)
    streams = torch.from_numpy(np.array(out.layers[-2]["layer_out"]))
    ids = torch.from_numpy(tokens).long()
    [their_logits], their_loss = theirs._mtp_forward(streams[:, :, 0], ids, ids)
    their_loss.backward()
    ours = {"loss": loss, "out": out, "gradients": in_nano(gradients, folder / "gradients")[0]}
    return ours, {"loss": their_loss, "logits": their_logits, "model": theirs}


def test_nano_finds_every_weight_that_we_write(params, tmp_path):
    _, report = in_nano(params, tmp_path / "model")
    assert not report.conversion.unconverted_keys and not report.conversion.ignored_keys
    assert all(name.endswith("tid2eid") for name in report.missing_keys)  # its learned routers hold unused tables


def test_the_streams_given_to_both_modules_are_equal(both):
    streams = np.array(both[0]["out"].layers[-2]["layer_out"])
    np.testing.assert_allclose(streams, np.broadcast_to(streams[:, :, :1], streams.shape), rtol=0, atol=1e-5)


def test_mtp_logits_match_nano(both, params):
    ours, theirs = both
    logits = model.output_logits(params, ours["out"].mtp_hidden)[:, : LENGTH - 1]
    expected = theirs["logits"].detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_the_mtp_loss_matches_nano(both):
    ours, theirs = both
    np.testing.assert_allclose(float(ours["loss"]), float(theirs["loss"].detach()), rtol=2e-6)


def test_gradients_of_the_mtp_module_match_nano(both):
    ours, theirs = both
    gradients = dict(ours["gradients"].mtp_modules[0].named_parameters())
    expected = {
        name: p.grad
        for name, p in theirs["model"].mtp_modules[0].named_parameters()
        if "_hc.base" not in name and "_hc.scale" not in name  # parameters of other functions
    }
    # Against at least a hundredth of the largest: equal streams are read with any weights to the same normed input.
    least = 1e-2 * max(float(g.norm()) for g in expected.values())
    error = lambda name, g: float((gradients[name].detach() - g).norm() / max(g.norm(), least))  # noqa: E731
    errors = {name: error(name, g) for name, g in expected.items()}
    assert len(errors) > 30
    assert {name: e for name, e in errors.items() if not e < TOLERANCE} == {}
