"""The grouped matmul as the real compilers of machines that are not here see it: no FLOP and no copy too many."""

from importlib.util import find_spec

import pytest
from grouped_costs import EXPERTS, INNER, NATIVE, OUTER, PAIRS, TILE, costs

from sharding import targets

pytestmark = pytest.mark.aot
OURS = ("forward", "rows", "weights", "fp8 forward", "fp4 forward")
MASTERS, ROWS = 4 * EXPERTS * INNER * OUTER, 2 * (PAIRS + EXPERTS * TILE) * INNER  # bytes: 16 and 10 MiB
SMALL = 2 << 20


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the extra aot")
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_tpus_do_the_ideal_flops_in_all_directions_and_copy_nothing(target):
    found = costs(target)
    for name in OURS:
        assert found[name].flops == 1, name
        # FP4 rows are put into the order of their bytes: at most two copies of the rows.
        assert found[name].temporary < SMALL + (2 * ROWS if name.startswith("fp4") else 0), name
    assert min(found[name].flops for name in NATIVE) >= 1


@pytest.mark.skipif(not targets._exists("jax_plugins.xla_cuda13"), reason="needs the extra aot")
def test_gpus_hold_no_dense_expansion():
    """At most the masters in BF16, which the kernels of matrices that are not packed take."""
    found = costs("h200:1x1")
    for name in OURS:
        assert found[name].temporary <= (MASTERS / 2 if name in ("forward", "rows") else 1 << 20), name
    assert min(found[name].temporary for name in NATIVE) > MASTERS
