"""About 1B parameters, 0.2-0.3B of them activated, for one accelerator with 80 GB.

Estimated, not yet measured: some days on one data-centre GPU for the 20 billion tokens. Bring text of that size:
`dsv4 train small --data path/to/corpus`; on the default text it would read every document hundreds of times.
"""

from train.optimizer import OptimizerConfig
from train.recipe import Cadence, DataChoice, LearningRate, ModelChoice, Recipe, Stage
from train.step import Precision

RECIPE = Recipe(
    name="small",
    about="estimated: some days on one data-centre GPU with 80 GB; bring a corpus of billions of tokens with --data",
    model=ModelChoice("small"),
    data=DataChoice(corpus="python", fim_rate=0.1, recall_share=0.01, recall_distance=1024),
    stages=(
        Stage("ramp", "dense", steps=4000, sequence_length=4096, batch_size=64, microbatches=8),
        Stage("dense", "dense", steps=12000, sequence_length=4096, batch_size=256, microbatches=32),
        Stage("indexer", "indexer_warmup", steps=200, sequence_length=16384, batch_size=64, microbatches=32),
        Stage("sparse", "sparse", steps=6000, sequence_length=16384, batch_size=64, microbatches=32),
    ),
    optimizer=OptimizerConfig(clip_norm=1.0, newton_schulz_dtype="bfloat16"),
    learning_rate=LearningRate(peak=6e-4, floor=6e-5, warmup_steps=1000, decay_start=0.7),
    precision=Precision(compute="bfloat16", remat="block"),
    cadence=Cadence(checkpoint_every=500, eval_every=1000, eval_batch_size=4),
)
