"""A reproducible sample of the corpus, kept with its token ids, so that the proof need not encode it again."""

from __future__ import annotations

import random
from collections.abc import Iterable

_CHARACTERS = 1 << 24
_TEXT_CHARACTERS = 1 << 17


class Sample:
    """All of a stream up to a budget of characters; after that each further text replaces one at random.

    The ids take about as much memory as the texts, two bytes a character.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts = list(texts)
        self.names = [""] * len(self.texts)  # of the corpus that each text is from
        self.ids: list[bytes | None] = [None] * len(self.texts)  # by the original, uint32; None: not known
        self.seen = len(self.texts)
        self._room = _CHARACTERS
        self._random = random.Random(0)

    def take(self, name: str, texts: list[str], encoded: list[bytes]) -> None:
        """Keep some of the next texts, which are from the corpus `name`."""
        for text, ids in zip(texts, encoded, strict=True):
            self.seen += 1
            kept = text[:_TEXT_CHARACTERS]
            known = ids if len(kept) == len(text) else None
            if self._room > 0:
                self.texts.append(kept)
                self.names.append(name)
                self.ids.append(known)
                self._room -= len(kept)
            elif (place := self._random.randrange(self.seen)) < len(self.texts):
                self.texts[place], self.names[place], self.ids[place] = kept, name, known
