"""The only place that turns messages into token ids and loss mask: train, chat and evaluation all render here.

The article's format, one turn after the other, the loss on `target</s>` alone:

    <s>input</s></s>target</s>

A system message stands before the first input, set off by a blank line. A plain text is `<s>text</s>`.
`template` says the same in Jinja and is written into every model directory; a test holds both to identity.
Text is encoded apart from the special tokens around it, so that a user who types `</s>` writes four characters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from firefly.data.example import Message
from firefly.data.tokenizer import ModelTokenizer

_TEMPLATE = (
    "{%- set first = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set first.system = message['content'] + '\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ BOS + first.system + message['content'] + EOS + EOS }}"
    "{%- set first.system = '' -%}"
    "{%- else -%}"
    "{{ (BOS if messages | length == 1 else '') + message['content'] + EOS }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def template(bos_token: str, eos_token: str) -> str:
    """The format in Jinja. The tokens stand in it as they are: not every tokenizer names a `bos_token`."""
    return _TEMPLATE.replace("BOS", json.dumps(bos_token)).replace("EOS", json.dumps(eos_token))


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of one sample and, for each, whether the model learns to produce it."""

    ids: list[int]
    mask: list[bool]


def render(messages: Sequence[Message], tokenizer: ModelTokenizer) -> Rendered:
    """Render a conversation; the loss lies on every assistant turn and the `</s>` behind it.

    A conversation that ends with a user turn renders as a prompt: the model's answer comes next.
    """
    return render_many([messages], tokenizer)[0]


def render_many(conversations: Sequence[Sequence[Message]], tokenizer: ModelTokenizer) -> list[Rendered]:
    """`render` for many conversations at once; the texts are encoded on all cores."""
    texts = [text for messages in conversations for _, text in _segments(messages)]
    encoded = iter(tokenizer.encode_many(texts))
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    samples = []
    for messages in conversations:
        ids: list[int] = []
        mask: list[bool] = []
        plain = len(messages) == 1 and messages[0].role == "assistant"
        for role, _ in _segments(messages):
            content = next(encoded)
            learn = role == "assistant"
            if role == "user" or plain:
                ids.append(bos)
                mask.append(False)
            tail = [eos] if learn else [eos, eos]
            ids += content + tail
            mask += [learn] * (len(content) + len(tail))
        samples.append(Rendered(ids, mask))
    return samples


def _segments(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(role, text) of each turn, the system message merged into the first input."""
    system = ""
    segments: list[tuple[str, str]] = []
    for message in messages:
        if message.role == "system":
            system = message.content + "\n\n"
        else:
            segments.append((message.role, system + message.content))
            system = ""
    return segments
