"""Rewards of your own: name them in a config as path/to/file.py:function.

  rewards:
    report:
      mccs: 0.8
      configs/my_rewards.py:says_it_once: 0.2

The signature is TRL's: every argument is a list with an entry per completion, and so is the result, where None means "does
not apply". There are prompts, completions, completion_ids, and the columns answer (the completion without thinking and
tags), reference, id, task, question, boxes, label, patient. Take what you need and leave the rest to **columns.

Weights make composites. Minus RadCliQ-v1 (2.450 - 1.245 RadGraph - 1.651 BERTScore - 0.995 SEMB, lower is better), without
the constant, which no advantage depends on, and with two files of yours that compute RadGraph F1 and SEMB:

    report: {radgraph.py:combined: 1.245, bertscore: 1.651, semb.py:cosine: 0.995}
"""


def says_it_once(answer, **columns):
    """1 where no sentence is repeated, less the more of them are; 0 for an empty answer."""
    sentences = [[s.strip().lower() for s in text.split(".") if s.strip()] for text in answer]
    return [len(set(s)) / len(s) if s else 0.0 for s in sentences]


def as_long_as_the_reference(answer, reference, **columns):
    """Words of the shorter text over words of the longer one; None without a reference."""
    lengths = [(len(a.split()), len(r.split())) for a, r in zip(answer, reference)]
    return [min(pair) / max(pair) if pair[1] else None for pair in lengths]
