"""The built-in phantoms: pure in (seed, index), plausible in number and company, true to their boxes and words."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from data import QUESTIONS
from readers.phantom import LABELS, ask_boxes, draw, phantom
from rewards import extract_labels

FINDINGS = LABELS[1:]
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = range(4)


@pytest.fixture(scope="module")
def studies():
    return [phantom(11, index) for index in range(3000)]


def pixels(study, without=None):
    return np.asarray(draw(study, without), dtype=float)


def test_pure_function_of_seed_and_index():
    expected = {
        index: (phantom(5, index), phantom(5, index).image.tobytes()) for index in range(12)
    }
    for index in (7, 0, 11, 3, 7):
        study = phantom.__wrapped__(5, index)  # made anew, not the remembered one
        image = (
            study.image.tobytes() if index % 2 else None
        )  # drawn first, or only after the texts are read
        assert (study.report, study.thinking, study.states, study.boxes) == (
            expected[index][0].report,
            expected[index][0].thinking,
            expected[index][0].states,
            expected[index][0].boxes,
        )
        assert (image or study.image.tobytes()) == expected[index][1]
    assert phantom(6, 3).image.tobytes() != expected[3][1]


def test_images_are_distinct_grey_and_of_varied_size():
    split_starts = (0, 10_000_000, 20_000_000)
    images = [phantom(0, start + n).image for start in split_starts for n in range(20)]
    assert len({image.tobytes() for image in images}) == len(images)
    assert {image.mode for image in images} == {"L"} and len({image.size for image in images}) > 30
    assert all(112 <= side <= 144 for image in images for side in image.size)
    assert all(40 < np.mean(image) < 200 and np.std(image) > 25 for image in images)


def test_prevalence_is_long_tailed(studies):
    share = {label: np.mean([label in study.boxes for study in studies]) for label in FINDINGS}
    assert 0.45 < np.mean([not study.findings for study in studies]) < 0.58
    for label in FINDINGS:
        low, high = (0.012, 0.035) if label in ("Pneumothorax", "Fracture") else (0.02, 0.16)
        assert low < share[label] < high, (label, share[label])
    assert max(share.values()) > 4 * min(share.values())


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
    first, second = (
        np.array([label in study.boxes for study in studies]) for label in (one, other)
    )
    assert (first & second).mean() > 1.5 * first.mean() * second.mean()


def test_boxes_are_inside_the_image_and_on_the_stated_side(studies):
    for study in studies:
        assert set(study.boxes) == {finding.label for finding in study.findings}
        for finding in study.findings:
            assert list(finding.boxes) == study.boxes[finding.label] and finding.boxes
            for x1, y1, x2, y2 in finding.boxes:
                assert 0 <= x1 < x2 - 0.02 and 0 <= y1 < y2 - 0.02 and max(x2, y2) <= 1
            centres = [(box[0] + box[2]) / 2 - study.anatomy.x for box in finding.boxes]
            if finding.label != "Support Devices":  # the patient's left is on the image's right
                assert finding.side != "left" or min(centres) > 0
                assert finding.side != "right" or max(centres) < 0
                assert finding.side != "both" or min(centres) < 0 < max(centres)


def test_boxes_hold_the_pixels_of_their_finding(studies):
    """Redrawn without one finding, the image changes visibly, inside the boxes, and over most of their extent."""
    seen = defaultdict(list)
    for study in studies[:900]:
        for finding in study.findings:
            if len(seen[finding.label]) == 12:
                continue
            change = np.abs(pixels(study) - pixels(study, finding.label))
            inside, filled = np.zeros(change.shape, bool), []
            for box in finding.boxes:
                x1, y1, x2, y2 = np.array(box) * (study.size * 2)
                window = slice(int(y1), int(np.ceil(y2))), slice(int(x1), int(np.ceil(x2)))
                inside[window] = True
                part = change[window]
                rows, columns = np.nonzero(part > 0.25 * np.percentile(part, 98))
                filled.append(np.ptp(rows) * np.ptp(columns) / part.size)
            seen[finding.label].append(
                (change[inside].sum() / change.sum(), change[inside].mean(), np.mean(filled))
            )
    assert set(seen) == set(FINDINGS)
    for label, rows in seen.items():
        share, visible, filled = np.transpose(rows)
        assert share.min() > 0.9, label
        assert visible.mean() > 10 and visible.min() > 3, label  # grey levels out of 255
        assert filled.mean() > 0.5, label


def test_states_are_what_the_report_says(studies):
    states = np.array([study.states for study in studies[:2000]])
    agree = extract_labels([study.report for study in studies[:2000]]) == states
    assert agree.mean() >= 0.98 and agree.mean(0).min() >= 0.97, dict(
        zip(LABELS, agree.mean(0).round(3))
    )
    assert all((states[:, 1:] == state).any(0)[:12].all() for state in (POSITIVE, UNCERTAIN))


def test_states_follow_the_findings(studies):
    unmentioned, hedged, total = 0, 0, 0
    for study in studies:
        findings = {finding.label: finding for finding in study.findings}
        for label, state in zip(LABELS[1:], study.states[1:]):
            finding = findings.get(label)
            expected = (
                {NEGATIVE, BLANK}
                if finding is None
                else {BLANK}
                if not finding.mentioned
                else {POSITIVE if finding.certain else UNCERTAIN}
            )
            assert state in expected, (study.report, label)
        assert (study.states[0] == POSITIVE) == (
            not {POSITIVE, UNCERTAIN} & set(study.states[1:13])
        )
        total += len(findings)
        unmentioned += sum(not finding.mentioned for finding in study.findings)
        hedged += sum(not finding.certain for finding in study.findings)
    assert 0.18 < unmentioned / total < 0.28 and 0.08 < hedged / total < 0.25


def test_reports_vary_around_a_normal_template(studies):
    reports = Counter(study.report for study in studies)
    words = [len(study.report.split()) for study in studies]
    sentences = [study.report.count(". ") + 1 for study in studies]
    vocabulary = {
        word.strip(".,:").lower()
        for study in studies
        for word in f"{study.report} {study.thinking}".split()
    }
    assert (
        len(reports) > 0.6 * len(studies)
        and 0.02 < reports.most_common(1)[0][1] / len(studies) < 0.15
    )
    assert 18 < np.median(words) < 40 and max(words) < 90 and min(words) >= 4
    assert np.percentile(sentences, 10) >= 3 and len(vocabulary) < 200
    denied = np.mean(
        [[state == NEGATIVE for state in study.states] for study in studies if not study.findings],
        0,
    )
    assert (
        0.5 < denied[LABELS.index("Pneumothorax")] < 0.99
        and denied[LABELS.index("Lung Lesion")] < 0.1
    )


def test_thinking_names_what_the_report_names(studies):
    word = {
        "Enlarged Cardiomediastinum": "widening",
        "Cardiomegaly": "cardiomegaly",
        "Lung Lesion": ("nodule", "mass"),
        "Lung Opacity": "opacity",
        "Pleural Other": ("thickening", "plaque"),
        "Fracture": "fracture",
        "Pleural Effusion": "effusion",
        "Support Devices": ("tube", "catheter", "pacemaker"),
    }
    for study in studies:
        regions = dict(part.split(": ") for part in study.thinking.rstrip(".").split(". "))
        assert list(regions) == [
            "Heart",
            "Mediastinum",
            "Right lung",
            "Left lung",
            "Pleura",
            "Bones",
            "Devices",
        ]
        for label, state in zip(LABELS[1:], study.states[1:]):
            names = np.atleast_1d(word.get(label, label.lower()))
            said = [text for text in regions.values() if any(name in text for name in names)]
            assert bool(said) == (state in (POSITIVE, UNCERTAIN)), (label, study.thinking)
        for finding in study.findings:
            if finding.mentioned and finding.zone:
                assert (
                    f"{finding.side} {finding.zone}" in regions[f"{finding.side.capitalize()} lung"]
                )
        assert study.thinking.count("possible") >= (UNCERTAIN in study.states)


def test_grounding_questions_name_the_label():
    rng = np.random.default_rng(0)
    study = phantom(0, 0)
    for label in FINDINGS:
        questions = {ask_boxes(study, label, rng, QUESTIONS).question for _ in range(60)}
        assert len(questions) >= 4
        assert all("{" not in question for question in questions)
    assert "pleural effusion" in ask_boxes(study, "Pleural Effusion", rng, QUESTIONS).question
