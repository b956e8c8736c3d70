"""A trained nnU-Net as the teacher: a joint teacher's head, any single-dataset model, or an ensemble of folds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_kd.data.joint import JointDataset
from nnunet_kd.data.splits import fold_cases
from nnunet_kd.errors import LabelSpaceError, LeakageError, TeacherError
from nnunet_kd.networks.joint import JointUNet, Route, crop, crop_features, pad_to_multiple
from nnunet_kd.networks.taps import Stage, encoder_strides, find_stage, forward_unet
from nnunet_kd.settings import BLOCK
from nnunet_kd.settings import Teacher as TeacherSettings
from nnunet_kd.spaces.channels import channel_names
from nnunet_kd.spaces.labels import LabelSpace, match_label_spaces
from nnunet_kd.teachers.checkpoint import (
    check_joint_plans,
    checkpoint_file,
    load_checkpoint,
    model_folder,
    read_model_json,
)
from nnunet_kd.teachers.geometry import ChannelMap, InputMap, input_map
from nnunet_kd.teachers.output import TeacherOutput

TEACHING = "teaching"  # the route of a student through a joint network
NUM_TIMINGS = 3  # the fastest counts, because machines are noisy
MAX_BF16_DISAGREEMENT = 0.01  # share of voxels whose most likely class may differ from float32


@dataclass(frozen=True)
class Student:
    """What a teacher must know of its student."""

    dataset: str
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    channel_names: tuple[str, ...]
    fold: int | str

    @property
    def label_space(self) -> LabelSpace:
        """The student's classes."""
        return LabelSpace.from_dataset_json(self.dataset_json)

    @property
    def num_previous_stage_channels(self) -> int:
        """One-hot channels that a cascade appends to the image."""
        total = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        return total - len(self.channel_names)


class NNUNetTeacher:
    """A frozen nnU-Net that turns a student's batch into logits and features.

    Construction reads plans only and finds every mismatch; :meth:`load` reads the weights. It is no nn.Module, so it
    can end up neither in the student's checkpoint nor in its DDP wrapper.

    Args:
        name: Its name in the settings, for messages.
        settings: Model folder, fold(s), checkpoint, head, label map.
        student: The student it will teach.

    Raises:
        TeacherError: The model is missing or does not fit the student.
        LabelSpaceError: The label spaces cannot be matched.
    """

    def __init__(self, name: str, settings: TeacherSettings, student: Student) -> None:
        self.name = name
        self.settings = settings
        self.student = student
        self.folder = model_folder(settings.model)
        self.files = [checkpoint_file(self.folder, fold, settings.checkpoint) for fold in self._folds()]
        self.plans = read_model_json(self.folder, "plans.json")
        self.dataset_json = read_model_json(self.folder, "dataset.json")
        self.plans_manager = PlansManager(self.plans)
        self.trainer_name, self.configuration_name = self._trainer_and_configuration()
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration_name)
        self.joint = JointDataset.from_plans(self.plans) if "members" in self.plans.get(BLOCK, {}) else None
        self.route: Route | None = None
        if self.joint is None:
            label_space, self.input_map = self._single_dataset()
        else:
            label_space, self.input_map = self._joint_head(self.joint)
        try:
            self.student_map, self.teacher_map = match_label_spaces(
                student.label_space, label_space, self.settings.labels
            )
        except LabelSpaceError as error:
            raise LabelSpaceError(f"Teacher '{name}' in {self.folder}: {error}") from error
        self.networks: list[Any] = []
        self.stages: dict[str, Stage] = {}
        self.training_cases: dict[str, set[str]] = {}
        self.leaked_cases: list[str] = []
        self.precision_note = ""
        self._use_bf16 = False
        self._bf16_undecided = False

    # ---- fitting the student ----------------------------------------------------------------------------------------

    def _folds(self) -> list[int | str]:
        fold = self.settings.fold
        if fold == "same":
            return [self.student.fold]
        return list(fold) if isinstance(fold, list) else [fold]

    def _trainer_and_configuration(self) -> tuple[str, str]:
        """From the folder's name TRAINER__PLANS__CONFIGURATION, or where it was renamed from its first checkpoint."""
        parts = self.folder.name.split("__")
        if len(parts) == 3 and parts[2] in self.plans["configurations"]:
            return parts[0], parts[2]
        checkpoint = load_checkpoint(self.files[0])
        configuration = checkpoint["init_args"]["configuration"]
        if configuration not in self.plans["configurations"]:
            raise TeacherError(
                f"Teacher '{self.name}': {self.files[0]} was trained in {configuration}, which plans.json in "
                f"{self.folder} does not have. Give the model folder as nnU-Net wrote it."
            )
        return checkpoint["trainer_name"], configuration

    def _single_dataset(self) -> tuple[LabelSpace, InputMap]:
        if self.settings.head is not None:
            raise TeacherError(
                f"Teacher '{self.name}' names the head '{self.settings.head}', but {self.folder} is not a joint "
                f"teacher. Remove 'head'."
            )
        if self.configuration_manager.previous_stage_name is not None:
            raise NotImplementedError(
                f"Teacher '{self.name}' in {self.folder} is the second stage of a cascade, which can teach only as a "
                f"joint teacher. Name its first stage or a 3d_fullres model instead."
            )
        names = channel_names(self.dataset_json)
        mapping = self._input_map(self.plans_manager, self.configuration_manager, names)
        return LabelSpace.from_dataset_json(self.dataset_json), mapping

    def _joint_head(self, joint: JointDataset) -> tuple[LabelSpace, InputMap]:
        dataset = self.student.dataset
        wanted = self.settings.head or dataset
        if wanted in joint.heads:
            head_name = wanted
        elif wanted in joint.members:
            head_name = joint.members[wanted].head
        else:
            raise TeacherError(
                f"Teacher '{self.name}' in {self.folder} has no head '{wanted}'. Its heads: "
                f"{', '.join(joint.heads)}; its members: {', '.join(joint.members)}. Name one with 'head'."
            )
        speaker = dataset if dataset in joint.members else self._member_of_head(joint, head_name)
        routes = joint.routes(cascaded=self.configuration_manager.previous_stage_name is not None)
        out = next(routes[m] for m, entry in joint.members.items() if entry.head == head_name)
        self.route = Route(routes[speaker].channels, out.start, out.stop)
        member = joint.recorded_member(speaker, self.configuration_name)
        mapping = self._input_map(
            member.plans_manager, member.configuration_manager, joint.members[speaker].channel_names
        )
        added = len(self.route.channels) - len(mapping.channels)
        if added:
            if self.student.num_previous_stage_channels != added or speaker != dataset:
                raise TeacherError(
                    f"Teacher '{self.name}' is a cascade ({self.configuration_name}) and can teach only its members in "
                    f"the same cascade."
                )
            first = len(self.student.channel_names)
            extra = tuple(ChannelMap(first + index) for index in range(added))
            mapping = replace(mapping, channels=mapping.channels + extra)
        space = joint.heads[head_name].label_space
        own_map = joint.members[dataset].label_map if dataset in joint.members else None
        if own_map is not None and head_name == joint.members[dataset].head and self.settings.labels is None:
            self.settings = replace(self.settings, labels=own_map)
        return space, mapping

    def _member_of_head(self, joint: JointDataset, head: str) -> str:
        return next(name for name, entry in joint.members.items() if entry.head == head)

    def _input_map(
        self, plans_manager: PlansManager, configuration_manager: ConfigurationManager, names: Sequence[str]
    ) -> InputMap:
        student = self.student
        try:
            return input_map(
                student.plans_manager,
                student.configuration_manager,
                student.channel_names,
                plans_manager,
                configuration_manager,
                names,
            )
        except TeacherError as error:
            where = f"Teacher '{self.name}' in {self.folder}"
            raise TeacherError(f"{where} does not fit {student.dataset}: {error}") from error

    # ---- weights ----------------------------------------------------------------------------------------------------

    def build_network(self) -> nn.Module:
        """The teacher's network without weights, deep supervision off."""
        try:
            trainer = recursive_find_trainer_class_by_name(self.trainer_name)
        except RuntimeError as error:
            raise TeacherError(
                f"The trainer {self.trainer_name} of teacher '{self.name}' in {self.folder} is not installed, so its "
                f"network cannot be built. Put the folder that holds it into nnUNet_extTrainer."
            ) from error
        num_inputs = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        # A student starts from the weights and sees the batches of its control, so a teacher must draw no numbers.
        with torch.random.fork_rng(devices=[]):
            network = trainer.build_network_architecture(
                self.plans_manager,
                self.configuration_manager,
                num_inputs,
                self.plans_manager.get_label_manager(self.dataset_json).num_segmentation_heads,
                enable_deep_supervision=False,
            )
        if isinstance(network, JointUNet) and self.route is not None:
            network.routes[TEACHING] = self.route
            network.select(TEACHING)
        return network.eval().requires_grad_(False)

    def find_stages(self, levels: Sequence[str], network: nn.Module | None = None) -> dict[str, Stage]:
        """The stage that each level name means in this teacher."""
        network = self.build_network() if network is None else network
        return {level: find_stage(network, level) for level in levels}

    def load(
        self, device: torch.device, levels: Sequence[str], compile_network: bool, validation_cases: Sequence[str]
    ) -> None:
        """Read the weights of every fold to ``device`` and refuse leakage.

        Args:
            device: Where to teach.
            levels: Levels whose features are wanted.
            compile_network: Whether to compile the forward pass.
            validation_cases: Cases of the student's dataset that no fold may have seen.

        Raises:
            TeacherError: A checkpoint is broken, or does not match the plans.
            LeakageError: A fold was trained on validation cases of the student.
        """
        for file in self.files:
            checkpoint = load_checkpoint(file)
            self._check_leakage(file, checkpoint, set(validation_cases))
            if self.joint is not None:
                check_joint_plans(file, checkpoint, self.plans)
            network = self.build_network()
            try:
                network.load_state_dict(checkpoint["network_weights"])
            except RuntimeError as error:
                raise TeacherError(
                    f"The weights in {file} do not fit the network of {self.folder / 'plans.json'}: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            self.stages = self.find_stages(levels, network) if levels else {}
            forward = _TeacherForward(network, list(self.stages.values())).to(device)
            self.networks.append(torch.compile(forward) if compile_network else forward)
        if self.settings.precision == "auto" and device.type == "cpu":
            self._bf16_undecided = _cpu_has_bf16()

    def _check_leakage(self, file: Path, checkpoint: dict[str, Any], validation_cases: set[str]) -> None:
        training_cases = self._training_cases(file, checkpoint)
        for dataset, cases in training_cases.items():
            self.training_cases.setdefault(dataset, set()).update(cases)
        seen = sorted(validation_cases & training_cases.get(self.student.dataset, set()))
        if seen and not self.settings.allow_leakage:
            raise LeakageError(
                f"Teacher '{self.name}' ({file}) was trained on {len(seen)} validation cases of {self.student.dataset} "
                f"fold {self.student.fold}, for example {', '.join(seen[:3])}. Use the teacher's fold "
                f'{self.student.fold} ("fold": "same"), or set "allow_leakage": true, which is recorded with the '
                f"results."
            )
        self.leaked_cases = sorted({*self.leaked_cases, *seen})

    def _training_cases(self, file: Path, checkpoint: dict[str, Any]) -> dict[str, set[str]]:
        """Cases that this checkpoint was trained on, itself or through its own teachers, per dataset."""
        recorded = checkpoint.get(BLOCK, {}).get("training_cases")
        if recorded is not None:
            return {dataset: set(cases) for dataset, cases in recorded.items()}
        dataset = self.plans_manager.dataset_name
        fold = file.parent.name.removeprefix("fold_")
        splits_file = Path(str(nnUNet_preprocessed)) / dataset / "splits_final.json"
        return {dataset: _training_cases_of_fold(splits_file, fold if fold == "all" else int(fold))}

    # ---- teaching ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, image: Tensor, want_logits: bool = True) -> TeacherOutput:
        """Teach one batch.

        Args:
            image: The student's batch [B, C, *S] on the teacher's device.
            want_logits: False leaves the logits out.

        Returns:
            Logits on the student's grid in the common label space, averaged over folds; features of the first fold.
        """
        if self._bf16_undecided:
            self._decide_bf16(image)
        prepared = self.input_map(image)
        with torch.autocast(image.device.type, dtype=self._autocast_dtype(image), enabled=self._autocast(image)):
            results = [network(prepared) for network in self.networks]
        features = dict(zip(self.stages, results[0][1], strict=True))
        if not want_logits:
            return TeacherOutput(None, features)
        logits = results[0][0].float()
        for other, _ in results[1:]:
            logits = logits + other.float()
        logits = self.input_map.restore(logits / len(results) if len(results) > 1 else logits, image.shape[2:])
        return TeacherOutput(self.teacher_map(logits), features)

    def _autocast(self, image: Tensor) -> bool:
        return image.device.type == "cuda" or self._use_bf16

    def _autocast_dtype(self, image: Tensor) -> torch.dtype:
        return torch.float16 if image.device.type == "cuda" else torch.bfloat16

    def _decide_bf16(self, image: Tensor) -> None:
        """Use bfloat16 on the CPU if its outputs are close to float32's on this batch and it is faster."""
        self._bf16_undecided = False
        seconds, predictions = [], []
        for use in (False, True):
            self._use_bf16 = use
            self(image)  # warm up: the first call packs weights
            times = []
            for _ in range(NUM_TIMINGS):
                start = time.perf_counter()
                logits = self(image).logits
                times.append(time.perf_counter() - start)
            seconds.append(min(times))
            assert logits is not None
            predictions.append(logits > 0 if self.teacher_map.target.regions else logits.argmax(1))
        disagreement = (predictions[0] != predictions[1]).float().mean().item()
        self._use_bf16 = disagreement <= MAX_BF16_DISAGREEMENT and seconds[1] < seconds[0]
        self.precision_note = (
            f"teacher '{self.name}': {'bfloat16' if self._use_bf16 else 'float32'} on this CPU (bfloat16 differs on "
            f"{disagreement:.2%} of voxels, {seconds[1]:.3f} s against {seconds[0]:.3f} s per batch)"
        )


class _TeacherForward(nn.Module):
    """One compilable forward: padded image -> (full-resolution logits, features)."""

    def __init__(self, network: nn.Module, stages: list[Stage]) -> None:
        super().__init__()
        self.network = network
        self.stages = stages

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        if isinstance(self.network, JointUNet):
            outputs, features = self.network.run(image, self.stages)
            return outputs[0], features
        if not hasattr(self.network, "encoder") or not hasattr(self.network.decoder, "transpconvs"):
            return self.network(image), []
        padded = pad_to_multiple(image, encoder_strides(self.network)[-1])
        outputs, features = forward_unet(self.network, padded, self.stages)
        return crop(outputs[0], image.shape[2:]), crop_features(features, self.stages, image.shape[2:])


def _training_cases_of_fold(splits_file: Path, fold: int | str) -> set[str]:
    """Training cases by nnU-Net's rules; nothing where the splits are not known."""
    if not splits_file.is_file():
        return set()
    splits = json.loads(splits_file.read_text())
    identifiers = sorted({case for split in splits for side in split.values() for case in side})
    return set(fold_cases(splits, fold, identifiers)[0])


def _cpu_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
