"""Tokens of whole cases on disk, cut as the patches of a batch are (our design).

A foundation model is the same in every step, so its tokens of a case are computed once: all slices across the teacher's
axis, at the scale in which it sees patches. Cases that are smaller than a patch are padded as its patches are. A patch
gets the tokens at its place, turned and mirrored as it is. They differ from those of the patch itself: the model has
seen what lies around the patch, and none of the augmentation of intensities; and a patch that was turned or scaled
beyond its case gets the tokens of the border there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.nn.functional import embedding_bag, pad
from tqdm import tqdm

from nnunet_kd.errors import TeacherError
from nnunet_kd.files import replacing, write_json
from nnunet_kd.teachers.slices import Slices

FOLDER = "nnunet_kd_tokens"
TOKENS, TOKEN_SLICES = "tokens", "token_slices"  # keys of a batch
SLICES_AT_ONCE = 8


class TokenMaps:
    """The token maps in a folder: per case float16 [N, h, w, C] of its N slices.

    Args:
        folder: Where they are.
        patch: Spatial shape of the patches that are drawn.
        axis: Across the slices; None for patches of slices, whose cases are volumes across their first axis.
        num_slices: K that are asked for of a 3D patch.
        grid_of: In-plane size of a patch to the size of its token map.
    """

    def __init__(
        self,
        folder: Path,
        patch: Sequence[int],
        axis: int | None,
        num_slices: int,
        grid_of: Callable[[Sequence[int]], tuple[int, int]],
    ) -> None:
        self.folder = folder
        self.smallest = (1, *patch) if axis is None else tuple(patch)
        self.axis = axis
        self.num_slices = num_slices
        self.grid_of = grid_of
        self.shapes: dict[str, list[int]] = {}  # of the cases, without padding

    def fill(self, sources: Mapping[str, tuple[Any, Sequence[Path]]], tokens_of: Callable[[Tensor], Tensor]) -> None:
        """Compute the maps that are missing or of another state of their case; of several processes, one does.

        Args:
            sources: Case to the dataset that loads it and its preprocessed files.
            tokens_of: Slices [N, 1, H, W] of a case to tokens [N, C, h, w].

        Raises:
            TeacherError: Tokens are not finite, or cannot be written.
        """
        several = distributed.is_available() and distributed.is_initialized()
        if several and distributed.get_rank() > 0:
            while self._missing(sources):  # a barrier would run into its timeout
                time.sleep(1)
        else:
            self._fill(sources, tokens_of)
        self.shapes = {case: self._entry(case)["shape"] for case in sources}

    def __call__(self, cases: Sequence[str], matrices: Tensor, patch: Sequence[int]) -> dict[str, Tensor]:
        """Tokens of patches.

        Args:
            cases: Of the samples.
            matrices: Their places, see ``data/patch_places.py``.
            patch: Spatial shape of the patches.

        Returns:
            ``TOKENS``, float16 [B, C, K, h, w], of 2D patches [B, C, h, w]; and for 3D patches ``TOKEN_SLICES``, the
            voxels [B, K] of their slices.
        """
        if self.axis is None:
            parts = [self._cut(case, own, _centres(self.grid_of(patch), patch)) for case, own in zip(cases, matrices)]  # noqa: B905
            return {TOKENS: torch.stack(parts)}
        slices = Slices.draw(len(cases), patch[self.axis], self.num_slices, self.axis, torch.device("cpu"))
        plane = [length for axis, length in enumerate(patch) if axis != self.axis]
        centres = _centres(self.grid_of(plane), plane)  # [h, w, 2]
        parts = []
        for case, matrix, indices in zip(cases, matrices, slices.indices, strict=True):
            across = indices.float().view(-1, 1, 1, 1).expand(-1, *centres.shape[:2], 1)
            own = centres.expand(len(indices), *centres.shape)
            places = torch.cat((own[..., : self.axis], across, own[..., self.axis :]), -1)  # [K, h, w, 3]
            parts.append(self._cut(case, matrix, places))
        return {TOKENS: torch.stack(parts), TOKEN_SLICES: slices.indices}

    def _cut(self, case: str, matrix: Tensor, places: Tensor) -> Tensor:
        """Tokens [C, ...] at voxels [..., D] of a patch, interpolated linearly."""
        tokens = np.load(self.folder / f"{case}.npy", mmap_mode="r")
        voxels = (places @ matrix[:, :-1].T + matrix[:, -1]).movedim(-1, 0)  # [3, ...] of the case
        order = [self.axis or 0, *(axis for axis in range(3) if axis != (self.axis or 0))]
        padding = [_padding(length, least) for length, least in zip(self.shapes[case], self.smallest, strict=True)]
        corners = torch.zeros((*places.shape[:-1], 1), dtype=torch.long)  # [..., 8] in the end, in rows of the map
        weights = torch.ones(corners.shape)
        for axis, size in zip(order, tokens.shape[:3], strict=True):
            before, after = padding[axis]
            share = (voxels[axis] + before + 0.5) / (before + self.shapes[case][axis] + after)
            place = (share * size - 0.5).clamp(0, size - 1)[..., None]
            below = place.floor().long()
            part = place - below
            corners = torch.cat((corners * size + below, corners * size + (below + 1).clamp(max=size - 1)), -1)
            weights = torch.cat((weights * (1 - part), weights * part), -1)
        rows, number = corners.flatten(0, -2).unique(return_inverse=True)
        needed = torch.from_numpy(tokens.reshape(-1, tokens.shape[3])[rows.numpy()]).float()
        found = embedding_bag(number, needed, per_sample_weights=weights.flatten(0, -2), mode="sum")
        return found.T.unflatten(1, places.shape[:-1]).half()

    def _fill(self, sources: Mapping[str, tuple[Any, Sequence[Path]]], tokens_of: Callable[[Tensor], Tensor]) -> None:
        missing = self._missing(sources)
        for case, state in tqdm(missing.items(), desc="Token maps of whole cases", disable=not missing):
            image = torch.from_numpy(np.asarray(sources[case][0].load_case(case)[0][:1]))
            widths = [_padding(length, least) for length, least in zip(image.shape[1:], self.smallest, strict=True)]
            padded = pad(image, [width for pair in reversed(widths) for width in pair])
            slices = padded.movedim((self.axis or 0) + 1, 0)  # [N, 1, H, W]
            parts = [tokens_of(part).permute(0, 2, 3, 1).cpu().half() for part in slices.split(SLICES_AT_ONCE)]
            tokens = torch.cat(parts)
            if not tokens.isfinite().all():
                raise TeacherError(
                    f"The foundation model gives tokens of {case} that are not finite, or too large for 16 bits. Look "
                    f"at this image and at the model, or switch 'foundation.cache' off."
                )
            self._write(case, tokens.numpy(), {"shape": list(image.shape[1:]), "state": state})

    def _write(self, case: str, tokens: NDArray[np.float16], entry: Mapping[str, Any]) -> None:
        """The map, then what says that it is there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{case}.npy") as temporary, temporary.open("wb") as stream:
                np.save(stream, tokens)
            write_json(self.folder / f"{case}.json", entry)
        except OSError as error:
            raise TeacherError(
                f"The token map of {case} ({tokens.nbytes / 1e6:.0f} MB) cannot be written to {self.folder}: {error}. "
                f"Make room there, or switch 'foundation.cache' off; finished cases are kept."
            ) from error

    def _missing(self, sources: Mapping[str, tuple[Any, Sequence[Path]]]) -> dict[str, str]:
        """Case to the state of its files, where the map is not of that state."""
        states = {case: _state(files) for case, (_, files) in sources.items()}
        return {case: state for case, state in states.items() if self._entry(case).get("state") != state}

    def _entry(self, case: str) -> dict[str, Any]:
        file = self.folder / f"{case}.json"
        is_there = file.is_file() and file.with_suffix(".npy").is_file()
        content: dict[str, Any] = json.loads(file.read_text()) if is_there else {}
        return content


def _centres(grid: Sequence[int], plane: Sequence[int]) -> Tensor:
    """Centres [h, w, 2] of the tokens of a patch, in voxels."""
    axes = [(torch.arange(size) + 0.5) * (length / size) - 0.5 for size, length in zip(grid, plane, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _padding(length: int, least: int) -> tuple[int, int]:
    """Voxels before and after an axis, as nnU-Net's loader pads what is shorter than a patch."""
    missing = max(0, least - length)
    return missing - missing // 2, missing // 2


def _state(files: Sequence[Path]) -> str:
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
