"""The command nnUNetKD_convert: a public dataset as it is downloaded, to nnU-Net's raw format."""

from __future__ import annotations

import argparse
import difflib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_kd.cli.errors import clear_errors
from nnunet_kd.errors import ConversionError

if TYPE_CHECKING:
    from nnunet_kd.conversion.base import Converter
    from nnunet_kd.conversion.convert import Report

MAX_NAMED = 5  # cases per reason; the file has all
MAX_REASONS = 20


@clear_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of nnUNetKD_convert."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.np < 1:
        parser.error("-np must be at least 1")
    if not args.list and (args.name is None or args.i is None):
        parser.error("a NAME and its folder -i are needed; --list shows the names")
    # imported late, so that --help and errors in the arguments take no seconds
    from nnunetv2.paths import nnUNet_raw

    from nnunet_kd.conversion import CONVERTERS
    from nnunet_kd.conversion.convert import REPORT_FILE, convert

    if args.list:
        width = max(map(len, CONVERTERS))
        print("\n".join(f"{name.ljust(width)}  {converter.title}" for name, converter in CONVERTERS.items()))
        return
    converter = _converter(args.name, CONVERTERS)
    print(f"{converter.title}\n  Licence: {converter.licence}\n  Please cite: {converter.citation}\n  {converter.url}")
    output = Path(args.o) if args.o is not None else Path(str(nnUNet_raw))
    report = convert(converter, Path(args.i), output, args.id, args.np, show_progress=not args.disable_progress_bar)
    print("\n".join(_lines(report, REPORT_FILE)))


def _converter(name: str, converters: Mapping[str, Converter]) -> Converter:
    by_lower = {known.lower(): known for known in converters}
    if name.lower() in by_lower:
        return converters[by_lower[name.lower()]]
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    suggestion = f"Perhaps {by_lower[close[0]]}? " if close else ""
    raise ConversionError(f"There is no converter '{name}'. {suggestion}There are {', '.join(converters)}.")


def _lines(report: Report, file: str) -> Iterator[str]:
    content = report.content
    counts = f"{content['training_cases']} training and {content['test_cases']} test cases"
    yield f"{report.folder} was finished before: {counts}" if report.was_there else f"Wrote {report.folder}: {counts}"
    names = defaultdict(list)
    for entry in content["left_out"]:
        names[entry["why"]].append(entry["name"])
    yield f"Left out: {len(content['left_out'])} cases" + (f"; all are in {file}" if names else "")
    for why, own in list(names.items())[:MAX_REASONS]:
        yield f"  {why}: {', '.join(own[:MAX_NAMED])}{', ...' if len(own) > MAX_NAMED else ''}"
    if len(names) > MAX_REASONS:
        yield f"  and {len(names) - MAX_REASONS} more reasons"
    outside = content["boxes_outside_image"]
    if outside:
        yield f"Dropped: {sum(outside.values())} boxes that lie outside their images, of {len(outside)} cases"
    yield f"Check it: nnUNetKD_verify -d {report.folder.name[7:10]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetKD_convert",
        description="Convert a public dataset, in the layout in which it is downloaded, to nnU-Net's raw format, with "
        "classification.csv and boxes.json where it has classes or boxes. Run again, it goes on where it stopped; no "
        "other dataset is overwritten. Cases that cannot be used are left out and listed in conversion_report.json.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="Dataset; --list shows them")
    parser.add_argument("-i", default=None, help="Folder with the unpacked download")
    parser.add_argument("-o", default=None, help="nnU-Net's raw folder. Default: the variable nnUNet_raw")
    parser.add_argument("-id", type=int, default=None, help="Dataset id. Default: one for each dataset")
    parser.add_argument("-np", type=int, default=min(8, os.cpu_count() or 1), help="Processes. Default: %(default)s")
    parser.add_argument("--list", action="store_true", help="Show the names, and do nothing")
    parser.add_argument("--disable_progress_bar", action="store_true", help="No progress bar")
    return parser


if __name__ == "__main__":
    main()
