"""
Stage 1: a network that continues text. It reads plain text, learns to predict every next token, and becomes a parrot.

    python pretrain.py                       # the embedded world: facts, told and quizzed, from data/world.py
    python pretrain.py --data my.txt notes/  # your own UTF-8 text, files or folders
    torchrun --nproc_per_node=2 pretrain.py  # on two processes, or GPUs
    python pretrain.py --resume              # goes on with a run that was stopped

Writes out/base.pt (the model), out/pretrain.jsonl (what was logged), out/train.bin and out/val.bin (token ids) and, for the
embedded world, out/world (its texts and questions). The loop is train(), and fine-tuning (sft.py) runs the very same
one: pretraining is fine-tuning with nothing masked.
"""

import os
import time

STARTED = time.perf_counter()  # before torch is imported, so that the log counts from the start of the process
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's threads wait less busily: beside another busy program, that is up to 40 times as fast

import argparse
import contextlib
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import compare
from data import Tokenizer, world
from data.machine import leave, precision, processes, start
from data.run import LOG_EVERY, CtrlC, Run
from data.terminal import InputError, Parser, Progress, clock, command, not_empty, parse_options, refuse_overwriting, setting
from data.text import Rows, Text, fills_a_row, find_files, open_tokens, survey, write_tokens
from model import GPT, IGNORE_INDEX, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# Settings: each field is an option of the command line, by its own name


@dataclass
class TrainConfig:
    """What train() needs to know; both stages have it."""

    out: str = setting("out", "folder that everything is written to")
    device: str = setting("auto", "cuda, mps or cpu; auto: the first of them that is there")
    seed: int = setting(1, "of all that is random: weights, order of the data, dropout, the embedded world and its split")
    resume: bool = setting(False, "go on with a run that was stopped")
    batch_size: int = setting(16, "rows of one optimizer step, over all processes")
    micro_batch_size: int = setting(0, "rows that a process puts through the network at once; 0: all of its share")
    max_steps: int = setting(700, "optimizer steps")
    lr: float = setting(0.02, "learning rate of the matrices inside the blocks (Muon)")
    embed_lr: float = setting(0.04, "learning rate of the embedding, which is the head too (AdamW)")
    weight_decay: float = setting(0.0, "how strongly the matrices are pulled towards zero")
    warmup: float = setting(0.02, "share of the steps, the first ones, in which the learning rates rise")
    cooldown: float = setting(0.6, "share of the steps, the last ones, in which they fall to zero")
    eval_every: int = setting(350, "steps between measurements of the validation loss (rounded up to tens)")


@dataclass
class PretrainConfig(TrainConfig):
    block_size: int = setting(128, "tokens of a row: the longest context")
    vocab_size: int = setting(4096, "tokens to learn from the text, 256 bytes and 5 special ones counted in")
    tokenizer: str = setting("", "use one of tiktoken's own encodings instead, gpt2 say, which is downloaded once")
    n_layer: int = setting(4, "blocks")
    n_head: int = setting(2, "attention heads of a block")
    n_embd: int = setting(128, "width of the residual stream")
    dropout: float = setting(0.0, "share of activations dropped in training, against overfitting")
    compile: bool = setting(False, "on CUDA, let torch.compile fuse the blocks: a minute to begin with, then faster")


PRESETS = {
    "world": {},  # the defaults above: the embedded world
    "tiny": dict(n_layer=3, n_embd=96, vocab_size=512, max_steps=300, dropout=0.1, weight_decay=0.1, embed_lr=0.01, eval_every=50),
    "small": dict(n_layer=3, vocab_size=1024, max_steps=560, weight_decay=0.1, embed_lr=0.01, cooldown=0.8, eval_every=70),
    "medium": dict(n_embd=256, n_head=4, block_size=256, max_steps=1500, weight_decay=0.1, embed_lr=0.01, cooldown=0.8, eval_every=250),
    "gpt2": dict(  # GPT-2's 124 million, for a GPU
        tokenizer="gpt2", n_layer=12, n_embd=768, n_head=12, block_size=1024, batch_size=512, micro_batch_size=16,
        max_steps=5000, embed_lr=0.003, weight_decay=0.01, eval_every=250, compile=True,
    ),
}  # fmt: skip
FITS = {"tiny": 0.3, "small": 5.0, "medium": math.inf}  # megabytes of text, below which a preset is chosen by itself
SAVE_EVERY = 60  # seconds between saves of an unfinished run
MOST_VALIDATION = 1_000_000  # characters: the last tenth of a text, but of a large one no more than this
PROMPTS = [  # what the base model is shown with at the end
    world.SEASONS,
    "What is the capital of Kenya?",
    "Who wrote Don Quixote?",
    "Why is the sky blue on a clear day?",
    "What does a panda eat?",
    "The capital of France is",
]


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer of the hidden matrices


def orthogonalize(G):
    """Bring all singular values of each matrix near 1, and keep its singular vectors.

    G: (n, rows, cols), any scale. Returns the same shape, in bfloat16 where the hardware has it: it need not be exact.

    By a Newton-Schulz iteration: five times a polynomial of the matrix, tuned by Jordan et al. to pull any singular
    value from 0.01 to 1 into 0.68 to 1.13.
    """
    if G.size(1) > G.size(2):
        return orthogonalize(G.mT).mT
    X = (G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(precision(G.device))
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)  # -4.7750 A + 2.0315 A A
        X = torch.baddbmm(X, B, X, beta=3.4445)  # 3.4445 X + B X
    return X


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The update rule of torch.optim.Muon, written out because torch's computes in bfloat16 everywhere, which a processor
    without such instructions multiplies about a hundred times slower than float32; and matrices of one shape go
    through the iteration together. A momentum of 0.9, not the usual 0.95: runs of a few hundred steps gain by forgetting sooner.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """One update of every parameter, (rows, cols) each, from its gradient."""
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))  # Nesterov: one step ahead
                updates = orthogonalize(torch.stack(updates))
                scale = max(1, shape[0] / shape[1]) ** 0.5  # taller matrices take larger steps
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model, config):
    """Muon for the matrices of the blocks, AdamW for the table that has a row for each token."""
    muon = Muon(model.blocks.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    adamw = torch.optim.AdamW(
        [model.embed.weight], lr=config.embed_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for group in muon.param_groups + adamw.param_groups:
        group["peak_lr"] = group["lr"]
    return [muon, adamw]


def lr_scale(step, config):
    """What the learning rates are multiplied by at a step: rise, stay, fall."""
    warmup, cooldown = config.warmup * config.max_steps, config.cooldown * config.max_steps
    return min(1.0, (step + 1) / max(1.0, warmup), (config.max_steps - step) / max(1.0, cooldown))


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


def backward(network, batch, config, dtype):
    """Add the gradients of one step's loss: the sum over all its supervised tokens, divided by their number.

    batch: {"input_ids", "labels"}, (B, T) each, the same on every process. Process r of n takes rows r, r + n, r + 2n ..., and these in
    micro-batches; the division is by the number of the whole batch, so it makes no difference how it is split
    (a mean of means would give a token more weight where there are few). Returns this process's part of the loss.
    """
    rank, world_size = processes()
    device = next(network.parameters()).device
    total = (batch["labels"][:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
    input_ids, labels = batch["input_ids"][rank::world_size], batch["labels"][rank::world_size]
    if len(input_ids) == 0:  # fewer rows than processes: this one looks on, but must take part in the exchange
        input_ids, labels = batch["input_ids"][:1], torch.full_like(batch["labels"][:1], IGNORE_INDEX)
    size = config.micro_batch_size or len(input_ids)
    starts = range(0, len(input_ids), size)
    loss_sum = torch.zeros((), device=device)
    for i in starts:
        x, y = input_ids[i : i + size].to(device), labels[i : i + size].to(device)
        last = i == starts[-1]
        with contextlib.nullcontext() if world_size == 1 or last else network.no_sync():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits, loss = network(x, y)
            loss = loss * (len(logits) / total)
            (loss * world_size).backward()  # (the exchange between processes averages; the loss is a sum)
        loss_sum += loss.detach()
    return loss_sum


def take_step(network, optimizers, batch, step, config, dtype):
    """One optimizer step. Returns this process's part of its loss."""
    rank, _ = processes()
    torch.manual_seed(((config.seed * 1_000_003 + step) * 1009 + rank) % 2**63)  # dropout too is a function of the step
    loss = backward(network, batch, config, dtype)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale(step, config)
        optimizer.step()
        optimizer.zero_grad()
    return loss


def train(model, batches, config, run, evaluate=None):
    """The only training loop. Trains the model in place, for config.max_steps optimizer steps, and leaves it in eval mode.

    batches(step): the step's whole batch, {"input_ids", "labels"}, each (B, T) int64; a pure function of step, which is
    what makes resuming exact and processes agree. run: a Run, where it is logged and saved. evaluate(model): a dict to
    log, every config.eval_every steps and at the end. Returns the last row of the log, a dict. Raises InputError if the
    loss is no number.
    """
    rank, world_size = processes()
    device, optimizers = model.embed.weight.device, make_optimizers(model, config)
    network = DistributedDataParallel(model) if world_size > 1 else model
    step, tokens, dtype = 0, 0, precision(device)
    if run.state:
        model.load_state_dict(run.state["model"])
        for optimizer, saved in zip(optimizers, run.state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, tokens, dtype = run.state["step"], run.state["tokens"], run.state["dtype"]
        torch.set_num_threads(run.state["threads"])  # (as many as before, or sums would be rounded in another order)
    if rank == 0:
        run.start_log()
    progress, losses = Progress(run.name, config.max_steps, step), []
    saved_at = since = time.perf_counter()  # since: when the steps began that the next row of the log is about
    first, since_tokens = step, tokens
    model.train()
    with CtrlC() as ctrl_c:
        while step < config.max_steps:
            batch = batches(step)
            losses.append(take_step(network, optimizers, batch, step, config, dtype))
            step, tokens = step + 1, tokens + batch["input_ids"].numel()
            last = step == config.max_steps
            if rank == 0 and step - first in (1, 3) and not last:  # the first step warms up; the next two tell the rate
                losses[-1].item()  # (a GPU may still be at it)
                if step - first == 1:
                    warm = time.perf_counter()
                else:
                    print(f"About {clock((time.perf_counter() - warm) / 2 * (config.max_steps - step))} to go.")
            if step % LOG_EVERY and not last:
                continue

            sums = torch.stack([*losses, torch.tensor(float(ctrl_c.pressed), device=device)])
            if world_size > 1:
                dist.all_reduce(sums)  # each process knows only its part of the loss, and its own keyboard
            *step_losses, pressed = sums.tolist()
            check_finite(model, step_losses, step)
            now = time.perf_counter()
            rate = (tokens - since_tokens) / (now - since)
            row = dict(step=step, tokens=tokens, seconds=round(now - STARTED, 3), loss=sum(step_losses) / len(losses))
            row.update(lr=optimizers[0].param_groups[0]["lr"], tokens_per_s=round(rate))
            if evaluate and (last or step // config.eval_every > (step - len(losses)) // config.eval_every):
                row.update(evaluate(model))
            if rank == 0:
                run.log_row(row)
                progress.update(step, f"loss {row['loss']:.3f}  {rate:,.0f} tokens/s")
                if not last and (pressed or now - saved_at > SAVE_EVERY):
                    run.save(model, optimizers, step=step, tokens=tokens, dtype=dtype)
                    saved_at = time.perf_counter()
            if pressed and not last:
                if world_size > 1:
                    dist.barrier()  # the first process is saving
                if rank == 0:
                    print(f"\nStopped at step {step}. The same command with --resume goes on from here.")
                raise KeyboardInterrupt("saved")
            since, since_tokens, losses = time.perf_counter(), tokens, []
    model.eval()
    return row


def check_finite(model, losses, step):
    """Raise InputError if a loss, or a weight after the step, is no number: before anything is logged or saved.

    losses: of the last steps, up to this one.
    """
    what = None if all(p.isfinite().all() for p in model.parameters()) else "a weight is no number any more"
    for i, loss in reversed(list(enumerate(losses, start=step - len(losses) + 1))):
        if not math.isfinite(loss):
            step, what = i, f"the loss is {loss}"
    if what:
        raise InputError(f"step {step}", f"{what}: the steps are likely too large", "lower --lr and --embed_lr")


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining


def shuffled(n, batch_size, seed):
    """Which of n items make up batch number s: a function of s. Every item comes once before any comes twice."""

    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return np.random.default_rng([seed, epoch]).permutation(n)

    return lambda s: [order(i // n)[i % n] for i in range(s * batch_size, (s + 1) * batch_size)]


def read_text(config, paths):
    """The text to learn from. Returns (sides, sha256, made, trained_on).

    sides: {"training": (documents, how many characters), "validation": the same}; a document is an iterable of strings, its pieces.
    sha256: of it all. made: the embedded world, or None. trained_on: what the checkpoint will say.
    """
    if not paths:
        made = world.build(config.seed)
        sides = {side: ([[text] for text in made[key]], sum(map(len, made[key]))) for side, key in (("training", "corpus"), ("validation", "val"))}
        digest = hashlib.sha256(json.dumps([made["corpus"], made["val"]]).encode()).hexdigest()
        return sides, digest, made, {"world": config.seed}
    files, digest = survey(paths)
    n = sum(characters for _, characters in files)
    cut = max(n * 9 // 10, n - MOST_VALIDATION)
    sides = {"training": (Text(files, 0, cut), cut), "validation": (Text(files, cut, n), n - cut)}
    return sides, digest, None, {"files": [str(path) for path in paths]}


def sizes_for(args):
    """The settings of the preset that is asked for, or else of the one that fits the amount of text: args.preset is set to its name."""
    if args.data and not args.preset:
        megabytes = sum(path.stat().st_size for path in find_files(args.data)) / 1e6
        args.preset = next(name for name, most in FITS.items() if megabytes < most)
    return PRESETS[args.preset or "world"]


def make_tokenizer(config, documents):
    """Learned from the documents, or one of tiktoken's own. Raises InputError if that cannot be had."""
    if not config.tokenizer:
        try:
            return Tokenizer.train((piece for document in documents for piece in document), config.vocab_size)
        except ValueError as error:
            raise InputError("--vocab_size", str(error), "choose another, or give more text") from None
    names = tiktoken.list_encoding_names()
    if config.tokenizer not in names:
        raise InputError("--tokenizer", f"tiktoken has no encoding {config.tokenizer!r}", f"choose one of {', '.join(names)}")
    try:
        return Tokenizer.named(config.tokenizer)
    except (OSError, ValueError) as error:  # (what goes wrong with a connection is an OSError, and other bytes than expected a ValueError)
        what = f"{config.tokenizer} cannot be downloaded ({type(error).__name__})"
        raise InputError("--tokenizer", what, "go online for its first use, or name the folder that holds it in TIKTOKEN_CACHE_DIR") from None


@command
def main(argv=None):
    parser = Parser("pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=not_empty, metavar="PATH", help="UTF-8 text files or folders; without it, the embedded world")
    default = f"world, which is the defaults below; with --data {', '.join(FITS)}, by the amount of text"
    parser.add_argument("--preset", choices=PRESETS, help=f"a set of sizes, see README.md (default: {default})")
    config, args = parse_options(parser, PretrainConfig, argv, sizes_for)
    device = start(config)
    rank, world_size = processes()
    say = print if rank == 0 else lambda *args: None
    out = Path(config.out)

    say(f"Reading {', '.join(args.data or ['the embedded world'])}, and making tokens of it.")
    sides, digest, made, trained_on = read_text(config, args.data)
    tokenizer = make_tokenizer(config, sides["training"][0])
    try:
        sizes = (config.block_size, tokenizer.n_vocab, config.n_layer, config.n_head, config.n_embd, config.dropout)
        model = GPT(GPTConfig(*sizes)).to(device)
    except ValueError as error:
        raise InputError("command line", str(error), "change the sizes") from None
    if config.compile and model.embed.weight.is_cuda:
        for block in model.blocks:  # they are alike: what is compiled for the first serves them all
            block.compile()
    for side, (documents, n_characters) in sides.items():
        if not fills_a_row(documents, n_characters, tokenizer, config.block_size):
            what = f"its {side} part holds fewer tokens than a block of {config.block_size}"
            raise InputError(", ".join(args.data or ["the embedded world"]), what, "give more text or a smaller --block_size")
    text_sha256 = hashlib.sha256(f"{digest} {tokenizer.state()}".encode()).hexdigest()
    run = Run(config, "pretrain", {"text_sha256": text_sha256})
    paths = [out / "train.bin", out / "val.bin"]
    read = [] if made else [path for path, _ in sides["training"][0].files]
    refuse_overwriting(read, [*paths, *(path.with_suffix(".sha256") for path in paths), run.log, run.unfinished, out / "base.pt"])
    if rank == 0:  # from here on files are written
        for (documents, n_characters), path in zip(sides.values(), paths):
            write_tokens(documents, tokenizer, path, text_sha256, n_characters)
        if made:
            world.write(made, out / "world", text_sha256)
    if world_size > 1:
        dist.barrier()  # the others wait for the files
    tokens, val_tokens = (open_tokens(path, tokenizer) for path in paths)
    rows = Rows(tokens, config.block_size)
    order = shuffled(len(rows), config.batch_size, config.seed)
    seen = config.max_steps * config.batch_size * config.block_size
    if args.data:
        amount = f"{sum(n for _, n in sides.values()) / 1e6:.1f} million characters of text"
        say(f"{amount}: where no option says otherwise, the sizes of --preset {args.preset}. (A larger network would learn it by heart, a smaller one could not hold it.)")
    say(
        f"Pretraining on {device} in {str(precision(device)).removeprefix('torch.')}: {sum(p.numel() for p in model.parameters()):,} "
        f"parameters ({config.n_layer} layers, {config.n_embd} wide), {len(tokens):,} tokens of text, "
        f"each read about {seen / len(tokens):.1f} times."
    )

    def evaluate(model):
        nats, bits = compare.text_loss(model, val_tokens, tokenizer)
        return {"val_loss": nats, "val_bpb": bits}

    last = train(model, lambda step: rows.batch(order(step)), config, run, evaluate)
    if rank > 0:
        return
    path = out / "base.pt"
    compare.save(path, model, tokenizer, stage="base", trained_on=trained_on, seed=config.seed, text_sha256=text_sha256)
    run.forget()
    say(f"\nValidation: {last['val_loss']:.3f} nats per token, {last['val_bpb']:.3f} bits per byte. What it makes of a prompt:")
    compare.show_parrot(model, tokenizer, PROMPTS)
    next_command = "python sft.py" + (f" --out {out}" if config.out != "out" else "") + (" --data YOUR_CONVERSATIONS" if args.data else "")
    say(f"\nIt goes on with the text; it does not answer. The model is in {path} ({clock(time.perf_counter() - STARTED)}). Next: {next_command}")


if __name__ == "__main__":
    main()
    leave()
