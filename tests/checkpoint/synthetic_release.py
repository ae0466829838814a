"""Quantised checkpoints made of random bytes, and the numbers they stand for, by ml_dtypes and plain numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint.names import tensors_of_scheme
from dsv4_jax.config import CSA, HCA, SLIDING, DeepseekV4Config
from dsv4_jax.config_json import to_released_json, to_transformers_json
from dsv4_jax.shapes import is_table, keeps_float32

FP8_SETTINGS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
SMALL = DeepseekV4Config(
    vocab_size=40, hidden_size=160, num_hidden_layers=5, compress_ratios=(0, 4, 8, 4, 8, 0),
    layer_types=(SLIDING, CSA, HCA, CSA, HCA), num_hash_layers=1, num_attention_heads=4, head_dim=48,
    qk_rope_head_dim=8, q_lora_rank=136, o_lora_rank=72, o_groups=2, sliding_window=8, index_n_heads=3,
    index_head_dim=8, index_topk=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96,
    max_position_embeddings=64, quantization_config=FP8_SETTINGS, expert_dtype="fp4",
)  # fmt: skip
"""No dense matrix is a multiple of the 128 x 128 tiles, and the groups of wo_a begin inside tiles."""
EVEN = SMALL.replace(hidden_size=256, q_lora_rank=128, o_lora_rank=128, head_dim=64, moe_intermediate_size=128,
    index_n_heads=4, index_head_dim=32)  # fmt: skip
"""Every quantised matrix is a multiple of the tiles."""
E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
CODES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "I64": np.int64,
    "I8": np.int8,
}
Raw = dict[str, tuple[str, np.ndarray]]


def write_safetensors(file: Path, tensors: Raw) -> None:
    """A safetensors file of (dtype string, array)."""
    rows, first = {}, 0
    for name, (dtype, array) in tensors.items():
        rows[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [first, first + array.nbytes]}
        first += array.nbytes
    header = json.dumps(rows).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(a.tobytes() for _, a in tensors.values()))


def read_safetensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype string, shape, bytes) of every tensor in a folder's files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, row in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                first, last = row["data_offsets"]
                found[name] = row["dtype"], tuple(row["shape"]), data[8 + length + first : 8 + length + last]
    return found


def stored_as(leaf: str, experts: str) -> str:
    """fp8, fp4 or plain: the rules of the release, experts in the given format."""
    if "/experts/" in leaf:
        return experts
    names = ("wq_a", "wq_b", "attn/wkv", "wo_a", "wo_b", "e_proj", "h_proj")
    return "fp8" if leaf.endswith(names) or "shared_experts/" in leaf else "plain"


def make_release(config: DeepseekV4Config, scheme: Any = "released", experts: str = "fp4") -> tuple[Raw, Raw]:
    """Tensors of a quantised checkpoint, and the same model in plain float32 (tables as they are)."""
    rng = np.random.default_rng(0)
    quantised: Raw = {}
    plain: Raw = {}
    for name, stored in tensors_of_scheme(config, scheme).items():
        leaf, shape = stored.leaves[0], stored.shape
        kind = stored_as(leaf, experts)
        scale_name = name.removesuffix(".weight") + ".scale" if scheme == "released" else f"{name}_scale_inv"
        if is_table(leaf):
            quantised[name] = plain[name] = "I64", rng.integers(0, config.n_routed_experts, shape)
        elif kind == "plain":
            dtype = "F32" if keeps_float32(leaf) else "BF16"
            array = rng.standard_normal(shape).astype(CODES[dtype])
            quantised[name], plain[name] = (dtype, array), ("F32", array.astype(np.float32))
        else:
            make = _random_fp8 if kind == "fp8" else _random_fp4
            values, scales, numbers = make(rng, shape)
            quantised[name] = ("F8_E4M3" if kind == "fp8" else "I8"), values
            quantised[scale_name], plain[name] = ("F8_E8M0", scales), ("F32", numbers)
    return quantised, plain


def write_folder(folder: Path, config: DeepseekV4Config, tensors: Raw, scheme: Any = "released") -> Path:
    """One model.safetensors and its config.json."""
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", tensors)
    if scheme == "transformers":
        raw = to_transformers_json(config.replace(num_nextn_predict_layers=0))
    else:
        raw = to_released_json(config)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def _random_fp8(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scales = rng.integers(110, 125, grid, dtype=np.uint8)
    factors = np.kron(2.0 ** (scales - 127.0), np.ones((128, 128)))[..., : shape[-2], : shape[-1]]
    values = codes.view(ml_dtypes.float8_e4m3fn)
    return values, scales.view(ml_dtypes.float8_e8m0fnu), (values.astype(np.float64) * factors).astype(np.float32)


def _random_fp4(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    codes[..., :1, :] &= 0b1011  # the first row stays at 1.5 and below: half the scale would do
    scales = rng.integers(110, 125, (*shape[:-1], -(-shape[-1] // 32)), dtype=np.uint8)
    factors = np.repeat(2.0 ** (scales - 127.0), 32, axis=-1)[..., : shape[-1]]
    packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8).view(np.int8)
    return packed, scales.view(ml_dtypes.float8_e8m0fnu), (E2M1[codes] * factors).astype(np.float32)
