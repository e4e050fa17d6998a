"""Answers as text while they grow."""

from collections.abc import Sequence

from megavlm.data.tokenizer import Tokenizer

HALF = "\ufffd"
"""What stands for the bytes of a character that are not all there yet."""


class GrowingText:
    """The text of tokens that come one by one, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._tokens: list[int] = []
        self._told = 0
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """The text that is certain with this token, after what was told before."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._tell(text, min(found))
        end = len(text.rstrip(HALF))
        # What may be the beginning of a stop string waits.
        begun = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return self._tell(text, min(end, len(text) - max(begun, default=0)))

    def end(self) -> str:
        """What is left when no token follows."""
        text = self._tokenizer.decode(self._tokens)
        return "" if self.stopped else self._tell(text, len(text))

    def _tell(self, text: str, end: int) -> str:
        new = text[self._told : end]
        self._told = max(self._told, end)
        return new
