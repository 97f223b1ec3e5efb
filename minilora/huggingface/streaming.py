"""The text of an answer while it is produced."""

from collections.abc import Callable

from torch import Tensor

# What stands in a decoded text for bytes that are not a whole character, or not yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes tokens as they come, and hands on what later tokens cannot change.

    A character may consist of several tokens, and what is decoded before its last one is none.
    White space at the end waits too: `generate` removes it if nothing follows. It is what
    transformers calls a streamer.

    Args:
        decode: the text of an answer's tokens.
        write: called with each part of the text. Together they are the text of the whole answer.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self.decode = decode
        self.write = write
        self.tokens: list[int] = []
        self.written = ""
        self._prompt_was_put = False

    def put(self, tokens: Tensor) -> None:
        """Takes the next token; at first, the prompt."""
        if not self._prompt_was_put:
            self._prompt_was_put = True
            return
        self.tokens += tokens.tolist()
        self._write_more(self.decode(self.tokens).rstrip(_INCOMPLETE).rstrip())

    def end(self) -> None:
        """Writes what is left: after the last token a character stays incomplete."""
        self._write_more(self.decode(self.tokens))

    def _write_more(self, text: str) -> None:
        # Shorter where bytes that were characters turn out to belong to an incomplete one.
        if len(text) > len(self.written):
            self.write(text[len(self.written) :])
            self.written = text
