"""Importers of labelled corpora: what annotators wrote (spans, tags, references, triples) becomes plain fields.

    grouped                        fields as they stand, kept together by the first: premise, sentence, question
    pclue, alpaca_cot              whole questions and answers
    ner_spans, ner_bio             entities: CLUENER's spans, Weibo's tags
    spelling, grammar_chat         corrections: SIGHAN, pycorrector's grammar set
    mucgec, yaclc                  corrections with several references
    squad, multiple_choice         reading comprehension: CMRC and DRCD, C3
    csl_keywords, csl_candidates   keywords: CSL, FewCLUE's CSL
    tags                           keywords: the tags of TNEWS
    meetings                       summaries: VCSum
    triples                        questions about an entity: NLPCC, KgCLUE
    cedict, mbpp                   words: CC-CEDICT; programs: MBPP
    ape210k, gaokao, gsm8k         answers with their reasoning

Each is a pure function of one record (see `importers`). A record that is sound but of no use is `Skipped` with its
reason's code; one of another shape is an `InputError`. The group of a record is its passage (for OCNLI the premise,
for a triple the entity): what is read in training is never read again in validation.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from firefly.data.clean import digest, normalised
from firefly.data.example import Example
from firefly.data.importers import (
    Imported,
    Origin,
    Record,
    Skipped,
    Whole,
    field_text,
    importer,
)
from firefly.data.tasks import task
from firefly.errors import InputError

NONE = "无"  # the answer where there is nothing to find
LETTERS = "ABCDEFGH"


def group_of(passage: str) -> str:
    """The group of everything that is asked about a passage, whichever corpus it comes from."""
    return digest(normalised(passage))


def _text(record: dict[str, Any], name: str, origin: Origin) -> str:
    """A field that must be there, with one kind of line end and without white space around it."""
    if name not in record:
        raise _wrong(record, name, "a text", origin)
    return "\n".join(field_text(record, name, origin).splitlines())


def _texts(record: dict[str, Any], name: str, origin: Origin) -> list[str]:
    """A field that must be a list of texts; empty ones are left out."""
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _wrong(record, name, "a list of texts", origin)
    return [text.strip() for text in value if text.strip()]


def _dicts(record: dict[str, Any], name: str, keys: set[str], origin: Origin) -> list[dict[str, Any]]:
    """A field that must be a list of objects with these keys."""
    value = record.get(name)
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and keys <= item.keys() for item in value
    ):
        raise _wrong(record, name, f"a list of objects with {', '.join(sorted(keys))}", origin)
    return value


def _wrong(record: dict[str, Any], name: str, what: str, origin: Origin) -> InputError:
    there = ", ".join(sorted(record)) or "none"
    return InputError(f"{origin}: field '{name}' must be {what}; the fields there are: {there}.")


def _choice(options: Sequence[str], key: str) -> str:
    """One of the options, always the same for the same key."""
    return options[int(digest(key)[:12], 16) % len(options)]


# Whole records and plain fields


@importer("grouped", needs_task=True)
def import_grouped(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """The task's fields as they stand; records with the same first field (premise, passage, …) stay together."""
    names = [name for name in task(origin.kind or "").fields if name in record]
    if not names:
        wanted = ", ".join(task(origin.kind or "").fields)
        raise InputError(
            f"{origin}: task {origin.kind} needs one of the fields {wanted}; "
            f"the fields there are: {', '.join(sorted(record)) or 'none'}."
        )
    fields = {name: _text(record, name, origin) for name in names}
    yield Record(fields, group_of(fields[names[0]]), origin.source)


@importer("alpaca_cot")
def import_alpaca_cot(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Alpaca-CoT: questions already worded, in which a backslash and an n may stand for a line end."""
    question, answer = (
        _text(record, name, origin).replace("\\n", "\n").strip() for name in ("instruction", "output")
    )
    yield Whole(Example.of(origin.kind or "Cot", question, answer, origin.source), group_of(question))


@importer("pclue")
def import_pclue(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """pCLUE's questions, already worded; its `type` says which task each belongs to."""
    question, answer, kind = (_text(record, name, origin) for name in ("input", "target", "type"))
    options = _texts(record, "answer_choices", origin) if record.get("answer_choices") else []
    if options and answer not in options:
        yield Skipped("answer_not_among_choices", origin.source, question)
        return
    kinds = {"nli": "NLI", "mrc": "MRC"}
    if kind == "classify" and len(options) == 2:  # do two sentences say the same?
        kinds["classify"] = "TextMatching"
    if "关键词" in question:
        kinds["generate"] = "KeywordRecognition"
    example = Example.of(kinds.get(kind, "BELLE"), question, answer, origin.source)
    yield Whole(example, group_of(question))


# Entities

CLUENER = {
    "name": "人名", "position": "职位", "company": "公司", "organization": "组织机构", "government": "政府机构",
    "address": "地址", "scene": "景点", "book": "书名", "movie": "电影", "game": "游戏",
}  # fmt: skip
WEIBO = {"PER": "人名", "ORG": "机构名", "LOC": "地名", "GPE": "地名"}


@importer("ner_spans", needs_task=True)
def import_ner_spans(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """CLUENER: {"text", "label": {type: {entity: [[first, last], …]}}}."""
    text, label = record.get("text"), record.get("label")
    if not isinstance(text, str) or not isinstance(label, dict):
        raise _wrong(record, "label", "an object {type: {entity: [[first, last]]}} beside a text", origin)
    try:
        found = sorted(
            (first, CLUENER[name], text[first : last + 1])
            for name, entities in label.items()
            for spans in entities.values()
            for first, last in spans
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{origin}: field 'label' must be {{type: {{entity: [[first, last]]}}}} with the types "
            f"{', '.join(CLUENER)}."
        ) from error
    yield _entities(text, [(kind, entity) for _, kind, entity in found], CLUENER, origin)


@importer("ner_bio", needs_task=True)
def import_ner_bio(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Weibo NER: {"chars", "tags"}, a BIO tag a character; only names (.NAM) count, not nouns (.NOM)."""
    characters, tags = record.get("chars"), record.get("tags")
    if not isinstance(tags, list) or not isinstance(characters, list) or len(characters) != len(tags):
        raise _wrong(record, "tags", "a list as long as the list 'chars'", origin)
    if not all(isinstance(character, str) for character in characters):
        raise _wrong(record, "chars", "a list of texts", origin)
    found: list[tuple[str, str]] = []
    before = ""
    for character, tag in zip(characters, tags, strict=True):
        place, _, label = str(tag).partition("-")
        kind, _, form = label.partition(".")
        if form == "NAM" and kind not in WEIBO:
            raise InputError(f"{origin}: unknown tag '{tag}'; the types are {', '.join(WEIBO)}.")
        if form == "NAM" and (place == "B" or label != before):  # a stray I opens an entity, as in conlleval
            found.append((WEIBO[kind], character))
        elif form == "NAM":
            found[-1] = (found[-1][0], found[-1][1] + character)
        before = label
    yield _entities("".join(characters), found, WEIBO, origin)


def _entities(
    text: str, found: Sequence[tuple[str, str]], scheme: Mapping[str, str], origin: Origin
) -> Record:
    """Entities in reading order, each once, in the ways in which a question can ask for them.

    `asked` is one type, now and then one that does not occur, so that "none" is an answer too.
    """
    types = list(dict.fromkeys(scheme.values()))
    table: dict[str, list[str]] = {}
    for kind, entity in dict.fromkeys((kind, entity.strip()) for kind, entity in found):
        table.setdefault(kind, []).append(entity)
    absent = [kind for kind in types if kind not in table]
    asked = _choice([*table] * 3 + ([_choice(absent, text)] if absent else []), "asked" + text)
    fields = {
        "text": text.strip(),
        "types": "、".join(types),
        "entities": "；".join(f"{kind}：{'、'.join(names)}" for kind, names in table.items()) or NONE,
        "entity_lines": "\n".join(f"{name}（{kind}）" for kind, names in table.items() for name in names)
        or NONE,
        "entities_json": json.dumps(table, ensure_ascii=False),
        "asked": asked,
        "of_asked": "、".join(table.get(asked, [])) or NONE,
    }
    return Record(fields, group_of(text), origin.source)


# Corrections


def _correction(sentence: str, corrected: str, group: str, origin: Origin) -> Record | Skipped:
    """A sentence, its correction, and the verdict whether there was anything to correct."""
    if not sentence or not corrected:
        return Skipped("empty_sentence", origin.source, sentence or corrected)
    verdict = "没有错误" if sentence == corrected else "有错误"
    return Record(
        {"sentence": sentence, "corrected": corrected, "verdict": verdict}, group_of(group), origin.source
    )


@importer("spelling", needs_task=True)
def import_spelling(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """SIGHAN: `sentence` and `corrected`, equally long; the single characters that changed become `edits`."""
    sentence, corrected = (_text(record, name, origin) for name in ("sentence", "corrected"))
    item = _correction(sentence, corrected, sentence, origin)
    if isinstance(item, Record) and len(sentence) == len(corrected):
        changed = [
            f"{wrong}→{right}" for wrong, right in zip(sentence, corrected, strict=True) if wrong != right
        ]
        item.fields["edits"] = "；".join(changed) or NONE
    yield item


@importer("mucgec", needs_task=True)
def import_mucgec(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """MuCGEC: `source` and `references`; the first one that is a whole sentence is the correction."""
    sentence = _text(record, "source", origin)
    references = _texts(record, "references", origin)
    whole = [text for text in references if text != "无法标注" and "缺失成分" not in text]
    if not whole:
        yield Skipped("no_whole_reference", origin.source, sentence)
        return
    yield _correction(sentence, sentence if whole[0] == "没有错误" else whole[0], sentence, origin)


@importer("yaclc", needs_task=True)
def import_yaclc(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """YACLC: a learner's sentence; the correction that most annotators chose, of these the one nearest to it."""
    sentence = _text(record, "sentence_text", origin)
    keys = {"correction", "annotator_count", "edits_count", "is_grammatical"}
    notes = _dicts(record, "sentence_annos", keys, origin)
    if not all(isinstance(note[name], int) for note in notes for name in keys - {"correction"}):
        raise _wrong(record, "sentence_annos", "a list of objects with whole numbers as counts", origin)
    given = [note for note in notes if note["is_grammatical"]]  # the others go beyond grammar
    if not given:
        yield Skipped("no_grammatical_reference", origin.source, sentence)
        return
    best = min(given, key=lambda note: (-note["annotator_count"], note["edits_count"]))
    article = _text(record, "article_id", origin)
    yield _correction(sentence, _text(best, "correction", origin), f"yaclc {article}", origin)


@importer("grammar_chat", needs_task=True)
def import_grammar_chat(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """pycorrector's grammar set: a ShareGPT conversation of one question, which ends with the sentence."""
    turns = _dicts(record, "conversations", {"from", "value"}, origin)
    if [turn["from"] for turn in turns] != ["human", "gpt"]:
        raise _wrong(record, "conversations", "one turn of 'human' and one of 'gpt'", origin)
    question, corrected = (_text(turn, "value", origin) for turn in turns)
    sentence = question.rpartition("\n")[2]
    yield _correction(sentence, corrected, sentence, origin)


# Reading


@importer("squad", needs_task=True)
def import_squad(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """CMRC 2018 and DRCD: `context`, `question`, `answers`; the answer that most annotators gave."""
    passage, question = (_text(record, name, origin) for name in ("context", "question"))
    answers = Counter(_texts(record, "answers", origin)).most_common(1)
    if not answers or not question:
        yield Skipped("no_question_or_answer", origin.source, question or passage)
        return
    fields = {
        "passage": passage,
        "title": field_text(record, "title", origin),
        "question": question,
        "answer": answers[0][0],
    }
    yield Record(fields, group_of(passage), origin.source)


@importer("multiple_choice", needs_task=True)
def import_multiple_choice(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """C3: `passage` (a list: paragraphs, or the turns of a dialogue), `question`, `choice`, `answer`."""
    passage, options = "\n".join(_texts(record, "passage", origin)), _texts(record, "choice", origin)
    question, answer = (_text(record, name, origin) for name in ("question", "answer"))
    if options.count(answer) != 1 or len(set(options)) != len(options) or len(options) > len(LETTERS):
        yield Skipped("ambiguous_choices", origin.source, question)
        return
    letters = LETTERS[: len(options)]
    fields = {
        "passage": passage,
        "stem": question,
        "options": "\n".join(f"{letter}. {text}" for letter, text in zip(letters, options, strict=True)),
        "letter": letters[options.index(answer)],
        "choice": answer,
    }
    yield Record(fields, group_of(passage), origin.source)


@importer("meetings", needs_task=True)
def import_meetings(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """VCSum: `context` (a list of sentences for every turn), `speaker`, and the summaries `discussion`, `agenda`."""
    context, speakers = record.get("context"), record.get("speaker")
    if not isinstance(context, list) or not isinstance(speakers, list) or len(context) != len(speakers):
        raise _wrong(record, "speaker", "a list as long as 'context'", origin)
    turns = ["".join(map(str.strip, _texts({"turn": turn}, "turn", origin))) for turn in context]
    meeting = "\n".join(f"发言人{who}：{said}" for who, said in zip(speakers, turns, strict=True))
    fields = {
        "meeting": meeting,
        "minutes": _text(record, "discussion", origin),
        "agenda": _text(record, "agenda", origin),
    }
    yield Record(fields, group_of(f"vcsum {_text(record, 'av_num', origin)}"), origin.source)


# Keywords


def _keywords(text: str, words: Sequence[str], origin: Origin) -> Record | Skipped:
    unique = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not text or not unique:
        return Skipped("no_keywords", origin.source, text)
    fields = {
        "text": text,
        "keywords": "、".join(unique),
        "keyword_lines": "\n".join(unique),
        "count": str(len(unique)),
    }
    return Record(fields, group_of(text), origin.source)


_TITLE_AT_END = re.compile(r"(.*[.。！？!?;；”])\s+[^。]{4,80}", re.DOTALL)


@importer("csl_keywords", needs_task=True)
def import_csl_keywords(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """CSL: `abst_title`, an abstract with the paper's title behind it, and `keywords` joined by "_"."""
    text = _text(record, "abst_title", origin)
    titled = _TITLE_AT_END.fullmatch(text)
    yield _keywords(titled[1] if titled else text, _text(record, "keywords", origin).split("_"), origin)


@importer("csl_candidates", needs_task=True)
def import_csl_candidates(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """FewCLUE's CSL: `abst` and `keyword`, a list in which with `label` 0 some are forged, without one unknown."""
    text, words = _text(record, "abst", origin), _texts(record, "keyword", origin)
    label = field_text(record, "label", origin)
    if label != "1":
        yield Skipped("forged_keywords" if label else "unlabelled", origin.source, text)
    else:
        yield _keywords(text, words, origin)


@importer("tags", needs_task=True)
def import_tags(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """TNEWS: `sentence` and a site's tags in `keywords`; of these the ones that the sentence has, two at least.

    A tag inside another one (贷款 in 企业贷款) says nothing new and is left out.
    """
    sentence = _text(record, "sentence", origin)
    tags = [tag for tag in _text(record, "keywords", origin).split(",") if tag and tag in sentence]
    longest = [tag for tag in tags if not any(tag in other and tag != other for other in tags)]
    if len(set(longest)) < 2:
        yield Skipped("too_few_keywords_in_text", origin.source, sentence)
    else:
        yield _keywords(sentence, sorted(set(longest), key=sentence.index), origin)


# Knowledge, words, programs


@importer("triples", needs_task=True)
def import_triples(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """NLPCC KBQA and KgCLUE: a question and `triple`, "subject ||| relation ||| answer"."""
    question, triple = _text(record, "question", origin), _text(record, "triple", origin)
    parts = [part.strip() for part in triple.split("|||")]
    if len(parts) != 3:
        raise _wrong(record, "triple", "'subject ||| relation ||| answer'", origin)
    if not all(parts) or not question:
        yield Skipped("no_question_or_answer", origin.source, question or triple)
        return
    subject, relation, answer = parts
    fields = {"question": question, "answer": answer, "subject": subject, "relation": relation}
    yield Record(fields, group_of(subject), origin.source)


# Meanings that explain a form by another entry instead of translating it.
_CROSS_REFERENCE = re.compile(
    r"^(CL:|see |(old |erhua )?variant |also |same as |abbr\.|Taiwan pr|surname |used in )|\["
)


@importer("cedict", needs_task=True)
def import_cedict(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """CC-CEDICT: `simplified` and its `meanings`; cross-references and notes on pronunciation are left out."""
    word = _text(record, "simplified", origin)
    meanings = [text for text in _texts(record, "meanings", origin) if not _CROSS_REFERENCE.search(text)]
    if not meanings:
        yield Skipped("no_plain_meaning", origin.source, word)
        return
    yield Record({"word": word, "meaning": "; ".join(meanings)}, group_of(word), origin.source)


@importer("mbpp", needs_task=True)
def import_mbpp(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """MBPP: `text`, the Python `code` that solves it, and the assertions in `test_list`."""
    description = _text(record, "text", origin)
    code = "\n".join(line.rstrip() for line in _text(record, "code", origin).splitlines())
    tests = "\n".join(_texts(record, "test_list", origin))
    yield Record(
        {"description": description, "code": code, "tests": tests}, group_of(description), origin.source
    )


# Reasoning


@importer("gsm8k", needs_task=True)
def import_gsm8k(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """GSM8K: the calculator's marks <<1+1=2>> go, and the last line "#### 2" becomes a sentence."""
    problem, answer = (_text(record, name, origin) for name in ("question", "answer"))
    steps, marker, result = re.sub(r"<<[^>]*>>", "", answer).rpartition("\n#### ")
    if not marker:
        raise _wrong(record, "answer", "steps and a last line '#### result'", origin)
    fields = {"problem": problem, "rationale": f"{steps.strip()}\nThe answer is {result}.", "result": result}
    yield Record(fields, group_of(problem), origin.source)


@importer("ape210k", needs_task=True)
def import_ape210k(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Ape210K: a word problem, its `equation` "x=…" and `ans`; both must agree, within rounding."""
    names = ("original_text", "equation", "ans")
    question, equation, answer = (_text(record, name, origin) for name in names)
    expression = equation.removeprefix("x=")
    if re.fullmatch(r"[\d.%]+|\(\d+/\d+\)", expression):
        yield Skipped("no_steps", origin.source, question)
        return
    computed, stated = _value(expression), _value(answer)
    if computed is None or stated is None or abs(computed - stated) > abs(stated) / 100:
        yield Skipped("equation_disagrees", origin.source, f"{question} {equation} {answer}")
        return
    result = re.sub(r"^(\d*)\((\d+/\d+)\)$", lambda m: f"{m[1]}又{m[2]}" if m[1] else m[2], answer)
    shown = re.sub(r"(\(\d+/\d+\))|/", lambda m: m[1] or "÷", expression)  # (1/3) is a fraction, not a step
    shown = shown.replace("**", "^").replace("*", "×")
    question = question.replace("**2", "²").replace("**3", "³")
    fields = {
        "question": question,
        "equation": shown,
        "solution": f"列式计算：{shown}＝{result}\n答案：{result}",
        "answer": result,
    }
    yield Record(fields, group_of(question), origin.source)


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(expression: str) -> Fraction | None:
    """The exact value of arithmetic with percentages and mixed numbers, 23(1/3); None for anything else."""
    python = re.sub(r"(\d+)(\(\d+/\d+\))", r"(\1+\2)", expression)
    python = re.sub(r"([\d.]+|\([^()]*\))%", r"(\1/100)", python).replace(":", "/")
    try:
        return _evaluate(ast.parse(python, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow) and right in (2, 3) and abs(left) < 10**9:
            return left**right.numerator
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
    raise ValueError("not plain arithmetic")


_LAYOUT = re.compile(
    r"横线|画线|划线|加点|[如下上左右][列面]?图|图[（(]?[0-9a-d一二三四甲乙丙丁]|[图表]中|示意图|统计图|坐标图|读图|漫画|!\[|<img"
)
_QUESTION_NUMBER = re.compile(r"^\s*(?:\d+\s*[．.、]\s*)?(?:[（(]\s*\d+\s*分\s*[）)])?\s*")
_BLANK = re.compile(r"(?<=\S)(?=[ \u3000]{3}) *\u3000[ \u3000]*(?=\S)")  # to fill in
_CJK = "\u3000-\u303f一-鿿\uff00-\uffef“”‘’…—"
_STRAY_SPACE = re.compile(
    rf"(?<=[{_CJK}])[ \u3000]+(?=[{_CJK}0-9])|(?<=[0-9A-Z])[ \u3000]+(?=[{_CJK}])|(?<=：)[ \u3000]+"
)
_WRAPPED = re.compile(
    r"(?m)^(.{28,}[^。！？!?;；：:\n]) *\n(?![ \u3000]*(?:[A-G①-⑩][．.、 ]|[（(]?\d+[）).．、]|$))"
)


@importer("gaokao", needs_task=True)
def import_gaokao(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """GAOKAO-Bench: `question`, `analysis` and `answer` (letters, or a text); line ends and spaces of the PDF go.

    A question about a picture or about underlined words cannot be answered without them and is skipped.
    """
    question = re.sub("[(（][ \u3000]*[)）]", "（）", _text(record, "question", origin))
    question = _unwrapped(_BLANK.sub("____", _QUESTION_NUMBER.sub("", question)))
    analysis = _unwrapped(re.sub("【(分析|解答|点评)】", "", _text(record, "analysis", origin)))
    value = record.get("answer")
    answer = (
        "、".join(_texts(record, "answer", origin))
        if isinstance(value, list)
        else _text(record, "answer", origin)
    )
    answer = _unwrapped(re.sub("【(解答|答案)】", "", answer))
    if _LAYOUT.search(question):
        yield Skipped("needs_layout", origin.source, question)
    elif not (question and analysis and answer):
        yield Skipped("no_question_or_answer", origin.source, question)
    else:
        solution = f"{analysis}\n答案：{answer}" if len(answer) < 40 else f"{analysis}\n\n答案：\n{answer}"
        fields = {"question": question, "solution": solution, "answer": answer}
        yield Record(fields, group_of(question), origin.source)


def _unwrapped(text: str) -> str:
    """Text out of a PDF without the line ends inside sentences and the spaces between characters."""
    joined = _WRAPPED.sub(r"\1", re.sub(r"[ \t\u3000]+$", "", text, flags=re.MULTILINE))
    return re.sub(r"\n{3,}", "\n\n", _STRAY_SPACE.sub("", joined)).strip()
