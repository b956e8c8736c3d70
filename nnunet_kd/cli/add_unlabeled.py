"""The command nnUNetKD_add_unlabeled: preprocess images without labels for semi-supervised training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunet_kd.cli.errors import clear_errors


@clear_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_add_unlabeled."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.np is not None and args.np < 1:
        parser.error("-np must be at least 1")
    # imported late, so that --help and errors in the arguments take no seconds
    from nnunet_kd.data.add_unlabeled import add_unlabeled
    from nnunet_kd.data.member import Member, dataset_name

    name = dataset_name(args.d)
    members = [Member(name, args.p, configuration) for configuration in dict.fromkeys(args.c)]
    report = add_unlabeled(members, Path(args.i), args.np, show_progress=not args.disable_progress_bar)
    for own in report:
        skipped = f", skipped {own.num_skipped} that were there" if own.num_skipped else ""
        print(f"{name}, {own.member.configuration}: added {own.num_added} cases without labels{skipped}.")
        print(f"  They lie in {own.folder}")
    print("Train with them:")
    for member in members:
        print(f"  nnUNetv2_train {name[7:10]} {member.configuration} FOLD -tr nnUNetTrainerDINOMix -p {args.p}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_add_unlabeled",
        description="Preprocess images without labels with the plans of a dataset, into a folder nnunet_kd_unlabeled "
        "beside its preprocessed data, for training that learns from them too. All images are checked first, and "
        "nothing is written if one does not fit. Cases that are finished are skipped.",
    )
    parser.add_argument("-d", required=True, help="Dataset id or name")
    parser.add_argument(
        "-i",
        required=True,
        help="Input folder; names (CASE_0000...) and file ending as in the training dataset",
    )
    parser.add_argument("-p", default="nnUNetPlans", help="Plans name. Default: nnUNetPlans")
    parser.add_argument("-c", nargs="+", required=True, help="Configurations")
    parser.add_argument("-np", type=int, default=None, help="Processes. Default: stock nnU-Net's for preprocessing")
    parser.add_argument("--disable_progress_bar", action="store_true", help="No progress bar")
    return parser


if __name__ == "__main__":
    main()
