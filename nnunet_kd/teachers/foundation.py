"""A vision foundation model (DINOv3, DINOv2, any of timm) as a frozen teacher of features.

Established (arXiv 2602.07819): a frozen DINOv3 encoder and the mean squared error of features of length 1, which is
2 - 2 cos. Which slices, sizes, intensities and level, and the common grid: our design.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses import NEED_TARGET
from nnunet_kd.settings import Teacher as TeacherSettings
from nnunet_kd.settings import Term
from nnunet_kd.teachers.base import BatchTeacher, HiddenCases, Student
from nnunet_kd.teachers.foundation_model import DEFAULT_MODEL, build_foundation
from nnunet_kd.teachers.output import TeacherOutput
from nnunet_kd.teachers.precision import choose_bf16, cpu_has_bf16
from nnunet_kd.teachers.slices import Slices, coarsest_axis
from nnunet_kd.teachers.token_maps import FOLDER, TOKEN_SLICES, TOKENS, TokenMaps

SEEN = "num_natural"  # key of a batch: how many of its first samples are natural images, not mixed ones
SLICE_PERCENTILES = (0.01, 0.99)
SMALLEST_RANGE = 1e-6


class FoundationTeacher(BatchTeacher):
    """Patch tokens of slices of the first channel.

    A 3D patch is seen in K slices across its coarsest axis (K is a setting, their places are drawn anew for every
    batch), a 2D patch as it is. Intensities are brought to [0, 1] by :class:`IntensityRange`, repeated for the three
    colours, and resized so that the longer side has the size of the settings; both sides become multiples of the
    model's patch size.

    Raises:
        TeacherError: The model is unknown, or its weights cannot be had.
    """

    def __init__(self, name: str, settings: TeacherSettings, student: Student) -> None:
        super().__init__(name, settings, student)
        self.model = build_foundation(settings.model or DEFAULT_MODEL, settings.foundation)
        weights = settings.foundation.weights
        self.files = [] if weights is None else [Path(weights)]
        self.range = IntensityRange(student)
        spacing = student.configuration_manager.spacing
        self.axis = coarsest_axis(spacing) if len(spacing) == 3 else None
        self._bf16_undecided = self._use_bf16 = False

    @property
    def origin(self) -> str:
        """The model, and where its weights come from."""
        return self.model.note

    def check_term(self, term: Term, where: str) -> None:
        """Raise SettingsError for anything but features of natural images."""
        if term.on != "features":
            raise SettingsError(
                f"'{where}.on' is '{term.on}', but teacher '{self.name}' is a foundation model, which teaches features "
                f"only. Set it to 'features' and name 'levels', for example [\"encoder@1/16\"]."
            )
        if term.loss in NEED_TARGET or term.foreground_only:
            what = "foreground_only" if term.foreground_only else f"loss' = '{term.loss}"
            raise SettingsError(
                f"'{where}.{what}' asks which voxels belong to a class, and teacher '{self.name}' knows no classes. "
                f"Use 'cosine' or 'mse' on all patches."
            )
        if "mixed" in term.samples:
            raise SettingsError(
                f"'{where}.samples' has 'mixed', but teacher '{self.name}' sees natural images only. Remove it."
            )

    def feature_channels(self, levels: Sequence[str]) -> dict[str, int]:
        """The width of its tokens, at every level."""
        return dict.fromkeys(levels, self.model.channels)

    def load(
        self,
        device: torch.device,
        levels: Sequence[str],
        tasks: Collection[str],
        compile_network: bool,
        hidden: HiddenCases,
    ) -> None:
        """Move the model to ``device``; it has seen none of the student's cases that anybody knows of."""
        del tasks, hidden
        self.levels = tuple(levels)
        network = self.model.network.to(device)
        # every case has a size of its own, for which it would be compiled again
        is_compiled = compile_network and not self.settings.foundation.cache
        self.network = torch.compile(network) if is_compiled else network
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in self.model[3:5])
        self.colours = (mean, std)
        self._bf16_undecided = self.settings.precision == "auto" and device.type == "cpu" and cpu_has_bf16()

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], tasks: Collection[str]) -> TeacherOutput:
        """Tokens [B, C, K, h, w] of slices, or [B, C, h, w] of 2D patches, the same for every level."""
        del tasks
        image = batch["data"][: batch.get(SEEN), :1]
        if self.settings.foundation.cache and TOKENS in batch:
            return self._cached(batch, image)
        slices = self._draw(image)
        if self._bf16_undecided:
            self._bf16_undecided = False
            self._use_bf16, reason = choose_bf16(lambda use: self._teach_in(use, image, slices), regions=False)
            self.precision_note = f"teacher '{self.name}': {reason}"
        return self._teach_in(self._use_bf16, image, slices)

    def token_maps(self, sources: Mapping[str, tuple[Any, Sequence[Path]]], folder: Path) -> TokenMaps:
        """The tokens of whole cases, computed where they are missing; called after :meth:`load`.

        Args:
            sources: Case to the dataset that loads it and its preprocessed files.
            folder: Of the dataset in nnUNet_preprocessed; the maps have a folder in it for every model and size.
        """
        patch = list(self.student.configuration_manager.patch_size)
        plane = patch if self.axis is None else [side for axis, side in enumerate(patch) if axis != self.axis]
        size, multiple = self.settings.foundation.size, self.model.multiple
        scale = size / max(plane)

        def tokens_of(slices: Tensor) -> Tensor:
            slices = slices.to(self.colours[0].device)
            larger = [max(1, round(side * scale / multiple)) * multiple for side in slices.shape[2:]]
            return self._tokens_of(slices, larger, cpu_has_bf16() and self.settings.precision == "auto")

        data = self.student.configuration_manager.data_identifier
        colours = [float(value) for values in self.model[3:5] for value in values]
        seen = [self.model.note, self._digest(), multiple, colours, size, patch, self.axis, self.range.limits, data]
        name = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
        grid_of = partial(grid_size, size=size, multiple=multiple)
        maps = TokenMaps(folder / FOLDER / name, patch, self.axis, self.settings.foundation.slices, grid_of)
        maps.fill(sources, torch.no_grad()(tokens_of))
        return maps

    def _digest(self) -> str:
        """Of the code, if it is the user's own, and of the weights."""
        digest = hashlib.sha256(self.model.code.encode())
        for value in self.model.network.state_dict().values():
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _cached(self, batch: Mapping[str, Any], image: Tensor) -> TeacherOutput:
        """What a loader with token maps has brought."""
        tokens = batch[TOKENS].to(image.device, non_blocking=True).float()
        slices = None
        if self.axis is not None:
            indices = batch[TOKEN_SLICES].to(image.device, non_blocking=True)
            slices = Slices(self.axis, indices, image.shape[self.axis + 2])
        return TeacherOutput(features=dict.fromkeys(self.levels, tokens), slices=slices)

    def _draw(self, image: Tensor) -> Slices | None:
        if self.axis is None:
            return None
        count = self.settings.foundation.slices
        return Slices.draw(len(image), image.shape[self.axis + 2], count, self.axis, image.device)

    def _teach_in(self, use_bf16: bool, image: Tensor, slices: Slices | None) -> TeacherOutput:
        seen = image[:, :, None] if slices is None else slices.of_image(image)  # [B, 1, K, H, W]
        pixels = seen.transpose(1, 2).flatten(0, 1)
        multiple = self.model.multiple
        grid = grid_size(pixels.shape[2:], size=self.settings.foundation.size, multiple=multiple)
        tokens = self._tokens_of(pixels, [side * multiple for side in grid], use_bf16)
        tokens = tokens.unflatten(0, (len(image), -1)).transpose(1, 2)  # [B, C, K, h, w]
        tokens = tokens[:, :, 0] if slices is None else tokens
        return TeacherOutput(features=dict.fromkeys(self.levels, tokens), slices=slices)

    def _tokens_of(self, slices: Tensor, size: Sequence[int], use_bf16: bool) -> Tensor:
        """Slices [N, 1, H, W], seen in ``size`` -> tokens [N, C, h, w]."""
        pixels = interpolate(self.range(slices), list(size), mode="bilinear", antialias=True)
        mean, std = self.colours
        is_cuda = pixels.device.type == "cuda"
        dtype = torch.float16 if is_cuda else torch.bfloat16
        with torch.autocast(pixels.device.type, dtype=dtype, enabled=is_cuda or use_bf16):
            tokens: Tensor = self.network((pixels - mean) / std).float()
        return tokens


def grid_size(plane: Sequence[int], size: int, multiple: int) -> tuple[int, int]:
    """Tokens along height and width of a patch whose longer side is seen in ``size`` pixels."""
    height, width = (max(1, round(side * size / max(plane) / multiple)) for side in plane)
    return height, width


class IntensityRange:
    """Brings intensities, as the plans' normalisation left them, to [0, 1].

    CT: the 0.5th and 99.5th percentile of the plans' foreground become 0 and 1. Schemes that give a fixed range are
    taken as they are. Others (z-scores): per slice, its 1st and 99th percentile. Values outside are clipped.
    """

    def __init__(self, student: Student) -> None:
        scheme = student.configuration_manager.normalization_schemes[0]
        self.limits: tuple[float, float] | None = None
        if scheme == "CTNormalization":
            found = student.plans_manager.foreground_intensity_properties_per_channel["0"]
            low, high = found["percentile_00_5"], found["percentile_99_5"]
            self.limits = ((low - found["mean"]) / found["std"], (high - found["mean"]) / found["std"])
        elif scheme in ("RescaleTo01Normalization", "RGBTo01Normalization"):
            self.limits = (0.0, 1.0)

    def __call__(self, slices: Tensor) -> Tensor:
        """[N, 1, H, W] -> the same in [0, 1]."""
        if self.limits is None:
            values, places = slices.flatten(1).float().sort(dim=1)[0], SLICE_PERCENTILES
            low, high = (values[:, round(place * (values.shape[1] - 1))].view(-1, 1, 1, 1) for place in places)
            return ((slices - low) / (high - low).clamp(min=SMALLEST_RANGE)).clamp(0, 1)
        low_limit, high_limit = self.limits
        return ((slices - low_limit) / (high_limit - low_limit)).clamp(0, 1)
