"""Where processes are spawned instead of forked (macOS, Windows, Python 3.14 on), workers get everything pickled."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.integration

# One training worker per loader. Batches are drawn until every member was seen, which validation does in turn.
SCRIPT = """
import json, multiprocessing
import torch

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from nnunetv2.run.run_training import get_trainer_from_args

    cpu = torch.device("cpu")
    trainer = get_trainer_from_args("900", "3d_fullres", 0, "nnUNetTrainerKDTeacher", "nnUNetKDPlans", device=cpu)
    trainer.initialize()
    training, validation = trainer.get_dataloaders()
    drawn = [next(training) for _ in range(2)]
    seen = {batch["member"]: batch for batch in (next(validation) for _ in range(4))}
    for augmenter in (training, validation):
        augmenter._finish()
    report = {name: [list(batch["data"].shape), list(batch["target"][0].shape)] for name, batch in seen.items()}
    print()
    print(json.dumps({"members": list(trainer.members), "trained": [b["member"] for b in drawn], "seen": report}))
"""


def test_spawned_workers_load_every_member(planned: Any, run_command: Callable[..., Any]) -> None:
    settings = {"nnUNetKD_settings": json.dumps({"training": {"num_epochs": 1}})}
    environment = {**planned.environment, **settings, "nnUNet_n_proc_DA": "1"}
    result = run_command([sys.executable, "-c", SCRIPT], environment, timeout=300)
    answer = json.loads(result.stdout.splitlines()[-1])
    members = ["Dataset001_Alpha", "Dataset002_Beta", "Dataset003_Gamma"]
    assert answer["members"] == members
    assert set(answer["trained"]) <= set(members)
    assert sorted(answer["seen"]) == members
    for name, num_channels in zip(members, (1, 2, 1), strict=True):
        data, target = answer["seen"][name]
        assert data[:2] == [2, num_channels]
        assert data[2:] == target[2:]
