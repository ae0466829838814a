"""Which mechanism did it: variants of a recipe, each a function from recipe to recipe.

Another kind of model is one more entry in `variants`: whatever a recipe can say, a variant can change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4_jax.analysis.count import total_parameters
from dsv4_jax.config import CSA, HCA, SLIDING, AttentionKind
from dsv4_jax.layer_plan import GQA, MLA, MLA_SPARSE
from dsv4_jax.presets import article_plan
from train.recipe import Recipe

Layer = tuple[AttentionKind, int]
"""Kind of attention and compression ratio."""


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: of its folder.
        about: what is different from the recipe.
        change: makes its recipe; the ablation sets seeds.
    """

    name: str
    about: str
    change: Callable[[Recipe], Recipe]


def variants(recipe: Recipe) -> dict[str, Variant]:
    """All variants of a recipe by name, in the order of the table; those that change nothing are left out."""
    config = recipe.model.config
    csa, hca = (next((layer.ratio for layer in config.layers if layer.attention == kind), 0) for kind in (CSA, HCA))
    found = [
        Variant("full", "the recipe", lambda r: r),
        Variant("no-csa", "CSA layers slide", lambda r: without(r, CSA)),
        Variant("no-hca", "HCA layers slide", lambda r: without(r, HCA)),
        Variant("sliding-only", "all layers slide", lambda r: without(r, CSA, HCA)),
        Variant("dense", "CSA attends all entries", dense_only),
    ]
    if recipe.data.task is not None and recipe.data.task.options.get("offset", 1) > 1:
        found.append(Variant("no-offsets", "documents of training begin at place 0", lambda r: with_offset(r, 1)))
    if csa:
        halves = [k for k in (config.index_topk // 4, config.index_topk // 2) if k]
        found += [Variant(f"topk-{k}", f"the indexer chooses {k} entries", with_topk(k)) for k in halves]
        others = [ratio for ratio in (csa // 2, csa * 2) if ratio > 1]
        found += [Variant(f"csa-{m}", f"CSA compresses by {m}", with_ratio(CSA, m)) for m in others]
    if hca:
        others = [ratio for ratio in (hca // 2, hca * 2) if ratio > 1]
        found += [Variant(f"hca-{m}", f"HCA compresses by {m}", with_ratio(HCA, m)) for m in others]
    if csa and hca:
        plans = (("article-3-1", 3), ("article-4-1", 4))
        found += [Variant(name, f"{n} CSA layers, then one HCA", lambda r, n=n: with_plan(r, n)) for name, n in plans]
    return {variant.name: variant for variant in found + without_a_claim(recipe) + other_models(recipe)}


def without_a_claim(recipe: Recipe) -> list[Variant]:
    """The mechanisms that the article makes claims about, each taken away or added (`train.claims` measures them)."""
    config, found = recipe.model.config, []
    if config.hc_mult > 1:
        found.append(Variant("one-stream", "one residual stream, nothing to mix", lambda r: _with_model(r, hc_mult=1)))
    if recipe.losses.bias_speed and config.n_routed_experts > config.num_experts_per_tok:
        found.append(Variant("no-bias", "router biases do not move", without_bias))
        found.append(Variant("temperature", "adaptive routing temperature", with_temperature))
    return found


def without_bias(recipe: Recipe) -> Recipe:
    """Router biases stay where they begin; the sequence-wise loss goes on balancing."""
    return dataclasses.replace(recipe, losses=dataclasses.replace(recipe.losses, bias_speed=0.0))


def with_temperature(recipe: Recipe) -> Recipe:
    """The article's adaptive routing temperature (3.2)."""
    return _with_model(recipe, adaptive_routing_temperature=0.5)


def other_models(recipe: Recipe) -> list[Variant]:
    """Attention and routing of other models, on the same rows, with experts as wide as the parameters should be many.

    Streams, norms, the optimizer and everything that is not named stay V4's.
    """
    found = [
        Variant("gqa", "grouped-query attention, as in Mixtral", with_baseline(GQA)),
        Variant("mla", "latent attention, as in DeepSeek-V3", with_baseline(MLA)),
        Variant("mla-sparse", "latent attention of chosen tokens, as in V3.2", with_baseline(MLA_SPARSE)),
    ]
    if recipe.model.config.n_routed_experts > 1:
        found.append(Variant("top-2", "two experts by softmax, none shared, as in Mixtral", top_2))
    return found


def without(recipe: Recipe, *kinds: AttentionKind) -> Recipe:
    """Layers of these kinds become sliding layers. Without CSA there is no indexer, so nothing is warmed up."""
    plan: list[Layer] = [(SLIDING, 0) if kind in kinds else (kind, ratio) for kind, ratio in _plan(recipe)]
    changed = _with_plan(recipe, plan)
    return changed if changed.model.config.has_indexer else dense_only(changed)


def dense_only(recipe: Recipe) -> Recipe:
    """Dense attention in every stage, on the same rows; the steps that would warm an indexer up train the model."""
    stages = tuple(dataclasses.replace(stage, kind="dense") for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages)


def with_offset(recipe: Recipe, offset: int) -> Recipe:
    """Training rows begin with 0 to offset - 1 tokens of filler; held-out rows are as before."""
    assert (choice := recipe.data.task) is not None
    choice = dataclasses.replace(choice, options={**choice.options, "offset": offset})
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, task=choice))


def with_topk(count: int) -> Callable[[Recipe], Recipe]:
    """The indexer chooses `count` entries."""
    return lambda recipe: _with_model(recipe, index_topk=count)


def with_ratio(kind: AttentionKind, ratio: int) -> Callable[[Recipe], Recipe]:
    """Layers of a kind compress by `ratio`."""

    def change(recipe: Recipe) -> Recipe:
        plan: list[Layer] = [(own, ratio if own == kind else before) for own, before in _plan(recipe)]
        return _with_plan(recipe, plan)

    return change


def with_plan(recipe: Recipe, csa_per_hca: int) -> Recipe:
    """The article's plan at the depth that it needs: the sliding layers, `csa_per_hca` CSA layers and one HCA layer."""
    ratios = dict(_plan(recipe))
    sliding: list[AttentionKind] = [SLIDING] * sum(kind == SLIDING for kind, _ in _plan(recipe))
    sparse: list[AttentionKind] = [CSA] * csa_per_hca
    kinds: tuple[AttentionKind, ...] = (*sliding, *sparse, HCA)
    deep = _with_plan(recipe, [(kind, ratios[kind]) for kind in kinds])
    planned = article_plan(deep.model.config, csa_per_hca)
    return _with_plan(recipe, [(spec.attention, spec.ratio) for spec in planned.layers])


def with_baseline(kind: AttentionKind) -> Callable[[Recipe], Recipe]:
    """Every layer of the main stack is of this kind, with sizes that follow from the recipe's.

    A quarter as many key-value heads as heads (at least one); a latent and a rotary key as wide together as an entry of
    V4, heads beside their rotary dims and values as wide as the latent; as many chosen tokens as a CSA layer attends
    entries, its window included.
    """

    def change(recipe: Recipe) -> Recipe:
        c = recipe.model.config
        groups = max(n for n in range(1, max(1, c.num_attention_heads // 4) + 1) if c.num_attention_heads % n == 0)
        rank = max(1, c.head_dim - c.qk_rope_head_dim)
        sizes = {"num_key_value_heads": groups, "kv_lora_rank": rank, "qk_nope_head_dim": rank, "v_head_dim": rank}
        plan: list[Layer] = [(kind, 0)] * c.num_hidden_layers
        changed = _with_model(_with_plan(recipe, plan), baseline=sizes)
        if kind != MLA_SPARSE:
            return matched(recipe, dense_only(changed))
        return matched(recipe, _with_model(changed, index_topk=c.index_topk + c.sliding_window))

    return change


def top_2(recipe: Recipe) -> Recipe:
    """Mixtral's routing: two of all experts by softmax, no shared one, no bias; its balance loss weighs 0.02."""
    routing: dict[str, Any] = {"scoring_func": "softmax", "topk_method": "greedy", "routed_scaling_factor": 1.0}
    experts = {"num_experts_per_tok": 2, "n_shared_experts": 0, "num_hash_layers": 0, "swiglu_limit": 0.0}
    changed = _with_model(recipe, **routing, **experts)
    losses = dataclasses.replace(recipe.losses, balance=0.02)
    return matched(recipe, dataclasses.replace(changed, losses=losses))


def matched(recipe: Recipe, changed: Recipe) -> Recipe:
    """`changed` with experts so wide that it has as nearly as many parameters as `recipe` as one width allows."""
    own, wanted = changed.model.config, total_parameters(recipe.model.config)
    wider = own.replace(moe_intermediate_size=own.moe_intermediate_size + 1)
    step = total_parameters(wider) - total_parameters(own)
    width = own.moe_intermediate_size + round((wanted - total_parameters(own)) / step)
    return _with_model(changed, moe_intermediate_size=max(1, width))


def _plan(recipe: Recipe) -> list[Layer]:
    return [(spec.attention, spec.ratio) for spec in recipe.model.config.layers]


def _with_plan(recipe: Recipe, plan: Sequence[Layer]) -> Recipe:
    """The recipe with these layers; routing by hash stays in the first blocks."""
    modules = [(spec.attention, spec.ratio) for spec in recipe.model.config.mtp_layers]
    kinds, ratios = zip(*plan, *modules, strict=True)
    return _with_model(recipe, num_hidden_layers=len(plan), compress_ratios=ratios, layer_types=kinds)


def _with_model(recipe: Recipe, **fields: Any) -> Recipe:
    model = dataclasses.replace(recipe.model, overrides={**recipe.model.overrides, **fields})
    return dataclasses.replace(recipe, model=model)
