"""What a finished run cost and what it has seen, read once from nnU-Net's own files and kept in its record.

Training time is the sum of nnU-Net's epochs (start to end, its validation batches included), so that waiting, planning
and the final validation do not count. A step is an epoch's median time over its training steps. Inference is the median
time between two cases of the final validation, from nnU-Net's log. FLOPs are those of one patch, counted by torch
(a multiplication and an addition are two).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from nnunet_kd.environment import TRAINERS_VARIABLE, add_trainers_folder, environment
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.reference import ReferenceDataset
from nnunet_kd.inference.predict import build_predictor
from nnunet_kd.inference.trained_model import open_model
from nnunet_kd.leaderboard.runs import Run
from nnunet_kd.settings import BLOCK
from nnunet_kd.teachers.checkpoint import load_checkpoint

CASE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?): (predicting |Validation complete)", re.MULTILINE)


def measure(run: Run, heads: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Costs and provenance of a finished run, in JSON types; null where nothing is known.

    Args:
        run: The run.
        heads: Of a joint teacher: dataset of the recipe to the name of its member. None: a model of one dataset.

    Returns:
        ``train_seconds``, ``num_steps``, ``seconds_per_step``, ``device``, ``device_name``, ``inference_seconds``,
        ``networks`` (dataset to ``parameters`` and ``gflops`` of a patch), ``training_cases`` (dataset folder to cases
        that it or its teachers have seen; of a stock trainer those of the fold in splits_final.json), ``leaked_cases``
        (of its own validation, by teacher), ``unlabeled_cases`` (those of ``training_cases`` whose labels it did not
        see) and ``peak_gpu_memory_gb`` (of a training on CUDA).
    """
    checkpoint = load_checkpoint(run.fold_folder / "checkpoint_final.pth")
    extra = checkpoint.get(BLOCK, {})
    if heads is None:
        networks = {run.group: _network(run, None)}
    else:
        networks = {name: _network(run, head) for name, head in heads.items()}
    return {
        **_training(checkpoint, extra),
        **_debug(run.fold_folder),
        "inference_seconds": _inference_seconds(run.fold_folder),
        "networks": networks,
        **{
            key: {name: [str(case) for case in cases] for name, cases in seen.items()}
            for key, seen in (
                ("training_cases", extra.get("training_cases") or _cases_of_fold(run)),
                ("unlabeled_cases", extra.get("unlabeled_cases", {})),
            )
        },
        "leaked_cases": {
            name: list(own["leaked_cases"]) for name, own in extra.get("teachers", {}).items() if own["leaked_cases"]
        },
        "peak_gpu_memory_gb": extra.get("peak_gpu_memory_gb"),
    }


def _cases_of_fold(run: Run) -> dict[str, list[str]]:
    """What a trainer that records nothing has seen, if the splits have not changed since; empty if there are none."""
    try:
        return {run.folder_name: ReferenceDataset.open(run.folder_name).training_cases(run.fold)}
    except NnUNetKDError:
        return {}


def _training(checkpoint: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    logged = checkpoint.get("logging", {})
    starts, ends = logged.get("epoch_start_timestamps", []), logged.get("epoch_end_timestamps", [])
    seconds = [end - start for start, end in zip(starts, ends, strict=False)]
    steps = extra.get("steps")  # a joint teacher counts its members' steps
    training = extra.get("settings", {}).get("training")
    if steps:
        num_steps = int(sum(steps.values()))
    elif training:
        num_steps = len(seconds) * int(training["num_iterations_per_epoch"])
    else:
        num_steps = 250 * len(seconds)  # stock nnU-Net's
    per_epoch = num_steps / len(seconds) if seconds else math.nan
    return {
        "train_seconds": float(sum(seconds)) if seconds else None,
        "num_steps": num_steps,
        "seconds_per_step": float(np.median(seconds)) / per_epoch if per_epoch > 0 else None,
    }


def _debug(fold: Path) -> dict[str, Any]:
    """The device, from the file that nnU-Net writes when a training starts."""
    file = fold / "debug.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    device = str(content.get("device", "")).partition(":")[0] or None
    return {"device": device, "device_name": content.get("gpu_name")}


def _inference_seconds(fold: Path) -> float | None:
    gaps: list[float] = []
    for file in sorted(fold.glob("training_log_*.txt")):
        found = CASE.findall(file.read_text(errors="replace"))
        times = [(datetime.fromisoformat(time), what.startswith("predicting")) for time, what in found]
        gaps += [(end - start).total_seconds() for (start, begins), (end, _) in itertools.pairwise(times) if begins]
    return float(np.median(gaps)) if gaps else None


def _network(run: Run, head: str | None) -> dict[str, Any]:
    """Parameters and FLOPs of what is deployed."""
    with environment({TRAINERS_VARIABLE: add_trainers_folder(os.environ.get(TRAINERS_VARIABLE, ""))}):
        predictor = build_predictor(
            open_model(run.model_folder, [run.fold]),
            head=head,
            device=torch.device("cpu"),
            verbose=False,
            allow_tqdm=False,
        )
    network = predictor.network
    parameters = sum(own.numel() for own in network.parameters())
    patch = list(predictor.configuration_manager.patch_size)
    first = next(own for own in network.parameters() if own.ndim == len(patch) + 2)
    on_meta = copy.deepcopy(network).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(torch.empty(1, first.shape[1], *patch, device="meta"))
    return {"parameters": parameters, "gflops": counter.get_total_flops() / 1e9}
