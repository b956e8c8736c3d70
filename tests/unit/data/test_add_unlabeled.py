from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from filelock import FileLock
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from PIL import Image

from nnunet_kd.cli.add_unlabeled import main
from nnunet_kd.data.add_unlabeled import Added, add_unlabeled, added_cases, added_folder, check_added
from nnunet_kd.data.member import Member
from nnunet_kd.errors import JointDatasetError, UnlabeledError

NAME = "Dataset005_Toy"
CHANNELS = ("T1", "FLAIR")
RESAMPLING = {"order": 1, "order_z": 0, "force_separate_z": None}


def plans(reader: str, num_channels: int, median: Sequence[float]) -> dict[str, Any]:
    """Plans as nnU-Net writes them, as far as preprocessing and the label manager read them."""
    shared = {
        "preprocessor_name": "DefaultPreprocessor",
        "architecture": {"network_class_name": "torch.nn.Identity", "arch_kwargs": {}, "_kw_requires_import": []},
        "batch_size": 2,
        "normalization_schemes": ["ZScoreNormalization"] * num_channels,
        "use_mask_for_norm": [False] * num_channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, **RESAMPLING},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, **RESAMPLING},
    }
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(median),
        "image_reader_writer": reader,
        "transpose_forward": [1, 0, 2] if median[0] < 999 else [0, 1, 2],
        "transpose_backward": [1, 0, 2] if median[0] < 999 else [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(num_channels)},
        "configurations": {
            "2d": {**shared, "data_identifier": "nnUNetPlans_2d", "patch_size": [8, 8], "spacing": list(median[1:])},
            "3d_fullres": {
                **shared,
                "data_identifier": "nnUNetPlans_3d_fullres",
                "patch_size": [8, 8, 8],
                "spacing": [1.25, 1.5, 1.0],
            },
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }


class Toy:
    """A raw and preprocessed dataset, and a folder of images without labels; a test may spoil all of it."""

    def __init__(self, root: Path, make_dataset: Callable[..., Path], reader: str, **arguments: Any) -> None:
        self.make_dataset, self.arguments = make_dataset, arguments
        self.reader = reader
        self.raw = make_dataset(root / "raw", 5, "Toy", num_cases=2, **arguments)
        self.base = root / "preprocessed" / NAME
        self.images = root / "unlabeled"
        self.root = root
        self.dataset_json = json.loads((self.raw / "dataset.json").read_text())
        self.ending = self.dataset_json["file_ending"]
        self.draw(3)

    def draw(self, num_cases: int, seed: int = 1) -> None:
        """Put images new_000 and on into the input folder."""
        folder = self.make_dataset(self.root / "drawn", 5, "New", num_cases=num_cases, seed=seed, **self.arguments)
        shutil.rmtree(self.images, ignore_errors=True)
        shutil.move(folder / "imagesTr", self.images)

    def plan(self, num_channels: int, median: Sequence[float]) -> None:
        """Write the plans, and preprocess the labelled cases with stock nnU-Net."""
        self.base.mkdir(parents=True)
        shutil.copy(self.raw / "dataset.json", self.base)
        self.write_plans(plans(self.reader, num_channels, median))
        # not in this process: blosc2 would start threads, and what is forked later would come to grief
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context()) as pool:
            list(pool.map(DefaultPreprocessor(verbose=False).run_case_save, *zip(*self.labeled_cases(), strict=True)))

    def labeled_cases(self) -> Iterator[tuple[Any, ...]]:
        """What stock nnU-Net's preprocessor is called with."""
        for member in (self.member("2d"), self.member("3d_fullres")):
            member.data_folder.mkdir()
            for case in ("toy_000", "toy_001"):
                yield (
                    str(member.data_folder / case),
                    [str(file) for file in sorted((self.raw / "imagesTr").glob(f"{case}_*"))],
                    str(self.raw / "labelsTr" / f"{case}{self.ending}"),
                    member.plans_manager,
                    member.configuration_manager,
                    self.dataset_json,
                )

    def write_plans(self, content: dict[str, Any], name: str = "nnUNetPlans") -> None:
        (self.base / f"{name}.json").write_text(json.dumps(content))

    def member(self, configuration: str = "3d_fullres", plans_name: str = "nnUNetPlans") -> Member:
        return Member(NAME, plans_name, configuration)

    def add(self, *configurations: str, plans_name: str = "nnUNetPlans") -> list[Added]:
        members = [self.member(own, plans_name) for own in configurations or ("3d_fullres",)]
        return add_unlabeled(members, self.images, 1, show_progress=False)

    def refused(self, *configurations: str) -> str:
        """The message of the refusal, after which nothing is written."""
        before = snapshot(self.root)
        with pytest.raises(UnlabeledError) as error:
            self.add(*configurations)
        assert snapshot(self.root) == before
        return str(error.value)

    def file(self, case: str, channel: int = 0) -> Path:
        return self.images / f"{case}_{channel:04d}{self.ending}"


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def make_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_dataset: Callable[..., Path]) -> Callable[..., Toy]:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    # a spawned process imports nnU-Net for seconds; these are forked from one that has done so and nothing else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nnunet_kd.data.add_unlabeled"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context)
    return lambda reader, **arguments: Toy(tmp_path, make_dataset, reader, **arguments)


@pytest.fixture
def toy(make_toy: Callable[..., Toy]) -> Toy:
    """Two channels, 3D; the plans transpose the first two axes."""
    toy = make_toy("SimpleITKIO", channels=CHANNELS, shape=(8, 14, 12), spacing=(2.0, 1.0, 1.0))
    toy.plan(2, (1.0, 2.0, 1.0))
    return toy


@pytest.fixture
def colour(make_toy: Callable[..., Toy]) -> Toy:
    """2D colour images, all channels in one file."""
    toy = make_toy("NaturalImage2DIO", dimension=2, shape=(20, 24))
    for folder in (toy.raw / "imagesTr", toy.images):
        for file in folder.iterdir():
            gray = np.array(Image.open(file))
            Image.fromarray(np.stack([gray, gray[::-1], gray[:, ::-1]], -1)).save(file)
    toy.dataset_json["channel_names"] = {"0": "R", "1": "G", "2": "B"}
    (toy.raw / "dataset.json").write_text(json.dumps(toy.dataset_json))
    toy.plan(3, (999.0, 1.0, 1.0))
    return toy


def rewrite(file: Path, change: Callable[[sitk.Image], Any]) -> None:
    """Change an image file; ``change`` returns the new image, or None where it changed the old one."""
    image = sitk.ReadImage(str(file))
    changed = change(image)
    sitk.WriteImage(image if changed is None else changed, str(file))


def change_voxel(file: Path) -> None:
    """Another image in a file of the same length."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


# --- what is written --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_an_added_image_is_what_stock_preprocessing_makes_of_it_with_its_label(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, configuration: str
) -> None:
    """The label changes neither crop nor intensities; so a labelled case under another name tells what is right."""
    monkeypatch.delenv("nnUNet_raw")
    shutil.rmtree(toy.images)
    toy.images.mkdir()
    for channel in range(2):
        shutil.copy(toy.raw / "imagesTr" / f"toy_001_{channel:04d}.nii.gz", toy.file("again", channel))
    before = snapshot(toy.root)
    (report,) = toy.add(configuration)

    member = toy.member(configuration)
    folder = toy.base / "nnunet_kd_unlabeled" / f"nnUNetPlans_{configuration}"
    assert report.folder == added_folder(member) == folder
    assert (report.num_added, report.num_skipped, added_cases(member)) == (1, 0, ["again"])
    assert {file.name for file in folder.iterdir() if file.is_file()} == {"again.b2nd", "again_seg.b2nd", "again.pkl"}
    image, segmentation, _, properties = infer_dataset_class(str(folder))(str(folder)).load_case("again")
    stock_image, stock_segmentation, _, stock = member.dataset_class(str(member.data_folder)).load_case("toy_001")
    np.testing.assert_array_equal(image[:], stock_image[:])
    np.testing.assert_array_equal(segmentation[:], np.minimum(stock_segmentation[:], 0))
    assert (image.dtype, segmentation.dtype) == (stock_image.dtype, stock_segmentation.dtype)
    assert (image.chunks, image.blocks) == (stock_image.chunks, stock_image.blocks)
    assert properties["class_locations"] == {}
    assert {key: properties[key] for key in stock if key != "class_locations"} == {
        key: value for key, value in stock.items() if key != "class_locations"
    }
    after = snapshot(toy.root)
    assert {file: after[file] for file in before} == before
    assert all(str(folder.parent) in file for file in set(after) - set(before))


def test_colour_images_of_one_file_are_added(colour: Toy) -> None:
    (report,) = colour.add("2d")
    assert (report.num_added, report.num_skipped) == (3, 0)
    image = infer_dataset_class(str(report.folder))(str(report.folder)).load_case("new_000")[0][:]
    red, green, _ = image[:, 0]
    assert image.shape == (3, 1, 20, 24)
    np.testing.assert_allclose(green, red[::-1], atol=1e-6)  # as the fixture drew them


def test_no_cases_where_nothing_was_added(toy: Toy) -> None:
    assert added_cases(toy.member()) == []
    check_added(toy.member())


def test_a_rerun_adds_what_is_new_and_leaves_the_rest(toy: Toy) -> None:
    for channel in range(2):
        shutil.move(toy.file("new_002", channel), toy.root)
    toy.add()
    before = snapshot(toy.base)
    for channel in range(2):
        shutil.move(toy.root / toy.file("new_002", channel).name, toy.images)
    (report,) = toy.add()
    after = snapshot(toy.base)
    assert (report.num_added, report.num_skipped) == (1, 2)
    assert added_cases(toy.member()) == ["new_000", "new_001", "new_002"]
    assert {file: after[file] for file in before} == before


def test_configurations_are_added_together_and_shared_data_once(toy: Toy) -> None:
    content = json.loads((toy.base / "nnUNetPlans.json").read_text())
    content["configurations"]["3d_large"] = {"inherits_from": "3d_fullres", "patch_size": [16, 16, 16]}
    toy.write_plans(content)
    toy.add("2d")
    report = toy.add("2d", "3d_fullres", "3d_large")
    assert [(own.member.configuration, own.num_added, own.num_skipped) for own in report] == [
        ("2d", 0, 3),
        ("3d_fullres", 3, 0),
    ]


def test_half_a_case_is_no_case_and_is_written_anew(toy: Toy) -> None:
    """What a kill leaves: image files in place without their properties, and a file aside that was being written."""
    toy.add()
    folder = added_folder(toy.member())
    stored = (folder / "new_001.b2nd").read_bytes()
    right = infer_dataset_class(str(folder))(str(folder)).load_case("new_001")[0][:]
    (folder / "new_001.pkl").unlink()
    (folder / "new_001.b2nd").write_bytes(stored[:100])
    (folder / ".temporary" / "new_001.77").mkdir(parents=True)
    (folder / ".temporary" / "new_001.77" / "new_001.b2nd").write_bytes(stored[:50])
    assert added_cases(toy.member()) == ["new_000", "new_002"]
    (report,) = toy.add()
    assert (report.num_added, report.num_skipped) == (1, 2)
    image, *_ = infer_dataset_class(str(folder))(str(folder)).load_case("new_001")
    assert image.shape == (2, 11, 11, 12)  # 14, 8, 12 voxels of 1, 2, 1 mm as voxels of 1.25, 1.5, 1 mm
    np.testing.assert_array_equal(image[:], right)
    assert not (folder / ".temporary").exists()


# --- errors while preprocessing ---------------------------------------------------------------------------------------
def test_an_image_that_breaks_off_is_named_and_the_others_are_kept(toy: Toy) -> None:
    file = toy.file("new_001", 1)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # SimpleITK reads it, with zeros in the place of what is missing
    with pytest.raises(
        UnlabeledError, match=r"1 of 3 cases could not be preprocessed for 3d_fullres of Dataset005_Toy"
    ):
        toy.add()
    assert added_cases(toy.member()) == ["new_000", "new_002"]
    with pytest.raises(UnlabeledError, match=r"new_001 \(new_001_0000.nii.gz, new_001_0001.nii.gz\): EOFError"):
        toy.add()
    file.write_bytes(whole)
    (report,) = toy.add()
    assert (report.num_added, report.num_skipped) == (1, 2)


def test_values_that_are_not_finite_are_refused(make_toy: Callable[..., Toy]) -> None:
    """Not of .nii.gz, where ITK reads them as zeros."""
    toy = make_toy("SimpleITKIO", shape=(8, 14, 12), spacing=(2.0, 1.0, 1.0), file_ending=".mha")
    toy.plan(1, (1.0, 2.0, 1.0))

    def spoil(image: sitk.Image) -> sitk.Image:
        voxels = sitk.GetArrayFromImage(image).astype(np.float32)
        voxels[3, 4, 5] = np.nan
        spoiled = sitk.GetImageFromArray(voxels)
        spoiled.CopyInformation(image)
        return spoiled

    rewrite(toy.file("new_001"), spoil)
    with pytest.raises(UnlabeledError, match=r"new_001 .*: ValueError: the image has values that are not finite"):
        toy.add()
    assert added_cases(toy.member()) == ["new_000", "new_002"]
    assert not (added_folder(toy.member()) / "new_001.b2nd").exists()


def test_a_case_whose_files_cannot_be_put_in_place_is_not_finished(toy: Toy) -> None:
    (added_folder(toy.member()) / "new_001_seg.b2nd").mkdir(parents=True)
    with pytest.raises(UnlabeledError, match=r"new_001 .*: IsADirectoryError"):
        toy.add()
    assert added_cases(toy.member()) == ["new_000", "new_002"]


def test_a_process_that_is_killed_is_said_and_its_case_named(toy: Toy) -> None:
    for channel in range(2):
        rewrite(toy.file("new_001", channel), lambda image: sitk.Expand(image, [12, 12, 12]))
    folder = added_folder(toy.member())

    def kill() -> None:
        while not list(folder.glob(".temporary/new_001.*")):
            time.sleep(0.01)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UnlabeledError, match=r"killed while it preprocessed one of new_001 .*smaller -np \(it was 1\)"):
        toy.add()
    killer.join()
    assert added_cases(toy.member()) == ["new_000"]
    assert infer_dataset_class(str(folder)).__name__ == "nnUNetDatasetBlosc2"


def test_two_runs_at_once_are_refused(toy: Toy) -> None:
    folder = added_folder(toy.member())
    folder.mkdir(parents=True)
    with (
        FileLock(folder.parent / f".{folder.name}.lock"),
        pytest.raises(UnlabeledError, match="Another process is adding images"),
    ):
        toy.add()


# --- the folder -------------------------------------------------------------------------------------------------------
def test_a_folder_without_such_images_says_what_is_there(toy: Toy) -> None:
    shutil.rmtree(toy.images)
    assert f"{toy.images} is not a folder. Name the folder of the images with -i" in toy.refused()
    toy.images.mkdir()
    assert "no image is named CASE_0000.nii.gz" in toy.refused()
    assert "(the folder is empty)" in toy.refused()
    for name in ("a_0000.nrrd", "b_0000.nii", "list.txt"):
        (toy.images / name).touch()
    assert "(the files there end with .nii, .nrrd, .txt)" in toy.refused()


def test_files_that_would_be_overlooked_are_named(toy: Toy) -> None:
    shutil.copy(toy.file("new_000"), toy.images / "scan.nii.gz")
    shutil.copy(toy.file("new_000"), toy.images / "other_0000.mha")
    (toy.images / "gone_0000.nii.gz").symlink_to(toy.root / "nothing.nii.gz")
    for channel in range(2):
        toy.file("new_001", channel).rename(toy.file("new_seg", channel))
    (toy.images / "notes_2024.txt").touch()
    message = toy.refused()
    assert "scan.nii.gz is not named CASE_0000.nii.gz, as training images are. Rename it" in message
    assert "other_0000.mha does not end with .nii.gz. Convert it, or move it away" in message
    assert "gone_0000.nii.gz is a link to nothing" in message
    assert "new_seg: nnU-Net takes a name that ends with _seg for a segmentation" in message
    assert len(message.splitlines()) == 5


# --- channels ---------------------------------------------------------------------------------------------------------
def test_missing_and_additional_channels_are_named(toy: Toy) -> None:
    toy.file("new_000", 1).unlink()
    toy.file("new_001", 0).unlink()
    shutil.copy(toy.file("new_002", 1), toy.file("new_002", 2))
    message = toy.refused()
    assert "new_000 lacks the channels FLAIR (new_000_0001.nii.gz)" in message
    assert "new_001 lacks the channels T1 (new_001_0000.nii.gz)" in message
    assert "new_002_0002.nii.gz: Dataset005_Toy has no such channel; it has T1, FLAIR" in message
    assert len(message.splitlines()) == 4


def test_a_fourth_axis_holds_channels(toy: Toy) -> None:
    """As in nnU-Net: one file with two channels is as good, with three it is not."""
    for case, num_channels in (("new_000", 2), ("new_001", 3)):
        images = [sitk.ReadImage(str(toy.file(case, min(channel, 1)))) for channel in range(num_channels)]
        toy.file(case, 1).unlink()
        sitk.WriteImage(sitk.JoinSeries(images), str(toy.file(case)))
    message = toy.refused()
    assert "new_001 has 3 channels in the files new_001_0000.nii.gz; Dataset005_Toy has 2 (T1, FLAIR)" in message
    assert len(message.splitlines()) == 2
    toy.file("new_001").unlink()
    (report,) = toy.add()
    assert report.num_added == 2


def test_colours_that_do_not_fit_are_named(colour: Toy) -> None:
    Image.fromarray(np.array(Image.open(colour.file("new_000")))[..., 0]).save(colour.file("new_000"))
    Image.open(colour.file("new_001")).convert("RGBA").save(colour.file("new_001"))
    colour.file("new_002").write_text("no image")
    message = colour.refused("2d")
    assert "new_000 lacks the channels G (new_000_0001.png), B (new_000_0002.png)" in message
    assert "new_001 has 4 channels in the files new_001_0000.png; Dataset005_Toy has 3 (R, G, B)" in message
    assert "new_002_0000.png cannot be read" in message
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_channels_that_do_not_lie_on_each_other_are_named(make_toy: Callable[..., Toy], reader: str) -> None:
    toy = make_toy(reader, channels=CHANNELS, shape=(8, 14, 12), spacing=(2.0, 1.0, 1.0))
    toy.plan(2, (1.0, 2.0, 1.0))
    toy.draw(5)
    angle = 0.1
    turned = (np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1)
    rewrite(toy.file("new_000", 1), lambda image: image[:, :, 1:])
    rewrite(toy.file("new_001", 1), lambda image: image.SetSpacing((1.0, 1.0, 2.1)))
    rewrite(toy.file("new_002", 1), lambda image: image.SetOrigin((0.0, 5.0, 0.0)))
    rewrite(toy.file("new_003", 1), lambda image: image.SetDirection(turned))
    rewrite(toy.file("new_004", 1), lambda image: image.SetOrigin((0.0, 1e-3, 0.0)))  # rounding
    lines = toy.refused().splitlines()[1:]
    for case, differing in (("new_000", "size 8 x 14 x 12 and 7 x 14 x 12"), ("new_001", "spacing 2 x 1 x 1 and 2.1")):
        (line,) = [line for line in lines if line.startswith(f"  {case}_0000.nii.gz and {case}_0001.nii.gz are")]
        assert differing in line
        if case == "new_001":
            assert "size" not in line
    assert [word in lines[2] for word in ("size", "spacing", "origin", "direction")] == [False, False, True, False]
    assert "direction" in lines[3]
    assert len(lines) == 4


# --- dimension and units ----------------------------------------------------------------------------------------------
def test_another_dimension_is_named(toy: Toy) -> None:
    for channel in range(2):
        rewrite(toy.file("new_001", channel), lambda image: image[:, :, 3])
    message = toy.refused()
    for channel in range(2):
        assert f"new_001_000{channel}.nii.gz has 2 dimensions, the images of Dataset005_Toy have 3" in message
    assert len(message.splitlines()) == 3


def test_2d_files_with_a_spacing_are_compared_in_plane(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy("SimpleITKIO", channels=("X-ray",), shape=(6, 20, 24), file_ending=".mha")
    for folder in (toy.raw / "imagesTr", toy.raw / "labelsTr", toy.images):
        for file in folder.iterdir():
            rewrite(file, lambda image: image[:, :, 3])
    toy.plan(1, (999.0, 1.0, 1.0))
    rewrite(toy.file("new_000"), lambda image: image.SetSpacing((0.2, 0.2)))
    assert toy.add("2d")[0].num_added == 3
    toy.draw(1)  # 3D
    assert "new_000_0000.mha has 3 dimensions, the images of Dataset005_Toy have 2" in toy.refused("3d_fullres")


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1e-3, "0.001 times that of Dataset005_Toy (median 1 x 2 x 1). It seems to be in other units (metres?)"),
     (1e3, "1e+03 times that of Dataset005_Toy (median 1 x 2 x 1). It seems to be in other units (micrometres?)"),
     (10, None), (0.1, None)],
)  # fmt: skip
def test_other_units_are_told_by_the_spacing(toy: Toy, factor: float, said: str | None) -> None:
    for channel in range(2):
        rewrite(toy.file("new_001", channel), lambda image: image.SetSpacing((factor, factor, 2 * factor)))
    shutil.copy(toy.file("new_000"), toy.images / "scan.nii.gz")  # so that there is a message in any case
    message = toy.refused()
    assert ("in other units" in message) == (said is not None)
    if said is not None:
        assert f"new_001_0000.nii.gz has the spacing {2 * factor:g} x {factor:g} x {factor:g}, {said}" in message


# --- labelled cases ---------------------------------------------------------------------------------------------------
def test_labelled_cases_are_refused_by_name_and_by_content(toy: Toy) -> None:
    for channel in range(2):
        toy.file("new_000", channel).rename(toy.file("toy_001", channel))  # another image, the same name
    copied = toy.raw / "imagesTr" / "toy_000_0001.nii.gz"
    shutil.copy(copied, toy.file("new_002", 1))
    message = toy.refused()
    assert "toy_001 is a labelled case of Dataset005_Toy and may be validated on" in message
    assert f"new_002_0001.nii.gz is a copy of {copied}, whose case is labelled" in message
    assert len(message.splitlines()) == 3
    (toy.member().data_folder / "toy_001.b2nd").unlink()  # labelled in nnUNet_raw, not preprocessed
    assert "toy_001 is a labelled case" in toy.refused()


def test_without_nnunet_raw_names_are_still_compared(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw")
    for channel in range(2):
        toy.file("new_000", channel).rename(toy.file("toy_001", channel))
    assert "toy_001 is a labelled case" in toy.refused()


def test_images_that_dataset_json_lists_elsewhere_are_labelled_too(toy: Toy) -> None:
    elsewhere = toy.root / "elsewhere"
    shutil.move(toy.raw / "imagesTr", elsewhere)
    toy.dataset_json["dataset"] = {
        case: {
            "images": [str(elsewhere / f"{case}_{channel:04d}.nii.gz") for channel in range(2)],
            "label": f"labelsTr/{case}.nii.gz",
        }
        for case in ("toy_000", "toy_001")
    }
    (toy.base / "dataset.json").write_text(json.dumps(toy.dataset_json))
    shutil.copy(elsewhere / "toy_000_0000.nii.gz", toy.file("new_001"))
    assert f"new_001_0000.nii.gz is a copy of {elsewhere / 'toy_000_0000.nii.gz'}" in toy.refused()


def test_a_blank_channel_makes_no_copy(toy: Toy) -> None:
    """Where a channel was not recorded, people put zeros: the same file in many cases, labelled or not."""
    blank = toy.raw / "imagesTr" / "toy_000_0001.nii.gz"
    rewrite(blank, lambda image: image * 0)
    shutil.copy(blank, toy.file("new_001", 1))
    assert toy.add()[0].num_added == 3


# --- what was added before --------------------------------------------------------------------------------------------
def test_another_image_under_the_same_name_is_refused(toy: Toy) -> None:
    toy.add()
    whole = toy.file("new_001", 1).read_bytes()
    change_voxel(toy.file("new_001", 1))
    folder = added_folder(toy.member())
    message = toy.refused()
    assert f"new_001 was added before from {toy.file('new_001')}, and this image is another one" in message
    assert f"delete {folder / 'new_001'}.pkl" in message
    assert len(message.splitlines()) == 2
    toy.file("new_001", 1).write_bytes(whole + b"\0")
    assert "new_001 was added before" in toy.refused()
    (folder / "new_001.pkl").unlink()  # as the message says
    toy.file("new_001", 1).write_bytes(whole)
    (report,) = toy.add()
    assert (report.num_added, report.num_skipped) == (1, 2)


def test_the_same_images_in_another_folder_are_the_same(toy: Toy) -> None:
    toy.add()
    shutil.copytree(toy.images, toy.root / "moved", copy_function=shutil.copyfile)
    shutil.rmtree(toy.images)
    toy.images = toy.root / "moved"
    assert toy.add()[0].num_skipped == 3


def test_the_spacing_file_of_a_3d_tif_belongs_to_the_image(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy("Tiff3DIO", shape=(8, 14, 12))
    for folder in (toy.raw / "imagesTr", toy.raw / "labelsTr", toy.images):
        for file in list(folder.iterdir()):
            name = file.name.removesuffix(".nii.gz")
            tifffile.imwrite(folder / f"{name}.tif", sitk.GetArrayFromImage(sitk.ReadImage(str(file))))
            (folder / f"{name.removesuffix('_0000')}.json").write_text(json.dumps({"spacing": [2, 1, 1]}))
            file.unlink()
    toy.ending = toy.dataset_json["file_ending"] = ".tif"
    (toy.raw / "dataset.json").write_text(json.dumps(toy.dataset_json))
    toy.plan(1, (1.0, 2.0, 1.0))
    assert toy.add()[0].num_added == 3
    (toy.images / "new_000.json").write_text(json.dumps({"spacing": [3, 1, 1]}))
    (toy.images / "new_001.json").unlink()
    message = toy.refused()
    assert "new_000 was added before" in message
    assert "new_001 was added before" in message
    (toy.images / "new_001.json").write_text(json.dumps({"spacing": [2, 1, 1]}))
    (added_folder(toy.member()) / "new_000.pkl").unlink()
    (toy.images / "new_000.json").write_text(json.dumps({"spacing": [2e-3, 1e-3, 1e-3]}))
    assert "in other units (metres?)" in toy.refused()


def test_changed_plans_are_said_with_what_changed(toy: Toy) -> None:
    toy.add()
    content = json.loads((toy.base / "nnUNetPlans.json").read_text())
    content["configurations"]["3d_fullres"]["spacing"] = [1.0, 1.0, 1.0]
    content["configurations"]["3d_fullres"]["normalization_schemes"] = ["NoNormalization"] * 2
    toy.write_plans(content)
    message = toy.refused()
    folder = added_folder(toy.member())
    assert f"{folder} holds 3 cases (new_000, new_001, new_002) that were preprocessed with other plans" in message
    assert "(spacing, normalization_schemes differ). Delete this folder and add all images again" in message
    with pytest.raises(UnlabeledError, match=r"no longer fit:\n.*other plans than nnUNetPlans are now"):
        check_added(toy.member())
    shutil.rmtree(folder)
    assert toy.add()[0].num_added == 3
    check_added(toy.member())


def test_other_plans_that_preprocess_alike_share_the_images(toy: Toy) -> None:
    toy.add()
    content = json.loads((toy.base / "nnUNetPlans.json").read_text())
    content["configurations"]["3d_fullres"] |= {"batch_size": 7, "patch_size": [4, 4, 4]}
    toy.write_plans({**content, "plans_name": "smaller", "nnunet_kd": {}}, "smaller")
    check_added(toy.member(plans_name="smaller"))
    assert toy.add(plans_name="smaller")[0].num_skipped == 3


def test_a_case_that_is_labelled_later_is_said(toy: Toy) -> None:
    toy.add()
    for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copy(toy.member().data_folder / f"toy_000{suffix}", toy.member().data_folder / f"new_001{suffix}")
    with pytest.raises(UnlabeledError, match="holds new_001, by now labelled in Dataset005_Toy"):
        check_added(toy.member())


def test_damaged_properties_are_named(toy: Toy) -> None:
    toy.add()
    file = added_folder(toy.member()) / "new_001.pkl"
    file.write_bytes(file.read_bytes()[:20])
    assert f"{file} is damaged" in toy.refused()


# --- dataset and plans ------------------------------------------------------------------------------------------------
def test_all_problems_are_told_at_once(toy: Toy) -> None:
    toy.file("new_000", 1).unlink()
    toy.file("new_001").rename(toy.file("toy_000"))
    toy.file("new_001", 1).write_bytes(b"no image")
    shutil.copy(toy.file("new_002"), toy.images / "scan.nii.gz")
    lines = toy.refused("2d", "3d_fullres").splitlines()
    assert lines[0] == f"The images in {toy.images} cannot be added:"
    assert [line.split()[0] for line in lines[1:]] == ["scan.nii.gz", "new_000", "new_001_0001.nii.gz", "toy_000"]


def test_what_cannot_be_preprocessed_for_is_refused(toy: Toy) -> None:
    with pytest.raises(NotImplementedError, match="second stage of a cascade and also needs the labels that 3d_lowres"):
        toy.add("3d_fullres", "3d_cascade_fullres")
    with pytest.raises(JointDatasetError, match="no configuration 3d_lowres in nnUNetPlans"):
        toy.add("3d_lowres")
    with pytest.raises(JointDatasetError, match=r"other.json does not exist. Run: nnUNetv2_plan_and_preprocess -d 005"):
        toy.add(plans_name="other")
    shutil.rmtree(toy.member().data_folder)
    with pytest.raises(JointDatasetError, match="no preprocessed images for 3d_fullres"):
        toy.add()
    (toy.base / "dataset.json").write_text(json.dumps({**toy.dataset_json, "nnunet_kd": {"members": []}}))
    assert "Dataset005_Toy is a joint dataset and has no images of its own" in toy.refused()


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command_says_what_it_did_and_what_comes_next(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-d", "5", "-i", str(toy.images), "-np", "2", "--disable_progress_bar", "-c"]
    main([*arguments, "2d"])
    main([*arguments, "2d", "3d_fullres"])
    printed = capsys.readouterr().out.splitlines()[4:]
    assert printed == [
        "Dataset005_Toy, 2d: added 0 cases without labels, skipped 3 that were there.",
        f"  They lie in {added_folder(toy.member('2d'))}",
        "Dataset005_Toy, 3d_fullres: added 3 cases without labels.",
        f"  They lie in {added_folder(toy.member())}",
        "Train with them:",
        "  nnUNetv2_train 005 2d FOLD -tr nnUNetTrainerDINOMix -p nnUNetPlans",
        "  nnUNetv2_train 005 3d_fullres FOLD -tr nnUNetTrainerDINOMix -p nnUNetPlans",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-d", "5", "-c", "3d_cascade_fullres"], "ERROR: 3d_cascade_fullres of Dataset005_Toy is the second stage"),
        (["-d", "5", "-c", "2d", "-i", "nowhere"], "nowhere is not a folder"),
        (["-d", "6", "-c", "2d"], "ERROR: There is no dataset with id 6"),
        (["-d", "5", "-c", "2d", "-np", "0"], "-np must be at least 1"),
    ],
)
def test_the_command_ends_with_the_message_alone(
    toy: Toy, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["-i", str(toy.images), *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
