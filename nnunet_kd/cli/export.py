"""The command nnUNetKD_export: a plain nnU-Net model folder, which predicts where nnunet_kd is not installed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from nnunet_kd.cli.errors import clear_errors
from nnunet_kd.cli.predict import fold
from nnunet_kd.environment import TRAINERS_VARIABLE, add_trainers_folder


@clear_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_export."""
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_export",
        description="Write a student, or one head of a joint teacher, as a plain nnU-Net model folder (nnUNetTrainer, "
        "stock network), and verify that stock nnU-Net gets the same logits from it.",
    )
    parser.add_argument("-m", required=True, help="Model folder; may be relative to nnUNet_results")
    parser.add_argument("-o", required=True, help="Folder to write; must not exist or be empty")
    parser.add_argument("-f", nargs="+", type=fold, default=None, help="Folds. Default: all that are trained")
    parser.add_argument("--head", default=None, help="Joint teacher: member (name or id) or shared head to write")
    parser.add_argument("--member", default=None, help="Joint teacher: whose images, if several share the head")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="Checkpoint. Default: checkpoint_final.pth")
    args = parser.parse_args(arguments)
    os.environ[TRAINERS_VARIABLE] = add_trainers_folder(os.environ.get(TRAINERS_VARIABLE, ""))
    # imported late, so that --help and errors in the arguments take no seconds
    from nnunet_kd.inference.export import SEEDS, export_model
    from nnunet_kd.inference.trained_model import open_model

    model = open_model(args.m, args.f, args.chk)
    verification = export_model(model, args.o, args.head, args.member)
    shape = " x ".join(str(size) for size in verification.patch_shape)
    print(f"Verified with stock nnU-Net on {len(SEEDS)} random patches (channels x size: {shape}):")
    for name, difference in verification.differences.items():
        result = "identical logits" if difference == 0 else f"logits differ by at most {difference:.3g}"
        print(f"  fold {name}: {result}")
    folds = " ".join(str(name) for name in verification.differences)
    print(f"Wrote {args.o}. It needs stock nnU-Net only:")
    print(f"  nnUNetv2_predict_from_modelfolder -m {args.o} -f {folds} -i IN -o OUT")


if __name__ == "__main__":
    main()
