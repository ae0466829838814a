"""The quickstart: a V4 with every mechanism, trained on Python source on two CPU cores.

`dsv4 train nano` took 628 s on 2 cores of an AMD EPYC and ended at 1.747 bits per byte of held-out text, where `xz -9`
has 1.756. With so few steps, many small batches from many documents teach most: short rows first (120 steps of 8 x 256
and 40 of 4 x 1024 came to 2.24, 100 of 4 x 1024 to 2.37), then rows long against the window of 64. A share of the rows
asks for names stated beyond it; that is not learned yet (1.2%, chance 25%). The router biases move faster than in large
runs, or a few experts would take all.
"""

from train.losses import LossWeights
from train.optimizer import OptimizerConfig
from train.recipe import Cadence, DataChoice, LearningRate, ModelChoice, Recipe, Stage

RECIPE = Recipe(
    name="nano",
    about="about 10 minutes on 2 CPU cores; 1.75 bits per byte of held-out Python source",
    model=ModelChoice("nano"),
    data=DataChoice(corpus="python", tokenizer="bpe", recall_share=0.05, recall_pairs=4, recall_distance=128),
    stages=(
        Stage("dense", "dense", steps=480, sequence_length=256, batch_size=8),
        Stage("indexer", "indexer_warmup", steps=10, sequence_length=512, batch_size=4),
        Stage("sparse", "sparse", steps=250, sequence_length=512, batch_size=4),
    ),
    optimizer=OptimizerConfig(clip_norm=1.0),
    learning_rate=LearningRate(peak=8e-3, floor=3e-4, warmup_steps=10, decay_start=0.4),
    losses=LossWeights(bias_speed=0.02),
    cadence=Cadence(checkpoint_every=200, eval_every=0, eval_documents=4, eval_batch_size=8, recall_rows=16),
)
