"""What all trainers of nnunet_kd share: settings, budget, seed, an own checkpoint key, extra log lines.

Host behaviour relied on (nnunetv2 2.8): ``save_checkpoint`` writes to whatever ``torch.save`` accepts;
``load_checkpoint`` calls ``initialize`` first; the logger replaces its dict when a checkpoint is loaded;
``local_rank`` is the global rank, and ``initialize`` wraps the network with the name ``DDP`` of its module.
"""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, distributed, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_kd.data.folds import keep_groups_together
from nnunet_kd.data.labeled_cases import labeled_cases
from nnunet_kd.data.member import Member
from nnunet_kd.environment import environment, replaced
from nnunet_kd.errors import DistributedError, SettingsError
from nnunet_kd.files import replacing, write_json
from nnunet_kd.settings import BLOCK, Settings, parse_settings, read_user_settings, resolve_settings

MAX_GRADIENT_NORM = 12  # stock nnU-Net's


class KDTrainer(nnUNetTrainer):
    """Stock nnU-Net driven by nnunet_kd settings. The settings change the budget and nothing else here."""

    preset: ClassVar[dict[str, Any]] = {}
    _earlier_peak_gb = 0.0  # of the training that is being resumed

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the signature must be stock nnU-Net's)
    ) -> None:
        # Errors of the user come before nnU-Net creates the output folder.
        self.settings = self.resolve_settings(plans, configuration, fold)
        self.given_settings = json.loads(json.dumps(read_user_settings(), default=str))
        self.training_cases: list[str] | None = None  # of the fold, once they were asked for
        self._groups_are_kept = False  # not looked at yet
        is_ddp = distributed.is_available() and distributed.is_initialized()
        if is_ddp:
            _refuse_small_batches(self.planned_batch_sizes(plans, configuration), distributed.get_world_size())
        # nnU-Net would start a W&B run per rank, right in its constructor.
        with environment({"nnUNet_wandb_enabled": "0"} if is_ddp and distributed.get_rank() else {}):
            super().__init__(plans, configuration, fold, dataset_json, device)
        if is_ddp and (device.type == "cpu" or device.index is not None):
            # nnU-Net has taken the GPU whose index is the rank, which only the first of several machines has
            self.device = device
            if device.type == "cpu":
                self.grad_scaler = None
        training = self.settings.training
        self.num_epochs = training.num_epochs
        self.num_iterations_per_epoch = training.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = training.num_val_iterations_per_epoch
        self.initial_lr = training.initial_lr
        self.weight_decay = training.weight_decay
        self.oversample_foreground_percent = training.oversample_foreground_percent
        self.save_every = training.save_every
        if self.device.type == "cpu" and training.num_threads is not None:
            torch.set_num_threads(training.num_threads)

    def resolve_settings(self, plans: dict, configuration: str, fold: int | str) -> Settings:
        """Merge preset, plans block and user settings. Trainers with more layers override this."""
        del configuration, fold
        return resolve_settings(self.preset, plans.get(BLOCK, {}), read_user_settings())

    def planned_batch_sizes(self, plans: dict, configuration: str) -> dict[str, int]:
        """Dataset to the batch size that all processes together draw from it."""
        return {plans["dataset_name"]: PlansManager(plans).get_configuration(configuration).batch_size}

    def own_dataset(self) -> Member:
        """The dataset, under the plans and the configuration of this training."""
        manager = self.plans_manager
        description = {"plans": manager.plans, "dataset_json": self.dataset_json}
        return Member(manager.dataset_name, manager.plans_name, self.configuration_name, description)

    def fold_split(self) -> tuple[list[str], list[str]]:
        """Training and validation cases of the fold, neither of which divides a group of ``split_by``."""
        if not self._groups_are_kept:
            keep_groups_together(self.own_dataset(), self.fold)
            self._groups_are_kept = True
        training, validation = nnUNetTrainer.do_split(self)
        return list(training), list(validation)

    def do_split(self) -> tuple[list[str], list[str]]:
        """The cases of the fold; of those of training, where the settings say so, only some keep their labels."""
        training, validation = self.fold_split()
        if self.settings.labeled is not None:
            if not hasattr(self, "_labeled"):
                self._labeled = labeled_cases(self.own_dataset(), training, self.settings.labeled)
            training = list(self._labeled)
        self.training_cases = sorted(map(str, training))
        return training, validation

    def _build_loss(self) -> nn.Module:
        """Stock loss; without its Dice part if the settings say so."""
        loss: nn.Module = super()._build_loss()
        if self.settings.training.loss == "ce":
            part: Any = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
            part.dc = NoDice()
        return loss

    def build_auxiliary(self) -> nn.ModuleDict:
        """Modules that train beside the network and are thrown away afterwards (projectors, a domain classifier)."""
        return nn.ModuleDict()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Stock optimizer; auxiliary modules become a parameter group of their own, clipped like the network."""
        optimizer, scheduler = super().configure_optimizers()
        with torch.random.fork_rng(devices=[]):  # what is trained beside the network must not change its data
            self.auxiliary = self.build_auxiliary().to(self.device)
        parameters = list(self.auxiliary.parameters())
        if parameters:
            optimizer.add_param_group({"params": parameters})
            # Stock training clips the network alone. Right before a step the gradients are already unscaled.
            optimizer.register_step_pre_hook(lambda *_: _clip(parameters))
        return optimizer, scheduler

    def initialize(self) -> None:
        """Seed if the settings say so, then initialise as stock nnU-Net does."""
        if self.settings.training.seed is not None:
            seed = self.settings.training.seed + self.local_rank
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 (nnU-Net and batchgenerators draw from the global generator)
            torch.manual_seed(seed)
        with replaced(sys.modules[nnUNetTrainer.__module__], DDP=self._distributed):
            super().initialize()
        # DDP averages the gradients of an auxiliary module only if its forward runs through a wrapper of its own.
        self.wrapped_auxiliary: dict[str, nn.Module] = {
            name: self._distributed(module) if self.is_ddp else module for name, module in self.auxiliary.items()
        }

    def _distributed(self, module: nn.Module, device_ids: Any = None) -> DistributedDataParallel:
        """DDP on the device of this process; stock ``device_ids`` are the global rank."""
        del device_ids
        return DistributedDataParallel(module, device_ids=None if self.device.type == "cpu" else [self.device])

    def on_train_start(self) -> None:
        """Start as stock nnU-Net does; the resolved settings are printed and written beside the checkpoint."""
        super().on_train_start()
        if self.local_rank == 0:
            settings = self.settings.to_dict()
            self.print_to_log_file(f"nnunet_kd settings: {settings}", add_timestamp=False)
            write_json(Path(self.output_folder) / "nnunet_kd_settings.json", settings)

    def checkpoint_extra(self) -> dict[str, Any]:
        """What goes into the checkpoint under our own key. Only tensors and plain types."""
        cases = {} if self.training_cases is None else {self.plans_manager.dataset_name: self.training_cases}
        return {
            "settings": self.settings.to_dict(),
            "given_settings": self.given_settings,
            **({"training_cases": cases} if cases else {}),
            "auxiliary": self.auxiliary.state_dict(),
            "peak_gpu_memory_gb": self._peak_gpu_memory(),
        }

    def _peak_gpu_memory(self) -> float | None:
        """Most memory that tensors took on the GPU, before an interruption too; None on other devices."""
        if self.device.type != "cuda":
            return None
        return max(self._earlier_peak_gb, torch.cuda.max_memory_allocated(self.device) / 1e9)

    def load_checkpoint_extra(self, extra: dict[str, Any]) -> None:
        """Restore :meth:`checkpoint_extra`; called before stock nnU-Net loads its part.

        Raises:
            SettingsError: The training was started with other settings.
        """
        self._earlier_peak_gb = extra.get("peak_gpu_memory_gb") or 0.0
        changed = _differences(recorded_settings(extra).to_dict(), self.settings.to_dict())
        if changed:
            raise SettingsError(
                f"The checkpoint in {self.output_folder} was trained with other settings: {'; '.join(changed)}. "
                f"Continue with the settings of nnunet_kd_settings.json in that folder (set nnUNetKD_settings to it), "
                f"or train under another plans name (nnUNetKD_plan_student -plans_name)."
            )

    def save_checkpoint(self, filename: str) -> None:
        """Write stock nnU-Net's checkpoint plus our key, in one step that a kill cannot tear."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        buffer = io.BytesIO()
        super().save_checkpoint(buffer)
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)
        checkpoint[BLOCK] = self.checkpoint_extra()
        with replacing(Path(filename)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restore our key, then stock nnU-Net's part."""
        if isinstance(filename_or_checkpoint, str):
            checkpoint = torch.load(filename_or_checkpoint, map_location="cpu", weights_only=False)
        else:
            checkpoint = filename_or_checkpoint
        extra = checkpoint.get(BLOCK, {})
        del checkpoint
        self.load_checkpoint_extra(extra)
        super().load_checkpoint(filename_or_checkpoint)
        self.auxiliary.load_state_dict(extra.get("auxiliary", {}))

    def move_to_device(self, batch: dict[str, Any]) -> None:
        """Start moving images and targets, in place; stock steps find them there and move nothing."""
        target = batch["target"]
        batch["data"] = batch["data"].to(self.device, non_blocking=True)
        moved = [part.to(self.device, non_blocking=True) for part in (target if isinstance(target, list) else [target])]
        batch["target"] = moved if isinstance(target, list) else moved[0]

    def unwrapped_network(self) -> nn.Module:
        """The network without DDP and ``torch.compile`` wrappers."""
        # nnU-Net wraps for DDP only after it has asked for the optimizer
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network


class NoDice(nn.Module):
    """Stands in nnU-Net's compound losses for the Dice loss and is always 0.

    Its weight must not be 0: without an annotated voxel the compound loss would be a plain number then.
    """

    def forward(self, output: Tensor, target: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """A zero that depends on the output."""
        del target, loss_mask
        return output.sum() * 0


def _refuse_small_batches(sizes: dict[str, int], num_processes: int) -> None:
    for name, size in sizes.items():
        if size < num_processes:
            raise DistributedError(
                f"The plans give {name} batches of {size}, which cannot be divided among {num_processes} processes. "
                f"Start at most {min(sizes.values())} processes in all, or train on plans with a larger batch_size."
            )


def recorded_settings(extra: dict[str, Any]) -> Settings:
    """The settings in :meth:`KDTrainer.checkpoint_extra`; those that are newer than the checkpoint have defaults."""
    return parse_settings(extra.get("settings", {}))


def _clip(parameters: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)


def _differences(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Human-readable differences of two settings, without those that the result does not depend on."""
    result = []
    for key in sorted({*before, *now}):
        name = f"{where}.{key}" if where else key
        if name in ("training.save_every", "training.num_threads") or before.get(key) == now.get(key):
            continue
        if key == "weights" and before.get("sha256") is not None and before["sha256"] == now.get("sha256"):
            continue  # the same file in another place
        if isinstance(before.get(key), dict) and isinstance(now.get(key), dict):
            result += _differences(before[key], now[key], name)
        else:
            result.append(f"{name} was {before.get(key)!r}, is {now.get(key)!r}")
    return result
