"""Every dataset in the layout in which it is distributed; mixtures, splits without leaks, templates, traces, the description."""

import collections
import dataclasses
import json
import sys

import layouts
import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

import data
from data import load_split
from readers.mimic_cxr import findings_section
from readers.vindr_cxr import fuse_boxes
from runtime.config import InputError, Source, config_text, load_config
from tools import inspect_data

SPLITS = ("train", "val", "test")


def of(source, root, *overrides):
    return load_config(
        ROOT / "config.yaml",
        [
            f"data.source={source}",
            f"data.path={root}",
            "data.tasks=[report,grounding,classification]",
            *overrides,
        ],
    )


def splits(config):
    return {split: load_split(config, split) for split in SPLITS}


def only(examples, kind):
    return [e for e in examples if (e.kind or e.task) == kind]


def near(boxes, wanted):
    return np.shape(boxes) == np.shape(wanted) and np.allclose(boxes, wanted, atol=1e-9)


def counts(config):
    return {
        split: dict(collections.Counter(e.kind or e.task for e in part))
        for split, part in splits(config).items()
    }


# ---------------------------------------------------------------- one by one


def test_iu_xray_from_openi(tmp_path):
    parts = splits(of("iu_xray", layouts.openi(tmp_path)))
    assert [len(p) for p in parts.values()] == [7, 1, 2]
    everyone = {e.id: e for p in parts.values() for e in p}
    assert (
        everyone["2"].answer == "Clear lungs & normal heart, study 2."
        and everyone["4"].answer == "No acute disease."
    )
    assert everyone["2"].patient == "iu/2" and [i[-20:] for i in everyone["2"].images] == [
        "XR2_IM-0001-4001.png",
        "XR2_IM-0002-4002.png",
    ]


@pytest.mark.parametrize("reports, end", [("txt", ".gz"), ("csv", "")])
def test_mimic_cxr_from_physionet(tmp_path, reports, end):
    root = layouts.mimic_cxr(tmp_path, reports, end)
    assert counts(of("mimic_cxr", root)) == {
        "train": {"report": 3, "classification": 3},
        "val": {"report": 1, "classification": 1},
        "test": {"report": 2, "classification": 2},
    }
    parts = splits(of("mimic_cxr", root))
    study = only(parts["train"], "report")[2]
    assert (study.id, study.patient, study.answer) == (
        "57375967",
        "mimic/10000764",
        "The lungs are clear. Study 57375967.",
    )
    assert [i[-6:-4] for i in study.images] == ["d6", "d5", "d4"]  # PA, AP, lateral
    assert (
        only(parts["val"], "report")[0].answer == "No acute process in study 50771383."
    )  # the impression: no findings
    assert (
        only(parts["train"], "classification")[0].answer == "cardiomegaly, pleural effusion."
    )  # by name, certain ones alone
    frontal = load_split(
        of("mimic_cxr", root, "data.views=frontal", "data.tasks=[report]"), "train"
    )
    assert [(e.id, len(e.images)) for e in frontal] == [
        ("50414267", 1),
        ("57375967", 1),
    ]  # one study is lateral only


def test_mimic_cxr_from_r2gen(tmp_path):
    parts = splits(of("mimic_cxr", layouts.mimic_r2gen(tmp_path)))
    assert [len(p) for p in parts.values()] == [6, 1, 2] and parts["train"][
        0
    ].patient == "mimic/10000032"


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
    ],
)
def test_findings_section(text, section):
    assert findings_section(text).strip() == section


def test_boxes_of_several_readers_are_fused():
    a, b, c, far = (0, 0, 10, 10), (0, 0, 10, 8), (0, 2, 10, 12), (50, 50, 60, 60)
    assert near(fuse_boxes([[a], [b]]), [(0, 0, 10, 9)]) and near(
        fuse_boxes([[a, far], [b, far]]), [(0, 0, 10, 9), far]
    )
    assert near(
        fuse_boxes([[a], [b], [c]]), [(0, 2 / 3, 10, 10)]
    )  # c overlaps the mean of a and b by 7 / 12
    assert near(fuse_boxes([[a], [(0, 5, 10, 15)]]), [a, (0, 5, 10, 15)])  # by a third: two lesions
    assert near(
        fuse_boxes([[(0, 0, 10, 11), (0, 0, 10, 7)], [(0, 0, 10, 8)]]), [(0, 0, 10, 26 / 3)]
    )  # one reader's, too
    rng = np.random.default_rng(0)
    apart = [(10 * i, 0, 10 * i + 4 + rng.random(), 5) for i in range(9)]
    assert (
        near(fuse_boxes([apart]), apart)
        and near(fuse_boxes([apart] * 3), apart)
        and fuse_boxes([]) == []
    )


def test_vindr_cxr_from_physionet(tmp_path):
    config = of("vindr_cxr", layouts.vindr_physionet(tmp_path))
    n = counts(config)
    assert n["test"] == {"abnormality": 1, "detection": 2, "classification": 2}
    assert [
        n["train"][k] + n["val"][k] for k in ("abnormality", "detection", "classification")
    ] == [18, 10, 10] and n["val"]["detection"] == 1
    parts = splits(config)
    study = {e.id: e for e in parts["train"] + parts["val"]}
    assert near(study["v3-Nodule/Mass"].boxes, [(0.11, 0.1, 0.31, 0.5)]) and near(
        study["v3-Cardiomegaly"].boxes, [(0.4, 0.4, 0.9, 0.9)]
    )
    assert near(study["v3-detect"].boxes, [(0.11, 0.1, 0.31, 0.5), (0.4, 0.4, 0.9, 0.9)])
    assert (
        study["v3-detect"].answer
        == "Nodule/Mass [0.11, 0.10, 0.31, 0.50]; Cardiomegaly [0.40, 0.40, 0.90, 0.90]."
    )
    assert (
        study["v0-list"].answer == "none."
        and study["v0-detect"].answer == data.NOTHING_THERE
        and study["v0-detect"].boxes == ()
    )
    assert (
        only(parts["test"], "abnormality")[0].question
        == "Where is the pleural effusion? Give its boxes."
    )
    (tmp_path / "test" / "t0.png").rename(tmp_path / "test" / "t0.dicom")
    with pytest.raises(InputError, match="t0.png does not exist .DICOM"):
        load_split(config, "test")


def test_vindr_cxr_from_kaggle_with_reduced_images(tmp_path):
    parts = splits(of("vindr_cxr", layouts.vindr_kaggle(tmp_path), "data.tasks=[abnormality]"))
    assert [len(p) for p in parts.values()] == [7, 1, 2] and all(
        near(e.boxes, [(0.4, 0.4, 0.9, 0.9)]) for p in parts.values() for e in p
    )
    (tmp_path / "train_meta.csv").unlink()  # then the boxes cannot be right: never just skipped
    with pytest.raises(InputError, match="were the images resized.*train_meta.csv"):
        load_split(
            of("vindr_cxr", tmp_path, "data.tasks=[abnormality]", "data.on_error=skip"), "train"
        )


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_ms_cxr(tmp_path, version):
    layouts.mimic_cxr(tmp_path / "mimic_cxr")
    parts = splits(of("ms_cxr", layouts.ms_cxr(tmp_path / "ms_cxr", version)))
    assert {s: [e.label for e in p] for s, p in parts.items()} == {
        "train": ["left basilar opacity", "mild cardiomegaly"],
        "val": ["mild edema"],
        "test": ["small right pneumothorax"],
    }
    opacity = parts["train"][0]
    assert (
        near(opacity.boxes, [(0.5, 0.5, 0.75, 0.75), (0.1, 0.1, 0.3, 0.3)])
        and opacity.patient == "mimic/10000764"
        and opacity.kind == "phrase"
    )
    assert parts["test"][
        0
    ].question == "Where is small right pneumothorax? Answer with boxes." and parts["test"][
        0
    ].images[0].endswith("d8.jpg")


def test_ms_cxr_without_any_split_keeps_patients_together(tmp_path):
    layouts.mimic_cxr(tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").glob("*split*"):
        path.unlink()
    parts = splits(
        of("ms_cxr", layouts.ms_cxr(tmp_path / "ms_cxr"), f"data.images={tmp_path / 'elsewhere'}")
    )
    assert (
        sum(map(len, parts.values())) == 4
        and len({frozenset(e.patient for e in p) for p in parts.values()}) == 3
    )


@pytest.mark.parametrize("with_table", [True, False])
def test_padchest_gr(tmp_path, with_table):
    config = of("padchest_gr", layouts.padchest_gr(tmp_path, with_table))
    parts = splits(config)
    if with_table:
        assert counts(config) == {
            "train": {"report": 4, "phrase": 3, "detection": 4},
            "val": {"report": 2, "phrase": 2, "detection": 2},
            "test": {"report": 2, "phrase": 2, "detection": 2},
        }
    everyone = {e.id: e for p in parts.values() for e in p}
    assert (
        everyone["0_x.png"].answer == "No relevant findings."
        and everyone["3_x.png"].answer == "Right pleural effusion. Normal heart size."
    )
    assert near(
        everyone["3_x.png-Right pleural effusion"].boxes,
        [(0.1, 0.5, 0.4, 0.9), (0.2, 0.1, 0.3, 0.2)],
    )
    assert data.open_images(everyone["3_x.png"])[0].getextrema() == ((0, 255),) * 3  # 16 bit
    assert everyone["3_x.png"].patient == (
        "padchest/p3" if with_table else "padchest/3"
    )  # the image's name begins with its study


def test_a_problem_with_one_question_leaves_the_others(tmp_path):
    root = layouts.padchest_gr(tmp_path)
    path = root / "grounded_reports_20240819.json"
    path.write_text(path.read_text().replace("0.5", "1.5", 1))  # a box of study 1
    assert "1_x.png" in [
        e.id for e in load_split(of("padchest_gr", root, "data.tasks=[report]"), "train")
    ]
    train = load_split(of("padchest_gr", root, "data.on_error=skip"), "train")
    assert [e.kind or e.task for e in train if e.id.startswith("1_x")] == ["report"]
    root = layouts.mimic_cxr(tmp_path / "mimic")
    (root / "files/p10/p10000764/s57375967.txt").write_text("FINAL REPORT\n")
    assert [
        e.id
        for e in load_split(of("mimic_cxr", root, "data.on_error=skip"), "train")
        if "57375967" in e.id
    ] == ["57375967-list"]


def test_chest_imagenome(tmp_path):
    layouts.mimic_cxr(tmp_path / "mimic_cxr")
    config = of("chest_imagenome", layouts.chest_imagenome(tmp_path / "chest_imagenome"))
    assert counts(config) == {
        "train": {"anatomy": 2},
        "val": {"anatomy": 1},
        "test": {"anatomy": 2},
    }  # d1, d5 | d7 | d8, d9
    regions = {"right lung": [(0.1, 0.1, 0.5, 0.75)], "cardiac silhouette": [(0.25, 0.5, 0.75, 1)]}
    seen = [
        e
        for seed in range(4)
        for e in load_split(
            of("chest_imagenome", tmp_path / "chest_imagenome", f"seed={seed}"), "val"
        )
    ]
    assert {e.label for e in seen} == {*regions} and all(
        near(e.boxes, regions[e.label]) for e in seen
    )  # one region of each image
    assert all(
        e.question == f"Where is the {e.label}? Give its box." and e.patient == "mimic/10000898"
        for e in seen
    )


@pytest.mark.parametrize("lists", [True, False])
def test_nih(tmp_path, lists):
    root = layouts.nih(tmp_path, lists)
    parts = splits(of("nih", root))
    patients = [{e.patient for e in p} for p in parts.values()]
    assert [len(p) for p in patients] == (
        [8, 1, 1] if lists else [7, 1, 2]
    ) and not set.intersection(*patients)
    boxes = {e.id: e for p in parts.values() for e in only(p, "abnormality")}
    assert near(
        boxes["00000009_000.png-Infiltration"].boxes, [(0.25, 0.5, 0.375, 0.75)]
    )  # its box file says Infiltrate
    assert (
        near(boxes["00000009_001.png-Effusion"].boxes, [(512.5 / 1024, 0, 768.5 / 1024, 1)])
        and len(boxes) == 2
    )
    assert {e.answer for e in only(parts["test"], "classification")} >= (
        {"infiltration, effusion."} if lists else {"none."}
    )
    for split in SPLITS:  # the same patients, whatever is asked
        asked = [
            e
            for _, part, _ in data.read_split(of("nih", root, "data.tasks=[grounding]"), split)
            for e in part
        ]
        assert {e.id for e in asked} == {e.id for e in only(parts[split], "abnormality")}


@pytest.mark.parametrize("split", [True, False])
def test_coco(tmp_path, split):
    config = of("coco", layouts.coco(tmp_path, split))
    if split:
        assert counts(config) == {
            s: {"classification": 3, "abnormality": 2, "detection": 3} for s in SPLITS
        }
    parts = splits(config)
    boxes = [e for p in parts.values() for e in only(p, "abnormality")]
    assert all(
        near(e.boxes, [(0.1, 0.1, 0.6, 0.6)]) and e.label == "active tuberculosis" for e in boxes
    ) and len(boxes) == (6 if split else 8)
    assert len({e.images for p in parts.values() for e in p}) == 9


def test_llava_conversations_go_round(tmp_path, policy):
    parts = splits(of("llava", layouts.llava(tmp_path)))
    where, report, other = parts["test"][:3]
    assert [e.task for e in (where, report, other)] == [
        "grounding",
        "report",
        "classification",
    ] and len(parts["test"]) == 6
    assert (
        where.boxes == ((0.12, 0.55, 0.41, 0.93), (0.5, 0.6, 1, 0.75))
        and report.answer == "There is a pleural effusion."
    )
    for e, turn in zip((where, report, other), range(3)):  # out again: the same texts and boxes
        written = json.loads((tmp_path / "test.json").read_text())[0]["conversations"]
        assert [t["value"].removeprefix("<image>\n") for t in written[: 2 * turn + 2]] == [
            *(t for q_a in e.history for t in q_a),
            e.question,
            data.target_text(e),
        ]
    assert data.parse_boxes(data.target_text(where)) == list(where.boxes)
    text = policy.chat(other)  # earlier turns come first, the image once
    places = [
        text.index(part)
        for part in (
            "<|image_pad|>",
            where.question,
            where.answer,
            report.question,
            report.answer,
            other.question,
        )
    ]
    assert (
        places == sorted(places)
        and text.count("<|image_pad|>") == 1
        and text.endswith("<|im_start|>assistant\n")
    )


def test_one_file_is_split_by_the_patients_in_its_paths(tmp_path):
    """Three studies of each of 12 patients of MIMIC-CXR in one LLaVA file, and two images of each of 10 NIH patients in one COCO file."""
    rows = [
        {
            "id": f"{p}_{k}",
            "image": f"files/p10/p100000{p}/s5000000{k}/x.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nIs a report needed?"},
                {"from": "gpt", "value": "Yes."},
            ],
        }
        for p in range(10, 22)
        for k in range(3)
    ]
    for row in rows:
        layouts.picture(tmp_path / "llava" / row["image"])
    layouts.write(
        tmp_path / "llava" / "all.json",
        json.dumps(
            rows + [{"id": "none", "image": None, "conversations": rows[0]["conversations"]}]
        ),
    )
    parts = splits(of("llava", tmp_path / "llava", "data.on_error=skip"))
    patients = [{e.patient for e in p} for p in parts.values()]
    assert (
        [len(p) for p in patients] == [9, 1, 2]
        and len(set.union(*patients)) == 12
        and [len(p) for p in parts.values()] == [27, 3, 6]
    )
    assert patients[0] <= {f"mimic/100000{p}" for p in range(10, 22)} and {
        e.task for e in parts["train"]
    } == {"classification"}
    names = [f"{patient:08d}_{k:03d}.png" for patient in range(10) for k in range(2)]
    for name in names:
        layouts.picture(tmp_path / "coco" / name)
    layouts.write(
        tmp_path / "coco" / "boxes.json",
        json.dumps(
            {
                "categories": [{"id": 1, "name": "x"}],
                "annotations": [
                    {"image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9]} for n in range(20)
                ],
                "images": [
                    {"id": n, "file_name": name, "width": 40, "height": 32}
                    for n, name in enumerate(names)
                ],
            }
        ),
    )
    parts = splits(of("coco", tmp_path / "coco", "data.tasks=[abnormality]"))
    assert [len({e.patient for e in p}) for p in parts.values()] == [7, 1, 2] and [
        len(p) for p in parts.values()
    ] == [14, 2, 4]


def test_coco_images_in_folders_of_their_own(tmp_path):
    root = layouts.coco(tmp_path)
    for split, first in (("train", 0), ("val", 3), ("test", 6)):
        (root / f"{split}2017").mkdir()
        for n in range(first, first + 3):
            (root / "images" / f"c{n}.png").rename(root / f"{split}2017" / f"c{n}.png")
    assert {e.images[0].split("/")[-2] for e in load_split(of("coco", root), "val")} == {"val2017"}


def test_a_study_without_certain_labels_is_not_called_normal(tmp_path):
    root = layouts.mimic_cxr(tmp_path, end="")
    path = root / "mimic-cxr-2.0.0-chexpert.csv"
    rows = path.read_text().splitlines()
    rows[1] = rows[1].replace("1.0", "-1.0").replace("--", "-")  # study 50414267
    rows[2] = ",".join(
        rows[2].split(",")[:2] + [""] * 8 + ["1.0"] + [""] * 5
    )  # 50414268: No Finding
    path.write_text("\n".join(rows) + "\n")
    found = {
        e.id: e.answer
        for e in load_split(of("mimic_cxr", root, "data.tasks=[classification]"), "train")
    }
    assert found == {"50414268-list": "none.", "57375967-list": "cardiomegaly, pleural effusion."}


# ---------------------------------------------------------------- what is wrong with the files


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
        ("mimic_cxr", layouts.mimic_cxr, "mimic-cxr-2.0.0-split.csv.gz", "mimic-cxr-2.*-split.csv"),
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
    path = build(tmp_path / source) / lost
    path.rename(tmp_path / "lost")
    with pytest.raises(InputError, match=message) as error:
        load_split(of(source, tmp_path / source), "train")
    assert "\n" not in str(error.value) and str(tmp_path / source) in str(error.value)


@pytest.mark.parametrize(
    "source, build, file, old, new, message",
    [
        (
            "vindr_cxr",
            layouts.vindr_physionet,
            "annotations/annotations_train.csv",
            "80,40,180,90",
            "180,40,80,90",
            "inside the image",
        ),
        (
            "vindr_cxr",
            layouts.vindr_physionet,
            "annotations/annotations_train.csv",
            "80,40,180,90",
            ",,,",
            "without a box",
        ),
        (
            "vindr_cxr",
            layouts.vindr_physionet,
            "annotations/annotations_train.csv",
            "x_max",
            "xmax",
            "no column 'x_max'",
        ),
        (
            "padchest_gr",
            layouts.padchest_gr,
            "grounded_reports_20240819.json",
            '"findings"',
            '"finding"',
            "ImageID and findings",
        ),
        (
            "padchest_gr",
            layouts.padchest_gr,
            "grounded_reports_20240819.json",
            "0.5",
            "1.5",
            "inside the image",
        ),
        ("nih", layouts.nih, "BBox_List_2017.csv", "512.5", "NA", "line 3: expected four numbers"),
        (
            "coco",
            layouts.coco,
            "annotations/instances_train2017.json",
            '"bbox"',
            '"box"',
            "COCO's format",
        ),
        ("llava", layouts.llava, "train.json", '"gpt"', '"human"', "human and gpt"),
        ("llava", layouts.llava, "train.json", "train/0.png", "../0.png", "lies outside"),
        ("iu_xray", layouts.r2gen, "annotation.json", "CXR0/0.png", "../../0.png", "lies outside"),
        ("iu_xray", layouts.openi, "ecgen-radiology/1.xml", "</eCitation>", "", "not valid XML"),
    ],
)
def test_bad_contents_are_named_or_skipped(
    tmp_path, capsys, source, build, file, old, new, message
):
    root = build(tmp_path / source)
    (root / file).write_text((root / file).read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=message) as error:
        load_split(of(source, root), "train")
    assert "\n" not in str(error.value) and file.rpartition("/")[2] in str(error.value)
    if "format" not in message and "column" not in message:
        assert (
            load_split(of(source, root, "data.on_error=skip"), "train")
            and "skipped" in capsys.readouterr().err
        )


def test_ids_are_unique(tmp_path):
    row = {"id": 1, "images": ["a.png"], "report": "Clear."}
    for split in SPLITS:
        layouts.write(
            tmp_path / "a" / f"{split}.jsonl",
            "".join(json.dumps(r) + "\n" for r in (row, {**row, "report": "Edema."})),
        )
        layouts.write(
            tmp_path / "b" / "a" / f"{split}.jsonl", json.dumps({**row, "patient": None}) + "\n"
        )
    for folder in ("a", "b/a"):
        layouts.picture(tmp_path / folder / "a.png")
    with pytest.raises(InputError, match="a second example has the id '1'"):
        load_split(of("jsonl", tmp_path / "a"), "train")
    mixture = "data.train=[{source: jsonl, path: a}, {source: jsonl, path: b/a}]"
    examples = load_split(
        load_config(ROOT / "config.yaml", [f"data.path={tmp_path}", mixture, "data.on_error=skip"]),
        "train",
    )
    assert [e.id for e in examples] == ["a.0/1", "a.1/1"] and {e.patient for e in examples} == {
        ""
    }  # no patient: no leak


def test_a_source_that_gives_nothing_is_an_error(tmp_path):
    root = layouts.everything(tmp_path)
    (root / "chest_imagenome" / "silver_dataset" / "scene_graph").rename(root / "lost")
    with pytest.raises(InputError, match="no usable example of chest_imagenome in split 'train'"):
        load_split(
            load_config(
                ROOT / "config.yaml",
                [
                    f"data.path={root}",
                    "data.train=[{source: mimic_cxr}, {source: chest_imagenome}]",
                ],
            ),
            "train",
        )


# ---------------------------------------------------------------- mixtures and splits

MIXTURE = (
    "data.train=[{source: iu_xray, tasks: [report]}, {source: mimic_cxr, weight: 2.5}, {source: vindr_cxr, tasks: [detection], weight: 0.5}, "
    "{source: ms_cxr}, {source: nih, limit: 4}]"
)


def test_a_mixture_of_sources_with_weights(tmp_path):
    root = layouts.everything(tmp_path)
    config = load_config(ROOT / "config.yaml", [f"data.path={root}", MIXTURE, "data.views=frontal"])
    assert load_config(layouts.write(tmp_path / "c.yaml", config_text(config))) == config
    train = load_split(config, "train")
    assert len({e.id for e in train}) == len(train)
    n = collections.Counter((e.id.split("/")[0], e.kind or e.task) for e in train)
    assert n == {
        ("iu_xray", "report"): 7,
        ("mimic_cxr", "report"): 5,
        ("mimic_cxr", "classification"): 5,
        ("vindr_cxr", "detection"): 4,
        ("ms_cxr", "phrase"): 2,
        ("nih", "classification"): 4,
    }
    studies = data.by_study(train)
    assert (
        sum(map(len, studies)) == len(train) and len(studies) == 7 + 5 + 4 + 1 + 4
    )  # a copy is a study of its own
    assert (
        all(len({e.copy for e in study}) == 1 for study in studies)
        and load_split(config, "train") == train
    )
    config.data.test = [Source("vindr_cxr", tasks=["abnormality"])]
    assert {e.kind for e in load_split(config, "test")} == {"abnormality"}


def test_patients_are_never_shared_between_splits(tmp_path, capsys):
    """Chest ImaGenome trains on images of a patient whose study MS-CXR holds out."""
    root = layouts.everything(tmp_path)
    path = root / "chest_imagenome" / "silver_dataset" / "splits" / "train.csv"
    path.write_text(path.read_text() + "9,10000898,50771383,d7,AP\n")
    config = load_config(
        ROOT / "config.yaml",
        [
            f"data.path={root}",
            "data.train=[{source: chest_imagenome}]",
            "data.test=[{source: ms_cxr}]",
        ],
    )
    config.data.val = config.data.test
    assert {e.patient for e in load_split(config, "train")} == {"mimic/10000032", "mimic/10000764"}
    assert (
        "left out 1 examples of 1 patients that are also held out, such as mimic/10000898"
        in capsys.readouterr().err
    )


def test_reports_that_repeat_held_out_ones_are_counted_or_left_out(tmp_path, capsys):
    root = layouts.r2gen(tmp_path)
    tree = json.loads((root / "annotation.json").read_text())
    tree["train"][0]["report"] = "the heart is normal.  Study 3"
    (root / "annotation.json").write_text(json.dumps(tree))
    assert (
        len(load_split(of("iu_xray", root), "train")) == 2
        and "1 of 2 reports (50%) repeat" in capsys.readouterr().err
    )
    assert [e.id for e in load_split(of("iu_xray", root, "data.dedup=true"), "train")] == ["CXR1"]
    assert (
        "are left out" in capsys.readouterr().err
        and len(load_split(of("iu_xray", root, "data.dedup=true"), "test")) == 1
    )


def test_wordings_are_seeded_and_held_out_ones_fixed(tmp_path):
    root = layouts.kaggle(tmp_path, 40)
    train, test = (load_split(of("iu_xray", root), split) for split in ("train", "test"))
    assert 3 < len({e.question for e in train}) <= len(data.QUESTIONS["report"]) and {
        e.question for e in test
    } == {data.QUESTIONS["report"][0]}
    assert (
        load_split(of("iu_xray", root), "train")
        == train
        != load_split(of("iu_xray", root, "seed=1"), "train")
    )
    assert all(
        len(set(texts)) >= 6
        and all(("{}" in t) == (kind in ("abnormality", "anatomy", "phrase")) for t in texts)
        for kind, texts in data.QUESTIONS.items()
    )


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
        load_config(ROOT / "config.yaml", [override])


# ---------------------------------------------------------------- traces for the cold start


def test_systematic_reading_sorts_the_sentences():
    report = "Lungs are clear. Heart size is normal. A right PICC line tip lies in the SVC. No effusion or pneumothorax. Unchanged."
    assert data.systematic_reading(report) == (
        "Heart: Heart size is normal. Mediastinum: not described. Lungs: Lungs are clear. Pleura: No effusion or pneumothorax. "
        "Bones: not described. Devices: A right PICC line tip lies in the SVC. Other: Unchanged."
    )
    assert data.looking_for("nodule", [(0.1, 0.1, 0.2, 0.2)]).endswith(
        "on the right."
    ) and data.looking_for("nodule", []).endswith("not there.")
    assert data.looking_for("nodule", [(0.1, 0.1, 0.2, 0.2), (0.6, 0.1, 0.8, 0.2)]).endswith(
        "both sides."
    )


def test_traces_come_from_the_file_or_the_references(tmp_path, capsys):
    root = layouts.r2gen(tmp_path)
    made = load_split(of("iu_xray", root, "data.thinking=true"), "train")
    assert made[1].thinking == data.systematic_reading(made[1].answer)
    path = layouts.write(
        tmp_path / "traces.jsonl", '{"id": "CXR1", "thinking": "First the heart."}\n'
    )
    given = load_split(of("iu_xray", root, "data.thinking=true", f"data.traces={path}"), "train")
    assert [e.thinking for e in given] == [
        "",
        "First the heart.",
    ] and "1 of 2 examples have a trace in" in capsys.readouterr().err
    held = load_split(of("iu_xray", root, "data.thinking=true", f"data.traces={path}"), "val")
    assert held[0].thinking == data.systematic_reading(held[0].answer)  # the file is for training
    for content, message in ((b"{}", "line 1"), (b"", "line 1"), (b"\xff", "cannot read")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"traces.jsonl.*{message}"):
            load_split(of("iu_xray", root, "data.thinking=true", f"data.traces={path}"), "train")


# ---------------------------------------------------------------- python -m tools.inspect_data


def test_the_description_counts_and_shows(tmp_path, monkeypatch):
    root = layouts.everything(tmp_path)
    (root / "iu_xray" / "images_normalized" / "5_Frontal.dcm.png").unlink()
    (root / "iu_xray" / "images_normalized" / "6_Frontal.dcm.png").write_bytes(b"no image")
    config = load_config(ROOT / "config.yaml", [f"data.path={root}", MIXTURE])
    seen = []

    def encode(_, example):
        seen.append(data.target_text(example))
        return 7, 5

    monkeypatch.setattr(inspect_data.Description, "encode", encode)
    text, sheet = inspect_data.describe(config)
    rows = {
        tuple(line.replace(" ", "").split("|")[:3]): line.replace(" ", "").split("|")[3:]
        for line in text.splitlines()
        if " | " in line
    }
    assert rows["mimic_cxr", "train", "report"][:3] == ["3", "3", "2"] and rows[
        "ms_cxr", "val", "phrase"
    ][:3] == ["1", "1", "1"]
    assert (
        rows["vindr_cxr", "test", "detection"][4:] == ["200/200/200", "100/100/100"]
        and "5_Frontal.dcm.png does not exist" in text
    )
    assert "cannot be read: " in text and "would stop a run" in text and "6_Frontal.dcm.png" in text
    config.data.thinking = True  # lengths are of what is trained, traces and tags included
    seen.clear()
    inspect_data.describe(config)
    assert any("Heart: " in text for text in seen) and any("Looking for " in text for text in seen)
    assert rows["val", "7", "7/7/7"] == ["5/5/5"] and rows["iu_xray", "train", "report"][:2] == [
        "6",
        "6",
    ]
    assert sheet.width == 4 * 360


@pytest.mark.parametrize("size", [(400, 200), (30, 60), (1000, 1000)])
def test_boxes_land_on_the_right_pixels_of_the_sheet(tmp_path, size):
    """A white rectangle in a black image: its box encloses it, whatever the image's size."""
    w, h = size
    box = (0.25, 0.5, 0.5, 0.75)
    pixels = np.zeros((h, w), np.uint8)
    pixels[h // 2 : h * 3 // 4, w // 4 : w // 2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    e = data.Example("a", "grounding", (str(tmp_path / "a.png"),), "q", "a", boxes=(box,))
    sheet = np.asarray(inspect_data.contact_sheet([e]), dtype=int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 60)
    white = sheet[:360, :360].min(-1) > 250
    scale = min(352 / w, 352 / h)
    left, top = (360 - round(w * scale)) / 2, (360 - round(h * scale)) / 2
    y, x = np.nonzero(red)
    edges = [
        left + box[0] * w * scale,
        left + box[2] * w * scale,
        top + box[1] * h * scale,
        top + box[3] * h * scale,
    ]
    assert np.allclose([x.min(), x.max(), y.min(), y.max()], edges, atol=2.5)
    inside = white[y.min() + 4 : y.max() - 4, x.min() + 4 : x.max() - 4]
    assert inside.mean() > 0.95


def test_dataclass_of_sources_has_no_default_that_hides_the_section(tmp_path):
    config = of(
        "coco",
        tmp_path,
        "data.train=[{source: coco, path: a}, {source: nih, images: pictures}]",
        "data.views=frontal",
    )
    a, b = data.sources(config, "val")
    assert (a.path, a.views, a.tasks) == (
        f"{tmp_path}/a",
        "frontal",
        config.data.tasks,
    ) and b.path == f"{tmp_path}/nih"
    assert (
        str(b.image_root()) == f"{tmp_path}/pictures"
        and dataclasses.asdict(config)["data"]["train"][0]["path"] == "a"
    )
    config.data.images = "films"  # what an entry leaves out, the section gives
    assert [str(e.image_root()) for e in data.sources(config, "train")] == [
        f"{tmp_path}/films",
        f"{tmp_path}/pictures",
    ]


def test_a_description_of_nothing_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "inspect_data.py",
            str(ROOT / "config.yaml"),
            "data.source=jsonl",
            "data.path=/absent",
            f"out={tmp_path}",
        ],
    )
    with pytest.raises(InputError, match="no usable example"):
        inspect_data.main()
    assert (
        "no such folder; set it to the jsonl dataset" in capsys.readouterr().out
        and not (tmp_path / "data.png").exists()
    )
