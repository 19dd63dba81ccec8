"""Rewards of your own: name them in a config as path/to/file.py:function.

  rewards:
    report:
      mccs: 0.8
      configs/my_rewards.py:says_it_once: 0.2

The signature is TRL's: every argument is a list with one entry per completion, and so is the
result, where None means "does not apply". There are prompts, completions, completion_ids, and the
columns answer (the completion without thinking and tags), reference, id, task, question, boxes,
label, patient. Take what you need and leave the rest to **columns.

Weights make composites. This is minus RadCliQ-v1 (2.450 - 1.245 RadGraph - 1.651 BERTScore
- 0.995 SEMB, lower is better) without the constant, which no advantage depends on. RadGraph F1,
BERTScore and SEMB come from files of yours:

    report: {radgraph.py:combined: 1.245, bertscore.py:f1: 1.651, semb.py:cosine: 0.995}
"""


def says_it_once(answer, **columns):
    """1 where no sentence is repeated, less the more of them are; 0 for an empty answer."""
    scores = []
    for text in answer:
        sentences = [part.strip().lower() for part in text.split(".") if part.strip()]
        scores.append(len(set(sentences)) / max(len(sentences), 1))
    return scores


def as_long_as_the_reference(answer, reference, **columns):
    """Words of the shorter text over words of the longer one; None without a reference."""
    scores = []
    for pair in zip(answer, reference):
        shorter, longer = sorted(len(text.split()) for text in pair)
        scores.append(shorter / longer if pair[1].split() else None)
    return scores
