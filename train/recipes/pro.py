"""V4-Pro's pretraining as the report states it: 33T tokens. Here as data; it needs a cluster, and its text.

Expected: months on many thousands of accelerators. `train.schedule` says what the report states and what is chosen.
"""

from train.recipes.report import recipe_of
from train.schedule import PRO

RECIPE = recipe_of(PRO, "pro", "the report's V4-Pro run, 33T tokens: for a cluster and a corpus of that size")
