"""The `dsv4` command. Each command is one module here with `main(arguments)`; it is imported only when it is called."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from dsv4_jax.cli.huge_pages import restart_with_huge_pages
from dsv4_jax.config_checks import nearest
from dsv4_jax.errors import for_people

COMMANDS = {  # name: module, what it does
    "info": (
        "dsv4_jax.cli.info",
        "layer plan, exact parameter counts and cache size of a preset, config.json or folder",
    ),
    "plan": ("dsv4_jax.cli.plan", "whether a deployment fits, how fast it can be and what it costs, in a second"),
    "compile": ("dsv4_jax.cli.compile", "compile a step for TPU slices or GPU clusters that are not here: what fits"),
    "train": ("dsv4_jax.cli.train", "train a model by a recipe, or resume an interrupted run"),
    "ablate": (
        "dsv4_jax.cli.ablate",
        "train variants of a recipe: which mechanism does what, as a table and a picture",
    ),
    "claims": ("dsv4_jax.cli.claims", "what the article claims of a mechanism, on models trained with it and without"),
    "launch": ("dsv4_jax.cli.launch", "start a command in several processes on this machine, as one job"),
    "generate": ("dsv4_jax.cli.generate", "continue a text with a checkpoint, as it comes"),
    "chat": ("dsv4_jax.cli.chat", "talk with a checkpoint in the release's prompt format"),
    "sample": ("dsv4_jax.cli.generate", "the same as generate"),
    "audit": (
        "dsv4_jax.cli.audit",
        "a page of what a model did with a text: where it looked, which experts, how mixed",
    ),
    "convert": ("dsv4_jax.cli.convert", "write a checkpoint in another naming scheme or format, or list its tensors"),
}
EXAMPLES = """  dsv4 info v4-pro
  dsv4 info path/to/model-folder
  dsv4 plan v4-flash --context 1M --hardware h200
  dsv4 compile v4-flash --target h200:1x8 --mode decode --batch 8 --seq 1M
  dsv4 train nano
  dsv4 ablate recall --only full no-csa sliding-only
  dsv4 launch -n 2 -- train nano
  dsv4 generate runs/nano --prompt 'def main():'
  dsv4 chat runs/nano --system 'Be brief.'
  dsv4 audit runs/nano --text README.md
  dsv4 convert runs/nano exported --scheme transformers"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dsv4 COMMAND ...`.

    Returns:
        The exit status: 2 for requests that cannot be met, 130 behind Ctrl-C, 141 when nobody reads on.
    """
    if arguments is None:  # the command itself, not a caller inside a program
        restart_with_huge_pages()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for handler in logging.root.handlers:
        handler.addFilter(_worth_saying)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"dsv4: there is no command {name!r}{nearest(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return _run(COMMANDS[name][0], rest)
    except KeyboardInterrupt as error:  # its text, where it has one, says what is left and how to go on
        print(f"dsv4 {name}: interrupted{f'. {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 141
    except Exception as error:
        if (words := for_people(error)) is None:
            raise
        print(f"dsv4 {name}: {words}", file=sys.stderr)
        return 2


def _run(module: str, arguments: Sequence[str]) -> int:
    """The exit status of a command, with all of its output written."""
    try:
        return importlib.import_module(module).main(arguments) or 0
    finally:
        print(end="", flush=True)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Of what the libraries below log only warnings: JAX would name every backend that is not here."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] not in ("absl", "jax")


def usage() -> str:
    """The text of `dsv4 --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return (
        "DeepSeek-V4 in JAX.\n\nusage: dsv4 COMMAND [options]\n\n"
        f"commands:\n{commands}\n\nexamples:\n{EXAMPLES}\n\n`dsv4 COMMAND --help` explains a command."
    )
