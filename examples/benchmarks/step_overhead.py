"""One training step of nnunet_kd's trainers against stock nnU-Net: time as a ratio, peak memory, loader.

All trainers are built in one process on one preprocessed dataset: the same architecture, batch size and batches (drawn
once from each trainer's own loader, with equal seeds, and compared). After a warm-up each round takes one step of every
trainer in turn, in rotated order; the ratio to stock is formed within a round, so that a busy machine disturbs both.
The joint teachers get links to the dataset as their members, planned by the joint planner; where their architecture
would differ from the dataset's, they get the dataset's. The students' teachers are the joint teacher of two members
and, for SIKD, the dataset's class-average teacher, untrained, read from checkpoints. Nothing is written into the
dataset's folders.

Peak memory is measured in a fresh process per trainer, over steps after a warm-up: on CUDA the allocated bytes, on a
CPU the resident bytes above those of the process with its libraries, before the trainer was built, after the C library
gave back what it only kept for later. It so holds weights, gradients, momentum, activations and, for a student, the
teacher.

On Linux the C library returns large tensors to the system after every step and gets them back page by page, which costs
any trainer a varying tenth of its time. These two variables stop that, for sharper ratios:

    MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000

    python examples/benchmarks/step_overhead.py -d 301 -c 3d_fullres -o cpu.json --precision float32 auto --batch_size 2
    python examples/benchmarks/step_overhead.py -d 301 -c 3d_fullres -o cuda.json -device cuda --compile
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import io
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLD = 0
STOCK, TEACHER_TRAINER, JOINT_PLANS = "stock", "nnUNetTrainerKDTeacher", "nnUNetKDPlans"
SHAPE_TRAINER = "nnUNetTrainerSIKDTeacher"
NO_SCHEDULE = {"kind": "constant"}  # a ramp would skip the teacher in the first step
LEVELS = ["bottleneck", "decoder@1/2", "decoder@1/4"]
FEATURES = {"teacher": "joint", "on": "features", "loss": "mse", "levels": LEVELS, "weight": 0.5}
PLENTY_GB = 1000.0  # the joint planner keeps the members' batch
BASE_FEATURES = 32  # of stock nnU-Net's planners
MEMORY_WARM_UP, MEMORY_STEPS = 2, 3


@dataclass(frozen=True)
class Variant:
    """A trainer to measure. ``settings`` is what a user would put into nnUNetKD_settings."""

    name: str
    trainer: str
    dataset: str
    plans: str
    settings: dict[str, Any] = field(default_factory=dict)


# ---- preparation ----------------------------------------------------------------------------------------------------


def set_environment(workspace: Path, threads: int, compile_network: bool) -> None:
    """Point nnU-Net into ``workspace``; must come before torch and nnU-Net are imported."""
    from nnunet_kd.environment import add_trainers_folder

    os.environ.update(
        nnUNet_raw=str(workspace / "raw"),
        nnUNet_preprocessed=str(workspace / "preprocessed"),
        nnUNet_results=str(workspace / "results"),
        nnUNet_extTrainer=add_trainers_folder(os.environ.get("nnUNet_extTrainer", "")),
        nnUNet_compile="t" if compile_network else "f",
        nnUNet_n_proc_DA="0",
        OMP_NUM_THREADS=str(threads),
        MPLBACKEND="Agg",
    )


def find_dataset(name_or_id: str) -> Path:
    """The dataset's folder in nnUNet_preprocessed as the caller set it."""
    pattern = name_or_id if name_or_id.startswith("Dataset") else f"Dataset{int(name_or_id):03d}_*"
    found = sorted(Path(os.environ["nnUNet_preprocessed"]).glob(pattern))
    if len(found) != 1:
        sys.exit(f"{os.environ['nnUNet_preprocessed']} must hold exactly one {pattern}, not {len(found)}.")
    return found[0].resolve()


def dataset_names(dataset: str, count: int) -> list[str]:
    """The dataset and links to it under unused ids."""
    unused = (number for number in range(501, 999) if number != int(dataset[7:10]))
    return [dataset, *(f"Dataset{next(unused)}_Copy{index}" for index in range(1, count))]


def joint_name(dataset: str, num_members: int) -> str:
    """The joint dataset of so many members, under an id that no link has."""
    own = int(dataset[7:10])
    return f"Dataset{(700 if own < 600 else 300) + num_members}_Joint"


def link_dataset(source: Path, name: str, args: argparse.Namespace) -> None:
    """A dataset ``name`` that shares the images of ``source`` and has copies of its descriptions."""
    target = Path(os.environ["nnUNet_preprocessed"]) / name
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir():
            (target / entry.name).symlink_to(entry, target_is_directory=True)
    for file in ("dataset.json", "dataset_fingerprint.json", "splits_final.json"):
        if (source / file).is_file():
            (target / file).write_text((source / file).read_text())
    plans = json.loads((source / f"{args.p}.json").read_text())
    if args.batch_size is not None:
        plans["configurations"][args.c]["batch_size"] = args.batch_size
    (target / f"{args.p}.json").write_text(json.dumps({**plans, "dataset_name": name}))


def plan_joint_dataset(members: Sequence[str], plans_name: str, configuration: str) -> str:
    """Plan a joint dataset whose teacher has the members' architecture.

    Returns:
        Where the architecture came from, for the report.
    """
    from nnunet_kd.data.member import Member
    from nnunet_kd.planners.joint_planner import plan_joint

    own = Member(members[0], plans_name, configuration).configuration_manager.configuration["architecture"]
    name = joint_name(members[0], len(members))
    width = own["arch_kwargs"]["features_per_stage"][0] / BASE_FEATURES
    settings: dict[str, Any] = {"plans_name": JOINT_PLANS, "gpu_memory_target": PLENTY_GB, "width": width}
    plan_joint(name, members, plans_name, [configuration], **settings)
    path = Path(os.environ["nnUNet_preprocessed"]) / name / f"{JOINT_PLANS}.json"
    plans = json.loads(path.read_text())
    planned = plans["configurations"][configuration]
    if planned["architecture"] == own:
        return "as planned for the joint teacher"
    planned["architecture"] = own
    path.write_text(json.dumps(plans))
    return "the dataset's, which the joint planner would not choose"


def list_variants(dataset: str, args: argparse.Namespace) -> list[Variant]:
    """Everything that is measured; stock comes first."""
    from nnunet_kd.data.tasks import Tasks
    from nnunet_kd.training.shape_intensity import LAST_FEATURES
    from nnunet_kd.training.terms import default_terms

    preset = default_terms(Tasks())
    logits = [{**term, "schedule": NO_SCHEDULE} for term in preset if term.get("on", "logits") == "logits"]
    both = [*logits, {**FEATURES, "schedule": NO_SCHEDULE}]
    variants = [
        Variant(STOCK, "nnUNetTrainer", dataset, args.p),
        Variant("control", "nnUNetTrainerKDControl", dataset, args.p),
    ]
    model = f"{joint_name(dataset, 2)}/{TEACHER_TRAINER}__{JOINT_PLANS}__{args.c}"
    for precision in args.precision:
        teachers = {"joint": {"model": model, "precision": precision}}
        for what, terms in (("logits", logits), ("logits + features", both)):
            name = f"student, {what}" + (f" (teacher {precision})" if args.device == "cpu" else "")
            settings = {"teachers": teachers, "terms": terms}
            variants.append(Variant(name, "nnUNetTrainerKDStudent", dataset, args.p, settings))
        name = "SIKD student" + (f" (teacher {precision})" if args.device == "cpu" else "")
        settings = {
            "teachers": {"shape": {"precision": precision}},
            "terms": [{**LAST_FEATURES, "schedule": NO_SCHEDULE}],
        }
        variants.append(Variant(name, "nnUNetTrainerSIKDStudent", dataset, args.p, settings))
    return variants + [
        Variant(f"teacher, {count} members", TEACHER_TRAINER, joint_name(dataset, count), JOINT_PLANS)
        for count in args.members
    ]


def prepare(source: Path, args: argparse.Namespace) -> str:
    """Link the members, plan the joint datasets, write the untrained teachers' checkpoints.

    Returns:
        Where the teachers' architecture came from, for the report.
    """
    counts = sorted({2, *args.members})
    names = dataset_names(source.name, counts[-1])
    for name in names:
        link_dataset(source, name, args)
    origins = {plan_joint_dataset(names[:count], args.p, args.c) for count in counts}
    for trainer_name, name, plans in (
        (TEACHER_TRAINER, joint_name(source.name, 2), JOINT_PLANS),
        (SHAPE_TRAINER, source.name, args.p),
    ):
        trainer = build_trainer(Variant("", trainer_name, name, plans), args)
        make_decided(trainer.unwrapped_network())
        trainer.disable_checkpointing = False
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    return "; ".join(sorted(origins))


def make_decided(network: Any) -> None:
    """Let an untrained network favour the background, as a trained one does in most voxels.

    Without it all classes are nearly equal, their order depends on the precision, and bfloat16 may be refused.
    """
    import torch

    with torch.no_grad():
        for layer in network.decoder.seg_layers:
            layer.bias -= 1
            backgrounds = [head.start for head in getattr(network, "heads", []) if not head.regions]
            layer.bias[backgrounds or [0]] += 2


# ---- one trainer ----------------------------------------------------------------------------------------------------


def build_trainer(variant: Variant, args: argparse.Namespace) -> Any:
    """The trainer as nnUNetv2_train makes it, at the beginning of its first epoch."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    os.environ["nnUNetKD_settings"] = json.dumps(variant.settings)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer: Any = get_trainer_from_args(
            variant.dataset, args.c, FOLD, variant.trainer, variant.plans, False, torch.device(args.device)
        )
        trainer.disable_checkpointing = True
        trainer.on_train_start()
        trainer.on_train_epoch_start()
    return trainer


class Subject:
    """A trainer with its fixed batches."""

    def __init__(self, variant: Variant, args: argparse.Namespace) -> None:
        self.variant = variant
        self.trainer = build_trainer(variant, args)
        self.members: list[str] = list(getattr(self.trainer, "members", []))
        self.steps_taken = 0
        self.seed_loaders()
        self.batches = [self.load() for _ in range(args.batches)]
        if args.device == "cuda":  # nnU-Net's own augmenters pin batches too
            self.batches = [{key: pin(value) for key, value in batch.items()} for batch in self.batches]

    def seed_loaders(self) -> None:
        """Let the n-th batch of every trainer be the same, whichever member it is drawn from."""
        loader = self.trainer.dataloader_train.data_loader
        numbers = itertools.count()
        for stock_loader in getattr(loader, "loaders", {"": loader}).values():
            stock_loader.generate_train_batch = functools.partial(
                draw_seeded, stock_loader.generate_train_batch, numbers
            )

    def load(self) -> dict[str, Any]:
        """The next batch of the trainer's own loader."""
        return next(self.trainer.dataloader_train)

    def step(self) -> float:
        """Seconds of one training step; a joint teacher speaks for its members in turn."""
        batch = dict(self.batches[self.steps_taken % len(self.batches)])  # a trainer may replace entries
        if self.members:
            batch["member"] = self.members[self.steps_taken % len(self.members)]
        self.steps_taken += 1
        wait_for(self.trainer.device)
        start = time.perf_counter()
        self.trainer.train_step(batch)
        wait_for(self.trainer.device)
        return time.perf_counter() - start


def pin(value: Any) -> Any:
    """Tensors, also in a list, in pinned memory."""
    if isinstance(value, list):
        return [pin(item) for item in value]
    return value.pin_memory() if hasattr(value, "pin_memory") else value


def draw_seeded(generate: Callable[[], dict[str, Any]], numbers: Iterator[int]) -> dict[str, Any]:
    """Call a stock loader's ``generate`` with the random state that belongs to this batch's number."""
    import numpy as np
    import torch

    number = next(numbers)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 (nnU-Net's loader draws from the global generator)
    torch.manual_seed(number)
    return generate()


def wait_for(device: Any) -> None:
    """Wait until the device has nothing to do."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def average(trainer: Any, batch: dict[str, Any]) -> None:
    """Make the class-wise averaged images of a batch."""
    trainer.teachers["shape"].see(batch)
    wait_for(trainer.device)


def check_equal(subjects: Sequence[Subject]) -> None:
    """All trainers must do the same work: weights of one shape, but for the heads, and the same batches."""
    import torch

    def shapes(subject: Subject) -> dict[str, Any]:
        weights = subject.trainer.network.state_dict()
        return {key.removeprefix("_orig_mod."): w.shape for key, w in weights.items() if "seg_layers" not in key}

    for subject in subjects[1:]:
        if shapes(subject) != shapes(subjects[0]):
            sys.exit(f"{subject.variant.name} does not have the network of stock nnU-Net.")
        for own, stock in zip(subject.batches, subjects[0].batches, strict=True):
            if not torch.equal(own["data"], stock["data"]):
                sys.exit(f"{subject.variant.name} did not get the batches of stock nnU-Net.")


# ---- measurements ---------------------------------------------------------------------------------------------------


def in_rotation(actions: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Seconds of every action per round; each round begins with another action."""
    seconds: list[list[float]] = [[] for _ in actions]
    for number in range(rounds):
        for offset in range(len(actions)):
            index = (number + offset) % len(actions)
            seconds[index].append(actions[index]())
    return seconds


def timed(action: Callable[[], Any]) -> float:
    """Seconds of ``action``."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def summarise(seconds: Sequence[float], stock: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of the seconds and of the ratio to stock within a round."""
    import numpy as np

    ratios = np.array(seconds) / np.array(stock)
    names = ("lower_quartile", "median", "upper_quartile")
    return {
        key: dict(zip(names, np.percentile(values, (25, 50, 75)).tolist(), strict=True))
        for key, values in (("seconds", seconds), ("ratio", ratios))
    }


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process, now or at its peak since :func:`reset_peak`."""
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS; the peak since the start
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM" if peak else "VmRSS"))
    return int(line.split()[1]) * 1024


def reset_peak(device: str) -> None:
    """Forget the peak so far, which getrusage cannot do; it even counts the process that this one was forked from."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        with contextlib.suppress(AttributeError):  # other C libraries than GNU's
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def measure_memory(variant: Variant, args: argparse.Namespace) -> dict[str, int]:
    """Bytes that this trainer adds to this fresh process: before its first step, and at the peak of its steps."""
    import torch
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    # The search imports every trainer there is, but for nnUNetTrainer itself it stops earlier.
    recursive_find_trainer_class_by_name(TEACHER_TRAINER)
    cuda = args.device == "cuda"
    libraries = 0 if cuda else resident_bytes(peak=False)
    subject = Subject(variant, args)
    before_steps = torch.cuda.memory_allocated() if cuda else resident_bytes(peak=False)
    for _ in range(MEMORY_WARM_UP):
        subject.step()
    reset_peak(args.device)
    for _ in range(MEMORY_STEPS):
        subject.step()
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes(peak=True)
    return {"before_steps": before_steps - libraries, "peak": peak - libraries}


def measure_memory_in_fresh_process(name: str, workspace: Path) -> dict[str, int]:
    """Run this file again for one variant, without the variables that would make the C library keep memory."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, __file__, *sys.argv[1:], "--workspace", str(workspace), "--memory_of", name]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        sys.exit(f"The memory of '{name}' could not be measured:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def describe_hardware(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as two tables."""
    hardware, settings = report["hardware"], report["settings"]
    where = f"{hardware['gpu']}, " if hardware["gpu"] else ""
    lines = [
        f"{where}{hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}; dataset {settings['d']} "
        f"{settings['c']} {settings['p']}: patch {report['patch_size']}, batch {report['batch_size']}, features "
        f"{report['features']}; {settings['rounds']} rounds, compile {'on' if settings['compile'] else 'off'}.",
        f"Architecture of the joint teachers: {report['architecture']}.",
        *report["notes"],
        "",
        "| training step | seconds | ratio to stock (quartiles) | peak memory, GB | ratio to stock |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["steps"].items():
        peak = row["memory"]["peak"]
        of_stock = peak / report["steps"][STOCK]["memory"]["peak"]
        lines.append(f"| {name} | {row['seconds']['median']:.4g} | {ratio(row)} | {peak / 1e9:.2f} | {of_stock:.3f} |")
    averaging = report["averaging"]
    lines += ["", f"Class-wise averaging of a batch takes {ratio(averaging)} of a stock step."]
    lines += ["", "| loader, one batch | seconds | ratio to stock (quartiles) |", "|---|---|---|"]
    lines += [f"| {name} | {row['seconds']['median']:.4g} | {ratio(row)} |" for name, row in report["loaders"].items()]
    return "\n".join(lines)


def ratio(row: dict[str, Any]) -> str:
    """Median and quartiles as text."""
    values = row["ratio"]
    return f"{values['median']:.3f} ({values['lower_quartile']:.3f} to {values['upper_quartile']:.3f})"


def measure(variants: Sequence[Variant], args: argparse.Namespace, workspace: Path) -> dict[str, Any]:
    """Memory first, while this process is small; then steps and loaders in rotation."""
    memory = {variant.name: measure_memory_in_fresh_process(variant.name, workspace) for variant in variants}
    subjects = [Subject(variant, args) for variant in variants]
    check_equal(subjects)
    for subject in subjects:
        # on CUDA every member's shapes and graphs are made when it speaks first
        for _ in range(max(args.warm_up, len(subject.members) if args.device == "cuda" else 0)):
            subject.step()
    seconds = in_rotation([subject.step for subject in subjects], args.rounds)
    with_own_loader = [subject for subject in subjects if subject.members or subject.variant.name == STOCK]
    loading = in_rotation([functools.partial(timed, s.load) for s in with_own_loader], args.loader_rounds)
    shape = next(subject for subject in subjects if "shape" in getattr(subject.trainer, "teachers", {}))
    moved = dict(shape.batches[0])
    shape.trainer.move_to_device(moved)
    averaged = functools.partial(timed, lambda: average(shape.trainer, moved))
    averaging = in_rotation([subjects[0].step, averaged], args.rounds)
    configuration = subjects[0].trainer.configuration_manager
    taught = [(s.variant.name, teacher) for s in subjects for teacher in getattr(s.trainer, "teachers", {}).values()]
    return {
        "hardware": describe_hardware(args.device),
        "settings": {key: value for key, value in vars(args).items() if key not in ("o", "workspace", "memory_of")},
        "patch_size": list(configuration.patch_size),
        "batch_size": configuration.batch_size,
        "features": configuration.network_arch_init_kwargs["features_per_stage"],
        "notes": [f"{name}: {teacher.precision_note}." for name, teacher in taught if teacher.precision_note],
        "variants": [asdict(variant) for variant in variants],
        "steps": {
            subject.variant.name: {
                **summarise(own, seconds[0]),
                "memory": memory[subject.variant.name],
                "all_seconds": own,
            }
            for subject, own in zip(subjects, seconds, strict=True)
        },
        "averaging": {**summarise(averaging[1], averaging[0]), "all_seconds": averaging[1]},
        "loaders": {
            subject.variant.name: {**summarise(own, loading[0]), "all_seconds": own}
            for subject, own in zip(with_own_loader, loading, strict=True)
        },
    }


def main() -> None:
    """Parse, prepare a workspace, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="Id or name of a dataset that is preprocessed")
    parser.add_argument("-c", required=True, help="Configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="Plans")
    parser.add_argument("--batch_size", type=int, default=None, help="Default: as planned")
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="torch.compile as stock nnU-Net does (CUDA only)")
    parser.add_argument("--precision", nargs="+", default=["auto"], choices=("auto", "float32"), help="CPU: teacher's")
    parser.add_argument("--members", nargs="+", type=int, default=[2, 4, 16], help="Members of the joint teachers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loader_rounds", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=3, help="Steps of each trainer before the first round")
    parser.add_argument("--batches", type=int, default=4, help="Fixed batches per trainer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-o", type=Path, required=True, help="JSON file for the report")
    parser.add_argument("--workspace", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--memory_of", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile and args.device != "cuda":
        parser.error("--compile needs -device cuda; stock nnU-Net does not compile on a CPU")
    source = find_dataset(args.d)
    with tempfile.TemporaryDirectory() if args.workspace is None else contextlib.nullcontext(args.workspace) as folder:
        set_environment(Path(folder), args.threads, args.compile)
        import torch

        torch.set_num_threads(args.threads)
        torch.backends.cudnn.benchmark = args.device == "cuda"  # as nnUNetv2_train does
        variants = list_variants(source.name, args)
        if args.memory_of is not None:
            variant = next(variant for variant in variants if variant.name == args.memory_of)
            print(json.dumps(measure_memory(variant, args)))
            return
        architecture = prepare(source, args)
        report = {"architecture": architecture, **measure(variants, args, Path(folder))}
    args.o.write_text(json.dumps(report, indent=2))
    print(to_markdown(report))


if __name__ == "__main__":
    main()
