"""The blocks that documents and agents share: their arrays, and who holds which.

Everything here runs on the host, between forwards; the arrays change by donation only. One thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.layers.kv_cache import init_cache
from dsv4_jax.quantization.storage import CacheFormat


class OutOfBlocks(UserError):
    """The pool has fewer free blocks than were asked for. Nothing was taken; a sequence that ends gives blocks back."""


class BlockPool:
    """A fixed number of blocks with reference counts.

    Attributes:
        config: the architecture.
        format: how entries are stored.
        block_tokens: tokens per block.
        pools: the arrays by stack, as in `Cache.pools`.
        options: what every forward over this pool gets: `model.forward`'s static dtype, attention or policy.
    """

    def __init__(self, config: DeepseekV4Config, blocks: int, format: str = "deployed", **options: Any):
        """Allocate `blocks` empty blocks; see `dsv4_jax.analysis.memory` for what one costs."""
        empty = init_cache(config, 1, 0, format, blocks)
        self.config, self.options = config, tuple(sorted(options.items()))
        self.format: CacheFormat = empty.format
        self.block_tokens, self.pools = empty.block_tokens, empty.pools
        self._holders = np.zeros(blocks, np.int32)
        self._free = list(range(blocks))[::-1]

    @property
    def blocks(self) -> int:
        """Blocks in all."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.pools))

    def holders(self, block: int) -> int:
        """How many sequences refer to a block."""
        return int(self._holders[block])

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks, each held once.

        Raises:
            OutOfBlocks: when there are not as many.
        """
        if count > self.free:
            raise OutOfBlocks(
                f"{count} more blocks of {self.block_tokens} tokens are needed and {self.free} of {self.blocks} are "
                "free: make the pool larger, or end or close sequences first"
            )
        taken = [self._free.pop() for _ in range(count)]
        self._holders[taken] = 1
        return taken

    def retain(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"block {block} is free; only a block that somebody holds can be shared")
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each of `blocks`; the last one gives it back."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"block {block} is free already")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(int(block))

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy blocks `source` [n] to blocks `target` [n], in every layer; a target of -1 copies nothing."""
        self.pools = _copy(self.pools, jnp.array(source), jnp.array(target))

    def read(self, blocks: np.ndarray) -> Any:
        """The content of blocks [n] on the host: the tree of `pools`, arrays [layers, n, E, ..]."""
        return jax.device_get(_read(self.pools, jnp.array(blocks)))

    def fill(self, blocks: np.ndarray, content: Any) -> None:
        """Put what `read` gave into `blocks` [n]; -1 is left out."""
        self.pools = _fill(self.pools, jnp.array(blocks), content)


@partial(jax.jit, donate_argnums=0)
def _copy(pools: Any, source: jax.Array, target: jax.Array) -> Any:
    return _set(pools, target, jax.tree.map(lambda x: x[:, source], pools))


@jax.jit
def _read(pools: Any, blocks: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[:, blocks], pools)


@partial(jax.jit, donate_argnums=0)
def _fill(pools: Any, blocks: jax.Array, content: Any) -> Any:
    return _set(pools, blocks, content)


def _set(pools: Any, blocks: jax.Array, content: Any) -> Any:
    def one(x: jax.Array, new: jax.Array) -> jax.Array:
        return x.at[:, jnp.where(blocks < 0, x.shape[1], blocks)].set(new, mode="drop")

    return jax.tree.map(one, pools, content)
