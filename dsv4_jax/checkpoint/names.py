"""Which tensor of a checkpoint file belongs to which leaf of the parameter tree, in every naming scheme.

Three spellings of one model exist: "released" (DeepSeek's own), "transformers" (its module names, with all experts of a
layer in two tensors), and the mix that transformers' `save_pretrained` writes (released leaf names below `model.`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsv4_jax.baseline import refuse_other_models
from dsv4_jax.config import DeepseekV4Config, LayerSpec
from dsv4_jax.shapes import Shape, block_shapes, layer_slots, mtp_shapes, top_shapes

Scheme = Literal["released", "transformers"]
SCHEMES: tuple[Scheme, ...] = ("released", "transformers")
Part = tuple[range, ...]  # a box in an array: from where to where in each axis


@dataclass(frozen=True)
class Place:
    """One matrix (or vector, or table) of the parameter tree, and the rows of a stored tensor that hold it.

    Attributes:
        leaf: the leaf's path.
        index: where in its leading axes.
        shape: what remains of the leaf there: `(in, out)`, or the shape of what is stored as it is.
        matrix: which matrix of a stored stack (an expert); 0 otherwise.
        row: the first row in that matrix.
        transposed: whether the stored rows are `out`.
    """

    leaf: str
    index: tuple[int, ...]
    shape: Shape
    matrix: int
    row: int
    transposed: bool

    def stored_part(self, part: Part) -> tuple[range, range]:
        """Rows and columns of the stored matrix that hold `part` of the place."""
        rows, columns = part[::-1] if self.transposed else (range(1), *part)[-2:]
        return range(self.row + rows.start, self.row + rows.stop), columns


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint file and its place in the tree.

    Attributes:
        names: the spellings under which it may be stored: released, transformers, then those of the mix; None where a
            scheme has none.
        leaves: the leaf it fills; two leaves when gate and up projection are stored as one tensor.
        index: where in the stacked leaf: (), (repeat,) or (repeat, expert).
        part: shape of that place in the leaf, `[.., in, out]`.
        shape: shape in the file, torch's `[.., out, in]`.
        transposed: False for embeddings, vectors and tables, which are stored as they are.
    """

    names: tuple[str | None, ...]
    leaves: tuple[str, ...]
    index: tuple[int, ...]
    part: Shape
    shape: Shape
    transposed: bool

    @property
    def places(self) -> Iterator[Place]:
        """What it holds, in the order of its rows."""
        if not self.transposed:
            yield Place(self.leaves[0], self.index, self.part, 0, 0, False)
            return
        inner = self.part[-2:]
        for number, lead in enumerate(np.ndindex(*self.part[:-2])):
            for half, leaf in enumerate(self.leaves):
                matrix, block = (number, half) if len(self.shape) == 3 else (0, number)
                yield Place(leaf, (*self.index, *lead), inner, matrix, block * inner[1], True)

    @property
    def matrices(self) -> int:
        """How many matrices are stored one behind the other: the experts, or 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def slots(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every place it fills, expert by expert, so that two tensors that claim one place are noticed."""
        if len(self.part) == 3 and "/experts/" in self.leaves[0]:
            return [(leaf, (*self.index, e)) for leaf in self.leaves for e in range(self.part[0])]
        return [(leaf, self.index) for leaf in self.leaves]


def stored_tensors(config: DeepseekV4Config) -> Iterator[Stored]:
    """Every tensor that a checkpoint of `config` may hold, under any scheme. UserError for models that are no V4."""
    refuse_other_models(config, "a checkpoint in safetensors")
    for leaf, shape in top_shapes(config).items():
        yield _plain(leaf, shape, TOP[leaf])
    for layer, (spec, path, repeat) in enumerate(layer_slots(config)):
        yield from _block(config, spec, f"{path}/", (repeat,), f"layers.{layer}.")
    for module, spec in enumerate(config.mtp_layers):
        yield from _mtp(config, spec, module)


def tensors_of_scheme(config: DeepseekV4Config, scheme: Scheme | Literal["mix"]) -> dict[str, Stored]:
    """The tensors of one scheme by name; only the release names those of the MTP module."""
    column = {"released": 0, "transformers": 1, "mix": -1}[scheme]
    named = ((stored.names[column], stored) for stored in stored_tensors(config))
    return {name: stored for name, stored in named if name is not None}


def scale_names(name: str, scheme: str = "released") -> tuple[str, ...]:
    """Names that the scales of tensor `name` may have, the one of `scheme` first."""
    if not name.endswith(".weight"):
        return (f"{name}_scale_inv",)
    names = (f"{name.removesuffix('.weight')}.scale", f"{name}_scale_inv")
    return names[::-1] if scheme == "transformers" else names


# Leaf: released name, transformers' name, the mix's name.
TOP = {
    "embed": ("embed.weight", "model.embed_tokens.weight", "model.embed_tokens.weight"),
    "head": ("head.weight", "lm_head.weight", "head.weight"),
    "norm": ("norm.weight", "model.norm.weight", "model.norm.weight"),
    "hc_head/fn": ("hc_head_fn", "model.hc_head.hc_fn", "model.hc_head.hc_fn"),
    "hc_head/base": ("hc_head_base", "model.hc_head.hc_base", "model.hc_head.hc_base"),
    "hc_head/scale": ("hc_head_scale", "model.hc_head.hc_scale", "model.hc_head.hc_scale"),
}
# Leaf of a block: released name, transformers' name. The mix has the released name, but for the one exception below.
BLOCK = {
    "attn_norm": ("attn_norm.weight", "input_layernorm.weight"),
    "ffn_norm": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "hc_attn/fn": ("hc_attn_fn", "attn_hc.fn"),
    "hc_attn/base": ("hc_attn_base", "attn_hc.base"),
    "hc_attn/scale": ("hc_attn_scale", "attn_hc.scale"),
    "hc_ffn/fn": ("hc_ffn_fn", "ffn_hc.fn"),
    "hc_ffn/base": ("hc_ffn_base", "ffn_hc.base"),
    "hc_ffn/scale": ("hc_ffn_scale", "ffn_hc.scale"),
    "attn/wq_a": ("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    "attn/q_norm": ("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    "attn/wq_b": ("attn.wq_b.weight", "self_attn.q_b_proj.weight"),
    "attn/wkv": ("attn.wkv.weight", "self_attn.kv_proj.weight"),
    "attn/kv_norm": ("attn.kv_norm.weight", "self_attn.kv_norm.weight"),
    "attn/attn_sink": ("attn.attn_sink", "self_attn.sinks"),
    "attn/wo_a": ("attn.wo_a.weight", "self_attn.o_a_proj.weight"),
    "attn/wo_b": ("attn.wo_b.weight", "self_attn.o_b_proj.weight"),
    "attn/compressor/wkv": ("attn.compressor.wkv.weight", "self_attn.compressor.kv_proj.weight"),
    "attn/compressor/wgate": ("attn.compressor.wgate.weight", "self_attn.compressor.gate_proj.weight"),
    "attn/compressor/ape": ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    "attn/compressor/norm": ("attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight"),
    "attn/indexer/wq_b": ("attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    "attn/indexer/weights_proj": (
        "attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
    "attn/indexer/compressor/wkv": (
        "attn.indexer.compressor.wkv.weight",
        "self_attn.compressor.indexer.kv_proj.weight",
    ),
    "attn/indexer/compressor/wgate": (
        "attn.indexer.compressor.wgate.weight",
        "self_attn.compressor.indexer.gate_proj.weight",
    ),
    "attn/indexer/compressor/ape": ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    "attn/indexer/compressor/norm": (
        "attn.indexer.compressor.norm.weight",
        "self_attn.compressor.indexer.kv_norm.weight",
    ),
    "ffn/gate/weight": ("ffn.gate.weight", "mlp.gate.weight"),
    "ffn/gate/bias": ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    "ffn/gate/tid2eid": ("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    "ffn/shared_experts/w1": ("ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight"),
    "ffn/shared_experts/w3": ("ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight"),
    "ffn/shared_experts/w2": ("ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight"),
}
# `save_pretrained` undoes transformers' renaming of the compressors' norms here too, where nothing was renamed.
MIX_EXCEPTIONS = {"attn/kv_norm": ("attn.norm.weight",)}
MTP = {
    "e_proj": "e_proj.weight",
    "h_proj": "h_proj.weight",
    "enorm": "enorm.weight",
    "hnorm": "hnorm.weight",
    "norm": "norm.weight",
    "hc_head/fn": "hc_head_fn",
    "hc_head/base": "hc_head_base",
    "hc_head/scale": "hc_head_scale",
}
UNTRANSPOSED = ("embed", "ape", "tid2eid")


def _block(c: DeepseekV4Config, spec: LayerSpec, path: str, index: Shape, prefix: str) -> Iterator[Stored]:
    for leaf, shape in block_shapes(c, spec).items():
        if leaf.startswith("ffn/experts/"):
            yield from _experts_one_by_one(path + leaf, shape, index, prefix)
        else:
            released, transformers = BLOCK[leaf]
            mix = (released, *MIX_EXCEPTIONS.get(leaf, ()))
            names = (prefix + released, f"model.{prefix}{transformers}", *(f"model.{prefix}{name}" for name in mix))
            yield _plain(path + leaf, shape, names, index)
    if path.startswith("segments/"):
        yield from _experts_together(c, path + "ffn/experts/", index, f"model.{prefix}mlp.experts.")


def _mtp(c: DeepseekV4Config, spec: LayerSpec, module: int) -> Iterator[Stored]:
    path, prefix = f"mtp/{module}/", f"mtp.{module}."
    for stored in _block(c, spec, f"{path}block/", (), prefix):
        yield dataclasses.replace(stored, names=stored.names[:1] + (None,))
    for leaf, shape in mtp_shapes(c, spec).items():
        if leaf in MTP:
            yield _plain(path + leaf, shape, (prefix + MTP[leaf], None))


def _experts_one_by_one(leaf: str, shape: Shape, index: Shape, prefix: str) -> Iterator[Stored]:
    for expert in range(shape[0]):
        released = f"{prefix}ffn.experts.{expert}.{leaf[-2:]}.weight"
        yield _plain(leaf, shape[1:], (released, None, f"model.{released}"), (*index, expert))


def _experts_together(c: DeepseekV4Config, path: str, index: Shape, prefix: str) -> Iterator[Stored]:
    experts, width, inner = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    gate_up, down = (None, f"{prefix}gate_up_proj", None), (None, f"{prefix}down_proj", None)
    both = (f"{path}w1", f"{path}w3")
    yield Stored(gate_up, both, index, (experts, width, inner), (experts, 2 * inner, width), True)
    yield Stored(down, (f"{path}w2",), index, (experts, inner, width), (experts, width, inner), True)


def _plain(leaf: str, part: Shape, names: tuple[str | None, ...], index: Shape = ()) -> Stored:
    """A tensor that fills one place. Grouped matrices `[G, in, out]` are stored as `[G*out, in]`."""
    transposed = len(part) > 1 and leaf.split("/")[-1] not in UNTRANSPOSED
    if not transposed:
        return Stored(names, (leaf,), index, part, part, False)
    *groups, rows, columns = list(part)
    return Stored(names, (leaf,), index, part, (math.prod(groups) * columns, rows), True)
