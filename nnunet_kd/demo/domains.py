"""Three small synthetic domains that share one kind of lesion; between them they have all three tasks (our design).

They differ as hospitals and scanners do: CT, one MR channel, two MR channels; other contrast, noise, bias field, voxel
size, label sets and numbers of labelled cases. The lesions are drawn from one distribution in millimetres, so a network
that has seen many of them in one domain knows something about their shape in the others. Vessels of the lesion's
intensity run through every image: intensity alone does not find the lesion.

The CT domain also has a box around each lesion, of which a case has none, one or two. The two-channel MR domain has a
grade per case, which shows in the width of the edema and not in the lesion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from nnunet_kd.data.side_files import CaseBoxes, write_boxes
from nnunet_kd.data.tasks import CLASSIFICATION_FILE, DETECTION_FILE, Tasks
from nnunet_kd.files import write_json
from nnunet_kd.settings import BLOCK

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

JOINT_ID = 970
FILE_ENDING = ".nii.gz"
# Shape statistics of the lesion, in mm, the same in every domain.
LESION_RADIUS_MM = (8.0, 13.0)
LESION_ROUGHNESS = 0.3
ROUGHNESS_SCALE_MM = 4.0
EDEMA_WIDTH_MM = 6.0
GRADE = "grade"
# Places that are tried for a further lesion before the case goes without it; lesions do not touch.
NUM_PLACES = 20


@dataclass(frozen=True)
class Channel:
    """Intensities of one image channel: a value per tissue, Gaussian noise, a smooth multiplicative bias field."""

    name: str
    air: float
    tissue: float
    organ: float
    lesion: float
    edema: float
    noise: float
    bias: float = 0.0


@dataclass(frozen=True)
class Domain:
    """One synthetic dataset. ``shape`` and ``spacing_mm`` are in array order (z, y, x).

    ``num_lesions`` and ``grades`` (with the range of their edema's width in mm) are dealt to the cases in turn, so that
    a few cases are balanced. Without ``grades`` there is no class, without ``boxes`` no box.
    """

    dataset_id: int
    name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    channels: tuple[Channel, ...]
    labels: Mapping[str, int]
    num_training: int
    num_test: int = 12
    integer: bool = False
    num_lesions: tuple[int, ...] = (1,)
    boxes: bool = False
    grades: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def folder_name(self) -> str:
        """Dataset971_DemoCT, for example."""
        return f"Dataset{self.dataset_id:03d}_{self.name}"

    def case_name(self, index: int) -> str:
        """Training cases are numbered from 0, test cases follow."""
        return f"{self.name.lower()}_{index:03d}"

    @property
    def dataset_json(self) -> dict[str, Any]:
        """Content of its dataset.json."""
        tasks: dict[str, Any] = {"segmentation": True}
        if self.grades:
            tasks["classification"] = {"file": CLASSIFICATION_FILE, "column": GRADE, "classes": list(self.grades)}
        if self.boxes:
            tasks["detection"] = {"file": DETECTION_FILE, "classes": ["lesion"]}
        return {
            "channel_names": {str(number): channel.name for number, channel in enumerate(self.channels)},
            "labels": dict(self.labels),
            "numTraining": self.num_training,
            "file_ending": FILE_ENDING,
            "description": "Synthetic example data of nnunet_kd.",
            **({BLOCK: {"tasks": tasks}} if len(tasks) > 1 else {}),
        }

    @property
    def tasks(self) -> Tasks:
        """What it has labels for."""
        return Tasks.from_dataset_json(self.dataset_json)


@dataclass(frozen=True)
class Case:
    """One synthetic case: image channels and label map, [Z, Y, X] each; lesion boxes [N, 6] in array order; grade."""

    images: list[NDArray[np.generic]]
    labels: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    grade: str | None


DOMAINS = (
    Domain(
        dataset_id=971,
        name="DemoCT",
        shape=(12, 32, 32),
        spacing_mm=(5.5, 2.2, 2.2),
        channels=(Channel("CT", air=-1000, tissue=30, organ=100, lesion=150, edema=100, noise=26),),
        labels={"background": 0, "organ": 1, "lesion": 2},
        num_training=16,
        integer=True,
        num_lesions=(1, 2, 0, 2),
        boxes=True,
    ),
    Domain(
        dataset_id=972,
        name="DemoT1",
        shape=(12, 32, 32),
        spacing_mm=(5.0, 2.0, 2.0),
        channels=(Channel("T1", air=20, tissue=420, organ=520, lesion=680, edema=520, noise=60, bias=0.2),),
        labels={"background": 0, "lesion": 1},
        num_training=6,
    ),
    Domain(
        dataset_id=973,
        name="DemoMR",
        shape=(12, 32, 32),
        spacing_mm=(5.8, 2.4, 2.4),
        channels=(
            Channel("T1", air=0, tissue=0.42, organ=0.55, lesion=0.72, edema=0.50, noise=0.06, bias=0.2),
            Channel("FLAIR", air=0, tissue=0.30, organ=0.40, lesion=0.75, edema=0.60, noise=0.07, bias=0.2),
        ),
        labels={"background": 0, "lesion": 1, "edema": 2},
        num_training=26,
        num_test=20,
        grades={"low": (2.5, 3.5), "high": (8.0, 10.0)},
    ),
)


def write_domains(raw_folder: Path, domains: tuple[Domain, ...] = DOMAINS, seed: int = 0) -> None:
    """Write the domains as nnU-Net raw datasets with imagesTr, labelsTr, imagesTs and labelsTs.

    Grades and boxes of the training cases lie beside dataset.json, those of the test cases in labelsTs. The same
    arguments write the same voxels. dataset.json comes last, so a domain that has one is complete and is kept.
    """
    for domain in domains:
        folder = raw_folder / domain.folder_name
        if (folder / "dataset.json").is_file():
            continue
        for subfolder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
        training = range(domain.num_training)
        test = range(domain.num_training, domain.num_training + domain.num_test)
        for split, indices, side_folder in (("Tr", training, folder), ("Ts", test, folder / "labelsTs")):
            cases = {}
            for index in indices:
                case = make_case(domain, np.random.default_rng([seed, domain.dataset_id, index]), index)
                name = domain.case_name(index)
                for number, image in enumerate(case.images):
                    file = folder / f"images{split}" / f"{name}_{number:04d}{FILE_ENDING}"
                    write_image(image, domain.spacing_mm, file)
                write_image(case.labels, domain.spacing_mm, folder / f"labels{split}" / f"{name}{FILE_ENDING}")
                cases[name] = case
            _write_side_files(domain, cases, side_folder)
        write_json(folder / "dataset.json", domain.dataset_json)


def make_case(domain: Domain, random: np.random.Generator, index: int = 0) -> Case:
    """One case; ``index`` decides the number of its lesions and its grade."""
    grade = list(domain.grades)[index % len(domain.grades)] if domain.grades else None
    edema_width = EDEMA_WIDTH_MM if grade is None else random.uniform(*domain.grades[grade])
    num_lesions = domain.num_lesions[index % len(domain.num_lesions)]
    masks = draw_anatomy(domain.shape, domain.spacing_mm, random, num_lesions, edema_width)
    images: list[NDArray[np.generic]] = []
    for channel in domain.channels:
        image = _render(channel, masks, domain.spacing_mm, random)
        images.append(np.rint(image).astype(np.int16) if domain.integer else image.astype(np.float32))
    labels = np.zeros(domain.shape, np.uint8)
    for name in ("organ", "edema", "lesion"):  # from the outside to the inside
        if name in domain.labels:
            labels[masks[name]] = domain.labels[name]
    return Case(images, labels, lesion_boxes(masks["lesion"]), grade)


def lesion_boxes(lesion: Mask) -> NDArray[np.float64]:
    """Boxes [N, 6] around the connected parts of a mask, voxel edges in array order, end exclusive."""
    parts, _ = ndimage.label(lesion, np.ones((3, 3, 3)))
    found = ndimage.find_objects(parts)
    corners = [[*(axis.start for axis in part), *(axis.stop for axis in part)] for part in found]
    return np.array(corners, dtype=np.float64).reshape(-1, 6)


def draw_anatomy(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    random: np.random.Generator,
    num_lesions: int = 1,
    edema_width_mm: float = EDEMA_WIDTH_MM,
) -> dict[str, Mask]:
    """Masks [Z, Y, X] of body, organ, vessels, lesion and edema. The lesions lie in the organ, edema surrounds them."""
    extent = np.array(shape) * spacing_mm
    grid = grid_mm(shape, spacing_mm)
    body = ellipsoid(grid, random.normal(0, 1.0, 3), extent * random.uniform(0.44, 0.48, 3)) > 0
    organ_radii = extent * random.uniform(0.29, 0.35, 3)
    organ_center = extent * random.uniform(-0.06, 0.06, 3)
    organ = ellipsoid(grid, organ_center, organ_radii) + 0.15 * smooth_noise(shape, spacing_mm, 8.0, random) > 0
    organ &= body
    lesion = np.zeros(shape, bool)
    for _ in range(num_lesions):
        for _ in range(NUM_PLACES):
            # A uniform point of the inner organ: far from its border, so that most of the lesion lies inside.
            direction = random.normal(size=3)
            direction *= random.uniform() ** (1 / 3) / np.linalg.norm(direction)
            center = organ_center + (0.55 if num_lesions == 1 else 0.8) * organ_radii * direction
            drawn = draw_lesion(shape, spacing_mm, center, random) & body
            if not (drawn & ndimage.binary_dilation(lesion, np.ones((3, 3, 3)))).any():
                lesion |= drawn
                break
    organ |= lesion
    vessels = np.zeros(shape, bool)
    for _ in range(int(random.integers(3, 6))):
        vessels |= _vessel(grid, organ_center + organ_radii * random.uniform(-0.8, 0.8, 3), random)
    near = np.zeros(shape, bool)
    if lesion.any():
        near = ndimage.distance_transform_edt(~lesion, sampling=spacing_mm) <= edema_width_mm
    return {
        "body": body,
        "organ": organ,
        "vessels": vessels & organ & ~lesion,
        "lesion": lesion,
        "edema": near & ~lesion & body,
    }


def draw_lesion(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], center_mm: Array, random: np.random.Generator
) -> Mask:
    """An irregular blob: an ellipsoid whose surface is moved by smooth noise; its largest connected part.

    ``center_mm`` is relative to the middle of the image.
    """
    radius = random.uniform(*LESION_RADIUS_MM)
    radii = radius * random.uniform(0.75, 1.25, 3)
    level = ellipsoid(grid_mm(shape, spacing_mm), center_mm, radii)
    blob = level + LESION_ROUGHNESS * smooth_noise(shape, spacing_mm, ROUGHNESS_SCALE_MM, random) > 0
    parts, num_parts = ndimage.label(blob)
    if num_parts == 0:
        return level == level.max()
    return parts == 1 + int(np.argmax(ndimage.sum_labels(blob, parts, range(1, num_parts + 1))))


def _render(
    channel: Channel, masks: Mapping[str, Mask], spacing_mm: tuple[float, float, float], random: np.random.Generator
) -> Array:
    """Intensities of one channel: tissues, partial volume, bias field, noise."""
    image = np.full(masks["body"].shape, channel.air, float)
    image[masks["body"]] = channel.tissue
    image[masks["organ"]] = channel.organ
    image[masks["edema"] & masks["organ"]] = channel.edema
    image[masks["vessels"] | masks["lesion"]] = channel.lesion
    image = ndimage.gaussian_filter(image, [0.7 / step for step in spacing_mm])
    image *= 1 + channel.bias * smooth_noise(image.shape, spacing_mm, 18.0, random)
    return image + random.normal(0, channel.noise, image.shape)


def grid_mm(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> Array:
    """Position of every voxel in mm from the middle of the image, [Z, Y, X, 3]."""
    axes = [(np.arange(size) - (size - 1) / 2) * step for size, step in zip(shape, spacing_mm, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def ellipsoid(grid: Array, center: Array, radii: Array) -> Array:
    """1 in the middle, 0 on the surface, negative outside; linear in the distance along any ray."""
    return 1 - np.linalg.norm((grid - center) / radii, axis=-1)


def _vessel(grid: Array, point: Array, random: np.random.Generator) -> Mask:
    """A straight tube of 2 to 3 mm radius through ``point`` in a random direction."""
    direction = random.normal(size=3)
    direction /= np.linalg.norm(direction)
    offset = grid - point
    along = offset @ direction
    distance = np.linalg.norm(offset - along[..., None] * direction, axis=-1)
    return distance <= random.uniform(2.0, 3.0)


def smooth_noise(
    shape: tuple[int, ...], spacing_mm: tuple[float, ...], scale_mm: float, random: np.random.Generator
) -> Array:
    """Gaussian noise smoothed over ``scale_mm``, with mean 0 and standard deviation 1 over the image."""
    noise = ndimage.gaussian_filter(random.normal(size=shape), [scale_mm / step for step in spacing_mm], mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _write_side_files(domain: Domain, cases: Mapping[str, Case], folder: Path) -> None:
    if domain.grades:
        rows = [f"case,{GRADE}", *(f"{name},{case.grade}" for name, case in cases.items())]
        (folder / CLASSIFICATION_FILE).write_text("\n".join(rows) + "\n")
    if domain.boxes:
        boxes = {name: CaseBoxes(np.zeros(len(case.boxes), np.int64), case.boxes) for name, case in cases.items()}
        write_boxes(folder / DETECTION_FILE, boxes, ["lesion"])


def write_image(array: NDArray[np.generic], spacing_mm: tuple[float, float, float], path: Path) -> None:
    """Write voxels [Z, Y, X]."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(step) for step in reversed(spacing_mm)])
    sitk.WriteImage(image, str(path))
