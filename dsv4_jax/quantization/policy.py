"""The precision policy: one object that says, per tensor role, which fake-quantiser runs (report 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.facts import Fact
from dsv4_jax.quantization.formats import FP4_BLOCK, TILE
from dsv4_jax.quantization.packed import Packed
from dsv4_jax.quantization.rounding import Rounding, bf16
from dsv4_jax.quantization.storage import FP8_BLOCK

# What layers ask while they run: inputs of the quantised products, stored entries, the indexer's operands.
ACTIVATIONS = ("attn_input", "shared_input", "expert_input", "mtp_input", "kv_entry", "index_q", "index_k")
# The matrices that the release stores quantised; rounded all at once, before a forward.
WEIGHTS = ("attn_weight", "indexer_weight", "shared_weight", "expert_weight", "mtp_weight")
ROLES = ACTIVATIONS + WEIGHTS
# How index scores are compared, in float32 or BF16. No named policy says: what kernels do inside is no array to round.
INDEX_SCORE = "index_score"
VECTOR = (1, 128)  # numbers of an FP8 activation that share a scale

NAMED = {"none": {}, "fp8": dict.fromkeys(ROLES, "fp8")}
NAMED["v4"] = NAMED["fp8"] | dict.fromkeys(("expert_weight", "index_q", "index_k"), "fp4")


@dataclass(frozen=True)
class Policy:
    """Maps a role to a function from array to array (rounding with a straight-through gradient); none by default.

    `Policy()` rounds nothing and leaves no trace in the compiled program.

    Raises:
        ValueError: for a role that the model does not have.
    """

    rounding: Mapping[str, Callable[[jax.Array], jax.Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse unknown roles: a policy that never acts must not look switched on."""
        if unknown := set(self.rounding) - {*ROLES, INDEX_SCORE}:
            known = ", ".join((*ROLES, INDEX_SCORE))
            raise ValueError(f"precision policy names the roles {sorted(unknown)}; the model has {known}")

    def __call__(self, role: str, x: jax.Array) -> jax.Array:
        """`x` rounded as the role's format asks, or x itself."""
        return self.rounding[role](x) if role in self.rounding else x

    def weights(self, facts: Any, params: Any) -> Any:
        """The parameters with the matrices of a release rounded as they would be stored.

        Elementwise but for the maxima of blocks, so every device works on what it has.

        Args:
            facts: `weights.facts` of the architecture.
            params: parameters, stacked or `weights.unstack`ed.
        """
        if not self.rounding.keys() & set(WEIGHTS):
            return params
        segments = {
            name: [self._tree(facts["segments"][name], unit) for unit in segment]
            if isinstance(segment, list)
            else self._tree(facts["segments"][name], segment)
            for name, segment in params["segments"].items()
        }
        ends = {name: self._tree(facts[name], value) for name, value in params.items() if name != "segments"}
        return ends | {"segments": segments}

    def _tree(self, facts: Any, params: Any) -> Any:
        return jax.tree.map(self._matrix, facts, params)

    def _matrix(self, fact: Fact, x: jax.Array | Packed) -> jax.Array | Packed:
        role = weight_role(fact)
        if role is None or role not in self.rounding or isinstance(x, Packed):  # what is packed is rounded
            return x
        *_, inner, outer = x.shape
        if "o_groups" not in fact.axes or outer % TILE[1] == 0:
            return self.rounding[role](x)
        # The groups' matrices are stored as one, and tiles that do not end with a group hold parts of two.
        joined = jnp.moveaxis(x, -3, -2)
        rounded = self.rounding[role](joined.reshape(*x.shape[:-3], inner, -1))
        return jnp.moveaxis(rounded.reshape(joined.shape), -2, -3)

    def __hash__(self) -> int:
        """Hash by content, so that a policy can be a static argument."""
        return hash(frozenset(self.rounding.items()))


NONE = Policy()


def weight_role(fact: Fact) -> str | None:
    """The role of a matrix that the release stores quantised; None for every other parameter.

    Plain are embedding and output matrix, routers, compressors, and the indexer's but for its queries' matrix.
    """
    if fact.optimizer != "muon":
        return None
    if fact.role == "experts":
        return "expert_weight" if "experts" in fact.axes else "shared_weight"
    if fact.role == "indexer":
        return "indexer_weight" if fact.axes[-2] == "q_lora" else None
    return {"attn": "attn_weight", "mtp": "mtp_weight"}.get(fact.role)


def precision_policy(text: str, config: DeepseekV4Config) -> Policy:
    """The policy that `text` describes.

    Args:
        text: "none"; "fp8", everything that the release quantises in FP8; "v4", the same with experts and the indexer's
            queries and keys in FP4. Single roles can differ: "v4,kv_entry=none", "none,expert_weight=fp4",
            "v4,index_score=bf16".
        config: gives the number of rotary dims, which stay BF16 in entries.

    Raises:
        UserError: for what is none of these, with what there is; for entries without any but rotary dims.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name not in NAMED:
        raise UserError(f"there is no precision policy {name!r}: one of {', '.join(NAMED)}; then ROLE=FORMAT, if any")
    formats = dict(NAMED[name])
    for change in changes:
        role, _, chosen = change.partition("=")
        allowed = {INDEX_SCORE: ("none", "bf16")} | dict.fromkeys(ROLES, ("none", "fp8", "fp4"))
        if chosen not in allowed.get(role, ()):
            raise UserError(
                f"precision policy {text!r}: {change!r} is not ROLE=FORMAT with a role of {', '.join(ROLES)} and a "
                f"format of none, fp8, fp4, or {INDEX_SCORE}=bf16"
            )
        formats[role] = chosen
    if formats.get("kv_entry", "none") != "none" and config.head_dim <= config.qk_rope_head_dim:
        raise UserError(
            f"precision policy {text!r} rounds entries beside their rotary dims, and head_dim {config.head_dim} leaves "
            f"none beside qk_rope_head_dim {config.qk_rope_head_dim}: add kv_entry=none"
        )
    return Policy({role: _rounding(role, chosen, config) for role, chosen in formats.items() if chosen != "none"})


def _rounding(role: str, chosen: Any, config: DeepseekV4Config) -> Callable[[jax.Array], jax.Array]:
    """How a role is rounded. Matrices are [in, out]: the FP4 blocks of the release run along their inputs."""
    if role == INDEX_SCORE:
        return bf16
    fp8 = chosen == "fp8"
    if role in WEIGHTS:
        return Rounding(chosen, TILE if fp8 else (FP4_BLOCK, 1))
    if role == "kv_entry":
        return Rounding(chosen, (1, FP8_BLOCK if fp8 else FP4_BLOCK), plain=config.qk_rope_head_dim)
    return Rounding(chosen, VECTOR if fp8 else (1, FP4_BLOCK))
