"""An evaluation on eight devices measures what one does, and each computes its part, whatever the batch size."""

import jax
import numpy as np
import pytest
from devices import on_devices
from jax.sharding import AbstractMesh
from support import TINY, random_params

from dsv4_jax.config import CSA
from dsv4_jax.partition import ALONE
from dsv4_jax.tokenizer import ByteTokenizer
from sharding.mesh import AXES, make_mesh, parse_mesh
from sharding.partition import MeshPartition
from sharding.rules import find_strategy
from train.data.manifest import Manifest
from train.data.retrieval import RecallTask
from train.data.tasks import make_task
from train.data.tokens import TokenStore
from train.evaluate import Evaluator
from train.placement import Placement

CONFIG = TINY.replace(
    vocab_size=288, q_lora_rank=16, n_routed_experts=8, index_n_heads=4, num_nextn_predict_layers=0, num_hash_layers=0,
    num_hidden_layers=1, layer_types=(CSA,), compress_ratios=(4,),
)  # fmt: skip
LENGTH, ROWS, DOCUMENTS = 64, 3, 5  # three rows do not divide over eight devices, and five documents fill no batches


def store():
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, size)) for size in (90, 20, 130, 7, 60, 50, 200)]
    return TokenStore.from_texts(texts, ByteTokenizer(), [i < 5 for i in range(len(texts))], Manifest("made"))


def evaluation(partition, rows):
    """(evaluator, its parameters, the shapes of a batch)."""
    evaluator = Evaluator(CONFIG, store(), LENGTH, rows, placement=Placement(partition, CONFIG))
    params = random_params(CONFIG)
    if isinstance(partition, MeshPartition):
        params = jax.device_put(params, evaluator.placement.state(params))
    shape = jax.ShapeDtypeStruct((evaluator.batch_size, LENGTH), np.int32)
    return evaluator, params, {"tokens": shape, "segment_ids": shape}


def measured(evaluator, params):
    """Numbers of an evaluation, and how many questions were asked."""
    recall = evaluator.recall(params, "sparse", RecallTask(2, 16), DOCUMENTS)
    score, found = evaluator.task(params, "sparse", make_task("mqar", {"n_pairs": 2}), DOCUMENTS, 4)
    found |= evaluator.heldout(params, "sparse") | {"recall": recall.accuracy, "task": score.accuracy}
    return found, [len(np.concatenate(each.correct)) for each in (recall, score)]


def operations(evaluator, params, batch):
    """Of one device, for one batch."""
    return evaluator._scores["sparse"].lower(params, batch).compile().cost_analysis()["flops"]


def on_eight(strategy, mesh):
    made = evaluation(MeshPartition(make_mesh(parse_mesh(mesh, 8)), find_strategy(strategy)), ROWS)
    return *measured(*made[:2]), operations(*made)


def test_eight_devices_share_an_evaluation_whose_rows_do_not_divide():
    """Against one device with a row a batch, which no padding fills."""
    found, asked, flops = on_devices(8, on_eight, "expert-fsdp", "expert=4,fsdp=2")
    wanted, asked_alone = measured(*evaluation(ALONE, 1)[:2])
    assert found == pytest.approx(wanted, rel=1e-5) and "heldout_bpb" in found and "task_loss" in found
    assert asked == asked_alone
    assert flops < 0.2 * operations(*evaluation(ALONE, 8)), "an eighth, and what is done on every device"


@pytest.mark.parametrize(
    ("strategy", "sizes", "rows", "full"),
    [
        ("fsdp", {"fsdp": 256}, 8, 256),
        ("fsdp", {"data": 2, "fsdp": 4}, 8, 8),
        ("data", {"data": 3}, 8, 9),
        ("expert-tensor", {"data": 2, "expert": 8, "tensor": 4}, 3, 4),
        ("long-context", {"expert": 4, "context": 8}, 6, 8),
    ],
)
def test_a_batch_is_made_full_for_the_axes_that_share_rows(strategy, sizes, rows, full):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    assert Placement(MeshPartition(mesh, find_strategy(strategy)), CONFIG).full_batch(rows) == full
