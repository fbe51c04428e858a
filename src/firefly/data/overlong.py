"""What happens to a sample that is longer than `max_seq_length`: never anything silent.

    middle-of-input   the oldest exchanges go, whole; then the middle of the last input, with … in its place
    left-of-input     the same, but the last input loses its beginning
    right-of-target   the sample ends early, without an end token: a cut answer must not teach to stop
    drop, error       as they say

The first two keep every token of the last answer, its end token and the format's fixed parts: the *conversation* is
shortened and rendered again, so what is learned is the exact rendering of a real conversation. Where even that does
not help, since the answer alone is too long, the sample is lost: an error, unless `allow_lost_targets` lets it
be dropped. A plain text becomes several samples and loses nothing.
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
        yield _shorten(example, chat_format, data)


def _shorten(example: Example, chat_format: ChatFormat, data: DataSection) -> Part:
    """Leave out the oldest exchanges, then a part of the last input, until the rest fits."""
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
    messages = [*system, *turns]
    sample: Rendered | None = chat_format.render(messages)
    if sample is not None and len(sample.ids) > limit:
        reasons.append("input_middle_cut" if data.overlong == "middle-of-input" else "input_start_cut")
        excess = len(sample.ids) - limit
        messages, sample = _cut_input(
            messages, excess, data.overlong == "middle-of-input", limit, chat_format
        )
    if sample is None:
        return _lost(example, "the answer alone fills", data)
    return Part(sample, chat_format.num_answer_bytes(messages), tuple(reasons))


def _cut_input(
    messages: Sequence[Message], excess: int, middle: bool, limit: int, chat_format: ChatFormat
) -> tuple[list[Message], Rendered | None]:
    """Take at least `excess` tokens out of the last input, at the borders of characters, and render again."""
    text = messages[-2].content
    starts = [start for start, _ in chat_format.tokenizer.rust.encode(text, add_special_tokens=False).offsets]
    kept = len(starts) - excess
    while kept >= 0:
        left = kept // 2 if middle else 0
        rest = text[starts[len(starts) - kept + left] :] if left < kept else ""
        shorter = (text[: starts[left]] if left else "") + _GAP + rest
        cut = [*messages[:-2], replace(messages[-2], content=shorter), messages[-1]]
        sample = chat_format.render(cut)
        if len(sample.ids) <= limit:
            return cut, sample
        kept -= len(sample.ids) - limit
    return list(messages), None


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
