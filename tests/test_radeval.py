"""Scores of the package radeval: as rewards, and as columns of the evaluation.

Its BLEU and ROUGE need no weights and run for real. `.ci/run` installs it without its dependencies:
pip install --no-deps radeval==2.2.1
"""

import importlib
import sys

import numpy as np
import pytest
from helpers import (
    LEARNING,
    ROOT,
    example,
    is_one_error_line,
    load,
    metrics,
    phantom_reports,
    random_texts,
    run_script,
)

import rewards
from rewards import check_rewards, library_score, score_completions
from runtime.config import InputError, load_config

pytest.importorskip("radeval", reason="pip install --no-deps radeval==2.2.1")

WORDS = ["no", "pleural", "effusion", "pneumothorax", "the", "heart", "is", "enlarged", "."]


def pairs(seed, n=50):
    texts = [text or "heart" for text in random_texts(n, seed, 30, WORDS)]
    references = [text or "heart" for text in random_texts(n, seed + 1, 30, WORDS)]
    return texts, references


# ------------------------------------------------------------------------------- scores


def test_a_score_is_the_library_s_own():
    from radeval import RadEval  # noqa: PLC0415

    texts, references = pairs(0)
    wanted = RadEval(metrics=["bleu"], per_sample=True, show_progress=False)(references, texts)
    assert library_score("radeval:bleu")(texts, references) == wanted["bleu"]


def test_a_key_chooses_one_of_several_numbers():
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    texts, references = pairs(2)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    wanted = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(texts, references)]
    assert library_score("radeval:rouge:rougeL")(texts, references) == wanted


def test_our_corpus_bleu_is_the_library_s_on_the_same_tokens():
    from radeval import RadEval  # noqa: PLC0415

    import eval as evaluation  # noqa: PLC0415

    references = phantom_reports(0, 40)
    texts = phantom_reports(1, 40)
    tokens = [[" ".join(rewards.tokenize(t)) for t in side] for side in (texts, references)]
    theirs = RadEval(metrics=["bleu"], show_progress=False)(tokens[1], tokens[0])["bleu"]
    ours = evaluation.bleu_scores(texts, references, np.ones((1, 40)))[3][0]
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_an_answer_without_text_has_a_score():
    (score,) = library_score("radeval:rouge:rougeL")(["  "], ["heart"])
    assert score == 0


def test_references_are_not_taken_for_earlier_ones(monkeypatch):
    """RadCliQ keeps what it computes of references, and knows them again by id(references)."""
    from scorers.radeval import radeval_score  # noqa: PLC0415

    def make_reward_fn(metric, reference_column):
        known = []

        def function(texts, reference):
            if known[:1] != [id(reference)]:
                known[:] = [id(reference), float(len(reference[0]))]
            return [known[1]] * len(texts)

        return function

    radeval_score.cache_clear()
    monkeypatch.setattr("radeval.rewards.make_reward_fn", make_reward_fn)
    cfg = load("rewards.report={radeval:mine: 1}").rewards
    for length in range(1, 30):
        references = [example(answer="b" * length)] * 2
        total, _ = score_completions(["a", "a"], references, cfg)
        assert list(total) == [length, length]
    radeval_score.cache_clear()


def test_its_former_name_can_be_imported():
    """As its RadGraph does, which then fails where names of files have capitals."""
    library_score("radeval:bleu")
    assert importlib.import_module("RadEval.metrics._registry").get_metric_class("bleu")


# ------------------------------------------------------------------------------- rewards


def test_a_weighted_reward_is_the_score_of_the_answers():
    texts, references = pairs(4, 8)
    examples = [example(answer=reference) for reference in references]
    cfg = load("rewards.report={radeval:bleu: -2}").rewards
    total, components = score_completions(texts, examples, cfg)
    wanted = library_score("radeval:bleu")(texts, references)
    assert np.allclose(components["radeval:bleu"], wanted)
    assert np.allclose(total, -2 * np.array(wanted))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("radeval:rouge", "multiple per-sample keys.*radeval:NAME:KEY"),
        ("radeval:rouge:rouge9", "rouge9.*not in per-sample output keys.*rougeL"),
        ("radeval:blue", "Unknown metric 'blue'.*bleu"),
    ],
)
def test_a_wrong_name_or_key_is_one_line_before_the_training(name, message):
    with pytest.raises(InputError, match=message):
        check_rewards(load(f"rewards.report={{{name}: 1}}").rewards)


def test_where_it_is_not_installed_the_line_says_how(monkeypatch):
    from scorers.radeval import radeval_score  # noqa: PLC0415

    radeval_score.cache_clear()
    monkeypatch.setitem(sys.modules, "radeval.rewards", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-radeval\.txt"):
        check_rewards(load("rewards.report={radeval:bleu: 1}").rewards)


@pytest.mark.parametrize("kind", [OSError, Exception])
def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch, kind):
    """RadGraph raises a bare Exception."""
    from scorers.radeval import radeval_score  # noqa: PLC0415

    def no_network(*args):
        raise kind("cannot reach the hub")

    radeval_score.cache_clear()
    monkeypatch.setattr("radeval.rewards.make_reward_fn", no_network)
    with pytest.raises(InputError, match=r"radeval:radcliq cannot be loaded.*~/\.cache"):
        check_rewards(load("rewards.report={radeval:radcliq: -1}").rewards)


def test_boxes_have_no_such_reward():
    with pytest.raises(InputError, match=r"rewards.grounding.radeval:bleu: no such reward"):
        check_rewards(load("rewards.grounding={radeval:bleu: 1}").rewards)


def test_the_recipe_has_the_reward_of_the_paper():
    config = load_config(ROOT / "configs" / "radvlm_grpo_report.yaml")
    assert config.rewards.report == {"radeval:radcliq": -1}


# ------------------------------------------------------------------------------- a run


def test_a_run_with_a_wrong_name_prints_one_line(tmp_path):
    table = "rewards.report={radeval:blue: 1}"
    status, _, err = run_script("train_grpo.py", *LEARNING, table, f"out={tmp_path}")
    assert status == 1
    assert is_one_error_line(err, "radeval:blue")


def test_a_run_with_it_as_reward_and_as_column(tmp_path):
    status, out, err = run_script(
        "train_grpo.py",
        *LEARNING,
        "grpo.init=base",
        "grpo.steps=2",
        "data.tasks=[report]",
        "rewards.report={radeval:bleu: 1}",
        "eval.radeval=[bleu, rouge:rougeL]",
        f"out={tmp_path}",
    )
    assert status == 0, err
    rows = metrics(tmp_path / "grpo")
    assert all(row["rewards/radeval:bleu/mean"] == pytest.approx(row["reward"]) for row in rows)
    assert any(row["reward_std"] > 0 for row in rows)
    assert "rouge:rougeL" in out
