"""What commands that make text have in common: which model, and how it chooses."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dsv4_jax.config import ConfigError
from dsv4_jax.errors import UserError

if TYPE_CHECKING:
    from dsv4_jax.api import Shardings
    from dsv4_jax.config import DeepseekV4Config
    from dsv4_jax.inference.generate import Engine
    from dsv4_jax.inference.requests import GenerateOptions
    from dsv4_jax.partition import Partition
    from dsv4_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelArguments:
    """The model, its cache and its choices."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A run folder of `dsv4 train`, its `checkpoints` folder, or a folder of config.json and safetensors."""
    max_new_tokens: int = 64
    """At most so many tokens."""
    temperature: float = 0.8
    """Of the softmax; 0 always takes the most likely token."""
    top_p: float = 0.95
    """Choose from the smallest set of tokens that holds this much probability."""
    top_k: int = 0
    """Choose among so many most likely tokens; 0 for all."""
    min_p: float = 0.0
    """Leave out tokens less than this share as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred before less likely."""
    seed: int | None = None
    """Of the choices; by default another one every time."""
    speculative: int = 0
    """Tokens that the multi-token-prediction module drafts per step; 0 for none."""
    cache_format: Literal["float32", "bfloat16", "deployed"] = "float32"
    """How the cache is stored; deployed is FP8, with FP4 indexer keys."""
    weights: Literal["packed", "plain"] = "packed"
    """packed: FP8 and FP4 matrices stay as they are stored, and are undone a part at a time; plain: all as floats."""
    step: int | None = None
    """Of a run: the checkpoint of this step; the newest good one by default."""
    tokenizer: str | None = None
    """bytes, deepseek, or a tokenizer.json; what lies beside the checkpoint by default."""
    mesh: str | None = None
    """Devices by axis, as in "expert=4,tensor=2"; -1 stands for the rest. By default the first device alone."""
    strategy: str | None = None
    """How parameters and cache lie on the mesh: expert-tensor (default with a mesh), expert-data, data, fsdp."""

    def options(self, **more: Any) -> GenerateOptions:
        """What to ask the engine for; `more` replaces or adds."""
        from dsv4_jax.inference.requests import GenerateOptions

        names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        return GenerateOptions(**{name: getattr(self, name) for name in names} | more)

    def open(self) -> tuple[Engine, Tokenizer]:
        """Load the model, with compiled programs kept for the next start.

        Raises:
            UserError: when there is no such model, or no tokenizer for it.
        """
        from dsv4_jax.api import load
        from dsv4_jax.cli.info import find_config
        from dsv4_jax.inference.generate import Engine
        from dsv4_jax.quantization.packed import packed_arrays
        from train.loop import use_compilation_cache

        use_compilation_cache()
        tokenizer = self._own_tokenizer()
        partition, shardings = self._placed()
        options = {"cache_format": self.cache_format, "speculative": self.speculative, "partition": partition}
        with suppress(ConfigError):  # a copy of a run's checkpoints has no config.json beside it
            config = find_config(str(Path(self.checkpoint).expanduser().absolute()))
            Engine(config, {}, tokenizer, **options)  # refuses before the weights are read
        model = load(self.checkpoint, step=self.step, shardings=shardings, packed=self.weights == "packed")
        if kept := packed_arrays(model.params):
            size = sum(matrix.nbytes for matrix in kept) / 2**20
            print(f"{len(kept)} stacks of matrices stay packed in FP8 or FP4: {size:,.1f} MiB", file=sys.stderr)
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        assert tokenizer is not None
        return Engine(model.config, model.params, tokenizer, **options), tokenizer

    def _own_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was named, None for what lies beside the checkpoint. Raises UserError without any."""
        from dsv4_jax.tokenizer import load_tokenizer
        from train.starting import tokenizer_file

        folder = Path(self.checkpoint).expanduser()
        if self.tokenizer is None and folder.is_dir() and tokenizer_file(folder) is None:
            raise UserError(f"there is no tokenizer.json in {self.checkpoint}: name one with --tokenizer")
        return load_tokenizer(self.tokenizer) if self.tokenizer else None

    def _placed(self) -> tuple[Partition, Shardings | None]:
        """The partition, and what gives the shardings of an architecture's parameters, checked; on one device none."""
        import jax

        from dsv4_jax import weights
        from dsv4_jax.partition import ALONE
        from sharding.partition import MeshPartition
        from sharding.rules import check_fit, parameter_shardings
        from train.placement import place

        if self.mesh is None and self.strategy is None and jax.process_count() == 1:
            return ALONE, None
        partition = place(self.mesh, self.strategy or "expert-tensor")
        assert isinstance(partition, MeshPartition)
        mesh, strategy = partition.mesh, partition.strategy

        def shardings(config: DeepseekV4Config) -> Any:
            facts, shapes = weights.facts(config), weights.shapes(config)
            check_fit(facts, shapes, strategy, mesh)
            return parameter_shardings(facts, shapes, strategy.parameters, mesh)

        return partition, shardings
