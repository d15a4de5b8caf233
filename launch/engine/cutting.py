"""Where a micro-batch whose samples differ in length is cut into smaller ones, so that less is padded. Pure.

Only where one more forward and backward pass costs no more than itself: no exchange between ranks, no program to be
compiled for its shape, no device that waits for work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from launch.recipe import Lengths

PASS_TOKENS = 128
"""What one forward and backward pass costs however small it is, in the tokens that could be computed instead.

Measured on two cores, a line through the times of batches of 8 to 1,024 tokens: 156 tokens for an encoder of 0.3 M
weights (2.6 ms; 0.017 ms a token), 104 for 0.7 M, 74 for 4 M, 92 for 23 M, 69 for 67 M (110 ms; 1.6 ms a token).
Collating and counting come on top.
"""

PLACES = 32
"""Places at which a micro-batch may be cut; more rows are cut in groups. The search then takes 0.1 ms."""


def parts(lengths: Lengths) -> list[int]:
    """How many rows each part of a micro-batch has that takes the least time; together all of them.

    `lengths` are the tokens of its rows, the longest first, shape `(rows,)`. A part takes as long as all its rows, each
    as wide as the longest, and PASS_TOKENS. Every division at PLACES is weighed: a dynamic programme from the end.
    """
    rows = len(lengths)
    widths = lengths.astype(np.int64)
    if rows * widths[0] - widths.sum() <= PASS_TOKENS:
        return [rows]  # not even without any padding would two passes be faster
    places = np.append(np.arange(0, rows, -(-rows // PLACES)), rows)
    least = np.zeros(len(places), np.int64)
    """The cost of all rows from a place on."""
    ends = np.zeros(len(places), np.int64)
    for place in range(len(places) - 2, -1, -1):
        costs = (places[place + 1 :] - places[place]) * widths[places[place]] + PASS_TOKENS + least[place + 1 :]
        best = int(costs.argmin())
        least[place], ends[place] = costs[best], place + 1 + best
    found, place = [], 0
    while place < len(places) - 1:
        found.append(int(places[ends[place]] - places[place]))
        place = ends[place]
    return found
