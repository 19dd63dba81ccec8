"""Evaluation: metrics of one or several checkpoints over a split, side by side, with paired bootstrap differences.

  python eval.py config.yaml --checkpoint RUN [RUN ...] [key=value ...]

Decodes greedily; writes OUT/eval/NAME.jsonl (predictions) and OUT/eval/metrics.json. NAME is RUN's path tail.
Reports: ce_ (clinical efficacy) compares the labels that rewards.labeler reads in the generated and reference text,
uncertain as positive in both; over all 14, the 13 without No Finding, or the 5 CheXpert competition labels.
  ce_f1_micro*, ce_f1_macro*     F1 of the pooled counts; mean F1 of the labels that some reference has
  ce_precision_*, ce_recall_*    of the pooled counts; ce_recall_micro13 is the recall of positive findings
  abnormal_f1_*                  F1 over the reports whose reference has a positive label among the 13
  bleu1, bleu4; rouge_l, gleu    corpus BLEU; mean over reports
  distinct_share, normal_share   distinct texts / reports; share that says No Finding (*_reference: of the references)
  mean_words                     words per report
Grounding:
  soft_f1, soft_f1_nonempty      mean over all examples (if nothing is there: 1 for saying so, else 0); over the others
  matched_iou, map50             mean IoU of the pairs that soft-F1 matches; see mean_average_precision
  empty_accuracy                 share of the references without boxes that are answered without boxes
Both: format_valid, truncated: shares of outputs in the required format and cut at grpo.max_new_tokens.
A metric with nothing to average over is NaN in Python, null in JSON and "-" in the table.
"""
import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import model
from rewards import (LABELS, MAX_MATCHED, POSITIVE, UNCERTAIN, corpus_bleu, gleu, iou, labeler, match_boxes,
                     parse_boxes, parse_output, rouge_l, says_nothing_there, soft_f1)

TOP5 = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
COLUMNS = {"14": list(range(14)), "13": list(range(1, 14)), "5": [LABELS.index(label) for label in TOP5]}
F1_METRICS = {f"ce_f1_{average}{size}": (average, COLUMNS[size]) for average in ("micro", "macro") for size in COLUMNS}
BOOTSTRAPPED = ("ce_f1_macro13", "ce_f1_micro13", "soft_f1")


def predict(policy, examples, cfg):
    """Decodes examples greedily; JSON-able dicts in their order, on every rank, without those that `sample` skips."""
    rows, place = {}, {id(example): i for i, example in enumerate(examples)}
    mine = examples[model.rank()::model.world_size()]
    for start in tqdm(range(0, len(mine), cfg.eval.batch_size), desc="predict", disable=model.rank() != 0):
        batch = mine[start:start + cfg.eval.batch_size]
        for r in policy.sample(batch, group_size=1, max_new_tokens=cfg.grpo.max_new_tokens, temperature=0.0):
            e, text = r.example, r.texts[0]
            valid, _, answer = parse_output(text, e.task, e.style)
            rows[place[id(e)]] = {
                "id": e.id, "task": e.task, "label": e.label, "patient": e.patient, "text": text, "answer": answer,
                "valid": bool(valid), "finished": bool(r.finished[0]), "n_tokens": len(r.tokens[0]),
                "reference": e.answer, "boxes": [list(box) for box in e.boxes]}
    merged = {i: row for part in model.gather_objects(rows) for i, row in part.items()}
    return [merged[i] for i in sorted(merged)]


def mean(values):
    return float(np.mean(values)) if len(values) else math.nan


def output_metrics(predictions):
    return {"format_valid": mean([p["valid"] for p in predictions]),
            "truncated": mean([not p["finished"] for p in predictions]), "examples": len(predictions)}


def label_counts(predictions, label):
    """(N, 3, 14) zeros and ones: is what `label` reads a true positive, a false positive, a false negative?"""
    generated, reference = (np.isin(label([p[key] for p in predictions]), (POSITIVE, UNCERTAIN))
                            for key in ("answer", "reference"))
    return np.stack([generated & reference, generated & ~reference, ~generated & reference], axis=1).astype(float)


@np.errstate(invalid="ignore")
def f1_score(counts, average):
    """F1 of whole-number counts (..., 3, L) in the order of label_counts; an array (...).

    A label without a reference positive has no F1 (a 0 would blame the model for the split): it leaves the macro
    mean, while its false positives still count in micro. NaN when no label has one.
    """
    tp, fp, fn = np.moveaxis(counts.sum(-1, keepdims=True) if average == "micro" else counts, -2, 0)
    return np.nansum(2 * tp / (2 * tp + fp + fn), -1) / (tp + fn > 0).sum(-1)


@np.errstate(invalid="ignore")
def report_metrics(predictions, label):
    """Metrics over the report predictions as a flat dict of numbers; {} if there are none."""
    if not (predictions := [p for p in predictions if p["task"] == "report"]):
        return {}
    counts = label_counts(predictions, label)
    generated, reference = counts[:, 0] + counts[:, 1], counts[:, 0] + counts[:, 2]
    metrics = {name: f1_score(counts.sum(0)[:, columns], average) for name, (average, columns) in F1_METRICS.items()}
    abnormal = counts[reference[:, 1:].any(1)].sum(0)[:, 1:]
    metrics |= {f"abnormal_f1_{average}13": f1_score(abnormal, average) for average in ("micro", "macro")}
    for size in ("14", "13"):
        tp, fp, fn = counts[:, :, COLUMNS[size]].sum((0, 2))
        metrics |= {f"ce_precision_micro{size}": tp / (tp + fp), f"ce_recall_micro{size}": tp / (tp + fn)}
    answers, references = ([p[key] for p in predictions] for key in ("answer", "reference"))
    metrics |= {f"bleu{n}": corpus_bleu(answers, references, n=n) for n in (1, 4)}
    metrics |= {f.__name__: mean([f(*pair) for pair in zip(answers, references)]) for f in (rouge_l, gleu)}
    for suffix, texts, labels in (("", answers, generated), ("_reference", references, reference)):
        metrics |= {f"distinct_share{suffix}": len(set(texts)) / len(texts),
                    f"normal_share{suffix}": mean(labels[:, 0]),
                    f"mean_words{suffix}": mean([len(text.split()) for text in texts])}
    return metrics | output_metrics(predictions)


def soft_f1_scores(predictions):
    """(N,) soft-F1. Only words can say "nothing there": an empty answer, or one with broken boxes, scores 0."""
    return np.array([soft_f1(parse_boxes(p["answer"]), p["boxes"], match_empty=says_nothing_there(p["answer"]))
                     for p in predictions])


def mean_average_precision(predictions, threshold=0.5):
    """Mean, over the asked labels that have reference boxes, of the average precision at one IoU threshold.

    Boxes carry no score: all first boxes of an answer rank before all second boxes, ties in the order of the examples
    (so it does not compare with the mAP of scored detectors). Each takes the best free reference box of its example
    if their IoU reaches the threshold, else it is a false positive. All-point interpolation.
    """
    scores = []
    for label in sorted({p["label"] for p in predictions if p["boxes"]}):
        rows, hits = [p for p in predictions if p["label"] == label], []
        free = [list(p["boxes"]) for p in rows]
        n_reference = sum(map(len, free))
        for _, i, box in sorted((rank, i, box) for i, p in enumerate(rows)
                                for rank, box in enumerate(parse_boxes(p["answer"]))):
            best = max(free[i], key=lambda reference: iou(box, reference), default=None)
            hits.append(best is not None and iou(box, best) >= threshold)
            if hits[-1]:
                free[i].remove(best)
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        interpolated = np.maximum.accumulate(precision[::-1])[::-1]     # the best precision at this recall or beyond
        scores.append(interpolated[np.array(hits, bool)].sum() / n_reference)
    return mean(scores)


def grounding_metrics(predictions):
    """Metrics over the grounding predictions as a flat dict of numbers; {} if there are none."""
    if not (predictions := [p for p in predictions if p["task"] == "grounding"]):
        return {}
    scores, nonempty = soft_f1_scores(predictions), np.array([bool(p["boxes"]) for p in predictions])
    pairs = [pair for p in predictions for pair in match_boxes(parse_boxes(p["answer"])[:MAX_MATCHED], p["boxes"])]
    return {"soft_f1": mean(scores), "soft_f1_nonempty": mean(scores[nonempty]),
            "matched_iou": mean([overlap for _, _, overlap in pairs]), "map50": mean_average_precision(predictions),
            "empty_accuracy": mean(scores[~nonempty])} | output_metrics(predictions)


def bootstrap(predictions_by_model, metrics, n, seed, label):
    """Percentile bootstrap (n samples) over patients, or over examples where no patient is named.

    Returns {metric: {model: {"interval": [low, high], "difference": [value, low, high]}}}, 95 %; differences are
    paired (the same samples for all models), to the first model. Leaves out what the split does not define.
    ValueError: the models saw other examples.
    """
    if len({tuple(p["id"] for p in predictions) for predictions in predictions_by_model.values()}) != 1:
        raise ValueError("paired differences need every model's predictions over the same examples in the same order")
    first, result = next(iter(predictions_by_model)), {}
    for metric in metrics if n else ():
        task = "grounding" if metric == "soft_f1" else "report"
        rows = {name: [p for p in every if p["task"] == task] for name, every in predictions_by_model.items()}
        patients, patient = np.unique([p["patient"] or p["id"] for p in rows[first]], return_inverse=True)
        if not (size := len(patients)):
            continue
        draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), n)      # (n, patients)
        weights = np.vstack([np.ones(size), draws])[:, patient]        # (1 + n, N); row 0 is the metric itself
        if metric == "soft_f1":
            values = {name: weights @ soft_f1_scores(p) / weights.sum(1) for name, p in rows.items()}
        else:
            average, columns = F1_METRICS[metric]
            values = {name: f1_score(np.tensordot(weights, label_counts(p, label)[:, :, columns], 1), average)
                      for name, p in rows.items()}
        for name, own in values.items() if not np.isnan(values[first][0]) else ():
            gain = own - values[first]
            low_high, paired = np.nanpercentile([own[1:], gain[1:]], [2.5, 97.5], axis=1).T.tolist()
            result.setdefault(metric, {})[name] = {"interval": low_high, "difference": [float(gain[0]), *paired]}
    return result


def summarise(predictions_by_model, cfg):
    """{"reports": {model: metrics}, "grounding": {model: metrics}, "bootstrap": what bootstrap returns}."""
    label = labeler(cfg.rewards)
    return {"reports": {name: report_metrics(p, label) for name, p in predictions_by_model.items()},
            "grounding": {name: grounding_metrics(p) for name, p in predictions_by_model.items()},
            "bootstrap": bootstrap(predictions_by_model, BOOTSTRAPPED, cfg.eval.bootstrap, cfg.seed, label)}


def table(results):
    """What summarise returns as aligned text, one column per model, with 95 % bootstrap intervals [low, high]."""
    def cell(value, low=math.nan, high=math.nan, sign=""):
        text = "-" if math.isnan(value) else str(value) if isinstance(value, int) else f"{value:{sign}.3f}"
        return text if math.isnan(low) else f"{text} [{low:{sign}.3f}, {high:{sign}.3f}]"
    names, boot = list(results["reports"]), results["bootstrap"]
    rows = [["", *names]]
    for block in ("reports", "grounding"):
        rows += [[f"{block}: {key}", *(cell(results[block][m][key], *(boot[key][m]["interval"] if key in boot else ()))
                                       for m in names)] for key in results[block][names[0]]]
    rows += [[f"minus {names[0]}: {key}", "", *(cell(*boot[key][m]["difference"], sign="+") for m in names[1:])]
             for key in boot if len(names) > 1]
    return data.aligned(rows)


def resolve(path):
    """The model folder of a run: its best checkpoint, else its last, else `path` itself (a model folder or hub id)."""
    return next((p for p in (os.path.join(path, "best"), os.path.join(path, "last")) if os.path.isdir(p)), path)


def column_names(paths):
    """Shortest path tails that tell the paths apart: {tail: path}. A path given twice is kept once."""
    parts = {Path(os.path.abspath(path)).parts[1:]: path for path in paths}
    tails = ({"/".join(part[-depth:]): path for part, path in parts.items()} for depth in range(1, 999))
    return next(names for names in tails if len(names) == len(parts))


def evaluate_checkpoints(cfg, paths):
    """Evaluates {name: checkpoint} on cfg.eval.split, writes OUT/eval/, prints; (table, what summarise returns)."""
    try:
        labeler(cfg.rewards)                # a labeler that cannot be loaded must not cost the decoding
    except ValueError as error:
        raise data.InputError(str(error)) from None
    loaded = data.load_split(cfg, cfg.eval.split)
    examples = [e for task in ("report", "grounding")
                for e in [e for e in loaded if e.task == task][:cfg.eval.limit or None]]
    predictions = {name: predict(model.load_policy(cfg, resolve(path)), examples, cfg) for name, path in paths.items()}
    results = summarise(predictions, cfg)
    text = table(results)
    if model.rank() == 0:
        files = {f"{name}.jsonl": "".join(json.dumps(p) + "\n" for p in predictions[name]) for name in predictions}
        without_nan = json.loads(json.dumps(results), parse_constant=lambda _: None)
        for name, content in (files | {"metrics.json": json.dumps(without_nan, indent=1)}).items():
            path = Path(cfg.out, "eval", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + ".tmp").write_text(content)
            os.replace(path.with_name(path.name + ".tmp"), path)
        print(text)
    return text, results


def main():
    parser = argparse.ArgumentParser(description="Evaluate checkpoints side by side.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="RUN", help="run folders or model folders")
    args = parser.parse_args()
    overrides = [a for a in args.checkpoint if "=" in a and not os.path.exists(a)]   # the option takes all that follows
    if not (paths := [a for a in args.checkpoint if a not in overrides]):
        parser.error("--checkpoint: expected at least one folder")
    model.setup()
    evaluate_checkpoints(data.load_config(args.config, args.overrides + overrides), column_names(paths))


if __name__ == "__main__":
    data.run_main(main)
