"""Short questions about numbers, days and dates with their answers: conversations that need no download."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from recipes.rows import EmbeddedRows

CONVERSATIONS = 3000

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_SYSTEM = "Answer as shortly as you can."


def _exchanges(chance: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    match chance.randrange(4):
        case 0:
            first, second = chance.randint(1, 9), chance.randint(1, 9)
            return f"What is {first} plus {second}?", str(first + second)
        case 1:
            step, when = chance.choice(((1, "after"), (-1, "before")))
            day = chance.randrange(7)
            return f"Which day comes {when} {_DAYS[day]}?", _DAYS[(day + step) % 7]
        case 2:
            step, when = chance.choice(((1, "after"), (-1, "before")))
            month = chance.randrange(12)
            return f"Which month comes {when} {_MONTHS[month]}?", _MONTHS[(month + step) % 12]
        case _:
            day, month = chance.randint(1, 28), chance.randrange(12)
            return f"Write {day} {_MONTHS[month]} in numbers.", f"{month + 1:02d}-{day:02d}"


def _conversations() -> Iterator[dict[str, Any]]:
    chance = random.Random(0)
    for _ in range(CONVERSATIONS):
        messages = [{"role": "system", "content": _SYSTEM}] if chance.random() < 0.2 else []
        for _ in range(chance.randint(1, 2)):
            question, answer = _exchanges(chance)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages}


def _instructions() -> Iterator[dict[str, Any]]:
    chance = random.Random(0)
    for _ in range(CONVERSATIONS):
        question, answer = _exchanges(chance)
        yield {"prompt": question, "completion": answer}


EMBEDDED_CHATS = {
    "chat": EmbeddedRows("embedded chats", {"version": 2, "rows": CONVERSATIONS}, _conversations),
    "instruction": EmbeddedRows("embedded instructions", {"version": 2, "rows": CONVERSATIONS}, _instructions),
}
"""Rows by the format they are in."""
