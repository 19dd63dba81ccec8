"""rewards.py audit: what each policy says, by the label extractor, and what the audit makes of its pay."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import data
import rewards
from conftest import ROOT, SMALL
from rewards import BLANK, LABELS, NEGATIVE, POSITIVE, UNCERTAIN

REFERENCES = [
    "The heart is enlarged. There is no pleural effusion. Possible pneumonia.",
    "Heart size is normal. The lungs are clear. No pneumothorax is seen.",
    "There is a 1.5 cm nodule in the right upper lobe. No evidence of pulmonary edema.",
]
LENGTH = "def length(completions, **columns):\n    return [len(text) for text in completions]\n"


@pytest.fixture(scope="module")
def phantom_reports():
    """Studies that no other test and no run draws."""
    return [data.phantom(7, index).report for index in range(400)]


def said(policy, texts, seed=0):
    return rewards.POLICIES[policy][1](list(texts), np.random.default_rng(seed))


def labels(texts):
    return rewards.extract_labels(texts)[:, 1:]


def audit(*overrides, config="config.yaml"):
    """(policy -> column -> cell of the first table, of the second, what follows them)."""
    text = rewards.audit(data.load_config(ROOT / config, [*SMALL, *overrides]))
    tables, lines = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(" | ")]
        if cells[0] in ("policy", "share, all / abnormal"):
            tables.append({})
            header = cells
        elif cells[0] in rewards.POLICIES:
            assert len(cells) == len(header)
            tables[-1][cells[0]] = dict(zip(header[1:], cells[1:]))
        elif ": " in line:
            lines.append(line)
    return *tables, dict(line.split(": ", 1) for line in lines)


# ---------------------------------------------------------------------------------------------------- what they say


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
        "Possibly the heart is enlarged. Possibly there is no pleural effusion. Possibly possible pneumonia."
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
    assert (labels(said("always normal", REFERENCES)) != POSITIVE).all() and len(
        said("always normal", REFERENCES)
    ) == 3


def test_dropped_sentences_keep_the_rest(phantom_reports):
    reference = labels(phantom_reports)
    positive, negative = np.isin(reference, (POSITIVE, UNCERTAIN)), reference == NEGATIVE
    assert positive.any(1).mean() > 0.2 and negative.any(1).mean() > 0.9
    assert (
        labels(said("positives dropped", phantom_reports)) == np.where(positive, BLANK, reference)
    ).all()
    assert (
        labels(said("negations dropped", phantom_reports)) == np.where(negative, BLANK, reference)
    ).all()


def test_every_finding_is_listed_and_negated():
    assert labels(said("every finding listed", ["a", "b"])).tolist() == [[POSITIVE] * 13] * 2
    assert labels(said("every finding negated", ["a", "b"])).tolist() == [[NEGATIVE] * 13] * 2
    assert list(rewards.FINDINGS) == list(LABELS[1:])
    for i, name in enumerate(
        rewards.FINDINGS.values()
    ):  # each by itself: a denial must not reach its neighbours
        assert labels([f"There is no {name}."])[0].nonzero()[0].tolist() == [i]


def test_rewording_keeps_the_labels(phantom_reports):
    reference = rewards.extract_labels(phantom_reports)
    shuffled, reworded = (
        said("sentences shuffled", phantom_reports),
        said("paraphrase", phantom_reports),
    )
    assert (rewards.extract_labels(shuffled) == reference).all()
    assert (rewards.extract_labels(reworded) == reference).all(1).mean() >= 0.99
    for texts, least in (
        (shuffled, 0.9),
        (reworded, 0.95),
    ):  # they are other texts, of the same words when shuffled
        assert np.mean([a != b for a, b in zip(texts, phantom_reports)]) > least
    assert all(
        sorted(rewards.tokenize(a)) == sorted(rewards.tokenize(b))
        for a, b in zip(shuffled, phantom_reports)
    )
    again, otherwise = (said("sentences shuffled", phantom_reports, seed) for seed in (0, 1))
    assert shuffled == again != otherwise


def test_hedges_touch_every_finding(phantom_reports):
    reference, hedged = labels(phantom_reports), labels(said("everything hedged", phantom_reports))
    assert ((hedged == UNCERTAIN) | (reference != POSITIVE)).mean() > 0.99 and (
        reference == POSITIVE
    ).any()


def test_exchange_has_no_fixed_point():
    for n in (2, 3, 50):
        texts = [str(i) for i in range(n)]
        for seed in range(20):
            out = said("another study's report", texts, seed)
            assert sorted(out) == sorted(texts) and all(a != b for a, b in zip(out, texts))
            assert out == said("another study's report", texts, seed)
    assert out != said("another study's report", texts, seed + 1)


# ---------------------------------------------------------------------------------------------------- what they earn


@pytest.mark.parametrize("style", ["plain", "tags", "suffix"])
def test_table_is_what_score_completions_says(style, tmp_path):
    """Every column of two policies, in every output format, and at a margin of one's own."""
    (tmp_path / "own.py").write_text(LENGTH)
    more = ["data.thinking=true", f"data.think_format={style}"] if style != "plain" else []
    more += [
        "data.test_size=40",
        "eval.limit=30",
        "rewards.mccs_margin=0.2",
        f"rewards.report={{mccs: 0.5, gleu: 0.25, format: 1, {tmp_path}/own.py:length: 0}}",
    ]
    config = data.load_config(ROOT / "config.yaml", [*SMALL, *more])
    examples = [e for e in data.load_split(config, "test") if e.task == "report"][:30]
    abnormal = np.isin(labels([e.answer for e in examples]), (POSITIVE, UNCERTAIN)).any(1)
    assert 0 < abnormal.sum() < 30
    rows, others, _ = audit(*more)
    cases = {
        "reference": examples,
        "always normal": [replace(e, answer=rewards.NORMAL_REPORT) for e in examples],
    }
    for name, answers in cases.items():
        targets = [data.target_text(e) for e in answers]
        total, parts = rewards.score_completions(targets, examples, config.rewards, style)
        share = total.mean() / float(rows["reference"]["reward"])
        assert float(rows[name].pop("share")) == pytest.approx(share, abs=2e-3)
        expected = {
            "reward": total,
            "abnormal": total[abnormal],
            "normal": total[~abnormal],
            **parts,
        }
        assert rows[name] == {
            column: f"{np.mean(values):.3f}" for column, values in expected.items()
        }
    assert set(rows["empty"].values()) == {
        "0.000"
    }  # its length, too: it does not even have the format
    may_be_empty = ("empty", "positives dropped", "negations dropped")
    assert all(row["format"] == "1.000" for name, row in rows.items() if name not in may_be_empty)
    for column, report, margin in (
        ("mccs", "mccs", 0.2),
        ("mccs, margin .7", "mccs", 0.7),
        ("gleu", "gleu", 0.5),
    ):
        cfg = data.RewardsConfig(report={report: 1}, mccs_margin=margin)
        total = rewards.score_completions([rewards.NORMAL_REPORT] * 30, examples, cfg, "plain")[0]
        assert (
            others["always normal"][column] == f"{total.mean():.3f} / {total[abnormal].mean():.3f}"
        )


def test_the_exploit_named_is_the_best_of_the_table(tmp_path):
    (tmp_path / "own.py").write_text(LENGTH)
    for rewards_report in (
        "{mccs: 1}",
        "{label_f1: 1}",
        "{gleu: 1}",
        f"{{{tmp_path}/own.py:length: 1}}",
    ):
        rows, others, lines = audit(f"rewards.report={rewards_report}", "data.test_size=60")
        wrong = {
            name: float(row["reward"])
            for name, row in rows.items()
            if name not in ("reference", "sentences shuffled", "paraphrase")
        }
        named = re.match(r"(.*) \(([\d.]+) of", lines["cheapest exploit"])
        assert set(named[1].split(", ")) <= {
            name for name in wrong if wrong[name] == max(wrong.values())
        }
        assert named[2] == rows[named[1].split(", ")[0]]["share"]
        blind = {
            name: wrong[name]
            for name in (
                "empty",
                "always normal",
                "most frequent report",
                "another study's report",
                "every finding listed",
                "every finding negated",
            )
        }
        assert lines["without the image"].startswith(max(blind, key=blind.get))
    assert lines["cheapest exploit"].startswith(
        "first sentence 50 times ("
    )  # of length, the last of the rewards


def test_dropped_positives_are_named_with_what_pays_them_least():
    _, others, lines = audit(
        "rewards.report={mccs: 1}", "data.test_size=60", "rewards.mccs_margin=0.3"
    )
    named = re.match(
        r"positives dropped \(([\d.]+) of what the reference earns; under (.*) ([\d.]+)\)",
        lines["findings omitted, on abnormal studies"],
    )
    abnormal = {
        column: cell.split(" / ")[1] for column, cell in others["positives dropped"].items()
    }
    assert (
        named[1] == abnormal["mccs"]
        and abnormal[named[2]] == named[3] == min(abnormal.values()) == "0.000"
    )
    assert abnormal["mccs, margin 0"] > abnormal["mccs"] > abnormal["mccs, margin .7"]


def test_no_exploit_is_named_where_the_reference_earns_nothing(tmp_path):
    """Normal studies of one's own; their image files are empty, so that opening one would fail."""
    (tmp_path / "image.png").touch()
    (tmp_path / "test.jsonl").write_text(
        "".join(
            json.dumps({"id": i, "images": ["image.png"], "report": REFERENCES[1]}) + "\n"
            for i in "ab"
        )
    )
    source = ["data.source=jsonl", f"data.path={tmp_path}"]
    rows, others, lines = audit(*source, "rewards.report={mccs: 1}")
    assert rows["reference"]["abnormal"] == "-" and others["empty"]["mccs"] == "0.000 / -"
    assert lines["findings omitted, on abnormal studies"].startswith("- (")
    assert lines["cheapest exploit"].startswith(
        "most frequent report, another study's report, positives dropped,"
    )
    rows, others, lines = audit(*source, "rewards.report={label_f1: 1}")
    assert rows["reference"]["share"] == "-" and lines["cheapest exploit"].startswith("- (")


# ---------------------------------------------------------------------------------------------------- command line


def run(*args):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "rewards.py"),
            "audit",
            str(ROOT / "config.yaml"),
            *SMALL,
            *args,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


def test_command_line(tmp_path):
    code, out, err = run("data.thinking=true")
    assert code == 0 and not err
    for name in rewards.POLICIES:
        assert len(re.findall(rf"^{name} +\|", out, re.M)) == 2, name
    (tmp_path / "own.py").write_text("def broken(**columns):\n    return [1 / 0]\n")
    for wrong, message in (
        ("rewards.mcss=1", "unknown key 'rewards.mcss'"),
        ("rewards.report={mcss: 1}", "did you mean 'mccs'"),
        (f"rewards.report={{{tmp_path}/own.py:broken: 1}}", "ZeroDivisionError"),
        ("data.tasks=[grounding]", "has 0 reports"),
        ("eval.limit=1", "has 1 reports"),
    ):
        code, out, err = run(wrong)
        assert (
            code == 1
            and not out
            and err.startswith("error: ")
            and err.count("\n") == 1
            and message in err
        )
