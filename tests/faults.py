"""Faults that tests inject into a run. As a script: `dsv4 train ...` on a machine that spoils the output matrix once.

python tests/faults.py 10 train --recipe FILE ...    # after step 10
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

from train import stage_run


def spoilt_after(steps: Collection[int], times: int = 1) -> Callable[..., Any]:
    """A `Programs.step` after which, the first `times` that one of `steps` is done, the output matrix is multiplied."""
    original, seen = stage_run.Programs.step, {}

    def step(self: Any, stage: Any, state: Any) -> Callable[..., Any]:
        inner = original(self, stage, state)

        def spoiling(state: Any, batch: Any) -> Any:
            state, metrics = inner(state, batch)
            done = int(state.step)
            seen[done] = seen.get(done, 0) + 1
            if done in steps and seen[done] <= times:
                state = state._replace(params=state.params | {"head": state.params["head"] * 300})
            return state, metrics

        return spoiling

    return step


if __name__ == "__main__":
    from dsv4_jax import cli

    stage_run.Programs.step = spoilt_after({int(sys.argv[1])})
    sys.exit(cli.main(sys.argv[2:]))
