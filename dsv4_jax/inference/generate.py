"""Generation: prompts in, events or whole continuations out.

    engine = Engine(config, params, tokenizer)
    for event in engine.stream([prompt], GenerateOptions(max_new_tokens=64)):
        print(event.text, end="")

Prompts are read together, in chunks; then every call of the compiled loop brings several tokens for each row. Sizes are
rounded up, so that few are ever compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model, weights
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.inference.batch import Emitted, Prompted, Shape, first_token, read_chunk, unread
from dsv4_jax.inference.continuation import Completion, Continuation, Event, TokenLogProb
from dsv4_jax.inference.decoding import decode
from dsv4_jax.inference.requests import GREEDY, GenerateOptions, check_prompt, stack_settings
from dsv4_jax.inference.sampling import LogProbs
from dsv4_jax.inference.sharing import fork
from dsv4_jax.inference.sizes import LEAST_CAPACITY, round_up
from dsv4_jax.partition import ALONE, Partition
from dsv4_jax.quantization.storage import FormatName, cache_format
from dsv4_jax.tokenizer import Tokenizer

SMALL_CHUNK = 128  # tokens of a chunk where no prompt is longer
MOST_DRAFTS = 8
CALL_SECONDS = 0.05  # how long the compiled loop runs before the host sees its tokens
APART = 16  # blocks of models whose layers are laid apart (`weights.unstack`); deeper ones would compile too long
_unstack = jax.jit(weights.unstack)


class _Request(NamedTuple):
    number: int
    prompt: np.ndarray
    options: GenerateOptions


@dataclass(frozen=True, eq=False)
class Engine:
    """A model made ready to continue prompts.

    Attributes:
        config: the architecture.
        params: its parameters.
        tokenizer: needed for text and stop strings; its end token ends texts.
        cache_format: how the cache is stored: "float32", "bfloat16" or "deployed".
        speculative: tokens that the MTP module drafts per step; 0 decodes plainly.
        prefill_chunk: tokens of each prompt per forward while prompts are read.
        max_rows: continuations computed together; further ones wait.
        rows, capacity: compute exactly so many rows, each with room for so many tokens. Then whatever else is asked for
            at the same time changes no bit of a continuation; by default both are fitted to what is asked.
        partition: how parameters, which lie so already, and caches lie on devices. In several processes each makes the
            same calls, with seeds given, and gets the same events.

    Raises:
        UserError: for values that the model cannot serve.
    """

    config: DeepseekV4Config
    params: model.Params
    tokenizer: Tokenizer | None = None
    cache_format: FormatName = "float32"
    speculative: int = 0
    prefill_chunk: int = 512
    max_rows: int = 32
    rows: int | None = None
    capacity: int | None = None
    partition: Partition = ALONE

    def __post_init__(self) -> None:
        """Check what does not depend on requests."""
        cache_format(self.config, self.cache_format)
        if not 0 <= self.speculative <= MOST_DRAFTS:
            raise UserError(
                f"speculative is {self.speculative}: from 0 (plain decoding) to {MOST_DRAFTS} drafts per step"
            )
        if self.speculative and not self.config.mtp_layers:
            raise UserError("speculative decoding needs a multi-token-prediction module, and this model has none")
        for name in ("prefill_chunk", "max_rows", "rows", "capacity"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: at least 1")
        if self.config.num_hidden_layers <= APART and isinstance(self.params.get("segments", {}).get("0"), dict):
            apart = _unstack({"segments": self.params["segments"]})  # embedding and head are shared, not copied
            object.__setattr__(self, "params", self.params | apart)

    def generate(
        self,
        prompts: Sequence[Any],
        options: GenerateOptions | Sequence[GenerateOptions] = GREEDY,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[list[Completion]]:
        """`stream` to its end: for each prompt its `n` continuations. `on_event` sees every event as it comes."""
        events: dict[tuple[int, int], list[Event]] = {}
        for event in self.stream(prompts, options):
            events.setdefault((event.prompt, event.sample), []).append(event)
            if on_event is not None:
                on_event(event)
        whole: list[list[Completion]] = [[] for _ in prompts]
        for (prompt, _), found in sorted(events.items()):
            whole[prompt].append(Completion.of(found))
        return whole

    def stream(
        self, prompts: Sequence[Any], options: GenerateOptions | Sequence[GenerateOptions] = GREEDY
    ) -> Iterator[Event]:
        """Continue prompts; events of different continuations come interleaved.

        Args:
            prompts: token ids of each, int [P]; nothing is added to them.
            options: for all, or for each prompt its own.

        Raises:
            UserError: at once, for whatever the model cannot do.
        """
        every = [options] * len(prompts) if isinstance(options, GenerateOptions) else list(options)
        if len(every) != len(prompts):
            raise UserError(f"there are {len(prompts)} prompts and {len(every)} options: give one for all, or one each")
        requests = [self._check(i, *request) for i, request in enumerate(zip(prompts, every, strict=True))]
        return self._run(requests)

    def _check(self, number: int, prompt: Any, options: GenerateOptions) -> _Request:
        prompt = check_prompt(self.config, prompt, options, self.tokenizer, f"prompt {number}")
        wanted = self._room(_Request(number, prompt, options))
        if self.capacity is not None and wanted > self.capacity:
            raise UserError(f"prompt {number} needs room for {wanted} tokens; the engine's rows hold {self.capacity}")
        return _Request(number, prompt, options)

    def _run(self, requests: list[_Request]) -> Iterator[Event]:
        """Requests for one continuation together; each other one by itself, since its rows share a prompt."""
        single = [request for request in requests if request.options.n == 1]
        most = self.rows or self.max_rows
        for begin in range(0, len(single), most):
            yield from self._together(single[begin : begin + most])
        for request in requests:
            if request.options.n > 1:
                yield from self._samples(request, most)

    def _together(self, requests: list[_Request]) -> Iterator[Event]:
        rows = self.rows or round_up(len(requests), 1)
        prompted, found = self._read(requests, rows, max(map(self._room, requests)))
        continuations = [Continuation(r.number, 0, r.options, self.tokenizer) for r in requests]
        yield from self._continue(prompted, continuations, found, rows)

    def _samples(self, request: _Request, most: int) -> Iterator[Event]:
        """`n` continuations whose caches refer to the same blocks of the prompt."""
        read, found = self._read([request], self.rows or 1, len(request.prompt))
        for begin in range(0, request.options.n, most):
            samples = range(begin, min(begin + most, request.options.n))
            rows = self.rows or round_up(len(samples), 1)
            capacity = self.capacity or round_up(self._room(request), LEAST_CAPACITY)
            continuations = [Continuation(request.number, i, request.options, self.tokenizer) for i in samples]
            forked = _forked(read, rows, capacity)
            if samples.stop == request.options.n:
                del read  # its blocks are copied: they need not be there twice
            yield from self._continue(forked, continuations, found * len(samples), rows)

    def _read(self, requests: list[_Request], rows: int, room: int) -> tuple[Prompted, list[Any]]:
        """Put prompts through the model: their state, and the log-probabilities of those that asked."""
        capacity = self.capacity or round_up(room, LEAST_CAPACITY)
        lengths = np.zeros(rows, np.int32)
        lengths[: len(requests)] = [len(request.prompt) for request in requests]
        chunk = self.prefill_chunk if self.rows or lengths.max() > SMALL_CHUNK else min(SMALL_CHUNK, self.prefill_chunk)
        tokens = np.zeros((rows, -(-lengths.max() // chunk) * chunk + 1), np.int32)
        for row, request in zip(tokens, requests, strict=False):
            row[: len(request.prompt)] = request.prompt
        asking = [request.options for request in requests if request.options.prompt_logprobs]
        shape, found = self._shape(asking), []
        dtype = self.params["embed"].dtype
        prompted = unread(self.config, shape, rows, capacity, self.cache_format, dtype)
        for begin in range(0, lengths.max(), chunk):
            counts = np.clip(lengths - begin, 0, chunk)
            known = np.clip(lengths - 1 - begin, 0, chunk)
            piece = tokens[:, begin : begin + chunk + 1]
            prompted, some = read_chunk(self.config, shape, self.params, prompted, piece, counts, known)
            found += [jax.device_get(some)] if asking else []
        return prompted, [_prompt_log_probs(row, request, found) for row, request in enumerate(requests)]

    def _continue(
        self, prompted: Prompted, continuations: list[Continuation], found: list[Any], rows: int
    ) -> Iterator[Event]:
        """Choose tokens until every continuation has ended; rows beyond them are padding."""
        options = [continuation.options for continuation in continuations]
        shape, limit = self._shape([o for o in options if o.logprobs is not None]), self._vocab_size
        chosen = [o.settings(c.sample, limit) for o, c in zip(options, continuations, strict=True)]
        settings = stack_settings(chosen + chosen[:1] * (rows - len(chosen)))
        for continuation, log_probs in zip(continuations, found, strict=True):
            yield from continuation.open(log_probs)
        left = _padded([continuation.left for continuation in continuations], rows)
        stops = _stops(continuations, rows)
        state, emitted = first_token(self.config, shape, self.params, *prompted, settings, left, stops)
        emitted, steps = jax.tree.map(lambda x: x[None], emitted), 1
        while True:
            yield from _events(continuations, jax.device_get(emitted))
            alive = _padded([not continuation.ended for continuation in continuations], rows)
            if not alive.any():
                return
            began = time.perf_counter()
            state, emitted = decode(self.config, shape, self.params, state, steps, alive)
            jax.block_until_ready(emitted)
            steps = int(np.clip(CALL_SECONDS * steps / (time.perf_counter() - began), 1, shape.steps))
            steps = steps if jax.process_count() == 1 else shape.steps  # which all processes have to agree on

    def _shape(self, asking: list[GenerateOptions]) -> Shape:
        """What to compile for: `asking` are the requests for log-probabilities, none if there are none."""
        if not asking:
            return Shape(self.speculative, partition=self.partition)
        most = max(options.logprobs or 0 for options in asking)
        top = min(next(n for n in (1, 5, 20) if n >= most), self.config.vocab_size)
        return Shape(self.speculative, top, partition=self.partition)

    def _room(self, request: _Request) -> int:
        """Tokens that a request may come to, rejected drafts included."""
        return len(request.prompt) + request.options.max_new_tokens + self.speculative

    @property
    def _vocab_size(self) -> int:
        known = self.config.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        return min(known, self.config.vocab_size)


def generate(
    config: DeepseekV4Config,
    params: model.Params,
    prompts: Sequence[Any],
    options: GenerateOptions | Sequence[GenerateOptions] = GREEDY,
    *,
    on_event: Callable[[Event], None] | None = None,
    **engine: Any,
) -> list[list[Completion]]:
    """`Engine(config, params, **engine).generate(prompts, options, on_event)`: the `n` continuations of each prompt."""
    return Engine(config, params, **engine).generate(prompts, options, on_event)


def _forked(prompted: Prompted, rows: int, capacity: int) -> Prompted:
    """The first prompt as `rows` rows whose caches share its blocks."""
    cache = prompted.cache
    state = jax.tree.map(lambda x: x[:, :1], cache.states)
    cache = replace(cache, lengths=cache.lengths[:1], tables=cache.tables[:1], states=state)
    columns, shared = -(-capacity // cache.block_tokens), int(cache.lengths[0]) // cache.block_tokens
    cache = fork(cache, rows, capacity, round_up(shared + rows * (columns - shared), 1))
    return Prompted(cache, *jax.tree.map(lambda x: jnp.repeat(x[:1], rows, axis=0), prompted[1:]))


def _events(continuations: list[Continuation], emitted: Emitted) -> Iterator[Event]:
    """The events of all steps [T, B, ..] of a call, in the order of steps."""
    for step in range(len(emitted.counts)):
        for row, continuation in enumerate(continuations):
            count, accepted = int(emitted.counts[step, row]), int(emitted.accepted[step, row])
            tokens = emitted.tokens[step, row, :count].tolist()
            found: list[TokenLogProb | None] = [None] * count
            if emitted.log_probs is not None and (wanted := continuation.options.logprobs) is not None:
                here = jax.tree.map(lambda x, at=(step, row): x[at], emitted.log_probs)
                found = list(_described(tokens, here, wanted))
            yield from continuation.take(tokens, found, None if accepted < 0 else accepted)


def _prompt_log_probs(row: int, request: _Request, chunks: list[LogProbs]) -> tuple[TokenLogProb, ...] | None:
    """Of the prompt's tokens from the second on, from those of each chunk [B, C, ..]."""
    if not request.options.prompt_logprobs:
        return None
    whole = jax.tree.map(lambda *parts: np.concatenate([part[row] for part in parts]), *chunks)
    return tuple(_described(request.prompt[1:].tolist(), whole, request.options.logprobs or 0))


def _described(tokens: list[int], found: LogProbs, top: int) -> Iterator[TokenLogProb]:
    """Log-probabilities [W, ..] of the tokens, with the `top` most likely ones."""
    for i, token in enumerate(tokens):
        best = zip(found.top_ids[i, :top].tolist(), found.top[i, :top].tolist(), strict=True)
        yield TokenLogProb(token, float(found.chosen[i]), tuple(best))


def _stops(continuations: list[Continuation], rows: int) -> np.ndarray:
    """Stop ids [rows, K], -1 unused."""
    width = round_up(max(len(continuation.stops) for continuation in continuations), 4)
    table = np.full((rows, width), -1, np.int32)
    for row, continuation in zip(table, continuations, strict=False):
        row[: len(continuation.stops)] = sorted(continuation.stops)
    return table


def _padded(values: list[Any], rows: int) -> np.ndarray:
    """Zeros, or False, behind the values."""
    return np.array(values + [type(values[0])(0)] * (rows - len(values)))
