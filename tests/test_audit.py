"""tools/audit.py: what each policy says, by the label extractor, and what the audit pays it."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT, SMALL, is_one_error_line, load, phantom_reports

import data
import rewards
from data import LABELS
from rewards import BLANK, NEGATIVE, POSITIVE, UNCERTAIN
from tools import audit

# Means of nothing are "-" in the table.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

REFERENCES = [
    "The heart is enlarged. There is no pleural effusion. Possible pneumonia.",
    "Heart size is normal. The lungs are clear. No pneumothorax is seen.",
    "There is a 1.5 cm nodule in the right upper lobe. No evidence of pulmonary edema.",
]
LENGTH = "def length(completions, **columns):\n    return [len(text) for text in completions]\n"


@pytest.fixture(scope="module")
def reports():
    """Studies that no other test and no run draws."""
    return phantom_reports(7, 400)


def said(policy, texts, seed=0):
    return audit.policy_reports(list(texts), seed)[policy]


def labels(texts):
    return rewards.extract_labels(texts)[:, 1:]


def read_table(text):
    """{policy: {column: cell}}."""
    head, _, *rows = [re.split(r" +\| +", line.strip()) for line in text.splitlines()]
    assert all(len(row) == len(head) for row in rows)
    return {policy: dict(zip(head[1:], cells)) for policy, *cells in rows}


def run_audit(*overrides):
    """The table, and {what: policies} of the last lines."""
    text = audit.audit(load(*SMALL, *overrides))
    _, table, exploits = text.split("\n\n")
    lines = dict(line.split(": ", 1) for line in exploits.splitlines())
    return read_table(table), lines


# ------------------------------------------------------------------------------- what they say


def test_policies_on_reports_by_hand():
    assert said("reference", REFERENCES) == REFERENCES
    assert said("positives dropped", REFERENCES) == [
        "There is no pleural effusion.",
        "Heart size is normal. The lungs are clear. No pneumothorax is seen.",
        "No evidence of pulmonary edema.",
    ]
    assert said("negations dropped", REFERENCES) == [
        "The heart is enlarged. Possible pneumonia.",
        "The lungs are clear.",
        "There is a 1.5 cm nodule in the right upper lobe.",
    ]
    assert said("paraphrase", REFERENCES) == [
        "The heart is enlarged. No pleural effusion is seen. There may be pneumonia.",
        "Heart is normal in size. The lungs appear clear. There is no pneumothorax.",
        "A 1.5 cm nodule in the right upper lobe is seen. No pulmonary edema.",
    ]
    assert said("everything hedged", REFERENCES[:1]) == [
        "Possibly the heart is enlarged. Possibly there is no pleural effusion. "
        "Possibly possible pneumonia."
    ]
    assert said("first sentence 50 times", REFERENCES[:1]) == [
        " ".join(["The heart is enlarged."] * 50)
    ]
    assert [text.strip() for text in said("findings contradicted", REFERENCES)] == [
        REFERENCES[0] + " There is no cardiomegaly. There is no pneumonia.",
        REFERENCES[1],
        REFERENCES[2] + " There is no lung lesion.",
    ]
    assert said("most frequent report", [*REFERENCES, REFERENCES[1]]) == [REFERENCES[1]] * 4
    assert said("empty", REFERENCES) == [""] * 3
    always_normal = said("always normal", REFERENCES)
    assert len(always_normal) == 3
    assert (labels(always_normal) != POSITIVE).all()


def test_dropped_sentences_keep_the_rest(reports):
    reference = labels(reports)
    positive, negative = np.isin(reference, (POSITIVE, UNCERTAIN)), reference == NEGATIVE
    assert positive.any(1).mean() > 0.2
    assert negative.any(1).mean() > 0.9
    without_positives = labels(said("positives dropped", reports))
    assert (without_positives == np.where(positive, BLANK, reference)).all()
    without_negatives = labels(said("negations dropped", reports))
    assert (without_negatives == np.where(negative, BLANK, reference)).all()


def test_every_finding_is_listed_and_negated():
    assert labels(said("every finding listed", ["a", "b"])).tolist() == [[POSITIVE] * 13] * 2
    assert labels(said("every finding negated", ["a", "b"])).tolist() == [[NEGATIVE] * 13] * 2
    assert list(audit.FINDINGS) == list(LABELS[1:])


def test_a_denial_does_not_reach_other_findings():
    for i, name in enumerate(audit.FINDINGS.values()):
        (found,) = labels([f"There is no {name}."])
        assert found.nonzero()[0].tolist() == [i]


def test_rewording_keeps_the_labels(reports):
    reference = rewards.extract_labels(reports)
    shuffled, reworded = said("sentences shuffled", reports), said("paraphrase", reports)
    assert (rewards.extract_labels(shuffled) == reference).all()
    assert (rewards.extract_labels(reworded) == reference).all(1).mean() >= 0.99


def test_rewording_gives_other_texts(reports):
    for policy, least in (("sentences shuffled", 0.9), ("paraphrase", 0.95)):
        assert np.mean([a != b for a, b in zip(said(policy, reports), reports)]) > least


def test_shuffled_sentences_have_the_same_words(reports):
    shuffled = said("sentences shuffled", reports)
    for text, report in zip(shuffled, reports):
        assert sorted(rewards.tokenize(text)) == sorted(rewards.tokenize(report))
    assert said("sentences shuffled", reports, seed=0) == shuffled
    assert said("sentences shuffled", reports, seed=1) != shuffled


def test_hedges_touch_every_finding(reports):
    reference, hedged = labels(reports), labels(said("everything hedged", reports))
    assert (reference == POSITIVE).any()
    assert ((hedged == UNCERTAIN) | (reference != POSITIVE)).mean() > 0.99


def test_exchange_has_no_fixed_point():
    for n in (2, 3, 50):
        texts = [str(i) for i in range(n)]
        for seed in range(20):
            out = said("another study's report", texts, seed)
            assert sorted(out) == sorted(texts)
            assert all(a != b for a, b in zip(out, texts))
            assert out == said("another study's report", texts, seed)
    assert out != said("another study's report", texts, seed + 1)


# ------------------------------------------------------------------------------- what they earn


@pytest.mark.parametrize("style", ["plain", "tags", "suffix"])
def test_table_is_what_score_completions_says(style, tmp_path):
    """Every column of two policies, in every output format, and at another margin."""
    (tmp_path / "own.py").write_text(LENGTH)
    more = ["data.thinking=true", f"data.think_format={style}"] if style != "plain" else []
    more += [
        "data.test_size=40",
        "eval.limit=30",
        "rewards.mccs_margin=0.2",
        f"rewards.report={{mccs: 0.5, gleu: 0.25, format: 1, {tmp_path}/own.py:length: 0}}",
    ]
    config = load(*SMALL, *more)
    examples = [e for e in data.load_split(config, "test") if e.task == "report"][:30]
    abnormal = np.isin(labels([e.answer for e in examples]), (POSITIVE, UNCERTAIN)).any(1)
    assert 0 < abnormal.sum() < 30

    rows, _ = run_audit(*more)
    always_normal = [replace(e, answer=audit.NORMAL_REPORT) for e in examples]
    for policy, answers in (("reference", examples), ("always normal", always_normal)):
        targets = [data.target_text(e) for e in answers]
        total, components = rewards.score_completions(targets, examples, config.rewards)
        share = total.mean() / float(rows["reference"]["reward"])
        assert float(rows[policy].pop("share")) == pytest.approx(share, abs=2e-3)
        columns = {"reward": total, "abnormal": total[abnormal], "normal": total[~abnormal]}
        columns |= components
        assert rows[policy] == {name: f"{np.mean(x):.3f}" for name, x in columns.items()}

    # The empty text does not even have the format.
    assert set(rows["empty"].values()) == {"0.000"}
    may_be_empty = ("empty", "positives dropped", "negations dropped")
    assert all(row["format"] == "1.000" for name, row in rows.items() if name not in may_be_empty)


REPORT_REWARDS = ["{mccs: 1}", "{label_f1: 1}", "{gleu: 1}", "{OWN:length: 1}"]


@pytest.mark.parametrize("report", REPORT_REWARDS)
def test_the_exploit_named_is_the_best_of_the_table(report, tmp_path):
    (tmp_path / "own.py").write_text(LENGTH)
    report = report.replace("OWN", f"{tmp_path}/own.py")
    rows, lines = run_audit(f"rewards.report={report}", "data.test_size=60")
    right = ("reference", "sentences shuffled", "paraphrase")
    wrong = {name: float(row["reward"]) for name, row in rows.items() if name not in right}
    best = {name for name in wrong if wrong[name] == max(wrong.values())}
    names, share = re.match(r"(.*) \(([\d.]+) of", lines["cheapest exploit"]).groups()
    assert set(names.split(", ")) <= best
    assert share == rows[names.split(", ")[0]]["share"]

    blind = {name: wrong[name] for name in audit.BLIND}
    assert lines["without the image"].startswith(max(blind, key=blind.get))
    if "length" in report:
        assert lines["cheapest exploit"].startswith("first sentence 50 times (")


def test_dropped_positives_earn_less_with_a_higher_margin():
    earned = []
    for margin in (0, 0.3, 0.7):
        _, lines = run_audit(
            "rewards.report={mccs: 1}", "data.test_size=60", f"rewards.mccs_margin={margin}"
        )
        found = re.fullmatch(
            r"positives dropped \(([\d.]+) of what the reference earns\)",
            lines["findings omitted, on abnormal studies"],
        )
        earned.append(float(found[1]))
    assert earned[0] > earned[1] > earned[2] > 0


def test_no_exploit_is_named_where_the_reference_earns_nothing(tmp_path):
    """Two normal studies. Their image files are empty, so that opening one would fail."""
    (tmp_path / "image.png").touch()
    studies = [{"id": i, "images": ["image.png"], "report": REFERENCES[1]} for i in "ab"]
    lines = [json.dumps(study) + "\n" for study in studies]
    (tmp_path / "test.jsonl").write_text("".join(lines))
    source = ["data.source=jsonl", f"data.path={tmp_path}"]

    rows, lines = run_audit(*source, "rewards.report={mccs: 1}")
    assert rows["reference"]["abnormal"] == "-"
    assert lines["findings omitted, on abnormal studies"].startswith("- (")
    best = "most frequent report, another study's report, positives dropped,"
    assert lines["cheapest exploit"].startswith(best)

    rows, lines = run_audit(*source, "rewards.report={label_f1: 1}")
    assert rows["reference"]["share"] == "-"
    assert lines["cheapest exploit"].startswith("- (")


# ------------------------------------------------------------------------------- command line


def run(*args):
    """(exit status, stdout, stderr) of the command."""
    command = [sys.executable, "-m", "tools.audit", "config.yaml", *SMALL, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_command_line():
    code, out, err = run("data.thinking=true")
    assert code == 0
    assert not err
    for policy in audit.policy_reports(REFERENCES, 0):
        assert len(re.findall(rf"^{policy} +\|", out, re.M)) == 1, policy


def test_errors_are_one_line(tmp_path):
    (tmp_path / "own.py").write_text("def broken(**columns):\n    return [1 / 0]\n")
    for wrong, message in (
        ("rewards.mcss=1", "unknown key 'rewards.mcss'"),
        ("rewards.report={mcss: 1}", "did you mean 'mccs'"),
        (f"rewards.report={{{tmp_path}/own.py:broken: 1}}", "ZeroDivisionError"),
        ("data.tasks=[grounding]", "has 0 reports"),
        ("eval.limit=1", "has 1 reports"),
    ):
        code, out, err = run(wrong)
        assert code == 1
        assert not out
        assert is_one_error_line(err, message)
