"""A conversation in the terminal: `chat` answers one prompt, or line after line until /exit.

One turn: history and message → the model's own chat format → token ids → `Generator.stream` → `StreamDecoder` → screen.
Answers alone go to stdout, every word about the session to stderr, so that a pipe carries answers:

    printf '你好\\n/exit\\n' | firefly chat out/demo > answers.txt
"""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import torch

from firefly.console import say
from firefly.data.chatformat import format_of
from firefly.data.example import Message
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import FireflyError, InputError, ModelError, choices
from firefly.files import locate
from firefly.model.families import FAMILIES
from firefly.model.generate import Generator, open_generator
from firefly.model.hub_generate import HubGenerator, open_hub_generator
from firefly.model.load import read_config
from firefly.model.shards import weight_files
from firefly.recipe import GenerationSection, Recipe
from firefly.text import StreamDecoder

COMMANDS = {
    "/reset": "forget the conversation; the system message stays",
    "/system": "/system TEXT sets the system message, /system alone removes it",
    "/help": "show these commands",
    "/exit": "leave; so does Ctrl-D",
}
_LEAVE = "To leave, type /exit or press Ctrl-D."
_CONTEXT_KEYS = ("seq_length", "max_position_embeddings", "n_positions", "model_max_length")
_DEFAULT_CONTEXT = 2048
# A model can write terminal commands (ESC …); on a terminal only line feeds and tabs pass.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Answer:
    """One answer; `finish_reason` says why it ended: the model was done, max_new_tokens, or Ctrl-C.

    `elapsed_s` includes reading the prompt; `tokens_per_s` counts the answer's tokens over it.
    """

    text: str
    num_prompt_tokens: int
    num_tokens: int
    elapsed_s: float
    tokens_per_s: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class ChatResult:
    """Every answer of a session in order, and the tokens of all of them together."""

    answers: tuple[Answer, ...]
    num_prompt_tokens: int
    num_tokens: int
    tokens_per_s: float


def chat(
    model_dir: Path,
    options: GenerationSection,
    prompt: str | None = None,
    system: str | None = None,
    out: TextIO | None = None,
    device: str | None = None,
) -> ChatResult:
    """Talk to a model: answer `prompt` and return, or without one read messages from stdin until /exit or its end.

    Answers are written to `out` (stdout) while they are made. `model_dir` may be a run's output directory; its
    `model/` is meant then. Raises `ModelError` for a directory that cannot be used, `InputError` for a prompt
    that is longer than the model's context.
    """
    if prompt is not None and not prompt.strip():
        raise InputError("The prompt is empty; write what you want to ask.")
    if prompt is None and sys.stdin is None:
        raise InputError("There is no standard input to read messages from; give one, or a prompt.")
    directory = model_directory(model_dir)
    if prompt is None and sys.stdin.isatty():
        say(f"Opening {directory} …")
    conversation = Conversation(directory, options, device)
    conversation.system = _clean(system or "")
    show = _writer(out or sys.stdout)
    if prompt is not None:
        answers = [conversation.ask(_clean(prompt), show)]
        _remark(answers[0], terminal=False)
    else:
        answers = _converse(conversation, show)
    num_tokens = sum(answer.num_tokens for answer in answers)
    elapsed_s = sum(answer.elapsed_s for answer in answers)
    return ChatResult(
        answers=tuple(answers),
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in answers),
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / elapsed_s if elapsed_s else 0.0,
    )


def model_directory(path: Path) -> Path:
    """The model directory that a user means: `path` itself, or `path`/model when `path` is a run's output.

    Raises `ModelError` when there is no directory, no config.json, or no weights.
    """
    directory = locate(str(path))
    if not directory.is_dir():
        raise ModelError(f"The model directory {path} does not exist; check the path.")
    if not (directory / "config.json").is_file() and (directory / "model" / "config.json").is_file():
        directory = directory / "model"
    read_config(directory)
    weight_files(directory)
    return directory


def sampling_of(directory: Path) -> GenerationSection:
    """How the run that a model directory belongs to samples; outside of one, the defaults."""
    recipe = directory.absolute().parent / "recipe.toml"
    return Recipe.load(recipe).generation if recipe.is_file() else GenerationSection()


class Conversation:
    """A model and what was said so far; `ask` adds one turn and its answer."""

    def __init__(self, directory: Path, options: GenerationSection, device: str | None = None) -> None:
        self.tokenizer = ModelTokenizer.load(directory)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.chat_format = format_of(self.tokenizer)
        known = read_config(directory).get("model_type") in FAMILIES
        opened = (open_generator if known else open_hub_generator)(
            directory, device, self.chat_format.stop_ids
        )
        self.generator: Generator | HubGenerator = opened
        self.options = options
        self.context_tokens = context_tokens(directory)
        self.system = ""
        self.turns: list[Message] = []

    def ask(self, text: str, show: Callable[[str], None]) -> Answer:
        """Answer `text`, giving each piece to `show` as it comes; Ctrl-C ends the answer and keeps what is there.

        Raises `InputError`, the conversation unchanged, when the message alone fills the model's context.
        """
        prompt_ids = self._fit(Message("user", text))
        room = min(self.options.max_new_tokens, self.context_tokens - len(prompt_ids))
        options = self.options.model_copy(update={"max_new_tokens": room})
        decoder = StreamDecoder.of(self.tokenizer.rust)
        pieces: list[str] = []

        def on_token(token: int) -> None:
            pieces.append(decoder.push(token))
            show(pieces[-1])

        start_s = time.monotonic()
        with _stop_on_sigint() as stopped:
            with suppress(KeyboardInterrupt):
                self.generator.stream(prompt_ids, options, on_token, stopped)
            interrupted = stopped()
        elapsed_s = time.monotonic() - start_s
        num_tokens = len(pieces)
        finish_reason: FinishReason = (
            "interrupted" if interrupted else "length" if num_tokens >= room else "stop"
        )
        if finish_reason == "stop":  # a character that the limit or Ctrl-C cut in two is left out instead
            pieces.append(decoder.finish())
            show(pieces[-1])
        show("\n")
        answer = "".join(pieces)
        if answer:
            self.turns += [Message("user", text), Message("assistant", answer)]
        rate = num_tokens / max(elapsed_s, 1e-9)
        return Answer(answer, len(prompt_ids), num_tokens, elapsed_s, rate, finish_reason)

    def _fit(self, message: Message) -> list[int]:
        """The rendered conversation with `message` at its end, the oldest turns dropped until an answer fits in."""
        reserve = min(self.options.max_new_tokens, self.context_tokens // 2)
        dropped = 0
        while True:
            system = [Message("system", self.system)] if self.system else []
            ids = self.chat_format.render([*system, *self.turns[2 * dropped :], message]).ids
            if len(ids) + reserve <= self.context_tokens or 2 * dropped == len(self.turns):
                break
            dropped += 1
        if len(ids) >= self.context_tokens:
            raise InputError(
                f"The message has {len(ids):,} tokens with the system message, and the model reads "
                f"{self.context_tokens:,} in all; shorten it."
            )
        if dropped:
            del self.turns[: 2 * dropped]
            turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            limit = f"the model's {self.context_tokens:,} tokens"
            say(f"(the conversation is longer than {limit}: {turns} dropped)")
        return ids


def context_tokens(directory: Path) -> int:
    """Tokens that the model was made to read at most: prompt and answer together."""
    config = read_config(directory)
    lengths = (config.get(key) for key in _CONTEXT_KEYS)
    return next((length for length in lengths if isinstance(length, int) and length > 1), _DEFAULT_CONTEXT)


def _converse(conversation: Conversation, show: Callable[[str], None]) -> list[Answer]:
    """Read, obey or answer, until /exit or the end of stdin."""
    terminal = sys.stdin.isatty()
    ask_user = _prompt() if terminal else ""
    if terminal:
        say(f"{conversation.context_tokens:,} tokens of context · /help shows the commands")
    answers: list[Answer] = []
    while True:
        try:
            line = _read_line(ask_user)
            if line is None or line.strip() == "/exit":
                return answers
            if _is_command(line):
                _obey(line, conversation)
            elif line.strip():
                answers.append(conversation.ask(line, show))
                _remark(answers[-1], terminal)
        except FireflyError as error:
            say(f"({error})")
        except UnicodeDecodeError:
            say("(that line was not valid UTF-8; please type it again)")
        except KeyboardInterrupt:
            if not terminal:
                raise
            say(f"\n({_LEAVE})")


def _remark(answer: Answer, terminal: bool) -> None:
    """Say what the answer itself does not show."""
    if answer.finish_reason == "interrupted":
        say("(stopped)")
    elif not answer.text:
        say("(the model gave no answer)")
    if terminal:
        cut = ", cut at max_new_tokens" if answer.finish_reason == "length" else ""
        say(f"({answer.num_tokens:,} tokens, {answer.tokens_per_s:,.1f} tokens/s{cut})")


def _is_command(line: str) -> bool:
    """`/word` at the start of a line; a path such as /usr/bin is a message."""
    return re.match(r"/[a-z]+(\s|$)", line) is not None


def _obey(line: str, conversation: Conversation) -> None:
    command, _, rest = line.strip().partition(" ")
    if command == "/reset":
        conversation.turns.clear()
        say("(the conversation is forgotten)")
    elif command == "/system":
        conversation.system = rest.strip()
        say("(the system message is set)" if conversation.system else "(there is no system message now)")
    elif command == "/help":
        say("\n".join(f"{name:<8} {what}" for name, what in COMMANDS.items()))
        say("Ctrl-C stops an answer and keeps what it said.")
    else:
        say(f"(unknown command {command}; {choices(command, COMMANDS)}; a space in front makes it a message)")


def _prompt() -> str:
    """The prompt on a terminal, with colour where the terminal has it, and line editing switched on."""
    from rich.console import Console

    if sys.platform != "win32":
        import readline  # noqa: F401 - gives input() editing by whole characters, and a history

    # \1 and \2 tell readline that what lies between has no width
    return "› " if Console().color_system is None else "\1\x1b[1;36m\2› \1\x1b[0m\2"


def _read_line(ask_user: str) -> str | None:
    """One line of stdin without its end, None where stdin ends; a pipe's invalid bytes become �."""
    if ask_user:
        try:
            return _clean(input(ask_user))
        except EOFError:
            return None
    if isinstance(raw := getattr(sys.stdin, "buffer", sys.stdin).readline(), str):
        raw = raw.encode("utf-8", "surrogatepass")
    return raw.decode("utf-8-sig", "replace").rstrip("\r\n") if raw else None


def _clean(text: str) -> str:
    """Text without lone surrogates, which stand for invalid bytes and which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _writer(out: TextIO) -> Callable[[str], None]:
    """A function that shows a piece of an answer at once, whatever the stream can encode."""
    encoding, controls = out.encoding or "utf-8", _CONTROLS if out.isatty() else {}

    def show(piece: str) -> None:
        out.write(piece.translate(controls).encode(encoding, "replace").decode(encoding))
        out.flush()

    return show


@contextmanager
def _stop_on_sigint() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag, read by the yielded function; a second one does not wait for the token in work."""
    stopped = False

    def on_signal(*_: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
