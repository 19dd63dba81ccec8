"""The built-in phantoms: pure in (seed, index), plausible, true to their boxes and words."""

import re
import textwrap
from collections import Counter, defaultdict

import numpy as np
import pytest

import readers.phantom
from data import QUESTIONS
from readers.phantom import KINDS, QUESTION_NAMES, ask_boxes, draw, phantom
from readers.study import LABELS
from rewards import BLANK, NEGATIVE, POSITIVE, UNCERTAIN, extract_labels

FINDINGS = LABELS[1:]
SAID = (POSITIVE, UNCERTAIN)
# Where the splits begin.
SPLIT_STARTS = (0, 10_000_000, 20_000_000)


@pytest.fixture(scope="module")
def studies():
    return [phantom(11, index) for index in range(3000)]


def pixels(study, without=None):
    return np.asarray(draw(study, without), dtype=float)


def states_of(study):
    """{finding: state}"""
    return dict(zip(FINDINGS, study.states[1:]))


# ------------------------------------------------------------------------------- images


def test_pure_function_of_seed_and_index():
    expected = [phantom(5, index) for index in range(12)]
    drawn = [study.image.tobytes() for study in expected]
    for index in (7, 0, 11, 3, 7):
        # Made anew, not the remembered one.
        study = phantom.__wrapped__(5, index)
        # Drawn first, or only after the texts are read.
        if index % 2:
            assert study.image.tobytes() == drawn[index]
        assert study.report == expected[index].report
        assert study.thinking == expected[index].thinking
        assert study.states == expected[index].states
        assert study.boxes == expected[index].boxes
        assert study.image.tobytes() == drawn[index]
    assert phantom(6, 3).image.tobytes() != drawn[3]


def test_images_are_distinct_grey_and_of_varied_size():
    images = []
    for start in SPLIT_STARTS:
        images += [phantom(0, start + n).image for n in range(20)]
    assert len({image.tobytes() for image in images}) == len(images)
    assert {image.mode for image in images} == {"L"}
    assert len({image.size for image in images}) > 30
    for image in images:
        assert min(image.size) >= 112
        assert max(image.size) <= 144
        assert 40 < np.mean(image) < 200
        assert np.std(image) > 25


# ------------------------------------------------------------------------------- findings


def share_of(label, studies):
    return np.mean([label in study.boxes for study in studies])


def test_half_of_the_studies_are_normal(studies):
    assert 0.45 < np.mean([not study.findings for study in studies]) < 0.58


@pytest.mark.parametrize("label", FINDINGS)
def test_prevalence(studies, label):
    low, high = (0.012, 0.035) if label in ("Pneumothorax", "Fracture") else (0.02, 0.16)
    assert low < share_of(label, studies) < high


def test_prevalence_is_long_tailed(studies):
    shares = [share_of(label, studies) for label in FINDINGS]
    assert max(shares) > 4 * min(shares)


@pytest.mark.parametrize(
    "one, other",
    [
        ("Pleural Effusion", "Atelectasis"),
        ("Pleural Effusion", "Edema"),
        ("Pleural Effusion", "Cardiomegaly"),
        ("Pneumonia", "Consolidation"),
        ("Pneumonia", "Lung Opacity"),
        ("Support Devices", "Pleural Effusion"),
        ("Support Devices", "Edema"),
        ("Support Devices", "Pneumothorax"),
        ("Cardiomegaly", "Edema"),
    ],
)
def test_findings_keep_company(studies, one, other):
    both = np.mean([one in study.boxes and other in study.boxes for study in studies])
    assert both > 1.5 * share_of(one, studies) * share_of(other, studies)


def test_a_finding_is_a_function_and_a_row(monkeypatch):
    """The example of the docstring: cavities are darker than the lung, in their box."""
    example = re.search(r"(    def cavity.*?)\n\n    (\S.*?)\n", readers.phantom.__doc__, re.S)
    names = dict(vars(readers.phantom))
    exec(textwrap.dedent(example[1]), names)
    row = eval(f"{{{example[2]}}}", names)
    monkeypatch.setitem(KINDS, "Lung Lesion", row["Lung Lesion"])

    seen = 0
    for index in range(200):
        # Made anew, not the remembered one.
        study = phantom.__wrapped__(8, index)
        for x1, y1, x2, y2 in study.boxes.get("Lung Lesion", ()):
            seen += 1
            assert 0.06 < x2 - x1 < 0.16
            change = pixels(study) - pixels(study, "Lung Lesion")
            width, height = study.size
            window = change[int(y1 * height) : int(y2 * height), int(x1 * width) : int(x2 * width)]
            assert window.mean() < -5
            if study.states[LABELS.index("Lung Lesion")]:
                assert "cavity in the" in study.thinking
    assert seen > 3


# ------------------------------------------------------------------------------- boxes


def test_boxes_are_inside_the_image(studies):
    for study in studies:
        assert set(study.boxes) == {finding.label for finding in study.findings}
        for finding in study.findings:
            assert finding.boxes
            assert list(finding.boxes) == study.boxes[finding.label]
            for x1, y1, x2, y2 in finding.boxes:
                assert 0 <= x1 < x2 - 0.02
                assert 0 <= y1 < y2 - 0.02
                assert max(x2, y2) <= 1


def test_boxes_are_on_the_stated_side(studies):
    """The patient's left is on the image's right."""
    seen = Counter()
    for study in studies:
        for finding in study.findings:
            if finding.label == "Support Devices":
                continue
            centres = [(box[0] + box[2]) / 2 - study.anatomy.x for box in finding.boxes]
            seen[finding.side] += 1
            if finding.side == "left":
                assert min(centres) > 0
            if finding.side == "right":
                assert max(centres) < 0
            if finding.side == "both":
                assert min(centres) < 0 < max(centres)
    assert set(seen) == {"left", "right", "both", ""}


def changes(study, finding):
    """What redrawing without a finding changes.

    The share of the change that is inside the boxes, its mean there, and how much of the extent of
    a box is filled, on average.
    """
    change = np.abs(pixels(study) - pixels(study, finding.label))
    inside, filled = np.zeros(change.shape, bool), []
    for box in finding.boxes:
        x1, y1, x2, y2 = np.array(box) * (study.size * 2)
        window = slice(int(y1), int(np.ceil(y2))), slice(int(x1), int(np.ceil(x2)))
        inside[window] = True
        part = change[window]
        rows, columns = np.nonzero(part > 0.25 * np.percentile(part, 98))
        filled.append(np.ptp(rows) * np.ptp(columns) / part.size)
    return change[inside].sum() / change.sum(), change[inside].mean(), np.mean(filled)


def test_boxes_hold_the_pixels_of_their_finding(studies):
    seen = defaultdict(list)
    for study in studies[:900]:
        for finding in study.findings:
            if len(seen[finding.label]) < 12:
                seen[finding.label].append(changes(study, finding))
    assert set(seen) == set(FINDINGS)
    for label, rows in seen.items():
        share, visible, filled = np.transpose(rows)
        assert share.min() > 0.9, label
        # Grey levels out of 255.
        assert visible.mean() > 10, label
        assert visible.min() > 3, label
        assert filled.mean() > 0.5, label


# ------------------------------------------------------------------------------- texts


def test_states_are_what_the_report_says(studies):
    some = studies[:2000]
    states = np.array([study.states for study in some])
    agree = extract_labels([study.report for study in some]) == states
    assert agree.mean() >= 0.98
    for label, share in zip(LABELS, agree.mean(0)):
        assert share >= 0.97, label
    # All findings but devices are affirmed and hedged.
    for state in SAID:
        assert (states[:, 1:13] == state).any(0).all()


def expected_states(finding):
    """The states that the report may give a label. finding: None where it is not drawn."""
    if finding is None:
        return (NEGATIVE, BLANK)
    if not finding.mentioned:
        return (BLANK,)
    return (POSITIVE,) if finding.certain else (UNCERTAIN,)


def test_states_follow_the_findings(studies):
    for study in studies:
        findings = {finding.label: finding for finding in study.findings}
        states = states_of(study)
        for label, state in states.items():
            assert state in expected_states(findings.get(label)), (study.report, label)
        # No Finding: devices do not count.
        nothing = not any(states[label] in SAID for label in FINDINGS[:-1])
        assert (study.states[0] == POSITIVE) == nothing


def test_some_findings_are_not_mentioned_or_hedged(studies):
    findings = []
    for study in studies:
        findings += study.findings
    assert 0.18 < np.mean([not finding.mentioned for finding in findings]) < 0.28
    assert 0.08 < np.mean([not finding.certain for finding in findings]) < 0.25


def test_reports_vary_around_a_normal_template(studies):
    reports = Counter(study.report for study in studies)
    (_, most), *_ = reports.most_common(1)
    assert len(reports) > 0.6 * len(studies)
    assert 0.02 < most / len(studies) < 0.15

    words = [len(study.report.split()) for study in studies]
    assert 18 < np.median(words) < 40
    assert min(words) >= 4
    assert max(words) < 90
    sentences = [study.report.count(". ") + 1 for study in studies]
    assert np.percentile(sentences, 10) >= 3

    vocabulary = set()
    for study in studies:
        text = f"{study.report} {study.thinking}".lower()
        vocabulary |= {word.strip(".,:") for word in text.split()}
    assert len(vocabulary) < 200


def test_what_normal_reports_deny(studies):
    states = np.array([study.states for study in studies if not study.findings])
    denied = dict(zip(LABELS, (states == NEGATIVE).mean(0)))
    assert 0.5 < denied["Pneumothorax"] < 0.99
    assert denied["Lung Lesion"] < 0.1


# How a trace calls a finding, where it is not by its label.
NAMES = {
    "Enlarged Cardiomediastinum": ("widening",),
    "Lung Lesion": ("nodule", "mass"),
    "Lung Opacity": ("opacity",),
    "Pleural Other": ("thickening", "plaque"),
    "Pleural Effusion": ("effusion",),
    "Support Devices": ("tube", "catheter", "pacemaker"),
}
REGIONS = ["Heart", "Mediastinum", "Right lung", "Left lung", "Pleura", "Bones", "Devices"]


def test_thinking_names_what_the_report_names(studies):
    for study in studies:
        regions = dict(part.split(": ") for part in study.thinking.rstrip(".").split(". "))
        assert list(regions) == REGIONS
        everything = " ".join(regions.values())
        for label, state in states_of(study).items():
            names = NAMES.get(label, (label.lower(),))
            said = any(name in everything for name in names)
            assert said == (state in SAID), (label, study.thinking)
        for finding in study.findings:
            if finding.mentioned and finding.zone:
                place = f"{finding.side} {finding.zone}"
                assert place in regions[f"{finding.side.capitalize()} lung"]
        if UNCERTAIN in study.states:
            assert "possible" in study.thinking


@pytest.mark.parametrize("label", FINDINGS)
def test_grounding_questions_name_the_label(label):
    rng = np.random.default_rng(0)
    study = phantom(0, 0)
    questions = {ask_boxes(study, label, rng, QUESTIONS).question for _ in range(60)}
    assert len(questions) >= 4
    for question in questions:
        assert "{" not in question
        assert QUESTION_NAMES[label] in question


def test_a_question_names_an_effusion():
    rng = np.random.default_rng(0)
    asked = ask_boxes(phantom(0, 0), "Pleural Effusion", rng, QUESTIONS)
    assert "pleural effusion" in asked.question
