"""About 100M parameters on English technical prose, for one accelerator or a patient workstation.

Estimated, not yet measured: an hour or two on one data-centre GPU, 0.8 bits per byte or less on held-out prose.
Needs the extra `prose`; `--data` trains on anything else.
"""

from train.optimizer import OptimizerConfig
from train.recipe import Cadence, DataChoice, LearningRate, ModelChoice, Recipe, Stage
from train.step import Precision

RECIPE = Recipe(
    name="mini",
    about="estimated: an hour or two on one data-centre GPU; below 0.8 bits per byte of technical prose",
    model=ModelChoice("mini"),
    data=DataChoice(corpus="prose", fim_rate=0.1, recall_share=0.05, recall_distance=512),
    stages=(
        Stage("dense", "dense", steps=3000, sequence_length=2048, batch_size=32),
        Stage("indexer", "indexer_warmup", steps=100, sequence_length=4096, batch_size=16),
        Stage("sparse", "sparse", steps=1500, sequence_length=4096, batch_size=16),
    ),
    optimizer=OptimizerConfig(clip_norm=1.0, newton_schulz_dtype="bfloat16"),
    learning_rate=LearningRate(peak=1e-3, floor=1e-4, warmup_steps=200, decay_start=0.6),
    precision=Precision(compute="bfloat16", remat="block"),
    cadence=Cadence(checkpoint_every=500, eval_every=500),
)
