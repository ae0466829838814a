"""What the report and the article say, beside the arithmetic with its terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsv4_jax.analysis.baselines import gqa_serving, v32_serving
from dsv4_jax.analysis.hardware import hardware
from dsv4_jax.analysis.serving import Serving, v4_serving
from dsv4_jax.analysis.sizing import Prices, fit
from dsv4_jax.analysis.weight_bytes import Weights, total_bytes
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.presets import preset

H200 = hardware("h200")
ASSUMPTIONS = (
    "Bytes are decimal (1 GB = 10^9); contexts are binary (1M = 1,048,576 tokens).",
    "A cache is what a sequence of its own holds: compressed entries of whole blocks, windows (MTP's too), float32 "
    "tails of incomplete blocks. A release's entry: 448 FP8 + 7 scales + 64 BF16 = 583 bytes, indexer key: 128 FP4 + 4 "
    "scales = 68 bytes.",
    "V3.2's cache per token and layer: latent 512 FP8 + 4 float32 scales + 64 BF16 rope = 656 bytes, indexer key 128 "
    "FP8 + a float32 scale = 132 bytes, 61 layers, all tokens.",
    "GQA-8: as many layers and query heads as the model, 8 key-value heads of 128 in BF16; its other parts unchanged.",
    "FLOPs of one token are equivalents of FP8: BF16 counts twice, float32 four times, FP4 half (our reading). A "
    "product multiplies in the format of its stored matrix; FP4 experts multiply as FP8; attention as BF16; index "
    "scores as FP4 in V4 and FP8 in V3.2. Element-wise work, top-k and MTP are not counted.",
    "Tokens per second are bounds: every byte read once per step, experts chosen evenly, no waiting for links.",
)


@dataclass(frozen=True)
class Claim:
    """A statement of the report or the article, and what comes out here.

    Attributes:
        source: where it stands.
        said: what it says.
        computed: the arithmetic with its terms.
        agrees: whether they agree within the rounding of what is said; None where nothing comparable is said.
    """

    source: str
    said: str
    computed: str
    agrees: bool | None


def released_name(config: DeepseekV4Config) -> str | None:
    """`v4-pro` or `v4-flash` when `config` is that release."""
    return next((name for name in ("v4-pro", "v4-flash") if config == preset(name)), None)


def report_claims(config: DeepseekV4Config, context: int) -> Iterator[Claim]:
    """The report's ratios, in the released formats; nothing for other models or far from a million tokens."""
    said = {"v4-pro": (10, 27), "v4-flash": (7, 10)}.get(released_name(config) or "")
    if said is None or context not in (10**6, 1 << 20):
        return
    own, v32, gqa = v4_serving(config, context), v32_serving(context), gqa_serving(config, context)
    yield _cache_ratio("of V3.2's KV cache", said[0], own, v32)
    share = 100 * own.flops / v32.flops
    computed = f"{own.flops / 1e9:,.2f} GFLOP / {v32.flops / 1e9:,.2f} GFLOP = {share:.2f}%"
    yield Claim("report", f"about {said[1]}% of V3.2's single-token FLOPs", computed, round(share) == said[1])
    yield _cache_ratio("of a BF16 GQA-8 cache", 2, own, gqa)


def _cache_ratio(of: str, percent: int, own: Serving, other: Serving) -> Claim:
    """Judged by what grows with the context; the fixed windows and tails are shown."""
    share = 100 * own.token / other.token
    computed = (
        f"{own.token:,.1f} bytes / {other.token:,.0f} bytes per token = {share:.2f}%; whole sequences, with windows "
        f"and tails, {own.sequence / 1e9:.2f} GB / {other.sequence / 1e9:.2f} GB = {own.sequence / other.sequence:.2%}"
    )
    return Claim("report", f"about {percent}% {of}", computed, round(share) == percent)


def article_claims(config: DeepseekV4Config, context: int, batch: int, agents: int) -> Iterator[Claim]:
    """The article's sizing questions (sections 3.4, 4.1, 4.3 and 6), always on H200 nodes; nothing for other models."""
    name, deployment, gqa = released_name(config), (config, context, batch), gqa_serving(config, context)
    if name == "v4-pro":
        yield _bf16_weights(config)
        yield _nodes(*deployment, "bf16", "three to four H200 nodes in BF16", (3, 4))
        yield _nodes(*deployment, "fp8", "two H200 nodes with FP8", (2, 2))
        yield _nodes(*deployment, "released", "(nothing about FP4 experts)", None)
        yield _naive_cache(config, context, gqa)
    if name == "v4-flash":
        yield _nodes(*deployment, "released", "one 8-GPU H200 node with FP8/FP4", (1, 1))
        yield _nodes(*deployment, "fp8", "one 8-GPU H200 node with FP8/FP4", (1, 1))
        yield _nodes(*deployment, "bf16", "(nothing about BF16)", None)
    if name:
        yield _agents(config, context, agents, gqa)


def _bf16_weights(config: DeepseekV4Config) -> Claim:
    size = total_bytes(config, "bf16")
    parameters = v4_serving(config, 1).parameters
    computed = (
        f"{parameters:,} parameters (MTP included) x 2 bytes = {2 * parameters / 1e12:.4f} TB; "
        f"{size / 1e12:.4f} TB with the leaves that stay float32 and the hash tables"
    )
    return Claim("article 3.4", "3.2 TB of BF16 weights", computed, round(size / 1e12, 1) == 3.2)


def _nodes(
    config: DeepseekV4Config, context: int, batch: int, weights: Weights, said: str, nodes: tuple[int, int] | None
) -> Claim:
    serving = v4_serving(config, context, weights)
    tight, roomy = (fit(serving.resident(batch), H200, reserve).hosts for reserve in (0, 0.1))
    computed = (
        f"{weights}: {serving.weights / 1e9:,.0f} GB of weights + {batch} x {serving.sequence / 1e9:.2f} GB of cache = "
        f"{serving.resident(batch) / 1e9:,.0f} GB; a node has 8 x 141 = 1,128 GB: {tight} of them"
        + ("" if roomy == tight else f", {roomy} with 10% kept free")
    )
    agrees = None if nodes is None else nodes[0] <= tight and roomy <= nodes[1]
    return Claim("article 3.4, 6", said, computed, agrees)


def _naive_cache(config: DeepseekV4Config, context: int, gqa: Serving) -> Claim:
    heads = config.num_attention_heads
    computed = (
        f"GQA-8 in BF16 over {context:,} tokens: {gqa.sequence / 1e9:,.0f} GB; without grouping, {heads} heads of 128: "
        f"{gqa.sequence / 1e9 * heads / 8:,.0f} GB"
    )
    said = "several hundred GB of naive cache per request at 1M tokens"
    return Claim("article 4.1", said, computed, 2e11 <= gqa.sequence <= 1e12)


def _agents(config: DeepseekV4Config, context: int, agents: int, gqa: Serving) -> Claim:
    own = v4_serving(config, context)
    shared, private = own.agents(agents), agents * own.sequence
    chips = fit(private, H200).chips
    computed = (
        f"{own.shareable / 1e9:.2f} GB of blocks once + {agents} x {own.own / 1e6:.1f} MB of windows and tails = "
        f"{shared / 1e9:.2f} GB. {agents} private copies: {private / 1e9:.1f} GB, {private / shared:.1f} times as "
        f"much: the memory of {chips} H200. Naive GQA-8 caches: {agents * gqa.sequence / 1e9:,.0f} GB in "
        f"private copies, {gqa.sequence / 1e9:,.0f} GB shared (any paged cache can share a prefix). An agent has no "
        "indexer state of its own but a tail: the keys lie in the shared blocks"
    )
    said = f"{agents} agents over one document: sharing decides whether memory suffices"
    return Claim("article 4.3", said, computed, chips > H200.chips_per_host)


def break_even_claims(prices: Prices, chips: int, capacity: float) -> Iterator[Claim]:
    """The article's 100 to 500 million tokens a month, at these prices; the chips decode `capacity` at most."""
    cost = prices.monthly(chips)
    if not cost:
        return
    needed = "; ".join(f"{tokens}M tokens: {cost / tokens:,.2f} per million" for tokens in (100, 500, 1000))
    computed = f"{chips} chips cost {cost:,.0f} a month; an API costs as much at {needed}"
    agrees = None
    if prices.api:
        tokens = prices.break_even(chips)
        agrees = 100e6 <= tokens <= 500e6
        computed += f". At {prices.api:g} per million the break-even is {tokens / 1e6:,.0f}M tokens a month"
        computed += (
            ""
            if tokens <= capacity
            else f", above the {capacity / 1e6:,.0f}M these chips decode at most at this context and batch"
        )
    yield Claim("article 6", "break-even between 100M and 500M tokens a month", computed, agrees)
