"""`dsv4 compile`: compile the real step for a machine that is not here, and say what it needs and moves."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dsv4_jax.cli.info import find_config, parse_tokens
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError, how_to_install

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from sharding.aot import Program, Report
    from sharding.rules import Strategy
    from sharding.targets import Target

DESCRIPTION = f"""Compile the real step with the real compiler for TPU slices and GPU clusters that are not here: libtpu
for TPUs, the CUDA plugin for GPUs. To have both: {how_to_install("aot")}.
Prints, per chip: memory and whether it fits, FLOPs, bytes of each collective by mesh axis, bounds of the step's time,
and what to change first if it does not fit.

Examples:
  dsv4 compile nano --target v5e:2x4 --batch 16 --seq 512
  dsv4 compile v4-flash --target v5p:4x8x8 --mesh expert=64,fsdp=4 --batch 256 --seq 4K
  dsv4 compile v4-flash --target h200:1x8 --mode decode --batch 8 --seq 1M
  dsv4 compile v4-flash --target v5e:8x8 --mode decode --batch 64 --seq 128K --weights packed
  dsv4 compile v4-pro --target tpu7x:8x8x8 --mode prefill --batch 64 --seq 128K --chunk 4096
  dsv4 compile v4-flash --target h200:32x8 --strategy fsdp --batch 256 --seq 4K --json"""


@dataclass(frozen=True)
class Compile:
    """Arguments of `dsv4 compile`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """A preset (v4-pro, v4-flash, nano, mini, small), a config.json, or a folder that holds one."""
    target: Annotated[str, tyro.conf.arg(metavar="CHIP:SHAPE")]
    """v5e:16x16, v5p:8x8x16, v6e:16x16 or tpu7x:4x4x4 (chips along each axis), h100:1x8, h200:2x8 or b200:2x8 (hosts x
    GPUs per host)."""
    strategy: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """one, data, fsdp, expert-fsdp, expert-tensor, expert-data or long-context; by default expert-fsdp to train and
    expert-tensor otherwise."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="AXES")] = None
    """For example expert=64,fsdp=4; one size may be -1. By default as many devices on the strategy's axis as fit."""
    mode: Literal["train", "prefill", "decode"] = "train"
    """An optimizer step, a chunk of a prompt, or one token of every sequence."""
    batch: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Sequences over all devices."""
    seq: Annotated[str, tyro.conf.arg(metavar="TOKENS")] = "4K"
    """Tokens of a row, or of room in the cache: a number, 128K (x 1,024) or 1M (x 1,048,576)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of matrix products, and of weights outside training, whose masters are always float32."""
    weights: Literal["plain", "packed"] = "plain"
    """Of inference: packed keeps FP8 and FP4 as a release stores them (FP4 experts), undone a part at a time."""
    cache: Literal["deployed", "bfloat16", "float32"] = "deployed"
    """Format of the cache: deployed is FP8 with FP4 indexer keys."""
    chunk: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 4096
    """Tokens that a prefill step reads of each prompt."""
    kind: Literal["dense", "indexer_warmup", "sparse"] = "sparse"
    """Stage of training."""
    microbatches: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Parts of a training batch that are computed one after another."""
    remat: Literal["block", "none"] = "block"
    """In training, whether activations of a block are recomputed in the backward pass."""
    policy: str = "none"
    """Of training: what is rounded to FP8 and FP4, none, fp8, v4, or one of these with changes (v4,kv_entry=none)."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments`, compile, and print."""
    asked = tyro.cli(Compile, args=list(arguments), prog="dsv4 compile", description=DESCRIPTION)
    from sharding.aot import compile_for

    with progress() as say:
        say("finding the compiler")
        program, target, mesh = check(asked)
        found = compile_for(program, target, mesh, say)
    show(asked, found, Console())


def check(asked: Compile) -> tuple[Program, Target, Mesh]:
    """The program that `asked` describes, and the machine; everything that can be refused is refused here.

    Raises:
        UserError: for whatever cannot be met, with what can.
    """
    config = find_config(asked.model)
    length = _tokens(asked)
    if min(asked.batch, asked.chunk, asked.microbatches) < 1:
        raise UserError("--batch, --chunk and --microbatches are numbers from 1 on")
    if asked.batch % asked.microbatches:
        raise UserError(f"--microbatches {asked.microbatches} does not divide --batch {asked.batch}")
    if asked.mode == "train" and asked.weights == "packed":
        raise UserError("training moves float32 masters: --weights packed is for --mode prefill and decode")
    if asked.mode != "train" and asked.policy != "none":
        raise UserError("--policy rounds what is trained: it is for --mode train")
    from dsv4_jax.quantization.policy import precision_policy
    from sharding.targets import parse_target, prepare

    precision_policy(asked.policy, config)
    target = parse_target(asked.target)
    prepare()
    from sharding.rules import find_strategy

    strategy = find_strategy(asked.strategy or ("expert-fsdp" if asked.mode == "train" else "expert-tensor"))
    mesh = find_mesh(asked, config, strategy, target)
    return make_program(asked, config, strategy, mesh, length), target, mesh


def _tokens(asked: Compile) -> int:
    try:
        return parse_tokens(asked.seq)
    except UserError as error:
        raise UserError(str(error).replace("--context", "--seq")) from None


def find_mesh(asked: Compile, config: DeepseekV4Config, strategy: Strategy, target: Target) -> Mesh:
    """The mesh that was asked for, or the first of `default_meshes` that the machine's wiring allows."""
    from sharding.mesh import first_mesh, parse_mesh
    from sharding.rules import check_axes, default_meshes

    devices = target.devices()
    texts = [asked.mesh] if asked.mesh else default_meshes(config, strategy, len(devices))
    for text in texts:
        check_axes(strategy, parse_mesh(text, len(devices)))
    if (mesh := first_mesh(texts, devices)) is not None:
        return mesh
    raise UserError(
        f"mesh {texts[0]!r} does not lie on {target.text}: each of its axes must be a product of the slice's axes. "
        "Choose other sizes with --mesh, or another slice"
    )


def make_program(asked: Compile, config: DeepseekV4Config, strategy: Strategy, mesh: Mesh, length: int) -> Program:
    """The program of a mode, after checking that everything divides."""
    from dsv4_jax import weights
    from dsv4_jax.cli import compile_programs as programs
    from sharding.partition import MeshPartition
    from sharding.rules import check_fit

    rows = asked.batch // asked.microbatches
    tokens = {"train": length, "prefill": min(asked.chunk, length), "decode": 0}[asked.mode]
    check_fit(weights.facts(config), weights.shapes(config), strategy, mesh, rows, tokens)
    partition = MeshPartition(mesh, strategy)
    setting = programs.Setting(config, mesh, strategy, partition, asked.batch, length, asked.dtype, asked.weights)
    if asked.mode == "train":
        return programs.train_program(setting, asked.kind, asked.remat == "block", asked.microbatches, asked.policy)
    if asked.mode == "prefill":
        return programs.prefill_program(setting, asked.cache, asked.chunk)
    return programs.decode_program(setting, asked.cache)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done and for how long; plain lines where stderr is no terminal."""
    if not sys.stderr.isatty():
        started = time.monotonic()
        yield lambda what: print(f"{time.monotonic() - started:6.1f} s  {what}", file=sys.stderr, flush=True)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what: bar.update(task, description=what)


def show(asked: Compile, found: Report, console: Console) -> None:
    """Print the report, as tables or as JSON."""
    from dsv4_jax.cli import compile_report

    if asked.json:
        print(json.dumps(compile_report.as_json(found), indent=2))
    else:
        compile_report.show(asked.model, found, console)
