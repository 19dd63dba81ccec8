"""Evaluation: metrics of one or several checkpoints over a split, side by side, with intervals and paired differences.

  python eval.py config.yaml --checkpoint RUN [RUN ...] [key=value ...]
  python eval.py config.yaml --predictions FILE.jsonl [FILE.jsonl ...]      # {"id", "text"} a line, from any other program
  python eval.py --reproduce configs/ablations/grid.yaml                    # the papers' claims in miniature: RESULTS.md

Decodes greedily; writes OUT/eval/: NAME.jsonl (predictions), metrics.json and
report.html (tables, training curves, cases). NAME is RUN's path tail.

Reports: ce_ (clinical efficacy) compares the labels that rewards.labeler reads in the generated and reference text,
uncertain as positive in both; over all 14, the 13 without No Finding, or the 5 CheXpert competition labels.
  ce_{f1,precision,recall}_micro*, _macro*   of the pooled counts; mean over the labels that some reference has
  ce_{f1,precision,recall}_samples14         of each report's set of labels, mean over reports
  ce_certain_f1_*                findings that the reference leaves uncertain are not scored
  abnormal_f1_*, unseen_f1_*     over the reports whose reference has a positive label among the 13; is no training report
  bleu1 .. bleu4; cider; rouge_l, gleu       corpus BLEU; CIDEr-D (times 10); mean over reports
  distinct_share, normal_share   distinct texts / reports; share that says No Finding (*_reference: of the references)
  copied_share                   share of reports that are a training report word for word
  mean_words, mean_characters    per report
Grounding:
  soft_f1, soft_f1_nonempty      mean over all examples (if nothing is there: 1 for saying so, else 0); over the others
  matched_iou                    mean IoU of the pairs that soft-F1 matches
  map50                          see average_precisions; map50_coco, map_coco: at COCO's 101 points, IoU 0.5 and 0.5:0.95
  empty_accuracy                 share of the references without boxes that are answered without boxes
Both: format_valid, truncated: shares of outputs in the required format and cut at grpo.max_new_tokens; thinking_words.
Per label: F1 of reports, soft-F1 and AP at IoU 0.5 of grounding, in metrics.json and report.html. Where several kinds of grounding are
asked (anatomy, abnormality, phrase, detection), each has its own block, too.
A metric with nothing to average over is NaN in Python, null in JSON and "-" in the table.
"""

import argparse
import base64
import dataclasses
import fcntl
import io
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
import model
import rewards
from rewards import (
    LABELS,
    MAX_MATCHED,
    POSITIVE,
    UNCERTAIN,
    gleu,
    iou,
    labeler,
    match_boxes,
    ngrams,
    parse_boxes,
    parse_output,
    rouge_l,
    says_nothing_there,
    soft_f1,
    tokenize,
)
from runtime.checkpoint import last_step, resolve
from runtime.config import InputError, load_config, read_yaml
from runtime.output import format_table, print0, progress, rank, world_size, write_atomically
from runtime.processes import gather_objects, init_processes, run_main

RESAMPLES = 1000  # of the bootstrap
CASES = 60  # shown in report.html
TOP5 = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
COLUMNS = {
    "14": list(range(14)),
    "13": list(range(1, 14)),
    "5": [LABELS.index(label) for label in TOP5],
}
IN_TABLE = """ce_f1_macro14 ce_f1_macro13 ce_f1_macro5 ce_f1_micro14 ce_f1_micro13 ce_f1_micro5 ce_precision_micro13 ce_recall_micro13
ce_f1_samples14 ce_certain_f1_macro13 abnormal_f1_macro13 unseen_f1_macro13 bleu1 bleu4 cider rouge_l gleu distinct_share
distinct_share_reference normal_share normal_share_reference copied_share mean_words mean_words_reference soft_f1 soft_f1_nonempty
matched_iou map50 map50_coco empty_accuracy thinking_words format_valid truncated examples""".split()


# ---------------------------------------------------------------------------------------------- predictions


def row(example, text, finished=True, n_tokens=0):
    """A prediction as it is written to NAME.jsonl."""
    valid, thinking, answer = parse_output(text, example.task, example.style)
    return {
        "id": example.id,
        "task": example.task,
        "kind": example.kind,
        "label": example.label,
        "patient": example.patient,
        "text": text,
        "answer": answer,
        "thinking": thinking,
        "valid": bool(valid),
        "finished": bool(finished),
        "n_tokens": n_tokens,
        "reference": example.answer,
        "boxes": [list(box) for box in example.boxes],
    }


def predict(policy, examples, cfg, name=""):
    """Decode examples greedily. Returns JSON-able dicts in their order, on every rank, without those
    that `sample` skips."""
    rows, place = {}, {id(example): i for i, example in enumerate(examples)}
    mine = data.batched(examples[rank() :: world_size()], cfg.eval.batch_size)
    for batch in progress(mine, f"predict {name}"):
        for r in policy.sample(batch, 1, cfg.grpo.max_new_tokens, 0.0, (cfg.seed, 99)):
            rows[place[id(r.example)]] = row(r.example, r.texts[0], r.finished[0], r.lengths[0])
    merged = {i: row for part in gather_objects(rows) for i, row in part.items()}
    return [merged[i] for i in sorted(merged)]


def read_predictions(path, examples):
    """Predictions of another program, {"id", "text"} a line, one for each example."""
    texts = data.texts_by_id(path, "text")
    missing = [e.id for e in examples if e.id not in texts]
    if missing:
        raise InputError(
            f"{path}: no prediction for {len(missing)} of {len(examples)} examples, such as id {missing[0]!r}"
        )
    return [row(e, texts[e.id]) for e in examples]


# ---------------------------------------------------------------------------------------------- metrics
# Each takes weights w (S, N): S samples of the N predictions, which count so often in each. It gives (S,) values, so that
# a metric and its bootstrap are one computation: the first row of w is all ones, the others are the resamples.


def average(values, w):
    """Weighted means (S,) of values (N,), without the NaN among them."""
    values = np.asarray(values, dtype=float)
    real = ~np.isnan(values)
    return w[:, real] @ values[real] / w[:, real].sum(1)


def ratios(tp, fp, fn):
    """F1, precision and recall; precision 0 where nothing is called, NaN where nothing is there."""
    there = np.where(tp + fn > 0, 0.0, np.nan)
    return {
        "f1": there + 2 * tp / (2 * tp + fp + fn),
        "precision": there + tp / np.maximum(tp + fp, 1e-9),
        "recall": there + tp / (tp + fn),
    }


def ce_scores(counts, w, columns, how):
    """{"f1", "precision", "recall"} -> (S,) of counts (N, 3, 14). A label without a reference positive has none of them (a 0
    would blame the model for the split): it leaves the macro mean, while its false positives still count in micro."""
    totals = np.tensordot(w, counts[:, :, COLUMNS[columns]], 1)  # (S, 3, L)
    if how == "micro":
        return ratios(*totals.sum(2).T)
    scores = ratios(*np.moveaxis(totals, 1, 0))
    there = (~np.isnan(scores["f1"])).sum(1)
    return {name: np.nansum(values, 1) / there for name, values in scores.items()}


def bleu_scores(candidates, references, w):
    """Corpus BLEU-1 .. 4 (Papineni et al. 2002), {n: (S,)}."""
    pairs = [(tokenize(a), tokenize(b)) for a, b in zip(candidates, references)]
    grams = [[[ngrams(t, n) for t in pair] for n in range(1, 5)] for pair in pairs]
    matches = w @ np.array(
        [[(a & b).total() for a, b in by_n] for by_n in grams], dtype=float
    )  # (S, 4)
    totals = w @ np.array([[a.total() for a, _ in by_n] for by_n in grams], dtype=float)
    length, wanted = (w @ np.array([len(pair[k]) for pair in pairs], dtype=float) for k in (0, 1))
    logs = np.log(matches / np.maximum(totals, 1)).cumsum(1) / np.arange(
        1, 5
    )  # of the geometric means
    return dict(
        zip(
            range(1, 5),
            np.exp(np.minimum(0, 1 - wanted / np.maximum(length, 1e-9))[:, None] + logs).T,
        )
    )


def cider_scores(candidates, references):
    """(N,) CIDEr-D (Vedantam et al. 2015) with one reference, sigma 6, 1 .. 4-grams; document frequencies of the references."""
    pairs = [(tokenize(a), tokenize(b)) for a, b in zip(candidates, references)]
    scores, gaps = np.zeros(len(pairs)), np.array([len(a) - len(b) for a, b in pairs], dtype=float)
    for n in range(1, 5):
        documents = Counter(g for _, b in pairs for g in ngrams(b, n).keys())
        for i, pair in enumerate(pairs):
            a, b = (
                {
                    g: count * math.log(len(pairs) / max(documents[g], 1))
                    for g, count in ngrams(t, n).items()
                }
                for t in pair
            )
            norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
            if norm > 0:
                scores[i] += sum(min(v, b[g]) * b[g] for g, v in a.items() if g in b) / norm
    return 10 / 4 * scores * np.exp(-(gaps**2) / (2 * 6**2))


def output_metrics(predictions, w):
    thinking = [len(p["thinking"].split()) if p["thinking"] else math.nan for p in predictions]
    return {
        "format_valid": average([p["valid"] for p in predictions], w),
        "truncated": average([not p["finished"] for p in predictions], w),
        **({"thinking_words": average(thinking, w)} if not np.isnan(thinking).all() else {}),
        "examples": np.full(len(w), len(predictions)),
    }


def report_metrics(predictions, w, label, training=()):
    """Two blocks, {metric: (S,)}: over the reports, and F1 per label. `training`: the texts of the training reports."""
    read = [label([p[key] for p in predictions]) for key in ("answer", "reference")]  # (N, 14) each
    generated, reference = (np.isin(found, (POSITIVE, UNCERTAIN)) for found in read)
    counts = np.stack(
        [generated & reference, generated & ~reference, ~generated & reference], 1
    ).astype(float)  # tp, fp, fn: (N, 3, 14)
    metrics = {
        f"ce_{name}_samples14": average(np.nan_to_num(values), w)
        for name, values in ratios(*counts.sum(2).T).items()
    }
    for columns in COLUMNS:
        for how in ("macro", "micro"):
            metrics |= {
                f"ce_{name}_{how}{columns}": values
                for name, values in ce_scores(counts, w, columns, how).items()
            }
    certain = counts * (read[1] != UNCERTAIN)[:, None]
    answers, references = ([p[key] for p in predictions] for key in ("answer", "reference"))
    known = set(map(data.plain_words, training))
    seen = np.array([data.plain_words(text) in known for text in references], dtype=bool)
    for how in ("macro", "micro"):
        metrics |= {
            f"ce_certain_f1_{how}13": ce_scores(certain, w, "13", how)["f1"],
            f"abnormal_f1_{how}13": ce_scores(counts, w * reference[:, 1:].any(1), "13", how)["f1"],
        }
        if known:
            metrics[f"unseen_f1_{how}13"] = ce_scores(counts, w * ~seen, "13", how)["f1"]
    metrics |= {f"bleu{n}": values for n, values in bleu_scores(answers, references, w).items()}
    metrics |= {"cider": average(cider_scores(answers, references), w)}
    metrics |= {
        f.__name__: average([f(*pair) for pair in zip(answers, references)], w)
        for f in (rouge_l, gleu)
    }
    for suffix, texts, labels in (("", answers, generated), ("_reference", references, reference)):
        distinct = np.full(len(w), np.nan)  # a resample repeats texts: no interval
        distinct[0] = len(set(texts)) / len(texts)
        metrics |= {
            f"distinct_share{suffix}": distinct,
            f"normal_share{suffix}": average(labels[:, 0], w),
            f"mean_words{suffix}": average([len(text.split()) for text in texts], w),
            f"mean_characters{suffix}": average([len(text) for text in texts], w),
        }
        if known:
            metrics[f"copied_share{suffix}"] = average(
                [data.plain_words(text) in known for text in texts], w
            )
    per_label = ratios(*np.moveaxis(np.tensordot(w, counts, 1), 1, 0))["f1"]  # (S, 14)
    return metrics | output_metrics(predictions, w), dict(zip(LABELS, per_label.T))


def soft_f1_scores(predictions):
    """(N,) soft-F1. Only words can say "nothing there": an empty answer, or one with broken boxes, scores 0."""
    return np.array(
        [
            soft_f1(
                parse_boxes(p["answer"]), p["boxes"], match_empty=says_nothing_there(p["answer"])
            )
            for p in predictions
        ]
    )


COCO_POINTS = np.linspace(0, 1, 101)


def class_of(prediction):
    """What was asked for; free phrases are one class, and so are detections of everything."""
    return (
        prediction["kind"] if prediction["kind"] in ("phrase", "detection") else prediction["label"]
    )


def average_precisions(predictions, w, threshold=0.5):
    """{class: (average precision with all-point interpolation (S,), at COCO's 101 points (S,))} at one IoU threshold, for the classes that
    have reference boxes.

    Boxes carry no score: all first boxes of an answer rank before all second boxes, ties in the order of the examples
    (so it does not compare with the mAP of scored detectors). Each takes the best free reference box of its example
    if their IoU reaches the threshold, else it is a false positive.
    """
    result, classes = {}, [class_of(p) for p in predictions]
    for label in sorted({c for c, p in zip(classes, predictions) if p["boxes"]}):
        rows = [i for i, c in enumerate(classes) if c == label]
        free = {i: list(predictions[i]["boxes"]) for i in rows}
        n_reference = w[:, rows] @ np.array([len(free[i]) for i in rows], dtype=float)  # (S,)
        hits, owners = [], []
        for _, i, box in sorted(
            (place, i, box)
            for i in rows
            for place, box in enumerate(parse_boxes(predictions[i]["answer"]))
        ):
            best = max(free[i], key=lambda reference: iou(box, reference), default=None)
            hits.append(best is not None and iou(box, best) >= threshold)
            owners.append(i)
            if hits[-1]:
                free[i].remove(best)
        weights = w[:, owners]  # (S, K): a copy of an example ranks beside it
        found = np.cumsum(weights * hits, 1)
        precision = np.nan_to_num(found / np.cumsum(weights, 1))
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[
            :, ::-1
        ]  # the best at this recall or beyond
        recall = found / n_reference[:, None]
        padded = np.pad(precision, ((0, 0), (0, 1)))
        at_points = [p[np.searchsorted(r, COCO_POINTS)].mean() for p, r in zip(padded, recall)]
        result[label] = (
            (precision * weights * hits).sum(1) / n_reference,
            np.where(n_reference > 0, at_points, np.nan),
        )
    return result


def grounding_metrics(predictions, w):
    """Two blocks, {metric: (S,)}: over the grounding questions, and per asked label."""
    scores, nonempty = (
        soft_f1_scores(predictions),
        np.array([bool(p["boxes"]) for p in predictions]),
    )
    pairs = [
        (i, overlap)
        for i, p in enumerate(predictions)
        for *_, overlap in match_boxes(parse_boxes(p["answer"])[:MAX_MATCHED], p["boxes"])
    ]
    owners, overlaps = [i for i, _ in pairs], [overlap for _, overlap in pairs]
    by_threshold = {
        t: average_precisions(predictions, w, t) for t in np.linspace(0.5, 0.95, 10).round(2)
    }

    def mean_over_labels(threshold, which):
        values = [ap[which] for ap in by_threshold[threshold].values()] or [np.full(len(w), np.nan)]
        return np.nansum(values, 0) / (~np.isnan(values)).sum(0)

    metrics = {
        "soft_f1": average(scores, w),
        "soft_f1_nonempty": average(np.where(nonempty, scores, np.nan), w),
        "matched_iou": average(overlaps, w[:, owners]),
        "map50": mean_over_labels(0.5, 0),
        "map50_coco": mean_over_labels(0.5, 1),
        "map_coco": np.mean([mean_over_labels(t, 1) for t in by_threshold], 0),
        "empty_accuracy": average(np.where(nonempty, np.nan, scores), w),
    }
    labels, classes = {}, [class_of(p) for p in predictions]
    for label in sorted(set(classes)):
        labels[f"soft_f1 {label}"] = average(
            np.where([c == label for c in classes], scores, np.nan), w
        )
        if label in by_threshold[0.5]:
            labels[f"ap50 {label}"] = by_threshold[0.5][label][0]
    return metrics | output_metrics(predictions, w), labels


def samples_of(predictions, n, seed):
    """(1 + n, N): ones, and how often each prediction is drawn when patients (or examples, where no patient is named) are drawn
    with replacement."""
    patients, patient = np.unique(
        [p["patient"] or p["id"] for p in predictions], return_inverse=True
    )
    size = len(patients)
    draws = np.random.default_rng(seed).multinomial(
        size, np.full(size, 1 / size), n
    )  # (n, patients)
    return np.vstack([np.ones(size), draws])[:, patient]


@np.errstate(invalid="ignore", divide="ignore")
def measure(predictions, w, label, training=()):
    """{block: {metric: (S,)}} of all predictions of one model; a task without predictions has no block."""
    blocks = {}
    for task, names in (
        ("report", ("reports", "labels")),
        ("grounding", ("grounding", "grounding labels")),
    ):
        rows = [i for i, p in enumerate(predictions) if p["task"] == task]
        if rows:
            some = [predictions[i] for i in rows], w[:, rows]
            blocks |= zip(
                names,
                report_metrics(*some, label, training)
                if task == "report"
                else grounding_metrics(*some),
            )
    kinds = sorted({p["kind"] for p in predictions if p["task"] == "grounding"})
    for kind in kinds if len(kinds) > 1 else ():  # the papers report them apart
        rows = [i for i, p in enumerate(predictions) if p["kind"] == kind]
        blocks[f"grounding of {kind}"] = grounding_metrics(
            [predictions[i] for i in rows], w[:, rows]
        )[0]
    return blocks


def interval(values):
    """[low, high], 95 %, of resamples (n,); NaN without any."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else [math.nan, math.nan]


def summarise(predictions_by_model, cfg, training=()):
    """{block: {metric: {model: {"value", "interval", "difference"}}}}: percentile bootstrap over patients; the difference to the first
    model, [value, low, high], is paired (the same samples for all models). ValueError: the models saw other examples."""
    if (
        len({tuple(p["id"] for p in predictions) for predictions in predictions_by_model.values()})
        > 1
    ):
        raise ValueError(
            "paired differences need every model's predictions over the same examples in the same order"
        )
    first, label = next(iter(predictions_by_model)), labeler(cfg.rewards)
    w = (
        samples_of(predictions_by_model[first], RESAMPLES, cfg.seed)
        if predictions_by_model[first]
        else np.ones((1, 0))
    )
    measured = {name: measure(p, w, label, training) for name, p in predictions_by_model.items()}
    results = {}
    for block, metrics in measured[first].items():
        for metric in metrics:
            values = {
                name: m[block].get(metric, np.full(len(w), np.nan)) for name, m in measured.items()
            }
            results.setdefault(block, {})[metric] = {
                name: {
                    "value": float(own[0]),
                    "interval": interval(own[1:]),
                    "difference": [
                        float(own[0] - values[first][0]),
                        *interval((own - values[first])[1:]),
                    ],
                }
                for name, own in values.items()
            }
    return results


# ---------------------------------------------------------------------------------------------- what is shown


def cell(value, low_high=(math.nan, math.nan), sign=""):
    text = (
        "-"
        if math.isnan(value)
        else f"{value:{sign}.0f}"
        if value == int(value) and abs(value) > 1
        else f"{value:{sign}.3f}"
    )
    return (
        text
        if math.isnan(low_high[0]) or low_high[0] == low_high[1]
        else f"{text} [{low_high[0]:{sign}.3f}, {low_high[1]:{sign}.3f}]"
    )


def table(results):
    """What summarise returns as aligned text, one column per model, with 95 % bootstrap intervals [low, high]."""
    blocks = {
        block: {m: results[block][m] for m in IN_TABLE if m in results[block]}
        for block in results
        if "labels" not in block
    }
    if not blocks:
        return "nothing to evaluate"
    names = list(next(iter(next(iter(blocks.values())).values())))
    rows = [["", *names]]
    for block, metrics in blocks.items():
        rows += [
            [
                f"{block}: {metric}",
                *(cell(by_model[m]["value"], by_model[m]["interval"]) for m in names),
            ]
            for metric, by_model in metrics.items()
        ]
    for block, metrics in blocks.items() if len(names) > 1 else ():
        for metric in ("ce_f1_macro13", "ce_f1_micro13", "ce_recall_micro13", "soft_f1", "map50"):
            if metric in metrics and not math.isnan(metrics[metric][names[0]]["interval"][0]):
                changes = [metrics[metric][m]["difference"] for m in names[1:]]
                rows.append(
                    [
                        f"minus {names[0]}: {metric}",
                        "",
                        *(cell(value, low_high, "+") for value, *low_high in changes),
                    ]
                )
    return format_table(rows)


# ---------------------------------------------------------------------------------------------- report.html

COLOURS = ("#2563a8", "#c2571a", "#2e8540", "#7b4fa3", "#8a6d1b", "#a83256")
STYLE = """
:root { --ink: #1d2733; --soft: #66727f; --line: #e2e6ea; --wash: #f6f8f9; --good: #2e8540; --bad: #b3312c; --accent: #2563a8 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 80px; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 18px; margin: 44px 0 12px } h3 { font-size: 14px; margin: 0 0 6px }
p, small { color: var(--soft) } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
td small { margin-left: 6px } summary { cursor: pointer; color: var(--accent); margin: 10px 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 18px }
.plot svg { width: 100%; height: auto; display: block; background: var(--wash); border-radius: 4px }
.case { display: grid; grid-template-columns: 260px 1fr; gap: 20px; padding: 18px 0; border-top: 1px solid var(--line) }
.case .film { position: relative } .case img { width: 100%; display: block; border-radius: 4px; background: #000 }
.case .film svg { position: absolute; inset: 0; width: 100%; height: 100% }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 18px; min-width: 0 }
.texts p { margin: 0; color: var(--ink); overflow-wrap: anywhere; white-space: pre-wrap } .texts u { text-decoration-color: var(--accent); text-underline-offset: 3px }
.chip { display: inline-block; font-size: 12px; padding: 1px 8px; margin: 6px 6px 0 0; border-radius: 9px; background: var(--wash); color: var(--soft) }
.chip.tp { background: #e4f2e7; color: var(--good) } .chip.fp { background: #fae6e5; color: var(--bad) } .chip.fn { background: #fff; color: var(--bad); border: 1px dashed var(--bad) }
.filters button { font: inherit; font-size: 13px; padding: 3px 12px; margin: 0 6px 6px 0; border: 1px solid var(--line); border-radius: 14px; background: #fff; color: var(--ink); cursor: pointer }
.filters button[aria-pressed=true] { background: var(--ink); color: #fff; border-color: var(--ink) }
.sample { display: grid; grid-template-columns: 170px 1fr; gap: 14px; padding: 7px 0; border-top: 1px solid var(--line); font-size: 13.5px }
.sample div { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 0 }
@media (max-width: 640px) { .case { grid-template-columns: 1fr } .sample { grid-template-columns: 1fr } body { padding: 18px 12px 60px } }
"""
SCRIPT = """
const chosen = { task: "", outcome: "" };
for (const button of document.querySelectorAll(".filters button")) button.onclick = () => {
  chosen[button.dataset.kind] = button.dataset.value;
  for (const b of document.querySelectorAll(".filters button"))
    b.setAttribute("aria-pressed", chosen[b.dataset.kind] === b.dataset.value);
  let n = 0;
  for (const c of document.querySelectorAll(".case")) {
    c.hidden = (chosen.task && c.dataset.task !== chosen.task) || (chosen.outcome && c.dataset.outcome !== chosen.outcome);
    c.style.display = c.hidden ? "none" : ""; n += !c.hidden;
  }
  document.getElementById("shown").textContent = n + " shown";
};
"""


def html_table(metrics):
    """Some metrics of results; intervals small, differences whose interval leaves out 0 bold."""
    names = list(next(iter(metrics.values())))
    head = "".join(f"<th>{escape(name)}</th>" for name in names) + "".join(
        f"<th>{escape(m)} minus {escape(names[0])}</th>" for m in names[1:]
    )
    rows = []
    for metric, by_model in metrics.items():
        cells = []
        for name in names:
            value, low_high = by_model[name]["value"], by_model[name]["interval"]
            shown, _, bounds = cell(value, low_high).partition(" ")
            cells.append(f"<td>{shown}<small>{bounds}</small></td>")
        for name in names[1:]:
            value, *low_high = by_model[name]["difference"]
            shown, _, bounds = cell(value, low_high, "+").partition(" ")
            clear = low_high[0] > 0 or low_high[1] < 0
            cells.append(
                f"<td{' style=font-weight:600' * clear}>{shown}<small>{bounds}</small></td>"
            )
        rows.append(f"<tr><th>{escape(metric)}</th>{''.join(cells)}</tr>")
    return f"<div class=scroll><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"


def plot(title, lines):
    """Curves as inline SVG: lines {name: [(step, value)]}."""
    points = [(x, y) for line in lines.values() for x, y in line]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    span_x, span_y = x1 - x0 or 1, y1 - y0 or 1

    def drawn(line, colour, style):
        places = " ".join(
            f"{8 + 284 * (x - x0) / span_x:.1f},{112 - 100 * (y - y0) / span_y:.1f}"
            for x, y in line
        )
        return f'<polyline fill="none" stroke="{colour}" {style} points="{places}"/>'

    width = 1 + max(map(len, lines.values())) // 20  # of the mean that is drawn over the values
    smooth = [
        [
            (line[i][0], np.mean([y for _, y in line[max(0, i - width) : i + width + 1]]))
            for i in range(len(line))
        ]
        for line in lines.values()
    ]
    svg = "".join(
        drawn(line, c, 'stroke-width="1" opacity=".3"') + drawn(mean, c, 'stroke-width="1.8"')
        for line, mean, c in zip(lines.values(), smooth, COLOURS)
    )
    key = (
        " ".join(
            f'<small style="color:{colour}">{escape(name)}</small>'
            for name, colour in zip(lines, COLOURS)
        )
        if len(lines) > 1
        else ""
    )
    return (
        f'<div class=plot><h3>{escape(title)}</h3><svg viewBox="0 0 300 120" role="img" aria-label="{escape(title)}">{svg}</svg>'
        f"<small>{f'{y0:.3g} to {y1:.3g}' if y1 > y0 else f'constant, {y0:.3g}'}, steps {x0} to {x1}</small> {key}</div>"
    )


def curves(run):
    """The training curves of one stage's metrics.jsonl."""
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # a run without a log, or one that is being written
        return ""
    series = {
        name: [
            (r["step"], r[name])
            for r in rows
            if isinstance(r.get(name), (int, float)) and math.isfinite(r[name])
        ]
        for r in rows
        for name in r
    }
    groups = {
        "loss": ["loss", "eval_loss"],
        "reward": ["reward"],
        "reward parts": [n for n in series if n.startswith("rewards/") and n.endswith("/mean")],
        "KL to the reference": ["kl"],
        "entropy": ["entropy"],
        "tokens per completion": ["completions/mean_length"],
        "cut at the limit": ["completions/clipped_ratio"],
        "groups without a signal": ["frac_reward_zero_std"],
        "clipped tokens": ["clip_ratio/region_mean"],
        "gradient norm": ["grad_norm"],
        "sampled against scored": ["sampling/sampling_logp_difference/mean"],
    }
    drawn = [
        plot(
            title,
            {
                n.removeprefix("rewards/").removesuffix("/mean"): series[n]
                for n in names
                if series.get(n)
            },
        )
        for title, names in groups.items()
        if any(series.get(n) for n in names)
    ]
    return (
        f"<h2>Training: {escape(run.name)}</h2><div class=plots>{''.join(drawn)}</div>"
        if drawn
        else ""
    )


def thumbnail(example, side=300):
    """The example's first image as a data URL."""
    try:
        image = data.open_images(dataclasses.replace(example, images=example.images[:1]))[
            0
        ].convert("L")
    except InputError:  # predictions of another program may not need it
        image = Image.new("L", (side, side))
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def box_svg(boxes, colour, dashed=False):
    return "".join(
        f'<rect x="{x1}" y="{y1}" width="{max(x2 - x1, 0)}" height="{max(y2 - y1, 0)}" fill="none" stroke="{colour}" stroke-width="2" '
        f'vector-effect="non-scaling-stroke" stroke-dasharray="{"4" if dashed else "none"}"/>'
        for x1, y1, x2, y2 in boxes
    )


def underlined(text):
    """The text, escaped, with the phrases behind its labels underlined."""
    phrases = sorted(
        {phrase for _, _, phrase, *_ in rewards.evidence(text) if phrase.strip()},
        key=len,
        reverse=True,
    )
    if not phrases:
        return escape(text)
    pattern = "|".join(
        r"[\s-]+".join(map(re.escape, re.split(r"[\s-]+", phrase))) for phrase in phrases
    )
    parts = re.split(rf"(?i)\b((?:{pattern})\w*)", text)  # plain, phrase, plain, ...
    return "".join(
        f"<u>{escape(part)}</u>" if n % 2 else escape(part) for n, part in enumerate(parts)
    )


def report_case(example, predictions, label):
    """(outcome of the last model, no SVG, its HTML): texts side by side, their labels as chips."""
    reference, *found = np.isin(
        label([example.answer, *(p["answer"] for p in predictions.values())]), (POSITIVE, UNCERTAIN)
    )
    columns, outcome = [f"<div><h3>reference</h3><p>{underlined(example.answer)}</p></div>"], ""
    for (name, p), own in zip(predictions.items(), found):
        kinds = [
            (k, "tp" if own[k] and reference[k] else "fp" if own[k] else "fn")
            for k in range(14)
            if own[k] or reference[k]
        ]
        chips = "".join(f'<span class="chip {kind}">{LABELS[k]}</span>' for k, kind in kinds)
        there = {kind for k, kind in kinds if k}
        outcome = (
            "false alarm"
            if "fp" in there and "fn" not in there
            else "missed"
            if "fn" in there
            else "right"
        )
        columns.append(
            f"<div><h3>{escape(name)}</h3><p>{underlined(p['answer']) or '(empty)'}</p>{chips}{thought(p)}</div>"
        )
    return outcome, "", "".join(columns)


def grounding_case(example, predictions):
    """(outcome of the last model, SVG of the boxes, its HTML)."""
    svg, columns, outcome = (
        box_svg(example.boxes, "#ffffff", dashed=True),
        [f"<div><h3>reference (dashed)</h3><p>{escape(example.answer)}</p></div>"],
        "",
    )
    for (name, p), colour in zip(predictions.items(), COLOURS):
        boxes, score = parse_boxes(p["answer"]), soft_f1_scores([p])[0]
        svg += box_svg(boxes, colour)
        outcome = (
            "right"
            if score >= 0.5
            else "missed"
            if example.boxes and not boxes
            else "false alarm"
            if not example.boxes
            else "wrong place"
        )
        columns.append(
            f'<div><h3 style="color:{colour}">{escape(name)}</h3><p>{escape(p["answer"])}</p><span class=chip>soft-F1 {score:.2f}</span>{thought(p)}</div>'
        )
    return (
        outcome,
        f'<svg viewBox="0 0 1 1" preserveAspectRatio="none">{svg}</svg>',
        "".join(columns),
    )


def thought(prediction):
    return (
        f"<details><summary>thinking</summary><p>{escape(prediction['thinking'])}</p></details>"
        if prediction["thinking"]
        else ""
    )


def groups_html(run, count=2):
    """The last groups of each task in samples.jsonl: every completion with its reward, the parts of it, and its advantage."""
    try:
        rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return ""
    blocks = []
    for group in (
        g
        for task in ("report", "grounding")
        for g in [g for g in rows if g.get("task") == task][-count:]
    ):
        samples = ""
        for s in sorted(group["samples"], key=lambda s: -s["reward"]):
            parts = "".join(
                f"<br><small>{escape(name.rpartition('/')[2])} {value:.3f}</small>"
                for name, value in s["parts"].items()
            )
            samples += (
                f"<div class=sample><div><b>{s['reward']:.3f}</b> <small>advantage {s['advantage']:+.3f}</small>{parts}</div>"
                f"<div>{escape(s['text'])}</div></div>"
            )
        blocks.append(
            f"<h3>step {group['step']}: {escape(group['question'])}</h3><p>Reference: {escape(group['reference'])}</p>{samples}<br>"
        )
    return f"<h2>Groups of samples, the best paid first</h2>{''.join(blocks)}" if blocks else ""


def page(cfg, results, predictions, examples):
    """report.html as one self-contained text. predictions {model: [row]} and examples are in the same order."""
    order = np.random.default_rng(cfg.seed).permutation(len(examples))
    places = [
        i
        for task in ("report", "grounding")
        for i in [i for i in order if examples[i].task == task][: -(-CASES // 2)]
    ]
    cases, label, outcomes = [], labeler(cfg.rewards), set()
    for i in places:
        e, own = examples[i], {name: rows[i] for name, rows in predictions.items()}
        outcome, svg, columns = (
            report_case(e, own, label) if e.task == "report" else grounding_case(e, own)
        )
        outcomes.add(outcome)
        cases.append(
            f'<div class=case data-task="{e.task}" data-outcome="{outcome}"><div><div class=film><img src="{thumbnail(e)}" alt="" loading=lazy>{svg}</div>'
            f"<small>{escape(e.id)}</small></div><div><p>{escape(e.question)}</p><div class=texts>{columns}</div></div></div>"
        )
    buttons = ""
    for kind, values in (("task", ["report", "grounding"]), ("outcome", sorted(outcomes))):
        buttons += (
            "<div>"
            + "".join(
                f'<button data-kind={kind} data-value="{v}" aria-pressed={str(not v).lower()}>{v or f"every {kind}"}</button>'
                for v in ["", *values]
            )
            + "</div>"
        )
    tables = ""
    for block, metrics in results.items():
        if "labels" not in block:
            tables += (
                f"<h2>{block.capitalize()}</h2>{html_table({m: metrics[m] for m in IN_TABLE if m in metrics})}<details><summary>every metric</summary>"
                f"{html_table(metrics)}</details>"
            )
            if per_label := results.get(
                {"reports": "labels", "grounding": "grounding labels"}.get(block)
            ):
                tables += f"<details><summary>per label</summary>{html_table(per_label)}</details>"
    gallery = (
        (
            f'<h2>Cases</h2><div class=filters>{buttons}</div><p>Underlined: the phrases that the built-in extractor reads. <span class="chip tp">found</span><span class="chip fp">not in the reference</span>'
            f'<span class="chip fn">missed</span></p><p id=shown>{len(cases)} shown</p>{"".join(cases)}'
        )
        if cases
        else ""
    )
    runs = "".join(curves(Path(cfg.out, stage)) for stage in ("sft", "cold_start", "more", "grpo"))
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1"><title>{escape(cfg.out)}</title>'
        f"<style>{STYLE}</style><h1>{escape(cfg.out)}</h1><p>{escape(', '.join(predictions))} on {escape(cfg.eval.split)}; 95 % bootstrap intervals over patients. "
        f"What each metric means stands at the top of eval.py.</p>{tables}{runs}{gallery}{groups_html(Path(cfg.out, 'grpo'))}<script>{SCRIPT}</script></html>"
    )


# ---------------------------------------------------------------------------------------------- the command


def column_names(paths):
    """Shortest path tails that tell the paths apart: {tail: path}. A path given twice is kept once."""
    parts = {Path(os.path.abspath(path)).parts[1:]: path for path in paths}
    tails = (
        {"/".join(part[-depth:]): path for part, path in parts.items()} for depth in range(1, 999)
    )
    return next(names for names in tails if len(names) == len(parts))


def chosen_examples(cfg):
    """The examples of cfg.eval.split to evaluate: all, or eval.limit of each task, drawn by the seed."""
    loaded, result = data.load_split(cfg, cfg.eval.split), []
    for task in ("report", "grounding"):
        some = [e for e in loaded if e.task == task]
        drawn = np.random.default_rng(cfg.seed).permutation(len(some))[: cfg.eval.limit or None]
        result += [some[i] for i in sorted(drawn)]
    return result


def training_reports(cfg):
    """The texts that training has seen; none where there is no training split (only their metrics are missing then)."""
    try:
        return [e.answer for e in data.load_split(cfg, "train") if e.task == "report"]
    except InputError as error:
        print0(f"no comparison with training reports: {error}")
        return []


def evaluate_checkpoints(cfg, paths, files={}):
    """Evaluates {name: checkpoint}, and {name: file of predictions}, on cfg.eval.split, writes OUT/eval/, prints; (table, results).
    All have to do with the examples that every one of them has predicted."""
    labeler(cfg.rewards)  # neither a labeler nor a file that cannot be read must cost the decoding
    examples, folder = chosen_examples(cfg), Path(cfg.out, "eval")
    training = training_reports(cfg) if any(e.task == "report" for e in examples) else []
    read = {name: read_predictions(path, examples) for name, path in files.items()}
    predictions = {}
    for name, path in paths.items():
        predictions[name] = predict(model.load_policy(cfg, resolve(path)), examples, cfg, name)
        if rank() == 0:
            write_atomically(
                folder / f"{name}.jsonl", "".join(json.dumps(p) + "\n" for p in predictions[name])
            )
    predictions |= read
    if rank() != 0:
        return "", {}
    common = set.intersection(*({p["id"] for p in some} for some in predictions.values()))
    if left := len(examples) - len(common):
        print0(
            f"{left} of {len(examples)} examples have no prediction by every model and are left out"
        )
    predictions = {
        name: [p for p in some if p["id"] in common] for name, some in predictions.items()
    }
    results = summarise(predictions, cfg, training)
    text = table(results)
    without_nan = json.loads(json.dumps(results), parse_constant=lambda _: None)
    write_atomically(folder / "metrics.json", json.dumps(without_nan, indent=1))
    write_atomically(
        folder / "report.html",
        page(cfg, results, predictions, [e for e in examples if e.id in common]),
    )
    print(f"{text}\n\n{folder / 'report.html'}")
    return text, results


# ---------------------------------------------------------------------------------------------- the papers' claims in miniature

SHOWN = (
    ("reports", "ce_f1_macro13"),
    ("reports", "ce_f1_macro5"),
    ("reports", "ce_f1_micro13"),
    ("reports", "ce_recall_micro13"),
    ("reports", "bleu4"),
    ("reports", "mean_words"),
    ("grounding", "soft_f1"),
    ("grounding", "map50"),
)
GAINS = (
    ("reports", "ce_f1_macro13"),
    ("reports", "ce_recall_micro13"),
    ("grounding", "soft_f1"),
    ("grounding", "map50"),
)


def grid_run(grid, name, seed):
    """(folder of a row, the row it starts from or None, the commands that make it). A row is a stage (grpo, unless said otherwise)
    with settings; all but plain SFT begin at the checkpoint of another row, and are evaluated beside it."""

    def places(name):
        if name not in grid["rows"]:
            raise InputError(f"grid: no row {name!r}; the rows are {', '.join(grid['rows'])}")
        row = {"stage": "grpo", "start": grid["start"], **(grid["rows"][name] or {})}
        folder = Path(grid["out"], re.sub(r"\W+", "_", name).strip("_").lower(), f"seed{seed}")
        return row, folder, folder / row["stage"]

    row, folder, result = places(name)
    settings = [grid["config"], f"seed={seed}", *grid["set"], *row.get("set", []), f"out={folder}"]
    if row["stage"] == "sft":
        return (
            folder,
            None,
            [["train_sft.py", *settings], ["eval.py", *settings, "--checkpoint", str(result)]],
        )
    start = places(row["start"])[2]
    if row["stage"] == "grpo":
        return folder, row["start"], [["train_grpo.py", *settings, f"grpo.init={start}/best"]]
    return (
        folder,
        row["start"],
        [
            ["train_sft.py", *settings, f"sft.stage={row['stage']}", f"sft.init={start}/best"],
            ["eval.py", *settings, "--checkpoint", str(start), str(result)],
        ],
    )


def reproduce(path):
    """Runs the grid of `path` and writes its RESULTS.md after each row and seed. What is done is kept, what was interrupted goes on
    from its last checkpoint; the same command in a second terminal takes rows that no other one is at."""
    grid, left = read_yaml(path), {}
    for claim in grid["claims"]:
        for seed in claim["seeds"]:
            for name in claim["rows"]:
                while name and (name, seed) not in left:  # with the rows that it starts from
                    left[name, seed], name, _ = grid_run(grid, name, seed)
    bar = tqdm(total=len(left), desc="grid")
    while left:
        for (name, seed), folder in list(left.items()):
            _, start, commands = grid_run(grid, name, seed)
            if (start, seed) in left:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "lock", "w") as lock:
                try:
                    fcntl.flock(
                        lock, fcntl.LOCK_EX | fcntl.LOCK_NB
                    )  # given up with the process, however it ends
                except BlockingIOError:
                    continue
                if not row_state(folder)["done"]:
                    run_commands(folder, commands, f"{path}: {name!r}, seed {seed}")
            del left[name, seed]
            write_atomically(Path(grid["results"]), grid_text(grid, path))
            bar.update()
            break
        else:
            time.sleep(5)  # all that could be run is being run elsewhere


def row_state(folder):
    """Is a row's run done, and how many CPU minutes has it taken so far?"""
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else {"done": False, "cpu_minutes": 0.0}


def run_commands(folder, commands, where):
    """Runs the commands of a row, and keeps its state.json."""
    state, before = row_state(folder), resource.getrusage(resource.RUSAGE_CHILDREN)
    config, metrics = (
        load_config(commands[0][1], commands[0][2:]),
        folder / "eval" / "metrics.json",
    )
    stage, sft = "grpo" if commands[0][0] == "train_grpo.py" else config.sft.stage, config.sft
    steps = {"grpo": config.grpo.steps, "more": sft.more_steps}.get(stage, sft.steps)
    metrics.unlink(missing_ok=True)
    try:
        for command in commands:
            tqdm.write("python " + " ".join(command))
            code = subprocess.run(
                [sys.executable, Path(__file__).with_name(command[0]), *command[1:]],
                stdout=subprocess.DEVNULL,
            ).returncode
            stopped = (
                last_step(folder / stage) < steps
            )  # by a signal: that is no failure, and not the end
            if code or stopped or command is commands[-1] and not metrics.exists():
                raise InputError(
                    f"{where}: `python {' '.join(command)}` did not end; started again, the grid goes on from there"
                )
        state["done"] = True
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        state["cpu_minutes"] += (
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        ) / 60
        write_atomically(folder / "state.json", json.dumps(state))


def grid_text(grid, path):
    """RESULTS.md: a table for each claim, with mean, lowest and highest over the seeds that are done."""
    text, minutes, runs = [], {}, set()
    for claim in grid["claims"]:
        lines = [
            [
                "",
                "seeds",
                *(metric for _, metric in SHOWN),
                *(f"{metric} - start" for _, metric in GAINS),
            ]
        ]
        for name in claim["rows"]:
            done = []
            for seed in claim["seeds"]:
                folder, _, _ = grid_run(grid, name, seed)
                state = row_state(folder)
                runs.add(folder)
                if state["done"]:
                    done.append(json.loads((folder / "eval" / "metrics.json").read_text()))
                    minutes[folder] = state["cpu_minutes"]

            def cell(values, sign=""):
                values = [v for v in values if v is not None]
                return (
                    f"{np.mean(values):{sign}.3f} [{min(values):{sign}.3f}, {max(values):{sign}.3f}]"
                    if values
                    else "-"
                )

            def found(
                block, metric, gain=False
            ):  # of the last model, the row's own; its start stands before it
                models = [
                    [*results.get(block, {}).get(metric, {"": {"value": None}}).values()]
                    for results in done
                ]
                return [
                    m[-1]["difference"][0] if gain else m[-1]["value"]
                    for m in models
                    if len(m) > 1 or not gain
                ]

            lines.append(
                [
                    name,
                    str(len(done)),
                    *(cell(found(*which)) for which in SHOWN),
                    *(cell(found(*which, True), "+") for which in GAINS),
                ]
            )
        few = min(2, len(claim["rows"]))  # a column compares rows
        kept = [
            i
            for i, column in enumerate(zip(*lines[1:]))
            if sum(text != "-" for text in column) >= few
        ]
        lines = [[line[i] for i in kept] for line in lines]
        table = "\n".join(
            "| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(kept), *lines[1:]]
        )
        text.append(
            "\n\n".join(
                filter(
                    None,
                    [
                        f"## {claim['title']}",
                        " ".join(claim["paper"].split()),
                        table,
                        " ".join(claim.get("reading", "").split()),
                    ],
                )
            )
        )
    head = (
        f"# The papers' claims in miniature\n\n`python eval.py --reproduce {path}`: phantoms and the built-in 2.4 M-parameter model. Mean [lowest, highest] over "
        f"the seeds that are done. {len(minutes)} of {len(runs)} runs, {sum(minutes.values()) / 60:.1f} CPU-hours, the longest {max(minutes.values(), default=0):.0f} CPU-minutes."
    )
    return (
        "\n\n".join([head, *filter(None, [" ".join(grid.get("setting", "").split())]), *text])
        + "\n"
    )


def main():
    parser = argparse.ArgumentParser(description="Evaluate checkpoints side by side.")
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--reproduce", metavar="GRID", help="train and evaluate a grid of runs")
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="RUN", help="run folders or model folders"
    )
    parser.add_argument(
        "--predictions", nargs="+", default=[], metavar="FILE", help="JSON lines of id and text"
    )
    args = parser.parse_args()
    if args.reproduce:
        return reproduce(args.reproduce)
    if not args.config:
        parser.error("expected a configuration file")
    given = [*args.checkpoint, *args.predictions]
    overrides = [
        a for a in given if "=" in a and not os.path.exists(a)
    ]  # the options take all that follows
    config = load_config(args.config, args.overrides + overrides)
    for path in (
        a
        for a in args.predictions
        if a not in overrides and not (a.endswith(".jsonl") and os.path.isfile(a))
    ):
        raise InputError(f"--predictions {path}: expected a file NAME.jsonl")
    names = column_names([a.removesuffix(".jsonl") for a in given if a not in overrides])
    if both := [
        path
        for path in names.values()
        if path in args.checkpoint and path + ".jsonl" in args.predictions
    ]:
        raise InputError(
            f"--checkpoint {both[0]} and --predictions {both[0]}.jsonl would be one column: rename the file"
        )
    if not names:
        parser.error(
            "expected at least one folder after --checkpoint, or a file after --predictions"
        )
    files = {
        name: path + ".jsonl" for name, path in names.items() if path + ".jsonl" in args.predictions
    }
    init_processes()
    evaluate_checkpoints(
        config, {name: path for name, path in names.items() if name not in files}, files
    )


if __name__ == "__main__":
    run_main(main)
