"""Importers for the shapes in which others publish conversations; each yields whole examples.

    alpaca        {"instruction", "input", "output", "history": [[question, answer], …]}   Alpaca, BELLE
    seed_tasks    {"instruction", "instances": [{"input", "output"}, …]}                    self-instruct, BELLE
    conversation  {"conversation": [{"human": …, "assistant": …}, …]}                       Firefly's later data
    sharegpt      {"conversations": [{"from": "human" | "gpt" | "system", "value": …}, …]}  ShareGPT, BELLE
    messages      {"messages": [{"role": …, "content": text or parts}, …]}                  OpenAI
    moss          {"chat": {"turn_1": {"Human": …, "MOSS": …}, …}}                          MOSS
    preferences   {"input", "chosen", "rejected"}; see the function for what else a question and an answer may be

Any of them may have a `system` text beside its turns (MOSS: `meta_instruction`). Lists may also come as JSON text,
as they stand in a CSV cell. The same conversation gives the same example, however it is written: white space at
the ends of a turn does not count, an empty system text is none, and a last question without an answer, from which
nothing can be learnt, is left out. What is not a conversation of one person with the model is skipped with a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

from firefly.data.clean import digest, normalised
from firefly.data.example import Example, Message, Role
from firefly.data.importers import Imported, Origin, Skipped, Whole, field_text, importer
from firefly.errors import InputError
from firefly.files import JSON_DECODER, check_json

Turn = tuple[str, str]  # role, content
_ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = {"tool", "function", "function_call", "function-call", "observation", "ipython"}
_MOSS_MARKS = re.compile(r"<\|\w[\w ]*\|>:|<eo[a-z]>")


class _Unusable(Exception):
    """The conversation is well-formed and cannot be used; the reason's code."""


@importer("alpaca", shapes=[{"instruction", "output"}])
def import_alpaca(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Question and answer with earlier turns in `history`; `input` follows the instruction on a new line."""
    turns: list[Turn] = []
    for pair in _list(record.get("history") or [], "history", origin):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"{origin}: field 'history' must be a list of [question, answer].")
        turns += [
            ("user", _text(pair[0], "history", origin)),
            ("assistant", _text(pair[1], "history", origin)),
        ]
    if "output" not in record or "instruction" not in record:
        raise _missing("'instruction' or 'output' is missing", record, origin)
    parts = (field_text(record, name, origin) for name in ("instruction", "input"))
    turns += [("user", "\n".join(filter(None, parts))), ("assistant", field_text(record, "output", origin))]
    yield from _example(record, turns, origin)


@importer("seed_tasks", shapes=[{"instruction", "instances"}])
def import_seed_tasks(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Seed tasks of self-instruct: an instruction with a list of instances, each {"input", "output"}."""
    for instance in _objects(record, "instances", origin):
        yield from import_alpaca({"instruction": record.get("instruction"), **instance}, origin)


@importer("conversation", shapes=[{"conversation"}])
def import_conversation(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Pairs of a question and its answer."""
    turns: list[Turn] = []
    for index, pair in enumerate(_objects(record, "conversation", origin)):
        if not {"human", "assistant"} <= pair.keys():
            raise InputError(f"{origin}: conversation[{index}] needs 'human' and 'assistant'.")
        turns += [(_ROLES[name], _text(pair.get(name), name, origin)) for name in ("human", "assistant")]
    yield from _example(record, turns, origin)


@importer("sharegpt", shapes=[{"conversations"}])
def import_sharegpt(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Turns with their speaker in `from`."""
    turns = _objects(record, "conversations", origin)
    yield from _example(record, _speaking(turns, "from", "value", "conversations", origin), origin)


@importer("messages", shapes=[{"messages"}])
def import_messages(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Turns with their speaker in `role`; content is text or a list of parts, which must be texts."""
    turns = _objects(record, "messages", origin)
    yield from _example(record, _speaking(turns, "role", "content", "messages", origin), origin)


@importer("moss", shapes=[{"chat"}])
def import_moss(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Numbered turns, each with markers around question and answer; a turn that used a tool is skipped."""
    chat = record.get("chat")
    if isinstance(chat, str):
        chat = _parsed(chat, "chat", origin)
    if not isinstance(chat, dict) or not all(isinstance(turn, dict | None) for turn in chat.values()):
        raise _missing("'chat' must be an object of turns, turn_1, turn_2, …", record, origin)
    there = {
        name: turn for name, turn in chat.items() if turn
    }  # Parquet has null for a turn that others have
    yield from _example(record, _moss_turns(there, origin), origin)


def _moss_turns(chat: dict[str, Any], origin: Origin) -> Iterator[Turn]:
    for _, turn in sorted(chat.items(), key=lambda item: (len(item[0]), item[0])):  # turn_10 behind turn_9
        text = {name: _MOSS_MARKS.sub("", field_text(turn, name, origin)).strip() for name in turn}
        if any(text.get(name, "None") not in ("", "None") for name in ("Commands", "Tool Responses")):
            raise _Unusable("tool_calls")
        if "Human" not in text or "MOSS" not in text:
            raise _missing("'chat' needs 'Human' and 'MOSS' in every turn", turn, origin)
        yield from (("user", text["Human"]), ("assistant", text["MOSS"]))


@importer("preferences", shapes=[{"chosen", "rejected"}, {"kind", "chosen", "rejected"}])
def import_preferences(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """A question with a chosen and a rejected answer.

    The question is text (`input`, `prompt`, `instruction`), a list of turns (`messages`, `conversations`, `prompt`), or
    stands in the answers; an answer is text, one turn, or the turns of the whole conversation.
    """
    if not {"chosen", "rejected"} <= record.keys():
        raise _missing("'chosen' or 'rejected' is missing", record, origin)
    try:
        asked = _asked(record, origin)
        chosen, rejected = (_side(record, name, asked, origin) for name in ("chosen", "rejected"))
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
            raise _Unusable("no_common_question")
        if not chosen[-1][0] == rejected[-1][0] == "assistant":
            raise _Unusable("no_answer")
    except _Unusable as unusable:
        yield Skipped(str(unusable), origin.source, json.dumps(record, ensure_ascii=False, default=str))
        return
    named = {"kind": "Preference", **record}
    for item in _example(named, chosen, origin):
        if isinstance(item, Whole):
            item = replace(item, example=replace(item.example, rejected=rejected[-1][1]))
        yield item


def _asked(record: dict[str, Any], origin: Origin) -> list[Turn]:
    """The turns before the two answers; none where each of these tells the whole conversation."""
    for name in ("messages", "conversations", "prompt"):
        if isinstance(record.get(name), list):
            return _turns(record, name, origin)
    names = ("instruction", "input", "prompt", "question")
    text = "\n".join(filter(None, (field_text(record, name, origin) for name in names)))
    return [("user", text)] if text else []


def _side(record: dict[str, Any], name: str, asked: list[Turn], origin: Origin) -> list[Turn]:
    """The whole conversation that ends with the answer `name`."""
    if isinstance(record[name], dict):
        record = {name: [record[name]]}
    if not isinstance(record[name], list):
        return [*asked, ("assistant", field_text(record, name, origin))]
    turns = _turns(record, name, origin)
    return turns if asked and turns[: len(asked)] == asked else [*asked, *turns]


def _turns(record: dict[str, Any], name: str, origin: Origin) -> list[Turn]:
    """A list of turns that name their speaker in `role`, or in `from`."""
    turns = _objects(record, name, origin)
    speaker, content = ("from", "value") if turns and "from" in turns[0] else ("role", "content")
    return list(_speaking(turns, speaker, content, name, origin))


def _speaking(
    turns: list[dict[str, Any]], speaker: str, content: str, field: str, origin: Origin
) -> Iterator[Turn]:
    """The turns in which each names its speaker."""
    for index, turn in enumerate(turns):
        role = turn.get(speaker)
        if not isinstance(role, str) or (content not in turn and "tool_calls" not in turn):
            raise InputError(f"{origin}: {field}[{index}] needs '{speaker}' and '{content}'.")
        if role.lower() in _TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
            raise _Unusable("tool_calls")
        if role.lower() not in _ROLES:
            raise _Unusable("unknown_speaker")
        yield _ROLES[role.lower()], _content(turn.get(content), f"{field}[{index}].{content}", origin)


def _content(value: Any, name: str, origin: Origin) -> str:
    """Text, or the texts of a list of parts one under the other."""
    if not isinstance(value, list):
        return _text(value, name, origin)
    texts = []
    for part in value:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise _Unusable("not_only_text")
        texts.append(_text(part.get("text") if isinstance(part, dict) else part, name, origin))
    return "\n".join(texts)


def _text(value: Any, name: str, origin: Origin) -> str:
    return field_text({name: value}, name, origin)


def _example(record: dict[str, Any], turns: Iterable[Turn], origin: Origin) -> Iterator[Imported]:
    """The turns, with the record's own system text before them, as an example; or why it cannot be one."""
    system = "meta_instruction" if "chat" in record else "system"
    try:
        found = [("system", field_text(record, system, origin)), *turns]
        messages = _in_order([turn for turn in found if turn[0] != "system" or turn[1]])
    except _Unusable as unusable:
        yield Skipped(str(unusable), origin.source, json.dumps(record, ensure_ascii=False, default=str))
        return
    own = record.get("kind") if "chat" not in record else None  # MOSS calls its subsets kinds
    example = Example(
        origin.kind or (own if isinstance(own, str) and own else "BELLE"), messages, origin.source
    )
    # By question: two answers to one question stay on one side of the split.
    yield Whole(example, digest(normalised(example.input)))


def _in_order(turns: list[Turn]) -> tuple[Message, ...]:
    """A system turn at most, then question and answer in turn."""
    if turns and turns[-1][0] == "user":
        turns = turns[:-1]
    spoken = turns[1:] if turns and turns[0][0] == "system" else turns
    if not spoken:
        raise _Unusable("no_answer")
    if any(role != ("user", "assistant")[index % 2] for index, (role, _) in enumerate(spoken)):
        raise _Unusable("turns_do_not_alternate")
    return tuple(Message(cast(Role, role), content) for role, content in turns)


def _objects(record: dict[str, Any], name: str, origin: Origin) -> list[dict[str, Any]]:
    """A field that is a list of objects."""
    found = _list(record.get(name), name, origin)
    if not all(isinstance(item, dict) for item in found):
        raise _missing(f"'{name}' must be a list of objects, one a turn", record, origin)
    return found


def _list(value: Any, name: str, origin: Origin) -> list[Any]:
    if isinstance(value, str):
        value = _parsed(value, name, origin)
    if not isinstance(value, list):
        raise InputError(
            f"{origin}: field '{name}' is a {type(value).__name__} where a list of turns is needed."
        )
    return value


def _parsed(text: str, name: str, origin: Origin) -> Any:
    """The value of a CSV cell that holds JSON."""
    try:
        value = JSON_DECODER.decode(text)
        check_json(value, text, 0, len(text))
        return value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin}: field '{name}' is text that is not valid JSON ({error}).") from error


def _missing(what: str, record: dict[str, Any], origin: Origin) -> InputError:
    return InputError(f"{origin}: field {what}; the fields there are: {', '.join(sorted(record)) or 'none'}.")
