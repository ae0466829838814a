"""What V4 is compared with: kinds of attention of other models as kinds of layers of this one.

`gqa` is grouped-query attention as in Mixtral, `mla` latent attention as in DeepSeek-V3, `mla_sparse` the same over
the tokens that an indexer chooses, as in DeepSeek-V3.2. Layers of these kinds train and are evaluated; no cache keeps
them and no release has a place for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from dsv4_jax.errors import UserError
from dsv4_jax.layer_plan import BASELINE_KINDS, GQA, MLA_SPARSE, AttentionKind

if TYPE_CHECKING:
    from dsv4_jax.config import DeepseekV4Config


@dataclass(frozen=True)
class BaselineSizes:
    """Sizes that V4's attention has not, under their released names; by default those of the releases.

    Heads, their number, the query's rank, rotary dims and the indexer have the sizes of the V4 configuration.

    Attributes:
        num_key_value_heads: of `gqa`; its heads are `head_dim` wide (Mixtral).
        kv_lora_rank: of the latent that a token leaves in `mla` and `mla_sparse` (V3), beside its rotary key.
        qk_nope_head_dim: of a head's query and key beside their rotary dims.
        v_head_dim: of a head's value.
    """

    num_key_value_heads: int = 8
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128


SIZES = tuple(field.name for field in fields(BaselineSizes))


def wrong_sizes(config: DeepseekV4Config) -> Iterator[str]:
    """What is wrong with the sizes of the baseline layers that the plan has, a sentence each."""
    c, sizes = config, config.baseline
    if not isinstance(sizes, BaselineSizes):
        yield f"baseline is {sizes!r}: an object with {', '.join(SIZES)} is needed"
        return
    for name in SIZES:
        value = getattr(sizes, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield f"baseline.{name} is {value!r}: an integer of at least 1 is needed"
            return
    if GQA in c.layer_types and c.num_attention_heads % sizes.num_key_value_heads:
        yield (
            f"baseline.num_key_value_heads = {sizes.num_key_value_heads} does not divide num_attention_heads = "
            f"{c.num_attention_heads}"
        )
    if GQA in c.layer_types and c.head_dim % 2:
        yield f"head_dim is {c.head_dim}: gqa layers rotate all dims in pairs, an even number is needed"


def cached_numbers(config: DeepseekV4Config, kind: AttentionKind) -> tuple[int, int]:
    """Numbers that a token leaves in a baseline layer for later ones: of its entry, and of its indexer key."""
    sizes = config.baseline
    if kind == GQA:
        return 2 * sizes.num_key_value_heads * config.head_dim, 0
    return sizes.kv_lora_rank + config.qk_rope_head_dim, config.index_head_dim if kind == MLA_SPARSE else 0


def refuse_baselines(config: DeepseekV4Config, what: str) -> None:
    """Raises UserError when the plan has baseline layers; `what` they cannot do begins the sentence."""
    if kinds := sorted(set(config.layer_types) & set(BASELINE_KINDS)):
        raise UserError(f"{what} is there for V4's own layers; {', '.join(kinds)} layers only train and are evaluated")


def refuse_other_models(config: DeepseekV4Config, what: str) -> None:
    """Raises UserError when the model is not a V4 in attention or in routing."""
    refuse_baselines(config, what)
    for name, own in (("topk_method", "noaux_tc"), ("n_shared_experts", 1)):
        if getattr(config, name) != own:
            raise UserError(f"{what} is there for V4's own experts: {name} is {getattr(config, name)!r}, not {own!r}")
