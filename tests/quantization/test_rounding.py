"""Fake quantisation, bit for bit: every number of the formats, every tie, hard blocks, and the way of the gradient."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.quantization.formats import (
    FP8,
    SCALE,
    TILE,
    dequantise_fp4,
    dequantise_fp8_tiles,
    fp4_as_fp8,
    quantise_fp4,
    scales_as_float,
    unpack_fp4,
)
from dsv4_jax.quantization.rounding import Rounding

pytestmark = pytest.mark.optimized

# Format: its ml_dtypes type, largest number, the floor of amax.
RELEASED = {
    "fp8": (ml_dtypes.float8_e4m3fn, 448.0, 1e-4),
    "fp4": (ml_dtypes.float4_e2m1fn, 6.0, 6 * 2.0**-126),
}
TILES = {
    "fp8 weights": Rounding("fp8", (128, 128)),
    "fp8 activations": Rounding("fp8", (1, 128)),
    "fp8 entries": Rounding("fp8", (1, 64)),
    "fp4 experts": Rounding("fp4", (32, 1)),
    "fp4 indexer": Rounding("fp4", (1, 32)),
}
WIDTH = 300  # no multiple of any tile


def by_hand(x, how):
    """The released kernels' rounding in float64, tile by tile: clamp amax, scale up to a power of two, cast."""
    dtype, largest, floor = RELEASED[how.format]
    out = np.empty_like(x)
    for i in range(0, x.shape[0], how.tile[0]):
        for j in range(0, x.shape[1], how.tile[1]):
            tile = x[i : i + how.tile[0], j : j + how.tile[1]].astype(np.float64)
            amax = max(np.abs(tile).max(), floor)
            power = int(np.floor(np.log2(amax / largest))) - 1  # near enough: the exact one is looked for
            scale = next(2.0**p for p in range(power, power + 4) if amax <= largest * 2.0**p)
            part = np.clip(tile / scale, -largest, largest).astype(np.float32).astype(dtype)
            out[i : i + how.tile[0], j : j + how.tile[1]] = part.astype(np.float64) * scale
    return out


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def every_number(how):
    """All finite numbers of a format, and the number midway between any two neighbours, with the float32s beside it."""
    codes = np.arange(256 if how.format == "fp8" else 16, dtype=np.uint8)
    numbers = np.unique(codes.view(RELEASED[how.format][0]).astype(np.float32))
    numbers = numbers[np.isfinite(numbers)]
    ties = (numbers[1:] + numbers[:-1]) / 2
    return np.concatenate([numbers, ties, np.nextafter(ties, np.float32(-999)), np.nextafter(ties, np.float32(999))])


@pytest.mark.parametrize("how", [TILES["fp8 activations"], TILES["fp4 indexer"]], ids=["fp8", "fp4"])
@pytest.mark.parametrize("power", [-20, 0, 1, 100])
def test_every_number_and_every_tie_rounds_as_ml_dtypes_casts(how, power):
    dtype, largest, _ = RELEASED[how.format]
    x = every_number(how)
    blocks = np.full((len(x), 2), largest, np.float32)  # the largest beside it makes the scale 2^power
    blocks[:, 0] = x
    rounded = np.asarray(jax.jit(how)(blocks * np.float32(2.0**power)))
    np.testing.assert_array_equal(bits(rounded[:, 0]), bits(x.astype(dtype).astype(np.float32) * 2.0**power))
    np.testing.assert_array_equal(rounded[:, 1], largest * 2.0**power)


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("compiled", [False, True])
def test_hard_blocks_round_as_the_released_kernels(name, compiled):
    how = TILES[name]
    _, largest, floor = RELEASED[how.format]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((160, WIDTH)) * 2.0 ** rng.integers(-40, 40, (160, WIDTH // 20)).repeat(20, 1)
    x[3], x[4], x[:, 7] = 0, -0.0, 0
    x[5] = floor * rng.uniform(-1, 1, WIDTH)  # below the floor: the scale stays
    x[6, ::2], x[7, ::2] = floor, np.nextafter(np.float32(floor), np.float32(1))
    x[8], x[9] = largest * 2.0 ** rng.integers(-9, 9, WIDTH), 1e37 * rng.standard_normal(WIDTH)
    x = x.astype(np.float32)
    x[np.abs(x) < 2.0**-125] = 0  # this processor has no denormals
    rounded = np.asarray((jax.jit(how) if compiled else how)(jnp.asarray(x)))
    expected = by_hand(x, how)
    expected[np.abs(expected) < 2.0**-126] = 0
    np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize("below", [1, 16, 1024, 2**20])
def test_under_the_floor_of_amax_the_scale_shrinks_no_more(below):
    x = np.array([[1e-4, 5e-5, 3e-8, 1e-9]], np.float32) / below
    scale = 2.0**-22  # 1e-4 / 448 = 2^-22.1
    expected = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(Rounding("fp8", (1, 128))(x), expected)


@pytest.mark.parametrize("name", TILES)
def test_what_is_rounded_stays_and_bfloat16_holds_it(name):
    how = TILES[name]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((140, 130)), jnp.float32)
    once = how(x)
    np.testing.assert_array_equal(how(once), once)
    np.testing.assert_array_equal(once.astype(jnp.bfloat16).astype(jnp.float32), once)
    narrow = x.astype(jnp.bfloat16)
    assert how(narrow).dtype == jnp.bfloat16
    np.testing.assert_array_equal(how(narrow).astype(jnp.float32), how(narrow.astype(jnp.float32)))


def test_rotary_dims_of_entries_are_rounded_to_bfloat16():
    x = np.random.default_rng(2).standard_normal((5, 7, 80)).astype(np.float32)
    rounded = np.asarray(jax.jit(Rounding("fp8", (1, 64), plain=16))(x))
    np.testing.assert_array_equal(rounded[..., 64:], x[..., 64:].astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(
        rounded[..., :64], by_hand(x[..., :64].reshape(35, 64), TILES["fp8 entries"]).reshape(5, 7, 64)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_that_is_not_finite_becomes_nan_and_no_other(bad):
    x = np.ones((2, 256), np.float32)
    x[1, 130] = bad
    rounded = np.asarray(Rounding("fp8", (1, 128))(x))
    assert np.isnan(rounded[1, 128:]).all()
    np.testing.assert_array_equal(rounded[0], 1)
    np.testing.assert_array_equal(rounded[1, :128], 1)


@pytest.mark.parametrize("how", [*TILES.values(), Rounding("fp8", (1, 64), plain=100)], ids=str)
def test_the_gradient_passes_straight_through(how):
    rng = np.random.default_rng(3)
    x, weight = (jnp.asarray(rng.standard_normal((40, WIDTH)), jnp.float32) for _ in range(2))
    np.testing.assert_array_equal(jax.grad(lambda x: (how(x) * weight).sum())(x), weight)
    through = jax.grad(lambda x: (jnp.sin(how(x)) * weight).sum())(x)
    np.testing.assert_allclose(through, jnp.cos(how(x)) * weight, rtol=1e-6)


def packed_experts(powers, rows=160, seed=4):
    """FP4 matrices [rows, 256] whose blocks have the scales 2^p, p drawn from `powers`."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows, 128)).astype(np.uint8)
    scales = (rng.choice(powers, (rows, 8)) + 127).astype(np.uint8).view(SCALE)
    return packed, scales


KINDS = [pytest.param(np.asarray, id="numpy"), pytest.param(jnp.asarray, id="jax")]


@pytest.mark.parametrize("kind", KINDS)
def test_fp4_becomes_fp8_without_loss_while_scales_span_two_to_the_six(kind):
    packed, scales = packed_experts(np.arange(-11, -4))
    values, tile_scales, lossless = fp4_as_fp8(kind(packed), kind(scales))
    assert values.dtype == FP8 and tile_scales.dtype == SCALE and tile_scales.shape == lossless.shape == (2, 2)
    assert np.asarray(lossless).all()
    np.testing.assert_array_equal(scales_as_float(np.asarray(tile_scales)), 2.0**-11)
    back = dequantise_fp8_tiles(np.asarray(values), np.asarray(tile_scales))
    np.testing.assert_array_equal(bits(back), bits(dequantise_fp4(packed, scales)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_whose_scales_lie_too_far_apart_is_told_and_no_other(kind):
    packed, scales = packed_experts([0])
    packed[130] = 0x11  # a row of 0.5 in the lower tiles
    scales = scales.copy()
    scales.view(np.uint8)[130, 5] = 127 - 15  # its scale in the second: 0.5 * 2^-15 is no e4m3 number under 2^-6
    values, tile_scales, lossless = fp4_as_fp8(kind(packed), kind(scales))
    np.testing.assert_array_equal(lossless, [[True, True], [True, False]])
    scales.view(np.uint8)[130, 5] = 127 - 14  # the last that e4m3's denormals bear
    assert np.asarray(fp4_as_fp8(kind(packed), kind(scales))[2]).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_condition_of_losslessness_is_told_tile_by_tile_as_it_is(seed):
    """Scales of a tile span from 0 to 2^20; where they span at most 2^6 nothing may be lost, elsewhere it may."""
    rng, tiles = np.random.default_rng(seed), (3, 4)
    span = rng.integers(0, 21, tiles)
    powers = rng.integers(-8, 8, tiles)[..., None, None] + (rng.random((*tiles, 128, 4)) * (span + 1)[..., None, None])
    scales = (np.floor(powers).astype(np.int64).swapaxes(1, 2).reshape(384, 16) + 127).astype(np.uint8).view(SCALE)
    packed = rng.integers(0, 256, (384, 256)).astype(np.uint8)
    values, tile_scales, lossless = fp4_as_fp8(packed, scales)
    same = dequantise_fp8_tiles(values, tile_scales) == dequantise_fp4(packed, scales)
    same = same.reshape(3, 128, 4, 128).all((1, 3))
    np.testing.assert_array_equal(lossless, same)
    assert lossless[span <= 6].all() and not lossless.all() and lossless.any()


def test_blocks_of_zeros_bind_no_tile():
    x = np.random.default_rng(5).standard_normal((128, 256)).astype(np.float32)
    x[:, 32:64] = 0
    packed, scales = quantise_fp4(x)
    values, tile_scales, lossless = fp4_as_fp8(packed, scales)
    assert lossless.all()
    np.testing.assert_array_equal(dequantise_fp8_tiles(values, tile_scales), dequantise_fp4(packed, scales))
    nothing = fp4_as_fp8(*quantise_fp4(np.zeros((128, 128), np.float32)))
    assert nothing[2].all() and not dequantise_fp8_tiles(nothing[0], nothing[1]).any()
    x[0, 0] = np.nan
    assert not fp4_as_fp8(*quantise_fp4(x))[2][0, 0]


@pytest.mark.reference
@pytest.mark.parametrize("tile", [(1, 32), (1, 64), (1, 128), TILE], ids=str)
def test_torch_rounds_the_same(tile):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((256, 512)) * 2.0 ** rng.integers(-12, 12, (256, 1))).astype(np.float32)
    x[3], x[4, :] = 0, 1e-6
    blocks = torch.from_numpy(x).reshape(256 // tile[0], tile[0], 512 // tile[1], tile[1])
    amax = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4)
    scales = torch.exp2(torch.ceil(torch.log2(amax.double() / 448))).float().to(torch.float8_e8m0fnu)
    theirs = (blocks / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales.float()
    np.testing.assert_array_equal(Rounding("fp8", tile)(x), theirs.reshape(256, 512).numpy())


@pytest.mark.reference
def test_torch_means_the_same_by_every_byte():
    """Torch has no cast of its FP4: transformers, which reads FP4 releases, has a table."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes, theirs = np.arange(256, dtype=np.uint8), torch.arange(256, dtype=torch.uint8)
    numbers = theirs.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(codes.view(FP8).astype(np.float32), numbers)
    scales = theirs.view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(scales_as_float(codes.view(SCALE)), scales)
    undo = transformers.Fp8Dequantize.__new__(transformers.Fp8Dequantize)
    for dtype in (torch.int8, torch.float4_e2m1fn_x2):
        pairs = undo._unpack_fp4(theirs[:, None].view(dtype).view(torch.int8)).numpy()
        np.testing.assert_array_equal(bits(unpack_fp4(codes[:, None])), bits(pairs))


@pytest.mark.reference
def test_torch_casts_every_number_and_every_tie_the_same():
    torch = pytest.importorskip("torch")
    x = every_number(TILES["fp8 activations"])
    blocks = np.full((len(x), 2), 448, np.float32)
    blocks[:, 0] = x
    ours = np.asarray(Rounding("fp8", (1, 128))(blocks))[:, 0]
    np.testing.assert_array_equal(bits(ours), bits(torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()))
