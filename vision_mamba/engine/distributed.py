"""The few collective operations training needs; each is the identity where there is one process."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from vision_mamba.errors import UserError


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """Joins the process group torchrun announces in the environment, if any.

    Args:
        device_name: "auto", "cpu" or "cuda". GPUs talk through NCCL, CPUs through gloo.

    Returns:
        This process's device, its rank, and the number of processes.
    """
    cuda = torch.cuda.is_available() if device_name == "auto" else device_name == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no GPU; use train.device=cpu")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return torch.device("cuda", 0) if cuda else torch.device("cpu"), 0, 1
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs of this machine")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Generous: the first process may be evaluating neighbours or writing to slow storage.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    return device, dist.get_rank(), world_size


def stop_processes() -> None:
    """Leaves the process group once all have arrived."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, as a new tensor."""
    tensor = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_true(flag: torch.Tensor) -> bool:
    """Whether a boolean scalar holds in every process."""
    if not dist.is_initialized():
        return bool(flag)
    return bool(all_sum((~flag).float()) == 0)


def share_buffers(model: nn.Module) -> None:
    """Gives every process the first one's buffers (batch-norm statistics differ between processes otherwise)."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
