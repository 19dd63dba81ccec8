"""Evaluation: metrics of one or several checkpoints over a split, side by side, with intervals.

  python eval.py config.yaml --checkpoint RUN [RUN ...] [key=value ...]
  python eval.py config.yaml --predictions FILE.jsonl [FILE.jsonl ...] [key=value ...]

The second reads the outputs of any other program: a line {"id": .., "text": ..} for each example.
Lines of other ids are counted and ignored.
Decoding is greedy. Writes OUT/eval/: NAME.jsonl (predictions), metrics.json and report.html
(tables, training curves, cases). NAME is the end of RUN's path.

Reports. Clinical efficacy (ce_) compares the labels that are read in the generated and in the
reference text, by the built-in rules or CheXbert (rewards.chexbert). Uncertain counts as positive
in both. The number at the end is of labels: all 14, the 13 without No Finding, or the 5 of the
CheXpert competition.
  ce_{f1,precision,recall}_micro*    of the pooled counts
  ce_{f1,precision,recall}_macro*    mean over the labels that the references have
  abnormal_f1_*                      over the reports whose reference has one of the 13 labels
  unseen_f1_*                        over the reports whose reference is no training report
  bleu1 .. bleu4, cider              corpus BLEU; CIDEr-D (times 10), of at least two reports
  rouge_l, gleu                      mean over reports
  distinct_share                     distinct texts / reports
  normal_share                       share of reports labelled No Finding
  copied_share                       share that repeats a training report word for word
  mean_words                         per report
  radeval:NAME                       mean over reports, what eval.radeval names
  {distinct,normal,copied}_share_reference, mean_words_reference: the same of the references
Grounding.
  soft_f1                            mean over all examples; if nothing is there: 1 for saying so
  soft_f1_nonempty                   mean over the examples with reference boxes
  matched_iou                        mean IoU of the pairs that soft-F1 matches
  map50                              mean over what is asked for of average_precision, at IoU 0.5
  empty_accuracy                     share of the references without boxes that are answered so:
                                     in words without brackets, or by []
Both.
  format_valid, truncated            share of outputs in the format; cut at grpo.max_new_tokens
  thinking_words                     mean over the outputs with thinking

Per label: F1 of reports, soft-F1 and average precision of grounding, in metrics.json and
report.html. Where there are several kinds of grounding (anatomy, abnormality, phrase, detection),
each also has its own block. A metric with nothing to average is NaN in Python, null in JSON and "-"
in the table.
"""

import itertools
import json
import math
import os
import warnings
from collections import Counter
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np

import data
import model
from data import LABELS, Example, batched, parse_boxes, parse_output, plain_words
from model import Policy
from rewards import (
    MAX_MATCHED,
    POSITIVE,
    UNCERTAIN,
    count_ngrams,
    finite_scores,
    gleu,
    iou,
    labeler,
    library_score,
    match_boxes,
    ngrams,
    rouge_l,
    say_large_boxes,
    says_nothing_there,
    soft_f1,
    tokenize,
)
from runtime.checkpoint import last_step, resolve
from runtime.config import Config, InputError
from runtime.output import format_table, print0, progress, rank, warn0, world_size, write_atomically
from runtime.processes import gather_lists, init_processes, parse_args, run_main

Array = np.ndarray
Predictions = list[dict]  # see prediction_record

RESAMPLES = 1000  # of the bootstrap
BATCH = 64  # examples that are decoded together
TOP5 = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
LABEL_SUBSETS = {"14": range(14), "13": range(1, 14), "5": list(map(LABELS.index, TOP5))}
# The metrics of the table, and those whose differences it shows. metrics.json has all.
IN_TABLE = """
    ce_f1_macro14 ce_f1_macro13 ce_f1_macro5 ce_f1_micro14 ce_f1_micro13 ce_f1_micro5
    ce_precision_micro13 ce_recall_micro13 abnormal_f1_macro13 unseen_f1_macro13
    bleu1 bleu4 cider rouge_l gleu distinct_share distinct_share_reference
    normal_share normal_share_reference copied_share mean_words mean_words_reference
    soft_f1 soft_f1_nonempty matched_iou map50 empty_accuracy
    thinking_words format_valid truncated examples
"""
DIFFERENCES = ("ce_f1_macro13", "ce_f1_micro13", "ce_recall_micro13", "soft_f1", "map50")

# ------------------------------------------------------------------------------- predictions


def predict(policy: Policy, examples: list[Example], cfg: Config, name: str) -> dict[str, dict]:
    """Decode examples greedily: {id: prediction} of all processes. Collective.

    An example that the policy skips has none.
    """
    own = examples[rank() :: world_size()]
    policy.encode_ahead(own)
    longest = cfg.grpo.max_new_tokens
    local = []
    for batch in progress(batched(own, BATCH), f"predict {name}"):
        for r in policy.sample(batch, 1, longest, temperature=0):
            record = prediction_record(r.example, r.texts[0], r.finished[0], r.lengths[0])
            local.append(record)
    return {p["id"]: p for p in gather_lists(local)}


def prediction_record(example: Example, text: str, finished=True, n_tokens=0) -> dict:
    """A prediction as it is written to NAME.jsonl."""
    valid, thinking, answer = parse_output(text, example.task, example.style)
    keys = ("id", "task", "kind", "label", "patient")
    record = {key: getattr(example, key) for key in keys}
    record |= {
        "text": text,
        "answer": answer,
        "thinking": thinking,
        "valid": valid,
        "finished": finished,
        "n_tokens": n_tokens,
        "reference": example.answer,
    }
    record["boxes"] = list(map(list, example.boxes))
    return record


def read_predictions(path: str, examples: list[Example]) -> dict[str, dict]:
    """The same of another program, {"id", "text"} a line. InputError if an example has none."""
    texts = data.texts_by_id(path, "text")
    missing = [e.id for e in examples if e.id not in texts]
    if missing:
        raise InputError(
            f"{path}: no prediction for {len(missing)} of {len(examples)} examples, such as id "
            f"{missing[0]!r}"
        )
    records = {e.id: prediction_record(e, texts[e.id]) for e in examples}
    surplus = [name for name in texts if name not in records]
    if surplus:
        warn0(
            f"{path}: {len(surplus)} of {len(texts)} predictions are ignored, as no chosen example "
            f"has their id, such as {surplus[0]!r}"
        )
    return records


# ------------------------------------------------------------------------------- reports
# Every metric takes weights (S, N) of N predictions and gives S values, one for each row of them.
# Row 0 is all ones: the metric itself. The other rows give its interval: see bootstrap_weights.


def average(values, weights):
    """Weighted means (S,) of values (N,); NaN of nothing."""
    return weights @ values / weights.sum(1)


def report_metrics(predictions: Predictions, weights: Array, read_labels, training=(), library=()):
    """Metrics of the reports, and F1 per label.

    training: the texts of the training reports; library: (name, score) of other packages.
    """
    answers = [p["answer"] for p in predictions]
    references = [p["reference"] for p in predictions]
    found = np.isin(read_labels(answers), (POSITIVE, UNCERTAIN))  # (N, 14)
    true = np.isin(read_labels(references), (POSITIVE, UNCERTAIN))
    training = {plain_words(text) for text in training}

    hits = found & true
    false_alarms = found & ~true
    misses = true & ~found
    counts = np.stack([hits, false_alarms, misses], 1)  # (N, 3, 14)
    scores, f1 = label_scores(counts, weights)
    metrics = {f"ce_{name}": values for name, values in scores.items()}
    # The same for some of the reports: a report with weight 0 does not count.
    subsets = {"abnormal": true[:, 1:].any(1)}
    if training:
        subsets["unseen"] = [plain_words(text) not in training for text in references]
    for subset, chosen in subsets.items():
        scores, _ = label_scores(counts, weights * chosen)
        for name in ("f1_macro13", "f1_micro13"):
            metrics[f"{subset}_{name}"] = scores[name]

    bleu = bleu_scores(answers, references, weights)
    for n in range(4):
        metrics[f"bleu{n + 1}"] = bleu[n]
    metrics["cider"] = average(cider_scores(answers, references), weights)
    for metric in (rouge_l, gleu):
        values = list(map(metric, answers, references))
        metrics[metric.__name__] = average(values, weights)

    metrics |= diversity_metrics(answers, found, training, weights)
    reference = diversity_metrics(references, true, training, weights)
    for name, values in reference.items():
        metrics[f"{name}_reference"] = values
    metrics |= output_metrics(predictions, weights)
    for name, score in library:
        values = finite_scores(name, score(answers, references), [p["id"] for p in predictions])
        metrics[name] = average(values, weights)
    return metrics, dict(zip(LABELS, f1.T))


def label_scores(counts, weights):
    """{"f1_macro14": (S,), ..} and F1 per label (S, 14), of the counts of each report (N, 3, 14).

    A label without a reference positive (in a resample) is no part of the macro mean, as a 0 would
    blame the model for the split. Its false positives still count in micro.
    """
    totals = np.tensordot(weights, counts, 1)  # (S, 3, 14)
    per_label = precision_recall_f1(totals)
    scores = {}
    for subset, columns in LABEL_SUBSETS.items():
        pooled = precision_recall_f1(totals[:, :, columns].sum(2))
        for name, values in per_label.items():
            scores[f"{name}_macro{subset}"] = np.nanmean(values[:, columns], 1)
            scores[f"{name}_micro{subset}"] = pooled[name]
    return scores, per_label["f1"]


def precision_recall_f1(counts):
    """Of true positives, false positives and false negatives, (S, 3, ..) -> (S, ..) each.

    NaN where the reference has no positive, precision 0 where the prediction has none.
    """
    tp, fp, fn = np.moveaxis(counts, 1, 0)
    # 0 where the reference has a positive, else NaN: added below, it makes the score NaN.
    there = np.where(tp + fn > 0, 0.0, np.nan)
    f1 = there + 2 * tp / (2 * tp + fp + fn)
    precision = there + tp / np.maximum(tp + fp, 1)
    recall = tp / (tp + fn)
    return {"f1": f1, "precision": precision, "recall": recall}


def bleu_scores(candidates: list[str], references: list[str], weights: Array) -> Array:
    """Corpus BLEU-1 .. 4 (Papineni et al. 2002), (4, S)."""
    texts = zip(map(tokenize, candidates), map(tokenize, references))
    counts = list(itertools.starmap(count_ngrams, texts))
    # Counts are summed over the corpus before any ratio is taken.
    totals = np.tensordot(weights, counts, 1)  # (S, 4, 3)
    matching, in_candidate, in_reference = totals.T  # (4, S) each

    in_candidate = np.maximum(in_candidate, 1)
    log_precision = np.log(matching / in_candidate)
    log_sums = log_precision.cumsum(0)
    log_means = log_sums / np.arange(1, 5)[:, None]
    # The length of a text is its number of 1-grams.
    ratio = in_reference[0] / in_candidate[0]
    brevity = np.minimum(0, 1 - ratio)
    return np.exp(brevity + log_means)


def cider_scores(candidates: list[str], references: list[str]) -> Array:
    """CIDEr-D (Vedantam et al. 2015), (N,): one reference, sigma 6, n-grams of 1 to 4 tokens.

    NaN for a single study: n-grams weigh by how few references have them, and here all have.
    """
    if len(references) == 1:
        return np.array([math.nan])
    candidates = list(map(tokenize, candidates))
    references = list(map(tokenize, references))
    scores = np.zeros(len(references))
    for n in range(1, 5):
        written = [ngrams(tokens, n) for tokens in candidates]
        expected = [ngrams(tokens, n) for tokens in references]
        scores += tf_idf_cosines(written, expected)
    gaps = np.array([len(a) - len(b) for a, b in zip(candidates, references)])
    penalty = np.exp(-(gaps**2) / (2 * 6**2))
    return 10 / 4 * scores * penalty


def tf_idf_cosines(candidates, references):
    """(N,) similarities of n-gram counts. Rare ones, in few references, weigh more."""
    documents = Counter(itertools.chain.from_iterable(references))
    cosines = []
    for a, b in zip(candidates, references):
        grams = a | b
        frequency = np.array([documents[gram] for gram in grams])
        idf = np.log(len(references) / np.maximum(frequency, 1))
        x = idf * [a[gram] for gram in grams]
        y = idf * [b[gram] for gram in grams]
        # Clipped: to repeat an n-gram earns nothing.
        product = np.minimum(x, y) @ y
        norm = math.hypot(*x) * math.hypot(*y)
        cosines.append(product / norm if norm else 0)
    return cosines


def diversity_metrics(texts, labels, training, weights):
    """How alike the reports are. training: the plain words of each training report."""
    # A resample repeats texts, so there is no interval.
    distinct = np.full(len(weights), np.nan)
    distinct[0] = len(set(texts)) / len(texts)
    normal = labels[:, 0]  # No Finding
    lengths = [len(text.split()) for text in texts]
    metrics = {
        "distinct_share": distinct,
        "normal_share": average(normal, weights),
        "mean_words": average(lengths, weights),
    }
    if training:
        copied = [plain_words(text) in training for text in texts]
        metrics["copied_share"] = average(copied, weights)
    return metrics


def output_metrics(predictions, weights):
    """Format, truncation and thinking, of reports and of grounding."""
    valid = [p["valid"] for p in predictions]
    truncated = [not p["finished"] for p in predictions]
    metrics = {
        "format_valid": average(valid, weights),
        "truncated": average(truncated, weights),
        "examples": np.full(len(weights), len(predictions)),
    }
    lengths = np.array([len(p["thinking"].split()) for p in predictions])
    if lengths.any():
        metrics["thinking_words"] = average(lengths, weights * (lengths > 0))
    return metrics


# ------------------------------------------------------------------------------- grounding


def grounding_metrics(predictions: Predictions, weights: Array):
    """Metrics of the grounding questions, and those of each class that is asked for."""
    per_class = {}
    precisions = []
    classes = group_by(class_of, predictions, weights)
    for name, (asked, own) in classes.items():
        scores = list(map(soft_f1_of, asked))
        per_class[f"soft_f1 {name}"] = average(scores, own)
        precision = average_precision(asked, own)
        precisions.append(precision)
        if any(p["boxes"] for p in asked):
            per_class[f"ap50 {name}"] = precision

    scores = list(map(soft_f1_of, predictions))
    nonempty = np.array([len(p["boxes"]) > 0 for p in predictions])
    metrics = {"soft_f1": average(scores, weights)}
    metrics["soft_f1_nonempty"] = average(scores, weights * nonempty)
    metrics["matched_iou"] = mean_matched_iou(predictions, weights)
    metrics["map50"] = np.nanmean(precisions, 0)
    # Without reference boxes, soft-F1 is 1 for "nothing there" and else 0.
    metrics["empty_accuracy"] = average(scores, weights * ~nonempty)
    metrics |= output_metrics(predictions, weights)
    return metrics, per_class


def class_of(prediction):
    """What was asked for. Free phrases are one class, and so are detections of everything."""
    kind = prediction["kind"]
    return kind if kind in ("phrase", "detection") else prediction["label"]


def soft_f1_of(prediction: dict) -> float:
    """Only words can say "nothing there": an empty answer, or one with broken boxes, scores 0."""
    answer = prediction["answer"]
    match_empty = says_nothing_there(answer)
    return soft_f1(parse_boxes(answer), prediction["boxes"], match_empty=match_empty)


def mean_matched_iou(predictions, weights):
    """Over the pairs that soft-F1 matches."""
    owners, overlaps = [], []
    for i, p in enumerate(predictions):
        boxes = parse_boxes(p["answer"])[:MAX_MATCHED]
        for _, _, overlap in match_boxes(boxes, p["boxes"]):
            owners.append(i)
            overlaps.append(overlap)
    return average(overlaps, weights[:, owners])


def average_precision(predictions: Predictions, weights: Array) -> Array:
    """Of the boxes of one class at IoU 0.5, with all-point interpolation, (S,).

    Boxes carry no score: all first boxes of an answer rank before all second boxes, ties in the
    order of the examples. So it does not compare with the mAP of scored detectors. Each box takes
    the best free reference box of its example if their IoU is at least 0.5. Else it is a false
    positive.
    """
    ranked = []
    for i, p in enumerate(predictions):
        free = list(p["boxes"])
        for place, box in enumerate(parse_boxes(p["answer"])):
            overlaps = [iou(box, reference) for reference in free]
            hit = max(overlaps, default=0) >= 0.5
            if hit:
                del free[np.argmax(overlaps)]
            ranked.append((place, i, hit))
    ranked = np.array(sorted(ranked), int).reshape(-1, 3)
    _, owners, hits = ranked.T  # (K,) each

    # Where an example is drawn k times, each of its boxes ranks k times.
    copies = weights[:, owners]  # (S, K)
    found = copies * hits
    precision = np.nan_to_num(found.cumsum(1) / copies.cumsum(1))
    # The best precision at this recall or a higher one.
    backwards = precision[:, ::-1]
    envelope = np.maximum.accumulate(backwards, 1)[:, ::-1]
    n_reference = weights @ [len(p["boxes"]) for p in predictions]
    # Each box found adds 1 / n_reference to the recall: the area under the envelope.
    return (envelope * found).sum(1) / n_reference


# ------------------------------------------------------------------------------- bootstrap


def bootstrap_weights(predictions: Predictions, resamples: int, seed: int) -> Array:
    """How often each prediction counts in each sample, (1 + resamples, N).

    How much would a metric change with other patients? The bootstrap (Efron 1979) draws as many
    patients from ours, with replacement, and measures again. To draw a prediction twice is to weigh
    it by 2, so a metric that takes weights needs no copies. Row 0 is no resample. With predictions
    of the patients A, A and B, of which the second is wrong, and three resamples, there may be:

      weights  share of right ones
      1 1 1    0.67                 row 0: the metric itself
      2 2 0    0.50                 drawn: A, A
      1 1 1    0.67                 drawn: B, A
      0 0 2    1.00                 drawn: B, B

    The interval of a metric holds 95 % of its resamples. A prediction without a patient is drawn by
    itself.
    """
    patients = [p["patient"] or p["id"] for p in predictions]
    names, patient = np.unique(patients, return_inverse=True)
    size = len(names)
    rng = np.random.default_rng(seed)
    chances = np.full(size, 1 / size)
    draws = rng.multinomial(size, chances, resamples)  # (resamples, patients)
    counts = np.vstack([np.ones(size), draws])
    return counts[:, patient]


def with_interval(values):
    """[value, low, high] of a metric and its resamples (S,): 95 % of those that are not NaN."""
    low_high = np.nanpercentile(values[1:], [2.5, 97.5])
    return [float(values[0]), *low_high.tolist()]


def summarise(
    predictions: dict[str, Predictions], cfg: Config, training: tuple | list = ()
) -> dict:
    """{block: {metric: {model: {"value", "interval", "difference"}}}} of {model: predictions}.

    The difference to the first model, [value, low, high], is paired: all models are measured on the
    same resamples. So all must have predicted the same examples, in the same order.
    """
    first, *_ = predictions.values()
    if not first:
        return {}
    weights = bootstrap_weights(first, RESAMPLES, cfg.seed)
    # What has nothing to average is NaN, and needs no warning.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        measured = {}
        for name, rows in predictions.items():
            measured[name] = measure(rows, weights, cfg, training)
        return compare(measured)


def measure(predictions, weights, cfg, training):
    """{block: {metric: (S,)}} of one model. A task without predictions has no block."""
    blocks = {}
    tasks = group_by(itemgetter("task"), predictions, weights)
    if "report" in tasks:
        read_labels = labeler(cfg.rewards)
        library = library_scores(cfg).items()
        metrics, per_label = report_metrics(*tasks["report"], read_labels, training, library)
        blocks |= {"reports": metrics, "labels": per_label}
    if "grounding" in tasks:
        metrics, per_class = grounding_metrics(*tasks["grounding"])
        blocks |= {"grounding": metrics, "grounding labels": per_class}
        # The papers report the kinds of grounding apart.
        kinds = group_by(itemgetter("kind"), *tasks["grounding"])
        if len(kinds) > 1:
            for kind, group in kinds.items():
                blocks[f"grounding of {kind}"], _ = grounding_metrics(*group)
    return blocks


def library_scores(cfg: Config) -> dict:
    """{"radeval:NAME": score} of eval.radeval, see scorers/radeval.py. Raises InputError."""
    names = [f"radeval:{name}" for name in cfg.eval.radeval]
    return {name: library_score(name) for name in names}


def group_by(key, predictions, weights):
    """{key of a prediction: (the predictions that have it, their weights)}, by key."""
    values = np.array([key(p) for p in predictions])
    groups = {}
    for value in np.unique(values).tolist():
        rows = np.flatnonzero(values == value)
        chosen = [predictions[i] for i in rows]
        groups[value] = chosen, weights[:, rows]
    return groups


def compare(measured):
    """What summarise returns, of what measure returns for each model."""
    first, *_ = measured.values()
    results = {}
    for block, metrics in first.items():
        results[block] = {}
        for metric, baseline in metrics.items():
            entries = {}
            for name, blocks in measured.items():
                # Another model may have no thinking to measure.
                values = blocks[block].get(metric, baseline * math.nan)
                value, *interval = with_interval(values)
                entries[name] = {
                    "value": value,
                    "interval": interval,
                    "difference": with_interval(values - baseline),
                }
            results[block][metric] = entries
    return results


# ------------------------------------------------------------------------------- table


def table(results: dict) -> str:
    """What summarise returns as text, one column per model, with intervals and differences."""
    head, values, changes = [], [], []
    for block, metrics in results.items():
        for metric, by_model in main_metrics(metrics).items():
            head = ["", *by_model]
            cells = [cell(entry["value"], *entry["interval"]) for entry in by_model.values()]
            values.append([f"{block}: {metric}", *cells])

            first, *others = by_model.values()
            if others and metric in DIFFERENCES and not math.isnan(first["interval"][0]):
                cells = [cell(*entry["difference"], sign="+") for entry in others]
                changes.append([f"minus {head[1]}: {metric}", "", *cells])
    if not values:
        return "nothing to evaluate"
    return format_table([head, *values, *changes])


def main_metrics(metrics: dict) -> dict:
    """Those of a block that the table shows, in its order."""
    shown = [name for name in IN_TABLE.split() if name in metrics]
    shown += [name for name in metrics if name.startswith("radeval:")]
    return {name: metrics[name] for name in shown}


def cell(value: float, low: float, high: float, sign: str = "") -> str:
    """A value with its interval, like "0.512 [0.480, 0.541]". sign="+" shows the sign."""
    if math.isnan(value):
        return "-"
    digits = 0 if value.is_integer() and abs(value) > 1 else 3
    text = f"{value:{sign}.{digits}f}"
    if low < high:
        text += f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return text


# ------------------------------------------------------------------------------- commands


def evaluate_checkpoints(cfg: Config, paths: dict, files: dict | None = None) -> tuple[str, dict]:
    """Evaluate {name: checkpoint} and {name: file of predictions} on cfg.eval.split. Collective.

    Writes OUT/eval/ and prints. Returns the table and what summarise returns, on the first process.
    """
    # If the labeler or a file cannot be read, we want to know before the decoding.
    labeler(cfg.rewards)
    library_scores(cfg)
    examples = chosen_examples(cfg)
    training = training_reports(cfg, examples)
    others = {}
    for name, path in (files or {}).items():
        others[name] = read_predictions(path, examples)

    folder = Path(cfg.out, "eval")
    predictions = {}
    for name, path in paths.items():
        # Nothing keeps the model: it is freed before the next one is loaded.
        by_id = predict(model.load_frozen(cfg, resolve(path)), examples, cfg, name)
        predictions[name] = by_id
        if rank() == 0:
            ordered = [by_id[e.id] for e in examples if e.id in by_id]
            lines = [json.dumps(p) + "\n" for p in ordered]
            write_atomically(folder / f"{name}.jsonl", "".join(lines))
    predictions |= others
    if rank() != 0:
        return "", {}

    # Compare on the examples that every model has predicted.
    common = set.intersection(*map(set, predictions.values()))
    missing = len(examples) - len(common)
    if missing:
        print0(f"{missing} of {len(examples)} examples are left out: a model did not predict them")
    examples = [e for e in examples if e.id in common]
    for name, by_id in predictions.items():
        predictions[name] = [by_id[e.id] for e in examples]
        answers = [p["text"] for p in predictions[name] if p["task"] == "grounding"]
        say_large_boxes(answers, name)

    results = summarise(predictions, cfg, training)
    text = table(results)
    print0(text)
    without_nan = json.loads(json.dumps(results), parse_constant=lambda _: None)
    write_atomically(folder / "metrics.json", json.dumps(without_nan, indent=1))
    write_page(folder / "report.html", cfg, results, predictions, examples)
    return text, results


def chosen_examples(cfg: Config) -> list[Example]:
    """All examples of the split cfg.eval.split, or eval.limit of each task, drawn by the seed."""
    examples = data.load_split(cfg, cfg.eval.split)
    chosen = []
    for task in ("report", "grounding"):
        own = [e for e in examples if e.task == task]
        rng = np.random.default_rng(cfg.seed)
        drawn = rng.permutation(len(own))[: cfg.eval.limit or None]
        chosen += [own[i] for i in sorted(drawn)]
    return chosen


def try_evaluation(policy: Policy, config: Config):
    """A few tokens of the first examples, so that what is wrong shows before the training."""
    examples = chosen_examples(config)[:2]
    grpo = replace(config.grpo, max_new_tokens=4)
    with policy.unsharded():
        predict(policy, examples, replace(config, grpo=grpo), "a try")


def compare_with_start(config: Config, start: str, run: Path):
    """Evaluate a start, the result of GRPO in `run`, and continued SFT if there is one."""
    stage = Path(start).parent.name
    name = stage if stage in ("sft", "cold_start") else "start"
    checkpoints = {name: start, "grpo": run / "last"}
    more = Path(config.out, "more")
    if last_step(more) >= config.sft.more_steps:
        checkpoints["more"] = more / "best"
    evaluate_checkpoints(config, checkpoints)


def training_reports(cfg, examples):
    """The reports of the training split. Without one, only the metrics that need it are missing."""
    if not any(e.task == "report" for e in examples):
        return []
    try:
        training = data.load_split(cfg, "train")
    except InputError as error:
        print0(f"no comparison with training reports: {error}")
        return []
    return [e.answer for e in training if e.task == "report"]


def write_page(path, *content):
    """report.html, if the tool that makes it is there."""
    try:
        from tools.report_page import page  # noqa: PLC0415
    except ImportError as error:
        print0(f"no page is written: {error}")
        return
    write_atomically(path, page(*content))
    print0(f"\n{path}")


def column_names(paths: list[str]) -> list[str]:
    """The shortest end of each path that tells it apart from the others."""
    absolute = map(os.path.abspath, paths)
    parts = [Path(path).parts[1:] for path in absolute]
    for depth in itertools.count(1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names


def main():
    paths = {"nargs": "*", "default": []}
    config, args = parse_args(
        __doc__,
        checkpoint={**paths, "metavar": "RUN", "help": "run folders or model folders"},
        predictions={**paths, "metavar": "FILE", "help": "JSON lines of id and text"},
    )
    folders, files = args.checkpoint, args.predictions
    stems = [path.removesuffix(".jsonl") for path in files]
    names = column_names(folders + stems)
    if not names:
        raise InputError("expected a folder after --checkpoint, or a file after --predictions")
    checkpoints = dict(zip(names, folders))
    predictions = dict(zip(names[len(folders) :], files))
    for name in checkpoints.keys() & predictions.keys():
        raise InputError(
            f"--checkpoint {checkpoints[name]} and --predictions {predictions[name]} would be one "
            f"column: rename the file"
        )
    init_processes()
    evaluate_checkpoints(config, checkpoints, predictions)


if __name__ == "__main__":
    run_main(main)
