"""Sentences as radiologists and models write them, and what the label extractor must read there.

Each kind has near misses, which look alike and must not flip. The wanted states are letters:
P positive, N negative, U uncertain, B blank; several letters where each of them will do.
"""

import random
import time

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
    "Pneumothorax: Not present.": "ptx N",
    "Pleural effusion: Not seen.": "effusion N",
    "Consolidation: nil": "consolidation N",
    "Pneumonia - No": "pneumonia N",
    "1) Pneumothorax: No 2) Effusion: Yes": "ptx N, effusion P",
    "* Atelectasis: No\n* Fracture: Yes": "atelectasis N, fracture P",
    "- **Pneumothorax**: None\n- **Pleural Effusion**: Small right": "ptx N, effusion P",
    "| Sign | Seen |\n| --- | --- |\n| Cardiomegaly | No |\n| Edema | Yes |": "heart N, edema P",
    "|Edema|No|": "edema N",
    "Findings: Cardiomegaly: no. Edema: mild.": "heart N, edema P",
    "Enlarged Cardiomediastinum: No": "mediastinum N",
    "Lung Opacity: Yes. Lung Lesion: No.": "opacity P, lesion N",
    "Support Devices: Yes": "devices P",
    "Fracture: No\nSupport Devices: No": "fracture N, devices N",
    "Pleural Other: No": "normal PB",
    "No: effusion, pneumothorax.": "effusion N, ptx N",
    "Effusion none. Pneumothorax none.": "effusion N, ptx N",
    "Nil focal consolidation, nil effusion.": "consolidation N, effusion N",
    "Effusions: small bilateral.": "effusion P",
    "Pneumonia: likely.": "pneumonia U",
    "Pneumonia: possible": "pneumonia U",
    "Pneumothorax: cannot be excluded.": "ptx U",
    "Edema: No evidence.": "edema N",
    "Edema: no evidence of edema.": "edema N",
    "IMPRESSION:\n1. Cardiomegaly: no\n2. Pneumonia: yes": "heart N, pneumonia P",
    "Lungs: Clear, no consolidation. Heart: Enlarged. Pleura: No effusion or pneumothorax.": (
        "heart P, effusion N, ptx N, consolidation N"
    ),
    "Consolidation: None identified.": "consolidation N",
    "Cardiomegaly - absent": "heart N",
    "Pneumothorax: No evidence of pneumothorax": "ptx N",
    "Edema: Not identified": "edema N",
    "Lung lesion: none": "lesion N",
    "Pleural effusion: trace left": "effusion P",
    "Atelectasis: Yes (left base)": "atelectasis P",
    "Pneumothorax: No (supine film)": "ptx N",
    "Edema: No, Effusion: No, Fracture: No": "edema N, effusion N, fracture N",
    "| Fracture | None |": "fracture N",
    "| Support devices | PICC line |": "devices P",
    "| Pneumonia | Possible |": "pneumonia U",
    "| Cardiomegaly | Yes | Moderate |": "heart P",
    "| Effusion | No | - |": "effusion N",
    "**Impression:** No pneumonia.": "pneumonia N",
    "**Heart:** Normal size. **Lungs:** Clear.": "heart N",
    "### Findings\n- No pneumothorax\n- Left effusion": "ptx N, effusion P",
    "Negative for effusion, pneumothorax, or fracture.": "effusion N, ptx N, fracture N",
    "Nil pleural effusion seen.": "effusion N",
    "Pneumothorax nil.": "ptx N",
    "No cardiomegaly. Nil pneumonia.": "heart N, pneumonia N",
    "Pleural effusion: no. Pneumothorax: no. Consolidation: yes.": (
        "effusion N, ptx N, consolidation P"
    ),
    "Cardiomegaly : No": "heart N",
    "Cardiomegaly=No": "heart N",
    "Cardiomegaly (No)": "heart N",
    "* **Edema:** No\n* **Cardiomegaly:** Yes": "edema N, heart P",
    "Edema:\nNo": "edema N",
    "Pleural effusion: Yes\nPneumothorax: No\nEdema: Yes": "effusion P, ptx N, edema P",
    "Devices: Right IJ catheter. Pneumothorax: No.": "devices P, ptx N",
    "Cardiomegaly: No evidence.": "heart N",
    "Pneumothorax: No, Effusion: No, Edema: Yes.": "ptx N, effusion N, edema P",
    "Heart: not enlarged.": "heart N",
    "Lungs: No consolidation or edema.": "consolidation N, edema N",
    "Pleural spaces: no effusion, no pneumothorax": "effusion N, ptx N",
    "Consolidation: No significant consolidation.": "consolidation N",
    "Tubes and lines: none.": "devices N",
    "Effusion: Nil. Pneumothorax: Nil. Heart: Normal.": "effusion N, ptx N, heart N",
    "| Label | Value |\n|:--|:--|\n| Atelectasis | No |\n| Pneumonia | No |": (
        "atelectasis N, pneumonia N"
    ),
    "| Fracture | Yes | old rib fracture |": "fracture P",
    "Pneumothorax: NO": "ptx N",
    "pneumothorax: no\neffusion: no\nedema: no": "ptx N, effusion N, edema N",
    "Pneumonia: unlikely.": "pneumonia NU",
    "Edema: mild. Pneumonia: none.": "edema P, pneumonia N",
    "Pneumothorax: small right apical.": "ptx P",
    "No (pneumothorax or effusion).": "ptx N, effusion N",
    "**Pleural effusion:** Yes, small.": "effusion P",
    "Nil acute. Nil fracture.": "fracture N",
    "- Cardiomegaly\n- No effusion": "heart P, effusion N",
    "- No cardiomegaly\n- Pleural effusion": "heart N, effusion P",
    "Effusion: no; pneumothorax: no; edema: yes": "effusion N, ptx N, edema P",
    "Pneumothorax: None.\nConsolidation: Right lower lobe.\nEffusion: None.": (
        "ptx N, consolidation P, effusion N"
    ),
    "| Edema | no |\n| Fracture | no |": "edema N, fracture N",
    "Heart size: Normal. Pneumothorax: No. Effusion: Left, small.": "heart N, ptx N, effusion P",
    "**Pneumonia**: absent": "pneumonia N",
    "Atelectasis: nil": "atelectasis N",
    "Consolidation? None.": "consolidation N",
    "Fractures: no. Devices: PICC.": "fracture N, devices P",
    "1. Cardiomegaly: No.\n2. Edema: No.\n3. Pneumothorax: Yes.": "heart N, edema N, ptx P",
    "Nil effusion, pneumothorax or consolidation seen.": "effusion N, ptx N, consolidation N",
    "Pneumothorax: No\n\nPleural effusion: Yes": "ptx N, effusion P",
    "Lung lesion: No. Lung opacity: No. Fracture: No.": "lesion N, opacity N, fracture N",
    "Findings:\n| Pneumothorax | No |\n| Edema | Yes |": "ptx N, edema P",
    "FINDINGS:\nLungs: No consolidation. Pleura: Small left effusion. Heart: Normal in size.": (
        "consolidation N, effusion P, heart N"
    ),
    "Support devices: Endotracheal tube.\nPneumothorax: None.": "devices P, ptx N",
    "Pneumothorax: no\nImpression: No acute disease.": "ptx N",
    "The patient has no effusion: the costophrenic angles are sharp.": "effusion N",
    "Edema - mild": "edema P",
    "Effusions: Bilateral, small. Edema: None.": "effusion P, edema N",
    "Cardiomegaly: mild. Edema: no. Effusion: no.": "heart P, edema N, effusion N",
    "Pleural thickening: No": "pleura N",
    "Rib fractures: No": "fracture N",
    "Lung nodule: No": "lesion N",
    "Nodule: Yes, right upper lobe": "lesion P",
    "| Consolidation | Right lower lobe |": "consolidation P",
    "* No pneumothorax\n* No effusion\n* Mild edema": "ptx N, effusion N, edema P",
    "Nil edema, small effusion.": "edema N, effusion P",
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
    "Large left pneumothorax with shift of the heart and mediastinum.": (
        "ptx P, heart BU, mediastinum BU"
    ),
    "Increased retrocardiac density obscures the heart border.": "heart BU, opacity P",
    "Big left effusion, the heart is shifted to the right.": "effusion P, heart B",
    "Heart obscured by the effusion, which is large.": "effusion P, heart BU",
    "Heart border is hidden as the effusion has increased.": "effusion P, heart BU",
    "Prominent pulmonary vessels around the heart.": "heart B",
    "Increased interstitial markings, with the heart partly obscured.": "opacity P, heart BU",
    "Enlarged hilar lymph nodes beside the mediastinum.": "mediastinum BU, heart B",
    "Large left pneumothorax displaces the heart.": "ptx P, heart BU",
    "The heart is obscured by a large left pleural effusion.": "heart BU, effusion P",
    "The mediastinum is shifted by the large pneumothorax.": "mediastinum BU, ptx P",
    "Large hiatal hernia with air-fluid level behind the heart.": "heart B",
    "Cardiac silhouette is not well evaluated due to large bilateral effusions.": (
        "heart BU, effusion P"
    ),
    "Large pericardial fat pad next to the heart.": "heart B",
    "Heart size cannot be evaluated, large right effusion.": "heart BU, effusion P",
    "Widened mediastinum.": "mediastinum P",
    "Heart mildly enlarged.": "heart P",
    "Mildly enlarged heart with large effusions.": "heart P, effusion P",
    "Mediastinal contours are obscured by the large mass.": "mediastinum BU, lesion P",
    "Enlarged right effusion obscures the right heart border.": "heart BU, effusion P",
    "Large bulla adjacent to the mediastinum.": "mediastinum B",
    "The heart is at the upper limits of normal, with a large hernia.": "heart NU",
    "A large opacity silhouettes the right heart border.": "heart BU, opacity P",
    "Tension pneumothorax with mediastinal shift.": "ptx P, mediastinum BU",
    "The left effusion is large and obscures the heart.": "effusion P, heart BU",
    "Large bilateral effusions limit evaluation of the heart.": "effusion P, heart BU",
    "The cardiac silhouette is obscured by large bilateral pleural effusions.": (
        "heart BU, effusion P"
    ),
    "Right heart border obscured by a large right middle lobe mass.": "heart BU, lesion P",
    "Increased opacity overlying the heart.": "heart BU, opacity P",
    "Heart size difficult to assess due to prominent mediastinal fat.": "heart BU",
    "Mediastinal shift to the left due to a large right effusion.": "mediastinum BU, effusion P",
    "The trachea and mediastinum are displaced by an enlarged thyroid.": "mediastinum BU",
    "Large gastric bubble below the heart.": "heart B",
    "Large anterior mediastinal mass.": "lesion P",
    "Cardiomediastinal silhouette is enlarged.": "heart P",
    "The heart appears large.": "heart P",
    "Moderately enlarged cardiac silhouette with bilateral effusions.": "heart P, effusion P",
    "The heart is top normal in size.": "heart NU",
    "No large effusion, heart size is normal.": "effusion N, heart N",
    "Heart size is normal, large left effusion.": "heart N, effusion P",
    "Stable enlarged heart.": "heart P",
    "Cardiac enlargement with increased pulmonary vascularity.": "heart P",
    "Heart enlarged; lungs clear.": "heart P",
    "A large hiatal hernia projects behind the heart.": "heart B",
    "Large right pleural effusion with leftward mediastinal shift.": "effusion P, mediastinum BU",
    "Prominent fat pad along the left heart border.": "heart B",
    "Increased density projecting over the heart.": "heart B",
    "Heart size not evaluated because of a big left effusion.": "heart BU, effusion P",
    "Assessment of the heart is limited by large effusions.": "heart BU, effusion P",
    "The mediastinum is deviated by a large left mass.": "mediastinum BU, lesion P",
    "Cardiac borders are obscured by increased opacities.": "heart BU, opacity P",
    "Widened mediastinum with a large aneurysm.": "mediastinum P",
    "The heart is enlarged and there is a large hernia.": "heart P",
    "Heart size is mildly increased.": "heart P",
    "Normal heart, large hiatal hernia.": "heart N",
    "Prominence of the cardiac silhouette.": "heart PU",
    "Large left effusion, heart not well seen.": "effusion P, heart BU",
    "A large hernia obscures the heart.": "heart B",
    "Large right pneumothorax with mediastinal shift to the left.": "ptx P, mediastinum BU",
    "Heart cannot be evaluated.": "heart BU",
    "Massive effusion shifting the mediastinum.": "effusion P, mediastinum BU",
    "Increased lucency left of the heart.": "heart B",
    "A big consolidation silhouettes the heart border.": "consolidation P, heart BU",
    "The heart is not large.": "heart NB",
    "The mediastinum is not widened.": "mediastinum N",
    "Globular enlarged heart.": "heart P",
    "Grossly enlarged heart with effusions.": "heart P",
    "Very large right pleural effusion, obscuring the heart.": "effusion P, heart BU",
    "Large mass in the right lung abutting the mediastinum.": "lesion P, mediastinum B",
    "Massive left effusion with the heart displaced to the right.": "effusion P, heart B",
    "The heart is hidden by a large opacity.": "heart BU, opacity P",
    "Enlarged pulmonary arteries, normal heart.": "heart N",
    "Heart normal. Large left hilar mass.": "heart N, lesion P",
    "Heart size upper normal; large hernia.": "heart N",
    "Large cardiac silhouette.": "heart P",
    "Large heart.": "heart P",
    "Cardiac silhouette enlarged, no effusion.": "heart P, effusion N",
    "The cardiomediastinal silhouette is obscured by the large right effusion.": (
        "heart BU, mediastinum BU, effusion P"
    ),
    "Lungs are well expanded with a large left nodule near the heart.": "lesion P, heart B",
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
    "No acute process other than mild cardiomegaly.": "heart P",
    "No effusion and the heart is enlarged.": "effusion N, heart P",
    "No effusion and heart is enlarged.": "effusion N, heart P",
    "No pneumothorax following right PICC placement.": "ptx N, devices P",
    "No pneumothorax status post pacemaker placement.": "ptx N, devices P",
    "No pneumothorax after insertion of a left chest tube.": "ptx N, devices P",
    "No pneumothorax with the left chest tube in place.": "ptx N, devices P",
    # Near misses of these.
    "No pneumothorax after removal of the chest tube.": "ptx N, devices N",
    "No pneumothorax following chest tube removal.": "ptx N, devices N",
    "No effusion and heart failure.": "effusion N, edema N",
    "No widening of the mediastinum and heart size normal.": "heart N",
    "No effusion with edema.": "effusion N, edema N",
    "A pneumothorax after chest tube placement has resolved.": "ptx N",
    "A pneumothorax following pacemaker placement cannot be excluded.": "ptx U",
    "A pneumothorax with a chest tube in place is not seen.": "ptx N",
    "The heart with a pacemaker in place is normal in size.": "heart N",
    "No pneumothorax after pacemaker insertion or effusion.": "ptx N, effusion N",
    "Mediastinal contour and heart size is normal.": "mediastinum N, heart N",
    "No consolidation, heart failure, or effusion.": "edema N, effusion N",
    "No pneumothorax, right basilar atelectasis persists.": "ptx N, atelectasis P, normal B",
    "No effusion, bibasilar opacities remain.": "effusion N, opacity P",
    "No pneumothorax, right lower lobe consolidation is unchanged.": "ptx N, consolidation P",
    "No pneumothorax, cardiomegaly is stable.": "ptx N, heart P",
    "No effusion or pneumothorax, edema has worsened.": "effusion N, ptx N, edema P",
    "Left basal opacity without effusion, suspicious for pneumonia.": (
        "opacity P, effusion N, pneumonia U"
    ),
    "Basal opacity without effusion, consistent with pneumonia.": (
        "opacity P, effusion N, pneumonia PU"
    ),
    "Hazy opacity without pneumothorax, likely atelectasis.": "opacity P, ptx N, atelectasis U",
    "No pneumothorax or effusion is seen, ET tube 4 cm above the carina.": (
        "ptx N, effusion N, devices P"
    ),
    "No pneumothorax is identified, left chest tube in place.": "ptx N, devices P",
    "No effusion, NG tube tip in the stomach.": "effusion N, devices P",
    "No pneumothorax, left pleural effusion.": "ptx N, effusion P",
    "No pneumothorax, only mild atelectasis.": "ptx N, atelectasis P",
    "No pneumothorax and left basilar atelectasis persists.": "ptx N, atelectasis P",
    "No effusion - right apical pneumothorax persists.": "effusion N, ptx P",
    "Left effusion persists, right pneumothorax has resolved.": "effusion P, ptx N",
    "No edema, yet a small effusion.": "edema N, effusion P",
    "No pneumothorax, right pleural effusion persists.": "ptx N, effusion P",
    "No pneumothorax, small left effusion is unchanged.": "ptx N, effusion P",
    "No effusion, retrocardiac atelectasis is again seen.": "effusion N, atelectasis P",
    "No pneumothorax, bibasilar atelectasis.": "ptx N, atelectasis P",
    "No effusion, consolidation in the left lower lobe persists.": "effusion N, consolidation P",
    "Left lower lobe opacity without effusion, worrisome for pneumonia.": (
        "opacity P, effusion N, pneumonia U"
    ),
    "Opacity without pneumothorax, raising concern for pneumonia.": "ptx N, pneumonia U, opacity P",
    "No pneumothorax is seen, left PICC tip in the SVC.": "ptx N, devices P",
    "No pneumothorax or effusion, right IJ line terminates in the SVC.": (
        "ptx N, effusion N, devices P"
    ),
    "No pneumothorax; right chest tube in place.": "ptx N, devices P",
    "No pneumothorax, pacemaker leads in unchanged position.": "ptx N, devices P",
    "No pneumothorax, effusion, consolidation, or edema.": (
        "ptx N, effusion N, consolidation N, edema N"
    ),
    "No pneumothorax, effusion, consolidation.": "ptx N, effusion N, consolidation N",
    "No evidence of pneumothorax, pleural effusion, or acute fracture.": (
        "ptx N, effusion N, fracture N"
    ),
    "No pneumothorax or effusion, and no consolidation.": "ptx N, effusion N, consolidation N",
    "No focal consolidation, pulmonary edema, pleural effusion, or pneumothorax is identified.": (
        "consolidation N, edema N, effusion N, ptx N"
    ),
    "There is no right pneumothorax, left effusion or right effusion.": "ptx N, effusion N",
    "No pneumothorax, stable cardiomegaly.": "ptx N, heart P",
    "No edema, cardiomegaly is present.": "edema N, heart P",
    "No effusion, moderate cardiomegaly.": "effusion N, heart P",
    "No pneumothorax, new right basilar consolidation.": "ptx N, consolidation P",
    "No pneumothorax following chest tube removal, residual effusion remains.": "ptx N, effusion P",
    "Without effusion, atelectasis at the left base is unchanged.": "effusion N, atelectasis P",
    "No pneumothorax, bilateral pleural effusions are stable.": "ptx N, effusion P",
    "No pneumothorax, the left effusion persists.": "ptx N, effusion P",
    "No pneumothorax, persistent left basilar opacity.": "ptx N, opacity P",
    "No pneumothorax, unchanged cardiomegaly.": "ptx N, heart P",
    "No effusion, increased left basilar opacity.": "effusion N, opacity P",
    "No focal consolidation, linear atelectasis at the left base.": "consolidation N",
    "Consolidation without effusion, compatible with pneumonia.": (
        "consolidation P, effusion N, pneumonia PU"
    ),
    "Left base opacity without pneumothorax, may represent pneumonia.": (
        "opacity P, ptx N, pneumonia U"
    ),
    "No pneumothorax or effusion is seen, endotracheal tube in good position.": (
        "ptx N, effusion N, devices P"
    ),
    "No pneumothorax is present, Swan-Ganz catheter in the pulmonary artery.": "ptx N, devices P",
    "No pneumothorax status post chest tube placement.": "ptx N",
    "No pleural effusion, pneumothorax, or focal airspace disease.": "effusion N, ptx N, opacity N",
    "No acute fracture, dislocation, or pneumothorax.": "fracture N, ptx N",
    "No effusions, infiltrates, or masses.": "effusion N, opacity N, lesion N",
    "No new consolidation, pneumothorax or enlarging effusion.": (
        "consolidation N, ptx N, effusion N"
    ),
    "There is no evidence of pneumothorax, pleural effusion, pulmonary edema, or pneumonia.": (
        "ptx N, effusion N, edema N, pneumonia N"
    ),
    "No pneumothorax and no effusion; atelectasis remains.": "ptx N, effusion N, atelectasis P",
    "No pneumothorax, although effusion remains.": "ptx N, effusion P",
    "No longer any effusion.": "effusion N",
    "There is no longer a pneumothorax.": "ptx N",
    "No effusion or pneumothorax, stable left lower lobe opacity.": "effusion N, ptx N, opacity P",
    "Without effusion or pneumothorax, compatible with emphysema and atelectasis.": (
        "effusion N, ptx N"
    ),
    "No pneumothorax, rib fractures again noted.": "ptx N, fracture P",
    "No pneumothorax, left-sided pacemaker.": "ptx N, devices P",
    "No pneumothorax, the ETT is unchanged.": "ptx N, devices P",
    "No pneumothorax identified, right lower lobe atelectasis noted.": "ptx N, atelectasis P",
    "No effusion is evident, bibasilar atelectasis is.": "effusion N, atelectasis P",
    "No pneumothorax, interval increase in edema.": "ptx N, edema P",
    "There is no pneumothorax, there is a small effusion.": "ptx N, effusion P",
    "Mild edema without effusion, pneumothorax, or consolidation.": (
        "edema P, effusion N, ptx N, consolidation N"
    ),
    "Cardiomegaly without edema, effusion or pneumothorax.": "heart P, edema N, effusion N, ptx N",
    "No pleural effusion, pneumothorax or acute osseous abnormality.": "effusion N, ptx N",
    "No lobar consolidation, overt edema, large effusion or pneumothorax.": (
        "consolidation N, edema N, effusion N, ptx N"
    ),
    "No pneumothorax, pneumomediastinum, or rib fracture.": "ptx N, fracture N",
    "No evidence of acute pneumonia, effusion, pneumothorax or CHF.": (
        "pneumonia N, effusion N, ptx N, edema N"
    ),
    "Neither effusion nor pneumothorax.": "effusion N, ptx N",
    "No right or left effusion.": "effusion N",
    "No pneumothorax, left lower lobe atelectasis is stable.": "ptx N, atelectasis P",
    "No pneumothorax, moderate right effusion persists.": "ptx N, effusion P",
    "Consolidation without pneumothorax, suspicious for infection.": (
        "consolidation P, ptx N, pneumonia U"
    ),
    "Right opacity without effusion, favoring pneumonia.": "opacity P, effusion N, pneumonia U",
    "Opacity without effusion, suggestive of atelectasis.": "opacity P, effusion N, atelectasis U",
    "No pneumothorax or consolidation is seen, left IJ catheter tip in the SVC.": (
        "ptx N, consolidation N, devices P"
    ),
    "No effusion is noted, tracheostomy tube in place.": "effusion N, devices P",
    "No pneumothorax or pleural effusion, cardiomegaly persists.": "ptx N, effusion N, heart P",
    "No edema, pneumothorax, or fracture is identified.": "edema N, ptx N, fracture N",
    "No effusion, edema or pneumothorax on this study.": "effusion N, edema N, ptx N",
    "No displaced rib fracture, pneumothorax, or effusion.": "fracture N, ptx N, effusion N",
    "No pneumothorax, hemothorax, or contusion.": "ptx N, effusion N",
    "No consolidation, mass, nodule, or effusion.": "consolidation N, lesion N, effusion N",
    "No pleural effusion, focal consolidation, or overt pulmonary edema.": (
        "effusion N, consolidation N, edema N"
    ),
    "There is no focal consolidation, effusion, or evidence of pneumothorax.": (
        "consolidation N, effusion N, ptx N"
    ),
    "Pneumothorax or effusion is not seen.": "ptx N, effusion N",
    "No pneumothorax, and the effusion is unchanged.": "ptx N, effusion P",
    "No pneumothorax, left chest tube remains in place.": "ptx N, devices P",
    "No pneumothorax, stable appearance of right effusion.": "ptx N, effusion P",
    "No acute fracture, mild atelectasis is seen at the bases.": "fracture N, atelectasis P",
    "No effusion, nodule in the right upper lobe is unchanged.": "effusion N, lesion P",
    "No pneumothorax, subcutaneous emphysema persists.": "ptx N",
    "No pneumothorax, retrocardiac consolidation has improved.": "ptx N, consolidation P",
    "Opacity at the right base without effusion, which could be pneumonia.": (
        "opacity P, effusion N, pneumonia U"
    ),
    "Bilateral opacities without pneumothorax, representing edema.": "opacity P, ptx N, edema PU",
    "No pneumothorax seen, ETT tip 3 cm above the carina.": "ptx N, devices P",
    "No pleural effusion seen, right-sided port in place.": "effusion N, devices P",
    "No pneumothorax, effusion, fracture, or foreign body is identified.": (
        "ptx N, effusion N, fracture N"
    ),
    "No pneumothorax, pleural effusion, pulmonary edema, consolidation, or mass.": (
        "ptx N, effusion N, edema N, consolidation N, lesion N"
    ),
    "No evidence for pneumothorax, pneumonia, or congestive heart failure.": (
        "ptx N, pneumonia N, edema N"
    ),
    "No large effusion, large pneumothorax, or large mass.": "effusion N, ptx N, lesion N",
    "No consolidation, collapse, or effusion.": "consolidation N, atelectasis N, effusion N",
    "No pneumothorax, large or small.": "ptx N",
    "Free of consolidation, effusion, and pneumothorax.": "consolidation N, effusion N, ptx N",
    "No pneumothorax or effusion; nodule persists.": "ptx N, effusion N, lesion P",
    # Near misses.
    "No pneumothorax, effusion, or edema.": "ptx N, effusion N, edema N, normal P",
    "No pneumothorax, pleural effusion or focal consolidation is seen.": (
        "ptx N, effusion N, consolidation N"
    ),
    "No consolidation, effusion, or pneumothorax is present.": "ptx N, effusion N, consolidation N",
    "No focal consolidation, large effusion, or pneumothorax.": (
        "ptx N, effusion N, consolidation N"
    ),
    "No focal consolidation, pleural effusion, pneumothorax.": "ptx N, effusion N, consolidation N",
    "No focal consolidation, left effusion, or right pneumothorax.": (
        "ptx N, effusion N, consolidation N"
    ),
    "No focal opacity concerning for pneumonia.": "opacity N, pneumonia N",
    "No consolidation, effusion, edema, or pneumothorax to suggest injury.": (
        "ptx N, edema N, effusion N"
    ),
    "There is no pneumothorax, pleural effusion, or displaced rib fracture.": (
        "ptx N, effusion N, fracture N"
    ),
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
    "AICD leads intact.": "devices P",
    "Swan-Ganz tip in the right main pulmonary artery.": "devices P",
    "Dobbhoff in place.": "devices P",
    "IABP in good position.": "devices P",
    "PICC line on the right.": "devices P",
    "Feeding tube in the stomach.": "devices P",
    "Hip fracture repaired with a plate.": "devices P",
    "Left chest wall ICD.": "devices P",
    "Biventricular pacemaker.": "devices P",
    "OGT in the stomach.": "devices P",
    "Right IJ central line.": "devices P",
    "Intraaortic balloon pump.": "devices P",
    "Open growth plates.": "devices B",
    "Tracheostomy in place.": "devices P",
    "Port-A-Cath in the SVC.": "devices P",
    "Right IJ sheath.": "devices P",
    "Spinal rods.": "devices PB",
    "Pleurx in the right pleural space.": "devices P",
    "Enteric tube below the diaphragm.": "devices P",
    "This is in line with the prior study.": "devices B",
    "Aortic valve stenosis.": "devices B",
    "Plate atelectasis.": "devices B, atelectasis P",
    "Left AICD with intact leads.": "devices P",
    "Dobbhoff terminates in the stomach.": "devices P",
    "ETT and NGT in place.": "devices P",
    "PICC tip at the cavoatrial junction.": "devices P",
    "Bi-V ICD in place.": "devices P",
    "Left PPM.": "devices PB",
    "Two PICCs.": "devices P",
    "ET tube, NG tube, and Swan-Ganz catheter are unchanged.": "devices P",
    "Pacer leads terminate in the right atrium.": "devices P",
    "Epiphyseal growth plates are open.": "devices B",
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
    "Tiny left ptx.": "ptx P",
    "Bilateral hemopneumothoraces.": "ptx P",
    "Status post mastectomy for breast cancer.": "lesion B",
    "Colon cancer.": "lesion B",
    "History of prostate cancer.": "lesion B",
    "Collapse of a thoracic vertebra.": "atelectasis B",
    "Vertebral collapse at T12.": "atelectasis B",
    "Thoracic vertebral collapse.": "atelectasis B",
    "Broken sternal wire.": "fracture B, devices P",
    "Sternal wire fracture.": "fracture B, devices P",
    "Fractured pacemaker lead.": "fracture B, devices P",
    "The growth plates are normal.": "devices B",
    "This may lead to misinterpretation.": "devices B",
    "Right upper lobe collapse.": "atelectasis P",
    "Lung cancer in the left hilum.": "lesion P",
    "Fractured rib.": "fracture P",
    "Metastatic disease in the liver.": "lesion B",
    "Renal cell carcinoma.": "lesion B",
    "Lymphoma and thyroid cancer in the history.": "lesion B",
    "Osteoporotic collapse of L1.": "atelectasis B",
    "Right-sided hydropneumothorax.": "ptx P",
    "Breast cancer with lung metastases.": "lesion P",
    "Hepatic mass.": "lesion B",
    "Ovarian carcinoma.": "lesion B",
    "Bladder tumor.": "lesion B",
    "Collapse of the T7 vertebral body.": "atelectasis B",
    "Compression fracture with vertebral collapse.": "fracture P, atelectasis B",
    "Fractured median sternotomy wires.": "fracture B, devices P",
    "Fracture of the second sternal wire.": "fracture B, devices P",
    "Rib fracture.": "fracture P",
    "Mass in the left breast.": "lesion B",
    "Axillary mass.": "lesion B",
    "Neck mass.": "lesion B",
    "Osseous metastatic disease.": "lesion B",
    "Squamous cell carcinoma of the skin.": "lesion B",
    "Knee joint effusion.": "effusion B",
    "Bowel edema.": "edema B",
    "Collapsed L2 vertebra.": "atelectasis B",
    "Lead fracture.": "fracture B, devices P",
    "Wire fractures are seen.": "fracture B, devices P",
    "Clavicle fracture fixed with plate and screws.": "fracture P, devices P",
    "Large right ptx.": "ptx P",
    "No ptx or effusion.": "ptx N, effusion N",
    "ptx: no": "ptx N",
    "History of breast cancer, no effusion.": "lesion B, effusion N",
    "Vertebral collapse.": "atelectasis B",
    "Fractured sternal wires.": "fracture B, devices P",
    "Fractured catheter fragment.": "fracture B, devices P",
    "Which may lead to overestimation of heart size.": "devices B",
    "Unfused growth plates.": "devices B",
    "Left lung collapse.": "atelectasis P",
    "Known breast cancer with a new lung nodule.": "lesion P",
    "Bilateral ptx.": "ptx P",
    "Hydropneumothorax on the right.": "ptx P",
    "History of lung cancer.": "lesion PU",
    "History of colon carcinoma.": "lesion B",
    "Prior mastectomy for cancer of the breast.": "lesion B",
    "L1 vertebral body collapse.": "atelectasis B",
    "Collapse of the right middle lobe.": "atelectasis P",
    "The third sternotomy wire is fractured.": "fracture B, devices P",
    "Fractured clavicle.": "fracture P",
    "Sternal fracture.": "fracture P",
    "Poor inspiration may lead to crowding.": "devices B",
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
    "Hemopneumothorax has resolved.": "ptx N",
    "Endotracheal tube has been removed.": "devices NB",
    "Swan-Ganz catheter removed.": "devices NB",
    "Pulmonary edema has resolved.": "edema N",
    "The previously seen pneumonia has cleared.": "pneumonia N",
    "The left effusion is no longer visualized.": "effusion N",
    "Pneumothorax no longer present.": "ptx N",
    "Atelectasis is no longer evident.": "atelectasis N",
    "Right pleural effusion has completely cleared.": "effusion N",
    "Pleural drain removed.": "devices NB",
    "PICC has been removed.": "devices NB",
    "Previously noted nodule is no longer visualized.": "lesion N",
    "Pneumonia has resolved.": "pneumonia N",
    "Effusion has decreased but not resolved.": "effusion P",
    "Improved but persistent edema.": "edema P",
    "Effusion cleared.": "effusion N",
    "Tube removed, new pneumothorax.": "ptx P",
    "Dobhoff tube removed.": "devices NB",
    "Interval extubation.": "devices NB",
    "Chest tube pulled.": "devices NBP",
    "All lines and tubes have been removed.": "devices NB",
    "Pneumothorax has disappeared.": "ptx N",
    "The effusion is gone.": "effusion N",
    "No residual pneumothorax.": "ptx N",
    "Residual pneumothorax.": "ptx P",
    "The consolidation is clearing.": "consolidation PU",
    "Improving pneumonia.": "pneumonia P",
    "Swan-Ganz removed.": "devices NB",
    "IABP removed.": "devices NB",
    "Left hemopneumothorax is no longer visualized.": "ptx N",
    "Edema no longer visualized.": "edema N",
    "Right basilar opacity has cleared.": "opacity N",
    "The right pneumothorax resolved.": "ptx N",
    "Chest tube removed without pneumothorax.": "devices NB, ptx N",
    "PICC removed.": "devices NB",
    "Feeding tube no longer present.": "devices NB",
    "Intra-aortic balloon pump removed.": "devices NB",
    "Right pneumothorax, now resolved.": "ptx N",
    "Resolution of edema.": "edema N",
    "Lines removed.": "devices NB",
    "Drains have been removed.": "devices NB",
    "Effusion not visualized.": "effusion N",
    "Previously described opacity is not visualized.": "opacity N",
    "Atelectasis has cleared.": "atelectasis N",
    "Edema almost completely resolved.": "edema PU",
    "Pneumothorax not resolved.": "ptx P",
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
    "Calcified granulomas in the left lung.": "lesion BN",
    "Calcified nodule, likely a granuloma.": "lesion BN",
    "Small calcified nodule in the left base.": "lesion BN",
    "Calcified pulmonary nodule.": "lesion BN",
    "Nodular opacities at the bases are nipple shadows.": "lesion BN",
    "Prominent nipple shadow simulates a nodule.": "lesion BNU",
    "Granuloma in the right upper lobe.": "lesion BN",
    "Nodule is unchanged, not calcified.": "lesion P",
    "Multiple calcified granulomata.": "lesion BN",
    "Calcified lung granulomas are present.": "lesion BN",
    "Rounded density is a nipple shadow.": "lesion BN",
    "Calcified 4 mm nodule in the lingula.": "lesion BN",
    "Calcified granuloma, no nodule.": "lesion N",
    "Several calcified nodules.": "lesion BN",
    "A nodule that is calcified.": "lesion BNP",
    "Solitary nodule.": "lesion P",
    "Calcified nodules bilaterally.": "lesion BN",
    "Tiny calcified nodule, unchanged.": "lesion BN",
    "Old granuloma.": "lesion BN",
    "Nipple shadows project over the bases.": "lesion BN",
    "Lung nodule.": "lesion P",
    "New nodule in the left upper lobe.": "lesion P",
    "Calcified lesion in the right lung.": "lesion BN",
    "Partially calcified mass in the left lung.": "lesion PBN",
    "Noncalcified lung nodule.": "lesion P",
    "Non-calcified nodule.": "lesion P",
    "Granulomas and a nodule.": "lesion P",
    "Nipple markers are in place.": "lesion B",
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
    "Favor pneumonia.": "pneumonia U",
    "Findings favor edema over infection.": "edema U",
    "Cardiac size is borderline.": "heart U",
    "Heart is borderline in size.": "heart U",
    "Pleural effusion is not appreciated.": "effusion U",
    "Pneumothorax not appreciated.": "ptx U",
    "Opacity favored to represent atelectasis.": "opacity P, atelectasis U",
    "Favor atelectasis rather than pneumonia.": "atelectasis U, pneumonia NU",
    "Effusion favored over atelectasis.": "effusion U",
    "Consolidation is not appreciated.": "consolidation U",
    "Heart size borderline.": "heart U",
    "Borderline enlarged heart size.": "heart PU",
    "Possible pneumonia, favor atelectasis.": "pneumonia U, atelectasis U",
    "Unlikely to represent pneumonia.": "pneumonia UN",
    "Favoring atelectasis.": "atelectasis U",
    "The findings favor atelectasis over consolidation.": "atelectasis U",
    "Effusion is difficult to exclude.": "effusion U",
    "Pneumonia is felt to be less likely.": "pneumonia U",
    "Suspected rib fracture.": "fracture U",
    "Edema, not appreciated on the prior study.": "edema U",
    "Pneumothorax is not well seen.": "ptx U",
    "Heart size is borderline, no edema.": "heart U, edema N",
    "Borderline size of the heart.": "heart U",
    "Favor edema.": "edema U",
    "Opacities favor infection over edema.": "opacity P, pneumonia U",
    "Fracture is not appreciated.": "fracture U",
    "No effusion appreciated.": "effusion N",
    "Findings favour heart failure.": "edema U",
    "We favor atelectasis.": "atelectasis U",
    "Favored atelectasis at the base.": "atelectasis U",
    "No nodule is appreciated.": "lesion N",
    "A nodule is not appreciated.": "lesion U",
    "The heart is borderline.": "heart U",
    "Borderline cardiac size.": "heart U",
    # Near misses.
    "No pneumothorax is appreciated.": "ptx N",
    "No appreciable effusion.": "effusion N",
    "A pneumothorax is not seen.": "ptx N",
}

COMPARISONS = {
    "The left effusion has not significantly changed.": "effusion P, normal B",
    "The left effusion is not markedly changed.": "effusion P",
    "The edema has not improved.": "edema P",
    "Edema has not substantially improved.": "edema P",
    "Consolidation has not worsened.": "consolidation P",
    "The pneumonia has not progressed.": "pneumonia P",
    "The pneumothorax has not increased.": "ptx P",
    "The pneumothorax is not larger.": "ptx P",
    "The pneumothorax has not enlarged.": "ptx P",
    "The effusion is not as large as before.": "effusion P",
    "The effusion is not significantly different.": "effusion P",
    "The edema is not worse.": "edema P",
    "The edema is not as severe.": "edema P",
    "The fracture is not displaced.": "fracture P",
    "Consolidation not previously seen.": "consolidation P",
    "The opacity was not seen on the recent prior study.": "opacity P",
    "A small pneumothorax has not been entirely excluded.": "ptx U",
    "The effusion has not yet resolved.": "effusion P",
    "The effusion has not completely resolved.": "effusion P",
    "The pneumonia has not fully cleared.": "pneumonia P",
    "The drain has not been removed.": "devices P",
    "The tube has not moved.": "devices P",
    "A pneumonia is not entirely excluded.": "pneumonia U",
    "Pneumonia has not been excluded.": "pneumonia U",
    "No interval worsening of the effusion.": "effusion P",
    "No significant interval improvement in the edema.": "edema P",
    "No progression of the consolidation.": "consolidation P",
    "No enlargement of the left pneumothorax.": "ptx P",
    "No significant difference in the effusion.": "effusion P",
    "No resolution of the pneumonia.": "pneumonia P",
    "No displacement of the endotracheal tube.": "devices P",
    "The nodule was not seen on the prior study.": "lesion P",
    "The nodule was not visible on the previous film.": "lesion P",
    "Left basal opacity not seen previously.": "opacity P",
    "New effusion, not present on the prior exam.": "effusion P",
    # Near misses.
    "Edema is not clearly seen.": "edema U",
    "The nodule is not seen on the current study.": "lesion N",
    "The nodule is not identified.": "lesion N",
    "The effusion is no longer seen.": "effusion N",
    "No enlargement of the heart.": "heart N",
    "No enlarged heart, no edema.": "heart N, edema N",
    "No effusion in the prior study or now.": "effusion N",
    "No worsening edema, no effusion.": "effusion N",
    "A fracture is not seen, as before.": "fracture N",
    "No enlargement of the pulmonary vessels or edema.": "edema N",
    "No enlargement of the aorta, effusion, or pneumothorax.": "effusion N, ptx N",
    "No displacement of the trachea, effusion or pneumothorax.": "effusion N, ptx N",
    "No pneumothorax or worsening of the effusion.": "ptx N",
    "No pneumothorax or change in the effusion.": "ptx N",
    "A pneumothorax is not seen on prior or current films.": "ptx N",
    "An effusion is not seen as well as edema.": "effusion N",
    "Pneumonia is not as likely as edema.": "pneumonia NU",
    "No worsening of the effusion or new pneumothorax.": "ptx N",
    "The edema is not well seen.": "edema U",
}

KINDS = {
    "lists tables and headed lines": LISTS_TABLES_AND_HEADED_LINES,
    "sizes and their nouns": SIZES_AND_THEIR_NOUNS,
    "where negation ends": WHERE_NEGATION_ENDS,
    "devices": DEVICES,
    "findings by short names": FINDINGS_BY_SHORT_NAMES,
    "what is gone": WHAT_IS_GONE,
    "calcified and nipples": CALCIFIED_AND_NIPPLES,
    "hedges": HEDGES,
    "comparisons": COMPARISONS,
}


def states_of(text):
    """{label: letter}"""
    (states,) = extract_labels([text]).tolist()
    return {label: "BPNU"[state] for label, state in zip(LABELS, states)}


def wrong_claims(text, wanted):
    """What the extractor does not read as wanted: [(text, name, wanted letters, letter)]."""
    found = states_of(text)
    wrong = []
    for claim in wanted.split(", "):
        name, accepted = claim.split()
        letter = found[NAMES[name]]
        if letter not in accepted:
            wrong.append((text, name, accepted, letter))
    return wrong


def rewritten(text):
    """The text in capitals, with wide spaces and with a number."""
    yield text
    yield text.upper()
    yield text.replace(" ", "  ")
    # Items of a list and rows of a table have no number.
    if text[0].isalpha():
        yield "1. " + text


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_have_the_wanted_states(kind):
    wrong = []
    for text, wanted in KINDS[kind].items():
        for version in rewritten(text):
            wrong += wrong_claims(version, wanted)
    assert not wrong


# A line of a list and what separates its lines.
LAYOUTS = {
    "lines": ("{}: {}", "\n"),
    "items": ("- {}: {}", "\n"),
    "bold items": ("* **{}**: {}", "\n"),
    "bold headings": ("**{}:** {}", "\n\n"),
    "numbers": ("1. {}: {}.", "\n"),
    "dashes": ("{} - {}", "\n"),
    "table": ("| {} | {} |", "\n"),
    "sentences": ("{}: {}.", " "),
    "commas": ("{}: {}", ", "),
    "semicolons": ("{}: {}", "; "),
    "nothing": ("{}: {}", " "),
}
VALUES = {"Yes": "P", "Present": "P", "No": "N", "no": "N", "None": "N", "Absent": "N"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_of_labels_have_their_values(layout):
    """Pleural Other is the name of no finding."""
    line, separator = LAYOUTS[layout]
    rng = random.Random(3)
    for _ in range(40):
        labels = rng.sample([*LABELS[1:11], *LABELS[12:]], 6)
        values = {label: rng.choice(list(VALUES)) for label in labels}
        text = separator.join(line.format(*pair) for pair in values.items())
        found = states_of(text)
        for label, value in values.items():
            assert found[label] == VALUES[value], (label, text)


def test_line_breaks_between_words_do_not_change_labels():
    for text in WHERE_NEGATION_ENDS | SIZES_AND_THEIR_NOUNS | WHAT_IS_GONE | HEDGES:
        assert states_of(text.replace(" ", "\n")) == states_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "| edema " * 12_000,
        "\n|" + "edema " * 16_000,
        "\n|edema|" * 12_000,
        "edema: no " * 10_000,
        ": no" + "\n" * 100_000,
        "no edema, large " * 6_000,
        "large a " * 12_000,
        "heart large calcified " * 4_000,
        "no edema, " + "a-" * 50_000,
        "edema. no" * 10_000,
    ],
    ids=range(10),
)
def test_lists_and_tables_take_linear_time(text):
    start = time.process_time()
    extract_labels([text])
    assert time.process_time() - start < 3
