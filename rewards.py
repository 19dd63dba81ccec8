"""Text and boxes in, numbers out: the rewards of both papers, and the label extractors under them.

In order of appearance
  LABELS, extract_labels        a rule-based CheXpert labeler: report text -> 14 states
  chexbert                      the same from a CheXbert checkpoint
  mccs, label_f1                rewards on label vectors: MRG-R1's margin-based cosine, F1 of the positives
  tokenize, ngrams, gleu, bleu4, rouge_l, bertscore      text overlap
  parse_output                  (valid, thinking, answer) of a completion in the three output formats
  parse_boxes, iou, match_boxes, soft_f1          grounding
  REWARDS, check_rewards, score_completions       the reward table; a batch of completions -> weighted totals
  POLICIES, audit               what the rewards pay to policies that cheat

  python rewards.py label REPORTS.csv -o LABELS.csv [--evidence]      # in the CheXpert labeler's format
  python rewards.py audit config.yaml [key=value ...]

Whatever a model writes, nothing here raises, and every regular expression takes linear time. torch is imported where a
network runs, in chexbert and bertscore; everything else does without.
"""

import argparse
import csv
import difflib
import math
import os
import re
import runpy
import sys
import traceback
from bisect import bisect
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from data import LABELS, parse_boxes, parse_output
from runtime.config import InputError

BLANK, POSITIVE, NEGATIVE, UNCERTAIN = 0, 1, 2, 3
CHEXBERT_HEADS = (
    *LABELS[1:3],
    "Lung Opacity",
    "Lung Lesion",
    *LABELS[5:],
    "No Finding",
)  # its own order
CACHED = 1 << 14  # texts whose CheXbert labels are kept
MAX_MATCHED = 64  # predicted boxes that enter the assignment; further ones are false positives


# Tables of the labeler: regular expressions on lower-cased text, tried at the start of a word. A stem without \b takes
# any ending; gaps are bounded, which keeps matching linear.
MENTIONS = {  # label: what names it, and, if need be, what only looks like it
    "Enlarged Cardiomediastinum": (
        r"(?:cardio)?mediastinal (?:widen|enlarge|prominence)|(?:widened|prominent|wide) (?:superior )?mediastin",
    ),
    "Cardiomegaly": (
        r"cardiomegaly|cardiac enlargement|enlarge(?:d|ment of the) (?:heart|cardiac)",
    ),
    "Lung Lesion": (
        r"mass(?:es)?\b|nodul|lump\b|(?:cavitary|lung|pulmonary|parenchymal) lesion|carcinoma|neoplas|"
        r"tumou?r|malignan|metasta|cancer",
        r"(?:breast|body) mass|mass effect|nipple",
    ),
    "Lung Opacity": (
        r"opaci|(?:decreased|reduced) translucency|(?:increased|hazy|patchy|streaky) densit|infiltrat|haziness|"
        r"scar(?:s|red|ring)?\b|air ?-?space (?:\w+ )?(?:disease|process)|reticul(?:ation|ar (?:pattern|marking))|interstitial (?:\w+ )?"
        r"(?:marking|pattern|lung|promin|thicken|disease|change)|(?:peri)?bronchial (?:wall )?(?:thicken|cuff)",
    ),
    "Edema": (
        r"o?edema|(?:heart|cardiac) failure|chf\b|(?:vascular|venous|pulmonary) congestion|congestive|kerley|"
        r"cephalization|vascular (?:indistinctness|prominence)",
        r"(?:soft tissue|peripheral|ankle|leg) edema",
    ),
    "Consolidation": (r"consolidat",),
    "Pneumonia": (
        r"(?:broncho)?pneumonia|infecti|pneumonitis",
        r"(?:granulomatous|prior|previous|old) (?:\w+ )?infec",
    ),
    "Atelectasis": (
        r"(?:micro)?ateleca?t|collapse|volume loss",
        r"collapsed? (?:of (?:the |a )?)?vertebra",
    ),
    "Pneumothorax": (r"(?:hydro)?pneumothora",),
    "Pleural Effusion": (
        r"effusion|pleural fluid|hydrothorax|blunt\w* of (?:\w+ ){0,4}costophrenic|"
        r"costophrenic (?:\w+ ){0,2}blunt|blunted (?:\w+ ){0,2}costophrenic",
        r"(?:pericardial|joint) effusion",
    ),
    "Pleural Other": (
        r"pleural (?:\w+ ){0,2}(?:thickening|scar|plaque|calcif|mass|abnormalit)|fibrothorax|fibrosis|"
        r"pleur(?:al|o)[ -]?(?:parenchymal|peripheral|based)|thickening of (?:\w+ ){0,2}pleura|"
        r"(?:bi)?apical (?:cap|thickening)",
    ),
    "Fracture": (r"fractur|compression deformit|(?:rib|clavic\w+|wedge) deformit",),
    "Support Devices": (
        r"pace(?:r\b|maker)|(?:\w+ )?(?:lines?|tubes?|tubing)\b|picc|valve|(?:porta)?catheter|hardware|arthroplast|"
        r"defib|drain\b|icd\b|device|plates?\b|screw|cannula|coil|mediport|port\b|wires?\b|shunt|"
        r"leads?\b|stimulator|generator|tracheostomy|xxxx-a-xxxx|"
        r"tips?\b (?:[\w-]+ ){0,6}(?:svc|cavoatrial|carina|atri|ventric)",
        r"(?:air|fat|mid|base|(?:kerley )?b|midclavicular|fissur\w*|pleural|paratracheal|fracture|lung)[ -]lines?\b|"
        r"end ?plate|plate ?-?like",
    ),
}
ANATOMY = {  # what has a size: normal is a negative, enlarged a positive
    "Enlarged Cardiomediastinum": (
        r"(?:cardio ?-?)?mediastin|contours?\b|cardiopulmonary silhouette",
        r"mediastinal (?:and hilar )?lymph|hilar contour",
    ),
    "Cardiomegaly": (
        r"heart\b|cardiac (?:silhouette|size|contour|shadow|and)|cardio(?: ?-?mediastin|pulmonary silh)",
    ),
}
NORMAL = r"normal|unremarkable|within|clear|intact|maintained|upper limit|not? (?:\w+ ){0,3}(?:enlarge|widen|promin)"
ENLARGED = (
    r"not (?:\w+ )?normal|above normal|borderline|enlarge|prominent|increased|widen|large\b|big\b"
)
OTHER = (  # findings outside the 13 observations: they only cancel No Finding
    r"granulom|scolio|kypho|degenerat|spondyl|arthri|osteophyt|hyper(?:inflat|expan|lucen|aerat)|emphysem|copd|chronic|"
    r"scar|hernia|tortuo|atheroscl|ectasia|aneurysm|calcif|fibro|elevat|eventrat|bronchiect|osteopen|deformit|flatten"
)
# Cues before a mention, then cues after it. The first that fits is taken: "not excluded" is a hedge and no negation.
NO_CUE = r"(?:no|without) (?:\w+ ){0,2}(?:doubt|question|change|increase|decrease)|not (?:\w+ )?(?:change|only|increas|decreas)"
HEDGE = (
    r"(?:can ?not|can't|could not|difficult to|not|never|to) (?:\w+ ){0,2}(?:exclude|rule out|be excluded)|may\b|"
    r"might|could|possib|probab|question|suspect|suspicious (?:for|of)|concern|worrisome|suggest|likely|vs\b|"
    r"versus|presum|equivocal|differential|potential|perhaps|apparent|rule out|"
    r"(?:evaluat|assess|correlat)\w* (?:\w+ )?for"
)
NEGATION = (
    r"no\b|not\b|without|free (?:of|from)|negative for|absence of|absent|never|neither|nor\b|denies|resolution of|"
    r"clear of|rather than|ruled? out|exclude[sd]?|remov(?:al|ed)"
)
HEDGE_AFTER = (
    r"(?:not|cannot be) (?:\w+ )?(?:excluded|ruled)|versus|vs\b|(?:is|are) (?:\w+ )?limited|consideration|"
    r"in the differential|(?:is|are) (?:\w+ ){0,2}(?:possible|suspected|questioned|difficult)"
)
NEGATION_AFTER = (
    r"(?:is|are|was|were|has|have|been) (?:\w+ )?(?:not\b|no longer|cleared|absent|excluded|removed)|"
    r"none\b|absent|resolved|not (?:\w+ )?(?:seen|identified|present|visuali)|unlikely|negative"
)
MASK = re.compile(r"\bx{3,}\b|_{2,}")  # a word removed by de-identification
ASCII = str.maketrans({0x2019: "'"} | dict.fromkeys(range(0x2010, 0x2015), "-"))
SPACES, LINE_HYPHEN = re.compile(r"[^\S\n]+"), re.compile(r"(?<=\w-) ?\n ?(?=\w)")
ASKED = re.compile(  # sections on what was asked, not on what was seen, up to the next section or paragraph
    r"(?:^|(?<=[\n.])|(?<=[\n.] ))(?:indications?|(?:clinical )?(?:history|information)|reason for (?:the )?(?:exam|study)\w*):"
    r".*?(?=\b(?:exam\w*|comparison|technique|findings?|impressions?|conclusions?|report)\s?:|\n ?\n|\Z)",
    re.S,
)
NO_CLAIM = re.compile(
    r"\b(?:evaluation|assessment) (?:for|of) (?:\w+ ){1,4}(?:is |was )?(?:\w+ )?limited"
)
SENTENCE_END = re.compile(r"[.;!?]+(?!\d)|\n\s*\n|\n(?=[-*\u2022]|\d+[.)])")
CLAUSE_END = re.compile(  # where cues stop: a contrast, or a conjunction or comma that opens a new statement
    r"\b(?:but|however|although|though|which|that|otherwise|except|aside|apart|while|whereas|given|(?:and|with) (?="
    r"(?:there|the|mild|small|bilateral|is|are|has|have|(?:stable|unchanged)(?! heart| cardi(?:ac|omed)| mediast))\b))|"
    r", (?=(?:and )?(?:there|the|stable|mild|small|minimal|moderate|severe|persistent|bilateral|unchanged|old|healed|"
    r"possibl\w*|likely|probabl\w*|heart|cardiac|lungs?|with)\b)"
)


def _compiled(table):
    return [
        (
            LABELS.index(label),
            re.compile(rf"\b(?:{''.join(f'{d}|' for d in decoy)}(?P<it>{pattern}))"),
        )
        for label, (pattern, *decoy) in table.items()
    ]


_MENTIONS, _ANATOMY, _OTHER = _compiled(MENTIONS), _compiled(ANATOMY), re.compile(rf"\b(?:{OTHER})")
_BEFORE = re.compile(rf"\b(?:(?P<skip>{NO_CUE})|(?P<hedge>{HEDGE})|(?P<no>{NEGATION}))")
_AFTER = re.compile(rf"\b(?:(?P<hedge>{HEDGE_AFTER})|(?P<no>{NEGATION_AFTER}))")
_SIZE = re.compile(
    rf"\b(?:(?P<normal>{NORMAL})|(?P<large>{ENLARGED})|(?P<same>stable|unchanged|similar))"
)
_SIZE_STATE = {
    "normal": NEGATIVE,
    "large": POSITIVE,
    "same": UNCERTAIN,
}  # "stable" hedges, as in the CheXpert labeler


@lru_cache(maxsize=1 << 14)
def _clause_mentions(clause):
    """[(label index, state, phrase, cue)] of every mention; a finding outside the 13 observations is (0, NEGATIVE, .., ..)."""
    first, last = {}, {}  # the first cue before, and the last cue after, that begin to act
    for cue in _BEFORE.finditer(clause):
        first.setdefault(cue.lastgroup, cue)
    for cue in _AFTER.finditer(clause):
        last[cue.lastgroup] = cue

    def judged(mention):
        """(state, cue) by the first cue in this order that acts on the mention."""
        for kind, state in ("no", NEGATIVE), ("hedge", UNCERTAIN):
            if kind in first and first[kind].end() <= mention.start():
                return state, first[kind][0]
        for kind, state in ("hedge", UNCERTAIN), ("no", NEGATIVE):
            if kind in last and last[kind].start() >= mention.end():
                return state, last[kind][0]
        return POSITIVE, ""

    mentions = [
        (label, m) for label, pattern in _MENTIONS for m in pattern.finditer(clause) if m["it"]
    ]
    found = [(label, state, m[0], cue) for label, m in mentions for state, cue in [judged(m)]]
    found += [(0, NEGATIVE, m[0], "") for m in _OTHER.finditer(clause) if judged(m)[0] != NEGATIVE]
    sizes = list(_SIZE.finditer(clause))
    sizes = [size for size in sizes if size.lastgroup != "same"] or sizes
    starts = [size.start() for size in sizes]
    for label, pattern in _ANATOMY if sizes else ():
        for part in filter(lambda match: match["it"], pattern.finditer(clause)):
            place = bisect(starts, part.start())
            nearest = min(
                sizes[max(place - 1, 0) : place + 1],
                key=lambda size: max(size.start() - part.end(), part.start() - size.end()),
            )
            if (
                nearest.lastgroup != "same"
                or LABELS[label] != "Cardiomegaly"
                or "mediast" not in part[0]
            ):
                hedged = nearest.lastgroup == "large" and judged(part)[0] == UNCERTAIN
                found.append(
                    (
                        label,
                        UNCERTAIN if hedged else _SIZE_STATE[nearest.lastgroup],
                        part[0],
                        nearest[0],
                    )
                )
    return found


def evidence(text):
    """[(label, state, phrase, cue, clause)] of every mention in a report, in order; what extract_labels decides on."""
    text = ASKED.sub("\n\n", LINE_HYPHEN.sub("", SPACES.sub(" ", text.lower().translate(ASCII))))
    clauses = [
        clause
        for sentence in SENTENCE_END.split(MASK.sub("xxxx", text))
        for clause in CLAUSE_END.split(NO_CLAIM.sub("", " ".join(sentence.split())))
    ]
    return [(*mention, clause) for clause in clauses for mention in _clause_mentions(clause)]


@lru_cache(maxsize=1 << 14)
def _labels(text):
    found = [set() for _ in LABELS]
    for label, state, *_ in evidence(text):
        found[label].add(state)
    states = [
        next((state for state in (POSITIVE, UNCERTAIN, NEGATIVE) if state in seen), BLANK)
        for seen in found
    ]
    abnormal = found[0] or POSITIVE in states[1:-1] or UNCERTAIN in states[1:-1]
    states[0] = POSITIVE if re.search(r"\w", text) and not abnormal else BLANK
    return tuple(states)


def extract_labels(texts):
    """(N, 14) int8 states, in the order of LABELS, of N report texts.

    Phrases name observations; cues in the same clause negate or hedge them; over all mentions positive > uncertain >
    negative (the CheXpert labeler, Irvin et al. 2019). No Finding: nothing positive or uncertain, devices aside, and
    none of OTHER. A text without a word has no label at all.
    """
    return np.array([_labels(text) for text in texts], np.int8).reshape(-1, len(LABELS))


def label_file(path, output, show_evidence=False):
    """Labels a CSV file of one report per row as the CheXpert labeler does: its columns, 1.0 / 0.0 / -1.0 / empty.

    A first row that says "Reports" or "Report Impression" is a header. Returns a line for every mention of an observation
    (show_evidence), and one that sums up. InputError: a bad file.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: cannot read ({getattr(error, 'strerror', None) or error})"
        ) from None
    rows = (
        rows[1:]
        if rows
        and rows[0]
        and rows[0][0].strip().lower() in ("reports", "report", "report impression")
        else rows
    )
    if wide := [n for n, row in enumerate(rows, 1) if len(row) > 1]:
        raise InputError(
            f"{path}: report {wide[0]} has {len(rows[wide[0] - 1])} cells; put quotes around a report with commas"
        )
    reports = [row[0] if row else "" for row in rows]
    values = {BLANK: "", POSITIVE: "1.0", NEGATIVE: "0.0", UNCERTAIN: "-1.0"}
    table = [("Reports", *LABELS)] + [
        (report, *(values[state] for state in states))
        for report, states in zip(reports, extract_labels(reports).tolist())
    ]
    try:
        with open(f"{output}.new", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
        os.replace(f"{output}.new", output)
    except OSError as error:
        raise InputError(f"{output}: cannot write ({error.strerror})") from None
    states = ("blank", "positive", "negative", "uncertain")
    lines = [
        f"{n} | {LABELS[label]} | {states[state]} | {phrase}"
        + (f" <- {cue}" if cue else "")
        + f" | {clause.strip()}"
        for n, report in enumerate(reports if show_evidence else (), 1)
        for label, state, phrase, cue, clause in evidence(report)
    ]
    return "\n".join([*lines, f"{output}: labels of {len(reports)} reports"])


def _padded(texts, tokenizer, longest, net):
    """Token ids (n, T) and their mask (n, T), without lone surrogates: tokenizers refuse them."""
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    inputs = tokenizer(
        texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
    ).to(net.device)
    return inputs["input_ids"], inputs["attention_mask"]


@lru_cache
def chexbert(path, bert):
    """The function texts -> (N, 14) int8 states, in the order of LABELS, of CheXbert (Smit et al. 2020).

    BERT with a linear head per observation on the [CLS] vector; the classes of a head are BLANK, POSITIVE, NEGATIVE,
    UNCERTAIN, of No Finding the first two. As in its label.py, whitespace becomes single spaces, and what exceeds its
    512 positions is cut before [SEP]. `path`: chexbert.pth as published, or another size of network in its format;
    `bert`: the folder or hub id of its tokenizer. Labels are kept by text. Raises InputError.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
        state = {key.removeprefix("module."): value for key, value in state.items()}
        words, hidden = state["bert.embeddings.word_embeddings.weight"].shape
        config = BertConfig(
            vocab_size=words,
            hidden_size=hidden,
            num_attention_heads=max(hidden // 64, 1),
            num_hidden_layers=1
            + max(int(key.split(".")[3]) for key in state if key.startswith("bert.encoder.layer.")),
            intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.bias"]),
            max_position_embeddings=len(state["bert.embeddings.position_embeddings.weight"]),
        )
        heads = torch.nn.ModuleList(torch.nn.Linear(hidden, classes) for classes in [4] * 13 + [2])
        net = torch.nn.ModuleDict(
            {"bert": BertModel(config, add_pooling_layer=False), "linear_heads": heads}
        )
        if missing := net.load_state_dict(
            state, strict=False
        ).missing_keys:  # it has more: a pooler, position_ids
            raise KeyError(missing[0])
    except Exception as error:
        why = {
            "FileNotFoundError": "no such file",
            "UnpicklingError": "it does not hold weights alone",
            "KeyError": f"it lacks {error}",
        }.get(type(error).__name__, f"{error!r:.160}")
        raise InputError(
            f"rewards.chexbert={path!r}: not a CheXbert checkpoint ({why}); give chexbert.pth as "
            "published (github.com/stanfordmlgroup/CheXbert)"
        ) from None
    try:
        tokenizer = BertTokenizer.from_pretrained(bert)
        if (
            len(tokenizer) != words
        ):  # where there is no vocabulary, from_pretrained makes up one of 5 words
            raise ValueError(f"{len(tokenizer)} words instead of {words}")
    except Exception as error:
        raise InputError(
            f"rewards.bert={bert!r}: no tokenizer for rewards.chexbert={path!r} there ({error!r:.160}); "
            "give a folder with bert-base-uncased's, or its hub id"
        ) from None
    net.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    columns, known = [CHEXBERT_HEADS.index(label) for label in LABELS], {}

    @torch.no_grad()
    def label(texts):
        texts = [" ".join(text.split()) for text in texts]
        new = sorted(
            dict.fromkeys(text for text in texts if text not in known), key=len
        )  # little padding
        for batch in (new[i : i + 64] for i in range(0, len(new), 64)):
            ids, mask = _padded(batch, tokenizer, config.max_position_embeddings, net["bert"])
            first = net["bert"](ids, attention_mask=mask).last_hidden_state[:, 0]  # (n, hidden)
            states = torch.stack(
                [head(first).argmax(1) for head in heads], 1
            )  # (n, 14), in its own order
            known.update(zip(batch, states[:, columns].tolist()))
        states = np.array([known[text] for text in texts], np.int8).reshape(-1, len(LABELS))
        for text in list(known)[:-CACHED]:
            del known[text]
        return states

    return label


def mccs(generated, reference, margin=0.5):
    """(N,) margin-based CheXbert cosine similarity, max((cos - m) / (1 - m), 0), of (N, 14) labels (MRG-R1).

    Vectors leave out No Finding; positive and uncertain are +1, negative -1, blank 0. Two zero vectors score 1
    (the reward `mccs` pays nothing for a text without a word).
    """
    value = np.array([0.0, 1.0, -1.0, 1.0])  # indexed by state
    a, b = value[np.asarray(generated)[:, 1:]], value[np.asarray(reference)[:, 1:]]
    product = (a * a).sum(1) * (b * b).sum(1)
    cosine = (a * b).sum(1) / np.sqrt(np.maximum(product, 1))
    score = np.where(product > 0, np.maximum((cosine - margin) / (1 - margin), 0), 0)
    return np.where(~a.any(1) & ~b.any(1), 1.0, score)


def label_f1(generated, reference):
    """(N,) F1 of the positive or uncertain observations without No Finding. Without any on either side it is 0, as in
    scikit-learn: normal studies then have no say, which weighs against the pull of MCCS to the normal template."""
    a, b = (
        np.isin(np.asarray(labels)[:, 1:], (POSITIVE, UNCERTAIN))
        for labels in (generated, reference)
    )
    return 2 * (a & b).sum(1) / np.maximum(a.sum(1) + b.sum(1), 1)


def tokenize(text):
    """Lower-cased words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens, n):
    """How often each n-gram occurs: a Counter of tuples."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def gleu(candidate, reference):
    """Google's sentence GLEU: matching n-grams, n = 1..4, over the larger number of n-grams (Wu et al. 2016)."""
    a, b = (
        sum((ngrams(tokenize(text), n) for n in range(1, 5)), Counter())
        for text in (candidate, reference)
    )
    return (a & b).total() / max(a.total(), b.total(), 1)


def bleu4(candidate, reference):
    """Sentence BLEU-4 with add-one smoothing above unigrams (Lin & Och 2004; nltk's SmoothingFunction().method2)."""
    a, b = tokenize(candidate), tokenize(reference)
    if not set(a) & set(b):
        return 0.0
    grams = [(ngrams(a, n), ngrams(b, n), n > 1) for n in range(1, 5)]
    precisions = [
        ((x & y).total() + smooth) / (max(x.total(), 1) + smooth) for x, y, smooth in grams
    ]
    return math.exp(min(0, 1 - len(b) / len(a)) + sum(map(math.log, precisions)) / 4)


def rouge_l(candidate, reference):
    """ROUGE-L F1 (Lin 2004); the longest common subsequence is bit-parallel (Hyyro 2004), fast on any length."""
    a, b = sorted((tokenize(candidate), tokenize(reference)), key=len)
    places = {}  # token -> bit mask of its places in a
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    full = row = (1 << len(a)) - 1  # a zero bit is a place where the subsequence grew
    for token in b:
        match = row & places.get(token, 0)
        row = (row + match | row - match) & full
    return 2 * (len(a) - row.bit_count()) / max(len(a) + len(b), 1)


def iou(a, b):
    """Intersection over union of two (x1, y1, x2, y2) boxes; an empty or inverted box has area 0."""

    def area(x1, y1, x2, y2):
        return max(x2 - x1, 0.0) * max(y2 - y1, 0.0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - both
    return both / union if union > 0 else 0.0  # nan, where areas overflow, is not > 0


def _assign(cost):
    """The row given to each column (-1: none) in the cheapest assignment of all n rows, n <= m: Hungarian, O(n^2 m)."""
    n, m = cost.shape
    u, v, row_of = (
        np.zeros(n),
        np.zeros(m + 1),
        np.full(m + 1, -1),
    )  # potentials; column m is where each path starts
    for row in range(n):
        row_of[m], column = row, m
        slack, previous, visited = (
            np.full(m + 1, np.inf),
            np.zeros(m + 1, int),
            np.zeros(m + 1, bool),
        )
        while row_of[column] >= 0:  # grow the cheapest alternating path to a free column
            visited[column] = True
            reduced = np.append(cost[row_of[column]] - u[row_of[column]] - v[:m], np.inf)
            better = ~visited & (reduced < slack)
            slack[better], previous[better] = reduced[better], column
            column = np.where(visited, np.inf, slack).argmin()
            step = slack[column]
            u[row_of[visited]] += step
            v[visited] -= step
            slack[~visited] -= step
        while column != m:  # flip it
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    return row_of[:m]


def match_boxes(predicted, reference):
    """[(i, j, iou)] by i: the one-to-one assignment with the largest total IoU, without pairs of IoU 0."""
    if not predicted or not reference:
        return []
    overlap = np.array([[iou(a, b) for b in reference] for a in predicted])
    if len(predicted) <= len(reference):
        pairs = ((i, j) for j, i in enumerate(_assign(-overlap)))
    else:
        pairs = enumerate(_assign(-overlap.T))
    return sorted(
        (int(i), int(j), float(overlap[i, j]))
        for i, j in pairs
        if min(i, j) >= 0 and overlap[i, j] > 0
    )


def soft_f1(predicted, reference, mode="radvlm", match_empty=False):
    """Soft F1 of boxes, with T = total IoU of the matched pairs and FP = predictions without a pair.

    "radvlm" (the released code): 2 T / (n_ref + T + FP); "pq" (the paper's figure): 2 T / (n_pred + n_ref). 0 if either
    side is empty; 1 if both are and match_empty. Only the first MAX_MATCHED predictions can match: ten thousand boxes
    cost no time and are ten thousand false positives.
    """
    if not predicted or not reference:
        return float(match_empty and not predicted and not reference)
    pairs = match_boxes(predicted[:MAX_MATCHED], reference)
    total = sum(overlap for _, _, overlap in pairs)
    size = {
        "radvlm": len(reference) + total + len(predicted) - len(pairs),
        "pq": len(predicted) + len(reference),
    }
    return 2 * total / size[mode]


def says_nothing_there(answer):
    """Words and no brackets: a missing answer or broken boxes must not pass for "there is none"."""
    return bool(re.search(r"\w", answer)) and not re.search(r"[\[\]]", answer)


# The reward table: f(batch, config.rewards) -> one number per completion.


@dataclass
class Batch:
    """N completions of one task, taken apart."""

    completions: list  # whole texts
    token_ids: list  # their tokens (of words, where a text has none)
    valid: np.ndarray  # (N,) do they have the format?
    answers: list  # the report, or the text with the boxes
    examples: list  # data.Example: the references


def labeler(cfg):
    """The function texts -> (N, 14) states that config.rewards.labeler names. Raises InputError."""
    return chexbert(cfg.chexbert, cfg.bert) if cfg.chexbert else extract_labels


def _on_labels(score):
    def reward(batch, cfg):
        says_something = np.array(
            [re.search(r"\w", answer) is not None for answer in batch.answers], bool
        )
        label = labeler(cfg)
        scores = score(label(batch.answers), label([e.answer for e in batch.examples]), cfg)
        return np.where(says_something, scores, 0)  # CheXbert may read labels in an empty text

    return reward


def _on_text(score):
    return lambda batch, cfg: [
        score(a, e.answer) for a, e in zip(batch.answers, batch.examples, strict=True)
    ]


def _soft_f1_reward(batch, cfg):
    return [
        soft_f1(
            parse_boxes(answer),
            example.boxes,
            cfg.soft_f1_mode,
            cfg.match_empty and says_nothing_there(answer),
        )
        for answer, example in zip(batch.answers, batch.examples)
    ]


def overlong(length, start, end):
    """0 up to `start` tokens, then down to -1 at `end` (DAPO's soft overlong punishment, Yu et al. 2025, eq. 13)."""
    return -min(max(length - start, 0) / max(end - start, 1), 1.0)


REWARDS = {
    "mccs": _on_labels(
        lambda generated, reference, cfg: mccs(generated, reference, cfg.mccs_margin)
    ),
    "label_f1": _on_labels(lambda generated, reference, cfg: label_f1(generated, reference)),
    "gleu": _on_text(gleu),
    "bleu4": _on_text(bleu4),
    "rouge_l": _on_text(rouge_l),
    "soft_f1": _soft_f1_reward,
    "format": lambda batch, cfg: batch.valid,
    "overlong": lambda batch, cfg: [
        overlong(len(ids), cfg.overlong_start, cfg.overlong_end) for ids in batch.token_ids
    ],
}
APPLIES = {
    "report": [name for name in REWARDS if name != "soft_f1"],
    "grounding": ["soft_f1", "format", "overlong"],
}


@lru_cache
def external_reward(name):
    """The function that "path/to/file.py:function" names. Raises InputError."""
    path, _, function = name.rpartition(":")
    if not os.path.isfile(path):
        raise InputError(f"rewards: {name}: no file {path}")
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # it may import files beside it
    try:
        namespace = runpy.run_path(path)
    except Exception as error:
        raise InputError(f"rewards: {name}: {path} fails with {error!r}") from None
    if function not in namespace:
        raise InputError(f"rewards: {name}: no function {function!r} in {path}")
    return namespace[function]


def call_external(name, batch):
    """(N,) values of a reward of the user's, called as TRL calls one.

    It gets prompts, completions, completion_ids and the columns id, task, question, answer (parsed from the completion),
    reference, boxes, label, patient, each a list of N, and returns N numbers; None: does not apply (nan here). What raises
    or is not finite stops the run.
    """
    columns = {
        key: [getattr(e, key) for e in batch.examples]
        for key in ("id", "task", "question", "boxes", "label", "patient")
    }
    try:
        given = external_reward(name)(
            prompts=columns["question"],
            completions=batch.completions,
            completion_ids=batch.token_ids,
            answer=batch.answers,
            reference=[e.answer for e in batch.examples],
            **columns,
        )
        values = np.array([math.nan if value is None else value for value in given], float)
        if values.shape != (len(batch.examples),):
            raise ValueError(f"{values.shape} values for {len(batch.examples)} completions")
        failed = ~np.isfinite(values) & np.array([value is not None for value in given])
        if failed.any():
            raise ValueError(
                f"{values[failed][0]} for completion {batch.completions[failed.argmax()]!r}"
            )
    except Exception as error:
        own = [
            f.lineno
            for f in traceback.extract_tb(error.__traceback__)
            if f.filename == name.rpartition(":")[0]
        ]
        line = (
            f", line {own[-1]}"
            if own
            else ", which returns a number per completion and ends its arguments with **columns"
        )
        raise InputError(
            f"reward {name}{line}: {error!r} (a reward that may fail catches its errors and returns 0 or None)"
        ) from None
    return values


def check_rewards(rewards_cfg):
    """Raises InputError for a reward unknown to its task, with the nearest valid name, or a network that cannot load."""
    for task, names in APPLIES.items():
        for name in getattr(rewards_cfg, task):
            if ".py:" in name:
                external_reward(name)
            elif name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
                raise InputError(
                    f"rewards.{task}.{name}: no such reward for this task; did you mean {nearest!r}? "
                    f"(there are {', '.join(names)}, and your own: path/to/file.py:function)"
                )
    labeler(rewards_cfg)


def score_completions(completions, examples, rewards_cfg, style, token_ids=None):
    """(total, parts) of N completions: (N,) weighted sums, and name -> (N,) unweighted rewards.

    Tasks may be mixed: a part is nan where it does not apply to the row. A weight of 0 only logs a part. Raises
    InputError if a reward is not finite.
    """
    parsed = [
        parse_output(text, e.task, style) for text, e in zip(completions, examples, strict=True)
    ]
    token_ids = token_ids or [tokenize(text) for text in completions]
    total, parts = np.zeros(len(examples)), {}
    for task in APPLIES:
        rows = [i for i, example in enumerate(examples) if example.task == task]
        batch = Batch(
            [completions[i] for i in rows],
            [token_ids[i] for i in rows],
            np.array([parsed[i][0] for i in rows], bool),
            [parsed[i][2] for i in rows],
            [examples[i] for i in rows],
        )
        for name, weight in getattr(rewards_cfg, task).items() if rows else ():
            if ".py:" in name:
                values = call_external(name, batch)
            else:
                values = np.asarray(REWARDS[name](batch, rewards_cfg), float)
                if not np.isfinite(values).all():
                    raise InputError(
                        f"reward {name!r} gave a value that is not finite: {values[~np.isfinite(values)][0]}"
                    )
            parts.setdefault(name, np.full(len(examples), np.nan))[rows] = values
            total[rows] += weight * np.nan_to_num(values)
    return total, parts


# The audit: what rewards pay to policies that cheat, each a function of all references and a random generator.
# Policies find their sentences with extract_labels, whichever labeler the rewards read with.

FINDINGS = {label: label.lower() for label in LABELS[1:]} | {  # as policies name them
    "Enlarged Cardiomediastinum": "mediastinal widening",
    "Pleural Other": "pleural thickening",
    "Support Devices": "pacemaker",
}
NORMAL_REPORT = (
    "The heart size and mediastinal contours are normal. The lungs are clear. There is no focal "
    "consolidation, pleural effusion, or pneumothorax. No acute bony abnormality."
)
WHAT = r"((?:(?! (?:is|are|which|that|there)\b).)+)"  # no further verb: the words around it can change places
PARAPHRASES = (  # the first that fits a lower-case sentence rewords it
    (rf"^there (is|are) (no )?(?:evidence of )?{WHAT}\.$", r"\2\3 \1 seen."),
    (rf"^(no )?(?:evidence of )?{WHAT} (is|are) (?:seen|present|identified)\.$", r"there \3 \1\2."),
    (r"^no evidence of ", "no "),
    (r"^no ", "no evidence of "),
    (r"^possible ", "there may be "),
    (r"^there may be ", "possible "),
    (r"size is normal\.$", "is normal in size."),
    (r"normal in size\.$", "of normal size."),
    (r"lungs are clear(?! of)", "lungs appear clear"),
    (r"\bwithin normal limits|\bunremarkable", "normal"),
)
OTHER_REWARDS = {  # column: rewards.report, and rewards.mccs_margin where it is not the configured one
    "mccs": [{"mccs": 1}],
    "mccs, margin 0": [{"mccs": 1}, 0],
    "mccs, margin .7": [{"mccs": 1}, 0.7],
    "label_f1": [{"label_f1": 1}],
    "mccs .3, label_f1 .7": [{"mccs": 0.3, "label_f1": 0.7}],
    "gleu": [{"gleu": 1}],
}


def sentences(text):
    """The sentences of a report, cut where the label extractor cuts them, each with a full stop."""
    return [part.strip() + "." for part in SENTENCE_END.split(text) if part.strip()]


def without(text, *states):
    """A report without the sentences in which one of the 13 observations has one of the `states`."""
    parts = sentences(text)
    dropped = np.isin(extract_labels(parts)[:, 1:], states).any(1)
    return " ".join(part for part, drop in zip(parts, dropped) if not drop)


def reword(text, table):
    """A report, each sentence changed by the first (pattern, replacement) of the table that fits it."""
    parts = [part.lower() for part in sentences(text)]
    parts = [
        next((re.sub(old, new, part) for old, new in table if re.search(old, part)), part)
        for part in parts
    ]
    return " ".join(part.capitalize() for part in parts)


def state_all(form, states=(POSITIVE,) * len(FINDINGS)):
    """A sentence of a form like "There is {}." about each finding that is positive or uncertain."""
    found = np.isin(states, (POSITIVE, UNCERTAIN))
    return " ".join(form.format(name) for name, there in zip(FINDINGS.values(), found) if there)


def exchange(texts, rng):
    """Every study gets the report of another one: all move on by one along a random circle."""
    order = rng.permutation(len(texts))
    return [texts[i] for i in np.roll(order, 1)[np.argsort(order)]]


def _each(edit):
    return lambda texts, rng: [edit(text) for text in texts]


POLICIES = {  # name: (what it is, the policy)
    "reference": ("right", _each(str)),
    "sentences shuffled": (
        "right",
        lambda texts, rng: [" ".join(rng.permutation(sentences(text))) for text in texts],
    ),
    "paraphrase": ("right", _each(lambda text: reword(text, PARAPHRASES))),
    "empty": ("wrong, blind, omits", _each(lambda text: "")),
    "always normal": ("wrong, blind, omits", _each(lambda text: NORMAL_REPORT)),
    "most frequent report": (
        "wrong, blind",
        lambda texts, rng: [max(texts, key=Counter(texts).get)] * len(texts),
    ),
    "another study's report": ("wrong, blind", exchange),
    "every finding listed": ("wrong, blind", _each(lambda text: state_all("There is {}."))),
    "every finding negated": (
        "wrong, blind, omits",
        _each(lambda text: state_all("There is no {}.")),
    ),
    "positives dropped": ("wrong, omits", _each(lambda text: without(text, POSITIVE, UNCERTAIN))),
    "negations dropped": ("wrong", _each(lambda text: without(text, NEGATIVE))),
    "first sentence 50 times": ("wrong", _each(lambda text: " ".join(sentences(text)[:1] * 50))),
    "findings contradicted": (
        "wrong",
        _each(lambda text: f"{text} {state_all('There is no {}.', extract_labels([text])[0, 1:])}"),
    ),
    "everything hedged": ("wrong", _each(lambda text: reword(text, [("^", "possibly ")]))),
}


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _share(paid, name, rows):
    """What a policy earns over the studies `rows` as a share of what the reference earns; nan if that is nothing."""
    whole = _mean(paid["reference"][0][rows])
    return _mean(paid[name][0][rows]) / whole if whole > 0 else math.nan


def name_exploit(kind, paid, others, rows):
    """Which of the policies of a kind earns most over the studies `rows`, and which of the `others` pays it least."""
    earned = {
        name: _mean(paid[name][0][rows]) for name, (kinds, _) in POLICIES.items() if kind in kinds
    }
    best = [name for name in earned if not earned[name] < max(earned.values()) - 1e-9]
    share = _share(paid, best[0], rows)
    if math.isnan(share):
        return "- (the reference earns nothing there)"
    shares = {
        column: max(_share(other, name, rows) for name in best) for column, other in others.items()
    }
    least = min(shares, key=lambda column: (math.isnan(shares[column]), shares[column]))
    narrower = (
        f"under {least} {_cell(shares[least])}"
        if shares[least] < share
        else "no other reward above pays less"
    )
    return f"{', '.join(best)} ({_cell(share)} of what the reference earns; {narrower})"


def audit(config):
    """What config.rewards.report pays to POLICIES on the reports of config.eval.split, next to OTHER_REWARDS, as text.

    No image is opened. Rewards that count tokens count words."""
    import data
    from runtime.output import format_table

    check_rewards(config.rewards)
    examples = [e for e in data.load_split(config, config.eval.split) if e.task == "report"][
        : config.eval.limit or None
    ]
    if len(examples) < 2:
        raise InputError(
            f"audit: split {config.eval.split!r} has {len(examples)} reports; it takes two"
        )
    references, texts = [e.answer for e in examples], {}
    for name, (_, policy) in POLICIES.items():
        pairs = zip(examples, policy(references, np.random.default_rng(config.seed)))
        texts[name] = [
            data.target_text(replace(e, answer=report)) if report else "" for e, report in pairs
        ]

    def pay(report, margin=config.rewards.mccs_margin):
        cfg = replace(config.rewards, report=report, mccs_margin=margin)
        return {
            name: score_completions(given, examples, cfg, data.style_of(config))
            for name, given in texts.items()
        }

    paid, others = (
        pay(config.rewards.report),
        {column: pay(*how) for column, how in OTHER_REWARDS.items()},
    )
    abnormal, every = (
        np.isin(labeler(config.rewards)(references)[:, 1:], (POSITIVE, UNCERTAIN)).any(1),
        slice(None),
    )
    rewards = [["policy", "reward", "share", "abnormal", "normal", *paid["reference"][1]]] + [
        [
            name,
            _mean(total),
            _share(paid, name, every),
            _mean(total[abnormal]),
            _mean(total[~abnormal]),
            *map(_mean, parts.values()),
        ]
        for name, (total, parts) in paid.items()
    ]
    shares = [["share, all / abnormal", *others]] + [
        [
            name,
            *(
                " / ".join(_cell(_share(other, name, rows)) for rows in (every, abnormal))
                for other in others.values()
            ),
        ]
        for name in POLICIES
    ]
    return f"""split {config.eval.split}: {len(examples)} reports, {abnormal.sum()} abnormal
rewards.report={config.rewards.report}

{format_table([[*map(_cell, row)] for row in rewards])}

the same policies under other rewards

{format_table([[*map(_cell, row)] for row in shares])}

cheapest exploit: {name_exploit("wrong", paid, others, every)}
without the image: {name_exploit("blind", paid, others, every)}
findings omitted, on abnormal studies: {name_exploit("omits", paid, others, abnormal)}"""


def _cell(value):
    return value if isinstance(value, str) else "-" if math.isnan(value) else f"{value:.3f}"


def main():
    import data

    parser = argparse.ArgumentParser(description="Tries rewards out without training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "audit", help="what the configured report reward pays to policies that cheat"
    )
    command.add_argument("config")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.set_defaults(run=lambda args: audit(data.load_config(args.config, args.overrides)))
    command = commands.add_parser(
        "label", help="CheXpert labels of a CSV file of reports, as a CSV file"
    )
    command.add_argument("reports", help="a report per row; a header `Reports` is optional")
    command.add_argument("-o", "--output", required=True, metavar="LABELS.csv")
    command.add_argument(
        "--evidence", action="store_true", help="print the phrase and the cue behind each label"
    )
    command.set_defaults(run=lambda args: label_file(args.reports, args.output, args.evidence))
    args = parser.parse_args()
    print(args.run(args))


if __name__ == "__main__":
    from runtime.processes import run_main

    run_main(main)
