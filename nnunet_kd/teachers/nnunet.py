"""A trained nnU-Net as the teacher: a joint teacher's head, any single-dataset model, or an ensemble of folds."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
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
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import LabelSpaceError, LeakageError, TeacherError
from nnunet_kd.networks.joint import JointUNet, Route
from nnunet_kd.networks.multitask import Heads, planned_heads
from nnunet_kd.networks.taps import Stage, find_stage
from nnunet_kd.settings import BLOCK
from nnunet_kd.settings import Teacher as TeacherSettings
from nnunet_kd.spaces.channels import channel_names
from nnunet_kd.spaces.labels import LabelMap, LabelSpace, match_label_spaces
from nnunet_kd.tasks.detection_head import BoxMaps
from nnunet_kd.tasks.detection_plan import DetectionPlan
from nnunet_kd.teachers.base import BatchTeacher, HiddenCases, Student
from nnunet_kd.teachers.checkpoint import (
    check_joint_plans,
    checkpoint_file,
    load_checkpoint,
    model_folder,
    read_model_json,
)
from nnunet_kd.teachers.forward import TeacherForward, drop_detection, pooled_channels, speaking_heads
from nnunet_kd.teachers.geometry import ChannelMap, InputMap, input_map
from nnunet_kd.teachers.heads import match_classification, match_detection
from nnunet_kd.teachers.output import Taught, TeacherOutput, task_names
from nnunet_kd.teachers.precision import choose_bf16, cpu_has_bf16

AVERAGES = "class_average"  # key in the checkpoint of a network that was trained on class-wise averaged images


@dataclass(frozen=True)
class Voice:
    """What a model has to say to its student, and how it wants to be asked.

    ``label_space``: of its segmentation; None without. ``tasks``, ``heads``: its classification targets and boxes, and
    the settings of their heads.
    """

    input_map: InputMap
    label_space: LabelSpace | None
    tasks: Tasks
    heads: Heads


class NNUNetTeacher(BatchTeacher):
    """A frozen nnU-Net that turns a student's batch into logits, features, classes and boxes.

    Args:
        name: Its name in the settings, for messages.
        settings: Model folder, fold(s), checkpoint, head, label map.
        student: The student it will teach.

    Raises:
        TeacherError: The model is missing or does not fit the student.
        LabelSpaceError: The label spaces cannot be matched.
    """

    def __init__(self, name: str, settings: TeacherSettings, student: Student) -> None:
        super().__init__(name, settings, student)
        self.folder = model_folder(settings.model, self._folds()[0])
        self.files = [checkpoint_file(self.folder, fold, settings.checkpoint) for fold in self._folds()]
        self.plans = read_model_json(self.folder, "plans.json")
        self.dataset_json = read_model_json(self.folder, "dataset.json")
        self.plans_manager = PlansManager(self.plans)
        self.trainer_name, self.configuration_name = self._trainer_and_configuration()
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration_name)
        self.joint = JointDataset.from_plans(self.plans) if "members" in self.plans.get(BLOCK, {}) else None
        self.route: Route | None = None
        self.member = ""  # of a joint teacher, the one whose heads for classes and boxes speak
        voice = self._single_dataset() if self.joint is None else self._joint_head(self.joint)
        self.input_map = voice.input_map
        self.class_orders: dict[str, tuple[int, ...]] = {}
        student_map = self._match_segmentation(voice)
        self._match_heads(voice)
        self.taught = Taught(tuple(t for t in task_names(student.tasks) if t not in self.refusals), student_map)
        self.networks: list[Any] = []
        self.stages: dict[str, Stage] = {}
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

    def _match_segmentation(self, voice: Voice) -> LabelMap | None:
        """Set the teacher's label map and return the student's."""
        if not self.student.tasks.segmentation:
            return None  # its labels are stand-ins
        own = self.student.label_space
        if voice.label_space is None:
            self.refusals["segmentation"] = self._refusal("segmentation", "It has learned none.")
            return match_label_spaces(own, own)[0]
        try:
            student_map, self.teacher_map = match_label_spaces(own, voice.label_space, self.settings.labels)
        except LabelSpaceError as error:
            raise LabelSpaceError(f"Teacher '{self.name}' in {self.folder}: {error}") from error
        return student_map

    def _match_heads(self, voice: Voice) -> None:
        student = self.student
        detection = None if voice.heads[1] is None else DetectionPlan.from_dict(voice.heads[1])
        try:
            self.class_orders = match_classification(student.tasks.classification, voice.tasks.classification)
        except TeacherError as error:
            self.refusals["classification"] = self._refusal("classification", str(error))
        try:
            if student.detection_plan is not None:
                match_detection(student.detection_plan, detection, self.input_map.zoom)
        except TeacherError as error:
            self.refusals["detection"] = self._refusal("detection", str(error))

    def _refusal(self, task: str, reason: str) -> str:
        return f"Teacher '{self.name}' in {self.folder} cannot teach {self.student.dataset} {task}. {reason}"

    def _single_dataset(self) -> Voice:
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
        heads = planned_heads(self.configuration_manager.configuration["architecture"]) or (None, None)
        tasks = Tasks.from_dataset_json(self.dataset_json).with_heads(*heads)
        space = LabelSpace.from_dataset_json(self.dataset_json) if tasks.segmentation else None
        return Voice(mapping, space, tasks, heads)

    def _joint_head(self, joint: JointDataset) -> Voice:
        dataset = self.student.dataset
        wanted = self.settings.head or dataset
        head_name: str | None
        if wanted in joint.heads:
            head_name = wanted
        elif wanted in joint.members:
            head_name = joint.members[wanted].head
        else:
            raise TeacherError(
                f"Teacher '{self.name}' in {self.folder} has no head '{wanted}'. Its heads: "
                f"{', '.join(joint.heads)}; its members: {', '.join(joint.members)}. Name one with 'head'."
            )
        named = wanted if wanted in joint.members else self._member_of_head(joint, head_name)
        speaker = dataset if dataset in joint.members else named
        self.member = wanted if wanted in joint.members else speaker
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
        space = None if head_name is None else joint.heads[head_name].label_space
        own_map = joint.members[dataset].label_map if dataset in joint.members else None
        if own_map is not None and head_name == joint.members[dataset].head and self.settings.labels is None:
            self.settings = replace(self.settings, labels=own_map)
        configuration = self.configuration_name
        heads = joint.member_heads(self.member, configuration)
        return Voice(mapping, space, joint.member_tasks(self.member, configuration), heads)

    def _member_of_head(self, joint: JointDataset, head: str | None) -> str:
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
            network.routes[self.member] = self.route  # another member's channels may enter where its heads speak
            network.select(self.member)
        return network.eval().requires_grad_(False)

    def find_stages(self, levels: Sequence[str], network: nn.Module | None = None) -> dict[str, Stage]:
        """The stage that each level name means in this teacher."""
        network = self.build_network() if network is None else network
        return {level: find_stage(network, level) for level in levels}

    def feature_channels(self, levels: Sequence[str]) -> dict[str, int]:
        """Width of its features at each of ``levels``."""
        return {level: stage.channels for level, stage in self.find_stages(levels).items()}

    def pooled_channels(self) -> int:
        """Width of the features that its classification pools."""
        return pooled_channels(speaking_heads(self.build_network()))

    def load(
        self,
        device: torch.device,
        levels: Sequence[str],
        tasks: Collection[str],
        compile_network: bool,
        hidden: HiddenCases,
    ) -> None:
        """Read the weights of every fold, see :meth:`BatchTeacher.load`."""
        for file in self.files:
            checkpoint = load_checkpoint(file)
            self.check_checkpoint(file, checkpoint)
            self._check_leakage(file, checkpoint, hidden)
            network = self.build_network()
            try:
                network.load_state_dict(checkpoint["network_weights"])
            except RuntimeError as error:
                raise TeacherError(
                    f"The weights in {file} do not fit the network of {self.folder / 'plans.json'}: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            self.stages = self.find_stages(levels, network) if levels else {}
            heads = speaking_heads(network)
            if heads is not None and "detection" not in tasks:
                drop_detection(heads)
            forward = TeacherForward(network, list(self.stages.values())).to(device)
            self.networks.append(torch.compile(forward) if compile_network else forward)
        if self.settings.precision == "auto" and device.type == "cpu":
            self._bf16_undecided = cpu_has_bf16()

    def check_checkpoint(self, file: Path, checkpoint: dict[str, Any]) -> None:
        """Raise an error unless a fold was trained as its plans say, and as this kind of teacher."""
        if self.joint is not None:
            check_joint_plans(file, checkpoint, self.plans)
        if self.settings.kind == "nnunet" and AVERAGES in checkpoint.get(BLOCK, {}):
            raise TeacherError(
                f"Teacher '{self.name}' ({file}) was trained on class-wise averaged images, so it knows nothing of "
                f'images. Give it "kind": "class_average" in the settings.'
            )

    def _check_leakage(self, file: Path, checkpoint: dict[str, Any], hidden: HiddenCases) -> None:
        training_cases = self._training_cases(file, checkpoint)
        for dataset, cases in training_cases.items():
            self.training_cases.setdefault(dataset, set()).update(cases)
        own = training_cases.get(self.student.dataset, set())
        only_images = checkpoint.get(BLOCK, {}).get("unlabeled_cases", {}).get(self.student.dataset, ())
        seen = sorted(own.intersection(hidden.validation) | own.intersection(hidden.unlabeled).difference(only_images))
        if seen and not self.settings.allow_leakage:
            raise LeakageError(
                f"Teacher '{self.name}' ({file}) was trained on {len(seen)} cases of {self.student.dataset} that are "
                f"validation cases of fold {self.student.fold}, or unlabelled to this student, for example "
                f'{", ".join(seen[:3])}. Use the teacher\'s fold {self.student.fold} ("fold": "same") and, with '
                f"'labeled', a teacher that was trained with the same; or set \"allow_leakage\": true, which is "
                f"recorded with the results."
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

    def see(self, batch: Mapping[str, Any]) -> Tensor:
        """What the teacher sees of a batch: [B, C, *S] in the student's channels and grid."""
        image: Tensor = batch["data"]
        return image

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], tasks: Collection[str]) -> TeacherOutput:
        """Teach one batch: logits and boxes averaged over folds, on the student's grid; features of the first fold."""
        image = self.see(batch)
        if self._bf16_undecided:
            self._decide_bf16(image, tasks)
        return self._teach(image, tasks)

    def _teach(self, image: Tensor, tasks: Collection[str]) -> TeacherOutput:
        prepared = self.input_map(image)
        heads = "classification" in tasks or "detection" in tasks
        with torch.autocast(image.device.type, dtype=self._autocast_dtype(image), enabled=self._autocast(image)):
            results = [network(prepared, "segmentation" in tasks, heads) for network in self.networks]
        output = TeacherOutput(features=dict(zip(self.stages, results[0].features, strict=True)))
        if "segmentation" in tasks:
            assert self.teacher_map is not None  # else it would not be taught
            logits = _mean([result.segmentation[0] for result in results])
            output.logits = self.teacher_map(self.input_map.restore(logits, image.shape[2:]))
        if "classification" in tasks:
            for target, order in self.class_orders.items():
                logits = _mean([result.classification[target] for result in results])
                output.classification[target] = logits[:, list(order)]
            output.pooled = torch.cat(results[0].pooled.values, 1)
        if "detection" in tasks:
            maps = zip(*(result.detection for result in results), strict=True)
            output.boxes = BoxMaps(*(tuple(_mean(level) for level in zip(*part, strict=True)) for part in maps))
        return output

    def _autocast(self, image: Tensor) -> bool:
        return image.device.type == "cuda" or self._use_bf16

    def _autocast_dtype(self, image: Tensor) -> torch.dtype:
        return torch.float16 if image.device.type == "cuda" else torch.bfloat16

    def _decide_bf16(self, image: Tensor, tasks: Collection[str]) -> None:
        """Use bfloat16 on the CPU if its outputs are close to float32's on this batch and it is faster."""
        self._bf16_undecided = False
        # where there is a segmentation it is what decides
        judged = tasks if self.teacher_map is None else {"segmentation"}

        def teach(use_bf16: bool) -> TeacherOutput:
            self._use_bf16 = use_bf16
            return self._teach(image, judged)

        regions = self.teacher_map is not None and self.teacher_map.target.regions
        self._use_bf16, reason = choose_bf16(teach, regions)
        self.precision_note = f"teacher '{self.name}': {reason}"


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """Mean over folds in float32."""
    total = parts[0].float()
    for other in parts[1:]:
        total = total + other.float()
    return total / len(parts) if len(parts) > 1 else total


def _training_cases_of_fold(splits_file: Path, fold: int | str) -> set[str]:
    """Training cases by nnU-Net's rules; nothing where the splits are not known."""
    if not splits_file.is_file():
        return set()
    splits = json.loads(splits_file.read_text())
    identifiers = sorted({case for split in splits for side in split.values() for case in side})
    return set(fold_cases(splits, fold, identifiers)[0])
