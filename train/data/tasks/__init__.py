"""Synthetic long-context tasks: rows with questions whose answers stand earlier in the row, scored exactly.

`make_task` makes one by name; `rows.TaskRows` numbers its rows for the trainer, `score.TaskScore` counts right answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsv4_jax.config_checks import nearest
from train.data.tasks.copying import Induction, SelectiveCopying
from train.data.tasks.mqar import MultiQueryRecall
from train.data.tasks.needles import Needles
from train.data.tasks.task import Task, TaskError
from train.data.tasks.variables import VariableTracking

__all__ = ["TASKS", "Task", "TaskError", "make_task"]

TASKS: dict[str, type[Task]] = {
    "mqar": MultiQueryRecall,
    "needle": Needles,
    "variables": VariableTracking,
    "selective_copying": SelectiveCopying,
    "induction": Induction,
}


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task called `name`, one of `TASKS`, with its fields set by `options`.

    Raises:
        TaskError: for an unknown name or option, with the nearest known one, and for values that cannot be.
    """
    if name not in TASKS:
        raise TaskError(f"there is no task {name!r}{nearest(name, TASKS)}: tasks are {', '.join(TASKS)}")
    known = {field.name: field for field in dataclasses.fields(TASKS[name])}
    for option, value in options.items():
        if option not in known:
            raise TaskError(f"there is no option {option!r}{nearest(option, known)}: options are {', '.join(known)}")
        wanted = float if isinstance(known[option].default, float) else int
        if isinstance(value, bool) or not isinstance(value, int if wanted is int else int | float):
            raise TaskError(f"{option} is {value!r}; expected {wanted.__name__}")
    return TASKS[name](**options)
