"""The supervised loss against one plain forward per question, and the schedule by hand."""

import dataclasses

import pytest
import torch

import data
import train_sft
from test_model import plain_logits


def test_loss_and_gradients_equal_plain_forwards(policy, config, examples):
    """Several studies, several questions about each: only answers count, whatever is shared."""
    studies = sorted(data.by_study(examples), key=len)[::40]  # of one question and of several
    assert len(studies[0]) < len(studies[-1])
    encoded = train_sft.encode_studies(policy, studies)
    flat, answers = (
        [e for study in studies for e in study],
        [policy.encode_target(e) for study in studies for e in study],
    )
    assert train_sft.answer_tokens(encoded) == sum(map(len, answers))
    weights = [p for p in policy.parameters() if p.ndim > 1]

    wanted = (
        sum(
            torch.nn.functional.cross_entropy(
                plain_logits(policy, policy.encode(e), ids), ids, reduction="sum"
            )
            for e, ids in zip(flat, answers)
        )
        / 77
    )
    expected = torch.autograd.grad(wanted, weights, allow_unused=True)
    loss = train_sft.sft_loss(policy, encoded, 77)
    for got, want in zip(torch.autograd.grad(loss, weights, allow_unused=True), expected):
        assert want is None or (got - want).norm() <= 1e-5 * want.norm()
    assert abs(loss - wanted) < 1e-5 * wanted
    with torch.no_grad():
        assert abs(train_sft.sft_loss(policy, encoded, 77) - wanted) < 1e-5 * wanted


def test_answers_that_cannot_be_used_stop_or_are_skipped(policy, config, examples, capsys):
    """An image token in question or answer: one line, or the study's other questions alone."""
    study = next(s for s in data.by_study(examples) if len(s) > 1)
    whole = train_sft.encode_studies(policy, [study])[0]
    for key, said in (("answer", "its answer contains"), ("question", "its question contains")):
        broken = [
            study[0],
            dataclasses.replace(study[1], **{key: "here <|image_pad|> there"}),
            *study[2:],
        ]
        with pytest.raises(data.InputError, match=said):
            train_sft.encode_studies(policy, [broken])
        policy.config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, on_error="skip")
        )
        ((_, rows, lengths),) = train_sft.encode_studies(policy, [broken])
        assert lengths == whole[2][:1] + whole[2][2:] and all(
            map(torch.equal, rows, whole[1][:1] + whole[1][2:])
        )
        assert (
            train_sft.encode_studies(policy, [[broken[1]]]) == []
            and said in capsys.readouterr().err
        )
        policy.config = config


def test_learning_rate_by_hand():
    rates = [train_sft.learning_rate(step, 12, 4, 8.0) for step in range(12)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0] and abs(rates[8] - 4.0) < 1e-12
    assert all(a > b > 0 for a, b in zip(rates[4:], rates[5:]))
