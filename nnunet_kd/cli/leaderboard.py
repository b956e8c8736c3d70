"""The command nnUNetKD_leaderboard: a recipe -> commands, runs, and a table."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_kd.cli.errors import clear_errors
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.leaderboard.plan import Machine, Plan, folders_environment, make_plan
from nnunet_kd.leaderboard.recipe import check_data, read_recipe


@clear_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_leaderboard."""
    args = _parser().parse_args(arguments)
    recipe_file = args.recipe.resolve()
    recipe = read_recipe(recipe_file)
    out = (args.o or Path(f"leaderboard_{recipe.name}")).resolve()
    os.environ.update(folders_environment(recipe, out))  # before nnU-Net is imported
    # imported late, so that --help and mistakes in a recipe take no seconds
    if args.command == "prepare":
        from nnunet_kd.leaderboard.prepare import prepare

        prepare(recipe, args.dataset, out, args.inputs)
        return
    plan = make_plan(recipe, recipe_file, out, _machine(args))
    if args.command == "plan":
        _print(plan)
    elif args.command == "run":
        _run(plan, args)
    else:
        from nnunet_kd.leaderboard.collect import collect
        from nnunet_kd.leaderboard.report import write_report

        collected = collect(plan)
        folder = write_report(collected)
        print((folder / "leaderboard.md").read_text(encoding="utf-8"))
        print(f"Wrote {folder / 'index.html'} and, beside it, leaderboard.md, .csv, .tex and runs.csv.")


def _run(plan: Plan, args: argparse.Namespace) -> None:
    from nnunet_kd.leaderboard.cluster import read_options, submit_plan
    from nnunet_kd.leaderboard.run import run_plan

    machine = _machine(args)
    check_data(plan.recipe, args.recipe)
    if args.cluster == "slurm":
        ids = submit_plan(plan, machine, read_options(args.slurm))
        print(
            f"Submitted {len(ids)} jobs. When they are done: nnUNetKD_leaderboard collect {args.recipe} -o {plan.out}"
        )
        return
    if machine.nodes > 1:
        raise NnUNetKDError("--nodes needs --cluster slurm; by hand, start the commands of `plan` on every node.")
    stream = sys.stdout  # which is replaced while runs are measured
    run_plan(plan, machine, args.workers, lambda line: print(line, file=stream, flush=True))
    print(f"All jobs are finished. Next: nnUNetKD_leaderboard collect {args.recipe} -o {plan.out}")


def _print(plan: Plan) -> None:
    """The commands in an order in which a shell can run them."""
    print('eval "$(nnUNetKD_env)"')
    print(f"mkdir -p {shlex.quote(str(plan.out))}")
    folders = folders_environment(plan.recipe, plan.out)
    for name, value in folders.items():
        print(f"export {name}={shlex.quote(value)}")
    numbers = {job.name: number for number, job in enumerate(plan.jobs, start=1)}
    for job in plan.jobs:
        needs = ", ".join(str(numbers[name]) for name in job.needs)
        print(f"\n# {numbers[job.name]} {job.name}" + (f", after {needs}" if needs else ""))
        print(job.shell(folders))


def _machine(args: argparse.Namespace) -> Machine:
    cores = os.cpu_count() or 1
    workers = getattr(args, "workers", 1)
    device: Any = getattr(args, "device", "cuda")
    threads = max(1, cores // workers) if device == "cpu" else 1
    return Machine(device, getattr(args, "num_gpus", 1), getattr(args, "nodes", 1), min(8, cores), threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_leaderboard",
        description="Compare methods over datasets, folds and seeds as a recipe says (examples/leaderboards).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="print the commands, in order, with what each needs")
    run = commands.add_parser("run", help="run what is not finished")
    collect = commands.add_parser("collect", help="build the table from what is finished")
    prepare = commands.add_parser("prepare", help="one of the commands of a plan: link data, write splits")
    for command in (plan, run, collect, prepare):
        command.add_argument("recipe", type=Path, help="YAML file")
        command.add_argument("-o", type=Path, default=None, help="Output folder. Default: leaderboard_NAME")
    for command in (plan, run):
        command.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="Default: cuda")
        command.add_argument(
            "-num_gpus", type=_positive, default=1, help="GPUs of one training on one node. Default: 1"
        )
        command.add_argument("--nodes", type=_positive, default=1, help="Nodes of one training (torchrun). Default: 1")
        command.add_argument("--workers", type=_positive, default=1, help="Jobs at the same time on this machine")
    run.add_argument("--cluster", choices=("local", "slurm"), default="local", help="Where. Default: local")
    run.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="Slurm's options, such as partition=gpu time=2880 (minutes)",
    )
    prepare.add_argument("--dataset", required=True, help="Dataset of the recipe")
    prepare.add_argument("--inputs", default=None, help="Link test images: all, or fold_F for its validation cases")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not possible. Give a whole number greater than 0.")
    return int(text)


if __name__ == "__main__":
    main()
