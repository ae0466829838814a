"""How many accelerators, how many tokens per second at best, and at how many tokens a month owning them pays."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv4_jax.analysis.hardware import Hardware
from dsv4_jax.analysis.serving import Serving
from dsv4_jax.errors import UserError

HOURS_PER_MONTH = 365.25 * 24 / 12


@dataclass(frozen=True)
class Fit:
    """Chips that hold so many bytes, and the hosts they come in."""

    bytes: float
    chips: int
    hosts: int


@dataclass(frozen=True)
class Bounds:
    """What no program can exceed: seconds per step by memory and by arithmetic, of which the longer counts."""

    batch: int
    memory: float
    compute: float

    @property
    def seconds(self) -> float:
        """Seconds per step."""
        return max(self.memory, self.compute)

    @property
    def tokens(self) -> float:
        """Tokens per second of the whole batch."""
        return self.batch / self.seconds


def fit(size: float, chip: Hardware, reserve: float = 0.0) -> Fit:
    """The fewest chips that hold `size` bytes with a share `reserve` of each kept free."""
    chips = max(1, math.ceil(size / (chip.hbm_bytes * (1 - reserve))))
    return Fit(size, chips, math.ceil(chips / chip.chips_per_host))


def decode_bounds(serving: Serving, batch: int, chips: int, chip: Hardware) -> Bounds:
    """Bounds of decoding one token for each of `batch` sequences on `chips` chips that share the work evenly.

    Everything is read once per step, nothing waits for a link, and reading and arithmetic overlap perfectly.
    """
    compute = sum(product.flops / chip.peak(product.operand) for product in serving.products)
    return Bounds(batch, serving.step_bytes(batch) / (chips * chip.hbm_bandwidth), batch * compute / chips)


@dataclass(frozen=True)
class Prices:
    """Prices in one currency.

    Attributes:
        api: of a million tokens, input and output as the workload mixes them.
        chip: of one accelerator with its share of host and network.
        months: over which that is written off.
        hour: of one accelerator's hour: its rent, or power and housing of one that is owned.
        month: of everything else in a month: people, support.
    """

    api: float = 0.0
    chip: float = 0.0
    months: float = 36.0
    hour: float = 0.0
    month: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no price."""
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise UserError(f"the price {name} is {value:g}: a number from 0 on is needed")
        if not self.months:
            raise UserError("hardware is written off over more than 0 months")

    def monthly(self, chips: int) -> float:
        """What `chips` accelerators cost in a month, used or not."""
        return chips * (self.chip / self.months + self.hour * HOURS_PER_MONTH) + self.month

    def break_even(self, chips: int) -> float:
        """Tokens a month whose API price is the month's cost of `chips`.

        Raises:
            UserError: without an API price.
        """
        if not self.api:
            raise UserError("a break-even needs the API's price of a million tokens: give --price-api")
        return self.monthly(chips) / self.api * 1e6
