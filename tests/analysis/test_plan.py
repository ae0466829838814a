"""`dsv4 plan`: the report's ratios, counts and caches made elsewhere, and what the command prints."""

import subprocess
import sys

import jax
import pytest

from dsv4_jax.analysis import claims, count, flops, sizing
from dsv4_jax.analysis.baselines import DeepseekV32, gqa_serving, v32_serving
from dsv4_jax.analysis.hardware import HARDWARE, hardware
from dsv4_jax.analysis.memory import FORMATS, cache_parts, cache_plan
from dsv4_jax.analysis.serving import v4_serving
from dsv4_jax.analysis.weight_bytes import WEIGHTS, total_bytes, weight_parts
from dsv4_jax.checkpoint import storage
from dsv4_jax.cli import main
from dsv4_jax.cli.plan import parse_tokens
from dsv4_jax.errors import UserError
from dsv4_jax.layers.kv_cache import init_cache
from dsv4_jax.presets import PRESETS, preset
from train.flops import training_flops_per_token

MILLION = 1 << 20
PRO, FLASH = preset("v4-pro"), preset("v4-flash")
H200 = hardware("h200")


# The report's numbers


@pytest.mark.parametrize(("name", "cache", "token"), [("v4-pro", 10, 27), ("v4-flash", 7, 10)])
@pytest.mark.parametrize("context", [10**6, MILLION])
def test_at_a_million_tokens_the_shares_of_v32_round_to_the_reported_percents(name, cache, token, context):
    own, v32 = v4_serving(preset(name), context), v32_serving(context)
    assert round(100 * own.token / v32.token) == cache
    assert 100 * own.sequence / v32.sequence == pytest.approx(cache, abs=0.51)  # windows and tails: 0.05 more
    assert round(100 * own.flops / v32.flops) == token


@pytest.mark.parametrize("config", [PRO, FLASH])
def test_the_cache_is_two_percent_of_grouped_query_attentions(config):
    own, gqa = v4_serving(config, MILLION), gqa_serving(config, MILLION)
    assert round(100 * own.sequence / gqa.sequence) == 2
    assert gqa.sequence == config.num_hidden_layers * MILLION * 2 * 8 * 128 * 2


def test_flops_of_one_token_of_pro_are_what_a_hand_counts():
    products = {(p.component, p.operand): p.flops for p in flops.token_products(PRO, MILLION)}
    entry = 4 * 128 * 512  # FLOPs of all heads with one entry
    assert products["attention: window", "bf16"] == 61 * 128 * entry
    assert products["attention: CSA", "bf16"] == 30 * 1024 * entry
    assert products["attention: HCA", "bf16"] == 31 * (MILLION // 128) * entry
    assert products["index scores", "fp4"] == 30 * (MILLION // 4) * 2 * 64 * 128
    assert products["routed experts", "fp8"] == 61 * 6 * 2 * 3 * 7168 * 3072
    assert products["head", "bf16"] == 2 * 7168 * 129280
    assert products["mHC", "float32"] == 2 * (61 * 2 * 24 + 4) * 4 * 7168


def test_v32_has_the_published_parameters():
    model = DeepseekV32()
    indexers = 61 * (1536 * 64 * 128 + 7168 * 128 + 7168 * 64)  # what V3.2 adds to the 671B and 37B of V3
    assert round((model.parameters - indexers) / 1e9) == 671
    assert round((model.activated - indexers) / 1e9) == 37
    assert (model.entry, model.key) == (656, 132)  # FlashMLA's and DeepGEMM's layouts


# Against counts, caches and checkpoints made elsewhere


@pytest.mark.parametrize("config", [*PRESETS.values(), preset("nano").replace(tie_word_embeddings=True)])
def test_products_with_parameters_are_twice_the_activated_matrices(config):
    products = sum(p.flops for p in flops.matrix_products(config))
    vectors = {"norms", "embedding"}
    parts = {p.name: p.activated for p in count.count_parameters(config) if p.name not in vectors}
    if config.tie_word_embeddings:
        parts["head"] = config.vocab_size * config.hidden_size
    unused = 1e-2 if config.hidden_size < 4096 else 1e-3  # sinks, ape, biases and scales multiply nothing
    assert products == pytest.approx(2 * sum(parts.values()), rel=unused)
    assert products < 2 * sum(parts.values())


def test_the_mean_over_a_row_is_the_forward_third_of_training():
    nano, length = preset("nano"), 300
    config = nano.replace(
        num_nextn_predict_layers=0, compress_ratios=nano.compress_ratios[:5], layer_types=nano.layer_types[:5]
    )
    total = sum(p.flops for n in range(1, length + 1) for p in flops.token_products(config, n))
    assert 3 * total / length == pytest.approx(training_flops_per_token(config, length, "sparse"), rel=1e-9)


@pytest.mark.parametrize("config", [PRO, FLASH])
def test_released_weights_weigh_what_the_release_stores(config):
    assert total_bytes(config) == storage.total_bytes(storage.inventory(config))
    plain = config.replace(quantization_config=None, expert_dtype=None)
    assert total_bytes(config, "bf16") == storage.total_bytes(storage.inventory(plain))
    fp8 = config.replace(expert_dtype=None)
    assert total_bytes(config, "fp8") == storage.total_bytes(storage.inventory(fp8))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("config", PRESETS.values())
def test_weights_hold_every_counted_parameter_once(config, weights):
    numbers = sum(part.numbers for part in weight_parts(config, weights))
    assert numbers == count.total_parameters(config) + count.table_entries(config)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("config", [preset("nano"), preset("mini"), PRO])
@pytest.mark.parametrize("tokens", [1, 1000, 4096])
@pytest.mark.parametrize("in_words", [False, True])
def test_cache_parts_add_up_to_the_plan_and_to_the_allocated_cache(config, tokens, format, in_words):
    total = sum(part.bytes for part in cache_parts(config, tokens, format, in_words))
    assert total == cache_plan(config, format, in_words).sequence(tokens)
    cache = jax.eval_shape(lambda: init_cache(config, 1, tokens, format, in_words=in_words))
    leaves = jax.tree.leaves((cache.pools, cache.states))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == pytest.approx(total, rel=0.01)


# Properties


@pytest.mark.parametrize("make", [lambda n: v4_serving(PRO, n), v32_serving, lambda n: gqa_serving(PRO, n)])
def test_a_longer_context_never_costs_less(make):
    plans = [make(1 << bits) for bits in range(0, 21, 2)]
    for before, after in zip(plans, plans[1:], strict=False):
        assert before.sequence <= after.sequence
        assert before.read <= after.read
        assert before.flops < after.flops
        assert before.weights == after.weights


def test_a_larger_batch_costs_more_bytes_and_fewer_per_token():
    own = v4_serving(FLASH, MILLION)
    for batch in (1, 2, 8, 64, 512):
        assert own.resident(2 * batch) - own.resident(batch) == batch * own.sequence
        assert own.step_bytes(batch) < own.step_bytes(2 * batch) < 2 * own.step_bytes(batch)
        assert own.step_bytes(batch) <= own.dense + own.routed + batch * own.read
    chosen = own.routed * 6 / 256  # one token reads the experts it chooses
    assert own.step_bytes(1) == pytest.approx(own.dense + chosen + own.read, rel=1e-12)


@pytest.mark.parametrize("context", [MILLION, 100_001])
def test_agents_over_one_document_hold_its_blocks_once(context):
    own, plan = v4_serving(PRO, context), cache_plan(PRO)
    for agents in (1, 10, 1000):
        assert own.agents(agents) == plan.shared(context, agents)
    assert own.agents(1) == own.sequence
    assert own.agents(11) - own.agents(10) == own.own < 0.05 * own.sequence


def test_narrower_weights_are_lighter_and_cost_fewer_fp8_equivalents():
    released, fp8, bf16 = (v4_serving(PRO, MILLION, weights) for weights in WEIGHTS)
    assert released.weights < fp8.weights < bf16.weights
    assert released.flops == fp8.flops < bf16.flops  # FP4 experts multiply as FP8
    raw = [sum(product.flops for product in plan.products) for plan in (released, fp8, bf16)]
    assert raw[0] == raw[1] == raw[2]


@pytest.mark.parametrize("chip", HARDWARE.values(), ids=HARDWARE)
def test_the_chips_hold_what_is_asked_and_one_less_would_not(chip):
    wanted = sizing.fit(1e12, chip, 0.1)
    assert 0.9 * chip.hbm_bytes * wanted.chips >= 1e12 > 0.9 * chip.hbm_bytes * (wanted.chips - 1)
    assert (wanted.hosts - 1) * chip.chips_per_host < wanted.chips <= wanted.hosts * chip.chips_per_host
    assert chip.bf16_flops <= chip.fp8_flops <= chip.fp4_flops
    assert chip.peak("float32") < chip.peak("bf16")


def test_bounds_are_the_longer_of_reading_and_multiplying():
    own = v4_serving(FLASH, MILLION)
    bounds = sizing.decode_bounds(own, 8, 4, H200)
    assert bounds.memory == own.step_bytes(8) / (4 * 4.8e12)
    assert bounds.tokens == 8 / max(bounds.memory, bounds.compute)
    assert bounds.memory > bounds.compute
    twice = sizing.decode_bounds(own, 8, 8, H200)
    assert twice.tokens == pytest.approx(2 * bounds.tokens)


# The article's questions


def test_nodes_for_pro_and_flash_are_those_of_the_arithmetic():
    needed = {weights: v4_serving(PRO, MILLION, weights).resident(8) for weights in WEIGHTS}
    assert [sizing.fit(needed[weights], H200).hosts for weights in ("bf16", "fp8", "released")] == [3, 2, 1]
    assert sizing.fit(needed["bf16"], H200, 0.1).hosts == 4
    assert all(sizing.fit(v4_serving(FLASH, MILLION, weights).resident(8), H200, 0.1).hosts == 1 for weights in WEIGHTS)
    assert round(total_bytes(PRO, "bf16") / 1e12, 1) == 3.2


def test_the_article_agrees_with_the_arithmetic_but_for_the_agents():
    found = [*claims.article_claims(PRO, MILLION, 8, 10), *claims.article_claims(FLASH, MILLION, 8, 10)]
    assert [claim.source for claim in found if claim.agrees is False] == ["article 4.3"] * 2
    assert all("10 private copies" in claim.computed for claim in found if claim.agrees is False)
    assert not list(claims.article_claims(preset("nano"), MILLION, 8, 10))


def test_break_even_is_cost_over_price():
    prices = sizing.Prices(api=2.0, chip=36_000, months=36, hour=1.0, month=500)
    assert prices.monthly(8) == pytest.approx(8 * (1000 + 730.5) + 500)
    assert prices.break_even(8) == pytest.approx(prices.monthly(8) / 2 * 1e6)
    (claim,) = claims.break_even_claims(prices, 8, capacity=1e9)
    assert "7,172M tokens a month, above the 1,000M" in claim.computed and claim.agrees is False
    with pytest.raises(UserError, match="--price-api"):
        sizing.Prices(hour=1).break_even(8)
    assert list(claims.break_even_claims(sizing.Prices(api=1), 8, 1e9)) == []


# The command


def printed(capsys, monkeypatch, *arguments):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["plan", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_command_reproduces_the_report_and_prints_its_assumptions(capsys, monkeypatch):
    out = printed(capsys, monkeypatch, "v4-pro")
    for said in ("about 10% of V3.2's KV cache", "about 27% of V3.2's single-token FLOPs", "about 2% of a BF16 GQA-8"):
        assert f"{said}" in out
    assert "5,023.7 bytes / 48,068 bytes per token = 10.45%" in out and "5.29 GB / 50.40 GB = 10.50%" in out
    assert "319.74 GFLOP / 1,194.64 GFLOP = 26.76%" in out
    assert "1,598,837,347,742 parameters (MTP included) x 2 bytes = 3.1977 TB" in out
    assert "3 of them, 4 with 10% kept free" in out
    assert "5.27 GB of blocks once + 10 x 23.3 MB of windows and tails = 5.50 GB" in out
    assert "BF16 counts twice, float32 four times, FP4 half" in out
    assert "break-even: give --price-api" in out


def test_flash_fits_one_node_and_prices_give_a_break_even(capsys, monkeypatch):
    arguments = "--context 128K --batch 64 --hardware tpu7x --weights fp8 --price-api 0.5 --price-hour 3".split()
    out = printed(capsys, monkeypatch, "v4-flash", *arguments)
    assert "131,072 tokens of context, batch 64" in out and "tpu7x: 206 GB, 7.38 TB/s" in out
    assert "about 7%" not in out  # the report speaks of one million tokens
    assert "4 chips cost 8,766 a month" in out and "17,532M tokens a month" in out


@pytest.mark.parametrize("model", ["nano", "mini"])
def test_small_models_are_planned_without_the_releases_claims(model, capsys, monkeypatch):
    out = printed(capsys, monkeypatch, model, "--context", "1000", "--cache", "float32", "--weights", "bf16")
    assert "article" not in out and "report:" not in out and "compared" in out


def test_a_context_beyond_the_models_is_said(capsys, monkeypatch):
    assert "made for 4,096 tokens at most" in printed(capsys, monkeypatch, "nano", "--context", "8K")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["v4-por"], "perhaps you meant 'v4-pro'"),
        (["v4-pro", "--hardware", "a100"], "known are h100, h200, b200, v5e, v5p, v6e, tpu7x"),
        (["v4-pro", "--weights", "fp4"], "'released' (FP4 experts"),
        (["v4-pro", "--cache", "fp8"], "float32, bfloat16, deployed"),
        (["v4-pro", "--context", "1G"], "128K (x 1,024)"),
        (["v4-pro", "--context", "0"], "1M (x 1,048,576)"),
        (["v4-pro", "--batch", "0"], "--batch 0"),
        (["v4-pro", "--reserve", "1"], "--reserve is 1"),
        (["v4-pro", "--price-hour", "-1"], "price hour is -1"),
        (["v4-pro", "--price-months", "0"], "more than 0 months"),
    ],
)
def test_what_cannot_be_planned_is_answered_in_a_sentence(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_contexts_are_written_as_people_write_them():
    for text, tokens in (("1M", MILLION), ("128k", 131072), ("1.5K", 1536), ("200_000", 200000), ("1,000", 1000)):
        assert parse_tokens(text) == tokens


def test_planning_a_giant_does_not_import_jax():
    code = "import sys; from dsv4_jax.cli import main; main(['plan', 'v4-pro']); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_help_has_the_examples(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "dsv4 plan v4-pro --context 1M --batch 8 --agents 10 --hardware h200" in capsys.readouterr().out
