"""The parts that answers come in, token by token, and how certain each answer is.

Of a token, with p_m the distribution of member m and p = 1/M Σ_m p_m the average that it was chosen from:

    expected entropy     1/M Σ_m H[p_m]             within members: each of them leaves open what comes next
    mutual information   H[p] − 1/M Σ_m H[p_m]      between members: they expect different tokens

Of an answer, over its tokens without the one that ends it: the means of both, in nats per token, and as confidence the
geometric mean of the chosen tokens' probabilities under p, which for an answer of one token is its probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...metrics.selective import is_below

LEAST_LOGPROB = -9999.0  # OpenAI's interface writes this for a probability of 0: JSON has no −∞


class Token(NamedTuple):
    """One token of an answer; its entropies are in nats."""

    id: int
    name: str  # its text by itself
    text: str  # what it adds to the answer; empty if it only begins a character
    logprob: float  # in nats, under the average at its softmax temperature, before the request's and top-p
    top: tuple[tuple[str, float], ...]  # (name, logprob) of the likeliest tokens, as many as the request asks for
    expected_entropy: float
    mutual_information: float

    def certainty(self) -> dict[str, Any]:
        """Return the entry of `ivon.tokens`."""
        return {
            "token": self.text,
            "probability": math.exp(self.logprob),
            "expected_entropy": self.expected_entropy,
            "mutual_information": self.mutual_information,
        }


class AnswerDelta(NamedTuple):
    """The next part of the answer `number`."""

    number: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None  # why the answer ends, in its last part: "stop" (a token or string ended it) or "length"
    ivon: dict[str, Any] | None = None  # how certain the answer is, in its last part
    generated: int = 0  # the tokens that the part took, hidden ones included


def certainty(
    confidence: float | None,
    expected_entropy: float | None,
    mutual_information: float | None,
    members: int,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Return the field `ivon` of an answer, with a threshold also that, and whether to abstain."""
    ivon: dict[str, Any] = {
        "confidence": confidence,
        "expected_entropy": expected_entropy,
        "mutual_information": mutual_information,
        "members": members,
    }
    if threshold is not None and confidence is not None:
        ivon |= {"threshold": threshold, "abstain": is_below(confidence, threshold)}
    return ivon


def certainty_of(tokens: Sequence[Token], members: int, threshold: float | None = None) -> dict[str, Any]:
    """Return the field `ivon` of an answer of these tokens."""

    def mean(name: str) -> float:
        return math.fsum(getattr(token, name) for token in tokens) / len(tokens)

    confidence = math.exp(mean("logprob"))
    return certainty(confidence, mean("expected_entropy"), mean("mutual_information"), members, threshold)
