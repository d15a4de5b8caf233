"""Labelled sentences that need no download: made here, with the persons, places, dates and the like in them marked.

Many of their words mean one thing here and another there: Georgia is a person, a place or half a bank, May a person,
a month or a verb. So the words alone do not tell the labels, but those around them do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from recipes.rows import EmbeddedRows

SENTENCES = 3000

_PLACES = ("Jordan", "Paris", "Sydney", "Florence", "Georgia", "Victoria", "Lincoln", "Austin", "Chad", "New Delhi")
_FIRST_NAMES = (*_PLACES[:-1], "April", "May", "June", "Maria", "Peter")
_SURNAMES = ("Jordan", "Paris", "Lincoln", "Austin", "May", "Banks", "March", "Million", "Smith", "Garcia")
_MONTHS = ("January", "March", "April", "May", "June", "August")
_SENTENCES = (
    "{person} may fly from {place} to {place} in {month} .",
    "On {date} {person} paid {money} to {organisation} .",
    "{organisation} lent {person} and {person} {money} .",
    "{number} guests of {organisation} met in {place} on {date} .",
    "In {place} , {person} may work for {organisation} until {month} .",
    "{person} , born in {place} on {date} , had {number} children .",
    "The march to {place} began in {month} and cost {money} .",
    "{place} and {place} owed {organisation} {money} .",
)
_LABELS = {"person": "PER", "place": "LOC", "organisation": "ORG", "date": "DATE", "month": "DATE", "money": "MONEY"}


def _rows() -> Iterator[dict[str, Any]]:
    """Rows `{"words": […], "labels": […]}`; the labels are O, and B- and I- of what `_LABELS` names."""
    chance = random.Random(0)
    for _ in range(SENTENCES):
        words, labels = [], []
        for part in chance.choice(_SENTENCES).split():
            slot = part.strip("{}")
            found = (_fill(slot, chance) if slot != part else part).split()
            kind = _LABELS.get(slot) if slot != part else None
            words += found
            labels += [f"{'I' if index else 'B'}-{kind}" if kind else "O" for index in range(len(found))]
        yield {"words": words, "labels": labels}


def _fill(slot: str, chance: random.Random) -> str:
    month, number = chance.choice(_MONTHS), str(chance.randint(2, 31))
    place, surname = chance.choice(_PLACES), chance.choice(_SURNAMES)
    found: dict[str, tuple[str, ...]] = {
        "person": (chance.choice(_FIRST_NAMES), f"{chance.choice(_FIRST_NAMES)} {surname}"),
        "place": (place,),
        "organisation": (f"Bank of {place}", f"{surname} Motors", f"{place} {surname} Holdings"),
        "date": (f"{number} {month} 2019", f"{month} {number} , 2018"),
        "month": (month,),
        "money": (f"{number} euros", f"$ {number}", f"{number} million dollars"),
        "number": (number,),
    }
    return chance.choice(found[slot])


ENTITIES = EmbeddedRows("sentences", {"sentences": SENTENCES, "version": 1}, _rows)
"""Rows of eleven labels."""
