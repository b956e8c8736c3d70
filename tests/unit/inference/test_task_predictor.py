"""Segmentation stays stock; classes and boxes are what tiles, views and folds say, put together by hand."""

from __future__ import annotations

import copy
import itertools
import json
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image
from torch import Tensor, nn

from nnunet_kd.cli.predict import main
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.prediction_files import read_box_predictions, read_classification_predictions
from nnunet_kd.inference import case_collector
from nnunet_kd.inference.task_files import boxes_in_stored_image
from nnunet_kd.inference.task_predictor import TaskPredictor
from nnunet_kd.networks.multitask import TaskOutputs, multitask_architecture, stock_architecture, stock_weights
from nnunet_kd.tasks.classification import ClassificationHead
from nnunet_kd.tasks.detection import BoxMaps

PATCH = {2: [16, 8], 3: [8, 16, 8]}
DATASET: dict[str, Any] = {
    "channel_names": {"0": "T1"},
    "labels": {"background": 0, "lesion": 1},
    "numTraining": 1,
    "file_ending": ".png",
    "nnunet_kd": {
        "tasks": {
            "classification": [
                {"column": "grade", "classes": ["low", "middle", "high"]},
                {"columns": ["effusion", "nodule"]},
            ],
            "detection": {"classes": ["lesion", "cyst"]},
        }
    },
}
TARGETS = Tasks.from_dataset_json(DATASET).classification
CLASSIFICATION = {"targets": [["grade", 3], ["findings", 2]], "stages": 2}


def detection_plan(dimension: int, stride: int, score_threshold: float) -> dict[str, Any]:
    anchors = [[[3.0] * dimension, [5.0] * dimension]]
    classes = ["lesion", "cyst"]
    return {
        "strides": [[stride] * dimension],
        "anchors": anchors,
        "classes": classes,
        "score_threshold": score_threshold,
    }


def make_plans(dimension: int, score_threshold: float = 0.009) -> dict[str, Any]:
    """Plans whose heads find boxes also before training, where all scores are about 0.01."""
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 4, 4],
            "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
            "kernel_sizes": [[3] * dimension] * 3,
            "strides": [[1] * dimension, [2] * dimension, [2] * dimension],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
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
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH[dimension],
        "spacing": [1.0] * dimension,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": multitask_architecture(
            architecture, CLASSIFICATION, detection_plan(dimension, 2, score_threshold)
        ),
        "batch_dice": True,
    }
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{kind}_kwargs"] = {**resampling, "is_seg": kind == "seg"}
    return {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetKDPlans",
        "label_manager": "LabelManager",
        "image_reader_writer": "NaturalImage2DIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {"2d": configuration},
    }


def stock_built_network(plans: dict[str, Any], seed: int) -> nn.Module:
    manager = PlansManager(plans)
    torch.manual_seed(seed)
    network = nnUNetTrainer.build_network_architecture(
        manager, manager.get_configuration("2d"), 1, 2, enable_deep_supervision=False
    )
    for parameter in network.parameters():  # biases and norms that differ between folds too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


def initialised(
    predictor: nnUNetPredictor, network: nn.Module, plans: dict[str, Any], folds: list[Any], axes: Any
) -> Any:
    manager = PlansManager(plans)
    weights = [copy.deepcopy(fold.state_dict()) for fold in folds]
    predictor.manual_initialization(
        network, manager, manager.get_configuration("2d"), weights, DATASET, "nnUNetTrainer", axes
    )
    if isinstance(predictor, TaskPredictor):
        predictor.choose_tasks()
    return predictor


def options(**own: Any) -> dict[str, Any]:
    return {"device": torch.device("cpu"), "allow_tqdm": False, **own}


def image_of(dimension: int) -> Tensor:
    """Two tiles and a half along one axis, smaller than the patch along another."""
    shape = {2: (1, 40, 5), 3: (8, 28, 5)}[dimension]
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("mirroring", [False, True])
def test_segmentation_is_stock_and_classes_are_combined_over_tiles_views_and_folds(
    dimension: int, mirroring: bool
) -> None:
    plans = make_plans(dimension)
    folds = [stock_built_network(plans, seed) for seed in (1, 2)]
    axes = tuple(range(dimension)) if mirroring else None
    network = stock_built_network(plans, 0)
    stock = initialised(nnUNetPredictor(**options()), network, plans, folds, axes)
    ours = initialised(TaskPredictor(**options()), network, plans, folds, axes)
    image = image_of(dimension)

    found = ours.predict_case(image)

    expected_logits = stock.predict_logits_from_preprocessed_data(image)
    assert found.segmentation is not None
    assert torch.equal(found.segmentation, expected_logits)

    # by hand: the last axis is padded from 5 to 8 voxels, 1 before and 2 after
    batch = nn.functional.pad(image if dimension == 3 else image[:, 0], (1, 2))[None]
    patch = PATCH[dimension]
    steps = compute_steps_for_sliding_window(batch.shape[2:], patch, 0.5)
    corners = list(itertools.product(*steps))
    assert len(corners) >= 3
    views = [()] + [c for n in range(1, dimension + 1) for c in itertools.combinations(range(2, dimension + 2), n)]
    logits: dict[str, list[Tensor]] = {"grade": [], "findings": []}
    with torch.no_grad():
        for fold in folds:
            for view in views if mirroring else [()]:
                parts = []
                for corner in corners:
                    cut = tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))
                    tile = batch[(slice(None), slice(None), *cut)]
                    parts.append(fold(tile.flip(view) if view else tile, tasks=True).pooled)
                head = fold.heads.classification
                for name, value in head.classify(head.combine(parts)).items():
                    logits[name].append(value[0])
    mean = {name: torch.stack(values).mean(0) for name, values in logits.items()}
    assert len(logits["grade"]) == 2 * (2**dimension if mirroring else 1)
    np.testing.assert_allclose(found.probabilities["grade"], mean["grade"].softmax(0), atol=1e-5)
    np.testing.assert_allclose(found.probabilities["findings"], mean["findings"].sigmoid(), atol=1e-5)

    assert found.boxes is not None
    labels, boxes, scores = found.boxes
    shape = image.shape[-dimension:]
    assert len(labels) > 0
    assert (np.diff(scores) <= 0).all()
    assert (boxes >= 0).all()
    assert (boxes <= np.array([*shape, *shape]) + 1e-5).all()  # corners are weighted means
    assert (boxes[:, dimension:] > boxes[:, :dimension]).all()


class PointwiseNetwork(nn.Module):
    """Says of each voxel what it sees there alone: so it is equivariant, and tiles say what the whole image says.

    A voxel of value v > 0 is a box of class 0 of 3 voxels per axis around it, of value v < 0 one of class 1 of 5.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.heads = nn.Module()
        self.heads.classification = ClassificationHead([2], dimension, [("grade", 3), ("findings", 2)], "attention")
        self.heads.detection = None
        torch.manual_seed(0)
        nn.init.normal_(self.heads.classification.pools[0].score.weight)
        self.calls: list[bool] = []

    @property
    def speaking_heads(self) -> nn.Module:
        return self.heads

    def forward(self, image: Tensor, tasks: bool = False, segmentation: bool = True) -> Any:
        logits = torch.cat((image, -image), 1)
        if not tasks:
            return logits
        self.calls.append(segmentation)
        nothing = torch.full_like(image, -10.0)
        # [B, anchors * classes, *S], anchors slowest: 3 voxels lesion, cyst; 5 voxels lesion, cyst
        lesion, cyst = nothing.where(image <= 0, image), nothing.where(image >= 0, -image)
        scores = torch.cat((lesion, nothing, nothing, cyst), 1)
        codes = torch.zeros(len(image), 2 * 2 * (image.ndim - 2), *image.shape[2:])
        maps = BoxMaps((scores,), (codes,))
        pooled = self.heads.classification.pooled([torch.cat((image, image.square()), 1)])
        return TaskOutputs([logits] if segmentation else [], [], pooled, None, maps)


def pointwise_predictor(dimension: int, num_folds: int = 1, **own: Any) -> tuple[TaskPredictor, PointwiseNetwork]:
    plans = make_plans(dimension)
    arguments = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    arguments["detection"] = detection_plan(dimension, 1, 0.05)
    network = PointwiseNetwork(dimension).eval()
    predictor = TaskPredictor(**options(**own))
    return initialised(predictor, network, plans, [network] * num_folds, tuple(range(dimension))), network


@pytest.mark.parametrize("dimension", [2, 3])
def test_tiles_without_overlap_classify_like_one_pass_over_the_image(dimension: int) -> None:
    predictor, network = pointwise_predictor(dimension, tile_step_size=1.0)
    shape = {2: (1, 32, 24), 3: (16, 32, 8)}[dimension]
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    found = predictor.predict_case(image).probabilities
    with torch.no_grad():
        whole = image[None] if dimension == 3 else image
        head = network.heads.classification
        logits = head.classify(network(whole, tasks=True).pooled)
    np.testing.assert_allclose(found["grade"], logits["grade"][0].softmax(0), atol=1e-5)
    np.testing.assert_allclose(found["findings"], logits["findings"][0].sigmoid(), atol=1e-5)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("num_folds", [1, 2])
@pytest.mark.parametrize("box_merging", ["cluster", "suppress"])
def test_boxes_lie_where_they_are_in_the_image(dimension: int, num_folds: int, box_merging: Any) -> None:
    predictor, _ = pointwise_predictor(dimension, num_folds, tile_step_size=1.0, box_merging=box_merging)
    # tiles of 16 x 8 at 0 and 16 (3D: of 8 at 0 and 8 too); the last axis has 5 voxels and is padded by 1 before
    image = torch.zeros(1, *{2: (1, 32, 5), 3: (16, 32, 5)}[dimension])
    front = (0,) if dimension == 2 else (11,)
    image[(0, *front, 3, 2)] = 2.0
    image[(0, *front, 25, 0)] = -1.0  # reaches into the padding
    found = predictor.predict_case(image).boxes
    assert found is not None
    labels, boxes, scores = found
    z3, z5 = ([[10.0], [13.0]], [[9.0], [14.0]]) if dimension == 3 else ([[], []], [[], []])
    assert labels.tolist() == [0, 1]
    expected = [[*z3[0], 2.0, 1.0, *z3[1], 5.0, 4.0], [*z5[0], 23.0, 0.0, *z5[1], 28.0, 3.0]]
    np.testing.assert_allclose(boxes, expected, atol=1e-5)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp([-2.0, -1.0])), atol=1e-6)


@pytest.mark.parametrize("dimension", [2, 3])
def test_boxes_leave_the_device_in_parts_without_a_difference(dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = make_plans(dimension)
    network = stock_built_network(plans, 0)
    predictor = initialised(TaskPredictor(**options()), network, plans, [network, network], tuple(range(dimension)))
    expected = predictor.predict_case(image_of(dimension)).boxes
    assert len(expected[0]) > 0
    monkeypatch.setattr(case_collector, "VIEWS_AT_ONCE", 5)
    for own, other in zip(predictor.predict_case(image_of(dimension)).boxes, expected, strict=True):
        np.testing.assert_array_equal(own, other)


def test_overlapping_tiles_keep_the_box_of_the_tile_that_sees_it_whole() -> None:
    predictor, _ = pointwise_predictor(2, box_merging="suppress")
    image = torch.zeros(1, 1, 32, 8)
    image[0, 0, 8, 4] = 2.0  # tiles at 0, 8 and 16: the second begins at this voxel and cuts the box
    labels, boxes, _ = predictor.predict_case(image).boxes  # type: ignore[misc]
    assert labels.tolist() == [0]
    np.testing.assert_allclose(boxes, [[7, 3, 10, 6]], atol=1e-5)


def test_without_segmentation_no_logits_are_asked_for() -> None:
    predictor, network = pointwise_predictor(2)
    image = image_of(2)
    everything = predictor.predict_case(image)
    assert network.calls
    assert all(network.calls)
    network.calls.clear()
    predictor.choose_tasks(["classification"])
    found = predictor.predict_case(image)
    assert found.segmentation is None
    assert found.boxes is None
    assert network.calls
    assert not any(network.calls)
    for name, values in everything.probabilities.items():
        np.testing.assert_array_equal(found.probabilities[name], values)
    assert predictor.network is network


def test_a_2d_network_pools_all_slices_and_refuses_boxes_of_a_volume() -> None:
    predictor, network = pointwise_predictor(2, tile_step_size=1.0)
    volume = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with pytest.raises(NotImplementedError, match="3 slices"):
        predictor.predict_case(volume)
    predictor.choose_tasks(["segmentation", "classification"])
    found = predictor.predict_case(volume)
    head = network.heads.classification
    with torch.no_grad():
        features = torch.cat((volume, volume.square())).flatten(2)[None]  # the slices side by side are one image
        logits = head.classify(head.pooled([features]))
    np.testing.assert_allclose(found.probabilities["grade"], logits["grade"][0].softmax(0), atol=1e-5)


def test_tasks_that_the_model_has_not_are_refused() -> None:
    predictor, _ = pointwise_predictor(2)
    del predictor.configuration_manager.configuration["architecture"]["arch_kwargs"]["detection"]
    with pytest.raises(NnUNetKDError, match="does not predict detection, only segmentation, classification"):
        predictor.choose_tasks(["detection"])
    predictor.configuration_manager.configuration["architecture"]["arch_kwargs"]["classification"] = {
        "targets": [["grade", 2]]
    }
    with pytest.raises(NnUNetKDError, match="'grade' with 2 classes"):
        predictor.choose_tasks()


def test_boxes_of_the_stored_image_undo_transposition_cropping_and_resampling() -> None:
    """Stored (z, y, x) = 10 x 20 x 30, transposed to (x, z, y), cropped from (4, 1, 2) and doubled."""
    properties = {"shape_before_cropping": (30, 10, 20), "bbox_used_for_cropping": [[4, 24], [1, 9], [2, 20]]}
    own = np.array(
        [[2.0, 4.0, 6.0, 8.0, 10.0, 12.0], [0.0, 0.0, 30.0, 4.0, 4.0, 50.0], [0.0, 0.0, 37.0, 4.0, 4.0, 50.0]]
    )
    boxes = (np.array([1, 0, 0]), own, np.array([0.9, 0.8, 0.7]))
    labels, mapped, scores = boxes_in_stored_image(boxes, properties, [2, 0, 1], (40, 16, 36))
    # x = a / 2 + 4, z = b / 2 + 1, y = c / 2 + 2; the second is clipped at y = 20, the third begins beyond it
    np.testing.assert_allclose(mapped, [[3.0, 5.0, 5.0, 6.0, 8.0, 8.0], [1.0, 17.0, 4.0, 3.0, 20.0, 6.0]])
    assert labels.tolist() == [1, 0]
    assert scores.tolist() == [0.9, 0.8]


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> SimpleNamespace:
    """A model folder with two folds of random weights, and three images of different size."""
    plans = make_plans(2)
    model = tmp_path / "Dataset001_Test" / "nnUNetTrainer__nnUNetKDPlans__2d"
    for fold in (0, 1):
        (model / f"fold_{fold}").mkdir(parents=True)
        checkpoint = {
            "network_weights": stock_built_network(plans, fold).state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "2d"},
            "inference_allowed_mirroring_axes": (0, 1),
        }
        torch.save(checkpoint, model / f"fold_{fold}" / "checkpoint_final.pth")
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(DATASET))
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for case, shape in {"a": (20, 12), "b": (16, 8), "c": (33, 9)}.items():
        Image.fromarray(random.integers(1, 255, shape, dtype=np.uint8)).save(images / f"{case}_0000.png")
    return SimpleNamespace(model=model, images=images, output=tmp_path / "out", plans=plans)


def predict(folders: SimpleNamespace, *arguments: str) -> Path:
    fixed = ["-m", folders.model, "-i", folders.images, "-o", folders.output, "-npp", "0", "-device", "cpu"]
    main(
        [*map(str, fixed), "--disable_progress_bar", *(arguments if "-nps" in arguments else ("-nps", "0", *arguments))]
    )
    return Path(folders.output)


def classes_in(folder: Path) -> dict[str, dict[str, Any]]:
    return read_classification_predictions(folder / "classification.csv", TARGETS)


def test_the_command_writes_all_tasks(folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # stock nnU-Net's export pool with threads, because spawned processes take seconds to import torch
    pool = SimpleNamespace(Pool=ThreadPool)
    monkeypatch.setattr(predict_from_raw_data.multiprocessing, "get_context", lambda method: pool)
    output = predict(folders, "-nps", "1")

    written = classes_in(output)
    boxes = read_box_predictions(output / "boxes.json", ["lesion", "cyst"], 2)
    assert list(written) == list(boxes) == ["a", "b", "c"]
    networks = [stock_built_network(folders.plans, fold) for fold in (0, 1)]
    predictor = initialised(TaskPredictor(**options()), networks[0], folders.plans, networks, (0, 1))
    for case in written:
        pixels = np.asarray(Image.open(folders.images / f"{case}_0000.png"), dtype=np.float32)
        assert Image.open(output / f"{case}.png").size == pixels.shape[::-1]
        scaled = (pixels - pixels.mean()) / pixels.std()
        expected = predictor.predict_case(torch.from_numpy(scaled)[None, None])
        for name, values in expected.probabilities.items():
            np.testing.assert_allclose(written[case][name], values, atol=1e-4)
        assert expected.boxes is not None
        assert len(boxes[case][0]) == len(expected.boxes[0]) > 0
        np.testing.assert_allclose(boxes[case][2], expected.boxes[2], atol=1e-4)
        np.testing.assert_allclose(boxes[case][1], expected.boxes[1], atol=1e-2)

    stock = tmp = output.parent / "stock"
    tmp.mkdir()
    folders.output = stock
    predict(folders, "--tasks", "segmentation")
    assert not (stock / "classification.csv").exists()
    for case in written:
        assert (stock / f"{case}.png").read_bytes() == (output / f"{case}.png").read_bytes()


def test_continuing_keeps_what_is_there(folders: SimpleNamespace) -> None:
    output = predict(folders, "--tasks", "classification")
    assert sorted(path.suffix for path in output.iterdir() if not path.name.startswith(".")) == [".csv", *[".json"] * 3]
    complete = classes_in(output)
    # as after a kill: b is not in the file; and a mark that shows that a is not predicted again
    lines = (output / "classification.csv").read_text().splitlines()
    marked = ["a,1,0,0,0.5,0.25" if line.startswith("a,") else line for line in lines if not line.startswith("b,")]
    (output / "classification.csv").write_text("\n".join(marked) + "\n")
    predict(folders, "--tasks", "classification", "--continue_prediction")
    continued = classes_in(output)
    assert list(continued) == ["a", "b", "c"]
    assert continued["a"]["findings"].tolist() == [0.5, 0.25]
    np.testing.assert_array_equal(continued["b"]["grade"], complete["b"]["grade"])
    # the boxes are asked for now and are nowhere: everything is predicted again
    predict(folders, "--tasks", "classification", "detection", "--continue_prediction")
    assert classes_in(output).keys() == complete.keys()
    np.testing.assert_array_equal(classes_in(output)["a"]["grade"], complete["a"]["grade"])
    assert set(read_box_predictions(output / "boxes.json", ["lesion", "cyst"], 2)) == {"a", "b", "c"}


def test_parts_fill_one_file_and_a_failure_loses_no_case(
    folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(folders, "--tasks", "classification", "-num_parts", "2", "-part_id", "0")
    assert list(classes_in(folders.output)) == ["a", "c"]
    predict(folders, "--tasks", "classification", "-num_parts", "2", "-part_id", "1")
    assert list(classes_in(folders.output)) == ["a", "b", "c"]

    folders.output = folders.output.parent / "failed"
    pass_over_tiles = TaskPredictor.predict_logits_from_preprocessed_data

    def fails_at_c(self: TaskPredictor, data: Tensor) -> Tensor:
        if tuple(data.shape[2:]) == (33, 9):
            raise MemoryError
        return pass_over_tiles(self, data)

    monkeypatch.setattr(TaskPredictor, "predict_logits_from_preprocessed_data", fails_at_c)
    with pytest.raises(MemoryError):
        predict(folders, "--tasks", "classification")
    assert list(classes_in(folders.output)) == ["a", "b"]


def test_files_of_another_model_are_not_mixed(folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    folders.output.mkdir()
    (folders.output / "classification.csv").write_text("case,other/x,other/y\na,0.5,0.5\n")
    message = failed(folders, capsys)
    assert f"The output folder {folders.output} holds predictions of another model" in message
    assert "grade/low" in message
    assert "Choose another folder with -o, or move classification.csv away." in message
    assert "dataset.json" not in message
    assert [file.name for file in folders.output.iterdir()] == ["classification.csv"]
    (folders.output / "classification.csv").unlink()
    (folders.output / "boxes.json").write_text('{"a": [{"label": "mass", "box": [0, 0, 1, 1], "score": 1}]}')
    message = failed(folders, capsys)
    assert "holds predictions of another model" in message
    assert "'mass' is not a class" in message
    assert "Choose another folder with -o, or move boxes.json away." in message


def failed(folders: SimpleNamespace, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a call that ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        predict(folders, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_the_folder_of_a_dataset_or_a_file_is_no_output_folder(
    folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnU-Net's prediction would write the model's dataset.json over that of the dataset."""
    folders.output.mkdir()
    (folders.output / "dataset.json").write_text('{"name": "mine"}')
    message = failed(folders, capsys)
    assert f"-o {folders.output} holds a dataset.json that no prediction has written" in message
    assert [file.read_text() for file in folders.output.iterdir()] == ['{"name": "mine"}']
    dataset, folders.output = folders.output, folders.output / "labelsTr"
    folders.output.mkdir()
    assert f"-o {folders.output} belongs to a dataset" in failed(folders, capsys)
    assert not list(folders.output.iterdir())
    folders.output = dataset / "other"
    predict(folders, "--tasks", "classification")
    predict(folders, "--tasks", "classification")  # into a folder of predictions one may predict again
    folders.output = folders.output / "classification.csv"
    before = folders.output.read_text()
    assert f"-o {folders.output} is a file" in failed(folders, capsys)
    assert folders.output.read_text() == before


@pytest.mark.parametrize("as_files", [False, True])
def test_a_case_with_other_channels_is_named_before_anything_is_predicted(
    folders: SimpleNamespace, as_files: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders.images / "b_0001.png").write_bytes((folders.images / "b_0000.png").read_bytes())
    given = [str(file) for file in sorted(folders.images.iterdir()) if file.name[0] == "b"]
    message = failed(folders, capsys, *(("-i", *given) if as_files else ()))  # the later of two -i counts
    assert "The model was trained with 1 channel(s), in this order: T1." in message
    assert message.splitlines()[1:] == ["  b has 2: b_0000.png, b_0001.png"]
    assert not folders.output.exists()


def test_an_unreadable_image_is_named_and_the_cases_before_it_are_kept(
    folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folders.images / "b_0000.png"
    whole = broken.read_bytes()
    broken.write_text("abc")
    message = failed(folders, capsys)
    assert f"Case b cannot be read from {broken}: " in message
    assert "--continue_prediction" in message
    assert list(classes_in(folders.output)) == ["a"]
    assert (folders.output / "a.png").is_file()
    broken.write_bytes(whole)
    predict(folders, "--continue_prediction")
    assert list(classes_in(folders.output)) == ["a", "b", "c"]


def test_an_unreadable_image_of_a_stock_model_is_named(
    folders: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = folders.plans["configurations"]["2d"]["architecture"]
    folders.plans["configurations"]["2d"]["architecture"] = stock_architecture(arguments)
    (folders.model / "plans.json").write_text(json.dumps(folders.plans))
    for fold in (0, 1):
        file = folders.model / f"fold_{fold}" / "checkpoint_final.pth"
        checkpoint = torch.load(file, weights_only=False)
        torch.save({**checkpoint, "network_weights": stock_weights(checkpoint["network_weights"])}, file)
    (folders.images / "b_0000.png").write_text("abc")
    message = failed(folders, capsys)
    assert f"Case b cannot be read from {folders.images / 'b_0000.png'}: " in message
    assert (folders.output / "a.png").is_file()


def test_an_input_folder_without_images_is_refused(
    folders: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.images = tmp_path / "empty"
    folders.images.mkdir()
    message = failed(folders, capsys)
    assert f"The input folder {folders.images} (-i) holds no image CASE_0000.png" in message
    assert not folders.output.exists()
