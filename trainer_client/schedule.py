"""A learning-rate schedule in words: what the ``campaign`` event says of it among the hyperparameters.

A schedule is an object of torch's or of the job's own. Recorded are its class and what it was made with: numbers,
texts, lists and tables of them, the functions of a ``LambdaLR`` by name with what was bound to them (an object in their
place by its class), and the schedules that one is made of. Where it stands is left out: that changes with every step,
and the steps record the learning rates' effect.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import partial

_MADE_OF = frozenset({"_anneal_func_type", "_milestones", "_scale_fn_custom", "_schedule_phases", "_schedulers"})
"""What torch keeps under private names of what a schedule was made with."""
_WHERE_IT_STANDS = frozenset({"last_epoch", "T_cur", "T_i"})
"""What torch keeps under public names of where a schedule stands."""
_MOST_CHARACTERS = 1_000


def schedule_settings(scheduler: object | None, name: str = "scheduler") -> dict[str, str]:
    """The schedule's settings by name, ``scheduler`` its class; nothing for None."""
    if scheduler is None:
        return {}
    settings = {name: type(scheduler).__name__}
    for own, value in sorted(getattr(scheduler, "__dict__", {}).items()):
        if own in _WHERE_IT_STANDS or (own.startswith("_") and own not in _MADE_OF):
            continue
        label = f"{name}.{own.lstrip('_')}"
        if _is_schedule(value):
            settings |= schedule_settings(value, label)
        elif isinstance(value, list | tuple) and any(map(_is_schedule, value)):
            for number, part in enumerate(value):
                settings |= schedule_settings(part, f"{label}.{number}")
        elif (shown := _shown(value)) is not None:
            settings[label] = _cut(shown)
    return settings


def _is_schedule(value: object) -> bool:
    return hasattr(value, "get_last_lr")


def _shown(value: object) -> str | None:
    """A setting in words; None for what is none."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, Counter):  # a MultiStepLR's milestones
        return _shown(sorted(value.elements()))
    if isinstance(value, list | tuple):
        shown = [_shown(part) for part in value]
        return None if None in shown else f"[{', '.join(part for part in shown if part is not None)}]"
    if isinstance(value, Mapping):
        pairs = [(_shown(key), _shown(part)) for key, part in value.items()]
        unshown = any(None in pair for pair in pairs)
        return None if unshown else f"{{{', '.join(f'{key}: {part}' for key, part in pairs)}}}"
    if isinstance(value, partial):
        bound = [_named(part) for part in value.args]
        bound += [f"{key}={_named(part)}" for key, part in sorted(value.keywords.items())]
        return f"{_named(value.func)}({', '.join(bound)})"
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return None


def _cut(shown: str) -> str:
    """A setting that is too long by its beginning and the SHA-256 of all of it."""
    if len(shown) <= _MOST_CHARACTERS:
        return shown
    digest = f"… SHA-256 {hashlib.sha256(shown.encode()).hexdigest()}"
    return shown[: _MOST_CHARACTERS - len(digest)] + digest


def _named(value: object) -> str:
    """A bound value in words, another object by its class: where it lies in memory differs from run to run."""
    return _shown(value) or type(value).__name__
