"""datasets/raw/findings.py: every label of both phases has a common finding."""

from datasets.raw.findings import COMMON_FINDING, LABELS, merge_findings, unify


def test_every_label_is_mapped_and_no_other():
    assert set(COMMON_FINDING) == set().union(*LABELS.values())
    assert [sum(kind == "certainty" for kind in LABELS[own].values()) for own in (1, 2, 3, "egd")] == [15, 14, 14, 0]


def test_highest_certainty_of_united_labels():
    labels = dict.fromkeys(LABELS[1], 0) | {"Mass": 2, "Nodule": 4, "Support devices": True}
    unified = unify(labels)
    assert unified["Lung nodule or mass"] == 4 and unified["Support devices"] is True
    assert unified["Pleural abnormality"] == 0 and "Enlarged hilum" not in unified
    assert list(unified) == sorted(unified)


def test_merged_over_those_who_were_asked():
    first = unify({"Mass": 5, "Nodule": 0, "Support devices": True, "Airway wall thickening": 3})
    second = unify({"Lung nodule or mass": 2, "Support devices": False, "Other": "scoliosis|old line"})
    third = unify({"Lung nodule or mass": 0, "Support devices": False, "Other": "scoliosis"})
    assert merge_findings([first, second, third]) == {
        "Airway wall thickening": 3.0,
        "Lung nodule or mass": 2.33,
        "Other": "scoliosis|old line",
        "Support devices": False,
    }
