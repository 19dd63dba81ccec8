"""Every dataset as it is distributed; mixtures, splits without leaks, traces, the description."""

import json
import sys
from collections import Counter
from functools import partial

import layouts
import numpy as np
import pytest
from helpers import ROOT, load
from PIL import Image

import data
from data import load_split, parse_boxes
from readers.mimic_cxr import findings_section
from readers.study import patient_of
from readers.vindr_cxr import fuse_boxes
from runtime.config import InputError, Source, config_text, load_config
from tools import inspect_data

SPLITS = ("train", "val", "test")


def of(source, root, *overrides):
    """The configuration of one dataset."""
    return load(f"data.source={source}", f"data.path={root}", *overrides)


def read_splits(config):
    """The examples of all splits of one source, without looking at their images. Unlike `splits`,
    it takes an empty split and keeps patients that are in two of them."""
    return {split: data.read_split(config, split)[0][1] for split in SPLITS}


def splits(config):
    return {split: load_split(config, split) for split in SPLITS}


def by_id(parts):
    return {e.id: e for part in parts.values() for e in part}


def kind_of(example):
    return example.kind or example.task


def only(examples, kind):
    return [e for e in examples if kind_of(e) == kind]


def counts(parts):
    """{split: {kind: number of examples}}"""
    return {split: dict(Counter(map(kind_of, part))) for split, part in parts.items()}


def sizes(parts):
    return [len(part) for part in parts.values()]


def patients_of(examples):
    return {e.patient for e in examples}


def patients(parts):
    """The set of patients of each split."""
    return list(map(patients_of, parts.values()))


def near(boxes, wanted):
    return np.shape(boxes) == np.shape(wanted) and np.allclose(boxes, wanted, atol=1e-9)


def replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


# ------------------------------------------------------------------------------- IU X-Ray


def test_iu_xray_from_openi(tmp_path):
    parts = splits(of("iu_xray", layouts.openi(tmp_path)))
    assert sizes(parts) == [7, 1, 2]
    everyone = by_id(parts)
    assert everyone["2"].answer == "Clear lungs & normal heart, study 2."
    # No findings: the impression.
    assert everyone["4"].answer == "No acute disease."
    assert everyone["2"].patient == "iu/2"
    names = [image.rpartition("/")[2] for image in everyone["2"].images]
    assert names == ["CXR2_IM-0001-4001.png", "CXR2_IM-0002-4002.png"]


# ------------------------------------------------------------------------------- MIMIC-CXR


@pytest.mark.parametrize("reports, end", [("txt", ".gz"), ("csv", "")])
def test_mimic_cxr_from_physionet(tmp_path, reports, end):
    parts = splits(of("mimic_cxr", layouts.mimic_cxr(tmp_path, reports, end)))
    assert counts(parts) == {
        "train": {"report": 3, "classification": 3},
        "val": {"report": 1, "classification": 1},
        "test": {"report": 2, "classification": 2},
    }
    study = only(parts["train"], "report")[2]
    assert study.id == "57375967"
    assert study.patient == "mimic/10000764"
    assert study.answer == "The lungs are clear. Study 57375967."
    # PA, AP, lateral.
    assert [image[-6:-4] for image in study.images] == ["d6", "d5", "d4"]
    # No findings: the impression.
    (study,) = only(parts["val"], "report")
    assert study.answer == "No acute process in study 50771383."
    # The columns go by name, and only certain labels count.
    labels = only(parts["train"], "classification")[0]
    assert labels.answer == "cardiomegaly, pleural effusion."


@pytest.mark.parametrize("reports", ["txt", "csv"])
def test_mimic_cxrs_frontal_views(tmp_path, reports):
    root = layouts.mimic_cxr(tmp_path, reports)
    frontal = load_split(
        of("mimic_cxr", root, "data.views=frontal", "data.tasks=[report]"), "train"
    )
    # One study is lateral only.
    assert [e.id for e in frontal] == ["50414267", "57375967"]
    assert [len(e.images) for e in frontal] == [1, 1]


def test_mimic_cxr_from_r2gen(tmp_path):
    parts = splits(of("mimic_cxr", layouts.mimic_r2gen(tmp_path)))
    assert sizes(parts) == [6, 1, 2]
    assert parts["train"][0].patient == "mimic/10000032"


@pytest.mark.parametrize(
    "text, section",
    [
        ("FINDINGS: A.\n\nIMPRESSION: B.", "A."),
        ("IMPRESSION: B\n is two lines.", "B\n is two lines."),
        ("FINDINGS:\n\nIMPRESSION:\n B.", "B."),
        ("FINDINGS AND IMPRESSION: C.", "C."),
        ("Findings are in another report.", ""),
        ("INDICATION: x\nFINAL FINDINGS: y", ""),
        (
            "  FINDINGS:  PA and lateral views. Note: stable.\n",
            "PA and lateral views. Note: stable.",
        ),
        ("", ""),
        # Other names of an impression, mixed case, misspelt.
        ("CONCLUSION: D.", "D."),
        ("Findings: E.\nImpression: F.", "E."),
        ("FINIDNGS: G.\nIMPRESSSION: H.", "G."),
        ("IMPRESSSION: H.", "H."),
        # Both on one line.
        ("FINDINGS: The lungs are clear.  IMPRESSION: Normal.", "The lungs are clear."),
        # Sub-headings neither end nor cut the findings.
        (
            "FINDINGS:\nLUNGS: Clear.\nHEART: Normal size.\n\nIMPRESSION: Normal.",
            "LUNGS: Clear.\nHEART: Normal size.",
        ),
        ("FINDINGS: Lungs: clear. Heart: normal.\nIMPRESSION: J.", "Lungs: clear. Heart: normal."),
        # The name of the examination stands for the findings.
        (
            "CHEST, TWO VIEWS: The lungs are clear and the heart is normal.\nIMPRESSION: K.",
            "The lungs are clear and the heart is normal.",
        ),
        (
            "INDICATION: pain.\nPA AND LATERAL VIEWS OF THE CHEST: There is no focal opacity.",
            "There is no focal opacity.",
        ),
        ("PORTABLE CHEST: 10:45\nIMPRESSION: L.", "L."),
        ("EXAMINATION: CHEST (PA AND LAT)\nTECHNIQUE: Chest PA\nFINDINGS: M.", "M."),
        # A name of the examination with a time, in mixed case, with what was anonymised.
        (
            "PORTABLE CHEST, 10:45 AM: The lungs are clear and well aerated.\nIMPRESSION: P.",
            "The lungs are clear and well aerated.",
        ),
        (
            "Chest, two views ___: The lungs are clear and well aerated.\nIMPRESSION: Q.",
            "The lungs are clear and well aerated.",
        ),
        # It is a part of the findings, or of the impression, where it stands in them.
        ("FINDINGS:\nTUBES: None.\nCHEST: Clear.\nIMPRESSION: R.", "TUBES: None.\nCHEST: Clear."),
        (
            "IMPRESSION: PA chest compared to ___:\nChest: no change of the lungs at all.",
            "PA chest compared to ___:\nChest: no change of the lungs at all.",
        ),
        # Mixed case on one line.
        ("Findings: The lungs are clear. Impression: Normal.", "The lungs are clear."),
        ("FINDINGS: The lungs are clear. Conclusion: Normal.", "The lungs are clear."),
        # What follows the findings is not theirs.
        ("FINDINGS: N.\nRECOMMENDATION: CT.", "N."),
        ("FINDINGS: O.\nNOTIFICATION: The team was told.", "O."),
        # A heading that findings seldom have.
        (
            "INDICATION: pain.\n\nREPORT:\n\nThe lungs are clear again.\n\nCONCLUSION: S.",
            "The lungs are clear again.",
        ),
        ("REPORT: CHEST, TWO VIEWS OF ___\n\nFINDINGS: T.", "T."),
        ("REPORT: ___\nIMPRESSION: U.", "U."),
        # Paragraphs without a heading: the last one, if it stands below all headings.
        (
            "FINAL REPORT\n COMPARISON: None.\n\n A line.\n \n The lungs are clear again.\n",
            "The lungs are clear again.",
        ),
        ("FINAL REPORT\n\nThe lungs are clear again.", "The lungs are clear again."),
        (
            "HISTORY: pain.\n\nThe lungs are clear again.\n\nDr. V\n\n___",
            "The lungs are clear again.",
        ),
        ("The lungs are clear again.\n\nCOMPARISON: None.", ""),
        ("FINAL REPORT\n\nINDICATION: pain.", ""),
    ],
)
def test_findings_section(text, section):
    assert findings_section(text).strip() == section


def test_where_both_sections_are_empty_the_last_paragraph_is_the_report(tmp_path):
    root = layouts.mimic_cxr(tmp_path, "csv")
    path = root / "mimic_cxr_sectioned.csv"
    text = "No acute process in study 50771383."
    replace_in(path, f"{text},,,", ",,The heart is normal.,")
    (study,) = load_split(of("mimic_cxr", root, "data.tasks=[report]"), "val")
    assert study.answer == "The heart is normal."


# ------------------------------------------------------------------------------- views


def with_codes(root, views):
    """The metadata have no ViewPosition, but the codes of these dicoms."""
    path = root / "mimic-cxr-2.0.0-metadata.csv"
    head, *rows = path.read_text().splitlines()
    lines = [f"{head},ViewCodeSequence_CodeMeaning"]
    for row in rows:
        dicom, subject, study, _, *rest = row.split(",")
        lines.append(",".join([dicom, subject, study, "", *rest, views.get(dicom, "")]))
    path.write_text("\n".join(lines) + "\n")


def frontal(root):
    config = of("mimic_cxr", root, "data.views=frontal", "data.tasks=[report]")
    return load_split(config, "train")


def test_where_the_position_is_empty_the_code_says_the_view(tmp_path):
    root = layouts.mimic_cxr(tmp_path, "csv", end="")
    with_codes(root, {"d1": "postero-anterior", "d2": "lateral", "d5": "antero-posterior"})
    assert [e.images[0][-6:-4] for e in frontal(root)] == ["d1", "d5"]


def test_images_of_unknown_view_are_left_out_and_counted(tmp_path, capsys):
    root = layouts.mimic_cxr(tmp_path, "csv", end="")
    with_codes(root, {"d1": "postero-anterior", "d2": "lateral"})
    assert [e.id for e in frontal(root)] == ["50414267"]
    # d3 to d6.
    said = capsys.readouterr().err
    assert "leaves out studies without a known frontal image: 2;" in said
    assert "images of unknown view: 4" in said


def test_r2gens_laterals_are_no_frontal_views(tmp_path, capsys):
    root = layouts.mimic_r2gen(tmp_path / "r2gen")
    layouts.mimic_cxr(tmp_path / "jpg", "csv", end="")
    name = "mimic-cxr-2.0.0-metadata.csv"
    (root / name).write_bytes((tmp_path / "jpg" / name).read_bytes())
    assert [e.id for e in frontal(root)] == ["d1", "d5", "d6"]
    assert "leaves out studies without a known frontal image: 3;" in capsys.readouterr().err


def test_r2gens_views_are_not_guessed(tmp_path):
    root = layouts.mimic_r2gen(tmp_path)
    with pytest.raises(InputError, match=r"metadata\.csv there.*annotation\.json.*data\.views=all"):
        frontal(root)


# ------------------------------------------------------------------------------- folders


def test_iu_xray_from_kaggle_as_it_unpacks(tmp_path):
    root = layouts.kaggle(tmp_path)
    (root / "images").mkdir()
    (root / "images_normalized").rename(root / "images" / "images_normalized")
    assert load_split(of("iu_xray", root), "train")


@pytest.mark.parametrize(
    ("source", "build", "folders"),
    [
        ("iu_xray", layouts.kaggle, ["images_normalized"]),
        ("iu_xray", layouts.openi, ["NLMCXR_png"]),
        ("iu_xray", layouts.r2gen, ["images"]),
        ("mimic_cxr", layouts.mimic_r2gen, ["images"]),
        ("mimic_cxr", partial(layouts.mimic_cxr, reports="csv"), ["files"]),
        ("chexpert_plus", layouts.chexpert_plus, ["PNG"]),
        ("rexgradient", layouts.rexgradient, ["deid_png"]),
        ("nih", layouts.nih, ["images_001", "images_002"]),
        ("vindr_cxr", layouts.vindr_physionet, ["train", "test"]),
        ("padchest_gr", layouts.padchest_gr, ["PadChest_GR"]),
        ("coco", layouts.coco, ["images"]),
        ("llava", layouts.llava, ["train", "val", "test"]),
    ],
)
def test_images_may_lie_in_a_folder_of_their_own(tmp_path, source, build, folders):
    root = build(tmp_path / "reports")
    pixels = tmp_path / "pixels"
    pixels.mkdir()
    expected = counts(read_splits(of(source, root)))
    for folder in folders:
        (root / folder).rename(pixels / folder)
    found = read_splits(of(source, root, f"data.images={pixels}"))
    assert counts(found) == expected
    # The folder itself is good, too.
    if len(folders) == 1 and folders != ["files"]:
        found = read_splits(of(source, root, f"data.images={pixels / folders[0]}"))
        assert counts(found) == expected


def test_reports_and_images_of_mimic_cxr_may_lie_apart(tmp_path):
    """As PhysioNet has them: the .txt files, and the images with all tables."""
    images = layouts.mimic_cxr(tmp_path / "mimic-cxr-jpg")
    reports = tmp_path / "mimic-cxr"
    for path in images.glob("files/**/*.txt"):
        new = reports / path.relative_to(images)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    parts = splits(of("mimic_cxr", reports, f"data.images={images}"))
    assert counts(parts)["train"] == {"report": 3, "classification": 3}


def test_both_folders_are_named_where_a_table_is_in_neither(tmp_path):
    root = layouts.chest_imagenome(tmp_path / "chest_imagenome")
    images = tmp_path / "pixels"
    images.mkdir()
    wanted = rf"{root} or {images}: expected mimic-cxr-2\*-metadata\.csv there"
    with pytest.raises(InputError, match=wanted):
        load_split(of("chest_imagenome", root, f"data.images={images}"), "train")


def test_json_lines_have_their_images_elsewhere(tmp_path):
    row = {"id": 1, "images": ["a.png"], "report": "Clear."}
    write_lines(tmp_path, "texts", row)
    (tmp_path / "texts" / "a.png").rename(tmp_path / "a.png")
    (example,) = load_split(of("jsonl", tmp_path / "texts", f"data.images={tmp_path}"), "train")
    assert example.images == (f"{tmp_path}/a.png",)


@pytest.mark.parametrize(
    ("source", "build", "file"),
    [
        ("iu_xray", layouts.r2gen, "annotation.json"),
        ("iu_xray", layouts.kaggle, "indiana_reports.csv"),
        ("padchest_gr", layouts.padchest_gr, "grounded_reports_20240819.json"),
        ("llava", layouts.llava, "train.json"),
        ("coco", layouts.coco, "annotations/instances_train2017.json"),
        ("chexpert_plus", layouts.chexpert_plus, "chexbert_labels/report_fixed.json"),
        ("rexgradient", layouts.rexgradient, "metadata/train_metadata_view_position.json"),
        ("jsonl", layouts.jsonl, "train.jsonl"),
    ],
)
def test_files_may_begin_with_a_byte_order_mark(tmp_path, source, build, file):
    root = build(tmp_path)
    before = len(load_split(of(source, root), "train"))
    path = root / file
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_split(of(source, root), "train")) == before


def test_kaggles_studies_without_a_frontal_image_are_counted(tmp_path, capsys):
    """In the published file, one study in 25. The splits stay as they are."""
    root = layouts.kaggle(tmp_path)
    train = {e.id for e in load_split(of("iu_xray", root), "train")}
    path = root / "indiana_projections.csv"
    name = min(train)
    replace_in(path, f"{name}_Frontal.dcm.png,Frontal", f"{name}_Frontal.dcm.png,Lateral")
    frontal = load_split(of("iu_xray", root, "data.views=frontal"), "train")
    assert {e.id for e in frontal} == train - {name}
    assert "leaves out studies without a known frontal image: 1;" in capsys.readouterr().err


def test_a_study_without_any_image_is_said(tmp_path):
    path = layouts.kaggle(tmp_path) / "indiana_projections.csv"
    text = "".join(line for line in path.open() if not line.startswith("5,"))
    path.write_text(text)
    with pytest.raises(InputError, match="uid 5: the study has no image"):
        splits(of("iu_xray", tmp_path))


def test_r2gens_views_may_be_known_beside_the_images(tmp_path):
    root = layouts.mimic_r2gen(tmp_path / "r2gen")
    images = layouts.mimic_cxr(tmp_path / "jpg", "csv", end="")
    (root / "images").rename(images / "images")
    config = of("mimic_cxr", root, "data.views=frontal", f"data.images={images}")
    assert [e.id for e in load_split(config, "train")] == ["d1", "d5", "d6"]


@pytest.mark.parametrize("text", ["null", "{}", "3"])
def test_a_file_without_a_list_is_one_line(tmp_path, text):
    root = layouts.padchest_gr(tmp_path)
    (root / "grounded_reports_20240819.json").write_text(text)
    with pytest.raises(InputError, match="expected a list of studies"):
        load_split(of("padchest_gr", root), "train")


def test_a_study_without_certain_labels_is_not_called_normal(tmp_path):
    root = layouts.mimic_cxr(tmp_path, end="")
    path = root / "mimic-cxr-2.0.0-chexpert.csv"
    head, first, second, *others = path.read_text().splitlines()
    # Study 50414267: all uncertain. Study 50414268: No Finding.
    first = first.replace("1.0", "-1.0").replace("--", "-")
    names = second.split(",")[:2]
    second = ",".join([*names, *[""] * 8, "1.0", *[""] * 5])
    path.write_text("\n".join([head, first, second, *others]) + "\n")
    labels = load_split(of("mimic_cxr", root, "data.tasks=[classification]"), "train")
    assert {e.id: e.answer for e in labels} == {
        "50414268-list": "none.",
        "57375967-list": "cardiomegaly, pleural effusion.",
    }


# ------------------------------------------------------------------------------- CheXpert Plus


# The PNG of CheXpert Plus, as they unpack, and the JPEG of CheXpert.
PLACES = pytest.mark.parametrize(
    "folder, end", [("PNG", ".png"), ("PNG/PNG", ".png"), ("", ".png"), ("", ".jpg")]
)


@PLACES
def test_chexpert_plus(tmp_path, folder, end):
    root = layouts.chexpert_plus(tmp_path, folder, end)
    train = load_split(of("chexpert_plus", root), "train")
    reports = {e.id: e for e in only(train, "report")}
    # Findings, else the impression.
    texts = {name: e.answer for name, e in reports.items()}
    assert texts == {
        "train/patient1/study1": "Clear. 1.",
        "train/patient1/study2": "Effusion.",
        "train/patient2/study1": "Edema.",
    }
    first = reports["train/patient1/study1"]
    assert first.patient == "chexpert/patient1"
    names = [image.removeprefix(f"{tmp_path / folder}/") for image in first.images]
    views = ("view1_frontal", "view2_lateral")
    assert names == [f"train/patient1/study1/{view}{end}" for view in views]


def test_chexpert_plus_keeps_what_is_uncertain(tmp_path):
    root = layouts.chexpert_plus(tmp_path)
    train = load_split(of("chexpert_plus", root, "data.tasks=[classification]"), "train")
    # Where there is no label at all, nothing is said.
    assert {e.id: e.answer for e in train} == {
        "train/patient1/study1-list": "none.",
        "train/patient1/study2-list": "edema, pleural effusion.",
    }


def test_chexpert_plus_has_the_official_valid_split(tmp_path):
    config = of("chexpert_plus", layouts.chexpert_plus(tmp_path), "data.tasks=[report]")
    assert [e.id for e in load_split(config, "val")] == ["valid/patient3/study1"]
    with pytest.raises(InputError, match="no usable example in split 'test'"):
        load_split(config, "test")


def test_chexpert_plus_without_labels(tmp_path):
    root = layouts.chexpert_plus(tmp_path)
    (root / "chexbert_labels" / "report_fixed.json").unlink()
    assert {e.task for e in load_split(of("chexpert_plus", root), "train")} == {"report"}


def test_chexpert_plus_frontal_views(tmp_path, capsys):
    root = layouts.chexpert_plus(tmp_path)
    config = of("chexpert_plus", root, "data.tasks=[report]", "data.views=frontal")
    names = [e.images[0].rpartition("/")[2] for e in load_split(config, "train")]
    assert names == ["view1_frontal.png"] * 2
    assert "leaves out studies without a known frontal image: 1;" in capsys.readouterr().err


# ------------------------------------------------------------------------------- ReXGradient-160K


def test_rexgradient(tmp_path):
    parts = splits(of("rexgradient", layouts.rexgradient(tmp_path)))
    assert sizes(parts) == [2, 2, 2]
    first, second = parts["val"]
    assert [first.answer, second.answer] == ["Clear lungs.", "No acute disease."]
    assert first.patient == "rexgradient/valid0"
    # The frontal one first.
    assert [image[-5:] for image in first.images] == ["1.png", "0.png"]


def test_rexgradients_frontal_views(tmp_path, capsys):
    config = of("rexgradient", layouts.rexgradient(tmp_path), "data.views=frontal")
    (example,) = load_split(config, "test")
    (image,) = example.images
    assert image == f"{tmp_path}/deid_png/test0/a1/studies/1.2/1.png"
    said = capsys.readouterr().err
    assert "without a known frontal image: 1;" in said
    assert "images of unknown view: 1" in said


# ------------------------------------------------------------------------------- VinDr-CXR

A, B, C = (0, 0, 10, 10), (0, 0, 10, 8), (0, 2, 10, 12)
FAR = (50, 50, 60, 60)
THIRD = (0, 5, 10, 15)
NONE, SWAPPED = (3, 3, 3, 3), (10, 8, 0, 0)


@pytest.mark.parametrize(
    "boxes, fused",
    [
        ([], []),
        ([A, B], [(0, 0, 10, 9)]),
        ([A, FAR, B, FAR], [(0, 0, 10, 9), FAR]),
        # C overlaps the mean of A and B by 7 / 12.
        ([A, B, C], [(0, 2 / 3, 10, 10)]),
        # They overlap by a third: two lesions.
        ([A, THIRD], [A, THIRD]),
        # Swapped corners and a box of no size: they stay, and the others are fused.
        ([NONE, A, NONE, SWAPPED, B], [(0, 0, 10, 9), NONE, NONE, SWAPPED]),
    ],
)
def test_boxes_of_several_radiologists_are_fused(boxes, fused):
    assert near(fuse_boxes(boxes), fused)


@pytest.mark.parametrize("radiologists", [1, 3])
def test_boxes_that_lie_apart_stay(radiologists):
    rng = np.random.default_rng(0)
    apart = [(10 * i, 0, 10 * i + 4 + rng.random(), 5) for i in range(9)]
    assert near(fuse_boxes(apart * radiologists), apart)


def test_vindr_cxr_from_physionet(tmp_path):
    parts = splits(of("vindr_cxr", layouts.vindr_physionet(tmp_path)))
    n = counts(parts)
    assert n["test"] == {"abnormality": 1, "detection": 2, "classification": 2}
    # The official training images: a tenth is held out.
    assert n["val"]["detection"] == 1
    both = Counter(n["train"]) + Counter(n["val"])
    assert both == {"abnormality": 18, "detection": 10, "classification": 10}

    study = by_id(parts)
    nodule, heart = (0.11, 0.1, 0.31, 0.5), (0.4, 0.4, 0.9, 0.9)
    assert near(study["v3-Nodule/Mass"].boxes, [nodule])
    assert near(study["v3-Cardiomegaly"].boxes, [heart])
    assert near(study["v3-detect"].boxes, [nodule, heart])
    places = ["Nodule/Mass [0.11, 0.10, 0.31, 0.50]", "Cardiomegaly [0.40, 0.40, 0.90, 0.90]"]
    assert study["v3-detect"].answer == "; ".join(places) + "."
    (effusion,) = only(parts["test"], "abnormality")
    assert effusion.question == "Where is the pleural effusion? Give its boxes."


@pytest.mark.parametrize(
    "bad, said",
    [
        ("180,40,80,90", "skipped 1"),
        (",,,", "skipped 1"),
        ("80,40,80,40", "skipped 1"),
        ("80,40,980,90", "clipped 1"),
        ("300,40,980,90", "skipped 1"),
    ],
    ids=["swapped", "absent", "without size", "too wide", "outside"],
)
def test_a_bad_box_of_vindr_cxr_takes_no_other_along(tmp_path, capsys, bad, said):
    root = layouts.vindr_physionet(tmp_path)
    replace_in(root / "annotations" / "annotations_train.csv", "80,40,180,90", bad)
    config = of("vindr_cxr", root, "data.on_error=skip")
    images = {e.images for part in splits(config).values() for e in part}
    everyone = by_id(splits(config))
    assert len(images) == 12
    assert near(everyone["v1-Nodule/Mass"].boxes, [(0.11, 0.1, 0.31, 0.5)])
    # What was seen was seen, wherever it is.
    assert everyone["v1-list"].answer == "cardiomegaly, nodule/mass."
    # Not all that is there has a box.
    assert ("v1-detect" in everyone) == (said == "clipped 1")
    assert said in capsys.readouterr().err


def test_an_unreadable_image_of_vindr_cxr_is_left_out(tmp_path, capsys):
    root = layouts.vindr_physionet(tmp_path)
    (root / "test" / "t0.png").write_bytes(b"no image")
    config = of("vindr_cxr", root, "data.on_error=skip")
    assert {e.id for e in load_split(config, "test")} == {"t1-list", "t1-detect"}
    assert "t0.png: not a readable image" in capsys.readouterr().err


def test_a_normal_study_of_vindr_cxr(tmp_path):
    study = by_id(splits(of("vindr_cxr", layouts.vindr_physionet(tmp_path))))
    assert study["v0-list"].answer == "none."
    assert study["v0-detect"].answer == data.NOTHING_THERE
    assert study["v0-detect"].boxes == ()


def test_vindr_cxr_has_to_be_converted(tmp_path):
    config = of("vindr_cxr", layouts.vindr_physionet(tmp_path))
    (tmp_path / "test" / "t0.png").rename(tmp_path / "test" / "t0.dicom")
    with pytest.raises(InputError, match=r"t0\.png does not exist .DICOM"):
        load_split(config, "test")


def test_vindr_cxr_from_kaggle_with_reduced_images(tmp_path):
    root = layouts.vindr_kaggle(tmp_path)
    parts = splits(of("vindr_cxr", root, "data.tasks=[abnormality]"))
    assert sizes(parts) == [7, 1, 2]
    for e in by_id(parts).values():
        assert near(e.boxes, [(0.4, 0.4, 0.9, 0.9)])
    # Without the sizes the boxes cannot be right: never just skipped.
    (root / "train_meta.csv").unlink()
    config = of("vindr_cxr", root, "data.tasks=[abnormality]", "data.on_error=skip")
    with pytest.raises(InputError, match=r"were the images resized.*train_meta\.csv"):
        load_split(config, "train")


# ------------------------------------------------------------------------------- MS-CXR


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_ms_cxr(tmp_path, version):
    layouts.mimic_cxr(tmp_path / "mimic_cxr")
    parts = splits(of("ms_cxr", layouts.ms_cxr(tmp_path / "ms_cxr", version)))
    assert [e.label for e in parts["train"]] == ["left basilar opacity", "mild cardiomegaly"]
    assert [e.label for e in parts["val"]] == ["mild edema"]
    assert [e.label for e in parts["test"]] == ["small right pneumothorax"]
    opacity = parts["train"][0]
    assert near(opacity.boxes, [(0.5, 0.5, 0.75, 0.75), (0.1, 0.1, 0.3, 0.3)])
    assert opacity.patient == "mimic/10000764"
    assert opacity.kind == "phrase"
    (pneumothorax,) = parts["test"]
    assert pneumothorax.question == "Where is small right pneumothorax? Answer with boxes."
    assert pneumothorax.images[0].endswith("d8.jpg")


def test_ms_cxr_without_any_split_keeps_patients_together(tmp_path):
    images = layouts.mimic_cxr(tmp_path / "elsewhere")
    for path in images.glob("*split*"):
        path.unlink()
    root = layouts.ms_cxr(tmp_path / "ms_cxr")
    parts = splits(of("ms_cxr", root, f"data.images={images}"))
    assert sum(sizes(parts)) == 4
    # Three patients, one in each split.
    assert [len(names) for names in patients(parts)] == [1, 1, 1]
    assert len(set.union(*patients(parts))) == 3


# ------------------------------------------------------------------------------- PadChest-GR


def test_padchest_gr(tmp_path):
    assert counts(splits(of("padchest_gr", layouts.padchest_gr(tmp_path)))) == {
        "train": {"report": 4, "phrase": 3, "detection": 4},
        "val": {"report": 2, "phrase": 2, "detection": 2},
        "test": {"report": 2, "phrase": 2, "detection": 2},
    }


# Without the table, the image's name begins with its study.
@pytest.mark.parametrize("with_table, patient", [(True, "padchest/p3"), (False, "padchest/3")])
def test_studies_of_padchest_gr(tmp_path, with_table, patient):
    everyone = by_id(splits(of("padchest_gr", layouts.padchest_gr(tmp_path, with_table))))
    assert everyone["0_x.png"].answer == "No relevant findings."
    study = everyone["3_x.png"]
    assert study.answer == "Right pleural effusion. Normal heart size."
    assert study.patient == patient
    effusion = everyone["3_x.png-Right pleural effusion"]
    assert near(effusion.boxes, [(0.1, 0.5, 0.4, 0.9), (0.2, 0.1, 0.3, 0.2)])
    # 16 bits.
    (image,) = data.open_images(study)
    assert image.getextrema() == ((0, 255),) * 3


# ------------------------------------------------------------------------------- Chest ImaGenome


def test_chest_imagenome(tmp_path):
    layouts.mimic_cxr(tmp_path / "mimic_cxr")
    root = layouts.chest_imagenome(tmp_path / "chest_imagenome")
    # d1, d5 | d7 | d8, d9
    assert counts(splits(of("chest_imagenome", root))) == {
        "train": {"anatomy": 2},
        "val": {"anatomy": 1},
        "test": {"anatomy": 2},
    }


def test_one_region_of_each_image_is_asked_for(tmp_path):
    layouts.mimic_cxr(tmp_path / "mimic_cxr")
    root = layouts.chest_imagenome(tmp_path / "chest_imagenome")
    regions = {"right lung": [(0.1, 0.1, 0.5, 0.75)], "cardiac silhouette": [(0.25, 0.5, 0.75, 1)]}
    seen = set()
    for seed in range(4):
        (e,) = load_split(of("chest_imagenome", root, f"seed={seed}"), "val")
        assert near(e.boxes, regions[e.label])
        assert e.question == f"Where is the {e.label}? Give its box."
        assert e.patient == "mimic/10000898"
        seen.add(e.label)
    assert seen == set(regions)


@pytest.mark.parametrize("bad", ["15", "null", "-90", '"?"'])
def test_a_bad_region_takes_no_other_along(tmp_path, capsys, bad):
    layouts.mimic_cxr(tmp_path / "mimic_cxr")
    root = layouts.chest_imagenome(tmp_path / "chest_imagenome")
    # The right edge of the heart.
    path = root / "silver_dataset" / "scene_graph" / "d7_SceneGraph.json"
    replace_in(path, '"original_x2": 45', f'"original_x2": {bad}')
    (example,) = load_split(of("chest_imagenome", root, "data.on_error=skip"), "val")
    assert example.label == "right lung"
    assert "skipped 1" in capsys.readouterr().err


# ------------------------------------------------------------------------------- NIH ChestX-ray14


@pytest.mark.parametrize("lists, shares", [(True, [8, 1, 1]), (False, [7, 1, 2])])
def test_nih(tmp_path, lists, shares):
    root = layouts.nih(tmp_path, lists)
    parts = splits(of("nih", root))
    assert [len(names) for names in patients(parts)] == shares
    assert len(set.union(*patients(parts))) == 10
    # Its box file says Infiltrate.
    boxes = {e.id: e.boxes for e in by_id(parts).values() if e.kind == "abnormality"}
    assert near(boxes.pop("00000009_000.png-Infiltration"), [(0.25, 0.5, 0.375, 0.75)])
    assert near(boxes.pop("00000009_001.png-Effusion"), [(512.5 / 1024, 0, 768.5 / 1024, 1)])
    assert not boxes
    answers = {e.answer for e in only(parts["test"], "classification")}
    assert ("infiltration, effusion." if lists else "none.") in answers


@pytest.mark.parametrize("lists", [True, False])
def test_nihs_splits_do_not_depend_on_what_is_asked(tmp_path, lists):
    root = layouts.nih(tmp_path, lists)
    parts = splits(of("nih", root))
    for split in SPLITS:
        config = of("nih", root, "data.tasks=[grounding]")
        ((_, asked, _),) = data.read_split(config, split)
        assert {e.id for e in asked} == {e.id for e in only(parts[split], "abnormality")}


# ------------------------------------------------------------------------------- COCO


def test_coco(tmp_path):
    for split, n in counts(splits(of("coco", layouts.coco(tmp_path)))).items():
        assert n == {"classification": 3, "abnormality": 2, "detection": 3}, split


@pytest.mark.parametrize("split, n_boxes", [(True, 6), (False, 8)])
def test_boxes_of_coco(tmp_path, split, n_boxes):
    everyone = by_id(splits(of("coco", layouts.coco(tmp_path, split)))).values()
    boxes = only(everyone, "abnormality")
    assert len(boxes) == n_boxes
    for e in boxes:
        assert near(e.boxes, [(0.1, 0.1, 0.6, 0.6)])
        assert e.label == "active tuberculosis"
    assert len({e.images for e in everyone}) == 9


def test_coco_images_in_folders_of_their_own(tmp_path):
    root = layouts.coco(tmp_path)
    for split, first in (("train", 0), ("val", 3), ("test", 6)):
        folder = root / f"{split}2017"
        folder.mkdir()
        for n in range(first, first + 3):
            (root / "images" / f"c{n}.png").rename(folder / f"c{n}.png")
    val = load_split(of("coco", root), "val")
    assert {e.images[0].split("/")[-2] for e in val} == {"val2017"}


def test_one_coco_file_is_split_by_the_patients_of_nih(tmp_path):
    """Two images of each of 10 patients."""
    images, boxes = [], []
    for n in range(20):
        name = f"{n // 2:08d}_{n % 2:03d}.png"
        layouts.picture(tmp_path / name)
        images.append({"id": n, "file_name": name, "width": 40, "height": 32})
        boxes.append({"image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9]})
    categories = [{"id": 1, "name": "x"}]
    tree = {"categories": categories, "images": images, "annotations": boxes}
    layouts.write_json(tmp_path / "boxes.json", tree)
    parts = splits(of("coco", tmp_path, "data.tasks=[abnormality]"))
    assert [len(names) for names in patients(parts)] == [7, 1, 2]
    assert len(set.union(*patients(parts))) == 10
    assert sizes(parts) == [14, 2, 4]


# ------------------------------------------------------------------------------- LLaVA


def test_turns_of_a_conversation(tmp_path):
    parts = splits(of("llava", layouts.llava(tmp_path)))
    assert sizes(parts) == [6, 6, 6]
    where, report, other = parts["test"][:3]
    assert where.task == "grounding"
    assert report.task == "report"
    assert other.task == "classification"
    assert where.boxes == ((0.12, 0.55, 0.41, 0.93), (0.5, 0.6, 1, 0.75))
    assert report.answer == "There is a pleural effusion."


def test_conversations_go_round(tmp_path):
    """What was read comes out again: the same texts and boxes."""
    turns = load_split(of("llava", layouts.llava(tmp_path)), "test")[:3]
    written = json.loads((tmp_path / "test.json").read_text())[0]["conversations"]
    texts = [turn["value"].removeprefix("<image>\n") for turn in written]
    for k, e in enumerate(turns):
        said = [text for question_and_answer in e.history for text in question_and_answer]
        assert [*said, e.question, data.target_text(e)] == texts[: 2 * k + 2]
    where = turns[0]
    assert parse_boxes(data.target_text(where)) == list(where.boxes)


def test_earlier_turns_come_first_and_the_image_once(tmp_path, policy):
    where, report, other = load_split(of("llava", layouts.llava(tmp_path)), "test")[:3]
    text = policy.chat(other)
    earlier = [where.question, where.answer, report.question, report.answer]
    places = [text.index(part) for part in ("<|image_pad|>", *earlier, other.question)]
    assert places == sorted(places)
    assert text.count("<|image_pad|>") == 1
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "image, name, first",
    [
        ("files/p10/p{}/s5000000{}/x.jpg", "mimic/{}", 10000010),
        ("CheXpert-v1.0/train/patient{}/study{}/view1_frontal.jpg", "chexpert/patient{}", 10010),
    ],
)
def test_one_llava_file_is_split_by_patients(tmp_path, image, name, first):
    """Three studies of each of 12 patients, and a conversation that has no image."""
    turns = [("human", "<image>\nIs a report needed?"), ("gpt", "Yes.")]
    conversations = layouts.conversation(*turns)
    rows = [{"id": "none", "image": None, "conversations": conversations}]
    names = set()
    for n in range(36):
        patient, k = first + n // 3, n % 3
        path = image.format(patient, k)
        layouts.picture(tmp_path / path)
        rows.append({"id": f"{patient}_{k}", "image": path, "conversations": conversations})
        names.add(name.format(patient))
    layouts.write_json(tmp_path / "all.json", rows)
    parts = splits(of("llava", tmp_path, "data.on_error=skip"))
    counts = [len(some) for some in patients(parts)]
    assert min(counts) > 0
    assert sum(counts) == len(set.union(*patients(parts)))
    assert set.union(*patients(parts)) == names
    assert sizes(parts) == [3 * count for count in counts]
    # A question with yes or no for an answer asks for no report.
    assert {e.task for e in parts["train"]} == {"classification"}


def test_a_conversation_with_no_image_in_its_list_is_named(tmp_path):
    root = layouts.llava(tmp_path)
    replace_in(root / "train.json", '"image": "train/0.png"', '"image": []')
    with pytest.raises(InputError, match=r"train\.json, \[0\]: expected an object with image"):
        load_split(of("llava", root), "train")


# ------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    "source, build, lost, message",
    [
        (
            "iu_xray",
            layouts.openi,
            "ecgen-radiology",
            "annotation.json or indiana_reports.csv or ecgen-radiology",
        ),
        ("iu_xray", layouts.kaggle, "indiana_projections.csv", "indiana_projections.csv"),
        ("mimic_cxr", layouts.mimic_cxr, "mimic-cxr-2.0.0-split.csv.gz", "mimic-cxr-2*-split.csv"),
        ("mimic_cxr", layouts.mimic_cxr, "mimic-cxr-2.0.0-metadata.csv.gz", "metadata.csv"),
        ("mimic_cxr", layouts.mimic_cxr, "mimic-cxr-2.0.0-chexpert.csv.gz", "chexpert.csv"),
        ("mimic_cxr", layouts.mimic_cxr, "files/p10/p10000032/s50414267.txt", "s50414267.txt"),
        (
            "mimic_cxr",
            layouts.mimic_cxr,
            "files/p10/p10000032/s50414267/d1.jpg",
            "d1.jpg does not exist",
        ),
        ("vindr_cxr", layouts.vindr_physionet, "annotations", "annotations_train.csv or train.csv"),
        ("vindr_cxr", layouts.vindr_physionet, "train/v1.png", "v1.png does not exist"),
        (
            "ms_cxr",
            layouts.ms_cxr,
            "MS_CXR_Local_Alignment_v1.0.0.csv",
            "MS_CXR_Local_Alignment_v1",
        ),
        ("padchest_gr", layouts.padchest_gr, "grounded_reports_20240819.json", "grounded_reports"),
        ("padchest_gr", layouts.padchest_gr, "PadChest_GR/1_x.png", "1_x.png does not exist"),
        ("nih", layouts.nih, "BBox_List_2017.csv", "BBox_List_2017.csv"),
        ("coco", layouts.coco, "annotations", "train.json"),
        ("llava", layouts.llava, "train.json", "train.json"),
        (
            "chest_imagenome",
            layouts.chest_imagenome,
            "silver_dataset/splits/train.csv",
            "silver_dataset/splits/train.csv",
        ),
    ],
)
def test_a_missing_file_is_named(tmp_path, source, build, lost, message):
    root = build(tmp_path / source)
    (root / lost).rename(tmp_path / "lost")
    with pytest.raises(InputError) as error:
        load_split(of(source, root), "train")
    assert message in str(error.value)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


VINDR = ("vindr_cxr", layouts.vindr_physionet, "annotations/annotations_train.csv")
PADCHEST = ("padchest_gr", layouts.padchest_gr, "grounded_reports_20240819.json")
NIH = ("nih", layouts.nih, "BBox_List_2017.csv")
COCO = ("coco", layouts.coco, "annotations/instances_train2017.json")
LLAVA = ("llava", layouts.llava, "train.json")
R2GEN = ("iu_xray", layouts.r2gen, "annotation.json")
OPENI = ("iu_xray", layouts.openi, "ecgen-radiology/1.xml")


def damaged(dataset, root, old, new):
    """(source, name of the file): a dataset in whose file the first `old` reads `new`."""
    source, build, file = dataset
    replace_in(build(root) / file, old, new)
    return source, file.rpartition("/")[2]


@pytest.mark.parametrize(
    "dataset, old, new, message",
    [
        (VINDR, "80,40,180,90", "180,40,80,90", "inside the image"),
        (VINDR, "80,40,180,90", ",,,", "image v1: box .nan"),
        (PADCHEST, '"findings"', '"finding"', "ImageID and findings"),
        (PADCHEST, "0.5", "1.5", "inside the image"),
        (NIH, "512.5", "NA", "image 00000009_001.png: box .nan"),
        (LLAVA, '"gpt"', '"human"', "human and gpt"),
        (LLAVA, "train/0.png", "../0.png", "lies outside"),
        (R2GEN, "CXR0/0.png", "../../0.png", "lies outside"),
        (OPENI, "</eCitation>", "", "not valid XML"),
    ],
)
def test_bad_contents_are_named_or_skipped(tmp_path, capsys, dataset, old, new, message):
    source, name = damaged(dataset, tmp_path, old, new)
    with pytest.raises(InputError, match=message) as error:
        load_split(of(source, tmp_path), "train")
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert all(splits(of(source, tmp_path, "data.on_error=skip")).values())
    assert "skipped 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "dataset, old, new, message",
    [(VINDR, "x_max", "xmax", "no column 'x_max'"), (COCO, '"bbox"', '"box"', "COCO's format")],
)
def test_files_of_another_format_are_never_skipped(tmp_path, dataset, old, new, message):
    source, name = damaged(dataset, tmp_path, old, new)
    for on_error in ("stop", "skip"):
        with pytest.raises(InputError, match=message) as error:
            load_split(of(source, tmp_path, f"data.on_error={on_error}"), "train")
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_a_bad_box_leaves_the_other_questions(tmp_path):
    root = layouts.padchest_gr(tmp_path)
    # Of study 1.
    replace_in(root / "grounded_reports_20240819.json", "0.5", "1.5")
    reports = load_split(of("padchest_gr", root, "data.tasks=[report]"), "train")
    assert "1_x.png" in [e.id for e in reports]
    train = load_split(of("padchest_gr", root, "data.on_error=skip"), "train")
    # Its other box has its own phrase.
    assert [kind_of(e) for e in train if e.id.startswith("1_x")] == ["report", "phrase"]


def test_an_empty_report_leaves_the_other_questions(tmp_path):
    root = layouts.mimic_cxr(tmp_path)
    (root / "files/p10/p10000764/s57375967.txt").write_text("FINAL REPORT\n")
    train = load_split(of("mimic_cxr", root, "data.on_error=skip"), "train")
    assert [e.id for e in train if "57375967" in e.id] == ["57375967-list"]


def write_lines(root, name, *rows):
    """JSON lines, the same in every split."""
    for split in SPLITS:
        layouts.write(root / name / f"{split}.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    layouts.picture(root / name / "a.png")


def test_ids_are_unique(tmp_path):
    row = {"id": 1, "images": ["a.png"], "report": "Clear."}
    write_lines(tmp_path, "a", row, {**row, "report": "Edema."})
    write_lines(tmp_path, "b/a", {**row, "patient": None})
    with pytest.raises(InputError, match="a second example has the id '1'"):
        load_split(of("jsonl", tmp_path / "a"), "train")
    mixture = "data.train=[{source: jsonl, path: a}, {source: jsonl, path: b/a}]"
    config = load(f"data.path={tmp_path}", mixture, "data.on_error=skip")
    examples = load_split(config, "train")
    assert [e.id for e in examples] == ["a.0/1", "a.1/1"]
    # Where no patient is named, the image is one.
    assert [e.patient for e in examples] == [f"{tmp_path}/a/a.png", f"{tmp_path}/b/a/a.png"]


def test_a_source_that_gives_nothing_is_an_error(tmp_path):
    root = layouts.everything(tmp_path)
    (root / "chest_imagenome" / "silver_dataset" / "scene_graph").rename(root / "lost")
    mixture = "data.train=[{source: mimic_cxr}, {source: chest_imagenome}]"
    with pytest.raises(InputError, match="no usable example of chest_imagenome in split 'train'"):
        load_split(load(f"data.path={root}", mixture), "train")


# ------------------------------------------------------------------------------- mixtures

MIXTURE = (
    "data.train=[{source: iu_xray, tasks: [report]}, {source: mimic_cxr, weight: 2.5}, "
    "{source: vindr_cxr, tasks: [detection], weight: 0.5}, {source: ms_cxr}, "
    "{source: nih, limit: 4}]"
)


def test_a_mixture_of_sources_with_weights(tmp_path):
    root = layouts.everything(tmp_path)
    config = load(f"data.path={root}", MIXTURE, "data.views=frontal")
    train = load_split(config, "train")
    assert load_split(config, "train") == train
    assert len({e.id for e in train}) == len(train)
    assert Counter((e.id.partition("/")[0], kind_of(e)) for e in train) == {
        ("iu_xray", "report"): 7,
        ("mimic_cxr", "report"): 5,
        ("mimic_cxr", "classification"): 5,
        ("vindr_cxr", "detection"): 4,
        ("ms_cxr", "phrase"): 2,
        ("nih", "classification"): 4,
    }
    # A copy is a study of its own. The two phrases are of one study.
    studies = data.by_study(train)
    assert sum(map(len, studies)) == len(train)
    assert len(studies) == 7 + 5 + 4 + 1 + 4
    for study in studies:
        assert len({e.copy for e in study}) == 1


def test_traces_of_a_mixture_have_its_ids(tmp_path):
    row = {"id": 1, "images": ["a.png"], "report": "Clear.", "thinking": "Own."}
    for name in ("a", "b"):
        write_lines(tmp_path, name, row)
    traces = layouts.write(tmp_path / "traces.jsonl", '{"id": "b/1", "thinking": "Of b."}')
    mixture = "data.train=[{source: jsonl, path: a}, {source: jsonl, path: b}]"
    config = load(f"data.path={tmp_path}", mixture, "data.thinking=true", f"data.traces={traces}")
    assert [(e.id, e.thinking) for e in load_split(config, "train")] == [
        ("a/1", ""),
        ("b/1", "Of b."),
    ]


def test_held_out_splits_may_have_sources_of_their_own(tmp_path):
    config = load(f"data.path={layouts.everything(tmp_path)}", MIXTURE)
    config.data.test = [Source("vindr_cxr", tasks=["abnormality"])]
    assert {e.kind for e in load_split(config, "test")} == {"abnormality"}


def test_a_mixture_is_saved_and_read_back(tmp_path):
    config = load(MIXTURE)
    assert load_config(layouts.write(tmp_path / "c.yaml", config_text(config))) == config


@pytest.mark.parametrize(
    "source, limit, ids",
    [
        ("mimic_cxr", 1, ["50414267", "50414267-list"]),
        # All turns of a conversation.
        ("llava", 1, ["train_0-0", "train_0-1", "train_0-2"]),
        ("jsonl", 2, ["0", "1"]),
        # Two with a report alone, then one that was chosen: findings, report, boxes.
        ("phantom", 3, ["0", "1", "5000007-list", "5000007", "5000007-Pneumothorax"]),
    ],
)
def test_limits_count_studies(tmp_path, source, limit, ids):
    layouts.everything(tmp_path)
    lines = [{"id": n, "images": ["a.png"], "report": f"Study {n}."} for n in range(5)]
    write_lines(tmp_path, "jsonl", *lines)
    mixture = f"data.train=[{{source: {source}, limit: {limit}}}]"
    config = load(f"data.path={tmp_path}", mixture, "data.train_size=2")
    assert [e.id for e in load_split(config, "train")] == ids


def test_what_an_entry_leaves_out_the_section_gives(tmp_path):
    entries = "data.train=[{source: coco, path: a}, {source: nih, images: pictures}]"
    config = load(f"data.path={tmp_path}", entries, "data.views=frontal")
    a, b = data.sources(config, "val")
    assert a.path == f"{tmp_path}/a"
    assert a.views == "frontal"
    assert a.tasks == config.data.tasks
    assert b.path == f"{tmp_path}/nih"
    assert str(b.image_root()) == f"{tmp_path}/pictures"
    # The entry itself stays as it is.
    assert config.data.train[0].path == "a"
    config.data.images = "films"
    a, b = data.sources(config, "train")
    assert str(a.image_root()) == f"{tmp_path}/films"
    assert str(b.image_root()) == f"{tmp_path}/pictures"


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.train=[{source: mimic}]", r"data.train\[\].source: expected one of"),
        ("data.train=[iu_xray]", "a list of sources"),
        ("data.train=[{weigth: 1}]", "weigth"),
        ("data.val=[{weight: 0}]", r"data.val\[\].weight: expected more than 0"),
        ("data.train=[{tasks: [reports]}]", r"data.train\[\].tasks"),
    ],
)
def test_bad_sources_name_the_key(override, message):
    with pytest.raises(InputError, match=message):
        load(override)


def test_a_source_beside_a_mixture_is_an_error():
    # It would not be read, and the run would be on other data than the one that was named.
    mixture = "data.train=[{source: iu_xray}]"
    with pytest.raises(InputError, match=r"data.source=jsonl would not be read.*data.train=\[\]"):
        load(mixture, "data.source=jsonl")
    assert load(mixture, "data.source=jsonl", "data.train=[]").data.source == "jsonl"


# ------------------------------------------------------------------------------- leaks


def test_patients_are_never_shared_between_splits(tmp_path, capsys):
    """Chest ImaGenome trains on images of a patient whose study MS-CXR holds out."""
    root = layouts.everything(tmp_path)
    path = root / "chest_imagenome" / "silver_dataset" / "splits" / "train.csv"
    path.write_text(path.read_text() + "9,10000898,50771383,d7,AP\n")
    held_out = [f"data.{split}=[{{source: ms_cxr}}]" for split in ("val", "test")]
    config = load(f"data.path={root}", "data.train=[{source: chest_imagenome}]", *held_out)
    names = {e.patient for e in load_split(config, "train")}
    assert names == {"mimic/10000032", "mimic/10000764"}
    notice = "left out 1 examples of 1 patients, such as mimic/10000898: they or their images are"
    assert notice in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "patient"),
    [
        ("00000013_005.png", "nih/00000013"),
        ("files/p10/p10000032/s50414267/a.jpg", "mimic/10000032"),
        ("train/patient00001/study1/view1_frontal.jpg", "chexpert/patient00001"),
        # Dates.
        ("20240105_001.png", "data/A"),
        ("scans/p20240105/a.png", "data/A"),
    ],
)
def test_paths_of_known_datasets_name_the_patient(path, patient):
    assert patient_of(path, "data", "A") == patient


def test_an_image_of_a_held_out_split_is_not_trained_on(tmp_path, capsys):
    """Reports and boxes in folders of their own, whose patients have names of their own."""
    layouts.picture(tmp_path / "images" / "p10000032" / "a.png")
    for name in "abc":
        layouts.picture(tmp_path / "images" / f"{name}.png")
    for folder, split, names, patient in [
        ("reports", "train", "ab", "one"),
        ("reports", "val", "c", "two"),
        ("reports", "test", ["p10000032/a"], "three"),
        ("boxes", "train", ["c", "a", "p10000032/a"], "four"),
    ]:
        rows = []
        for name in names:
            row = {"id": name, "images": [f"{name}.png"], "patient": patient + name}
            asked = {"phrase": "it", "boxes": []} if folder == "boxes" else {"report": name}
            rows.append(json.dumps(row | asked))
        layouts.write(tmp_path / folder / f"{split}.jsonl", "\n".join(rows))
    part = "{{source: jsonl, path: {}, images: {}}}"
    reports, boxes = (part.format(name, tmp_path / "images") for name in ("reports", "boxes"))
    held_out = [f"data.{split}=[{reports}]" for split in ("val", "test")]
    config = load(f"data.path={tmp_path}", f"data.train=[{reports}, {boxes}]", *held_out)

    kept = [e.id for e in load_split(config, "train")]
    assert kept == ["reports/a", "reports/b", "boxes/a"]
    assert "left out 2 examples" in capsys.readouterr().err
    # Whatever the line says: paths of MIMIC-CXR name the patient.
    (example,) = load_split(config, "test")
    assert example.patient == "mimic/10000032"


def test_reports_that_repeat_held_out_ones_are_counted_or_left_out(tmp_path, capsys):
    root = layouts.r2gen(tmp_path)
    path = root / "annotation.json"
    tree = json.loads(path.read_text())
    tree["train"][0]["report"] = "the heart is normal.  Study 3"
    layouts.write_json(path, tree)
    assert len(load_split(of("iu_xray", root), "train")) == 2
    assert "1 of 2 reports (50%) repeat" in capsys.readouterr().err

    config = of("iu_xray", root, "data.dedup=true")
    (example,) = load_split(config, "train")
    assert example.id == "CXR1"
    assert "are left out" in capsys.readouterr().err
    assert len(load_split(config, "test")) == 1


# ------------------------------------------------------------------------------- wordings


def test_wordings_are_seeded_and_held_out_ones_fixed(tmp_path):
    root = layouts.kaggle(tmp_path, 40)
    usual = data.QUESTIONS["report"]
    train = load_split(of("iu_xray", root), "train")
    questions = {e.question for e in train}
    assert len(questions) > 3
    assert questions <= set(usual)
    assert {e.question for e in load_split(of("iu_xray", root), "test")} == {usual[0]}
    assert load_split(of("iu_xray", root), "train") == train
    assert load_split(of("iu_xray", root, "seed=1"), "train") != train


@pytest.mark.parametrize("kind", data.QUESTIONS)
def test_there_are_several_wordings_of_each_question(kind):
    texts = data.QUESTIONS[kind]
    assert len(set(texts)) >= 6
    for text in texts:
        assert ("{}" in text) == (kind in ("abnormality", "anatomy", "phrase"))


# ------------------------------------------------------------------------------- traces


def test_systematic_reading_sorts_the_sentences():
    report = (
        "Lungs are clear. Heart size is normal. A right PICC line tip lies in the SVC. "
        "No effusion or pneumothorax. Unchanged."
    )
    assert data.systematic_reading(report) == (
        "Heart: Heart size is normal. Mediastinum: not described. Lungs: Lungs are clear. "
        "Pleura: No effusion or pneumothorax. Bones: not described. "
        "Devices: A right PICC line tip lies in the SVC. Other: Unchanged."
    )


@pytest.mark.parametrize(
    "boxes, end",
    [
        ([], "not there."),
        ([(0.1, 0.1, 0.2, 0.2)], "on the right."),
        ([(0.6, 0.1, 0.8, 0.2)], "on the left."),
        ([(0.1, 0.1, 0.2, 0.2), (0.6, 0.1, 0.8, 0.2)], "on both sides."),
    ],
)
def test_traces_of_boxes_name_the_side(boxes, end):
    trace = data.looking_for("nodule", boxes)
    assert trace.startswith("Looking for nodule. It is ")
    assert trace.endswith(end)


def test_traces_are_made_from_the_references(tmp_path):
    config = of("iu_xray", layouts.r2gen(tmp_path), "data.thinking=true")
    for e in load_split(config, "train"):
        assert e.thinking == data.systematic_reading(e.answer)


def with_trace_file(root):
    """A configuration with traces, and the file that they come from."""
    path = root / "traces.jsonl"
    return of("iu_xray", layouts.r2gen(root), "data.thinking=true", f"data.traces={path}"), path


def test_traces_come_from_the_file(tmp_path, capsys):
    config, path = with_trace_file(tmp_path)
    # With a byte order mark.
    layouts.write(path, '\ufeff{"id": "CXR1", "thinking": "First the heart."}\n')
    assert [e.thinking for e in load_split(config, "train")] == ["", "First the heart."]
    assert "1 of 2 examples have a trace in" in capsys.readouterr().err
    # The file is for training.
    (held_out,) = load_split(config, "val")
    assert held_out.thinking == data.systematic_reading(held_out.answer)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{}", "line 1"),
        (b"", "line 1"),
        (b"\xff", "cannot read"),
        (b'{"id": "CXR1", "thinking": "<think>The heart.</think>"}', "line 1: .*tags are added"),
    ],
)
def test_a_bad_file_of_traces_is_named(tmp_path, content, message):
    config, path = with_trace_file(tmp_path)
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"traces\.jsonl.*{message}"):
        load_split(config, "train")


# ------------------------------------------------------------------------------- the description


def read_rows(text):
    """{first three cells: other cells} of all tables, without spaces."""
    rows = {}
    for line in text.splitlines():
        if " | " in line:
            cells = line.replace(" ", "").split("|")
            rows[tuple(cells[:3])] = cells[3:]
    return rows


def describe(config):
    """The tables as rows, the text, and the policy whose tokens are counted."""
    description = inspect_data.Description(config)
    text = description.text()
    return read_rows(text), text, description.policy


def test_the_description_counts(tmp_path):
    root = layouts.everything(tmp_path)
    (root / "iu_xray" / "images_normalized" / "5_Frontal.dcm.png").unlink()
    (root / "iu_xray" / "images_normalized" / "6_Frontal.dcm.png").write_bytes(b"no image")
    rows, text, _ = describe(load(f"data.path={root}", MIXTURE))
    # Examples, studies, patients; words, widths, heights, tokens.
    assert rows["mimic_cxr", "train", "report"][:3] == ["3", "3", "2"]
    assert rows["ms_cxr", "val", "phrase"][:3] == ["1", "1", "1"]
    assert rows["vindr_cxr", "test", "detection"][4:6] == ["200/200/200", "100/100/100"]
    assert rows["iu_xray", "train", "report"][:2] == ["6", "6"]
    assert "iu_xray: would stop a run" in text
    assert "5_Frontal.dcm.png does not exist" in text
    assert "cannot be read: " in text
    assert "6_Frontal.dcm.png" in text


def test_the_description_counts_what_is_clipped_and_skipped(tmp_path):
    root = layouts.padchest_gr(tmp_path)
    path = root / "grounded_reports_20240819.json"
    # Of two studies: one box reaches outside, one has its corners swapped.
    replace_in(path, "0.5, 0.4, 0.9", "0.5, 1.4, 0.9")
    replace_in(path, "0.1, 0.5, 0.4, 0.9", "0.4, 0.5, 0.1, 0.9")
    _, text, _ = describe(of("padchest_gr", root, "data.on_error=skip"))
    assert "train, padchest_gr: skipped 1 examples or boxes, clipped 1 boxes, such as" in text
    assert "it is clipped" in text
    assert "it is left out" in text


def test_labels_are_described_where_there_are_reports(tmp_path):
    _, text, _ = describe(of("nih", layouts.nih(tmp_path / "boxes")))
    assert "Support Devices" not in text
    _, text, _ = describe(of("iu_xray", layouts.r2gen(tmp_path / "reports")))
    assert "Support Devices" in text


def test_the_lengths_are_of_what_is_trained(tmp_path):
    """Traces and tags included."""
    config = of("iu_xray", layouts.r2gen(tmp_path), "data.thinking=true")
    rows, _, policy = describe(config)
    lengths = [len(policy.encode_target(e)) for e in load_split(config, "train")]
    assert rows["iu_xray", "train", "report"][-1] == inspect_data.spread(lengths).replace(" ", "")


def test_tokens_are_those_of_the_model(tmp_path):
    config = of("llava", layouts.llava(tmp_path), "model.max_pixels=9216")
    rows, _, policy = describe(config)
    examples = only(load_split(config, "val"), "report")
    prompts = [len(policy.encode(e)) for e in examples]
    answers = [len(policy.encode_target(e)) for e in examples]
    spreads = [inspect_data.spread(lengths).replace(" ", "") for lengths in (prompts, answers)]
    assert rows["llava", "val", "report"][-2:] == spreads


@pytest.mark.parametrize("size", [(400, 200), (30, 60), (1000, 1000)])
def test_boxes_land_on_the_right_pixels_of_the_sheet(tmp_path, size):
    """A white rectangle in a black image: its box encloses it, whatever the image's size."""
    w, h = size
    x1, y1, x2, y2 = box = (0.25, 0.5, 0.5, 0.75)
    pixels = np.zeros((h, w), np.uint8)
    pixels[h // 2 : h * 3 // 4, w // 4 : w // 2] = 255
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    e = data.Example("a", "grounding", (str(path),), "q", "a", boxes=(box,))
    sheet = np.asarray(inspect_data.contact_sheet([e]), dtype=int)

    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 60)
    y, x = np.nonzero(red)
    scale = min(352 / w, 352 / h)
    width, height = w * scale, h * scale
    left, top = (360 - round(width)) / 2, (360 - round(height)) / 2
    edges = [left + x1 * width, left + x2 * width, top + y1 * height, top + y2 * height]
    assert np.allclose([x.min(), x.max(), y.min(), y.max()], edges, atol=2.5)

    white = sheet[:360, :360].min(-1) > 250
    inside = white[y.min() + 4 : y.max() - 4, x.min() + 4 : x.max() - 4]
    assert inside.mean() > 0.95


def test_a_description_of_nothing_says_why(tmp_path, monkeypatch, capsys):
    config = layouts.write(tmp_path / "c.yaml", "data: {source: jsonl, path: /absent}\n")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["inspect_data", str(config), f"out={out}"])
    with pytest.raises(InputError, match="no usable example"):
        inspect_data.main()
    assert "no such folder; set it to the jsonl dataset" in capsys.readouterr().out
    assert not (out / "data.png").exists()


def test_the_command_writes_the_sheet(tmp_path, monkeypatch, capsys):
    root = layouts.coco(tmp_path / "coco")
    text = json.dumps({"data": {"source": "coco", "path": str(root)}})
    config = layouts.write(tmp_path / "c.yaml", text)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["inspect_data", str(config), f"out={out}"])
    inspect_data.main()
    assert f"examples: {out / 'data.png'}" in capsys.readouterr().out
    assert Image.open(out / "data.png").width == 4 * 360


# ------------------------------------------------------------------------------- broken images


def cut(path):
    """A download that was interrupted."""
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_is_decoded_on_request(tmp_path, split):
    root = layouts.r2gen(tmp_path)
    n = {"train": 0, "val": 2, "test": 3}[split]
    cut(root / "images" / f"CXR{n}" / "1.png")
    description = inspect_data.Description(of("iu_xray", root))
    description.decode_images()
    text = description.text()
    assert f"CXR{n}/1.png: not a readable image" in text
    assert "1 of 8 images cannot be read" in text


def test_the_command_lists_images_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    root = layouts.r2gen(tmp_path / "data")
    cut(root / "images" / "CXR0" / "1.png")
    settings = ["data.source=iu_xray", f"data.path={root}", "data.tasks=[report]"]
    argv = ["inspect_data", str(ROOT / "config.yaml"), *settings, f"out={tmp_path}", "--images"]
    monkeypatch.setattr(sys, "argv", argv)
    inspect_data.main()
    said = capsys.readouterr()
    assert "1 of 8 images cannot be read" in said.out
    assert "decode: 100%" in said.err


@pytest.mark.parametrize("split, n", [("train", 0), ("val", 2)])
def test_training_tries_some_images_at_its_start(tmp_path, split, n):
    root = layouts.r2gen(tmp_path)
    cut(root / "images" / f"CXR{n}" / "0.png")
    with pytest.raises(InputError, match=rf"CXR{n}/0\.png: not a readable image"):
        load_split(of("iu_xray", root), split)


def test_where_errors_are_skipped_a_broken_image_is_said_at_the_start(tmp_path, capsys):
    root = layouts.r2gen(tmp_path)
    cut(root / "images" / "CXR0" / "0.png")
    assert load_split(of("iu_xray", root, "data.on_error=skip"), "train")
    assert "CXR0/0.png: not a readable image" in capsys.readouterr().err
