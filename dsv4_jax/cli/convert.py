"""`dsv4 convert`: checkpoints from one form to another, and the inventory of a release that is not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv4_jax.checkpoint.names import Scheme
from dsv4_jax.checkpoint.storage import Quantise, count_dtypes, inventory, stored_as, total_bytes
from dsv4_jax.cli.info import find_config, short
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import has_dspark, read_json
from dsv4_jax.errors import UserError, check_writable

DESCRIPTION = """Write a checkpoint in another naming scheme or format, matrix by matrix: memory is one matrix.

Examples:
  dsv4 convert runs/nano exported
  dsv4 convert runs/nano exported --scheme transformers --dtype bfloat16
  dsv4 convert path/to/release plain --dtype bfloat16
  dsv4 convert runs/nano release --quantize v4
  dsv4 convert path/to/finetuned release --quantise release
  dsv4 convert --dry-run v4-flash
  dsv4 convert --dry-run v4-pro --against model.safetensors.index.json"""


@dataclass(frozen=True)
class Convert:
    """Arguments of `dsv4 convert`."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A folder of config.json and safetensors, or a run of `dsv4 train`; for a dry run also a preset or config.json."""
    out: Annotated[str | None, tyro.conf.Positional] = None
    """The folder to write; it must not hold a model yet."""
    scheme: Scheme = "released"
    """Names of the tensors."""
    quantise: Annotated[Quantise, tyro.conf.arg(aliases=["--quantize"])] = "none"
    """v4: matrices in FP8, routed experts in FP4, the rest in bfloat16; fp8: experts in FP8 too, as in base models;
    release: as the source's config.json says, v4 where it says nothing."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of what is not quantised; by default as it is, and torch_dtype for what was quantised."""
    step: int | None = None
    """Of a run: the checkpoint of this step; the newest good one by default."""
    dry_run: bool = False
    """List every tensor, from the configuration alone, and write nothing."""
    against: str | None = None
    """With --dry-run: a model.safetensors.index.json to compare with; shards beside it are checked too."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments`; list, compare or convert."""
    asked = tyro.cli(Convert, args=list(arguments), prog="dsv4 convert", description=DESCRIPTION)
    if asked.against is not None and not asked.dry_run:
        raise UserError("--against compares and writes nothing: give --dry-run with it")
    if asked.dry_run:
        dry_run(asked)
    elif asked.out is None:
        raise UserError("where to? give a folder to write, or --dry-run to list tensors")
    else:
        write(asked, Path(asked.out).expanduser())


def dry_run(asked: Convert) -> None:
    """Print the inventory, or how it differs from an index.

    Raises:
        UserError: when it differs, with what is missing, extra and misshapen.
    """
    config = find_config(asked.checkpoint)
    config = config if asked.quantise == "none" else stored_as(config, asked.quantise)
    config = config.replace(torch_dtype=asked.dtype) if asked.dtype else config
    if asked.against is not None:
        return _compare(
            config, asked.against, Path(asked.checkpoint).exists() and has_dspark(read_json(asked.checkpoint))
        )
    specs = inventory(config, asked.scheme)
    for name, spec in specs.items():
        print(f"{name}  {spec}")
    print(f"{len(specs):,} tensors, {total_bytes(specs):,} bytes")
    print(", ".join(f"{dtype} {count:,}" for dtype, count in sorted(count_dtypes(specs).items())))


def write(asked: Convert, out: Path) -> None:
    """Convert to the folder `out`; says what was written.

    Raises:
        FileExistsError: when there are files in it: what is there would pass for a part of the model.
    """
    check_writable(out)
    if out.exists() and (there := sorted(path.name for path in out.iterdir())):
        named = ", ".join(there[:3]) + ", ..." * (len(there) > 3)
        raise FileExistsError(f"{out} holds {named}: choose a new folder, nothing is overwritten")
    from dsv4_jax.checkpoint import convert, save

    source = Path(asked.checkpoint).expanduser()
    if source.is_dir() and (any(source.glob("*.safetensors")) or any(source.glob("*.safetensors.index.json"))):
        convert(source, out, asked.scheme, asked.quantise, dtype=asked.dtype)
    else:
        import jax

        from dsv4_jax.api import load
        from dsv4_jax.shapes import flatten, is_table, keeps_float32, nest

        model = load(source, step=asked.step)
        params = model.params
        if asked.dtype is not None:
            leaves = flatten(params)
            kept = {path: is_table(path) or keeps_float32(path) for path in leaves}
            params = nest({p: x if kept[p] else jax.numpy.asarray(x, asked.dtype) for p, x in leaves.items()})
        save(out, model.config, params, asked.scheme, asked.quantise, tokenizer=model.tokenizer)
    files = sorted(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(
        f"{out}: {', '.join(file.name for file in files[:6])}{', ...' if len(files) > 6 else ''}; {short(size)} bytes"
    )


def _compare(config: DeepseekV4Config, index: str, dspark: bool) -> None:
    from dsv4_jax.checkpoint.comparing import compare

    result = compare(config, index, dspark)
    text = "\n  ".join(result.lines())
    if not result.fits:
        raise UserError(f"{index} differs from the configuration:\n  {text}")
    print(f"{index} is what the configuration says:\n  {text}")
