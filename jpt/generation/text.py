"""From token ids to text while the ids arrive: whole characters only, and the first stop string ends it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Decode = Callable[[list[int]], str]

# A byte-level token may hold part of a character, which decoders show so.
_REPLACEMENT = '\ufffd'
# Decoders look at neighbours (SentencePiece drops the first space), so a text is decoded with some tokens before it.
_CONTEXT = 8


class Detokenizer:
    """Turns ids into text piece by piece, so that the pieces joined are the text of the whole.

    The text that follows a prompt is what the decoder writes for prompt and ids, less what it writes for the prompt.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()):
        self._decode = decode
        self._window = list(prompt[-_CONTEXT:])  # shown ids that still matter, then ids not shown yet
        self._shown = len(self._window)

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids add; what may still change (part of a character) waits for the next ids."""
        self._window += ids
        text = self._pending()
        if text.endswith(_REPLACEMENT) or not text:
            return ''
        self._advance()
        return text

    def flush(self) -> str:
        """The rest of the text, when no more ids will come."""
        text = self._pending()
        self._advance()
        return text

    def _pending(self) -> str:
        if self._shown == len(self._window):
            return ''
        before = self._decode(self._window[: self._shown])
        whole = self._decode(self._window)
        if not whole.startswith(before):
            # The context ended within a character that is whole now.
            before = before.rstrip(_REPLACEMENT)
        return whole[len(before) :]

    def _advance(self) -> None:
        keep = max(len(self._window) - _CONTEXT, 0)
        self._window = self._window[keep:]
        self._shown = len(self._window)


class Piece(NamedTuple):
    """What a chunk of tokens adds: text to show, how many of the tokens count, and whether a stop string ended it."""

    text: str
    used: int
    stopped: bool


class StopScanner:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str]):
        """stop: strings; none may be empty. The text ends before the first of them."""
        self._detokenizer = Detokenizer(decode, prompt)
        self._stop = [string for string in stop if string]
        self._held = ''
        self.stopped = False

    def push(self, ids: Sequence[int]) -> Piece:
        """The tokens of a chunk, in order. `used` counts those up to the one that completed a stop string."""
        if not self._stop:
            return Piece(self._detokenizer.push(ids), len(ids), False)
        shown = ''
        for used, token in enumerate(ids, 1):
            shown += self._scan(self._detokenizer.push([token]))
            if self.stopped:
                return Piece(shown, used, True)
        return Piece(shown, len(ids), False)

    def flush(self) -> Piece:
        """The rest, when the row has ended otherwise."""
        if self.stopped:
            return Piece('', 0, True)
        shown = self._scan(self._detokenizer.flush())
        if not self.stopped:
            shown, self._held = shown + self._held, ''
        return Piece(shown, 0, self.stopped)

    def _scan(self, text: str) -> str:
        """The part of held and new text that can be shown."""
        text = self._held + text
        found = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ''
            return text[: min(found)]
        keep = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, string: str) -> int:
    """The length of the longest beginning of `string` that `text` ends with."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
