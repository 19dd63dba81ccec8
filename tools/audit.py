"""What the configured report reward pays to policies that cheat.

  python -m tools.audit config.yaml [key=value ...]

It scores 14 policies, which only edit or ignore the references of eval.split. It needs no model and
opens no image. A policy that is wrong should earn little, and so should one that ignores the image,
on abnormal studies. Policies find their sentences with the built-in rules, whichever labeler the
rewards use. Rewards that count tokens count words.
"""

import math
import re
import warnings
from collections import defaultdict
from dataclasses import replace
from itertools import compress
from statistics import mode

import numpy as np

import data
import rewards
from rewards import NEGATIVE, POSITIVE, SENTENCE_END, UNCERTAIN, extract_labels
from runtime.config import Config, InputError
from runtime.output import format_table
from runtime.processes import parse_args, run_main

# ------------------------------------------------------------------------------- the policies

# Observations as policies name them.
FINDINGS = {label: label.lower() for label in data.LABELS[1:]} | {
    "Enlarged Cardiomediastinum": "mediastinal widening",
    "Pleural Other": "pleural thickening",
    "Support Devices": "pacemaker",
}
NORMAL_REPORT = (
    "The heart size and mediastinal contours are normal. The lungs are clear. There is no focal "
    "consolidation, pleural effusion, or pneumothorax. No acute bony abnormality."
)
# No further verb: the words around it can change places.
WHAT = r"((?:(?! (?:is|are|which|that|there)\b).)+)"
# pattern: replacement. The first that fits a lower-case sentence rewords it.
PARAPHRASES = {
    rf"^there (is|are) (no )?(?:evidence of )?{WHAT}\.$": r"\2\3 \1 seen.",
    rf"^(no )?(?:evidence of )?{WHAT} (is|are) (?:seen|present|identified)\.$": r"there \3 \1\2.",
    r"^no evidence of ": "no ",
    r"^no ": "no evidence of ",
    r"^possible ": "there may be ",
    r"^there may be ": "possible ",
    r"size is normal\.$": "is normal in size.",
    r"normal in size\.$": "of normal size.",
    r"lungs are clear(?! of)": "lungs appear clear",
    r"\bwithin normal limits|\bunremarkable": "normal",
}
# All other policies are wrong.
RIGHT = ("reference", "sentences shuffled", "paraphrase")
# These do not read the image.
BLIND = (
    "empty",
    "always normal",
    "most frequent report",
    "another study's report",
    "every finding listed",
    "every finding negated",
)
# These mention no finding.
OMITS = ("empty", "always normal", "every finding negated", "positives dropped")


def policy_reports(references: list[str], seed: int) -> dict[str, list[str]]:
    """policy: what it writes about the studies with these references."""
    most_frequent = mode(references)
    # Every study gets another one's report: all move on by one along a random circle.
    circle = np.random.default_rng(seed).permutation(len(references))
    others = np.array(references, object)
    others[circle] = others[np.roll(circle, 1)]

    rng = np.random.default_rng(seed)
    reports = defaultdict(list)
    for text, other in zip(references, others):
        for policy, report in policies(text, other, most_frequent, rng).items():
            reports[policy].append(report)
    return reports


def policies(text, other, most_frequent, rng):
    """policy: what it writes about one study, whose reference is `text`."""
    parts = sentences(text)
    reports = {
        "reference": text,
        "sentences shuffled": " ".join(rng.permutation(parts)),
        "paraphrase": " ".join(map(reword, parts)),
    }
    listed = " ".join(f"There is {name}." for name in FINDINGS.values())
    reports |= {
        "empty": "",
        "always normal": NORMAL_REPORT,
        "most frequent report": most_frequent,
        "another study's report": other,
        "every finding listed": listed,
        "every finding negated": listed.replace("There is", "There is no"),
    }
    reports["positives dropped"] = without(parts, POSITIVE, UNCERTAIN)
    reports["negations dropped"] = without(parts, NEGATIVE)
    reports["first sentence 50 times"] = " ".join(parts[:1] * 50)
    reports["findings contradicted"] = contradict(text)
    reports["everything hedged"] = " ".join(f"Possibly {part.lower()}" for part in parts)
    return reports


def sentences(text):
    """The sentences of a report, cut where the label extractor cuts, each with a full stop."""
    return [part.strip() + "." for part in SENTENCE_END.split(text) if part.strip()]


def reword(sentence):
    """The sentence, changed by the first paraphrase that fits it."""
    sentence = sentence.lower()
    for pattern, replacement in PARAPHRASES.items():
        sentence, fits = re.subn(pattern, replacement, sentence)
        if fits:
            break
    return sentence.capitalize()


def without(parts, *states):
    """The sentences in which no observation has one of the states."""
    labels = extract_labels(parts)[:, 1:]
    kept = ~np.isin(labels, states).any(1)
    return " ".join(compress(parts, kept))


def contradict(text):
    """A report that denies at its end what it has found."""
    (present,) = rewards.present(extract_labels([text]))
    denials = [f"There is no {name}." for name in compress(FINDINGS.values(), present)]
    return f"{text} {' '.join(denials)}"


# ------------------------------------------------------------------------------- what they earn


def audit(config: Config) -> str:
    """A table and three lines, as text. No image is opened."""
    rewards.check_rewards(config.rewards)
    split = config.eval.split
    examples = data.load_split(config, split, images=False)
    examples = [e for e in examples if e.task == "report"]
    examples = examples[: config.eval.limit or None]
    if len(examples) < 2:
        raise InputError(f"audit: split {split!r} has {len(examples)} reports; it takes two")
    references = [e.answer for e in examples]
    labels = rewards.labeler(config.rewards)(references)
    abnormal = rewards.present(labels).any(1)

    paid = {}
    for policy, reports in policy_reports(references, config.seed).items():
        paid[policy] = pay(reports, examples, config)
    shares = shares_of(paid)
    wrong = [policy for policy in paid if policy not in RIGHT]
    return f"""split {split}: {len(examples)} reports, {abnormal.sum()} abnormal
rewards.report={config.rewards.report}

{reward_table(paid, shares, abnormal)}

cheapest exploit: {name_exploit(wrong, shares)}
without the image: {name_exploit(BLIND, shares)}
findings omitted, on abnormal studies: {name_exploit(OMITS, shares_of(paid, abnormal))}"""


def pay(reports, examples, config):
    """The rewards and their components, of reports in the configured output format."""
    texts = []
    for example, report in zip(examples, reports):
        # An empty report stays empty.
        texts.append(report and data.target_text(replace(example, answer=report)))
    return rewards.score_completions(texts, examples, config.rewards)


def shares_of(paid, studies=slice(None)):
    """{policy: what it earns on these studies, over what the reference earns}, or NaN."""
    earned = {policy: total[studies].mean() for policy, (total, _) in paid.items()}
    whole = max(earned["reference"], 0) or math.nan
    return {policy: value / whole for policy, value in earned.items()}


def reward_table(paid, shares, abnormal):
    """What the reward and its components pay, on average."""
    _, components = paid["reference"]
    rows = [["policy", "reward", "share", "abnormal", "normal", *components]]
    for policy, (total, components) in paid.items():
        values = [total[abnormal], total[~abnormal], *components.values()]
        means = [total.mean(), shares[policy], *map(np.nanmean, values)]
        rows.append([policy, *map(cell, means)])
    return format_table(rows)


def cell(value):
    return "-" if math.isnan(value) else f"{value:.3f}"


def name_exploit(policies, shares):
    """Which of the policies earns most."""
    most = max(shares[policy] for policy in policies)
    if math.isnan(most):
        return "- (the reference earns nothing there)"
    best = [policy for policy in policies if shares[policy] >= most - 1e-9]
    return f"{', '.join(best)} ({cell(most)} of what the reference earns)"


def main():
    config, _ = parse_args(__doc__)
    # A mean of nothing is NaN, and needs no warning.
    warnings.simplefilter("ignore", RuntimeWarning)
    print(audit(config))


if __name__ == "__main__":
    run_main(main)
