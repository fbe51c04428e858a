"""The only place that turns messages into token ids and loss mask: train, chat and evaluation all render here.

    chat_format = open_format("chatml", tokenizer)      # or "model": the model directory's own chat_template
    chat_format.render(messages)                        # ids and mask of a sample, or of a prompt
    chat_format.template, chat_format.stop_ids          # what the trained model's directory says

A format is one Jinja file in chatformats/ and the special tokens that it needs; the same Jinja is written into the
model directory. A conversation's *layout* depends on its roles alone, so it is found once, by rendering the template
with placeholders for the contents: fixed text, contents, and which part the assistant writes. Contents are then put
between the layout's token ids. A plain text is `bos text eos` in every format.

The ids are those of transformers' `apply_chat_template`, with three differences, all on purpose:
* A special token's name, or a marker of the template's, in a message stays text: nobody can inject a `</s>`.
* An answer never shares a token with the header before it, since chat cannot either. It matters where an answer
  begins with a line feed, which some tokenizers would merge with the header's.
* A template that writes the next header behind a finished answer is cut after the answer's end token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.data.example import Message
from firefly.data.jinja import LEARN_BEGIN, LEARN_END, ChatTemplate, without_marks
from firefly.data.sequences import EncodedTexts, borders, spans
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import FireflyError, InputError, ModelError, RecipeError, choices

FORMATS: dict[str, tuple[str, ...]] = {
    "firefly": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": (),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "baichuan": ("<reserved_106>", "<reserved_107>"),
}
"""The special tokens that a format needs beside the tokenizer's own bos and eos; NAME.jinja says the rest."""

_PAD = "\n" * 5 + "\u2003"  # more line feeds than any template writes, and a space that none does
Encode = Callable[[list[str]], EncodedTexts]  # the ids that `ModelTokenizer.encode_texts` gives


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of one sample and, for each, whether the model learns to produce it."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True, slots=True)
class RenderedBlock:
    """Many samples end to end. T tokens, N samples; sample i is `ids[borders[i] : borders[i + 1]]`."""

    ids: NDArray[np.uint32]  # T
    mask: NDArray[np.uint8]  # T
    borders: NDArray[np.int64]  # N + 1
    answer_bytes: NDArray[np.int64]  # N, UTF-8 bytes of the answers

    def samples(self) -> Iterator[Rendered]:
        """One after the other, as lists."""
        for start, end in zip(self.borders[:-1].tolist(), self.borders[1:].tolist(), strict=True):
            yield Rendered(self.ids[start:end].tolist(), self.mask[start:end].astype(bool).tolist())

    def replaced(self, where: NDArray[np.bool_], others: list[Rendered]) -> RenderedBlock:
        """The same with the samples at `where` [N] taken from `others`, in order."""
        ids = EncodedTexts(self.ids, self.borders).replaced(where, EncodedTexts.of(one.ids for one in others))
        masks = EncodedTexts.of([*map(int, one.mask)] for one in others)
        mask = EncodedTexts(self.mask.astype(np.uint32), self.borders).replaced(where, masks).ids
        return RenderedBlock(ids.ids, mask.astype(np.uint8), ids.borders, self.answer_bytes)


def open_format(name: str, tokenizer: ModelTokenizer) -> ChatFormat:
    """The chat format of a recipe for a tokenizer; "model" is the chat_template of the tokenizer's directory.

    Raises `RecipeError` for an unknown name, `ModelError` when the tokenizer lacks a special token of the format
    or the directory a template that can be trained on.
    """
    if name == "model":
        return model_format(tokenizer)
    if name not in FORMATS:
        raise RecipeError(
            f"data.chat_format = '{name}': unknown format; {choices(name, [*FORMATS, 'model'])}."
        )
    missing = [token for token in FORMATS[name] if tokenizer.rust.token_to_id(token) is None]
    if missing:
        raise ModelError(
            f"{tokenizer.path} has no token {', '.join(missing)}, which data.chat_format = '{name}' needs; "
            "choose another format ('firefly' needs none), or add the tokens to the base model."
        )
    source = (
        (Path(__file__).parent / "chatformats" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    )
    source = re.sub(r"\bBOS\b", lambda _: json.dumps(tokenizer.bos_token), source)
    source = re.sub(r"\bEOS\b", lambda _: json.dumps(tokenizer.eos_token), source)
    return ChatFormat(ChatTemplate(source, {}, f"the chat format '{name}'"), tokenizer, check_text=False)


def model_format(tokenizer: ModelTokenizer, only_prompts: bool = False) -> ChatFormat:
    """The format that the tokenizer's own directory describes; raises `ModelError` when it has none."""
    source = tokenizer.chat_template()
    if source is None:
        raise ModelError(
            f"{tokenizer.path.parent} has no chat_template; set data.chat_format to one of {', '.join(FORMATS)}."
        )
    origin = f"the chat_template of {tokenizer.path.parent}"
    return ChatFormat(ChatTemplate(source, tokenizer.named_tokens(), origin), tokenizer, True, only_prompts)


def format_of(tokenizer: ModelTokenizer) -> ChatFormat:
    """The format in which to talk to a model: its directory's own, or else the article's.

    A template that could not be trained on, since prompts and samples would differ, still renders prompts.
    """
    if tokenizer.chat_template() is None:
        return open_format("firefly", tokenizer)
    try:
        return model_format(tokenizer)
    except FireflyError:
        return model_format(tokenizer, only_prompts=True)


def render(messages: Sequence[Message], tokenizer: ModelTokenizer, chat_format: str = "firefly") -> Rendered:
    """Render one conversation; `ChatFormat.render` does it for many."""
    return open_format(chat_format, tokenizer).render(messages)


class _Rewritten(InputError):
    """The template does more with a message than to write it down, trimmed or not."""


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Token ids that are the same in every conversation of a layout."""

    ids: list[int]
    learn: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """Text between two special tokens: stretches of parts (fixed text, or the number of a message).

    `heads[k]` are the ids of stretches 0 … k joined, where these hold no message; `patterns` the texts of stretches
    0 … k joined, where they do, to be filled with the messages.
    """

    stretches: tuple[tuple[tuple[str | int, ...], bool], ...]
    heads: tuple[list[int], ...]
    patterns: tuple[str, ...]

    def texts(self, contents: list[str]) -> list[str]:
        """The text of each stretch."""
        return [
            "".join([contents[part] if isinstance(part, int) else part for part in parts])
            for parts, _ in self.stretches
        ]


# What a stretch of a layout's tokens is: a row of `_Layout.segments`.
_FIXED, _TEXT, _LONGER_TEXT = range(3)  # fixed ids; a text's; what a text has beyond the one before it


@dataclass(frozen=True)
class _Layout:
    """How the conversations of one sequence of roles are written.

    Segments are `pieces` once more, for many conversations at once: each has what it is, a span of `fixed` (start and
    length) and whether it is learned. A text's segment is what follows that span, with which its ids must begin.
    """

    pieces: tuple[_Fixed | _Run, ...]
    strips: tuple[tuple[int, Callable[[str], str]], ...]  # message → how the template trims its content
    answers: tuple[int, ...]  # the assistant's messages
    parts: tuple[str | int, ...]  # the whole text, for comparison
    beyond: str  # what the template writes behind it, and we do not
    patterns: tuple[str, ...]  # the texts to encode, those of all runs
    segments: NDArray[np.int64]  # S × 4
    fixed: NDArray[np.uint32]


class ChatFormat:
    """Renders conversations for one tokenizer.

    `template` is the Jinja form for the model directory, `stop_ids` the tokens that end an answer.
    """

    def __init__(
        self, jinja: ChatTemplate, tokenizer: ModelTokenizer, check_text: bool, only_prompts: bool = False
    ) -> None:
        """`check_text`: compare every conversation with what the template itself writes.

        Raises `ModelError` for a template that cannot be followed exactly.
        """
        self.tokenizer, self._jinja, self._check_text = tokenizer, jinja, check_text
        self.template = without_marks(jinja.source) if not check_text else jinja.source
        self._added = tokenizer.added_tokens()
        names = sorted(
            filter(str.strip, self._added), key=len, reverse=True
        )  # "\n" belongs to the text around it
        self._splitter = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._layouts: dict[tuple[tuple[str, str | None], ...], _Layout] = {}
        self._markers: tuple[str, ...] = ()
        self.stop_ids: tuple[int, ...] = (tokenizer.eos_id,)
        self._only_prompts = only_prompts
        if only_prompts:
            return
        turns = [Message("user", "问"), Message("assistant", "答")]
        layout = self._layout(turns)
        self._markers = tuple(self._marker_names(layout))
        learned = [
            id for piece in layout.pieces if isinstance(piece, _Fixed) and piece.learn for id in piece.ids
        ]
        specials = set(self._added.values())
        end = next((number for number in reversed(learned) if number in specials), None)
        if end is None:
            raise ModelError(
                f"{jinja.origin} writes no special token behind an answer, so a model trained on it could never "
                "stop; choose another data.chat_format."
            )
        self.stop_ids = tuple(dict.fromkeys([end, tokenizer.eos_id]))
        self._prove(turns, layout)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Ids and mask of one conversation; one that ends with the user renders as a prompt.

        Raises `InputError` for a conversation that the template refuses, and for a sample that it rewrites.
        """
        if self._only_prompts:
            return self._render_text(messages)
        try:
            return next(self.render_many([messages]).samples())
        except _Rewritten:
            if messages[-1].role == "assistant":
                raise
            return self._render_text(messages)

    def _render_text(self, messages: Sequence[Message]) -> Rendered:
        """A prompt as the template writes it, where layouts do not serve: earlier answers lose their thoughts, say.

        Raises `InputError` when a message names a special token, which would become one.
        """
        typed = "\n".join(message.content for message in messages)
        special = self.tokenizer.special_names()
        if name := next((name for name in special if name in typed), None):
            raise InputError(
                f"A message holds the special token {name!r}, which cannot be sent here; leave it out."
            )
        ids = self.tokenizer.encode_with_specials(self._jinja.render(_dicts(messages), True))
        return Rendered(ids, [False] * len(ids))

    def render_many(
        self, conversations: Sequence[Sequence[Message]], encode: Encode | None = None
    ) -> RenderedBlock:
        """`render` for many conversations, encoded together by `encode` (by default the tokenizer's own)."""
        texts: list[str] = []
        layouts: list[_Layout] = []
        numbers: dict[int, int] = {}  # of the layouts, by identity
        which: list[int] = []  # the layout of each conversation
        answer_bytes: list[int] = []
        for messages in conversations:
            layout = self._layout(messages)
            contents = self._contents(messages, layout)
            if id(layout) not in numbers:
                numbers[id(layout)] = len(layouts)
                layouts.append(layout)
            which.append(numbers[id(layout)])
            texts += [pattern.format(*contents) for pattern in layout.patterns]
            answer_bytes.append(sum([len(contents[number].encode()) for number in layout.answers]))
        encoded = (encode or self.tokenizer.encode_texts)(texts)
        block, odd = _assembled(layouts, np.asarray(which, np.int64), encoded, answer_bytes)
        if self._markers:
            odd |= np.asarray(
                [self._has_marker(one.content for one in messages) for messages in conversations]
            )
        if odd.any():
            careful = [self._render_alone(conversations[number]) for number in np.flatnonzero(odd).tolist()]
            block = block.replaced(odd, careful)
        return block

    def num_answer_bytes(self, messages: Sequence[Message]) -> int:
        """UTF-8 bytes of the answers as they are written."""
        layout = self._layout(messages)
        contents = self._contents(messages, layout)
        return sum(len(contents[number].encode()) for number in layout.answers)

    def _has_marker(self, texts: Iterable[str]) -> bool:
        return any(marker in text for text in texts for marker in self._markers)

    def _render_alone(self, messages: Sequence[Message]) -> Rendered:
        """One conversation, with a closer look at what `_assembled` leaves alone."""
        layout = self._layout(messages)
        contents = self._contents(messages, layout)
        ids: list[int] = []
        mask: list[bool] = []
        for piece in layout.pieces:
            for part in [piece] if isinstance(piece, _Fixed) else self._stretches(piece, contents):
                ids += part.ids
                mask += [part.learn] * len(part.ids)
        return Rendered(ids, mask)

    def _stretches(self, run: _Run, contents: list[str]) -> list[_Fixed]:
        """The ids of each stretch of a run, as they are in the whole of it; each on its own where two share a token.

        A run in which a message has a marker is encoded in parts too, none of which has the whole marker.
        """
        texts, flags = run.texts(contents), [learn for _, learn in run.stretches]
        heads = [[], *map(self.tokenizer.encode, accumulate(texts))]
        nested = all(longer[: len(head)] == head for head, longer in pairwise(heads))
        messages = (contents[part] for parts, _ in run.stretches for part in parts if isinstance(part, int))
        if nested and not self._has_marker(messages):
            found = [longer[len(head) :] for head, longer in pairwise(heads)]
        else:
            inside = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in self._markers]
            halves = re.compile("|".join(inside) or "(?!)")
            found = [
                [id for half in halves.split(text) if half for id in self.tokenizer.encode(half)]
                for text in texts
            ]
        return [_Fixed(ids, learn) for ids, learn in zip(found, flags, strict=True)]

    def _contents(self, messages: Sequence[Message], layout: _Layout) -> list[str]:
        """The contents as the template writes them."""
        contents = [message.content for message in messages]
        for number, strip in layout.strips:
            contents[number] = strip(contents[number])
        if self._check_text and not _is_plain(messages):
            written = "".join([contents[part] if isinstance(part, int) else part for part in layout.parts])
            prompt = messages[-1].role != "assistant"
            if self._jinja.render(_dicts(messages), prompt) != written + layout.beyond:
                raise _Rewritten(
                    f"{self._jinja.origin} rewrites the text of a message, so it is unclear what would be learned; "
                    "change the message, or choose another data.chat_format."
                )
        return contents

    def _layout(self, messages: Sequence[Message]) -> _Layout:
        # A blank content is part of the layout, since trimming it may reach the fixed text around it.
        key = tuple([(m.role, None if m.content.strip() else m.content) for m in messages])
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) > 5000:
                self._layouts.clear()
            layout = self._layouts[key] = self._find_layout(messages)
        return layout

    def _find_layout(self, messages: Sequence[Message]) -> _Layout:
        """Render the template with placeholders and read from it what is fixed and what is learned."""
        if _is_plain(messages):
            bos, eos = _Fixed([self.tokenizer.bos_id], False), _Fixed([self.tokenizer.eos_id], True)
            run = _Run((((0,), True),), (), ("{0}",))
            return _Layout((bos, run, eos), (), (0,), (0,), "", *_segments([bos, run, eos]))
        skeleton, beyond = self._skeleton(messages)
        strips = []
        for number, message in enumerate(messages):
            if message.content.strip():
                strip, skeleton = self._trimming(skeleton, number)
                if strip is not None:
                    strips.append((number, strip))
        learn = False
        pieces: list[tuple[str | int, bool]] = []
        for part in re.split(f"(\ue000\\d+\ue001|{LEARN_BEGIN}|{LEARN_END})", skeleton):
            if part in (LEARN_BEGIN, LEARN_END):
                learn = part == LEARN_BEGIN
            elif part.startswith("\ue000"):
                pieces.append((int(part[1:-1]), learn))
            elif part:
                pieces.append((part, learn))
        parts = tuple(part for part, _ in pieces)
        found = tuple(_merged(self._tokenized(pieces)))
        answers = tuple(number for number, message in enumerate(messages) if message.role == "assistant")
        return _Layout(found, tuple(strips), answers, parts, beyond, *_segments(found))

    def _skeleton(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The text with placeholders and marks around what is learned, and what the template writes beyond it."""
        dicts = _dicts(messages)
        for number, one in enumerate(dicts):
            if one["content"].strip():
                one["content"] = _padded(number)
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        prompt = messages[-1].role != "assistant"
        whole = self._jinja.render(dicts, prompt)
        if self._jinja.marks_answers:
            return self._jinja.render(dicts, prompt, marked=True), ""
        marked, done = "", 0
        for number in answers:
            start = len(self._jinja.render(dicts[:number], True))
            if start < done or self._jinja.render(dicts[:number], True) != whole[:start]:
                raise InputError(
                    f"{self._jinja.origin} writes the beginning of a conversation differently once it goes on, so "
                    "what the model is asked in chat would not be what it learned; choose another data.chat_format."
                )
            content = whole.find(_mark(number), start) if messages[number].content.strip() else start
            end = self._splitter.search(whole, content) if self._splitter and content >= 0 else None
            if end is None:
                raise ModelError(
                    f"{self._jinja.origin} writes no special token behind an answer, so a model trained on it could "
                    "never stop; choose another data.chat_format."
                )
            marked += whole[done:start] + LEARN_BEGIN + whole[start : end.end()] + LEARN_END
            done = end.end()
        if not prompt and whole == self._jinja.render(dicts, True):  # it always asks for an answer
            return marked, whole[done:]
        return marked + whole[done:], ""

    @staticmethod
    def _trimming(skeleton: str, number: int) -> tuple[Callable[[str], str] | None, str]:
        """How the template trims message `number`, seen from the white space left around its placeholder."""
        before, mark, after = skeleton.partition(_mark(number))
        left = next((kept for kept in (_PAD, _PAD[-1]) if before.endswith(kept)), "")
        right = next((kept for kept in (_PAD[::-1], _PAD[-1]) if after.startswith(kept)), "")
        skeleton = before.removesuffix(left) + mark + after.removeprefix(right)
        strips: list[Callable[[str], str]] = []
        if left != _PAD:
            strips.append((lambda text: text.lstrip("\n")) if left else str.lstrip)
        if right != _PAD[::-1]:
            strips.append((lambda text: text.rstrip("\n")) if right else str.rstrip)
        if not strips:
            return None, skeleton
        if strips == [str.lstrip, str.rstrip]:
            return str.strip, skeleton
        return (lambda text: strips[-1](strips[0](text))), skeleton

    def _tokenized(self, pieces: Iterable[tuple[str | int, bool]]) -> Iterator[_Fixed | _Run]:
        """Special tokens become ids, and what lies between two of them a run."""
        stretches: list[tuple[list[str | int], bool]] = []
        for part, learn in pieces:
            fragments = self._splitter.split(part) if isinstance(part, str) and self._splitter else [part]
            for fragment in fragments:
                if isinstance(fragment, str) and fragment.strip() and fragment in self._added:
                    yield from self._run(stretches)
                    stretches = []
                    yield _Fixed([self._added[fragment]], learn)
                elif fragment != "":
                    if not stretches or stretches[-1][1] != learn:
                        stretches.append(([], learn))
                    stretches[-1][0].append(fragment)
        yield from self._run(stretches)

    def _run(self, stretches: list[tuple[list[str | int], bool]]) -> Iterator[_Fixed | _Run]:
        if not stretches:
            return
        heads: list[list[int]] = []
        patterns: list[str] = []
        text = pattern = ""
        for parts, _ in stretches:
            for part in parts:
                text += str(part)
                pattern += (
                    f"{{{part}}}" if isinstance(part, int) else part.replace("{", "{{").replace("}", "}}")
                )
            if patterns or any(isinstance(part, int) for part in parts):
                patterns.append(pattern)
            else:
                heads.append(self.tokenizer.encode(text))
        if len(stretches) == 1 and heads:
            yield _Fixed(heads[0], stretches[0][1])
        else:
            yield _Run(
                tuple((tuple(parts), learn) for parts, learn in stretches), tuple(heads), tuple(patterns)
            )

    def _marker_names(self, layout: _Layout) -> Iterator[str]:
        """Added tokens that the template writes and that a tokenizer would also find in a message."""
        fixed = "".join(part for part in layout.parts if isinstance(part, str))
        for name in self._splitter.findall(fixed) if self._splitter else []:
            if self.tokenizer.encode(name) == [self._added[name]]:
                yield name

    def _prove(self, messages: Sequence[Message], layout: _Layout) -> None:
        """One conversation must come out as the tokenizer reads the whole text; else the format is refused."""
        text = "".join([messages[p].content if isinstance(p, int) else p for p in layout.parts])
        if self.render(messages).ids != self.tokenizer.encode_with_specials(text):
            raise ModelError(
                f"{self._jinja.origin} cannot be followed token by token with {self.tokenizer.path}; "
                "choose another data.chat_format."
            )


def _segments(
    pieces: Iterable[_Fixed | _Run],
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.uint32]]:
    """The texts to encode, the segments and the fixed ids of a layout; no segments where fixed text shares a token."""
    patterns: list[str] = []
    segments: list[tuple[int, int, int, bool]] = []
    fixed: list[int] = []
    for piece in pieces:
        if isinstance(piece, _Fixed):
            segments.append((_FIXED, len(fixed), len(piece.ids), piece.learn))
            fixed += piece.ids
            continue
        patterns += piece.patterns
        before: list[int] = []
        flags = [learn for _, learn in piece.stretches]
        for head, learn in zip(piece.heads, flags, strict=False):
            if head[: len(before)] != before:
                return (), np.zeros((0, 4), np.int64), np.zeros(0, np.uint32)
            segments.append((_FIXED, len(fixed) + len(before), len(head) - len(before), learn))
            before = head
        what = _TEXT
        for learn in flags[len(piece.heads) :]:
            segments.append((what, len(fixed), len(before), learn))
            what = _LONGER_TEXT
        fixed += before
    return tuple(patterns), np.asarray(segments, np.int64), np.asarray(fixed, np.uint32)


def _assembled(
    layouts: list[_Layout], which: NDArray[np.int64], encoded: EncodedTexts, answer_bytes: list[int]
) -> tuple[RenderedBlock, NDArray[np.bool_]]:
    """Conversations [N] put together from their layouts' fixed ids and their texts' ids, all at once.

    The second says which [N] are wrong: an answer shares a token with the header before it.
    """
    # All segments of all conversations: from now on a start is a place in `pool`.
    pool = np.concatenate([encoded.ids, *[layout.fixed for layout in layouts]])
    counts = np.asarray([len(layout.segments) for layout in layouts], np.int64)
    fixed_starts = len(encoded.ids) + borders([len(layout.fixed) for layout in layouts])
    table = np.concatenate([np.zeros((0, 4), np.int64), *[layout.segments for layout in layouts]])
    table[:, 1] += np.repeat(fixed_starts[:-1], counts)
    num_segments = counts[which]
    what, starts, lengths, learn = table[spans(borders(counts)[:-1][which], num_segments)].T.copy()
    # A text begins with the ids of its head, which are another segment's.
    is_text = what != _FIXED
    head_starts, head_lengths = starts[is_text], lengths[is_text]
    text_starts, text_lengths = encoded.borders[:-1], encoded.lengths
    longer = np.flatnonzero(what[is_text] == _LONGER_TEXT)
    head_starts[longer], head_lengths[longer] = text_starts[longer - 1], text_lengths[longer - 1]
    compared = np.minimum(head_lengths, text_lengths)
    differs = pool[spans(text_starts, compared)] != pool[spans(head_starts, compared)]
    wrong = head_lengths > text_lengths
    wrong[np.repeat(np.arange(len(wrong)), compared)[differs]] = True
    starts[is_text], lengths[is_text] = text_starts + compared, text_lengths - compared
    odd = num_segments == 0
    odd[np.repeat(np.arange(len(odd)), num_segments)[is_text][wrong]] = True
    mask = np.repeat(learn.astype(np.uint8), lengths)
    ends = borders(lengths)[borders(num_segments)]
    block = RenderedBlock(pool[spans(starts, lengths)], mask, ends, np.asarray(answer_bytes, np.int64))
    return block, odd


def _merged(pieces: Iterable[_Fixed | _Run]) -> Iterator[_Fixed | _Run]:
    """Neighbouring fixed pieces in one."""
    last: _Fixed | None = None
    for piece in pieces:
        if last is not None and isinstance(piece, _Fixed) and piece.learn == last.learn:
            last = _Fixed(last.ids + piece.ids, last.learn)
            continue
        if last is not None:
            yield last
        last = piece if isinstance(piece, _Fixed) else None
        if last is None:
            yield piece
    if last is not None:
        yield last


def _dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _padded(number: int) -> str:
    """A message's placeholder; what is left of the white space around it shows how the template trims."""
    return _PAD + _mark(number) + _PAD[::-1]


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _is_plain(messages: Sequence[Message]) -> bool:
    return len(messages) == 1 and messages[0].role == "assistant"
