"""Metrics against scikit-learn, sacrebleu, pycocotools, pycocoevalcap, brute force and hand numbers; prediction order; the page."""

import contextlib
import dataclasses
import html.parser
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import sacrebleu
from PIL import Image
from pycocoevalcap.cider.cider import Cider
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import classification_report, precision_recall_fscore_support

import data
import eval as evaluation
import model
from rewards import LABELS, extract_labels, iou, parse_boxes, tokenize

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


def report(i, answer, reference, patient=None, **other):
    return {
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
    } | other


def grounding(i, answer, boxes, label="Edema", **other):
    return report(
        i,
        answer,
        "",
        **{
            "task": "grounding",
            "kind": "abnormality",
            "id": f"g{i}",
            "boxes": boxes,
            "label": label,
        }
        | other,
    )


def text_of(boxes):
    return ", ".join(str(list(box)) for box in boxes)


def random_reports(rng, n, patients=None):
    def text():
        return " ".join(rng.choice(SENTENCES, rng.integers(0, 4), replace=False))

    return [
        report(
            i,
            text(),
            text() or SENTENCES[0],
            None if patients is None else f"p{rng.integers(patients)}",
        )
        for i in range(n)
    ]


def random_boxes(rng, n, digits):
    low = rng.uniform(0, 0.5, (n, 2))
    return np.round(np.concatenate([low, low + rng.uniform(0.1, 0.4, (n, 2))], 1), digits).tolist()


def random_groundings(rng, n, digits=2):
    rows = []
    for i in range(n):
        boxes = random_boxes(rng, rng.integers(0, 4), digits)
        moved = [
            [round(x + rng.normal(0, 0.04), digits) for x in box]
            for box in boxes
            if rng.random() < 0.8
        ]
        moved = [box for box in moved if box[0] < box[2] and box[1] < box[3]] + random_boxes(
            rng, rng.integers(0, 2), digits
        )
        rows.append(
            grounding(
                i, text_of(moved) or "Not seen.", boxes, str(rng.choice(["Edema", "Fracture"]))
            )
        )
    return rows


def config(tmp_path, **keys):
    keys = {
        "split": "test",
        "limit": 0,
        "batch_size": 2,
        "bootstrap": 20,
        "temperature": 0.0,
        "samples": 1,
        "cases": 4,
    } | keys
    return SimpleNamespace(
        seed=0,
        out=str(tmp_path),
        rewards=data.RewardsConfig(),
        eval=SimpleNamespace(**keys),
        grpo=SimpleNamespace(max_new_tokens=8),
    )


def plain(blocks):
    """The first block with plain numbers, of the predictions as they are."""
    return {name: float(values[0]) for name, values in blocks[0].items()}


def of_reports(rows, training=()):
    with np.errstate(all="ignore"):
        return plain(
            evaluation.report_metrics(rows, np.ones((1, len(rows))), extract_labels, training)
        )


def of_groundings(rows):
    with np.errstate(all="ignore"):
        return plain(evaluation.grounding_metrics(rows, np.ones((1, len(rows)))))


def test_label_scores_equal_scikit_learn():
    rows = random_reports(np.random.default_rng(0), 150)
    metrics = of_reports(rows)
    y_pred, y_true = (
        np.isin(extract_labels([p[key] for p in rows]), (1, 3)) for key in ("answer", "reference")
    )
    top5 = [2, 5, 6, 8, 10]
    assert [LABELS[i] for i in top5] == list(evaluation.TOP5)
    seen = False
    for name, columns in {"14": range(14), "13": range(1, 14), "5": top5}.items():
        columns = list(columns)
        oracle = classification_report(
            y_true[:, columns], y_pred[:, columns], output_dict=True, zero_division=0
        )
        per_label = [oracle[str(i)] for i in range(len(columns))]
        seen |= any(row["support"] == 0 for row in per_label)
        macro = np.mean([row["f1-score"] for row in per_label if row["support"]])
        assert metrics[f"ce_f1_macro{name}"] == pytest.approx(macro)
        assert metrics[f"ce_f1_micro{name}"] == pytest.approx(oracle["micro avg"]["f1-score"])
        for score in ("precision", "recall"):
            assert metrics[f"ce_{score}_micro{name}"] == pytest.approx(oracle["micro avg"][score])
            macro = np.mean([row[score] for row in per_label if row["support"]])
            assert metrics[f"ce_{score}_macro{name}"] == pytest.approx(macro)
    assert seen  # the rule for labels without support was exercised
    sick = y_true[:, 1:].any(1)
    assert 0 < sick.sum() < len(rows)
    oracle = classification_report(
        y_true[sick, 1:], y_pred[sick, 1:], output_dict=True, zero_division=0
    )
    assert metrics["abnormal_f1_micro13"] == pytest.approx(oracle["micro avg"]["f1-score"])
    macro = np.mean([oracle[str(i)]["f1-score"] for i in range(13) if oracle[str(i)]["support"]])
    assert metrics["abnormal_f1_macro13"] == pytest.approx(macro)

    samples = precision_recall_fscore_support(y_true, y_pred, average="samples", zero_division=0)
    assert [
        metrics[f"ce_{score}_samples14"] for score in ("precision", "recall", "f1")
    ] == pytest.approx(samples[:3])
    certain = extract_labels([p["reference"] for p in rows]) != 3
    scored = [
        precision_recall_fscore_support(
            y_true[certain[:, k], k], y_pred[certain[:, k], k], average="binary", zero_division=0
        )[2]
        for k in range(1, 14)
        if y_true[certain[:, k], k].any()
    ]
    assert metrics["ce_certain_f1_macro13"] == pytest.approx(np.mean(scored)) and not certain.all()
    with np.errstate(all="ignore"):
        labels = evaluation.report_metrics(rows, np.ones((1, 150)), extract_labels)[1]
    oracle = classification_report(y_true, y_pred, output_dict=True, zero_division=0)
    for k, label in enumerate(LABELS):
        f1 = oracle[str(k)]["f1-score"]
        assert (
            labels[label][0] == pytest.approx(f1)
            if oracle[str(k)]["support"]
            else math.isnan(labels[label][0])
        )


def test_bleu_and_cider_equal_published_libraries():
    rows = random_reports(np.random.default_rng(2), 60)
    metrics, tokens = (
        of_reports(rows),
        [[" ".join(tokenize(p[key])) for p in rows] for key in ("answer", "reference")],
    )
    for n in range(1, 5):
        oracle = sacrebleu.BLEU(
            max_ngram_order=n, tokenize="none", smooth_method="none", force=True
        ).corpus_score(tokens[0], [tokens[1]])
        assert metrics[f"bleu{n}"] == pytest.approx(oracle.score / 100)
    _, scores = Cider().compute_score(
        {i: [t] for i, t in enumerate(tokens[1])}, {i: [t] for i, t in enumerate(tokens[0])}
    )
    assert evaluation.cider_scores(
        *([p[key] for p in rows] for key in ("answer", "reference"))
    ) == pytest.approx(scores)
    assert metrics["cider"] == pytest.approx(scores.mean()) and scores.max() > 1


def test_reports_that_training_has_are_told_apart():
    rows = [
        report(0, "Clear lungs.", "Moderate cardiomegaly."),
        report(1, "Pulmonary edema.", "Pulmonary edema."),
    ]
    m = of_reports(rows, ["clear  lungs", "moderate cardiomegaly"])
    assert (m["copied_share"], m["copied_share_reference"], m["unseen_f1_micro13"]) == (
        0.5,
        0.5,
        1,
    ) and m["ce_f1_micro13"] < 1
    assert "copied_share" not in of_reports(rows)


def test_a_collapsed_model_has_bleu_zero():
    m = of_reports(
        [report(0, "", "Clear lungs."), report(1, "Clear lungs", "Clear lungs are seen.")]
    )
    assert (
        m["bleu1"] > 0
        and m["bleu3"] == m["bleu4"] == 0
        and of_reports([report(0, "", "Clear.")])["bleu1"] == 0
    )


def test_kinds_of_grounding_are_told_apart(tmp_path):
    """Each kind has a block of its own; phrases are one class of the average precision, whatever they say."""
    a = [0.1, 0.1, 0.4, 0.4]
    rows = [
        grounding(0, text_of([a]), [a]),
        grounding(1, "Not seen.", [a], kind="phrase", label="one thing"),
        grounding(2, text_of([a]), [a], kind="phrase", label="another"),
    ]
    results = evaluation.summarise({"m": rows}, config(tmp_path))
    value = {
        block: results[block]["map50"]["m"]["value"] for block in results if "labels" not in block
    }
    assert value == {"grounding": 0.75, "grounding of abnormality": 1, "grounding of phrase": 0.5}
    assert list(results["grounding labels"]) == [
        "soft_f1 Edema",
        "ap50 Edema",
        "soft_f1 phrase",
        "ap50 phrase",
    ]


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
    assert m["ce_recall_micro13"] == pytest.approx(
        2 / 5
    )  # uncertain pneumonia is found once, missed once
    assert m["ce_precision_micro13"] == 1 and m["ce_precision_micro14"] == pytest.approx(3 / 4)
    assert m["ce_f1_macro13"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert m["rouge_l"] == pytest.approx(
        (1 + 2 / 11 + 1 + 0) / 4
    )  # the full stop is a token of both
    exact = of_reports([report(0, sick, sick)])
    assert all(
        exact[key] == pytest.approx(1)
        for key in ("bleu1", "bleu4", "rouge_l", "gleu", "ce_f1_micro14")
    )


def test_a_label_without_reference_counts_in_micro_only():
    rows = [report(0, "Moderate cardiomegaly. Rib fracture.", "Moderate cardiomegaly.")]
    m = of_reports(rows)
    assert m["ce_f1_macro13"] == 1 and m["ce_f1_micro13"] == pytest.approx(2 / 3)


def brute_force_map(rows, threshold=0.5):
    """Textbook VOC (2010 on): area under the precision envelope as a step function of recall."""
    scores = []
    for label in {p["label"] for p in rows}:
        mine = [p for p in rows if p["label"] == label]
        total = sum(len(p["boxes"]) for p in mine)
        if not total:
            continue
        answers = [json.loads(f"[{p['answer']}]") if "[" in p["answer"] else [] for p in mine]
        taken, recall, precision, found, seen = set(), [0.0], [0.0], 0, 0
        for rank in range(max(map(len, answers))):
            for i, answer in enumerate(answers):
                if rank < len(answer):
                    free = [j for j in range(len(mine[i]["boxes"])) if (i, j) not in taken]
                    overlaps = [iou(answer[rank], mine[i]["boxes"][j]) for j in free]
                    seen += 1
                    if overlaps and max(overlaps) >= threshold:
                        taken.add((i, free[int(np.argmax(overlaps))]))
                        found += 1
                    recall.append(found / total)
                    precision.append(found / seen)
        recall.append(1.0)
        precision.append(0.0)
        for k in range(len(precision) - 2, -1, -1):
            precision[k] = max(precision[k], precision[k + 1])
        scores.append(
            sum((recall[k + 1] - recall[k]) * precision[k + 1] for k in range(len(recall) - 1))
        )
    return float(np.mean(scores))


def test_map_by_hand_and_brute_force():
    a, b, far = [0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.8, 0.1, 0.9]

    def score(rows):
        return of_groundings(rows)["map50"]

    assert score([grounding(0, text_of([a, b]), [a, b])]) == 1
    assert score([grounding(0, text_of([far, a]), [a, b])]) == pytest.approx(
        1 / 4
    )  # 1/2 precision at recall 1/2
    assert score([grounding(0, text_of([a, a]), [a])]) == 1  # the repeat comes after full recall
    # First boxes of both answers (miss, hit) come before the second box (hit): precision 1/2 and 2/3.
    rows = [grounding(0, text_of([far, a]), [a]), grounding(1, text_of([b]), [b])]
    assert score(rows) == pytest.approx(2 / 3)
    # A false positive on an image without the finding counts; a class without reference boxes does not.
    rows = [
        grounding(0, text_of([a]), []),
        grounding(1, text_of([b]), [b]),
        grounding(2, text_of([a]), [], "Fracture"),
    ]
    assert score(rows) == pytest.approx(1 / 2)
    for seed in range(30):
        rows = random_groundings(np.random.default_rng(seed), 12)
        assert score(rows) == pytest.approx(brute_force_map(rows))


def test_map_equals_pycocotools():
    """COCO's own evaluation of the same boxes, with scores that fall with the place of a box in its answer."""
    for seed in range(10):
        rows = random_groundings(np.random.default_rng(seed), 25, digits=5)  # no IoU on a threshold
        names = sorted({p["label"] for p in rows})
        boxes = [(i, p["label"], box) for i, p in enumerate(rows) for box in p["boxes"]]
        found = [
            (rank, i, p["label"], box)
            for i, p in enumerate(rows)
            for rank, box in enumerate(parse_boxes(p["answer"]))
        ]

        def entry(i, label, box, **more):
            # an image of its own for each question: 1000 pixels wide, so that COCO's areas and IoUs are ours
            x1, y1, x2, y2 = (1000 * v for v in box)
            return {
                "image_id": i,
                "category_id": names.index(label),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                **more,
            }

        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {
                "images": [{"id": i} for i in range(len(rows))],
                "categories": [{"id": k} for k in range(len(names))],
                "annotations": [entry(*b, id=n + 1) for n, b in enumerate(boxes)],
            }
            truth.createIndex()
            run = COCOeval(
                truth, truth.loadRes([entry(*b, score=-rank) for rank, *b in found]), "bbox"
            )
            run.evaluate()
            run.accumulate()
        precision = run.eval["precision"][:, :, :, 0, 2]  # (T, R, K): all areas, 100 detections
        m = of_groundings(rows)
        assert m["map50_coco"] == pytest.approx(precision[0].mean()) and m[
            "map_coco"
        ] == pytest.approx(precision.mean())


def test_grounding_numbers_by_hand():
    a, half, b = (
        [0.0, 0.0, 0.4, 0.4],
        [0.0, 0.0, 0.4, 0.24],
        [0.5, 0.5, 0.9, 0.9],
    )  # IoU of a and half: 0.6
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
    assert (
        m["empty_accuracy"] == 1 / 4
    )  # neither silence nor a broken box says that nothing is there
    assert m["truncated"] == pytest.approx(1 / 7)


@pytest.mark.parametrize("patients", [None, 9])
def test_bootstrap_equals_resampling_loop(patients):
    rng = np.random.default_rng(5)
    before, after = random_reports(rng, 30, patients), random_reports(rng, 30)
    after = [
        x | {"reference": y["reference"], "patient": y["patient"]} for x, y in zip(after, before)
    ]
    boxes, others = random_groundings(rng, 20), random_groundings(rng, 20)
    boxes = (
        boxes
        if patients is None
        else [x | {"patient": f"p{rng.integers(patients)}"} for x in boxes]
    )
    others = [
        x | {key: y[key] for key in ("boxes", "label", "patient")} for x, y in zip(others, boxes)
    ]
    models = {"sft": before + boxes, "grpo": after + others}
    results = evaluation.summarise(models, config("", bootstrap=25), ["Moderate cardiomegaly."])
    names = sorted({p["patient"] for p in models["sft"]})
    draws = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), 25)
    loop = {name: [] for name in models}
    for draw in [[1] * len(names), *draws]:
        chosen = [names[i] for i in np.repeat(np.arange(len(names)), draw)]
        for name in models:
            # a copy of an example stands beside it, as it does for the order of boxes
            resample = [p for p in models[name] for _ in range(chosen.count(p["patient"]))]
            reports, groundings = (
                [p for p in resample if p["task"] == task] for task in ("report", "grounding")
            )
            loop[name].append(
                {
                    "reports": of_reports(reports, ["Moderate cardiomegaly."]),
                    "grounding": of_groundings(groundings),
                }
            )
    assert {*results} == {"reports", "labels", "grounding", "grounding labels"}
    for block in ("reports", "grounding"):
        for metric, by_model in results[block].items():
            before, after = (
                np.array([m[block].get(metric, np.nan) for m in loop[name]]) for name in models
            )
            assert by_model["grpo"]["value"] == pytest.approx(after[0], nan_ok=True)
            assert by_model["grpo"]["difference"][0] == pytest.approx(
                after[0] - before[0], nan_ok=True
            )
            if metric.startswith(
                ("distinct", "examples", "cider")
            ):  # these take the split as it is
                continue
            assert by_model["grpo"]["interval"] == pytest.approx(
                np.nanpercentile(after[1:], [2.5, 97.5]), nan_ok=True
            ), metric
            assert by_model["grpo"]["difference"][1:] == pytest.approx(
                np.nanpercentile((after - before)[1:], [2.5, 97.5]), nan_ok=True
            ), metric
            assert by_model["sft"]["difference"] == [0, 0, 0]


def test_paired_differences_need_the_same_examples(tmp_path):
    with pytest.raises(ValueError, match="same examples"):
        evaluation.summarise(
            {"a": [report(0, "x", "y")], "b": [report(1, "x", "y")]}, config(tmp_path)
        )


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
def test_empty_cases(predictions, tmp_path):
    table = evaluation.table(
        evaluation.summarise({"a": predictions, "b": predictions}, config(tmp_path))
    )
    assert "nan" not in table.lower()
    assert ("reports" in table) == any(p["task"] == "report" for p in predictions)
    assert ("grounding" in table) == any(p["task"] == "grounding" for p in predictions)


def test_table_is_aligned_and_shows_differences(tmp_path):
    rows = random_reports(np.random.default_rng(1), 20)
    models = {"sft": rows, "grpo": [p | {"answer": p["reference"]} for p in rows]}
    lines = evaluation.table(evaluation.summarise(models, config(tmp_path))).splitlines()
    assert (
        len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines if "|" in line})
        == 1
    )
    (row,) = [line for line in lines if line.startswith("minus sft: ce_f1_micro13")]
    gain = 1 - of_reports(rows)["ce_f1_micro13"]
    assert f"{gain:+.3f} [" in row.split("|")[2] and not row.split("|")[1].strip()


class Policy:
    """Answers with its example's id; skips the examples it is told to."""

    def __init__(self, skip=()):
        self.skip = skip

    def sample(self, examples, group_size, max_new_tokens, temperature, stream):
        assert (group_size > 1) == (temperature > 0)
        return [
            SimpleNamespace(
                example=e,
                texts=[f"Text {e.id}.", "Edema."][:group_size],
                finished=[True] * group_size,
                tokens=[np.zeros(4)] * group_size,
            )
            for e in examples
            if e.id not in self.skip
        ]


def examples(n):
    film = SimpleNamespace(image=Image.new("L", (40, 30)))
    return [
        data.Example(
            id=str(i),
            task="report" if i % 2 else "grounding",
            images=(film,),
            question="",
            answer="Pulmonary edema.",
            boxes=() if i % 2 else ((0, 0, 1, 1),),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("n, world", [(7, 3), (6, 3), (1, 2), (0, 2), (5, 1)])
def test_predict_keeps_the_order_over_ranks(n, world, monkeypatch, tmp_path):
    shares, given = [], examples(n)
    monkeypatch.setattr(model, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(model, "rank", lambda: rank)
        monkeypatch.setattr(model, "gather_objects", lambda rows: shares.append(rows) or [rows])
        evaluation.predict(Policy(skip="4"), given, config(tmp_path))
    assert sum(map(len, shares)) == len(
        [e for e in given if e.id != "4"]
    )  # nothing is decoded twice
    monkeypatch.setattr(model, "gather_objects", lambda rows: shares)
    result = evaluation.predict(Policy(skip="4"), given, config(tmp_path))
    assert [p["answer"] for p in result] == [f"Text {i}." for i in range(n) if i != 4]
    assert json.loads(json.dumps(result)) == result


def test_best_of_several_samples_is_what_the_rewards_pay_most(tmp_path):
    result = evaluation.predict(Policy(), examples(4), config(tmp_path, samples=2, temperature=1.0))
    assert [p["answer"] for p in result] == [
        "Text 0.",
        "Edema.",
        "Text 2.",
        "Edema.",
    ]  # no box is better than another


def test_predictions_of_another_program(tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": "Edema."}) + "\n" for i in (1, 0, 2)))
    rows = evaluation.read_predictions(path, examples(3))
    assert [(p["id"], p["answer"], p["task"]) for p in rows] == [
        ("0", "Edema.", "grounding"),
        ("1", "Edema.", "report"),
        ("2", "Edema.", "grounding"),
    ]
    for text, message in (
        ('{"id": 0}', "line 1"),
        ('{"id": 0, "text": null}', "line 1.*expected text, got None"),
        ('{"id": 0, "text": ""}', "no prediction for 2 of 3 examples, such as id '1'"),
    ):
        path.write_text(text)
        with pytest.raises(data.InputError, match=f"theirs.jsonl.*{message}"):
            evaluation.read_predictions(path, examples(3))


def test_resolve_prefers_best_then_last(tmp_path):
    assert evaluation.resolve(tmp_path) == tmp_path and evaluation.resolve("org/name") == "org/name"
    (tmp_path / "last").mkdir()
    assert evaluation.resolve(tmp_path) == str(tmp_path / "last")
    (tmp_path / "best").mkdir()
    assert evaluation.resolve(tmp_path) == str(tmp_path / "best")


def test_what_one_model_lacks_no_model_is_measured_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "load_split", lambda cfg, split: examples(6))
    monkeypatch.setattr(
        model, "load_policy", lambda cfg, path: Policy(skip="3" if path == "a" else "")
    )
    _, results = evaluation.evaluate_checkpoints(config(tmp_path), {"a": "a", "b": "b"})
    assert (
        results["reports"]["examples"]["b"]["value"] == 2
        and "1 of 6 examples" in capsys.readouterr().out
    )
    assert len((tmp_path / "eval" / "b.jsonl").read_text().splitlines()) == 6


def test_no_training_split_costs_its_metrics_only(monkeypatch, tmp_path, capsys):
    def load_split(cfg, split):
        if split == "train":
            raise data.InputError("train.jsonl: cannot read")
        return examples(4)

    monkeypatch.setattr(data, "load_split", load_split)
    monkeypatch.setattr(model, "load_policy", lambda cfg, path: Policy())
    _, results = evaluation.evaluate_checkpoints(config(tmp_path), {"a": "a"})
    assert "copied_share" not in results["reports"] and "train.jsonl" in capsys.readouterr().out


def test_column_names_are_the_shortest_distinct_tails():
    assert evaluation.column_names(["out/sft", "out/grpo/", "out/./sft"]) == {
        "sft": "out/./sft",
        "grpo": "out/grpo/",
    }
    assert list(evaluation.column_names(["x/sft", "y/sft"])) == ["x/sft", "y/sft"]
    assert list(evaluation.column_names(["/a", "/b/a"])) == ["a", "b/a"]


def test_evaluate_checkpoints_writes_predictions_metrics_and_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "load_split", lambda cfg, split: examples(9))
    monkeypatch.setattr(model, "load_policy", lambda cfg, path: Policy())
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"id": i, "text": "No edema."}) + "\n" for i in range(9)))
    table, results = evaluation.evaluate_checkpoints(
        config(tmp_path, limit=3), {"x/sft": "x/sft", "grpo": "grpo"}, {"other": other}
    )
    assert capsys.readouterr().out.startswith(table)
    rows = [json.loads(line) for line in (tmp_path / "eval/x/sft.jsonl").read_text().splitlines()]
    reports, groundings = (
        [p["id"] for p in rows if p["task"] == task] for task in ("report", "grounding")
    )
    assert (
        len(reports) == len(groundings) == 3
        and reports == sorted(reports)
        and groundings == sorted(groundings)
    )  # drawn, in order
    stored = json.loads((tmp_path / "eval/metrics.json").read_text(), parse_constant=pytest.fail)
    assert (
        (reports, groundings) != (["1", "3", "5"], ["0", "2", "4"])
        and stored["reports"]["examples"]["grpo"]["value"] == 3
        and list(stored["reports"]["bleu4"]) == ["x/sft", "grpo", "other"]
    )
    assert math.isnan(results["grounding"]["matched_iou"]["grpo"]["value"])
    assert stored["grounding"]["matched_iou"]["grpo"]["value"] is None
    assert (tmp_path / "eval/report.html").read_text().count("class=case") == 4
    assert not list(Path(tmp_path).rglob("*.tmp"))


class Tags(html.parser.HTMLParser):
    """All tags of a page, and all addresses in them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, text):
        self.text += text


def test_every_box_is_drawn():
    """The picture is well-formed, or a browser would show its first box only: references dashed, then each model's in its colour."""
    example = dataclasses.replace(
        examples(1)[0], boxes=((0.1, 0.1, 0.4, 0.5), (0.5, 0.2, 0.9, 0.6)), answer="two"
    )
    answers = {
        "sft": "[0.10, 0.10, 0.40, 0.50]",
        "grpo": "[0.20, 0.20, 0.30, 0.40] and [0.50, 0.20, 0.80, 0.60]",
    }
    predictions = {
        name: report(0, answer, "two") | {"task": "grounding", "boxes": list(example.boxes)}
        for name, answer in answers.items()
    }
    _, svg, _ = evaluation.grounding_case(example, predictions)
    drawn = [
        (r.get("stroke"), r.get("stroke-dasharray") != "none", float(r.get("x")))
        for r in ElementTree.fromstring(svg)
    ]
    white, first, second = "#ffffff", *evaluation.COLOURS[:2]
    assert drawn == [
        (white, True, 0.1),
        (white, True, 0.5),
        (first, False, 0.1),
        (second, False, 0.2),
        (second, False, 0.5),
    ]


def test_the_page_stands_alone_and_shows_generated_text_as_text(tmp_path):
    """Hostile text everywhere: it neither adds a tag nor gets lost. 200 cases stay small."""
    hostile = '<script>alert(1)</script> <img src=x onerror=y> & "quoted" edema'
    given = [
        dataclasses.replace(e, question=hostile, answer=hostile, id=hostile + e.id)
        for e in examples(200)
    ]
    rows = [
        report(i, hostile, hostile)
        | {"task": e.task, "boxes": list(e.boxes), "thinking": hostile, "id": e.id}
        for i, e in enumerate(given)
    ]
    calm = [r | {key: "calm" for key in ("text", "answer", "reference", "thinking")} for r in rows]
    cfg = config(tmp_path, cases=200)
    (tmp_path / "grpo").mkdir()
    groups = [
        {
            "step": n,
            "task": task,
            "question": hostile,
            "reference": f"{task}-{n}",
            "samples": [
                {"text": hostile, "reward": 0.5, "advantage": 0.0, "parts": {hostile: 0.25}}
            ],
        }
        for n in range(3)
        for task in ("grounding", "report")
    ]
    (tmp_path / "grpo" / "samples.jsonl").write_text(
        "".join(json.dumps(group) + "\n" for group in groups)
    )
    (tmp_path / "grpo" / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": n, "reward": n / 7, "rewards/mccs/mean": 0.1, "kl": 0.0}) + "\n"
            for n in range(3)
        )
    )
    pages = []
    for predictions, shown in (
        (rows, given),
        (
            calm,
            [
                dataclasses.replace(e, question="calm", answer="calm", id=e.id[len(hostile) :])
                for e in given
            ],
        ),
    ):
        with np.errstate(all="ignore"):
            results = evaluation.summarise({"<b>": predictions}, cfg)
            pages.append(evaluation.page(cfg, results, {"<b>": predictions}, shown))
    loud, quiet = map(Tags, pages)
    assert [t for t in loud.tags if t != "u"] == [
        t for t in quiet.tags if t != "u"
    ] and loud.tags.count("script") == 1  # labels underline
    assert (
        loud.text.count("alert(1)") >= 400
        and "onerror=y" in loud.text
        and loud.tags.count("polyline") == 6
    )
    assert (
        all(address.startswith("data:image/jpeg;base64,") for address in loud.addresses)
        and len(loud.addresses) == 200
    )
    assert re.findall(r"Reference: (\w+-\d)", loud.text) == [
        "report-1",
        "report-2",
        "grounding-1",
        "grounding-2",
    ]  # the last ones of each task
    assert len(pages[0]) < 10e6 and "http" not in pages[0]


def test_command_line_separates_folders_from_overrides(monkeypatch, tmp_path):
    calls = []
    (tmp_path / "cwd" / "x" / "eval").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    for name in ("p.jsonl", "x/eval/a.jsonl"):
        Path(name).touch()
    monkeypatch.setattr(data, "load_config", lambda path, overrides: (path, overrides))
    monkeypatch.setattr(
        evaluation,
        "evaluate_checkpoints",
        lambda cfg, paths, files: calls.append((cfg, list(paths), files)),
    )
    monkeypatch.setattr(
        "sys.argv",
        [
            "eval.py",
            "c.yaml",
            "seed=1",
            "--predictions",
            "p.jsonl",
            "x/eval/a.jsonl",
            "--checkpoint",
            "x/a",
            "x/b",
            "eval.limit=2",
        ],
    )
    evaluation.main()
    assert calls == [
        (
            ("c.yaml", ["seed=1", "eval.limit=2"]),
            ["x/a", "x/b"],
            {"cwd/p": "p.jsonl", "eval/a": "x/eval/a.jsonl"},
        )
    ]
    monkeypatch.setattr("sys.argv", ["eval.py", "c.yaml", "--predictions", "absent.jsonl"])
    with pytest.raises(data.InputError, match="absent.jsonl: expected a file"):
        evaluation.main()
    monkeypatch.setattr(
        "sys.argv", ["eval.py", "c.yaml", "--checkpoint", "p", "--predictions", "p.jsonl"]
    )
    with pytest.raises(data.InputError, match="would be one column"):
        evaluation.main()
