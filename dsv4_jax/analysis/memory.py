"""What a cache weighs, from the configuration alone: bytes per block, per token and per sequence (report 3.6.1).

Written from the formats' definitions and not from the code that allocates, so that each checks the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv4_jax.baseline import cached_numbers, refuse_baselines
from dsv4_jax.config import CSA, DeepseekV4Config, LayerSpec
from dsv4_jax.errors import UserError
from dsv4_jax.layer_plan import BASELINE_KINDS

FORMATS = ("float32", "bfloat16", "deployed")


@dataclass(frozen=True)
class CachePlan:
    """Bytes of a cache.

    Attributes:
        block_tokens: tokens per block.
        entries: bytes of compressed entries per block, all layers.
        index_keys: bytes of indexer keys per block, all CSA layers.
        windows: bytes of a sequence's windows, all layers, the MTP module's included.
        tails: bytes of a sequence's incomplete blocks, float32 values and scores.
    """

    block_tokens: int
    entries: int
    index_keys: int
    windows: int
    tails: int

    @property
    def block(self) -> int:
        """Bytes per block."""
        return self.entries + self.index_keys

    @property
    def token(self) -> float:
        """Bytes that the cache grows by per token."""
        return self.block / self.block_tokens

    @property
    def state(self) -> int:
        """Bytes per sequence, whatever its length."""
        return self.windows + self.tails

    def blocks(self, tokens: int) -> int:
        """Blocks of a sequence."""
        return -(-tokens // self.block_tokens)

    def sequence(self, tokens: int) -> int:
        """Bytes of a sequence that shares nothing, without its table (4 bytes per block)."""
        return self.blocks(tokens) * self.block + self.state

    def shared(self, tokens: int, agents: int, own: int = 0) -> int:
        """Bytes of `agents` sequences over one document of `tokens` tokens, each with `own` tokens after it."""
        complete = tokens // self.block_tokens
        return complete * self.block + agents * ((self.blocks(tokens + own) - complete) * self.block + self.state)


def cache_plan(config: DeepseekV4Config, format: str = "deployed") -> CachePlan:
    """The plan of one architecture in one format of `FORMATS`.

    Of baseline layers it says what a cache would weigh: keys and values, or latents and indexer keys, of every token.

    Raises:
        UserError: for another format, and for baseline layers in the deployed one, which is V4's.
    """
    if format not in FORMATS:
        raise UserError(f"there is no cache format {format!r}: one of {', '.join(FORMATS)}")
    layers = config.layers + config.mtp_layers[:1]
    tokens = math.lcm(*(layer.ratio for layer in layers if layer.ratio))
    entry, key = entry_bytes(config, format), index_key_bytes(config, format)
    entries = entry * sum(tokens // layer.ratio for layer in layers if layer.ratio)
    keys = key * sum(tokens // layer.ratio for layer in layers if layer.attention == CSA)
    tails = sum(_tail_bytes(config, layer.ratio, layer.attention == CSA) for layer in layers if layer.ratio)
    whole = [layer for layer in layers if layer.attention in BASELINE_KINDS]
    if whole and format == "deployed":
        refuse_baselines(config, "the deployed cache format")
    for layer in whole:
        own, of_indexer = cached_numbers(config, layer.attention)
        entries += tokens * _floats(own, format)
        keys += tokens * _floats(of_indexer, format)
    windows = (len(layers) - len(whole)) * config.sliding_window * entry
    return CachePlan(tokens, entries, keys, windows, tails)


@dataclass(frozen=True)
class CachePart:
    """One component of a sequence's cache.

    Attributes:
        name: the component.
        format: how it is stored.
        count: entries, keys or tails of all layers.
        bytes: what they weigh.
        read: bytes that the sequence's next token reads of them, tails as a mean over tokens.
    """

    name: str
    format: str
    count: int
    bytes: int
    read: float


def cache_parts(config: DeepseekV4Config, tokens: int, format: str = "deployed") -> tuple[CachePart, ...]:
    """What a sequence of `tokens` tokens holds; the bytes add up to `cache_plan(config, format).sequence(tokens)`.

    The main stack reads; the MTP module, which drafts, does not. UserError for baseline layers.
    """
    refuse_baselines(config, "the cache by parts")
    plan, parts = cache_plan(config, format), []
    layers, drafting = config.layers, config.mtp_layers[:1]
    entry, kept = entry_bytes(config, format), plan.blocks(tokens) * plan.block_tokens
    formats = ("FP8, rope BF16", "FP4") if format == "deployed" else (format, format)
    for kind in sorted({layer.attention for layer in layers + drafting if layer.ratio}):
        chosen, label = kind == CSA, "CSA" if kind == CSA else "HCA"
        ratios = [layer.ratio for layer in layers if layer.attention == kind]
        count = sum(kept // layer.ratio for layer in layers + drafting if layer.attention == kind)
        limit = config.index_topk if chosen else tokens
        read = entry * sum(min(limit, tokens // ratio) for ratio in ratios)
        parts.append(CachePart(f"{label} entries", formats[0], count, count * entry, read))
        if chosen:
            key = index_key_bytes(config, format)
            read = key * sum(tokens // ratio for ratio in ratios)
            parts.append(CachePart("indexer keys", formats[1], count, count * key, read))
        parts.append(_tail_part(config, kind, label, layers + drafting))
    read = entry * min(tokens, config.sliding_window) * len(layers)
    windows = len(layers + drafting) * config.sliding_window
    return (*parts, CachePart("windows", formats[0], windows, plan.windows, read))


def _tail_part(config: DeepseekV4Config, kind: str, label: str, layers: tuple[LayerSpec, ...]) -> CachePart:
    """Incomplete blocks: read once per block, when it is complete."""
    sizes = [
        (_tail_bytes(config, layer.ratio, kind == CSA), layer.ratio) for layer in layers if layer.attention == kind
    ]
    read = sum(size / ratio for size, ratio in sizes)
    return CachePart(f"{label} tails", "float32", len(sizes), sum(size for size, _ in sizes), read)


def entry_bytes(config: DeepseekV4Config, format: str) -> int:
    """One key-value entry: in the deployed format FP8, a scale per 64 numbers, and BF16 rotary dims."""
    width, rope = config.head_dim, config.qk_rope_head_dim
    return _floats(width, format) or (width - rope) + -(-(width - rope) // 64) + 2 * rope


def index_key_bytes(config: DeepseekV4Config, format: str) -> int:
    """One indexer key: in the deployed format FP4 and a scale per 32 numbers."""
    width = config.index_head_dim
    return _floats(width, format) or width // 2 + -(-width // 32)


def _floats(width: int, format: str) -> int:
    return {"float32": 4, "bfloat16": 2}.get(format, 0) * width


def _tail_bytes(config: DeepseekV4Config, ratio: int, overlap: bool) -> int:
    """Values and scores of a block in the making; CSA's overlap, so it keeps two of them, twice as wide, twice."""
    if not overlap:
        return 2 * 4 * ratio * config.head_dim
    return 2 * 4 * (2 * ratio) * 2 * (config.head_dim + config.index_head_dim)
