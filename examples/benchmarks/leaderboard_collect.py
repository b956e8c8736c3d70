"""How long `nnUNetKD_leaderboard collect` takes: 1,000 synthetic runs of 200 cases, whose scores are cached as usual.

Ten datasets, ten methods, two folds and five seeds. Of every run there is what a finished one leaves: empty files for
nnU-Net's, the record, and the scores of its cases.

    python examples/benchmarks/leaderboard_collect.py -o OUT
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from nnunet_kd.leaderboard.plan import Machine, make_plan
from nnunet_kd.leaderboard.recipe import read_recipe
from nnunet_kd.leaderboard.record import record_file, write_record
from nnunet_kd.leaderboard.scores import write_scores

NUM_DATASETS, NUM_METHODS, NUM_CASES = 10, 10, 200


def write_recipe(folder: Path) -> Path:
    """A recipe with 1,000 runs."""
    recipe = {
        "name": "synthetic",
        "datasets": {
            f"dataset{index}": {"id": 100 + index, "name": f"Synthetic{index}"} for index in range(NUM_DATASETS)
        },
        "methods": {
            f"method{index}": {
                "trainer": "nnUNetTrainerKDControl",
                "settings": {"training": {"weight_decay": index / 1e4}},
            }
            for index in range(NUM_METHODS)
        },
        "control": "method0",
        "configurations": ["3d_fullres"],
        "folds": [0, 1],
        "seeds": [0, 1, 2, 3, 4],
        "metrics": ["dice", "nsd", "hd95"],
    }
    file = folder / "synthetic.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def write_runs(recipe_file: Path, out: Path) -> int:
    """What the runs leave."""
    plan = make_plan(read_recipe(recipe_file), recipe_file, out, Machine())
    random = np.random.default_rng(0)
    costs = {"train_seconds": 3600.0, "seconds_per_step": 0.2, "device": "cuda", "inference_seconds": 1.5}
    costs["networks"] = {}
    jobs = {id(job.run): job for job in plan.jobs if job.run is not None}
    for evaluation in plan.evaluations:
        run, job = evaluation.run, jobs[id(evaluation.run)]
        evaluation.predictions.mkdir(parents=True)
        for output in job.outputs:
            output.touch()
        write_record(record_file(job, out), job, finished=True, costs=costs)
        level = 0.7 + 0.01 * int(run.method.removeprefix("method")) + random.normal(0, 0.02)
        dice = np.clip(level + random.normal(0, 0.08, NUM_CASES), 0, 1)
        cases = [f"case_{run.fold}_{index:03d}" for index in range(NUM_CASES)]
        scores = {"case": cases, "class": "lesion", "dice": dice, "hd95_mm": 50 * (1 - dice), "nsd": dice**0.5}
        write_scores(plan.recipe, evaluation, pd.DataFrame({**scores, "volume_error_ml": 0.0}), out)
    return len(plan.evaluations)


def main() -> None:
    """Write the runs, then time the command in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, help="Folder that is written anew")
    out = parser.parse_args().o.resolve()
    if out.exists():
        sys.exit(f"{out} exists. Give another folder.")
    out.mkdir(parents=True)
    recipe = write_recipe(out)
    count = write_runs(recipe, out)
    command = [shutil.which("nnUNetKD_leaderboard", path=Path(sys.executable).parent) or "nnUNetKD_leaderboard"]
    start = time.perf_counter()
    subprocess.run([*command, "collect", str(recipe), "-o", str(out)], check=True, stdout=subprocess.DEVNULL)
    print(f"{count} runs of {NUM_CASES} cases collected in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
