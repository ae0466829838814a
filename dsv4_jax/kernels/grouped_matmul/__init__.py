"""Rows sorted by expert, times each expert's own matrix: nothing is dropped, nothing is computed densely."""

from dsv4_jax.kernels.grouped_matmul.groups import Groups, collect, make_groups, spread
from dsv4_jax.kernels.grouped_matmul.product import grouped_matmul
from dsv4_jax.kernels.grouped_matmul.stacked import OfStack

__all__ = ["Groups", "OfStack", "collect", "grouped_matmul", "make_groups", "spread"]
