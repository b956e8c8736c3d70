"""The command nnUNetKD_predict: nnUNetv2_predict for any model folder, all its tasks, one head of a joint teacher."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_kd.cli.errors import clear_errors, need_folder
from nnunet_kd.environment import TRAINERS_VARIABLE, add_trainers_folder
from nnunet_kd.errors import NnUNetKDError

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from numpy import float64
    from numpy.typing import NDArray

    from nnunet_kd.inference.trained_model import TrainedModel

DOMAINS = ("source", "target")
DATASET_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs", "gt_segmentations")
ARGUMENTS_FILE = "predict_from_raw_data_args.json"  # nnU-Net writes it beside dataset.json into predictions


@clear_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_predict."""
    args = _parser().parse_args(arguments)
    os.environ[TRAINERS_VARIABLE] = add_trainers_folder(os.environ.get(TRAINERS_VARIABLE, ""))
    # imported late, so that --help and errors in the arguments take no seconds
    import torch

    from nnunet_kd.inference.input_files import input_images, need_all_channels, unreadable_images_named
    from nnunet_kd.inference.predict import build_predictor
    from nnunet_kd.inference.trained_model import open_model
    from nnunet_kd.spaces.channels import channel_names

    if args.code is not None and args.translate is not None:
        raise NnUNetKDError("--code chooses a segmentation and --translate gives an image. Leave one of them out.")
    if not 0 <= args.part_id < args.num_parts:
        raise NnUNetKDError(f"-part_id {args.part_id} must be at least 0 and below -num_parts {args.num_parts}.")
    _need_output_folder(Path(args.o), writes_dataset_json=args.translate is None)
    model = open_model(args.m, args.f, args.chk)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise NnUNetKDError("No CUDA device is available. Use -device cpu, or -device mps on Apple silicon.")
    if args.device == "cuda":
        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
    elif args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(multiprocessing.cpu_count())
    predictor = build_predictor(
        model,
        head=args.head,
        member=args.member,
        tasks=args.tasks,
        box_merging=args.box_merging,
        tile_step_size=args.step_size,
        use_mirroring=not args.disable_tta,
        perform_everything_on_device=not args.not_on_device,
        device=torch.device(args.device),
        verbose=args.verbose,
        verbose_preprocessing=args.verbose,
        allow_tqdm=not args.disable_progress_bar,
    )
    previous_stage = predictor.configuration_manager.previous_stage_name
    if previous_stage is not None and args.prev_stage_predictions is None:
        raise NnUNetKDError(
            f"{model.folder} is the second stage of a cascade. Predict {previous_stage} first and give its folder with "
            f"-prev_stage_predictions."
        )
    minimum = None if args.false_positives is None else _minimum_scores(args, model, predictor)
    file_ending = predictor.dataset_json["file_ending"]
    reader = predictor.plans_manager.image_reader_writer_class
    images = input_images(args.i, file_ending)
    need_all_channels(images, file_ending, channel_names(predictor.dataset_json), reader)
    os.makedirs(args.o, exist_ok=True)
    with unreadable_images_named(images, file_ending, reader()):
        _predict(args, model, predictor, images)
    if minimum is not None:
        _report(Path(args.o), predictor, minimum)


def _report(folder: Path, predictor: Any, minimum: NDArray[float64]) -> None:
    from nnunet_kd.inference.operating_point import write_reported

    if not predictor.task_files(folder).boxes_file.is_file():
        return  # this call had no case to predict (-num_parts)
    plan = predictor.detection.plan
    written = write_reported(folder, plan.classes, plan.dimension, minimum)
    chosen = ", ".join(f"{name} {score:.3f}" for name, score in zip(plan.classes, minimum, strict=True))
    print(f"Wrote {written}: the boxes that score at least {chosen}.")
    if not minimum.all():
        print("A score of 0: all boxes of the validation together had fewer false positives, so that all are reported.")


def _minimum_scores(args: argparse.Namespace, model: TrainedModel, predictor: Any) -> NDArray[float64]:
    """Of the boxes to report; before anything is predicted, because there may be none."""
    from nnunet_kd.inference.operating_point import minimum_scores
    from nnunet_kd.inference.plain_model import choose_member

    detection = getattr(predictor, "detection", None)
    if detection is None:
        raise NnUNetKDError("--false_positives chooses among boxes, and none are predicted. Leave it out.")
    member = None if model.joint is None else choose_member(model.joint, args.head, args.member)
    return minimum_scores(model, detection.plan.classes, args.false_positives, member)


def _need_output_folder(folder: Path, *, writes_dataset_json: bool) -> None:
    """Refuse a folder in which predictions would replace a dataset's segmentations or images, or a dataset.json."""
    need_folder("-o", folder)
    if folder.resolve().name in DATASET_FOLDERS and (folder.resolve().parent / "dataset.json").is_file():
        raise NnUNetKDError(f"-o {folder} belongs to a dataset, whose files would be replaced. Choose another folder.")
    has_own = (folder / "dataset.json").is_file() and not (folder / ARGUMENTS_FILE).is_file()
    if writes_dataset_json and has_own:
        raise NnUNetKDError(
            f"-o {folder} holds a dataset.json that no prediction has written (there is no {ARGUMENTS_FILE}), so it is "
            f"probably the folder of a dataset, a model or an ensemble, and the file would be replaced. Choose another "
            f"folder."
        )


def _predict(
    args: argparse.Namespace, model: TrainedModel, predictor: nnUNetPredictor, images: str | list[list[str]]
) -> None:
    """Write the predictions, or translations, of ``images`` into the output folder, which exists."""
    from nnunet_kd.inference.predict import has_heads

    predicts_tasks = has_heads(model, args.head, args.member)
    if predicts_tasks:
        from nnunet_kd.inference.task_predictor import TaskPredictor

        assert isinstance(predictor, TaskPredictor)
        # stock nnU-Net writes the model's dataset.json into the folder before it asks for the cases
        predictor.task_files(Path(args.o)).finished()
    if args.code is not None or args.translate is not None:
        from nnunet_kd.inference.task_codes import choose_prediction, translate_files

        recorded = model.load(next(iter(model.files))).get("nnunet_kd", {})
        choose_prediction(predictor, args.code or args.translate, recorded.get("settings"))
        if args.translate is not None:
            overwrite, bar = not args.continue_prediction, not args.disable_progress_bar
            part = slice(args.part_id, None, args.num_parts)
            translate_files(predictor, images, Path(args.o), overwrite, bar, part)
            return
    shared = {
        "save_probabilities": args.save_probabilities,
        "overwrite": not args.continue_prediction,
        "folder_with_segs_from_prev_stage": args.prev_stage_predictions,
    }
    if args.npp == 0 and args.nps == 0 and not predicts_tasks:
        predictor.predict_from_files_sequential(images, args.o, **shared)
        return
    predictor.predict_from_files(
        images,
        args.o,
        num_processes_preprocessing=args.npp,
        num_processes_segmentation_export=args.nps,
        num_parts=args.num_parts,
        part_id=args.part_id,
        **shared,
    )


def fold(text: str) -> int | str:
    """A fold on the command line: a number or "all"."""
    return text if text == "all" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_predict",
        description="Predict from raw images with a trained model folder, as nnUNetv2_predict does, and all tasks that "
        "the model has. Of a joint teacher, --head says which member or head to predict.",
    )
    parser.add_argument("-m", required=True, help="Model folder; may be relative to nnUNet_results")
    parser.add_argument("--head", default=None, help="Joint teacher: member (name or id) or shared head to predict")
    parser.add_argument("--member", default=None, help="Joint teacher: whose images, if several share the head")
    parser.add_argument(
        "-i",
        required=True,
        nargs="+",
        help="Input folder, or image files; names (CASE_0000...) and file ending as in the training dataset",
    )
    parser.add_argument("-o", required=True, help="Output folder; made if it does not exist")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=("segmentation", "classification", "detection"),
        default=None,
        help="Predict these only. Default: all that the model has; classes go into classification.csv, boxes into "
        "boxes.json of the output folder, beside the segmentations",
    )
    parser.add_argument(
        "--box_merging",
        choices=("cluster", "suppress"),
        default="cluster",
        help="How boxes of tiles, mirrored views and folds become one: weighted clustering (scores are comparable "
        "between one fold and several) or non-maximum suppression. Default: cluster",
    )
    parser.add_argument(
        "--false_positives",
        type=float,
        choices=(0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
        default=None,
        help="Also write boxes_reported.json: those of boxes.json that score as boxes did which had at most so many "
        "false positives per image and class in the final validation of the folds",
    )
    parser.add_argument(
        "--code",
        choices=("self", "seg", "two_step"),
        default=None,
        help="Model of nnUNetTrainerAdaIN: the one-step segmentation (self, the default), that without a code (seg, "
        "for images of the source), or that of the image translated to the source (two_step)",
    )
    parser.add_argument(
        "--translate",
        choices=DOMAINS,
        default=None,
        help="Model of nnUNetTrainerAdaIN: write the images translated to this domain instead of segmentations",
    )
    parser.add_argument("-f", nargs="+", type=fold, default=None, help="Folds. Default: all that are trained")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="Checkpoint. Default: checkpoint_final.pth")
    parser.add_argument("-step_size", type=float, default=0.5, help="Step of the sliding window in tiles. Default: 0.5")
    parser.add_argument("--disable_tta", action="store_true", help="No mirroring: faster, less accurate")
    parser.add_argument("--verbose", action="store_true", help="Say more")
    parser.add_argument("--save_probabilities", action="store_true", help="Also write class probabilities")
    parser.add_argument("--continue_prediction", "--c", action="store_true", help="Keep what is predicted already")
    parser.add_argument("-npp", type=int, default=_default("nnUNet_npp"), help="Preprocessing processes. Default: 3")
    parser.add_argument("-nps", type=int, default=_default("nnUNet_nps"), help="Export processes. Default: 3")
    parser.add_argument("-prev_stage_predictions", default=None, help="Cascade: folder of the previous stage's labels")
    parser.add_argument("-num_parts", type=int, default=1, help="Number of calls that share the cases. Default: 1")
    parser.add_argument("-part_id", type=int, default=0, help="Which of these calls this is, from 0")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="Default: cuda")
    parser.add_argument("--disable_progress_bar", action="store_true", help="No progress bar")
    parser.add_argument("--not_on_device", action="store_true", help="Collect logits in RAM; for very large images")
    return parser


def _default(variable: str) -> int:
    return int(os.environ.get(variable, "3"))


if __name__ == "__main__":
    main()
