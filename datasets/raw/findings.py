"""Common findings: one set of labels for all phases of REFLACX and for EGD-CXR.

Certainty is kept as REFLACX gives it, 0 (absent) to 5 (certain: over 90%). A common finding that
unites several labels has the highest of their certainties. A finding that a phase or data set did
not ask for is left out, which is not the same as 0.

The two phases' terms are not synonyms everywhere: phase 1's Fracture may be old, its Fibrosis is
one kind of interstitial disease, its Emphysema one cause of high lung volume. Where that matters,
keep to one phase (`phase` is in reflacx.json). EGD-CXR's labels match none of these and keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FINDINGS = """
common finding                | kind      | REFLACX phase 1                      | REFLACX phases 2, 3          | EGD-CXR
Abnormal mediastinal contour  | certainty | Wide mediastinum                     | Abnormal mediastinal contour |
Airway wall thickening        | certainty | Airway wall thickening               |                              |
Atelectasis                   | certainty | Atelectasis                          | Atelectasis                  |
Consolidation                 | certainty | Consolidation                        | Consolidation                |
Enlarged cardiac silhouette   | certainty | Enlarged cardiac silhouette          | Enlarged cardiac silhouette  |
Enlarged hilum                | certainty |                                      | Enlarged hilum               |
Fracture                      | certainty | Fracture                             | Acute fracture               |
Groundglass opacity           | certainty | Groundglass opacity                  | Groundglass opacity          |
Hiatal hernia                 | certainty |                                      | Hiatal hernia                |
High lung volume or emphysema | certainty | Emphysema                            | High lung volume / emphysema |
Interstitial lung disease     | certainty | Fibrosis                             | Interstitial lung disease    |
Lung nodule or mass           | certainty | Mass, Nodule                         | Lung nodule or mass          |
Pleural abnormality           | certainty | Pleural effusion, Pleural thickening | Pleural abnormality          |
Pneumothorax                  | certainty | Pneumothorax                         | Pneumothorax                 |
Pulmonary edema               | certainty | Pulmonary edema                      | Pulmonary edema              |
Support devices               | yes/no    | Support devices                      | Support devices              |
Quality issue                 | yes/no    | Quality issue                        |                              |
Other                         | text      |                                      | Other                        |
Normal                        | yes/no    |                                      |                              | Normal
CHF                           | yes/no    |                                      |                              | CHF
Pneumonia                     | yes/no    |                                      |                              | pneumonia
"""
_ROWS = [[cell.strip() for cell in line.split("|")] for line in FINDINGS.strip().splitlines()[1:]]
Value = int | float | bool | str


def _labels(column: int) -> dict[str, str]:
    return {label: row[1] for row in _ROWS for label in row[column].split(", ") if label}


# phase of REFLACX, or "egd" -> label -> its kind
LABELS: Mapping[int | str, Mapping[str, str]] = {1: _labels(2), 2: _labels(3), 3: _labels(3), "egd": _labels(4)}
# label of a data set -> common finding; every label has exactly one, whatever the phase
COMMON_FINDING: Mapping[str, str] = {
    label: row[0] for row in _ROWS for cell in row[2:] for label in cell.split(", ") if label
}


def unify(labels: Mapping[str, Value]) -> dict[str, Value]:
    """Common findings of one reading, sorted by name, from a data set's own labels.

    Certainties stay int 0-5, yes/no stays bool, text stays text. Raises KeyError for a label that
    `COMMON_FINDING` does not know.
    """
    unified: dict[str, Value] = {}
    for label, value in labels.items():
        finding = COMMON_FINDING[label]
        unified[finding] = max(unified.get(finding, value), value)
    return dict(sorted(unified.items()))


def merge_findings(readings: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Common findings of several readings of one image, each over the readings that were asked for it:
    the mean certainty (two decimals), yes where at least half say yes, the texts joined by "|"."""
    merged: dict[str, Value] = {}
    for finding in sorted(set().union(*readings)):
        values = [reading[finding] for reading in readings if finding in reading]
        if isinstance(values[0], str):
            merged[finding] = "|".join(dict.fromkeys(filter(None, "|".join(values).split("|"))))
        else:
            mean = sum(values) / len(values)
            merged[finding] = mean >= 0.5 if isinstance(values[0], bool) else round(mean, 2)
    return merged
