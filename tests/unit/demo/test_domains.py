"""The synthetic domains: valid nnU-Net datasets, reproducible, different scanners, the same kind of lesion."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

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
        labels = sorted((folder / f"labels{split}").iterdir())
        assert len(labels) == number
        for file in labels:
            label_map = sitk.ReadImage(str(file))
            assert label_map.GetSpacing() == pytest.approx(domain.spacing_mm[::-1])
            values = set(np.unique(sitk.GetArrayFromImage(label_map)))
            assert values == set(domain.labels.values()), file.name
            case = file.name.removesuffix(domains.FILE_ENDING)
            for channel in range(len(domain.channels)):
                image = sitk.ReadImage(str(folder / f"images{split}" / f"{case}_{channel:04d}{domains.FILE_ENDING}"))
                assert image.GetSize() == label_map.GetSize() == domain.shape[::-1]
                assert image.GetSpacing() == label_map.GetSpacing()
        assert len(list((folder / f"images{split}").iterdir())) == number * len(domain.channels)


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
    assert all(np.array_equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])


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
        images, labels = make_case(domain, np.random.default_rng(seed))
        lesion = labels == domain.labels["lesion"]
        image = images[-1].astype(float)
        thresholds = np.quantile(image, np.linspace(0.5, 0.999, 40))
        scores.append(max(float(dice(lesion, image > threshold, [1])[0]) for threshold in thresholds))
    assert 0.2 < np.mean(scores) < 0.75
