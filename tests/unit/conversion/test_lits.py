from __future__ import annotations

from pathlib import Path

import numpy as np


def test_both_batches_and_the_test_volumes(run, tmp_path: Path, volume, labels) -> None:
    images = {}
    for batch, numbers in (("Training Batch 1", (0, 2)), ("Training Batch 2", (28, 130))):
        for number in numbers:
            folder = tmp_path / "lits" / batch
            images[number] = volume(folder / f"volume-{number}.nii", np.full((4, 5, 6), number - 1000))
            volume(folder / f"segmentation-{number}.nii", labels(1, 2))
    volume(tmp_path / "lits" / "test-volume-3.nii")
    volume(tmp_path / "lits" / "Training Batch 1" / "volume-5.nii")
    result = run("LiTS", tmp_path / "lits")
    assert result.cases("labelsTr") == ["lits_000", "lits_002", "lits_028", "lits_130"]
    assert (result.image("lits_130") == images[130]).all()
    assert np.bincount(result.labels("lits_028").ravel()).tolist() == [118, 1, 1]
    assert result.dataset_json["channel_names"] == {"0": "CT"}
    assert "nnunet_kd" not in result.dataset_json
    assert result.cases("imagesTs") == ["lits_test_003_0000"]
    assert not (result.folder / "labelsTs").exists()
    assert result.left_out == {"lits_005": "there is no segmentation-5.nii"}
