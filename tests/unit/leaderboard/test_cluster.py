from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.leaderboard.cluster import read_options, submit_plan
from nnunet_kd.leaderboard.plan import Machine, Plan
from nnunet_kd.leaderboard.record import record_file, write_record

MakePlan = Callable[..., Plan]
NUMBERED_SBATCH = """\
#!/bin/sh
number=$(($(cat {folder}/count 2>/dev/null || echo 100) + 1))
echo $number > {folder}/count
cp "$1" {folder}/$number.sh
echo "Submitted batch job $number"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the scripts that were handed to sbatch, by their job id; there is no Slurm here."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", NUMBERED_SBATCH.format(folder=folder)), ("srun", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_jobs_wait_for_what_they_need_and_finished_ones_are_not_submitted(
    slurm: Path, make_small_plan: MakePlan
) -> None:
    plan = make_small_plan(num_gpus=2)
    planning = next(job for job in plan.jobs if job.name == "plan_joint_both")
    write_record(record_file(planning, plan.out), planning, finished=True)
    ids = submit_plan(plan, Machine(num_gpus=2), read_options(["partition=gpu", "time=90"]), lambda _: None)
    assert set(ids) == {job.name for job in plan.jobs} - {"plan_joint_both"}
    student = (slurm / f"{ids['train_a_student_2d_f0_s3']}.sh").read_text()
    assert f"#SBATCH --dependency=afterok:{ids['train_both_teacher_2d_f0_s3']}\n" in student
    assert "#SBATCH --gpus-per-node=2\n" in student
    assert "#SBATCH --partition=gpu\n" in student
    assert "#SBATCH --time=90\n" in student
    teacher = (slurm / f"{ids['train_both_teacher_2d_f0_s3']}.sh").read_text()
    assert "--dependency" not in teacher
    inputs = (slurm / f"{ids['inputs_Dataset002_Beta_fold_0']}.sh").read_text()
    assert "--gpus-per-node=0" in inputs or "--gpus-per-node" not in inputs


def test_several_nodes_belong_to_trainings_alone(slurm: Path, make_small_plan: MakePlan) -> None:
    machine = Machine(num_gpus=4, nodes=2)
    ids = submit_plan(make_small_plan(num_gpus=4, nodes=2), machine, {}, lambda _: None)
    assert "#SBATCH --nodes=2\n" in (slurm / f"{ids['train_a_control_2d_f0_s3']}.sh").read_text()
    predict = (slurm / f"{ids['predict_b_with_a_control_2d_f0_s3']}.sh").read_text()
    assert "#SBATCH --nodes=1\n" in predict
    assert "#SBATCH --gpus-per-node=1\n" in predict


def test_without_submitit_the_extra_is_named(make_small_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(NnUNetKDError, match=r"pip install 'nnunet-kd\[cluster\]'"):
        submit_plan(make_small_plan(), Machine(), {})


@pytest.mark.parametrize("word", ["partition", "=gpu", "time=2h", "time="])
def test_options_that_are_none(word: str) -> None:
    with pytest.raises(NnUNetKDError, match="KEY=VALUE"):
        read_options([word])
