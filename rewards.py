"""Text and boxes in, numbers out: the rewards of both papers, and the label extractors under them.

In order of appearance
  LABELS, extract_labels        a rule-based CheXpert labeler: report text -> 14 states
  chexbert                      the same from a CheXbert checkpoint
  mccs, label_f1                rewards on label vectors: MRG-R1's margin-based cosine, F1 of the positives
  tokenize, gleu, corpus_bleu, bleu4, rouge_l, bertscore      text overlap
  parse_output                  (valid, thinking, answer) of a completion in the three output formats
  parse_boxes, iou, match_boxes, soft_f1          grounding
  REWARDS, check_rewards, score_completions       the reward table; a batch of completions -> weighted totals

Whatever a model writes, nothing here raises, and every regular expression takes linear time. torch is imported where a
network runs, in chexbert and bertscore; everything else does without.
"""
import difflib
import math
import re
import runpy
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LABELS = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema",
          "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
          "Support Devices")
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = 0, 1, 2, 3
TAGS = ("<think>", "</think>", "<report>", "</report>", "<answer>", "</answer>")
CHEXBERT_HEADS = (*LABELS[1:3], "Lung Opacity", "Lung Lesion", *LABELS[5:], "No Finding")  # its own order
CACHED = 1 << 14  # texts whose CheXbert labels are kept
MAX_MATCHED = 64  # predicted boxes that enter the assignment; further ones are false positives

# Tables of the labeler: regular expressions on lower-cased text, tried at the start of a word. A stem without \b takes
# any ending; gaps are bounded, which keeps matching linear.
MENTIONS = {  # label: what names it, and, if need be, what only looks like it
    "Enlarged Cardiomediastinum": (
        r"(?:cardio)?mediastinal (?:widen|enlarge|prominence)|(?:widened|prominent|wide) (?:superior )?mediastin",),
    "Cardiomegaly": (r"cardiomegaly|cardiac enlargement|enlarge(?:d|ment of the) (?:heart|cardiac)",),
    "Lung Lesion": (r"mass(?:es)?\b|nodul|lump\b|(?:cavitary|lung|pulmonary|parenchymal) lesion|carcinoma|neoplas|"
                    r"tumou?r|malignan|metasta|cancer", r"(?:breast|body) mass|mass effect|nipple"),
    "Lung Opacity": (
        r"opaci|(?:decreased|reduced) translucency|(?:increased|hazy|patchy|streaky) densit|infiltrat|parenchymal scar|"
        r"air ?-?space (?:\w+ )?disease|reticul(?:ation|ar (?:pattern|marking))|interstitial (?:\w+ )?"
        r"(?:marking|pattern|lung|promin|thicken|disease|change)|(?:peri)?bronchial (?:wall )?(?:thicken|cuff)",),
    "Edema": (r"o?edema|(?:heart|cardiac) failure|chf\b|(?:vascular|venous|pulmonary) congestion|congestive|kerley|"
              r"cephalization|vascular (?:indistinctness|prominence)", r"(?:soft tissue|peripheral|ankle|leg) edema"),
    "Consolidation": (r"consolidat",),
    "Pneumonia": (r"(?:broncho)?pneumonia|infecti|pneumonitis", r"(?:granulomatous|prior|previous|old) (?:\w+ )?infec"),
    "Atelectasis": (r"(?:micro)?ateleca?t|collapse|volume loss", r"collapsed? vertebra"),
    "Pneumothorax": (r"(?:hydro)?pneumothora",),
    "Pleural Effusion": (r"effusion|pleural fluid|hydrothorax|blunt\w* of (?:\w+ ){0,4}costophrenic|"
                         r"costophrenic (?:\w+ ){0,2}blunt|blunted (?:\w+ ){0,2}costophrenic",
                         r"(?:pericardial|joint) effusion"),
    "Pleural Other": (r"pleural (?:\w+ ){0,2}(?:thickening|scar|plaque|calcif|mass|abnormalit)|fibrothorax|fibrosis|"
                      r"pleur(?:al|o)[ -]?(?:parenchymal|peripheral|based)|thickening of (?:\w+ ){0,2}pleura|"
                      r"(?:bi)?apical (?:cap|thickening)",),
    "Fracture": (r"fractur|compression deformit|(?:rib|clavic\w+|wedge) deformit",),
    "Support Devices": (
        r"pace(?:r\b|maker)|(?:\w+ )?(?:lines?|tubes?|tubing)\b|picc|valve|(?:porta)?catheter|hardware|arthroplast|"
        r"defib|drain\b|icd\b|device|plates?\b|screw|cannula|coil|mediport|port\b|stent|clips?\b|wires?\b|shunt|"
        r"leads?\b|rods?\b|sutur|prosthe|stimulator|generator|tracheostomy|xxxx-a-xxxx|"
        r"tips?\b (?:[\w-]+ ){0,6}(?:svc|cavoatrial|carina|atri|ventric)",
        r"(?:air|fat|mid|base|(?:kerley )?b|midclavicular|fissur\w*|pleural|paratracheal|fracture|lung)[ -]lines?\b|"
        r"end ?plate|plate ?-?like"),
}
ANATOMY = {  # what has a size: normal is a negative, enlarged a positive
    "Enlarged Cardiomediastinum": (r"(?:cardio ?-?)?mediastin|contours?\b|cardiopulmonary silhouette",
                                   r"mediastinal (?:and hilar )?lymph|hilar contour"),
    "Cardiomegaly": (r"heart\b|cardiac (?:silhouette|size|contour|shadow|and)|cardio(?: ?-?mediastin|pulmonary silh)",),
}
NORMAL = r"normal|unremarkable|within|clear|intact|maintained|upper limit|not? (?:\w+ ){0,3}(?:enlarge|widen|promin)"
ENLARGED = r"borderline|enlarge|prominent|increased|widen|large\b|big\b"
OTHER = (  # findings outside the 13 observations: they only cancel No Finding
    r"granulom|scolio|kypho|degenerat|spondyl|arthri|osteophyt|hyper(?:inflat|expan|lucen|aerat)|emphysem|copd|chronic|"
    r"scar|hernia|tortuo|atheroscl|ectasia|aneurysm|calcif|fibro|elevat|eventrat|bronchiect|osteopen|deformit|flatten")
# Cues before a mention, then cues after it. The first that fits is taken: "not excluded" is a hedge and no negation.
NO_CUE = r"(?:no|without) (?:\w+ ){0,2}(?:change|increase|decrease)|not (?:\w+ )?(?:change|only|increas|decreas)"
HEDGE = (r"(?:can ?not|can't|could not|difficult to|not|never|to) (?:\w+ ){0,2}(?:exclude|rule out|be excluded)|may\b|"
         r"might|could|possib|probab|question|suspect|suspicious (?:for|of)|concern|worrisome|suggest|likely|vs\b|"
         r"versus|presum|equivocal|differential|potential|perhaps|apparent|rule out|"
         r"(?:evaluat|assess|correlat)\w* (?:\w+ )?for")
NEGATION = (r"no\b|not\b|without|free of|negative for|absence of|absent|never|neither|nor\b|denies|resolution of|"
            r"clear of|rather than|ruled? out|exclude[sd]?|remov(?:al|ed)")
HEDGE_AFTER = (r"(?:not|cannot be) (?:\w+ )?(?:excluded|ruled)|versus|vs\b|(?:is|are) (?:\w+ )?limited|consideration|"
               r"in the differential|(?:is|are) (?:\w+ ){0,2}(?:possible|suspected|questioned|difficult)")
NEGATION_AFTER = (r"(?:is|are|was|were|has|have|been) (?:\w+ )?(?:not\b|no longer|cleared|absent|excluded|removed)|"
                  r"none\b|resolved|not (?:\w+ )?(?:seen|identified|present|visuali)|unlikely|negative")
MASK = re.compile(r"\bx{3,}\b|_{2,}")  # a word removed by de-identification
NO_CLAIM = re.compile(r"\b(?:evaluation|assessment) (?:for|of) (?:\w+ ){1,4}(?:is |was )?(?:\w+ )?limited")
SENTENCE_END = re.compile(r"[.;!?]+(?!\d)|\n\s*\n|\n(?=[-*\u2022]|\d+[.)])")
CLAUSE_END = re.compile(  # where cues stop: a contrast, or a conjunction or comma that opens a new statement
    r"\b(?:but|however|although|though|which|that|otherwise|except|aside|apart|while|whereas|given|(?:and|with) (?="
    r"(?:there|the|mild|small|bilateral|is|are|has|have|(?:stable|unchanged)(?! heart| cardi(?:ac|omed)| mediast))\b))|"
    r", (?=(?:and )?(?:there|the|stable|mild|small|minimal|bilateral|unchanged|old|healed|possibl\w*|likely|probabl\w*|"
    r"heart|cardiac|lungs?|with)\b)")


def _compiled(table):
    return [(LABELS.index(label), re.compile(rf"\b(?:{''.join(f'{d}|' for d in decoy)}(?P<it>{pattern}))"))
            for label, (pattern, *decoy) in table.items()]


_MENTIONS, _ANATOMY, _OTHER = _compiled(MENTIONS), _compiled(ANATOMY), re.compile(rf"\b(?:{OTHER})")
_BEFORE = re.compile(rf"\b(?:(?P<skip>{NO_CUE})|(?P<hedge>{HEDGE})|(?P<no>{NEGATION}))")
_AFTER = re.compile(rf"\b(?:(?P<hedge>{HEDGE_AFTER})|(?P<no>{NEGATION_AFTER}))")
_SIZE = re.compile(rf"\b(?:(?P<normal>{NORMAL})|(?P<large>{ENLARGED})|(?P<same>stable|unchanged|similar))")
_SIZE_STATE = {"normal": NEGATIVE, "large": POSITIVE, "same": UNCERTAIN}  # "stable" hedges, as in the CheXpert labeler


@lru_cache(maxsize=1 << 14)
def _clause_mentions(clause):
    """[(label index, state)] of every mention; a finding outside the 13 observations is (0, NEGATIVE)."""
    first, last = {}, {}                    # where the first cue before, and the last cue after, begin to act
    for cue in _BEFORE.finditer(clause):
        first.setdefault(cue.lastgroup, cue.end())
    for cue in _AFTER.finditer(clause):
        last[cue.lastgroup] = cue.start()

    def state(mention):
        if first.get("no", math.inf) <= mention.start():
            return NEGATIVE
        if first.get("hedge", math.inf) <= mention.start() or last.get("hedge", -1) >= mention.end():
            return UNCERTAIN
        return NEGATIVE if last.get("no", -1) >= mention.end() else POSITIVE

    found = [(label, state(m)) for label, pattern in _MENTIONS for m in pattern.finditer(clause) if m["it"]]
    if any(state(mention) != NEGATIVE for mention in _OTHER.finditer(clause)):
        found.append((0, NEGATIVE))
    sizes = list(_SIZE.finditer(clause))
    sizes = [size for size in sizes if size.lastgroup != "same"] or sizes
    starts = [size.start() for size in sizes]
    for label, pattern in _ANATOMY if sizes else ():
        for part in filter(lambda match: match["it"], pattern.finditer(clause)):
            place = bisect(starts, part.start())
            nearest = min(sizes[max(place - 1, 0):place + 1], key=lambda size: max(
                size.start() - part.end(), part.start() - size.end())).lastgroup
            if nearest != "same" or LABELS[label] != "Cardiomegaly" or "mediast" not in part[0]:
                hedged = nearest == "large" and state(part) == UNCERTAIN
                found.append((label, UNCERTAIN if hedged else _SIZE_STATE[nearest]))
    return found


@lru_cache(maxsize=1 << 14)
def _labels(text):
    found = [set() for _ in LABELS]
    for sentence in SENTENCE_END.split(MASK.sub("xxxx", text.lower())):
        for clause in CLAUSE_END.split(NO_CLAIM.sub("", " ".join(sentence.split()))):
            for label, state in _clause_mentions(clause):
                found[label].add(state)
    states = [next((state for state in (POSITIVE, UNCERTAIN, NEGATIVE) if state in seen), BLANK) for seen in found]
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


def _padded(texts, tokenizer, longest, net):
    """Token ids (n, T) and their mask (n, T), without lone surrogates: tokenizers refuse them."""
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(net.device)
    return inputs["input_ids"], inputs["attention_mask"]


@lru_cache
def chexbert(path, bert):
    """The function texts -> (N, 14) int8 states, in the order of LABELS, of CheXbert (Smit et al. 2020).

    BERT with a linear head per observation on the [CLS] vector; the classes of a head are BLANK, POSITIVE, NEGATIVE,
    UNCERTAIN, of No Finding the first two. As in its label.py, whitespace becomes single spaces, and what exceeds its
    512 positions is cut before [SEP]. `path`: chexbert.pth as published, or another size of network in its format;
    `bert`: the folder or hub id of its tokenizer. Labels are kept by text. Raises ValueError.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
        state = {key.removeprefix("module."): value for key, value in state.items()}
        words, hidden = state["bert.embeddings.word_embeddings.weight"].shape
        config = BertConfig(
            vocab_size=words, hidden_size=hidden, num_attention_heads=max(hidden // 64, 1),
            num_hidden_layers=1 + max(int(key.split(".")[3]) for key in state if key.startswith("bert.encoder.layer.")),
            intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.bias"]),
            max_position_embeddings=len(state["bert.embeddings.position_embeddings.weight"]))
        heads = torch.nn.ModuleList(torch.nn.Linear(hidden, classes) for classes in [4] * 13 + [2])
        net = torch.nn.ModuleDict({"bert": BertModel(config, add_pooling_layer=False), "linear_heads": heads})
        if missing := net.load_state_dict(state, strict=False).missing_keys:  # it has more: a pooler, position_ids
            raise KeyError(missing[0])
    except Exception as error:
        why = {"FileNotFoundError": "no such file", "UnpicklingError": "it does not hold weights alone",
               "KeyError": f"it lacks {error}"}.get(type(error).__name__, f"{error!r:.160}")
        raise ValueError(f"rewards.chexbert={path!r}: not a CheXbert checkpoint ({why}); give chexbert.pth as "
                         "published (github.com/stanfordmlgroup/CheXbert)") from None
    try:
        tokenizer = BertTokenizer.from_pretrained(bert)
        if len(tokenizer) != words:         # where there is no vocabulary, from_pretrained makes up one of 5 words
            raise ValueError(f"{len(tokenizer)} words instead of {words}")
    except Exception as error:
        raise ValueError(f"rewards.bert={bert!r}: no tokenizer for rewards.chexbert={path!r} there ({error!r:.160}); "
                         "give a folder with bert-base-uncased's, or its hub id") from None
    net.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    columns, known = [CHEXBERT_HEADS.index(label) for label in LABELS], {}

    @torch.no_grad()
    def label(texts):
        texts = [" ".join(text.split()) for text in texts]
        new = sorted(dict.fromkeys(text for text in texts if text not in known), key=len)  # little padding
        for batch in (new[i:i + 64] for i in range(0, len(new), 64)):
            ids, mask = _padded(batch, tokenizer, config.max_position_embeddings, net["bert"])
            first = net["bert"](ids, attention_mask=mask).last_hidden_state[:, 0]   # (n, hidden)
            states = torch.stack([head(first).argmax(1) for head in heads], 1)      # (n, 14), in its own order
            known.update(zip(batch, states[:, columns].tolist()))
        states = np.array([known[text] for text in texts], np.int8).reshape(-1, len(LABELS))
        for text in list(known)[:-CACHED]:
            del known[text]
        return states
    return label


def mccs(generated, reference, margin=0.5, nonempty=None):
    """(N,) margin-based CheXbert cosine similarity, max((cos - m) / (1 - m), 0), of (N, 14) labels (MRG-R1).

    Vectors leave out No Finding; positive and uncertain are +1, negative -1, blank 0. Two zero vectors score 1 if the
    generated text says something, else 0: `nonempty`, (N,) bool, by default whether the row has any label.
    """
    nonempty = np.any(generated, axis=1) if nonempty is None else nonempty
    value = np.array([0.0, 1.0, -1.0, 1.0])  # indexed by state
    a, b = value[np.asarray(generated)[:, 1:]], value[np.asarray(reference)[:, 1:]]
    product = (a * a).sum(1) * (b * b).sum(1)
    cosine = (a * b).sum(1) / np.sqrt(np.maximum(product, 1))
    score = np.where(product > 0, np.maximum((cosine - margin) / (1 - margin), 0), 0)
    return np.where(~a.any(1) & ~b.any(1), nonempty, score)


def label_f1(generated, reference):
    """(N,) F1 of the positive or uncertain observations without No Finding. Without any on either side it is 0, as in
    scikit-learn: normal studies then have no say, which weighs against the pull of MCCS to the normal template."""
    a, b = (np.isin(np.asarray(labels)[:, 1:], (POSITIVE, UNCERTAIN)) for labels in (generated, reference))
    return 2 * (a & b).sum(1) / np.maximum(a.sum(1) + b.sum(1), 1)


def tokenize(text):
    """Lower-cased words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _ngrams(tokens, n):
    return Counter(zip(*(tokens[i:] for i in range(n))))


def gleu(candidate, reference):
    """Google's sentence GLEU: matching n-grams, n = 1..4, over the larger number of n-grams (Wu et al. 2016)."""
    a, b = (sum((_ngrams(tokenize(text), n) for n in range(1, 5)), Counter()) for text in (candidate, reference))
    return (a & b).total() / max(a.total(), b.total(), 1)


def corpus_bleu(candidates, references, n=4, smooth=0):
    """Corpus BLEU-n (Papineni et al. 2002), one reference each; `smooth` is added to matches and totals above n = 1."""
    pairs = [(tokenize(a), tokenize(b)) for a, b in zip(candidates, references, strict=True)]
    matches, totals = np.zeros(n), np.zeros(n)
    for a, b in pairs:
        for k in range(n):
            grams = _ngrams(a, k + 1)
            matches[k] += (grams & _ngrams(b, k + 1)).total()
            totals[k] += max(grams.total(), 1)
    if matches[0] == 0:
        return 0.0
    matches[1:], totals[1:] = matches[1:] + smooth, totals[1:] + smooth
    brevity = min(0, 1 - sum(len(b) for _, b in pairs) / sum(len(a) for a, _ in pairs))
    return math.exp(brevity + np.log(matches / totals).mean()) if matches.all() else 0.0


def bleu4(candidate, reference):
    """Sentence BLEU-4 with add-one smoothing above unigrams (Lin & Och 2004; nltk's SmoothingFunction().method2)."""
    return corpus_bleu([candidate], [reference], smooth=1)


def rouge_l(candidate, reference):
    """ROUGE-L F1 (Lin 2004); the longest common subsequence is bit-parallel (Hyyro 2004), fast on any length."""
    a, b = sorted((tokenize(candidate), tokenize(reference)), key=len)
    places = {}                             # token -> bit mask of its places in a
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    full = row = (1 << len(a)) - 1          # a zero bit is a place where the subsequence grew
    for token in b:
        match = row & places.get(token, 0)
        row = (row + match | row - match) & full
    return 2 * (len(a) - row.bit_count()) / max(len(a) + len(b), 1)


@lru_cache
def _encoder(path, layer):
    """(tokenizer, its longest text, network) in `path`. Raises ValueError."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    try:
        net = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        longest = min(tokenizer.model_max_length, net.config.max_position_embeddings)
    except Exception as error:
        raise ValueError(f"rewards.bertscore={path!r}: no encoder and tokenizer for the reward bertscore "
                         f"({error!r:.160}); give a local folder or hub id") from None
    if layer > net.config.num_hidden_layers:
        raise ValueError(f"rewards.bertscore_layer={layer}: {path} has {net.config.num_hidden_layers} layers")
    return tokenizer, longest, net.to("cuda" if torch.cuda.is_available() else "cpu")


def bertscore(candidates, references, path, layer=0):
    """(N,) BERTScore F1 of text pairs (Zhang et al. 2020), without idf weights and without rescaling.

    Each token takes the most similar one of the other text, by the cosine of hidden states of `layer` (0: the last).
    Precision and recall are means over all tokens but [CLS] and [SEP], which others may take. An empty text scores 0.
    """
    import torch
    tokenizer, longest, net = _encoder(path, layer)

    def embed(texts):                       # unit vectors (n, T, D), and (n, T): is it a token, does it count?
        ids, mask = _padded([text.strip() for text in texts], tokenizer, longest, net)
        hidden = net(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer or -1]
        special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id)
        return torch.nn.functional.normalize(hidden, dim=-1), mask.bool(), mask.bool() & ~special

    def best(similarity, others, counts):   # (n, S, T), (n, T), (n, S) -> (n,) mean over what counts
        return (similarity.masked_fill(~others[:, None], -math.inf).amax(2) * counts).sum(1) / counts.sum(1)

    scores = []
    with torch.no_grad():
        for i in range(0, len(candidates), 64):
            (a, a_mask, a_counts), (b, b_mask, b_counts) = (embed(t[i:i + 64]) for t in (candidates, references))
            precision, recall = best(a @ b.mT, b_mask, a_counts), best(b @ a.mT, a_mask, b_counts)
            scores += (2 * precision * recall / (precision + recall)).nan_to_num(0, 0, 0).tolist()
    return scores


def parse_output(text, task, style):
    """(valid, thinking, answer) of a completion for task "report" | "grounding", style "plain" | "tags" | "suffix".

    Valid: the whole text has the format, each tag once and in order, no other tag, the answer not empty. A thinking
    style without </think> has no answer; otherwise invalid "tags" still answer if exactly one closed block follows
    </think>, and invalid "suffix" with what follows the last </think>.
    """
    text = text.strip()
    count = {tag: text.count(tag) for tag in TAGS}
    if style == "plain":
        return bool(text) and not any(count.values()), "", text
    if not count["</think>"]:
        return False, text, ""
    if style == "suffix":
        thinking, _, answer = map(str.strip, text.rpartition("</think>"))
        return sum(count.values()) == 1 and bool(answer), thinking, answer
    start, end = ("<report>", "</report>") if task == "report" else ("<answer>", "</answer>")
    thinking, _, rest = text.partition("</think>")
    between, _, block = rest.partition(start)
    answer, _, after = map(str.strip, block.partition(end))
    if not rest.count(start) == rest.count(end) == block.count(end) == 1:
        answer = ""
    once = all(count[tag] == (tag in ("<think>", "</think>", start, end)) for tag in TAGS)
    valid = once and thinking.startswith("<think>") and not between.strip() and not after and bool(answer)
    return valid, thinking.removeprefix("<think>").strip(), answer


NUMBER = r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")


def parse_boxes(text):
    """Every well-formed "[x1, y1, x2, y2]" of finite numbers in the text, as tuples of floats in reading order."""
    boxes = [tuple(map(float, numbers)) for numbers in BOX.findall(text)]
    return [box for box in boxes if all(map(math.isfinite, box))]


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
    u, v, row_of = np.zeros(n), np.zeros(m + 1), np.full(m + 1, -1)  # potentials; column m is where each path starts
    for row in range(n):
        row_of[m], column = row, m
        slack, previous, visited = np.full(m + 1, np.inf), np.zeros(m + 1, int), np.zeros(m + 1, bool)
        while row_of[column] >= 0:          # grow the cheapest alternating path to a free column
            visited[column] = True
            reduced = np.append(cost[row_of[column]] - u[row_of[column]] - v[:m], np.inf)
            better = ~visited & (reduced < slack)
            slack[better], previous[better] = reduced[better], column
            column = np.where(visited, np.inf, slack).argmin()
            step = slack[column]
            u[row_of[visited]] += step
            v[visited] -= step
            slack[~visited] -= step
        while column != m:                  # flip it
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
    return sorted((int(i), int(j), float(overlap[i, j])) for i, j in pairs if min(i, j) >= 0 and overlap[i, j] > 0)


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
    size = {"radvlm": len(reference) + total + len(predicted) - len(pairs), "pq": len(predicted) + len(reference)}
    return 2 * total / size[mode]


def says_nothing_there(answer):
    """Words and no brackets: a missing answer or broken boxes must not pass for "there is none"."""
    return bool(re.search(r"\w", answer)) and not re.search(r"[\[\]]", answer)


# The reward table: f(batch, config.rewards) -> one number per completion.

@dataclass
class Batch:
    """N completions of one task, taken apart."""
    completions: list                       # whole texts
    token_ids: list                         # their tokens (of words, where a text has none)
    valid: np.ndarray                       # (N,) do they have the format?
    answers: list                           # the report, or the text with the boxes
    examples: list                          # data.Example: the references


def labeler(cfg):
    """The function texts -> (N, 14) states that config.rewards.labeler names. Raises ValueError."""
    return extract_labels if cfg.labeler == "rules" else chexbert(cfg.chexbert, cfg.bert)


def _on_labels(score):
    def reward(batch, cfg):
        says_something = np.array([re.search(r"\w", answer) is not None for answer in batch.answers], bool)
        label = labeler(cfg)
        scores = score(label(batch.answers), label([e.answer for e in batch.examples]), cfg, says_something)
        return np.where(says_something, scores, 0)  # CheXbert may read labels in an empty text
    return reward


def _on_text(score):
    return lambda batch, cfg: [score(a, e.answer) for a, e in zip(batch.answers, batch.examples, strict=True)]


def _soft_f1_reward(batch, cfg):
    return [soft_f1(parse_boxes(answer), example.boxes, cfg.soft_f1_mode, cfg.match_empty and says_nothing_there(answer))
            for answer, example in zip(batch.answers, batch.examples)]


def overlong(length, start, end):
    """0 up to `start` tokens, then down to -1 at `end` (DAPO's soft overlong punishment, Yu et al. 2025, eq. 13)."""
    return -min(max(length - start, 0) / max(end - start, 1), 1.0)


REWARDS = {
    "mccs": _on_labels(lambda generated, reference, cfg, said: mccs(generated, reference, cfg.mccs_margin, said)),
    "label_f1": _on_labels(lambda generated, reference, cfg, said: label_f1(generated, reference)),
    "gleu": _on_text(gleu), "bleu4": _on_text(bleu4), "rouge_l": _on_text(rouge_l),
    "bertscore": lambda batch, cfg: bertscore(batch.answers, [e.answer for e in batch.examples], cfg.bertscore,
                                              cfg.bertscore_layer),
    "soft_f1": _soft_f1_reward,
    "format": lambda batch, cfg: batch.valid,
    "overlong": lambda batch, cfg: [overlong(len(ids), cfg.overlong_start, cfg.overlong_end) for ids in batch.token_ids],
}
APPLIES = {"report": [name for name in REWARDS if name != "soft_f1"], "grounding": ["soft_f1", "format", "overlong"]}


@lru_cache
def external_reward(name):
    """The function that "path/to/file.py:function" names. Raises ValueError."""
    path, _, function = name.rpartition(":")
    try:
        return runpy.run_path(path)[function]
    except FileNotFoundError:
        raise ValueError(f"rewards: {name}: no file {path}") from None
    except KeyError:
        raise ValueError(f"rewards: {name}: no function {function!r} in {path}") from None
    except Exception as error:
        raise ValueError(f"rewards: {name}: {path} fails with {error!r}") from None


def call_external(name, batch, cfg):
    """(values, failed), (N,) each, of a reward of the user's, called as TRL calls one.

    It gets prompts, completions, completion_ids and the columns id, task, question, answer (parsed from the completion),
    reference, boxes, label, patient, each a list of N, and returns N numbers; None: does not apply (nan here). What raises
    or is not finite stops the run, or counts as 0 where rewards.on_error=zero.
    """
    columns = {key: [getattr(e, key) for e in batch.examples] for key in ("id", "task", "question", "boxes", "label", "patient")}
    try:
        given = external_reward(name)(
            prompts=columns["question"], completions=batch.completions, completion_ids=batch.token_ids,
            answer=batch.answers, reference=[e.answer for e in batch.examples], **columns)
        values = np.array([math.nan if value is None else value for value in given], float)
        if values.shape != (len(batch.examples),):
            raise ValueError(f"{values.shape} values for {len(batch.examples)} completions")
        failed = ~np.isfinite(values) & np.array([value is not None for value in given])
        if failed.any() and cfg.on_error == "stop":
            raise ValueError(f"{values[failed][0]} for completion {batch.completions[failed.argmax()]!r}")
    except Exception as error:
        if cfg.on_error == "stop":
            raise ValueError(f"reward {name}: {error!r} (rewards.on_error=zero counts such rewards as 0)") from None
        values, failed = np.zeros(len(batch.examples)), np.ones(len(batch.examples), bool)
    return np.where(failed, 0.0, values), failed.astype(float)


def check_rewards(rewards_cfg):
    """Raises ValueError for a reward unknown to its task, with the nearest valid name, or a network that cannot load."""
    for task, names in APPLIES.items():
        for name in getattr(rewards_cfg, task):
            if ".py:" in name:
                external_reward(name)
            elif name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
                raise ValueError(f"rewards.{task}.{name}: no such reward for this task; did you mean {nearest!r}? "
                                 f"(there are {', '.join(names)}, and your own: path/to/file.py:function)")
    labeler(rewards_cfg)
    if "bertscore" in rewards_cfg.report:
        _encoder(rewards_cfg.bertscore, rewards_cfg.bertscore_layer)


def score_completions(completions, examples, rewards_cfg, style, token_ids=None):
    """(total, parts) of N completions: (N,) weighted sums, and name -> (N,) unweighted rewards.

    Tasks may be mixed: a part is nan where it does not apply to the row. A weight of 0 only logs a part. Raises
    ValueError if a reward is not finite.
    """
    parsed = [parse_output(text, e.task, style) for text, e in zip(completions, examples, strict=True)]
    token_ids = token_ids or [tokenize(text) for text in completions]
    total, parts = np.zeros(len(examples)), {}
    for task in APPLIES:
        rows = [i for i, example in enumerate(examples) if example.task == task]
        batch = Batch([completions[i] for i in rows], [token_ids[i] for i in rows],
                      np.array([parsed[i][0] for i in rows], bool), [parsed[i][2] for i in rows], [examples[i] for i in rows])
        for name, weight in getattr(rewards_cfg, task).items() if rows else ():
            if ".py:" in name:
                values, failed = call_external(name, batch, rewards_cfg)
                parts.setdefault(f"{name}/failed", np.full(len(examples), np.nan))[rows] = failed
            else:
                values = np.asarray(REWARDS[name](batch, rewards_cfg), float)
                if not np.isfinite(values).all():
                    raise ValueError(f"reward {name!r} gave a value that is not finite: {values[~np.isfinite(values)][0]}")
            parts.setdefault(name, np.full(len(examples), np.nan))[rows] = values
            total[rows] += weight * np.nan_to_num(values)
    return total, parts
