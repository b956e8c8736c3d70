"""Miniatures of published layouts, and a runner of the real command that checks what every conversion must hold."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from numpy.typing import ArrayLike
from PIL import Image

from nnunet_kd.cli.convert import main
from nnunet_kd.data.verify import verify_dataset


@dataclass(frozen=True)
class Converted:
    """A converted dataset as it lies on the disk, and what the command printed."""

    folder: Path
    dataset_json: dict[str, Any]
    report: dict[str, Any]
    printed: str

    def image(self, name: str, channel: int = 0, side: str = "Tr") -> np.ndarray:
        return self.array(f"images{side}/{name}_{channel:04d}")

    def labels(self, name: str, side: str = "Tr") -> np.ndarray:
        return self.array(f"labels{side}/{name}")

    def array(self, relative: str) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(self.folder / (relative + self.dataset_json["file_ending"]))))

    def cases(self, part: str) -> list[str]:
        ending = self.dataset_json["file_ending"]
        return sorted(file.name.removesuffix(ending) for file in (self.folder / part).glob(f"*{ending}"))

    def table(self, where: str = "") -> dict[str, dict[str, str]]:
        with (self.folder / where / "classification.csv").open(newline="") as stream:
            return {row.pop("case"): row for row in csv.DictReader(stream)}

    def boxes(self, where: str = "") -> dict[str, list[tuple[str, list[float]]]]:
        content = json.loads((self.folder / where / "boxes.json").read_text())
        return {case: [(entry["label"], entry["box"]) for entry in entries] for case, entries in content.items()}

    @property
    def left_out(self) -> dict[str, str]:
        return {entry["name"]: entry["why"] for entry in self.report["left_out"]}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty nnUNet_raw that nnU-Net knows."""
    folder = tmp_path / "nnUNet_raw"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(folder))
    return folder


@pytest.fixture
def run(raw: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Converted]:
    """Run the command; assert that nnU-Net reads the result and that nnUNetKD_verify finds no problem."""

    def convert(name: str, source: Path, *arguments: str, processes: int = 1) -> Converted:
        capsys.readouterr()
        parts = ["-i", str(source), "-o", str(raw), "-np", str(processes), "--disable_progress_bar", *arguments]
        main([name, *parts])
        printed = capsys.readouterr().out
        match = re.search(rf"^(?:Wrote )?({raw}/Dataset\d{{3}}_\w+)(?::| was finished before)", printed, re.MULTILINE)
        assert match is not None
        folder = Path(match[1])
        dataset_json = json.loads((folder / "dataset.json").read_text())
        check(folder, dataset_json)
        return Converted(folder, dataset_json, json.loads((folder / "conversion_report.json").read_text()), printed)

    return convert


def check(folder: Path, dataset_json: dict[str, Any]) -> None:
    assert verify_dataset(folder.name, show_progress=False).problems == ()
    segmented = dataset_json.get("nnunet_kd", {}).get("tasks", {}).get("segmentation", True)
    reader = determine_reader_writer_from_dataset_json(dataset_json, verbose=False)()
    ending = dataset_json["file_ending"]
    first = f"_0000{ending}"
    cases = [file.name.removesuffix(first) for file in (folder / "imagesTr").glob(f"*{first}")]
    num_channels = len(dataset_json["channel_names"])
    assert len(cases) == dataset_json["numTraining"]
    assert len(list((folder / "imagesTr").iterdir())) == len(cases) * num_channels
    declared = {0}
    for value in dataset_json["labels"].values():
        declared.update([value] if isinstance(value, int) else value)
    for case in cases:
        files = [str(folder / "imagesTr" / f"{case}_{channel:04d}{ending}") for channel in range(num_channels)]
        images, properties = reader.read_images(files)
        assert images.shape[0] == num_channels
        if segmented:
            labels, own = reader.read_seg(str(folder / "labelsTr" / f"{case}{ending}"))
            assert labels.shape[1:] == images.shape[1:]
            assert own["spacing"] == properties["spacing"]
            assert set(np.unique(labels).tolist()) <= declared
    assert not (folder / ".conversion").exists()
    assert (folder / "labelsTr").exists() == segmented


@pytest.fixture
def fails(raw: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must end as a user error; return what it printed on stderr."""

    def convert(name: str, source: Path, *arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([name, "-i", str(source), "-o", str(raw), "-np", "1", "--disable_progress_bar", *arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return convert


@pytest.fixture
def volume() -> Callable[..., np.ndarray]:
    """Write a volume and return its array; without an array, numbers that differ in every voxel."""

    def write(
        path: Path,
        array: ArrayLike | None = None,
        spacing: Sequence[float] = (0.75, 0.75, 2.5),
        origin: Sequence[float] = (-10.0, 5.0, 7.5),
        direction: Sequence[float] = (1, 0, 0, 0, 1, 0, 0, 0, 1),
        dtype: type = np.int16,
    ) -> np.ndarray:
        own = np.arange(6 * 5 * 4).reshape(4, 5, 6) - 40 if array is None else np.asarray(array)
        image = sitk.GetImageFromArray(own.astype(dtype))
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection(direction)
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path))
        return own.astype(dtype)

    return write


@pytest.fixture
def labels() -> Callable[..., np.ndarray]:
    """A label array of the size of ``volume``'s own, with these values in one voxel each, the rest 0."""

    def make(*values: int, dtype: type = np.uint8) -> np.ndarray:
        array = np.zeros((4, 5, 6), dtype=dtype)
        array.ravel()[7 : 7 + len(values)] = values
        return array

    return make


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """Write a 2D image file and return its array; without an array, a ramp that depends on ``seed``."""

    def write(path: Path, array: ArrayLike | None = None, seed: int = 0, size: tuple[int, int] = (8, 10)) -> np.ndarray:
        own = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8) if array is None else np.array(array)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(own).save(path)
        return own

    return write


@pytest.fixture
def radiograph() -> Callable[..., np.ndarray]:
    """Write a DICOM file of one grey image and return its array."""

    def write(path: Path, array: ArrayLike, photometric: str = "MONOCHROME2") -> np.ndarray:
        own = np.asarray(array)
        image = sitk.GetImageFromArray(own[None])
        image.SetMetaData("0008|0060", "CR")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".dcm")
        sitk.WriteImage(image, str(temporary))
        content = temporary.read_bytes()
        assert b"MONOCHROME2 " in content  # ITK writes nothing else
        temporary.unlink()
        path.write_bytes(content.replace(b"MONOCHROME2 ", f"{photometric} ".encode()))
        return own

    return write


@pytest.fixture
def table() -> Callable[..., None]:
    """Write a CSV file from its lines."""

    def write(path: Path, *lines: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")

    return write
