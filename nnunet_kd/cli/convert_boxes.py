"""The command nnUNetKD_convert_boxes: boxes.json from COCO, nnDetection or segmentations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from nnunet_kd.cli.errors import clear_errors


@clear_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_convert_boxes."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.coco is not None and args.min_voxels != 1:
        parser.error("--min_voxels counts voxels, and COCO boxes have none")
    # imported late, so that --help and errors in the arguments take no seconds
    from nnunetv2.paths import nnUNet_raw

    from nnunet_kd.data.convert_boxes import (
        boxes_from_coco,
        boxes_from_masks,
        boxes_from_nndetection,
        detection_block,
    )
    from nnunet_kd.data.member import dataset_name, read_json
    from nnunet_kd.data.side_files import SideFileError, write_boxes
    from nnunet_kd.data.tasks import DETECTION_FILE
    from nnunet_kd.data.verify import raw_cases

    folder = Path(str(nnUNet_raw)) / dataset_name(args.d)
    dataset_json = read_json(folder / "dataset.json", "The conversion needs the raw dataset. Put it there.")
    output = Path(args.o) if args.o is not None else folder / DETECTION_FILE
    if output.exists():
        raise SideFileError(f"{output} exists and is not overwritten. Name another file with -o, or move it away.")
    if not output.parent.is_dir():
        raise SideFileError(f"The folder {output.parent} of -o does not exist. Make it, or name another file.")
    cases = raw_cases(folder, dataset_json)
    if not cases:
        raise SideFileError(f"There are no training images in {folder / 'imagesTr'}. Put them there.")
    show_progress = not args.disable_progress_bar
    if args.coco is not None:
        conversion = boxes_from_coco(Path(args.coco), cases, dataset_json, args.classes)
    elif args.nndetection is not None:
        source = Path(args.nndetection)
        if not source.is_dir():
            raise SideFileError(f"The folder {source} does not exist. Give nnDetection's labelsTr with --nndetection.")
        conversion = boxes_from_nndetection(source, cases, dataset_json, args.classes, args.min_voxels, show_progress)
    else:
        conversion = boxes_from_masks(cases, dataset_json, args.classes, args.min_voxels, show_progress)
    write_boxes(output, conversion.boxes, conversion.classes)

    number = sum(len(own.labels) for own in conversion.boxes.values())
    print(f"Wrote {output}: {number} boxes of {len(conversion.boxes)} of {len(cases)} cases.")
    for sentence in conversion.left_out:
        print(f"Left out: {sentence}")
    num_without = len(cases.keys() - conversion.boxes.keys())
    if num_without:
        what = f"{num_without} of {len(cases)} cases are not mentioned in {args.coco or args.nndetection}"
        print(f"{what}; they count as cases without boxes.")
    if not conversion.classes:
        print("No box was found, so that there is no class to declare in dataset.json. Check the source.")
        return
    if output.parent.resolve() != folder.resolve():
        print(f"Put it into {folder}.")
    print(f"Declare it in {folder / 'dataset.json'}:")
    print(json.dumps(detection_block(dataset_json, output.name, conversion.classes), indent=2))
    print(f"Then check it: nnUNetKD_verify -d {args.d}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_convert_boxes",
        description="Write boxes.json of a dataset in nnUNet_raw from another source. Nothing is overwritten, and "
        "dataset.json is left as it is: the part that belongs into it is printed.",
    )
    parser.add_argument("-d", required=True, help="Dataset id or name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--coco", metavar="FILE", default=None, help="COCO json of 2D images")
    source.add_argument("--nndetection", metavar="FOLDER", default=None, help="labelsTr of nnDetection")
    source.add_argument("--from_masks", action="store_true", help="Connected components per class in labelsTr")
    parser.add_argument("-o", default=None, help="File to write. Default: boxes.json beside dataset.json")
    parser.add_argument(
        "--classes",
        nargs="+",
        default=None,
        help="Classes to keep, in this order; of nnDetection, the names of the class indices. Default: all that occur",
    )
    parser.add_argument("--min_voxels", type=int, default=1, help="Leave out objects of fewer voxels. Default: 1")
    parser.add_argument("--disable_progress_bar", action="store_true", help="No progress bar")
    return parser


if __name__ == "__main__":
    main()
