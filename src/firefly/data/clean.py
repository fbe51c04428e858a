"""Cleaning: what is mended in an example, and why an example is dropped, one small function a rule.

    example ──strip_html, simplify, half_width──▶ mended ──empty_target, echo, …──▶ kept, or the reason's code

A reason is a short code (`empty_target`, `echo`, …) that is counted in the dataset's card and stands beside the
dropped text among the rejects: nothing disappears without a trace. Which rules apply, and how strictly, is the
recipe's `[data.clean]`. Rules look for what is certainly broken; taste is not theirs. They are quick, some 40 µs
for 200 characters, because each first asks a cheap question that sound text answers with no.
"""

from __future__ import annotations

import functools
import hashlib
import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from firefly.data.example import Example
from firefly.recipe import CleanSection

Rule = Callable[[Example, CleanSection], str | None]


def clean(example: Example, options: CleanSection) -> tuple[Example, str | None]:
    """The mended example, and the first reason to drop it, or None to keep it."""
    example = mended(example, options)
    return example, next((reason for rule in RULES if (reason := rule(example, options))), None)


def mended(example: Example, options: CleanSection) -> Example:
    """The example with everything mended that the options name."""
    for mend in MENDING:
        example = mend(example, options)
    return example


def normalised(text: str) -> str:
    """The text under NFKC with every run of white space as one space: what counts as the same text."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def digest(text: str) -> str:
    """SHA-256 of any string, lone surrogates included, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _mended(example: Example, mend: Callable[[str], str]) -> Example:
    """The example with `mend` applied to every message; the same object where nothing changed."""
    texts = [mend(message.content) for message in example.messages]
    rejected = None if example.rejected is None else mend(example.rejected)
    if rejected == example.rejected and all(
        text == message.content for text, message in zip(texts, example.messages, strict=True)
    ):
        return example
    pairs = zip(example.messages, texts, strict=True)
    messages = tuple(replace(message, content=text) for message, text in pairs)
    return replace(example, messages=messages, rejected=rejected)


# ---- HTML that a crawler left

# Tags that lay out text. A page's own (html, head, script, …) tell of an example about HTML.
_LINE_TAGS = "p br div tr table ul ol li dl dt dd hr h1 h2 h3 h4 h5 h6 blockquote section center".split()
_SPAN_TAGS = "span a b i u em strong font img tbody thead td th strike sub sup small big nobr wbr".split()
_TAG = re.compile(rf"</?({'|'.join(_LINE_TAGS + _SPAN_TAGS)})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_ENTITY = re.compile(
    r"&(?:amp;)?(?:nbsp|amp|lt|gt|quot|apos|[lr][ds]quo|[mn]dash|hellip|middot|#\d{1,6}|#x[\da-f]{1,5});",
    re.IGNORECASE,
)
_ABOUT_MARKUP = re.compile(
    r"html|xml|css|svg|markdown|jsx|<(?:head|body|script|style|button|form|input|title|meta|link)\b|标[签籤]|[网網]页"
    r"|网頁|转义|轉義|爬虫|\btags?\b|web ?(?:page|site)|escape",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"```|[;{]\s*\n|=>|\b(?:import|function|const|var|def|php|react|vue|angular)\b|代[码碼]", re.IGNORECASE
)


def strip_html(example: Example, options: CleanSection) -> Example:
    """Tags and entities go out of the text, unless the example is about markup; tags in code stay."""
    if options.html != "strip" or not _has_html(example):
        return example
    is_code = any(_CODE.search(message.content) for message in example.messages)
    return _mended(example, _unescaped if is_code else _without_tags)


def _unescaped(text: str) -> str:
    return _ENTITY.sub(lambda entity: html.unescape(html.unescape(entity[0])).replace("\xa0", " "), text)


def _without_tags(text: str) -> str:
    stripped = _TAG.sub(lambda tag: "\n" if tag[1].lower() in _LINE_TAGS else "", text)
    if stripped != text:
        stripped = re.sub(r"\n[ \t]*(?:\n[ \t]*){2,}", "\n\n", stripped).strip()
    return _unescaped(stripped)


def html_remains(example: Example, options: CleanSection) -> str | None:
    """With html = "drop": an example with tags or entities that is not about markup."""
    return "html" if options.html == "drop" and _has_html(example) else None


def _has_html(example: Example) -> bool:
    texts = [message.content for message in example.messages]
    texts += [example.rejected] if example.rejected else []
    if not any(
        ("<" in text and _TAG.search(text)) or ("&" in text and _ENTITY.search(text)) for text in texts
    ):
        return False
    return not any(_ABOUT_MARKUP.search(text) for text in texts)


# ---- script and width


def simplify(example: Example, options: CleanSection) -> Example:
    """Traditional characters become simplified ones, by OpenCC's phrases (乾隆 stays, 乾燥 becomes 干燥)."""
    if not options.simplify:
        return example
    return _mended(example, _converter().convert)


@functools.cache
def _converter() -> Any:
    from opencc import OpenCC

    return OpenCC("t2s")


_FULL_WIDTH = re.compile("[０-９Ａ-Ｚａ-ｚ]+")
_HALF = {code: code - 0xFEE0 for code in range(0xFF10, 0xFF5B) if chr(code).isalnum()}


def half_width(example: Example, options: CleanSection) -> Example:
    """Ｆｕｌｌ-width letters and digits become ASCII; punctuation stays as Chinese writes it."""
    if not options.half_width:
        return example
    return _mended(example, lambda text: _FULL_WIDTH.sub(lambda run: run[0].translate(_HALF), text))


# ---- reasons to drop


def empty_target(example: Example, _: CleanSection) -> str | None:
    """An answer without text teaches the model to say nothing."""
    answers = (message.content for message in example.messages if message.role == "assistant")
    return "empty_target" if any(not text or text.isspace() for text in answers) else None


def empty_input(example: Example, _: CleanSection) -> str | None:
    """A question without text; plain text for pre-training has no question and passes."""
    questions = (message.content for message in example.messages if message.role == "user")
    return "empty_input" if any(not text or text.isspace() for text in questions) else None


def no_preference(example: Example, _: CleanSection) -> str | None:
    """A rejected answer that is empty, or the same as the chosen one; otherwise it may be as bad as it likes."""
    if example.rejected is None:
        return None
    worse = normalised(example.rejected)
    return "no_preference" if not worse or worse == normalised(example.target) else None


_HAN = re.compile("[一-鿿]")


def echo(example: Example, _: CleanSection) -> str | None:
    """An answer that repeats its question."""
    if example.is_plain:
        return None
    question, answer = example.messages[-2].content, example.messages[-1].content
    first, second = _HAN.search(question), _HAN.search(answer)
    if first and second and first[0] != second[0]:  # normalising leaves these as they are
        return None
    return "echo" if normalised(question) == normalised(answer) else None


# C0 and C1 controls but tab and line ends; lone surrogates, which UTF-8 cannot hold; U+FFFD, left by bad decoding.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd-\uffff]")


def control_characters(example: Example, _: CleanSection) -> str | None:
    """Control characters and U+FFFD: the text was decoded wrongly somewhere."""
    broken = any(_CONTROL.search(message.content) for message in example.messages)
    return "control_characters" if broken else None


def too_short(example: Example, options: CleanSection) -> str | None:
    """A last answer with fewer characters than `min_target_characters`."""
    return "too_short" if len(example.target.strip()) < options.min_target_characters else None


def too_long(example: Example, options: CleanSection) -> str | None:
    """An example with more characters than `max_characters`."""
    return (
        "too_long"
        if sum(len(message.content) for message in example.messages) > options.max_characters
        else None
    )


# What wrong decoding leaves, and people do not write: UTF-8 read as Latin-1 or Windows-1252 (â€œ, Ã©, ä½ å¥½),
# GBK read as Latin-1 (ÄãºÃ), U+FFFD that went through GBK (锟斤拷) or Big5 (嚙踝蕭), a debugger's filling (烫烫烫烫).
_CP1252 = "\xa0-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(
    "锟斤拷|嚙踝蕭|(?:烫{4}|屯{4})|â€[™œ“”˜¦¢\x9d]|ï¼[\x80-\x9f\xa1-\xbfŒ]"
    f"|Ã[\xa1-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ•˜™š›œžŸ]|(?:[äåæçèé][{_CP1252}]{{2}}){{2}}"
    "|(?=(?:[\xa1-\xff]*?[À-ÖØ-öø-ÿ]){4})(?:[\xa1-\xf7][\xa1-\xfe]){4}"
)


def mojibake(example: Example, options: CleanSection) -> str | None:
    """Text that was decoded with a wrong table."""
    if options.mojibake == "keep":
        return None
    broken = any(_is_mojibake(message.content) for message in example.messages)
    return "mojibake" if broken else None


def _is_mojibake(text: str) -> bool:
    if text.isascii():
        return False
    if _MOJIBAKE.search(text):
        return True
    if len(_LEADS.findall(text)) < 3:
        return False
    data = text.encode("gbk", "ignore")
    read = _CHINESE.findall(data.decode("utf-8", "ignore"))  # three bytes each
    return 3 * len(read) > 0.6 * sum(byte >= 0x80 for byte in data)


def _utf8_leads_as_gbk() -> str:
    """What the first two bytes of a Chinese character in UTF-8 become when they are read as GBK: rare characters."""
    pairs = [bytes((first, second)) for first in range(0xE4, 0xEA) for second in range(0x80, 0xC0)]
    return "".join(pair.decode("gbk", "ignore") for pair in [*pairs, b"\xef\xbc", b"\xe3\x80"])


# UTF-8 read as GBK (浣犲ソ for 你好) is all Han. It has many rare characters, and its bytes are Chinese once more when
# read as UTF-8, which those of a Chinese text never are by chance.
_LEADS = re.compile(f"[{_utf8_leads_as_gbk()}]")
_CHINESE = re.compile("[一-鿿\u3000-\u303f\uff00-\uffef]")


_GRAM_BYTES = 30  # 10 Han or 30 ASCII characters: longer than a song's refrain or the head of a list item
_STRETCH = 2000  # characters: any long text repeats itself in the end, so each stretch is judged alone


def repetition(example: Example, options: CleanSection) -> str | None:
    """An answer that goes round in circles: too many of its n-grams of 30 bytes stand in it a second time."""
    answers = (message.content for message in example.messages if message.role == "assistant")
    return "repetition" if any(_repeats(text, options.max_repetition) for text in answers) else None


def _repeats(text: str, max_share: float) -> bool:
    if "  " in text:
        text = " ".join(text.split())  # the indentation of code and tables is no repetition
    num_characters = len(text)
    size = num_characters * _GRAM_BYTES // max(1, len(text.encode("utf-8", "surrogatepass")))
    if num_characters < 2 * size or num_characters < 4:
        return False  # too short to call it that
    num_distinct = num_grams = 0
    for start in range(0, num_characters, _STRETCH):
        stretch = text[start : start + _STRETCH + size - 1]
        in_stretch = len(stretch) - size + 1
        if in_stretch <= 0:
            break
        num_grams += in_stretch
        # Each different character but those of the last gram begins a different gram: mostly this settles it.
        fewest = len(set(stretch)) - size + 1
        if fewest < (1 - max_share) * in_stretch:
            fewest = len({stretch[at : at + size] for at in range(in_stretch)})
        num_distinct += fewest
    return num_distinct < (1 - max_share) * num_grams


_LETTERS = {"zh": re.compile("[〇㐀-䶿一-鿿豈-龎\U00020000-\U000323af]+"), "en": re.compile("[A-Za-z]+")}


def wrong_language(example: Example, options: CleanSection) -> str | None:
    """Too few of the letters are Han characters (zh) or ASCII letters (en)."""
    if not options.min_language_share:
        return None
    text = "".join(message.content for message in example.messages)
    letters = sum(map(str.isalpha, text))
    wanted = sum(len(run) for name in options.languages for run in _LETTERS[name].findall(text))
    return "wrong_language" if wanted < options.min_language_share * letters else None


MENDING = (strip_html, simplify, half_width)
RULES: tuple[Rule, ...] = (
    empty_target,
    empty_input,
    no_preference,
    too_short,
    too_long,
    control_characters,
    mojibake,
    html_remains,
    echo,
    repetition,
    wrong_language,
)
