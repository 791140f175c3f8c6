"""Text that grows token by token."""

from collections.abc import Iterable

from jpt.data.tokenizer import Tokenizer


class StreamDecoder:
    """Turns ids that come one after another into pieces of text that join to the decoded whole.

    A token may end inside a UTF-8 character; nothing of a character is given out before it is complete. The pieces of
    `push`, and `finish` at the end, joined, equal `tokenizer.decode` of all ids wherever those are valid UTF-8. The
    cost of a token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []  # some ids whose text is given out, as context, and those that wait
        self._waiting = 0  # where in _ids the waiting ones start
        self._given = 0  # how many characters of the text of _ids are given out

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next ids and returns the text that they complete, perhaps ''."""
        self._ids.extend(int(i) for i in ids)
        text = self._decode(self._ids)
        complete = text.rstrip('\ufffd')  # what an unfinished character decodes to
        new = complete[self._given :]
        self._given = max(self._given, len(complete))
        if complete == text:
            self._shorten()
        return new

    def finish(self) -> str:
        """The text that still waits: a last character that never became complete, as U+FFFD."""
        text = self._decode(self._ids)
        new = text[self._given :]
        self._given = len(text)
        return new

    def _shorten(self) -> None:
        # Decoders treat the first token of a text in their own way (a leading space goes), so some visible context
        # stays in front of what comes.
        context = self._ids[self._waiting :]
        text = self._decode(context)
        if text:
            self._ids, self._given = context, len(text)
        self._waiting = len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)
