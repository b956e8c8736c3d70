"""Stock nnU-Net's multi-process augmenters around loaders of our own.

Host behaviour relied on (nnunetv2 2.8): the numbers of processes and of cached batches in ``get_dataloaders``.
"""

from __future__ import annotations

from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter


def augmenters(training: Any, validation: Any, num_processes: int, *, pin_memory: bool) -> tuple[Any, Any]:
    """Augmenters of a training and a validation loader, started.

    Args:
        training: Loader of training batches.
        validation: Loader of validation batches.
        num_processes: Worker processes for training, half of them for validation; 0 loads in this process.
        pin_memory: Whether batches go into pinned memory.
    """
    if num_processes == 0:
        return SingleThreadedAugmenter(training, None), SingleThreadedAugmenter(validation, None)
    started = [
        NonDetMultiThreadedAugmenter(
            data_loader=loader,
            transform=None,
            num_processes=processes,
            num_cached=cached,
            seeds=None,
            pin_memory=pin_memory,
            wait_time=0.002,
        )
        for loader, processes, cached in (
            (training, num_processes, max(6, num_processes // 2)),
            (validation, max(1, num_processes // 2), max(3, num_processes // 4)),
        )
    ]
    for augmenter in started:
        next(augmenter)
    return started[0], started[1]
