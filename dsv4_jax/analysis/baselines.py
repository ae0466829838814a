"""What V4 is compared with: DeepSeek-V3.2, and V4 itself with plain grouped-query attention in BF16."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dsv4_jax.analysis.flops import SCORES, Product, matrix_products
from dsv4_jax.analysis.hardware import Operand
from dsv4_jax.analysis.serving import Serving, bytes_of, v4_serving
from dsv4_jax.analysis.weight_bytes import Weights, weight_parts
from dsv4_jax.config import DeepseekV4Config

FP8_WITH_SCALES = 1 + 4 / 128**2  # V3.2 stores a float32 per 128 x 128 tile
_V4_ATTENTION = ("attention projections", "compressors", "indexers")


class _Matrix(NamedTuple):
    component: str
    numbers: int
    used: int  # by one token
    fp8: bool = True


def _whole(component: str, numbers: int, fp8: bool = True) -> _Matrix:
    return _Matrix(component, numbers, numbers, fp8)


@dataclass(frozen=True)
class DeepseekV32:
    """DeepSeek-V3.2: fields and values of the config.json released with deepseek-ai/DeepSeek-V3.2.

    One latent of `kv_lora_rank` and one rotary key per token serve all heads (MLA); decoding multiplies the queries
    with the latents themselves ("absorbed"). Its indexer keeps a key for every token. Without the MTP module and
    without norms, which are 0.001% of the parameters.
    """

    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    vocab_size: int = 129280

    def matrices(self) -> Iterator[_Matrix]:
        """All matrices; embedding, output matrix, routers and the indexer's head weights are stored as BF16."""
        width, depth = self.hidden_size, self.num_hidden_layers
        sparse = depth - self.first_k_dense_replace
        keys = self.q_lora_rank * self.index_n_heads * self.index_head_dim + width * self.index_head_dim
        expert = sparse * 3 * width * self.moe_intermediate_size
        yield _Matrix("embedding", self.vocab_size * width, width, fp8=False)
        yield _whole("attention projections", depth * self._attention())
        yield _whole("indexers", depth * keys)
        yield _whole("indexers", depth * width * self.index_n_heads, fp8=False)
        yield _whole("dense MLPs", self.first_k_dense_replace * 3 * width * self.intermediate_size)
        yield _whole("routers", sparse * width * self.n_routed_experts, fp8=False)
        yield _Matrix("routed experts", expert * self.n_routed_experts, expert * self.num_experts_per_tok)
        yield _whole("shared experts", expert * self.n_shared_experts)
        yield _whole("head", self.vocab_size * width, fp8=False)

    def _attention(self) -> int:
        heads, rope = self.num_attention_heads, self.qk_rope_head_dim
        queries = self.hidden_size * self.q_lora_rank + self.q_lora_rank * heads * (self.qk_nope_head_dim + rope)
        latents = self.hidden_size * (self.kv_lora_rank + rope)
        heads_of_latents = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return queries + latents + heads_of_latents + heads * self.v_head_dim * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters of the matrices."""
        return sum(matrix.numbers for matrix in self.matrices())

    @property
    def activated(self) -> int:
        """Parameters that one token uses; of the embedding one row."""
        return sum(matrix.used for matrix in self.matrices())

    @property
    def entry(self) -> int:
        """Bytes of a token's latent as its kernels (FlashMLA) keep it: FP8, a float32 scale per 128, BF16 rope."""
        return self.kv_lora_rank + 4 * (self.kv_lora_rank // 128) + 2 * self.qk_rope_head_dim

    @property
    def key(self) -> int:
        """Bytes of a token's indexer key: FP8 and a float32 scale."""
        return self.index_head_dim + 4

    def products(self, context: int, weights: Weights = "released") -> tuple[Product, ...]:
        """FLOPs of the token that makes a sequence `context` tokens long."""
        wide: Operand = "bf16"
        narrow: Operand = "bf16" if weights == "bf16" else "fp8"
        used = [m for m in self.matrices() if m.component != "embedding"]
        latents = 2 * self.num_attention_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)
        chosen = self.num_hidden_layers * latents * min(context, self.index_topk)
        scores = self.num_hidden_layers * 2 * self.index_n_heads * self.index_head_dim * context
        return (
            *(Product(m.component, narrow if m.fp8 else wide, 2.0 * m.used) for m in used),
            Product("attention", wide, chosen),
            Product(SCORES, "fp8", scores),
        )


def v32_serving(context: int, weights: Weights = "released", model: DeepseekV32 | None = None) -> Serving:
    """DeepSeek-V3.2 in its own FP8 (or in BF16), its cache in FP8. All of its cache can be shared."""
    model = model or DeepseekV32()
    sizes: dict[str, float] = defaultdict(float)
    for matrix in model.matrices():
        each = FP8_WITH_SCALES if matrix.fp8 and weights != "bf16" else 2
        sizes[matrix.component] += matrix.numbers * each
    layers, total = model.num_hidden_layers, sum(sizes.values())
    token = layers * (model.entry + model.key)
    return Serving(
        name="V3.2",
        parameters=model.parameters,
        activated=model.activated,
        weights=total,
        dense=total - sizes["routed experts"] - sizes["embedding"],
        routed=sizes["routed experts"],
        chosen=model.num_experts_per_tok / model.n_routed_experts,
        token=token,
        shareable=token * context,
        own=0,
        read=layers * (min(context, model.index_topk) * model.entry + context * model.key),
        products=model.products(context, weights),
    )


def gqa_serving(
    config: DeepseekV4Config, context: int, weights: Weights = "released", groups: int = 8, head_dim: int = 128
) -> Serving:
    """`config` with grouped-query attention over the whole context in place of its own, and a BF16 cache.

    As many layers and query heads as V4, `groups` key-value heads of `head_dim`; experts, streams and head stay.
    """
    c, own = config, v4_serving(config, context, weights)
    parts = weight_parts(config, weights)
    replaced = sum(bytes_of(parts, name) for name in _V4_ATTENTION)
    numbers = sum(part.numbers for part in parts if part.component in _V4_ATTENTION)
    projections = c.num_hidden_layers * 2 * c.hidden_size * head_dim * (c.num_attention_heads + groups)
    change = projections * (2 if weights == "bf16" else 1 + 1 / 128**2) - replaced
    narrow: Operand = "bf16" if weights == "bf16" else "fp8"
    token = c.num_hidden_layers * 2 * groups * head_dim * 2
    kept = [p for p in matrix_products(config, weights) if p.component not in _V4_ATTENTION]
    attention = c.num_hidden_layers * 4 * c.num_attention_heads * head_dim * context
    return Serving(
        name="GQA-8",
        parameters=own.parameters + projections - numbers,
        activated=own.activated + projections - numbers,
        weights=own.weights + change,
        dense=own.dense + change,
        routed=own.routed,
        chosen=own.chosen,
        token=token,
        shareable=token * context,
        own=0,
        read=token * context,
        products=(
            *kept,
            Product("attention projections", narrow, 2.0 * projections),
            Product("attention", "bf16", attention),
        ),
    )
