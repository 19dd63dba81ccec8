"""Text and boxes in, numbers out: every reward of both papers, and the label extractor they rest on. No torch.

In order of appearance
  LABELS, extract_labels        a rule-based CheXpert labeler: report text -> 14 states (blank, positive, negative, uncertain)
  mccs, label_f1                rewards on label vectors (MRG-R1's margin-based cosine; F1 of the positives)
  tokenize, gleu, bleu4, corpus_bleu, rouge_l     text overlap
  parse_output                  (valid, thinking, answer) of a completion, in the three output formats
  parse_boxes, iou, match_boxes, soft_f1          grounding
  REWARDS, check_rewards, score_completions       the reward table, and a batch of completions -> weighted totals

Whatever a model writes, nothing here raises or takes more than linear time on text.
"""
from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from functools import lru_cache

import numpy as np

LABELS = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema", "Consolidation",
          "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices")
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = 0, 1, 2, 3

# ------------------------------------------------------------------------------------------------- label extractor
# Every table is a regular expression on lower-cased text, tried from a word boundary on; a stem matches any ending.
# Gaps are bounded ((?:\w+ ){0,3}), so that matching stays linear.

MENTIONS = {  # what names an observation
    "Enlarged Cardiomediastinum": r"(?:mediastinal|cardiomediastinal) (?:widening|enlargement|prominence)|"
                                  r"(?:widened|enlarged|prominent|wide) (?:superior )?(?:cardio)?mediastin",
    "Cardiomegaly": r"cardiomegaly|cardiac enlargement|enlargement of the (?:heart|cardiac)|enlarged (?:heart|cardiac)",
    "Lung Lesion": r"mass(?:es)?\b|nodul|lump\b|cavitary lesion|(?:lung|pulmonary|parenchymal) lesion|carcinoma|neoplas|"
                   r"tumou?r|malignan|metasta|cancer",
    "Lung Opacity": r"opaci|(?:decreased|reduced) translucency|(?:increased|hazy|patchy|streaky) densit|"
                    r"air ?-?space (?:\w+ )?disease|infiltrat|interstitial (?:\w+ )?(?:marking|pattern|lung|prominence|"
                    r"thickening|disease|change)|reticular (?:pattern|marking)|reticulation|parenchymal scar|"
                    r"(?:peri)?bronchial (?:wall )?(?:thickening|cuffing)",
    "Edema": r"(?:o?edema)|(?:heart|cardiac) failure|chf\b|(?:vascular|venous|pulmonary) congestion|congestive|"
             r"vascular (?:indistinctness|prominence)|cephalization|kerley",
    "Consolidation": r"consolidat",
    "Pneumonia": r"(?:broncho)?pneumonia|infecti|pneumonitis",
    "Atelectasis": r"(?:micro)?ateleca?t|collapse|volume loss",
    "Pneumothorax": r"(?:hydro)?pneumothora",
    "Pleural Effusion": r"effusion|pleural fluid|hydrothorax|(?:blunt\w* of (?:\w+ ){0,4})costophrenic|"
                        r"costophrenic (?:\w+ ){0,2}blunt|blunted (?:\w+ ){0,2}costophrenic",
    "Pleural Other": r"pleural (?:\w+ ){0,2}(?:thickening|scar|plaque|calcif|mass|abnormalit)|fibrothorax|"
                     r"pleur(?:al|o)[ -]?(?:parenchymal|peripheral|based)|fibrosis|thickening of (?:\w+ ){0,2}pleura|(?:apical|biapical) (?:cap|thickening)",
    "Fracture": r"fractur|compression deformit|(?:rib|clavic\w+|wedge) deformit",
    "Support Devices": r"pace(?:r\b|maker)|(?:\w+ )?lines?\b|picc|(?:\w+ )?tubes?\b|valve|catheter|hardware|arthroplast|icd\b|"
                       r"defib|device|drain\b|plate\b|screw|cannula|coil|mediport|port\b|port-a-cath|chest port|stent|"
                       r"clips?\b|wires?\b|shunt|(?:internal|screw|plate) fixation|xxxx-a-xxxx|"
                       r"tips?\b (?:[\w-]+ ){0,6}(?:svc|cavoatrial|carina|atri|ventric)|"
                       r"|leads?\b|prosthe|sutur|tracheostomy|stimulator|generator|\brods?\b",
}
UNMENTIONS = {  # what looks like a mention and is none; tried first
    "Lung Lesion": r"breast mass|nipple|mass effect|body mass",
    "Edema": r"(?:soft tissue|peripheral|ankle|leg) edema",
    "Pneumonia": r"(?:granulomatous|prior|old|previous|remote) (?:\w+ )?infecti",
    "Pleural Effusion": r"pericardial effusion|joint effusion",
    "Support Devices": r"(?:air|fat|hair|mid|sky|base|kerley|midclavicular|paraspinal|fissur\w*|pleural|paratracheal|fracture|"
                       r"lung|in|b) lines?\b|air fluid|end ?plate|plate ?-?like|support",
    "Atelectasis": r"collapsed? vertebra",
}
ANATOMY = {  # normal anatomy is a negative, enlarged anatomy a positive
    "Enlarged Cardiomediastinum": r"(?:cardio ?)?-?mediastin|contours?\b|cardiopulmonary silhouette",
    "Cardiomegaly": r"heart\b|cardiac (?:silhouette|size|contour|shadow|and)|cardio ?-?mediastinal|cardiopulmonary silhouette",
}
OTHER = (r"granulom|scolio|kypho|degenerat|spondyl|arthri|osteophyt|hyper(?:inflat|expan|lucen|aerat)|emphysem|copd|chronic|"
         r"hernia|tortuo|atheroscl|ectasia|aneurysm|calcif|scar|fibro|elevat|eventrat|bronchiect|osteopen|deformit|flatten")

NEGATION = (r"no\b|not\b|without|free of|negative for|absence of|absent|never|neither|nor\b|denies|resolution of|clear of|"
            r"rather than|ruled? out|exclude[sd]?|remov(?:al|ed)")
PSEUDO = (r"no (?:\w+ ){0,2}(?:change|increase|decrease)|not (?:\w+ )?(?:changed?|only|increased|decreased)|"
          r"no longer|without (?:\w+ )?change")
UNCERTAINTY = (r"(?:can ?not|can't|could not|difficult to|not|never|to) (?:\w+ ){0,2}(?:exclude|rule out|be excluded|excluded)|"
               r"may\b|might|could|possib|probab|question|suspect|suspicious (?:for|of)|concern|worrisome|suggest|likely|"
               r"versus|vs\b|presum|equivocal|borderline|differential|potential|perhaps|apparent|appearance of|rule out|"
               r"evaluat\w* for|assess\w* for")
POST_NEGATION = (r"(?:is|are|was|were|has|have|been) (?:\w+ )?(?:not\b|no longer|cleared|absent|excluded|removed)|none\b|"
                 r"resolved|not (?:\w+ )?(?:seen|identified|present|visuali)|unlikely|negative")
POST_UNCERTAINTY = (r"(?:not|cannot be) (?:\w+ )?(?:excluded|ruled)|(?:is|are) (?:\w+ ){0,2}(?:possible|suspected|questioned|difficult)|consideration|in the differential|versus|vs\b|"
                    r"(?:is|are) (?:\w+ )?limited")
NORMAL = (r"normal|unremarkable|within|not (?:\w+ ){0,3}(?:enlarge|widen)|clear|intact|maintained|"
          r"upper limits?|no (?:\w+ ){0,3}(?:enlarge|widen|prominen)")
ENLARGED = r"borderline|enlarge|prominent|increased|widen|large|big\b"

MASK = re.compile(r"\bx{3,}\b|_{2,}")                                   # de-identification: one unknown word
SENTENCE_END = re.compile(r"(?:[.;!?](?!\d)|\n\s*(?=\n|[-*\u2022]|\d+[.)]))+")
CLAUSE_END = re.compile(
    r"\b(?:but|however|although|though|which|that|otherwise|except|aside|apart|while|whereas|secondary to|due to|given|"
    r"(?:and|with) (?=(?:there|the|stable|mild|small|bilateral|unchanged|is|are|has|have)\b))|"
    r", (?=(?:and )?(?:there|the|stable|mild|small|minimal|bilateral|unchanged|old|healed|possibl\w*|likely|probabl\w*|heart|cardiac|lungs?|with)\b)")


def _any(pattern):
    return re.compile(rf"\b(?:{pattern})")


_CUES = re.compile(rf"\b(?:(?P<skip>{PSEUDO})|(?P<maybe>{UNCERTAINTY})|(?P<no>{NEGATION}))")
_AFTER = re.compile(rf"\b(?:(?P<maybe>{POST_UNCERTAINTY})|(?P<no>{POST_NEGATION}))")
_SIZE = re.compile(rf"\b(?:(?P<stable>stable|unchanged|similar)|(?P<normal>{NORMAL})|(?P<large>{ENLARGED}))")
_MENTIONS = [(LABELS.index(name), re.compile(
    rf"\b(?:(?:{UNMENTIONS[name]})|(?P<it>{pattern}))" if name in UNMENTIONS else rf"\b(?P<it>{pattern})"))
    for name, pattern in MENTIONS.items()]
_ANATOMY = [(LABELS.index(name), _any(pattern)) for name, pattern in ANATOMY.items()]
_OTHER = _any(OTHER)


def _clause(clause):
    """Yields (label index, state) of every mention in one clause: the stretch of text that shares its cues."""
    first, last = {}, {}                    # where the first cue before, and the last cue after, take effect
    for cue in _CUES.finditer(clause):
        first.setdefault(cue.lastgroup, cue.end())
    for cue in _AFTER.finditer(clause):
        last[cue.lastgroup] = cue.start()

    def state(mention):
        if first.get("no", math.inf) <= mention.start():
            return NEGATIVE
        if first.get("maybe", math.inf) <= mention.start() or last.get("maybe", -1) >= mention.end():
            return UNCERTAIN
        return NEGATIVE if last.get("no", -1) >= mention.end() else POSITIVE

    for label, pattern in _MENTIONS:
        for mention in pattern.finditer(clause):
            if mention["it"]:
                yield label, state(mention)
    sizes = list(_SIZE.finditer(clause))
    sizes = [size for size in sizes if size.lastgroup != "stable"] or sizes
    for label, pattern in _ANATOMY if sizes else ():
        for part in pattern.finditer(clause):
            nearest = min(sizes, key=lambda size: max(size.start() - part.end(), part.start() - size.end()))
            if not (nearest.lastgroup == "stable" and label == 2 and "mediast" in part[0]):
                yield label, {"stable": UNCERTAIN, "normal": NEGATIVE, "large": POSITIVE}[nearest.lastgroup]
    if any(state(m) != NEGATIVE for m in _OTHER.finditer(clause)):
        yield 0, NEGATIVE


@lru_cache(maxsize=1 << 16)
def _labels(text):
    found = [set() for _ in LABELS]
    for sentence in SENTENCE_END.split(MASK.sub("xxxx", text.lower())):
        for clause in CLAUSE_END.split(" ".join(sentence.split())):
            for label, state in _clause(clause):
                found[label].add(state)
    states = [next((s for s in (POSITIVE, UNCERTAIN, NEGATIVE) if s in seen), BLANK) for seen in found]
    abnormal = any(s in (POSITIVE, UNCERTAIN) for s in states[1:-1])
    says_something = re.search(r"\w", text) is not None
    states[0] = POSITIVE if says_something and not abnormal and NEGATIVE not in found[0] else BLANK
    return tuple(states)


def extract_labels(texts):
    """(N, 14) int8 states in the order of LABELS, of N report texts.

    Phrases name observations; cues before and after them in the same clause negate or hedge them (CheXpert, Irvin et al.
    2019); over all mentions positive > uncertain > negative. A text without a word has no label at all.
    """
    return np.array([_labels(text) for text in texts], np.int8).reshape(-1, len(LABELS))


# ------------------------------------------------------------------------------------------------- label rewards

def _present(labels):
    """(N, 13) bool: which observations other than No Finding are positive or uncertain."""
    return np.isin(np.asarray(labels)[:, 1:], (POSITIVE, UNCERTAIN))


def mccs(generated, reference, margin=0.5, nonempty=None):
    """(N,) margin-based CheXbert cosine similarity of (N, 14) label arrays: max((cos - m) / (1 - m), 0) (MRG-R1).

    Vectors leave out No Finding; positive and uncertain are +1, negative -1, blank 0. Two zero vectors score 1 if the
    generated text says something, else 0: `nonempty`, (N,) bool, by default whether the row has any label at all.
    """
    value = np.array([0.0, 1.0, -1.0, 1.0])  # indexed by state
    a, b = (value[np.asarray(labels)[:, 1:]] for labels in (generated, reference))
    nonempty = np.any(np.asarray(generated) != BLANK, axis=1) if nonempty is None else np.asarray(nonempty)
    squared = (a * a).sum(1) * (b * b).sum(1)
    score = np.maximum(((a * b).sum(1) / np.sqrt(np.maximum(squared, 1)) - margin) / (1 - margin), 0)
    both_zero = ~a.any(1) & ~b.any(1)
    return np.where(both_zero, nonempty, np.where(squared > 0, score, 0.0)).astype(float)


def label_f1(generated, reference, nonempty=None):
    """(N,) F1 of the present (positive or uncertain) observations without No Finding; none in both: as in mccs."""
    a, b = _present(generated), _present(reference)
    nonempty = np.any(np.asarray(generated) != BLANK, axis=1) if nonempty is None else np.asarray(nonempty)
    size = a.sum(1) + b.sum(1)
    return np.where(size == 0, nonempty, 2 * (a & b).sum(1) / np.maximum(size, 1)).astype(float)


# ------------------------------------------------------------------------------------------------- text overlap

def tokenize(text):
    """Lower-cased words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _ngrams(tokens, n):
    return Counter(zip(*(tokens[i:] for i in range(n))))


def gleu(candidate, reference):
    """Google's sentence GLEU: matched n-grams (n = 1..4) over the larger number of n-grams (Wu et al. 2016)."""
    a, b = (sum((_ngrams(tokenize(text), n) for n in range(1, 5)), Counter()) for text in (candidate, reference))
    return (a & b).total() / max(a.total(), b.total(), 1)


def _bleu(candidates, references, n, smooth):
    pairs = [(tokenize(c), tokenize(r)) for c, r in zip(candidates, references, strict=True)]
    matched, total = np.zeros(n), np.zeros(n)
    for c, r in pairs:
        for k in range(n):
            grams = _ngrams(c, k + 1)
            matched[k] += (grams & _ngrams(r, k + 1)).total()
            total[k] += max(grams.total(), 1)
    if matched[0] == 0:
        return 0.0
    matched[1:], total[1:] = matched[1:] + smooth, total[1:] + smooth
    length, reference_length = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    brevity = min(0.0, 1 - reference_length / length)
    return math.exp(brevity + np.log(matched / total).mean()) if matched.all() else 0.0


def bleu4(candidate, reference):
    """Sentence BLEU-4, one added to matches and totals of n > 1 (Lin & Och 2004; nltk's SmoothingFunction().method2)."""
    return _bleu([candidate], [reference], 4, smooth=1)


def corpus_bleu(candidates, references, n=4):
    """Corpus BLEU-n with uniform weights and no smoothing: 0 if any order has no match (Papineni et al. 2002)."""
    return _bleu(candidates, references, n, smooth=0)


def rouge_l(candidate, reference):
    """ROUGE-L F1: the longest common subsequence (Lin 2004), bit-parallel (Hyyro 2004) to stay fast on long texts."""
    a, b = tokenize(candidate), tokenize(reference)
    where = {}                              # token -> bit mask of its places in a
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    full = row = (1 << len(a)) - 1          # a zero bit marks a place where the subsequence grows
    for token in b:
        match = row & where.get(token, 0)
        row = (row + match | row - match) & full
    return 2 * (len(a) - row.bit_count()) / max(len(a) + len(b), 1)


# ------------------------------------------------------------------------------------------------- output format

TAGS = ("<think>", "</think>", "<report>", "</report>", "<answer>", "</answer>")


def parse_output(text, task, style):
    """(valid, thinking, answer) of a completion for task "report" | "grounding" and style "plain" | "tags" | "suffix".

    Valid: the whole text has the format, each tag once and in order, no other tag, and an answer that is not empty.
    Without </think> there is no answer in a thinking style; an invalid "tags" output still has one if exactly one closed
    block follows </think>, an invalid "suffix" output what follows its last </think>.
    """
    text = text.strip()
    counts = {tag: text.count(tag) for tag in TAGS}
    if style == "plain":
        return bool(text) and not any(counts.values()), "", text
    if not counts["</think>"]:
        return False, text, ""
    if style == "suffix":
        thinking, _, answer = text.rpartition("</think>")
        return sum(counts.values()) == 1 and bool(answer.strip()), thinking.strip(), answer.strip()
    start, end = ("<report>", "</report>") if task == "report" else ("<answer>", "</answer>")
    thinking, _, rest = text.partition("</think>")
    between, _, block = rest.partition(start)
    answer, _, after = block.partition(end)
    answer = answer.strip() if rest.count(start) == rest.count(end) == 1 and rest.find(start) < rest.find(end) else ""
    in_place = thinking.startswith("<think>") and not between.strip() and not after
    once = all(counts[tag] == (tag in ("<think>", "</think>", start, end)) for tag in TAGS)
    return in_place and once and bool(answer), thinking.removeprefix("<think>").strip(), answer


# ------------------------------------------------------------------------------------------------- boxes

NUMBER = r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
MAX_MATCHED = 64  # predicted boxes that enter the assignment; the rest count as false positives


def parse_boxes(text):
    """Every well-formed "[a, b, c, d]" in the text, as (x1, y1, x2, y2) floats in reading order; finite numbers only."""
    boxes = (tuple(map(float, numbers)) for numbers in BOX.findall(text))
    return [box for box in boxes if all(map(math.isfinite, box))]


def iou(a, b):
    """Intersection over union of two (x1, y1, x2, y2) boxes; an inverted or empty box has no area and IoU 0."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1, 0.0) * max(y2 - y1, 0.0)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - both
    return both / union if 0 < union < math.inf else 0.0


def _assign(cost):
    """The Hungarian method for an (n, m) cost, n <= m: the column of every row that minimises the total, O(n^2 m)."""
    n, m = cost.shape
    u, v = np.zeros(n + 1), np.zeros(m + 1)                     # potentials; row and column 0 are virtual
    row_of, previous = np.zeros(m + 1, int), np.zeros(m + 1, int)
    for row in range(1, n + 1):
        row_of[0], column = row, 0
        slack, visited = np.full(m + 1, np.inf), np.zeros(m + 1, bool)
        while row_of[column]:                                   # grow the shortest augmenting path to a free column
            visited[column] = True
            reduced = np.append(np.inf, cost[row_of[column] - 1] - u[row_of[column]] - v[1:])
            better = ~visited & (reduced < slack)
            slack[better], previous[better] = reduced[better], column
            column = int(np.where(visited, np.inf, slack).argmin())
            step = slack[column]
            u[row_of[visited]] += step
            v[visited] -= step
            slack[~visited] -= step
        while column:
            row_of[column], column = row_of[previous[column]], previous[column]
    columns = np.empty(n, int)
    columns[row_of[1:][row_of[1:] > 0] - 1] = np.flatnonzero(row_of[1:])
    return columns


def match_boxes(predicted, reference):
    """[(i, j, iou)]: the one-to-one assignment that maximises the total IoU, without its pairs of IoU 0."""
    if not predicted or not reference:
        return []
    overlap = np.array([[iou(a, b) for b in reference] for a in predicted])
    flip = len(predicted) > len(reference)
    pairs = enumerate(_assign(-(overlap.T if flip else overlap)))
    pairs = sorted((int(j), i) if flip else (i, int(j)) for i, j in pairs)
    return [(i, j, float(overlap[i, j])) for i, j in pairs if overlap[i, j] > 0]


def soft_f1(predicted, reference, mode="radvlm", match_empty=False):
    """Soft F1 of boxes. T = total IoU of the matched pairs, FP = predictions without a pair.

    "radvlm" (the paper's released code): 2 T / (n_ref + T + FP); "pq" (its figure): 2 T / (n_pred + n_ref). 0 when either
    side is empty; with match_empty 1 when both are. A repeated box is one more prediction. Only the first MAX_MATCHED
    predictions are matched, all others are false positives: a thousand boxes cost no time and earn nothing.
    """
    if not predicted or not reference:
        return float(match_empty and not predicted and not reference)
    pairs = match_boxes(predicted[:MAX_MATCHED], reference)
    total = sum(overlap for _, _, overlap in pairs)
    size = {"radvlm": len(reference) + total + len(predicted) - len(pairs), "pq": len(predicted) + len(reference)}
    return 2 * total / size[mode]


# ------------------------------------------------------------------------------------------------- reward table

def _on_labels(score):
    def reward(answers, examples, valid, cfg):
        generated, reference = extract_labels(answers), extract_labels([example.answer for example in examples])
        return score(generated, reference, cfg)
    return reward


def _on_text(score):
    return lambda answers, examples, valid, cfg: [score(a, example.answer) for a, example in zip(answers, examples)]


def _soft_f1_reward(answers, examples, valid, cfg):
    def says_nothing_there(answer):  # a missing answer or broken boxes must not pass for "no boxes"
        return bool(answer.strip()) and "[" not in answer and "]" not in answer
    return [soft_f1(parse_boxes(answer), list(example.boxes), cfg.soft_f1_mode,
                    cfg.match_empty and says_nothing_there(answer)) for answer, example in zip(answers, examples)]


REWARDS = {  # name -> f(N answers, N examples, (N,) valid format, config.rewards) -> N numbers
    "mccs": _on_labels(lambda generated, reference, cfg: mccs(generated, reference, cfg.mccs_margin)),
    "format": lambda answers, examples, valid, cfg: valid,
    "label_f1": _on_labels(lambda generated, reference, cfg: label_f1(generated, reference)),
    "gleu": _on_text(gleu),
    "bleu4": _on_text(bleu4),
    "rouge_l": _on_text(rouge_l),
    "soft_f1": _soft_f1_reward,
}
APPLIES = {"report": [name for name in REWARDS if name != "soft_f1"], "grounding": ["soft_f1", "format"]}


def check_rewards(rewards_cfg):
    """Raises ValueError, with the nearest valid name, if rewards.report or rewards.grounding names no reward of its task."""
    for task, names in APPLIES.items():
        for name in getattr(rewards_cfg, task):
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
                raise ValueError(f"rewards.{task}.{name}: no such reward for this task; did you mean {nearest!r}? "
                                 f"({', '.join(names)})")


def score_completions(completions, examples, rewards_cfg, style):
    """(total, parts) of N completions of N examples, tasks mixed: (N,) weighted sums, and every part by name.

    A part is (N,), nan on rows of a task that does not use it, and unweighted: a weight of 0 only logs it.
    """
    check_rewards(rewards_cfg)
    parsed = [parse_output(text, e.task, style) for text, e in zip(completions, examples, strict=True)]
    total, parts = np.zeros(len(examples)), {}
    for task in APPLIES:
        rows = [i for i, example in enumerate(examples) if example.task == task]
        answers, valid = [parsed[i][2] for i in rows], np.array([parsed[i][0] for i in rows], bool)
        for name, weight in getattr(rewards_cfg, task).items() if rows else ():
            values = np.asarray(REWARDS[name](answers, [examples[i] for i in rows], valid, rewards_cfg), float)
            if not np.isfinite(values).all():
                raise ValueError(f"reward {name!r} is not finite for example {examples[rows[int(np.argmin(np.isfinite(values)))]].id!r}")
            parts.setdefault(name, np.full(len(examples), np.nan))[rows] = values
            total[rows] += weight * values
    return total, parts
