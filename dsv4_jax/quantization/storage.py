"""How the cache stores its entries: plain floats, or the deployed FP8 and FP4 formats, packed (report 3.6.1).

Floats narrower than 32 bits are stored as the unsigned integers of their bits. XLA's CPU compiler has no scatter for
narrow floats: it would convert the whole pool to wide ones and back at every write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from dsv4_jax.baseline import refuse_baselines
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.quantization.formats import (
    FP4_BLOCK,
    FP8,
    SCALE,
    dequantise_fp4,
    dequantise_fp8,
    quantise_fp4,
    quantise_fp8,
)

Stored = dict[str, jax.Array]
FormatName = Literal["float32", "bfloat16", "deployed"]
FP8_BLOCK = 64


class Storage(Protocol):
    """One format for vectors of a fixed width: arrays [.., width] to named arrays with the same leading axes, and back.

    Instances are frozen and hashable, so that a cache can carry them as static data.
    """

    def zeros(self, shape: tuple[int, ...]) -> Stored:
        """Storage for vectors in places `shape`."""
        ...

    def encode(self, x: jax.Array) -> Stored:
        """[.., width] -> stored."""
        ...

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        """Stored -> [.., width] in `dtype`."""
        ...


@dataclass(frozen=True)
class Plain:
    """Floats as they are."""

    width: int
    dtype: str

    def zeros(self, shape: tuple[int, ...]) -> Stored:
        """See `Storage`."""
        return {"values": jnp.zeros((*shape, self.width), _stored(self.dtype))}

    def encode(self, x: jax.Array) -> Stored:
        """See `Storage`."""
        return {"values": _bits(x.astype(self.dtype))}

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        """See `Storage`."""
        return stored["values"].view(self.dtype).astype(dtype)


@dataclass(frozen=True)
class Fp8WithRope:
    """FP8 in blocks of 64 with power-of-two scales; the rotary dims at the end stay BF16."""

    width: int
    rope: int

    def zeros(self, shape: tuple[int, ...]) -> Stored:
        """See `Storage`."""
        plain = self.width - self.rope
        return {
            "values": jnp.zeros((*shape, plain), jnp.uint8),
            "scales": jnp.zeros((*shape, -(-plain // FP8_BLOCK)), jnp.uint8),
            "rope": jnp.zeros((*shape, self.rope), jnp.uint16),
        }

    def encode(self, x: jax.Array) -> Stored:
        """See `Storage`."""
        plain = self.width - self.rope
        values, scales = quantise_fp8(x[..., :plain], FP8_BLOCK)
        rope = x[..., plain:].astype(jnp.bfloat16)
        return {"values": _bits(values), "scales": _bits(scales), "rope": _bits(rope)}

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        """See `Storage`."""
        plain = dequantise_fp8(stored["values"].view(FP8), stored["scales"].view(SCALE), FP8_BLOCK, dtype)
        return jnp.concatenate([plain, stored["rope"].view(jnp.bfloat16).astype(dtype)], axis=-1)


@dataclass(frozen=True)
class Fp4:
    """FP4 in blocks of 32 with power-of-two scales, two numbers per byte."""

    width: int

    def zeros(self, shape: tuple[int, ...]) -> Stored:
        """See `Storage`."""
        scales = jnp.zeros((*shape, -(-self.width // FP4_BLOCK)), jnp.uint8)
        return {"packed": jnp.zeros((*shape, self.width // 2), jnp.uint8), "scales": scales}

    def encode(self, x: jax.Array) -> Stored:
        """See `Storage`."""
        packed, scales = quantise_fp4(x)
        return {"packed": packed, "scales": _bits(scales)}

    def decode(self, stored: Stored, dtype: Any) -> jax.Array:
        """See `Storage`."""
        return dequantise_fp4(stored["packed"], stored["scales"].view(SCALE), dtype=dtype)


@dataclass(frozen=True)
class CacheFormat:
    """The formats of one cache.

    Attributes:
        name: as people call it.
        entry: of window and compressed entries.
        index: of indexer keys and queries.
        in_words: blocks are rows of 32-bit words (`kernels.pools.InWords`).
    """

    name: str
    entry: Storage
    index: Storage
    in_words: bool = False


def cache_format(config: DeepseekV4Config, name: str = "float32") -> CacheFormat:
    """The format called `name`.

    Args:
        config: gives the widths.
        name: "float32" or "bfloat16" for parity work; "deployed": entries in FP8 with BF16 rotary dims, indexer keys
            in FP4 (the indexer's queries are rounded to FP4 as well).

    Raises:
        UserError: for another name, where the widths cannot be stored so, and for layers that keep no cache.
    """
    refuse_baselines(config, "a cache, and so generation,")
    width, index = config.head_dim, config.index_head_dim
    if name in ("float32", "bfloat16"):
        return CacheFormat(name, Plain(width, name), Plain(index, name))
    if name != "deployed":
        raise UserError(f"there is no cache format {name!r}: one of float32, bfloat16, deployed")
    if width == config.qk_rope_head_dim or index % 2:
        raise UserError(
            f"the deployed cache format needs a head_dim beyond qk_rope_head_dim and an even index_head_dim; the model "
            f"has head_dim {width}, qk_rope_head_dim {config.qk_rope_head_dim} and index_head_dim {index}"
        )
    return CacheFormat(name, Fp8WithRope(width, config.qk_rope_head_dim), Fp4(index))


def _bits(x: jax.Array) -> jax.Array:
    """x as it is stored: floats of 8 or 16 bits as unsigned integers."""
    return x.view(_stored(x.dtype))


def _stored(dtype: Any) -> Any:
    return {1: jnp.uint8, 2: jnp.uint16}.get(jnp.dtype(dtype).itemsize, dtype)
