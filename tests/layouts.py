"""The datasets in the layouts in which they are distributed: tiny, with made-up contents.

Each function writes one dataset into the folder `root` and returns it.
"""

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


def write_json(path, tree):
    return write(path, json.dumps(tree))


def table(path, header, rows):
    """A CSV file. header: the names of the columns, with commas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def picture(path, mode="L", size=(40, 32)):
    """An image file of noise. size: width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    shape = size[::-1]
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 4096, shape).astype(np.uint16))
    else:
        pixels = rng.integers(0, 256, (*shape, 4), dtype=np.uint8)
        image = Image.fromarray(pixels, "RGBA").convert(mode)
    image.save(path)
    return path


# ------------------------------------------------------------------------------- IU X-Ray


def r2gen(root):
    studies = []
    for n in range(4):
        names = [f"CXR{n}/0.png", f"CXR{n}/1.png"]
        report = f"The heart is normal . Study {n} ."
        studies.append({"id": f"CXR{n}", "report": report, "image_path": names})
        for name in names:
            picture(root / "images" / name, "RGB")
    splits = {"train": studies[:2], "val": studies[2:3], "test": studies[3:]}
    write_json(root / "annotation.json", splits)
    return root


def kaggle(root, n=10):
    reports, views = [], []
    for uid in range(n):
        findings = "" if uid == 3 else f"Clear,\nstudy {uid}."
        words = ["normal", "normal", "PA, lateral", "Pain", "None."]
        reports.append([uid, *words, findings, 'No "acute" disease.'])
        for view in ("Lateral", "Frontal"):
            views.append([uid, f"{uid}_{view}.dcm.png", view])
    header = "uid,MeSH,Problems,image,indication,comparison,findings,impression"
    table(root / "indiana_reports.csv", header, reports)
    table(root / "indiana_projections.csv", "uid,filename,projection", views)
    for _, name, _ in views:
        picture(root / "images_normalized" / name)
    return root


OPENI = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{uid}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText>\
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">No acute disease.</AbstractText>\
</Abstract></Article></MedlineCitation>{images}</eCitation>"""


def openi(root, n=10):
    for uid in range(1, n + 1):
        findings = "" if uid == 4 else f"Clear lungs &amp; normal heart, study {uid}."
        images = ""
        for k in (2, 1):
            name = f"CXR{uid}_IM-000{k}-400{k}"
            images += f'<parentImage id="{name}"><caption>PA</caption></parentImage>'
            picture(root / "NLMCXR_png" / f"{name}.png")
        text = OPENI.format(uid=uid, findings=findings, images=images)
        write(root / "ecgen-radiology" / f"{uid}.xml", text)
    return root


# ------------------------------------------------------------------------------- MIMIC-CXR

# (subject, study, [(dicom, view)], split). The images are 60 wide and 80 high.
MIMIC = [
    ("10000032", "50414267", [("d1", "PA"), ("d2", "LATERAL")], "train"),
    ("10000032", "50414268", [("d3", "LL")], "train"),
    ("10000764", "57375967", [("d4", "LATERAL"), ("d5", "AP"), ("d6", "PA")], "train"),
    ("10000898", "50771383", [("d7", "AP")], "validate"),
    ("10000935", "50578979", [("d8", "PA")], "test"),
    ("10000980", "50985099", [("d9", "AP")], "test"),
]
# In the order of the published file.
MIMIC_LABELS = [
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
]
MIMIC_REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  History: pain. Findings: none

 {findings}
 IMPRESSION:

 No acute process in study {study}.
"""
# The names of its splits in MIMIC-CXR.
OFFICIAL = {"train": "train", "val": "validate", "test": "test"}


def mimic_folder(subject, study):
    return f"files/p{subject[:2]}/p{subject}/s{study}"


def mimic_images():
    """(subject, study, dicom, view, split) of every image."""
    images = []
    for subject, study, dicoms, split in MIMIC:
        images += [(subject, study, dicom, view, split) for dicom, view in dicoms]
    return images


def mimic_paths():
    """dicom -> the path of its image."""
    return {d: f"{mimic_folder(p, s)}/{d}.jpg" for p, s, d, _, _ in mimic_images()}


def mimic_cxr(root, reports="txt", end=".gz"):
    """MIMIC-CXR-JPG from PhysioNet. reports: "txt" files, or the sectioned "csv"."""
    splits, metadata, labels = [], [], []
    for subject, study, dicom, view, split in mimic_images():
        splits.append([dicom, study, subject, split])
        metadata.append([dicom, subject, study, view, 80, 60, 21800506])
        picture(root / mimic_folder(subject, study) / f"{dicom}.jpg", size=(60, 80))
    for subject, study, *_ in MIMIC:
        # Cardiomegaly and Pleural Effusion; no Consolidation, and Edema is uncertain.
        labels.append([subject, study, "", "1.0", "0.0", "-1.0", *[""] * 5, "1.0", *[""] * 4])
    header = "dicom_id,study_id,subject_id,split"
    table(root / f"mimic-cxr-2.0.0-split.csv{end}", header, splits)
    header = "dicom_id,subject_id,study_id,ViewPosition,Rows,Columns,StudyDate"
    table(root / f"mimic-cxr-2.0.0-metadata.csv{end}", header, metadata)
    header = ",".join(["subject_id", "study_id", *MIMIC_LABELS])
    table(root / f"mimic-cxr-2.0.0-chexpert.csv{end}", header, labels)
    if reports == "txt":
        write_mimic_texts(root)
    else:
        write_mimic_sections(root)
    return root


def write_mimic_texts(root):
    for subject, study, *_ in MIMIC:
        findings = f"FINDINGS:\n \n The lungs are\n clear. Study {study}.\n"
        if study == "50771383":
            findings = ""
        text = MIMIC_REPORT.format(findings=findings, study=study)
        write(root / f"{mimic_folder(subject, study)}.txt", text)


def write_mimic_sections(root):
    rows = []
    for _, study, *_ in MIMIC:
        findings = "" if study == "50771383" else f"The lungs are clear. Study {study}."
        rows.append([f"s{study}", f"No acute process in study {study}.", findings, "", ""])
    header = "study,impression,findings,last_paragraph,comparison"
    table(root / "mimic_cxr_sectioned.csv", header, rows)


def mimic_r2gen(root):
    tree = {"train": [], "val": [], "test": []}
    for split, official in OFFICIAL.items():
        for subject, study, dicom, _, given in mimic_images():
            if given != official:
                continue
            path = f"p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
            row = {
                "id": dicom,
                "study_id": int(study),
                "subject_id": int(subject),
                "report": f"Clear. Study {study}.",
                "image_path": [path],
                "split": split,
            }
            tree[split].append(row)
            picture(root / "images" / path, size=(60, 80))
    write_json(root / "annotation.json", tree)
    return root


def chexpert_plus(root, folder="PNG", end=".png"):
    """Four patients: two studies of three images in all, a lateral one, the official valid split.

    The table names JPEG files, whatever there is; the labels are those of CheXbert.
    """
    # (image, view, findings, impression, split)
    images = [
        ("train/patient1/study1/view1_frontal.jpg", "Frontal", "Clear.\n1.", "Normal.", "train"),
        ("train/patient1/study1/view2_lateral.jpg", "Lateral", "Clear.\n1.", "Normal.", "train"),
        ("train/patient1/study2/view1_frontal.jpg", "Frontal", "", "\nEffusion.", "train"),
        ("train/patient2/study1/view1_lateral.jpg", "Lateral", "Edema.", "", "train"),
        ("valid/patient3/study1/view1_frontal.jpg", "Frontal", "", "Normal.", "valid"),
    ]
    header = "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,report"
    header += ",section_findings,section_impression,section_summary,age,split"
    rows, lines = [], []
    for name, view, findings, impression, split in images:
        _, patient, study, _ = name.split("/")
        rows.append([name, "x.dcm", view, "AP", patient, "-", findings, impression, "", 61, split])
        labels = dict.fromkeys(MIMIC_LABELS)
        if impression == "Normal.":
            labels["No Finding"] = 1.0
        if study == "study2":
            labels |= {"Pleural Effusion": 1.0, "Edema": -1.0, "Pneumonia": 0.0}
        lines.append(json.dumps({"path_to_image": name, **labels}))
        picture((root / folder / name).with_suffix(end))
    table(root / "df_chexpert_plus_240401.csv", header, rows)
    write(root / "chexbert_labels" / "report_fixed.json", "\n".join(lines) + "\n")
    return root


def rexgradient(root):
    """Two studies in each split: PA with a lateral image; one whose view is unknown."""
    for split in ("train", "valid", "test"):
        tree = {}
        for n, views in enumerate((["LATERAL", "POSTERO_ANTERIOR"], [None])):
            name = f"p{split}{n}_a1_s1.2"
            files = [f"deid_png/{split}{n}/a1/studies/1.2/{k}.png" for k in range(len(views))]
            tree[name] = {
                "PatientID": f"{split}{n}",
                "Findings": None if n else "Clear lungs.",
                "Impression": "No acute disease.",
                "ImagePath": [f"../{file}" for file in files],
                "ImageViewPosition": views,
            }
            for file in files:
                picture(root / file)
        write_json(root / "metadata" / f"{split}_metadata_view_position.json", tree)
    return root


def ms_cxr(root, version="1.0.0"):
    """Two phrases on d5, one with two boxes; one on d7 and on d8. Version 1.0.0 has no split.

    The images are those of mimic_cxr, beside it.
    """
    header = "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height,split"
    path = mimic_paths()
    rows = [
        ["d5", "Pneumonia", "left basilar opacity", path["d5"], 30, 40, 15, 20, 60, 80, "train"],
        ["d5", "Pneumonia", "left basilar opacity", path["d5"], 6, 8, 12, 16, 60, 80, "train"],
        ["d5", "Cardiomegaly", "mild cardiomegaly", path["d5"], 15, 40, 30, 20, 60, 80, "train"],
        ["d7", "Edema", "mild edema", path["d7"], 3, 4, 30, 40, 60, 80, "val"],
        ["d8", "Pneumothorax", "small right pneumothorax", path["d8"], 0, 0, 30, 8, 60, 80, "test"],
    ]
    if version == "1.0.0":
        header = header.removesuffix(",split")
        rows = [row[:-1] for row in rows]
    table(root / f"MS_CXR_Local_Alignment_v{version}.csv", header, rows)
    return root


def chest_imagenome(root):
    """Two regions on every frontal image of mimic_cxr, beside it. d6 has no scene graph."""
    silver = root / "silver_dataset"
    for split, official in (("train", "train"), ("valid", "validate"), ("test", "test")):
        rows = []
        for subject, study, dicom, view, given in mimic_images():
            if given == official and view in ("PA", "AP"):
                rows.append([len(rows), subject, study, dicom, view])
                if dicom != "d6":
                    path = silver / "scene_graph" / f"{dicom}_SceneGraph.json"
                    write_json(path, scene_graph(subject, study, dicom, view))
        header = ",subject_id,study_id,dicom_id,ViewPosition"
        table(silver / "splits" / f"{split}.csv", header, rows)
    return root


def scene_graph(subject, study, dicom, view):
    objects = []
    for name, box in (("right lung", (6, 8, 30, 60)), ("cardiac silhouette", (15, 40, 45, 80))):
        # Corners in a smaller image, then in the original.
        region = {"object_id": f"{dicom}_{name}", "bbox_name": name}
        region |= {"x1": 1, "y1": 2, "x2": 3, "y2": 4}
        for corner, value in zip(("x1", "y1", "x2", "y2"), box):
            region[f"original_{corner}"] = value
        objects.append(region)
    return {
        "image_id": f"{dicom}.dcm",
        "viewpoint": view,
        "patient_id": int(subject),
        "study_id": int(study),
        "objects": objects,
        "attributes": [],
    }


# ------------------------------------------------------------------------------- boxes


def vindr_physionet(root):
    """Ten training images, 200 x 100 pixels, by three radiologists; the first is normal.

    Two test images with the consensus.
    """
    rows = []
    for n in range(10):
        image = f"v{n}"
        picture(root / "train" / f"{image}.png", size=(200, 100))
        for r, radiologist in enumerate(("R1", "R2", "R3")):
            row = [image, radiologist, "Nodule/Mass", 20 + 2 * r, 10, 60 + 2 * r, 50]
            if n == 0:
                row = [image, radiologist, "No finding", "", "", "", ""]
            rows.append(row)
        if n > 0:
            rows.append([image, "R1", "Cardiomegaly", 80, 40, 180, 90])
    header = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max"
    table(root / "annotations" / "annotations_train.csv", header, rows)

    for n in range(2):
        picture(root / "test" / f"t{n}.png", size=(200, 100))
    rows = [["t0", "Pleural effusion", 0, 50, 50, 100], ["t1", "No finding", "", "", "", ""]]
    header = "image_id,class_name,x_min,y_min,x_max,y_max"
    table(root / "annotations" / "annotations_test.csv", header, rows)
    return root


def vindr_kaggle(root):
    """Images reduced to 50 x 25, whose boxes are pixels of 200 x 100 originals."""
    boxes, sizes = [], []
    for n in range(10):
        boxes.append([f"v{n}", "Cardiomegaly", 3, "R8", 80, 40, 180, 90])
        sizes.append([f"v{n}", 100, 200])
        picture(root / "train" / f"v{n}.png", size=(50, 25))
    header = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
    table(root / "train.csv", header, boxes)
    table(root / "train_meta.csv", "image_id,dim0,dim1", sizes)
    return root


def padchest_gr(root, with_table=True):
    """Eight 16-bit images, the first without a finding."""
    normal = padchest_sentence("No relevant findings.", False)
    boxes = [[0.1, 0.5, 0.4, 0.9], [0.2, 0.1, 0.3, 0.2]]
    effusion = padchest_sentence("Right pleural effusion.", True) | {
        "boxes": boxes,
        "extra_boxes": [],
        "labels": ["x"],
        "locations": [],
    }
    heart = padchest_sentence("Normal heart size", False)
    rows, lines = [], []
    for n, split in enumerate(["train"] * 4 + ["validation"] * 2 + ["test"] * 2):
        findings = [effusion, heart] if n else [normal]
        rows.append({"StudyID": f"s{n}", "ImageID": f"{n}_x.png", "findings": findings})
        # The table has a row per label.
        lines += [[f"s{n}", f"{n}_x.png", f"p{n}", split]] * 2
        picture(root / "PadChest_GR" / f"{n}_x.png", "I;16", (50, 60))
    write_json(root / "grounded_reports_20240819.json", rows)
    if with_table:
        table(root / "master_table.csv", "StudyID,ImageID,PatientID,split", lines)
    return root


def padchest_sentence(text, abnormal):
    return {"sentence_en": text, "sentence_es": "...", "abnormal": abnormal, "progression": None}


# Its header splits into other cells than its rows.
NIH_BOXES = """Image Index,Finding Label,Bbox [x,y,w,h],,,
00000009_000.png,Infiltrate,256,512,128,256,,,
00000009_001.png,Effusion,512.5,0,256,1024
"""


def nih(root, lists=True):
    """Two images of each of 10 patients. Patient 9, whom the lists hold out, has boxes on both."""
    rows, names = [], []
    for patient in range(10):
        labels = "Infiltration|Effusion" if patient == 9 else "No Finding"
        for k in range(2):
            name = f"{patient:08d}_{k:03d}.png"
            folder = "images_001" if patient < 5 else "images_002"
            picture(root / folder / "images" / name, size=(64, 64))
            rows.append([name, labels, 0, patient, 40])
            names.append(name)
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age"
    table(root / "Data_Entry_2017.csv", header, rows)
    write(root / "BBox_List_2017.csv", NIH_BOXES)
    if lists:
        write(root / "train_val_list.txt", "\n".join(names[:-2]))
        write(root / "test_list.txt", "\n".join(names[-2:]))
    return root


def coco(root, split=True):
    """Nine images, in a file for each split or in one file. The last of each file is normal."""
    if split:
        for k, name in enumerate(("train", "val", "test")):
            write_json(root / "annotations" / f"instances_{name}2017.json", coco_tree(3 * k, 3))
    else:
        write_json(root / "all_boxes.json", coco_tree(0, 9))
    for n in range(9):
        picture(root / "images" / f"c{n}.png", size=(100, 50))
    return root


def coco_tree(first, count):
    images, boxes = [], []
    for n in range(first, first + count):
        images.append({"id": n, "file_name": f"c{n}.png", "width": 200, "height": 100})
        box = [20, 10, 100, 50]
        boxes.append({"id": 2 * n, "image_id": n, "category_id": 7, "bbox": box, "iscrowd": 0})
    categories = [{"id": 7, "name": "ActiveTuberculosis"}]
    return {"categories": categories, "images": images, "annotations": boxes[:-1]}


# ------------------------------------------------------------------------------- conversations

LLAVA = [
    ("human", "<image>\nWhere is the effusion in this Chest X-ray?"),
    (
        "gpt",
        "The effusion is located at the coordinates [0.12, 0.55, 0.41, 0.93] and "
        "[0.50, 0.60, 1.00, 0.75] on the image.",
    ),
    ("human", "Write a radiology report."),
    ("gpt", "There is a pleural effusion."),
    ("human", "Is it large?"),
    ("gpt", "No, it is small."),
]


def conversation(*turns):
    """Turns of (speaker, text) as LLaVA writes them."""
    return [{"from": speaker, "value": text} for speaker, text in turns]


def llava(root):
    for split in ("train", "val", "test"):
        rows = []
        for n in range(2):
            row = {"id": f"{split}_{n}", "image": f"{split}/{n}.png"}
            rows.append(row | {"conversations": conversation(*LLAVA)})
            picture(root / split / f"{n}.png")
        write_json(root / f"{split}.json", rows)
    return root


def jsonl(root):
    picture(root / "a.png")
    for split in ("train", "val", "test"):
        row = {"id": split, "images": ["a.png"], "report": "Clear."}
        write(root / f"{split}.jsonl", json.dumps(row) + "\n")
    return root


# ------------------------------------------------------------------------------- all


def everything(root):
    """All datasets side by side, as data.path of a mixture expects them."""
    kaggle(root / "iu_xray")
    mimic_cxr(root / "mimic_cxr")
    chexpert_plus(root / "chexpert_plus")
    rexgradient(root / "rexgradient")
    vindr_physionet(root / "vindr_cxr")
    ms_cxr(root / "ms_cxr")
    padchest_gr(root / "padchest_gr")
    chest_imagenome(root / "chest_imagenome")
    nih(root / "nih")
    coco(root / "coco")
    llava(root / "llava")
    return root
