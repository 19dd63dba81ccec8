"""What the configured report reward pays to policies that cheat.

  python -m tools.audit config.yaml [key=value ...]

It scores 14 policies, which only edit or ignore the references of eval.split: no model, no images.
A policy that is wrong should earn little, and so should one that ignores the image, on abnormal
studies. Policies find their sentences with the built-in rules, whichever labeler the rewards use.
Rewards that count tokens count words.
"""

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np

import data
import rewards
from rewards import NEGATIVE, POSITIVE, SENTENCE_END, UNCERTAIN, extract_labels
from runtime.config import InputError
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
HEDGES = {"^": "possibly "}

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


def policy_reports(references, seed):
    """policy: what it writes about the studies with these references."""
    n = len(references)
    rng = np.random.default_rng(seed)
    listed = " ".join(f"There is {name}." for name in FINDINGS.values())
    negated = " ".join(f"There is no {name}." for name in FINDINGS.values())
    [(most_frequent, _)] = Counter(references).most_common(1)

    reports = {"reference": references}
    reports["sentences shuffled"] = [" ".join(rng.permutation(sentences(t))) for t in references]
    reports["paraphrase"] = [reword(text, PARAPHRASES) for text in references]
    reports["empty"] = [""] * n
    reports["always normal"] = [NORMAL_REPORT] * n
    reports["most frequent report"] = [most_frequent] * n
    reports["another study's report"] = exchange(references, seed)
    reports["every finding listed"] = [listed] * n
    reports["every finding negated"] = [negated] * n
    reports["positives dropped"] = [without(text, POSITIVE, UNCERTAIN) for text in references]
    reports["negations dropped"] = [without(text, NEGATIVE) for text in references]
    reports["first sentence 50 times"] = [" ".join(sentences(t)[:1] * 50) for t in references]
    reports["findings contradicted"] = [contradict(text) for text in references]
    reports["everything hedged"] = [reword(text, HEDGES) for text in references]
    return reports


def sentences(text):
    """The sentences of a report, cut where the label extractor cuts, each with a full stop."""
    return [part.strip() + "." for part in SENTENCE_END.split(text) if part.strip()]


def reword(text, table):
    """A report, each sentence changed by the first pattern that fits it."""
    reworded = []
    for sentence in sentences(text):
        sentence = sentence.lower()
        for pattern, replacement in table.items():
            sentence, fits = re.subn(pattern, replacement, sentence)
            if fits:
                break
        reworded.append(sentence.capitalize())
    return " ".join(reworded)


def exchange(texts, seed):
    """Every study gets another one's report: all move on by one along a random circle."""
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in np.roll(order, 1)[np.argsort(order)]]


def without(text, *states):
    """A report without the sentences in which an observation has one of the states."""
    parts = sentences(text)
    dropped = np.isin(extract_labels(parts)[:, 1:], states).any(1)
    return " ".join(part for part, drop in zip(parts, dropped) if not drop)


def contradict(text):
    """A report that denies at its end what it has found."""
    (present,) = rewards.present(extract_labels([text]))
    found = np.array(list(FINDINGS.values()))[present]
    return f"{text} {' '.join(f'There is no {name}.' for name in found)}"


# ------------------------------------------------------------------------------- what they earn


def mean(values):
    """Over what is not NaN; NaN of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def shares_of(scores, studies):
    """{policy: what it earns on these studies, over what the reference earns}, or NaN."""
    earned = {policy: mean(total[studies]) for policy, (total, _) in scores.items()}
    whole = earned["reference"] if earned["reference"] > 0 else math.nan
    return {policy: value / whole for policy, value in earned.items()}


def cell(value):
    return "-" if math.isnan(value) else f"{value:.3f}"


def reward_table(scores, shares, abnormal):
    """What the reward and its components pay, on average."""
    rows = []
    for policy, (total, components) in scores.items():
        means = map(mean, [total[abnormal], total[~abnormal], *components.values()])
        rows.append([policy, *map(cell, [mean(total), shares[policy], *means])])
    return format_table([["policy", "reward", "share", "abnormal", "normal", *components], *rows])


def name_exploit(policies, shares):
    """Which of the policies earns most."""
    most = max(shares[policy] for policy in policies)
    if math.isnan(most):
        return "- (the reference earns nothing there)"
    best = [policy for policy in policies if shares[policy] >= most - 1e-9]
    return f"{', '.join(best)} ({cell(most)} of what the reference earns)"


def audit(config):
    """A table and three lines, as text. No image is opened."""
    rewards.check_rewards(config.rewards)
    split = config.eval.split
    examples = [e for e in data.load_split(config, split) if e.task == "report"]
    examples = examples[: config.eval.limit or None]
    if len(examples) < 2:
        raise InputError(f"audit: split {split!r} has {len(examples)} reports; it takes two")
    references = [e.answer for e in examples]
    abnormal = rewards.present(rewards.labeler(config.rewards)(references)).any(1)

    scores = {}
    style = data.style_of(config)
    for policy, reports in policy_reports(references, config.seed).items():
        texts = []
        for example, report in zip(examples, reports):
            # In the configured output format. An empty report stays empty.
            texts.append(data.target_text(replace(example, answer=report)) if report else "")
        scores[policy] = rewards.score_completions(texts, examples, config.rewards, style)

    shares = shares_of(scores, slice(None))
    wrong = [policy for policy in scores if policy not in RIGHT]
    return f"""split {split}: {len(examples)} reports, {abnormal.sum()} abnormal
rewards.report={config.rewards.report}

{reward_table(scores, shares, abnormal)}

cheapest exploit: {name_exploit(wrong, shares)}
without the image: {name_exploit(BLIND, shares)}
findings omitted, on abnormal studies: {name_exploit(OMITS, shares_of(scores, abnormal))}"""


def main():
    config, _ = parse_args(__doc__)
    print(audit(config))


if __name__ == "__main__":
    run_main(main)
