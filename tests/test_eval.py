"""Metrics against published libraries, brute force and hand numbers; predictions; the page."""

import contextlib
import dataclasses
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import sacrebleu
from helpers import ROOT, load, random_boxes
from PIL import Image
from pycocoevalcap.cider.cider import Cider
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import classification_report

import data
import eval as evaluation
import model
from data import LABELS, parse_boxes
from rewards import extract_labels, iou, tokenize
from runtime.checkpoint import resolve
from runtime.config import InputError
from tools import report_page

SENTENCES = [
    "Heart size is normal.",
    "Moderate cardiomegaly.",
    "Possible pneumonia.",
    "No pleural effusion.",
    "Small left pleural effusion.",
    "Bibasilar atelectasis.",
    "Pulmonary edema.",
    "Right pneumothorax.",
    "The lungs are clear.",
    "Dense consolidation on the left.",
    "Pacemaker in place.",
    "Rib fracture.",
]


# ------------------------------------------------------------------------------- inputs


def report(i, answer, reference, patient=None, **other):
    record = {
        "id": f"r{i}",
        "task": "report",
        "kind": "",
        "label": "",
        "patient": f"p{i}" if patient is None else patient,
        "text": answer,
        "answer": answer,
        "thinking": "",
        "valid": bool(answer),
        "finished": True,
        "n_tokens": 3,
        "reference": reference,
        "boxes": [],
    }
    return record | other


def grounding(i, answer, boxes, label="Edema", **other):
    asked = {"task": "grounding", "kind": "abnormality", "id": f"g{i}"}
    return report(i, answer, "", **asked | {"boxes": boxes, "label": label} | other)


def text_of(boxes):
    return ", ".join(str(list(box)) for box in boxes)


def random_reports(rng, n, patients=None):
    def text():
        return " ".join(rng.choice(SENTENCES, rng.integers(0, 4), replace=False))

    rows = []
    for i in range(n):
        patient = None if patients is None else f"p{rng.integers(patients)}"
        rows.append(report(i, text(), text() or SENTENCES[0], patient))
    return rows


def random_groundings(rng, n, digits=2):
    """Answers with some of the reference boxes, a little off, and some others."""
    rows = []
    for i in range(n):
        boxes = random_boxes(rng, rng.integers(0, 4), digits)
        answer = random_boxes(rng, rng.integers(0, 2), digits)
        for box in boxes:
            moved = (np.array(box) + rng.normal(0, 0.03, 4)).round(digits).tolist()
            if rng.random() < 0.8 and moved[0] < moved[2] and moved[1] < moved[3]:
                answer.insert(0, moved)
        label = str(rng.choice(["Edema", "Fracture"]))
        rows.append(grounding(i, text_of(answer) or "Not seen.", boxes, label))
    return rows


@pytest.fixture
def cfg(tmp_path):
    return load(f"out={tmp_path}")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 2)


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(evaluation, "RESAMPLES", 20)


def plain(metrics):
    return {name: float(values[0]) for name, values in metrics.items()}


@np.errstate(all="ignore")
def of_reports(rows, training=()):
    """The metrics of the predictions as they are."""
    weights = np.ones((1, len(rows)))
    return plain(evaluation.report_metrics(rows, weights, extract_labels, training)[0])


@np.errstate(all="ignore")
def of_groundings(rows):
    return plain(evaluation.grounding_metrics(rows, np.ones((1, len(rows))))[0])


@np.errstate(all="ignore")
def by_class(rows):
    return plain(evaluation.grounding_metrics(rows, np.ones((1, len(rows))))[1])


# ------------------------------------------------------------------------------- reports


def positives(rows, key):
    return np.isin(extract_labels([p[key] for p in rows]), (1, 3))


def oracle_scores(y_true, y_pred, columns):
    """scikit-learn's report, and its macro means over the labels with support."""
    report = classification_report(
        y_true[:, columns], y_pred[:, columns], output_dict=True, zero_division=0
    )
    rows = [report[str(i)] for i in range(len(columns))]
    macro = {}
    for score in ("f1-score", "precision", "recall"):
        macro[score] = np.mean([row[score] for row in rows if row["support"]])
    return report["micro avg"], macro, rows


@pytest.mark.parametrize(
    "name, columns", [("14", range(14)), ("13", range(1, 14)), ("5", [2, 5, 6, 8, 10])]
)
def test_label_scores_equal_scikit_learn(name, columns):
    rows = random_reports(np.random.default_rng(0), 150)
    metrics = of_reports(rows)
    y_pred, y_true = positives(rows, "answer"), positives(rows, "reference")
    micro, macro, labels = oracle_scores(y_true, y_pred, list(columns))
    # The rule for labels without support is exercised.
    assert name == "5" or any(row["support"] == 0 for row in labels)
    for ours, theirs in (("f1", "f1-score"), ("precision", "precision"), ("recall", "recall")):
        assert metrics[f"ce_{ours}_micro{name}"] == pytest.approx(micro[theirs])
        assert metrics[f"ce_{ours}_macro{name}"] == pytest.approx(macro[theirs])


def test_the_five_labels_are_those_of_the_competition():
    assert [LABELS[i] for i in (2, 5, 6, 8, 10)] == list(evaluation.TOP5)


def test_abnormal_scores_equal_scikit_learn():
    rows = random_reports(np.random.default_rng(0), 150)
    metrics = of_reports(rows)
    y_pred, y_true = positives(rows, "answer"), positives(rows, "reference")
    sick = y_true[:, 1:].any(1)
    assert 0 < sick.sum() < len(rows)
    micro, macro, _ = oracle_scores(y_true[sick], y_pred[sick], list(range(1, 14)))
    assert metrics["abnormal_f1_micro13"] == pytest.approx(micro["f1-score"])
    assert metrics["abnormal_f1_macro13"] == pytest.approx(macro["f1-score"])


def test_f1_of_each_label_equals_scikit_learn():
    rows = random_reports(np.random.default_rng(0), 150)
    with np.errstate(all="ignore"):
        ours = evaluation.report_metrics(rows, np.ones((1, 150)), extract_labels)[1]
    y_pred, y_true = positives(rows, "answer"), positives(rows, "reference")
    _, _, labels = oracle_scores(y_true, y_pred, list(range(14)))
    for label, theirs in zip(LABELS, labels):
        expected = theirs["f1-score"] if theirs["support"] else math.nan
        assert ours[label][0] == pytest.approx(expected, nan_ok=True)


def test_bleu_equals_sacrebleu():
    rows = random_reports(np.random.default_rng(2), 60)
    metrics = of_reports(rows)
    answers = [" ".join(tokenize(p["answer"])) for p in rows]
    references = [" ".join(tokenize(p["reference"])) for p in rows]
    options = {"tokenize": "none", "smooth_method": "none", "force": True}
    for n in range(1, 5):
        oracle = sacrebleu.BLEU(max_ngram_order=n, **options).corpus_score(answers, [references])
        assert metrics[f"bleu{n}"] == pytest.approx(oracle.score / 100)


def test_cider_equals_the_published_code():
    rows = random_reports(np.random.default_rng(2), 60)
    answers, references = [p["answer"] for p in rows], [p["reference"] for p in rows]
    theirs = {i: [" ".join(tokenize(text))] for i, text in enumerate(answers)}
    truth = {i: [" ".join(tokenize(text))] for i, text in enumerate(references)}
    _, scores = Cider().compute_score(truth, theirs)
    assert scores.max() > 1
    assert evaluation.cider_scores(answers, references) == pytest.approx(scores)
    assert of_reports(rows)["cider"] == pytest.approx(scores.mean())


def test_a_single_study_has_no_cider(cfg, few_resamples):
    """Every n-gram is in all references, and so weighs nothing."""
    row = report(0, "Pulmonary edema.", "Pulmonary edema.")
    assert math.isnan(of_reports([row])["cider"])
    lines = evaluation.table(evaluation.summarise({"a": [row]}, cfg)).splitlines()
    (line,) = [line for line in lines if "cider" in line]
    assert line.split("|")[1].strip() == "-"


def test_a_library_score_that_gives_nothing_is_named(cfg, monkeypatch, few_resamples):
    scores = {"radeval:f": lambda texts, references: [0.5, None]}
    monkeypatch.setattr(evaluation, "library_scores", lambda cfg: scores)
    rows = [report(i, "Edema.", "Edema.") for i in range(2)]
    with pytest.raises(InputError, match=r"'radeval:f' gave nothing for .* id 'r1'"):
        evaluation.summarise({"a": rows}, cfg)


def test_reports_that_training_has_are_told_apart():
    rows = [
        report(0, "Clear lungs.", "Moderate cardiomegaly."),
        report(1, "Pulmonary edema.", "Pulmonary edema."),
    ]
    m = of_reports(rows, ["clear  lungs", "moderate cardiomegaly"])
    assert m["copied_share"] == 0.5
    assert m["copied_share_reference"] == 0.5
    assert m["unseen_f1_micro13"] == 1
    assert m["ce_f1_micro13"] < 1
    without = of_reports(rows)
    assert "copied_share" not in without
    assert "unseen_f1_micro13" not in without


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_a_collapsed_model_has_bleu_zero():
    rows = [report(0, "", "Clear lungs."), report(1, "Clear lungs", "Clear lungs are seen.")]
    m = of_reports(rows)
    assert m["bleu1"] > 0
    assert m["bleu3"] == m["bleu4"] == 0
    assert of_reports([report(0, "", "Clear.")])["bleu1"] == 0


def test_report_numbers_by_hand():
    normal, sick = "Heart size is normal.", "Moderate cardiomegaly. Possible pneumonia."
    rows = [
        report(0, normal, normal),
        report(1, normal, sick, finished=False),
        report(2, sick, sick),
        report(3, "", "Pulmonary edema."),
    ]
    m = of_reports(rows)
    assert (m["normal_share"], m["normal_share_reference"]) == (0.5, 0.25)
    assert (m["distinct_share"], m["distinct_share_reference"]) == (0.75, 0.75)
    assert (m["mean_words"], m["mean_words_reference"]) == (12 / 4, 14 / 4)
    assert (m["format_valid"], m["truncated"], m["examples"]) == (0.75, 0.25, 4)
    # Uncertain pneumonia is found once, missed once.
    assert m["ce_recall_micro13"] == pytest.approx(2 / 5)
    assert m["ce_precision_micro13"] == 1
    assert m["ce_precision_micro14"] == pytest.approx(3 / 4)
    assert m["ce_f1_macro13"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    # The full stop is a token of both.
    assert m["rouge_l"] == pytest.approx((1 + 2 / 11 + 1 + 0) / 4)
    exact = of_reports([report(0, sick, sick)])
    for name in ("bleu1", "bleu4", "rouge_l", "gleu", "ce_f1_micro14"):
        assert exact[name] == pytest.approx(1)


def test_a_label_without_reference_counts_in_micro_only():
    rows = [report(0, "Moderate cardiomegaly. Rib fracture.", "Moderate cardiomegaly.")]
    m = of_reports(rows)
    assert m["ce_f1_macro13"] == 1
    assert m["ce_f1_micro13"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------- grounding


def test_kinds_of_grounding_are_told_apart(cfg, few_resamples):
    """Each kind has its own block. Phrases are one class of the average precision."""
    a = [0.1, 0.1, 0.4, 0.4]
    rows = [
        grounding(0, text_of([a]), [a]),
        grounding(1, "Not seen.", [a], kind="phrase", label="one thing"),
        grounding(2, text_of([a]), [a], kind="phrase", label="another"),
    ]
    results = evaluation.summarise({"m": rows}, cfg)
    labels = results.pop("grounding labels")
    value = {block: metrics["map50"]["m"]["value"] for block, metrics in results.items()}
    assert value == {"grounding": 0.75, "grounding of abnormality": 1, "grounding of phrase": 0.5}
    assert list(labels) == ["soft_f1 Edema", "ap50 Edema", "soft_f1 phrase", "ap50 phrase"]


def ranked_boxes(rows):
    """(place in the answer, example, box): all first boxes, then all second ones, .."""
    ranked = []
    for i, p in enumerate(rows):
        ranked += [(place, i, box) for place, box in enumerate(parse_boxes(p["answer"]))]
    return sorted(ranked)


def brute_force_ap(rows):
    """Textbook VOC (2010 on): area under the precision envelope as a step function of recall."""
    total = sum(len(p["boxes"]) for p in rows)
    taken, recall, precision = set(), [0.0], [0.0]
    for seen, (_, i, box) in enumerate(ranked_boxes(rows), 1):
        overlaps = {}
        for j, reference in enumerate(rows[i]["boxes"]):
            if (i, j) not in taken:
                overlaps[j] = iou(box, reference)
        if overlaps and max(overlaps.values()) >= 0.5:
            taken.add((i, max(overlaps, key=overlaps.get)))
        recall.append(len(taken) / total)
        precision.append(len(taken) / seen)
    area = 0.0
    for k in range(1, len(recall)):
        area += (recall[k] - recall[k - 1]) * max(precision[k:])
    return area


def coco_ap(rows):
    """COCO's own evaluation at IoU 0.5, with scores that fall with a box's place in its answer.

    COCO averages the precision over chosen recalls. With n references we choose the middles
    (k - 0.5) / n of the n steps of recall, which makes the mean the exact area.
    """

    def entry(i, box, **more):
        # An image for each question, 1000 pixels wide, so that COCO's areas and IoUs are ours.
        x1, y1, x2, y2 = (1000 * v for v in box)
        size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        return {"image_id": i, "category_id": 0, "iscrowd": 0, **size, **more}

    references = [(i, box) for i, p in enumerate(rows) for box in p["boxes"]]
    n = len(references)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(rows))],
            "categories": [{"id": 0}],
            "annotations": [entry(*b, id=k) for k, b in enumerate(references, 1)],
        }
        truth.createIndex()
        found = [entry(i, box, score=-place) for place, i, box in ranked_boxes(rows)]
        run = COCOeval(truth, truth.loadRes(found), "bbox")
        run.params.iouThrs = np.array([0.5])
        run.params.recThrs = (np.arange(n) + 0.5) / n
        run.evaluate()
        run.accumulate()
    return run.eval["precision"][0, :, 0, 0, 2].mean()  # all areas, 100 detections


@pytest.mark.parametrize("oracle, digits", [(brute_force_ap, 2), (coco_ap, 5)])
def test_average_precision_equals_the_oracle(oracle, digits):
    # With 5 digits no IoU lies on the threshold.
    seen = []
    for seed in range(20):
        rows = random_groundings(np.random.default_rng(seed), 25, digits)
        scores = []
        for label in ("Edema", "Fracture"):
            scores.append(oracle([p for p in rows if p["label"] == label]))
            assert by_class(rows)[f"ap50 {label}"] == pytest.approx(scores[-1])
        assert of_groundings(rows)["map50"] == pytest.approx(np.mean(scores))
        seen += scores
    assert 0.05 < min(seen) < max(seen) < 0.95


def test_map_by_hand():
    a, b, far = [0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.8, 0.1, 0.9]

    def score(*rows):
        return of_groundings(rows)["map50"]

    assert score(grounding(0, text_of([a, b]), [a, b])) == 1
    # Precision 1/2 at recall 1/2.
    assert score(grounding(0, text_of([far, a]), [a, b])) == pytest.approx(1 / 4)
    # The repeat comes after full recall.
    assert score(grounding(0, text_of([a, a]), [a])) == 1
    # First boxes of both answers (miss, hit), then the second box (hit): precision 1/2 and 2/3.
    rows = [grounding(0, text_of([far, a]), [a]), grounding(1, text_of([b]), [b])]
    assert score(*rows) == pytest.approx(2 / 3)
    # A false positive where nothing is there counts. A class without reference boxes does not.
    rows = [
        grounding(0, text_of([a]), []),
        grounding(1, text_of([b]), [b]),
        grounding(2, text_of([a]), [], "Fracture"),
    ]
    assert score(*rows) == pytest.approx(1 / 2)


def test_grounding_numbers_by_hand():
    # IoU of a and half: 0.6
    a, half, b = [0.0, 0.0, 0.4, 0.4], [0.0, 0.0, 0.4, 0.24], [0.5, 0.5, 0.9, 0.9]
    rows = [
        grounding(0, text_of([half]), [a]),
        grounding(1, text_of([half, b]), [a]),
        grounding(2, "Not seen.", []),
        grounding(3, "", []),
        grounding(4, "[0.1, 0.2]", []),
        grounding(5, text_of([b]), []),
        grounding(6, "Not seen.", [a], finished=False),
    ]
    m = of_groundings(rows)
    radvlm = [1.2 / 1.6, 1.2 / 2.6, 1, 0, 0, 0, 0]
    assert m["soft_f1"] == pytest.approx(np.mean(radvlm))
    assert m["soft_f1_nonempty"] == pytest.approx((1.2 / 1.6 + 1.2 / 2.6) / 3)
    assert m["matched_iou"] == pytest.approx(0.6)
    # Neither silence nor a broken box says that nothing is there.
    assert m["empty_accuracy"] == 1 / 4
    assert m["truncated"] == pytest.approx(1 / 7)


# ------------------------------------------------------------------------------- bootstrap


def test_bootstrap_weights_count_the_patients():
    patients = ["A", "A", "B", ""]
    rows = [report(i, "", "", patient) for i, patient in enumerate(patients)]
    weights = evaluation.bootstrap_weights(rows, 500, 0)
    assert weights.shape == (501, 4)
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all()
    # Three are drawn: A, B, and the prediction without a patient.
    assert (weights[:, 1:].sum(1) == 3).all()
    assert weights[1:].mean(0) == pytest.approx(1, abs=0.15)


def copies(rows, names, draw):
    """A resample, written out: a copy of a prediction stands beside it."""
    count = dict(zip(names, draw))
    return [p for p in rows for _ in range(count[p["patient"]])]


@pytest.mark.parametrize("patients", [None, 9])
def test_bootstrap_equals_resampling_loop(patients, monkeypatch):
    monkeypatch.setattr(evaluation, "RESAMPLES", 25)
    rng = np.random.default_rng(5)
    before, after = random_reports(rng, 30, patients), random_reports(rng, 30)
    boxes, others = random_groundings(rng, 20), random_groundings(rng, 20)
    if patients is not None:
        boxes = [p | {"patient": f"p{rng.integers(patients)}"} for p in boxes]
    # Both models answer the same questions.
    asked = ("reference", "boxes", "label", "patient")
    first, second = before + boxes, after + others
    second = [y | {key: x[key] for key in asked} for x, y in zip(first, second)]
    training = ["Moderate cardiomegaly."]
    results = evaluation.summarise({"sft": first, "grpo": second}, load("seed=0"), training)

    names = sorted({p["patient"] for p in first})
    size = len(names)
    draws = np.random.default_rng(0).multinomial(size, [1 / size] * size, 25)
    loop = {"sft": [], "grpo": []}
    for draw in [[1] * size, *draws]:
        for name, rows in (("sft", first), ("grpo", second)):
            reports = copies([p for p in rows if p["task"] == "report"], names, draw)
            groundings = copies([p for p in rows if p["task"] == "grounding"], names, draw)
            metrics = {
                "reports": of_reports(reports, training),
                "grounding": of_groundings(groundings),
            }
            loop[name].append(metrics)

    assert {*results} == {"reports", "labels", "grounding", "grounding labels"}
    for block in ("reports", "grounding"):
        for metric, by_model in results[block].items():
            start = np.array([m[block].get(metric, np.nan) for m in loop["sft"]])
            end = np.array([m[block].get(metric, np.nan) for m in loop["grpo"]])
            own, change = by_model["grpo"], end - start
            assert own["value"] == pytest.approx(end[0], nan_ok=True)
            assert own["difference"][0] == pytest.approx(change[0], nan_ok=True)
            # These take the split as it is.
            if metric.startswith(("distinct", "examples", "cider")):
                continue
            low_high = np.nanpercentile(end[1:], [2.5, 97.5])
            assert own["interval"] == pytest.approx(low_high, nan_ok=True), metric
            low_high = np.nanpercentile(change[1:], [2.5, 97.5])
            assert own["difference"][1:] == pytest.approx(low_high, nan_ok=True), metric
            assert by_model["sft"]["difference"] == [0, 0, 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "predictions",
    [
        [],
        [report(0, "", "Pulmonary edema.")],
        [report(0, "", "Heart size is normal.")],
        [grounding(0, "", [])],
        [grounding(0, "", [[0.1, 0.1, 0.2, 0.2]])],
        [report(i, "", "Pulmonary edema.", "") for i in range(3)],
        [
            report(0, "Pulmonary edema.", "Pulmonary edema."),
            grounding(0, "[0, 0, 1, 1]", [[0, 0, 1, 1]]),
        ],
    ],
)
def test_empty_cases(predictions, cfg, few_resamples):
    table = evaluation.table(evaluation.summarise({"a": predictions, "b": predictions}, cfg))
    assert "nan" not in table.lower()
    tasks = {p["task"] for p in predictions}
    assert ("reports" in table) == ("report" in tasks)
    assert ("grounding" in table) == ("grounding" in tasks)


def test_table_is_aligned_and_shows_differences(cfg, few_resamples):
    rows = random_reports(np.random.default_rng(1), 20)
    models = {"sft": rows, "grpo": [p | {"answer": p["reference"]} for p in rows]}
    lines = evaluation.table(evaluation.summarise(models, cfg)).splitlines()
    places = {tuple(m.start() for m in re.finditer(r"\|", line)) for line in lines}
    assert len(places) == 1
    (row,) = [line for line in lines if line.startswith("minus sft: ce_f1_micro13")]
    _, first, second = row.split("|")
    gain = 1 - of_reports(rows)["ce_f1_micro13"]
    assert f"{gain:+.3f} [" in second
    assert not first.strip()


# ------------------------------------------------------------------------------- predictions


class Policy:
    """Answers with its example's id; skips the examples it is told to."""

    def __init__(self, skip=()):
        self.skip = skip

    def freeze_all(self):
        return self

    def encode_ahead(self, upcoming):
        pass

    def sample(self, examples, group_size, max_new_tokens, temperature):
        assert (group_size, temperature) == (1, 0)
        rollouts = []
        for e in examples:
            if e.id not in self.skip:
                rollout = {"texts": [f"Text {e.id}."], "finished": [True], "lengths": [4]}
                rollouts.append(SimpleNamespace(example=e, **rollout))
        return rollouts


def examples(n):
    film = SimpleNamespace(image=Image.new("L", (40, 30)))
    made = []
    for i in range(n):
        task, boxes = ("report", ()) if i % 2 else ("grounding", ((0, 0, 1, 1),))
        asked = {"images": (film,), "question": "", "answer": "Pulmonary edema."}
        made.append(data.Example(id=str(i), task=task, boxes=boxes, **asked))
    return made


def write_predictions(path, n, text):
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i in range(n)]
    path.write_text("".join(lines))


@pytest.mark.parametrize("n, world", [(7, 3), (6, 3), (1, 2), (0, 2), (5, 1)])
def test_predict_gathers_what_all_ranks_decode(n, world, monkeypatch, cfg):
    gathered, given = [], examples(n)
    monkeypatch.setattr(evaluation, "world_size", lambda: world)
    # What each process gives is added to what the others gave before it.
    monkeypatch.setattr(
        evaluation, "gather_lists", lambda items: gathered.extend(items) or gathered
    )
    for rank in reversed(range(world)):
        monkeypatch.setattr(evaluation, "rank", lambda rank=rank: rank)
        result = evaluation.predict(Policy(skip="4"), given, cfg, "")
    # Nothing is decoded twice.
    assert len(gathered) == len([e for e in given if e.id != "4"])
    answers = {name: p["answer"] for name, p in result.items()}
    assert answers == {str(i): f"Text {i}." for i in range(n) if i != 4}
    assert json.loads(json.dumps(result)) == result


def test_predictions_of_another_program(tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": "Edema."}) + "\n" for i in (1, 0, 2)))
    rows = evaluation.read_predictions(path, examples(3))
    assert [(p["id"], p["answer"], p["task"]) for p in rows.values()] == [
        ("0", "Edema.", "grounding"),
        ("1", "Edema.", "report"),
        ("2", "Edema.", "grounding"),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": 0}', "line 1"),
        ('{"id": 0, "text": null}', "line 1.*expected text, got None"),
        ('{"id": 0, "text": ""}', "no prediction for 2 of 3 examples, such as id '1'"),
        ('{"id": 0, "text": ""}\n{"id": "0", "text": ""}', "line 2: a second line has the id '0'"),
    ],
)
def test_bad_predictions_of_another_program(line, message, tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=f"theirs.jsonl.*{message}"):
        evaluation.read_predictions(path, examples(3))


def test_surplus_predictions_are_counted(tmp_path, capsys):
    path = tmp_path / "theirs.jsonl"
    write_predictions(path, 5, "Edema.")
    assert list(evaluation.read_predictions(path, examples(3))) == ["0", "1", "2"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: 2 of 5 predictions are ignored")
    assert line.endswith("'3'")
    evaluation.read_predictions(path, examples(5))
    assert capsys.readouterr().err == ""


def test_a_file_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl: cannot read"):
        evaluation.read_predictions(tmp_path / "absent.jsonl", examples(3))


# ------------------------------------------------------------------------------- commands


def test_resolve_prefers_best_then_last(tmp_path):
    assert resolve(tmp_path) == str(tmp_path)
    assert resolve("org/name") == "org/name"
    (tmp_path / "last").mkdir()
    assert resolve(tmp_path) == str(tmp_path / "last")
    (tmp_path / "best").mkdir()
    assert resolve(tmp_path) == str(tmp_path / "best")


def test_what_one_model_lacks_no_model_is_measured_on(
    monkeypatch, cfg, tmp_path, capsys, few_resamples
):
    policies = {"a": Policy(skip="3"), "b": Policy()}
    monkeypatch.setattr(data, "load_split", lambda cfg, split: examples(6))
    monkeypatch.setattr(model, "load_frozen", lambda cfg, path: policies[path])
    _, results = evaluation.evaluate_checkpoints(cfg, {"a": "a", "b": "b"})
    assert results["reports"]["examples"]["b"]["value"] == 2
    assert "1 of 6 examples" in capsys.readouterr().out
    assert len((tmp_path / "eval" / "b.jsonl").read_text().splitlines()) == 6


def test_boxes_in_pixels_are_said_for_each_model(monkeypatch, cfg, tmp_path, capsys, few_resamples):
    """A plain model beside a trained one: else its zero would look like blindness."""
    monkeypatch.setattr(data, "load_split", lambda cfg, split: examples(4))
    files = {}
    for name, text in {"plain": "[310, 450, 780, 830]", "trained": "[0.3, 0.4, 0.7, 0.8]"}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        write_predictions(files[name], 4, text)
    evaluation.evaluate_checkpoints(cfg, {}, files)
    said = capsys.readouterr().err
    assert "2 of 2 boxes of plain have numbers beyond 1" in said
    assert "trained" not in said


def test_no_training_split_costs_its_metrics_only(monkeypatch, cfg, capsys, few_resamples):
    def load_split(cfg, split):
        if split == "train":
            raise InputError("train.jsonl: cannot read")
        return examples(4)

    monkeypatch.setattr(data, "load_split", load_split)
    monkeypatch.setattr(model, "load_frozen", lambda cfg, path: Policy())
    _, results = evaluation.evaluate_checkpoints(cfg, {"a": "a"})
    assert "copied_share" not in results["reports"]
    assert "train.jsonl" in capsys.readouterr().out


def test_without_the_tool_no_page_is_written(monkeypatch, cfg, tmp_path, capsys, few_resamples):
    monkeypatch.setattr(data, "load_split", lambda cfg, split: examples(4))
    monkeypatch.setattr(model, "load_frozen", lambda cfg, path: Policy())
    monkeypatch.setitem(sys.modules, "tools.report_page", None)
    table, _ = evaluation.evaluate_checkpoints(cfg, {"a": "a"})
    out = capsys.readouterr().out
    assert out.startswith(table)
    assert len(out.removeprefix(table).strip().splitlines()) == 1
    assert "no page is written" in out
    written = {path.name for path in (tmp_path / "eval").iterdir()}
    assert written == {"a.jsonl", "metrics.json"}


def test_column_names_are_the_shortest_distinct_tails():
    paths = ["out/sft", "out/grpo/", "out/./sft"]
    assert evaluation.column_names(paths) == ["sft", "grpo", "sft"]
    assert evaluation.column_names(["x/sft", "y/sft"]) == ["x/sft", "y/sft"]
    assert evaluation.column_names(["/a", "/b/a"]) == ["a", "b/a"]


def test_evaluate_checkpoints_writes_predictions_metrics_and_page(
    monkeypatch, cfg, tmp_path, capsys, few_resamples
):
    monkeypatch.setattr(data, "load_split", lambda cfg, split: examples(9))
    monkeypatch.setattr(model, "load_frozen", lambda cfg, path: Policy())
    monkeypatch.setattr(report_page, "CASES", 4)
    cfg.eval.limit = 3
    other = tmp_path / "other.jsonl"
    write_predictions(other, 9, "No edema.")
    checkpoints = {"x/sft": "x/sft", "grpo": "grpo"}
    table, results = evaluation.evaluate_checkpoints(cfg, checkpoints, {"other": other})
    assert capsys.readouterr().out.startswith(table)

    # Three examples of each task, drawn, in order.
    rows = [json.loads(line) for line in (tmp_path / "eval/x/sft.jsonl").read_text().splitlines()]
    reports = [p["id"] for p in rows if p["task"] == "report"]
    groundings = [p["id"] for p in rows if p["task"] == "grounding"]
    assert len(reports) == len(groundings) == 3
    assert reports == sorted(reports)
    assert groundings == sorted(groundings)
    assert (reports, groundings) != (["1", "3", "5"], ["0", "2", "4"])

    stored = json.loads((tmp_path / "eval/metrics.json").read_text(), parse_constant=pytest.fail)
    assert stored["reports"]["examples"]["grpo"]["value"] == 3
    assert list(stored["reports"]["bleu4"]) == ["x/sft", "grpo", "other"]
    assert math.isnan(results["grounding"]["matched_iou"]["grpo"]["value"])
    assert stored["grounding"]["matched_iou"]["grpo"]["value"] is None
    assert (tmp_path / "eval/report.html").read_text().count("<article") == 4
    assert not list(tmp_path.rglob("*.new"))


def run_main(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["eval.py", str(ROOT / "config.yaml"), *words])
    evaluation.main()


def test_command_line_separates_folders_from_overrides(monkeypatch, tmp_path):
    calls = []
    (tmp_path / "cwd" / "x" / "eval").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "cwd" / "p.jsonl").touch()
    (tmp_path / "cwd" / "x" / "eval" / "a.jsonl").touch()
    monkeypatch.setattr(evaluation, "evaluate_checkpoints", lambda *args: calls.append(args))
    files = ["--predictions", "p.jsonl", "x/eval/a.jsonl"]
    folders = ["--checkpoint", "x/a", "x/b"]
    run_main(monkeypatch, "seed=1", *files, *folders, "eval.limit=2")
    ((cfg, checkpoints, predictions),) = calls
    assert (cfg.seed, cfg.eval.limit) == (1, 2)
    assert list(checkpoints) == ["x/a", "x/b"]
    assert predictions == {"cwd/p": "p.jsonl", "eval/a": "x/eval/a.jsonl"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--checkpoint", "p", "--predictions", "p.jsonl"], "would be one column"),
        (["eval.limit=2"], "expected a folder after --checkpoint"),
    ],
)
def test_a_wrong_command_line_is_an_input_error(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").touch()
    with pytest.raises(InputError, match=message):
        run_main(monkeypatch, *words)


def test_an_option_of_another_program_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, "--reproduce", "grid.yaml")
    assert end.value.code == 2
    assert "unrecognized arguments: --reproduce" in capsys.readouterr().err


# ------------------------------------------------------------------------------- the page


class Tags(html.parser.HTMLParser):
    """All tags of a page, all addresses in them, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, text):
        self.text += text


def found_by(example, *answers):
    return report_page.findings(example, answers, extract_labels)


def case_of(example, answers):
    """The case of {model: answer}, as XML."""
    true, *said = found_by(example, *answers.values())
    predictions = {}
    for name, answer in answers.items():
        asked = {"task": example.task, "boxes": list(example.boxes)}
        predictions[name] = report(0, answer, example.answer, **asked)
    case = report_page.case_html(example, predictions, true, said)
    return ElementTree.fromstring(f"<article>{case}</article>")


def drawn_in(case):
    """[(colour, dashed, x)] of the boxes of a case."""
    drawn = []
    for r in case.iter(f"{{{report_page.SVG}}}rect"):
        dashed = r.get("stroke-dasharray") != "none"
        drawn.append((r.get("stroke"), dashed, float(r.get("x"))))
    return drawn


def test_every_box_is_drawn():
    """The picture is well-formed, or a browser would show its first box only."""
    boxes = ((0.1, 0.1, 0.4, 0.5), (0.5, 0.2, 0.9, 0.6))
    example = dataclasses.replace(examples(1)[0], boxes=boxes, answer="two")
    answers = {
        "sft": "[0.10, 0.10, 0.40, 0.50]",
        "grpo": "[0.20, 0.20, 0.30, 0.40] and [0.50, 0.20, 0.80, 0.60]",
    }
    # References dashed, then those of each model in its colour.
    white, first, second = "#ffffff", *report_page.COLOURS[:2]
    assert drawn_in(case_of(example, answers)) == [
        (white, True, 0.1),
        (white, True, 0.5),
        (first, False, 0.1),
        (second, False, 0.2),
        (second, False, 0.5),
    ]


def test_reports_show_the_boxes_that_a_phantom_drew():
    phantom = next(p for p in (data.phantom(0, i) for i in range(99)) if len(p.boxes) > 1)
    example = dataclasses.replace(examples(2)[1], images=(phantom,), answer=phantom.report)
    left = [box[0] for boxes in phantom.boxes.values() for box in boxes]
    drawn = drawn_in(case_of(example, {"m": "Edema at [0.1, 0.1, 0.4, 0.5]"}))
    assert [x for _, dashed, x in drawn if dashed] == left


def test_what_an_answer_finds():
    """Labels without No Finding; boxes at IoU 0.5, each once."""
    asked, told = examples(2)
    texts = "No edema. Possible pneumonia.", "Heart size is normal.", ""
    assert found_by(told, *texts) == [{"Edema"}, {"Pneumonia"}, set(), set()]

    a, b = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)
    asked = dataclasses.replace(asked, boxes=(a, b))
    # IoU 0.5 with box 1; 0.4 / 0.4; both, in the other order; the same one twice.
    answers = [[(0, 0, 0.4, 0.2)], [(0, 0, 0.4, 0.16)], [b, a], [b, b], []]
    assert found_by(asked, *map(text_of, answers)) == [
        {"box 1", "box 2"},
        {"box 1"},
        {"other boxes"},
        {"box 1", "box 2"},
        {"box 2", "other boxes"},
        set(),
    ]
    nowhere = dataclasses.replace(asked, boxes=())
    assert found_by(nowhere, "It is not seen.", text_of([a])) == [set(), set(), {"other boxes"}]


def test_chips_say_what_changed_and_whether_it_is_right():
    told = dataclasses.replace(examples(2)[1], answer="Pulmonary edema. Rib fracture.")
    answers = {
        "sft": "Rib fracture. Possible pneumonia.",
        "grpo": "Pulmonary edema. Right pneumothorax.",
    }
    case = case_of(told, answers)
    chips = [(s.text, s.get("class")) for s in case.iter("span")]
    assert chips == [
        ("Edema: missed", "chip missed"),
        ("Fracture: found", "chip found"),
        ("Pneumonia: false", "chip false"),
        ("gained Edema: found", "chip found"),
        ("lost Fracture: missed", "chip missed"),
        ("lost Pneumonia: right", "chip right"),
        ("gained Pneumothorax: false", "chip false"),
    ]
    underlined = [u.text for u in case.iter("u")]
    assert underlined == ["edema", "fracture", "fracture", "pneumonia", "edema", "pneumothorax"]


def test_chips_of_boxes():
    box, other = (0.1, 0.1, 0.4, 0.4), (0.6, 0.6, 0.9, 0.9)
    asked = dataclasses.replace(examples(1)[0], boxes=(box,))
    case = case_of(asked, {"sft": text_of([other]), "grpo": text_of([box])})
    chips = [s.text for s in case.iter("span")]
    assert chips == [
        "box 1: missed",
        "other boxes: false",
        "soft-F1 0.00",
        "gained box 1: found",
        "lost other boxes: right",
        "soft-F1 1.00",
    ]


def test_phrases_are_underlined():
    html = report_page.underlined("<b> Cardiac enlargement & effusions.")
    assert html == "&lt;b&gt; <u>Cardiac enlargement</u> &amp; <u>effusions</u>."
    assert report_page.underlined("Nothing & no one.") == "Nothing &amp; no one."


def compared(cfg, answered):
    """The page of [(example, answer of the first model, answer of the last model)]."""
    given, before, after = [], [], []
    for number, (example, first, last) in enumerate(answered):
        given.append(dataclasses.replace(example, id=f"case {number}"))
        asked = {"task": example.task, "boxes": list(example.boxes)}
        before.append(report(number, first, example.answer, **asked))
        after.append(report(number, last, example.answer, **asked))
    predictions = {"sft": before, "grpo": after}
    return report_page.page(cfg, evaluation.summarise(predictions, cfg), predictions, given)


NORMAL = "Heart size is normal."


def test_changed_cases_come_first_and_abnormal_before_normal(cfg, few_resamples):
    _, abnormal = examples(2)
    normal = dataclasses.replace(abnormal, answer=NORMAL)
    edema = "Pulmonary edema."
    page = compared(
        cfg,
        [
            (normal, NORMAL, "The heart is normal in size."),
            (abnormal, edema, "There is pulmonary edema."),
            (normal, edema, NORMAL),
            (abnormal, NORMAL, edema),
        ],
    )
    assert re.findall("<h3>(.*?)</h3>|Image of (case .)", page[page.index("Cases") :]) == [
        ("changed, abnormal: 1", ""),
        ("", "case 3"),
        ("changed, normal: 1", ""),
        ("", "case 2"),
        ("unchanged, abnormal: 1", ""),
        ("", "case 1"),
        ("unchanged, normal: 1", ""),
        ("", "case 0"),
    ]


def changed_page(cfg):
    """Five abnormal reports that change in their errors, by different numbers, and one answer.

    Beside them reports that are normal, or have not changed.
    """
    asked, told = examples(2)
    labels = "Pulmonary edema. Rib fracture. Small left pleural effusion."
    told = dataclasses.replace(told, answer=labels)
    fracture = "Rib fracture."
    return compared(
        cfg,
        [
            (told, fracture, labels),
            (told, fracture, NORMAL),
            (told, fracture, f"{fracture} Pulmonary edema. <&>"),
            (told, fracture, "Pulmonary edema."),
            (told, NORMAL, labels),
            (told, labels, labels),
            (dataclasses.replace(told, answer=NORMAL), labels, NORMAL),
            (asked, "It is not seen.", "[0.0, 0.0, 1.0, 1.0]"),
        ],
    )


def test_the_figure_shows_the_median_change(monkeypatch, cfg, capsys, few_resamples, tmp_path):
    page = tmp_path / "eval" / "report.html"
    page.parent.mkdir()
    page.write_text(changed_page(cfg))
    words = ["report_page.py", str(ROOT / "config.yaml"), f"out={tmp_path}"]
    monkeypatch.setattr("sys.argv", words)
    report_page.main()
    assert capsys.readouterr().out.strip() == str(page.with_name("figure.svg"))
    svg = page.with_name("figure.svg").read_text()
    # It stands alone, and a strict parser reads it.
    figure = ElementTree.fromstring(svg)
    assert re.findall("Image of (case .)", svg) == ["case 2", "case 7"]
    assert "<&>" in "".join(figure.itertext())
    assert figure.find(f"{{{report_page.SVG}}}title").text
    assert all(address.startswith("data:image/jpeg") for address in Tags(svg).addresses)
    assert len(svg) < 60_000


def test_no_figure_without_a_change(monkeypatch, cfg, tmp_path, few_resamples):
    monkeypatch.setattr(
        "sys.argv", ["report_page.py", str(ROOT / "config.yaml"), f"out={tmp_path}"]
    )
    with pytest.raises(InputError, match=r"report\.html: no such page"):
        report_page.main()
    asked, told = examples(2)
    page = compared(cfg, [(told, NORMAL, NORMAL), (asked, "Not seen.", "[0, 0, 1, 1]")])
    with pytest.raises(InputError, match="no case of report that is changed, abnormal"):
        report_page.figure(page)


def test_clear_differences_are_bold():
    entry = {"value": 0.5, "interval": [0.4, 0.6], "difference": [0.2, 0.1, 0.3]}
    unclear = entry | {"difference": [0.2, -0.1, 0.3]}
    html = report_page.html_table({"m": {"a": entry, "b": entry}, "n": {"a": entry, "b": unclear}})
    assert html.count("<b>+0.200</b><small>[+0.100, +0.300]</small>") == 1
    assert html.count("<b>") == 1


HOSTILE = '<script>alert(1)</script> <img src=x onerror=y> & "quoted" edema'


def write_run(folder):
    """The log of a run with hostile text everywhere."""
    folder.mkdir()
    sample = {"text": HOSTILE, "reward": 0.5, "advantage": 0.0, "parts": {HOSTILE: 0.25}}
    groups, rows = [], []
    for step in range(3):
        for task in ("grounding", "report"):
            group = {"step": step, "task": task, "reference": f"{task}-{step}"}
            groups.append(group | {"question": HOSTILE, "samples": [sample]})
        rows.append({"step": step, "reward": step / 7, "rewards/mccs/mean": 0.1, "kl": 0.0})
    (folder / "samples.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def page_of(cfg, text):
    """The page of 200 cases in which every text is `text`."""
    given, rows = [], []
    for e in examples(200):
        example = dataclasses.replace(e, question=text, answer=text, id=text + e.id)
        given.append(example)
        same = {"task": e.task, "boxes": list(e.boxes), "thinking": text, "id": example.id}
        rows.append(report(0, text, text, e.id, **same))
    predictions = {"<b>": rows}
    results = evaluation.summarise(predictions, cfg)
    return report_page.page(cfg, results, predictions, given)


def test_the_page_stands_alone_and_shows_generated_text_as_text(
    cfg, tmp_path, monkeypatch, few_resamples
):
    """Hostile text everywhere: it neither adds a tag nor gets lost. 200 cases stay small."""
    monkeypatch.setattr(report_page, "CASES", 200)
    write_run(tmp_path / "grpo")
    page = page_of(cfg, HOSTILE)
    loud, quiet = Tags(page), Tags(page_of(cfg, "calm"))
    # The labels of the hostile text are underlined, and have chips.
    own = ("u", "span")
    assert Counter(loud.tags) - Counter(own * 9999) == Counter(quiet.tags) - Counter(own * 9999)
    assert "script" not in loud.tags
    assert loud.text.count("alert(1)") >= 400
    assert "onerror=y" in loud.text
    assert loud.tags.count("polyline") == 6
    assert len(loud.addresses) == 200
    assert all(address.startswith("data:image/jpeg;base64,") for address in loud.addresses)
    # The last groups of each task.
    last = ["report-1", "report-2", "grounding-1", "grounding-2"]
    assert re.findall(r"Reference: (\w+-\d)", loud.text) == last
    assert len(page) < 10e6
    assert "http" not in page.replace(report_page.SVG, "")


def test_pictures_have_a_text(cfg, tmp_path, monkeypatch, few_resamples):
    """A screen reader says what a plot or an image is."""
    monkeypatch.setattr(report_page, "CASES", 6)
    write_run(tmp_path / "grpo")
    page = page_of(cfg, "calm")
    labelled = re.findall(r'<svg [^>]*role="img"\s+aria-label="[^"]+"', page)
    assert len(labelled) == page.count("<svg") == 6 + 3


# ------------------------------------------------------------------------------- in a browser

# Shows a page in a frame of each width, and the figure as an image; writes what it sees as JSON.
WATCH = """<!doctype html><meta charset=utf-8><pre id=seen></pre><script>
const seen = { frames: [] };
const figure = new Image();
figure.src = "data:image/svg+xml," + encodeURIComponent(FIGURE);
const look = (width) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
  frame.onload = () => {
    const page = frame.contentDocument, inside = frame.contentWindow;
    for (const details of page.querySelectorAll("details")) details.open = true;
    const stops = [...page.querySelectorAll("a, button, input, summary, [tabindex]")];
    const shown = (stop) => {
      stop.focus();
      const style = inside.getComputedStyle(stop);
      return page.activeElement === stop && style.outlineStyle === "solid";
    };
    seen.frames.push({
      width: inside.innerWidth,
      beyond: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      stops: stops.length,
      shown: stops.filter(shown).length,
      films: [...page.querySelectorAll(".film")].map((film) => film.clientHeight),
    });
    done();
  };
  frame.srcdoc = PAGE;
  document.body.append(frame);
});
onload = async () => {
  for (const width of WIDTHS) await look(width);
  // How light are the texts, the right half, where a phone shows the figure?
  await figure.decode().catch(() => {});
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  canvas.width = 350;
  canvas.height = 350 * figure.naturalHeight / figure.naturalWidth;
  pen.drawImage(figure, 0, 0, canvas.width, canvas.height);
  const { data } = pen.getImageData(175, 0, 175, canvas.height);
  seen.light = data.reduce((sum, value) => sum + value, 0) / data.length;
  document.getElementById("seen").textContent = JSON.stringify(seen);
};
</script>"""


def browser():
    """The program $CHROME, or a browser in the path that shows pages without a window."""
    names = (os.environ.get("CHROME", ""), "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.mark.skipif(not browser(), reason="no browser: install chromium, or set CHROME")
def test_in_a_browser(cfg, tmp_path, few_resamples):
    """The page fits a desktop and a phone, the keyboard's place is seen, nothing is complained."""
    write_run(tmp_path / "grpo")
    page = changed_page(cfg)
    wrapper = tmp_path / "watch.html"
    widths = [1280, 390]
    values = {"WIDTHS": widths, "PAGE": page, "FIGURE": report_page.figure(page)}
    text = WATCH
    for name, value in values.items():
        text = text.replace(name, json.dumps(value).replace("</", r"<\/"), 1)
    wrapper.write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    command = [browser(), *options, "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    (seen,) = re.findall(r"<pre id=\"seen\">(\{.*?\})</pre>", done.stdout)
    seen = json.loads(seen)
    assert [frame["width"] for frame in seen["frames"]] == widths
    for frame in seen["frames"]:
        assert frame["beyond"] == 0
        assert frame["shown"] == frame["stops"] > 6
        assert len(frame["films"]) == 8
        assert min(frame["films"]) > 100
    # Texts on white: the images are on the left, and the white is not the canvas's.
    assert seen["light"] > 220
