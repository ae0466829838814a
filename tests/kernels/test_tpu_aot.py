"""Every TPU kernel through the TPU's own compiler, at the shapes of the releases, for four generations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.indexer_topk import IndexOperands, tpu_loss
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import InWords
from dsv4_jax.kernels.sparse_attention import gather_attention, range_attention, tpu_pages, tpu_sums, window_attention
from dsv4_jax.quantization.storage import Fp8WithRope, Plain
from sharding.targets import parse_target

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
LENGTH, WIDTH, WINDOW = 256, 512, 128
SHAPES = {"v4-flash": (64, 512), "v4-pro": (128, 1024)}  # heads, chosen entries
SCALE = WIDTH**-0.5


def gathered(q, entries, indices):
    return gather_attention(q, entries, indices, SCALE)


def ranged(q, entries, indices):
    lo, hi = jnp.zeros_like(indices[..., 0]), indices[..., 0]
    return range_attention(q, entries, lo, hi, SCALE)


def windowed(q, entries, indices):
    return window_attention(q, entries, indices[..., 0], WINDOW, SCALE)


def compiled(branch, chip, heads, count, entries):
    """`branch` and its gradients, for one device of `chip`."""
    placed = SingleDeviceSharding(parse_target(SLICES[chip]).devices()[0])
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)  # noqa: E731
    q = array(jnp.bfloat16, 1, LENGTH, heads, WIDTH)

    def both(q, keys, indices, d_out, d_lse):
        primal, pull = jax.vjp(lambda q, keys: branch(q, keys, indices), q, keys)
        return primal, pull((d_out, d_lse))

    with platforms.compiling_for("tpu"):
        traced = jax.jit(both).trace(
            q,
            array(jnp.bfloat16, 1, entries, WIDTH),
            array(jnp.int32, 1, LENGTH, count),
            q,
            array(jnp.float32, 1, LENGTH, heads),
        )
        return traced.lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.aot
@pytest.mark.parametrize("chip", SLICES)
@pytest.mark.parametrize(
    ("branch", "entries", "kernels", "shapes"),
    [
        (gathered, 1 << 16, 2, "v4-pro"),  # whose gradients do not fit into VMEM
        *(
            (*case, shapes)
            for case in ((gathered, 1 << 14, 2), (ranged, 8192, 3), (windowed, LENGTH, 4))
            for shapes in SHAPES
        ),
    ],
)
def test_kernels_compile_at_the_releases_shapes(branch, entries, kernels, shapes, chip):
    heads, count = SHAPES[shapes]
    by_rows = branch is gathered and entries * WIDTH * 4 > tpu_sums.SUM_BYTES
    program = compiled(branch, chip, heads, count, entries)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == kernels
    assert program.as_text().count(" scatter(") == by_rows
    # Beside results: the words of the entries, and their float32 gradient, or those of what a few queries chose.
    results = LENGTH * heads * WIDTH * 2
    chosen = by_rows * 64 * count * WIDTH * 4 + (3 if branch is gathered else 2) * entries * WIDTH * 4
    assert program.memory_analysis().temp_size_in_bytes < 3 * results + 1.5 * chosen


@pytest.mark.aot
@pytest.mark.parametrize("chip", SLICES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_the_loss_of_the_indexer_compiles_at_the_releases_shapes(shapes, chip):
    heads, count = SHAPES[shapes]
    entries, index_heads, index_width = 1 << 16, 64, 128
    placed = SingleDeviceSharding(parse_target(SLICES[chip]).devices()[0])
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype, sharding=placed)  # noqa: E731
    operands = IndexOperands(
        array(jnp.bfloat16, LENGTH, index_heads, index_width),
        array(jnp.bfloat16, entries, index_width),
        array(jnp.float32, LENGTH, index_heads),
    )
    q, rows = array(jnp.bfloat16, LENGTH, heads, WIDTH), array(jnp.bfloat16, entries, WIDTH)
    lse, choice = array(jnp.float32, LENGTH, heads), array(jnp.int32, LENGTH, count)

    def forward(operands, q, rows, lse, choice):
        return tpu_loss.forward(operands, q, rows, lse, choice, SCALE)

    def memory(function, *args):
        with platforms.compiling_for("tpu"):
            program = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).compile()
        assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
        return program.memory_analysis().temp_size_in_bytes

    # Words of entries and keys, twice at most, and nothing that grows with queries x entries x heads.
    assert memory(forward, operands, q, rows, lse, choice) < 2 * entries * 3 * 512
    # Words of keys, and their float32 gradient for each of two parts of the queries, twice.
    backward = memory(tpu_loss.backward, operands, choice, array(jnp.float32, LENGTH, count))
    assert backward < entries * (512 + 4 * index_width * 4)


def decoded(branch, chip, heads, count, pool, queries):
    """`branch` of eight sequences with `queries` each over the pages of a cache for 128K tokens, for one `chip`."""
    placed, batch, columns = SingleDeviceSharding(parse_target(SLICES[chip]).devices()[0]), 8, 1024
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)  # noqa: E731
    store = {name: array(x.dtype, *x.shape) for name, x in jax.eval_shape(lambda: pool.zeros(4, 8192)).items()}
    pages = Pages(store, array(jnp.int32), array(jnp.int32, batch, columns), pool, own_blocks=True)
    q, indices = array(jnp.bfloat16, batch, queries, heads, WIDTH), array(jnp.int32, batch, queries, count)
    with platforms.compiling_for("tpu"):
        return jax.jit(branch).trace(q, pages, indices).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.aot
@pytest.mark.parametrize("chip", SLICES)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("storage", [Fp8WithRope(WIDTH, 64), Plain(WIDTH, "bfloat16")], ids=["fp8", "bf16"])
@pytest.mark.parametrize(("branch", "per_block"), [(gathered, 32), (ranged, 1)])
def test_decoding_reads_a_cache_as_it_is_stored(branch, per_block, storage, shapes, chip):
    """One kernel, and no array as large as the entries of its queries: their rows' numbers and the queries at most."""
    heads, count = SHAPES[shapes]
    for queries in (1, tpu_pages.FEW_QUERIES):
        program = decoded(branch, chip, heads, count, InWords(storage, per_block), queries)
        assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
        assert program.memory_analysis().temp_size_in_bytes < 8 * queries * (count * 16 + 2 * heads * WIDTH * 2) + 1e6
