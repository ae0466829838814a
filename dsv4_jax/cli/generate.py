"""`dsv4 generate`: continue a text with a checkpoint."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dsv4_jax.cli.model_arguments import ModelArguments
from dsv4_jax.errors import UserError
from sharding.processes import Processes

if TYPE_CHECKING:
    from dsv4_jax.inference.continuation import Event, TokenLogProb
    from dsv4_jax.tokenizer import Tokenizer

DESCRIPTION = """Continue a text with a checkpoint; the text comes on stdout, the speed on stderr.

Examples:
  dsv4 generate runs/nano --prompt 'def main():'
  dsv4 generate runs/nano --prompt 'class Node:' --n 3 --temperature 0.7 --seed 1
  dsv4 generate runs/nano --prompt 'import os' --temperature 0 --speculative 1 --stop 'def '
  dsv4 generate path/to/model-folder --prompt-file - --max-new-tokens 200 --cache-format deployed < question.txt
  dsv4 generate runs/nano --prompt 'for i in ' --max-new-tokens 4 --logprobs 3
  dsv4 generate path/to/model-folder --prompt 'Once' --strategy expert-tensor --mesh expert=4,tensor=2"""


@dataclass(frozen=True)
class Generate(ModelArguments):
    """Arguments of `dsv4 generate`."""

    prompt: str = ""
    """The text to continue; it is printed too."""
    prompt_file: str | None = None
    """A file with the text to continue, - for stdin; it is not printed."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends the text; may be given several times."""
    n: int = 1
    """How many continuations; with more than one, each is printed when it has ended."""
    logprobs: int | None = None
    """Also list every token's log-probability, and those of so many most likely ones, on stderr."""
    processes: tyro.conf.OmitArgPrefixes[Processes] = Processes()
    """The job that this process belongs to."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments`, load, and print as text comes."""
    asked = tyro.cli(Generate, args=list(arguments), prog="dsv4 generate", description=DESCRIPTION)
    from sharding.distributed import from_first, job, only_first_speaks

    with job(asked.processes, "generate"), only_first_speaks():
        prompt = from_first(lambda: read_prompt(asked))
        seed = from_first(lambda: secrets.randbits(32)) if asked.seed is None else asked.seed
        write(replace(asked, seed=seed), prompt)


def write(asked: Generate, prompt: str) -> None:
    """Continue `prompt`; every process of a job makes the same tokens."""
    options = asked.options(n=asked.n, stop=asked.stop, logprobs=asked.logprobs)
    engine, tokenizer = asked.open()
    events = engine.stream([[tokenizer.bos_id, *tokenizer.encode(prompt)]], options)
    began = time.perf_counter()
    seen, times = [], []
    if asked.prompt_file is None and asked.n == 1:
        print(prompt, end="", flush=True)
    for event in events:
        seen.append(event)
        times.append(time.perf_counter() - began)
        if asked.n == 1:
            print(event.text, end="", flush=True)
        elif event.finish_reason is not None:
            text = "".join(other.text for other in seen if other.sample == event.sample)
            print(f"[{event.sample + 1} of {asked.n}] {prompt if asked.prompt_file is None else ''}{text}", flush=True)
    print("\n" if asked.n == 1 else "", end="", flush=True)
    for line in log_prob_lines(seen, tokenizer):
        print(line, file=sys.stderr)
    print(speed(seen, times), file=sys.stderr)


def read_prompt(asked: Generate) -> str:
    """The text of `--prompt`, or of `--prompt-file`.

    Raises:
        UserError: when both are given, or the file is no text.
        FileNotFoundError: when there is no such file.
    """
    if asked.prompt_file is None:
        return asked.prompt
    if asked.prompt:
        raise UserError("--prompt and --prompt-file are both given: give one")
    if asked.prompt_file == "-":
        return sys.stdin.read()
    if not Path(asked.prompt_file).is_file():
        raise FileNotFoundError(f"there is no file {asked.prompt_file}")
    try:
        return Path(asked.prompt_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{asked.prompt_file} is no UTF-8 text: {error}") from error


def log_prob_lines(events: Iterable[Event], tokenizer: Tokenizer) -> list[str]:
    """One line per token whose log-probability is known."""

    def name(token: int) -> str:
        # A model's vocabulary may be padded beyond the tokenizer's.
        return repr(tokenizer.decode([token])) if token < tokenizer.vocab_size else f"token {token}"

    def line(event: Event, found: TokenLogProb) -> str:
        others = ", ".join(f"{name(token)} {log_prob:.3f}" for token, log_prob in found.top)
        return f"[{event.sample + 1}] {name(found.token)} {found.log_prob:.3f}" + (f"   of {others}" if others else "")

    return [line(event, found) for event in events for found in event.log_probs]


def speed(events: Sequence[Event], times: Sequence[float]) -> str:
    """Tokens, when the first one came, how fast they came behind the second, and how many drafts were right.

    Args:
        events: in the order in which they came.
        times: of each, in seconds. Whatever must be compiled is done by the second.
    """
    count = sum(len(event.tokens) for event in events)
    rate = f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s" if len(times) > 2 else ""
    accepted = [event.accepted for event in events if event.accepted is not None]
    drafted = f", {1 + sum(accepted) / len(accepted):.2f} tokens per step with drafts" if accepted else ""
    return f"{count} tokens, the first after {times[0]:.2f} s{rate}{drafted}"
