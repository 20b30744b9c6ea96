"""Which answers are labels to choose from: what training writes into the header of σ, and what an evaluation takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_FEW, MOST_LABELS = 26, 200  # different answers
LONGEST_LABEL = 40  # characters


def are_labels(counts: Mapping[str, int]) -> bool:
    """Return whether answers, given how often each occurs, look like a few strings to choose from.

    Each is then one line of at most 40 characters. Of at most 26 different ones each is a single character, or every
    answer occurs at least twice on average. 27 to 200 have letters somewhere (amounts are no labels), and at most a
    tenth of the rows has an answer that no other row has. That share estimates how often the next row has a new answer
    (Good 1953, Biometrika 40): about e^(−r) for equally frequent labels with r rows each, 0.25 and more for names and
    other answers without an end.
    """
    rows = sum(counts.values())
    if len(counts) > MOST_LABELS or any(len(answer) > LONGEST_LABEL or "\n" in answer for answer in counts):
        return False
    if len(counts) <= _FEW:
        return 2 * len(counts) <= rows or all(len(answer.strip()) == 1 for answer in counts)
    return 10 * sum(count == 1 for count in counts.values()) <= rows and not are_amounts(counts)


def are_amounts(answers: Collection[str]) -> bool:
    """Return whether there are many answers and no letter in any."""
    return len(answers) > _FEW and not any(letter.isalpha() for answer in answers for letter in answer)
