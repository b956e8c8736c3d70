from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nnunet_kd.cli.convert_boxes import main
from nnunet_kd.cli.verify import main as verify
from nnunet_kd.data.convert_boxes import (
    Conversion,
    boxes_from_coco,
    boxes_from_masks,
    boxes_from_nndetection,
    connected_components,
)
from nnunet_kd.data.side_files import SideFileError, flip_axes
from nnunet_kd.data.verify import RawCase, raw_cases

LABELS = {"background": 0, "edge": 1, "core": 2}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def dataset(raw: Path, masks: dict[str, NDArray[np.uint8]], **extra: Any) -> tuple[Path, dict[str, Any]]:
    """A raw dataset whose images are its masks; png for 2D, nii.gz for 3D."""
    ending = ".png" if next(iter(masks.values())).ndim == 2 else ".nii.gz"
    folder = raw / "Dataset905_Boxes"
    for case, mask in masks.items():
        for file in (folder / "imagesTr" / f"{case}_0000{ending}", folder / "labelsTr" / f"{case}{ending}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            if mask.ndim == 2:
                Image.fromarray(mask).save(file)
            else:
                sitk.WriteImage(sitk.GetImageFromArray(mask), str(file))
    content = {"channel_names": {"0": "X"}, "labels": LABELS, "numTraining": len(masks), "file_ending": ending, **extra}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder, content


def plain(conversion: Conversion) -> dict[str, list[tuple[str, list[float]]]]:
    """Case to (class, box in the order of side files), sorted."""
    return {
        case: sorted(
            (conversion.classes[label], box)
            for label, box in zip(own.labels.tolist(), flip_axes(own.boxes).tolist(), strict=True)
        )
        for case, own in conversion.boxes.items()
    }


# --- masks ------------------------------------------------------------------------------------------------------------
def flood_fill(mask: NDArray[np.bool_]) -> list[list[tuple[int, ...]]]:
    """The components of a mask as lists of voxels; voxels that touch anywhere belong together."""
    left = {tuple(int(index) for index in voxel) for voxel in np.argwhere(mask)}
    steps = list(itertools.product((-1, 0, 1), repeat=mask.ndim))
    components = []
    while left:
        component = [left.pop()]
        for voxel in component:
            for step in steps:
                neighbour = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if neighbour in left:
                    left.remove(neighbour)
                    component.append(neighbour)
        components.append(component)
    return components


@settings(deadline=None)
@given(st.integers(2, 3), st.integers(0, 2**32 - 1), st.floats(0.05, 0.6))
def test_components_are_those_of_a_flood_fill(dimension: int, seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((4, 5, 6)[:dimension]) < density
    numbered = connected_components(mask)
    assert np.array_equal(numbered > 0, mask)
    found = {frozenset(map(tuple, np.argwhere(numbered == number).tolist())) for number in range(1, numbered.max() + 1)}
    assert found == {frozenset(component) for component in flood_fill(mask)}


@pytest.mark.parametrize("shape", [(20, 30), (1, 20, 30), (6, 12, 14)])
def test_every_component_of_every_label_gets_its_box(raw: Path, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    masks = {f"c{index}": random.choice(3, shape, p=[0.9, 0.06, 0.04]).astype(np.uint8) for index in range(3)}
    masks["empty"] = np.zeros(shape, dtype=np.uint8)
    folder, dataset_json = dataset(raw, masks)
    for min_voxels in (1, 3):
        conversion = boxes_from_masks(raw_cases(folder, dataset_json), dataset_json, None, min_voxels, False)
        expected: dict[str, list[tuple[str, list[float]]]] = {case: [] for case in masks}
        small = 0
        for case, name in itertools.product(masks, ("edge", "core")):
            for component in flood_fill(masks[case].squeeze() == LABELS[name]):  # single slices are 2D
                voxels = np.array(component, dtype=float)
                corners = [*voxels.min(axis=0)[::-1], *(voxels.max(axis=0)[::-1] + 1)]
                if len(component) >= min_voxels:
                    expected[case].append((name, corners))
                else:
                    small += 1
        assert plain(conversion) == {case: sorted(boxes) for case, boxes in expected.items()}
        assert conversion.left_out == ((f"{small} component(s) of fewer than 3 voxels.",) if small else ())


def test_a_region_is_boxed_as_the_union_of_its_labels_and_ignored_voxels_are_not(raw: Path) -> None:
    mask = np.zeros((10, 12), dtype=np.uint8)
    mask[2:6, 3:9] = 1
    mask[4:5, 5:7] = 2
    mask[8:, :] = 3
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    folder, dataset_json = dataset(raw, {"a": mask}, labels=labels, regions_class_order=[1, 2])
    cases = raw_cases(folder, dataset_json)
    conversion = boxes_from_masks(cases, dataset_json, show_progress=False)
    assert plain(conversion) == {"a": [("core", [5, 4, 7, 5]), ("whole", [3, 2, 9, 6])]}
    assert conversion.classes == ("whole", "core")
    conversion = boxes_from_masks(cases, dataset_json, ["core"], show_progress=False)
    assert (plain(conversion), conversion.classes) == ({"a": [("core", [5, 4, 7, 5])]}, ("core",))
    with pytest.raises(SideFileError, match="whole, core"):
        boxes_from_masks(cases, dataset_json, ["ignore"], show_progress=False)


def test_missing_segmentations_are_all_named(raw: Path) -> None:
    folder, dataset_json = dataset(raw, {case: np.eye(8, dtype=np.uint8) for case in ("a", "b", "c")})
    for case in ("a", "c"):
        (folder / "labelsTr" / f"{case}.png").unlink()
    with pytest.raises(SideFileError) as error:
        boxes_from_masks(raw_cases(folder, dataset_json), dataset_json, show_progress=False)
    assert [line.split(",")[1].split(":")[0] for line in str(error.value).splitlines()] == [" case a", " case c"]


# --- COCO -------------------------------------------------------------------------------------------------------------
def coco(folder: Path, **parts: Any) -> Path:
    content = {
        "images": [
            {"id": 7, "file_name": "train/a_0000.png", "width": 30, "height": 20},
            {"id": 8, "file_name": "b.jpg"},
            {"id": 9, "file_name": "c\\a_0001_0000.png"},
            {"id": 10, "file_name": "elsewhere.png"},
        ],
        "categories": [{"id": 3, "name": "mass"}, {"id": 1, "name": "cyst"}, {"id": 2, "name": "never"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [2, 3.5, 10, 4]},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 30, 20]},
            {"image_id": 9, "category_id": 3, "bbox": [1, 1, 1, 1]},
            {"image_id": 9, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"image_id": 10, "category_id": 2, "bbox": [0, 0, 9, 9]},
        ],
        **parts,
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def flat(raw: Path) -> tuple[dict[str, RawCase], dict[str, Any]]:
    """Cases a, b and a_0001, whose name looks as if it carried a channel number."""
    folder, dataset_json = dataset(raw, {case: np.zeros((20, 30), dtype=np.uint8) for case in ("a", "b", "a_0001")})
    return raw_cases(folder, dataset_json), dataset_json


def test_coco_boxes_become_corners_of_the_right_cases(tmp_path: Path, flat: Any) -> None:
    conversion = boxes_from_coco(coco(tmp_path), *flat)
    assert plain(conversion) == {
        "a": [("cyst", [2, 3.5, 12, 7.5]), ("mass", [0, 0, 30, 20])],
        "a_0001": [("mass", [1, 1, 2, 2])],
        "b": [],
    }
    assert conversion.classes == ("mass", "cyst")
    left_out = " ".join(conversion.left_out)
    assert all(text in left_out for text in ("1 image(s)", "elsewhere.png", "1 annotation(s) with iscrowd", "never"))
    conversion = boxes_from_coco(coco(tmp_path), *flat, ["cyst"])
    assert plain(conversion) == {"a": [("cyst", [2, 3.5, 12, 7.5])], "a_0001": [], "b": []}


def test_coco_boxes_fit_single_slices_in_files_of_volumes(tmp_path: Path, raw: Path) -> None:
    folder, dataset_json = dataset(raw, {case: np.zeros((1, 20, 30), dtype=np.uint8) for case in ("a", "b")})
    images = [{"id": 7, "file_name": "a_0000.nii.gz", "width": 30, "height": 20}]
    annotations = [{"image_id": 7, "category_id": 1, "bbox": [2, 3.5, 10, 4]}]
    file = coco(tmp_path, images=images, annotations=annotations)
    conversion = boxes_from_coco(file, raw_cases(folder, dataset_json), dataset_json)
    assert plain(conversion) == {"a": [("cyst", [2, 3.5, 12, 7.5])]}


def test_all_that_is_wrong_in_a_coco_file_is_named(tmp_path: Path, flat: Any) -> None:
    annotations = [
        {"image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1]},
        {"image_id": 7, "category_id": 77, "bbox": [0, 0, 1, 1]},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 0, 1]},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 1]},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, float("nan"), 1]},
        {"image_id": 7, "category_id": 1},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1]},
    ]
    images = [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}, {"id": 8}]
    with pytest.raises(SideFileError) as error:
        boxes_from_coco(coco(tmp_path, annotations=annotations, images=images), *flat)
    lines = str(error.value).splitlines()
    assert [line.split(", ")[1].split(":")[0] for line in lines] == [
        *["images[0]", "images[1]"],
        *[f"annotations[{index}]" for index in range(6)],
    ]
    assert "60 x 40" in lines[0]
    assert "30 x 20" in lines[0]


def test_ids_of_coco_that_are_lists_are_all_named(tmp_path: Path, flat: Any) -> None:
    images = [{"id": [1], "file_name": "a_0000.png"}]
    annotations = [{"image_id": {}, "category_id": [3], "bbox": [2, 3.5, 10, 4]}]
    file = coco(tmp_path, images=images, categories=[{"id": [2], "name": "cyst"}], annotations=annotations)
    with pytest.raises(SideFileError) as error:
        boxes_from_coco(file, *flat)
    places = ["images[0]", "categories[0]", "annotations[0]", "annotations[0]"]
    assert [problem.where for problem in error.value.problems] == places


def test_two_coco_images_of_one_case_are_named(tmp_path: Path, flat: Any) -> None:
    """Else the boxes of two different images that have one name would be put together."""
    images = [{"id": 7, "file_name": "site1/a.png"}, {"id": 8, "file_name": "site2/a.png"}]
    annotations = [{"image_id": number, "category_id": 1, "bbox": [0, 0, 1, 1]} for number in (7, 8)]
    with pytest.raises(SideFileError) as error:
        boxes_from_coco(coco(tmp_path, images=images, annotations=annotations), *flat)
    (line,) = str(error.value).splitlines()
    assert "images[1]: site2/a.png and site1/a.png are both the case a" in line
    images[1]["file_name"] = "site1/a.png"  # joined files of several annotators list an image several times
    conversion = boxes_from_coco(coco(tmp_path, images=images, annotations=annotations), *flat)
    assert plain(conversion) == {"a": [("cyst", [0, 0, 1, 1])] * 2}


def test_ids_that_joined_coco_files_repeat_are_named(tmp_path: Path, flat: Any) -> None:
    """Else the boxes of the first image would silently go to the second."""
    images = [{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]
    categories = [{"id": 1, "name": "cyst"}, {"id": 3, "name": "mass"}, {"id": 1, "name": "stone"}]
    annotations = [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1]}]
    with pytest.raises(SideFileError) as error:
        boxes_from_coco(coco(tmp_path, images=images, categories=categories, annotations=annotations), *flat)
    category, image = str(error.value).splitlines()
    assert "categories[2]: the id 1 of stone is also that of cyst" in category
    assert "images[1]: the id 7 of b.png is also that of a.png" in image
    same = [{"id": 1, "name": "cyst"}] * 2  # the same categories in every joined file are no contradiction
    conversion = boxes_from_coco(coco(tmp_path, images=images[:1], categories=same, annotations=annotations), *flat)
    assert plain(conversion) == {"a": [("cyst", [0, 0, 1, 1])]}


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"annotations": None}, "not a COCO json"),
        ({"categories": ["mass"]}, "not a COCO json"),
        ({"images": [{"id": 7, "file_name": "other.png"}], "annotations": []}, "None of the 1 images"),
    ],
)
def test_a_file_that_is_no_coco_json_of_this_dataset_is_refused(
    tmp_path: Path, flat: Any, parts: dict[str, Any], named: str
) -> None:
    with pytest.raises(SideFileError, match=named):
        boxes_from_coco(coco(tmp_path, **parts), *flat)
    with pytest.raises(SideFileError, match="mass, cyst, never"):
        boxes_from_coco(coco(tmp_path), *flat, ["Mass"])


def test_coco_boxes_do_not_fit_volumes(tmp_path: Path, raw: Path) -> None:
    folder, dataset_json = dataset(raw, {"a": np.zeros((4, 20, 30), dtype=np.uint8)})
    with pytest.raises(SideFileError, match="2D, but the images of this dataset are 3D"):
        boxes_from_coco(coco(tmp_path), raw_cases(folder, dataset_json), dataset_json)


# --- nnDetection ------------------------------------------------------------------------------------------------------
def instances(task: Path, case: str, image: NDArray[np.uint8], classes: Any) -> None:
    folder = task / "raw_splitted" / "labelsTr"
    folder.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / f"{case}.nii.gz"))
    (folder / f"{case}.json").write_text(json.dumps({"instances": classes}))


@pytest.fixture
def volumes(raw: Path) -> tuple[dict[str, RawCase], dict[str, Any]]:
    folder, dataset_json = dataset(raw, {case: np.zeros((6, 12, 14), dtype=np.uint8) for case in ("a", "b")})
    return raw_cases(folder, dataset_json), dataset_json


def test_instances_get_the_box_of_their_voxels_and_the_class_of_the_json(tmp_path: Path, volumes: Any) -> None:
    image = np.zeros((6, 12, 14), dtype=np.uint8)
    image[1:3, 2:5, 4:9] = 1
    image[5, 11, 13] = 2
    image[0, 0, 0] = image[2, 8, 1] = 3  # one instance in two parts
    task = tmp_path / "Task100_Toy"
    instances(task, "a", image, {"1": 1, "2": 0, "3": 1})
    instances(task, "b", np.zeros_like(image), {})
    instances(task, "stranger", image, {})
    (task / "dataset.yaml").write_text('labels:\n    "0": Square\n    "1": Hole\n')
    folder = task / "raw_splitted" / "labelsTr"
    conversion = boxes_from_nndetection(folder, *volumes, show_progress=False)
    square, holes = ("Square", [13, 11, 5, 14, 12, 6]), [("Hole", [0, 0, 0, 2, 9, 3]), ("Hole", [4, 2, 1, 9, 5, 3])]
    assert plain(conversion) == {"a": [*holes, square], "b": []}
    assert conversion.classes == ("Square", "Hole")
    assert "stranger" in " ".join(conversion.left_out)
    conversion = boxes_from_nndetection(folder, *volumes, ["x", "y"], min_voxels=2, show_progress=False)
    assert plain(conversion) == {"a": [("y", box) for _, box in holes], "b": []}
    assert conversion.classes == ("x", "y")


def test_a_case_of_one_slice_among_volumes_has_boxes_of_volumes(tmp_path: Path, raw: Path) -> None:
    folder, dataset_json = dataset(raw, {"a": np.zeros((1, 9, 9), np.uint8), "b": np.zeros((4, 9, 9), np.uint8)})
    image = np.zeros((1, 9, 9), dtype=np.uint8)
    image[0, 2:5, 4:9] = 1
    instances(tmp_path, "a", image, {"1": 0})
    labels = tmp_path / "raw_splitted" / "labelsTr"
    conversion = boxes_from_nndetection(labels, raw_cases(folder, dataset_json), dataset_json, ["x"], 1, False)
    assert plain(conversion) == {"a": [("x", [4, 2, 0, 9, 5, 1])]}


def test_all_that_is_wrong_in_nndetection_files_is_named(tmp_path: Path, volumes: Any) -> None:
    image = np.zeros((6, 12, 14), dtype=np.uint8)
    image[1, 1, 1], image[2, 2, 2] = 1, 4
    folder = tmp_path / "raw_splitted" / "labelsTr"
    instances(tmp_path, "a", image, {"1": 0, "2": 0, "3": 5})
    instances(tmp_path, "b", image[:5], {})
    with pytest.raises(SideFileError, match="--classes"):
        boxes_from_nndetection(folder, *volumes, show_progress=False)
    with pytest.raises(SideFileError) as error:
        boxes_from_nndetection(folder, *volumes, ["x"], show_progress=False)
    lines = str(error.value).splitlines()
    for line, named in zip(
        lines,
        [
            "class index 5",
            "instance 2 is in the json only",
            "instance 3 is in the json only",
            "instance 4 is in the image only",
            "its size",
        ],
        strict=True,
    ):
        assert named in line
    (folder / "a.json").write_text("[1]")
    (folder / "b.nii.gz").unlink()
    with pytest.raises(SideFileError) as error:
        boxes_from_nndetection(folder, *volumes, ["x"], show_progress=False)
    assert '{"instances": {"1": CLASS INDEX, ...}}' in str(error.value)
    assert "b.nii.gz: the file does not exist" in str(error.value)


def test_an_instance_mask_that_cannot_be_read_is_named_beside_the_others(tmp_path: Path, volumes: Any) -> None:
    """The message of the library that reads it names neither the case nor what to do."""
    folder = tmp_path / "raw_splitted" / "labelsTr"
    for case in ("a", "b"):
        instances(tmp_path, case, np.zeros((6, 12, 14), dtype=np.uint8), {"1": 0})
    (folder / "a.nii.gz").write_bytes(b"no image")
    with pytest.raises(SideFileError) as error:
        boxes_from_nndetection(folder, *volumes, ["x"], show_progress=False)
    broken, other = str(error.value).splitlines()
    assert f"{folder / 'a.nii.gz'}: it cannot be read" in broken
    assert "instance 1 is in the json only" in other


def test_an_instance_mask_without_its_json_is_named(tmp_path: Path, volumes: Any) -> None:
    """Else its case would silently count as an image without objects."""
    image = np.zeros((6, 12, 14), dtype=np.uint8)
    image[1, 1, 1] = 1
    folder = tmp_path / "raw_splitted" / "labelsTr"
    for case in ("a", "b", "stranger"):
        instances(tmp_path, case, image, {"1": 0})
    for case in ("b", "stranger"):
        (folder / f"{case}.json").unlink()
    with pytest.raises(SideFileError) as error:
        boxes_from_nndetection(folder, *volumes, ["x"], show_progress=False)
    (line,) = str(error.value).splitlines()
    assert f"{folder / 'b.json'}: the file does not exist, but b.nii.gz does" in line


# --- command ----------------------------------------------------------------------------------------------------------
def test_the_command_writes_boxes_that_verify_accepts_and_overwrites_nothing(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[3:8, 2:20], mask[12:14, 5:6] = 1, 2
    block = {"tasks": {"segmentation": False}, "split_by": "patient", "terms": []}
    folder, dataset_json = dataset(raw, {"a": mask, "b": mask}, nnunet_kd=block)
    main(["-d", "905", "--from_masks", "--disable_progress_bar"])
    output = capsys.readouterr().out
    written = (folder / "boxes.json").read_text()
    expected = [{"label": "edge", "box": [2, 3, 20, 8]}, {"label": "core", "box": [5, 12, 6, 14]}]
    assert json.loads(written) == {"a": expected, "b": expected}
    assert json.loads((folder / "dataset.json").read_text()) == dataset_json

    snippet = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    detection = {"file": "boxes.json", "classes": ["edge", "core"]}
    assert snippet == {"nnunet_kd": {**block, "tasks": {"segmentation": False, "detection": detection}}}
    del snippet["nnunet_kd"]["split_by"], snippet["nnunet_kd"]["terms"]  # kept above, but no key that verify knows
    (folder / "dataset.json").write_text(json.dumps({**dataset_json, **snippet}))
    verify(["-d", "905", "--disable_progress_bar"])
    assert "4 boxes (edge 2, core 2)" in capsys.readouterr().out

    (folder / "labelsTr" / "a.png").unlink()  # refused before anything is read
    for arguments in ([], ["-o", str(folder / "boxes.json")]):
        with pytest.raises(SystemExit) as ended:
            main(["-d", "905", "--from_masks", *arguments])
        assert ended.value.code == 2
        assert "-o" in capsys.readouterr().err
    assert (folder / "boxes.json").read_text() == written


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--coco", "missing.json"], "missing.json does not exist"),
        (["--nndetection", "missing"], "missing does not exist"),
        (["--coco", "x.json", "--min_voxels", "3"], "--min_voxels"),
        (["--from_masks", "-o", "missing/boxes.json"], "missing of -o does not exist"),
        ([], "one of the arguments"),
    ],
)
def test_wrong_arguments_end_with_a_message(
    raw: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(raw, {"a": np.zeros((20, 30), dtype=np.uint8)})
    monkeypatch.chdir(raw)
    with pytest.raises(SystemExit) as ended:
        main(["-d", "905", *arguments])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_the_command_says_which_cases_the_source_leaves_out(
    tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(raw, {case: np.zeros((20, 30), dtype=np.uint8) for case in ("a", "b", "c")})
    source = coco(
        tmp_path,
        images=[{"id": 1, "file_name": "a.png"}],
        annotations=[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
    )
    main(["-d", "905", "--coco", str(source)])
    output = capsys.readouterr().out
    assert f"2 of 3 cases are not mentioned in {source}; they count as cases without boxes." in output


def test_without_boxes_no_class_is_suggested(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A detection task needs a class."""
    folder, _ = dataset(raw, {"a": np.zeros((20, 30), dtype=np.uint8)})
    main(["-d", "905", "--from_masks", "--disable_progress_bar"])
    output = capsys.readouterr().out
    assert '"classes"' not in output
    assert "No box was found" in output
    assert json.loads((folder / "boxes.json").read_text()) == {"a": []}


def test_a_missing_labels_folder_is_said_once(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = dataset(raw, {f"c{index}": np.eye(8, dtype=np.uint8) for index in range(3)})
    shutil.rmtree(folder / "labelsTr")
    with pytest.raises(SystemExit):
        main(["-d", "905", "--from_masks", "--disable_progress_bar"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"There is no labelsTr with segmentations: {folder / 'labelsTr'} does not exist" in line
