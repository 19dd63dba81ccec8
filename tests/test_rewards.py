"""rewards.py against worked values, brute force, nltk, rouge-score and scipy."""

import itertools
import math
import random
import re
import string
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import f1_score
from nltk.translate import bleu_score, gleu_score
from rouge_score.rouge_scorer import RougeScorer
from scipy.optimize import linear_sum_assignment

import data
import rewards
from conftest import ROOT
from rewards import BLANK, LABELS, NEGATIVE, POSITIVE, UNCERTAIN

WORDS = "the heart is normal no effusion or edema , . small left lung".split()


def states(text):
    """{label: state} without blanks."""
    return {
        label: int(s)
        for label, s in zip(LABELS, rewards.extract_labels([text])[0], strict=True)
        if s != BLANK
    }


def row(**labels):
    """A (1, 14) label array; Pleural_Effusion=POSITIVE."""
    out = np.zeros((1, 14), np.int8)
    for label, state in labels.items():
        out[0, LABELS.index(label.replace("_", " "))] = state
    return out


def random_texts(n, seed, longest=25):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(longest))) for _ in range(n)]


# ---------------------------------------------------------------------------------------------- label extractor


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
def test_extract_labels(text, expected):
    assert states(text) == expected


def rewritten(text, rng):
    """The report as another system would store it: {how: text}."""
    sentences = re.findall(r"[^.]+[.]", text)
    shuffled = rng.sample(sentences, len(sentences))
    return {
        "upper": text.upper(),
        "lower": text.lower(),
        "lines": text.replace(" ", "\n"),
        "spaces": text.replace(" ", "  \t"),
        "wrapped": "".join(c if c != " " else rng.choice([" ", "\n", " \n ", "  "]) for c in text),
        "numbers": "\n".join(f"{i}. {s.strip()}" for i, s in enumerate(sentences, 1)),
        "bullets": "- " + text.replace(". ", ".\n- "),
        "header": "EXAM: CHEST TWO VIEWS.\n\nFINDINGS:\n" + text,
        "impression": "IMPRESSION: " + text,
        "dots": text.replace(".", ".."),
        "masked": text + " Discussed with Dr. XXXX by phone on ___.",
        "order": "".join(shuffled),
        "cut": text.rstrip(". "),
    }


def test_labels_do_not_depend_on_layout():
    """Case, line breaks, spaces, list numbers, headers, masked names and the order of sentences change nothing."""
    rng = random.Random(5)
    reports = [data.phantom(3, index).report.replace("Impression: ", "") for index in range(300)]
    expected = rewards.extract_labels(reports)
    assert (
        (expected == POSITIVE).any(0).all()
        and (expected[:, 1:] == NEGATIVE).any()
        and (expected == UNCERTAIN).any()
    )
    versions = [rewritten(report, rng) for report in reports]
    for how in versions[0]:
        changed = (rewards.extract_labels([v[how] for v in versions]) != expected).any(1)
        assert not changed.any(), (how, versions[changed.argmax()][how])


def test_evidence_names_phrase_and_cue():
    found = rewards.evidence("No pleural effusion, but possible mild edema. Heart is enlarged.")
    assert [(LABELS[label], state, phrase, cue) for label, state, phrase, cue, _ in found] == [
        ("Pleural Effusion", NEGATIVE, "effusion", "no"),
        ("Edema", UNCERTAIN, "edema", "possib"),
        ("Cardiomegaly", POSITIVE, "heart", "enlarge"),
    ]
    assert found[1][-1].strip() == "possible mild edema"


def test_label_file_is_in_chexperts_format(tmp_path):
    path, out = tmp_path / "reports.csv", tmp_path / "labels.csv"
    path.write_text('Small effusion.\n"No edema,\n\npossible pneumonia."\n')
    printed = rewards.label_file(path, out, show_evidence=True)
    assert "2 | Edema | negative | edema <- no | no edema" in printed and printed.endswith(
        "labels of 2 reports"
    )
    header, first, *second = out.read_text().split("\n", 2)
    assert (
        header == "Reports," + ",".join(LABELS) and first == "Small effusion." + "," * 11 + "1.0,,,"
    )
    assert second == ['"No edema,\n\npossible pneumonia."' + "," * 6 + "0.0,,-1.0" + "," * 6 + "\n"]
    path.write_text("Reports\nNo edema, no effusion.\n")
    with pytest.raises(ValueError, match="report 1 has 2 cells"):
        rewards.label_file(path, out)
    with pytest.raises(ValueError, match="absent.csv"):
        rewards.label_file(tmp_path / "absent.csv", out)


def test_extract_labels_shape_and_case():
    assert rewards.extract_labels([]).shape == (0, 14)
    out = rewards.extract_labels(["EDEMA.", "edema"])
    assert out.dtype == np.int8 and (out[0] == out[1]).all()


NASTY = [
    "no " * 33_000,
    "heart normal " * 8_000,
    "a" * 100_000,
    "[1" * 50_000,
    "[" + "1" * 100_000,
    "<think>" * 15_000,
    "\n" * 100_000,
    "tip " + "a-" * 50_000,
    "xxx_" * 25_000,
    ", the " * 17_000,
    "." * 100_000,
    "interstitial " * 8_000,
    "[" + " " * 100_000,
    "[0,0,1,1]" * 11_000,
    "".join(map(chr, range(1, 60_000, 3))),
    "\x00\ud800 \u0130",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_any_output_is_fast_and_safe(text):
    report, boxes = (
        example(answer="Mild edema."),
        example("grounding", boxes=[(0, 0, 1, 1), (0.2, 0.2, 0.3, 0.3)]),
    )
    start = time.process_time()
    for style in ("plain", "tags", "suffix"):
        texts = [text, "</think>" + text, text]
        total, _ = rewards.score_completions(texts, [report, report, boxes], EVERYTHING, style)
        assert np.isfinite(total).all()
    assert time.process_time() - start < 10


# ------------------------------------------------------------------------------------------------- label rewards

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
def test_mccs_worked_values(generated, reference, m05, m03):
    for margin, expected in ((0.5, m05), (0.3, m03)):
        assert rewards.mccs(row(**generated), row(**reference), margin)[0] == pytest.approx(
            expected, abs=6e-4
        )


def test_mccs_and_label_f1_against_loops():
    rng = np.random.default_rng(0)
    a, b = rng.choice(4, (2, 500, 14), p=[0.7, 0.1, 0.1, 0.1]).astype(np.int8)
    a[:100, 1:], b[50:150, 1:] = 0, 0
    scores, f1 = rewards.mccs(a, b, 0.4), rewards.label_f1(a, b)
    for i in range(500):
        x, y = ([{0: 0, 1: 1, 2: -1, 3: 1}[int(s)] for s in labels[i, 1:]] for labels in (a, b))
        if not any(x) or not any(y):
            expected = float(not any(x) and not any(y))
        else:
            cosine = sum(p * q for p, q in zip(x, y)) / math.sqrt(
                sum(p * p for p in x) * sum(q * q for q in y)
            )
            expected = max((cosine - 0.4) / 0.6, 0)
        assert scores[i] == pytest.approx(expected)
        x, y = ([value == 1 for value in v] for v in (x, y))
        assert f1[i] == pytest.approx(f1_score(y, x, zero_division=0))


# -------------------------------------------------------------------------------------------------- text overlap

PAIRS = list(zip(random_texts(500, 0), random_texts(500, 1))) + [
    ("", ""),
    ("", "a"),
    ("a", ""),
    ("a b c d e",) * 2,
]


def test_tokenize():
    assert rewards.tokenize("No PTX, 1.5 cm.") == ["no", "ptx", ",", "1", ".", "5", "cm", "."]


def test_text_rewards_against_nltk_and_rouge_score():
    smooth = bleu_score.SmoothingFunction().method2
    rouge = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=rewards.tokenize))
    for a, b in PAIRS:
        x, y = rewards.tokenize(a), rewards.tokenize(b)
        assert rewards.gleu(a, b) == pytest.approx(gleu_score.sentence_gleu([y], x))
        assert rewards.bleu4(a, b) == pytest.approx(
            bleu_score.sentence_bleu([y], x, smoothing_function=smooth)
        )
        assert rewards.rouge_l(a, b) == pytest.approx(rouge.score(b, a)["rougeL"].fmeasure)


# ------------------------------------------------------------------------------------------------- output format


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
def test_parse_output(style, task, text, expected):
    assert rewards.parse_output(text, task, style) == expected


def test_tags_format_against_a_regular_expression():
    rng, pieces = random.Random(0), ["a", " ", "\n", *rewards.TAGS[:4]]
    good = re.compile(r"\s*<think>[^<]*</think>\s*<report>[^<]*[^<\s][^<]*</report>\s*")
    texts = ["".join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(3000)]
    texts += [
        "".join(order)
        for order in itertools.permutations(["<think>", "a", "</think>", "<report>", "</report>"])
    ]
    texts += [text.replace("<report>", "<report>b") for text in texts]
    valid = [rewards.parse_output(text, "report", "tags")[0] for text in texts]
    assert valid == [bool(good.fullmatch(text)) for text in texts] and any(valid)


# --------------------------------------------------------------------------------------------------------- boxes


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
def test_parse_boxes(text, expected):
    assert rewards.parse_boxes(text) == expected


def random_boxes(rng, n):
    corner = rng.random((n, 2)) * 0.7
    return [tuple(box) for box in np.hstack([corner, corner + rng.random((n, 2)) * 0.5]).tolist()]


def test_iou_against_pixel_counts():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    for a, b in rng.integers(0, 20, (300, 2, 4)):  # a quarter of them inverted or empty
        inside = [(x >= c[0]) & (x < c[2]) & (y >= c[1]) & (y < c[3]) for c in (a, b)]
        both, union = (inside[0] & inside[1]).sum(), (inside[0] | inside[1]).sum()
        assert rewards.iou(a.tolist(), b.tolist()) == pytest.approx(both / max(union, 1))
    assert rewards.iou((0, 0, 1e200, 1e200), (0, 0, 1e200, 1e200)) == 0  # area overflows


def test_match_boxes_against_brute_force_and_scipy():
    rng = np.random.default_rng(1)
    for n, m in [
        *itertools.product(range(5), repeat=2),
        (1, 40),
        (40, 1),
        (30, 50),
        (50, 30),
        (100, 100),
    ]:
        for _ in range(8 if n < 5 and m < 5 else 1):
            a, b = random_boxes(rng, n), random_boxes(rng, m)
            if n > 2:
                a[2] = a[1]  # ties
            pairs = rewards.match_boxes(a, b)
            assert all(rewards.iou(a[i], b[j]) == overlap > 0 for i, j, overlap in pairs)
            assert len({i for i, _, _ in pairs}) == len({j for _, j, _ in pairs}) == len(pairs)
            overlap = np.array([[rewards.iou(p, q) for q in b] for p in a]).reshape(n, m)
            total = sum(pair[2] for pair in pairs)
            assert total == pytest.approx(overlap[linear_sum_assignment(-overlap)].sum())
            if n <= m < 5:
                orders = itertools.permutations(range(m), n)
                assert total == pytest.approx(
                    max(overlap[range(n), list(order)].sum() for order in orders)
                )


@pytest.mark.parametrize(
    "predicted, reference, radvlm, pq",
    [
        ([(0, 0, 0.6, 1)], [(0, 0, 1, 1)], 0.75, 0.60),
        ([(0, 0, 0.6, 1), (2, 2, 3, 3)], [(0, 0, 1, 1)], 1.2 / 2.6, 0.40),
        ([(0, 0, 1, 1)] * 2, [(0, 0, 1, 1)], 2 / 3, 2 / 3),  # a repeated box is a false positive
        ([(0, 0, 1, 1)], [(0, 0, 1, 1)], 1, 1),
        ([(0, 0, 1, 1)] * 10_000, [(0, 0, 1, 1)], 2 / 10_001, 2 / 10_001),
        ([(5, 5, 6, 6)] * 64 + [(0, 0, 1, 1)], [(0, 0, 1, 1)], 0, 0),  # beyond MAX_MATCHED
        ([], [(0, 0, 1, 1)], 0, 0),
        ([(0, 0, 1, 1)], [], 0, 0),
        ([], [], 0, 0),
    ],
)
def test_soft_f1_worked_values(predicted, reference, radvlm, pq):
    assert rewards.soft_f1(predicted, reference) == pytest.approx(radvlm)
    assert rewards.soft_f1(predicted, reference, mode="pq") == pytest.approx(pq)
    assert rewards.soft_f1(predicted, reference, match_empty=True) == pytest.approx(
        radvlm if predicted or reference else 1
    )


# -------------------------------------------------------------------------------------------------- reward table


def config(report, grounding, mode="radvlm"):
    return data.RewardsConfig(report=report, grounding=grounding, soft_f1_mode=mode)


def example(task="report", answer="", boxes=()):
    return data.Example(id="1", task=task, images=(), question="", answer=answer, boxes=boxes)


EVERYTHING = config(
    {name: 0.5 for name in rewards.APPLIES["report"] if name != "bertscore"},  # it needs a network
    dict.fromkeys(rewards.APPLIES["grounding"], 0.5),
)


def test_score_completions_mixes_tasks():
    cfg = config({"mccs": 0.75, "format": 0.25, "gleu": 0.0}, {"soft_f1": 1.0, "format": 0.5})
    examples = [
        example(answer="Mild edema."),
        example("grounding", boxes=[(0, 0, 1, 1)]),
        example(answer="No edema."),
    ]
    completions = [
        "<think>a</think><report>Edema.</report>",
        "<think>a</think><answer>[0, 0, 0.6, 1]</answer>",
        "<report>No edema.",
    ]
    total, parts = rewards.score_completions(completions, examples, cfg, "tags")
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
    examples = [example(answer="Normal chest."), example("grounding"), example("grounding")]
    for text in ("", "thinking without end", "<think>a</think>"):
        total, parts = rewards.score_completions([text] * 3, examples, EVERYTHING, "tags")
        assert (total == 0).all()


@pytest.mark.parametrize(
    "answer, expected",
    [("No box.", 1), ("", 0), ("...", 0), ("[0.1, 0.2, 0.3", 0), ("[]", 0), ("[0, 0, 1, 1]", 0)],
)
def test_match_empty_needs_a_plain_no(answer, expected):
    cfg = config({}, {"soft_f1": 1.0})
    assert (
        rewards.score_completions([answer], [example("grounding")], cfg, "plain")[0][0] == expected
    )


def test_text_without_labels_counts_as_non_empty():
    cfg = config({"mccs": 1.0, "label_f1": 1.0}, {})
    total, _ = rewards.score_completions(
        ["Old granuloma."], [example(answer="Scoliosis.")], cfg, "plain"
    )
    assert not rewards.extract_labels(["Old granuloma."]).any() and total[0] == 1


def test_settings_reach_the_rewards():
    cfg = config({"mccs": 1.0}, {})
    cfg.mccs_margin = 0.3
    total, _ = rewards.score_completions(
        ["No effusion."], [example(answer="No effusion or edema.")], cfg, "plain"
    )
    assert total[0] == pytest.approx((math.sqrt(0.5) - 0.3) / 0.7)
    cfg = config({}, {"soft_f1": 1.0}, mode="pq")
    examples = [example("grounding", boxes=[(0, 0, 1, 1)])]
    assert rewards.score_completions(["[0, 0, 0.6, 1]"], examples, cfg, "plain")[
        0
    ] == pytest.approx([0.6])


def test_non_finite_reward_is_named(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "gleu", lambda batch, cfg: [math.nan] * len(batch.answers))
    with pytest.raises(ValueError, match="'gleu'"):
        rewards.score_completions(["a"], [example(answer="a")], config({"gleu": 1.0}, {}), "plain")


OWN = """
def length(completions, answer, reference, **columns):
    assert columns["prompts"] == columns["question"] and len(columns["completion_ids"]) == len(answer)
    return [None if not ref else float(len(a) - len(ref)) for a, ref in zip(answer, reference)]

def not_finite(completions, **_):
    return [float(text) for text in completions]

def one_too_few(completions, **_):
    return [0.0] * (len(completions) - 1)
"""


def test_rewards_of_your_own(tmp_path):
    """TRL's signature; None does not apply; what raises, is not finite or of the wrong length stops the run or counts as 0."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    name = f"{path}:length"
    cfg = config({name: 0.5, "format": 1.0}, {})
    rewards.check_rewards(cfg)
    total, parts = rewards.score_completions(
        ["abc", "a", "x"], [example(answer="a"), example(answer="abc"), example()], cfg, "plain"
    )
    assert total == pytest.approx([2, 0, 1])
    assert (
        parts[name] == pytest.approx([2, -2, math.nan], nan_ok=True)
        and (parts[f"{name}/failed"] == 0).all()
    )
    for function, values, failed in (
        ("not_finite", [1, 0, 0], [0, 1, 1]),
        ("one_too_few", [0] * 3, [1] * 3),
    ):
        cfg = config({f"{path}:{function}": 1.0}, {})
        texts, examples = ["1", "nan", "inf"], [example(answer="a")] * 3
        with pytest.raises(ValueError, match=f"{function}.*rewards.on_error"):
            rewards.score_completions(texts, examples, cfg, "plain")
        cfg.on_error = "zero"
        total, parts = rewards.score_completions(texts, examples, cfg, "plain")
        assert total == pytest.approx(values) and parts[
            f"{path}:{function}/failed"
        ] == pytest.approx(failed)
    for wrong, message in (
        (f"{tmp_path}/absent.py:f", "no file"),
        (f"{path}:f", "no function 'f'"),
        (f"{tmp_path}/bad.py:f", "fails with KeyError"),
    ):
        (tmp_path / "bad.py").write_text("{}['f']")  # not taken for a function that is not there
        with pytest.raises(ValueError, match=message):
            rewards.check_rewards(config({wrong: 1.0}, {}))


def test_the_example_of_a_reward_file():
    name = str(ROOT / "configs" / "my_rewards.py")
    cfg = config({f"{name}:says_it_once": 2.0, f"{name}:as_long_as_the_reference": 1.0}, {})
    texts, examples = (
        ["No edema. no edema. Clear.", "", "One word."],
        [example(answer="a b c d e"), example(answer="a"), example()],
    )
    total, parts = rewards.score_completions(texts, examples, cfg, "plain")
    assert parts[f"{name}:says_it_once"] == pytest.approx([2 / 3, 0, 1])
    assert parts[f"{name}:as_long_as_the_reference"] == pytest.approx([1, 0, math.nan], nan_ok=True)
    assert total == pytest.approx([4 / 3 + 1, 0, 2])


@pytest.mark.parametrize(
    "length, expected", [(0, 0), (10, 0), (11, -0.25), (13, -0.75), (14, -1), (1000, -1)]
)
def test_overlong_worked_values(length, expected):
    assert rewards.overlong(length, 10, 14) == expected


def test_check_rewards():
    rewards.check_rewards(EVERYTHING)
    for cfg, message in (
        (config({"mcss": 1}, {}), "rewards.report.mcss.*'mccs'"),
        (config({}, {"mccs": 1}), "rewards.grounding.mccs"),
        (config({"".join(string.digits): 1}, {}), "did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            rewards.check_rewards(cfg)


def test_a_reward_file_may_import_its_neighbours_and_errors_name_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "import neighbour_of_mine\n\ndef f(answer, **columns):\n    return [neighbour_of_mine.VALUE for _ in answer]\n\n"
        "def g(answer, **columns):\n    return [1 / 0]\n\ndef h(answer, **columns):\n    return 1.0\n"
    )
    examples = [data.Example("a", "report", (), "q", "Clear.")]

    def pay(name):
        return rewards.score_completions(
            ["Clear."],
            examples,
            data.RewardsConfig(report={f"{tmp_path}/mine.py:{name}": 1}),
            "plain",
        )[0][0]

    assert pay("f") == 0.5
    with pytest.raises(ValueError, match=r"mine.py:g, line 7: ZeroDivisionError"):
        pay("g")
    with pytest.raises(
        ValueError,
        match=r"mine.py:h, which returns a number per completion and ends its arguments with \*\*columns",
    ):
        pay("h")
