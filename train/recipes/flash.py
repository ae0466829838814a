"""V4-Flash's pretraining as the report states it: 32T tokens. Here as data; it needs a cluster, and its text.

Expected: months on thousands of accelerators. `train.schedule` says what the report states and what is chosen.
"""

from train.recipes.report import recipe_of
from train.schedule import FLASH

RECIPE = recipe_of(FLASH, "flash", "the report's V4-Flash run, 32T tokens: for a cluster and a corpus of that size")
