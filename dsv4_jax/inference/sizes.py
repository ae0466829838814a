"""Sizes rounded up, so that few are ever compiled."""

LEAST_CAPACITY = 256  # tokens that a row of a cache has room for


def round_up(size: int, least: int) -> int:
    """The next power of two, from 8,192 on at most a quarter more: few sizes, little waste."""
    size = max(size, least)
    step = 1 << (size - 1).bit_length() if size <= 8192 else 1 << (size.bit_length() - 3)
    return -(-size // step) * step
