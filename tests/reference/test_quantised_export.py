"""transformers reads the quantised checkpoints that we write, and computes our logits from them.

Without a GPU transformers 5.23 undoes FP8 and FP4 while it loads, for experts stored one by one (the release's names)
and not for its own joined ones; of these the names, shapes and dtypes are compared with its quantised modules.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import run_where_choices_are_clear, torch, transformers
from support import random_params, transformers_names

from dsv4_jax import model
from dsv4_jax.checkpoint import inventory, load_checkpoint, save
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import to_transformers_json

pytestmark = pytest.mark.reference

LOGITS = 2e-5  # absolute
# Every quantised matrix is a multiple of the 128 x 128 tiles: transformers infers the tiles from the shapes.
CONFIG = DeepseekV4Config(
    vocab_size=48, hidden_size=128, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), num_hash_layers=1,
    num_attention_heads=8, head_dim=32, qk_rope_head_dim=8, q_lora_rank=128, o_lora_rank=64, o_groups=2,
    sliding_window=7, index_n_heads=8, index_head_dim=16, index_topk=5, n_routed_experts=5, num_experts_per_tok=2,
    moe_intermediate_size=128, swiglu_limit=1.0, torch_dtype="float32",
)  # fmt: skip


def from_pretrained(folder):
    return transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32,
        output_loading_info=True, quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )  # fmt: skip


SETTINGS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0"}
SETTINGS |= {"weight_block_size": [128, 128]}
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.int8, "I64": torch.int64}


@pytest.fixture(scope="module", params=["fp4", "fp8"])
def exported(request, tmp_path_factory):
    """(folder, transformers' model of it, its loading report) of a release and of a base model."""
    pytest.importorskip("accelerate", reason="transformers loads FP8 checkpoints only with accelerate installed")
    expert_dtype = "fp4" if request.param == "fp4" else None
    config = CONFIG.replace(quantization_config=SETTINGS, expert_dtype=expert_dtype)
    folder = tmp_path_factory.mktemp("quantised") / request.param
    save(folder, config, random_params(CONFIG), quantise="release")
    return folder, *from_pretrained(folder)


@pytest.mark.parametrize("expert_dtype", ["fp4", None])
def test_the_other_scheme_is_that_of_transformers_quantised_modules(expert_dtype):
    config = CONFIG.replace(quantization_config=SETTINGS, expert_dtype=expert_dtype, num_nextn_predict_layers=0)
    theirs = quantised_modules(to_transformers_json(config))
    ours = inventory(config, "transformers")
    assert {name for name in theirs if "inv_freq" not in name} == set(ours)
    for name, spec in ours.items():
        assert tuple(theirs[name].shape) == spec.shape, name
        assert theirs[name].dtype == DTYPES.get(spec.dtype, torch.float32), name


def quantised_modules(raw):
    """Parameters and buffers of transformers' model with its FP8 and FP4 layers, without memory for them."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    config = transformers.DeepseekV4Config(**{key: raw[key] for key in raw if key != "architectures"})
    settings = {key: value for key, value in config.quantization_config.items() if key != "quant_method"}
    settings = transformers.FineGrainedFP8Config(**settings)
    with torch.device("meta"):
        net = transformers.DeepseekV4ForCausalLM(config)
        quantizer = FineGrainedFP8HfQuantizer(settings, pre_quantized=True)
        kept = quantizer.get_modules_to_not_convert(net, settings.modules_to_not_convert, net._keep_in_fp32_modules)
        net = replace_with_fp8_linear(net, kept, quantization_config=settings, pre_quantized=True)
    return dict([*net.named_parameters(), *net.named_buffers()])


def test_transformers_reads_the_numbers_that_we_read(exported):
    folder, theirs, report = exported
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in report["unexpected_keys"])
    config, params = load_checkpoint(folder, dtype=np.float32)
    ours = transformers_names(config, params)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_array_equal(parameter.detach().float().numpy(), ours[name], err_msg=name)


def test_transformers_computes_our_logits_from_a_quantised_export(exported):
    folder, theirs, _ = exported
    theirs = theirs.float().eval()
    config, params = load_checkpoint(folder, dtype=np.float32)
    expected = run_where_choices_are_clear(theirs, seed=0, length=141)
    logits = jax.jit(lambda p, t: model.forward(config, p, t).logits)(params, jnp.asarray(expected.tokens, jnp.int32))
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=LOGITS)
