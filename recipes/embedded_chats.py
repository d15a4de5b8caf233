"""Short questions about numbers, days and dates with their answers: conversations that need no download."""

from __future__ import annotations

import datetime
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
_SYSTEM = "Answer in one word."


def _exchanges(chance: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    match chance.randrange(4):
        case 0:
            first, second = chance.randint(1, 9), chance.randint(1, 9)
            return f"What is {first} plus {second}?", str(first + second)
        case 1:
            day, days = chance.randrange(7), chance.randint(1, 6)
            return f"Which day is {days} days after {_DAYS[day]}?", _DAYS[(day + days) % 7]
        case 2:
            month, months = chance.randrange(12), chance.randint(1, 6)
            return f"Which month is {months} months after {_MONTHS[month]}?", _MONTHS[(month + months) % 12]
        case _:
            date = datetime.date(chance.randint(1980, 2029), chance.randint(1, 12), chance.randint(1, 28))
            return f"Write {date.day} {_MONTHS[date.month - 1]} {date.year} in numbers.", date.isoformat()


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
    "chat": EmbeddedRows("embedded chats", {"version": 1, "rows": CONVERSATIONS}, _conversations),
    "instruction": EmbeddedRows("embedded instructions", {"version": 1, "rows": CONVERSATIONS}, _instructions),
}
"""Rows by the format they are in."""
