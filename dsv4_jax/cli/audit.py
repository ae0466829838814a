"""`dsv4 audit`: one page that shows what a model did with a text and why."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dsv4_jax.errors import UserError, check_writable
from dsv4_jax.paths import local_path

if TYPE_CHECKING:
    from dsv4_jax.api import Model

DESCRIPTION = """Write one HTML page about what a model does with a text: where each layer looked, which experts it
used, how well the indexer chooses, how the residual streams mix. The page needs no network.

Examples:
  dsv4 audit runs/nano
  dsv4 audit runs/nano --text dsv4_jax/model.py --out model-py.html
  dsv4 audit path/to/model-folder --text a.txt --text b.txt --tokens 1024
  dsv4 audit runs/nano --policy v4 --force
  dsv4 audit path/to/folder-without-tokenizer --text ids.txt

The first text can be read token by token; load and recall are over all of them."""


@dataclass(frozen=True)
class Audit:
    """Arguments of `dsv4 audit`."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A run folder of `dsv4 train`, its `checkpoints` folder, or a folder of config.json and safetensors."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text file; may be given several times. Without a tokenizer: a file of token ids. By default held-out documents
    of the run."""
    out: str = "audit.html"
    """The page."""
    tokens: int = 512
    """At most so many tokens of each text; below 4 x index_topk the indexer has nothing to choose."""
    documents: int = 8
    """Without --text: so many held-out documents."""
    policy: str = "none"
    """A precision policy to run under and to measure: none, fp8, v4, or one with changes (docs/precision.md)."""
    step: int | None = None
    """Of a run: the checkpoint of this step; the newest good one by default."""
    tokenizer: str | None = None
    """bytes, deepseek, or a tokenizer.json; what lies beside the checkpoint by default."""
    cache: str | None = None
    """Where the run's token files are kept; the user's cache folder by default."""
    force: bool = False
    """Replace a page that is already there."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments`, trace and write."""
    asked = tyro.cli(Audit, args=list(arguments), prog="dsv4 audit", description=DESCRIPTION)
    out = local_path(asked.out)
    if out.exists() and not asked.force:
        raise FileExistsError(f"{out} is already there: name another page with --out, or replace it with --force")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write the page in")
    check_writable(out.parent)
    if asked.tokens < 2 or asked.documents < 1:
        raise UserError("--tokens is a number from 2 on, --documents from 1 on")
    for file in asked.text:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file}")
    write(asked, out)


def write(asked: Audit, out: Path) -> None:
    """Load the model and its texts, trace them and write the page."""
    from dsv4_jax.analysis.audit import audit
    from dsv4_jax.analysis.audit_page import render
    from dsv4_jax.api import Model, load
    from dsv4_jax.quantization.policy import precision_policy
    from dsv4_jax.tokenizer import load_tokenizer
    from train.loop import use_compilation_cache

    use_compilation_cache()
    tokenizer = load_tokenizer(asked.tokenizer) if asked.tokenizer else None
    model = load(asked.checkpoint, step=asked.step)
    if tokenizer is not None:
        model = Model(model.config, model.params, tokenizer)
    precision_policy(asked.policy, model.config)  # a mistake is better found now
    named = texts(asked, model)
    log = logging.getLogger(__name__).info
    data = audit(model, [ids for _, ids in named], length=asked.tokens, policy=asked.policy, progress=log)
    name = Path(asked.checkpoint).resolve().name
    page = render(name, facts(asked, model, [name for name, _ in named], data["counted"]), data)
    draft = out.with_name(f".{out.name}.tmp")
    draft.write_text(page, encoding="utf-8")
    draft.replace(out)
    log(f"{out}: {len(page.encode()) / 1e6:.1f} MB, {len(named)} texts. Open it in a browser")


def facts(asked: Audit, model: Model, names: Sequence[str], tokens: int) -> list[tuple[str, str]]:
    """What stands at the head of the page."""
    c = model.config
    read = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return [
        ("layers", f"{c.num_hidden_layers}: {', '.join(map(str, c.segments))}"),
        ("width", f"{c.hidden_size} in {c.hc_mult} residual streams, {c.num_attention_heads} heads"),
        ("attention", f"a window of {c.sliding_window} tokens; CSA layers choose {c.index_topk} entries"),
        ("experts", f"{c.num_experts_per_tok} of {c.n_routed_experts} per token, and a shared one"),
        ("texts", f"{read}; {tokens:,} tokens"),
        ("precision policy", asked.policy),
    ]


def texts(asked: Audit, model: Model) -> list[tuple[str, list[int]]]:
    """Names and token ids of the texts to look at."""
    if not asked.text:
        return heldout(asked, model)
    return [(Path(file).name, encoded(Path(file), model)) for file in asked.text]


def encoded(file: Path, model: Model) -> list[int]:
    """The token ids of a text file, or those written in it where there is no tokenizer.

    Raises:
        UserError: when the file is no text, holds fewer than two tokens, or ids that are none.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text: {error}") from error
    if model.tokenizer is not None:
        ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    else:
        try:
            ids = [int(word) for word in text.replace(",", " ").split()]
        except ValueError:
            raise UserError(
                f"the model has no tokenizer, so {file} must hold token ids: numbers apart by spaces. Or name a "
                "tokenizer with --tokenizer"
            ) from None
    vocabulary = model.config.vocab_size
    if stray := [token for token in ids if not 0 <= token < vocabulary]:
        raise UserError(f"{file}: token {stray[0]} is not of the model, whose ids go from 0 to {vocabulary - 1}")
    if len(ids) < 2:
        raise UserError(f"{file} holds fewer than two tokens: there is nothing to look at")
    return ids


def heldout(asked: Audit, model: Model) -> list[tuple[str, list[int]]]:
    """Held-out documents of the run, those first that are long enough.

    Raises:
        UserError: when the folder is no run.
    """
    folder = local_path(asked.checkpoint)
    recipe = next(
        (place / "recipe.json" for place in (folder, folder.parent) if (place / "recipe.json").is_file()), None
    )
    if recipe is None:
        raise UserError(f"{folder} is no training run with held-out documents: name a text with --text FILE")
    from train.data.tokens import prepare

    data = json.loads(recipe.read_text(encoding="utf-8"))["data"]
    store = prepare(data["corpus"], data["tokenizer"], vocab_size=model.config.vocab_size, cache=asked.cache)
    chosen = sorted(store.heldout_documents, key=lambda i: store.lengths[i] < asked.tokens)[: asked.documents]
    return [(f"held-out document {i}", [int(token) for token in store.document(i)]) for i in chosen]
