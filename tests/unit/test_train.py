"""Which device a process of torchrun gets."""

from __future__ import annotations

import re

import pytest
import torch

from nnunet_kd.errors import DistributedError
from nnunet_kd.train import device_of_rank


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Pretend that the machine has four; returns those that were made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_the_gpu_is_that_of_the_local_rank(monkeypatch: pytest.MonkeyPatch, four_gpus: list[torch.device]) -> None:
    for name, value in {"RANK": "7", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert device_of_rank("cuda") == torch.device("cuda", 3)
    assert four_gpus == [torch.device("cuda", 3)]


@pytest.mark.parametrize(
    ("num_gpus", "named"), [(4, "5 processes on this machine, where 4 GPUs.*--nproc_per_node 4"), (0, "no GPU.*cpu")]
)
def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, num_gpus: int, named: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(DistributedError) as refused:
        device_of_rank("cuda")
    assert re.search(named, str(refused.value))


def test_processes_share_the_threads_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        assert device_of_rank("cpu") == torch.device("cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
