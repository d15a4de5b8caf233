"""Which key was meant by one that there is not. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection

SIMILAR = 0.7
"""From here on (`difflib`'s ratio, 1 for the same) a name of the same section may be what was meant."""

VERY_SIMILAR = 0.85
"""From here on it is what was meant most likely; a name anywhere else must be as similar to be thought of."""

AT_MOST = 4
"""Keys that are named; more of them would not help."""


def nearest_keys(key: str, siblings: list[str], everywhere: list[str], stated: Collection[str] = ()) -> list[str]:
    """The keys most likely meant, the likeliest first, all dotted: similar ones beside it, the same name elsewhere.

    Args:
        key: what is not there.
        siblings: what is there in its section.
        everywhere: what is there in all sections.
        stated: what the file states: of several sections those that are there and lack the name come first.
    """
    name = _last(key)
    beside = _most_similar(name, siblings)
    same = [other for other in everywhere if _last(other) == name and other != key]
    same.sort(key=lambda other: (other in stated, bool(_section(other)) and _section(other) not in stated))
    if not beside and not same:
        likeness = {other: _likeness(name, _last(other)) for other in everywhere}
        best = max(likeness.values(), default=0.0)
        return [other for other in everywhere if likeness[other] == best][:1] if best >= VERY_SIMILAR else []
    first, then = (beside, same) if beside and _likeness(name, _last(beside[0])) >= VERY_SIMILAR else (same, beside)
    room = AT_MOST - len(then[:2])
    return list(dict.fromkeys([*first[:room], *then[:2]]))


def listed(keys: list[str]) -> str:
    """`a, b or c`."""
    *most, last = keys
    return f"{', '.join(most)} or {last}" if most else last


def _most_similar(name: str, siblings: list[str]) -> list[str]:
    """The most similar of a section, several where none is more so than another; whole names before parts of them."""
    whole = {sibling: _likeness(name, _last(sibling)) for sibling in siblings}
    best = max(whole.values(), default=0.0)
    if best >= SIMILAR:
        return [sibling for sibling in siblings if whole[sibling] == best]
    # batch_size for global_batch_size, verison for fsdp_version
    ends = {sibling: _likeness(name, _last(sibling).partition("_")[2]) for sibling in siblings}
    best = max(ends.values(), default=0.0)
    return [sibling for sibling in siblings if ends[sibling] == best] if best >= VERY_SIMILAR else []


def _likeness(one: str, other: str) -> float:
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    return matcher.ratio() if matcher.quick_ratio() >= SIMILAR else 0.0


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _section(key: str) -> str:
    return key.rpartition(".")[0]
