"""DINO-Mix: semi-supervised segmentation with a foundation teacher, a moving average and imbalance-aware CutMix.

Source: Liu and Sun, arXiv 2602.07819, whose equations are not at hand. Established: the frozen DINOv3 teacher, the mean
squared error of features of length 1, class-conditional CutMix of labelled and unlabelled images whose curriculum goes
from tail classes to all alike, and consistency. Our specification: everything that a number or formula says here.

L = L_supervised(labelled) + u * ramp * [L_consistency(unlabelled) + L_mix(mixed)] + w * L_foundation(both)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn

from nnunet_kd.data.add_unlabeled import added_cases, added_folder, check_added
from nnunet_kd.data.augmenters import augmenters
from nnunet_kd.data.semi_supervised import SemiSupervisedLoader, UnlabeledImages
from nnunet_kd.environment import environment
from nnunet_kd.errors import SettingsError
from nnunet_kd.settings import Settings, check_types, merge
from nnunet_kd.spaces.labels import LabelSpace
from nnunet_kd.teachers.ema import EMATeacher
from nnunet_kd.teachers.foundation import FoundationTeacher
from nnunet_kd.teachers.token_maps import TokenMaps
from nnunet_kd.training.dino_mix_terms import check_terms, terms_of
from nnunet_kd.training.distillation import DistillationLoss
from nnunet_kd.training.other_weights import PredictsWithOthers
from nnunet_kd.training.semi_batch import SemiSupervisedBatch, SupervisedPart
from nnunet_kd.training.student import nnUNetTrainerKDStudent
from nnunet_kd.training.task_trainer import need_plain_plans


class nnUNetTrainerDINOMix(PredictsWithOthers, nnUNetTrainerKDStudent):
    """The student trainer with another list of terms, and batches that carry unlabelled and mixed samples, too."""

    preset: ClassVar[dict[str, Any]] = {
        "teachers": {"ema": {"kind": "ema"}, "foundation": {"kind": "foundation"}},
    }
    samples: ClassVar[tuple[str, ...]] = ("labeled", "unlabeled", "mixed")
    unlabeled_cases: frozenset[str] = frozenset()  # whose images were seen, also before training went on

    # ---- settings ---------------------------------------------------------------------------------------------------

    def method_preset(self, given: dict[str, Any]) -> dict[str, Any]:
        """The terms of the parts that are switched on."""
        parts = check_types({"dino_mix": given.get("dino_mix", {})}).dino_mix
        if "terms" in given and "unsupervised_weight" in given.get("dino_mix", {}):
            raise SettingsError(
                "'dino_mix.unsupervised_weight' is that of the standard terms, but 'terms' names others, which have "
                "weights of their own. Remove one of the two."
            )
        return merge(self.preset, {"terms": terms_of(parts)})

    def resolve_settings(self, plans: dict, configuration: str, fold: int | str) -> Settings:
        """Refuse what has no meaning here."""
        need_plain_plans(plans, configuration, "DINO-Mix", "unlabelled images have no segmentation of the first stage")
        settings = super().resolve_settings(plans, configuration, fold)
        if not any(term.weight for term in settings.terms):
            raise SettingsError(
                "All parts of DINO-Mix are switched off, so nothing would be learned from unlabelled images. Switch "
                "one on in 'dino_mix', or train on the labelled cases alone: -tr nnUNetTrainerKDControl."
            )
        if settings.guard.watches:
            raise SettingsError(
                "'guard' compares teachers with their student by labels, which unlabelled samples do not have. Remove "
                "it from the settings."
            )
        return replace(settings, terms=check_terms(settings))

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def _divide_batch(self) -> None:
        """The batch has to hold labelled and unlabelled samples."""
        asked = self.settings.dino_mix.unlabeled_per_batch
        self.num_unlabeled = self.batch_size // 2 if asked is None else asked
        self.num_labeled = self.batch_size - self.num_unlabeled
        if self.num_unlabeled < 1 or self.num_labeled < 1:
            raise SettingsError(
                f"A batch of {self.batch_size} cannot hold labelled and {self.num_unlabeled or 'any'} unlabelled "
                f"patches. Train on plans with a larger batch (and a smaller patch, where memory is short), on fewer "
                f"GPUs, or with a smaller 'dino_mix.unlabeled_per_batch'."
            )
        mixes = self.settings.dino_mix.mixes
        self.num_mixes = self.num_unlabeled if mixes is None else mixes
        space = LabelSpace.from_dataset_json(self.dataset_json)
        self.semi_supervised = SemiSupervisedBatch(space, self.num_labeled, self.settings.dino_mix)

    def _unlabeled_images(self) -> UnlabeledImages:
        """Training cases without labels, the added ones, and if that is asked for the validation cases."""
        member, plans_name = self.own_dataset(), self.plans_manager.plans_name
        (labeled, validation), (training, _) = self.do_split(), self.fold_split()
        transductive = sorted(validation) if self.settings.dino_mix.transductive and self.fold != "all" else []
        known = set(labeled)
        cases = [*(case for case in training if case not in known), *transductive]
        check_added(member)
        folders = {member.data_folder: cases, added_folder(member): added_cases(member)}
        images = UnlabeledImages(folders)
        self.unlabeled_cases |= set(images.identifiers)
        self.seen_cases[member.name] |= self.unlabeled_cases
        if not images.identifiers:
            raise SettingsError(
                f"There are no unlabelled images of {member.name}. Add some: nnUNetKD_add_unlabeled -d "
                f"{member.name[7:10]} -i FOLDER -p {plans_name} -c {self.configuration_name}; or let only some "
                f'of the training cases keep their labels: "labeled": {{"fraction": 0.1}}.'
            )
        self.print_to_log_file(
            f"{len(labeled)} labelled and {len(images.identifiers)} unlabelled images; {self.num_labeled} + "
            f"{self.num_unlabeled} patches and {self.num_mixes if self._mixes else 0} mixed ones per step",
            add_timestamp=False,
        )
        if transductive:
            self.print_to_log_file(
                f"TRANSDUCTIVE: the images of {len(transductive)} validation cases are trained on without "
                f"their labels.",
                add_timestamp=False,
            )
        return images

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Stock loaders; that of training also draws unlabelled images."""
        self._divide_batch()
        images, processes = self._unlabeled_images(), get_allowed_n_proc_DA()
        with environment({"nnUNet_n_proc_DA": "0"}):  # stock nnU-Net then returns the bare loaders
            labeled, validation = (augmenter.data_loader for augmenter in super().get_dataloaders())
        numbers = (self.num_labeled, self.num_unlabeled)
        maps = self._token_maps(labeled, images)
        training = SemiSupervisedLoader(labeled, images, *numbers, self.label_manager, maps)
        return augmenters(training, validation, processes, pin_memory=self.device.type == "cuda")

    def _token_maps(self, labeled: Any, images: UnlabeledImages) -> TokenMaps | None:
        """Tokens of whole cases for a foundation teacher that wants them."""
        wanting = [
            own
            for own in self.teachers.values()
            if isinstance(own, FoundationTeacher) and own.settings.foundation.cache
        ]
        if not wanting:
            return None
        if len(wanting) > 1:
            raise SettingsError("'foundation.cache' is possible for one teacher only. Switch it off for the others.")
        member = self.own_dataset()
        folders = {**dict.fromkeys(labeled.indices, member.data_folder), **images.folder_of}
        sources = {
            case: (
                images if case in images.folder_of else labeled._data,
                [file for ending in (".b2nd", ".npz", ".npy") if (file := folder / f"{case}{ending}").is_file()],
            )
            for case, folder in folders.items()
        }
        maps = wanting[0].token_maps(sources, member.base_folder)
        megabytes = sum((maps.folder / f"{case}.npy").stat().st_size for case in sources) / 1e6
        self.print_to_log_file(
            f"Token maps of {len(sources)} cases, {megabytes:.0f} MB: {maps.folder}", add_timestamp=False
        )
        return maps

    def _distillation_loss(self, supervised: nn.Module) -> DistillationLoss:
        loss = super()._distillation_loss(supervised)
        loss.supervised = SupervisedPart(supervised)
        return loss

    def on_train_start(self) -> None:
        """Start as the student does, with the class frequencies of a training that goes on."""
        super().on_train_start()
        if hasattr(self, "restored_frequencies"):
            self.semi_supervised.frequencies.load_state(self.restored_frequencies, self.device)

    # ---- training ---------------------------------------------------------------------------------------------------

    @property
    def average(self) -> EMATeacher | None:
        """The moving average, if a term asks it."""
        return next((own for own in self.teachers.values() if isinstance(own, EMATeacher)), None)

    @property
    def _mixes(self) -> bool:
        return any("mixed" in term.samples and term.weight for term in self.settings.terms)

    def train_step(self, batch: dict) -> dict:
        """Ask the moving average about the unlabelled samples, mix, then take the student's step."""
        self.move_to_device(batch)
        logits = None if self.average is None else self.average.predict(batch["data"][self.num_labeled :])
        num_mixes = self.num_mixes if self._mixes else 0
        prepared, groups = self.semi_supervised(batch, logits, num_mixes, self.progress)
        self.loss.groups, self.loss.supervised.num_labeled = groups, self.num_labeled
        try:
            return super().train_step(prepared)
        finally:
            self.loss.supervised.num_labeled = None

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """The student's log, and what is mixed."""
        super().on_train_epoch_end(train_outputs)
        drawn = self.semi_supervised.take_drawn()
        probabilities = self.semi_supervised.probabilities
        if drawn and probabilities is not None:
            space = self.semi_supervised.space
            names = space.names if space.regions else space.names[1:]
            rows = zip(names, drawn, probabilities.tolist(), strict=True)
            shares = ", ".join(f"{name} {count} (p {value:.3f})" for name, count, value in rows)
            self.print_to_log_file(f"Mixed boxes around each class, of those that a donor has: {shares}")

    def other_weights(self) -> dict[str, Tensor] | None:
        """Those of the moving average, if it is to predict."""
        average = self.average if self.settings.dino_mix.predict_with == "ema" else None
        return None if average is None else average.network.state_dict()

    # ---- checkpoint and results -------------------------------------------------------------------------------------

    def checkpoint_extra(self) -> dict[str, Any]:
        """Also the class frequencies, and whose images were seen without labels."""
        extra = super().checkpoint_extra()
        extra["class_frequencies"] = self.semi_supervised.frequencies.state()
        extra["unlabeled_cases"] = {self.plans_manager.dataset_name: sorted(self.unlabeled_cases)}
        return extra

    def load_checkpoint_extra(self, extra: dict[str, Any]) -> None:
        """Restore :meth:`checkpoint_extra`."""
        super().load_checkpoint_extra(extra)
        self.restored_frequencies = extra["class_frequencies"]
        self.unlabeled_cases = frozenset(extra["unlabeled_cases"][self.plans_manager.dataset_name])

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock validation; results of transductive training say so."""
        super().perform_actual_validation(save_probabilities)
        if self.settings.dino_mix.transductive and self.fold != "all":
            self.note_in_summary("transductive", sorted(self.unlabeled_cases.intersection(self.fold_split()[1])))
