"""The face: `dsv4.load`, `dsv4.create`, and the `Model` they return. It stands above every other room."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax import model as _model
from dsv4_jax import weights
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import config_from_json
from dsv4_jax.errors import UserError
from dsv4_jax.inference.requests import GenerateOptions, token_ids
from dsv4_jax.layers.kv_cache import Cache, init_cache
from dsv4_jax.paths import local_path
from dsv4_jax.presets import PRESETS, preset
from dsv4_jax.quantization.storage import FormatName
from dsv4_jax.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from dsv4_jax.inference.generate import Engine


Shardings = Callable[[DeepseekV4Config], Any]
_ARRAYS = ("params", "tokens", "segment_ids", "expert_ids", "cache", "counts")
_STATIC = tuple(name for name in inspect.signature(_model.forward).parameters if name not in _ARRAYS)
_compiled_forward = jax.jit(_model.forward, static_argnames=_STATIC)
_compiled_in_place = jax.jit(_model.forward, static_argnames=_STATIC, donate_argnames="cache")


@dataclass(frozen=True, eq=False)
class Model:
    """An architecture with parameters beside it.

    `params` is a plain nested dict of arrays; `forward` is a pure function of it, so `jax.jit(model.forward)`,
    `jax.grad` and `jax.vmap` work as on any function.

    Attributes:
        config: the architecture.
        params: parameters and buffers.
        tokenizer: what lies beside the checkpoint, or None.
    """

    config: DeepseekV4Config
    params: _model.Params
    tokenizer: Tokenizer | None = None

    def forward(
        self, params: _model.Params, tokens: Any, *, cache: Cache | None = None, donate: bool = False, **options: Any
    ) -> Any:
        """`dsv4_jax.model.forward` for this config: tokens int32 [B, S] -> `.logits` [B, S, V] float32 and more.

        With a `cache` the tokens follow what it holds, and the result is (output, cache with these tokens). Compiled at
        the first call for each shape of tokens and cache and each choice of options.

        Args:
            params: as `self.params`.
            tokens: [B, S]. Ids are checked in lists and numpy arrays; with JAX arrays this would wait for the device.
            cache: what came before. A row that has no room for its tokens comes out as NaN, as do all later ones.
            donate: write the new entries into `cache` itself, which is gone then; without it every call copies the
                cache, whatever its capacity.
            options: those of `dsv4_jax.model.forward`.

        Raises:
            UserError: for ids outside the vocabulary, and more tokens than an empty row of the cache would hold.
            ValueError: for options that do not go together, as of `dsv4_jax.model.forward`.
        """
        if not any(isinstance(part, jax.Array) for part in jax.tree.leaves(tokens)):
            tokens = token_ids(self.config, tokens, "tokens")
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2:
            raise UserError(f"tokens have the shape {tokens.shape}: rows of them are needed, [B, S]")
        if cache is not None and options.get("counts") is None and tokens.shape[1] > cache.capacity:
            raise UserError(f"{tokens.shape[1]} tokens do not fit a cache for {cache.capacity}: make a larger one")
        run = _compiled_in_place if donate else _compiled_forward
        out = run(self.config, params, tokens, cache=cache, **options)
        return out if cache is None else (out, out.cache)

    def init_cache(self, batch: int, capacity: int, format: str = "float32", blocks: int | None = None) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` tokens; see `layers.kv_cache.init_cache`.

        Raises:
            UserError: for a format that there is not, or that the widths do not allow.
        """
        return init_cache(self.config, batch, capacity, format, blocks)

    def engine(self, **options: Any) -> Engine:
        """What continues prompts of token ids, many at a time or as a stream; see `inference.generate.Engine`."""
        from dsv4_jax.inference.generate import Engine

        return Engine(self.config, self.params, self.tokenizer, **options)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        cache_format: FormatName = "float32",
        speculative: int = 0,
        **options: Any,
    ) -> str:
        """The text that follows `prompt`, greedy by default.

        Args:
            prompt: text; the token that begins a document is put in front.
            max_new_tokens: at most so many.
            cache_format: "float32", "bfloat16" or "deployed".
            speculative: tokens that the MTP module drafts per step, where the model has one.
            options: of `inference.requests.GenerateOptions`: temperature, top_k, top_p, min_p, stop, seed, ...

        Raises:
            UserError: when no tokenizer came with the model, the request does not fit it, or asks for more than a text.
        """
        asked = GenerateOptions(max_new_tokens, **options)
        if asked.n > 1 or asked.logprobs is not None or asked.prompt_logprobs:
            raise UserError("generate gives one text: for n, logprobs or prompt_logprobs ask `model.engine().generate`")
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: load a folder that holds tokenizer.json")
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        engine = self.engine(cache_format=cache_format, speculative=speculative)
        return engine.generate([ids], asked)[0][0].text


def create(config: str | DeepseekV4Config, key: jax.Array | int = 0) -> Model:
    """A model with fresh float32 parameters.

    Args:
        config: a preset's name ("nano", "v4-flash", ...) or a configuration.
        key: a `jax.random.key`, or its seed.

    Raises:
        ConfigError: for a name that is no preset's.
    """
    config = preset(config) if isinstance(config, str) else config
    key = jax.random.key(key) if isinstance(key, int) else key
    return Model(config, jax.jit(weights.init, static_argnums=0, compiler_options=weights.draw_quickly())(config, key))


def load(
    folder: str | Path, *, step: int | None = None, shardings: Shardings | None = None, packed: bool = False
) -> Model:
    """A model from a folder of config.json and safetensors (any of the three naming schemes), or from a training run.

    Args:
        folder: the model's folder, a run of `dsv4 train`, or the run's `checkpoints`.
        step: of a run: this checkpoint; the newest good one by default. A folder of safetensors has no steps.
        shardings: the tree of shardings for an architecture; everything on one device by default.
        packed: keep matrices that the folder stores in FP8 or FP4 so in memory (`quantization.packed.Packed`): a
            forward undoes a few columns or one expert at a time. For inference: integers have no gradient.

    Raises:
        UserError: when the folder holds no model, or one that is damaged or of another architecture.
        FileNotFoundError: when there is no such folder.
    """
    folder = local_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}{_if_preset(folder.name)}")
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        if step is not None:
            raise UserError(f"{folder} holds one model and no steps, so there is no step {step}: leave the step out")
        from dsv4_jax.checkpoint import load_params, read_config

        config, alone = read_config(folder), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params = load_params(folder, config, shardings(config) if shardings else alone, packed=packed)
    else:
        config, params = _load_run(folder, step, shardings)
    return Model(config, jax.tree.map(jnp.asarray, params), _tokenizer(folder))


def _if_preset(name: str) -> str:
    """What to do instead, for a name that is a preset's: people write it where a folder is needed."""
    if name not in PRESETS:
        return ""
    how = "download the release" if name.startswith("v4-") else f"train one with `dsv4 train {name}`"
    return f": {name} is a preset, an architecture without weights; {how} and name its folder"


def _load_run(folder: Path, step: int | None, shardings: Shardings | None) -> tuple[DeepseekV4Config, _model.Params]:
    from train.checkpointing import CheckpointError, load_params

    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder

    def placed(raw: dict[str, Any]) -> Any:
        config = config_from_json(raw)
        put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(put, weights.shapes(config), shardings(config)) if shardings else None

    try:
        config, params = load_params(checkpoints, step, abstract_params=placed if shardings else None)
    except (CheckpointError, FileNotFoundError) as error:
        raise UserError(f"{folder} holds neither safetensors nor a training checkpoint: {error}") from error
    return config_from_json(config), params


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in the folder, or in the run's folder around its checkpoints."""
    found = next((place for place in (folder, folder.parent) if (place / "tokenizer.json").is_file()), None)
    return load_tokenizer(found) if found else None
