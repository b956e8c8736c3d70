"""The student: stock nnU-Net on its own plans and data, plus a list of terms.

Host behaviour relied on (nnunetv2 2.8): ``train_step`` calls ``self.network`` and ``self.loss`` once each, and
``validation_step`` too; a tapped network returns features only while it trains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import SettingsError, TeacherError
from nnunet_kd.files import write_json
from nnunet_kd.networks.adapters import Projector
from nnunet_kd.networks.multitask import planned_heads
from nnunet_kd.networks.taps import Stage, find_stage, tap
from nnunet_kd.settings import (
    BLOCK,
    DESCRIPTION_KEYS,
    Settings,
    Teacher,
    Term,
    check_types,
    merge,
    read_user_settings,
    resolve_settings,
)
from nnunet_kd.spaces.channels import channel_names
from nnunet_kd.tasks.detection_plan import DetectionPlan
from nnunet_kd.teachers.base import BatchTeacher, HiddenCases, Student
from nnunet_kd.teachers.discover import class_average_model, discover_joint_teacher, is_wanted
from nnunet_kd.teachers.forward import pooled_channels, speaking_heads
from nnunet_kd.teachers.kinds import TEACHERS
from nnunet_kd.training.base import recorded_settings
from nnunet_kd.training.distillation import POOLED, DistillationLoss, build_terms, projector_name
from nnunet_kd.training.progress import append_curves
from nnunet_kd.training.task_loss import TaskLoss
from nnunet_kd.training.task_trainer import TaskTrainer, need_heads
from nnunet_kd.training.terms import asked_task, check_samples, default_terms, fit_terms, is_pooled

SETTINGS_FILE = "nnunet_kd_settings.json"


class nnUNetTrainerKDStudent(TaskTrainer):
    """Student of multi-dataset cross-domain distillation (arXiv 2605.01563); terms and weights are our choice.

    The terms depend on what the dataset has, see :func:`default_terms`. A trainer whose ``preset`` names "terms" has
    these instead: another method.
    """

    preset: ClassVar[dict[str, Any]] = {"guard": {"margin": 0.1, "exponent": 4.0}}
    step_in_epoch = 0
    samples: ClassVar[tuple[str, ...]] = ()  # the parts of a batch, in their order, that terms can choose between

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the signature must be stock nnU-Net's)
    ) -> None:
        # The default terms depend on what the network learns.
        architecture = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
        heads, declared = planned_heads(architecture), Tasks.from_dataset_json(dataset_json)
        need_heads(plans, heads, declared)
        classification, detection = heads or (None, None)
        self.planned_tasks = declared.with_heads(classification, detection)
        self.planned_boxes = None if detection is None else DetectionPlan.from_dict(detection)
        super().__init__(plans, configuration, fold, dataset_json, device)

    # ---- settings ----

    def resolve_settings(self, plans: dict, configuration: str, fold: int | str) -> Settings:
        """Add the joint teacher that fits, if neither the plans nor the user name a teacher, and the default terms."""
        block = {key: value for key, value in plans.get(BLOCK, {}).items() if key not in DESCRIPTION_KEYS}
        given = merge(block, read_user_settings())
        check_types(given)
        method = self.method_preset(given)
        teachers = merge(method.get("teachers", {}), given.get("teachers", {}))
        self.has_default_terms = "terms" not in given and "terms" not in method
        preset = {"terms": default_terms(self.planned_tasks), **method}
        if "terms" not in given and "teachers" not in method and len(teachers) == 1:
            only = next(iter(teachers))
            preset["terms"] = [{**term, "teacher": only} for term in preset["terms"]]
        terms = given.get("terms", preset["terms"])
        found: dict[str, Any] = {}
        needs_joint = any(term.get("teacher", "joint") == "joint" for term in terms)
        if needs_joint and not teachers.get("joint", {}).get("model"):
            found = self._find_teacher(plans, configuration, fold, given)
        for name, teacher in teachers.items():
            if teacher.get("kind") == "class_average" and not teacher.get("model"):
                checkpoint = teacher.get("checkpoint", Teacher().checkpoint)
                recorded = self._recorded(plans, configuration, fold).get("teachers", {}).get(name, {})
                model = recorded.get("model") or class_average_model(plans, configuration, fold, checkpoint)
                found = merge(found, {"teachers": {name: {"model": model}}})
        settings = resolve_settings(preset, found, given)
        check_samples(settings.terms, self.samples)
        if not self.samples and any(own.foundation.cache for own in settings.teachers.values()):
            raise SettingsError("'foundation.cache' is for nnUNetTrainerDINOMix. Remove it from the settings.")
        fitted = fit_terms(settings.terms, plans["dataset_name"], self.planned_tasks, self.planned_boxes)
        return replace(settings, terms=fitted)

    def method_preset(self, given: dict[str, Any]) -> dict[str, Any]:
        """What this trainer sets before its plans and the user do, who may choose by ``given`` between recipes."""
        del given
        return self.preset

    def _recorded(self, plans: dict, configuration: str, fold: int | str) -> dict[str, Any]:
        """The settings of this very training if it is continued; else nothing."""
        name = f"{self.__class__.__name__}__{plans['plans_name']}__{configuration}"
        folder = Path(str(nnUNet_results)) / plans["dataset_name"] / name / f"fold_{fold}"
        started = any((folder / f"checkpoint_{kind}.pth").is_file() for kind in ("final", "latest", "best"))
        resumed = plans.get("continue_training") or (folder / "checkpoint_final.pth").is_file()
        if not started or not resumed or not (folder / SETTINGS_FILE).is_file():
            return {}
        recorded: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text())
        return recorded

    def _find_teacher(self, plans: dict, configuration: str, fold: int | str, given: dict[str, Any]) -> dict[str, Any]:
        """The recorded teacher of this very training if there is one, else the joint teacher that fits."""
        recorded = self._recorded(plans, configuration, fold)
        if "joint" in recorded.get("teachers", {}) and is_wanted(str(recorded["joint"]), given.get("joint")):
            return {"joint": recorded["joint"], "teachers": {"joint": recorded["teachers"]["joint"]}}
        checkpoint = given.get("teachers", {}).get("joint", {}).get("checkpoint", Teacher().checkpoint)
        return discover_joint_teacher(plans["dataset_name"], configuration, fold, given.get("joint"), checkpoint)

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Find the teachers (plans only; weights are read when training starts), then initialise."""
        if not hasattr(self, "projector_shapes"):  # else they come from the checkpoint that is being resumed
            self.teachers = self._make_teachers()
            self.projector_shapes: dict[str, tuple[int, int, int]] | None = None
        self.levels = _levels([term for term in self.settings.terms if term.weight != 0])
        super().initialize()

    def _make_teachers(self) -> dict[str, BatchTeacher]:
        """The teachers of all terms; default terms on tasks that they cannot teach are left out."""
        student = Student(
            self.plans_manager.dataset_name,
            self.plans_manager,
            self.configuration_name,
            self.configuration_manager,
            self.dataset_json,
            channel_names(self.dataset_json),
            self.fold,
            self.planned_tasks,
            self.planned_boxes,
        )
        used = {term.teacher for term in self.settings.terms if term.weight != 0}
        teachers = {
            name: TEACHERS[settings.kind](name, settings, student)
            for name, settings in self.settings.teachers.items()
            if name in used
        }
        for index, term in enumerate(self.settings.terms):
            if term.teacher in teachers:
                teachers[term.teacher].check_term(term, f"terms[{index}]")
        refusals = {
            index: teachers[term.teacher].refusals.get(asked_task(term) or "")
            for index, term in enumerate(self.settings.terms)
            if term.teacher in teachers
        }
        for index, refusal in refusals.items():
            if refusal is not None and hasattr(self, "restored_competence"):
                raise TeacherError(f"The training that is continued had the term {index} of its settings. {refusal}")
            if refusal is not None and not self.has_default_terms:
                raise TeacherError(f"'terms[{index}]': {refusal} Or remove the term.")
        for refusal in dict.fromkeys(refusal for refusal in refusals.values() if refusal is not None):
            self.print_to_log_file(f"{refusal} The default terms on it are left out.", add_timestamp=False)
        kept = [term for index, term in enumerate(self.settings.terms) if refusals.get(index) is None]
        self.settings = replace(self.settings, terms=kept)
        return teachers

    def _terms_of(self, teacher: str) -> list[Term]:
        return [term for term in self.settings.terms if term.teacher == teacher]

    def build_auxiliary(self) -> nn.ModuleDict:
        """A projector per teacher and level; also taps the network."""
        network = self.unwrapped_network()
        stages = {level: find_stage(network, level) for level in self.levels}
        if stages:
            tap(network, list(stages.values()))
        if self.projector_shapes is None:
            self.projector_shapes = {}
            for name in self.teachers:
                self.projector_shapes.update(self._projector_shapes(name, stages))
        return nn.ModuleDict({name: Projector(*shape) for name, shape in self.projector_shapes.items()})

    def _projector_shapes(self, name: str, stages: dict[str, Stage]) -> dict[str, tuple[int, int, int]]:
        """Dimension, width of the student and of the teacher, for each projector of a teacher."""
        terms = self._terms_of(name)
        levels, needs_pooled = _levels(terms), any(is_pooled(term) for term in terms)
        if not levels and not needs_pooled:
            return {}
        teacher = self.teachers[name]
        widths = teacher.feature_channels(levels) if levels else {}
        shapes = {
            projector_name(name, level): (len(stages[level].stride), stages[level].channels, width)
            for level, width in widths.items()
            if teacher.always_projects or stages[level].channels != width
        }
        if needs_pooled:
            own = pooled_channels(speaking_heads(self.unwrapped_network()))
            shapes[projector_name(name, POOLED)] = (2, own, teacher.pooled_channels())
        return shapes

    def on_train_start(self) -> None:
        """Read the teachers' weights, build the terms, then start as stock nnU-Net does."""
        if not self.was_initialized:
            self.initialize()
        if not hasattr(self, "teachers"):
            self.teachers = self._make_teachers()
        training_cases, validation_cases = self.do_split()
        if self.fold == "all":
            validation_cases = []  # there are none that training leaves out
        known = {*training_cases, *validation_cases}
        hidden = HiddenCases(validation_cases, [case for case in self.fold_split()[0] if case not in known])
        self.loss: Any = self._distillation_loss(self.loss)
        asked = self.loss.asked()
        self.leaked_cases: dict[str, list[str]] = {}
        self.seen_cases = {self.plans_manager.dataset_name: set(training_cases)}
        for name, teacher in self.teachers.items():
            levels = _levels(self._terms_of(name))
            teacher.load(self.device, levels, asked[name], self._do_i_compile(), hidden)
            for dataset, cases in teacher.training_cases.items():
                self.seen_cases.setdefault(dataset, set()).update(cases)
            self.leaked_cases[name] = teacher.leaked_cases
            teacher.follow(self.unwrapped_network())
            if name in getattr(self, "restored_teachers", {}):
                teacher.load_state(self.restored_teachers[name])
            self._say_what_is_taught(name, teacher)
        for name, restored in getattr(self, "restored_competence", {}).items():
            for task, counts in restored.items():
                if task in self.loss.competence.get(name, {}):
                    self.loss.competence[name][task].counts = None if counts is None else counts.to(self.device)
        for term in self.loss.terms:
            for key in (term.name, f"{term.name} weighted"):
                self.logger.local_logger.my_fantastic_logging.setdefault(key, [])
        super().on_train_start()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock validation; a leak that was accepted is written into summary.json."""
        super().perform_actual_validation(save_probabilities)
        leaked = {name: cases for name, cases in self.leaked_cases.items() if cases}
        if leaked:
            self.note_in_summary("accepted_leakage", leaked)

    def note_in_summary(self, key: str, value: Any) -> None:
        """Add to the block of nnunet_kd in the summary.json of the final validation."""
        if self.local_rank == 0:
            file = Path(self.output_folder) / "validation" / "summary.json"
            content = json.loads(file.read_text())
            write_json(file, {**content, BLOCK: {**content.get(BLOCK, {}), key: value}})

    def _say_what_is_taught(self, name: str, teacher: BatchTeacher) -> None:
        taught = [] if teacher.teacher_map is None else [f"classes {', '.join(teacher.teacher_map.target.names)}"]
        taught += [task for task in teacher.taught.tasks if task != "segmentation"]
        self.print_to_log_file(
            f"Teacher '{name}': {teacher.origin}, {', '.join(taught) or 'features'}", add_timestamp=False
        )
        if self.settings.guard.watches and not teacher.taught.tasks:
            self.print_to_log_file(
                f"The terms of teacher '{name}' are not guarded: it has no task in common with "
                f"{self.plans_manager.dataset_name} by which both could be compared.",
                add_timestamp=False,
            )
        if teacher.leaked_cases:
            self.print_to_log_file(
                f"WARNING: LEAKAGE ACCEPTED. Teacher '{name}' was trained on {len(teacher.leaked_cases)} cases of this "
                f"fold whose labels its student must not know; the results of this student are contaminated.",
                add_timestamp=False,
            )

    def _distillation_loss(self, supervised: nn.Module) -> DistillationLoss:
        taught = {name: teacher.taught for name, teacher in self.teachers.items()}
        used = [term for term in self.settings.terms if term.teacher in self.teachers]
        settings = Settings(teachers=self.settings.teachers, terms=used)
        segmentation = supervised.segmentation if isinstance(supervised, TaskLoss) else supervised
        weights = segmentation.weight_factors if isinstance(segmentation, DeepSupervisionWrapper) else (1.0,)
        regions = {name: own.label_map.target.regions for name, own in taught.items() if own.label_map is not None}
        terms = build_terms(settings, regions, self.planned_tasks.classification)
        return DistillationLoss(
            supervised, weights, terms, taught, self.wrapped_auxiliary, self.levels, self.settings.guard
        ).to(self.device)

    @property
    def task_loss(self) -> TaskLoss:
        """The supervised part of the loss."""
        loss: Any = self.loss.supervised if isinstance(self.loss, DistillationLoss) else self.loss
        return loss

    # ---- training ----

    def on_train_epoch_start(self) -> None:
        """Count the steps of the epoch, which the schedules of the terms follow."""
        super().on_train_epoch_start()
        self.step_in_epoch = 0
        self.epoch_terms: list[dict[str, Any]] = []

    @property
    def progress(self) -> float:
        """Fraction of the training that is done, in [0, 1]."""
        return (self.current_epoch + self.step_in_epoch / self.num_iterations_per_epoch) / self.num_epochs

    def train_step(self, batch: dict) -> dict:
        """Ask the teachers that have a weight now, then take stock nnU-Net's training step."""
        loss: Any = self.loss
        loss.progress = self.progress
        self.step_in_epoch += 1
        for name, tasks in loss.asked(loss.progress).items():
            self.move_to_device(batch)
            loss.teacher_outputs[name] = self.teachers[name](batch, tasks)
        try:
            result: dict = super().train_step(batch)
            for teacher in self.teachers.values():
                teacher.after_step()
            return result
        finally:
            loss.teacher_outputs.clear()
            if loss.logged:
                self.epoch_terms.append(dict(loss.logged))
                loss.logged.clear()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Stock logging, and every term raw and weighted."""
        super().on_train_epoch_end(train_outputs)
        for term in self.loss.terms:
            seen = [step[term.name] for step in self.epoch_terms if term.name in step]
            of_rank = [float(torch.stack(values).mean()) for values in zip(*seen, strict=True)] if seen else [0.0, 0.0]
            means = np.mean(self.gathered(of_rank), axis=0).tolist()
            for key, value in zip((term.name, f"{term.name} weighted"), means, strict=True):
                self.logger.log(key, value, self.current_epoch)
            self.print_to_log_file(f"{term.name}: {np.round(means[0], 4)}, weighted {np.round(means[1], 4)}")
        for name, competences in self.loss.competence.items():
            for competence in competences.values():
                if competence.counts is not None:
                    own, other = (float(score) for score in competence.scores())
                    self.print_to_log_file(
                        f"{competence.measure} on training batches: student {own:.4f}, teacher '{name}' {other:.4f}"
                    )
        if self.current_epoch == 0:
            for teacher in self.teachers.values():
                if teacher.precision_note:
                    self.print_to_log_file(teacher.precision_note)

    def on_epoch_end(self) -> None:
        """Stock epoch end; the terms are added to progress.png."""
        super().on_epoch_end()
        logged = self.logger.local_logger.my_fantastic_logging
        terms = {key: logged[key] for term in self.loss.terms for key in (term.name, f"{term.name} weighted")}
        if self.local_rank == 0 and terms:
            append_curves(Path(self.output_folder) / "progress.png", "distillation terms", terms, dotted=" weighted")

    # ---- checkpoint ----

    def checkpoint_extra(self) -> dict[str, Any]:
        """Also the projectors' shapes, the competence, where the teachers came from, and all that they have seen."""
        extra = super().checkpoint_extra()
        extra["projector_shapes"] = {name: list(shape) for name, shape in (self.projector_shapes or {}).items()}
        if isinstance(self.loss, DistillationLoss):
            extra["training_cases"] = {dataset: sorted(cases) for dataset, cases in self.seen_cases.items()}
            extra["competence"] = {
                name: {task: competence.counts for task, competence in competences.items()}
                for name, competences in self.loss.competence.items()
            }
            states = {name: teacher.state() for name, teacher in self.teachers.items()}
            extra["teacher_states"] = {name: state for name, state in states.items() if state}
            extra["teachers"] = {
                name: {"files": [str(file) for file in teacher.files], "leaked_cases": teacher.leaked_cases}
                for name, teacher in self.teachers.items()
            }
        return extra

    def load_checkpoint_extra(self, extra: dict[str, Any]) -> None:
        """Projectors are rebuilt from the checkpoint, so that validation needs no teacher."""
        if self.has_default_terms:  # some may have been left out
            recorded = recorded_settings(extra).terms
            kept = [term for term in self.settings.terms if term in recorded]
            self.settings = replace(self.settings, terms=kept)
        super().load_checkpoint_extra(extra)
        shapes = extra.get("projector_shapes", {})
        self.projector_shapes = {name: (shape[0], shape[1], shape[2]) for name, shape in shapes.items()}
        self.restored_competence = {  # of segmentation alone in the checkpoints of earlier versions
            name: value if isinstance(value, dict) else {"segmentation": value}
            for name, value in extra.get("competence", {}).items()
        }
        self.restored_teachers = extra.get("teacher_states", {})
        self.leaked_cases = {name: teacher["leaked_cases"] for name, teacher in extra.get("teachers", {}).items()}


def _levels(terms: Sequence[Term]) -> list[str]:
    return sorted({level for term in terms for level in term.levels})
