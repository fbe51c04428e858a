"""Chat templates in Jinja's sandbox, rendered exactly as transformers renders them (and without importing torch).

`{% generation %} … {% endgeneration %}` says what the assistant writes; on demand the rendered text carries a mark
on either side of it.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from firefly.errors import InputError, ModelError

LEARN_BEGIN, LEARN_END = "\ue002", "\ue003"
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class ChatTemplate:
    """A compiled chat template; `tokens` are the names that it may use, such as bos_token."""

    def __init__(self, source: str, tokens: Mapping[str, str], origin: str) -> None:
        """Raises `ModelError`, naming `origin`, when `source` is not valid Jinja."""
        self.source, self.tokens, self.origin = source, dict(tokens), origin
        self.marks_answers = _GENERATION.search(source) is not None
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ModelError(f"{origin} is not a valid Jinja template ({error}); mend it.") from error

    def render(self, messages: Sequence[Mapping[str, str]], prompt: bool, marked: bool = False) -> str:
        """The conversation as text; `prompt` asks for the beginning of the assistant's next turn.

        Raises `InputError` when the template refuses the conversation.
        """
        names: dict[str, Any] = self.tokens | {"messages": messages, "add_generation_prompt": prompt}
        if marked:
            names |= {"learn_begin": LEARN_BEGIN, "learn_end": LEARN_END}
        try:
            return self._template.render(**names, tools=None, documents=None)
        except (TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"{self.origin} refuses a conversation of the roles {roles} ({error}); change the conversation, "
                "or choose another data.chat_format."
            ) from error


def without_marks(source: str) -> str:
    """The template without its generation tags, which not every program knows."""
    return _GENERATION.sub("", source)


class _Generation(Extension):
    """The generation tag: its body, with the marks around it where they are asked for."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("learn_begin", "learn_end")
        )
        return [begin, nodes.Scope(body, lineno=line), end]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
