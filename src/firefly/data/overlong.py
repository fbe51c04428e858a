"""What happens to a sample that is longer than `max_seq_length`: never anything silent.

    middle-of-input   the oldest exchanges go, whole; then the middle of the last input, with … in its place
    left-of-input     the same, but the last input loses its beginning
    right-of-target   the sample ends early, without an end token: a cut answer must not teach to stop
    drop, error       as they say

The first two keep every token of the last answer, its end token and the format's fixed parts: the *conversation* is
shortened and rendered again, so what is learned is the exact rendering of a real conversation. Where even that does
not help, since the answer alone is too long, the sample is lost: an error, unless `allow_lost_targets` lets it
be dropped. A plain text becomes several samples and loses nothing. The two sides of a preference keep the same
question, cut so that the longer one fits, and are lost together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from firefly.data.chatformat import ChatFormat, Rendered
from firefly.data.example import Example, Message
from firefly.errors import InputError
from firefly.recipe import DataSection

_GAP = "…"


@dataclass(frozen=True)
class Part:
    """One sample that an example became; `sample` is None where it was lost. `reasons` say what was cut."""

    sample: Rendered | None
    target_bytes: int = 0
    reasons: tuple[str, ...] = ()


def fit(example: Example, whole: Rendered, chat_format: ChatFormat, data: DataSection) -> Iterator[Part]:
    """The samples that one rendered example becomes, none longer than `data.max_seq_length`.

    Raises `InputError`, naming the record, where the recipe does not say what may be lost.
    """
    limit = data.max_seq_length
    if len(whole.ids) <= limit:
        yield Part(whole, chat_format.num_answer_bytes(example.messages))
    elif example.is_plain:
        # Windows overlap by one token: the last of one is the first of the next, where it is not learned again.
        for start in range(0, len(whole.ids) - 1, limit - 1):
            window = slice(start, start + limit)
            part = Rendered(whole.ids[window], [False, *whole.mask[window][1:]])
            yield Part(part, _learned_bytes(part, chat_format))
    elif data.overlong == "error":
        raise InputError(
            f"{example.source} ({example.kind}) has {len(whole.ids)} tokens and max_seq_length is {limit}; "
            "raise data.max_seq_length, or let data.overlong say what to cut."
        )
    elif data.overlong == "drop":
        yield Part(None, reasons=("overlong_dropped",))
    elif data.overlong == "right-of-target":
        if True not in whole.mask[:limit]:
            yield _lost(example, "the input alone fills", data)
        else:
            end = limit - whole.mask[:limit][::-1].index(
                True
            )  # nothing behind the last learned token teaches
            part = Rendered(whole.ids[:end], whole.mask[:end])
            yield Part(part, _learned_bytes(part, chat_format), ("target_end_cut",))
    else:
        messages, reasons = _shorten(example, chat_format, data)
        if messages is None:
            yield _lost(example, "the answer alone fills", data)
        else:
            yield Part(chat_format.render(messages), chat_format.num_answer_bytes(messages), reasons)


def fit_pair(
    sides: Sequence[Example], wholes: Sequence[Rendered], chat_format: ChatFormat, data: DataSection
) -> list[Part]:
    """The two samples of a preference, or the one part that says why both are lost; see `fit`."""
    if data.overlong in ("middle-of-input", "left-of-input"):
        return _shorten_both(sides, wholes, chat_format, data)
    both = zip(sides, wholes, strict=True)
    parts = [part for side, whole in both for part in fit(side, whole, chat_format, data)]
    return next(([part] for part in parts if part.sample is None), parts)


def _shorten_both(
    sides: Sequence[Example], wholes: Sequence[Rendered], chat_format: ChatFormat, data: DataSection
) -> list[Part]:
    longer = max(range(2), key=lambda side: len(wholes[side].ids))
    messages, reasons = _shorten(sides[longer], chat_format, data)
    if messages is None:
        return [_lost(sides[longer], "the answer alone fills", data)]
    parts = []
    for side in sides:
        turns = [*messages[:-1], side.messages[-1]]
        parts.append(Part(chat_format.render(turns), chat_format.num_answer_bytes(turns), reasons))
    return parts


def _shorten(
    example: Example, chat_format: ChatFormat, data: DataSection
) -> tuple[list[Message] | None, tuple[str, ...]]:
    """Leave out the oldest exchanges, then a part of the last input, until the rest fits; None: nothing does.

    Returns the messages, and what was done to them.
    """
    limit = data.max_seq_length
    system = example.messages[:1] if example.messages[0].role == "system" else ()
    turns = example.messages[len(system) :]
    reasons: list[str] = []
    if len(turns) > 2:
        reasons.append("turns_dropped")
        # lengths by number of exchanges left out, negated to rise; the last exchange always stays
        dropped = bisect_left(
            range(len(turns) // 2 - 1),
            -limit,
            lo=1,
            key=lambda number: -len(chat_format.render([*system, *turns[2 * number :]]).ids),
        )
        turns = turns[2 * dropped :]
    messages: list[Message] | None = [*system, *turns]
    assert messages is not None
    excess = len(chat_format.render(messages).ids) - limit
    if excess > 0:
        reasons.append("input_middle_cut" if data.overlong == "middle-of-input" else "input_start_cut")
        messages = _cut_input(messages, excess, data.overlong == "middle-of-input", limit, chat_format)
    return messages, tuple(reasons)


def _cut_input(
    messages: Sequence[Message], excess: int, middle: bool, limit: int, chat_format: ChatFormat
) -> list[Message] | None:
    """Take at least `excess` tokens out of the last input, at the borders of characters."""
    text = messages[-2].content
    starts = [start for start, _ in chat_format.tokenizer.rust.encode(text, add_special_tokens=False).offsets]
    kept = len(starts) - excess
    while kept >= 0:
        left = kept // 2 if middle else 0
        rest = text[starts[len(starts) - kept + left] :] if left < kept else ""
        shorter = (text[: starts[left]] if left else "") + _GAP + rest
        cut = [*messages[:-2], replace(messages[-2], content=shorter), messages[-1]]
        excess = len(chat_format.render(cut).ids) - limit
        if excess <= 0:
            return cut
        kept -= excess
    return None


def _lost(example: Example, why: str, data: DataSection) -> Part:
    if not data.allow_lost_targets:
        raise InputError(
            f"{example.source} ({example.kind}): {why} max_seq_length = {data.max_seq_length}, so its target would be "
            "lost; raise data.max_seq_length, or set data.allow_lost_targets = true to drop it"
            + (", or data.overlong = 'right-of-target'." if "answer" in why else ".")
        )
    return Part(None, reasons=("target_lost",))


def _learned_bytes(sample: Rendered, chat_format: ChatFormat) -> int:
    """UTF-8 bytes of the text under the loss mask of a cut sample."""
    learned = [token for token, learn in zip(sample.ids, sample.mask, strict=True) if learn]
    return len(chat_format.tokenizer.decode(learned).encode("utf-8"))
