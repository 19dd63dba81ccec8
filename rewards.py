"""Text and boxes in, numbers out: the rewards of both papers.

In this order: rewards on labels (MRG-R1's margin-based cosine, F1), on boxes (soft F1) and on
words (GLEU, BLEU, ROUGE-L); the reward table with score_completions; rewards of your own; the
label extractor, which reads 14 states in a report, and last its tables of phrases.

Whatever a model writes, nothing here raises, and every regular expression takes linear time.
Labels are arrays (N, 14), of N texts, in the order of LABELS.
"""

import difflib
import math
import os
import re
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain

import numpy as np

from data import LABELS, Box, Example, parse_boxes, parse_output
from runtime.config import InputError, RewardsConfig
from runtime.output import moved, warn_once

# The states of an observation, CheXbert's classes.
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = 0, 1, 2, 3
# Predicted boxes that may be matched. Further ones are false positives.
MAX_MATCHED = 64
# Clauses and texts whose labels are kept.
CACHED = 1 << 14
# Characters of a clause. What is longer is no sentence.
LONGEST = 1000

# ------------------------------------------------------------------------------- labels


def mccs(generated: np.ndarray, reference: np.ndarray, margin: float = 0.5) -> np.ndarray:
    """(N,) margin-based CheXbert cosine similarity, max((cos - m) / (1 - m), 0) (MRG-R1).

    Vectors leave out No Finding. Positive and uncertain are +1, negative -1, blank 0. Two zero
    vectors score 1; the reward pays nothing for a text without a word.
    """
    value_of_state = np.array([0.0, 1.0, -1.0, 1.0])
    a = value_of_state[generated[:, 1:]]  # (N, 13)
    b = value_of_state[reference[:, 1:]]
    norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    # A norm is 0, or at least 1.
    cosine = (a * b).sum(1) / np.maximum(norms, 1)
    score = np.maximum((cosine - margin) / (1 - margin), 0)
    both_zero = ~(a.any(1) | b.any(1))
    return np.where(both_zero, 1.0, score)


def present(labels: np.ndarray) -> np.ndarray:
    """(N, 13) is the observation positive or uncertain? Without No Finding."""
    return np.isin(labels[:, 1:], (POSITIVE, UNCERTAIN))


def label_f1(generated: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(N,) F1 of the observations that are present.

    0 if none is on either side, as in scikit-learn. So normal studies have no say, which weighs
    against the pull of MCCS to the normal template.
    """
    a = present(generated)
    b = present(reference)
    both = (a & b).sum(1)
    return 2 * both / np.maximum(a.sum(1) + b.sum(1), 1)


# ------------------------------------------------------------------------------- boxes


def area(x1, y1, x2, y2):
    """Of a box; 0 if it is empty or inverted."""
    return max(x2 - x1, 0.0) * max(y2 - y1, 0.0)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    top_left = map(max, a[:2], b[:2])
    bottom_right = map(min, a[2:], b[2:])
    both = area(*top_left, *bottom_right)
    union = area(*a) + area(*b) - both
    # Where areas overflow, the union is NaN, which is not > 0.
    return both / union if union > 0 else 0.0


def match_boxes(predicted: list[Box], reference: list[Box]) -> list[tuple]:
    """[(i, j, iou)] by i: the one-to-one assignment with the largest total IoU, all of it > 0."""
    overlaps = np.array([iou(a, b) for a in predicted for b in reference])
    overlaps = overlaps.reshape(len(predicted), len(reference))
    pairs = [(i, j, float(overlaps[i, j])) for i, j in best_assignment(overlaps)]
    return [pair for pair in pairs if pair[2] > 0]


def best_assignment(overlaps):
    """[(row, column)] by row: the one-to-one assignment with the largest total, of (n, m) in 0..1.

    What scipy.optimize.linear_sum_assignment does, which is not among our packages.

    Rows enter one by one. The new row takes a column, whose row moves on to another column, and so
    on to a free one. Bellman and Ford's method finds the path that gains most:

              column 0  column 1
      row 0     0.6       0.5      enters first and takes column 0
      row 1     0.5       0.1      gains 0.1 in column 1, but 0.5 + 0.5 - 0.6 = 0.4 in column 0, if
                                   row 0 moves on to column 1: the total is 1.0 and not 0.7
    """
    # With whole numbers, rounding cannot lead a path in a circle.
    value = np.rint(overlaps * 1e12).astype(int)
    # One more column, of value 0: to stay without a partner. It is free for any number of rows.
    value = np.pad(value, ((0, 0), (0, 1)))
    row_of = np.full(value.shape[1], -1)  # of each column; -1: free
    for row in range(len(value)):
        # What the best path from the new row to each column gains, and the column before on it. At
        # first the path goes there at once.
        gain = value[row].copy()
        previous = np.full_like(row_of, -1)
        improved = True
        while improved:
            improved = False
            for column in np.flatnonzero(row_of >= 0):
                # The row of this column gives it up and moves on.
                moving = value[row_of[column]]
                through = gain[column] - moving[column] + moving
                better = through > gain
                gain[better] = through[better]
                previous[better] = column
                improved |= better.any()

        # The best path that ends at a free column: move its rows on, from the end to the start.
        column = np.where(row_of < 0, gain, -1).argmax()
        while previous[column] >= 0:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
        row_of[column] = row
        row_of[-1] = -1
    return sorted((row, column) for column, row in enumerate(row_of.tolist()) if row >= 0)


def soft_f1(
    predicted: list[Box], reference: list[Box], mode: str = "radvlm", match_empty: bool = False
) -> float:
    """Soft F1 of boxes. T: total IoU of the matched pairs; FP: predictions without a pair.

    mode "radvlm": 2 T / (n_ref + T + FP), as the released code has it, where a matched prediction
    counts with its IoU below the line, too; "pq": 2 T / (n_pred + n_ref), the paper's figure. 0 if
    either side is empty; 1 if both are, and match_empty. Only the first MAX_MATCHED predictions can
    match, so that ten thousand boxes cost no time.
    """
    if not predicted or not reference:
        return float(match_empty and not predicted and not reference)
    pairs = match_boxes(predicted[:MAX_MATCHED], reference)
    total = sum(overlap for _, _, overlap in pairs)
    if mode == "pq":
        return 2 * total / (len(predicted) + len(reference))
    false_positives = len(predicted) - len(pairs)
    return 2 * total / (len(reference) + total + false_positives)


def has_words(text):
    return re.search(r"\w", text) is not None


def says_nothing_there(answer: str) -> bool:
    """An empty list, or words and no brackets: broken boxes do not mean "there is none"."""
    if re.sub(r"```(json)?|\s", "", answer) == "[]":
        return True
    return has_words(answer) and not re.search(r"[\[\]]", answer)


def say_large_boxes(texts: list[str], whose: str):
    """Warn, once, if most boxes have numbers beyond 1, as Qwen-VL writes them."""
    boxes = list(chain.from_iterable(parse_boxes(text) for text in texts))
    for text in texts:
        # (310,450),(780,830)
        pairs = re.findall(r"\((\d+), ?(\d+)\), ?\((\d+), ?(\d+)\)", text)
        boxes += [tuple(map(float, numbers)) for numbers in pairs]
    large = [box for box in boxes if max(box) > 1]
    if 2 * len(large) > len(boxes):
        warn_once(
            f"large boxes of {whose}",
            f"{len(large)} of {len(boxes)} boxes of {whose} have numbers beyond 1, such as "
            f"{list(large[0])}: pixels or thousandths, which score 0. The prompt has to ask for "
            f"numbers from 0 to 1, or SFT to teach them (grpo.init=auto)",
        )


# ------------------------------------------------------------------------------- words


def tokenize(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens: list[str], n: int) -> Counter:
    """How often each n-gram, a tuple, occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def count_ngrams(a: list[str], b: list[str]) -> list[tuple]:
    """[(how many match, how many a has, how many b has)] of the n-grams, n = 1..4."""
    counts = []
    for n in range(1, 5):
        x, y = ngrams(a, n), ngrams(b, n)
        counts.append(((x & y).total(), x.total(), y.total()))
    return counts


def gleu(candidate: str, reference: str) -> float:
    """Google's sentence GLEU (Wu et al. 2016): the share of n-grams, n = 1..4, that match."""
    counts = count_ngrams(tokenize(candidate), tokenize(reference))
    matching, in_candidate, in_reference = map(sum, zip(*counts))
    return matching / max(in_candidate, in_reference, 1)


def bleu4(candidate: str, reference: str) -> float:
    """Sentence BLEU-4 with add-one smoothing above unigrams (Lin & Och 2004), as nltk's method2."""
    a = tokenize(candidate)
    b = tokenize(reference)
    matching, in_candidate, _ = np.array(count_ngrams(a, b)).T
    if not matching[0]:
        return 0.0
    smooth = np.array([0, 1, 1, 1])
    precision = (matching + smooth) / (np.maximum(in_candidate, 1) + smooth)
    # A shorter text than the reference's pays for it.
    brevity = min(0, 1 - len(b) / len(a))
    return math.exp(brevity + np.log(precision).mean())


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004), from the longest common subsequence of tokens."""
    short, long = sorted((tokenize(candidate), tokenize(reference)), key=len)
    words = np.array(short, object)
    # longest[j]: of the tokens of `long` up to here and the first j of `short`.
    longest = np.zeros(len(short) + 1, int)
    for token in long:
        extended = longest[:-1] + (words == token)
        longest[1:] = np.maximum.accumulate(np.maximum(longest[1:], extended))
    return 2 * int(longest[-1]) / max(len(short) + len(long), 1)


# ------------------------------------------------------------------------------- the reward table


@dataclass
class Completion:
    """A completion, taken apart, and its example."""

    text: str  # the whole text
    token_ids: list
    valid: bool  # has it the format?
    answer: str  # the report, or the text with the boxes
    example: Example  # with the reference


def labeler(cfg: RewardsConfig) -> Callable:
    """The function texts -> labels: CheXbert, if rewards.chexbert is set, or rules.

    Raises InputError.
    """
    if not cfg.chexbert:
        return extract_labels
    from scorers.chexbert import chexbert  # noqa: PLC0415

    return chexbert(cfg.chexbert, cfg.bert)


def label_reward(score, batch, cfg):
    """score(labels of the answers, labels of the references), 0 for an answer without a word."""
    label = labeler(cfg)
    generated = label([c.answer for c in batch])
    reference = label([c.example.answer for c in batch])
    # CheXbert may read labels in an empty text.
    says_something = [has_words(c.answer) for c in batch]
    return np.where(says_something, score(generated, reference), 0)


def mccs_reward(batch, cfg):
    return label_reward(partial(mccs, margin=cfg.mccs_margin), batch, cfg)


def text_reward(score, batch, cfg):
    return [score(c.answer, c.example.answer) for c in batch]


def soft_f1_reward(batch, cfg):
    scores = []
    for c in batch:
        match_empty = cfg.match_empty and says_nothing_there(c.answer)
        boxes = parse_boxes(c.answer)
        scores.append(soft_f1(boxes, c.example.boxes, cfg.soft_f1_mode, match_empty))
    return scores


def format_reward(batch, cfg):
    return [c.valid for c in batch]


def overlong(length: int, start: int, end: int) -> float:
    """0 up to `start` tokens, then down to -1 at `end` (DAPO, Yu et al. 2025, eq. 13)."""
    excess = max(length - start, 0)
    return -min(excess / max(end - start, 1), 1.0)


def overlong_reward(batch, cfg):
    return [overlong(len(c.token_ids), cfg.overlong_start, cfg.overlong_end) for c in batch]


# name: f(completions of one task, config.rewards) -> a number for each. Only functions of your own
# may say None, "does not apply". A text without a word must earn nothing. What is not named under
# "grounding" below is for reports.
REWARDS = {
    "mccs": mccs_reward,
    "label_f1": partial(label_reward, label_f1),
    "gleu": partial(text_reward, gleu),
    "bleu4": partial(text_reward, bleu4),
    "rouge_l": partial(text_reward, rouge_l),
    "soft_f1": soft_f1_reward,
    "format": format_reward,
    "overlong": overlong_reward,
}
APPLIES = {
    "report": [name for name in REWARDS if name != "soft_f1"],
    "grounding": ["soft_f1", "format", "overlong"],
}


def library_score(name: str) -> Callable:
    """The score `radeval:NAME`, see scorers/radeval.py. Raises InputError."""
    from scorers.radeval import radeval_score  # noqa: PLC0415

    return radeval_score(name)


def check_rewards(rewards_cfg: RewardsConfig):
    """Raises InputError for an unknown reward, with the nearest name, or what cannot be loaded."""
    for task, names in APPLIES.items():
        for name in getattr(rewards_cfg, task):
            if ".py:" in name:
                external_reward(name)
            elif name.startswith("radeval:") and task == "report":
                library_score(name)
            elif name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
                raise InputError(
                    f"rewards.{task}.{name}: no such reward for this task; did you mean "
                    f"{nearest!r}? (there are {', '.join(names)}, for reports those of a library: "
                    f"radeval:NAME, and your own: path/to/file.py:function)"
                )
    labeler(rewards_cfg)


def score_batch(name: str, batch: list[Completion], cfg: RewardsConfig) -> np.ndarray:
    """(N,) values of one reward, NaN where it does not apply. InputError: one is not finite."""
    if ".py:" in name:
        return call_external(name, batch)
    if name.startswith("radeval:"):
        answers = [c.answer for c in batch]
        values = library_score(name)(answers, [c.example.answer for c in batch])
    else:
        values = REWARDS[name](batch, cfg)
    return finite_scores(name, values, [c.example.id for c in batch])


def finite_scores(name: str, values: Sequence, ids: list[str]) -> np.ndarray:
    """(N,) values of a score. Raises InputError for one that is missing or not finite."""
    scores = np.array(values, float)  # None becomes NaN
    for i in np.flatnonzero(~np.isfinite(scores)):
        what = "nothing" if values[i] is None else f"{values[i]}, which is not finite,"
        raise InputError(f"score {name!r} gave {what} for the example with id {ids[i]!r}")
    return scores


def score_completions(
    completions: list[str],
    examples: list[Example],
    rewards_cfg: RewardsConfig,
    token_ids: list[list[int]] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Weighted sums (N,) of N completions, and name -> (N,) unweighted components.

    Tasks and styles may be mixed. A component is NaN where it does not apply; a weight of 0 only
    logs it. Without token_ids, words are counted. Raises InputError if a reward is not finite.
    """
    token_ids = token_ids or [tokenize(text) for text in completions]
    total = np.zeros(len(examples))
    components = {}
    for task in APPLIES:
        places = [i for i, example in enumerate(examples) if example.task == task]
        if not places:
            continue
        batch = []
        for i in places:
            text, example = completions[i], examples[i]
            valid, _, answer = parse_output(text, task, example.style)
            batch.append(Completion(text, token_ids[i], valid, answer, example))
        for name, weight in getattr(rewards_cfg, task).items():
            values = score_batch(name, batch, rewards_cfg)
            components.setdefault(name, np.full(len(examples), np.nan))[places] = values
            total[places] += weight * np.nan_to_num(values)
    return total, components


# ------------------------------------------------------------------------------- your own rewards


@lru_cache
def external_reward(name: str) -> Callable:
    """The function that "path/to/file.py:function" names. Raises InputError."""
    path, _, function = name.rpartition(":")
    if not os.path.isfile(path):
        raise InputError(f"rewards: {name}: no file {path}")
    # It may import files beside it.
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    try:
        namespace = runpy.run_path(path)
    except Exception as error:
        raise InputError(f"rewards: {name}: {path} fails with {error!r}") from None
    if function not in namespace:
        raise InputError(f"rewards: {name}: no function {function!r} in {path}")
    return namespace[function]


def call_external(name: str, batch: list[Completion]) -> np.ndarray:
    """(N,) values of a reward of the user's, called as TRL calls one.

    It gets prompts, completions, completion_ids and the columns id, task, question, answer
    (parsed from the completion), reference, boxes, label, patient, each a list of N, and returns N
    numbers. None: does not apply (NaN here). InputError: it raises, or a number is not finite.
    """
    columns = {}
    for key in ("id", "task", "question", "boxes", "label", "patient"):
        columns[key] = [getattr(c.example, key) for c in batch]
    columns["prompts"] = columns["question"]
    columns["reference"] = [c.example.answer for c in batch]
    columns["answer"] = [c.answer for c in batch]
    columns["completions"] = [c.text for c in batch]
    columns["completion_ids"] = [c.token_ids for c in batch]
    try:
        given = external_reward(name)(**columns)
        return finite_values(list(given), columns["completions"])
    except Exception as error:
        # The last line of the user's file that ran.
        place = ", which returns a number per completion and ends its arguments with **columns"
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == name.rpartition(":")[0]:
                place = f", line {frame.lineno}"
        hint = "a reward that may fail catches its errors and returns 0 or None"
        if re.search("string ind|'str' object has no attribute", str(error)):
            hint = "completions are strings, not chat messages: take completion itself"
        raise InputError(f"reward {name}{place}: {error!r} ({hint})") from None


def finite_values(given, completions):
    """What a reward returned, with NaN for None. Raises ValueError for any other NaN."""
    values = np.array(given, float)  # None becomes NaN
    if values.shape != (len(completions),):
        raise ValueError(f"{values.shape} values for {len(completions)} completions")
    for value, completion in zip(given, completions):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{value} for completion {completion!r}")
    return values


# ------------------------------------------------------------------------------- label extractor


def extract_labels(texts: list[str]) -> np.ndarray:
    """(N, 14) int8 states of N reports, in the order of LABELS, by rules.

    Phrases name observations; cues in the same clause negate or hedge them; over all mentions
    positive > uncertain > negative (the CheXpert labeler, Irvin et al. 2019).
    """
    return np.array([report_states(text) for text in texts], np.int8).reshape(-1, len(LABELS))


@lru_cache(CACHED)
def report_states(text):
    """The 14 states of a report.

    No Finding: nothing is positive or uncertain, devices aside, and nothing of OTHER is mentioned.
    A text without a word has no label at all.
    """
    weakest_first = (BLANK, NEGATIVE, UNCERTAIN, POSITIVE)
    states = [BLANK] * len(LABELS)
    for label, state, *_ in find_mentions(text):
        states[label] = max(states[label], state, key=weakest_first.index)
    findings = {POSITIVE, UNCERTAIN} & {*states[1:-1]}
    normal = has_words(text) and not findings and states[0] == BLANK
    states[0] = POSITIVE if normal else BLANK
    return tuple(states)


def find_mentions(text: str) -> list[tuple]:
    """[(label index, state, phrase, cue, clause)] of a report: what its labels are decided on."""
    text = "\n" + text.lower().translate(ASCII)
    # Single spaces. Most are, and need no change.
    text = re.sub(r"(?! \S)[^\S\n]+", " ", text)
    # A word that a line break divides at its hyphen.
    text = re.sub(r"(?<=\w-) ?\n ?(?=\w)", "", text)
    text = re.sub(ASKED, "\n\n", text)
    if re.search(r"[:*|]| - ", text):
        text = plain_lists(text)
    # A word removed by de-identification.
    text = re.sub(r"\bx{3,}\b|_{2,}", "xxxx", text)

    mentions = []
    for sentence in SENTENCE_END.split(text):
        sentence = " ".join(sentence.split())
        if "limited" in sentence:
            sentence = re.sub(NO_CLAIM, "", sentence)
        for clause in CLAUSE_END.split(sentence):
            # Pieces of bounded length keep all of this linear.
            for start in range(0, len(clause), LONGEST):
                piece = clause[start : start + LONGEST]
                mentions += [(*mention, piece) for mention in clause_mentions(piece)]
    return mentions


def plain_lists(text):
    """Lists and tables as sentences: "**Edema:** no" and "| Edema | no |" become "edema: no"."""
    text = re.sub(rf" - (?={VALUE}\b)", ": ", text.replace("**", ""))
    text = text.replace(" - ", ", ")
    text = re.sub(r"\n ?\|([^|\n]*\w) ?\|", r"\n\1:", text).replace("|", ".")
    text = re.sub(VALUE_END, r"\1. ", text)
    return re.sub(REPEATED_HEAD, "", text) if ": n" in text else text


@lru_cache(CACHED)
def clause_mentions(clause):
    """[(label index, state, phrase, cue)] of a clause."""
    mentions = []
    for label, pattern, judge in PATTERNS:
        for match in pattern.finditer(clause):
            # What only looks like a phrase lacks the group.
            state, cue = judge(match) if match["phrase"] else (BLANK, "")
            if state != BLANK:
                mentions.append((label, state, match[0], cue))
    return mentions


@lru_cache(1)
def find_cues(clause):
    """The first cue of each kind that acts on what follows, the last that acts on what precedes.

    {"negation" | "hedge" | "skip": match} each. All mentions of a clause ask for the same.
    """
    before = {}
    for cue in CUES_BEFORE.finditer(clause):
        before.setdefault(cue.lastgroup, cue)
    # The last of a kind stays.
    after = {cue.lastgroup: cue for cue in CUES_AFTER.finditer(clause)}
    return before, after


def assertion_of(mention):
    """(state, cue) of a mention, by the first cue in this order that acts on it.

    "no evidence of pneumothorax or effusion"  both: (NEGATIVE, "no"), as "or" ends no clause
    "no focal opacity to suggest pneumonia"    pneumonia: (NEGATIVE, "no"), which comes first
    "a pneumothorax cannot be excluded"        pneumothorax: (UNCERTAIN, "cannot be excluded")
    "no change in the left effusion"           effusion: (POSITIVE, ""), as "no change" is no cue
    """
    before, after = find_cues(mention.string)
    # "no possible effusion" denies, but an effusion that is "not likely" stays in doubt.
    for kind in ("negation", "hedge"):
        cue = before.get(kind)
        if cue and cue.end() <= mention.start():
            return CUE_STATES[kind], cue[0]
    for kind in ("hedge", "negation"):
        cue = after.get(kind)
        if cue and cue.start() >= mention.end():
            return CUE_STATES[kind], cue[0]
    return POSITIVE, ""


def other_finding(mention):
    """A finding outside the 13 observations is negative evidence for No Finding."""
    state, _ = assertion_of(mention)
    return (BLANK if state == NEGATIVE else NEGATIVE), ""


def size_of(label, part):
    """(state, cue) of the heart or mediastinum, by the nearest word on size."""
    sizes = [size for size in SIZE.finditer(part.string) if size.lastgroup != "other"]
    # "Stable" only counts where nothing else is said.
    sizes = [size for size in sizes if size.lastgroup != "same"] or sizes
    size = min(sizes, key=partial(distance, part), default=None)
    if not size:
        return BLANK, ""
    # A stable mediastinum says nothing about the heart.
    if size.lastgroup == "same" and label == "Cardiomegaly" and "mediast" in part[0]:
        return BLANK, ""
    if size.lastgroup == "large":
        state, _ = assertion_of(part)
        return state, size[0]
    return SIZE_STATES[size.lastgroup], size[0]


def distance(a, b):
    """Characters between two matches; below 0 if they overlap."""
    return max(a.start() - b.end(), b.start() - a.end())


def one_of(**rules):
    """The rules as one pattern, tried in this order at the start of a word, with a group each."""
    groups = (f"(?P<{name}>{rule})" for name, rule in rules.items())
    return re.compile(rf"\b(?:{'|'.join(groups)})")


def compile_phrases(label, judge, phrase, *decoys):
    """(label index, pattern, judge). What only looks like a phrase is tried first."""
    alternatives = "|".join([*decoys, f"(?P<phrase>{phrase})"])
    return LABELS.index(label), re.compile(rf"\b(?:{alternatives})"), judge


# ------------------------------------------------------------------------------- its phrases

# Regular expressions on lower-cased text, tried at the start of a word. A stem without \b takes
# any ending. Gaps are bounded, which keeps matching linear.

# Organs whose masses are no lesions of the lung.
ORGANS = (
    r"(?:breast|body|renal|kidney|liver|hepatic|prostat\w+|colon\w*|gastric|pancrea\w+|thyroid|"
    r"adrenal|ovarian|uterine|bladder|brain|bone|bony|osseous|skin|neck|axillary|soft tissue|"
    r"chest wall|abdominal|pelvic)"
)
# What breaks, beside bones.
BROKEN = r"(?:wire|lead|catheter|hardware|screw|rod|plate)"
# label: what names it, and, if there is, what only looks like it
MENTIONS = {
    "Enlarged Cardiomediastinum": (
        r"(?:cardio)?mediastinal (?:widen|enlarge|prominence)|"
        r"(?:widened|prominent|wide) (?:superior )?mediastin",
    ),
    "Cardiomegaly": (
        r"cardiomegaly|cardiac enlargement|enlarge(?:d|ment of the) (?:heart|cardiac)",
    ),
    "Lung Lesion": (
        r"mass(?:es|-?like)?\b|nodul|lump\b|(?:cavitary|lung|pulmonary|parenchymal) lesion|"
        r"carcinoma|neoplas|tumou?r|malignan|metasta|cancer",
        r"mass effect",
        # "CT is more sensitive in detecting small nodules"
        r"(?:detect|identify)\w* (?:\w+ ){0,3}nodul",
        # "history of metastatic breast cancer"
        rf"(?:metasta\w+ )?{ORGANS} (?:\w+ )?(?:mass|nodul|carcinoma|neoplas|tumou?r|malignan|"
        r"metasta|cancer)",
        # "mass in the left breast", "metastatic disease in the liver"
        r"(?:cancer|carcinoma|malignancy|tumou?r|mass|metasta\w+)(?: disease)? (?:of|in|to) "
        rf"(?:the )?(?:left |right )?{ORGANS}",
        # "calcified lung nodule"
        r"calcified(?<!non-calcified) (?:(?!and\b|or\b)[\w-]+ )?(?:mm )?(?:nodul|mass|lesion)",
        # "the nodules are calcified"
        r"nodul\w* (?:is|are|appears?) (?:\w+ )?calcified",
        # "nodular density compatible with a nipple shadow", and the other way round
        r"nodul\w* (?:(?!and\b|or\b)[\w-]+ ){0,8}nipple|nipple(?: (?:\w+ ){1,4}nodul)?",
    ),
    "Lung Opacity": (
        r"opaci|(?:decreased|reduced) translucency|ggos?\b|"
        r"(?:increased|hazy|patchy|streaky) (?:(?:left|right|retrocardiac|basilar) ){0,2}densit|"
        r"infiltrat|haziness|scar(?:s|red|ring)?\b|air ?-?space (?:\w+ )?(?:disease|process)|"
        r"reticul(?:ation|ar (?:pattern|marking))|interstitial (?:\w+ )?"
        r"(?:marking|pattern|lung|promin|thicken|disease|change)|"
        r"(?:peri)?bronchial (?:wall )?(?:thicken|cuff)",
    ),
    "Edema": (
        r"o?edema|(?:heart|cardiac) failure|chf\b|(?:vascular|venous|pulmonary) congestion|"
        r"congestive|kerley|cephalization|vascular (?:indistinctness|prominence)",
        r"(?:soft tissue|peripheral|ankle|leg|pedal|cerebral|brain|bowel|laryngeal) o?edema",
    ),
    "Consolidation": (r"consolidat",),
    "Pneumonia": (
        r"(?:broncho)?pneumonia|pna\b|infecti|pneumonitis",
        r"(?:granulomatous|prior|previous|old|urinary tract|wound) (?:\w+ )?infec",
    ),
    "Atelectasis": (
        r"(?:micro)?ateleca?t|collapse|volume loss",
        # "collapse of T8", "collapsed vertebra"
        r"collapsed? (?:of (?:the |a )?)?(?:\w+ )?(?:vertebra|[tl]-?\d)",
        # "vertebral body collapse"
        r"(?:vertebra\w*|[tl]-?\d+|wedge|spinal|femoral head) (?:body |bodies )?collaps",
    ),
    "Pneumothorax": (r"(?:hydro|hemo|haemo|hydrohemo)?pneumothora|ptx\b|pleural air\b",),
    "Pleural Effusion": (
        r"effusion|pleural fluid|(?:hydro|hemo|haemo)thorax|"
        r"blunt\w* of (?:\w+ ){0,4}costophrenic|"
        r"costophrenic (?:\w+ ){0,2}blunt|blunted (?:\w+ ){0,2}costophrenic",
        r"(?:pericardial|joint|knee) effusion",
    ),
    "Pleural Other": (
        r"pleural (?:\w+ ){0,2}(?:thickening|scar|plaque|calcif|mass|abnormalit)|fibrothorax|"
        r"fibrosis|pleur(?:al|o)[ -]?(?:parenchymal|peripheral|based)|"
        r"thickening of (?:\w+ ){0,2}pleura|(?:bi)?apical (?:cap|thickening)",
    ),
    "Fracture": (
        r"fractur|compression deformit|(?:rib|clavic\w+|wedge) deformit|(?:rib|clavic\w+) fx",
        # "fractured sternotomy wire", "fracture of the second sternal wire"
        rf"fractur\w* (?:of )?(?:the )?(?:(?!rib|beside|near|and\b|with\b)\w+ ){{0,3}}{BROKEN}",
        # "the lower wire is fractured"
        rf"{BROKEN}s? (?:(?:is|are|has|have) )?(?:\w+ )?fractur",
    ),
    "Support Devices": (
        r"pace(?:r\b|maker)|(?:\w+ )?(?:lines?|tubes?|tubing)\b|picc|valve|(?:porta)?catheter|"
        r"hardware|arthroplast|defib|drain\b|a?icd\b|device|plates?\b|screw|cannula|coil|mediport|"
        r"port\b|wires?\b|shunt|leads?\b|stimulator|generator|tracheostomy|xxxx-a-xxxx|"
        r"tips?\b (?:[\w-]+ ){0,6}(?:svc|cavoatrial|carina|atri|ventric)|"
        r"swan|dobb?hoff|iabp|balloon pump|ett\b|[no]gt\b|cv[cl]s?\b|port-?a-?cath|"
        r"pigtail|lvad|impella|ecmo|permcath|hickman|loop recorder|internal fixation|"
        r"sheath|pleurx|cordis|quinton",
        r"(?:air|fat|mid|base|(?:kerley )?b|midclavicular|fissur\w*|pleural|paratracheal|"
        r"fracture|lung|skin|skin ?fold|fold|septal|suture|joint|hair|in)[ -]lines?\b",
        # "growth plates", "platelike atelectasis"
        r"(?:end ?|growth |physeal )plate|plate ?-?like|plates? (?:of )?atelect",
        # "may lead to"
        r"(?:to|may|might|can|could|will|would) lead|leads? to\b",
        r"catheteriz|valv\w+ (?:annul\w+ )?(?:calcif|stenosis|disease|regurg|insuff)",
    ),
}
# What heart and mediastinum are only a place for.
PLACE = (
    r"(?:behind|over|overlying|obscur\w*|beside|around|near|next to|adjacent to|against|along|"
    r"displac\w*|shift\w*(?: of)?)"
)
# What has a size.
ANATOMY = {
    "Enlarged Cardiomediastinum": (
        r"(?:cardio ?-?)?mediastin|contours?\b|cardiopulmonary silhouette",
        r"mediastinal (?:and hilar )?lymph|hilar contour",
        rf"{PLACE} (?:the )?mediastin",
    ),
    "Cardiomegaly": (
        r"heart\b|cardiac (?:silhouette|size|contour|shadow|and)|"
        r"cardio(?: ?-?mediastin|pulmonary silh)",
        # "enlarged cardiomediastinum", a label by itself
        r"cardiomediastinum\b",
        # "the right lung is clear behind the heart"
        rf"{PLACE} (?:the )?(?:left |right )?heart",
    ),
}
# Findings outside the 13 observations: they only cancel No Finding.
OTHER = (
    r"granulom|scolio|kypho|degenerat|spondyl|arthri|osteophyt|"
    r"hyper(?:inflat|expan|lucen|aerat)|emphysem|copd|chronic|scar|hernia|tortuo|atheroscl|"
    r"ectasia|aneurysm|calcif|fibro|elevat|eventrat|bronchiect|osteopen|deformit|flatten"
)


LARGE = r"(?:large|big|enlarged|prominent|increased|widened)"
# Nouns that have a size besides heart and mediastinum, and words that end a group of words.
OTHER_NOUN = (
    r"(?:effusion|pneumothora|ptx|hernia|mass|opaci|densit|lucen|consolidat|nodul|marking|vessel|"
    r"vascul|hila|lymph|node|aort|arter|vein|volume|fluid|collection|atelecta|bulla|stomach|"
    r"bubble|hemidiaphragm|azygos|thyroid|goiter)"
)
GROUP_END = r"heart|cardi|mediast|silh|is\b|are\b|and\b|or\b|with\b|in\b|by\b"
# A normal size is negative, an enlarged one positive. "Stable" hedges, as in the CheXpert labeler.
SIZE = one_of(
    # "a large left effusion obscures the heart", "prominent mediastinal fat"
    other=rf"{LARGE} (?:(?!{GROUP_END})[\w-]+ ){{0,3}}{OTHER_NOUN}|"
    rf"{LARGE} mediastinal (?:fat|mass|lymph)|"
    # "the effusion has increased"
    rf"{OTHER_NOUN}\w* (?:is|are|has|have) (?:\w+ )?{LARGE}",
    normal=r"normal|unremarkable|within|clear|intact|maintained|upper limit|"
    r"not? (?:\w+ ){0,3}(?:enlarge|widen|promin)",
    # "borderline heart size"
    borderline=r"borderline(?! (?:cardiac )?enlarge)",
    # "the heart is not of normal size"
    abnormal=r"not (?:\w+ )?normal|above normal",
    large=r"increase in (?:heart )?size|enlarge|prominen|increased|widen|large\b|big\b",
    same=r"stable|unchanged|similar",
)
SIZE_STATES = {"normal": NEGATIVE, "borderline": UNCERTAIN, "abnormal": POSITIVE, "same": UNCERTAIN}
CUE_STATES = {"negation": NEGATIVE, "hedge": UNCERTAIN}
BE = r"(?:is|are|was|were|has|have|been)"
# Cues before a mention.
CUES_BEFORE = one_of(
    # Neither negates: "no change in the effusion", "partial clearing of the edema"
    skip=r"(?:no|without) (?:(?!or\b|and\b)\w+ ){0,2}(?:doubt|question|change|increase|decrease|"
    r"displacement of (?:\w+ ){0,3}(?:tube|line|lead|catheter|wire)|"
    # but "no worsening of the effusion or pneumothorax" denies the second
    r"(?:(?:improvement|worsening|progression|difference|resolution) (?:of|in)|"
    r"enlargement of (?:\w+ ){0,2}(?:effusion|pneumothora|ptx|mass|opaci|consolidat|nodul))"
    r"(?!.{0,80}\bor\b))|"
    r"not (?:\w+ )?(?:change|only|increas|decreas|resolv|clear)|"
    # "no longer seen", of what stands before
    r"(?:not|no longer) (?:be )?(?:well |clearly )?"
    r"(?:evaluat|assess|apprec|seen|visuali|present|identif|evident|appar)|"
    r"(?:partial|incomplete|near|some|slight)\w* (?:\w+ )?(?:resolution|clearing)",
    # "cannot exclude edema", "suspicious for pneumonia", "favor atelectasis"
    hedge=r"(?:can ?not|can't|could not|difficult to|not|never|to) (?:\w+ ){0,2}"
    r"(?:exclude|rule out|be excluded)|may\b|might|could|possib|probab|question|suspect|"
    r"suspicious (?:for|of)|concern|worrisome|suggest|(?:un)?likely|vs\b|versus|presum|equivocal|"
    r"differential|potential|perhaps|apparent|rule out|favou?r|and/or|"
    r"(?:evaluat|assess|correlat)\w* (?:\w+ )?for",
    # "no edema", "nil effusion", "resolution of the effusion", "resolved pneumothorax"
    negation=r"no\b|nil\b|not\b|without|free (?:of|from)|negative for|absence of|absent|never|"
    r"neither|nor\b|denies|(?:resolution|clearing|removal) of|clear of|rather than|ruled? out|"
    r"exclude[sd]?|(?:^|interval |completely )(?:resolved|removed)",
)
# Cues after a mention.
CUES_AFTER = one_of(
    # "has not resolved" leaves it there, and "was not seen on the prior study", too.
    skip=rf"(?:{BE} )?(?:not|nearly|almost|partial\w*|incomplet\w*|mostly) (?:\w+ )?"
    r"(?:resolv|clear(?!ly)|chang|remov|increas|decreas|improv|wors|progress|enlarg|larger|"
    r"smaller|different|moved|healed|displaced|more\b|as (?!well|likely|probable|before)\w+|"
    r"previously (?:seen|present|visible|identified)|(?:seen|present|visible|identified) "
    r"(?:previously|before|(?:on|in) (?:the )?(?:\w+ )?(?:prior|previous)(?!.{0,60}\bn?or\b)))",
    # "cannot be excluded", "is not appreciated"
    hedge=rf"(?:{BE} )?(?:not|cannot be) (?:\w+ ){{0,2}}(?:excluded|ruled)|versus|vs\b|and/or|"
    r"not (?:well|clearly|appreciated)\b|"
    r"(?:is|are) (?:\w+ )?limited|consideration|in the differential|"
    r"(?:is|are) (?:\w+ ){0,2}(?:questioned|difficult|favou?red(?! to))|favou?red over|"
    r"possible|suspected|(?:likely|probable|questionable)\W*$",
    # "is not seen", "has cleared", "removed"
    negation=rf"{BE} (?:\w+ )?not\b(?! (?:yet|well|clear|apprec|exclu|ruled|resolv|chang|remov))|"
    r"none\b|absent|resolved|removed|cleared|disappeared|gone\b|interval resolution|no longer|"
    r"unlikely|negative|not (?:\w+ )?(?:seen|identified|present|visuali)|"
    rf"{BE} (?:(?!not|near|almost|part)\w+ )?excluded|"
    # "edema: no significant edema", "edema: no", "edema: no (supine)"
    r": no (?:evidence|significant|definite|focal|acute|new|large|obvious|visible)|"
    r"(?:no|nil)(?:\W*$| \()",
)
ASCII = str.maketrans("\u2019\u2010\u2011\u2012\u2013\u2014", "'-----")
# Sections on what was asked, not on what was seen, up to the next section or paragraph.
ASKED = (
    r"(?s)[\n.] ?"
    r"(?:indications?|(?:clinical )?(?:history|information)|reason for (?:the )?(?:exam|study)\w*):"
    r".*?(?=\b(?:exam\w*|comparison|technique|findings?|impressions?|conclusions?|report)\s?:|"
    r"\n ?\n|\Z)"
)
# Values in lists and tables.
VALUE = r"(?:yes|no|nil|none|absent|present|negative|positive|normal)"
# Before a further heading, "edema: no effusion: yes".
VALUE_END = rf"(: ?{VALUE})[,\s]+(?=(?:\d[.)]\s)?(?:[\w/]+\s){{0,3}}[\w/]+:)"
# "edema: no pulmonary edema" is "no pulmonary edema".
REPEATED_HEAD = r"\b(\w[\w ]{2,30}): (?=(?:no|nil) (?:\w+ ){0,3}\1)"
NO_CLAIM = r"\b(?:evaluation|assessment) (?:for|of) (?:\w+ ){1,4}(?:is |was )?(?:\w+ )?limited"
SENTENCE_END = re.compile(
    # "Edema? No." is one sentence.
    r"[.;!?]+(?!\d)(?!\s*(?:no|nil|none)\s*(?:[.\n]|\Z))|"
    # A paragraph, an item of a list, a headed line.
    r"\n\s*\n|\n(?=[-*\u2022]|\d+[.)]|[\w /()]{1,40}:)"
)
# What opens a new statement after a comma.
OPENING = (
    # "no edema, small effusion"
    r"(?:there|the|stable|mild|small|minimal|moderate|severe|persistent|bilateral|unchanged|old|"
    r"healed|possibl\w*|likely|probabl\w*|(?:heart|cardiac)(?! failure)|lungs?|with|only|yet|may|"
    r"might|could|"
    # "opacity without effusion, concerning for pneumonia"
    r"concern\w*|suspicious for|suggest\w*|consistent|compatible|worrisome|rais\w*|represent\w*|"
    r"reflect\w*|favou?r\w*|question\w*)\b|"
    # "no edema, left effusion", while "no edema, left effusion, or mass" is a list
    r"(?:(?:left|right)(?:-sided)?|bibasilar|new|interval|residual|patchy|hazy|linear|increas\w*|"
    r"decreas\w*|worsen\w*) (?!.{0,60}\bor\b)|"
    # "no edema, the left effusion persists"
    rf"(?!now|since|{BE} )(?:(?!or\b|and\b|nor\b|no\b)[\w-]+ ){{1,7}}(?:persist|remain|unchanged|"
    r"stable|again|improv|worse|resolv|removed|no longer|"
    rf"{BE} (?:\w+ )?(?:present|increas|decreas|clear)|"
    # "no edema, PICC tip in the SVC"
    r"tips?\b|terminat|in place|in the (?:svc|stomach)|above the carina)"
)
# "a pneumothorax after chest tube placement has resolved" goes on.
NO_CUE_AHEAD = (
    r"(?![^,]{0,100}\b(?:not|no longer|resolved|cleared|absent|gone|unlikely|excluded|ruled|"
    r"enlarged|normal|stable|unchanged|or)\b)"
)
# Where cues stop: at a contrast, or a conjunction or comma that opens a new statement.
CLAUSE_END = re.compile(
    r"\b(?:but|however|although|though|which|that|otherwise|other than|except|aside|apart|while|"
    r"whereas|given|"
    # "no pneumothorax following PICC placement", "no pneumothorax with the tube in place"
    rf"(?:following|after|status post) (?=(?:\w+ ){{0,4}}(?:placement|insertion)\b{NO_CUE_AHEAD})|"
    rf"with (?=(?:\w+ ){{1,4}}in place\b{NO_CUE_AHEAD})|"
    r"(?:and|with) (?=(?:there|the|mild|small|bilateral|is|are|has|have|"
    r"(?:stable|unchanged)(?! heart| cardi(?:ac|omed)| mediast))\b)|"
    # "no edema and basal atelectasis persists"
    r"and (?=(?:\w+ ){1,4}persist)|"
    # "no effusion and heart is enlarged", not "mediastinum and heart are normal"
    r"(?<!mediastinum )(?<!contour )(?<!silhouette )and (?=heart (?:size )?(?:is|appears)))|"
    rf", (?:(?=(?:and )?(?:{OPENING}))|"
    # "no edema is seen, PICC in the SVC"
    r"(?:(?<=seen, )|(?<=noted, )|(?<=identified, )|(?<=visualized, )|(?<=present, ))"
    r"(?!or\b|nor\b|and\b))"
)

# Of phrases, judge: match -> (state, cue).
PATTERNS = [compile_phrases(label, assertion_of, *MENTIONS[label]) for label in MENTIONS]
PATTERNS.append(compile_phrases("No Finding", other_finding, OTHER))
for label, phrases in ANATOMY.items():
    PATTERNS.append(compile_phrases(label, partial(size_of, label), *phrases))

if __name__ == "__main__":
    moved(
        "rewards.py",
        {
            "the audit": "tools.audit config.yaml [key=value ...]",
            "labels": "tools.label reports.csv -o labels.csv",
        },
    )
