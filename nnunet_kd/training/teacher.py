"""The joint teacher: one network over all members, each through its own stock data loader, loss and head.

Host behaviour relied on (nnunetv2 2.8): ``get_dataloaders``, ``perform_actual_validation``, ``train_step`` and
``validation_step`` read the dataset from attributes of the trainer, so speaking for a member means setting these.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_kd.data.augmenters import augmenters
from nnunet_kd.data.folds import divided_groups
from nnunet_kd.data.joint import JointDataset, changes
from nnunet_kd.data.joint_network import build_joint_network
from nnunet_kd.data.loader import JointLoader, MapLabelsTransform, PadToMultipleTransform, member_probabilities
from nnunet_kd.data.member import Member, read_json
from nnunet_kd.data.splits import some
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.environment import environment, replaced
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.files import write_json
from nnunet_kd.networks.joint import JointUNet
from nnunet_kd.networks.multitask import multitask_architecture
from nnunet_kd.networks.taps import find_stage
from nnunet_kd.settings import BLOCK, Settings, read_user_settings, resolve_settings, without_terms
from nnunet_kd.tasks.detection_plan import DetectionPlan
from nnunet_kd.training.alignment import AlignedLoss, MemberClassifier
from nnunet_kd.training.joint_segmentations import write_joint_segmentations
from nnunet_kd.training.member_view import MemberView, evaluation_labels
from nnunet_kd.training.task_loss import TaskLoss
from nnunet_kd.training.task_scores import TaskScores, pseudo_dice
from nnunet_kd.training.task_trainer import TaskTrainer


class nnUNetTrainerKDTeacher(TaskTrainer):
    """Joint teacher over the members of a joint dataset and all of their tasks (our design)."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the signature must be stock nnU-Net's)
    ) -> None:
        self.joint = JointDataset.from_plans(plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.members: dict[str, Member] = {m: self.joint.member(m, configuration) for m in self.joint.members}
        first = next(iter(self.members.values()))
        self.joint_configuration_manager = self.configuration_manager
        self.preprocessed_dataset_folder = str(first.data_folder)  # stock initialize reads the dataset class there
        self.member: str | None = None
        self.steps: Counter[str] = Counter()  # batches of each member, of all processes
        self.steps_of_epoch: Counter[str] = Counter()
        self.member_tasks: dict[str, Tasks | None] = {}
        for name in self.members:
            has_heads = any(self.joint.member_heads(name, configuration))
            self.member_tasks[name] = self.joint.member_tasks(name, configuration) if has_heads else None

    def resolve_settings(self, plans: dict, configuration: str, fold: int | str) -> Settings:
        """Check that the members are as planned, then resolve the settings; terms and teachers are for students."""
        self.joint.check_unchanged(configuration)
        self._refuse_other_plans(plans, configuration)
        del fold
        layers = (without_terms(layer) for layer in (plans.get(BLOCK, {}), read_user_settings()))
        settings = resolve_settings(*layers)
        if settings.labeled is not None:
            raise NotImplementedError(
                "'labeled' is for one dataset, and a joint teacher would see the labels of all training cases of its "
                "members. Remove it from the settings of the teacher."
            )
        return settings

    def planned_batch_sizes(self, plans: dict, configuration: str) -> dict[str, int]:
        """Every member has batches of its own."""
        del plans
        return {name: member.batch_sizes[configuration] for name, member in self.joint.members.items()}

    def _refuse_other_plans(self, plans: dict, configuration: str) -> None:
        """All folds share one plans.json, so a fold trained under other joint plans would spoil the earlier ones."""
        name = f"{self.__class__.__name__}__{plans['plans_name']}__{configuration}"
        folder = Path(str(nnUNet_results)) / plans["dataset_name"] / name
        if not (folder / "plans.json").is_file() or not any(folder.glob("fold_*/checkpoint_*.pth")):
            return
        changed = changes(read_json(folder / "plans.json", f"Restore it, or remove {folder}."), plans, configuration)
        if changed:
            raise JointDatasetError(
                f"The folds in {folder} were trained under other joint plans ({', '.join(changed)} changed since). "
                f"To keep them, plan the new joint dataset under another id (nnUNetKD_plan_and_preprocess ... --joint "
                f"NEW_ID) and train that; or move this folder away and train all folds again."
            )

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The joint network; its channels and heads are in the plans, not in the two numbers."""
        del num_input_channels, num_output_channels
        return build_joint_network(plans_manager, configuration_manager, enable_deep_supervision)

    # ---- set-up ---------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Initialise, then build one stock loss per member on its head."""
        self.splits = {name: self.joint.split(member, self.fold) for name, member in self.members.items()}
        for name, (training, validation) in self.splits.items():
            if not training or not validation:
                raise JointDatasetError(f"{name} has no cases in fold {self.fold} of {self.joint.splits_file}.")
            split = {"train": training, "val": validation}
            divided = [] if self.fold == "all" else divided_groups(self.members[name], split)
            if divided:
                raise JointDatasetError(
                    f"Fold {self.fold} of {self.joint.name} has {len(divided)} value(s) of {name}'s 'split_by' both in "
                    f"training and in validation: {some(divided)}. Train a fold that {self.members[name].splits_file} "
                    f"has, or correct that file or add the fold to it, and plan the joint dataset again."
                )
        self._refuse_merged_labels_in_cascade()
        self.probabilities = member_probabilities(
            {name: len(training) for name, (training, _) in self.splits.items()}, self.settings.sampling_exponent
        )
        self._set_budget()
        super().initialize()
        network = self.unwrapped_network()
        assert isinstance(network, JointUNet)
        self.joint_network = network
        network.uses_all_parameters = self.is_ddp and len(network.task_heads) > 0
        if self._do_i_compile():
            # Every member compiles a graph for its own patch. Otherwise the second member would make all later graphs
            # accept any size, which is slower, and the default limit (8) would send the others to eager mode.
            torch._dynamo.config.automatic_dynamic_shapes = False
            limit = 4 * len(self.members) + 8
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        self.losses = {name: self._member_loss(name) for name in self.members}
        self.head_label_managers = {name: self._head_label_manager(name) for name in self.members}

    def _refuse_merged_labels_in_cascade(self) -> None:
        for name in self.members if self.is_cascaded else ():
            label_map = self.joint.head_map(name)
            if label_map is not None and any(len(group) > 1 for group in label_map.groups):
                raise NotImplementedError(
                    f"{name} has labels that its shared head '{self.joint.members[name].head}' merges. In a cascade "
                    f"the previous stage must tell them apart. Give {name} a head of its own (--heads), or train "
                    f"3d_fullres."
                )

    def _set_budget(self) -> None:
        training = self.settings.training
        if self.settings.budget == "member":
            rarest = min(self.probabilities.values())
            self.num_iterations_per_epoch = math.ceil(training.num_iterations_per_epoch / rarest)
            self.num_val_iterations_per_epoch = training.num_val_iterations_per_epoch * len(self.members)
        else:
            self.num_val_iterations_per_epoch = max(training.num_val_iterations_per_epoch, len(self.members))

    def _head_label_manager(self, name: str) -> Any:
        name_of_head = self.joint.members[name].head
        if name_of_head is None:
            return self.members[name].label_manager
        head = self.joint.heads[name_of_head]
        return self.plans_manager.get_label_manager(head.dataset_json)

    def _member_loss(self, name: str) -> nn.Module:
        with replaced(
            self,
            label_manager=self._head_label_manager(name),
            configuration_manager=self._configuration(name),
            **self._tasks_of(name),
        ):
            loss = self._build_loss()
        if self.is_ddp:
            _disable_gathering(loss)  # ranks draw different members, whose classes cannot be gathered
        if self.settings.alignment == "none":
            return loss
        index = list(self.members).index(name)
        return AlignedLoss(loss, self.wrapped_auxiliary["member_classifier"], index, self.settings.alignment_weight)

    @property
    def task_loss(self) -> TaskLoss:
        """The supervised loss of the speaking member."""
        loss: Any = self.loss.supervised if isinstance(self.loss, AlignedLoss) else self.loss
        return loss

    def _tasks_of(self, name: str) -> dict[str, Any]:
        """Attributes that let the methods for one dataset's tasks see those of a member."""
        _, detection = self.joint.member_heads(name, self.configuration_name)
        plan = None if detection is None else DetectionPlan.from_dict(detection)
        return {"tasks": self.member_tasks[name], "detection_plan": plan}

    def build_auxiliary(self) -> nn.ModuleDict:
        """The member classifier, if alignment is on."""
        if self.settings.alignment == "none":
            return nn.ModuleDict()
        network: Any = self.unwrapped_network()
        stage = find_stage(network, "bottleneck")
        network.tapped_stages = (stage,)
        return nn.ModuleDict({"member_classifier": MemberClassifier(stage.channels, len(self.members))})

    def _configuration(self, name: str) -> ConfigurationManager:
        """The member's stock configuration with the batch size, and the heads, that were planned for the teacher."""
        configuration = dict(self.members[name].configuration_manager.configuration)
        configuration["batch_size"] = self.joint.members[name].batch_sizes[self.configuration_name]
        heads = self.joint.member_heads(name, self.configuration_name)
        if any(heads):
            architecture = self.joint_configuration_manager.configuration["architecture"]
            configuration["architecture"] = multitask_architecture(architecture, *heads)
        return ConfigurationManager(configuration)

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """Deep supervision follows the teacher's strides, whichever member speaks."""
        with replaced(self, configuration_manager=self.joint_configuration_manager):
            return super()._get_deep_supervision_scales()

    @contextmanager
    def speaking_for(self, name: str) -> Iterator[Member]:
        """Let stock methods see the member's plans, labels, folders and batch size instead of the joint dataset's."""
        member = self.members[name]
        previous = None
        if self.is_cascaded:
            folder = Path(str(nnUNet_results), *Path(self.folder_with_segs_from_previous_stage).parts[-4:-2])
            previous = str(folder / name / "predicted_next_stage" / self.configuration_name)
        with replaced(
            self,
            member=name,
            plans_manager=member.plans_manager,
            configuration_manager=self._configuration(name),
            dataset_json=member.dataset_json,
            label_manager=member.label_manager,
            preprocessed_dataset_folder_base=str(member.base_folder),
            preprocessed_dataset_folder=str(member.data_folder),
            dataset_class=member.dataset_class,
            folder_with_segs_from_previous_stage=previous,
            batch_size=self.batch_size,
            loss=self.losses[name],
            **self._tasks_of(name),
            oversample_foreground_percent=self.settings.training.oversample_foreground_percent,
        ):
            self._set_batch_size_and_oversample()
            yield member

    # ---- data -----------------------------------------------------------------------------------------------------

    def do_split(self) -> tuple[list[str], list[str]]:
        """The speaking member's cases of the joint fold; all as MEMBER/CASE when none speaks."""
        if self.member is not None:
            training, validation = self.splits[self.member]
            return list(training), list(validation)
        sides: tuple[list[str], list[str]] = ([], [])
        for name, split in self.splits.items():
            for side, cases in zip(sides, split, strict=True):
                side += [f"{name}/{case}" for case in cases]
        return sides

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """Stock transforms; labels go to the shared head, the sample is padded to the teacher's strides."""
        return self._insert_transforms(nnUNetTrainer.get_training_transforms(*args, **kwargs))

    def get_validation_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """Stock transforms with the same two additions."""
        return self._insert_transforms(nnUNetTrainer.get_validation_transforms(*args, **kwargs))

    def _insert_transforms(self, composed: ComposeTransforms) -> ComposeTransforms:
        """Add ours right before nnU-Net turns -1 into background, where the segmentation is still a label map."""
        position = next(i for i, t in enumerate(composed.transforms) if isinstance(t, RemoveLabelTansform))
        own: list[Any] = [PadToMultipleTransform(self.joint_network.multiple)]
        label_map = self.joint.head_map(str(self.member))
        if label_map is not None:
            own.append(MapLabelsTransform(label_map.lookup_table()))
        composed.transforms[position:position] = own
        return composed

    def get_dataloaders(self) -> tuple[Any, Any]:
        """One stock loader per member behind one joint loader, inside stock nnU-Net's augmenters."""
        training, validation = {}, {}
        num_processes = get_allowed_n_proc_DA()
        with environment({"nnUNet_n_proc_DA": "0"}):  # stock nnU-Net then returns the bare loaders
            for name in self.members:
                with self.speaking_for(name):
                    single_training, single_validation = super().get_dataloaders()
                training[name], validation[name] = single_training.data_loader, single_validation.data_loader
        joint_training = JointLoader(training, self.probabilities)
        joint_validation = JointLoader(validation, None)
        return augmenters(joint_training, joint_validation, num_processes, pin_memory=self.device.type == "cuda")

    # ---- training -------------------------------------------------------------------------------------------------

    def print_plans(self) -> None:
        """Stock log of the plans without our block, which holds the members' plans."""
        plans = {key: value for key, value in self.plans_manager.plans.items() if key != BLOCK}
        with replaced(self, plans_manager=PlansManager(plans)):
            super().print_plans()

    def on_train_start(self) -> None:
        """Start as stock nnU-Net does and say how often each member is drawn."""
        super().on_train_start()
        total = self.num_epochs * self.num_iterations_per_epoch
        for name, probability in self.probabilities.items():
            if self.local_rank == 0:
                with self.speaking_for(name) as member:
                    self.dataset_class.unpack_dataset(str(member.data_folder), overwrite_existing=False, verify=True)
            training, validation = self.splits[name]
            self.print_to_log_file(
                f"{name}: {len(training)} training and {len(validation)} validation cases, drawn with p = "
                f"{probability:.3f}, about {probability * total:.0f} of {total} steps",
                add_timestamp=False,
            )

    def _speak(self, batch: dict[str, Any]) -> str:
        name = batch["member"]
        self.joint_network.select(name)
        self.label_manager = self.head_label_managers[name]
        self.loss = self.losses[name]
        self.tasks = self.member_tasks[name]
        return name

    def train_step(self, batch: dict) -> dict:
        """Stock training step on the batch's member."""
        name = self._speak(batch)
        if isinstance(self.loss, AlignedLoss):
            self.loss.progress = self.current_epoch / self.num_epochs
        self.steps_of_epoch[name] += 1
        return super().train_step(batch)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Stock logging, and count the steps of every process."""
        super().on_train_epoch_end(train_outputs)
        for drawn in self.gathered(self.steps_of_epoch):
            self.steps.update(drawn)
        self.steps_of_epoch.clear()

    def on_validation_epoch_start(self) -> None:
        """Start collecting the scores of every member's tasks."""
        super().on_validation_epoch_start()
        self.member_scores = {name: TaskScores(tasks) for name, tasks in self.member_tasks.items() if tasks is not None}

    def validation_step(self, batch: dict) -> dict:
        """Stock validation step on the batch's member, with its name."""
        name = self._speak(batch)
        if name in self.member_scores:
            self.task_scores = self.member_scores[name]
        return {"member": name, **super().validation_step(batch)}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Pseudo scores per member; nnU-Net's mean_fg_dice, which chooses checkpoint_best, is the mean over members."""
        parts = self.gathered((val_outputs, self.member_scores))
        outputs = [output for own, _ in parts for output in own]
        dice_per_class: list[float] = []
        self.scores: dict[str, dict[str, float]] = {}
        for name, tasks in self.member_tasks.items():
            own = [output for output in outputs if output["member"] == name]
            if tasks is None or tasks.segmentation:
                label_manager = self.head_label_managers[name]
                num_classes = label_manager.num_segmentation_heads - (0 if label_manager.has_regions else 1)
                dice_per_class += pseudo_dice(own) or [float("nan")] * num_classes
            self.scores[name] = TaskScores.of_epoch(own, [scores[name] for _, scores in parts if name in scores])
        for name, own_scores in self.scores.items():
            self.latest_scores.update(name, own_scores)
        self.log_joint_score()
        self.logger.log("dice_per_class_or_region", dice_per_class or [float("nan")], self.current_epoch)
        self.logger.log("val_losses", np.mean([output["loss"] for output in outputs]), self.current_epoch)
        for name, scores in self.member_scores.items():
            for score in scores.names:
                self.logger.log(_curve(name, score), self.scores[name][score], self.current_epoch)

    def on_epoch_end(self) -> None:
        """Stock epoch end, with pseudo scores and steps per member in the log."""
        steps = {name: f"({self.steps[name]} steps)" for name in self.members}
        dice = [f"{name} {own['Dice']:.4f} {steps[name]}" for name, own in self.scores.items() if "Dice" in own]
        self.print_to_log_file("Pseudo dice per member:", "; ".join(dice))
        for name, collected in self.member_scores.items():
            values = ", ".join(f"{score} {self.scores[name][score]:.4f}" for score in collected.names)
            self.print_to_log_file(f"Pseudo scores of {name}: {values} {steps[name]}")
        super().on_epoch_end()

    def _curves(self) -> list[str]:
        return [
            _curve(name, score)
            for name, tasks in self.member_tasks.items()
            if tasks is not None
            for score in TaskScores(tasks).names
        ]

    def checkpoint_extra(self) -> dict[str, Any]:
        """Also the cases that the teacher was trained on, and the steps per member."""
        cases = {name: list(training) for name, (training, _) in self.splits.items()}
        return {**super().checkpoint_extra(), "training_cases": cases, "steps": dict(self.steps)}

    def load_checkpoint_extra(self, extra: dict[str, Any]) -> None:
        """Also the steps per member.

        Raises:
            JointDatasetError: The training was started with other members or training cases; a teacher that has seen
                both could not say which validation cases it knows.
        """
        super().load_checkpoint_extra(extra)
        splits = {name: self.joint.split(member, self.fold) for name, member in self.members.items()}
        recorded = {name: set(cases) for name, cases in extra.get("training_cases", {}).items()}
        changed = {name for name in {*recorded, *splits} if recorded.get(name) != set(splits.get(name, ([],))[0])}
        if changed:
            raise JointDatasetError(
                f"The checkpoint in {self.output_folder} was trained on other cases of {', '.join(sorted(changed))} "
                f"than {self.joint.name} has now in fold {self.fold}. Train from the start (without --c or --val), or "
                f"under another -plans_name."
            )
        self.steps = Counter(extra.get("steps", {}))

    # ---- final validation -----------------------------------------------------------------------------------------

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock validation per member into ``MEMBER/validation``; all in the joint label map into ``validation``."""
        folder = Path(self.output_folder)
        for name in self.members:
            self.print_to_log_file(f"Validating {name}")
            self.joint_network.select(name)
            with self.speaking_for(name), replaced(self, **self._member_output(name)):
                super().perform_actual_validation(save_probabilities)
        self.joint_network.select(None)
        if self.local_rank == 0:
            summaries = {name: folder / name / "validation" / "summary.json" for name in self.members}
            for name, member in self.members.items():
                if self.joint.members[name].head is not None:
                    cases = self.splits[name][1]
                    write_joint_segmentations(self.joint, member, cases, self.plans_manager, self.dataset_json, folder)
            (folder / "validation").mkdir(exist_ok=True)  # not there yet where no member has segmentations
            write_json(folder / "validation" / "summary.json", _join_summaries(summaries))

    def _member_output(self, name: str) -> dict[str, Any]:
        """Attributes that send stock validation into the member's folders and show a shared head in its labels."""
        values: dict[str, Any] = {
            "output_folder": str(Path(self.output_folder) / name),
            "output_folder_base": str(Path(self.output_folder_base) / name),
        }
        label_map = self.joint.head_map(name)
        if label_map is not None:
            values["network"] = MemberView(self.network, self.joint_network.decoder, label_map)
            values["label_manager"] = evaluation_labels(self.members[name].label_manager, label_map)
        return values


def _join_summaries(files: dict[str, Path]) -> dict[str, Any]:
    """One summary in nnU-Net's format: classes as MEMBER/CLASS, foreground mean = mean over the members."""
    joined: dict[str, Any] = {"foreground_mean": {}, "mean": {}, "members": {}, "metric_per_case": []}
    tasks = {}
    for name, file in files.items():
        summary = json.loads(file.read_text())
        if BLOCK in summary:
            tasks[name] = summary[BLOCK]
        if "foreground_mean" not in summary:
            continue  # a member without segmentation
        joined["members"][name] = summary["foreground_mean"]
        joined["mean"].update({f"{name}/{label}": metrics for label, metrics in summary["mean"].items()})
        joined["metric_per_case"] += [{"member": name, **case} for case in summary["metric_per_case"]]
    for metric in next(iter(joined["members"].values()), {}):
        joined["foreground_mean"][metric] = float(np.nanmean([own[metric] for own in joined["members"].values()]))
    return {**joined, BLOCK: {"members": tasks}} if tasks else joined


def _curve(member: str, score: str) -> str:
    """Name of a member's curve in progress.png."""
    return f"{member} {score}"


def _disable_gathering(loss: nn.Module) -> None:
    for module in loss.modules():
        if hasattr(module, "ddp"):
            module.ddp = False  # type: ignore[assignment]
