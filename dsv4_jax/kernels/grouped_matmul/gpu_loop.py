"""The loop of the grouped matmul's GPU kernels: one warpgroup copies into slots, two add up products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.grouped_matmul.gpu import STEP, WIDTH
from dsv4_jax.kernels.sparse_attention.gpu_tiles import full

FETCHER = 2  # the warpgroup beside the two that multiply


class Place(NamedTuple):
    """What a program computes: `rows` of one `expert` and a `block` of 2 x 128 columns, in `count` steps."""

    expert: Any
    rows: Any
    block: Any
    count: Any

    def columns(self, half: Any) -> Any:
        """Of a warpgroup."""
        return part(2 * self.block + half, WIDTH)


def place_of_program(experts_ref: Any, used_ref: Any, rows_ref: Any, out_ref: Any, tile: int) -> Place:
    """Columns vary fastest, then tiles of rows; a tile that is not used takes no step."""
    program, blocks = jax.lax.axis_index("program"), out_ref.shape[1] // (2 * WIDTH)
    t, block = jax.lax.div(program, blocks), jax.lax.rem(program, blocks)
    count = jnp.where(t < used_ref[0], rows_ref.shape[1] // STEP, 0)
    return Place(experts_ref[t], part(t, tile), block, count)


def part(i: Any, size: int) -> Any:
    """The i-th part of an axis in parts of `size`."""
    return pl.ds(pl.multiple_of(i * size, size), size)


def tiled(itemsize: int) -> tuple[Any, Any]:
    """How pieces lie in shared memory: in blocks of 8 rows x 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128)


def kernel(
    body: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    programs: int,
    memory: Sequence[Any],
    slots: int,
    copies: int,
    name: str,
    interpret: Any,
) -> Callable[..., jax.Array]:
    """A kernel of three warpgroups.

    Args:
        body: takes references to the operands, to the result, to `memory`, and two barriers per slot: all copies have
            arrived, both warpgroups have multiplied.
        out: the result.
        programs: how many run.
        memory: shared, among it the slots.
        slots: how many.
        copies: into a slot.
        name: of the kernel.
        interpret: False on a GPU; the parameters of Pallas' GPU interpreter elsewhere.
    """
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            *memory,
            plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        ],
        interpret=interpret or None,
        kernel_name=name,
    )


def summed(
    copies: Callable[[Any, Any], Sequence[tuple[Any, Any]]],
    add: Callable[[jax.Array, Any, Any], jax.Array],
    leave: Callable[[Any, jax.Array], None],
    count: Any,
    shape: tuple[int, int],
    barriers: tuple[Any, Any],
    interpret: Any,
) -> None:
    """The sum of `count` products of `shape`, one in each of two warpgroups.

    Args:
        copies: from the number of a product and a slot to pairs of what is in global memory and where it goes.
        add: takes a sum, a slot and the number of the warpgroup, gives the sum with its product.
        leave: takes the number of the warpgroup and its sum, float32.
        count: of products.
        shape: of each warpgroup's.
        barriers: `kernel`'s.
        interpret: see `kernel`.
    """
    arrived, free = barriers
    slots = arrived.shape[0]
    me = jax.lax.axis_index("warpgroup")

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def step(i, _):
            slot = jax.lax.rem(i, slots)
            pl.when(i >= slots)(lambda: plgpu.barrier_wait(free.at[slot]))
            for source, place in copies(i, slot):
                plgpu.copy_gmem_to_smem(source, place, arrived.at[slot])
            return _

        def until_free(i, _):
            plgpu.barrier_wait(free.at[jax.lax.rem(i, slots)])
            return _

        jax.lax.fori_loop(0, count, step, None)
        jax.lax.fori_loop(jnp.maximum(count - slots, 0), count, until_free, None)

    @pl.when(me < FETCHER)
    def _():
        plgpu.set_max_registers(232, action="increase")

        def step(i, total):
            slot = jax.lax.rem(i, slots)
            plgpu.barrier_wait(arrived.at[slot])
            total = add(total, slot, me)
            plgpu.barrier_arrive(free.at[slot])
            return total

        leave(me, jax.lax.fori_loop(0, count, step, full(shape, 0.0, plgpu.Layout.WGMMA, interpret)))
