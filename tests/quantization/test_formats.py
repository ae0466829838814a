"""FP8, FP4 and power-of-two scales against ml_dtypes, and against a plain loop over blocks in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.quantization import formats

pytestmark = pytest.mark.optimized

KINDS = [pytest.param(np.asarray, id="numpy"), pytest.param(jnp.asarray, id="jax")]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def hard_numbers(shape, seed=0):
    """Magnitudes over sixty octaves, blocks whose maximum is a power of two or the format's largest, zeros, -0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 30, (*shape[:-1], 1))
    x[..., 0] = rng.choice([2.0, 448.0, 449.0, 224.0, 6.0, 3.0, 1e-30], shape[:-1])
    x[..., 1] = rng.choice([0.0, -0.0], shape[:-1])
    return x.astype(np.float32)


def direct_scale(block, largest):
    """The smallest power of two, not below 2^-126, with which `block` fits, by trying all of them."""
    size = float(np.abs(np.float64(block)).max())
    return next(2.0**p for p in range(-126, 128) if size <= largest * 2.0**p)


def blocks_of(n, block):
    return [slice(i, min(i + block, n)) for i in range(0, n, block)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "block"), [(128, 64), (48, 64), (75, 32), (300, 128)])
def test_fp8_blocks_are_what_ml_dtypes_rounds_under_the_smallest_scale(kind, n, block):
    x = hard_numbers((7, n))
    values, scales = formats.quantise_fp8(kind(x), block)
    assert values.dtype == ml_dtypes.float8_e4m3fn and scales.dtype == ml_dtypes.float8_e8m0fnu
    assert scales.shape == (7, -(-n // block))
    back = np.asarray(formats.dequantise_fp8(values, scales, block))
    for row in range(7):
        for j, part in enumerate(blocks_of(n, block)):
            scale = direct_scale(x[row, part], 448)
            assert float(np.asarray(scales)[row, j]) == scale
            expected = (np.float64(x[row, part]) / scale).astype(ml_dtypes.float8_e4m3fn)
            assert np.asarray(values)[row, part].tobytes() == expected.tobytes()
            np.testing.assert_array_equal(back[row, part], expected.astype(np.float64) * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [64, 48])
def test_fp4_blocks_are_what_ml_dtypes_rounds_with_the_even_element_in_the_low_bits(kind, n):
    x = hard_numbers((9, n), seed=1)
    packed, scales = formats.quantise_fp4(kind(x))
    assert packed.dtype == np.uint8 and packed.shape == (9, n // 2) and scales.shape == (9, -(-n // 32))
    nibbles = np.stack([np.asarray(packed) & 15, np.asarray(packed) >> 4], -1).reshape(9, n)
    back = np.asarray(formats.dequantise_fp4(packed, scales))
    for row in range(9):
        for j, part in enumerate(blocks_of(n, 32)):
            scale = direct_scale(x[row, part], 6)
            assert float(np.asarray(scales)[row, j]) == scale
            expected = (x[row, part] / np.float32(scale)).astype(ml_dtypes.float4_e2m1fn)
            np.testing.assert_array_equal(nibbles[row, part], expected.view(np.uint8) & 15)
            np.testing.assert_array_equal(back[row, part], expected.astype(np.float32) * np.float32(scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(256, 128), (2, 130, 200), (5, 7)])
def test_fp8_tiles_share_one_scale_in_both_directions(kind, shape):
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    x[..., :3, :3] *= 1000
    values, scales = formats.quantise_fp8_tiles(kind(x))
    rows, columns = shape[-2:]
    assert values.shape == shape and scales.shape == (*shape[:-2], -(-rows // 128), -(-columns // 128))
    expected = np.empty(shape)
    for lead in np.ndindex(*shape[:-2]):
        for i, r in enumerate(blocks_of(rows, 128)):
            for j, c in enumerate(blocks_of(columns, 128)):
                scale = direct_scale(x[lead][r, c], 448)
                assert float(np.asarray(scales)[(*lead, i, j)]) == scale
                expected[lead][r, c] = (x[lead][r, c] / scale).astype(ml_dtypes.float8_e4m3fn).astype(float) * scale
    np.testing.assert_array_equal(np.asarray(formats.dequantise_fp8_tiles(values, scales)), expected)


def test_a_part_of_a_matrix_finds_its_tiles():
    values, scales = formats.quantise_fp8_tiles(np.random.default_rng(3).standard_normal((300, 300)) * np.arange(300))
    whole = formats.dequantise_fp8_tiles(values, scales)
    part = formats.dequantise_fp8_tiles(values[130:290, 7:256], scales[1:, :2], start=(2, 7))
    np.testing.assert_array_equal(part, whole[130:290, 7:256])


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_of_e2m1_is_its_number(kind):
    codes = np.arange(256, dtype=np.uint8)
    low = [E2M1[c & 7] * (-1 if c & 8 else 1) for c in range(16)]
    expected = np.float32([[low[byte & 15], low[byte >> 4]] for byte in range(256)])
    for packed in (codes, codes.view(np.int8)):
        found = np.asarray(formats.unpack_fp4(kind(packed[:, None])))
        assert found.tobytes() == expected.tobytes()  # bytes: -0 is not 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_of_e4m3_under_every_scale_is_what_ml_dtypes_says(kind):
    codes, scales = np.arange(256, dtype=np.uint8), np.arange(1, 255, dtype=np.uint8)
    numbers = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = numbers * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[:, None]
    values = np.broadcast_to(codes, (254, 256)).copy().view(ml_dtypes.float8_e4m3fn)
    normal = ~(np.abs(expected) < 2.0**-126) | (expected == 0)  # JAX on this processor has no denormals
    with np.errstate(over="ignore"):
        found = formats.dequantise_fp8(kind(values), kind(scales[:, None].view(ml_dtypes.float8_e8m0fnu)), 256)
        np.testing.assert_array_equal(np.asarray(found)[normal], expected.astype(np.float32)[normal])
    np.testing.assert_array_equal(np.signbit(found)[normal], np.signbit(expected)[normal])
    assert normal.mean() > 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_every_finite_bfloat16_alone_in_its_block_is_what_ml_dtypes_casts(kind):
    x = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[np.isfinite(x) & ((np.abs(x) >= 2.0**-126) | (x == 0))]
    for dtype, largest, quantise in (
        (ml_dtypes.float8_e4m3fn, 448, lambda x: formats.quantise_fp8(x, 1)),
        (ml_dtypes.float4_e2m1fn, 6, lambda x: formats.quantise_fp4(x, 2)),
    ):
        values, scales = quantise(kind(x[:, None] if largest == 448 else np.stack([x, -x], -1)))
        fraction, exponent = np.frexp(np.abs(np.float64(x)) / largest)
        power = np.maximum(np.where(fraction == 0.5, exponent - 1, exponent), -126)  # ceil(log2)
        np.testing.assert_array_equal(np.asarray(scales).view(np.uint8)[:, 0], np.where(x == 0, 1, power + 127))
        expected = (np.float64(x) / 2.0**power).astype(np.float32).astype(dtype).view(np.uint8)
        codes = np.asarray(values).view(np.uint8)[:, 0]
        if largest == 6:
            np.testing.assert_array_equal(codes >> 4, (codes & 15) ^ 8)  # the second is the first's negative
            codes, expected = codes & 15, expected & 15
        np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scale_byte_is_its_power_of_two(kind):
    bytes_ = np.arange(256, dtype=np.uint8)
    found = np.asarray(formats.scales_as_float(kind(bytes_.view(ml_dtypes.float8_e8m0fnu))))
    np.testing.assert_array_equal(found[1:255], 2.0 ** (bytes_[1:255].astype(np.float64) - 127))
    assert np.isnan(found[255]) and found[0] in (0, np.float32(2.0**-127))


@pytest.mark.parametrize("kind", KINDS)
def test_ties_and_neighbours_of_ties_round_to_even(kind):
    """Every midpoint between two neighbouring numbers, and the float32 numbers just beside it."""
    for dtype, largest, quantise in (
        (ml_dtypes.float8_e4m3fn, 448, lambda x: formats.quantise_fp8(x, x.shape[-1])[0]),
        (ml_dtypes.float4_e2m1fn, 6, lambda x: formats.quantise_fp4(x, x.shape[-1])[0]),
    ):
        count = 127 if largest == 448 else 8
        numbers = np.arange(count, dtype=np.uint8).view(dtype).astype(np.float32)
        ties = (numbers[1:] + numbers[:-1]) / 2
        x = np.concatenate([ties, np.nextafter(ties, 0), np.nextafter(ties, 1e9), numbers, [largest, largest]])
        x = np.float32(x)[: len(x) // 2 * 2]
        x[-1] = largest
        expected = x.astype(dtype).view(np.uint8)
        found = np.asarray(quantise(kind(x))).view(np.uint8)
        found = np.stack([found & 15, found >> 4], -1).reshape(-1) if largest == 6 else found
        np.testing.assert_array_equal(found, expected & (15 if largest == 6 else 255))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_was_quantised_once_comes_back_unchanged_and_keeps_its_numbers_ever_after(kind, dtype):
    x = kind(np.random.default_rng(4).standard_normal((64, 256)).astype(np.float32))
    for quantise, dequantise, half in (
        (lambda x: formats.quantise_fp8(x, 64), lambda v, s: formats.dequantise_fp8(v, s, 64, dtype), 224),
        (formats.quantise_fp4, lambda v, s: formats.dequantise_fp4(v, s, dtype=dtype), 3),
        (formats.quantise_fp8_tiles, lambda v, s: formats.dequantise_fp8_tiles(v, s, dtype=dtype), 224),
    ):
        values, scales = quantise(x)
        numbers = dequantise(values, scales)
        assert numbers.dtype == dtype
        values_2, scales_2 = quantise(numbers)
        assert np.asarray(dequantise(values_2, scales_2)).tobytes() == np.asarray(numbers).tobytes()
        # Only blocks whose maximum was rounded down onto half the largest number may take half the scale.
        fell = np.asarray(scales).astype(np.float32) != np.asarray(scales_2).astype(np.float32)
        sizes = {"v": np.asarray(numbers).astype(np.float32), "s": np.asarray(scales).astype(np.float32)}
        per = x.shape[-1] // scales.shape[-1], x.shape[-2] // scales.shape[-2]
        largest = np.abs(sizes["v"]).reshape(scales.shape[0], per[1], -1, per[0]).max((1, 3)) / sizes["s"]
        np.testing.assert_array_equal(fell, largest <= half)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_get_a_finite_scale_and_what_is_not_finite_the_nan_scale(kind):
    x = np.zeros((3, 64), np.float32)
    x[1, 5], x[2, 40] = np.nan, -np.inf
    for values, scales, back in (
        (*formats.quantise_fp8(kind(x), 32), lambda v, s: formats.dequantise_fp8(v, s, 32)),
        (*formats.quantise_fp4(kind(x), 32), formats.dequantise_fp4),
    ):
        codes = np.asarray(scales).view(np.uint8)
        np.testing.assert_array_equal(codes, [[1, 1], [255, 1], [1, 255]])
        np.testing.assert_array_equal(np.isnan(np.asarray(back(values, scales))), np.repeat(codes == 255, 32, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_known_scales_stay_where_they_hold_the_numbers_exactly(kind):
    """A row per case: a half full block, a known scale that is too small, zeros, a number that would be lost, a NaN."""
    x = np.zeros((5, 32), np.float32)
    x[0, :3], x[1, 0], x[3, :2], x[4, 0] = [3, -0.5, -0.0], 6, [3, 0.25], np.nan
    known = np.array([[127], [126], [0], [127], [127]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    packed, scales = formats.quantise_fp4(kind(x), 32, kind(known))
    np.testing.assert_array_equal(np.asarray(scales).view(np.uint8)[:, 0], [127, 127, 0, 126, 255])
    np.testing.assert_array_equal(np.asarray(packed)[0, :2], [5 + 16 * 9, 8])
    values, scales = formats.quantise_fp8_tiles(kind(x[:4] / 64), (1, 32), kind(known[:4]))
    np.testing.assert_array_equal(np.asarray(scales).view(np.uint8)[:, 0], [127, 126, 0, 127])
    np.testing.assert_array_equal(formats.dequantise_fp8_tiles(values, scales, (1, 32)), x[:4] / 64)


def test_an_odd_axis_cannot_be_packed():
    with pytest.raises(ValueError, match="is odd"):
        formats.quantise_fp4(np.zeros((2, 31), np.float32))


def test_inside_jit_the_bytes_are_those_of_numpy():
    x = hard_numbers((16, 128), seed=5)
    for quantise in (lambda x: formats.quantise_fp8(x, 64), formats.quantise_fp4, formats.quantise_fp8_tiles):
        for ours, theirs in zip(jax.jit(quantise)(x), quantise(x), strict=True):
            assert isinstance(theirs, np.ndarray)
            assert np.asarray(ours).tobytes() == theirs.tobytes()
