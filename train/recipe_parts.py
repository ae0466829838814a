"""The parts of a recipe: model, data, stages, learning rate, and how often to look and save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv4_jax.checkpoint import read_config
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import config_from_json
from dsv4_jax.presets import preset
from train.data.tasks import Task, make_task
from train.step import Kind


@dataclass(frozen=True)
class ModelChoice:
    """Which architecture.

    Attributes:
        preset: a name of `dsv4_jax.presets`, a config.json, or a folder that holds one.
        overrides: configuration fields to change; `--set model.hidden_size=128` writes here.
    """

    preset: str = "nano"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> DeepseekV4Config:
        """The configuration. Raises ConfigError, and FileNotFoundError for a path that leads nowhere."""
        return self._base.replace(**self.overrides)

    @property
    def _base(self) -> DeepseekV4Config:
        if "/" not in self.preset and not self.preset.endswith(".json"):
            return preset(self.preset)
        place = Path(self.preset).expanduser()
        has_weights = any(place.glob("*.safetensors*"))  # which say whether there is an MTP module
        config = read_config(place) if has_weights else config_from_json(place)
        return config.replace(quantization_config=None, expert_dtype=None)  # of how its weights are stored


@dataclass(frozen=True)
class TaskChoice:
    """A synthetic task instead of a text (`train.data.tasks`).

    Attributes:
        name: one of `TASKS`.
        options: fields of the task to change; `--set data.task.options.n_pairs=4` writes here.
        answers_only: the loss counts the answers alone; otherwise every token, as with a text.
        phases: held-out rows begin with 0 to phases - 1 filler tokens, and accuracy is told apart by the needle's place
            modulo it: a compression ratio.
        far: questions whose answer stands further back count as far; 0: beyond the reach of all windows.
    """

    name: str = "mqar"
    options: Mapping[str, Any] = field(default_factory=dict)
    answers_only: bool = True
    phases: int = 4
    far: int = 0

    def training(self, stage: Stage) -> Task:
        """The task of a stage's rows. Raises TaskError."""
        return make_task(self.name, {**self.options, **(stage.task or {})})

    def heldout(self, stage: Stage) -> Task:
        """The task of held-out rows at a stage's length: all phases alike. Raises TaskError."""
        return make_task(self.name, {**self.options, **(stage.task or {}), "offset": self.phases})


@dataclass(frozen=True)
class DataChoice:
    """Which text or task, and how it becomes rows.

    Attributes:
        task: a synthetic task; then there is no text, and the other settings here mean nothing.
        corpus: `python`, `prose`, or a path, as `train.data.corpus.resolve` takes it.
        format: `chat` for tables of conversations (`messages` of `role` and `content`), which are written in the
            release's prompt format; the loss counts what the assistant wrote.
        tokenizer: `bpe` (learned from the corpus, as large as the model's vocabulary allows), `bytes`, `deepseek`, or a
            tokenizer.json.
        packing: `concat` or `first_fit`.
        fim_rate: share of documents rearranged to fill in the middle.
        recall_share: share of rows that are documents of the long-range recall task.
        recall_pairs: pairs that such a document states and asks for.
        recall_distance: tokens between a statement and its question, at least; beyond the window.
    """

    corpus: str = "python"
    format: Literal["text", "chat"] = "text"
    tokenizer: str = "bpe"
    packing: Literal["concat", "first_fit"] = "concat"
    fim_rate: float = 0.0
    recall_share: float = 0.0
    recall_pairs: int = 8
    recall_distance: int = 256
    task: TaskChoice | None = None


@dataclass(frozen=True)
class Stage:
    """A part of the run with one kind of attention and one shape of batch: one compiled step.

    Attributes:
        name: shown in progress, metrics and pictures.
        kind: "dense" (all visible entries), "indexer_warmup" (dense; only the indexers train) or "sparse".
        steps: optimizer steps.
        sequence_length: tokens of a row.
        batch_size: rows of a batch, over all devices.
        microbatches: parts of a batch that are computed one after another, to save memory.
        task: options of the run's task that differ in this stage.
    """

    name: str
    kind: Kind
    steps: int
    sequence_length: int
    batch_size: int
    microbatches: int = 1
    task: Mapping[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all its batches."""
        return self.steps * self.batch_size * self.sequence_length


@dataclass(frozen=True)
class LearningRate:
    """Warm-up, constant, cosine tail, over the steps of all stages.

    Attributes:
        peak: from the end of the warm-up to the start of the decay.
        floor: at the end of the run.
        warmup_steps: of a linear start.
        decay_start: share of the run's steps after which the cosine begins (and the MTP weight falls).
    """

    peak: float = 2.7e-4
    floor: float = 2.7e-5
    warmup_steps: int = 2000
    decay_start: float = 0.8


@dataclass(frozen=True)
class Cadence:
    """How often, in steps, and on how much.

    Attributes:
        checkpoint_every: steps between checkpoints; there is one at the end too.
        keep: checkpoints that stay.
        eval_every: steps between evaluations on held-out text; there is one at the end too. 0: only at the end.
        eval_documents: held-out documents of the evaluations between.
        final_documents: held-out documents of the last evaluation, which `xz` compresses as well; None: all, or the
            first that fill four million tokens of rows or 64 rows (`train.report.final_documents`).
        eval_batch_size: rows of an evaluation batch; on a mesh more, if its devices cannot share so many evenly.
        recall_rows: recall documents, or rows of the task, of an evaluation (the last takes four times as many); 0
            evaluates no recall.
        data_timeout: seconds to wait for a batch before the run saves itself and ends; 0 waits for ever.
    """

    checkpoint_every: int = 500
    keep: int = 3
    eval_every: int = 500
    eval_documents: int = 16
    final_documents: int | None = None
    eval_batch_size: int = 8
    recall_rows: int = 32
    data_timeout: float = 600.0
