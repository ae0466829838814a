"""`dsv4 convert`: checkpoints from one form to another, and the inventory of a release that is not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dsv4_jax.checkpoint.names import Scheme
from dsv4_jax.checkpoint.storage import Quantise, Spec, count_dtypes, inventory, stored_as, total_bytes
from dsv4_jax.cli.info import find_config, short
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import has_dspark, read_json
from dsv4_jax.errors import UserError, check_writable
from dsv4_jax.paths import local_path

if TYPE_CHECKING:
    from dsv4_jax.api import Model

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
    quantise: Annotated[Quantise | None, tyro.conf.arg(aliases=["--quantize"])] = None
    """none, the default: plain floats; v4: matrices in FP8, routed experts in FP4, the rest in bfloat16; fp8: experts
    in FP8 too, as in base models; release: as the source's config.json says, v4 where it says nothing. A dry run of a
    preset or config.json lists what it says by default."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of plain floats; by default as they are, and torch_dtype for what was quantised."""
    step: int | None = None
    """Of a run: the checkpoint of this step; the newest good one by default."""
    dry_run: bool = False
    """List every tensor that would be written, and write nothing; of a preset or config.json, every tensor it means."""
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
        write(asked, local_path(asked.out))


def dry_run(asked: Convert) -> None:
    """Print the inventory, or how it differs from an index.

    Raises:
        UserError: when it differs, with what is missing, extra and misshapen.
    """
    if asked.against is not None:
        dspark = Path(asked.checkpoint).exists() and has_dspark(read_json(asked.checkpoint))
        return _compare(_described(asked), asked.against, dspark)
    specs = planned(asked, Path(asked.checkpoint).expanduser())
    for name, spec in specs.items():
        print(f"{name}  {spec}")
    print(f"{len(specs):,} tensors, {total_bytes(specs):,} bytes")
    print(", ".join(f"{dtype} {count:,}" for dtype, count in sorted(count_dtypes(specs).items())))


def _described(asked: Convert) -> DeepseekV4Config:
    """The configuration of a checkpoint that is none yet, as it says itself or as it is asked for."""
    from dsv4_jax.checkpoint.exporting import float_dtype

    config, quantise = find_config(asked.checkpoint), asked.quantise
    if quantise is None and asked.dtype is not None:
        quantise = "none"
    config = config if quantise is None else stored_as(config, quantise)
    float_dtype(asked.dtype, quantise or "none")
    return config.replace(torch_dtype=asked.dtype) if asked.dtype else config


def planned(asked: Convert, source: Path) -> dict[str, Spec]:
    """Every tensor that `write` would write; without weights, those that the configuration means."""
    from dsv4_jax.checkpoint.exporting import planned_convert, planned_save

    if not source.is_dir():
        return inventory(_described(asked), asked.scheme)
    if holds_safetensors(asked, source):
        return planned_convert(source, asked.scheme, asked.quantise or "none", asked.dtype)
    if (source / "config.json").is_file() and not (source / "checkpoints").is_dir():
        return inventory(_described(asked), asked.scheme)
    model = _load_run(asked, source)
    return planned_save(model.config, model.params, asked.scheme, asked.quantise or "none", asked.dtype)


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

    source, quantise = local_path(asked.checkpoint), asked.quantise or "none"
    if holds_safetensors(asked, source):
        convert(source, out, asked.scheme, quantise, dtype=asked.dtype)
    else:
        run = _load_run(asked, source)
        save(out, run.config, run.params, asked.scheme, quantise, dtype=asked.dtype, tokenizer=run.tokenizer)
    files = sorted(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(
        f"{out}: {', '.join(file.name for file in files[:6])}{', ...' if len(files) > 6 else ''}; {short(size)} bytes"
    )


def holds_safetensors(asked: Convert, source: Path) -> bool:
    """Whether `source` is a folder of safetensors, which has no steps to ask for."""
    found = source.is_dir() and any(any(source.glob(f"*.safetensors{end}")) for end in ("", ".index.json"))
    if found and asked.step is not None:
        raise UserError(f"--step is for runs of dsv4 train: {source} holds one model")
    return found


def _load_run(asked: Convert, source: Path) -> Model:
    from dsv4_jax.api import load

    return load(source, step=asked.step)


def _compare(config: DeepseekV4Config, index: str, dspark: bool) -> None:
    from dsv4_jax.checkpoint.comparing import compare

    result = compare(config, index, dspark)
    text = "\n  ".join(result.lines())
    if not result.fits:
        raise UserError(f"{index} differs from the configuration:\n  {text}")
    print(f"{index} is what the configuration says:\n  {text}")
