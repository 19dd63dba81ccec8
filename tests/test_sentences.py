"""Sentences as radiologists and models write them, and what the label extractor must read there.

Each kind has near misses, which look alike and must not flip. The wanted states are letters:
P positive, N negative, U uncertain, B blank; several letters where each of them will do.
"""

import pytest

from data import LABELS
from rewards import extract_labels

# How the tables below call the labels.
NAMES = {
    "normal": "No Finding",
    "mediastinum": "Enlarged Cardiomediastinum",
    "heart": "Cardiomegaly",
    "lesion": "Lung Lesion",
    "opacity": "Lung Opacity",
    "edema": "Edema",
    "consolidation": "Consolidation",
    "pneumonia": "Pneumonia",
    "atelectasis": "Atelectasis",
    "ptx": "Pneumothorax",
    "effusion": "Pleural Effusion",
    "pleura": "Pleural Other",
    "fracture": "Fracture",
    "devices": "Support Devices",
}

LISTS_TABLES_AND_HEADED_LINES = {
    "Edema: No.": "edema N, normal P",
    "Effusion: nil.": "effusion N, normal P",
    "Fracture: none seen.": "fracture N",
    "Pneumonia: negative.": "pneumonia N",
    "**Pneumothorax:** No": "ptx N",
    "**Edema**: **No**": "edema N",
    "| Consolidation | No |": "consolidation N",
    "| Finding | Present |\n|---|---|\n| Edema | No |\n| Effusion | Yes |": "edema N, effusion P",
    "| Pneumothorax | Absent |\n| Pleural effusion | Small, left |": "ptx N, effusion P",
    "Nil consolidation.": "consolidation N",
    "Nil pneumothorax, effusion or consolidation.": "ptx N, effusion N, consolidation N",
    "Lung mass - no": "lesion N",
    "Pneumothorax \u2013 none": "ptx N",
    "Pleural effusion? No.": "effusion N",
    "- Edema: no\n- Effusion: yes\n- Fracture: no": "edema N, effusion P, fracture N",
    "Edema: no\nEffusion: yes\nFracture: no": "edema N, effusion P, fracture N",
    "Cardiomegaly: Yes\nPneumothorax: No": "heart P, ptx N",
    "Cardiomegaly: Yes, Pneumothorax: No": "heart P, ptx N",
    "Pneumothorax: No, Pleural effusion: Yes": "ptx N, effusion P",
    "Edema: absent; pneumonia: present": "edema N, pneumonia P",
    "Pneumothorax: no Pleural effusion: yes": "ptx N, effusion P",
    "1. Pneumothorax: no\n2. Effusion: small left": "ptx N, effusion P",
    "Heart size: enlarged\nEffusion: none": "heart P, effusion N",
    "Heart: normal\nLungs: clear\nPleura: no effusion": "heart N, effusion N, normal P",
    "Support devices: none": "devices N",
    "Lines and tubes: None.": "devices N",
    # Near misses.
    "Pneumothorax: Yes.": "ptx P",
    "**Cardiomegaly:** Yes": "heart P",
    "| Cardiomegaly | Yes |": "heart P",
    "Edema: possible.": "edema U",
    "Effusion: no change.": "effusion P",
    "Devices: no change in the position of the chest tube.": "devices P",
    "Effusion: moderate, no change since yesterday.": "effusion P",
    "Lungs: no edema. Pleura: left effusion.": "edema N, effusion P",
    "Tubes: endotracheal tube. Pneumothorax: no.": "devices P, ptx N",
}

SIZES_AND_THEIR_NOUNS = {
    "Large right pleural effusion obscures the right heart border.": "effusion P, heart BU",
    "A large hiatal hernia lies behind the heart.": "heart B, mediastinum B",
    "Large hiatal hernia projecting over the heart.": "heart B",
    "There is a large mass behind the heart.": "lesion P, heart B",
    "The heart cannot be assessed because of a large effusion.": "effusion P, heart BU",
    "Cardiac size is difficult to evaluate given the large effusions.": "effusion P, heart BU",
    "Heart size is obscured by increased opacity at the left base.": "opacity P, heart BU",
    "The mediastinum is displaced to the left by a large effusion.": "effusion P, mediastinum BU",
    "Large left pneumothorax with shift of the heart and mediastinum.": "ptx P, heart BU, mediastinum BU",
    "Increased retrocardiac density obscures the heart border.": "heart BU, opacity P",
    "Big left effusion, the heart is shifted to the right.": "effusion P, heart B",
    "Heart obscured by the effusion, which is large.": "effusion P, heart BU",
    "Heart border is hidden as the effusion has increased.": "effusion P, heart BU",
    "Prominent pulmonary vessels around the heart.": "heart B",
    "Increased interstitial markings, with the heart partly obscured.": "opacity P, heart BU",
    "Enlarged hilar lymph nodes beside the mediastinum.": "mediastinum BU, heart B",
    # Near misses.
    "The heart is large.": "heart P",
    "Large heart with a small effusion.": "heart P, effusion P",
    "The heart is enlarged, with a large left effusion.": "heart P, effusion P",
    "Large effusion and an enlarged heart.": "heart P, effusion P",
    "The cardiac silhouette is markedly enlarged.": "heart P",
    "Enlarged cardiac silhouette.": "heart P",
    "Prominent cardiomediastinal silhouette.": "heart P",
    "Heart size has increased.": "heart P",
    "There is increased size of the heart.": "heart P",
    "The heart is normal despite a large effusion.": "heart N, effusion P",
    "Large effusion. The heart is of normal size.": "heart N, effusion P",
    "The mediastinum is widened by a large mass.": "mediastinum P, lesion P",
    "Heart size is within normal limits with a large hiatal hernia.": "heart N",
    "Heart and mediastinum are normal.": "heart N, mediastinum N, normal P",
}

WHERE_NEGATION_ENDS = {
    "No pneumothorax, right basilar atelectasis persists.": "ptx N, atelectasis P, normal B",
    "No effusion, bibasilar opacities remain.": "effusion N, opacity P",
    "No pneumothorax, right lower lobe consolidation is unchanged.": "ptx N, consolidation P",
    "No pneumothorax, cardiomegaly is stable.": "ptx N, heart P",
    "No effusion or pneumothorax, edema has worsened.": "effusion N, ptx N, edema P",
    "Left basal opacity without effusion, suspicious for pneumonia.": "opacity P, effusion N, pneumonia U",
    "Basal opacity without effusion, consistent with pneumonia.": "opacity P, effusion N, pneumonia PU",
    "Hazy opacity without pneumothorax, likely atelectasis.": "opacity P, ptx N, atelectasis U",
    "No pneumothorax or effusion is seen, ET tube 4 cm above the carina.": "ptx N, effusion N, devices P",
    "No pneumothorax is identified, left chest tube in place.": "ptx N, devices P",
    "No effusion, NG tube tip in the stomach.": "effusion N, devices P",
    "No pneumothorax, left pleural effusion.": "ptx N, effusion P",
    "No pneumothorax, only mild atelectasis.": "ptx N, atelectasis P",
    "No pneumothorax and left basilar atelectasis persists.": "ptx N, atelectasis P",
    "No effusion - right apical pneumothorax persists.": "effusion N, ptx P",
    "Left effusion persists, right pneumothorax has resolved.": "effusion P, ptx N",
    "No edema, yet a small effusion.": "edema N, effusion P",
    # Near misses.
    "No pneumothorax, effusion, or edema.": "ptx N, effusion N, edema N, normal P",
    "No pneumothorax, pleural effusion or focal consolidation is seen.": "ptx N, effusion N, consolidation N",
    "No consolidation, effusion, or pneumothorax is present.": "ptx N, effusion N, consolidation N",
    "No focal consolidation, large effusion, or pneumothorax.": "ptx N, effusion N, consolidation N",
    "No focal consolidation, pleural effusion, pneumothorax.": "ptx N, effusion N, consolidation N",
    "No focal consolidation, left effusion, or right pneumothorax.": "ptx N, effusion N, consolidation N",
    "No focal opacity concerning for pneumonia.": "opacity N, pneumonia N",
    "No consolidation, effusion, edema, or pneumothorax to suggest injury.": "ptx N, edema N, effusion N",
    "There is no pneumothorax, pleural effusion, or displaced rib fracture.": "ptx N, effusion N, fracture N",
    "Without pneumothorax, effusion or edema.": "ptx N, effusion N, edema N",
}

DEVICES = {
    "Right-sided AICD with leads in place.": "devices P",
    "Swan-Ganz catheter in the right pulmonary artery.": "devices P",
    "Swan Ganz in the main pulmonary artery.": "devices P",
    "Dobhoff in the stomach.": "devices P",
    "IABP tip below the aortic knob.": "devices P",
    "Intra-aortic balloon pump in the descending aorta.": "devices P",
    "ETT 3 cm above the carina.": "devices P",
    "NGT in the stomach.": "devices P",
    "Left PICC in the SVC.": "devices P",
    "LVAD is noted.": "devices P",
    "Left pigtail in the pleural space.": "devices P",
    "Portacath on the right.": "devices P",
    "ECMO cannulae.": "devices P",
    "Sternotomy wires are intact.": "devices P",
    "Dual-chamber pacer.": "devices P",
    # Near misses.
    "Portable AP view, clear lungs.": "devices B, normal P",
    "This leads to crowding of the vessels.": "devices B",
    "Low volumes may lead to crowding.": "devices B",
    "Growth plates are open.": "devices B",
    "Prior cardiac catheterization.": "devices B",
    "Mitral valve calcification.": "devices B",
    "A skin fold line overlies the left lung.": "devices B",
}

FINDINGS_BY_SHORT_NAMES = {
    "Tiny apical ptx.": "ptx P",
    "No PTX.": "ptx N",
    "Right hydropneumothorax.": "ptx P",
    "Left hemopneumothorax.": "ptx P, normal B",
    "RLL PNA.": "pneumonia P",
    "Left hemothorax.": "effusion PU",
    "Rib fx on the left.": "fracture P",
    "Bilateral GGO.": "opacity P",
    # Near misses.
    "History of breast carcinoma.": "lesion B",
    "Prostate cancer.": "lesion B",
    "Known renal mass.": "lesion B",
    "Body mass index of 40.": "lesion B",
    "Thyroid nodule.": "lesion B",
    "Vertebral body collapse.": "atelectasis B",
    "Collapse of T8.": "atelectasis B",
    "Fracture of a sternal wire.": "fracture B, devices P",
    "The lower wire is fractured.": "fracture B, devices P",
    "Fracture line is not seen in the clavicle.": "devices B",
    "Soft tissue edema of the chest wall.": "edema B",
    "Ankle edema.": "edema B",
    "Pericardial effusion.": "effusion B",
    "Lung cancer.": "lesion P",
    "Pulmonary metastases from breast cancer.": "lesion P",
    "Collapse of the left lower lobe.": "atelectasis P",
    "Fractured ribs beside the sternal wires.": "fracture P, devices P",
}

WHAT_IS_GONE = {
    "ETT removed.": "devices NB",
    "The chest tube has been removed.": "devices NB",
    "Interval removal of the Swan-Ganz catheter.": "devices NB",
    "Left effusion no longer visualized.": "effusion N",
    "The opacity is no longer seen.": "opacity N",
    "Right pneumothorax no longer identified.": "ptx N",
    "The edema has cleared.": "edema N",
    "Resolved pneumothorax.": "ptx N",
    "Interval resolution of the left effusion.": "effusion N",
    "Previous consolidation has completely resolved.": "consolidation N",
    "NG tube removed, PICC unchanged.": "devices P",
    "Interval clearing of the pneumonia.": "pneumonia N",
    # Near misses.
    "The effusion has not resolved.": "effusion P",
    "The pneumothorax has nearly resolved.": "ptx PU",
    "Partially resolved consolidation.": "consolidation PU",
    "The effusion has not changed.": "effusion P",
    "Chest tube removed, small pneumothorax.": "ptx P",
}

CALCIFIED_AND_NIPPLES = {
    "Calcified nodule at the left apex.": "lesion BN, normal B",
    "Calcified lung nodules.": "lesion BN",
    "The nodule is calcified.": "lesion BN",
    "Densely calcified 5 mm nodule.": "lesion BN",
    "Calcified granuloma.": "lesion BN",
    "Nodular density compatible with a nipple shadow.": "lesion BN",
    "Bilateral nipple shadows.": "lesion BN",
    # Near misses.
    "Noncalcified nodule in the left lung.": "lesion P",
    "Nodule without calcification.": "lesion P",
    "Calcified hilar lymph nodes and a new lung mass.": "lesion P",
    "Calcified aorta and a lung nodule.": "lesion P",
    "Nodule in the right lung, not calcified.": "lesion P",
}

HEDGES = {
    "Borderline heart size.": "heart U",
    "Heart size is borderline.": "heart U",
    "Borderline cardiomegaly.": "heart PU",
    "Opacity, favor atelectasis.": "atelectasis U, opacity P",
    "Favored to represent pneumonia.": "pneumonia U",
    "Pneumonia is favored.": "pneumonia U",
    "A pneumothorax is not appreciated.": "ptx U",
    "Effusion not appreciated.": "effusion U",
    "Pneumonia is not excluded.": "pneumonia U",
    "Question small left effusion.": "effusion U",
    # Near misses.
    "No pneumothorax is appreciated.": "ptx N",
    "No appreciable effusion.": "effusion N",
    "A pneumothorax is not seen.": "ptx N",
}

KINDS = [
    LISTS_TABLES_AND_HEADED_LINES,
    SIZES_AND_THEIR_NOUNS,
    WHERE_NEGATION_ENDS,
    DEVICES,
    FINDINGS_BY_SHORT_NAMES,
    WHAT_IS_GONE,
    CALCIFIED_AND_NIPPLES,
    HEDGES,
]
CASES = [case for kind in KINDS for case in kind.items()]


@pytest.mark.parametrize("text, wanted", CASES)
def test_a_sentence_has_the_wanted_states(text, wanted):
    (states,) = extract_labels([text]).tolist()
    found = {label: "BPNU"[state] for label, state in zip(LABELS, states)}
    for claim in wanted.split(", "):
        name, accepted = claim.split()
        assert found[NAMES[name]] in accepted, name
