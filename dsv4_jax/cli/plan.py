"""`dsv4 plan`: memory, FLOPs, accelerators and costs of a deployment, by arithmetic; JAX is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv4_jax.analysis import claims
from dsv4_jax.analysis.baselines import gqa_serving, v32_serving
from dsv4_jax.analysis.flops import IN_FP8
from dsv4_jax.analysis.hardware import Hardware, hardware
from dsv4_jax.analysis.memory import cache_parts
from dsv4_jax.analysis.serving import Serving, v4_serving
from dsv4_jax.analysis.sizing import HOURS_PER_MONTH, Bounds, Prices, decode_bounds, fit
from dsv4_jax.analysis.weight_bytes import WEIGHTS, Weights, check_weights, weight_parts
from dsv4_jax.cli.info import find_config, parse_tokens, short, weight
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError

DESCRIPTION = """Answer in a second, without compiling: KV cache, weights, single-token FLOPs, memory of agents over one
document, accelerators, bounds of tokens per second, break-even; beside DeepSeek-V3.2 and a BF16 GQA-8 baseline.

Examples:
  dsv4 plan v4-pro
  dsv4 plan v4-pro --context 1M --batch 8 --agents 10 --hardware h200
  dsv4 plan v4-flash --context 128K --batch 64 --hardware tpu7x --weights fp8
  dsv4 plan v4-flash --price-api 0.5 --price-hour 3
  dsv4 plan v4-pro --price-api 2 --price-chip 35000 --price-hour 0.4 --price-month 20000
  dsv4 plan path/to/config.json"""


@dataclass(frozen=True)
class Plan:
    """Arguments of `dsv4 plan`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """A preset (v4-pro, v4-flash, nano, mini, small), a config.json, or a folder that holds one."""
    context: Annotated[str, tyro.conf.arg(metavar="TOKENS")] = "1M"
    """Tokens of each sequence: a number, or 128K (x 1,024) or 1M (x 1,048,576)."""
    batch: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Sequences that are decoded at a time and share nothing."""
    agents: Annotated[int, tyro.conf.arg(metavar="N")] = 10
    """Sequences that share one document of --context tokens."""
    hardware: Annotated[str, tyro.conf.arg(metavar="NAME")] = "h200"
    """h100, h200, b200, v5e, v5p, v6e or tpu7x."""
    weights: Annotated[str, tyro.conf.arg(metavar="FORMAT")] = "released"
    """released (FP4 experts, FP8 projections), fp8 or bf16."""
    cache: Annotated[str, tyro.conf.arg(metavar="FORMAT")] = "deployed"
    """deployed (FP8 entries, FP4 indexer keys), bfloat16 or float32."""
    reserve: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.1
    """Share of each accelerator's memory that is kept free for activations and buffers."""
    price_api: Annotated[float, tyro.conf.arg(metavar="PRICE")] = 0.0
    """What an API takes for a million tokens, input and output as you mix them."""
    price_chip: Annotated[float, tyro.conf.arg(metavar="PRICE")] = 0.0
    """What one accelerator costs with its share of host and network, when it is bought."""
    price_months: Annotated[float, tyro.conf.arg(metavar="MONTHS")] = 36.0
    """Months over which --price-chip is written off."""
    price_hour: Annotated[float, tyro.conf.arg(metavar="PRICE")] = 0.0
    """Rent of one accelerator per hour; power and housing when it is bought."""
    price_month: Annotated[float, tyro.conf.arg(metavar="PRICE")] = 0.0
    """Everything else in a month: people, support."""


@dataclass(frozen=True)
class Deployment:
    """What was asked, checked, and what follows from it."""

    name: str
    config: DeepseekV4Config
    context: int
    asked: Plan
    chip: Hardware
    prices: Prices

    @cached_property
    def own(self) -> Serving:
        """The model itself."""
        return self.served(check_weights(self.asked.weights))

    @cached_property
    def models(self) -> tuple[Serving, Serving, Serving]:
        """The model, V3.2 and GQA-8, with weights of the same kind."""
        weights = check_weights(self.asked.weights)
        return self.own, v32_serving(self.context, weights), gqa_serving(self.config, self.context, weights)

    def served(self, weights: Weights) -> Serving:
        """The model with weights of another kind."""
        return v4_serving(self.config, self.context, weights, self.asked.cache, self.name, self.chip.in_words)

    def chips(self, serving: Serving) -> int:
        """Chips of the whole hosts that hold weights and caches of the batch."""
        wanted = fit(serving.resident(self.asked.batch), self.chip, self.asked.reserve)
        return wanted.hosts * self.chip.chips_per_host

    def bounds(self, serving: Serving, batch: int) -> Bounds:
        """Of decoding `batch` sequences on `chips`."""
        return decode_bounds(serving, batch, self.chips(serving), self.chip)


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments` and print."""
    asked = tyro.cli(Plan, args=list(arguments), prog="dsv4 plan", description=DESCRIPTION)
    show(check(asked), Console())


def check(asked: Plan) -> Deployment:
    """The deployment that `asked` describes.

    Raises:
        UserError: for whatever cannot be met, with what can.
    """
    context = parse_tokens(asked.context)
    if min(asked.batch, asked.agents) < 1:
        raise UserError(f"--batch {asked.batch} and --agents {asked.agents}: numbers from 1 on are needed")
    if not 0 <= asked.reserve < 1:
        raise UserError(f"--reserve is {asked.reserve:g}: a share from 0 to below 1 is needed")
    check_weights(asked.weights)
    prices = Prices(asked.price_api, asked.price_chip, asked.price_months, asked.price_hour, asked.price_month)
    return Deployment(asked.model, find_config(asked.model), context, asked, hardware(asked.hardware), prices)


def show(plan: Deployment, console: Console) -> None:
    """Print everything."""
    asked, chip = plan.asked, plan.chip
    console.print(
        f"[bold]{escape(plan.name)}[/bold]: {plan.context:,} tokens of context, batch {asked.batch}, {asked.agents} "
        f"agents on one document, {asked.weights} weights, {asked.cache} cache\n{chip.name}: "
        f"{weight(int(chip.hbm_bytes))}, {chip.hbm_bandwidth / 1e12:.3g} TB/s, {chip.bf16_flops / 1e12:,.0f} TFLOP/s "
        f"in BF16, {chip.fp8_flops / 1e12:,.0f} in FP8, {chip.chips_per_host} per host",
        highlight=False,
    )
    console.print(answer(plan), highlight=False)
    if plan.context > plan.config.max_position_embeddings:
        most = plan.config.max_position_embeddings
        console.print(f"[yellow]the model was made for {most:,} tokens at most[/yellow]", highlight=False)
    for table in (cache_table, weight_table, flops_table, comparison_table, accelerator_table):
        console.print(table(plan))
    show_claims(plan, console)
    console.print(
        "\n[bold]assumptions[/bold]", *(f"- {line}" for line in claims.ASSUMPTIONS), sep="\n", highlight=False
    )


def answer(plan: Deployment) -> str:
    """What most people ask: how many machines, and how fast they can be at most."""
    asked, chip = plan.asked, plan.chip
    serving = plan.own
    wanted, bounds = fit(serving.resident(asked.batch), chip, asked.reserve), plan.bounds(serving, asked.batch)
    bound = "memory" if bounds.memory > bounds.compute else "compute"
    return (
        f"[bold]weights and caches need {weight(int(wanted.bytes))}: {wanted.chips:,} x {chip.name} ({wanted.hosts:,} "
        f"host{'s' * (wanted.hosts > 1)}); at most {bounds.tokens:,.0f} tokens/s, bound by {bound}[/bold]"
    )


def cache_table(plan: Deployment) -> Table:
    """One sequence's cache by component and format."""
    title = "KV cache of one sequence" + ", blocks as rows of 128 words" * plan.chip.in_words
    table = _table(title, "component", "format", "number", "bytes", "read per token")
    parts = cache_parts(plan.config, plan.context, plan.asked.cache, plan.chip.in_words)
    for part in sorted(parts, key=lambda part: -part.bytes):
        table.add_row(part.name, part.format, f"{part.count:,}", weight(part.bytes), weight(int(part.read)))
    return _sum(table, "", "", weight(sum(part.bytes for part in parts)), weight(int(plan.own.read)))


def weight_table(plan: Deployment) -> Table:
    """Weights by component and format."""
    weights = check_weights(plan.asked.weights)
    table = _table(f"weights, {weights}", "component", "format", "numbers", "bytes")
    parts = weight_parts(plan.config, weights)
    for part in parts:
        table.add_row(part.component, part.format, short(part.numbers), weight(part.bytes))
    return _sum(table, "", short(sum(part.numbers for part in parts)), weight(sum(part.bytes for part in parts)))


def flops_table(plan: Deployment) -> Table:
    """One token's FLOPs by component and operand."""
    table = _table("one token's GFLOP", "component", "multiplied as", "GFLOP", "as FP8", "share")
    for product in plan.own.products:
        share = f"{product.in_fp8 / plan.own.flops:.1%}"
        operand = f"{product.operand} (x{IN_FP8[product.operand]:g})"
        table.add_row(product.component, operand, f"{product.flops / 1e9:,.2f}", f"{product.in_fp8 / 1e9:,.2f}", share)
    total = sum(product.flops for product in plan.own.products) / 1e9
    return _sum(table, "", f"{total:,.2f}", f"{plan.own.flops / 1e9:,.2f}", "")


def comparison_table(plan: Deployment) -> Table:
    """The model beside its baselines."""
    batch, agents = plan.asked.batch, plan.asked.agents
    own, v32, gqa = plan.models
    table = _table(
        f"compared ({plan.asked.weights} weights)", "", own.name, v32.name, gqa.name, f"of {v32.name}", f"of {gqa.name}"
    )

    def row(name: str, values: Iterable[float], form: Callable[[float], str]) -> None:
        mine, *others = values
        table.add_row(name, *map(form, (mine, *others)), *(f"{mine / other:.1%}" for other in others))

    size, count = (lambda x: weight(int(x))), (lambda x: short(int(x)))
    row("parameters", (m.parameters for m in plan.models), count)
    row("activated", (m.activated for m in plan.models), count)
    row("weights", (m.weights for m in plan.models), size)
    row("KV cache of a sequence", (m.sequence for m in plan.models), size)
    row(f"{agents} agents, one document", (m.agents(agents) for m in plan.models), size)
    row(f"{agents} private copies", (agents * m.sequence for m in plan.models), size)
    row("GFLOP per token, as FP8", (m.flops / 1e9 for m in plan.models), lambda x: f"{x:,.1f}")
    row(f"cache read, batch {batch}", (batch * m.read for m in plan.models), size)
    row(f"{plan.chip.name} for batch {batch}", (plan.chips(m) for m in plan.models), str)
    per_chip = (plan.bounds(m, batch).tokens / plan.chips(m) for m in plan.models)
    row("tokens/s per chip, at most", per_chip, lambda x: f"{x:,.1f}")
    return table


def accelerator_table(plan: Deployment) -> Table:
    """Chips and bounds for each format of the weights."""
    batch, chip, reserve = plan.asked.batch, plan.chip, plan.asked.reserve
    title = f"{chip.name} for weights and {batch} caches, {reserve:.0%} kept free; tokens per second on whole hosts"
    table = _table(title, "weights", "needed", "chips", "hosts", "memory", "compute", "per sequence", "batch 1")
    for weights in WEIGHTS:
        serving = plan.served(weights)
        wanted = fit(serving.resident(batch), chip, reserve)
        many, one = plan.bounds(serving, batch), plan.bounds(serving, 1)
        bounds = (batch / many.memory, batch / many.compute, 1 / many.seconds, one.tokens)
        texts = [weight(int(wanted.bytes)), f"{wanted.chips:,}", f"{wanted.hosts:,}", *(f"{x:,.0f}" for x in bounds)]
        table.add_row(weights, *texts)
    return table


def show_claims(plan: Deployment, console: Console) -> None:
    """The report's ratios and the article's questions, with the arithmetic."""
    asked, own = plan.asked, plan.own
    found = list(claims.report_claims(plan.config, plan.context))
    found += claims.article_claims(plan.config, plan.context, asked.batch, asked.agents)
    capacity = plan.bounds(own, asked.batch).tokens * HOURS_PER_MONTH * 3600
    costs = list(claims.break_even_claims(plan.prices, plan.chips(own), capacity))
    for claim in found + costs:
        verdict = {True: "[green]agrees[/green]", False: "[red]differs[/red]", None: "[dim]-[/dim]"}[claim.agrees]
        console.print(f"\n{claim.source}: {claim.said}: {verdict}\n  {claim.computed}", highlight=False)
    if not costs:
        text = "break-even: give --price-api and --price-hour (rent), or --price-chip (purchase) and --price-month"
        console.print(f"\n[dim]{text}[/dim]", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    words = {"", "component", "format", "weights", "multiplied as"}
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right")
    return table


def _sum(table: Table, *cells: str) -> Table:
    table.add_section()
    table.add_row("[bold]all", *cells)
    return table
