"""Importers for literature: verse, songs, prose, fiction and dictionaries, as their corpora write them.

    poems            {"title", "authorName", "dynasty", "content": [lines]}: 绝句 and 律诗
    odes             older verse, of any shape: 诗经, 楚辞, 曹操
    couplets         the same poems as `poems`: the middle couplets of 律诗, which are antithetical by rule
    couplet_lines    {"first", "second"}: collected couplets
    lyrics           宋词 {"rhythmic", "author", "paragraphs"} and 元曲 {"title", "author", "paragraphs"}
    classical        {"classical", "modern", "book"}: a sentence and its translation
    idioms, xiehouyu, chinese_english    dictionaries (the last is CC-CEDICT)
    fiction, essays, classical_prose    whole works; long ones become passages that follow each other
    themed_stories   {"names", "genre", "theme", "story"}
    product          {"content": "类型#裙*颜色#红", "summary"}

They give a task's fields as tidy text and refuse what is damaged, with a reason. Records of one poem, chapter or
work share a group, so that no held-out couplet was read in a training poem, and no chapter is on both sides.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from firefly.data.clean import digest, normalised
from firefly.data.importers import Imported, Origin, Record, Skipped, field_text, importer
from firefly.errors import InputError

_HAN = re.compile("[〇㐀-䶿一-鿿\U00020000-\U000323af]+")
_MARKS = "，。！？；：、"
_NOTE = re.compile(r"[（(〔［\[【][^（）()〔〕［］\[\]【】]*[）)〕］\]】]")
_LONG_NOTE = re.compile(r"（[^（）]{3,}）")  # a short one names the character behind a pun
_NUMERAL = "一二三四五六七八九十百廿"


def _group(*parts: str) -> str:
    return digest("\0".join(map(normalised, parts)))


def _present(**fields: str) -> dict[str, str]:
    """The fields that have a text."""
    return {name: text for name, text in fields.items() if text}


def _closes_quotations(text: str) -> bool:
    return text.count("“") == text.count("”") and text.count("‘") == text.count("’")


def _required(record: dict[str, Any], names: tuple[str, ...], origin: Origin) -> list[str]:
    """Texts of fields that must be there; raises `InputError` naming the first that is not."""
    for name in names:
        if not isinstance(record.get(name), str):
            raise InputError(
                f"{origin}: field '{name}' is missing or not text; "
                f"the fields there are: {', '.join(sorted(record)) or 'none'}."
            )
    return [field_text(record, name, origin) for name in names]


def _lines(record: dict[str, Any], names: tuple[str, ...], origin: Origin) -> list[str]:
    """The list of texts in the first of these fields that is there, without the blank ones."""
    lines = next((record[name] for name in names if name in record), None)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise InputError(
            f"{origin}: field '{names[0]}' must be a list of the text's lines; "
            f"the fields there are: {', '.join(sorted(record)) or 'none'}."
        )
    return [line.strip() for line in lines if line.strip()]


# Verse

FORMS = {(4, 5): "五言绝句", (4, 7): "七言绝句", (8, 5): "五言律诗", (8, 7): "七言律诗"}
_VERSE_LINE = re.compile(f"([^{_MARKS}]+)([{_MARKS}]+)")
_CLOSING_NOTES = re.compile(rf"({_NOTE.pattern}\s*)+$")
_SERIES = re.compile(f"(?<=.)[·\\s]*([{_NUMERAL}]+首)?[·\\s]*([其之][{_NUMERAL}]+)?$")
_BAD_TITLE = re.compile("[□囗■○?？（）()〔〕【】\\[\\]]")
_NOBODY = ("佚名", "无名氏", "不详", "未知", "不题撰人")
_LONGEST_VERSE = 400  # characters


@dataclass(frozen=True, slots=True)
class Verse:
    """A poem of four or eight lines, each of five or seven characters, without and with its punctuation."""

    title: str
    form: str
    lines: tuple[str, ...]
    text: str

    @property
    def group(self) -> str:
        """A hash of the poem's characters alone."""
        return digest("".join(self.lines))


def read_verse(title: str, content: list[str]) -> Verse | str:
    """A poem's form and lines, or the code of the reason why it cannot be used.

    The title loses a closing note in brackets and its number in a series (咏怀八十二首（其七十九） becomes 咏怀).
    """
    title = _plain_title(title)
    if not title or _BAD_TITLE.search(title):
        return "bad_title"
    pieces = ["".join(piece.split()) for piece in content if piece.strip()]
    closed = [
        piece if piece[-1] in _MARKS else piece + "，。"[index % 2] for index, piece in enumerate(pieces)
    ]
    pairs = _VERSE_LINE.findall("".join(closed))
    lines = tuple(line for line, _ in pairs)
    if not all(_HAN.fullmatch(line) for line in lines):
        return "not_only_han"  # a lacuna □, a note in brackets, a character outside Unicode
    lengths = {len(line) for line in lines}
    form = FORMS.get((len(lines), lengths.pop())) if len(lengths) == 1 else None
    if form is None:
        return "other_form"
    halves = [line + marks for line, marks in pairs]
    text = "\n".join(first + second for first, second in zip(halves[::2], halves[1::2], strict=True))
    return Verse(title, form, lines, text)


def _plain_title(title: str) -> str:
    return _SERIES.sub("", _CLOSING_NOTES.sub("", title).strip()).strip()


def _verse(record: dict[str, Any], origin: Origin) -> Verse | Skipped:
    """The poem of a raw record."""
    content = _lines(record, ("content",), origin)
    verse = read_verse(field_text(record, "title", origin), content)
    return Skipped(verse, origin.source, "".join(content)) if isinstance(verse, str) else verse


@importer("poems", needs_task=True)
def import_poems(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """绝句 and 律诗: fields title, author, dynasty, form, first_line, heads, poem (two lines to a row).

    `heads` are the first characters of the lines, so that every poem is a 藏头诗 to somebody who asks for them.
    """
    verse = _verse(record, origin)
    if isinstance(verse, Skipped):
        yield verse
        return
    fields = {
        "title": verse.title,
        "author": field_text(record, "authorName", origin),
        "dynasty": field_text(record, "dynasty", origin),
        "form": verse.form,
        "first_line": verse.lines[0],
        "heads": "".join(line[0] for line in verse.lines),
        "poem": verse.text,
    }
    yield Record(fields, verse.group, origin.source)


@importer("odes", needs_task=True)
def import_odes(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Verse of any shape out of a collection: fields collection, title, author, first_line, poem."""
    stanzas = [_NOTE.sub("", line).strip() for line in _lines(record, ("content", "paragraphs"), origin)]
    text = "\n".join(stanzas)
    title = _plain_title(field_text(record, "title", origin))
    reason = _not_verse(text) or ("bad_title" if not title or _BAD_TITLE.search(title) else None)
    if reason:
        yield Skipped(reason, origin.source, text)
        return
    collection = field_text(record, "collection", origin)
    author = field_text(record, "author", origin)
    fields = _present(
        title=title, collection=collection, author=author, first_line=_first_line(text), poem=text
    )
    yield Record(fields, digest("".join(_HAN.findall(text))), origin.source)


def _not_verse(text: str) -> str | None:
    """Why a text of any shape cannot be used as verse."""
    if not _HAN.search(text):
        return "empty"
    if not all(_HAN.fullmatch(part) for part in re.split(f"[{_MARKS}《》“”‘’\\s]+", text) if part):
        return "not_only_han"
    if not _closes_quotations(text):
        return "broken_quotation"
    return "too_long" if len(text) > _LONGEST_VERSE else None


def _first_line(text: str) -> str:
    """The characters before the first mark that ends a line."""
    return re.split("[，。！？；：\n]", text.lstrip("“‘《"), maxsplit=1)[0]


# Couplets


@importer("couplets", needs_task=True)
def import_couplets(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """The 颔联 and 颈联 of 律诗, which must be antithetical: fields first, second, form (without punctuation)."""
    verse = _verse(record, origin)
    if isinstance(verse, Skipped):
        yield verse
    elif len(verse.lines) != 8:
        yield Skipped("no_middle_couplets", origin.source, verse.text)
    else:
        for first, second in (verse.lines[2:4], verse.lines[4:6]):
            if _faces_itself(first, second):
                # No antithesis, so the poem is 古体 in the shape of 律诗.
                yield Skipped("not_antithetical", origin.source, f"{first}，{second}")
            else:
                yield Record(
                    {"first": first, "second": second, "form": verse.form}, verse.group, origin.source
                )


@importer("couplet_lines", needs_task=True)
def import_couplet_lines(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Two lines that answer each other, clause by clause: fields first, second."""
    first, second = (
        unicodedata.normalize("NFKC", "".join(text.split())).translate(_WIDE).rstrip("。，；！？")
        for text in _required(record, ("first", "second"), origin)
    )
    clauses = [re.split(f"[{_MARKS}]", line) for line in (first, second)]
    if not all(_HAN.fullmatch(clause) for line in clauses for clause in line):
        reason = "not_only_han"
    elif [len(clause) for clause in clauses[0]] != [len(clause) for clause in clauses[1]]:
        reason = "unequal_lines"
    elif not 3 <= len(first) <= 60:
        reason = "too_short" if len(first) < 3 else "too_long"
    elif _faces_itself("".join(clauses[0]), "".join(clauses[1])):
        reason = "not_antithetical"
    else:
        yield Record({"first": first, "second": second}, _group(first, second), origin.source)
        return
    yield Skipped(reason, origin.source, f"{first} / {second}")


def _faces_itself(first: str, second: str) -> bool:
    return any(upper == lower for upper, lower in zip(first, second, strict=True))


# Songs to named tunes

_MODES = "正宫 中吕 双调 越调 仙吕 南吕 黄钟 商调 大石调 小石调 般涉调 商角调 高平调".split()
# Tunes that stand before a song's own title without a mark between them: 天净沙 + 孤山雪夜.
_TUNES = (
    "上小楼 四块玉 塞鸿秋 天净沙 寨儿令 小桃红 山坡羊 庆东原 庆宣和 得胜乐 折桂令 拨不断 新水令 普天乐 朝天子 朝天曲 "
    "柳营曲 梧叶儿 楚天遥 水仙子 沉醉东风 清江引 湘妃怨 满庭芳 潘妃曲 红绣鞋 落梅风 蟾宫曲 醉中天 醉太平 醉扶归 "
    "金字经 阳春曲 雁儿落 青哥儿 风入松 骂玉郎 鹦鹉曲 黑漆弩 小梁州 凭阑人 喜春来 卖花声 殿前欢 一枝花 一半儿 "
    "叨叨令 太常引 干荷叶 快活年 鹧鸪天 寿阳曲 斗鹌鹑 端正好 粉蝶儿 点绛唇 集贤宾 迎仙客 十二月 尧民歌 碧玉箫 "
    "大德歌 节节高 人月圆 后庭花 游四门 贺圣朝 玉交枝 春闺怨 步步娇 夜行船 乔牌儿 沽美酒 太平令 胜葫芦 那吒令 "
    "鹊踏枝 寄生草 六幺序 石榴花 斗虾蟆 耍孩儿 赏花时 脱布衫 滚绣球 倘秀才 绿幺遍 醉高歌 河西六娘子"
).split()
# Names for "the same tune again" and "the end": they say nothing about the song.
_NO_TUNE = re.compile(f"前腔.*|同前.*|.*尾声?|幺篇?|幺|么篇?|[{_NUMERAL}]+煞?|换头|煞|隔尾|余文")


@importer("lyrics", needs_task=True)
def import_lyrics(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """宋词 and 元曲: fields genre, tune, title, work, author, first_line, lyric (a sentence to a row).

    `tune` is the 词牌 or 曲牌, `title` the song's own title, `work` the play that it belongs to.
    """
    heading = field_text(record, "title", origin)
    beginning = heading.partition("・")[2] if re.search(f"[{_MARKS}]", heading) else ""  # of 尾声・赏心乐事……
    text = beginning + "\n".join("".join(line.split()) for line in _lines(record, ("paragraphs",), origin))
    text = re.sub("([？！])。", r"\1", text)
    if reason := _not_verse(text):
        # Of 元曲, mostly stage directions and speech between the sung lines.
        yield Skipped("stage_directions" if re.search(r"[（(［\[]", text) else reason, origin.source, text)
        return
    author, _, work = field_text(record, "author", origin).partition("《")
    if "rhythmic" in record:  # "醉落魄・一斛珠": the tune's other name comes second
        tune, title, genre = field_text(record, "rhythmic", origin).partition("・")[0], "", "宋词"
    else:
        tune, title, play = _tune_and_title(heading)
        work, genre = play or work.rstrip("》"), "元曲"
    fields = _present(
        genre=genre,
        tune="" if _NO_TUNE.fullmatch(tune) else tune,
        title=_plain_title(title),
        work=work,
        author="" if author in _NOBODY else author,
        first_line=_first_line(text),
        lyric=text,
    )
    yield Record(fields, digest("".join(_HAN.findall(text))), origin.source)


def _tune_and_title(heading: str) -> tuple[str, str, str]:
    """Tune, title and play in the heading of a 元曲, each "" where it is not to be told.

    越调・天净沙孤山雪夜 is mode, tune and title; 感天动地窦娥冤・仙吕/点绛唇 is play, mode and tune; 尾声・赏心乐事……
    is a tune and the song's beginning.
    """
    head, _, tail = _NOTE.sub("", heading).partition("・")
    tail = tail.rpartition("/")[2]
    if head in _MODES:
        known = max((tune for tune in _TUNES if tail.startswith(tune)), key=len, default="")
        return (known, tail.removeprefix(known), "") if known else ("", tail, "")
    if re.search(f"[{_MARKS}]", tail) or not tail:
        return (head if len(head) <= 5 else ""), "", ""
    return (tail, "", head) if len(head) >= 5 else ("", "", "")


# Translation from the classical language


@importer("classical", needs_task=True)
def import_classical(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """A classical sentence and its modern translation: fields classical, modern, book."""
    classical, modern = map(tidy, _required(record, ("classical", "modern"), origin))
    characters = set("".join(_HAN.findall(classical)))
    shared = len(characters.intersection(modern)) / max(1, len(characters))
    if _DAMAGED.search(classical + modern) or re.search("[0-9A-Za-z]", classical + modern):
        reason = "damaged"
    elif " " in record["classical"].strip() or " " in record["modern"].strip():
        reason = "lost_quotation_marks"  # the source has a space where a mark was
    elif classical == modern:
        reason = "not_translated"
    elif shared < 0.13:
        reason = "misaligned"  # a translation keeps names and half of the characters as parts of words
    else:
        fields = _present(classical=classical, modern=modern, book=field_text(record, "book", origin))
        yield Record(fields, _group(classical), origin.source)
        return
    yield Skipped(reason, origin.source, f"{classical} / {modern}")


# Dictionaries

_MEANING = re.compile("(?<=。)(比喻|形容|指|泛指|原指|后指|多指|现指|旧指|旧时|表示|意思|用来|谓|喻)")
_SOURCE_OF_WORD = re.compile(f"^[^《，。”]{{0,14}}《[^》]+》(第[{_NUMERAL}〇零]+[回章折出卷则])?")


@importer("idioms", needs_task=True)
def import_idioms(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """An idiom: fields word, explanation, pinyin, origin (the book it comes from), sentence (that uses it)."""
    word, raw = _required(record, ("word", "explanation"), origin)
    explanation = _closed(raw.replace("◇", "。后"))
    glosses_word = explanation[:1] in word and "。" in explanation[:-1]
    if glosses_word and (meaning := _MEANING.search(explanation)):
        # "噬脐用嘴咬肚脐。比喻后悔莫及。" has lost the colons of its glosses; the meaning stands after them.
        explanation = explanation[meaning.start() :]
    elif glosses_word:
        yield Skipped("run_together", origin.source, f"{word}：{raw}")
        return
    if not word or len(explanation) < 4 or _DAMAGED.search(word + explanation):
        yield Skipped("damaged", origin.source, f"{word}：{raw}")
        return
    book = _SOURCE_OF_WORD.match(field_text(record, "derivation", origin))
    fields = _present(
        word=word,
        explanation=explanation,
        pinyin=field_text(record, "pinyin", origin),
        origin=book[0] if book else "",
        sentence=_sentence_with(word, field_text(record, "example", origin)),
    )
    yield Record(fields, _group(word), origin.source)


def _closed(text: str) -> str:
    """Without quotation marks when one of a pair has been lost."""
    return text if text.count("“") == text.count("”") else re.sub("[“”]", "", text)


def _sentence_with(word: str, example: str) -> str:
    """An example whose ～ stands for the word, without where it was found; "" when it is no whole sentence."""
    sentence = re.sub("（[^（）]*）$", "", example.partition("★")[0]).strip()
    whole = sentence.count("～") == 1 and sentence[-1] in "。！？" and not _DAMAGED.search(sentence)
    return _closed(sentence.replace("～", word)) if whole else ""


@importer("xiehouyu", needs_task=True)
def import_xiehouyu(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """A riddle and its first answer, in which a note in brackets names the pun: 照旧（舅）. Fields riddle, answer."""
    raw_riddle, raw_answer = _required(record, ("riddle", "answer"), origin)
    riddle = _NOTE.sub("", raw_riddle).strip("，。 ")
    answer = re.split("[；;]", raw_answer)[0].strip("，。 ").translate(_WIDE)
    answer = _LONG_NOTE.sub("", answer)
    plain = _NOTE.sub("", answer)
    if not re.fullmatch("[，、：？！《》“”〇㐀-䶿一-鿿]+", riddle + plain) or not (riddle and plain):
        yield Skipped("damaged", origin.source, f"{raw_riddle} / {raw_answer}")
        return
    yield Record({"riddle": riddle, "answer": answer}, _group(riddle), origin.source)


_CROSS_REFERENCE = re.compile(
    r"(old |archaic |erhua )?variant of|see( also)? |also written|abbr\. (for|of)|CL:"
)


@importer("chinese_english", needs_task=True)
def import_chinese_english(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """A word of CC-CEDICT: fields word, pinyin (with tone marks), meaning (in English, the first four)."""
    (word,) = _required(record, ("simplified",), origin)
    # "Xining 西寧|西宁[Xi1 ning2]": the simplified form is enough.
    raw = [
        re.sub(r"[^\s|(]+\|", "", re.sub(r"\[[^]]*\]", "", text))
        for text in _lines(record, ("meanings",), origin)
    ]
    meanings = [text.strip() for text in raw if not _CROSS_REFERENCE.match(text)][:4]
    if not meanings:
        yield Skipped("cross_reference", origin.source, f"{word}: {'; '.join(raw)}")
    elif not _HAN.fullmatch(word):
        yield Skipped("not_only_han", origin.source, word)
    else:
        pinyin = " ".join(map(_tone_mark, field_text(record, "pinyin", origin).split()))
        yield Record(
            {"word": word, "pinyin": pinyin, "meaning": "; ".join(meanings)}, _group(word), origin.source
        )


def _tone_mark(syllable: str) -> str:
    """ "xiong1" → "xiōng": the mark stands on a or e, on the o of ou, else on the last vowel."""
    letters, tone = syllable.replace("u:", "ü").rstrip("12345"), syllable[-1:]
    if not tone.isdigit() or tone == "5":
        return letters
    vowels = [at for at, letter in enumerate(letters) if letter in "aeiouüAEIOUÜ"]
    marked = next((at for at in vowels if letters[at] in "aeAE" or letters[at : at + 2] == "ou"), None)
    at = marked if marked is not None else vowels[-1] if vowels else len(letters) - 1
    accent = "\u0304\u0301\u030c\u0300"[int(tone) - 1]
    return unicodedata.normalize("NFC", letters[: at + 1] + accent + letters[at + 1 :])


# Prose and fiction

_WIDE = str.maketrans(",;:?!()", "，；：？！（）")
_NEAR_HAN = re.compile(r"(?<=[^\x00-\x7f])[,;:?!()]+|[,;:?!()]+(?=[^\x00-\x7f])")
_DAMAGED = re.compile("[□■〓●◆◎○※*#=_<>{}|�\ue000-\uf8ff\\[\\]（）()]|&[a-z]+;|[A-Za-z]{2}[0-9]")
_SENTENCE = re.compile("[^。！？…]+(?:[。！？…]+[”’」』]*|$)")
_WHOLE = 800  # characters: a work up to this length is learnt whole
_PASSAGE = 400  # characters at most in what is written
_OPENING = 150  # characters at most in what stands before
_SHORTEST = 40
_FRONT_MATTER = re.compile(
    "题记|题辞|[前后附]记|序|自?序言|小引|引言"
)  # titles that say nothing of what follows
# What Lu Xun's collections hold; the others are essays.
_KIND_OF_COLLECTION = dict.fromkeys(("野草", "朝花夕拾"), "ProseGeneration") | dict.fromkeys(
    ("呐喊", "彷徨", "故事新编"), "StoryGeneration"
)


def tidy(text: str) -> str:
    """Chinese prose with full-width punctuation, without notes in brackets, white space or blank lines."""
    return "\n".join(line for line in map(_tidy_line, text.splitlines()) if line)


def _tidy_line(line: str) -> str:
    line = _NOTE.sub("", line)
    line = _NEAR_HAN.sub(lambda match: match[0].translate(_WIDE), line)
    line = re.sub(r"(?<=[^\x00-\x7f])\s+|\s+(?=[^\x00-\x7f])", "", line).strip()
    line = re.sub(r"\.{3,}|。{3,}|…+", "……", re.sub("[-―—─－]{2,}", "——", line))
    pieces = line.split('"')
    if len(pieces) % 2:  # straight quotation marks in pairs
        line = "".join(piece + mark for piece, mark in zip(pieces, "“”" * len(pieces), strict=False))[:-1]
    if line.count("：”") > line.count("：“"):
        # The paragraph began inside a quotation, and whoever made the marks curly took it for the outside.
        line = line.translate(str.maketrans("“”", "”“"))
    return line


def _sentences(text: str) -> Iterator[str]:
    """Sentences, a quotation of several as one, each with the line break that stands before it."""
    for paragraph in text.split("\n"):
        begun = "\n"
        for sentence in _SENTENCE.findall(paragraph):
            begun += sentence
            if _closes_quotations(begun):
                yield begun
                begun = ""
        if begun.strip():
            yield begun  # a quotation that goes on in the next paragraph, or was never closed


def passages(text: str) -> list[list[str]]:
    """Cut a text at ends of sentences into passages of `_PASSAGE` characters at most, as lists of sentences."""
    cut: list[list[str]] = [[]]
    for sentence in _sentences(text):
        if cut[-1] and sum(map(len, cut[-1])) + len(sentence) > _PASSAGE:
            cut.append([])
        cut[-1].append(sentence)
    return cut


def _last(sentences: list[str], longest: int) -> str:
    """As many sentences from the end as fit, at least one."""
    start = len(sentences) - 1
    while start > 0 and sum(map(len, sentences[start - 1 :])) <= longest:
        start -= 1
    return "".join(sentences[start:]).strip()


def _faults(text: str, shortest: int = _SHORTEST, longest: int = _PASSAGE) -> str | None:
    """Why a text cannot be used."""
    if _DAMAGED.search(text):
        return "damaged"
    if not _closes_quotations(text) or text.startswith(tuple("”’，。、；：")):
        return "broken_quotation"
    return "too_long" if len(text) > longest else "too_short" if len(text) < shortest else None


def _work(fields: dict[str, str], text: str, group: str, origin: Origin) -> Iterator[Imported]:
    """A work that is short enough whole (text, length, outline); a longer one as its beginning (beginning) and the
    passages that follow it (opening → continuation)."""
    if len(text) <= _WHOLE:
        if reason := _faults(text, longest=_WHOLE):
            yield Skipped(reason, origin.source, text)
        else:
            length = str(max(1, round(len(text) / 100)) * 100)
            yield Record(
                fields | _present(text=text, length=length, outline=_outline(text)), group, origin.source
            )
        return
    before: list[str] = []
    for sentences in passages(text):
        passage = "".join(sentences).strip()
        opening = _last(before, _OPENING) if before else ""
        if reason := _faults(passage) or (_faults(opening, shortest=1) if before else None):
            yield Skipped(reason, origin.source, passage)
        elif before:
            yield Record(fields | {"opening": opening, "continuation": passage}, group, origin.source)
        else:
            yield Record(fields | {"beginning": passage}, group, origin.source)
        before = sentences


def _outline(text: str) -> str:
    """The first sentence of each paragraph, numbered; "" when the text has fewer than three or more than eight."""
    firsts = [match[0] for paragraph in text.split("\n") if (match := _SENTENCE.search(paragraph))]
    if not 3 <= len(firsts) <= 8 or any(_faults(first, shortest=1) for first in firsts):
        return ""
    return "\n".join(f"{number}. {first}" for number, first in enumerate(firsts, 1))


@importer("fiction", needs_task=True)
def import_fiction(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """A chapter of a novel in passages: fields book, author, title (of the chapter), and those of `_work`.

    Where records name a `type`, JinYongGeneration takes the heroic ones (英雄传奇) and StoryGeneration the others.
    """
    book, chapter, raw = _required(record, ("book", "chapter", "text"), origin)
    heroic = record.get("type") == "英雄传奇"
    if "type" in record and heroic != (origin.kind == "JinYongGeneration"):
        yield Skipped("other_kind", origin.source, f"{book} {chapter}")
        return
    # A line that ends without a mark was cut by width; one that then has none at all is a web page's ("下一章").
    paragraphs = re.sub(f"(?<![{_MARKS}…”’—])\\n", "", tidy(raw)).split("\n")
    text = "\n".join(line for line in paragraphs if re.search(f"[{_MARKS}…”]", line))
    number, _, rest = _NOTE.sub("", chapter).strip().replace("\u3000", " ").partition(" ")
    title = "，".join(rest.split()) if re.match("第.+回|楔子|引首", number) else "".join(chapter.split())
    author = field_text(record, "author", origin)
    fields = _present(book=book, author="" if author in _NOBODY else author, title=title)
    yield from _work(fields, text, _group(book, chapter), origin)


@importer("essays", needs_task=True)
def import_essays(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """A work out of an author's collection: fields book (the collection), author, title, and those of `_work`.

    Each collection feeds one kind: prose poems and memoirs ProseGeneration, short stories StoryGeneration,
    the others Composition.
    """
    collection, title, raw = _required(record, ("collection", "title", "text"), origin)
    if _KIND_OF_COLLECTION.get(collection, "Composition") != origin.kind:
        yield Skipped("other_kind", origin.source, f"{collection} {title}")
        return
    if _FRONT_MATTER.fullmatch(title):
        yield Skipped("front_matter", origin.source, f"{collection} {title}")
        return
    text = tidy(raw.partition("※")[0])  # after ※ an editor's notes
    fields = _present(book=collection, author=field_text(record, "author", origin), title=tidy(title))
    yield from _work(fields, text, _group(collection, title), origin)


@importer("classical_prose", needs_task=True)
def import_classical_prose(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """古文观止 {"chapter", "author", "paragraphs"} as `essays`; of 幽梦影 {"content"} the first clause opens."""
    book = field_text(record, "collection", origin)
    if "content" in record:
        (raw,) = _required(record, ("content",), origin)
        text = tidy(raw)
        opening, mark, rest = re.match("([^，；：。？！]*)(.?)(.*)", text, re.S).groups()  # type: ignore[union-attr]
        if not rest or _DAMAGED.search(text):
            yield Skipped("damaged" if rest else "too_short", origin.source, text)
            return
        fields = _present(book=book, opening=opening + mark, continuation=rest)
        yield Record(fields, _group(book, text), origin.source)
        return
    dynasty_author = field_text(record, "author", origin).rpartition("：")[2].strip()
    fields = _present(
        book=book,
        title=tidy(field_text(record, "chapter", origin)),
        author="" if dynasty_author in _NOBODY else dynasty_author,
    )
    text = tidy("\n".join(_lines(record, ("paragraphs",), origin)))
    yield from _work(fields, text, _group(book, fields.get("title", "")), origin)


@importer("themed_stories", needs_task=True)
def import_themed_stories(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """A story to a theme: fields theme, genre, names, text; stories of one theme share a group."""
    theme, raw = _required(record, ("theme", "story"), origin)
    text = tidy(raw)
    if reason := _faults(text, longest=_WHOLE):
        yield Skipped(reason, origin.source, text)
        return
    names = field_text(record, "names", origin).replace("|", "、")
    genre = field_text(record, "genre", origin)
    fields = _present(theme=theme.rstrip("。"), genre=genre, names=names, text=text)
    yield Record(fields, _group(theme), origin.source)


# Advertising copy


@importer("product", needs_task=True)
def import_product(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """AdvertiseGen: fields product, attributes ("颜色：红；风格：简约、淑女"), description."""
    content, description = _required(record, ("content", "summary"), origin)
    values: dict[str, list[str]] = {}
    for pair in content.split("*"):
        name, _, value = pair.partition("#")
        values.setdefault(name, []).append(value)
    if re.search("<UNK>|BRAND", content + description):
        yield Skipped("placeholder", origin.source, description)
        return
    product = values.pop("类型", [""])[0]
    attributes = "；".join(f"{name}：{'、'.join(texts)}" for name, texts in values.items())
    fields = _present(product=product, attributes=attributes, description=description)
    yield Record(fields, _group(content), origin.source)
