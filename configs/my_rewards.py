"""Rewards of your own: name them in a config as path/to/file.py:function.

  rewards:
    report:
      mccs: 0.8
      configs/my_rewards.py:says_it_once: 0.2

The signature is TRL's: every argument is a list with one entry per completion, and so is the
result, where None means "does not apply". There are prompts, completions, completion_ids, and the
columns answer (the completion without thinking and tags), reference, id, task, question, boxes,
label, patient. Take what you need and leave the rest to **columns.

Completions are strings. A function that was written for chat messages, which take
completion[0]["content"], needs completion alone here.

Weights make composites. RadGraph, RadCliQ, BERTScore and others come from a library, see
scorers/radeval.py:

    report: {radeval:radgraph:radgraph_partial: 0.5, configs/my_rewards.py:says_it_once: 0.5}
"""

from rewards import POSITIVE, extract_labels, parse_boxes, soft_f1


def says_it_once(answer, **columns):
    """1 where no sentence is repeated, less the more of them are; 0 for an empty answer."""
    scores = []
    for text in answer:
        sentences = [part.strip().lower() for part in text.split(".") if part.strip()]
        scores.append(len(set(sentences)) / max(len(sentences), 1))
    return scores


def called_normal(answer, **columns):
    """1 where a report says that nothing is there. With a weight of 0 it is only logged."""
    return list(extract_labels(answer)[:, 0] == POSITIVE)


def where_something_is(answer, boxes, **columns):
    """Soft-F1 where something is there, else None. With half of the weight each, soft_f1 and this
    pay 1 for the right boxes and 0.5 for a right "nothing is there":

    grounding: {soft_f1: 0.5, configs/my_rewards.py:where_something_is: 0.5}
    """
    scores = []
    for text, reference in zip(answer, boxes):
        scores.append(soft_f1(parse_boxes(text), reference) if reference else None)
    return scores
