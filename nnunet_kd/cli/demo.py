"""``nnUNetKD_demo``: the whole way from datasets to a table on a CPU, in a few minutes."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nnunet_kd.cli.errors import clear_errors
from nnunet_kd.demo.pipeline import Demo, DemoSettings
from nnunet_kd.demo.runner import progress
from nnunet_kd.errors import NnUNetKDError

NUM_EPOCHS = 6
NUM_ITERATIONS = 32
ENDINGS_2D = (".png", ".bmp", ".tif")


@clear_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_demo."""
    settings = parse(arguments)
    # A training is a process group of its own; it is ended with the demo, not left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    start = time.monotonic()
    demo = Demo(settings)
    demo.run(num_after=1)
    num_all = len(demo.steps()) + (2 if settings.raw is None else 1)
    with progress(num_all, num_all, "evaluate, write table and figure"):
        from nnunet_kd.demo.report import report  # imports nnU-Net, which takes seconds

        table = report(demo.datasets(), demo.output)
    print(f"\n{table}\n")
    held_out = "held-out test cases" if settings.raw is None else f"validation cases of fold {settings.fold}"
    print(
        f"On the {held_out}; intervals by bootstrap over cases. Dice is the mean over cases, with p by Wilcoxon's "
        f"signed-rank test. AUROC and AP are of all cases at once (1 won, lost or tied), with p by bootstrap."
    )
    print(f"Written to {demo.output}: table.md, table.csv, cases.csv, figure.png ({time.monotonic() - start:.0f} s)")


def parse(arguments: Sequence[str] | None) -> DemoSettings:
    """Read and check the command line.

    Raises:
        NnUNetKDError: Options that do not go together, or a number out of range.
    """
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_demo",
        description="Plan, train a joint teacher, train a student and a control per dataset, predict, evaluate: all "
        "tasks through the real commands. Without --raw on three small synthetic domains. A second call with the same "
        "options continues where the first one stopped.",
    )
    parser.add_argument("-o", type=Path, default=Path("nnUNetKD_demo"), help="Output folder. Default: ./nnUNetKD_demo")
    parser.add_argument("--raw", type=Path, default=None, help="Your nnUNet_raw folder; it is only read")
    parser.add_argument("-d", type=int, nargs="+", default=(), help="Ids of your datasets, with --raw")
    parser.add_argument(
        "--epochs", type=int, default=NUM_EPOCHS, help=f"Epochs of each training. Default: {NUM_EPOCHS}"
    )
    parser.add_argument("--iterations", type=int, default=NUM_ITERATIONS, help=f"Per epoch. Default: {NUM_ITERATIONS}")
    parser.add_argument(
        "-c",
        choices=("2d", "3d_fullres"),
        default=None,
        help="Configuration. Default: 2d with 2D images, else 3d_fullres",
    )
    parser.add_argument("--fold", type=int, default=0, choices=range(5), help="Default: 0")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="Default: cpu")
    args = parser.parse_args(arguments)
    if (args.raw is None) != (not args.d):
        msg = "--raw and -d go together: the folder with your datasets, and the ids of at least two of them."
        raise NnUNetKDError(msg)
    if args.raw is not None and len(set(args.d)) < 2:
        msg = f"-d names {len(set(args.d))} dataset; a joint teacher needs at least two."
        raise NnUNetKDError(msg)
    if args.raw is not None and not args.raw.is_dir():
        msg = f"--raw {args.raw} is not a folder. Give the folder that holds your Dataset... folders."
        raise NnUNetKDError(msg)
    if args.epochs < 1 or args.iterations < 1:
        msg = f"--epochs {args.epochs} and --iterations {args.iterations} must be at least 1."
        raise NnUNetKDError(msg)
    return DemoSettings(
        output=args.o.resolve(),
        raw=None if args.raw is None else args.raw.resolve(),
        dataset_ids=tuple(dict.fromkeys(args.d)),
        num_epochs=args.epochs,
        num_iterations=args.iterations,
        configuration=args.c or ("2d" if has_2d_images(args.raw, args.d) else "3d_fullres"),
        fold=args.fold,
        device=args.device,
    )


def has_2d_images(raw: Path | None, dataset_ids: Sequence[int]) -> bool:
    """Whether one of the datasets holds 2D images, which have no 3d_fullres configuration."""
    files = [] if raw is None else [file for i in dataset_ids for file in raw.glob(f"Dataset{i:03d}_*/dataset.json")]
    return any(json.loads(file.read_text()).get("file_ending") in ENDINGS_2D for file in files)


if __name__ == "__main__":
    main()
