"""One optimizer step: accumulated gradients, Muon and AdamW, router biases, and the numbers worth watching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dsv4_jax import model, weights
from dsv4_jax.config import CSA, DeepseekV4Config
from dsv4_jax.facts import Fact
from dsv4_jax.lora import Lora
from dsv4_jax.partition import ALONE, Partition
from dsv4_jax.quantization.policy import Policy, precision_policy
from dsv4_jax.segments import learned_choices
from sharding.partition import MeshPartition
from train import adapted
from train.losses import OBJECTIVES, Batch, LossWeights, Objective, Parts, batch_totals, learned_blocks, training_loss
from train.optimizer import OptimizerConfig, at_step, make_optimizer, update_rms
from train.placement import Placement
from train.spread_muon import SpreadMuon
from train.state import TrainState, add_updates, init_state, join, move_router_biases, split

Metrics = dict[str, jax.Array]
Kind = Literal["dense", "indexer_warmup", "sparse"]


@dataclass(frozen=True)
class Precision:
    """How a step computes; the parameters and the optimizer's state are float32 whatever this says.

    Attributes:
        compute: dtype of activations and matrix products.
        remat: "block" recomputes the activations of each unit of blocks in the backward pass.
        unroll: how many units the layer loop unrolls; 0 all. Unrolled code compiles longer and can run faster.
        policy: what is rounded to FP8 and FP4 (`dsv4_jax.quantization.policy.precision_policy`): "none", "fp8", "v4",
            or one of these with changes, "v4,kv_entry=none".
    """

    compute: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "block"] = "none"
    unroll: int = 1
    policy: str = "none"


@dataclass(frozen=True)
class StepPlan:
    """Everything static that a train step is made of.

    Attributes:
        config: the architecture.
        learning_rate: by optimizer step.
        decay_start: step from which the MTP weight is the decayed one.
        optimizer: its numbers.
        weights: of the losses.
        precision: see there.
        partition: how everything lies on devices.
        lora: adapters that are trained in place of the parameters (`train.adapted`).
    """

    config: DeepseekV4Config
    learning_rate: optax.Schedule
    decay_start: int
    optimizer: OptimizerConfig = OptimizerConfig()
    weights: LossWeights = LossWeights()
    precision: Precision = Precision()
    partition: Partition = ALONE
    lora: Lora | None = None

    @cached_property
    def placement(self) -> Placement:
        """The shardings of state and batches."""
        return Placement(self.partition, self.config, self.lora)

    @property
    def facts(self) -> Any:
        """The facts of the state's parameters."""
        return weights.facts(self.config) if self.lora is None else adapted.facts(self.lora, self.config)

    def masters(self, params: Any) -> Any:
        """The model's parameters from the state's, not rounded."""
        return params if self.lora is None else adapted.model_params(self.lora, params)

    @property
    def rounded_partition(self) -> Partition:
        """The partition for `forward`: it knows how parameters are `rounded`."""
        partition = self.partition
        return replace(partition, rounded=self.policy) if isinstance(partition, MeshPartition) else partition

    def forward(self) -> Callable[..., model.Output]:
        """`model.forward` with the precision filled in; it wants parameters that are `rounded`."""
        chosen = self.precision
        computing = {"dtype": jnp.dtype(chosen.compute), "policy": self.policy}
        return partial(model.forward, remat=chosen.remat, unroll=chosen.unroll or True, **computing)

    @property
    def policy(self) -> Policy:
        """What is rounded, by tensor role."""
        return precision_policy(self.precision.policy, self.config)

    def rounded(self, params: Any) -> Any:
        """The model's parameters as the policy stores them. Their gradient goes to the state's as if not rounded."""
        return self.policy.weights(weights.facts(self.config), self.masters(params))

    def transformation(self, kind: Kind = "dense") -> optax.GradientTransformation:
        """The optimizer of a stage; its state has the same structure in every stage."""
        trainable = partial(moves, OBJECTIVES[kind])
        mesh = self.partition if isinstance(self.partition, MeshPartition) else None
        spread = None if mesh is None else SpreadMuon(mesh.mesh, mesh.strategy)
        return make_optimizer(self.facts, self.learning_rate, self.optimizer, trainable=trainable, orthogonalize=spread)

    def init(self, seed: int, params: Any = None) -> TrainState:
        """A fresh state; see `make_state` for one on many devices."""
        key = jax.random.key(seed)
        params = weights.init(self.config, key) if params is None else params
        if self.lora is not None:
            params = adapted.init(self.lora, self.config, params, jax.random.fold_in(key, 1))
        return init_state(params, self.transformation(), key)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
        return self.placement.placed(jax.eval_shape(lambda: self.init(0)))

    def make_state(self, seed: int, params: Any = None) -> TrainState:
        """A fresh state, made where it lies; the same numbers on every mesh.

        With `params`, float32 and lying so already, these are its masters; they are donated.
        """
        shardings = self.placement.state(jax.eval_shape(lambda: self.init(0)))
        placed = {} if self.placement.mesh_partition is None else {"out_shardings": shardings}
        options = weights.draw_quickly() if params is None else {}
        return jax.jit(self.init, static_argnums=0, donate_argnums=1, compiler_options=options, **placed)(seed, params)


def moves(objective: Objective, fact: Fact) -> bool:
    """Whether a parameter trains under an objective: all but the buffers, or the indexers alone."""
    return fact.optimizer != "none" and (objective.language or fact.role == "indexer")


def make_train_step(plan: StepPlan, kind: Kind, microbatches: int = 1) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step `(state, batch) -> (state, metrics)` of one kind of stage; the state is donated.

    `batch` holds "tokens" and "segment_ids", int32 [B, S], with B a multiple of `microbatches`. The microbatches are
    computed one after another and give the gradient of the whole batch: every loss is divided by the whole batch's
    count of tokens. Metrics are float32 scalars; `StepPlan.init` gives the first state. With "expert_ids" (see
    `make_router`) the learned routers use those experts instead of their own choice.

    Where the loss, the norm of the gradients or the size of the updates is not finite, the returned parameters and
    optimizer state are the old ones, bit by bit, and "skipped" is 1. Only `state.step` moves, so that the run and its
    data go on, and with them the learning rate; the optimizer's moments count the steps that they took.
    """
    placed: dict[str, Any] = {}
    if plan.placement.mesh_partition is not None:
        placed["out_shardings"] = (plan.placement.state(jax.eval_shape(lambda: plan.init(0))), plan.placement.whole)
    return jax.jit(partial(train_step, plan, kind, microbatches), donate_argnums=0, **placed)


def make_router(plan: StepPlan, kind: Kind, microbatches: int = 1) -> Callable[..., jax.Array]:
    """The jitted `(params, batch) -> expert_ids`, int32 [B, S, L, k]: what the L learned routers choose in a step.

    They lie as the batch does, where the step that is given them wants them.
    """
    placed: dict[str, Any] = {}
    if plan.placement.mesh_partition is not None:
        placed["out_shardings"] = plan.placement.batch
    return jax.jit(partial(chosen_experts, plan, kind, microbatches), **placed)


def chosen_experts(plan: StepPlan, kind: Kind, microbatches: int, params: Any, batch: Batch) -> jax.Array:
    """See `make_router`."""
    config, objective = plan.config, OBJECTIVES[kind]
    mtp = bool(config.mtp_layers) and (objective.language or config.mtp_layers[0].attention == CSA)
    forward = partial(
        plan.forward(),
        attention=objective.attention,
        logits=False,
        mtp=mtp,
        record=True,
        partition=plan.rounded_partition,
    )
    params = plan.placement.computing(plan.rounded(params))

    def choose(batch: Batch) -> jax.Array:
        out = forward(config, params, batch["tokens"], segment_ids=batch["segment_ids"])
        return learned_choices(config, out.layers)

    if microbatches == 1:
        return choose(batch)
    chosen = jax.lax.map(choose, _cut(batch, microbatches))
    return chosen.swapaxes(0, 1).reshape(-1, *chosen.shape[2:])


def train_step(plan: StepPlan, kind: Kind, microbatches: int, state: TrainState, batch: Batch):
    """See `make_train_step`."""
    facts, objective = plan.facts, OBJECTIVES[kind]
    mtp_weight = jnp.where(state.step < plan.decay_start, plan.weights.mtp, plan.weights.mtp_decayed)
    gradients, parts = batch_gradients(plan, objective, microbatches, state.params, batch, mtp_weight)
    with jax.named_scope("optimizer"):
        full = plan.placement.stored(join(gradients, jax.tree.map(jnp.zeros_like, state.params)))
        updates, optimizer = plan.transformation(kind).update(full, at_step(state.optimizer, state.step), state.params)
        params = add_updates(state.params, updates, facts)
    if objective.language and plan.lora is None:
        params = move_router_biases(plan.config, params, parts["load"], plan.weights.bias_speed)
    metrics = {name: value for name, value in parts.items() if value.ndim == 0} | routing_metrics(plan.config, parts)
    if objective.attention == "sparse":
        metrics.pop("index_recall", None)  # 1 by construction; an evaluation with dense attention measures it
    metrics |= {"lr": jnp.asarray(plan.learning_rate(state.step), jnp.float32)}
    metrics |= {"grad_norm": optax.tree.norm(gradients)}
    moved = {f"update_rms_{name}": value for name, value in update_rms(updates, facts).items()}
    metrics |= moved
    finite = jnp.isfinite(jnp.stack([metrics["loss"], metrics["grad_norm"], *moved.values()])).all()
    metrics |= {"skipped": 1 - finite.astype(jnp.float32)}
    after = TrainState(state.step + 1, params, optimizer, state.key)
    return jax.tree.map(partial(jnp.where, finite), after, state._replace(step=after.step)), metrics


def batch_gradients(
    plan: StepPlan, objective: Objective, microbatches: int, params: Any, batch: Batch, mtp_weight: jax.Array
) -> tuple[Any, Parts]:
    """Gradients (None where nothing moves) and the parts of the loss, "loss" among them, of a whole batch.

    Weights are rounded once for all microbatches; with adapters, which change what is rounded, in each of them.
    """
    rows = batch["tokens"].shape[0]
    if rows % microbatches:
        raise ValueError(f"a batch of {rows} rows cannot be cut into {microbatches} microbatches of equal size")
    config, forward = plan.config, plan.forward()
    ready = plan.rounded(params) if plan.lora is None else params
    moved, held = split(ready, plan.facts, partial(moves, objective))
    totals = batch_totals(config, batch)

    def loss(moved: Any, batch: Batch) -> tuple[jax.Array, Parts]:
        share = 1 / microbatches
        run = partial(forward, expert_ids=batch.get("expert_ids"))
        params = join(moved, held) if plan.lora is None else plan.rounded(join(moved, held))
        params = plan.placement.computing(params)
        total, parts = training_loss(
            config, params, batch, totals, objective, plan.weights, mtp_weight, run, share, plan.rounded_partition
        )
        return total, parts | {"loss": total}

    gradient = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        return gradient(moved, batch)
    cut = _cut(batch, microbatches)
    shapes = jax.eval_shape(gradient, moved, jax.tree.map(lambda x: x[0], cut))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(lambda sums, batch: (_add(sums, gradient(moved, batch)), None), start, cut)[0]


def _cut(batch: Batch, microbatches: int) -> Batch:
    """[B, ...] as [microbatches, B / microbatches, ...]."""
    # Strided rows, so that each device's rows of a sharded batch spread evenly over the microbatches.
    return {name: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


def _add(sums: tuple[Any, Parts], new: tuple[Any, Parts]) -> tuple[Any, Parts]:
    """Everything of a batch is the sum over its microbatches but the largest mHC error."""
    gradients, parts = jax.tree.map(jnp.add, sums, new)
    return gradients, parts | {"hc_errors": jnp.maximum(sums[1]["hc_errors"], new[1]["hc_errors"])}


def routing_metrics(config: DeepseekV4Config, parts: Parts) -> Metrics:
    """Load of the learned routers (worst max/mean, mean entropy relative to uniform, dead experts) and mHC errors."""
    row, column = parts["hc_errors"]
    metrics = {"hc_row_error": row, "hc_col_error": column}
    learned = [i for i in learned_blocks(config) if i < len(parts["load"])]
    if not learned:
        return metrics
    load = parts["load"][jnp.array(learned)]
    share = load / jnp.maximum(load.sum(-1, keepdims=True), 1)
    entropy = -jax.scipy.special.xlogy(share, share).sum(-1) / jnp.log(load.shape[-1])
    return metrics | {
        "load_max_over_mean": (share.max(-1) * load.shape[-1]).max(),
        "load_entropy": entropy.mean(),
        "dead_experts": (load == 0).sum().astype(jnp.float32),
    }
