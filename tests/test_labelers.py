"""The networks of rewards.py, tiny ones: CheXbert against a forward pass by hand, bertscore against bert-score."""

import argparse
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from bert_score import BERTScorer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

import data
import eval as evaluation
import model
import rewards
from conftest import ROOT
from rewards import LABELS, POSITIVE
from test_eval import report
from test_rewards import NASTY, example

WORDS = "the heart lungs are is no not clear normal large effusion edema pneumonia left right small in ##s . ,".split()
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
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n"
    )
    return str(folder)


def random_bert(seed=2, **sizes):
    """A BERT whose weights are so large that every token and every position matters, and no two texts look alike."""
    torch.manual_seed(seed)
    bert = BertModel(
        BertConfig(
            **{
                "vocab_size": len(WORDS) + 5,
                "hidden_size": 128,
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
                "intermediate_size": 40,
            }
            | sizes
        )
    ).eval()
    for p in bert.parameters():
        p.data.add_(0.3 * torch.randn(p.shape))
    return bert


def checkpoint(path, bert, heads, prefix="module."):
    """chexbert.pth as published: from a DataParallel module with a buffer of positions, in torch's old file format."""
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


def config(folder, path, **changes):
    return data.RewardsConfig(**{"labeler": "chexbert", "bert": folder, "chexbert": path} | changes)


def random_texts(n, seed, longest):
    rng = random.Random(seed)
    words = [*WORDS[:-3], ",", "Hearts.", "unseen"]
    return [" ".join(rng.choices(words, k=rng.randrange(1, longest))) for _ in range(n)]


LONG = [
    " ".join(random.Random(n).choices(WORDS[:10], k=n))
    for n in (509, 510, 511, 512, 513, 700, 701, 702, 1500)
]
TEXTS = [
    "",
    " \n\t",
    "\n No effusion.\n\nHeart\x0cnormal ",
    "edema [SEP] left",
    *random_texts(90, 0, 40),
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
    for ids in (ids_by_hand(text, folder) for text in texts):
        with torch.no_grad():
            logits = [head(bert(torch.tensor([ids]))[0][0, 0]) for head in heads]
        assert (
            min(float(x.sort().values.diff()[-1]) for x in logits) > 1e-4
        )  # no tie that rounding could turn
        result.append({name: int(x.argmax()) for name, x in zip(CHEXBERT, logits, strict=True)})
    return result


@pytest.fixture
def runs(monkeypatch):
    """The texts, as token ids, of every forward pass of a BERT from here on: a list of lists of lists."""
    runs, forward = [], BertModel.forward

    def spy(self, ids, attention_mask):
        runs.append([row[mask > 0].tolist() for row, mask in zip(ids, attention_mask)])
        return forward(self, ids, attention_mask=attention_mask)

    monkeypatch.setattr(BertModel, "forward", spy)
    return runs


def test_chexbert_reads_a_text_as_published(chexbert, runs):
    """Whitespace, what is cut and [SEP]; each text once."""
    folder, _, _, path = chexbert
    rewards.labeler(config(folder, path))(TEXTS)
    ids = [ids_by_hand(text, folder) for text in TEXTS]
    assert sorted(ids[1:]) == sorted(row for run in runs for row in run) and ids[0] == ids[1]
    assert max(map(len, ids)) == 512 and len(runs) == 2


def test_chexbert_equals_the_forward_pass_by_hand(chexbert, tmp_path):
    folder, bert, heads, path = chexbert
    expected = states_by_hand(TEXTS, folder, bert, heads)
    for label in LABELS:
        assert len({row[label] for row in expected}) > 1, label  # every head tells texts apart
    plain = checkpoint(tmp_path / "plain.pth", bert, heads, prefix="")
    for file in (path, plain):
        states = rewards.labeler(config(folder, file))(TEXTS)
        assert states.dtype == np.int8 and states.shape == (len(TEXTS), 14)
        for text, row, by_hand in zip(TEXTS, states, expected):
            assert dict(zip(LABELS, row.tolist())) == by_hand, text
    assert rewards.labeler(config(folder, path))([]).shape == (0, 14)


def test_chexbert_labels_go_by_name(tmp_path):
    """Constant heads: what one says must arrive under its name."""
    said = {"Lung Opacity": 1, "Lung Lesion": 2, "Edema": 3, "No Finding": 1}
    heads = random_heads(16)
    for name, head in zip(CHEXBERT, heads):
        head.weight.data.zero_()
        head.bias.data = torch.arange(len(head.bias)).eq(said.get(name, 0)).float()
    bert = random_bert(hidden_size=16, num_attention_heads=1)
    path = checkpoint(tmp_path / "c.pth", bert, heads)
    (row,) = rewards.labeler(config(tokenizer_folder(tmp_path / "bert"), path))(["Edema."])
    assert {label: int(state) for label, state in zip(LABELS, row) if state} == said


def test_chexbert_labels_are_kept_by_text(chexbert, monkeypatch, runs):
    folder, _, _, path = chexbert
    label = rewards.labeler(config(folder, path))
    assert rewards.labeler(config(folder, path)) is label  # loaded once
    texts = TEXTS[2:12]
    first = label(texts * 2)
    assert [len(run) for run in runs] == [10]  # a text twice runs once
    assert (label(texts[::-1]) == first[9::-1]).all() and len(runs) == 1
    monkeypatch.setattr(rewards, "CACHED", 4)
    assert (label(texts + TEXTS[20:21]) == label(texts + TEXTS[20:21])).all()
    assert [len(run) for run in runs] == [10, 1, 7]  # all but the last four were dropped


def changed(path, key, value=None):
    """The path of the checkpoint without a weight, or with another one."""
    state = torch.load(path, weights_only=True)
    del state["model_state_dict"][f"module.{key}"]
    if value is not None:
        state["model_state_dict"][f"module.{key}"] = value
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda path: "", "rewards.chexbert='': .*no such file"),
        (lambda path: path + ".absent", "rewards.chexbert='.*absent': .*no such file"),
        (lambda path: __file__, "rewards.chexbert=.*not a CheXbert checkpoint .*weights alone"),
        (lambda path: str(ROOT), "rewards.chexbert=.*not a CheXbert checkpoint .*IsADirectory"),
        (
            lambda path: torch.save({"state_dict": {}}, path) or path,
            "rewards.chexbert=.*lacks 'model_state_dict'",
        ),
        (
            lambda path: (
                torch.save({"model_state_dict": {}, "cfg": argparse.Namespace()}, path) or path
            ),
            "weights alone",
        ),
        (
            lambda path: torch.save([1], path) or path,
            "rewards.chexbert=.*not a CheXbert checkpoint .*TypeError",
        ),
        (
            lambda path: changed(path, "bert.embeddings.word_embeddings.weight"),
            "lacks 'bert.embeddings.word_embeddings",
        ),
        (
            lambda path: changed(path, "bert.encoder.layer.2.attention.self.query.weight"),
            "lacks 'bert.encoder.layer.2.att",
        ),
        (
            lambda path: changed(path, "linear_heads.13.bias"),
            "rewards.chexbert=.*lacks 'linear_heads.13.bias'",
        ),
        (
            lambda path: changed(path, "linear_heads.13.weight", torch.zeros(4, 128)),
            "size mismatch for linear_heads.13",
        ),
    ],
)
def test_chexbert_errors_name_key_and_file(chexbert, break_it, message):
    folder, _, _, path = chexbert
    with pytest.raises(ValueError, match=message) as error:
        rewards.check_rewards(config(folder, break_it(path)))
    assert "\n" not in str(error.value) and "give chexbert.pth" in str(error.value)


def test_tokenizer_errors_name_key_and_file(chexbert, tmp_path):
    _, _, _, path = chexbert
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "absent", "absent.*OSError"),
        (tmp_path / "empty", "empty.*5 words instead of"),
        (tokenizer_folder(tmp_path / "small", WORDS[:-1]), "small.*24 words instead of 25"),
    ):
        with pytest.raises(ValueError, match=f"rewards.bert=.*{message}.*give a folder") as error:
            rewards.check_rewards(config(str(folder), path))
        assert "\n" not in str(error.value)


def test_chexbert_from_the_configuration_to_the_reward(chexbert):
    folder, bert, heads, path = chexbert
    cfg = data.load_config(
        ROOT / "config.yaml",
        [
            "rewards.labeler=chexbert",
            f"rewards.chexbert={path}",
            f"rewards.bert={folder}",
            "rewards.report={mccs: 0.25, label_f1: 1}",
        ],
    )
    rewards.check_rewards(cfg.rewards)
    answers, references = random_texts(12, 1, 20), random_texts(12, 2, 20)
    examples = [example(answer=text) for text in references + ["Edema."]]
    total, parts = rewards.score_completions(answers + [""], examples, cfg.rewards, "plain")
    a, b = (
        np.array(
            [[row[label] for label in LABELS] for row in states_by_hand(texts, folder, bert, heads)]
        )
        for texts in (answers, references)
    )
    assert parts["mccs"][:12] == pytest.approx(rewards.mccs(a, b)) and parts["mccs"].any()
    assert (
        parts["label_f1"][:12] == pytest.approx(rewards.label_f1(a, b)) and parts["label_f1"].any()
    )
    assert total == pytest.approx(parts["mccs"] / 4 + parts["label_f1"])
    assert (
        rewards.labeler(cfg.rewards)([""])[0, 1:].any() and total[12] == 0
    )  # labels read in silence earn nothing


def test_evaluation_reads_labels_with_the_configured_labeler(chexbert, tmp_path):
    folder, bert, heads, path = chexbert
    cfg = data.load_config(
        ROOT / "config.yaml",
        [
            f"out={tmp_path}",
            "eval.bootstrap=5",
            "rewards.labeler=chexbert",
            f"rewards.chexbert={path}",
            f"rewards.bert={folder}",
        ],
    )
    rows = [
        report(i, *texts)
        for i, texts in enumerate(zip(random_texts(8, 3, 20), random_texts(8, 4, 20)))
    ]
    results = evaluation.summarise(
        {"a": rows, "b": [p | {"answer": p["reference"]} for p in rows]}, cfg
    )
    y_pred, y_true = (
        np.array(
            [
                [row[label] in (1, 3) for label in LABELS[1:]]
                for row in states_by_hand([p[key] for p in rows], folder, bert, heads)
            ]
        )
        for key in ("answer", "reference")
    )
    micro = 2 * (y_pred & y_true).sum() / (y_pred.sum() + y_true.sum())
    assert results["reports"]["ce_f1_micro13"]["a"]["value"] == pytest.approx(micro)
    assert results["reports"]["ce_f1_micro13"]["b"]["difference"][0] == pytest.approx(1 - micro)


def test_evaluation_stops_before_decoding_where_the_labeler_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_split", lambda *args: pytest.fail("reads data"))
    monkeypatch.setattr(model, "load_policy", lambda *args: pytest.fail("loads the model"))
    cfg = data.load_config(ROOT / "config.yaml", [f"out={tmp_path}", "rewards.labeler=chexbert"])
    with pytest.raises(rewards.RewardError, match="rewards.chexbert=''"):
        evaluation.evaluate_checkpoints(cfg, {"a": "tiny"})


# ------------------------------------------------------------------------------------------------------ BERTScore


def encoder_folder(folder, positions=40, **tokenizer):
    tokenizer = BertTokenizer.from_pretrained(tokenizer_folder(folder), **tokenizer)
    tokenizer.save_pretrained(folder)
    random_bert(
        7, hidden_size=8, num_attention_heads=2, max_position_embeddings=positions
    ).save_pretrained(folder)
    return str(folder)


PAIRS = [*zip(random_texts(80, 5, 30), random_texts(40, 6, 30) + random_texts(40, 7, 4))] + [
    ("heart", "heart"),
    ("edema " * 40, "left edema " * 50),
    ("no [SEP] effusion", " no effusion\n"),
    ("[CLS]", "heart"),
    ("heart", ""),
    ("", "heart"),
    ("", ""),
    (" \n", "no edema"),
]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_bertscore_equals_the_package(tmp_path, layer):
    folder = encoder_folder(tmp_path / "encoder", model_max_length=32)
    scorer = BERTScorer(model_type=folder, num_layers=layer or 3, device="cpu", idf=False)
    bert = scorer._tokenizer  # transformers 5 has lost what the package asks for ""
    bert.build_inputs_with_special_tokens = lambda ids: [bert.cls_token_id, *ids, bert.sep_token_id]
    expected = [scorer.score([a], [b])[2].item() for a, b in PAIRS]
    a, b = map(list, zip(*PAIRS))
    scores = rewards.bertscore(a, b, folder, layer)
    assert scores == pytest.approx(expected, abs=1e-5)
    # In a batch, the package lets the 0 of padding win over negative similarities; no score here depends on its batch.
    assert scorer.score(a, b)[2].tolist() != pytest.approx(expected, abs=5e-3)
    assert np.std(expected) > 0.02 and scores[80] == pytest.approx(1) and scores[-4:] == [0] * 4


def test_bertscore_needs_no_tokenizer_that_knows_the_longest_text(tmp_path):
    folder, known = (
        encoder_folder(tmp_path / "a"),
        encoder_folder(tmp_path / "b", model_max_length=40),
    )
    assert AutoTokenizer.from_pretrained(folder).model_max_length > 1e9
    a, b = zip(*PAIRS)
    assert rewards.bertscore(a, b, folder) == pytest.approx(
        rewards.bertscore(a, b, known), abs=1e-6
    )


def test_bertscore_from_the_configuration_to_the_reward(tmp_path):
    folder = encoder_folder(tmp_path / "encoder")
    cfg = data.load_config(
        ROOT / "config.yaml",
        [
            f"rewards.bertscore={folder}",
            "rewards.bertscore_layer=2",
            "rewards.report={bertscore: 2}",
        ],
    ).rewards
    rewards.check_rewards(cfg)
    a, b = zip(*PAIRS)
    total, parts = rewards.score_completions(a, [example(answer=text) for text in b], cfg, "plain")
    assert parts["bertscore"] == pytest.approx(rewards.bertscore(a, b, folder, 2))
    assert total == pytest.approx(2 * parts["bertscore"])
    for changes, message in (
        ({"bertscore": ""}, "rewards.bertscore='': .*encoder"),
        ({"bertscore": f"{tmp_path}/absent"}, "rewards.bertscore='.*absent': .*OSError"),
        ({"bertscore_layer": 4}, "rewards.bertscore_layer=4: .* has 3 layers"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            rewards.check_rewards(data.RewardsConfig(**vars(cfg) | changes))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="rewards.grounding.bertscore"):
        rewards.check_rewards(data.RewardsConfig(grounding={"bertscore": 1.0}))


# ---------------------------------------------------------------------------------------------------------- both


def test_any_output_is_safe_for_the_networks(chexbert, tmp_path):
    folder, _, _, path = chexbert
    cfg = config(
        folder,
        path,
        bertscore=encoder_folder(tmp_path / "encoder"),
        report={"mccs": 1.0, "label_f1": 1.0, "bertscore": 1.0},
    )
    total, _ = rewards.score_completions(
        NASTY, [example(answer="Mild edema.")] * len(NASTY), cfg, "plain"
    )
    assert np.isfinite(total).all()


def test_rules_need_no_torch():
    code = """import sys
sys.modules |= {"torch": None, "transformers": None}
import data, rewards
rewards.check_rewards(data.RewardsConfig())
print(rewards.labeler(data.RewardsConfig())(["Edema."])[0, 5])"""
    assert (
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
        == f"{POSITIVE}\n"
    )
