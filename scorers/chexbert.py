"""CheXbert (Smit et al. 2020): a BERT with one linear head per observation reads a report's labels.

It needs chexbert.pth as published, github.com/stanfordmlgroup/CheXbert, or a network of another
size in the same format. Shapes: n texts, T tokens.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from readers.study import LABELS
from runtime.config import InputError

# The heads stand in an order of their own. Their classes are blank, positive, negative and
# uncertain. No Finding has the first two.
CHEXBERT_HEADS = (*LABELS[1:3], "Lung Opacity", "Lung Lesion", *LABELS[5:], "No Finding")
BATCH = 64  # texts per forward pass
CACHED = 1 << 14  # texts whose labels are kept


@lru_cache
def chexbert(path, bert):
    """The function texts -> (N, 14) int8 states, in the order of LABELS. Labels are kept by text.

    path: the checkpoint; bert: the folder or hub id of its tokenizer. Raises InputError.
    """
    network = load_network(path)
    tokenizer = load_tokenizer(bert, path, network["bert"].config.vocab_size)
    known = {}

    def label(texts):
        # Tokenizers refuse lone surrogates.
        texts = [text.encode("utf-8", "ignore").decode() for text in texts]
        # As in the published label.py, whitespace becomes single spaces.
        texts = [" ".join(text.split()) for text in texts]
        # Texts of about the same length together need little padding.
        new = [text for text in dict.fromkeys(texts) if text not in known]
        new.sort(key=len)
        for i in range(0, len(new), BATCH):
            batch = new[i : i + BATCH]
            known.update(zip(batch, read_labels(batch, network, tokenizer)))
        states = np.array([known[text] for text in texts], np.int8).reshape(-1, len(LABELS))
        for text in list(known)[:-CACHED]:
            del known[text]
        return states

    return label


@torch.no_grad()
def read_labels(texts, network, tokenizer):
    """The 14 states of each text, in the order of LABELS."""
    bert, heads = network["bert"], network["linear_heads"]
    # What exceeds BERT's positions is cut before [SEP].
    longest = bert.config.max_position_embeddings
    inputs = tokenizer(
        texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
    ).to(bert.device)
    first = bert(**inputs).last_hidden_state[:, 0]  # (n, hidden)
    states = torch.stack([head(first).argmax(1) for head in heads], 1)  # (n, 14)
    return states[:, [CHEXBERT_HEADS.index(label) for label in LABELS]].tolist()


# ------------------------------------------------------------------------------- loading


def load_network(path):
    """The network in a checkpoint. Raises InputError for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
        # It was saved from a DataParallel module.
        network = build_network({name.removeprefix("module."): w for name, w in state.items()})
    except Exception as error:
        reasons = {
            "FileNotFoundError": "no such file",
            "UnpicklingError": "it does not hold weights alone",
            "KeyError": f"it lacks {error}",
        }
        reason = reasons.get(type(error).__name__, f"{error!r:.160}")
        raise InputError(
            f"rewards.chexbert={path!r}: not a CheXbert checkpoint ({reason}); give chexbert.pth "
            f"as published (github.com/stanfordmlgroup/CheXbert)"
        ) from None
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def build_network(state):
    """BERT and the heads, of the sizes that the weights have. KeyError: a weight is missing."""
    words, hidden = state["bert.embeddings.word_embeddings.weight"].shape
    positions = len(state["bert.embeddings.position_embeddings.weight"])
    inner = len(state["bert.encoder.layer.0.intermediate.dense.bias"])
    layers = {name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")}
    config = BertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_attention_heads=max(hidden // 64, 1),
        num_hidden_layers=len(layers),
        intermediate_size=inner,
        max_position_embeddings=positions,
    )
    heads = nn.ModuleList(nn.Linear(hidden, classes) for classes in [4] * 13 + [2])
    network = nn.ModuleDict(
        {"bert": BertModel(config, add_pooling_layer=False), "linear_heads": heads}
    )
    # The file also holds a pooler and a buffer of positions, which are not used.
    missing = network.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise KeyError(missing[0])
    return network


def load_tokenizer(bert, path, words):
    """CheXbert's tokenizer, which must have `words` words. Raises InputError."""
    try:
        tokenizer = BertTokenizer.from_pretrained(bert)
        # Where there is no vocabulary, from_pretrained makes up one of 5 words.
        if len(tokenizer) != words:
            raise ValueError(f"{len(tokenizer)} words instead of {words}")
    except Exception as error:
        raise InputError(
            f"rewards.bert={bert!r}: no tokenizer for rewards.chexbert={path!r} there "
            f"({error!r:.160}); give a folder with bert-base-uncased's, or its hub id"
        ) from None
    return tokenizer
