"""Prediction with a network of task codes: which segmentation, or the image of another domain (our design)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from nnunet_kd.environment import replaced
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.files import replacing
from nnunet_kd.networks.multitask import unwrapped
from nnunet_kd.networks.task_codes import TaskCodeNetwork


class _Channels:
    """Stands for a label manager while images are predicted: as many outputs as the image has channels."""

    def __init__(self, num_channels: int) -> None:
        self.num_segmentation_heads = num_channels


def choose_prediction(predictor: nnUNetPredictor, prediction: str, settings: Mapping[str, Any] | None = None) -> None:
    """Say what the predictor's network gives: "self", "seg", "two_step", or an image of "source" or "target".

    Args:
        predictor: Ready to predict.
        prediction: One of these.
        settings: Of the training, as its checkpoint has them; None does not look at them.

    Raises:
        NnUNetKDError: The model was not trained by nnUNetTrainerAdaIN, or without what is asked of it.
    """
    adversarial = 1 if settings is None else settings.get("adaptation", {}).get("adversarial", 1)
    if adversarial == 0 and prediction not in ("self", "seg"):
        raise NnUNetKDError(
            "This model was trained without translation ('adaptation.adversarial' is 0), so that it has no --translate "
            "and no --code two_step. Use --code self or seg."
        )
    network = unwrapped(predictor.network)
    if not isinstance(network, TaskCodeNetwork):
        raise NnUNetKDError(
            f"--code and --translate belong to models of nnUNetTrainerAdaIN; this one's network is a "
            f"{type(network).__name__}. Leave them out, or give another model with -m."
        )
    network.predicts = prediction


def translate_files(
    predictor: nnUNetPredictor,
    images: str | list[list[str]],
    output: Path,
    overwrite: bool,
    show_progress: bool,
    part: slice = slice(None),
) -> list[Path]:
    """Write every image in another domain, in the geometry and the range of intensities of the original.

    Args:
        predictor: See :func:`choose_prediction`.
        images: Folder, or channel files of every case.
        output: Existing folder; files are named as the originals.
        overwrite: Also translate cases that are there already.
        show_progress: Show a bar.
        part: Of the cases, where several calls share them.

    Returns:
        The files.

    Raises:
        NnUNetKDError: There are no images, or they lie in the output folder.
        NotImplementedError: nnU-Net reads these files by another class than SimpleITKIO and NaturalImage2DIO.
    """
    ending = predictor.dataset_json["file_ending"]
    cases = create_lists_from_splitted_dataset_folder(images, ending) if isinstance(images, str) else images
    if not cases:
        raise NnUNetKDError(f"There are no images CASE_0000{ending} in {images}. Name another folder with -i.")
    reader = predictor.plans_manager.image_reader_writer_class()
    if not isinstance(reader, (SimpleITKIO, NaturalImage2DIO)):
        raise NotImplementedError(
            f"Translated images cannot be written for the reader {type(reader).__name__}. Use files that nnU-Net reads "
            f"with SimpleITKIO (nii.gz, nrrd, mha) or NaturalImage2DIO (png, bmp, tif)."
        )
    inputs = {Path(file).resolve() for files in cases for file in files}
    if any((output / file.name).resolve() in inputs for file in inputs):
        raise NnUNetKDError(
            f"The output folder {output} is that of the images, which would be overwritten: translated images have the "
            f"names of the originals. Give another folder with -o."
        )
    written = []
    for files in tqdm(cases[part], desc="Translating", disable=not show_progress):
        paths = [output / Path(file).name for file in files]
        if overwrite or not all(path.is_file() for path in paths):
            original, properties = reader.read_images(files)
            _write(reader, paths, _translate(predictor, original, properties), original, properties)
        written += paths
    return written


def _translate(predictor: nnUNetPredictor, original: NDArray[np.float32], properties: dict[str, Any]) -> NDArray[Any]:
    """An image [C, *S] translated on its own grid; voxels outside nnU-Net's crop stay as they are."""
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(
        original, None, properties, plans, configuration, predictor.dataset_json
    )
    with replaced(predictor, label_manager=_Channels(len(original))):
        translated = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).float()
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = properties["shape_after_cropping_and_before_resampling"]
    current = list(configuration.spacing)
    current = current if len(current) == len(shape) else [spacing[0], *current]
    resampled = np.asarray(configuration.resampling_fn_data(translated.numpy(), shape, current, spacing))
    transposed = original.astype(np.float32).transpose([0, *(axis + 1 for axis in plans.transpose_forward)])
    cropped, mask, _ = crop_to_nonzero(transposed, None)
    normalised = preprocessor._normalize(
        cropped.copy(), mask, configuration, plans.foreground_intensity_properties_per_channel
    )
    everywhere = np.ones(shape, dtype=bool)
    inside = [mask[0] >= 0 if uses_mask else everywhere for uses_mask in configuration.use_mask_for_norm]
    channels = zip(resampled, normalised, cropped, inside, strict=True)
    restored = np.stack([_with_range(*channel) for channel in channels])
    whole = insert_crop_into_image(transposed, restored, properties["bbox_used_for_cropping"])
    return whole.transpose([0, *(axis + 1 for axis in plans.transpose_backward)])


def _with_range(
    image: NDArray[Any], normalised: NDArray[Any], original: NDArray[Any], inside: NDArray[np.bool_]
) -> NDArray[Any]:
    """Undo a channel's normalisation, which is linear up to clipping, by the line that it was on this image.

    Args:
        image: Normalised intensities to bring back, [*S].
        normalised: The original, normalised.
        original: As it was.
        inside: Voxels that were normalised; the others stay as they were.
    """
    before, after = original[inside].astype(np.float64), normalised[inside].astype(np.float64)
    unclipped = (after > after.min()) & (after < after.max()) if after.size else after.astype(bool)
    if unclipped.sum() > 1 and np.ptp(after[unclipped]) > 0:
        before, after = before[unclipped], after[unclipped]
    if not after.size or np.ptp(after) == 0:
        return original
    slope, offset = np.polyfit(after, before, 1)
    return np.where(inside, image * slope + offset, original)


def _write(
    reader: BaseReaderWriter,
    paths: Sequence[Path],
    image: NDArray[Any],
    original: NDArray[Any],
    properties: dict[str, Any],
) -> None:
    per_file = len(image) // len(paths)  # a colour image has several channels in one file
    for index, path in enumerate(paths):
        channels = image[index * per_file : (index + 1) * per_file]
        with replacing(path) as temporary:
            named = temporary.with_name(f"{temporary.stem}{path.name[path.name.index('.', 1) :]}")  # formats go by it
            if isinstance(reader, NaturalImage2DIO):
                whole = np.iinfo(np.uint8 if original.max() < 256 else np.uint16)
                pixels = np.rint(channels[:, 0]).clip(whole.min, whole.max).astype(whole.dtype)
                Image.fromarray(pixels[0] if per_file == 1 else pixels.transpose(1, 2, 0)).save(named)
            else:
                _write_itk(named, channels[0], properties["sitk_stuff"])
            named.replace(temporary)


def _write_itk(path: Path, voxels: NDArray[Any], geometry: dict[str, Any]) -> None:
    stored = voxels[0] if len(geometry["spacing"]) == 2 else voxels
    written = sitk.GetImageFromArray(stored.astype(np.float32))
    written.SetSpacing(geometry["spacing"])
    written.SetOrigin(geometry["origin"])
    written.SetDirection(geometry["direction"])
    sitk.WriteImage(written, str(path), True)
