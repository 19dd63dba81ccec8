"""rewards.py against worked values, brute force, nltk, rouge-score and scipy."""

import itertools
import math
import random
import re
import string
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import NASTY, ROOT, example, phantom_reports, random_boxes, random_texts
from nltk.translate import bleu_score, gleu_score
from rouge_score.rouge_scorer import RougeScorer
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import f1_score

import data
import rewards
from data import LABELS
from rewards import BLANK, NEGATIVE, POSITIVE, UNCERTAIN
from runtime.config import InputError, RewardsConfig
from runtime.output import WARNED
from tools.label import evidence, label_file

WORDS = ["the", "heart", "is", "normal", "no", "effusion", "or", "edema", ",", ".", "small", "left"]


def states(text):
    """{label: state} without blanks."""
    (found,) = rewards.extract_labels([text]).tolist()
    return {label: state for label, state in zip(LABELS, found) if state != BLANK}


def row(**labels):
    """A (1, 14) label array; Pleural_Effusion=POSITIVE."""
    out = np.zeros((1, 14), np.int8)
    for label, state in labels.items():
        out[0, LABELS.index(label.replace("_", " "))] = state
    return out


# ------------------------------------------------------------------------------- label extractor


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Small left pleural effusion.", {"Pleural Effusion": POSITIVE}),
        (
            "No pleural effusion, consolidation, or pneumothorax.",
            {
                "No Finding": POSITIVE,
                "Pleural Effusion": NEGATIVE,
                "Consolidation": NEGATIVE,
                "Pneumothorax": NEGATIVE,
            },
        ),
        ("Pneumothorax is not seen.", {"No Finding": POSITIVE, "Pneumothorax": NEGATIVE}),
        ("Possible right pneumonia.", {"Pneumonia": UNCERTAIN}),
        ("A small pneumothorax cannot be excluded.", {"Pneumothorax": UNCERTAIN}),
        (
            "Opacity in the right base, which may reflect atelectasis.",
            {"Lung Opacity": POSITIVE, "Atelectasis": UNCERTAIN},
        ),
        (
            "No pneumothorax, but there is mild edema.",
            {"Pneumothorax": NEGATIVE, "Edema": POSITIVE},
        ),
        (
            "No effusion and stable cardiomegaly.",
            {"Pleural Effusion": NEGATIVE, "Cardiomegaly": POSITIVE},
        ),
        (
            "No focal opacity to suggest pneumonia.",
            {"No Finding": POSITIVE, "Lung Opacity": NEGATIVE, "Pneumonia": NEGATIVE},
        ),
        ("No change in the left effusion.", {"Pleural Effusion": POSITIVE}),
        ("The heart size is normal.", {"No Finding": POSITIVE, "Cardiomegaly": NEGATIVE}),
        ("The heart is mildly enlarged.", {"Cardiomegaly": POSITIVE}),
        (
            "The cardiomediastinal silhouette is within normal limits.",
            {
                "No Finding": POSITIVE,
                "Enlarged Cardiomediastinum": NEGATIVE,
                "Cardiomegaly": NEGATIVE,
            },
        ),
        ("The mediastinum is widened.", {"Enlarged Cardiomediastinum": POSITIVE}),
        (
            "There is no mediastinal widening.",
            {"No Finding": POSITIVE, "Enlarged Cardiomediastinum": NEGATIVE},
        ),
        ("The lungs are clear.", {"No Finding": POSITIVE}),
        (
            "Right PICC with its tip in the SVC. Lungs clear.",
            {"No Finding": POSITIVE, "Support Devices": POSITIVE},
        ),
        ("No XXXX for edema on this film.", {"No Finding": POSITIVE, "Edema": NEGATIVE}),
        ("The cardiomediastinal silhouette is stable.", {"Enlarged Cardiomediastinum": UNCERTAIN}),
        ("Normal and stable heart size.", {"No Finding": POSITIVE, "Cardiomegaly": NEGATIVE}),
        ("Left ___-A-___ in place.", {"No Finding": POSITIVE, "Support Devices": POSITIVE}),
        ("Platelike atelectasis and endplate spurs.", {"Atelectasis": POSITIVE}),
        ("Old rib fracture is noted.", {"Fracture": POSITIVE}),
        ("No acute bony abnormality.", {"No Finding": POSITIVE}),
        ("Evaluation for small pneumothorax is limited.", {"No Finding": POSITIVE}),
        ("Lungs are clear. Pericardial effusion.", {"No Finding": POSITIVE}),
        ("Scattered calcified granulomas.", {}),
        ("The effusion has resolved.", {"No Finding": POSITIVE, "Pleural Effusion": NEGATIVE}),
        (
            "Interval removal of the feeding tube.",
            {"No Finding": POSITIVE, "Support Devices": NEGATIVE},
        ),
        ("No new opacity.", {"No Finding": POSITIVE, "Lung Opacity": NEGATIVE}),
        ("No doubt there is edema.", {"Edema": POSITIVE}),
        ("The heart is not of normal size.", {"Cardiomegaly": POSITIVE}),
        (
            "Lungs free from effusion. Edema: absent.",
            {"No Finding": POSITIVE, "Pleural Effusion": NEGATIVE, "Edema": NEGATIVE},
        ),
        ("Scarring at both apices.", {"Lung Opacity": POSITIVE}),
        ("Surgical clips in the upper abdomen.", {"No Finding": POSITIVE}),
        ("Without acute process, moderate effusion.", {"Pleural Effusion": POSITIVE}),
        ("INDICATION: Rule out pneumonia.\n\nFINDINGS: Mild edema.", {"Edema": POSITIVE}),
        (
            "HISTORY: CHF. FINDINGS: No edema. IMPRESSION: Fracture.",
            {"Edema": NEGATIVE, "Fracture": POSITIVE},
        ),
        ("Bibasilar air-\nspace disease.", {"Lung Opacity": POSITIVE}),
        ("No air\u2011space disease.", {"No Finding": POSITIVE, "Lung Opacity": NEGATIVE}),
        (
            "No effusion on the right. Small effusion on the left. Possible effusion.",
            {"Pleural Effusion": POSITIVE},
        ),
        ("No edema. Possible edema.", {"Edema": UNCERTAIN}),
        ("", {}),
        (" \n\t", {}),
        ("...", {}),
    ],
)
def test_the_extractor_reads_the_states_of_a_text(text, expected):
    assert states(text) == expected


def rewritten(text, rng):
    """The report as another system would store it: {how: text}."""
    sentences = re.findall(r"[^.]+[.]", text)
    shuffled = rng.sample(sentences, len(sentences))
    numbered = [f"{i}. {s.strip()}" for i, s in enumerate(sentences, 1)]
    wrapped = [rng.choice([" ", "\n", " \n ", "  "]) if c == " " else c for c in text]
    return {
        "upper": text.upper(),
        "lower": text.lower(),
        "lines": text.replace(" ", "\n"),
        "spaces": text.replace(" ", "  \t"),
        "wrapped": "".join(wrapped),
        "numbers": "\n".join(numbered),
        "bullets": "- " + text.replace(". ", ".\n- "),
        "header": "EXAM: CHEST TWO VIEWS.\n\nFINDINGS:\n" + text,
        "impression": "IMPRESSION: " + text,
        "dots": text.replace(".", ".."),
        "masked": text + " Discussed with Dr. XXXX by phone on ___.",
        "order": "".join(shuffled),
        "cut": text.rstrip(". "),
    }


def test_labels_do_not_depend_on_layout():
    """Case, lines, spaces, list numbers, headers, masked names and the order of sentences."""
    rng = random.Random(5)
    reports = [report.replace("Impression: ", "") for report in phantom_reports(3, 300)]
    expected = rewards.extract_labels(reports)
    assert (expected == POSITIVE).any(0).all()
    assert (expected[:, 1:] == NEGATIVE).any()
    assert (expected == UNCERTAIN).any()
    versions = [rewritten(report, rng) for report in reports]
    for how in versions[0]:
        texts = [version[how] for version in versions]
        changed = (rewards.extract_labels(texts) != expected).any(1)
        assert not changed.any(), (how, texts[changed.argmax()])


def test_mentions_have_phrase_cue_and_clause():
    text = "No pleural effusion, but possible mild edema. Heart is enlarged."
    found = rewards.find_mentions(text)
    assert [(LABELS[label], state, phrase, cue) for label, state, phrase, cue, _ in found] == [
        ("Pleural Effusion", NEGATIVE, "effusion", "no"),
        ("Edema", UNCERTAIN, "edema", "possib"),
        ("Cardiomegaly", POSITIVE, "heart", "enlarge"),
    ]
    assert found[1][-1].strip() == "possible mild edema"


@pytest.mark.parametrize(
    "clause, expected",
    [
        ("no focal opacity to suggest pneumonia", (NEGATIVE, "no")),
        ("a pneumothorax cannot be excluded", (UNCERTAIN, "cannot be excluded")),
        ("no change in the left effusion", (POSITIVE, "")),
    ],
)
def test_worked_clauses_have_the_states_of_the_docstring(clause, expected):
    """Those of its docstring."""
    *_, (_, state, phrase, cue, _) = rewards.find_mentions(clause)
    assert (state, cue) == expected
    doc = " ".join(rewards.assertion_of.__doc__.split())
    name = {NEGATIVE: "NEGATIVE", UNCERTAIN: "UNCERTAIN", POSITIVE: "POSITIVE"}[state]
    assert re.search(rf'"{clause}" {phrase}\w*: \({name}, "{cue}"\)', doc)


def test_label_file_is_in_chexperts_format(tmp_path):
    path, out = tmp_path / "reports.csv", tmp_path / "labels.csv"
    path.write_text('Small effusion.\n"No edema,\n\npossible pneumonia."\n')
    reports = label_file(path, out)
    assert reports == ["Small effusion.", "No edema,\n\npossible pneumonia."]
    header, first, second = out.read_text().split("\n", 2)
    assert header == "Reports," + ",".join(LABELS)
    assert first == "Small effusion." + "," * 11 + "1.0,,,"
    assert second == '"No edema,\n\npossible pneumonia."' + "," * 6 + "0.0,,-1.0" + "," * 6 + "\n"
    assert "2 | Edema | negative | edema <- no | no edema," in evidence(reports)


def test_label_file_takes_a_header(tmp_path):
    path = tmp_path / "reports.csv"
    path.write_text("Report Impression\nNo edema.\n")
    assert label_file(path, tmp_path / "labels.csv") == ["No edema."]


def test_label_file_names_what_is_wrong(tmp_path):
    path, out = tmp_path / "reports.csv", tmp_path / "labels.csv"
    path.write_text("Reports\nNo edema, no effusion.\n")
    with pytest.raises(InputError, match="report 1 has 2 cells"):
        label_file(path, out)
    with pytest.raises(InputError, match=r"absent\.csv"):
        label_file(tmp_path / "absent.csv", out)


def test_the_command_that_labels_a_file(tmp_path):
    (tmp_path / "reports.csv").write_text("Mild edema.\n")
    args = [str(tmp_path / "reports.csv"), "-o", str(tmp_path / "labels.csv"), "--evidence"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.label", *args], cwd=ROOT, capture_output=True, text=True
    )
    first, last = done.stdout.splitlines()
    assert first == "1 | Edema | positive | edema | mild edema"
    assert last == f"{tmp_path / 'labels.csv'}: labels of 1 reports"


def test_a_label_file_that_cannot_be_written_leaves_nothing(tmp_path):
    path = tmp_path / "reports.csv"
    path.write_text("No edema.\n")
    folder = tmp_path / "labels.csv"
    folder.mkdir()
    for out in (folder, path / "labels.csv"):
        with pytest.raises(InputError, match=r"labels\.csv: cannot write"):
            label_file(path, out)
    assert sorted(tmp_path.iterdir()) == [folder, path]


def test_rewards_names_its_tools():
    done = subprocess.run(
        [sys.executable, "rewards.py", "label"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "python -m tools.audit config.yaml" in done.stderr
    assert "python -m tools.label" in done.stderr


def test_labels_are_small_integers_and_do_not_depend_on_case():
    assert rewards.extract_labels([]).shape == (0, 14)
    upper, lower = out = rewards.extract_labels(["EDEMA.", "edema"])
    assert out.dtype == np.int8
    assert (upper == lower).all()


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_any_output_is_fast_and_safe(text):
    pair = [(0, 0, 1, 1), (0.2, 0.2, 0.3, 0.3)]
    start = time.process_time()
    for style in ("plain", "tags", "suffix"):
        report = example(answer="Mild edema.", style=style)
        boxes = example("grounding", boxes=pair, style=style)
        texts = [text, "</think>" + text, text]
        total, _ = rewards.score_completions(texts, [report, report, boxes], EVERYTHING)
        assert np.isfinite(total).all()
    assert time.process_time() - start < 10


# ------------------------------------------------------------------------------- label rewards

N3 = dict(Edema=NEGATIVE, Pneumothorax=NEGATIVE, Pleural_Effusion=NEGATIVE)
P1N2 = dict(Edema=POSITIVE, Pneumothorax=NEGATIVE, Pleural_Effusion=NEGATIVE)


@pytest.mark.parametrize(
    "generated, reference, m05, m03",
    [
        (P1N2, P1N2, 1, 1),
        (N3, N3 | dict(Fracture=NEGATIVE, Consolidation=NEGATIVE), 0.549, 0.678),
        (N3, P1N2, 0, 0.048),
        (dict(Pneumothorax=NEGATIVE, Pleural_Effusion=NEGATIVE), P1N2, 0.633, 0.738),
        (
            dict(Edema=POSITIVE, Fracture=POSITIVE, Pneumonia=UNCERTAIN),
            dict(Edema=POSITIVE),
            0.155,
            0.396,
        ),
        (dict(Edema=UNCERTAIN), dict(Edema=POSITIVE), 1, 1),
        (dict(No_Finding=POSITIVE), dict(No_Finding=POSITIVE), 1, 1),
        ({}, dict(No_Finding=POSITIVE), 1, 1),
        (dict(No_Finding=POSITIVE), N3, 0, 0),
    ],
)
def test_mccs_has_the_worked_values(generated, reference, m05, m03):
    for margin, expected in ((0.5, m05), (0.3, m03)):
        score = rewards.mccs(row(**generated), row(**reference), margin)[0]
        assert score == pytest.approx(expected, abs=6e-4)


def values_by_hand(labels):
    """-1, 0 or 1 for each of the 13 observations."""
    value = {BLANK: 0, POSITIVE: 1, NEGATIVE: -1, UNCERTAIN: 1}
    return [value[int(state)] for state in labels[1:]]


def mccs_by_hand(x, y, margin):
    if not any(x) or not any(y):
        return float(not any(x) and not any(y))
    norms = math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
    cosine = sum(p * q for p, q in zip(x, y)) / norms
    return max((cosine - margin) / (1 - margin), 0)


def test_mccs_and_label_f1_equal_plain_loops():
    rng = np.random.default_rng(0)
    a, b = rng.choice(4, (2, 500, 14), p=[0.7, 0.1, 0.1, 0.1]).astype(np.int8)
    a[:100, 1:] = 0
    b[50:150, 1:] = 0
    scores, f1 = rewards.mccs(a, b, 0.4), rewards.label_f1(a, b)
    for i in range(500):
        x, y = values_by_hand(a[i]), values_by_hand(b[i])
        assert scores[i] == pytest.approx(mccs_by_hand(x, y, 0.4))
        found, true = np.equal(x, 1), np.equal(y, 1)
        assert f1[i] == pytest.approx(f1_score(true, found, zero_division=0))


# ------------------------------------------------------------------------------- text overlap

PAIRS = [
    *zip(random_texts(500, 0, 24, WORDS), random_texts(500, 1, 24, WORDS)),
    ("", ""),
    ("", "a"),
    ("a", ""),
    ("a b c d e", "a b c d e"),
]


def test_tokens_are_words_and_single_marks():
    assert rewards.tokenize("No PTX, 1.5 cm.") == ["no", "ptx", ",", "1", ".", "5", "cm", "."]


def test_text_rewards_equal_those_of_nltk_and_rouge_score():
    smooth = bleu_score.SmoothingFunction().method2
    rouge = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=rewards.tokenize))
    for a, b in PAIRS:
        x, y = rewards.tokenize(a), rewards.tokenize(b)
        assert rewards.gleu(a, b) == pytest.approx(gleu_score.sentence_gleu([y], x))
        assert rewards.bleu4(a, b) == pytest.approx(
            bleu_score.sentence_bleu([y], x, smoothing_function=smooth)
        )
        assert rewards.rouge_l(a, b) == pytest.approx(rouge.score(b, a)["rougeL"].fmeasure)


# ------------------------------------------------------------------------------- output format


@pytest.mark.parametrize(
    "style, task, text, expected",
    [
        ("plain", "report", " Clear lungs. ", (True, "", "Clear lungs.")),
        ("plain", "report", "  ", (False, "", "")),
        ("plain", "report", "a </think> b", (False, "", "a </think> b")),
        ("suffix", "report", "seen</think> b", (True, "seen", "b")),
        ("suffix", "report", "no end", (False, "no end", "")),
        ("suffix", "report", "a</think> ", (False, "a", "")),
        ("suffix", "report", "a</think>b</think>c", (False, "a</think>b", "c")),
        ("tags", "report", "<think>a</think>\n<report>b</report>\n", (True, "a", "b")),
        (
            "tags",
            "grounding",
            "<think>a</think><answer>[0, 0, 1, 1]</answer>",
            (True, "a", "[0, 0, 1, 1]"),
        ),
        ("tags", "grounding", "<think>a</think><report>b</report>", (False, "a", "")),
        ("tags", "report", "<think>a<report>b</report>", (False, "<think>a<report>b</report>", "")),
        ("tags", "report", "<think>a</think> so <report>b</report>", (False, "a", "b")),
        ("tags", "report", "<think>a</think><report>b</report> bye", (False, "a", "b")),
        ("tags", "report", "a</think><report>b</report>", (False, "a", "b")),
        ("tags", "report", "<think>a</think><report>b", (False, "a", "")),
        ("tags", "report", "<think>a</think>b</report><report>", (False, "a", "")),
        (
            "tags",
            "report",
            "<think>a</think><report>b</report><report>c</report>",
            (False, "a", ""),
        ),
        (
            "tags",
            "report",
            "<report>b</report><think>a</think>",
            (False, "<report>b</report><think>a", ""),
        ),
        ("tags", "report", "<think><think>a</think><report>b</report>", (False, "<think>a", "b")),
        ("tags", "report", "<think>a</think><report> </report>", (False, "a", "")),
        ("tags", "report", "", (False, "", "")),
    ],
)
def test_an_output_has_a_format_a_trace_and_an_answer(style, task, text, expected):
    assert data.parse_output(text, task, style) == expected


def test_the_tags_format_equals_a_regular_expression():
    rng = random.Random(0)
    pieces = ["a", " ", "\n", *data.TAGS[:4]]
    text = r"[^<]*[^<\s][^<]*"
    good = re.compile(rf"\s*<think>{text}</think>\s*<report>{text}</report>\s*")
    texts = ["".join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(3000)]
    orders = itertools.permutations(["<think>", "a", "</think>", "<report>", "</report>"])
    texts += ["".join(order) for order in orders]
    texts += [text.replace("<report>", "<report>b") for text in texts]
    valid = [data.parse_output(text, "report", "tags")[0] for text in texts]
    assert valid == [bool(good.fullmatch(text)) for text in texts]
    assert any(valid)


# ------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "[0.12, 0.30, 0.45, 0.61] and [.5,0 , 1,\n+1.]",
            [(0.12, 0.30, 0.45, 0.61), (0.5, 0, 1, 1)],
        ),
        ("[-1, 2, 3, 4", []),
        ("[1, 2, 3]", []),
        ("[1, 2, 3, 4, 5]", []),
        ("[a, 1, 2, 3]", []),
        ("[nan, inf, 1, 2]", []),
        ("[1, 2, [-1, 2, 3, 4]]", [(-1, 2, 3, 4)]),
        (f"[0, 0, 1, {'9' * 400}]", []),
        ("No box.", []),
    ],
)
def test_boxes_are_four_finite_numbers_in_brackets(text, expected):
    assert data.parse_boxes(text) == expected


def test_iou_equals_a_count_of_pixels():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    # A quarter of them are inverted or empty.
    for a, b in rng.integers(0, 20, (300, 2, 4)):
        in_a, in_b = [(x >= c[0]) & (x < c[2]) & (y >= c[1]) & (y < c[3]) for c in (a, b)]
        expected = (in_a & in_b).sum() / max((in_a | in_b).sum(), 1)
        assert rewards.iou(a.tolist(), b.tolist()) == pytest.approx(expected)


def test_iou_is_zero_where_areas_overflow():
    assert rewards.iou((0, 0, 1e200, 1e200), (0, 0, 1e200, 1e200)) == 0


SIZES = [*itertools.product(range(5), repeat=2), (1, 40), (40, 1), (30, 50), (50, 30), (100, 100)]


@pytest.mark.parametrize("n, m", SIZES)
def test_matched_boxes_have_the_largest_total_iou(n, m):
    rng = np.random.default_rng([1, n, m])
    for _ in range(8 if n < 5 and m < 5 else 1):
        a, b = random_boxes(rng, n), random_boxes(rng, m)
        # Ties.
        if n > 2:
            a[2] = a[1]
        pairs = rewards.match_boxes(a, b)
        assert all(rewards.iou(a[i], b[j]) == overlap > 0 for i, j, overlap in pairs)
        assert len({i for i, _, _ in pairs}) == len(pairs)
        assert len({j for _, j, _ in pairs}) == len(pairs)

        overlap = np.array([rewards.iou(p, q) for p in a for q in b]).reshape(n, m)
        total = sum(pair[2] for pair in pairs)
        assert total == pytest.approx(overlap[linear_sum_assignment(-overlap)].sum())
        if n <= m < 5:
            orders = itertools.permutations(range(m), n)
            best = max(overlap[range(n), list(order)].sum() for order in orders)
            assert total == pytest.approx(best)


@pytest.mark.parametrize(
    "predicted, reference, radvlm, pq",
    [
        ([(0, 0, 0.6, 1)], [(0, 0, 1, 1)], 0.75, 0.60),
        ([(0, 0, 0.6, 1), (2, 2, 3, 3)], [(0, 0, 1, 1)], 1.2 / 2.6, 0.40),
        # A repeated box is a false positive.
        ([(0, 0, 1, 1)] * 2, [(0, 0, 1, 1)], 2 / 3, 2 / 3),
        ([(0, 0, 1, 1)], [(0, 0, 1, 1)], 1, 1),
        ([(0, 0, 1, 1)] * 10_000, [(0, 0, 1, 1)], 2 / 10_001, 2 / 10_001),
        # Beyond MAX_MATCHED.
        ([(5, 5, 6, 6)] * 64 + [(0, 0, 1, 1)], [(0, 0, 1, 1)], 0, 0),
        ([], [(0, 0, 1, 1)], 0, 0),
        ([(0, 0, 1, 1)], [], 0, 0),
        ([], [], 0, 0),
    ],
)
def test_soft_f1_has_the_worked_values(predicted, reference, radvlm, pq):
    assert rewards.soft_f1(predicted, reference) == pytest.approx(radvlm)
    assert rewards.soft_f1(predicted, reference, mode="pq") == pytest.approx(pq)
    assert rewards.soft_f1(predicted, reference, match_empty=True) == pytest.approx(
        radvlm if predicted or reference else 1
    )


# ------------------------------------------------------------------------------- reward table


def config(report, grounding, mode="radvlm"):
    return RewardsConfig(report=report, grounding=grounding, soft_f1_mode=mode)


EVERYTHING = config(
    dict.fromkeys(rewards.APPLIES["report"], 0.5), dict.fromkeys(rewards.APPLIES["grounding"], 0.5)
)


def test_tasks_may_be_mixed_in_a_batch():
    cfg = config({"mccs": 0.75, "format": 0.25, "gleu": 0.0}, {"soft_f1": 1.0, "format": 0.5})
    examples = [
        example(answer="Mild edema.", style="tags"),
        example("grounding", boxes=[(0, 0, 1, 1)], style="tags"),
        example(answer="No edema.", style="tags"),
    ]
    completions = [
        "<think>a</think><report>Edema.</report>",
        "<think>a</think><answer>[0, 0, 0.6, 1]</answer>",
        "<report>No edema.",
    ]
    total, parts = rewards.score_completions(completions, examples, cfg)
    assert total == pytest.approx([1, 1.25, 0])
    nan = math.nan
    expected = {
        "mccs": [1, nan, 0],
        "format": [1, 1, 0],
        "gleu": [0.5, nan, 0],
        "soft_f1": [nan, 0.75, nan],
    }
    for name, values in expected.items():
        assert parts[name] == pytest.approx(values, nan_ok=True), name
    assert set(parts) == set(expected)


def test_no_reward_for_a_missing_answer():
    examples = [example(answer="Normal chest.", style="tags")]
    examples += 2 * [example("grounding", style="tags")]
    for text in ("", "thinking without end", "<think>a</think>"):
        total, _ = rewards.score_completions([text] * 3, examples, EVERYTHING)
        assert (total == 0).all()


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("No box.", 1),
        ("", 0),
        ("...", 0),
        ("[0.1, 0.2, 0.3", 0),
        ("[]", 1),
        ("```json\n[ ]\n```", 1),
        ("[[]]", 0),
        ("[0, 0, 1, 1]", 0),
    ],
)
def test_match_empty_needs_a_plain_no(answer, expected):
    cfg = config({}, {"soft_f1": 1.0})
    total, _ = rewards.score_completions([answer], [example("grounding")], cfg)
    assert total[0] == expected


@pytest.fixture(autouse=True)
def not_warned_yet():
    WARNED.clear()


def test_large_boxes_are_said_once(capsys):
    for _ in range(2):
        rewards.say_large_boxes(["[310, 450, 780, 830]"], "a step")
    assert capsys.readouterr().err.count("numbers beyond 1") == 1


@pytest.mark.parametrize(
    "text",
    [
        "[310, 450, 780, 830]",
        '[{"bbox_2d": [310, 450, 780, 830], "label": "effusion"}]',
        "(310,450),(780,830)",
        "[0.1, 0.2, 0.3, 0.4], [310, 450, 780, 830] and [1, 2, 5, 6]",
    ],
)
def test_pixels_and_thousandths_are_said(text, capsys):
    rewards.say_large_boxes(["Normal.", text], "a step")
    assert "numbers beyond 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "No box.", "[0.1, 0.2, 0.3, 0.4]", "[0, 0, 1, 1], [0, 0, 1, 1], [1, 2, 5, 6]"]
)
def test_boxes_of_the_wanted_form_are_not_said(text, capsys):
    rewards.say_large_boxes(["Normal.", text], "a step")
    assert capsys.readouterr().err == ""


def test_text_without_labels_counts_as_non_empty():
    cfg = config({"mccs": 1.0, "label_f1": 1.0}, {})
    text, reference = "Old granuloma.", example(answer="Scoliosis.")
    total, _ = rewards.score_completions([text], [reference], cfg)
    assert not rewards.extract_labels([text]).any()
    assert total[0] == 1


def test_settings_reach_the_rewards():
    cfg = config({"mccs": 1.0}, {})
    cfg.mccs_margin = 0.3
    reference = example(answer="No effusion or edema.")
    total, _ = rewards.score_completions(["No effusion."], [reference], cfg)
    assert total[0] == pytest.approx((math.sqrt(0.5) - 0.3) / 0.7)

    cfg = config({}, {"soft_f1": 1.0}, mode="pq")
    reference = example("grounding", boxes=[(0, 0, 1, 1)])
    total, _ = rewards.score_completions(["[0, 0, 0.6, 1]"], [reference], cfg)
    assert total[0] == pytest.approx(0.6)


def test_non_finite_reward_is_named(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "gleu", lambda batch, cfg: [math.nan] * len(batch))
    with pytest.raises(InputError, match=r"'gleu' gave nan, which is not finite, .* id '1'"):
        rewards.score_completions(["a"], [example(answer="a")], config({"gleu": 1.0}, {}))


def test_a_library_score_that_gives_nothing_is_named(monkeypatch):
    monkeypatch.setattr(rewards, "library_score", lambda name: lambda texts, references: [1, None])
    examples = [example(answer="a"), example(answer="b", name="second")]
    with pytest.raises(InputError, match=r"'radeval:f' gave nothing for .* id 'second'"):
        rewards.score_completions(["a", "b"], examples, config({"radeval:f": 1}, {}))


OWN = """
def length(completions, answer, reference, **columns):
    assert columns["prompts"] == columns["question"]
    assert len(columns["completion_ids"]) == len(answer)
    return [None if not ref else float(len(a) - len(ref)) for a, ref in zip(answer, reference)]

def not_finite(completions, **_):
    return [float(text) for text in completions]

def one_too_few(completions, **_):
    return [0.0] * (len(completions) - 1)
"""


@pytest.fixture
def own(tmp_path):
    """The path of a file with rewards."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_rewards_of_your_own_have_trls_signature(own):
    """None means that it does not apply."""
    name = f"{own}:length"
    cfg = config({name: 0.5, "format": 1.0}, {})
    rewards.check_rewards(cfg)
    examples = [example(answer="a"), example(answer="abc"), example()]
    total, components = rewards.score_completions(["abc", "a", "x"], examples, cfg)
    assert total == pytest.approx([2, 0, 1])
    assert components[name] == pytest.approx([2, -2, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    "function, message",
    [
        ("not_finite", "nan for completion 'nan'"),
        ("one_too_few", r"\(2,\) values for 3 completions"),
    ],
)
def test_a_reward_that_returns_nonsense_stops_the_run(own, function, message):
    cfg = config({f"{own}:{function}": 1.0}, {})
    examples = [example(answer="a")] * 3
    with pytest.raises(InputError, match=f"own.py:{function}, .*{message}") as error:
        rewards.score_completions(["1", "nan", "inf"], examples, cfg)
    assert "\n" not in str(error.value)
    assert "returns 0 or None" in str(error.value)


@pytest.mark.parametrize("text", ["Clear.", ""])
@pytest.mark.parametrize("content", ['c[0]["content"]', 'c.get("content")'])
def test_a_reward_for_chat_messages_is_told_that_completions_are_strings(tmp_path, text, content):
    path = tmp_path / "chatty.py"
    path.write_text(f"def f(completions, **_):\n    return [len({content}) for c in completions]\n")
    cfg = config({f"{path}:f": 1}, {})
    with pytest.raises(InputError, match=r"line 2: .*completions are strings, not chat messages"):
        rewards.score_completions([text], [example(answer="a")], cfg)


def test_a_reward_that_cannot_be_loaded_is_named(own, tmp_path):
    # This KeyError is not taken for a function that is not there.
    (tmp_path / "bad.py").write_text("{}['f']")
    for wrong, message in (
        (f"{tmp_path}/absent.py:f", "no file"),
        (f"{own}:f", "no function 'f'"),
        (f"{tmp_path}/bad.py:f", "fails with KeyError"),
    ):
        with pytest.raises(InputError, match=message):
            rewards.check_rewards(config({wrong: 1.0}, {}))


def test_the_example_of_a_reward_file_works():
    name = str(ROOT / "configs" / "my_rewards.py")
    cfg = config({f"{name}:says_it_once": 2.0}, {})
    texts = ["No edema. no edema. Clear.", "", "One word."]
    total, _ = rewards.score_completions(texts, [example()] * 3, cfg)
    assert total == pytest.approx([4 / 3, 0, 2])


def test_half_of_the_example_reward_of_boxes_pays_half_for_nothing():
    name = str(ROOT / "configs" / "my_rewards.py")
    cfg = config({}, {"soft_f1": 0.5, f"{name}:where_something_is": 0.5})
    box = (0.1, 0.1, 0.5, 0.5)
    asked = [example(task="grounding", boxes=boxes) for boxes in ((box,), (box,), (), ())]
    texts = ["[0.1, 0.1, 0.5, 0.5]", "It is not seen.", "It is not seen.", "[0.1, 0.1, 0.5, 0.5]"]
    total, _ = rewards.score_completions(texts, asked, cfg)
    assert total == pytest.approx([1, 0, 0.5, 0])


@pytest.mark.parametrize(
    "length, expected", [(0, 0), (10, 0), (11, -0.25), (13, -0.75), (14, -1), (1000, -1)]
)
def test_overlong_has_the_worked_values(length, expected):
    assert rewards.overlong(length, 10, 14) == expected


def test_an_unknown_reward_is_refused_with_the_nearest_name():
    rewards.check_rewards(EVERYTHING)
    for cfg, message in (
        (config({"mcss": 1}, {}), "rewards.report.mcss.*'mccs'"),
        (config({}, {"mccs": 1}), "rewards.grounding.mccs"),
        (config({"bertscore": 1}, {}), "rewards.report.bertscore"),
        (config({string.digits: 1}, {}), "did you mean"),
    ):
        with pytest.raises(InputError, match=message):
            rewards.check_rewards(cfg)


NEIGHBOURS = """import neighbour_of_mine

def f(answer, **columns):
    return [neighbour_of_mine.VALUE for _ in answer]

def g(answer, **columns):
    return [1 / 0]

def h(answer, **columns):
    return 1.0
"""


def test_a_reward_file_may_import_its_neighbours_and_errors_name_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 0.5\n")
    (tmp_path / "mine.py").write_text(NEIGHBOURS)

    def pay(name):
        cfg = RewardsConfig(report={f"{tmp_path}/mine.py:{name}": 1})
        total, _ = rewards.score_completions(["Clear."], [example(answer="Clear.")], cfg)
        return total[0]

    assert pay("f") == 0.5
    with pytest.raises(InputError, match=r"mine.py:g, line 7: ZeroDivisionError"):
        pay("g")
    with pytest.raises(
        InputError, match=r"mine.py:h, which .* ends its arguments with \*\*columns"
    ):
        pay("h")
