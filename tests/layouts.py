"""The datasets in the layouts in which they are distributed, tiny and with made-up contents. Each writes into `root`."""

import csv
import gzip
import json

import numpy as np
from PIL import Image


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def table(path, header, rows):
    lines = [header.split(","), *rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def picture(path, mode="L", size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 4096, size[::-1]).astype(np.uint16)).save(path)
    else:
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 4), dtype=np.uint8), "RGBA").convert(
            mode
        ).save(path)
    return path


def r2gen(root):
    studies = [
        {
            "id": f"CXR{n}",
            "report": f"The heart is normal . Study {n} .",
            "image_path": [f"CXR{n}/0.png", f"CXR{n}/1.png"],
        }
        for n in range(4)
    ]
    for s in studies:
        for p in s["image_path"]:
            picture(root / "images" / p, "RGB")
    write(
        root / "annotation.json",
        json.dumps({"train": studies[:2], "val": studies[2:3], "test": studies[3:]}),
    )
    return root


def kaggle(root, n=10):
    table(
        root / "indiana_reports.csv",
        "uid,MeSH,Problems,image,indication,comparison,findings,impression",
        [
            [
                uid,
                "normal",
                "normal",
                "PA, lateral",
                "Pain",
                "None.",
                "" if uid == 3 else f"Clear,\nstudy {uid}.",
                'No "acute" disease.',
            ]
            for uid in range(n)
        ],
    )
    rows = [
        [uid, f"{uid}_{view}.dcm.png", view] for uid in range(n) for view in ("Lateral", "Frontal")
    ]
    table(root / "indiana_projections.csv", "uid,filename,projection", rows)
    for _, name, _ in rows:
        picture(root / "images_normalized" / name)
    return root


def openi(root, n=10):
    for uid in range(1, n + 1):
        findings = "" if uid == 4 else f"Clear lungs &amp; normal heart, study {uid}."
        images = "".join(
            f'<parentImage id="CXR{uid}_IM-000{k}-400{k}"><caption>PA</caption></parentImage>'
            for k in (2, 1)
        )
        write(
            root / "ecgen-radiology" / f"{uid}.xml",
            f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{uid}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">No acute disease.</AbstractText></Abstract></Article></MedlineCitation>{images}</eCitation>""",
        )
        for k in (1, 2):
            picture(root / "NLMCXR_png" / f"CXR{uid}_IM-000{k}-400{k}.png")
    return root


# (subject, study, [(dicom, view)], split) of the MIMIC-CXR fixture; images are 60 wide and 80 high
MIMIC = [
    ("10000032", "50414267", [("d1", "PA"), ("d2", "LATERAL")], "train"),
    ("10000032", "50414268", [("d3", "LL")], "train"),
    ("10000764", "57375967", [("d4", "LATERAL"), ("d5", "AP"), ("d6", "PA")], "train"),
    ("10000898", "50771383", [("d7", "AP")], "validate"),
    ("10000935", "50578979", [("d8", "PA")], "test"),
    ("10000980", "50985099", [("d9", "AP")], "test"),
]
MIMIC_REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  History: pain. Findings: none

 {findings}
 IMPRESSION:

 No acute process in study {study}.
"""


def mimic_folder(subject, study):
    return f"files/p{subject[:2]}/p{subject}/s{study}"


def mimic_cxr(root, reports="txt", end=".gz"):
    """MIMIC-CXR-JPG from PhysioNet, with the reports as text files or as the sectioned CSV."""
    images = [
        (subject, study, dicom, view, split)
        for subject, study, dicoms, split in MIMIC
        for dicom, view in dicoms
    ]
    table(
        root / f"mimic-cxr-2.0.0-split.csv{end}",
        "dicom_id,study_id,subject_id,split",
        [(d, s, p, part) for p, s, d, _, part in images],
    )
    table(
        root / f"mimic-cxr-2.0.0-metadata.csv{end}",
        "dicom_id,subject_id,study_id,ViewPosition,Rows,Columns,StudyDate",
        [(d, p, s, v, 80, 60, 21800506) for p, s, d, v, _ in images],
    )
    labels = [
        "Atelectasis",
        "Cardiomegaly",
        "Consolidation",
        "Edema",
        "Enlarged Cardiomediastinum",
        "Fracture",
        "Lung Lesion",
        "Lung Opacity",
        "No Finding",
        "Pleural Effusion",
        "Pleural Other",
        "Pneumonia",
        "Pneumothorax",
        "Support Devices",
    ]  # as published
    table(
        root / f"mimic-cxr-2.0.0-chexpert.csv{end}",
        "subject_id,study_id," + ",".join(labels),
        [[p, s, "", "1.0", "0.0", "-1.0", *[""] * 5, "1.0", *[""] * 4] for p, s, *_ in MIMIC],
    )
    for subject, study, dicom, _, _ in images:
        picture(root / mimic_folder(subject, study) / f"{dicom}.jpg", size=(60, 80))
    sections = []
    for subject, study, *_ in MIMIC:
        findings = "" if study == "50771383" else f"The lungs are clear. Study {study}."
        sections.append([f"s{study}", f"No acute process in study {study}.", findings, "", ""])
        if reports == "txt":
            text = MIMIC_REPORT.format(
                findings=f"FINDINGS:\n \n The lungs are\n clear. Study {study}.\n"
                if findings
                else "",
                study=study,
            )
            write(root / f"{mimic_folder(subject, study)}.txt", text)
    if reports == "csv":
        table(
            root / "mimic_cxr_sectioned.csv",
            "study,impression,findings,last_paragraph,comparison",
            sections,
        )
    return root


def mimic_r2gen(root):
    rows = {
        split: [
            {
                "id": d,
                "study_id": int(s),
                "subject_id": int(p),
                "report": f"Clear. Study {s}.",
                "image_path": [f"p{p[:2]}/p{p}/s{s}/{d}.jpg"],
                "split": split,
            }
            for p, s, dicoms, given in MIMIC
            if given == {"val": "validate"}.get(split, split)
            for d, _ in dicoms
        ]
        for split in ("train", "val", "test")
    }
    for row in (r for part in rows.values() for r in part):
        picture(root / "images" / row["image_path"][0], size=(60, 80))
    write(root / "annotation.json", json.dumps(rows))
    return root


def vindr_physionet(root):
    """Three readers of 10 training images, 200 x 100 pixels; one normal; the consensus on two test images."""
    rows = []
    for n in range(10):
        picture(root / "train" / f"v{n}.png", size=(200, 100))
        for r, reader in enumerate(("R1", "R2", "R3")):
            rows += (
                [[f"v{n}", reader, "Nodule/Mass", 20 + 2 * r, 10, 60 + 2 * r, 50]]
                if n
                else [[f"v{n}", reader, "No finding", "", "", "", ""]]
            )
        rows += [[f"v{n}", "R1", "Cardiomegaly", 80, 40, 180, 90]] if n else []
    table(
        root / "annotations" / "annotations_train.csv",
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max",
        rows,
    )
    for n in range(2):
        picture(root / "test" / f"t{n}.png", size=(200, 100))
    table(
        root / "annotations" / "annotations_test.csv",
        "image_id,class_name,x_min,y_min,x_max,y_max",
        [["t0", "Pleural effusion", 0, 50, 50, 100], ["t1", "No finding", "", "", "", ""]],
    )
    return root


def vindr_kaggle(root):
    """Images reduced to 50 x 25, whose boxes are pixels of 200 x 100 originals."""
    rows = [[f"v{n}", "Cardiomegaly", 3, "R8", 80, 40, 180, 90] for n in range(10)]
    table(root / "train.csv", "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max", rows)
    table(root / "train_meta.csv", "image_id,dim0,dim1", [[f"v{n}", 100, 200] for n in range(10)])
    for n in range(10):
        picture(root / "train" / f"v{n}.png", size=(50, 25))
    return root


def ms_cxr(root, version="1.0.0"):
    """Two phrases on d5 (one with two boxes), one on d8; the images are those of mimic_cxr, beside it."""
    header = (
        "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height"
        + ",split" * (version != "1.0.0")
    )
    path = {d: f"{mimic_folder(p, s)}/{d}.jpg" for p, s, dicoms, _ in MIMIC for d, _ in dicoms}
    rows = [
        ["d5", "Pneumonia", "left basilar opacity", path["d5"], 30, 40, 15, 20, 60, 80, "train"],
        ["d5", "Pneumonia", "left basilar opacity", path["d5"], 6, 8, 12, 16, 60, 80, "train"],
        ["d5", "Cardiomegaly", "mild cardiomegaly", path["d5"], 15, 40, 30, 20, 60, 80, "train"],
        ["d7", "Edema", "mild edema", path["d7"], 3, 4, 30, 40, 60, 80, "val"],
        ["d8", "Pneumothorax", "small right pneumothorax", path["d8"], 0, 0, 30, 8, 60, 80, "test"],
    ]
    table(
        root / f"MS_CXR_Local_Alignment_v{version}.csv",
        header,
        [row[: header.count(",") + 1] for row in rows],
    )
    return root


def padchest_gr(root, with_table=True):
    def finding(text, abnormal, boxes=()):
        more = (
            {"boxes": [list(b) for b in boxes], "extra_boxes": [], "labels": ["x"], "locations": []}
            if abnormal
            else {}
        )
        return {
            "sentence_en": text,
            "sentence_es": "...",
            "abnormal": abnormal,
            "progression": None,
            **more,
        }

    rows = [
        {
            "StudyID": f"s{n}",
            "ImageID": f"{n}_x.png",
            "findings": [
                finding(
                    "Right pleural effusion.", True, [(0.1, 0.5, 0.4, 0.9), (0.2, 0.1, 0.3, 0.2)]
                ),
                finding("Normal heart size", False),
            ],
        }
        for n in range(8)
    ]
    rows[0]["findings"] = [finding("No relevant findings.", False)]
    write(root / "grounded_reports_20240819.json", json.dumps(rows))
    if with_table:
        splits = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
        table(
            root / "master_table.csv",
            "StudyID,ImageID,PatientID,split",
            [
                [f"s{n}", f"{n}_x.png", f"p{n}", split]
                for n, split in enumerate(splits)
                for _ in "ab"
            ],
        )
    for n in range(8):
        picture(root / "PadChest_GR" / f"{n}_x.png", "I;16", (50, 60))
    return root


def chest_imagenome(root):
    """Two regions on every frontal image of mimic_cxr, beside it; d6 has no scene graph."""
    for split, given in (("train", "train"), ("valid", "validate"), ("test", "test")):
        rows = [
            (n, p, s, d, v)
            for n, (p, s, d, v) in enumerate(
                (p, s, d, v)
                for p, s, dicoms, part in MIMIC
                for d, v in dicoms
                if part == given and v in ("PA", "AP")
            )
        ]
        table(
            root / "silver_dataset" / "splits" / f"{split}.csv",
            ",subject_id,study_id,dicom_id,ViewPosition",
            rows,
        )
        for _, p, s, d, v in rows:
            objects = [
                {
                    "object_id": f"{d}_{name}",
                    "bbox_name": name,
                    "x1": 1,
                    "y1": 2,
                    "x2": 3,
                    "y2": 4,
                    "original_x1": box[0],
                    "original_y1": box[1],
                    "original_x2": box[2],
                    "original_y2": box[3],
                }
                for name, box in (
                    ("right lung", (6, 8, 30, 60)),
                    ("cardiac silhouette", (15, 40, 45, 80)),
                )
            ]
            if d != "d6":
                write(
                    root / "silver_dataset" / "scene_graph" / f"{d}_SceneGraph.json",
                    json.dumps(
                        {
                            "image_id": f"{d}.dcm",
                            "viewpoint": v,
                            "patient_id": int(p),
                            "study_id": int(s),
                            "objects": objects,
                            "attributes": [],
                        }
                    ),
                )
    return root


def nih(root, lists=True):
    """Two images of each of 10 patients; boxes on both of patient 9, which the lists put into the test split."""
    names = [f"{patient:08d}_{k:03d}.png" for patient in range(10) for k in range(2)]
    table(
        root / "Data_Entry_2017.csv",
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age",
        [
            [
                name,
                "Infiltration|Effusion" if name.startswith("00000009") else "No Finding",
                0,
                int(name[:8]),
                40,
            ]
            for name in names
        ],
    )
    write(
        root / "BBox_List_2017.csv",
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000009_000.png,Infiltrate,256,512,128,256,,,\n00000009_001.png,Effusion,512.5,0,256,1024\n",
    )
    for n, name in enumerate(names):
        picture(root / ("images_001" if n < 10 else "images_002") / "images" / name, size=(64, 64))
    if lists:
        write(root / "train_val_list.txt", "\n".join(names[:-2]))
        write(root / "test_list.txt", "\n".join(names[-2:]))
    return root


def coco(root, split=True):
    def tree(first, count):
        images = [
            {"id": n, "file_name": f"c{n}.png", "width": 200, "height": 100}
            for n in range(first, first + count)
        ]
        boxes = [
            {"id": 2 * n, "image_id": n, "category_id": 7, "bbox": [20, 10, 100, 50], "iscrowd": 0}
            for n in range(first, first + count - 1)
        ]
        return {
            "categories": [{"id": 7, "name": "ActiveTuberculosis"}],
            "images": images,
            "annotations": boxes + boxes[:0],
        }

    if split:
        for k, name in enumerate(("train", "val", "test")):
            write(root / "annotations" / f"instances_{name}2017.json", json.dumps(tree(3 * k, 3)))
    else:
        write(root / "all_boxes.json", json.dumps(tree(0, 9)))
    for n in range(9):
        picture(root / "images" / f"c{n}.png", size=(100, 50))
    return root


def llava(root):
    for split in ("train", "val", "test"):
        rows = [
            {
                "id": f"{split}_{n}",
                "image": f"{split}/{n}.png",
                "conversations": [
                    {
                        "from": "human",
                        "value": "<image>\nWhere is the effusion in this Chest X-ray?",
                    },
                    {
                        "from": "gpt",
                        "value": "The effusion is located at the coordinates [0.12, 0.55, 0.41, 0.93] and [0.50, 0.60, 1.00, 0.75] on the image.",
                    },
                    {"from": "human", "value": "Write a radiology report."},
                    {"from": "gpt", "value": "There is a pleural effusion."},
                    {"from": "human", "value": "Is it large?"},
                    {"from": "gpt", "value": "No, it is small."},
                ],
            }
            for n in range(2)
        ]
        write(root / f"{split}.json", json.dumps(rows))
        for n in range(2):
            picture(root / split / f"{n}.png")
    return root


def everything(root):
    """All datasets side by side, as data.path of a mixture expects them."""
    for name, build in (
        ("iu_xray", kaggle),
        ("mimic_cxr", mimic_cxr),
        ("vindr_cxr", vindr_physionet),
        ("ms_cxr", ms_cxr),
        ("padchest_gr", padchest_gr),
        ("chest_imagenome", chest_imagenome),
        ("nih", nih),
        ("coco", coco),
        ("llava", llava),
    ):
        build(root / name)
    return root
