"""The quickstart: a V4 with every mechanism, trained on Python source on two CPU cores.

`dsv4 train nano` takes about 12 minutes on 2 cores and ends below the bits per byte of `xz -9` on held-out text. Its
rows are long against the window of 64, and a share of them asks for names stated far beyond it, so that the compressed
branches have something to do.
"""

from train.optimizer import OptimizerConfig
from train.recipe import Cadence, DataChoice, LearningRate, ModelChoice, Recipe, Stage

RECIPE = Recipe(
    name="nano",
    about="about 12 minutes on 2 CPU cores; held-out bits per byte below xz -9, recall far beyond the window",
    model=ModelChoice("nano"),
    data=DataChoice(corpus="python", tokenizer="bpe", recall_share=0.1, recall_pairs=4, recall_distance=128),
    stages=(
        Stage("dense", "dense", steps=250, sequence_length=1024, batch_size=4),
        Stage("indexer", "indexer_warmup", steps=10, sequence_length=1024, batch_size=4),
        Stage("sparse", "sparse", steps=50, sequence_length=1024, batch_size=4),
    ),
    optimizer=OptimizerConfig(clip_norm=1.0),
    learning_rate=LearningRate(peak=8e-3, floor=3e-4, warmup_steps=10, decay_start=0.4),
    cadence=Cadence(checkpoint_every=100, eval_every=0, eval_documents=4, eval_batch_size=4, recall_rows=16),
)
