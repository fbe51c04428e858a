"""Metrics: known values, and the cases in which a careless version goes wrong."""

from __future__ import annotations

import pytest
import sacrebleu

from firefly.data.tasks import load_tasks
from firefly.errors import InputError
from firefly.evaluate.metrics import METRICS, Answered, score

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


def test_couplets_and_poems_are_averaged_and_come_first() -> None:
    lines = answered(("黄河入海流", "黄河入海流"), ("黄河入海流", "白云出"), question="对下联：白日依山尽")
    values = score("couplet", lines)
    assert next(iter(values)) == "well_formed"
    assert (values["well_formed"], values["no_shared_character"]) == (0.5, 0.5)
    quatrain = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
    values = score("poem", answered((quatrain, quatrain), (quatrain, "床前明月光。")))
    assert (values["well_formed"], values["equal_lengths"]) == (0.5, 1.0)


def test_couplets_whose_given_line_is_lost_are_not_judged() -> None:
    assert "well_formed" not in score("couplet", answered(("黄河入海流", "黄河入海流")))


def test_an_unknown_metric_names_the_choices() -> None:
    with pytest.raises(InputError, match="did you mean 'chrf'"):
        score("chrff", answered(("a", "b")))
