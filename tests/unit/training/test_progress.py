"""The panel of the terms below stock nnU-Net's figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from nnunet_kd.training.progress import append_curves


def test_panel_is_added_below_and_the_stock_figure_stays(tmp_path: Path) -> None:
    stock = np.random.default_rng(0).integers(0, 256, (60, 300, 4), dtype=np.uint8)
    stock[..., 3] = 255
    file = tmp_path / "progress.png"
    Image.fromarray(stock).save(file)
    append_curves(
        file,
        "distillation terms",
        {"joint.logits.kl": [1.0, 0.5], "joint.logits.kl weighted": [0.0, 0.25]},
        " weighted",
    )
    joined = np.asarray(Image.open(file).convert("RGB"))
    assert joined.shape[1] == 300
    np.testing.assert_array_equal(joined[:60], stock[..., :3])
    assert joined[60:].std() > 0  # something is drawn
