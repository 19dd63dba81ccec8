"""The supervised loss against one plain forward per question, and the schedule by hand."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from helpers import SMALL, load, plain_logprobs, relative_distance, tolerance

import data
from runtime.config import InputError
from train_sft import count_answer_tokens, encode_studies, learning_rate, sft_loss

pytestmark = pytest.mark.gpu


def test_loss_and_gradients_equal_plain_forwards(policy, examples):
    """Several studies, several questions about each: only answers count, whatever is shared."""
    # Of one question and of several.
    studies = sorted(data.by_study(examples), key=len)[::40]
    assert len(studies[0]) < len(studies[-1])
    asked = [e for study in studies for e in study]
    answers = [policy.encode_target(e) for e in asked]
    encoded = encode_studies(policy, studies)
    assert count_answer_tokens(encoded) == sum(map(len, answers))

    pairs = zip(asked, answers)
    plain = [plain_logprobs(policy, policy.encode(e), ids).sum() for e, ids in pairs]
    wanted = -sum(plain) / 77
    loss = sft_loss(policy, encoded, 77)
    limit = tolerance("gradients", policy.device)
    assert abs(loss - wanted) < limit * wanted
    weights = [p for p in policy.parameters() if p.ndim > 1]
    expected = torch.autograd.grad(wanted, weights, allow_unused=True)
    for got, want in zip(torch.autograd.grad(loss, weights, allow_unused=True), expected):
        assert want is None or relative_distance(got, want) <= limit
    with torch.no_grad():
        assert abs(sft_loss(policy, encoded, 77) - wanted) < limit * wanted


@pytest.mark.parametrize("key", ["answer", "question"])
def test_examples_that_cannot_be_used_stop_or_are_skipped(
    policy, examples, capsys, monkeypatch, key
):
    """An image token in question or answer: one line, or the study's other questions alone."""
    study = next(s for s in data.by_study(examples) if len(s) > 1)
    (whole,) = encode_studies(policy, [study])
    unusable = dataclasses.replace(study[1], **{key: "here <|image_pad|> there"})
    broken = [study[0], unusable, *study[2:]]
    message = f"its {key} contains"
    with pytest.raises(InputError, match=message):
        encode_studies(policy, [broken])

    monkeypatch.setattr(policy, "config", load(*SMALL, "data.on_error=skip"))
    (rest,) = encode_studies(policy, [broken])
    assert rest.answer_lengths == whole.answer_lengths[:1] + whole.answer_lengths[2:]
    assert all(map(torch.equal, rest.rows, whole.rows[:1] + whole.rows[2:]))
    assert encode_studies(policy, [[unusable]]) == []
    assert message in capsys.readouterr().err


def test_learning_rate_by_hand():
    rates = [learning_rate(step, 12, 4, 8.0) for step in range(12)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[8] == pytest.approx(4.0, abs=1e-12)
    assert all(a > b > 0 for a, b in pairwise(rates[4:]))
