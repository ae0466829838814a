"""Presets and the article's layer plan."""

import pytest

from dsv4_jax.analysis.count import activated_parameters, total_parameters
from dsv4_jax.config import CSA, HCA, SLIDING, ConfigError
from dsv4_jax.presets import PRESETS, article_plan, preset


@pytest.mark.parametrize("name", ["nano", "mini", "small"])
def test_the_small_presets_keep_every_mechanism_of_v4(name):
    config = preset(name)
    assert set(config.layer_types) == {SLIDING, CSA, HCA}
    assert set(config.mlp_layer_types) == {"hash_moe", "moe"}
    assert config.mtp_layers and config.hc_mult == 4 and config.rope_scaling is not None
    assert config.max_position_embeddings > config.rope_scaling["original_max_position_embeddings"]
    assert config.n_routed_experts > config.num_experts_per_tok
    # The chosen entries are fewer than the visible ones well before the context ends.
    assert config.index_topk * 4 < config.max_position_embeddings


def test_mini_has_a_hundred_million_parameters_and_small_a_billion():
    assert 0.9e8 < total_parameters(preset("mini")) < 1.1e8
    assert 0.9e9 < total_parameters(preset("small")) < 1.1e9
    assert 0.2e9 < activated_parameters(preset("small")) < 0.3e9


@pytest.mark.parametrize("name", ["mini", "small"])
def test_widths_of_presets_for_accelerators_fill_the_matrix_units(name):
    c = preset(name)
    for width in (c.hidden_size, c.head_dim, c.q_lora_rank, c.o_lora_rank, c.moe_intermediate_size, c.vocab_size):
        assert width % 128 == 0


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="perhaps you meant 'v4-flash'"):
        preset("v4flash")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("csa_per_hca", [3, 4])
def test_the_articles_plan_has_its_ratio_and_its_hca_layers_late(name, csa_per_hca):
    config = preset(name)
    plan = article_plan(config, csa_per_hca)
    kinds = plan.layer_types[: plan.num_hidden_layers]
    heavy = [i for i, kind in enumerate(kinds) if kind == HCA]
    compressed = len(kinds) - kinds.count(SLIDING)
    assert abs(len(heavy) - compressed / (csa_per_hca + 1)) <= 0.5
    assert min(heavy) >= len(kinds) / 3
    assert [kind == SLIDING for kind in kinds] == [kind == SLIDING for kind in config.layer_types[: len(kinds)]]
    assert {layer.ratio for layer in plan.layers} == {layer.ratio for layer in config.layers}
    assert sum(len(segment.unit) for segment in plan.segments) <= 10


def test_the_articles_plan_needs_a_ratio_and_both_kinds():
    with pytest.raises(ConfigError, match="csa_per_hca is 0"):
        article_plan(preset("nano"), 0)
    sliding = preset("nano").replace(num_hidden_layers=2, compress_ratios=(0, 0, 0))
    with pytest.raises(ConfigError, match="both CSA and HCA"):
        article_plan(sliding, 3)
