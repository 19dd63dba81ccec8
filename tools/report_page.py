"""report.html: tables, training curves, cases with texts and boxes, and groups of samples.

eval.evaluate_checkpoints writes it. The page stands alone: it holds its images and asks for no
other file. Whatever a model wrote is shown as text.
"""

import base64
import io
import json
import math
import re
from html import escape
from itertools import compress
from pathlib import Path

import numpy as np
from PIL import Image

from data import LABELS, Example, open_image, parse_boxes
from eval import cell, main_metrics, soft_f1_of
from rewards import MAX_MATCHED, POSITIVE, UNCERTAIN, find_mentions, labeler, match_boxes
from runtime.config import Config, InputError

CASES = 60  # half of them reports, half grounding
GROUPS = 2  # of each task
SIDE = (300, 300)  # of a thumbnail, in pixels
TASKS = ("report", "grounding")
COLOURS = ("#2563a8", "#c2571a", "#2e8540", "#7b4fa3", "#8a6d1b", "#a83256")
# Title of a plot -> its lines, a pattern of keys of metrics.jsonl. A group is a line's name.
PLOTS = {
    "loss": "loss|eval_loss",
    "reward": "reward",
    "reward parts": "rewards/(.*)/mean",
    "KL to the reference": "kl",
    "entropy": "entropy",
    "tokens per completion": "completions/mean_length",
    "cut at the limit": "completions/clipped_ratio",
    "groups without a signal": "frac_reward_zero_std",
    "clipped tokens": "clip_ratio/region_mean",
    "gradient norm": "grad_norm",
    "sampled against scored": "sampling/sampling_logp_difference/mean",
}
# Of what is said by (a model, the reference) as 2 * (yes or no) + (yes or no).
VERDICTS = ("right", "missed", "false", "found")
# By (does a model say it?) - (does the first model say it?)
GAINS = ("", "gained ", "lost ")
# By the sign of the change: are there fewer errors?
CHANGES = ("other changes", "better", "worse")
SECTIONS = (*CHANGES[1:], CHANGES[0], "no change, abnormal", "no change, normal")
STYLE = """
:root {
  --ink: #1d2733; --soft: #66727f; --line: #e2e6ea; --wash: #f6f8f9;
  --good: #2e8540; --bad: #b3312c; --accent: #2563a8;
}
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 1180px; padding: 28px 20px 80px; color: var(--ink);
  background: #fff; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { font-size: 24px; margin: 0 }
h2 { font-size: 18px; margin: 44px 0 12px }
h3, h4, h5 { font-size: 14px; margin: 0 0 6px }
summary h3 { display: inline; font-size: 16px }
h4 { color: var(--soft); font-weight: normal; font-size: 15px }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
p, small { color: var(--soft) }
summary { cursor: pointer; color: var(--accent); margin: 10px 0 }

.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px }
th, td {
  padding: 4px 14px 4px 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line);
}
td small { margin-left: 6px }

.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 18px }
.plots svg { width: 100%; display: block; background: var(--wash); border-radius: 4px }

.case {
  display: grid; grid-template-columns: 260px 1fr; gap: 20px; padding: 18px 0;
  border-top: 1px solid var(--line);
}
.film { position: relative }
.film img { width: 100%; display: block; border-radius: 4px; background: #000 }
.film svg { position: absolute; inset: 0; width: 100%; height: 100% }
.film rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
.texts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 18px;
  min-width: 0;
}
.texts p { margin: 0; color: var(--ink); overflow-wrap: anywhere; white-space: pre-wrap }
.texts u { text-decoration-color: var(--accent); text-underline-offset: 3px }
.chip {
  display: inline-block; font-size: 12px; padding: 1px 8px; margin: 6px 6px 0 0;
  border-radius: 9px; background: var(--wash); color: var(--soft);
}
.found, .right { background: #e4f2e7; color: var(--good) }
.false { background: #fae6e5; color: var(--bad) }
.missed { background: #fff; color: var(--bad); border: 1px dashed var(--bad) }
.sample {
  display: grid; grid-template-columns: 170px 1fr; gap: 14px; padding: 7px 0;
  border-top: 1px solid var(--line); font-size: 13.5px;
}
.sample div { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 0 }
@media (max-width: 640px) {
  .case, .sample { grid-template-columns: 1fr }
  body { padding: 18px 12px 60px }
}
"""


def page(cfg: Config, results: dict, predictions: dict, examples: list[Example]) -> str:
    """The whole page. The predictions {model: [..]} and the examples are in the same order."""
    out = escape(cfg.out)
    stages = [Path(cfg.out, stage) for stage in ("sft", "cold_start", "more", "grpo")]
    return f"""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{out}</title><style>{STYLE}</style><h1>{out}</h1>
<p>{escape(", ".join(predictions))} on {cfg.eval.split}; 95 % bootstrap intervals over patients.
The top of eval.py says what each metric means.</p>
<main>{tables_html(results)}{"".join(map(curves, stages))}
{cases_html(cfg, predictions, examples)}{groups_html(stages[-1])}</main></html>"""


# ------------------------------------------------------------------------------- tables


def table_cell(value, low, high, sign=""):
    """A difference (with a sign) is bold if its interval leaves out 0."""
    shown, _, bounds = cell(value, low, high, sign).partition(" ")
    if sign and (low > 0 or high < 0):
        shown = f"<b>{shown}</b>"
    return f"<td>{shown}<small>{bounds}</small></td>"


def html_table(metrics):
    """A block of what eval.summarise returns: values, then differences to the first model."""
    first, *others = next(iter(metrics.values()))
    heads = ["", first, *others, *(f"{name} minus {first}" for name in others)]
    html = "<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads)
    for metric, models in metrics.items():
        html += f"<tr><th>{escape(metric)}</th>"
        for entry in models.values():
            html += table_cell(entry["value"], *entry["interval"])
        for name in others:
            html += table_cell(*models[name]["difference"], sign="+")
    return f"<div class=scroll tabindex=0 role=group aria-label=metrics><table>{html}</table></div>"


def tables_html(results):
    html = ""
    for block, metrics in results.items():
        if "labels" in block:
            html += f"<details><summary>per label</summary>{html_table(metrics)}</details>"
            continue
        html += f"<h2>{block.capitalize()}</h2>{html_table(main_metrics(metrics))}"
        html += f"<details><summary>every metric</summary>{html_table(metrics)}</details>"
    return html


# ------------------------------------------------------------------------------- training


def read_lines(path):
    """A file of JSON lines; nothing if it does not exist, or is just being written."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []


def plot(title, lines):
    """Curves as SVG, of {name: [(step, value), ..]}: thin the values, thick their running means."""
    x, y = np.concatenate([*lines.values()]).T
    svg = key = ""
    for (name, line), colour in zip(lines.items(), COLOURS):
        steps, values = np.transpose(line)
        left = 8 + 284 * (steps - x.min()) / (np.ptp(x) or 1)
        width = 1 + len(values) // 20
        means = [values[max(0, i - width) : i + width + 1].mean() for i in range(len(values))]
        for heights, style in ((values, "opacity=.3"), (means, "stroke-width=1.8")):
            top = 112 - 100 * (heights - y.min()) / (np.ptp(y) or 1)
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(left, top))
            svg += f'<polyline fill=none stroke={colour} {style} points="{points}" />'
        if len(lines) > 1:
            key += f' <small style="color:{colour}">{escape(name)}</small>'
    span = f"{y.min():.3g} to {y.max():.3g}, steps {x.min():.0f} to {x.max():.0f}"
    return f"""<div><h3>{title}</h3>
<svg viewBox="0 0 300 120" role="img" aria-label="{title}: {span}">{svg}</svg>
<small>{span}</small>{key}</div>"""


def curves(run):
    """The training curves of one stage, from its metrics.jsonl."""
    series = {}
    for row in read_lines(run / "metrics.jsonl"):
        for name, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, []).append((row["step"], value))

    plots = ""
    for title, pattern in PLOTS.items():
        lines = {}
        for name, line in series.items():
            match = re.fullmatch(pattern, name)
            if match:
                lines[match[match.lastindex or 0]] = line
        if lines:
            plots += plot(title, lines)
    return f"<h2>Training: {run.name}</h2><div class=plots>{plots}</div>" if plots else ""


def groups_html(run):
    """The last groups of each task in samples.jsonl: completions with rewards and advantages."""
    rows = read_lines(run / "samples.jsonl")
    html = ""
    for task in TASKS:
        for group in [row for row in rows if row["task"] == task][-GROUPS:]:
            html += f"""<h3>step {group["step"]}: {escape(group["question"])}</h3>
<p>Reference: {escape(group["reference"])}</p>"""
            for sample in sorted(group["samples"], key=lambda s: -s["reward"]):
                html += sample_html(sample)
    return f"<h2>Groups of samples, the highest reward first</h2>{html}" if html else ""


def sample_html(sample):
    parts = ""
    for name, value in sample["parts"].items():
        parts += f"<br><small>{escape(name.rpartition('/')[2])} {value:.3f}</small>"
    return f"""<div class=sample><div><b>{sample["reward"]:.3f}</b>
<small>advantage {sample["advantage"]:+.3f}</small>{parts}</div>
<div>{escape(sample["text"])}</div></div>"""


# ------------------------------------------------------------------------------- cases


def thumbnail(example):
    """The example's first image as a data URL."""
    try:
        image = open_image(example.images[0]).convert("L")
    except InputError:
        # Predictions of another program can be shown without the images.
        image = Image.new("L", SIDE)
    image.thumbnail(SIDE)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def box_svg(boxes, colour, dashes="none"):
    svg = ""
    for x1, y1, x2, y2 in boxes:
        svg += f"""<rect x="{x1}" y="{y1}" width="{max(x2 - x1, 0)}" height="{max(y2 - y1, 0)}"
stroke="{colour}" stroke-dasharray="{dashes}"/>"""
    return svg


def underlined(text):
    """The text as HTML. The phrases that the built-in rules read labels from are underlined."""
    phrases = {phrase for _, _, phrase, *_ in find_mentions(text) if phrase.strip()}
    if not phrases:
        return escape(text)
    # Longer phrases first. The rules have read the text with other blanks and hyphens.
    longest_first = map(re.escape, sorted(phrases, key=len, reverse=True))
    pattern = re.sub(r"(\\[\s-])+", r"[\\s-]+", "|".join(longest_first))
    parts = [escape(part) for part in re.split(rf"(?i)\b((?:{pattern})\w*)", text)]
    # Plain text and phrases take turns.
    parts[1::2] = [f"<u>{phrase}</u>" for phrase in parts[1::2]]
    return "".join(parts)


def column(title, text, prediction, chips, colour):
    """What a model answered: `text` and `chips` are HTML."""
    thinking = ""
    if prediction["thinking"]:
        thought = escape(prediction["thinking"])
        thinking = f"<details><summary>thinking</summary><p>{thought}</p></details>"
    return f"""<div><h5 style="color:{colour}">{escape(title)}</h5><p>{text or "(empty)"}</p>
{chips}{thinking}</div>"""


def findings(example, answers, read_labels):
    """What the reference says, then what each answer says: sets of labels, or of boxes found."""
    if example.task == "report":
        states = read_labels([example.answer, *answers])
        # No Finding is no finding.
        there = np.isin(states, (POSITIVE, UNCERTAIN))[:, 1:]
        return [set(compress(LABELS[1:], row)) for row in there]

    said = [{f"box {place + 1}" for place in range(len(example.boxes))}]
    for answer in answers:
        boxes = parse_boxes(answer)
        pairs = match_boxes(boxes[:MAX_MATCHED], example.boxes)
        found = {f"box {place + 1}" for _, place, overlap in pairs if overlap >= 0.5}
        if len(boxes) > len(found):
            found.add("other boxes")
        said.append(found)
    return said


def verdicts(true, first, said):
    """[(verdict, text)] of what a model says or misses, and of what the first model says."""
    chips = []
    for name in sorted(true | first | said):
        verdict = VERDICTS[2 * (name in said) + (name in true)]
        gain = GAINS[(name in said) - (name in first)]
        chips.append((verdict, f"{gain}{name}: {verdict}"))
    return chips


def section_of(true, first, *others):
    """Where a case belongs, by what the models say."""
    last = [first, *others][-1]
    if first == last:
        return SECTIONS[-2 if true else -1]
    fewer = len(first ^ true) - len(last ^ true)
    return CHANGES[np.sign(fewer)]


def case_html(example, predictions, true, said):
    """One example with the answers of all models."""
    svg = box_svg(example.boxes, "#ffffff", "4")
    texts = f"<div><h5>reference (dashed)</h5><p>{underlined(example.answer)}</p></div>"
    for (name, p), own, colour in zip(predictions.items(), said, COLOURS):
        svg += box_svg(parse_boxes(p["answer"]), colour)
        chips = ""
        for verdict, text in verdicts(true, said[0], own):
            chips += f'<span class="chip {verdict}">{text}</span>'
        if example.task == "grounding":
            chips += f"<span class=chip>soft-F1 {soft_f1_of(p):.2f}</span>"
        texts += column(name, underlined(p["answer"]), p, chips, colour)

    name = escape(example.id)
    return f"""<div class=case><div><div class=film>
<img src="{thumbnail(example)}" alt="Image of {name}" loading=lazy>
<svg viewBox="0 0 1 1" preserveAspectRatio="none" role="img"
aria-label="{svg.count("<rect")} boxes">{svg}</svg></div><small>{name}</small></div>
<div><h4>{escape(example.question)}</h4><div class=texts>{texts}</div></div></div>"""


def cases_html(cfg, predictions, examples):
    """Some examples, drawn by the seed: first those that change from the first to the last model."""
    read_labels = labeler(cfg.rewards)
    order = np.random.default_rng(cfg.seed).permutation(len(examples))
    sections = dict.fromkeys(SECTIONS, "")
    for task in TASKS:
        for i in [i for i in order if examples[i].task == task][: CASES // 2]:
            own = {name: rows[i] for name, rows in predictions.items()}
            answers = [p["answer"] for p in own.values()]
            true, *said = findings(examples[i], answers, read_labels)
            sections[section_of(true, *said)] += case_html(examples[i], own, true, said)

    html = ""
    for title, cases in sections.items():
        if cases:
            count = cases.count("class=case")
            html += f"<details open><summary><h3>{title}: {count}</h3></summary>{cases}</details>"
    if not html:
        return ""
    names = list(map(escape, predictions))
    return f"""<h2>Cases</h2><p>Drawn by the seed, {CASES // 2} at most of each task, and ordered by
what changes from {names[0]} to {names[-1]}: more or fewer errors in labels, or in boxes found at IoU
0.5. Gained and lost: against {names[0]}. Right, found, missed and false: against the reference.
Underlined: phrases that the built-in rules read.</p>{html}"""
