"""Metrics against scikit-learn, brute force and hand numbers; prediction order; empty cases; files."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import classification_report

import data
import eval as evaluation
import model
from rewards import LABELS, extract_labels, iou

SENTENCES = ["Heart size is normal.", "Moderate cardiomegaly.", "Possible pneumonia.", "No pleural effusion.",
             "Small left pleural effusion.", "Bibasilar atelectasis.", "Pulmonary edema.", "Right pneumothorax.",
             "The lungs are clear.", "Dense consolidation on the left.", "Pacemaker in place.", "Rib fracture."]


def report(i, answer, reference, patient=None, **other):
    return {"id": f"r{i}", "task": "report", "label": "", "patient": f"p{i}" if patient is None else patient,
            "text": answer, "answer": answer, "valid": bool(answer), "finished": True, "n_tokens": 3,
            "reference": reference, "boxes": []} | other


def grounding(i, answer, boxes, label="Edema", **other):
    return report(i, answer, "", task="grounding", id=f"g{i}", boxes=boxes, label=label, **other)


def text_of(boxes):
    return ", ".join(str(list(box)) for box in boxes)


def random_reports(rng, n, patients=None):
    def text():
        return " ".join(rng.choice(SENTENCES, rng.integers(0, 4), replace=False))
    return [report(i, text(), text() or SENTENCES[0], None if patients is None else f"p{rng.integers(patients)}")
            for i in range(n)]


def random_boxes(rng, n):
    low = rng.uniform(0, 0.5, (n, 2))
    return np.round(np.concatenate([low, low + rng.uniform(0.1, 0.4, (n, 2))], 1), 2).tolist()


def random_groundings(rng, n):
    rows = []
    for i in range(n):
        boxes = random_boxes(rng, rng.integers(0, 4))
        moved = [[round(x + rng.normal(0, 0.04), 2) for x in box] for box in boxes if rng.random() < 0.8]
        moved = [box for box in moved if box[0] < box[2] and box[1] < box[3]] + random_boxes(rng, rng.integers(0, 2))
        rows.append(grounding(i, text_of(moved) or "Not seen.", boxes, str(rng.choice(["Edema", "Fracture"]))))
    return rows


def config(tmp_path, **keys):
    keys = {"split": "test", "limit": 0, "batch_size": 2, "bootstrap": 20} | keys
    return SimpleNamespace(seed=0, out=str(tmp_path), rewards=data.RewardsConfig(), eval=SimpleNamespace(**keys),
                           grpo=SimpleNamespace(max_new_tokens=8))


def test_label_scores_equal_scikit_learn():
    rows = random_reports(np.random.default_rng(0), 150)
    metrics = evaluation.report_metrics(rows, extract_labels)
    y_pred, y_true = (np.isin(extract_labels([p[key] for p in rows]), (1, 3)) for key in ("answer", "reference"))
    top5 = [2, 5, 6, 8, 10]
    assert [LABELS[i] for i in top5] == list(evaluation.TOP5)
    seen = False
    for name, columns in {"14": range(14), "13": range(1, 14), "5": top5}.items():
        columns = list(columns)
        oracle = classification_report(y_true[:, columns], y_pred[:, columns], output_dict=True, zero_division=0)
        per_label = [oracle[str(i)] for i in range(len(columns))]
        seen |= any(row["support"] == 0 for row in per_label)
        macro = np.mean([row["f1-score"] for row in per_label if row["support"]])
        assert metrics[f"ce_f1_macro{name}"] == pytest.approx(macro)
        assert metrics[f"ce_f1_micro{name}"] == pytest.approx(oracle["micro avg"]["f1-score"])
        if name != "5":
            assert metrics[f"ce_precision_micro{name}"] == pytest.approx(oracle["micro avg"]["precision"])
            assert metrics[f"ce_recall_micro{name}"] == pytest.approx(oracle["micro avg"]["recall"])
    assert seen                                         # the rule for labels without support was exercised
    sick = y_true[:, 1:].any(1)
    assert 0 < sick.sum() < len(rows)
    oracle = classification_report(y_true[sick, 1:], y_pred[sick, 1:], output_dict=True, zero_division=0)
    assert metrics["abnormal_f1_micro13"] == pytest.approx(oracle["micro avg"]["f1-score"])
    macro = np.mean([oracle[str(i)]["f1-score"] for i in range(13) if oracle[str(i)]["support"]])
    assert metrics["abnormal_f1_macro13"] == pytest.approx(macro)


def test_report_numbers_by_hand():
    normal, sick = "Heart size is normal.", "Moderate cardiomegaly. Possible pneumonia."
    rows = [report(0, normal, normal), report(1, normal, sick, finished=False), report(2, sick, sick),
            report(3, "", "Pulmonary edema.")]
    m = evaluation.report_metrics(rows, extract_labels)
    assert (m["normal_share"], m["normal_share_reference"]) == (0.5, 0.25)
    assert (m["distinct_share"], m["distinct_share_reference"]) == (0.75, 0.75)
    assert (m["mean_words"], m["mean_words_reference"]) == (12 / 4, 14 / 4)
    assert (m["format_valid"], m["truncated"], m["examples"]) == (0.75, 0.25, 4)
    assert m["ce_recall_micro13"] == pytest.approx(2 / 5)       # uncertain pneumonia is found once, missed once
    assert m["ce_precision_micro13"] == 1 and m["ce_precision_micro14"] == pytest.approx(3 / 4)
    assert m["ce_f1_macro13"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert m["rouge_l"] == pytest.approx((1 + 2 / 11 + 1 + 0) / 4)   # the full stop is a token of both
    exact = evaluation.report_metrics([report(0, sick, sick)], extract_labels)
    assert all(exact[key] == pytest.approx(1) for key in ("bleu1", "bleu4", "rouge_l", "gleu", "ce_f1_micro14"))


def test_a_label_without_reference_counts_in_micro_only():
    rows = [report(0, "Moderate cardiomegaly. Rib fracture.", "Moderate cardiomegaly.")]
    m = evaluation.report_metrics(rows, extract_labels)
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
        scores.append(sum((recall[k + 1] - recall[k]) * precision[k + 1] for k in range(len(recall) - 1)))
    return float(np.mean(scores))


def test_map_by_hand_and_brute_force():
    a, b, far = [0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.8, 0.1, 0.9]
    score = evaluation.mean_average_precision
    assert score([grounding(0, text_of([a, b]), [a, b])]) == 1
    assert score([grounding(0, text_of([far, a]), [a, b])]) == pytest.approx(1 / 4)      # 1/2 precision at recall 1/2
    assert score([grounding(0, text_of([a, a]), [a])]) == 1          # the repeat comes after full recall
    # First boxes of both answers (miss, hit) come before the second box (hit): precision 1/2 and 2/3.
    rows = [grounding(0, text_of([far, a]), [a]), grounding(1, text_of([b]), [b])]
    assert score(rows) == pytest.approx(2 / 3)
    # A false positive on an image without the finding counts; a class without reference boxes does not.
    rows = [grounding(0, text_of([a]), []), grounding(1, text_of([b]), [b]), grounding(2, text_of([a]), [], "Fracture")]
    assert score(rows) == pytest.approx(1 / 2)
    for seed in range(30):
        rows = random_groundings(np.random.default_rng(seed), 12)
        assert score(rows) == pytest.approx(brute_force_map(rows))


def test_grounding_numbers_by_hand():
    a, half, b = [0.0, 0.0, 0.4, 0.4], [0.0, 0.0, 0.4, 0.24], [0.5, 0.5, 0.9, 0.9]       # IoU of a and half: 0.6
    rows = [grounding(0, text_of([half]), [a]), grounding(1, text_of([half, b]), [a]), grounding(2, "Not seen.", []),
            grounding(3, "", []), grounding(4, "[0.1, 0.2]", []), grounding(5, text_of([b]), []),
            grounding(6, "Not seen.", [a], finished=False)]
    m = evaluation.grounding_metrics(rows)
    radvlm = [1.2 / 1.6, 1.2 / 2.6, 1, 0, 0, 0, 0]
    assert m["soft_f1"] == pytest.approx(np.mean(radvlm))
    assert m["soft_f1_nonempty"] == pytest.approx((1.2 / 1.6 + 1.2 / 2.6) / 3)
    assert m["matched_iou"] == pytest.approx(0.6)
    assert m["empty_accuracy"] == 1 / 4                  # neither silence nor a broken box says that nothing is there
    assert m["truncated"] == pytest.approx(1 / 7)


@pytest.mark.parametrize("patients", [None, 9])
def test_bootstrap_equals_resampling_loop(patients):
    rng = np.random.default_rng(5)
    before, after = random_reports(rng, 30, patients), random_reports(rng, 30)
    after = [x | {"reference": y["reference"], "patient": y["patient"]} for x, y in zip(after, before)]
    boxes, others = random_groundings(rng, 20), random_groundings(rng, 20)
    boxes = boxes if patients is None else [x | {"patient": f"p{rng.integers(patients)}"} for x in boxes]
    others = [x | {key: y[key] for key in ("boxes", "label", "patient")} for x, y in zip(others, boxes)]
    models = {"sft": before + boxes, "grpo": after + others}
    result = evaluation.bootstrap(models, evaluation.BOOTSTRAPPED, 25, 3, extract_labels)
    scores = {"soft_f1": evaluation.grounding_metrics} | dict.fromkeys(
        ("ce_f1_macro13", "ce_f1_micro13"), lambda rows: evaluation.report_metrics(rows, extract_labels))
    for metric, task in (("ce_f1_macro13", "report"), ("ce_f1_micro13", "report"), ("soft_f1", "grounding")):
        rows = {name: [p for p in predictions if p["task"] == task] for name, predictions in models.items()}
        names = sorted({p["patient"] for p in rows["sft"]})
        draws = np.random.default_rng(3).multinomial(len(names), [1 / len(names)] * len(names), 25)
        loop = {name: [] for name in models}
        for draw in draws:
            chosen = [names[i] for i in np.repeat(np.arange(len(names)), draw)]
            for name in models:
                resample = [p for patient in chosen for p in rows[name] if p["patient"] == patient]
                loop[name].append(scores[metric](resample)[metric])
        difference = np.subtract(loop["grpo"], loop["sft"])
        assert result[metric]["grpo"]["interval"] == pytest.approx(np.nanpercentile(loop["grpo"], [2.5, 97.5]))
        whole = scores[metric](rows["grpo"])[metric] - scores[metric](rows["sft"])[metric]
        expected = [whole, *np.nanpercentile(difference, [2.5, 97.5])]
        assert result[metric]["grpo"]["difference"] == pytest.approx(expected)
        assert result[metric]["sft"]["difference"] == [0, 0, 0]


def test_bootstrap_needs_the_same_examples():
    with pytest.raises(ValueError, match="same examples"):
        evaluation.bootstrap({"a": [report(0, "x", "y")], "b": [report(1, "x", "y")]}, ["ce_f1_micro13"], 5, 0,
                             extract_labels)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("predictions", [
    [], [report(0, "", "Pulmonary edema.")], [report(0, "", "Heart size is normal.")], [grounding(0, "", [])],
    [grounding(0, "", [[0.1, 0.1, 0.2, 0.2]])], [report(i, "", "Pulmonary edema.", "") for i in range(3)],
    [report(0, "Pulmonary edema.", "Pulmonary edema."), grounding(0, "[0, 0, 1, 1]", [[0, 0, 1, 1]])]])
def test_empty_cases(predictions, tmp_path):
    table = evaluation.table(evaluation.summarise({"a": predictions, "b": predictions}, config(tmp_path)))
    assert "nan" not in table.lower()
    assert ("reports" in table) == any(p["task"] == "report" for p in predictions)
    assert ("grounding" in table) == any(p["task"] == "grounding" for p in predictions)


def test_table_is_aligned_and_shows_differences(tmp_path):
    rows = random_reports(np.random.default_rng(1), 20)
    models = {"sft": rows, "grpo": [p | {"answer": p["reference"]} for p in rows]}
    lines = evaluation.table(evaluation.summarise(models, config(tmp_path))).splitlines()
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines if "|" in line}) == 1
    row, = [line for line in lines if line.startswith("minus sft: ce_f1_micro13")]
    gain = 1 - evaluation.report_metrics(rows, extract_labels)["ce_f1_micro13"]
    assert f"{gain:+.3f} [" in row.split("|")[2] and not row.split("|")[1].strip()
    assert "1.000 [1.000, 1.000]" in evaluation.table(evaluation.summarise(models, config(tmp_path)))


class Policy:
    """Answers with its example's id; skips the examples it is told to."""

    def __init__(self, skip=()):
        self.skip = skip

    def sample(self, examples, group_size, max_new_tokens, temperature):
        assert group_size == 1 and temperature == 0.0
        return [SimpleNamespace(example=e, texts=[f"Text {e.id}."], finished=[True], tokens=[np.zeros(4)])
                for e in examples if e.id not in self.skip]


def examples(n):
    return [data.Example(id=str(i), task="report" if i % 2 else "grounding", images=(), question="", answer="a",
                         boxes=() if i % 2 else ((0, 0, 1, 1),)) for i in range(n)]


@pytest.mark.parametrize("n, world", [(7, 3), (6, 3), (1, 2), (0, 2), (5, 1)])
def test_predict_keeps_the_order_over_ranks(n, world, monkeypatch, tmp_path):
    shares, given = [], examples(n)
    monkeypatch.setattr(model, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(model, "rank", lambda: rank)
        monkeypatch.setattr(model, "gather_objects", lambda rows: shares.append(rows) or [rows])
        evaluation.predict(Policy(skip="4"), given, config(tmp_path))
    assert sum(map(len, shares)) == len([e for e in given if e.id != "4"])     # nothing is decoded twice
    monkeypatch.setattr(model, "gather_objects", lambda rows: shares)
    result = evaluation.predict(Policy(skip="4"), given, config(tmp_path))
    assert [p["answer"] for p in result] == [f"Text {i}." for i in range(n) if i != 4]
    assert json.loads(json.dumps(result)) == result


def test_resolve_prefers_best_then_last(tmp_path):
    assert evaluation.resolve(tmp_path) == tmp_path and evaluation.resolve("org/name") == "org/name"
    (tmp_path / "last").mkdir()
    assert evaluation.resolve(tmp_path) == str(tmp_path / "last")
    (tmp_path / "best").mkdir()
    assert evaluation.resolve(tmp_path) == str(tmp_path / "best")


def test_column_names_are_the_shortest_distinct_tails():
    assert evaluation.column_names(["out/sft", "out/grpo/", "out/./sft"]) == {"sft": "out/./sft", "grpo": "out/grpo/"}
    assert list(evaluation.column_names(["x/sft", "y/sft"])) == ["x/sft", "y/sft"]
    assert list(evaluation.column_names(["/a", "/b/a"])) == ["a", "b/a"]


def test_evaluate_checkpoints_writes_predictions_and_metrics(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "load_split", lambda cfg, split: examples(9))
    monkeypatch.setattr(model, "load_policy", lambda cfg, path: Policy())
    table, results = evaluation.evaluate_checkpoints(config(tmp_path, limit=3), {"x/sft": "x/sft", "grpo": "grpo"})
    assert capsys.readouterr().out.strip() == table.strip()
    rows = [json.loads(line) for line in (tmp_path / "eval/x/sft.jsonl").read_text().splitlines()]
    assert [p["id"] for p in rows] == ["1", "3", "5", "0", "2", "4"]     # the first three of each task
    stored = json.loads((tmp_path / "eval/metrics.json").read_text(), parse_constant=pytest.fail)
    assert stored["reports"]["grpo"]["examples"] == 3
    assert math.isnan(results["grounding"]["grpo"]["matched_iou"])
    assert stored["grounding"]["grpo"]["matched_iou"] is None
    assert not list(Path(tmp_path).rglob("*.tmp"))


def test_command_line_separates_folders_from_overrides(monkeypatch):
    calls = []
    monkeypatch.setattr(data, "load_config", lambda path, overrides: (path, overrides))
    monkeypatch.setattr(evaluation, "evaluate_checkpoints", lambda cfg, paths: calls.append((cfg, list(paths))))
    monkeypatch.setattr("sys.argv", ["eval.py", "c.yaml", "seed=1", "--checkpoint", "x/a", "x/b", "eval.limit=2"])
    evaluation.main()
    assert calls == [(("c.yaml", ["seed=1", "eval.limit=2"]), ["a", "b"])]
