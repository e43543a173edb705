"""Common findings: one set of labels for all phases of REFLACX and for EGD-CXR.

Certainty is kept as REFLACX gives it, 0 (absent) to 5 (certain: over 90%). A common finding that
unites several labels has the highest of their certainties. A finding that a phase or data set did
not ask for is left out, which is not the same as 0.

| common finding                | REFLACX phase 1                       | REFLACX phases 2, 3            |
|-------------------------------|---------------------------------------|--------------------------------|
| Abnormal mediastinal contour  | Wide mediastinum                      | Abnormal mediastinal contour   |
| Airway wall thickening        | Airway wall thickening                | not asked                      |
| Atelectasis                   | Atelectasis                           | Atelectasis                    |
| Consolidation                 | Consolidation                         | Consolidation                  |
| Enlarged cardiac silhouette   | Enlarged cardiac silhouette           | Enlarged cardiac silhouette    |
| Enlarged hilum                | not asked                             | Enlarged hilum                 |
| Fracture                      | Fracture                              | Acute fracture                 |
| Groundglass opacity           | Groundglass opacity                   | Groundglass opacity            |
| Hiatal hernia                 | not asked                             | Hiatal hernia                  |
| High lung volume or emphysema | Emphysema                             | High lung volume / emphysema   |
| Interstitial lung disease     | Fibrosis                              | Interstitial lung disease      |
| Lung nodule or mass           | Mass, Nodule                          | Lung nodule or mass            |
| Pleural abnormality           | Pleural effusion, Pleural thickening  | Pleural abnormality            |
| Pneumothorax                  | Pneumothorax                          | Pneumothorax                   |
| Pulmonary edema               | Pulmonary edema                       | Pulmonary edema                |
| Quality issue (yes/no)        | Quality issue                         | not asked                      |
| Support devices (yes/no)      | Support devices                       | Support devices                |
| Other (text)                  | not asked                             | Other                          |

The two phases' terms are not synonyms everywhere: phase 1's Fracture may be old, its Fibrosis is
one kind of interstitial disease, its Emphysema one cause of high lung volume. Where that matters,
keep to one phase (`phase` is in reflacx.json). EGD-CXR's labels (Normal, CHF, Pneumonia, yes/no)
match none of these and keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# label of a data set -> common finding; every label has exactly one, whatever the phase
COMMON_FINDING: Mapping[str, str] = {
    "Abnormal mediastinal contour": "Abnormal mediastinal contour",
    "Wide mediastinum": "Abnormal mediastinal contour",
    "Airway wall thickening": "Airway wall thickening",
    "Atelectasis": "Atelectasis",
    "Consolidation": "Consolidation",
    "Enlarged cardiac silhouette": "Enlarged cardiac silhouette",
    "Enlarged hilum": "Enlarged hilum",
    "Fracture": "Fracture",
    "Acute fracture": "Fracture",
    "Groundglass opacity": "Groundglass opacity",
    "Hiatal hernia": "Hiatal hernia",
    "Emphysema": "High lung volume or emphysema",
    "High lung volume / emphysema": "High lung volume or emphysema",
    "Fibrosis": "Interstitial lung disease",
    "Interstitial lung disease": "Interstitial lung disease",
    "Mass": "Lung nodule or mass",
    "Nodule": "Lung nodule or mass",
    "Lung nodule or mass": "Lung nodule or mass",
    "Pleural effusion": "Pleural abnormality",
    "Pleural thickening": "Pleural abnormality",
    "Pleural abnormality": "Pleural abnormality",
    "Pneumothorax": "Pneumothorax",
    "Pulmonary edema": "Pulmonary edema",
    "Quality issue": "Quality issue",
    "Support devices": "Support devices",
    "Other": "Other",
    "Normal": "Normal",
    "CHF": "CHF",
    "pneumonia": "Pneumonia",
}

Value = int | float | bool | str


def unify(labels: Mapping[str, Value]) -> dict[str, Value]:
    """Common findings of one reading, sorted by name, from a data set's own labels.

    Certainties stay int 0-5, yes/no stays bool, text stays text. Raises KeyError for a label that
    `COMMON_FINDING` does not know.
    """
    unified: dict[str, Value] = {}
    for label, value in labels.items():
        finding = COMMON_FINDING[label]
        unified[finding] = max(unified[finding], value) if finding in unified else value
    return dict(sorted(unified.items()))


def merge_findings(readings: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Common findings of several readings of one image, each over the readings that were asked for it:
    the mean certainty (two decimals), yes where at least half say yes, the texts joined by "|"."""
    merged: dict[str, Value] = {}
    for finding in sorted(set().union(*readings)):
        values = [reading[finding] for reading in readings if finding in reading]
        if isinstance(values[0], str):
            texts = [text for value in values for text in value.split("|") if text]
            merged[finding] = "|".join(dict.fromkeys(texts))
        elif isinstance(values[0], bool):
            merged[finding] = 2 * sum(values) >= len(values)
        else:
            merged[finding] = round(sum(values) / len(values), 2)
    return merged
