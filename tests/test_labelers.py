"""scorers/chexbert.py: a tiny CheXbert against its forward pass by hand."""

import argparse
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import NASTY, ROOT, example, load, random_texts
from transformers import BertConfig, BertModel, BertTokenizer

import data
import eval as evaluation
import model
import rewards
from data import LABELS
from rewards import POSITIVE
from runtime.config import InputError, RewardsConfig
from scorers import chexbert as scorer

WORDS = ["the", "heart", "lungs", "are", "is", "no", "not", "clear", "normal", "large"]
WORDS += ["effusion", "edema", "pneumonia", "left", "right", "small", "in", "##s", ".", ","]
CHEXBERT = [
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
]


def tokenizer_folder(folder, words=WORDS):
    folder.mkdir()
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    return str(folder)


def random_bert(hidden=128, heads=2):
    """A BERT with weights so large that every token matters, and no two texts look alike."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=3,
        intermediate_size=40,
    )
    bert = BertModel(config).eval()
    for p in bert.parameters():
        p.data.add_(0.3 * torch.randn(p.shape))
    return bert


def checkpoint(path, bert, heads, prefix="module."):
    """chexbert.pth as published: a DataParallel module's weights and a buffer of positions, in
    torch's old file format."""
    net = torch.nn.ModuleDict({"bert": bert, "linear_heads": torch.nn.ModuleList(heads)})
    state = net.state_dict(prefix=prefix)
    state[f"{prefix}bert.embeddings.position_ids"] = torch.arange(512)[None]
    optimizer = torch.optim.Adam(net.parameters()).state_dict()
    torch.save(
        {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": optimizer},
        path,
        _use_new_zipfile_serialization=not prefix,
    )
    return str(path)


def random_heads(size):
    return [torch.nn.Linear(size, 2 if name == "No Finding" else 4) for name in CHEXBERT]


@pytest.fixture
def chexbert(tmp_path):
    """(tokenizer folder, BERT, heads, checkpoint)."""
    folder, bert = tokenizer_folder(tmp_path / "bert"), random_bert()
    heads = random_heads(128)
    return folder, bert, heads, checkpoint(tmp_path / "chexbert.pth", bert, heads)


def config(folder, path):
    return RewardsConfig(bert=folder, chexbert=path)


# "unseen" is in no vocabulary.
SAID = [*WORDS[:-3], ",", "Hearts.", "unseen"]
LONG = []
for n in (509, 510, 511, 512, 513, 700, 701, 702, 1500):
    LONG.append(" ".join(np.random.default_rng(n).choice(WORDS[:10], n)))
TEXTS = [
    "",
    " \n\t",
    "\n No effusion.\n\nHeart\x0cnormal ",
    "edema [SEP] left",
    *filter(None, random_texts(90, 0, 40, SAID)),
    *LONG,
]


def ids_by_hand(text, folder):
    tokenizer = BertTokenizer.from_pretrained(folder)
    text = re.sub(r"\s+", " ", text.strip().replace("\n", " ")).strip()
    words = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    return [tokenizer.cls_token_id, *words[:510], tokenizer.sep_token_id]


def states_by_hand(texts, folder, bert, heads):
    """[{label: class}], text by text, without padding."""
    result = []
    for text in texts:
        ids = torch.tensor([ids_by_hand(text, folder)])
        with torch.no_grad():
            first = bert(ids)[0][0, 0]
            logits = [head(first) for head in heads]
        # No tie that rounding could turn.
        assert min(float(x.sort().values.diff()[-1]) for x in logits) > 1e-4
        result.append({name: int(x.argmax()) for name, x in zip(CHEXBERT, logits, strict=True)})
    return result


def array_by_hand(texts, *network):
    """states_by_hand as an array (N, 14), in the order of LABELS."""
    rows = states_by_hand(texts, *network)
    return np.array([row[label] for row in rows for label in LABELS]).reshape(-1, 14)


@pytest.fixture
def runs(monkeypatch):
    """The texts, as token ids, of every forward pass of a BERT from here on: a list per pass."""
    runs, forward = [], BertModel.forward

    def spy(self, input_ids, attention_mask, **more):
        runs.append([row[mask > 0].tolist() for row, mask in zip(input_ids, attention_mask)])
        return forward(self, input_ids, attention_mask=attention_mask, **more)

    monkeypatch.setattr(BertModel, "forward", spy)
    return runs


def test_chexbert_reads_a_text_as_published(chexbert, runs):
    """Whitespace, what is cut, and [SEP]; each text once."""
    folder, _, _, path = chexbert
    rewards.labeler(config(folder, path))(TEXTS)
    ids = [ids_by_hand(text, folder) for text in TEXTS]
    assert ids[0] == ids[1]
    read = [row for run in runs for row in run]
    assert sorted(read) == sorted(ids[1:])
    assert max(map(len, ids)) == 512
    assert len(runs) == 2


def test_chexbert_equals_the_forward_pass_by_hand(chexbert, tmp_path):
    folder, bert, heads, path = chexbert
    expected = array_by_hand(TEXTS, folder, bert, heads)
    # Every head tells texts apart.
    assert (expected.min(0) < expected.max(0)).all()
    plain = checkpoint(tmp_path / "plain.pth", bert, heads, prefix="")
    for file in (path, plain):
        states = rewards.labeler(config(folder, file))(TEXTS)
        assert states.dtype == np.int8
        assert states.shape == (len(TEXTS), 14)
        assert (states == expected).all()
    assert rewards.labeler(config(folder, path))([]).shape == (0, 14)


def test_chexbert_labels_go_by_name(tmp_path):
    """Constant heads: what one says must arrive under its name."""
    said = {"Lung Opacity": 1, "Lung Lesion": 2, "Edema": 3, "No Finding": 1}
    heads = random_heads(16)
    for name, head in zip(CHEXBERT, heads):
        head.weight.data.zero_()
        head.bias.data = torch.arange(len(head.bias)).eq(said.get(name, 0)).float()
    path = checkpoint(tmp_path / "c.pth", random_bert(hidden=16, heads=1), heads)
    (row,) = rewards.labeler(config(tokenizer_folder(tmp_path / "bert"), path))(["Edema."])
    assert {label: int(state) for label, state in zip(LABELS, row) if state} == said


def test_chexbert_is_loaded_once(chexbert):
    folder, _, _, path = chexbert
    assert rewards.labeler(config(folder, path)) is rewards.labeler(config(folder, path))


def test_chexbert_labels_are_kept_by_text(chexbert, monkeypatch, runs):
    folder, _, _, path = chexbert
    label = rewards.labeler(config(folder, path))
    texts = TEXTS[2:12]
    first = label(texts * 2)
    # A text twice runs once.
    assert [len(run) for run in runs] == [10]
    assert (label(texts[::-1]) == first[9::-1]).all()
    assert len(runs) == 1
    monkeypatch.setattr(scorer, "CACHED", 4)
    more = texts + TEXTS[20:21]
    assert (label(more) == label(more)).all()
    # All but the last four were dropped.
    assert [len(run) for run in runs] == [10, 1, 7]


def changed(path, key, value=None):
    """The path of the checkpoint without a weight, or with another one."""
    state = torch.load(path, weights_only=True)
    del state["model_state_dict"][f"module.{key}"]
    if value is not None:
        state["model_state_dict"][f"module.{key}"] = value
    torch.save(state, path)
    return path


def saved(content, path):
    torch.save(content, path)
    return path


LAYER = "bert.encoder.layer.2.attention.self.query.weight"
BROKEN = [
    (lambda path: path + ".absent", "absent': .*no such file"),
    (lambda path: __file__, "not a CheXbert checkpoint .*weights alone"),
    (lambda path: str(ROOT), "not a CheXbert checkpoint .*IsADirectory"),
    (lambda path: saved({"state_dict": {}}, path), "lacks 'model_state_dict'"),
    (
        lambda path: saved({"model_state_dict": {}, "cfg": argparse.Namespace()}, path),
        "weights alone",
    ),
    (lambda path: saved([1], path), "not a CheXbert checkpoint .*TypeError"),
    (
        lambda path: changed(path, "bert.embeddings.word_embeddings.weight"),
        "lacks 'bert.embeddings.word_embeddings",
    ),
    (lambda path: changed(path, LAYER), "lacks 'bert.encoder.layer.2.att"),
    (lambda path: changed(path, "linear_heads.13.bias"), "lacks 'linear_heads.13.bias'"),
    (
        lambda path: changed(path, "linear_heads.13.weight", torch.zeros(4, 128)),
        "size mismatch for linear_heads.13",
    ),
]


@pytest.mark.parametrize("break_it, message", BROKEN)
def test_chexbert_errors_name_key_and_file(chexbert, break_it, message):
    folder, _, _, path = chexbert
    with pytest.raises(InputError, match=f"rewards.chexbert=.*{message}") as error:
        rewards.check_rewards(config(folder, break_it(path)))
    assert "\n" not in str(error.value)
    assert "give chexbert.pth" in str(error.value)


def test_tokenizer_errors_name_key_and_file(chexbert, tmp_path):
    _, _, _, path = chexbert
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "absent", "absent.*OSError"),
        (tmp_path / "empty", "empty.*5 words instead of"),
        (tokenizer_folder(tmp_path / "small", WORDS[:-1]), "small.*24 words instead of 25"),
    ):
        with pytest.raises(InputError, match=f"rewards.bert=.*{message}.*give a folder") as error:
            rewards.check_rewards(config(str(folder), path))
        assert "\n" not in str(error.value)


def test_chexbert_from_the_configuration_to_the_reward(chexbert):
    folder, *network, path = chexbert
    cfg = load(
        f"rewards.chexbert={path}",
        f"rewards.bert={folder}",
        "rewards.report={mccs: 0.25, label_f1: 1}",
    ).rewards
    rewards.check_rewards(cfg)
    answers = [*random_texts(12, 1, 20, SAID), ""]
    references = [*random_texts(12, 2, 20, SAID), "Edema."]
    examples = [example(answer=text) for text in references]
    total, components = rewards.score_completions(answers, examples, cfg)

    a, b = (array_by_hand(texts[:12], folder, *network) for texts in (answers, references))
    mccs, f1 = components["mccs"], components["label_f1"]
    assert mccs[:12] == pytest.approx(rewards.mccs(a, b))
    assert f1[:12] == pytest.approx(rewards.label_f1(a, b))
    assert mccs.any()
    assert f1.any()
    assert total == pytest.approx(mccs / 4 + f1)
    # Labels that are read in an empty text earn nothing.
    assert rewards.labeler(cfg)([""])[0, 1:].any()
    assert total[12] == 0


def test_evaluation_reads_labels_with_the_configured_labeler(chexbert, tmp_path):
    folder, *network, path = chexbert
    cfg = load(f"out={tmp_path}", f"rewards.chexbert={path}", f"rewards.bert={folder}")
    answers, references = random_texts(8, 3, 20, SAID), random_texts(8, 4, 20, SAID)
    rows, right = [], []
    for i, (answer, reference) in enumerate(zip(answers, references)):
        study = example(answer=reference, name=f"r{i}")
        rows.append(evaluation.prediction_record(study, answer))
        right.append(evaluation.prediction_record(study, reference))
    results = evaluation.summarise({"a": rows, "b": right}, cfg)["reports"]["ce_f1_micro13"]

    found, true = (
        np.isin(array_by_hand(texts, folder, *network)[:, 1:], (1, 3))
        for texts in (answers, references)
    )
    micro = 2 * (found & true).sum() / (found.sum() + true.sum())
    assert results["a"]["value"] == pytest.approx(micro)
    assert results["b"]["difference"][0] == pytest.approx(1 - micro)


def test_evaluation_stops_before_decoding_where_the_labeler_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_split", lambda *args: pytest.fail("reads data"))
    monkeypatch.setattr(model, "load_policy", lambda *args: pytest.fail("loads the model"))
    cfg = load(f"out={tmp_path}", "rewards.chexbert=absent.pth")
    with pytest.raises(InputError, match=r"rewards\.chexbert='absent\.pth'"):
        evaluation.evaluate_checkpoints(cfg, {"a": "tiny"})


def test_any_output_is_safe_for_the_network(chexbert):
    folder, _, _, path = chexbert
    cfg = RewardsConfig(report={"mccs": 1.0, "label_f1": 1.0}, bert=folder, chexbert=path)
    examples = [example(answer="Mild edema.")] * len(NASTY)
    total, _ = rewards.score_completions(NASTY, examples, cfg)
    assert np.isfinite(total).all()


WITHOUT_TORCH = """
import sys
sys.modules |= {"torch": None, "transformers": None}
import rewards
from runtime.config import RewardsConfig
cfg = RewardsConfig()
rewards.check_rewards(cfg)
print(rewards.labeler(cfg)(["Edema."])[0, 5])
"""


def test_rules_need_no_torch():
    out = subprocess.check_output([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, text=True)
    assert out == f"{POSITIVE}\n"
