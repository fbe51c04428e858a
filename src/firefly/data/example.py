"""An `Example` is one record of the dataset: which task it is, the messages, and where it came from.

On disk it is one JSON line. A single question and answer is written the way firefly-train-1.1M writes it,
`{"kind", "input", "target", "source"}`; anything longer as `{"kind", "messages", "source"}`. A preference has two
answers to its last question, `"chosen"` and `"rejected"`, in the place of `"target"` or behind the `"messages"`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, Literal, cast

from firefly.errors import InputError

Role = Literal["system", "user", "assistant"]
_to_json = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` would make an encoder a record
_LONGER = frozenset(
    ("messages", "chosen", "rejected")
)  # fields of records that are more than a question and an answer
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One training record: `kind` names the task, `source` says where it came from (file:line).

    In a preference the last message is the chosen answer, and `rejected` the worse one.
    """

    kind: str
    messages: tuple[Message, ...]
    source: str = ""
    rejected: str | None = None

    @classmethod
    def plain(cls, kind: str, text: str, source: str = "") -> Example:
        """A plain text to learn from, without a question."""
        return cls(kind, (Message("assistant", text),), source)

    @property
    def is_plain(self) -> bool:
        """Whether this is a plain text, without a question."""
        return len(self.messages) == 1

    @classmethod
    def of(cls, kind: str, input: str, target: str, source: str = "") -> Example:
        """A single question and its answer."""
        return cls(kind, (Message("user", input), Message("assistant", target)), source)

    @property
    def input(self) -> str:
        """Everything before the last answer, joined by newlines."""
        return "\n".join(message.content for message in self.messages[:-1])

    @property
    def target(self) -> str:
        """The last answer."""
        return self.messages[-1].content

    @property
    def answered(self) -> tuple[Example, ...]:
        """The example itself, or of a preference its two sides, each with one answer: chosen, rejected."""
        if self.rejected is None:
            return (self,)
        answers = (self.target, self.rejected)
        turns = ((*self.messages[:-1], Message("assistant", answer)) for answer in answers)
        return tuple(Example(self.kind, messages, self.source) for messages in turns)

    def to_json(self) -> str:
        """The record as one JSON line, without the line end."""
        if self.rejected is None and [message.role for message in self.messages] == ["user", "assistant"]:
            texts = (self.kind, self.messages[0].content, self.target, self.source)  # most are such
            kind, question, answer, source = map(encode_basestring, texts)
            return f'{{"kind": {kind}, "input": {question}, "target": {answer}, "source": {source}}}'
        record: dict[str, Any] = {"kind": self.kind}
        turns = [{"role": message.role, "content": message.content} for message in self.messages]
        if self.rejected is None:
            record["messages"] = turns
        else:
            if [turn["role"] for turn in turns] == ["user", "assistant"]:
                record["input"] = turns[0]["content"]
            else:
                record["messages"] = turns[:-1]
            record |= {"chosen": self.target, "rejected": self.rejected}
        record["source"] = self.source
        return _to_json(record)

    @classmethod
    def from_record(cls, record: dict[str, Any], path: Path, line: int, kind: str | None = None) -> Example:
        """Read a record with `kind`, and `input`/`target` or `messages`, or a preference.

        Raises `InputError` naming file, line and field.
        """
        name, question, answer = record.get("kind", kind), record.get("input"), record.get("target")
        if (  # most are such, and need no closer look
            isinstance(name, str)
            and isinstance(question, str)
            and isinstance(answer, str)
            and _LONGER.isdisjoint(record)
        ):
            return cls.of(name, question, answer, record.get("source") or f"{path.name}:{line}")
        where = f"{path}, line {line}"
        if not isinstance(name, str):
            raise InputError(
                f'{where}: field \'kind\' is missing; write the task\'s name, e.g. "kind": "Couplet".'
            )
        source = record.get("source") or f"{path.name}:{line}"
        is_preference = {"chosen", "rejected"} <= record.keys()
        answers = ["chosen", "rejected"] if is_preference else ["target"]
        if "messages" in record and not is_preference:
            return cls(name, _messages(record["messages"], where), source)
        for field in answers if "messages" in record else ["input", *answers]:
            if not isinstance(record.get(field), str):
                have = ", ".join(sorted(record)) or "none"
                raise InputError(
                    f"{where}: field '{field}' is missing or not text; the fields there are: {have}."
                )
        if not is_preference:
            return cls.of(name, record["input"], record["target"], source)
        asked = record.get("messages", [{"role": "user", "content": record.get("input")}])
        if not isinstance(asked, list) or not asked:
            raise InputError(f"{where}: a preference needs a question before 'chosen' and 'rejected'.")
        turns = [*asked, {"role": "assistant", "content": record["chosen"]}]
        return cls(name, _messages(turns, where), source, record["rejected"])


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    """Check that messages are an optional system turn, then user and assistant in alternation.

    One assistant turn alone is a plain text, for pre-training.
    """
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: field 'messages' must be a list of role/content objects.")
    messages = []
    for index, turn in enumerate(value):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("content"), str)
            or turn.get("role") not in ROLES
        ):
            raise InputError(
                f"{where}: messages[{index}] needs 'content' (text) and 'role' (one of {', '.join(ROLES)})."
            )
        messages.append(Message(cast(Role, turn["role"]), turn["content"]))
    roles = [message.role for message in messages if message.role != "system"]
    if [message.role for message in messages] == ["assistant"]:
        return tuple(messages)
    alternate = all(role == ("user", "assistant")[index % 2] for index, role in enumerate(roles))
    system_first = all(message.role != "system" for message in messages[1:])
    if not roles or not alternate or roles[-1] != "assistant" or not system_first:
        raise InputError(
            f"{where}: messages must be an optional system turn, then user and assistant in turn, ending with the "
            f"assistant; the roles there are: {', '.join(m.role for m in messages)}."
        )
    return tuple(messages)
