"""Where the configuration of a checkpoint and the one asked for differ, in words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

_SHOWN = 100  # characters of a long value


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Where two nested configurations differ, a readable line each, in the order of the saved one.

    Tuples equal lists (JSON has only lists) and 1 equals 1.0; True does not equal 1.
    ``["clusters: 9 in the checkpoint, 10 asked", "optimizer.lr: 0.1 in the checkpoint, not set now"]``
    """
    return list(_differences(saved, current, ""))


def _differences(saved: Any, current: Any, path: str) -> Iterator[str]:
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in [*saved, *(key for key in current if key not in saved)]:
            below = f"{path}.{key}" if path else str(key)
            if key not in current:
                yield f"{below}: {_short(saved[key])} in the checkpoint, not set now"
            elif key not in saved:
                yield f"{below}: not in the checkpoint, {_short(current[key])} asked"
            else:
                yield from _differences(saved[key], current[key], below)
    elif _is_list(saved) and _is_list(current) and len(saved) == len(current):
        for place, (old, new) in enumerate(zip(saved, current, strict=True)):
            yield from _differences(old, new, f"{path}[{place}]")
    elif not _equal(saved, current):
        old, new = _both(saved, current)
        yield f"{path}: {old} in the checkpoint, {new} asked"


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _equal(saved: Any, current: Any) -> bool:
    if isinstance(saved, bool) or isinstance(current, bool):
        return saved is current
    return bool(saved == current) or (_is_nan(saved) and _is_nan(current))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _long(value: Any) -> str:
    return str(value) if isinstance(value, (str, int, float)) else json.dumps(value, default=str)


def _short(value: Any, start: int = 0) -> str:
    text = _long(value)
    shown = text[start : start + _SHOWN]
    return ("..." if start else "") + shown + ("..." if start + _SHOWN < len(text) else "")


def _both(saved: Any, current: Any) -> tuple[str, str]:
    """The two in words that differ: of long ones the place from which they do, of "1" and 1 the quotes."""
    old, new = _short(saved), _short(current)
    if old != new:
        return old, new
    if type(saved) is not type(current):
        return json.dumps(saved, default=str), json.dumps(current, default=str)
    pairs = zip(_long(saved), _long(current), strict=False)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), _SHOWN)
    return _short(saved, max(0, same - 10)), _short(current, max(0, same - 10))
