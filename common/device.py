"""
What training runs on: memory, devices, number formats, and several processes at once.
"""

import atexit
import ctypes
import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from common.messages import InputError
from model import GPT, PAIR_ROWS, GPTConfig


def keep_freed_memory():
    """Let the C library reuse freed memory instead of returning it to the system.

    By default, glibc on Linux returns large blocks and asks for them again. That costs 5 to 12%
    of a training step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def pick_device(name):
    """The named device, or for "auto" the first one available. Raises InputError if unavailable."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    choices = [device for device in available if available[device]]
    if name == "auto":
        return choices[0]
    try:
        if name.split(":")[0] not in choices:
            raise RuntimeError
        torch.zeros((), device=name)
    except (RuntimeError, AssertionError):
        what = f"{name} is not available here"
        raise InputError("--device", what, "use " + " or ".join(choices)) from None
    return name


def precision(device):
    """The dtype for matrix products: bfloat16 where the hardware is fast at it, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def processes():
    """(rank, number of processes) under torchrun, otherwise (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(*text):
    """Print, but only in the first of several processes."""
    if processes()[0] == 0:
        print(*text)


def memory_of(device):
    """How many bytes of memory the device has, or None if we can't find out."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may have less than the machine
    if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        total = min(total, int(text))
    return total


def check_memory(n_parameters, n_layer, device):
    """Raise InputError if a network of this size can't be trained on the device.

    Training needs about 16 bytes per parameter: the weight, its gradient, and two numbers for
    the optimizer's step. A layer's Python objects take some 60 kB more.
    """
    needed, total = 16 * n_parameters + 60_000 * n_layer, memory_of(device)
    if total is not None and needed > total:
        what = (
            f"{n_parameters:,} parameters need at least {needed / 1e9:,.0f} GB of memory to train"
        )
        what += f", and {device} has {total / 1e9:,.0f} GB"
        raise InputError("command line", what, "lower --n_embd, --n_layer or --vocab_size")


def make_model(config, n_vocab, device):
    """A fresh network on the device. Raises InputError if the sizes clash or exceed the memory."""
    rows = 2 * n_vocab + PAIR_ROWS + 12 * config.n_embd * config.n_layer
    check_memory(rows * config.n_embd, config.n_layer, device)
    sizes = (config.block_size, n_vocab, config.n_layer, config.n_head, config.n_embd)
    try:
        model = GPT(GPTConfig(*sizes, config.dropout)).to(device)
    except ValueError as error:
        raise InputError("command line", str(error), "change --n_embd or --n_head") from None
    if config.compile and model.embed.weight.is_cuda:
        for block in model.blocks:  # all blocks are alike, so they share one compilation
            block.compile()
    return model


def start(device, seed):
    """Set up memory, devices, processes and the random seed. Returns the device to use."""
    keep_freed_memory()
    under_torchrun = dist.is_torchelastic_launched()  # a leftover RANK means nothing
    if under_torchrun and device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    device = pick_device(device)
    if under_torchrun and not dist.is_initialized():
        if device == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        patience = datetime.timedelta(days=1)  # the others wait while the first encodes the text
        dist.init_process_group(backend, timeout=patience)
        atexit.register(dist.destroy_process_group)
    torch.manual_seed(seed)
    return device


def leave():
    """Under torchrun, end the process here, now that all is done. Otherwise do nothing.

    A thread of torch's that is still alive while Python takes itself apart can abort the process
    (pytorch pull request 179291). It is rare, but torchrun then calls the whole run a failure.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # no atexit handlers either: the group is gone
