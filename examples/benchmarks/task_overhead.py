"""What heads cost: training steps, loading and prediction with classification and detection against stock nnU-Net.

Everything runs in one process on small synthetic datasets with the shapes and widths of stock plans: a 2D one with
patches of 256 x 256 and a 3D one with patches of 32 x 96 x 96. Actions take turns, and the ratio to stock is formed
within a round, so that a busy machine disturbs all of them.

* Training: stock nnUNetTrainer on stock plans; the same trainer on plans with both heads, which it leaves unused;
  nnUNetTrainerKDControl on plans with the classification head, with the detection head, with both. All take the same
  batches, with a few boxes in every patch.
* Loading: one batch of the stock loader, and one that also carries class labels and boxes.
* Prediction of a preprocessed case with mirroring: nnUNetPredictor against CasePredictor with all tasks. The networks
  are untrained, so the bias of the detection head's scores is set such that a given number of candidates per view pass
  the threshold. Their boxes lie anywhere, so that suppression and clustering have more to do than with trained weights.

Beside the times stand the multiplications and additions of convolutions in a forward pass, which no machine disturbs.

    python examples/benchmarks/task_overhead.py -o cpu.json
    python examples/benchmarks/task_overhead.py -o cuda.json -device cuda --batch_size 0 --case_tiles 3
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from step_overhead import (
    STOCK,
    Subject,
    Variant,
    describe_hardware,
    in_rotation,
    ratio,
    set_environment,
    summarise,
    timed,
    wait_for,
)

PATCH = {2: (256, 256), 3: (32, 96, 96)}
BATCH = {2: 49, 3: 4}  # what stock nnU-Net plans for these patches with 8 GB
STRIDES = {
    2: [[1, 1]] + [[2, 2]] * 6,
    3: [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
}
BOX_SIZES = {2: (6, 40), 3: (4, 20)}  # voxels, of the smallest and largest objects
BOXES_PER_CASE = 12
NUM_CASES = 4
CLASSES, GRADES = ["lesion", "cyst"], ["low", "middle", "high"]
CONTROL = "nnUNetTrainerKDControl"
UNUSED, CLASSIFICATION, DETECTION, ALL = "heads unused", "classification head", "detection head", "all heads"
PLANS = {
    STOCK: "nnUNetPlans",
    UNUSED: "bothPlans",
    CLASSIFICATION: "classPlans",
    DETECTION: "boxPlans",
    ALL: "bothPlans",
}


# ---- dataset --------------------------------------------------------------------------------------------------------


def dataset_name(dimension: int) -> str:
    """Of the synthetic dataset."""
    return f"Dataset{dimension:03d}_Synthetic{dimension}D"


def configuration_name(dimension: int) -> str:
    """Stock name of the configuration."""
    return {2: "2d", 3: "3d_fullres"}[dimension]


def write_dataset(dimension: int, batch_size: int) -> None:
    """A preprocessed dataset of noise with cuboids, their segmentation and boxes, random classes, and all plans."""
    import numpy as np
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset_name(dimension)
    cases = folder / "data"
    cases.mkdir(parents=True)
    shape = tuple(round(1.5 * size) for size in PATCH[dimension])
    shape = (1,) * (3 - dimension) + shape
    random = np.random.default_rng(0)
    boxes, sizes, rows = {}, [], ["case,grade"]
    for number in range(NUM_CASES):
        case = f"case_{number}"
        image = random.standard_normal((1, *shape), dtype=np.float32)
        segmentation = np.zeros((1, *shape), dtype=np.int16)
        boxes[case] = []
        for _ in range(BOXES_PER_CASE):
            size = random.integers(*BOX_SIZES[dimension], dimension)
            lower = random.integers(0, np.array(shape[-dimension:]) - size)
            place = (0,) * (4 - dimension) + tuple(map(slice, lower, lower + size))
            label = int(random.integers(2))
            segmentation[place] = label + 1
            image[place] += 2
            corners = [*reversed(lower.tolist()), *reversed((lower + size).tolist())]
            boxes[case].append({"label": CLASSES[label], "box": corners})
            sizes.append(size)
        rows.append(f"{case},{GRADES[number % 3]}")
        properties = {
            "bbox_used_for_cropping": [[0, length] for length in shape],
            "shape_before_cropping": shape,
            "class_locations": {label: np.argwhere(segmentation == label)[:10000] for label in (1, 2)},
        }
        chunks = tuple(min(length, 32) for length in shape)
        nnUNetDatasetBlosc2.save_case(image, segmentation, properties, str(cases / case), (1, *chunks), (1, *chunks))
    (folder / "boxes.json").write_text(json.dumps(boxes))
    (folder / "classification.csv").write_text("\n".join(rows) + "\n")
    everyone = [f"case_{number}" for number in range(NUM_CASES)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": everyone, "val": everyone[:1]}]))
    (folder / "dataset_fingerprint.json").write_text("{}")
    (folder / "dataset.json").write_text(json.dumps(dataset_json()))
    write_plans(folder, dimension, batch_size, np.array(sizes, dtype=float))


def dataset_json() -> dict[str, Any]:
    """Declares both tasks."""
    classification = {"column": "grade", "classes": GRADES}
    return {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "lesion": 1, "cyst": 2},
        "numTraining": NUM_CASES,
        "file_ending": ".nii.gz",
        "nnunet_kd": {"tasks": {"classification": [classification], "detection": {"classes": CLASSES}}},
    }


def write_plans(folder: Path, dimension: int, batch_size: int, box_sizes: Any) -> None:
    """Stock plans, and the same with the heads that our planner would add."""
    import numpy as np

    from nnunet_kd.networks.multitask import multitask_architecture
    from nnunet_kd.tasks.detection_plan import plan_detection

    stages = len(STRIDES[dimension])
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(32 * 2**stage, {2: 512, 3: 320}[dimension]) for stage in range(stages)],
            "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
            "kernel_sizes": [[3] * dimension] * stages,
            "strides": STRIDES[dimension],
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    strides = np.cumprod(STRIDES[dimension], 0)[:-1].tolist()
    boxes = plan_detection(box_sizes, strides, PATCH[dimension], CLASSES).to_dict()
    classes = {"targets": [["grade", len(GRADES)]]}
    architectures = {
        PLANS[STOCK]: architecture,
        PLANS[CLASSIFICATION]: multitask_architecture(architecture, classes, None),
        PLANS[DETECTION]: multitask_architecture(architecture, None, boxes),
        PLANS[ALL]: multitask_architecture(architecture, classes, boxes),
    }
    for name, own in architectures.items():
        configuration: dict[str, Any] = {
            "data_identifier": "data",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": batch_size,
            "patch_size": PATCH[dimension],
            "spacing": [1.0] * dimension,
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "architecture": own,
            "batch_dice": True,
        }
        for kind in ("data", "seg", "probabilities"):
            configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
            configuration[f"resampling_fn_{kind}_kwargs"] = {"is_seg": kind == "seg", "order": 1, "order_z": 0}
        plans = {
            "dataset_name": folder.name,
            "plans_name": name,
            "label_manager": "LabelManager",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {configuration_name(dimension): configuration},
        }
        (folder / f"{name}.json").write_text(json.dumps(plans))


# ---- training -------------------------------------------------------------------------------------------------------


def build_subjects(dimension: int, args: argparse.Namespace) -> dict[str, Subject]:
    """All trainers, with the batches of the one that has all heads."""
    own = argparse.Namespace(**{**vars(args), "c": configuration_name(dimension)})
    subjects = {}
    for name, plans in PLANS.items():
        trainer = "nnUNetTrainer" if name in (STOCK, UNUSED) else CONTROL
        subjects[name] = Subject(Variant(name, trainer, dataset_name(dimension), plans), own)
    for subject in subjects.values():
        subject.batches = subjects[ALL].batches
    return subjects


def unwrapped(subject: Subject) -> Any:
    """The network, not compiled."""
    return getattr(subject.trainer.network, "_orig_mod", subject.trainer.network)


def forward_operations(subject: Subject, dimension: int) -> int:
    """Multiplications and additions of a forward pass for one patch, with the heads that this trainer uses."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, 1, *PATCH[dimension], device=subject.trainer.device)
    options = {} if subject.variant.name in (STOCK, UNUSED) else {"tasks": True}
    network = unwrapped(subject).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image, **options)
    network.train()
    return int(counter.get_total_flops())


# ---- prediction -----------------------------------------------------------------------------------------------------


def build_predictor(kind: Any, subject: Subject, dimension: int) -> Any:
    """A predictor of ``kind`` with mirroring and the subject's weights."""
    predictor = kind(device=subject.trainer.device, allow_tqdm=False)
    network = copy.deepcopy(unwrapped(subject))
    network.decoder.deep_supervision = False
    trainer = subject.trainer
    plans = (trainer.plans_manager, trainer.configuration_manager, [network.state_dict()], trainer.dataset_json)
    predictor.manual_initialization(network, *plans, "nnUNetTrainer", tuple(range(dimension)))
    return predictor


def let_pass(predictor: Any, dimension: int, image: Any, count: int | None) -> None:
    """Set the score's bias so that ``count`` logits of a patch pass the threshold; None lets nearly all pass."""
    import torch

    head, (weights,) = predictor.network.heads.detection, predictor.list_of_parameters
    patch = image[(slice(None), *(slice(0, size) for size in PATCH[dimension][-dimension:]))]
    patch = patch if dimension == 3 else image[:, 0, : PATCH[2][0], : PATCH[2][1]]
    predictor.network.eval()
    with torch.no_grad():
        maps = predictor.network(patch[None].to(predictor.device), tasks=True).detection
        logits = torch.cat([level.flatten() for level in maps.class_logits])
        least = logits.min() if count is None else logits.topk(count).values[-1]
        threshold = torch.tensor(predictor.detection.plan.score_threshold).logit()
        head.classify.bias += threshold.to(least) - least
    weights.update({key: value.clone() for key, value in predictor.network.state_dict().items()})


def count_boxes(predictor: Any, image: Any) -> dict[str, Any]:
    """Boxes per view after suppression, and boxes of the case."""
    merged = {}

    def counting(folds: Any, *args: Any) -> Any:
        merged["views"] = sum(len(fold.boxes.tiles) for fold in folds)
        merged["boxes_in_views"] = sum(len(fold.boxes.scores) for fold in folds)
        return case_boxes(folds, *args)

    from nnunet_kd.environment import replaced
    from nnunet_kd.inference import case_predictor

    case_boxes = case_predictor.case_boxes
    with replaced(case_predictor, case_boxes=counting):
        labels, _, _ = predictor.predict_case(image).boxes
    return {"views": merged["views"], "per_view": merged["boxes_in_views"] / merged["views"], "case": len(labels)}


def measure_prediction(
    subjects: dict[str, Subject], dimension: int, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Seconds and ratios for each number of candidates."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_kd.inference.case_predictor import CasePredictor

    # so many steps of half a tile along each axis
    shape = [size * (args.case_tiles + 1) // 2 for size in PATCH[dimension]]
    image = torch.randn(1, *[1] * (3 - dimension), *shape, generator=torch.Generator().manual_seed(0))
    stock = build_predictor(nnUNetPredictor, subjects[STOCK], dimension)
    actions: dict[str, Callable[[], Any]] = {
        STOCK: functools.partial(stock.predict_logits_from_preprocessed_data, image)
    }
    notes: dict[str, Any] = {STOCK: None}
    for count in args.candidates:
        predictor = build_predictor(CasePredictor, subjects[ALL], dimension)
        predictor.choose_tasks()
        let_pass(predictor, dimension, image, None if count < 0 else count)
        name = "all tasks, all anchors pass" if count < 0 else f"all tasks, {count} candidates"
        notes[name] = count_boxes(predictor, image)
        actions[name] = functools.partial(predictor.predict_case, image)
    actions[STOCK]()
    seconds = in_rotation([functools.partial(timed, action) for action in actions.values()], args.predict_rounds)
    return {
        name: {**summarise(own, seconds[0]), "boxes": notes[name], "all_seconds": own}
        for name, own in zip(actions, seconds, strict=True)
    }


# ---- report ---------------------------------------------------------------------------------------------------------


def rows_of(names: Sequence[str], seconds: Sequence[Sequence[float]]) -> dict[str, dict[str, Any]]:
    """One summary per action; the first is what the others are compared with."""
    return {
        name: {**summarise(own, seconds[0]), "all_seconds": list(own)} for name, own in zip(names, seconds, strict=True)
    }


def measure(dimension: int, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one dimension."""
    write_dataset(dimension, args.batch_size or BATCH[dimension])
    subjects = build_subjects(dimension, args)
    operations = {name: forward_operations(subject, dimension) for name, subject in subjects.items()}
    for subject in subjects.values():
        for _ in range(args.warm_up):
            subject.step()
    steps = rows_of(list(subjects), in_rotation([subject.step for subject in subjects.values()], args.rounds))
    for name, row in steps.items():
        row["operations"] = operations[name]
    loading = [functools.partial(timed, subjects[name].load) for name in (STOCK, ALL)]
    loaders = rows_of([STOCK, "with classes and boxes"], in_rotation(loading, args.loader_rounds))
    wait_for(subjects[STOCK].trainer.device)
    plan = subjects[ALL].trainer.detection_plan
    boxes = [len(image) for batch in subjects[ALL].batches for image in batch["boxes"]]
    return {
        "patch_size": list(PATCH[dimension]),
        "batch_size": args.batch_size or BATCH[dimension],
        "levels": [list(stride) for stride in plan.strides],
        "boxes_per_patch": sum(boxes) / len(boxes),
        "steps": steps,
        "loaders": loaders,
        "predictions": measure_prediction(subjects, dimension, args),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    hardware = report["hardware"]
    where = f"{hardware['gpu']}, " if hardware["gpu"] else ""
    lines = [f"{where}{hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}."]
    for dimension, own in report["dimensions"].items():
        lines += [
            "",
            f"{dimension}D: patch {own['patch_size']}, batch {own['batch_size']}, {own['boxes_per_patch']:.1f} boxes "
            f"per patch, detection on levels of stride {own['levels']}.",
            "",
            "| training step | seconds | ratio to stock (quartiles) | operations of a forward pass, ratio |",
            "|---|---|---|---|",
        ]
        for name, row in own["steps"].items():
            operations = row["operations"] / own["steps"][STOCK]["operations"]
            lines.append(f"| {name} | {row['seconds']['median']:.4g} | {ratio(row)} | {operations:.3f} |")
        lines += ["", "| loader, one batch | seconds | ratio to stock (quartiles) |", "|---|---|---|"]
        lines += [f"| {name} | {row['seconds']['median']:.4g} | {ratio(row)} |" for name, row in own["loaders"].items()]
        lines += [
            "",
            "| prediction of a case | seconds | ratio to stock (quartiles) | boxes per view, in the case |",
            "|---|---|---|---|",
        ]
        for name, row in own["predictions"].items():
            boxes = row["boxes"]
            found = f"{boxes['per_view']:.1f} in {boxes['views']} views, {boxes['case']}" if boxes else ""
            lines.append(f"| {name} | {row['seconds']['median']:.4g} | {ratio(row)} | {found} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, prepare a workspace, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dimensions", nargs="+", type=int, default=[2, 3], choices=(2, 3))
    parser.add_argument("--batch_size", type=int, default=2, help="0: as stock nnU-Net plans for 8 GB")
    parser.add_argument("--compile", action="store_true", help="torch.compile as stock nnU-Net does (CUDA only)")
    parser.add_argument("--rounds", type=int, default=9, help="Training steps of each trainer")
    parser.add_argument("--loader_rounds", type=int, default=20)
    parser.add_argument("--predict_rounds", type=int, default=5)
    parser.add_argument("--case_tiles", type=int, default=2, help="Tiles of the predicted case along each axis")
    parser.add_argument("--candidates", nargs="+", type=int, default=[0, 50, -1], help="Per view; -1: all anchors")
    parser.add_argument("--warm_up", type=int, default=2, help="Steps of each trainer before the first round")
    parser.add_argument("--batches", type=int, default=2, help="Fixed batches")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-o", type=Path, required=True, help="JSON file for the report")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        set_environment(Path(folder), args.threads, args.compile)
        import torch

        torch.set_num_threads(args.threads)
        torch.backends.cudnn.benchmark = args.device == "cuda"  # as nnUNetv2_train does
        report = {
            "hardware": describe_hardware(args.device),
            "settings": {key: value for key, value in vars(args).items() if key != "o"},
            "dimensions": {str(dimension): measure(dimension, args) for dimension in args.dimensions},
        }
    args.o.write_text(json.dumps(report, indent=2))
    print(to_markdown(report))


if __name__ == "__main__":
    main()
