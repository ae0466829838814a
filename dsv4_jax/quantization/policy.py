"""The precision policy: one object that says, per tensor role, which fake-quantiser runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax

# Every place of the model that asks the policy, by the role it passes.
ROLES = ("index_q", "index_k", "kv_entry")


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
        if unknown := set(self.rounding) - set(ROLES):
            raise ValueError(f"precision policy names the roles {sorted(unknown)}; the model has {', '.join(ROLES)}")

    def __call__(self, role: str, x: jax.Array) -> jax.Array:
        """`x` rounded as the role's format asks, or x itself."""
        return self.rounding[role](x) if role in self.rounding else x

    def __hash__(self) -> int:
        """Hash by content, so that a policy can be a static argument."""
        return hash(tuple(sorted((role, id(f)) for role, f in self.rounding.items())))


NONE = Policy()
