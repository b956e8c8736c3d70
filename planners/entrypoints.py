"""The commands nnUNetKD_plan_and_preprocess, _plan_student and _plan_adaptation: parse, call, print."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_kd.cli.errors import clear_errors
from nnunet_kd.data.domains import target_name
from nnunet_kd.data.joint import JointDataset
from nnunet_kd.data.member import Member, dataset_name
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.networks.task_codes import NETWORKS
from nnunet_kd.planners.adaptation import check_domains, prepare_source, prepare_target, write_adaptation_plans
from nnunet_kd.planners.existing import check_joint_name, outdated_teachers
from nnunet_kd.planners.heads import read_heads
from nnunet_kd.planners.joint_planner import TeacherPlan, plan_joint
from nnunet_kd.planners.members import (
    StockSteps,
    check_planner,
    default_plans_name,
    find_planner,
    is_preprocessed,
    member_cases,
    prepare_member,
    preprocess_command,
)
from nnunet_kd.planners.student_planner import check_member_plans, read_settings_file, write_member_plans
from nnunet_kd.planners.student_planner import plan_student as write_student_plans
from nnunet_kd.planners.tasks import (
    declared_tasks,
    prepare_side_files,
    stand_in_segmentations,
    write_splits,
)
from nnunet_kd.settings import Adaptation, Domain

STOCK_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")


@clear_errors
def plan_and_preprocess(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_plan_and_preprocess."""
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_plan_and_preprocess",
        description="Plan a joint teacher over several nnU-Net datasets, or (without --joint) the heads for the "
        "classification and detection tasks of each. Stock fingerprint, planning and preprocessing run for datasets "
        "that lack them; the others are left as they are. No image data is copied.",
    )
    parser.add_argument("-d", nargs="+", required=True, help="Dataset ids or names of the members, for example 301 302")
    parser.add_argument("--joint", default=None, type=_dataset_id, help="Id of the joint dataset, for example 900")
    parser.add_argument("--joint_name", default=None, help="Name after DatasetXXX_. Default: the existing, or Joint")
    parser.add_argument("-c", nargs="+", default=None, help="Configurations. Default: all that every member has")
    _add_planning_arguments(parser, "The members'")
    parser.add_argument("--heads", default=None, help="JSON file with shared heads and their label maps")
    args = parser.parse_args(arguments)

    planner, members_plans = _planner_and_plans(args)
    members = [dataset_name(entry) for entry in args.d]
    name = None if args.joint is None else _joint_name(args.joint, args.joint_name)
    if name is not None:
        check_joint_name(name, members)
    elif args.heads is not None or args.joint_name is not None:
        raise JointDatasetError("--heads and --joint_name describe a joint dataset. Give its id with --joint.")
    elif args.width != 1:
        raise JointDatasetError(
            "--width is that of a joint teacher's network. Give its id with --joint, or plan without --width, and then "
            "a narrower student with: nnUNetKD_plan_student -d ID -p nnUNetKDPlans --width W -plans_name NAME"
        )
    heads = read_heads(args.heads, members)
    tasks = declared_tasks(members)
    for member in members:
        check_planner(member, members_plans, args.pl)
        check_member_plans(member, members_plans, args.plans_name)
    steps = _planning_steps(args, planner, members_plans)
    prepare_side_files(tasks)
    for member in members:
        with stand_in_segmentations(member, tasks[member]):
            prepare_member(member, steps, ())
    chosen = {m: _configurations([m], members_plans, args.c) for m in members} if name is None else {}
    configurations = []
    if name is not None:
        configurations = _without_cascade(_configurations(members, members_plans, args.c), members_plans, tasks, args.c)
    if not args.no_pp:
        for member in members:
            with stand_in_segmentations(member, tasks[member]):
                needed = chosen.get(member, configurations)
                prepare_member(member, StockSteps(planner, members_plans, num_processes=args.np), needed)
    if name is None:
        for member in members:
            write_splits(Member(member, members_plans, chosen[member][0]))
            print(f"Wrote {write_member_plans(member, members_plans, args.plans_name, None)}. Train with:")
            print('  eval "$(nnUNetKD_env)"')
            for c in chosen[member]:
                print(f"  nnUNetv2_train {member[7:10]} {c} 0 -tr nnUNetTrainerKDControl -p {args.plans_name}")
        return
    joint, plans = plan_joint(
        name,
        members,
        members_plans,
        configurations,
        plans_name=args.plans_name,
        planner=None if args.pl is None else planner,
        gpu_memory_target=args.gpu_memory_target,
        width=args.width,
        shared_heads=heads,
    )
    for member in members:
        write_member_plans(member, members_plans, args.plans_name, name)
    _print_summary(joint, plans, args.plans_name)
    _warn_of_outdated_teachers(name, args.plans_name)


@clear_errors
def plan_student(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_plan_student."""
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_plan_student",
        description="Write plans for a smaller or otherwise set student. They reuse the preprocessed data.",
    )
    parser.add_argument("-d", required=True, help="Dataset id or name")
    parser.add_argument("-p", default="nnUNetPlans", help="Plans to start from")
    parser.add_argument("--width", type=_positive, default=1.0, help="Factor on the number of features of every stage")
    parser.add_argument("--min_features", type=int, default=8, help="No stage gets fewer features than this")
    parser.add_argument("--settings", default=None, help="JSON or YAML file with settings for the nnunet_kd block")
    parser.add_argument("-plans_name", required=True, help="Name of the new plans, for example nnUNetKDPlansW50")
    args = parser.parse_args(arguments)
    dataset = dataset_name(args.d)
    prepare_side_files(declared_tasks([dataset]))
    path = write_student_plans(
        dataset,
        args.p,
        args.plans_name,
        width=args.width,
        min_features=args.min_features,
        settings=read_settings_file(args.settings) if args.settings else None,
    )
    configurations = json.loads(path.read_text())["configurations"]
    write_splits(Member(dataset, args.p, next(iter(configurations))))
    print(f"Wrote {path}. Train the student and its control with:")
    for trainer in ("nnUNetTrainerKDStudent", "nnUNetTrainerKDControl"):
        print(f"  nnUNetv2_train {dataset[7:10]} CONFIG FOLD -tr {trainer} -p {args.plans_name}")


@clear_errors
def plan_adaptation(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_plan_adaptation."""
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_plan_adaptation",
        description="Plan and preprocess the adaptation of a segmentation from a labelled source to an unlabelled "
        "target: two datasets, or one that is divided by a column of its classification file. The target's images are "
        "preprocessed with the source's plans; its masks, where there are any, are used for the final evaluation only.",
    )
    parser.add_argument("-source", required=True, help="Dataset id or name with masks, for example 306")
    parser.add_argument("-target", required=True, help="Dataset id or name of the target; may be the source's")
    parser.add_argument("-source_label", default=None, help="Only cases with this value in the column, e.g. normal")
    parser.add_argument("-target_label", default=None, help="Only cases with this value, for example tuberculosis")
    parser.add_argument("-column", default=None, help="Column of the classification file. Default: the only one")
    parser.add_argument("-c", nargs="+", default=["2d"], help="Configurations. Default: 2d")
    parser.add_argument(
        "--network",
        choices=tuple(NETWORKS),
        default="stargan",
        help="The paper's generator, or the planned U-Net with one scale and shift per task. Default: stargan",
    )
    parser.add_argument("--any_size", action="store_true", help="The target's images may be of another scale")
    _add_planning_arguments(parser, "The source's")
    args = parser.parse_args(arguments)
    planner, base_plans = _planner_and_plans(args)
    source, target = dataset_name(args.source), dataset_name(args.target)
    settings = Adaptation(
        Domain(column=args.column, label=args.source_label),
        Domain(None if target == source else target, args.column, args.target_label),
        args.network,
    )
    target_name(source, settings)
    check_planner(source, base_plans, args.pl)
    steps = _planning_steps(args, planner, base_plans)
    prepare_source(source, steps, args.c, preprocess=not args.no_pp)
    if target != source and not args.no_pp:
        prepare_target(source, target, base_plans, args.c, args.np, args.any_size)
    counts = None if args.no_pp else check_domains(source, settings, base_plans, args.c[0])
    path = write_adaptation_plans(source, settings, base_plans, args.plans_name, args.c, args.width)
    print(f"\nWrote {path}.")
    if counts is None:
        print("Nothing was preprocessed. Before training, run the same command without --no_pp.")
    else:
        print(f"{counts[0]} labelled cases of the source, {counts[1]} of the target.")
    print('Train with:\n  eval "$(nnUNetKD_env)"')
    for configuration in args.c:
        print(f"  nnUNetv2_train {source[7:10]} {configuration} 0 -tr nnUNetTrainerAdaIN -p {args.plans_name}")


def _add_planning_arguments(parser: argparse.ArgumentParser, whose: str) -> None:
    """What every planning command of ours can be told; ``whose`` plans are planned."""
    parser.add_argument("-p", default=None, help=f"{whose} plans. Default: what the planner writes (nnUNetPlans)")
    parser.add_argument("-pl", default=None, help="Stock planner class. Default: ExperimentPlanner")
    parser.add_argument("-plans_name", default="nnUNetKDPlans", help="Name of the plans that are written")
    parser.add_argument("-gpu_memory_target", type=_positive, default=None, help="GB. Default: the planner class's")
    parser.add_argument("--width", type=_positive, default=1.0, help="Factor on the network's number of features")
    parser.add_argument("-np", type=int, default=None, help="Processes for preprocessing. Default: stock nnU-Net's")
    parser.add_argument("-npfp", type=int, default=8, help="Processes for the fingerprint")
    parser.add_argument("--no_pp", action="store_true", help="Do not preprocess datasets that lack it")
    parser.add_argument("--verify_dataset_integrity", action="store_true", help="Run nnU-Net's check on the datasets")


def _planner_and_plans(args: argparse.Namespace) -> tuple[type[ExperimentPlanner], str]:
    """The stock planner, and the name of the plans that the datasets have or get."""
    planner = find_planner(args.pl or "ExperimentPlanner")
    plans_name = args.p or default_plans_name(planner)
    if args.plans_name == plans_name or "__" in args.plans_name:
        raise JointDatasetError(
            f"-plans_name {args.plans_name} is not possible: it must differ from the datasets' {plans_name} and not "
            f"contain '__'."
        )
    return planner, plans_name


def _planning_steps(args: argparse.Namespace, planner: type[ExperimentPlanner], plans_name: str) -> StockSteps:
    """The stock steps up to the plans; preprocessing comes after the checks."""
    return StockSteps(
        planner,
        plans_name,
        args.gpu_memory_target,
        args.np,
        args.npfp,
        preprocess=False,
        verify_dataset_integrity=args.verify_dataset_integrity,
    )


def _configurations(members: Sequence[str], plans_name: str, requested: Sequence[str] | None) -> list[str]:
    """Configurations of the joint dataset: the requested ones, or all stock ones that every member has."""
    available = {member: set(Member(member, plans_name, "").plans["configurations"]) for member in members}
    if requested is not None:
        for configuration in requested:
            for member, own in available.items():
                if configuration not in own:
                    raise JointDatasetError(
                        f"{member} has no configuration {configuration} in {plans_name} (it has "
                        f"{', '.join(sorted(own))}), so {configuration} cannot be planned. 2D datasets join 3D ones "
                        f"only in 2d. Choose another -c, or leave {member} out."
                    )
        return list(requested)
    common = [c for c in STOCK_CONFIGURATIONS if all(c in own for own in available.values())]
    for configuration in STOCK_CONFIGURATIONS:
        missing = [member for member, own in available.items() if configuration not in own]
        if missing and len(missing) < len(members):
            print(f"INFO: no joint {configuration}, because it is not planned for {', '.join(missing)}.")
    if not common:
        raise JointDatasetError(f"The members have no configuration in common: {available}.")
    return common


def _without_cascade(
    configurations: Sequence[str], plans_name: str, tasks: Mapping[str, Tasks], requested: Sequence[str] | None
) -> list[str]:
    """The configurations in which all members can be joined: a cascade needs a previous segmentation of each."""
    others = [member for member, own in tasks.items() if not own.segmentation]
    if not others:
        return list(configurations)
    cascades = [c for c in configurations if Member(others[0], plans_name, c).configuration_manager.previous_stage_name]
    if cascades and requested is not None:
        raise JointDatasetError(
            f"{others[0]} has no segmentation, so it has no previous stage for {cascades[0]}. Leave the configuration "
            f"or the member out."
        )
    for configuration in cascades:
        print(f"INFO: no joint {configuration}, because {others[0]} has no segmentation for its previous stage.")
    return [configuration for configuration in configurations if configuration not in cascades]


def _dataset_id(text: str) -> int:
    if not (text.isdigit() and 1 <= int(text) <= 999):
        raise argparse.ArgumentTypeError(f"'{text}' is no dataset id: nnU-Net's have three digits, 1 to 999.")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not possible. Give a number greater than 0.")
    return value


def _joint_name(joint_id: int, name: str | None) -> str:
    prefix = f"Dataset{joint_id:03d}_"
    if name is not None:
        return prefix + name
    try:
        return dataset_name(joint_id)
    except JointDatasetError:
        return prefix + "Joint"


def _print_summary(joint: JointDataset, plans: Mapping[str, TeacherPlan], plans_name: str) -> None:
    print(f"\n{joint.name}: {len(joint.members)} members, channels {', '.join(joint.channels.names)}")
    for configuration, plan in plans.items():
        arguments = plan.configuration["architecture"]["arch_kwargs"]
        print(f"\n{configuration}")
        print(f"  {'member':32s} {'cases':>5s} {'head':>44s} {'spacing':>22s} {'patch':>18s} {'batch':>5s} {'GB':>6s}")
        for name, entry in joint.members.items():
            member = joint.member(name, configuration)
            manager = member.configuration_manager
            spacing = " x ".join(f"{value:.3g}" for value in manager.spacing)
            patch = " x ".join(str(size) for size in manager.patch_size)
            shared = ", shared" if entry.label_map else ""
            head = "no segmentation"
            if entry.head is not None:
                head = f"{entry.head} ({joint.heads[entry.head].label_space.num_channels} channels{shared})"
            print(
                f"  {name:32s} {len(member_cases(member)):5d} {head:>44s} {spacing:>22s} {patch:>18s} "
                f"{plan.batch_sizes[name]:5d} {plan.memory_gb[name]:6.2f}"
            )
        for name in joint.members:
            classification, detection = joint.member_heads(name, configuration)
            heads = [f"{target} ({classes} classes)" for target, classes in (classification or {}).get("targets", ())]
            heads += [f"boxes of {', '.join(detection['classes'])}"] if detection is not None else []
            if heads:
                print(f"  {name} also has heads for {'; '.join(heads)}")
        print(
            f"  teacher: {plan.configuration['architecture']['network_class_name'].split('.')[-1]} for the patch of "
            f"{plan.largest}, features {list(arguments['features_per_stage'])}, "
            f"strides {[list(stride) for stride in arguments['strides']]}"
        )
        disk = sum(_folder_size(joint.member(name, configuration).data_folder) for name in joint.members)
        print(f"  disk: {disk / 1e9:.2f} GB of the members' own preprocessed data, none copied")
    configuration = next(iter(plans))
    print("\nNext:")
    views = [joint.member(name, configuration) for configuration in plans for name in joint.members]
    for command in dict.fromkeys(preprocess_command(view) for view in views if not is_preprocessed(view)):
        print(f"  {command}")
    print('  eval "$(nnUNetKD_env)"')
    print(f"  nnUNetv2_train {joint.name[7:10]} {configuration} 0 -tr nnUNetTrainerKDTeacher -p {plans_name}")
    for name, entry in joint.members.items():
        own_plans = plans_name if any(joint.member_heads(name, configuration)) else entry.plans
        print(f"  nnUNetv2_train {name[7:10]} {configuration} 0 -tr nnUNetTrainerKDStudent -p {own_plans}")


def _warn_of_outdated_teachers(joint_name: str, plans_name: str) -> None:
    outdated = outdated_teachers(joint_name, plans_name)
    if outdated:
        print(
            f"\nWARNING: {joint_name} changed, so that these trained models do not fit {plans_name} any more:\n  "
            + "\n  ".join(str(model) for model in outdated)
            + "\nThey still predict and teach, but no further fold can be trained beside theirs. Plan again with "
            "another -plans_name or another --joint id and train with that, or move these folders away and train all "
            "folds again."
        )


def _folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*")) if folder.is_dir() else 0


if __name__ == "__main__":
    sys.exit(plan_and_preprocess())
