"""AdaIN-based domain adaptation and self-distillation: a labelled source, an unlabelled target, one network.

Stage 1 learns to translate between the domains and to segment the source; stage 2 also to segment the target in one
step, from its own translation and segmentation. Source: Oh and Ye, ECCV 2022 (arXiv 2104.05892) and its released code.
What differs is said where it differs; data, augmentation and validation are nnU-Net's.

Host behaviour relied on (nnunetv2 2.8): ``perform_actual_validation`` finds images and references by three attributes
and ``do_split``; ``lr_scheduler.step`` takes the epoch; ``validation_step`` calls ``self.network`` once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, distributed, nn

from nnunet_kd.data.augmenters import augmenters
from nnunet_kd.data.domains import find_target, source_cases, target_name
from nnunet_kd.data.member import read_json
from nnunet_kd.data.semi_supervised import SemiSupervisedLoader, UnlabeledImages
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.environment import environment, replaced
from nnunet_kd.errors import AdaptationError, SettingsError
from nnunet_kd.networks.moving_average import MovingAverage
from nnunet_kd.networks.star_generator import SELF, StarGenerator
from nnunet_kd.networks.styles import training_parts
from nnunet_kd.networks.task_codes import planned_network, task_code_architecture
from nnunet_kd.settings import BLOCK, Settings, check_types, merge, read_user_settings, resolve_settings, without_terms
from nnunet_kd.spaces.labels import LabelSpace
from nnunet_kd.training.adaptation_figure import Panel, draw_panels
from nnunet_kd.training.adaptation_losses import AdaptationLosses, frozen, make_pair
from nnunet_kd.training.adaptation_optimizers import AdversarialSteps, StageSchedule, adam
from nnunet_kd.training.other_weights import PredictsWithOthers
from nnunet_kd.training.progress import append_curves
from nnunet_kd.training.task_trainer import need_plain_plans

LOSSES = ("discriminator", "adversarial", "style", "cycle", "diversity", "segmentation", "self", "trust")
FIGURE = "translations.png"
STAGE_1_CHECKPOINT = "checkpoint_stage_1.pth"
GUARD = {"guard": {"margin": 0.1, "exponent": 4.0}}  # as of students
PRESETS: dict[str, dict[str, Any]] = {
    "stargan": {"training": {"loss": "ce"}},  # the paper's
    # ours, with nnU-Net's loss, so that it compares with its control
    "conditional_unet": {"adaptation": {"learning_rate": 1e-3, "self_on": "probabilities"}},
}


class nnUNetTrainerAdaIN(PredictsWithOthers):
    """Both stages in one training. ``network(image)`` is the one-step segmentation, which stock nnU-Net predicts."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the signature must be stock nnU-Net's)
    ) -> None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise NotImplementedError("The AdaIN trainer has four optimizers and runs in one process. Use -num_gpus 1.")
        if not Tasks.from_dataset_json(dataset_json).segmentation:
            raise AdaptationError(
                f"The source {plans['dataset_name']} has no masks, so there is nothing to adapt. Name a dataset with "
                f"segmentations as the source."
            )
        need_plain_plans(plans, configuration, "AdaIN", "the images of the target have no segmentation of the first")
        plans = with_task_code_network(plans, configuration)
        _refuse_other_network(f"{type(self).__name__}__{plans['plans_name']}__{configuration}", plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.network_name = planned_network(self.configuration_manager.configuration["architecture"])
        self.enable_deep_supervision = self.network_name == "conditional_unet"
        # at least one epoch for each stage
        share = self.settings.adaptation.stage_1
        self.stage_2_epoch = max(1, min(self.num_epochs - 1, round(share * self.num_epochs)))
        self.step_in_epoch = 0
        self.images_before: tuple[Tensor, Tensor] | None = None

    def resolve_settings(self, plans: dict, configuration: str, fold: int | str) -> Settings:
        """The network's preset; terms and teachers are for students."""
        del fold
        given = (plans.get(BLOCK, {}), read_user_settings())
        layers = [{key: value for key, value in layer.items() if key not in ("teachers", "terms")} for layer in given]
        network = planned_network(PlansManager(plans).get_configuration(configuration).configuration["architecture"])
        settings = resolve_settings(GUARD, PRESETS[network or "stargan"], *layers)
        target_name(plans["dataset_name"], settings.adaptation)
        if settings.training.num_epochs < 2:
            raise SettingsError("'training.num_epochs' is 1, but adaptation has two stages. Give it at least 2.")
        return settings

    # ---- set-up -----------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """1 or 2, of the present epoch."""
        return 1 if self.current_epoch < self.stage_2_epoch else 2

    def fold_split(self) -> tuple[list[str], list[str]]:
        """Training and validation cases of the source."""
        self.whole_split = super().fold_split()
        member, source = self.own_dataset(), self.settings.adaptation.source
        training, validation = (source_cases(member, source, cases, self.fold) for cases in self.whole_split)
        return training, validation

    def _do_i_compile(self) -> bool:
        """Not compiled: the network runs in four ways, and each would be compiled anew in every stage."""
        return False

    def initialize(self) -> None:
        """Initialise as stock nnU-Net does, then start the moving average."""
        super().initialize()
        self._start_average(nn.ModuleDict({"network": self.network, **dict(self.auxiliary.items())}))
        space = LabelSpace.from_dataset_json(self.dataset_json)
        settings = self.settings
        self.losses = AdaptationLosses(self.network, self.auxiliary, settings.adaptation, settings.guard, space)

    def _start_average(self, followed: Any) -> None:
        """Begin a moving average of the network and of what trains beside it."""
        self.followed = followed
        self.average = MovingAverage(followed, self.settings.adaptation.ema_decay)
        if self.enable_deep_supervision:
            self.average.network["network"].decoder.deep_supervision = False

    def build_auxiliary(self) -> nn.ModuleDict:
        """Discriminator, and for the generator style encoder and mapping network."""
        return training_parts(self.configuration_manager.configuration["architecture"], self.num_input_channels)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """One Adam per network."""
        if not hasattr(self, "auxiliary"):
            with torch.random.fork_rng(devices=[]):  # the network's weights must not depend on what trains beside it
                self.auxiliary = self.build_auxiliary().to(self.device)
        settings = self.settings.adaptation
        self.optimizers = {"network": adam(self.network, settings.learning_rate)}
        for name, part in self.auxiliary.items():
            rate = settings.mapping_learning_rate if name == "mapping" else settings.learning_rate
            self.optimizers[name] = adam(part, rate)
        self.adversarial_steps = AdversarialSteps(self.optimizers, self.grad_scaler)
        schedule = StageSchedule(self.optimizers.values(), [0, self.stage_2_epoch, self.num_epochs])
        return self.optimizers["network"], schedule

    def _build_loss(self) -> nn.Module:
        """Stock loss; the cross entropy of the paper weighs the background less."""
        loss: nn.Module = super()._build_loss()
        weight = self.settings.adaptation.background_weight
        if self.settings.training.loss == "ce" and not self.label_manager.has_regions and weight != 1:
            part: Any = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
            weights = torch.ones(self.label_manager.num_segmentation_heads, device=self.device)
            weights[0] = weight
            part.ce.weight = weights
        return loss

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Stock loaders of the source; that of training also draws images of the target, in equal parts."""
        self.num_target = max(1, self.batch_size // 2)
        self.num_source = max(1, self.batch_size - self.num_target)
        self.do_split()
        member, processes = self.own_dataset(), get_allowed_n_proc_DA()
        self.target = find_target(member, self.settings.adaptation, self.fold, self.whole_split)
        self.print_to_log_file(
            f"Source: {len(self.do_split()[0])} labelled cases of {member.name}; target: {len(self.target.training)} "
            f"cases of {self.target.dataset}, whose labels are not used; {len(self.target.validation)} are held back. "
            f"{self.num_source} + {self.num_target} patches per step. Stage 2 begins with epoch {self.stage_2_epoch}.",
            add_timestamp=False,
        )
        images = UnlabeledImages({self.target.folder: self.target.training})
        with environment({"nnUNet_n_proc_DA": "0"}):  # stock nnU-Net then returns the bare loaders
            labeled, validation = (augmenter.data_loader for augmenter in super().get_dataloaders())
        training = SemiSupervisedLoader(labeled, images, self.num_source, self.num_target, self.label_manager)
        return augmenters(training, validation, processes, pin_memory=self.device.type == "cuda")

    def on_train_start(self) -> None:
        """Start as stock nnU-Net does; the losses become curves."""
        super().on_train_start()
        for name in LOSSES:
            self.logger.local_logger.my_fantastic_logging.setdefault(name, [])

    # ---- training ---------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Enter stage 2 when its time has come."""
        if self.current_epoch == self.stage_2_epoch:
            self._enter_stage_2()
        super().on_train_epoch_start()
        self.step_in_epoch = 0
        self.adversarial_steps.start_counting()

    def _enter_stage_2(self) -> None:
        """Keep the network of stage 1, and go on from its moving average with fresh optimizers, as the source does."""
        line = "=" * 80
        self.print_to_log_file(
            f"\n{line}\nSTAGE 2: the one-step segmentation of the target by self-distillation\n{line}\n"
            f"The network of stage 1 is kept in {STAGE_1_CHECKPOINT} (nnUNetKD_predict --code two_step -chk "
            f"{STAGE_1_CHECKPOINT}).",
            add_timestamp=False,
        )
        self.current_epoch -= 1  # nnU-Net stores the next epoch
        self.save_checkpoint(str(Path(self.output_folder) / STAGE_1_CHECKPOINT))
        self.current_epoch += 1
        self.followed.load_state_dict(self.average.network.state_dict())
        self.network.start_self_code()
        self._start_average(self.followed)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self._best_ema = None  # what was best is another segmentation from now on

    def train_step(self, batch: dict) -> dict:
        """Discriminator, translation, segmentation, and in stage 2 self-distillation: a step of an optimizer each."""
        self.move_to_device(batch)
        source, target = batch["data"][: self.num_source], batch["data"][self.num_source :]
        values = dict.fromkeys(LOSSES, torch.full((), float("nan"), device=self.device))
        if self.settings.adaptation.adversarial > 0:
            values |= self._translate(source, target)
        values["segmentation"] = self._segment(source, batch["target"])
        if self.stage == 2:
            values |= self._distil(source, target, batch["target"])
        self.average.update()
        self.images_before = (source, target)
        self.step_in_epoch += 1
        losses = torch.stack([values[name].detach().float() for name in LOSSES]).cpu().numpy()  # one wait for all
        return {"loss": losses[LOSSES.index("segmentation")], "losses": losses}

    def _mixed_precision(self) -> Any:
        return torch.autocast(self.device.type) if self.device.type == "cuda" else nullcontext()

    def _translate(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Latent codes train all networks, codes of reference images the discriminator and the generator alone."""
        pair, losses, step = make_pair(source, target, self.images_before), self.losses, self.adversarial_steps
        with self._mixed_precision():
            with torch.no_grad():
                codes = losses.latent_codes(pair.other)
            discriminator = losses.discriminator_loss(pair, codes)
        step(discriminator, "discriminator")
        if losses.has_styles:
            with self._mixed_precision():
                with torch.no_grad():
                    codes = losses.reference_codes(pair.references, pair.other)
                by_reference = losses.discriminator_loss(pair, codes)
            step(by_reference, "discriminator")
        in_stage = (self.current_epoch + self.step_in_epoch / self.num_iterations_per_epoch) / self.stage_2_epoch
        diversity = self.settings.adaptation.diversity * max(0.0, 1 - in_stage)
        with self._mixed_precision():
            codes, others = losses.latent_codes(pair.other), losses.latent_codes(pair.other).detach()
            parts = losses.translation_losses(pair, codes, others, diversity)
        step(torch.stack(list(parts.values())).sum(), "network", *(["mapping", "style"] if losses.has_styles else []))
        if losses.has_styles:
            with self._mixed_precision(), frozen(self.auxiliary["style"]):
                codes = losses.reference_codes(pair.references, pair.other)
                others = losses.reference_codes(pair.second_references, pair.other)
                terms = losses.translation_losses(pair, codes, others, diversity)
            step(torch.stack(list(terms.values())).sum(), "network")
            done = self.current_epoch * self.num_iterations_per_epoch + self.step_in_epoch
            losses.store_styles(codes, pair, done)
        return {"discriminator": discriminator, **parts}

    def _segment(self, source: Tensor, labels: Any) -> Tensor:
        rows = slice(self.num_source)
        own = [level[rows] for level in labels] if isinstance(labels, list) else labels[rows]
        loss: Tensor
        for _ in range(self.settings.adaptation.segmentation_steps):
            with self._mixed_precision():
                loss = self.loss(self.network(source, "seg"), own)
            self.adversarial_steps(self.settings.adaptation.segmentation * loss, "network")
        return loss

    def _distil(self, source: Tensor, target: Tensor, labels: Any) -> dict[str, Tensor]:
        by_average = self.settings.adaptation.self_teacher == "ema"
        teacher = self.average.network["network"] if by_average else self.network
        finest = labels[0] if isinstance(labels, list) else labels
        with self._mixed_precision():
            taught = self.losses.self_targets(source, target, teacher, finest[: self.num_source])
        with self._mixed_precision():
            loss = self.losses.self_loss(source, target, *taught)
        self.adversarial_steps(loss, "network", *(["mapping"] if self.losses.has_styles else []))
        return {"self": loss, "trust": torch.as_tensor(taught[-1], device=self.device)}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Stock epoch end; the mean of every loss is logged, and a training that diverges stops."""
        self._refresh_self_code()
        super().on_train_epoch_end(train_outputs)
        steps = self.adversarial_steps
        if steps.num_taken < steps.num_asked:
            left_out = f"{steps.num_asked - steps.num_taken} of {steps.num_asked}"
            self.print_to_log_file(f"{left_out} steps of the optimizers were not finite and left out.")
        if not steps.num_taken:
            raise AdaptationError(
                f"The training diverged: no step of epoch {self.current_epoch} was finite. Train anew with a smaller "
                f"'adaptation.learning_rate' (it is {self.settings.adaptation.learning_rate:g}) or 'adaptation.r1'."
            )
        # NaN: not a part of this stage
        values = np.array([output["losses"] for output in train_outputs])
        means = [float(np.nanmean(own)) if np.isfinite(own).any() else float("nan") for own in values.T]
        for name, value in zip(LOSSES, means, strict=True):
            self.logger.log(name, value, self.current_epoch)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in zip(LOSSES, means, strict=True) if value == value)
        self.print_to_log_file(f"Stage {self.stage}: {shown}")

    @torch.no_grad()
    def _refresh_self_code(self) -> None:
        """Store the self code of the present mapping networks, so that prediction needs none."""
        for networks in (self.followed, self.average.network):
            code = self.losses.self_code_of(networks)
            if code is not None:
                networks["network"].codes[SELF] = code[0]

    # ---- validation -------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict) -> dict:
        """Stock validation on the source: of the segmentation without a code in stage 1, of the one-step in stage 2."""
        with replaced(self.network, predicts="seg" if self.stage == 1 else "self"):
            return super().validation_step(batch)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Stock pseudo Dice; its moving average, which chooses checkpoint_best, begins anew in stage 2."""
        super().on_validation_epoch_end(val_outputs)
        if self.current_epoch == self.stage_2_epoch:
            logged = self.logger.local_logger.my_fantastic_logging
            logged["ema_fg_dice"][-1] = logged["mean_fg_dice"][-1]

    def on_epoch_end(self) -> None:
        """Stock epoch end; losses go into progress.png, and what the network does into a figure."""
        stage = self.stage
        super().on_epoch_end()
        logged = self.logger.local_logger.my_fantastic_logging
        append_curves(Path(self.output_folder) / "progress.png", "adaptation", {name: logged[name] for name in LOSSES})
        self._draw(stage)

    @torch.no_grad()
    def _draw(self, stage: int) -> None:
        if self.images_before is None:
            return
        with self._predicting_weights():
            self.network.eval()
            source, target = (images[:1] for images in self.images_before)
            translates = self.settings.adaptation.adversarial > 0

            def panel(name: str, image: Tensor, task: str | None = None) -> Panel:
                labels = None if task is None else self._labels(self.network(image, task))
                return name, image[0, 0].float().cpu().numpy(), labels

            rows = [[panel("source", source)], [panel("target", target)]]
            if translates:
                rows[0].append(panel("source -> target", self.network(source, "target")))
                rows[1].append(panel("target -> source", self.network(target, "source")))
            for row, image in zip(rows, (source, target), strict=True):
                row.append(panel("without a code", image, "seg"))
            if translates:
                rows[0].append(panel("and back", self.network(self.network(source, "target"), "source")))
                rows[1].append(panel("two steps", target, "two_step"))
            if stage == 2:
                for row, image in zip(rows, (source, target), strict=True):
                    row.append(panel("one step (self code)", image, "self"))
        draw_panels(Path(self.output_folder) / FIGURE, f"epoch {self.current_epoch - 1}, stage {stage}", rows)

    def _labels(self, output: Any) -> np.ndarray:
        logits = output[0] if isinstance(output, (list, tuple)) else output
        labels = (logits[0] > 0).any(0) if self.label_manager.has_regions else logits[0].argmax(0)
        return labels.cpu().numpy().astype(np.int64)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock validation of the source, then of the held-back cases of the target, the one use of their masks."""
        super().perform_actual_validation(save_probabilities)
        self.do_split()
        target = find_target(self.own_dataset(), self.settings.adaptation, self.fold, self.whole_split)
        if not target.evaluated:
            self.print_to_log_file(f"{target.dataset} has no masks of held-back cases: no validation of the target.")
            return
        self.print_to_log_file(
            f"Validation of {len(target.evaluated)} of {len(target.validation)} held-back cases of the target, those "
            f"with masks"
        )
        with replaced(
            self,
            do_split=lambda: ([], target.evaluated),
            preprocessed_dataset_folder=str(target.folder),
            preprocessed_dataset_folder_base=str(target.base),
            output_folder=str(Path(self.output_folder) / "target"),
        ):
            super().perform_actual_validation(save_probabilities)

    # ---- the network that predicts, and checkpoints -----------------------------------------------------------------

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Stock; the generator has no deep supervision."""
        if not isinstance(self.network, StarGenerator):
            super().set_deep_supervision_enabled(enabled)

    def other_weights(self) -> dict[str, Tensor] | None:
        """Those of the moving average, if it is to predict."""
        if self.settings.adaptation.predict_with == "network":
            return None
        weights: dict[str, Tensor] = self.average.network["network"].state_dict()
        return weights

    def save_checkpoint(self, filename: str) -> None:
        """Stock; a network of stage 1, whose self code has not been trained, segments without one by default, too."""
        if self.current_epoch < self.stage_2_epoch:
            for networks in (self.followed, self.average.network):
                networks["network"].start_self_code()
        super().save_checkpoint(filename)

    def checkpoint_extra(self) -> dict[str, Any]:
        """Also what else resumes: the other optimizers and the moving average; and all cases that were seen."""
        cases = {self.plans_manager.dataset_name: set(self.do_split()[0])}
        cases.setdefault(self.target.dataset, set()).update(self.target.training)
        return {
            **super().checkpoint_extra(),
            "optimizers": {name: own.state_dict() for name, own in self.optimizers.items() if name != "network"},
            "average": self.average.state(),
            "competence": self.losses.competence.counts,
            "training_cases": {dataset: sorted(own) for dataset, own in cases.items()},
            "unlabeled_cases": {self.target.dataset: sorted(self.target.training)},
        }

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restore everything that trains."""
        super().load_checkpoint(filename_or_checkpoint)
        for name, state in self.restored["optimizers"].items():
            self.optimizers[name].load_state_dict(state)
        self.average.load_state(self.restored["average"])
        counts = self.restored["competence"]
        self.losses.competence.counts = None if counts is None else counts.to(self.device)
        del self.restored

    def load_checkpoint_extra(self, extra: dict[str, Any]) -> None:
        """Keep what can be restored only after the networks are built."""
        super().load_checkpoint_extra(extra)
        self.restored = {name: extra[name] for name in ("optimizers", "average", "competence")}


def with_task_code_network(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """The plans with the network of the settings in ``configuration``, where they do not plan one already.

    Raises:
        SettingsError: The plans have another one than the user's settings ask for.
    """
    given = merge(without_terms(plans.get(BLOCK, {})), without_terms(read_user_settings()))
    asked = check_types(given).adaptation.network
    architecture = PlansManager(plans).get_configuration(configuration).configuration.get("architecture", {})
    planned = planned_network(architecture)
    if planned is not None and asked not in (None, planned):
        raise SettingsError(
            f"'adaptation.network' is '{asked}', but {plans['plans_name']} plans '{planned}'. Train on plans of their "
            f"own: nnUNetKD_plan_adaptation --network {asked} -plans_name NAME."
        )
    if planned is not None:
        return plans
    changed = copy.deepcopy(plans)
    changed["configurations"][configuration]["architecture"] = task_code_architecture(architecture, asked or "stargan")
    return changed


def _refuse_other_network(model: str, plans: Mapping[str, Any], configuration: str) -> None:
    """Raise SettingsError where a model folder holds folds of another network: its plans.json would be overwritten."""
    if not nnUNet_results.is_set():
        return
    file = Path(str(nnUNet_results)) / plans["dataset_name"] / model / "plans.json"
    if not file.is_file() or not any(file.parent.glob("fold_*/checkpoint_*.pth")):
        return
    before, now = (
        PlansManager(own).get_configuration(configuration).configuration["architecture"]
        for own in (read_json(file, "Move the broken model away."), plans)
    )
    if planned_network(before) != planned_network(now):
        raise SettingsError(
            f"{file.parent} holds folds of the network '{planned_network(before)}'. Train another one under plans of "
            f"its own: nnUNetKD_plan_adaptation --network NAME -plans_name NAME."
        )
