"""Evaluation: metrics of one or several checkpoints over a split, side by side, with intervals.

  python eval.py config.yaml --checkpoint RUN [RUN ...] [key=value ...]
  python eval.py config.yaml --predictions FILE.jsonl [FILE.jsonl ...] [key=value ...]

The second reads the outputs of any other program: a line {"id": .., "text": ..} for each example.
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
  bleu1 .. bleu4, cider              corpus BLEU; CIDEr-D (times 10)
  rouge_l, gleu                      mean over reports
  distinct_share                     distinct texts / reports
  normal_share                       share of reports labelled No Finding
  copied_share                       share that repeats a training report word for word
  mean_words                         per report
  *_reference                        the same of the reference reports
Grounding.
  soft_f1                            mean over all examples; if nothing is there: 1 for saying so
  soft_f1_nonempty                   mean over the examples with reference boxes
  matched_iou                        mean IoU of the pairs that soft-F1 matches
  map50                              mean over what is asked for of average_precision, at IoU 0.5
  empty_accuracy                     share of the references without boxes that are answered so
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
from collections import Counter
from dataclasses import replace
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
    gleu,
    iou,
    labeler,
    match_boxes,
    ngrams,
    rouge_l,
    says_nothing_there,
    soft_f1,
    tokenize,
)
from runtime.checkpoint import last_step, resolve
from runtime.config import Config, InputError, load_config
from runtime.output import format_table, print0, progress, rank, world_size, write_atomically
from runtime.processes import gather_lists, init_processes, parse_args, run_main

Array = np.ndarray
Predictions = list[dict]  # see prediction_record

RESAMPLES = 1000  # of the bootstrap
TOP5 = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
COLUMNS = {"14": range(14), "13": range(1, 14), "5": [LABELS.index(label) for label in TOP5]}
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


def prediction_record(example: Example, text: str, finished=True, n_tokens=0) -> dict:
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
        "valid": valid,
        "finished": finished,
        "n_tokens": n_tokens,
        "reference": example.answer,
        "boxes": [list(box) for box in example.boxes],
    }


def predict(policy: Policy, examples: list[Example], cfg: Config, name: str) -> Predictions:
    """Decode examples greedily. Collective.

    Returns the predictions of all processes in the order of the examples, without those that the
    policy skips.
    """
    local = []
    batches = batched(examples[rank() :: world_size()], cfg.eval.batch_size)
    for batch in progress(batches, f"predict {name}"):
        for r in policy.sample(batch, 1, cfg.grpo.max_new_tokens, temperature=0):
            local.append(prediction_record(r.example, r.texts[0], r.finished[0], r.lengths[0]))
    place = {example.id: i for i, example in enumerate(examples)}
    return sorted(gather_lists(local), key=lambda p: place[p["id"]])


def read_predictions(path: str, examples: list[Example]) -> Predictions:
    """Predictions of another program, {"id", "text"} a line. InputError if an example has none."""
    texts = data.texts_by_id(path, "text")
    missing = [e.id for e in examples if e.id not in texts]
    if missing:
        raise InputError(
            f"{path}: no prediction for {len(missing)} of {len(examples)} examples, such as id "
            f"{missing[0]!r}"
        )
    return [prediction_record(e, texts[e.id]) for e in examples]


# ------------------------------------------------------------------------------- metrics
# Every metric takes weights (S, N) for N predictions and gives S values, one for each row of them.
# Row 0 is all ones: the metric itself. The other rows give its interval, see bootstrap_weights.


def average(values, weights):
    """Weighted means (S,) of values (N,), without the NaN among them."""
    values = np.asarray(values, dtype=float)
    real = ~np.isnan(values)
    return weights[:, real] @ values[real] / weights[:, real].sum(1)


def mean_of_real(values, axis):
    """The mean along an axis without the NaN among them."""
    return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)


def precision_recall_f1(tp, fp, fn):
    """Of true positives, false positives and false negatives, arrays of any shape.

    NaN where the reference has no positive, precision 0 where the prediction has none.
    """
    there = np.where(tp + fn > 0, 0.0, np.nan)
    return {
        "f1": there + 2 * tp / (2 * tp + fp + fn),
        "precision": there + tp / np.maximum(tp + fp, 1e-9),
        "recall": there + tp / (tp + fn),
    }


def label_scores(counts, weights):
    """{"f1_macro14": (S,), ..} and F1 per label (S, 14), of tp, fp, fn of each report: (N, 3, 14).

    A label without a reference positive is no part of the macro mean, as a 0 would blame the model
    for the split. Its false positives still count in micro.
    """
    totals = np.tensordot(weights, counts, 1)  # (S, 3, 14)
    per_label = precision_recall_f1(*np.moveaxis(totals, 1, 0))
    scores = {}
    for columns, chosen in COLUMNS.items():
        pooled = precision_recall_f1(*totals[:, :, chosen].sum(2).T)
        for name, values in per_label.items():
            scores[f"{name}_macro{columns}"] = mean_of_real(values[:, chosen], 1)
            scores[f"{name}_micro{columns}"] = pooled[name]
    return scores, per_label["f1"]


def bleu_scores(candidates: list[str], references: list[str], weights: Array) -> Array:
    """Corpus BLEU-1 .. 4 (Papineni et al. 2002), (4, S)."""
    counts = []
    for candidate, reference in zip(candidates, references):
        a, b = tokenize(candidate), tokenize(reference)
        row = [len(a), len(b)]
        for matching, in_candidate, _ in count_ngrams(a, b):
            row += [matching, in_candidate]
        counts.append(row)

    # Counts are summed over the corpus before any ratio is taken.
    totals = weights @ np.array(counts)  # (S, 10)
    length, reference_length = totals[:, :2].T
    precisions = totals[:, 2::2] / np.maximum(totals[:, 3::2], 1)  # (S, 4)
    log_means = np.log(precisions).cumsum(1) / np.arange(1, 5)
    brevity = np.minimum(0, 1 - reference_length / np.maximum(length, 1e-9))
    return np.exp(brevity[:, None] + log_means).T


def tf_idf(grams, documents, n_documents):
    """Weigh each n-gram by how few of the documents have it."""
    return {
        gram: count * math.log(n_documents / max(documents[gram], 1))
        for gram, count in grams.items()
    }


def cider_scores(candidates: list[str], references: list[str]) -> Array:
    """CIDEr-D (Vedantam et al. 2015), (N,): one reference, sigma 6, n-grams of 1 to 4 tokens.

    Document frequencies are those of the references.
    """
    pairs = [(tokenize(a), tokenize(b)) for a, b in zip(candidates, references)]
    scores = np.zeros(len(pairs))
    for n in range(1, 5):
        grams = [(ngrams(a, n), ngrams(b, n)) for a, b in pairs]
        documents = Counter(gram for _, b in grams for gram in b)
        for i, both in enumerate(grams):
            a, b = (tf_idf(counts, documents, len(pairs)) for counts in both)
            norm = math.hypot(*a.values()) * math.hypot(*b.values())
            if norm > 0:
                # Clipped: to repeat an n-gram earns nothing.
                shared = sum(min(a[gram], b[gram]) * b[gram] for gram in a if gram in b)
                scores[i] += shared / norm
    gaps = np.array([len(a) - len(b) for a, b in pairs])
    return 10 / 4 * scores * np.exp(-(gaps**2) / (2 * 6**2))


def overlap_metrics(answers, references, weights):
    bleu = enumerate(bleu_scores(answers, references, weights), 1)
    return {
        **{f"bleu{n}": values for n, values in bleu},
        "cider": average(cider_scores(answers, references), weights),
        "rouge_l": average([*map(rouge_l, answers, references)], weights),
        "gleu": average([*map(gleu, answers, references)], weights),
    }


def diversity_metrics(texts, normal, training, weights):
    """How alike reports are. normal (N,): No Finding. training: plain words of training reports."""
    # A resample repeats texts, so there is no interval.
    distinct = np.full(len(weights), np.nan)
    distinct[0] = len(set(texts)) / len(texts)
    metrics = {
        "distinct_share": distinct,
        "normal_share": average(normal, weights),
        "mean_words": average([len(text.split()) for text in texts], weights),
    }
    if training:
        copied = [plain_words(text) in training for text in texts]
        metrics["copied_share"] = average(copied, weights)
    return metrics


def output_metrics(predictions, weights):
    metrics = {
        "format_valid": average([p["valid"] for p in predictions], weights),
        "truncated": average([not p["finished"] for p in predictions], weights),
        "examples": np.full(len(weights), len(predictions)),
    }
    lengths = [len(p["thinking"].split()) or math.nan for p in predictions]
    if not np.isnan(lengths).all():
        metrics["thinking_words"] = average(lengths, weights)
    return metrics


def report_metrics(predictions: Predictions, weights: Array, read_labels, training=()):
    """Metrics of the reports, and F1 per label. training: the texts of the training reports."""
    answers = [p["answer"] for p in predictions]
    references = [p["reference"] for p in predictions]
    generated = np.isin(read_labels(answers), (POSITIVE, UNCERTAIN))  # (N, 14)
    reference = np.isin(read_labels(references), (POSITIVE, UNCERTAIN))
    counts = [generated & reference, generated & ~reference, ~generated & reference]
    counts = np.stack(counts, 1).astype(float)  # (N, 3, 14)

    scores, f1 = label_scores(counts, weights)
    metrics = {f"ce_{name}": values for name, values in scores.items()}
    training = {plain_words(text) for text in training}
    subsets = {"abnormal": reference[:, 1:].any(1)}
    if training:
        subsets["unseen"] = np.array([plain_words(text) not in training for text in references])
    for name, rows in subsets.items():
        scores, _ = label_scores(counts, weights * rows)
        metrics[f"{name}_f1_macro13"] = scores["f1_macro13"]
        metrics[f"{name}_f1_micro13"] = scores["f1_micro13"]

    metrics |= overlap_metrics(answers, references, weights)
    metrics |= diversity_metrics(answers, generated[:, 0], training, weights)
    of_references = diversity_metrics(references, reference[:, 0], training, weights)
    metrics |= {f"{name}_reference": values for name, values in of_references.items()}
    return metrics | output_metrics(predictions, weights), dict(zip(LABELS, f1.T))


def soft_f1_of(prediction):
    """Only words can say "nothing there": an empty answer, or one with broken boxes, scores 0."""
    answer = prediction["answer"]
    match_empty = says_nothing_there(answer)
    return soft_f1(parse_boxes(answer), prediction["boxes"], match_empty=match_empty)


def class_of(prediction):
    """What was asked for. Free phrases are one class, and so are detections of everything."""
    kind = prediction["kind"]
    return kind if kind in ("phrase", "detection") else prediction["label"]


def average_precision(predictions: Predictions, weights: Array) -> Array:
    """Of the boxes of one class at IoU 0.5, with all-point interpolation, (S,).

    Boxes carry no score: all first boxes of an answer rank before all second boxes, ties in the
    order of the examples. So it does not compare with the mAP of scored detectors. Each box takes
    the best free reference box of its example if their IoU is at least 0.5. Else it is a false
    positive.
    """
    ranked = []
    for i, p in enumerate(predictions):
        ranked += [(place, i, box) for place, box in enumerate(parse_boxes(p["answer"]))]
    free = [list(p["boxes"]) for p in predictions]
    n_reference = weights @ [len(boxes) for boxes in free]  # (S,)

    owners, hits = [], []
    for _, i, box in sorted(ranked):
        overlaps = [iou(box, reference) for reference in free[i]]
        best = max(overlaps, default=0)
        hit = best >= 0.5
        if hit:
            del free[i][overlaps.index(best)]
        hits.append(hit)
        owners.append(i)

    # Where an example is drawn k times, each of its boxes ranks k times.
    copies = weights[:, owners]  # (S, K)
    found = copies * hits
    precision = np.nan_to_num(found.cumsum(1) / copies.cumsum(1))
    # The best precision at this recall or a higher one.
    envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    return (envelope * found).sum(1) / n_reference


def mean_matched_iou(predictions, weights):
    owners, overlaps = [], []
    for i, p in enumerate(predictions):
        for _, _, overlap in match_boxes(parse_boxes(p["answer"])[:MAX_MATCHED], p["boxes"]):
            owners.append(i)
            overlaps.append(overlap)
    return average(overlaps, weights[:, owners])


def grounding_metrics(predictions: Predictions, weights: Array):
    """Metrics of the grounding questions, and those of each class that is asked for."""
    scores = np.array([soft_f1_of(p) for p in predictions])
    nonempty = np.array([bool(p["boxes"]) for p in predictions])
    classes = np.array([class_of(p) for p in predictions])
    per_class, precisions = {}, []
    for name in np.unique(classes).tolist():
        own = classes == name
        per_class[f"soft_f1 {name}"] = average(scores[own], weights[:, own])
        if nonempty[own].any():
            asked = list(itertools.compress(predictions, own))
            precisions.append(average_precision(asked, weights[:, own]))
            per_class[f"ap50 {name}"] = precisions[-1]

    metrics = {
        "soft_f1": average(scores, weights),
        "soft_f1_nonempty": average(scores[nonempty], weights[:, nonempty]),
        "matched_iou": mean_matched_iou(predictions, weights),
        "map50": mean_of_real(np.reshape(precisions, (-1, len(weights))), 0),
        "empty_accuracy": average(scores[~nonempty], weights[:, ~nonempty]),
    }
    return metrics | output_metrics(predictions, weights), per_class


# ------------------------------------------------------------------------------- summary


def bootstrap_weights(predictions: Predictions, resamples: int, seed: int) -> Array:
    """How often each prediction counts in each sample, (1 + resamples, N).

    How much would a metric change with other patients? The bootstrap (Efron 1979) draws as many
    patients from ours, with replacement, and measures again. To draw a prediction twice is to weigh
    it by 2, so a metric that takes weights needs no copies. With predictions of the patients A, A
    and B, three resamples may be:

      1 1 1    no resample: the metric itself
      2 2 0    drawn: A, A
      1 1 1    drawn: B, A
      0 0 2    drawn: B, B

    A prediction without a patient is drawn by itself.
    """
    patients = [p["patient"] or p["id"] for p in predictions]
    names, patient = np.unique(patients, return_inverse=True)
    size = len(names)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(size, np.full(size, 1 / size), resamples)  # (resamples, patients)
    return np.vstack([np.ones(size), draws])[:, patient]


def select(predictions, weights, key, value):
    """The predictions whose `key` is `value`, and their weights."""
    rows = [i for i, p in enumerate(predictions) if p[key] == value]
    return [predictions[i] for i in rows], weights[:, rows]


@np.errstate(invalid="ignore", divide="ignore")
def measure(predictions: Predictions, weights: Array, read_labels, training=()):
    """{block: {metric: (S,)}} of one model. A task without predictions has no block."""
    blocks = {}
    reports, own = select(predictions, weights, "task", "report")
    if reports:
        blocks["reports"], blocks["labels"] = report_metrics(reports, own, read_labels, training)

    asked, own = select(predictions, weights, "task", "grounding")
    if asked:
        blocks["grounding"], blocks["grounding labels"] = grounding_metrics(asked, own)
    # The papers report the kinds of grounding apart.
    kinds = sorted({p["kind"] for p in asked})
    if len(kinds) > 1:
        for kind in kinds:
            blocks[f"grounding of {kind}"], _ = grounding_metrics(*select(asked, own, "kind", kind))
    return blocks


def with_interval(values):
    """[value, low, high] of a metric and its resamples (1 + n,): 95 %, NaN without any."""
    resamples = values[1:]
    resamples = resamples[~np.isnan(resamples)]
    low_high = [math.nan, math.nan]
    if len(resamples):
        low_high = np.percentile(resamples, [2.5, 97.5]).tolist()
    return [float(values[0]), *low_high]


def ids_of(predictions):
    return [p["id"] for p in predictions]


def summarise(predictions: dict[str, Predictions], cfg: Config, training=()) -> dict:
    """{block: {metric: {model: {"value", "interval", "difference"}}}} of {model: predictions}.

    The difference to the first model, [value, low, high], is paired: all models are measured on the
    same resamples. ValueError if they have predictions for other examples.
    """
    first, *_ = predictions.values()
    if any(ids_of(rows) != ids_of(first) for rows in predictions.values()):
        raise ValueError("paired differences need the same examples in the same order")
    if not first:
        return {}
    weights = bootstrap_weights(first, RESAMPLES, cfg.seed)
    read_labels = labeler(cfg.rewards)
    measured = {
        name: measure(rows, weights, read_labels, training) for name, rows in predictions.items()
    }

    results = {}
    unknown = np.full(len(weights), np.nan)
    for block, metrics in next(iter(measured.values())).items():
        results[block] = {}
        for metric, baseline in metrics.items():
            entries = {}
            for name, blocks in measured.items():
                values = blocks[block].get(metric, unknown)
                value, *interval = with_interval(values)
                difference = with_interval(values - baseline)
                entries[name] = {"value": value, "interval": interval, "difference": difference}
            results[block][metric] = entries
    return results


# ------------------------------------------------------------------------------- table


def cell(value: float, low: float, high: float, sign: str = "") -> str:
    """A value with its interval, like "0.512 [0.480, 0.541]". sign="+" shows the sign."""
    if math.isnan(value):
        return "-"
    digits = 0 if value == int(value) and abs(value) > 1 else 3
    text = f"{value:{sign}.{digits}f}"
    if math.isnan(low) or low == high:
        return text
    return f"{text} [{low:{sign}.3f}, {high:{sign}.3f}]"


def main_metrics(metrics):
    """Those of a block that the table shows, in its order."""
    return {name: metrics[name] for name in IN_TABLE.split() if name in metrics}


def table(results: dict) -> str:
    """What summarise returns as text, one column per model, with intervals and differences."""
    models, values, changes = [], [], []
    for block, metrics in results.items():
        if "labels" in block:
            continue
        for metric, by_model in main_metrics(metrics).items():
            models = list(by_model)
            cells = [cell(m["value"], *m["interval"]) for m in by_model.values()]
            values.append([f"{block}: {metric}", *cells])

            first, *others = by_model.values()
            if others and metric in DIFFERENCES and not math.isnan(first["interval"][0]):
                cells = [cell(*m["difference"], sign="+") for m in others]
                changes.append([f"minus {models[0]}: {metric}", "", *cells])
    if not values:
        return "nothing to evaluate"
    return format_table([["", *models], *values, *changes])


# ------------------------------------------------------------------------------- commands


def chosen_examples(cfg: Config) -> list[Example]:
    """All examples of the split cfg.eval.split, or eval.limit of each task, drawn by the seed."""
    examples = data.load_split(cfg, cfg.eval.split)
    chosen = []
    for task in ("report", "grounding"):
        own = [e for e in examples if e.task == task]
        drawn = np.random.default_rng(cfg.seed).permutation(len(own))[: cfg.eval.limit or None]
        chosen += [own[i] for i in sorted(drawn)]
    return chosen


def try_evaluation(policy: Policy, config: Config):
    """A few tokens of the first examples, so that what is wrong shows before the training."""
    short = replace(config, grpo=replace(config.grpo, max_new_tokens=4))
    with policy.unsharded():
        predict(policy, chosen_examples(config)[:2], short, "a try")


def compare_with_start(config: Config, start: str, run: Path):
    """Evaluate a start, the result of GRPO in `run`, and continued SFT if there is one."""
    stage = Path(start).parent.name
    name = stage if stage in ("sft", "cold_start") else "start"
    checkpoints = {name: start, "grpo": run / "last"}
    more = Path(config.out, "more")
    if last_step(more) >= config.sft.more_steps:
        checkpoints["more"] = more / "best"
    evaluate_checkpoints(config, checkpoints)


def training_reports(cfg: Config) -> list[str]:
    """The reports of the training split. Without one, only the metrics that need it are missing."""
    try:
        return [e.answer for e in data.load_split(cfg, "train") if e.task == "report"]
    except InputError as error:
        print0(f"no comparison with training reports: {error}")
        return []


def write_page(path, *content):
    """report.html, if the tool that makes it is there."""
    try:
        from tools.report_page import page  # noqa: PLC0415
    except ImportError as error:
        print0(f"no page is written: {error}")
        return
    write_atomically(path, page(*content))
    print0(f"\n{path}")


def evaluate_checkpoints(cfg: Config, paths: dict, files: dict | None = None) -> tuple[str, dict]:
    """Evaluate {name: checkpoint} and {name: file of predictions} on cfg.eval.split. Collective.

    Writes OUT/eval/ and prints. Returns the table and what summarise returns, on the first process.
    """
    # If the labeler or a file cannot be read, we want to know before the decoding.
    labeler(cfg.rewards)
    examples = chosen_examples(cfg)
    has_reports = any(e.task == "report" for e in examples)
    training = training_reports(cfg) if has_reports else []
    from_files = {}
    for name, path in (files or {}).items():
        from_files[name] = read_predictions(path, examples)

    folder = Path(cfg.out, "eval")
    predictions = {}
    for name, path in paths.items():
        # Nothing keeps the model: it is freed before the next one is loaded.
        predictions[name] = predict(model.load_policy(cfg, resolve(path)), examples, cfg, name)
        if rank() == 0:
            lines = [json.dumps(p) + "\n" for p in predictions[name]]
            write_atomically(folder / f"{name}.jsonl", "".join(lines))
    predictions |= from_files
    if rank() != 0:
        return "", {}

    # Compare on the same examples.
    common = set.intersection(*(set(ids_of(rows)) for rows in predictions.values()))
    missing = len(examples) - len(common)
    if missing:
        print0(f"{missing} of {len(examples)} examples are left out: a model did not predict them")
    for name, rows in predictions.items():
        predictions[name] = [p for p in rows if p["id"] in common]
    examples = [e for e in examples if e.id in common]

    results = summarise(predictions, cfg, training)
    without_nan = json.loads(json.dumps(results), parse_constant=lambda _: None)
    write_atomically(folder / "metrics.json", json.dumps(without_nan, indent=1))
    text = table(results)
    print0(text)
    write_page(folder / "report.html", cfg, results, predictions, examples)
    return text, results


def column_names(paths: list[str]) -> dict[str, str]:
    """{the shortest end of each path that tells it apart: path}. Equal paths are kept once."""
    parts = {Path(os.path.abspath(path)).parts[1:]: path for path in paths}
    for depth in itertools.count(1):
        names = {"/".join(part[-depth:]): path for part, path in parts.items()}
        if len(names) == len(parts):
            return names


def main() -> None:
    paths = {"nargs": "+", "default": []}
    _, args = parse_args(
        __doc__,
        checkpoint={**paths, "metavar": "RUN", "help": "run folders or model folders"},
        predictions={**paths, "metavar": "FILE", "help": "JSON lines of id and text"},
    )
    # The options take all words that follow, so overrides may be among them.
    words = [*args.checkpoint, *args.predictions]
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]
    config = load_config(args.config, args.overrides + overrides)
    folders = [word for word in args.checkpoint if word not in overrides]
    files = {
        path.removesuffix(".jsonl"): path for path in args.predictions if path not in overrides
    }
    for name in files.keys() & set(folders):
        raise InputError(
            f"--checkpoint {name} and --predictions {files[name]} would be one column: rename the "
            f"file"
        )
    names = column_names([*folders, *files])
    if not names:
        raise InputError("expected a folder after --checkpoint, or a file after --predictions")

    init_processes()
    checkpoints = {name: path for name, path in names.items() if path in folders}
    predictions = {name: files[path] for name, path in names.items() if path in files}
    evaluate_checkpoints(config, checkpoints, predictions)


if __name__ == "__main__":
    run_main(main)
