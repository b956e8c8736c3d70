"""Splits, settings and scores of a semi-supervised leaderboard in its own protocol; see README.md.

python semi_supervised.py splits dino_mix.yaml synapse -d 801      # splits, and settings per share, method and seed
python semi_supervised.py score dino_mix.yaml synapse -ref labelsTs -pred PREDICTIONS
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import yaml


def write_splits(recipe: dict[str, Any], name: str, dataset: str, out: Path) -> None:
    """One fold with the protocol's training and validation cases, and settings for each share, method and seed."""
    from nnunetv2.paths import nnUNet_preprocessed

    from nnunet_kd.data.member import dataset_name

    entry = recipe["datasets"][name]
    if "validation" not in entry:
        sys.exit(f"{name} has no list of cases here: take its splits_final.json from the lists of its authors.")
    folder = Path(str(nnUNet_preprocessed)) / dataset_name(dataset)
    segmentations = sorted((folder / "gt_segmentations").iterdir())
    cases = {file.name.split(".")[0][-4:]: file.name.split(".")[0] for file in segmentations}
    missing = [digits for digits in [*entry["test"], *entry["validation"]] if digits not in cases]
    left_out = {*entry["test"], *entry["validation"]}
    in_training = {digits for digits in entry["validation"] if digits in cases}
    if not in_training:
        sys.exit(
            f"No case in {folder / 'gt_segmentations'} ends in {', '.join(entry['validation'])}. Rename the cases."
        )
    if missing:
        print(f"Not among the training cases of {folder.name}: {', '.join(missing)} (right for test cases)")
    split = {
        "train": [case for digits, case in cases.items() if digits not in left_out],
        "val": [cases[digits] for digits in sorted(in_training)],
    }
    file = folder / "splits_final.json"
    if file.is_file() and json.loads(file.read_text()) != [split]:
        sys.exit(f"{file} exists and differs. Move it away, so that trained folds keep their splits.")
    file.write_text(json.dumps([split], indent=4))
    out.mkdir(parents=True, exist_ok=True)
    for share, chosen in entry["labeled"].items():
        listed = [cases[digits] for digits in chosen.get("cases", [])]
        for method, seed in itertools.product(recipe["methods"], recipe["seeds"]):
            labeled = listed or {"fraction": chosen["count"] / len(split["train"]), "seed": seed}
            own = recipe["methods"][method].get("settings", {})
            settings = {"training": {"seed": seed}, "labeled": labeled, **own}
            settings_file = out / f"{name}_{share.rstrip('%')}_{method}_s{seed}.json"
            settings_file.write_text(json.dumps(settings, indent=4))
    print(f"{len(split['train'])} training and {len(split['val'])} validation cases in {file}; settings in {out}")


def score(recipe: dict[str, Any], name: str, reference: Path, prediction: Path) -> None:
    """Mean Dice and surface distance per class over all references, on the protocol's grid."""
    import numpy as np
    import SimpleITK as sitk
    from tqdm import tqdm

    from nnunet_kd.evaluation.resized_grid import dice_and_distance, resize_labels

    entry = recipe["datasets"][name]
    classes = entry["labels"][1:]
    files = sorted(reference.glob("*.nii.gz"))
    missing = [file.name for file in files if not (prediction / file.name).is_file()]
    if not files or missing:
        sys.exit(f"{prediction} has no {', '.join(missing[:5])}" if missing else f"{reference} has no *.nii.gz")
    rows = []
    for file in tqdm(files):
        pair = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / file.name))) for folder in (reference, prediction))
        resized = (resize_labels(labels, entry["grid"]) for labels in pair)
        rows.append(dice_and_distance(*resized, range(1, len(classes) + 1)))
    dice, distance = (np.stack(values).mean(0) for values in zip(*rows, strict=True))
    print("| class | Dice (%) | surface distance (voxels) |\n|---|---|---|")
    for label, own, other in zip([*classes, "mean"], [*dice, dice.mean()], [*distance, distance.mean()], strict=True):
        print(f"| {label} | {own:.2f} | {other:.2f} |")
    references = recipe["reference"][name]
    print(f"\nTables of others (Dice / distance), {', '.join(references['columns'])}:")
    for method, columns in references["rows"].items():
        print(
            f"  {method}: " + ", ".join("not known" if pair is None else f"{pair[0]} / {pair[1]}" for pair in columns)
        )


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    splits, scores = commands.add_parser("splits"), commands.add_parser("score")
    for command in (splits, scores):
        command.add_argument("recipe", type=Path)
        command.add_argument("name", help="Dataset of the recipe")
    splits.add_argument("-d", required=True, help="nnU-Net dataset id or name")
    splits.add_argument("-o", type=Path, default=Path(), help="Folder for the settings files")
    scores.add_argument("-ref", type=Path, required=True, help="Folder of reference segmentations")
    scores.add_argument("-pred", type=Path, required=True, help="Folder of predictions")
    args = parser.parse_args()
    recipe = yaml.safe_load(args.recipe.read_text())
    if args.name not in recipe["datasets"]:
        sys.exit(f"{args.recipe} has no dataset {args.name}. It has: {', '.join(recipe['datasets'])}.")
    if args.command == "splits":
        write_splits(recipe, args.name, args.d, args.o)
    else:
        score(recipe, args.name, args.ref, args.pred)


if __name__ == "__main__":
    main()
