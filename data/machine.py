"""
What the program runs on: memory, devices, what they multiply in, and several processes at once.
"""

import atexit
import ctypes
import datetime
import os
import sys

import torch
import torch.distributed as dist

from data.terminal import InputError


def keep_freed_memory():
    """Let the C library keep the memory of tensors that are gone for those that come.

    On Linux, glibc hands large blocks back to the system and asks for them anew: a twentieth to an eighth of a training step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap does not shrink


def pick_device(name):
    """The best device there is for "auto", or the named one. Raises InputError if that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in there if there[device])
    try:
        if not there.get(name.split(":")[0]):
            raise RuntimeError
        torch.zeros((), device=name)
    except (RuntimeError, AssertionError):
        raise InputError("--device", f"there is no {name} here", "use " + " or ".join(d for d in there if there[d])) from None
    return name


def precision(device):
    """What matrices are multiplied in: bfloat16 where the hardware has it, by what it says of itself; else float32."""
    kind = torch.device(device).type  # (a device or its name)
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def processes():
    """(rank, number of processes) under torchrun, otherwise (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start(config):
    """Set up memory, devices, processes and seeds, by config.device and config.seed. Returns the device."""
    keep_freed_memory()
    torchrun = "RANK" in os.environ
    device = pick_device("cpu" if torchrun and config.device == "auto" and not torch.cuda.is_available() else config.device)
    if torchrun and not dist.is_initialized():
        if device == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # the others wait while the first encodes the text
        atexit.register(dist.destroy_process_group)
    torch.manual_seed(config.seed)
    return device


def leave():
    """Under torchrun, end the process here and now, when all is done; otherwise do nothing.

    A thread by which torch exchanges tensors, and which lets go of one while the interpreter is being taken apart, aborts the process
    (pytorch pull request 179291), and after DDP they are still there when their group is destroyed. It is rare, but torchrun then calls
    the whole run a failure.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
