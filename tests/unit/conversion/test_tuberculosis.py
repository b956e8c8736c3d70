from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def test_montgomery_joins_the_masks_of_both_lungs(run, tmp_path: Path, picture) -> None:
    root = tmp_path / "MontgomerySet"
    left, right = np.zeros((8, 10), dtype=bool), np.zeros((8, 10), dtype=bool)
    left[2:5, 6:9], right[2:6, 1:4] = True, True
    images = {}
    for seed, name in enumerate(("MCUCXR_0001_0", "MCUCXR_0104_1", "MCUCXR_0200_1")):
        images[name] = picture(root / "CXR_png" / f"{name}.png", seed=seed)
        for side, mask in (("left", left), ("right", right)):
            (root / "ManualMask" / f"{side}Mask").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "ManualMask" / f"{side}Mask" / f"{name}.png")  # 1 bit, as published
    (root / "ManualMask" / "rightMask" / "MCUCXR_0200_1.png").unlink()
    result = run("Montgomery", tmp_path)
    assert (result.image("MCUCXR_0001_0") == images["MCUCXR_0001_0"]).all()
    assert (result.labels("MCUCXR_0104_1") == (left | right)).all()
    assert result.table() == {"MCUCXR_0001_0": {"label": "normal"}, "MCUCXR_0104_1": {"label": "tuberculosis"}}
    assert result.left_out == {"MCUCXR_0200_1": "there is no ManualMask/rightMask"}


def test_shenzhen_leaves_out_images_without_a_mask(run, tmp_path: Path, picture) -> None:
    grey = picture(tmp_path / "ChinaSet_AllFiles" / "CXR_png" / "CHNCXR_0001_0.png")
    colour = np.repeat(np.arange(80, dtype=np.uint8).reshape(8, 10, 1), 3, axis=2)
    picture(tmp_path / "ChinaSet_AllFiles" / "CXR_png" / "CHNCXR_0330_1.png", colour)
    picture(tmp_path / "ChinaSet_AllFiles" / "CXR_png" / "CHNCXR_0331_1.png")
    mask = np.zeros((8, 10), dtype=np.uint8)
    mask[3:5, 3:5] = 255
    for name in ("CHNCXR_0001_0", "CHNCXR_0330_1"):
        picture(tmp_path / "mask" / f"{name}_mask.png", mask)
    result = run("Shenzhen", tmp_path)
    assert (result.image("CHNCXR_0001_0") == grey).all()
    assert (result.image("CHNCXR_0330_1") == colour[..., 0]).all()
    assert (result.labels("CHNCXR_0330_1") == (mask > 0)).all()
    assert result.table()["CHNCXR_0330_1"] == {"label": "tuberculosis"}
    assert result.left_out == {"CHNCXR_0331_1": "there is no lung mask"}


def test_shenzhen_without_any_mask_says_so(fails, tmp_path: Path, picture) -> None:
    picture(tmp_path / "ChinaSet_AllFiles" / "CXR_png" / "CHNCXR_0001_0.png")
    message = fails("Shenzhen", tmp_path)
    assert "no lung masks CHNCXR_*_mask.png" in message
    assert "mask/CHNCXR_0001_0_mask.png" in message
