"""The terminal chat: commands, Ctrl-C, history that fits, and pipes; the answers come from a script or a tiny model."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from firefly import console
from firefly.app import chat as module
from firefly.app.chat import ChatResult, chat, context_tokens, model_directory
from firefly.cli import main
from firefly.data.chatformat import render
from firefly.data.example import Message
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import InputError, ModelError
from firefly.recipe import GenerationSection, Recipe

OPTIONS = GenerationSection(max_new_tokens=40)
CONTEXT = 400


def make_model_files(directory: Path, **config: Any) -> Path:
    """A model directory with a byte-level tokenizer that splits most characters, and weights nobody opens."""
    directory.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["流萤会发光。你好！再来一次 hello 😀"] * 3, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    settings = {"model_type": "bloom", "seq_length": CONTEXT} | config
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "model.safetensors").write_bytes(b"")
    return directory


class Script:
    """A generator that gives prepared answers; `press_at` sends Ctrl-C while that token of an answer is made."""

    def __init__(self, tokenizer: ModelTokenizer, answers: Sequence[str]) -> None:
        self.tokenizer, self.answers = tokenizer, list(answers)
        self.prompts: list[list[int]] = []
        self.options: list[GenerationSection] = []
        self.press_at: dict[int, int] = {}

    def stream(
        self,
        prompt: Sequence[int],
        options: GenerationSection,
        on_token: Callable[[int], object],
        should_stop: Callable[[], bool],
    ) -> list[int]:
        turn = len(self.prompts)
        self.prompts.append(list(prompt))
        self.options.append(options)
        given = []
        for number, token in enumerate(self.tokenizer.encode(self.answers[turn])[: options.max_new_tokens]):
            if self.press_at.get(turn) == number:
                os.kill(os.getpid(), signal.SIGINT)
            given.append(token)
            on_token(token)
            if should_stop():
                break
        return given


@pytest.fixture(autouse=True)
def _words_are_heard(_quiet: None) -> None:
    console.quiet(False)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_files(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture
def tokenizer(model_dir: Path) -> ModelTokenizer:
    return ModelTokenizer.load(model_dir)


@pytest.fixture
def script(tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    made = Script(tokenizer, ["流萤会发光。", "好的😀", "第三", "第四"])
    monkeypatch.setattr(module, "open_generator", lambda *_: made)
    before = signal.getsignal(signal.SIGINT)
    yield made
    assert signal.getsignal(signal.SIGINT) is before  # given back after every answer


@pytest.fixture
def talk(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ChatResult, str]]:
    """Run a piped session: what is typed in, what stdout showed."""

    def run(typed: str | bytes, **arguments: Any) -> tuple[ChatResult, str]:
        data = typed.encode() if isinstance(typed, str) else typed
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        out = io.StringIO()
        return chat(model_dir, OPTIONS, out=out, **arguments), out.getvalue()

    return run


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def test_single_shot_prints_the_answer_and_returns_it(
    model_dir: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    result = chat(model_dir, OPTIONS, prompt="你好", system="只用中文。", out=out)
    assert out.getvalue() == "流萤会发光。\n"
    (answer,) = result.answers
    assert capsys.readouterr() == ("", "")
    assert (answer.text, answer.finish_reason) == ("流萤会发光。", "stop")
    turns = [Message("system", "只用中文。"), user("你好")]
    assert script.prompts == [render(turns, script.tokenizer).ids]
    assert result.num_prompt_tokens == len(script.prompts[0])
    assert result.num_tokens == answer.num_tokens == len(script.tokenizer.encode("流萤会发光。"))
    assert result.tokens_per_s > 0


@pytest.mark.usefixtures("script")
def test_pieces_are_shown_as_they_come_and_never_torn(model_dir: Path) -> None:
    shown: list[str] = []

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            shown.append(text)
            return len(text)

    chat(model_dir, OPTIONS, prompt="你好", out=Out())
    assert "".join(shown) == "流萤会发光。\n"
    assert len([piece for piece in shown if piece]) > 3
    assert "\ufffd" not in "".join(shown)


def test_history_is_rendered_and_end_of_input_leaves(talk: Any, script: Script) -> None:
    result, shown = talk("你好\r\n\n再来")  # CRLF, an empty line, no line end at the end
    assert shown == "流萤会发光。\n好的😀\n"
    assert len(result.answers) == 2
    turns = [user("你好"), assistant("流萤会发光。"), user("再来")]
    assert script.prompts[1] == render(turns, script.tokenizer).ids


@pytest.mark.usefixtures("script")
def test_exit_leaves_at_once(talk: Any) -> None:
    result, shown = talk("你好\n/exit\n再来\n")
    assert (len(result.answers), shown) == (1, "流萤会发光。\n")


def test_reset_forgets_the_turns_and_keeps_the_system(talk: Any, script: Script) -> None:
    talk("/system 说中文\n你好\n/reset\n再来\n/system\n又来\n")
    system = Message("system", "说中文")
    assert script.prompts[0] == render([system, user("你好")], script.tokenizer).ids
    assert script.prompts[1] == render([system, user("再来")], script.tokenizer).ids
    without = [user("再来"), assistant("好的😀"), user("又来")]
    assert script.prompts[2] == render(without, script.tokenizer).ids


def test_help_and_unknown_commands(talk: Any, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    talk("/help\n/rest\n/usr/bin 是什么\n")
    said = capsys.readouterr().err
    assert all(command in said for command in module.COMMANDS)
    assert "unknown command /rest; did you mean '/reset'?" in said
    assert script.prompts == [render([user("/usr/bin 是什么")], script.tokenizer).ids]  # a path is a message


def test_ctrl_c_stops_the_answer_and_keeps_the_session(
    talk: Any, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.answers[0] = "流萤龘龘"
    script.press_at[0] = len(script.tokenizer.encode("流萤"))  # while the first byte of 龘 is made
    result, shown = talk("你好\n再来\n")
    assert [answer.finish_reason for answer in result.answers] == ["interrupted", "stop"]
    assert result.answers[0].text == "流萤"  # half a character does not show
    assert shown == "流萤\n好的😀\n"
    assert "(stopped)" in capsys.readouterr().err
    assert script.prompts[1] == render([user("你好"), assistant("流萤"), user("再来")], script.tokenizer).ids


def test_a_second_ctrl_c_does_not_wait_for_the_token(
    talk: Any, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(*_: Any) -> list[int]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second Ctrl-C should have ended this")

    monkeypatch.setattr(script, "stream", stuck)
    result, shown = talk("你好\n")
    assert (result.answers[0].finish_reason, result.answers[0].text, shown) == ("interrupted", "", "\n")


def test_an_answer_cut_by_the_limit_shows_no_half_character(model_dir: Path, script: Script) -> None:
    whole = script.tokenizer.encode("流萤😀")
    limit = len(whole) - 1
    out = io.StringIO()
    script.answers = ["流萤😀"]
    result = chat(model_dir, GenerationSection(max_new_tokens=limit), prompt="你好", out=out)
    assert (out.getvalue(), result.answers[0].finish_reason) == ("流萤\n", "length")


def test_oldest_turns_are_dropped_with_a_word(
    talk: Any, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = "a" * 150, "b" * 150, "c" * 150
    talk(f"/system s\n{first}\n{second}\n{third}\n")
    said = capsys.readouterr().err
    assert f"longer than the model's {CONTEXT} tokens: the oldest turn was dropped" in said
    turns = [Message("system", "s"), user(second), assistant("好的😀"), user(third)]
    assert script.prompts[2] == render(turns, script.tokenizer).ids
    assert all(len(prompt) + OPTIONS.max_new_tokens <= CONTEXT for prompt in script.prompts)


def test_a_message_that_fills_the_context(
    talk: Any, model_dir: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "长" * CONTEXT
    result, _ = talk(f"你好\n{long}\n再来\n")
    assert "shorten it" in capsys.readouterr().err
    assert len(result.answers) == 2
    turns = [user("你好"), assistant("流萤会发光。"), user("再来")]
    assert script.prompts[1] == render(turns, script.tokenizer).ids  # as if the long one had not been typed
    with pytest.raises(InputError, match="shorten it"):
        chat(model_dir, OPTIONS, prompt=long)


def test_the_answer_gets_the_room_that_is_left(model_dir: Path, script: Script) -> None:
    text = "x" * (CONTEXT - 8)
    chat(model_dir, OPTIONS, prompt=text, out=io.StringIO())
    assert script.options[0].max_new_tokens == CONTEXT - len(script.prompts[0]) < OPTIONS.max_new_tokens


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize("typed", [b"\xff\xfe\xe4\n", b"\xef\xbb\xbf\xed\xa0\x80\n", b"\x00\x1b[2J\n"])
def test_invalid_bytes_do_no_harm(talk: Any, typed: bytes) -> None:
    result, _ = talk(typed)
    assert len(result.answers) == 1


@pytest.mark.usefixtures("script")
def test_surrogates_and_poor_encodings_do_no_harm(model_dir: Path) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    chat(model_dir, OPTIONS, prompt="a\udcff", system="\ud800", out=out)
    assert raw.getvalue() == b"??????\n"


def test_an_output_directory_means_its_model(tmp_path: Path) -> None:
    inner = make_model_files(tmp_path / "run" / "model")
    assert model_directory(tmp_path / "run") == inner
    assert model_directory(inner) == inner


def test_a_run_samples_as_its_recipe_says_and_options_change_some_of_it(
    tmp_path: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, model = make_model_files(tmp_path / "alone"), make_model_files(tmp_path / "run" / "model")
    recipe = {"name": "r", "output_dir": "out", "model": {"base": "b"}, "data": {"sources": [{"path": "x"}]}}
    said = {"temperature": 0.7, "penalize_prompt": False, "max_new_tokens": 60}
    written = Recipe.model_validate(recipe | {"generation": said})
    (tmp_path / "run" / "recipe.toml").write_text(written.to_toml(), encoding="utf-8")

    def options(*arguments: str) -> GenerationSection:
        with pytest.raises(SystemExit, match="0"):
            main(["chat", *arguments, "--prompt", "你好"])
        assert capsys.readouterr().out
        return script.options[-1]

    assert options(str(alone)) == GenerationSection()
    assert options(str(tmp_path / "run")) == GenerationSection(**said)
    changed = said | {"temperature": 0.9, "penalize_prompt": True}
    assert options(str(model), "--temperature", "0.9", "--penalize-prompt") == GenerationSection(**changed)
    assert not options(str(model), "--temperature", "0").do_sample


def test_bad_directories_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        chat(tmp_path / "nothing", OPTIONS, prompt="你好")
    with pytest.raises(ModelError, match=r"no config\.json"):
        chat(tmp_path, OPTIONS, prompt="你好")
    bare = make_model_files(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        chat(bare, OPTIONS, prompt="你好")


@pytest.mark.parametrize(
    ("config", "tokens"),
    [({"seq_length": 512}, 512), ({"seq_length": None, "max_position_embeddings": 64}, 64), ({}, CONTEXT)],
)
def test_context_length(tmp_path: Path, config: dict[str, Any], tokens: int) -> None:
    assert context_tokens(make_model_files(tmp_path / "model", **config)) == tokens


def test_context_length_has_a_default(tmp_path: Path) -> None:
    assert context_tokens(make_model_files(tmp_path / "model", seq_length=None)) == 2048


def test_a_real_tiny_bloom_streams_and_stops(tmp_path: Path) -> None:
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    directory = make_model_files(tmp_path / "bloom")
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=280,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=1,
        seq_length=CONTEXT,
    )
    model = BloomForCausalLM(config)
    model.transformer.word_embeddings.weight.data[1] = 0  # the tied head then never prefers </s>
    model.save_pretrained(directory)
    greedy = GenerationSection(max_new_tokens=30, do_sample=False, repetition_penalty=1.0)
    out = io.StringIO()
    whole = chat(directory, greedy, prompt="你好", out=out, device="cpu").answers[0]
    assert out.getvalue() == whole.text + "\n"
    assert whole.num_tokens == 30

    class PressesCtrlC(io.StringIO):
        num_writes = 0

        def write(self, text: str) -> int:
            self.num_writes += 1
            if self.num_writes == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    part = chat(directory, greedy, prompt="你好", out=PressesCtrlC(), device="cpu").answers[0]
    assert (part.num_tokens, part.finish_reason) == (5, "interrupted")
    assert whole.text.startswith(part.text)


TERMINAL = """
import signal, sys, time
from pathlib import Path
from firefly.app import chat as module
from firefly.recipe import GenerationSection

class Slow:  # writes for a minute unless it is stopped
    def stream(self, prompt, options, on_token, should_stop):
        for _ in range(6000):
            on_token(tokenizer.encode("A")[0])
            if should_stop():
                break
            time.sleep(0.01)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
tokenizer = module.ModelTokenizer.load(Path(sys.argv[1]))
module.open_generator = lambda *_: Slow()
result = module.chat(Path(sys.argv[1]), GenerationSection(max_new_tokens=300))
print("REASONS", [answer.finish_reason for answer in result.answers], flush=True)
"""


def test_ctrl_c_on_a_terminal(model_dir: Path) -> None:
    """At the prompt it says how to leave, in an answer it stops the answer; the session lives through both."""
    pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
    screen, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, str(model_dir)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""

    def wait_for(text: str, press: bytes = b"") -> None:
        nonlocal shown
        limit_s = time.monotonic() + 60
        while text.encode() not in shown:
            assert time.monotonic() < limit_s, f"no {text!r} in {shown.decode(errors='replace')!r}"
            if select.select([screen], [], [], 1)[0]:
                shown += os.read(screen, 4096)
            elif press:  # readline misses a Ctrl-C that comes just before it begins to wait
                os.write(screen, press)
        shown = shown.split(text.encode(), 1)[1]

    try:
        wait_for("› ")
        wait_for("type /exit or press Ctrl-D", press=b"\x03")
        wait_for("› ")
        os.write(screen, "你好\n".encode())
        wait_for("AAA")
        os.write(screen, b"\x03")
        wait_for("(stopped)")
        wait_for("› ")
        os.write(screen, b"\x04")
        wait_for("REASONS ['interrupted']")
        assert child.wait(timeout=20) == 0
    finally:
        child.kill()
        child.wait()
        os.close(screen)
