from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 2048


def _write_masks(root: Path, name: str, **masks: tuple[slice, slice]) -> None:
    fold = "fold1" if int(name[-3:]) % 2 else "fold2"
    for structure, place in masks.items():
        array = np.zeros((SIDE // 2, SIDE // 2), dtype=np.uint8)
        array[place] = 255
        path = root / "scratch" / fold / "masks" / structure.replace("_", " ") / f"{name}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def test_raw_images_are_inverted_and_masks_doubled(run, tmp_path: Path) -> None:
    images = tmp_path / "All247images"
    images.mkdir()
    raw = np.tile(np.arange(SIDE, dtype=np.uint16) * 2, (SIDE, 1))
    raw[5, 7] = 4095
    for name in ("JPCLN001", "JPCNN002", "JPCLN003"):
        raw.astype(">u2").tofile(images / f"{name}.IMG")
        _write_masks(
            tmp_path,
            name,
            left_lung=np.s_[10:20, 30:40],
            right_lung=np.s_[10:20, 5:15],
            heart=np.s_[15:25, 12:32],
            left_clavicle=np.s_[8:11, 30:40],
        )
    (images / "JPCLN003.IMG").write_bytes(b"\x00" * 100)
    result = run("JSRT", tmp_path)
    assert (result.image("JPCLN001") == 4095 - raw).all()
    labels = result.labels("JPCNN002")
    assert labels[20:40, 60:80].tolist() == np.ones((20, 20)).tolist()
    assert labels[49, 63] == 2
    assert labels[50, 63] == labels[16, 70] == 0  # below the heart; the clavicle above the lung
    assert np.bincount(labels.ravel())[1:].tolist() == [4 * 200, 4 * (200 - 2 * 5 - 3 * 5)]
    assert result.table() == {"JPCLN001": {"nodule": "nodule"}, "JPCNN002": {"nodule": "none"}}
    assert result.left_out == {"JPCLN003": "JPCLN003.IMG holds 50 numbers of 2 bytes instead of 2048 x 2048"}
