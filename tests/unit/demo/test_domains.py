"""The synthetic domains: valid nnU-Net datasets with all tasks, reproducible, different scanners, the same lesions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from nnunet_kd.data.side_files import read_boxes, read_labels
from nnunet_kd.data.verify import verify_dataset
from nnunet_kd.demo import domains
from nnunet_kd.demo.domains import DOMAINS, Domain, draw_anatomy, draw_lesion, make_case, write_domains
from nnunet_kd.evaluation.metrics import dice


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_domains(folder)
    return folder


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)
def test_dataset_is_what_its_description_says(raw: Path, domain: Domain) -> None:
    folder = raw / domain.folder_name
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == domain.num_training
    assert list(description["channel_names"].values()) == [channel.name for channel in domain.channels]
    for split, number in (("Tr", domain.num_training), ("Ts", domain.num_test)):
        labels = sorted((folder / f"labels{split}").glob(f"*{domains.FILE_ENDING}"))
        assert len(labels) == number
        for file in labels:
            label_map = sitk.ReadImage(str(file))
            assert label_map.GetSpacing() == pytest.approx(domain.spacing_mm[::-1])
            values = set(np.unique(sitk.GetArrayFromImage(label_map)))
            assert values <= set(domain.labels.values()), file.name
            if 0 not in domain.num_lesions:
                assert values == set(domain.labels.values()), file.name
            case = file.name.removesuffix(domains.FILE_ENDING)
            for channel in range(len(domain.channels)):
                image = sitk.ReadImage(str(folder / f"images{split}" / f"{case}_{channel:04d}{domains.FILE_ENDING}"))
                assert image.GetSize() == label_map.GetSize() == domain.shape[::-1]
                assert image.GetSpacing() == label_map.GetSpacing()
        assert len(list((folder / f"images{split}").iterdir())) == number * len(domain.channels)


def test_side_files_are_right_and_cover_training_and_test_cases(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(raw))
    declared = {domain.name: domain.tasks for domain in DOMAINS}
    assert [bool(tasks.classification) for tasks in declared.values()] == [False, False, True]
    assert [tasks.detection is not None for tasks in declared.values()] == [True, False, False]
    for domain in DOMAINS:
        folder = raw / domain.folder_name
        assert verify_dataset(domain.folder_name, show_progress=False, check_copies=False).problems == ()
        for target in domain.tasks.classification:
            for side_folder, number in ((folder, domain.num_training), (folder / "labelsTs", domain.num_test)):
                labels = np.array(list(read_labels(side_folder / target.file, target).values()))
                assert labels.sum(axis=0).tolist() == [number / 2, number / 2]
        if domain.tasks.detection is not None:
            test = read_boxes(folder / "labelsTs" / domain.tasks.detection.file, domain.tasks.detection, 3)
            assert len(test) == domain.num_test
            assert {len(case.boxes) for case in test.values()} == {0, 1, 2}


def test_boxes_are_those_of_the_lesions_that_were_drawn() -> None:
    domain = DOMAINS[0]
    counts = []
    for index in range(len(domain.num_lesions) * 5):
        case = make_case(domain, np.random.default_rng(index), index)
        wanted = domain.num_lesions[index % len(domain.num_lesions)]
        assert len(case.boxes) <= wanted
        counts.append((wanted, len(case.boxes)))
        covered = np.zeros(domain.shape, bool)
        for box in case.boxes.astype(int):
            inside = tuple(slice(first, end) for first, end in zip(box[:3], box[3:], strict=True))
            part = case.labels[inside] == domain.labels["lesion"]
            for axis in range(3):  # the mask touches every face of its box
                outline = part.any(axis=tuple(other for other in range(3) if other != axis))
                assert outline[[0, -1]].all()
            covered[inside] = True
        assert not (case.labels[~covered] == domain.labels["lesion"]).any()
    assert counts.count((2, 2)) > counts.count((2, 1))  # there is nearly always room for the second


def test_boxes_do_not_share_a_lesion() -> None:
    lesion = np.zeros((4, 8, 8), bool)
    lesion[1:3, 1:3, 1:3] = True
    lesion[1:2, 5:8, 4:6] = True
    assert domains.lesion_boxes(lesion).tolist() == [[1, 1, 1, 3, 3, 3], [1, 5, 4, 2, 8, 6]]
    lesion[2, 3, 3] = True  # touches the first at a corner
    assert domains.lesion_boxes(lesion).tolist() == [[1, 1, 1, 3, 4, 4], [1, 5, 4, 2, 8, 6]]
    assert domains.lesion_boxes(np.zeros((4, 8, 8), bool)).shape == (0, 6)


def test_grade_shows_in_the_edema_and_neither_in_the_lesion_nor_in_the_brightness() -> None:
    domain = DOMAINS[2]
    cases = [make_case(domain, np.random.default_rng(index), index) for index in range(80)]
    high = [case.grade == "high" for case in cases]
    assert np.mean(high) == 0.5
    voxels = {name: [np.sum(case.labels == label) for case in cases] for name, label in domain.labels.items()}
    assert roc_auc_score(high, voxels["edema"]) > 0.95
    assert 0.3 < roc_auc_score(high, voxels["lesion"]) < 0.7
    assert roc_auc_score(high, [case.images[1].mean() for case in cases]) < 0.75


def test_domains_differ_as_scanners_do() -> None:
    assert len({domain.spacing_mm for domain in DOMAINS}) == len(DOMAINS)
    assert len({tuple(domain.labels) for domain in DOMAINS}) == len(DOMAINS)
    assert len({tuple(channel.name for channel in domain.channels) for domain in DOMAINS}) == len(DOMAINS)
    assert all("lesion" in domain.labels for domain in DOMAINS)
    assert len({domain.dataset_id for domain in DOMAINS} | {domains.JOINT_ID}) == len(DOMAINS) + 1


def test_no_case_is_written_twice(raw: Path) -> None:
    for domain in DOMAINS:
        files = [file for split in ("Tr", "Ts") for file in (raw / domain.folder_name / f"images{split}").iterdir()]
        assert len({file.name for file in files}) == len(files)
        contents = {sitk.GetArrayFromImage(sitk.ReadImage(str(file))).tobytes() for file in files}
        assert len(contents) == len(files)


def test_same_seed_same_voxels() -> None:
    domain = DOMAINS[2]
    first, second, other = (make_case(domain, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first.images, second.images, strict=True))
    assert np.array_equal(first.labels, second.labels)
    assert not np.array_equal(first.labels, other.labels)


def test_existing_domain_is_kept(tmp_path: Path) -> None:
    domain = dataclasses.replace(DOMAINS[1], num_training=1, num_test=1)
    write_domains(tmp_path, (domain,))
    label_file = tmp_path / domain.folder_name / "labelsTr" / f"{domain.case_name(0)}{domains.FILE_ENDING}"
    label_file.write_text("kept")
    write_domains(tmp_path, (domain,))
    assert label_file.read_text() == "kept"


def test_unfinished_domain_is_written_again(tmp_path: Path) -> None:
    domain = dataclasses.replace(DOMAINS[1], num_training=1, num_test=1)
    write_domains(tmp_path, (domain,))
    folder = tmp_path / domain.folder_name
    (folder / "dataset.json").unlink()
    label_file = folder / "labelsTr" / f"{domain.case_name(0)}{domains.FILE_ENDING}"
    before = label_file.read_bytes()
    label_file.write_text("torn")
    write_domains(tmp_path, (domain,))
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(label_file))).any()
    assert label_file.read_bytes() == before


def test_anatomy() -> None:
    spacing = (2.0, 1.5, 1.5)
    for seed in range(10):
        masks = draw_anatomy((30, 40, 40), spacing, np.random.default_rng(seed))
        assert masks["lesion"].any()
        assert not (masks["lesion"] & ~masks["organ"]).any()
        assert not (masks["organ"] & ~masks["body"]).any()
        assert not (masks["vessels"] & masks["lesion"]).any()
        assert not (masks["edema"] & masks["lesion"]).any()
        # every edema voxel is near the lesion, measured in mm over all pairs
        lesion = np.argwhere(masks["lesion"]) * spacing
        for voxel in np.argwhere(masks["edema"])[::40] * spacing:
            assert np.linalg.norm(lesion - voxel, axis=1).min() <= domains.EDEMA_WIDTH_MM + 1e-9


def test_lesions_are_in_one_piece_and_irregular() -> None:
    spacing = (1.0, 1.0, 1.0)
    fills = []
    for seed in range(20):
        lesion = draw_lesion((48, 48, 48), spacing, np.zeros(3), np.random.default_rng(seed))
        assert ndimage.label(lesion)[1] == 1
        points = np.argwhere(lesion).astype(float)
        # an ellipsoid of the same second moments has the volume 4/3 pi sqrt(5^3 det covariance)
        ellipsoid = 4 / 3 * np.pi * np.sqrt(5**3 * np.linalg.det(np.cov(points.T)))
        fills.append(len(points) / ellipsoid)
    assert 0.5 < np.mean(fills) < 0.99  # 1 for an ellipsoid; the surface is rough


def test_lesion_volume_does_not_depend_on_the_voxel_size() -> None:
    """The same distribution in mm on two grids: mean volumes agree within the error of 150 draws each."""
    volumes = []
    for shape, spacing in (((40, 40, 40), (1.5, 1.5, 1.5)), ((20, 30, 30), (3.0, 2.0, 2.0))):
        voxel_ml = float(np.prod(spacing)) / 1000
        random = np.random.default_rng(0)
        volumes.append([draw_lesion(shape, spacing, np.zeros(3), random).sum() * voxel_ml for _ in range(150)])
    standard_error = np.hypot(*(np.std(values) / np.sqrt(150) for values in volumes))
    assert abs(np.mean(volumes[0]) - np.mean(volumes[1])) < 3 * standard_error


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)
def test_lesion_is_visible_but_not_by_intensity_alone(domain: Domain) -> None:
    """The best threshold finds something of the lesion, but a network can do better."""
    scores = []
    for seed in range(5):
        case = make_case(domain, np.random.default_rng(seed))
        lesion = case.labels == domain.labels["lesion"]
        image = case.images[-1].astype(float)
        thresholds = np.quantile(image, np.linspace(0.5, 0.999, 40))
        scores.append(max(float(dice(lesion, image > threshold, [1])[0]) for threshold in thresholds))
    assert 0.2 < np.mean(scores) < 0.75
