"""A synthetic CT dataset of three organs whose voxels are as 100 to 10 to 1 (our design).

The small organ is a little brighter than the middle one, and than things of its own size that are no organ, so that
what makes it hard is how rare it is. It is data for class-imbalanced, semi-supervised segmentation; the demo's joint
teacher does not use it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nnunet_kd.demo.domains import FILE_ENDING, ellipsoid, grid_mm, smooth_noise, write_image
from nnunet_kd.files import write_json

DATASET = "Dataset974_DemoOrgans"
SHAPE, SPACING_MM = (28, 52, 52), (3.0, 2.0, 2.0)
LABELS = {"background": 0, "large": 1, "middle": 2, "small": 3}
AIR, TISSUE, NOISE = -1000.0, 30.0, 22.0
INTENSITY = {"large": 80.0, "middle": 140.0, "small": 180.0}
# centre and radii in mm, array order (z, y, x), before every case moves and scales them
ORGANS = {
    "large": ((0.0, -4.0, -16.0), (22.0, 20.0, 19.0)),
    "middle": ((-4.0, 8.0, 22.0), (11.0, 8.5, 8.5)),
    "small": ((12.0, 4.0, 20.0), (5.5, 3.6, 3.6)),
}
DISTRACTORS = 5  # of the small organ's size and the middle one's intensity, anywhere in the body


def write_organs(raw_folder: Path, num_cases: int = 60, seed: int = 0) -> None:
    """Write the dataset with imagesTr and labelsTr; dataset.json comes last, and a folder that has one is kept."""
    folder = raw_folder / DATASET
    if (folder / "dataset.json").is_file():
        return
    for subfolder in ("imagesTr", "labelsTr"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    for index in range(num_cases):
        image, labels = make_organs(np.random.default_rng([seed, index]))
        write_image(image, SPACING_MM, folder / "imagesTr" / f"organs_{index:03d}_0000{FILE_ENDING}")
        write_image(labels, SPACING_MM, folder / "labelsTr" / f"organs_{index:03d}{FILE_ENDING}")
    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": num_cases,
        "file_ending": FILE_ENDING,
        "description": "Synthetic organs of nnunet_kd, voxels as 100 to 10 to 1.",
    }
    write_json(folder / "dataset.json", description)


def make_organs(random: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image and labels [Z, Y, X] of one case."""
    grid, extent = grid_mm(SHAPE, SPACING_MM), np.array(SHAPE) * SPACING_MM
    body = ellipsoid(grid, random.normal(0, 1.0, 3), 0.49 * extent * random.uniform(0.95, 1.05, 3)) > 0
    moved, scaled = random.normal(0, 2.0, 3), random.uniform(0.9, 1.1, 3)
    labels = np.zeros(SHAPE, np.uint8)
    for name, (center, radii) in ORGANS.items():
        place = (np.array(center) + random.normal(0, 1.0, 3)) * scaled + moved
        level = ellipsoid(grid, place, np.array(radii) * scaled * random.uniform(0.9, 1.1, 3))
        labels[(level + 0.08 * smooth_noise(SHAPE, SPACING_MM, 5.0, random) > 0) & (labels == 0)] = LABELS[name]
    image = np.full(SHAPE, AIR)
    image[body] = TISSUE
    for _ in range(DISTRACTORS):
        place = random.uniform(-0.38, 0.38, 3) * extent
        thing = ellipsoid(grid, place, np.array(ORGANS["small"][1]) * random.uniform(0.9, 1.1, 3)) > 0
        image[thing & (labels == 0)] = INTENSITY["middle"]
    for name, intensity in INTENSITY.items():
        image[labels == LABELS[name]] = intensity
    return np.rint(image + random.normal(0, NOISE, SHAPE)).astype(np.int16), labels
