"""Translated images: back in the range of the original, in its geometry."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from PIL import Image
from torch import nn

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.inference.task_codes import _with_range, _write, choose_prediction, translate_files


def test_a_linear_normalisation_is_undone_exactly() -> None:
    original = np.random.default_rng(0).uniform(20, 180, (1, 6, 5))
    everywhere = np.ones(original.shape, dtype=bool)
    normalised = (original - 70.0) / 12.5
    np.testing.assert_allclose(_with_range(normalised, normalised, original, everywhere), original)
    np.testing.assert_allclose(_with_range(normalised + 2, normalised, original, everywhere), original + 25)
    constant = np.full((1, 6, 5), 3.0)
    np.testing.assert_array_equal(_with_range(normalised, constant * 0, constant, everywhere), constant)


def test_clipped_voxels_do_not_bend_the_line() -> None:
    """As CT normalisation: values beyond the percentiles are clipped before they are scaled."""
    original = np.linspace(-1000, 1000, 400).reshape(1, 20, 20)
    normalised = (original.clip(-100, 300) - 80) / 50
    restored = _with_range(normalised, normalised, original, np.ones(original.shape, dtype=bool))
    np.testing.assert_allclose(restored, original.clip(-100, 300), atol=1e-6)


def test_only_voxels_that_were_normalised_change() -> None:
    """As z-score normalisation inside a mask."""
    original = np.zeros((1, 10, 10))
    original[:, 2:8, 2:8] = np.random.default_rng(0).normal(100, 10, (1, 6, 6))
    inside = original > 0
    normalised = np.where(inside, (original - 100) / 10, 0)
    restored = _with_range(normalised + 1, normalised, original, inside)
    np.testing.assert_allclose(restored, np.where(inside, original + 10, 0))


@pytest.mark.parametrize(("highest", "dtype"), [(255, np.uint8), (4095, np.uint16)])
def test_png_files_keep_their_depth_and_are_clipped(tmp_path: Path, highest: int, dtype: type) -> None:
    original = np.array([0, highest, 7, 9], dtype=np.float32).reshape(1, 1, 2, 2)
    image = np.array([-4.0, 1e6, 3.6, 9.0]).reshape(1, 1, 2, 2)
    _write(NaturalImage2DIO(), [tmp_path / "case_0000.png"], image, original, {})
    written = np.asarray(Image.open(tmp_path / "case_0000.png"))
    assert written.dtype == dtype
    assert written.ravel().tolist() == [0, np.iinfo(dtype).max, 4, 9]
    assert [file.name for file in tmp_path.iterdir()] == ["case_0000.png"]


def test_colours_are_one_file(tmp_path: Path) -> None:
    image = np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2)
    _write(NaturalImage2DIO(), [tmp_path / "case_0000.png"], image, image, {})
    read, _ = NaturalImage2DIO().read_images((str(tmp_path / "case_0000.png"),))
    np.testing.assert_array_equal(read, image)


def test_volumes_keep_their_geometry(tmp_path: Path) -> None:
    files = []
    for channel in range(2):
        stored = sitk.GetImageFromArray(np.random.default_rng(channel).normal(size=(3, 4, 5)).astype(np.float32))
        stored.SetSpacing((0.5, 0.75, 2.0))
        stored.SetOrigin((1.0, -2.0, 3.0))
        stored.SetDirection((0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
        files.append(tmp_path / f"in_{channel:04d}.nii.gz")
        sitk.WriteImage(stored, str(files[-1]))
    original, properties = SimpleITKIO().read_images([str(file) for file in files])
    written = [tmp_path / file.name.replace("in", "out") for file in files]
    _write(SimpleITKIO(), written, original + 1, original, properties)
    for before, after in zip(files, written, strict=True):
        first, second = sitk.ReadImage(str(before)), sitk.ReadImage(str(after))
        for name in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(second, name)() == pytest.approx(getattr(first, name)())
        np.testing.assert_allclose(sitk.GetArrayFromImage(second), sitk.GetArrayFromImage(first) + 1, rtol=1e-6)


def test_originals_are_never_overwritten(tmp_path: Path) -> None:
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.dataset_json = {"file_ending": ".png"}
    predictor.plans_manager = SimpleNamespace(image_reader_writer_class=NaturalImage2DIO)
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(image).save(tmp_path / "case_0000.png")
    for given in (str(tmp_path), [[str(tmp_path / "case_0000.png")]]):
        with pytest.raises(NnUNetKDError, match="would be overwritten"):
            translate_files(predictor, given, tmp_path, overwrite=True, show_progress=False)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "case_0000.png")), image)


def test_what_was_not_trained_is_refused() -> None:
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    for prediction in ("two_step", "source"):
        with pytest.raises(NnUNetKDError, match="trained without translation"):
            choose_prediction(predictor, prediction, {"adaptation": {"adversarial": 0.0}})


def test_codes_belong_to_adain_models() -> None:
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.network = nn.Conv2d(1, 1, 1)
    with pytest.raises(NnUNetKDError, match=r"belong to models of nnUNetTrainerAdaIN.*Conv2d"):
        choose_prediction(predictor, "seg")
