"""What a backend gives for a request: the pieces of its answers, token by token, and how sure each answer is.

Of a token, with p_m the distribution of member m and p = 1/M Σ_m p_m the average that it was chosen from:

    expected entropy     1/M Σ_m H[p_m]             within members: to each of them what comes next is open
    mutual information   H[p] − 1/M Σ_m H[p_m]      between members: they expect different tokens

Of an answer, over its tokens without the one that ends it: the means of both, in nats per token, and as confidence the
geometric mean of the chosen tokens' probabilities under p, which for an answer of one token is its probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..generation.uncertainty import is_below

LEAST_LOGPROB = -9999.0  # what OpenAI's interface has for a probability of 0, as JSON has no −∞


class Token(NamedTuple):
    """One token of an answer.

    Attributes:
        id: its number; name: what it is by itself.
        text: what it adds to the answer: nothing where it only begins a character.
        logprob: in nats, under the average, before the request's temperature and top-p.
        top: (name, logprob) of the likeliest tokens, as many as were asked for.
        confidence: the logarithm of its probability with the output temperature of `recommended.json`.
        expected_entropy, mutual_information: in nats; see the module.
    """

    id: int
    name: str
    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    confidence: float
    expected_entropy: float
    mutual_information: float


class Piece(NamedTuple):
    """A part of the answer `number`: text, the tokens that it is made of, and at the end why it ends there.

    `finish` is "stop" (a token or string that ends it) or "length", `ivon` what the answer says of itself. `generated`
    counts the tokens that it took, those that are not shown included.
    """

    number: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    ivon: dict[str, Any] | None = None
    generated: int = 0


@dataclass(frozen=True)
class Ask:
    """What is asked for, checked: a prompt and how to go on from it.

    Attributes:
        model: the served name, one of the backend's.
        ids: the prompt's tokens.
        n: how many answers.
        max_tokens: of each, the token that ends it included.
        top: how many of the likeliest tokens are told at each place; None: nothing is told of tokens.
        seed: of the answers.
    """

    model: str
    ids: tuple[int, ...]
    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top: int | None = None
    seed: int = 0


def answer_facts(tokens: Sequence[Token], members: int, threshold: float | None) -> dict[str, Any]:
    """Return `ivon` of an answer: how sure it is, of how many members, and whether to abstain where that is known."""

    def mean(name: str) -> float:
        return math.fsum(getattr(token, name) for token in tokens) / len(tokens)

    confidence = math.exp(mean("confidence"))
    facts: dict[str, Any] = {
        "confidence": confidence,
        "expected_entropy": mean("expected_entropy"),
        "mutual_information": mean("mutual_information"),
        "members": members,
    }
    if threshold is not None:
        facts["abstain"] = is_below(confidence, threshold)
    return facts


def token_facts(token: Token) -> dict[str, Any]:
    """Return what `ivon.tokens` holds of a token."""
    return {
        "token": token.text,
        "probability": math.exp(token.logprob),
        "expected_entropy": token.expected_entropy,
        "mutual_information": token.mutual_information,
    }


@dataclass
class Text:
    """The text of an answer that grows by tokens, up to the first of the strings that stop it.

    What may be the beginning of such a string is held back until it is known, and so is half a character. A token is
    given out together with the text that it begins in.

    Args:
        decode: returns the text of tokens, without special ones.
        stop: the strings.
    """

    decode: Callable[[Sequence[int]], Any]
    stop: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    stopped: bool = False
    _text: str = ""
    _given: int = 0  # of the text's characters
    _begun: int = 0  # from here on tokens are decoded together: what comes before has no influence on the text
    _read: int = 0  # up to here tokens are in the text
    _waiting: list[tuple[int, Any]] = field(default_factory=list)  # (where it begins, token)

    def add(self, id: int) -> str:
        """Add a token, and return the text that it completes."""
        self.ids.append(id)
        before = self.decode(self.ids[self._begun : self._read])
        now = self.decode(self.ids[self._begun :])
        if now.endswith("�") or len(now) <= len(before):
            return ""  # not a whole character, or nothing that is shown
        self._begun, self._read = self._read, len(self.ids)
        self._text += now[len(before) :]
        return now[len(before) :]

    def take(self, token: Token) -> tuple[str, tuple[Token, ...]]:
        """Return the text, and the tokens, that can be given out after the token that was just added."""
        self._waiting.append((len(self._text) - len(token.text), token))
        # No earlier stop can be completed by this token's text than one that begins before it.
        begin = max(0, len(self._text) - len(token.text) - max(map(len, self.stop), default=1) + 1)
        places = [place for text in self.stop if (place := self._text.find(text, begin)) >= 0]
        if places:
            self.stopped, self._text = True, self._text[: min(places)]
            end = len(self._text)
            self._waiting = [(at, t._replace(text=t.text[: end - at])) for at, t in self._waiting if at < end]
            return self._give(len(self._text))
        return self._give(len(self._text) - self._held())

    def rest(self) -> tuple[str, tuple[Token, ...]]:
        """Return what was held back, at the end of the answer."""
        if not self.stopped and self._read < len(self.ids):
            before = self.decode(self.ids[self._begun : self._read])
            half = self.decode(self.ids[self._begun :])[len(before) :]
            self._text += half
            if self._waiting:
                place, token = self._waiting[-1]
                self._waiting[-1] = place, token._replace(text=token.text + half)
        return self._give(len(self._text), whole=True)

    def _give(self, end: int, whole: bool = False) -> tuple[str, tuple[Token, ...]]:
        text, self._given = self._text[self._given : end], max(end, self._given)
        count = len(self._waiting) if whole else sum(place < end for place, _ in self._waiting)
        tokens, self._waiting = self._waiting[:count], self._waiting[count:]
        return text, tuple(token for _, token in tokens)

    def _held(self) -> int:
        """Return how many of the last characters may be the beginning of a string that stops."""
        for size in range(max(map(len, self.stop), default=1) - 1, 0, -1):
            if any(text.startswith(self._text[-size:]) for text in self.stop if len(text) > size):
                return min(size, len(self._text) - self._given)
        return 0
