"""What share of words is masked when: one rate, or a schedule that follows the run.

A schedule is a function of the share of the run that is done, not of what was drawn before, so that
a resumed run, several processes and workers that collate ahead all have the same rate at a step.
How much is done, the collator knows: see `WholeWordMaskingCollator.set_progress`.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

# A rate, or the rate by the share of the run that is done: in steps, or of any form.
RateSchedule: TypeAlias = float | Mapping[float, float] | Callable[[float], float]


def is_share(value: Any) -> bool:
    """Tell whether a value is a number in [0, 1].

    Examples:
        >>> is_share(0.2), is_share("0.2")
        (True, False)
    """
    is_number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    return is_number and bool(0 <= value <= 1)


def check_probability(name: str, value: Any, when: str = "") -> float:
    """Return a value that must be a number in [0, 1].

    Raises:
        ValueError: If it is not.

    Examples:
        >>> check_probability("mask_replace_prob", 0.8)
        0.8
    """
    if not is_share(value):
        raise ValueError(f"{name} is {value!r}{when}; it must be a probability in [0, 1]")
    return value  # type: ignore[no-any-return]  # is_share has seen it


def rate_at(schedule: RateSchedule, progress: float) -> float:
    """Return the rate when a share `progress` of the run is done.

    Raises:
        ValueError: If it is not in [0, 1], or `progress` is not.

    Examples:
        >>> rate_at({0.0: 0.3, 0.8: 0.15}, 0.9), rate_at(lambda done: 0.3 - 0.15 * done, 1.0)
        (0.15, 0.15)
    """
    if not is_share(progress):
        raise ValueError(f"progress is {progress!r}; it must be a share of the run, in [0, 1]")
    rate: Any = schedule
    if isinstance(schedule, Mapping):
        rate = schedule.get(max((share for share in schedule if share <= progress), default=-1))
    elif callable(schedule):
        rate = schedule(progress)
    when = "" if rate is schedule else f" when a share {progress} of the run is done"
    return check_probability("wwm_probability", rate, when)


def sample_rates(schedule: RateSchedule) -> list[float]:
    """Return the rates of a run at 1,001 places, which tell schedules apart and show wrong ones.

    Raises:
        ValueError: If one is not in [0, 1], or a step is not at a share of the run.

    Examples:
        >>> sample_rates({0.0: 0.3, 0.8: 0.15})[799:801]
        [0.3, 0.15]
    """
    steps = [*schedule] if isinstance(schedule, Mapping) else []
    for share in steps:
        if not is_share(share):
            raise ValueError(f"wwm_probability has a step at {share!r}; it must be in [0, 1]")
    return [rate_at(schedule, share) for share in (*(i / 1000 for i in range(1001)), *steps)]
