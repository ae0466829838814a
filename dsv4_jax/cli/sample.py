"""`dsv4 sample`: continue a text with a trained checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from dsv4_jax.errors import UserError

DESCRIPTION = """Continue a text with a trained checkpoint.

Examples:
  dsv4 sample runs/nano
  dsv4 sample runs/nano --prompt 'def main():' --max-new-tokens 100 --temperature 0.7
  dsv4 sample runs/nano --step 200 --temperature 0"""


@dataclass(frozen=True)
class Sample:
    """Arguments of `dsv4 sample`."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A run folder of `dsv4 train`, its `checkpoints` folder, or a folder of config.json and safetensors."""
    prompt: str = "def "
    """The text to continue."""
    max_new_tokens: int = 64
    """At most so many tokens."""
    temperature: float = 0.8
    """Of the softmax; 0 always takes the most likely token."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens that holds this much probability."""
    seed: int = 0
    """Of the choices."""
    count: int = 1
    """How many continuations."""
    step: int | None = None
    """Checkpoint of this step; the newest good one by default."""
    tokenizer: str | None = None
    """bytes, deepseek, or a tokenizer.json; what lies beside the checkpoint by default."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments`, load, and print continuations."""
    asked = tyro.cli(Sample, args=list(arguments), prog="dsv4 sample", description=DESCRIPTION)
    for talkative in ("absl", "jax"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    import jax
    import numpy as np

    from dsv4_jax.api import load
    from dsv4_jax.inference.sample import SampleOptions, sample
    from dsv4_jax.tokenizer import load_tokenizer
    from train.loop import use_compilation_cache

    use_compilation_cache()
    model = load(asked.checkpoint, step=asked.step)
    tokenizer = load_tokenizer(asked.tokenizer) if asked.tokenizer else model.tokenizer
    if tokenizer is None:
        raise UserError(f"there is no tokenizer.json in {asked.checkpoint}: name one with --tokenizer")
    special = tokenizer.eos_id, tokenizer.vocab_size
    options = SampleOptions(asked.max_new_tokens, asked.temperature, asked.top_p, *special)
    prompt = np.array([tokenizer.bos_id, *tokenizer.encode(asked.prompt)], np.int32)
    for number in range(asked.count):
        key = jax.random.fold_in(jax.random.key(asked.seed), number)
        ids = sample(model.config, model.params, prompt, key, options)
        print(asked.prompt + tokenizer.decode(ids.tolist()))
