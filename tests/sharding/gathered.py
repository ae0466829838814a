"""What a compiled program gathers, and what it must not: all experts, anything of all tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dsv4_jax.config import DeepseekV4Config
from sharding.hlo import Collective

Shape = tuple[int, ...]


def gathered(moved: Iterable[Collective]) -> list[Shape]:
    """Shapes of all that is gathered from other devices."""
    texts = [one.shape for one in moved if one.kind == "all-gather"]
    return [tuple(map(int, filter(None, dims.split(",")))) for text in texts for dims in re.findall(r"\[(.*?)\]", text)]


def assert_nothing_large(shapes: Iterable[Shape], config: DeepseekV4Config, rows: int, length: int) -> None:
    """None holds the matrices of all experts; none has a place for every token, neither [B, S, ..] nor [.., B * S]."""
    matrix = sorted((config.hidden_size, config.moe_intermediate_size))
    for shape in shapes:
        assert shape[-3:-2] != (config.n_routed_experts,) or sorted(shape[-2:]) != matrix, shape
        assert length == 1 or (shape[:2] != (rows, length) and rows * length not in shape), shape
