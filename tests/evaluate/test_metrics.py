"""Metrics: known values, reference implementations on random inputs, and where a careless version goes wrong."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
import sacrebleu
import seqeval.metrics
from hypothesis import given
from hypothesis import strategies as st
from rouge_chinese import Rouge
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from firefly.data.tasks import load_tasks
from firefly.errors import InputError
from firefly.evaluate.metrics import METRICS, Answered, Intervals, bootstrap, judge, metric, score

REFERENCE = "他比喻做了多余的事情，反而不恰当。"
NEAR = "比喻做了多余的事，反而不恰当。"


def answered(*pairs: tuple[str, str], question: str = "问") -> list[Answered]:
    return [Answered(question, reference, answer) for reference, answer in pairs]


def test_every_tasks_metric_is_in_the_table() -> None:
    assert {task.metric for task in load_tasks().values()} <= set(METRICS)


def test_identical_answers_have_full_chrf_and_bleu_and_foreign_ones_none() -> None:
    same = score("chrf", answered((REFERENCE, REFERENCE)))
    assert same == pytest.approx({"chrf": 100, "bleu": 100})
    assert score("chrf", answered((REFERENCE, "abc")))["chrf"] == 0


def test_bleu_counts_chinese_characters_where_the_default_tokenizer_sees_none() -> None:
    value = score("chrf", answered((REFERENCE, NEAR)))["bleu"]
    assert 40 < value < 100
    assert sacrebleu.corpus_bleu([NEAR], [[REFERENCE]]).score < 1e-3


def test_chrf_pairs_each_answer_with_its_own_reference() -> None:
    straight = answered(("甲乙丙丁", "甲乙丙丁"), ("天地玄黄", "天地玄黄"))
    crossed = answered(("甲乙丙丁", "天地玄黄"), ("天地玄黄", "甲乙丙丁"))
    assert score("chrf", straight)["chrf"] == pytest.approx(100)
    assert score("chrf", crossed)["chrf"] == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("正面", 1),
        ("这条评论是正面的。", 1),
        ("正面，正面！", 1),
        ("负面", 0),
        ("正面或负面", 0),  # naming both is no answer, even where no reference is 负面
        ("好评", 0),
        ("", 0),
    ],
)
def test_accuracy_reads_one_label_out_of_the_answer(answer: str, right: int) -> None:
    assert score("accuracy", answered(("正面", answer)))["accuracy"] == right


def test_accuracy_takes_the_longer_of_two_labels_and_averages() -> None:
    pairs = answered(("好评", "好评"), ("好评", "好"), ("好", "好"), ("好", "很好"))
    assert score("accuracy", pairs)["accuracy"] == 0.75


def test_distinct_counts_character_grams_within_answers() -> None:
    values = score("distinct", answered(("x", "春春 春\n秋"), ("x", "秋")))
    assert values["distinct_1"] == pytest.approx(2 / 5)
    assert values["distinct_2"] == pytest.approx(2 / 3)  # 春春 春春 春秋; none across answers
    assert next(iter(values)) == "distinct_2"


def test_repetition_is_within_an_answer_and_free_writing_is_judged_by_it() -> None:
    values = score("distinct", answered(("x", "春眠不觉晓，春眠不觉晓，"), ("x", "春眠不觉晓，")))
    assert values["repetition"] == pytest.approx(3 / 12)  # 春眠不觉 眠不觉晓 不觉晓， of 9 and 3
    assert score("distinct", answered(("x", "花"), ("x", "花")))["repetition"] == 0
    assert "repetition" not in score("rouge", answered(("x", "花")))


def test_couplets_and_poems_are_averaged_and_come_first() -> None:
    lines = answered(("黄河入海流", "黄河入海流"), ("黄河入海流", "白云出"), question="对下联：白日依山尽")
    values = score("couplet", lines)
    assert next(iter(values)) == "well_formed"
    assert (values["well_formed"], values["no_shared_character"]) == (0.5, 0.5)
    assert (values["closing_tones"], values["opposed_tones"]) == (0.5, 0.75)
    quatrain = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
    values = score("poem", answered((quatrain, quatrain), (quatrain, "床前明月光。")))
    assert (values["well_formed"], values["equal_lengths"], values["rhymed"]) == (0.5, 1.0, 0.5)
    assert "rhymed" not in score(
        "poem", answered(("昨夜雨疏风骤，浓睡不消残酒。", "昨夜雨疏风骤，浓睡不消残酒。"))
    )


@pytest.mark.parametrize(("answer", "right"), [("明月松间照", 1.0), ("明月松间流", 0.0), ("", 0.0)])
def test_a_couplet_asked_backwards_is_judged_with_its_lines_in_order(answer: str, right: float) -> None:
    asked = [Answered("下联：清泉石上流\n上联：", "明月松间照", answer)]
    assert score("couplet", asked)["closing_tones"] == right


def test_couplets_whose_given_line_is_lost_are_not_judged() -> None:
    assert "well_formed" not in score("couplet", answered(("黄河入海流", "黄河入海流")))


def test_an_unknown_metric_names_the_choices() -> None:
    with pytest.raises(InputError, match="did you mean 'chrf'"):
        score("chrff", answered(("a", "b")))


def test_nothing_to_judge_is_an_error() -> None:
    for name in METRICS:
        with pytest.raises(InputError, match="no answers"):
            score(name, [])
        with pytest.raises(InputError, match="'问' has no reference"):
            score(name, answered(("好", "好"), (" ", "好")))


@pytest.mark.parametrize("name", METRICS)
def test_empty_answers_score_low_and_never_fail(name: str) -> None:
    values = score(name, answered(("白日依山尽，黄河入海流。", ""), question="对下联：白日依山尽"))
    assert all(math.isfinite(value) for value in values.values())
    assert next(iter(values.values()), 0.0) == 0.0


# Held to reference implementations -----------------------------------------------------------------------------------

TEXT = st.text("春风又绿江南岸a1 ，。", max_size=12)
PAIRS = st.lists(st.tuples(TEXT.filter(str.strip), TEXT), min_size=1, max_size=6)


@given(PAIRS)
def test_chrf_is_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    references, texts = zip(*pairs, strict=True)
    expected = sacrebleu.corpus_chrf(list(texts), [list(references)]).score
    assert score("chrf", answered(*pairs))["chrf"] == pytest.approx(expected)


@given(PAIRS)
def test_bleu_is_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    references, texts = zip(*pairs, strict=True)
    judge = sacrebleu.BLEU(tokenize="zh", effective_order=True)
    assert score("bleu", answered(*pairs))["bleu"] == pytest.approx(
        judge.corpus_score(list(texts), [list(references)]).score
    )


@given(st.text("春风又绿江", min_size=1, max_size=14), st.text("春风又绿江", min_size=1, max_size=14))
def test_rouge_is_rouge_chineses(reference: str, text: str) -> None:
    [expected] = Rouge(exclusive=False).get_scores([" ".join(text)], [" ".join(reference)])
    values = score("rouge", answered((reference, text)))
    for ours, theirs in (("rouge_1", "rouge-1"), ("rouge_2", "rouge-2"), ("rouge_l", "rouge-l")):
        if ours != "rouge_2" or min(len(reference), len(text)) > 1:  # they give 0 to two texts without pairs
            assert values[ours] == pytest.approx(expected[theirs]["f"], abs=1e-6), ours
    span = score("span_f1", answered((reference, text)))  # SQuAD's F1 is ROUGE-1
    assert span["span_f1"] == pytest.approx(expected["rouge-1"]["f"], abs=1e-6)


@given(st.lists(st.tuples(st.sampled_from("甲乙丙"), st.sampled_from("甲乙丙丁")), min_size=1, max_size=20))
def test_accuracy_and_macro_f1_are_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    true, predicted = zip(*pairs, strict=True)
    values = score("accuracy", answered(*pairs))
    expected = f1_score(true, predicted, labels=sorted(set(true)), average="macro", zero_division=0)
    assert values["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert values["macro_f1"] == pytest.approx(expected)


SETS = st.lists(st.tuples(*[st.sets(st.sampled_from("甲乙丙丁戊"), max_size=4)] * 2), min_size=1, max_size=8)


@given(SETS)
def test_keyword_f1_is_scikit_learns_over_samples(pairs: list[tuple[set[str], set[str]]]) -> None:
    columns = [
        [[char in chosen for char in "甲乙丙丁戊"] for chosen in column]
        for column in zip(*pairs, strict=True)
    ]
    expected = f1_score(*columns, average="samples", zero_division=1)
    texts = [tuple("、".join(sorted(chosen)) or "无" for chosen in pair) for pair in pairs]
    assert score("keyword_f1", answered(*texts))["keyword_f1"] == pytest.approx(expected)


TAGS = st.lists(st.sampled_from(["O", "B-人名", "I-人名", "B-地名", "I-地名"]), min_size=6, max_size=6)


@given(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=5), st.integers(0, 2))
def test_entity_f1_is_seqevals(pairs: list[tuple[list[str], list[str]]], form: int) -> None:
    def written(tags: list[str]) -> str:
        found = [(kind, "甲乙丙丁戊己"[start : end + 1]) for kind, start, end in get_entities(tags)]
        names = {kind: [name for other, name in found if other == kind] for kind, _ in found}
        lines = "\n".join(f"{name}（{kind}）" for kind, name in found)
        listed = "；".join(f"{kind}：{'、'.join(group)}" for kind, group in names.items())
        return [listed, lines, str(names).replace("'", '"')][form] or "无"

    values = score("entity_f1", answered(*(tuple(map(written, pair)) for pair in pairs)))
    true, predicted = map(list, zip(*pairs, strict=True))
    judges = (seqeval.metrics.f1_score, seqeval.metrics.precision_score, seqeval.metrics.recall_score)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [judge(true, predicted) for judge in judges]
        anything = any(get_entities(tags) for pair in pairs for tags in pair)
    found = [values[name] for name in ("entity_f1", "precision", "recall")]
    assert found == pytest.approx(expected if anything else [1.0, 0.0, 0.0])


PLACES = st.lists(st.sampled_from("东南西"), min_size=8, max_size=8)


@given(st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=4))
def test_correction_f1_is_scikit_learns_over_changed_characters(
    pairs: list[tuple[list[str], list[str]]],
) -> None:
    """Each character of a source becomes 南 or 西, or stays (here 东): few enough to be replacements."""
    source = "甲乙丙丁戊己庚辛"
    items, columns = [], ([], [])
    for pair in pairs:
        kept = [["东" if place > 2 else char for place, char in enumerate(chars)] for chars in pair]
        texts = [
            "".join(old if new == "东" else new for old, new in zip(source, chars, strict=True))
            for chars in kept
        ]
        items.append(Answered(f"改正病句：{source}", *texts))
        for column, chars in zip(columns, kept, strict=True):
            column.append([char == wanted for char in chars for wanted in "南西"])
    values = score("correction_f1", items)
    precision, recall, f1, _ = precision_recall_fscore_support(*columns, average="micro", zero_division=0)
    if any(any(row) for column in columns for row in column):
        assert [values[name] for name in ("correction_f1", "precision", "recall")] == pytest.approx(
            [f1, precision, recall]
        )
    else:
        assert values["correction_f1"] == 1.0


# Confidence intervals ------------------------------------------------------------------------------------------------


def intervals(name: str, items: list[Answered], num_resamples: int) -> Intervals:
    """Those of the metric's own numbers."""
    own = metric(name).scores(np.asarray(metric(name).count(items), float).sum(axis=0))
    return {key: ends for key, ends in judge(name, items, num_resamples)[1].items() if key in own}


@pytest.mark.parametrize("name", sorted(METRICS))
def test_intervals_hold_the_score_and_do_not_depend_on_the_order(name: str) -> None:
    draw = random.Random(0)
    lines = ["黄河入海流", "白云出岫来", "黄河", "流入海黄河"]
    items = answered(
        *((draw.choice(lines), draw.choice(lines)) for _ in range(40)), question="对下联：白日依山尽"
    )
    found = intervals(name, items, num_resamples=200)
    values = score(name, items)
    assert found == intervals(name, items, num_resamples=200)
    assert (found == {}) == (name == "distinct")  # of a whole set; a resample would repeat answers
    for key, (low, high) in found.items():
        assert low <= values[key] + 1e-9 and values[key] <= high + 1e-9, key


def bootstrap_of_accuracy(items: list[Answered], seed: int) -> tuple[float, float]:
    rows = np.asarray(metric("accuracy").count(items), float)
    return bootstrap(rows, metric("accuracy").scores, 300, seed=seed)["accuracy"]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    draw = random.Random(1)
    hits = 0
    for trial in range(100):
        items = answered(*(("好评", "好评" if draw.random() < 0.7 else "差评") for _ in range(60)))
        low, high = bootstrap_of_accuracy(items, trial)
        hits += low <= 0.7 <= high
    assert 85 <= hits <= 100
    assert bootstrap_of_accuracy(answered(("好评", "好评")) * 5, 0) == (1.0, 1.0)
    assert judge("accuracy", answered(("好评", "好评")))[1] == {}  # one answer says nothing about others
