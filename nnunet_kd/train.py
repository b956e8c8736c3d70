r"""``torchrun ... -m nnunet_kd.train ARGUMENTS``: training on several GPUs of one or of several machines.

The arguments are those of ``nnUNetv2_train``, and so is nearly everything else: nnU-Net's own command runs in each
process that torchrun starts. It finds a process group there (nccl on GPUs, gloo with ``-device cpu``) and the device of
its process. Every rank draws its own cases, and members, from its own stock loaders for its share of the plans' batch.
Losses, gradients, pseudo scores and the final validation are brought together; rank 0 alone writes logs and
checkpoints. All machines must see the same ``nnUNet_preprocessed`` and ``nnUNet_results``. On every machine::

    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint FIRST_MACHINE:29500 \
        -m nnunet_kd.train 301 3d_fullres 0 -tr nnUNetTrainerKDStudent

Without torchrun this is ``nnUNetv2_train``. Our trainers are found without ``nnUNet_extTrainer``.

Host behaviour relied on (nnunetv2 2.8): ``run_training_entry`` parses the arguments and calls ``run_training``, whose
branch for one GPU makes a trainer on the device that it is given; a trainer that finds a process group takes the global
rank for its ``local_rank``.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from nnunetv2.run import load_pretrained_weights, run_training
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import distributed

from nnunet_kd.cli.errors import clear_errors
from nnunet_kd.environment import TRAINERS_VARIABLE, add_trainers_folder, replaced
from nnunet_kd.errors import DistributedError
from nnunet_kd.training.base import KDTrainer

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@clear_errors
def main() -> None:
    """Train as ``nnUNetv2_train`` does, as one of the processes of torchrun if there are any.

    Raises:
        DistributedError: The processes that torchrun started cannot train together; ends the command with a message.
    """
    os.environ[TRAINERS_VARIABLE] = add_trainers_folder(os.environ.get(TRAINERS_VARIABLE, ""))
    missing = [name for name in VARIABLES if name not in os.environ]
    if "RANK" in missing:
        run_training.run_training_entry()
        return
    if missing:
        raise DistributedError(
            f"RANK is set, but not {', '.join(missing)}. Start with torchrun, which sets them all, or unset RANK."
        )
    with replaced(run_training, run_training=functools.partial(train_rank, run_training.run_training)):
        run_training.run_training_entry()


def train_rank(stock: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Stand in for nnU-Net's ``run_training``: the same, within the process group and on the device of this rank."""
    bound = inspect.signature(stock).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    if arguments["num_gpus"] != 1:
        raise DistributedError(
            f"-num_gpus {arguments['num_gpus']} makes processes on one machine, which is torchrun's task here. Leave "
            f"it out and say torchrun --nproc_per_node {arguments['num_gpus']}."
        )
    name = arguments["trainer_class_name"]
    if not issubclass(recursive_find_trainer_class_by_name(name), KDTrainer):
        raise DistributedError(
            f"{name} is not a trainer of nnunet_kd and knows one machine only. Train it with nnUNetv2_train -num_gpus, "
            f"or take -tr nnUNetTrainerKDControl, which is stock nnU-Net on any number of machines."
        )
    device = device_of_rank(arguments["device"].type)
    on_gpu = device.type == "cuda"
    distributed.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    # for pretrained weights nnU-Net would take the GPU whose index is the global rank
    group = SimpleNamespace(is_initialized=lambda: on_gpu, get_rank=lambda: device.index)
    with replaced(load_pretrained_weights, dist=group):
        stock(**{**arguments, "device": device})
    distributed.destroy_process_group()


def device_of_rank(kind: str) -> torch.device:
    """The device of this process; on a CPU it gets its share of the threads."""
    num_local = int(os.environ["LOCAL_WORLD_SIZE"])
    if kind == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // num_local))
        return torch.device("cpu")
    if kind != "cuda":
        raise DistributedError(f"-device {kind} cannot be used by several processes. Take cuda or cpu.")
    num_gpus = torch.cuda.device_count()
    if num_local > num_gpus:
        raise DistributedError(
            f"torchrun starts {num_local} processes on this machine, where {num_gpus} GPUs can be seen. Say "
            f"--nproc_per_node {num_gpus}, or train on the CPU with -device cpu."
            if num_gpus
            else "There is no GPU on this machine. Train on the CPU with -device cpu."
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    main()
