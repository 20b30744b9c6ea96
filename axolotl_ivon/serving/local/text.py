"""The text of an answer that grows by tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..api.answers import Token


@dataclass
class GrowingText:
    """The text of an answer that grows by tokens, up to the first of the strings that stop it.

    What may begin such a string is held back until it is known, and so is half a character. A token is released
    together with the end of its text.
    """

    decode: Callable[[Sequence[int]], Any]  # returns the text of tokens, without special ones
    stop: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    stopped: bool = False
    _text: str = ""
    _released: int = 0  # characters of the text
    _begun: int = 0  # tokens from here on are decoded together: earlier ones have no influence on the text
    _read: int = 0  # tokens up to here are in the text
    _waiting: list[tuple[int, Token]] = field(default_factory=list)  # (where its text begins, token)

    def add(self, id: int) -> str:
        """Add a token, and return the text that it completes."""
        self.ids.append(id)
        more = self._undecoded()
        if not more or more.endswith("�"):
            return ""  # nothing to show, or not a whole character
        self._begun, self._read = self._read, len(self.ids)
        self._text += more
        return more

    def release(self, token: Token) -> tuple[str, tuple[Token, ...]]:
        """Return the text and the tokens that can be shown after the token that was just added."""
        self._waiting.append((len(self._text) - len(token.text), token))
        longest = max(map(len, self.stop), default=1)
        # No earlier stop can be completed by this token's text than one that begins before it.
        begin = max(0, len(self._text) - len(token.text) - longest + 1)
        places = [place for text in self.stop if (place := self._text.find(text, begin)) >= 0]
        if places:
            self.stopped, self._text = True, self._text[: min(places)]
            end = len(self._text)
            self._waiting = [(at, t._replace(text=t.text[: end - at])) for at, t in self._waiting if at < end]
            return self._release(end)
        for size in range(longest - 1, 0, -1):
            if any(text.startswith(self._text[-size:]) for text in self.stop if len(text) > size):
                return self._release(max(len(self._text) - size, self._released))
        return self._release(len(self._text))

    def rest(self) -> tuple[str, tuple[Token, ...]]:
        """Return what was held back, at the end of the answer."""
        if not self.stopped and self._read < len(self.ids):
            half = self._undecoded()
            self._text += half
            if self._waiting:
                place, token = self._waiting[-1]
                self._waiting[-1] = place, token._replace(text=token.text + half)
        return self._release(len(self._text), whole=True)

    def _undecoded(self) -> str:
        before = self.decode(self.ids[self._begun : self._read])
        return str(self.decode(self.ids[self._begun :])[len(before) :])

    def _release(self, end: int, whole: bool = False) -> tuple[str, tuple[Token, ...]]:
        text, self._released = self._text[self._released : end], max(end, self._released)
        ready = (place < end and place + len(token.text) <= end for place, token in self._waiting)
        count = len(self._waiting) if whole else sum(ready)
        tokens, self._waiting = self._waiting[:count], self._waiting[count:]
        return text, tuple(token for _, token in tokens)
