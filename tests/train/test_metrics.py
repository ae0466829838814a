"""The log holds each step once, nothing waits for the device, and a rate that is not known is not guessed."""

import io
import json
import math
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import plots, progress
from train.metrics import Meter, MetricsWriter, Progress, device_peak, measured_matmul_peak, read_metrics, sparkline


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_step_is_written_one_step_late_and_the_last_at_the_end(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        assert writer.write(1, {"loss": jnp.float32(0.1), "stage": "dense"}) is None
        assert writer.path.read_text() == ""
        assert writer.write(2, {"loss": jnp.bfloat16(0.5)}) == {
            "step": 1,
            "loss": float(np.float32(0.1)),
            "stage": "dense",
        }
        assert writer.write(2, {"heldout_bpb": 1.75}) is None
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": 0.5, "heldout_bpb": 1.75}


def test_writing_does_not_wait_for_the_step_that_is_running(tmp_path):
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 40, lambda _, y: jnp.sin(y @ y), x).sum()

    x = jnp.ones((700, 700)) / 700
    slow(x).block_until_ready()
    start = time.perf_counter()
    slow(x).block_until_ready()
    duration = time.perf_counter() - start
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": jnp.float32(1)})
        value = slow(x)
        start = time.perf_counter()
        writer.write(2, {"loss": value})
        assert time.perf_counter() - start < duration / 2


def test_resuming_drops_later_steps_and_a_line_cut_short(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "lo')
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 8))
    with pytest.raises(FileExistsError, match="log of an earlier run"):
        MetricsWriter(tmp_path, tensorboard=False)
    with MetricsWriter(tmp_path, resume_step=4, tensorboard=False) as writer:
        writer.write(5, {"loss": 2.0})
    assert steps_of(path) == [1, 2, 3, 4, 5] and read_metrics(path)[-1]["loss"] == 2.0
    with MetricsWriter(tmp_path, resume_step=0, tensorboard=False):
        assert path.read_text() == ""


def test_a_flush_before_a_checkpoint_leaves_no_step_missing(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})
    writer.flush()  # The checkpoint of step 3 is saved here; the process is killed before step 4 is written.
    writer.write(4, {"loss": 1.0})
    with MetricsWriter(tmp_path, resume_step=3, tensorboard=False) as resumed:
        resumed.write(4, {"loss": 1.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]


def test_values_that_are_not_finite_stay_strict_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(
            1,
            {
                "loss": jnp.nan,
                "grad_norm": jnp.float32(-jnp.inf),
                "load": jnp.array([1.0, jnp.nan]),
                "mfu": None,
                "dead_experts": jnp.int32(3),
            },
        )

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["load"] == [1.0, None] and line["dead_experts"] == 3
    back = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(back["loss"]) and back["grad_norm"] == -math.inf and back["mfu"] is None


def test_the_losses_in_the_log_are_bitwise_those_of_the_device(tmp_path):
    losses = jax.random.normal(jax.random.key(0), (50,))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step, loss in enumerate(losses):
            writer.write(step, {"loss": loss})
    logged = np.array([line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")], np.float32)
    assert logged.tobytes() == np.asarray(losses).tobytes()


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(1.5), "stage": "dense", "mfu": None})
    events = [p for p in (tmp_path / "tensorboard").iterdir() if "tfevents" in p.name]
    assert len(events) == 1 and b"loss" in events[0].read_bytes()


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
        assert writer.write(2, {"loss": 1.0}) is None
    assert not (tmp_path / "run").exists()


def test_rates_leave_out_the_first_step_and_whatever_a_pause_covers():
    meter = Meter(peak_flops=1e6, window=3)
    assert meter.tick(100, 50.0, now=1000.0) == {"tokens_per_s": None, "flops_per_token": 50.0, "mfu": None}
    assert meter.tick(100, 50.0, now=1002.0) == {"tokens_per_s": 50.0, "flops_per_token": 50.0, "mfu": 2500 / 1e6}
    assert meter.tick(400, 50.0, now=1004.0)["tokens_per_s"] == 125.0
    meter.pause()
    assert meter.tick(100, 50.0, now=2000.0)["tokens_per_s"] is None
    assert Meter(None).tick(1, 2.0) == {"tokens_per_s": None, "flops_per_token": 2.0, "mfu": None}


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("cpu", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 MIG 1g.10gb", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets_or_unknown(kind, tera):
    assert progress.peak_of(kind) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpu_has_no_peak_until_it_is_measured():
    assert device_peak(jax.devices("cpu")) is None
    assert 1e8 < measured_matmul_peak(size=256, seconds=0.05) < 1e14


def test_plain_lines_come_every_few_seconds_and_leave_out_what_is_unknown():
    out = io.StringIO()
    with Progress(1000, every=10, stream=out) as bar:
        for step in range(1, 31):
            bar.update({"step": step, "stage": "dense", "loss": 2.0, "tokens_per_s": 1234.5, "mfu": None}, now=step)
        bar.update({"step": 31, "mfu": 0.4321, "heldout_bpb": 1.5, "tokens_per_s": None}, now=31.0)
        bar.update(None)
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == "step 1/1,000 | dense | loss 2.0000 | 1,234 tokens/s"
    assert lines[1] == "step 11/1,000 | dense | loss 2.0000 | 1,234 tokens/s | 16m 29s left"
    assert lines[3] == "step 31/1,000 | held-out 1.500 bits/byte | MFU 43.2% | 16m 09s left"


def test_time_left_follows_tokens_when_the_batch_grows():
    bar = Progress(1000, total_tokens=10**6, stream=io.StringIO())
    assert bar.seconds_left({"step": 1, "tokens": 400_000, "tokens_per_s": 1000.0}) == 600.0
    assert bar.seconds_left({"step": 1}) is None


def test_a_terminal_gets_one_live_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Progress(10, stream=out) as bar:
        for step in range(1, 11):
            bar.update({"step": step, "loss": 1.0})
        bar.note("[saved]")
    assert "step 10/10" in out.getvalue() and "[saved]" in out.getvalue()


def test_a_sparkline_falls_with_the_loss_and_leaves_gaps():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, math.nan, None, 2.0]) == "▁  █"
    assert len(sparkline(range(1000), width=40)) == 40 and sparkline([]) == "" and sparkline([3, 3]) == "▁▁"


def fake_run(folder: pathlib.Path, steps: int = 300, indexer: bool = True) -> pathlib.Path:
    rng = np.random.default_rng(0)
    with MetricsWriter(folder, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            stage = "dense" if step < 0.5 * steps else "indexer warm-up" if step < 0.6 * steps else "sparse"
            t = step / steps
            ce = 2.2 + 6.5 * math.exp(-9 * t) + rng.normal(0, 0.06)
            line = {
                "stage": stage if indexer else "dense",
                "tokens": step * 4096,
                "loss": ce + 0.3 * (ce + 0.4),
                "ce": ce,
                "mtp": ce + 0.4,
                "lr": 3e-3 * min(1, 20 * t, 0.1 + 3 * (1 - t)),
                "grad_norm": 0.4 + 3 * math.exp(-20 * t) + abs(rng.normal(0, 0.1)),
                "load_max_over_mean": 1.2 + 2 * math.exp(-8 * t) + rng.normal(0, 0.05),
                "tokens_per_s": 5600 if stage == "dense" else 7100,
                "load_entropy": 1 - 0.2 * math.exp(-8 * t),
                "dead_experts": int(4 * math.exp(-20 * t)),
                "update_rms_muon": 0.18,
                "update_rms_adamw": 0.2 - 0.05 * t,
            }
            if indexer and stage != "dense":
                line |= {
                    "index_kl": 1.5 * math.exp(-14 * (t - 0.5)),
                    "index_recall": 0.95 - 0.5 * math.exp(-18 * (t - 0.5)),
                }
            if step % (steps // 10) == 0:
                line |= {"heldout_bpb": ce * 0.75 - 0.2, "retrieval_accuracy": min(1.0, t * t)}
            writer.write(step, line)
    return folder / "metrics.jsonl"


def test_the_picture_has_a_panel_for_what_was_measured_and_none_for_what_was_not(tmp_path):
    pytest.importorskip("matplotlib")
    full = plots.plot_curves(fake_run(tmp_path / "a"), tmp_path / "a.svg", baselines={"xz -9": 2.4}).read_text()
    for label in ("Training loss", "Held-out", "xz -9  2.400", "Expert load", "Indexer", "indexer warm-up"):
        assert re.search(f"<!-- .*{re.escape(label)}.* -->", full), label
    plain = plots.plot_curves(fake_run(tmp_path / "b", 40, indexer=False), tmp_path / "b.svg").read_text()
    assert "<!-- Training loss" in plain and "Indexer" not in plain
    assert plots.plot_curves(tmp_path / "a" / "metrics.jsonl", tmp_path / "a.png").stat().st_size > 10_000


def test_an_empty_log_says_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no steps"):
        plots.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "a.png")
