"""
How fast is it? This times our code against plain PyTorch and prints the ratios.

    python tests/bench.py                   # all of it: two to five minutes on two cores
    python tests/bench.py training loss     # some of it
    python tests/bench.py fine_tuning --base out/base.pt --data talks.jsonl

The two sides of a pair take turns in one run. We show the median times.

training     our network, loss and Muon, against a GPT-2-like model with F.cross_entropy and AdamW
             in float32
fine_tuning  batches of similar lengths and logits only where the loss looks, against random
             batches and logits everywhere. Without --base, it pretrains a base model for 200 steps
             first. Without --data, it takes the embedded world's conversations.
loss         our cross-entropy, against F.cross_entropy: time and memory
generation   with the cache, against computing everything again; many prompts at once, against one
             after the other
tokenizing   encoding a text to a file, against tiktoken's own encode_ordinary_batch
"""

import argparse
import copy
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.checkpoint import load
from common.device import keep_freed_memory, pick_device, precision
from common.evaluation import mean_loss
from common.files import read_json
from common.optimizer import make_optimizers
from common.run import Run
from data import Tokenizer, world
from data.order import shuffled, similar_lengths
from data.text import Rows, write_tokens
from model import GPT, IGNORE_INDEX, GPTConfig, cross_entropy
from pretrain import PretrainConfig, lr_scale, train
from sft import SFTConfig, encode, prepare_special_tokens, sft_data_collator

DEVICE = pick_device("auto")
LOSS_SHAPES = ((4096, 1024), (4096, 4096), (2048, 50257))  # (N, V)


# -------------------------------------------------------------------------------------------------
# Clocks and the table


def now():
    """The time in seconds, once the device has finished its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    elif DEVICE == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def seconds(function):
    start = now()
    function()
    return now() - start


def in_turn(ours, theirs, rounds):
    """The median seconds of two functions that we call in turn, after one call each to warm up."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def train_in_turn(model, batches, config, their_step=lambda step: None):
    """Run the real training loop. Before each of its steps, run their_step(step).

    Returns the seconds of each of our steps, and those of each of theirs.
    """
    ours, theirs, started = [], [], None

    def stop_our_clock():
        if started is not None:
            ours.append(now() - started)

    def batches_in_turn(step):
        nonlocal started
        stop_our_clock()
        theirs.append(seconds(lambda: their_step(step)))
        started = now()
        return batches(step)

    with tempfile.TemporaryDirectory() as folder:
        config.out = folder
        train(model, batches_in_turn, config, Run(config, "bench", "bench.pt", {}))
        stop_our_clock()
    return ours, theirs


def show(what, ours, theirs, unit, less_is_better=False):
    ratio, digits = ours / theirs, 0 if max(ours, theirs) >= 100 else 1
    note = "  (less is better)" if less_is_better else ""
    numbers = f"{ours:>10,.{digits}f}{theirs:>10,.{digits}f}"
    print(f"{what:44}{numbers}  {unit:22}{ratio:5.2f}{note}", flush=True)


# -------------------------------------------------------------------------------------------------
# Training


class GPT2(nn.Module):
    """Made of torch's own pieces: learned positions, LayerNorm, GELU, F.cross_entropy."""

    def __init__(self, config):
        super().__init__()
        T, C = config.block_size, config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(T, C)
        kind = dict(activation=F.gelu, batch_first=True, norm_first=True, bias=False)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(C, config.n_head, 4 * C, dropout=0.0, **kind)
            for _ in range(config.n_layer)
        )
        self.ln_f = nn.LayerNorm(C, bias=False)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input_ids, labels):
        x = self.wte(input_ids) + self.wpe.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        logits = self.lm_head(self.ln_f(x[:, :-1])).flatten(0, 1)
        return logits, F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def matrix_rate(dtype):
    """The best FLOP/s of a square matrix product, over several sizes."""
    best = 0.0
    for n in (512, 1024, 2048) if DEVICE == "cpu" else (4096, 8192):
        a = torch.randn(n, n, device=DEVICE, dtype=dtype)
        torch.mm(a, a)
        fastest = min(seconds(lambda a=a: torch.mm(a, a)) for _ in range(10))
        best = max(best, 2 * n**3 / fastest)
    return best


def training():
    B, T = 32, 128
    shape = GPTConfig(T, vocab_size=1024, n_layer=4, n_head=4, n_embd=192)
    torch.manual_seed(0)
    ours, theirs = GPT(shape).to(DEVICE), GPT2(shape).to(DEVICE)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    ids = torch.randint(shape.vocab_size, (B, T))

    def their_step(step):
        _, loss = theirs(ids.to(DEVICE), ids.to(DEVICE))
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    batch = {"input_ids": ids, "labels": ids}
    times = train_in_turn(ours, lambda step: batch, PretrainConfig(max_steps=25), their_step)
    our_time, their_time = (statistics.median(column[1:]) for column in times)  # the first warms up
    rates = [B * T / t for t in (our_time, their_time)]
    show("training, 4 layers, 192 wide, 32 x 128", *rates, "tokens/s")
    dtype, n_parameters = precision(DEVICE), sum(p.numel() for p in ours.parameters())
    flops = (6 * n_parameters + 12 * shape.n_layer * shape.n_embd * T) * B * T
    ours, peak = flops / our_time / 1e9, matrix_rate(dtype) / 1e9
    what = f"  of the rate of matrix products, {str(dtype)[6:]}"
    print(f"{what:44}{ours:>10,.0f}{peak:>10,.0f}  {'GFLOP/s':22}{ours / peak:5.2f}")


# -------------------------------------------------------------------------------------------------
# Fine-tuning


def brief_base():
    """A base model after 200 steps on the embedded world. Returns (model, tokenizer)."""
    texts, config = world.build(1)["corpus"], PretrainConfig(max_steps=200)
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    ids = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.endoftext)]
    rows = Rows(np.array(ids), config.block_size)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab)).to(DEVICE)
    indices = shuffled(len(rows), config.batch_size, 0)

    def batches(step):
        input_ids = rows.take(indices(step))
        return {"input_ids": input_ids, "labels": input_ids}

    train_in_turn(model, batches, config)
    return model, tokenizer


class AllLogits(GPT):
    """The straightforward way: logits for every position, though the loss ignores most of them."""

    def forward(self, input_ids, labels=None):
        if not self.training:
            return super().forward(input_ids, labels)
        logits = self.head(self.hidden(input_ids)[:, :-1]).flatten(0, 1)
        targets = labels[:, 1:].flatten()
        return logits, F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)


class Batches:
    """Batches of conversations. Counts their rows, and how much of them is padding."""

    def __init__(self, rows, indices, tokenizer):
        self.rows, self.indices, self.tokenizer = rows, indices, tokenizer
        self.n_rows, self.n_tokens, self.n_padding = 0, 0, 0

    def __call__(self, step):
        batch = sft_data_collator([self.rows[i] for i in self.indices(step)], self.tokenizer)
        ids = batch["input_ids"]
        self.n_rows, self.n_tokens = self.n_rows + len(ids), self.n_tokens + ids.numel()
        self.n_padding += int((ids == self.tokenizer.pad).sum())
        return batch

    def padding(self):
        return 100 * self.n_padding / self.n_tokens


def fine_tuning(path=None, base=None):
    """As many steps as sft.py takes, from one base model, in both ways."""
    base, tokenizer = load(base, DEVICE) if base else brief_base()
    conversations = [c for _, c in read_json(path)] if path else world.build(1)["sft"]
    rows = [encode(c, tokenizer, base.config.block_size) for c in conversations]
    rows = [row for row in rows if row]
    held_out, rows = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    config, lengths = SFTConfig(), [len(row["input_ids"]) for row in rows]
    n = config.batch_size
    our_batches = Batches(rows, similar_lengths(lengths, n, 1), tokenizer)
    their_batches = Batches(rows, shuffled(len(rows), n, 1), tokenizer)
    ours, theirs = copy.deepcopy(base), AllLogits(base.config).to(DEVICE)
    theirs.load_state_dict(base.state_dict())
    prepare_special_tokens(ours, tokenizer)
    prepare_special_tokens(theirs, tokenizer)
    optimizers = make_optimizers(theirs.train(), config)
    half = precision(DEVICE)

    def their_step(step):
        batch = their_batches(step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale(step, config)
        with torch.autocast(torch.device(DEVICE).type, half, enabled=half == torch.bfloat16):
            _, loss = theirs(batch["input_ids"].to(DEVICE), batch["labels"].to(DEVICE))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    our_times, their_times = train_in_turn(ours, our_batches, config, their_step)
    sides = (our_batches, our_times), (their_batches, their_times)
    rates = [batches.n_rows / sum(times) for batches, times in sides]
    show(f"fine-tuning, {len(rows):,} conversations, in {n}s", *rates, "examples/s")
    shares = [batches.padding() for batches, _ in sides]
    show("  padding", *shares, "% of the tokens", less_is_better=True)
    parts = [held_out[i : i + 64] for i in range(0, len(held_out), 64)]
    held_out = [sft_data_collator(part, tokenizer) for part in parts]
    losses = [mean_loss(model, held_out) for model in (ours, theirs)]
    what = f"  held-out loss after {config.max_steps} steps"
    print(f"{what:44}{losses[0]:>10.3f}{losses[1]:>10.3f}  nats per token", flush=True)


# -------------------------------------------------------------------------------------------------
# The loss


def loss_and_gradient(function, N, V, dtype, times=1):
    """A function that computes a loss and its gradient, `times` times in a row."""
    torch.manual_seed(0)
    logits = torch.randn(N, V, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,), device=DEVICE)
    half = torch.bfloat16

    def both():
        for _ in range(times):
            # With autocast, F.cross_entropy works in float32, as ours always does.
            with torch.autocast(torch.device(DEVICE).type, half, enabled=dtype == half):
                loss = function(logits, targets)
            torch.autograd.grad(loss, logits)

    return both


def peak_memory(name, *shape_and_dtype):
    """How many MB one loss and its gradient need at most. Runs in a process of its own."""
    function = {"ours": cross_entropy, "torch's": F.cross_entropy}[name]
    both = loss_and_gradient(function, *shape_and_dtype)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # Forget the peak that importing torch made.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak()
    both()
    return (peak() - before) / 1e3


def peak():
    """The most memory that this process ever held, in kB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def loss():
    for dtype in (torch.float32, torch.bfloat16):
        for N, V in LOSS_SHAPES:
            compare_losses(N, V, dtype)


def compare_losses(N, V, dtype):
    # Small ones run ten times in a row, so their data is in the processor's cache.
    times, rounds = (10, 20) if V < 9999 else (1, 9)
    pair = [loss_and_gradient(f, N, V, dtype, times) for f in (cross_entropy, F.cross_entropy)]
    ours, theirs = (1000 * t / times for t in in_turn(*pair, rounds))
    what = f"loss and gradient, ({N}, {V}), {str(dtype)[6:]}"
    show(what, ours, theirs, "ms", less_is_better=True)
    if DEVICE == "mps" or (DEVICE == "cpu" and sys.platform != "linux"):
        return  # nothing there tells us the peak
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = [pool.apply(peak_memory, (name, N, V, dtype)) for name in ("ours", "torch's")]
    show("  memory", *peaks, "MB", less_is_better=True)


# -------------------------------------------------------------------------------------------------
# Generation and tokenizing


@torch.inference_mode()
def recompute(model, prompt, n):
    """Generation without a cache."""
    ids = torch.tensor([prompt], device=DEVICE)
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)


def generation():
    torch.manual_seed(0)
    shape = GPTConfig(block_size=512, vocab_size=1024, n_layer=4, n_head=4, n_embd=192)
    model = GPT(shape).to(DEVICE).eval()

    def with_cache():
        model.generate([[1]], 511, temperature=0)

    ours, theirs = in_turn(with_cache, lambda: recompute(model, [1], 511), 3)
    show("generating 511 tokens, with a cache", 511 / ours, 511 / theirs, "tokens/s")
    prompts = [torch.randint(1024, (8 + i,)).tolist() for i in range(64)]

    def at_once():
        model.generate(prompts, 64, temperature=0)

    def one_by_one():
        for prompt in prompts:
            model.generate([prompt], 64, temperature=0)

    ours, theirs = in_turn(at_once, one_by_one, 3)
    n = 64 * len(prompts)
    show("64 prompts of 8 to 71 tokens, at once", n / ours, n / theirs, "tokens/s")


def tokenizing(path=None):
    if path:
        text = Path(path).read_text(encoding="utf-8")
    else:
        text = "\n\n".join(world.build(1)["corpus"])
    text *= 20_000_000 // len(text) + 1
    start = time.perf_counter()
    tokenizer = Tokenizer.train([text], 1024)
    spent = time.perf_counter() - start
    print(f"{'learning 1,024 tokens':44}{spent:>10.1f}{'':>10}  s", flush=True)
    pieces = [text[i : i + 2**20] for i in range(0, len(text), 2**20)]
    with tempfile.TemporaryDirectory() as folder:
        path, n = Path(folder) / "tokens.bin", 0

        def write():
            nonlocal n
            n += 1  # a new fingerprint, so the file is written again
            write_tokens([pieces], tokenizer, path, str(n), len(text))

        def encode_batch():
            tokenizer.encoding.encode_ordinary_batch(pieces, num_threads=os.cpu_count())

        rates = [len(text) / 1e6 / t for t in in_turn(write, encode_batch, 3)]
    show("encoding text to a file", *rates, "million characters/s")


# -------------------------------------------------------------------------------------------------
# The command


def processor():
    """The processor's name, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    benchmarks = {f.__name__: f for f in (training, fine_tuning, loss, generation, tokenizing)}
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    option = parser.add_argument
    option("what", nargs="*", choices=[*benchmarks, []], help="which ones (default: all)")
    option("--data", help="conversations for fine_tuning, or a text for tokenizing")
    option("--base", help="a base model for fine_tuning, made by pretrain.py")
    args = parser.parse_args()
    keep_freed_memory()  # as the programs do; both sides gain from it
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else processor()
    threads, version = torch.get_num_threads(), torch.__version__
    print(f"{name}, {threads} threads, torch {version}, {platform.system()}\n")
    print(f"{'':44}{'ours':>10}{'plain':>10}  {'':22}ratio")
    options = {"fine_tuning": [args.data, args.base], "tokenizing": [args.data]}
    for name in args.what or benchmarks:
        benchmarks[name](*options.get(name, []))


if __name__ == "__main__":
    main()
