"""report.html: tables, training curves, cases with texts and boxes, and groups of samples.

eval.evaluate_checkpoints writes it. The page stands alone: it holds its images and asks for no
other file. Whatever a model wrote is shown as text. The README's figure is two cases of it:

  python -m tools.report_page config.yaml [key=value ...]

writes OUT/eval/figure.svg. One is a report, one a grounding question. Each is the median (of an
even number, the upper one), by how many errors fewer the last model makes, of the cases that are
abnormal and changed. An error is a label or a box that is missed or false.
"""

import base64
import io
import json
import math
import re
from html import escape
from itertools import chain, compress
from pathlib import Path

import numpy as np
from PIL import Image

from data import LABELS, Example, open_image, parse_boxes
from eval import cell, main_metrics, soft_f1_of
from rewards import MAX_MATCHED, POSITIVE, UNCERTAIN, find_mentions, labeler, match_boxes
from runtime.config import Config, InputError
from runtime.output import print0, write_atomically
from runtime.processes import parse_args, run_main

CASES = 60  # half of them reports, half grounding
GROUPS = 2  # of each task
SIDE = (300, 300)  # of a thumbnail, in pixels
TASKS = ("report", "grounding")
SVG = "http://www.w3.org/2000/svg"
COLOURS = ("#2563a8", "#b8501a", "#2e8540", "#7b4fa3", "#8a6d1b", "#a83256")
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
# Of a label or a box, by 2 * (does the model say it?) + (does the reference say it?)
VERDICTS = ("right", "missed", "false", "found")
# By (does a model say it?) - (does the first model say it?)
GAINS = ("", "gained ", "lost ")
# By 2 * (is it the same for the first and the last model?) + (is nothing there?)
SECTIONS = ("changed, abnormal", "changed, normal", "unchanged, abnormal", "unchanged, normal")
STYLE = """
:root {
  --ink: #1d2733; --soft: #66727f; --line: #e2e6ea; --wash: #f6f8f9;
  --good: #23703a; --bad: #b3312c; --accent: #2563a8;
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

article {
  display: grid; grid-template-columns: 260px 1fr; gap: 20px; padding: 18px 0;
  border-top: 1px solid var(--line);
}
.film { width: 100%; display: block; border-radius: 4px }
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
.figure {
  max-width: none; height: 100%; padding: 0 20px; line-height: 1.4;
  display: flex; flex-direction: column; justify-content: space-evenly;
}
.figure article { grid-template-columns: 200px 1fr; padding: 10px 0 }
.figure article:first-of-type { border: 0 }
.figure .texts { grid-template-columns: repeat(3, 1fr); gap: 14px }
.figure .chip { font-size: 13px; margin: 3px 4px 0 0 }

.sample {
  display: grid; grid-template-columns: 170px 1fr; gap: 14px; padding: 7px 0;
  border-top: 1px solid var(--line); font-size: 13.5px;
}
.sample div { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 0 }
@media (max-width: 640px) {
  article, .sample { grid-template-columns: 1fr }
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


def film(example, boxes):
    """The example's first image, and boxes (SVG) on it."""
    try:
        image = open_image(example.images[0]).convert("L")
    except InputError:
        # Predictions of another program can be shown without the images.
        image = Image.new("L", SIDE)
    image.thumbnail(SIDE)
    width, height = image.size
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72)
    jpeg = base64.b64encode(buffer.getvalue()).decode()
    return f"""<svg xmlns="{SVG}" class="film" viewBox="0 0 {width} {height}" role="img"
aria-label="Image of {escape(example.id)}, {boxes.count("<rect")} boxes">
<image href="data:image/jpeg;base64,{jpeg}" width="{width}" height="{height}"/>
<g transform="scale({width} {height})">{boxes}</g></svg>"""


def box_svg(boxes, colour, dashes="none"):
    svg = ""
    for x1, y1, x2, y2 in boxes:
        svg += f"""<rect x="{x1}" y="{y1}" width="{max(x2 - x1, 0)}" height="{max(y2 - y1, 0)}"
stroke="{colour}" stroke-dasharray="{dashes}"/>"""
    return svg


def underlined(text):
    """The text as HTML. The phrases that the built-in rules read labels from are underlined."""
    phrases = {escape(phrase) for _, _, phrase, *_ in find_mentions(text)}
    # Longer phrases first.
    pattern = "|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))
    if not pattern:
        return escape(text)
    return re.sub(rf"(?i)\b((?:{pattern})\w*)", r"<u>\1</u>", escape(text))


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

    said = []
    for boxes in [example.boxes, *map(parse_boxes, answers)]:
        pairs = match_boxes(boxes[:MAX_MATCHED], example.boxes)
        found = {f"box {place + 1}" for _, place, overlap in pairs if overlap >= 0.5}
        if len(boxes) > len(found):
            found.add("other boxes")
        said.append(found)
    return said


def chips_html(true, first, said):
    """What a model says or misses, and what it says or misses otherwise than the first model."""
    html = ""
    for name in sorted(true | first | said):
        verdict = VERDICTS[2 * (name in said) + (name in true)]
        gain = GAINS[(name in said) - (name in first)]
        html += f'<span class="chip {verdict}">{gain}{name}: {verdict}</span>'
    return html


def case_html(example, predictions, true, said):
    """One example with the answers of all models."""
    reference = example.boxes
    if example.task == "report":
        # A phantom knows where its findings are.
        drawn = getattr(example.images[0], "boxes", {})
        reference = chain.from_iterable(drawn.values())
    boxes = box_svg(reference, "#ffffff", "4")
    texts = f"<div><h5>reference</h5><p>{underlined(example.answer)}</p></div>"
    for (name, p), own, colour in zip(predictions.items(), said, COLOURS):
        boxes += box_svg(parse_boxes(p["answer"]), colour)
        chips = chips_html(true, said[0], own)
        if example.task == "grounding":
            chips += f'<span class="chip">soft-F1 {soft_f1_of(p):.2f}</span>'
        texts += column(name, underlined(p["answer"]), p, chips, colour)
    return f"""<div>{film(example, boxes)}<small>{escape(example.id)}</small></div>
<div><h4>{escape(example.question)}</h4><div class="texts">{texts}</div></div>"""


def cases_html(cfg, predictions, examples):
    """Some examples, drawn by the seed. First those that the last model answers otherwise."""
    read_labels = labeler(cfg.rewards)
    order = np.random.default_rng(cfg.seed).permutation(len(examples))
    sections = dict.fromkeys(SECTIONS, "")
    for task in TASKS:
        for i in [i for i in order if examples[i].task == task][: CASES // 2]:
            own = {name: rows[i] for name, rows in predictions.items()}
            answers = [p["answer"] for p in own.values()]
            true, *said = findings(examples[i], answers, read_labels)
            section = SECTIONS[2 * (said[0] == said[-1]) + (not true)]
            fewer = len(said[0] ^ true) - len(said[-1] ^ true)
            sections[section] += f"""<article data-case="{section}, {task}, {fewer}">
{case_html(examples[i], own, true, said)}</article>"""

    html = ""
    for title, cases in sections.items():
        html += f"""<details open><summary><h3>{title}: {cases.count("<article")}</h3></summary>
{cases}</details>"""
    return f"""<h2>Cases</h2><p>Drawn by the seed, {CASES // 2} of each task. Changed: the last
model has other labels than the first one, or finds other boxes (IoU 0.5). Gained and lost: against
the first model. Found, missed, false and right: against the reference. Underlined: phrases that the
built-in rules read. Dashed boxes: the reference.</p>{html}"""


# ------------------------------------------------------------------------------- the figure


def figure(page: str) -> str:
    """Two cases of a page as SVG. Raises InputError."""
    rows = ""
    for task in TASKS:
        pattern = rf'<article data-case="{SECTIONS[0]}, {task}, (.+?)">(.*?)</article>'
        cases = re.findall(pattern, page, re.DOTALL)
        if not cases:
            raise InputError(f"the page has no case of {task} that is {SECTIONS[0]}")
        cases.sort(key=lambda case: int(case[0]))
        _, middle = cases[len(cases) // 2]
        rows += f"<article>{middle}</article>"
    return f"""<svg xmlns="{SVG}" viewBox="0 0 920 680" role="img">
<title>A report and boxes before and after GRPO</title><foreignObject width="920" height="680">
<body xmlns="http://www.w3.org/1999/xhtml" class="figure"><style>{STYLE}</style>{rows}</body>
</foreignObject></svg>"""


def main():
    cfg, _ = parse_args(__doc__)
    path = Path(cfg.out, "eval", "report.html")
    if not path.exists():
        raise InputError(f"{path}: no such page; eval.py writes it")
    write_atomically(path.with_name("figure.svg"), figure(path.read_text()))
    print0(str(path.with_name("figure.svg")))


if __name__ == "__main__":
    run_main(main)
