"""What a cache weighs, from the configuration alone: bytes per block, per token and per sequence (report 3.6.1).

Written from the formats' definitions and not from the code that allocates, so that each checks the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv4_jax.baseline import cached_numbers, refuse_baselines
from dsv4_jax.config import CSA, DeepseekV4Config, LayerSpec
from dsv4_jax.errors import UserError
from dsv4_jax.kernels.rows import LANES, WORD, rows_of, words_of
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


def cache_plan(config: DeepseekV4Config, format: str = "deployed", in_words: bool = False) -> CachePlan:
    """The plan of one architecture in one format of `FORMATS`; `in_words` if blocks are rows of words, as on TPUs.

    Of baseline layers it says what a cache would weigh: keys and values, or latents and indexer keys, of every token.

    Raises:
        UserError: for another format, and for baseline layers in the deployed one, which is V4's.
    """
    if format not in FORMATS:
        raise UserError(f"there is no cache format {format!r}: one of {', '.join(FORMATS)}")
    layers = config.layers + config.mtp_layers[:1]
    tokens = math.lcm(*(layer.ratio for layer in layers if layer.ratio))
    sizes = [_block_bytes(config, layer, tokens, format, in_words) for layer in layers if layer.ratio]
    entries, keys = (sum(size) for size in zip(*sizes, strict=True)) if sizes else (0, 0)
    tails = sum(_tail_bytes(config, layer.ratio, layer.attention == CSA) for layer in layers if layer.ratio)
    whole = [layer for layer in layers if layer.attention in BASELINE_KINDS]
    if whole and format == "deployed":
        refuse_baselines(config, "the deployed cache format")
    for layer in whole:
        own, of_indexer = cached_numbers(config, layer.attention)
        entries += tokens * _floats(own, format)
        keys += tokens * _floats(of_indexer, format)
    windows = (len(layers) - len(whole)) * config.sliding_window * entry_bytes(config, format)
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


def cache_parts(
    config: DeepseekV4Config, tokens: int, format: str = "deployed", in_words: bool = False
) -> tuple[CachePart, ...]:
    """What a sequence of `tokens` tokens holds; the bytes add up to those of `cache_plan(..).sequence(tokens)`.

    The main stack reads; the MTP module, which drafts, does not. UserError for baseline layers.
    """
    refuse_baselines(config, "the cache by parts")
    plan, parts = cache_plan(config, format, in_words), []
    layers, drafting = config.layers, config.mtp_layers[:1]
    formats = ("FP8, rope BF16", "FP4") if format == "deployed" else (format, format)
    for kind in sorted({layer.attention for layer in layers + drafting if layer.ratio}):
        chosen, label = kind == CSA, "CSA" if kind == CSA else "HCA"
        held, read = ([layer for layer in those if layer.attention == kind] for those in (layers + drafting, layers))

        def part(name: str, stored: str, which: int, limit: int, held=held, read=read) -> CachePart:
            """Entries or keys of the layers of this kind, of which the next token reads up to `limit` a layer."""
            size = lambda layer: _block_bytes(config, layer, plan.block_tokens, format, in_words)[which]  # noqa: E731
            blocks, each = plan.blocks(tokens), plan.block_tokens
            taken = (size(layer) * layer.ratio / each * min(limit, tokens // layer.ratio) for layer in read)
            count = blocks * sum(each // layer.ratio for layer in held)
            return CachePart(name, stored, count, blocks * sum(map(size, held)), sum(taken))

        parts.append(part(f"{label} entries", formats[0], 0, config.index_topk if chosen else tokens))
        if chosen:
            parts.append(part("indexer keys", formats[1], 1, tokens))
        parts.append(_tail_part(config, kind, label, held))
    count, read = config.sliding_window, entry_bytes(config, format) * min(tokens, config.sliding_window) * len(layers)
    return (*parts, CachePart("windows", formats[0], count * len(layers + drafting), plan.windows, read))


def _tail_part(config: DeepseekV4Config, kind: str, label: str, layers: list[LayerSpec]) -> CachePart:
    """Incomplete blocks of layers of one kind: read once per block, when it is complete."""
    sizes = [(_tail_bytes(config, layer.ratio, kind == CSA), layer.ratio) for layer in layers]
    read = sum(size / ratio for size, ratio in sizes)
    return CachePart(f"{label} tails", "float32", len(sizes), sum(size for size, _ in sizes), read)


def entry_bytes(config: DeepseekV4Config, format: str) -> int:
    """One key-value entry: in the deployed format FP8, a scale per 64 numbers, and BF16 rotary dims."""
    return sum(_entry(config, format))


def index_key_bytes(config: DeepseekV4Config, format: str) -> int:
    """One indexer key: in the deployed format FP4 and a scale per 32 numbers."""
    return sum(_index_key(config, format))


def _entry(config: DeepseekV4Config, format: str) -> tuple[int, ...]:
    """Bytes of an entry's arrays."""
    width, rope = config.head_dim, config.qk_rope_head_dim
    if format != "deployed":
        return (_floats(width, format),)
    return width - rope, -(-(width - rope) // 64), 2 * rope


def _index_key(config: DeepseekV4Config, format: str) -> tuple[int, ...]:
    """Bytes of an indexer key's arrays."""
    width = config.index_head_dim
    return (_floats(width, format),) if format != "deployed" else (width // 2, -(-width // 32))


def _block_bytes(
    config: DeepseekV4Config, layer: LayerSpec, tokens: int, format: str, in_words: bool
) -> tuple[int, int]:
    """A layer's entries and its indexer keys in a block of `tokens` tokens."""
    count = tokens // layer.ratio

    def block(arrays: tuple[int, ...]) -> int:
        if in_words:
            return rows_of(sum(map(words_of, arrays)), count) * LANES * WORD
        return count * sum(arrays)

    return block(_entry(config, format)), block(_index_key(config, format)) * (layer.attention == CSA)


def _floats(width: int, format: str) -> int:
    return {"float32": 4, "bfloat16": 2}.get(format, 0) * width


def _tail_bytes(config: DeepseekV4Config, ratio: int, overlap: bool) -> int:
    """Values and scores of a block in the making; CSA's overlap, so it keeps two of them, twice as wide, twice."""
    if not overlap:
        return 2 * 4 * ratio * config.head_dim
    return 2 * 4 * (2 * ratio) * 2 * (config.head_dim + config.index_head_dim)
