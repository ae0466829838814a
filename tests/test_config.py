"""The configuration: both JSON forms, the derived layer plan, errors that name the field and what would be right."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.config import CSA, HCA, SLIDING, ConfigError, DeepseekV4Config, LayerSpec, find_segments
from dsv4_jax.config_json import config_from_json, to_released_json, to_transformers_json
from dsv4_jax.presets import PRESETS, preset

FIXTURES = Path(__file__).parent / "fixtures" / "public"
RELEASED = {  # config.json of V4-Flash, written here by hand from the release
    "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "expert_dtype": "fp4", "hc_eps": 1e-06, "hc_mult": 4, "hc_sinkhorn_iters": 20, "head_dim": 512,
    "hidden_act": "silu", "hidden_size": 4096, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 512,
    "initializer_range": 0.02, "max_position_embeddings": 1048576, "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 64, "num_experts_per_tok": 6, "num_hidden_layers": 43, "num_hash_layers": 3,
    "num_key_value_heads": 1, "num_nextn_predict_layers": 1, "o_groups": 8, "o_lora_rank": 1024, "q_lora_rank": 1024,
    "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
    "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536,
    "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus",
    "sliding_window": 128, "swiglu_limit": 10.0, "tie_word_embeddings": False, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.57.1", "use_cache": True, "vocab_size": 129280,
    "compress_rope_theta": 160000, "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
}  # fmt: skip
PRO = RELEASED | {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
    "index_topk": 1024, "n_routed_experts": 384, "moe_intermediate_size": 3072, "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
}  # fmt: skip


@pytest.mark.parametrize("raw", [RELEASED, PRO], ids=["flash", "pro"])
def test_a_released_config_survives_reading_and_writing_byte_for_byte(raw):
    written = to_released_json(config_from_json(raw))
    assert json.dumps(written, sort_keys=True) == json.dumps(raw, sort_keys=True)


@pytest.mark.parametrize("name", ["pub_a", "pub_b"])
def test_a_transformers_config_survives_reading_and_writing_byte_for_byte(name):
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    written = to_transformers_json(config_from_json(FIXTURES / name))
    assert json.dumps(written, sort_keys=True) == json.dumps(raw, sort_keys=True)


@pytest.mark.parametrize("name", ["pub_a", "pub_b", *PRESETS])
def test_both_forms_describe_the_same_config(name):
    config = preset(name) if name in PRESETS else config_from_json(FIXTURES / name / "config.json")
    assert config_from_json(to_released_json(config)) == config
    assert config_from_json(to_transformers_json(config)) == config
    assert hash(config_from_json(to_transformers_json(config))) == hash(config)


def test_ratios_and_hash_layers_of_any_kind_survive_the_released_form():
    config = DeepseekV4Config(
        num_hidden_layers=3,
        compress_ratios=(8, 2, 16, 0),
        layer_types=(CSA, CSA, HCA),
        mlp_layer_types=("moe", "hash_moe", "moe"),
    )
    assert config.num_hash_layers == 1
    assert config_from_json(to_released_json(config)) == config
    with pytest.raises(ConfigError, match=r"ratios \[2, 8\].*write the released form"):
        to_transformers_json(config)


def test_options_of_the_article_are_written_in_the_released_form_only():
    config = preset("nano").replace(adaptive_routing_temperature=0.5)
    assert config_from_json(to_released_json(config)) == config
    with pytest.raises(ConfigError, match="adaptive_routing_temperature"):
        to_transformers_json(config)


def test_the_fixtures_read_as_their_readme_says():
    a, b = (config_from_json(FIXTURES / name) for name in ("pub_a", "pub_b"))
    assert [str(layer) for layer in a.layers] == ["SWA hash", "SWA hash", "CSA/4 hash", "HCA/8", "CSA/4", "HCA/8"]
    assert [str(layer) for layer in b.layers] == ["HCA/16 hash", "CSA/4 hash", "SWA", "CSA/4", "HCA/16", "CSA/4"]
    assert (a.qk_rope_head_dim, b.qk_rope_head_dim) == (8, 10)
    assert a.rope_scaling is not None and a.rope_scaling["factor"] == 16
    assert b.rope_scaling is None


def test_the_0731_release_reads_as_its_main_stack():
    raw = RELEASED | {"compress_ratios": [*RELEASED["compress_ratios"], 0, 0], "dspark_block_size": 5}
    assert config_from_json(raw) == config_from_json(RELEASED).replace(num_nextn_predict_layers=0)


def test_keys_of_every_transformers_model_are_accepted():
    extra = {"id2label": {}, "pad_token_id": None, "_name_or_path": "x", "output_hidden_states": False, "dtype": None}
    assert config_from_json(RELEASED | extra) == config_from_json(RELEASED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v41"}, "another architecture"),
        ({"model_type": "llama"}, "'deepseek_v4' is needed"),
        ({"hiden_size": 4}, "'hiden_size' .perhaps you meant 'hidden_size'"),
        ({"attention_bias": True}, "attention_bias is True: in V4 it is always False"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8: in V4 it is always 1"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh': one of 'sqrtsoftplus', 'sigmoid'"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hc_mult": 0}, "hc_mult is 0: an integer of at least 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0"),
        ({"o_groups": 7}, "o_groups = 7 does not divide num_attention_heads = 64"),
        ({"qk_rope_head_dim": 63}, "rotary dims come in pairs"),
        ({"qk_rope_head_dim": 1024}, "exceeds head_dim"),
        ({"index_head_dim": 32}, "indexer keys carry the same rotary dims"),
        ({"num_experts_per_tok": 257}, "exceeds n_routed_experts"),
        ({"eos_token_id": 129280}, "outside the vocabulary"),
        ({"compress_ratios": [0] * 43}, "43 values: num_hidden_layers .* = 43 . 1 are needed"),
        ({"compress_ratios": [3] * 44}, "give layer_types as well"),
        ({"compress_ratios": [4] * 44}, "the MTP block: V4's is a sliding layer"),
        ({"compress_ratios": 4}, "compress_ratios is 4: a list"),
        ({"compress_ratios": None}, "neither compress_ratios nor layer_types"),
        ({"layer_types": [SLIDING] * 43}, r"compress_ratios\[2\] is 4 for a sliding_attention layer"),
        ({"layer_types": ["sliding_atention"] * 43}, "perhaps you meant 'sliding_attention'"),
        ({"mlp_layer_types": ["moe"] * 43}, "num_hash_layers is 3 but mlp_layer_types has 0"),
        ({"num_nextn_predict_layers": 3}, "one of 0, 1 is needed"),
        ({"partial_rotary_factor": 0.5}, r"disagree for head_dim = 512: they give \[64, 256\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "V4 has YaRN"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "lack original_max_position_embeddings"),
        ({"rope_scaling": RELEASED["rope_scaling"] | {"factor": 0.5}}, "factor is at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_would_be_right(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_json(RELEASED | change)


def test_files_that_are_no_config_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        config_from_json(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        config_from_json(tmp_path)


def test_replace_derives_the_plan_anew():
    flash = preset("v4-flash")
    assert flash.replace(num_nextn_predict_layers=0).compress_ratios == flash.compress_ratios[:-1]
    assert flash.replace(num_nextn_predict_layers=0).replace(num_nextn_predict_layers=1) == flash
    assert flash.replace(num_hash_layers=1).mlp_layer_types.count("hash_moe") == 1
    short = flash.replace(num_hidden_layers=2, compress_ratios=(4, 128, 0))
    assert short.layer_types == (CSA, HCA, SLIDING)
    with pytest.raises(ConfigError, match="perhaps you meant 'hc_mult'"):
        flash.replace(hc_mul=2)


def test_the_releases_are_a_short_prefix_and_one_repeated_pair():
    pro, flash = (tuple(map(str, preset(name).segments)) for name in ("v4-pro", "v4-flash"))
    assert pro == ("2 x (HCA/128 hash)", "1 x (CSA/4 hash)", "29 x (HCA/128, CSA/4)")
    assert flash == ("2 x (SWA hash)", "1 x (CSA/4 hash)", "20 x (HCA/128, CSA/4)")


SPECS = [LayerSpec(SLIDING, 0, "moe"), LayerSpec(CSA, 4, "moe"), LayerSpec(HCA, 8, "moe")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SPECS), min_size=1, max_size=7))
def test_segments_spell_the_plan_with_the_fewest_traced_blocks(layers):
    segments = find_segments(layers)
    assert [spec for segment in segments for spec in segment.unit * segment.repeats] == layers
    assert sum(len(segment.unit) for segment in segments) == _fewest_blocks(layers)


def _fewest_blocks(layers):
    """By trying every way to cut the plan into pieces."""
    best = len(layers)
    for cuts in itertools.product((False, True), repeat=len(layers) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(layers)]
        best = min(best, sum(_period(layers[a:b]) for a, b in itertools.pairwise(edges)))
    return best


def _period(piece):
    sizes = (n for n in range(1, len(piece) + 1) if len(piece) % n == 0 and piece[:n] * (len(piece) // n) == piece)
    return next(sizes)
