"""`dsv4 info`: what an architecture is, from its configuration alone; nothing is allocated and JAX is not imported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from dsv4_jax.analysis import count
from dsv4_jax.analysis.memory import CachePlan, cache_plan
from dsv4_jax.config import ConfigError, DeepseekV4Config
from dsv4_jax.config_json import config_from_json
from dsv4_jax.errors import UserError
from dsv4_jax.presets import PRESETS, article_plan, preset

DESCRIPTION = """Print the layer plan, exact total and activated parameters per component, and the cache size.

Examples:
  dsv4 info v4-pro
  dsv4 info nano --csa-per-hca 3
  dsv4 info v4-pro --context 1M --agents 10
  dsv4 info path/to/config.json
  dsv4 info path/to/model-folder"""


@dataclass(frozen=True)
class Info:
    """Arguments of `dsv4 info`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A preset (v4-pro, v4-flash, nano, mini, small), a config.json, or a folder that holds one."""
    csa_per_hca: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Show the article's layer plan with this many CSA layers per HCA layer instead of the model's own."""
    context: Annotated[str | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Also show what the cache of a document of so many tokens weighs, in the deployed format: a number, 128K or 1M."""
    agents: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")] = (1, 10, 100)
    """With --context: numbers of agents that share the document."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments` and print."""
    asked = tyro.cli(Info, args=list(arguments), prog="dsv4 info", description=DESCRIPTION)
    config = find_config(asked.model)
    if asked.csa_per_hca is not None:
        config = article_plan(config, asked.csa_per_hca)
    show(asked.model, config, Console())
    if asked.context is not None:
        if min(asked.agents, default=1) < 1:
            raise ConfigError("--agents are numbers from 1 on")
        show_agents(cache_plan(config), parse_tokens(asked.context), asked.agents, Console())


def parse_tokens(text: str) -> int:
    """`1M` as 1,048,576, `128K` as 131,072, `200_000` and `200000` as they are.

    Raises:
        UserError: for anything else, and for 0.
    """
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kKmM]?)", text.strip())
    number = float(re.sub("[_,]", "", found[1])) * 1024 ** " KM".index(found[2].upper() or " ") if found else 0.0
    if number < 1 or number % 1:
        raise UserError(f"--context {text!r} is no number of tokens: write 200000, 128K (x 1,024) or 1M (x 1,048,576)")
    return int(number)


def find_config(model: str) -> DeepseekV4Config:
    """The configuration of a preset, a config.json, or a folder that holds one; of a run also by its `checkpoints`.

    Raises:
        ConfigError: when it is none of these, or the file is wrong.
    """
    if model in PRESETS:
        return preset(model)
    if (place := Path(model)).exists():
        run = place.resolve().parent
        is_inside_a_run = not (place / "config.json").exists() and (run / "recipe.json").is_file()
        return config_from_json(run if place.is_dir() and is_inside_a_run else place)
    try:
        return preset(model)
    except ConfigError as error:
        raise ConfigError(f"{model!r} is no file or folder, and {error}") from None


def show(name: str, config: DeepseekV4Config, console: Console) -> None:
    """Print everything about `config`."""
    console.print(f"[bold]{name}[/bold]", highlight=False)
    facts = Table.grid(padding=(0, 2))
    for row in describe(config):
        facts.add_row(*row)
    console.print(facts)
    console.print(parameter_table(config))
    rule = count.COUNTED.format(
        k=config.num_experts_per_tok, experts=config.n_routed_experts, rows=f"{config.vocab_size:,}"
    )
    console.print(f"[dim]{rule}[/dim]", highlight=False)


def describe(config: DeepseekV4Config) -> Iterator[tuple[str, str]]:
    """Name and value of what is not a parameter count."""
    c = config
    layers = ", ".join(map(str, c.segments))
    yield "layers", f"{c.num_hidden_layers}: {layers}" + (f"; MTP: {c.mtp_layers[0]}" if c.mtp_layers else "")
    yield "width", f"{c.hidden_size} in {c.hc_mult} streams, {c.num_attention_heads} heads of {c.head_dim}"
    yield "attention", f"window {c.sliding_window}" + (f", {c.index_topk} chosen CSA entries" if c.has_indexer else "")
    experts = f"{c.n_routed_experts} of width {c.moe_intermediate_size}, {c.num_experts_per_tok} per token"
    yield "experts", f"{experts}, {c.n_shared_experts} shared"
    yield "context", f"{c.max_position_embeddings:,} tokens"
    grows, window = count.cache_elements_per_token(c), count.window_elements(c)
    yield "cache", f"{2 * grows:,.0f} bytes per token and {2 * window:,} for the windows of a sequence, in bf16"
    if entries := count.table_entries(c):
        yield "hash tables", f"{entries:,} integers"


def parameter_table(config: DeepseekV4Config) -> Table:
    """Total and activated parameters per component, and their sums with and without the MTP module."""
    table = Table("component", title="parameters", title_justify="left")
    table.add_column("total", justify="right")
    table.add_column("activated", justify="right")
    components = count.count_parameters(config)
    for part in components:
        table.add_row(part.name, f"{part.total:,}", f"{part.activated:,}")
    table.add_section()
    total, activated = sum(part.total for part in components), sum(part.activated for part in components)
    mtp = sum(part.total for part in components if part.name == "MTP")
    if mtp:
        table.add_row("main stack", short(total - mtp), short(activated))
    table.add_row("[bold]all", f"[bold]{total:,}", f"[bold]{activated:,}")
    return table


def show_agents(plan: CachePlan, tokens: int, agents: Sequence[int], console: Console) -> None:
    """Print what agents over one document weigh together, against a copy of the document for each."""
    console.print(
        f"a document of {tokens:,} tokens: {weight(plan.blocks(tokens) * plan.block)} of blocks once, "
        f"{weight(plan.state)} of state per agent ({weight(plan.windows)} windows, {weight(plan.tails)} tails)",
        highlight=False,
    )
    table = Table("agents")
    for name in ("sharing it", "with private copies", "ratio"):
        table.add_column(name, justify="right")
    for number in agents:
        shared, private = plan.shared(tokens, number), number * plan.sequence(tokens)
        table.add_row(str(number), weight(shared), weight(private), f"{private / shared:.1f}")
    console.print(table)


def weight(size: int) -> str:
    """Bytes in decimal units: 5.27 GB, 23.3 MB."""
    return next(
        (f"{size / unit:.3g} {name}" for name, unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if size >= unit),
        f"{size:,} bytes",
    )


def short(number: int) -> str:
    """Three digits and a unit: 284B, 1.57T, 19.6M."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.{max(0, 3 - len(str(number // size)))}f}{unit}"
    return str(number)
