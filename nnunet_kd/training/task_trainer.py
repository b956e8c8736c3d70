"""Training of all tasks that the plans have heads for: segmentation, classification, detection.

Where the plans have no heads this is stock nnU-Net. Host behaviour relied on (nnunetv2 2.8): ``get_dataloaders``
returns loaders inside SingleThreadedAugmenter when nnUNet_n_proc_DA is 0; ``validation_step`` calls ``self.network``
and ``self.loss`` once each; ``mean_fg_dice`` decides about ``checkpoint_best``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import autocast, distributed, nn

from nnunet_kd.data.augmenters import augmenters
from nnunet_kd.data.task_data import TaskData
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.environment import environment, replaced
from nnunet_kd.errors import SettingsError
from nnunet_kd.networks.multitask import Heads, TaskOutputs, planned_heads
from nnunet_kd.tasks.classification import ClassificationLoss, class_weights
from nnunet_kd.tasks.detection import DetectionTask
from nnunet_kd.tasks.detection_plan import DetectionPlan
from nnunet_kd.training.base import KDTrainer
from nnunet_kd.training.progress import append_curves
from nnunet_kd.training.task_loss import TaskLoss
from nnunet_kd.training.task_scores import LatestScores, TaskScores, pseudo_dice
from nnunet_kd.training.task_validation import validate_tasks


class TaskTrainer(KDTrainer):
    """Stock nnU-Net plus the heads of the plans; all of a dataset's tasks share one network and one step."""

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Find out which tasks are trained, then initialise as stock nnU-Net does."""
        self.tasks: Tasks | None = None
        self.latest_scores = LatestScores()
        self.detection_plan: DetectionPlan | None = None
        heads = planned_heads(self.configuration_manager.configuration["architecture"])
        declared = Tasks.from_dataset_json(self.dataset_json)
        need_heads(self.plans_manager.plans, heads, declared)
        if heads is None and not declared.is_segmentation_only:
            self.print_to_log_file(
                f"{self.plans_manager.plans_name} has no heads in {self.configuration_name} for the classes and boxes "
                f"that dataset.json declares: segmentation alone is trained. For all tasks, train on plans of "
                f"nnUNetKD_plan_and_preprocess (-p nnUNetKDPlans), boxes of volumes in 3d.",
                add_timestamp=False,
            )
        if heads is not None:
            self.tasks = declared.with_heads(*heads)
            if heads[1] is not None:
                self.detection_plan = DetectionPlan.from_dict(heads[1])
        super().initialize()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Stock optimizer of a network that gives all tasks while it trains."""
        result = super().configure_optimizers()
        if self.tasks is not None:
            network: Any = self.unwrapped_network()
            network.train_tasks(self.tasks.segmentation)
        return result

    def _build_loss(self) -> nn.Module:
        """Stock loss; with heads, the sum over the tasks."""
        loss: nn.Module = super()._build_loss()
        if self.tasks is None:
            return loss
        classification = {
            target.name: ClassificationLoss(
                multilabel=target.multilabel, label_smoothing=self.settings.tasks.label_smoothing
            )
            for target in self.tasks.classification
        }
        detection = None if self.detection_plan is None else DetectionTask(self.detection_plan)
        segmentation = loss if self.tasks.segmentation else None
        return TaskLoss(segmentation, classification, detection, self.settings.tasks).to(self.device)

    @property
    def task_loss(self) -> TaskLoss:
        """The supervised loss of the tasks."""
        loss: Any = self.loss
        return loss

    # ---- checkpoint -------------------------------------------------------------------------------------------------

    def checkpoint_extra(self) -> dict[str, Any]:
        """Also what the outputs of the heads mean, and the last defined scores."""
        meaning = self._meaning()
        own = {} if meaning is None else {"tasks": meaning}
        return {**super().checkpoint_extra(), **own, "latest_scores": self.latest_scores.values}

    def load_checkpoint_extra(self, extra: dict[str, Any]) -> None:
        """Refuse to go on where the outputs of the heads meant something else.

        Raises:
            SettingsError: Classes were renamed or reordered in dataset.json since.
        """
        super().load_checkpoint_extra(extra)
        self.latest_scores = LatestScores(extra.get("latest_scores"))
        now = self._meaning() if "tasks" in extra else None
        if extra.get("tasks") != now:
            raise SettingsError(
                f"The checkpoint in {self.output_folder} was trained on the tasks {extra['tasks']}, but dataset.json "
                f"declares {now} now. Put back the names and the order of the classes, or train from the start under "
                f"another plans name (nnUNetKD_plan_student -plans_name)."
            )

    def _meaning(self) -> dict[str, Any] | None:
        heads = planned_heads(self.configuration_manager.configuration["architecture"])
        return None if heads is None else Tasks.from_dataset_json(self.dataset_json).with_heads(*heads).meaning

    # ---- data -------------------------------------------------------------------------------------------------------

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Stock loaders; with heads, they also carry class labels and boxes."""
        if self.tasks is None:
            return super().get_dataloaders()
        data = self._task_data()
        processes = get_allowed_n_proc_DA()
        with environment({"nnUNet_n_proc_DA": "0"}):  # stock nnU-Net then returns the bare loaders
            stock = [augmenter.data_loader for augmenter in super().get_dataloaders()]
        training, validation = (
            data.loader(
                loader,
                self.dataset_json["labels"],
                self.plans_manager.transpose_forward,
                self.settings.tasks,
                training=loader is stock[0],
            )
            for loader in stock
        )
        for note in self._fold_notes(data):
            self.print_to_log_file(f"WARNING: {self.plans_manager.dataset_name}, {note}")
        if self.settings.tasks.balance == "loss":
            self._weigh_classes(data, list(training.indices))
        return augmenters(training, validation, processes, pin_memory=self.device.type == "cuda")

    def _task_data(self) -> TaskData:
        assert self.tasks is not None
        return TaskData.read(self.plans_manager.dataset_name, self.tasks, len(self.configuration_manager.patch_size))

    def _fold_notes(self, data: TaskData) -> list[str]:
        """What the fold can neither teach nor score although the dataset can."""
        training, validation = self.do_split()
        presences = data.presences({*training, *validation})
        split = {"train": training, "val": validation}
        return [f"fold {self.fold}: {what}" for presence in presences for what in presence.lacks(split)]

    def _weigh_classes(self, data: TaskData, cases: list[str]) -> None:
        for target, loss in zip(data.tasks.classification, self.task_loss.classification, strict=True):
            labels = torch.from_numpy(data.labels_of(cases, target.name))
            loss.weights = class_weights(labels, multilabel=target.multilabel).to(self.device)

    # ---- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Start as stock nnU-Net does; the tasks' scores become curves of their own."""
        super().on_train_start()
        for name in self._curves():
            self.logger.local_logger.my_fantastic_logging.setdefault(name, [])

    def train_step(self, batch: dict) -> dict:
        """Stock training step on all tasks."""
        if self.tasks is not None:
            self.task_loss.set_batch(batch, self.device)
        return super().train_step(batch)

    # ---- validation -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start collecting what the tasks' scores need."""
        super().on_validation_epoch_start()
        if self.tasks is not None:
            self.task_scores = TaskScores(self.tasks)

    def validation_step(self, batch: dict) -> dict:
        """One pass for all tasks; the segmentation's part is stock nnU-Net's."""
        if self.tasks is None:
            return super().validation_step(batch)
        loss = self.task_loss
        loss.set_batch(batch, self.device)
        self.move_to_device(batch)
        with autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
            outputs: TaskOutputs = self.network(batch["data"], tasks=True)
            total = float(loss(outputs, batch["target"]))
        detections = None
        if outputs.detection is not None and loss.detection is not None:
            detections = loss.detection.decode(outputs.detection, batch["data"].shape[2:])
        self.task_scores.add(outputs.classification, detections, batch)
        result: dict[str, Any] = {"loss": np.array(total)}
        if self.tasks.segmentation:
            segmentation = outputs.segmentation if self.enable_deep_supervision else outputs.segmentation[0]
            with replaced(self, network=lambda data: segmentation, loss=lambda output, target: output[0].sum()):
                result = {**super().validation_step(batch), **result}
        return result

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Stock pseudo Dice; with heads, the mean over the tasks' latest scores takes the place of its mean."""
        if self.tasks is None:
            super().on_validation_epoch_end(val_outputs)
            return
        parts = self.gathered((val_outputs, self.task_scores))
        outputs = [output for own, _ in parts for output in own]
        scores = TaskScores.of_epoch(outputs, [own for _, own in parts])
        self.latest_scores.update(self.plans_manager.dataset_name, scores)
        self.log_joint_score()
        self.logger.log("dice_per_class_or_region", pseudo_dice(outputs) or [float("nan")], self.current_epoch)
        self.logger.log("val_losses", float(np.mean([output["loss"] for output in outputs])), self.current_epoch)
        for name in self._curves():
            self.logger.log(name, scores[name], self.current_epoch)
        self.print_to_log_file("Pseudo scores:", ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))

    def log_joint_score(self) -> None:
        """Log what chooses ``checkpoint_best``; as long as no score was defined, the newest epoch is the best."""
        score = self.latest_scores.joint()
        averages = self.logger.local_logger.my_fantastic_logging["ema_fg_dice"]
        starts = not averages or np.isnan(averages[-1])
        if starts:
            self._best_ema = None
            if averages:
                averages[-1] = float(score)  # nnU-Net's average begins with it
        self.logger.log("mean_fg_dice", float(score), self.current_epoch)
        if starts and len(averages) > 1:
            averages[-2] = float("nan")
        self.print_to_log_file(f"Joint score {score:.4f}; checkpoint_best follows its EMA, which is called pseudo Dice")

    def gathered(self, own: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        if not self.is_ddp:
            return [own]
        everything: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everything, own)
        return everything

    def on_epoch_end(self) -> None:
        """Stock epoch end; the tasks' scores are added to progress.png."""
        super().on_epoch_end()
        curves = {name: self.logger.local_logger.my_fantastic_logging[name] for name in self._curves()}
        if self.local_rank == 0 and curves:
            append_curves(Path(self.output_folder) / "progress.png", "pseudo scores", curves)

    # ---- final validation -------------------------------------------------------------------------------------------

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock validation of the segmentation, then that of the other tasks."""
        if self.tasks is None or self.tasks.segmentation:
            super().perform_actual_validation(save_probabilities)
        if self.tasks is None:
            return
        declared = {"classification": self.tasks.classification, "detection": self.tasks.detection}
        wanted = [name for name, task in declared.items() if task]
        _, cases = self.do_split()
        self.set_deep_supervision_enabled(False)
        self.network.eval()
        notes = self._fold_notes(self._task_data())
        metrics = validate_tasks(self, wanted, cases, Path(self.output_folder) / "validation", notes)
        for note in metrics.get("notes", []):
            self.print_to_log_file(note)
        self.print_to_log_file(f"Validation of {' and '.join(wanted)} complete, see summary.json")
        self.set_deep_supervision_enabled(True)

    def _curves(self) -> list[str]:
        return [] if self.tasks is None else TaskScores(self.tasks).names


def need_plain_plans(plans: dict[str, Any], configuration: str, method: str, no_cascade: str) -> None:
    """Raise NotImplementedError where a method of segmentation alone is given a cascade or heads for other tasks.

    Args:
        plans: Of the training.
        configuration: Its configuration.
        method: Its name, for the message.
        no_cascade: Why it cannot be trained in the second stage of a cascade.
    """
    manager = PlansManager(plans).get_configuration(configuration)
    if manager.previous_stage_name is not None:
        raise NotImplementedError(
            f"{method} is not supported in the second stage of a cascade ({configuration}): {no_cascade}. Train in "
            f"3d_lowres or 3d_fullres."
        )
    if planned_heads(manager.configuration["architecture"]) is not None:
        raise NotImplementedError(
            f"{method} trains segmentation only, but {plans['plans_name']} has heads for classes or boxes. Train on "
            f"the stock plans (-p nnUNetPlans)."
        )


def need_heads(plans: dict[str, Any], heads: Heads | None, declared: Tasks) -> None:
    """Raise SettingsError where plans have nothing to learn from a dataset without segmentations."""
    if heads is None and not declared.segmentation:
        raise SettingsError(
            f"{plans['dataset_name']} has no segmentations, and {plans['plans_name']} has no heads for its tasks. "
            f"Train with -p nnUNetKDPlans, which nnUNetKD_plan_and_preprocess writes."
        )
