"""
How fast: our way beside plain PyTorch's, each pair measured in turn in one run; medians, as a table of ratios.

    python tests/bench.py                                 # everything, in a minute and a half to five on two cores
    python tests/bench.py training loss                   # some of it
    python tests/bench.py fine_tuning --base out/base.pt --data talks.jsonl  # from a base model, on conversations of your own

training     the network, the loss and Muon beside a GPT-2-like model with F.cross_entropy and AdamW in float32
fine_tuning  similar lengths together, supervised positions projected, beside random order and every position projected;
             without --base from a model that is pretrained for 200 steps, with --data on other conversations than the world's
loss         the hand-written cross-entropy beside F.cross_entropy, time and memory
generation   with the cache beside recomputing; many prompts at once beside one after the other
tokenizing   encoding text to a file beside tiktoken's own encode_ordinary_batch
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from compare import load  # noqa: E402
from data import Tokenizer, world  # noqa: E402
from data.machine import keep_freed_memory, pick_device, precision  # noqa: E402
from data.text import Rows, read_json, write_tokens  # noqa: E402
from model import GPT, IGNORE_INDEX, GPTConfig, cross_entropy  # noqa: E402
from pretrain import PretrainConfig, make_optimizers, shuffled, take_step  # noqa: E402
from sft import SFTConfig, batches_of_similar_length, dialogue_loss, encode, prepare_special_tokens, sft_data_collator  # noqa: E402

DEVICE = pick_device("auto")


def seconds(function):
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(DEVICE, lambda: None)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def in_turn(a, b, rounds):
    """The median seconds of two functions that are called in turn, after once each for warming up."""
    a(), b()
    times = [(seconds(a), seconds(b)) for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times)]


def show(what, ours, theirs, unit, higher_is_better):
    ratio = ours / theirs
    digits = 0 if max(ours, theirs) >= 100 else 1
    print(f"{what:44}{ours:>10,.{digits}f}{theirs:>10,.{digits}f}  {unit:22}{ratio:5.2f}{'' if higher_is_better else '  (less is better)'}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------


class GPT2(nn.Module):
    """What one would write with torch's own pieces: learned positions, LayerNorm, GELU, F.cross_entropy."""

    def __init__(self, config):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(config.block_size, config.n_embd)
        layer = lambda: nn.TransformerEncoderLayer(config.n_embd, config.n_head, 4 * config.n_embd, 0.0, F.gelu, batch_first=True, norm_first=True, bias=False)
        self.blocks = nn.ModuleList(layer() for _ in range(config.n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(config.n_embd, bias=False), nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(config.block_size), persistent=False)

    def forward(self, input_ids, labels):
        x = self.wte(input_ids) + self.wpe.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        logits = self.lm_head(self.ln_f(x[:, :-1]))
        return logits, F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def matrix_rate(dtype):
    """FLOP/s of products of square matrices, the best of some sizes."""
    best = 0.0
    for n in (512, 1024, 2048) if DEVICE == "cpu" else (4096, 8192):
        a = torch.randn(n, n, device=DEVICE, dtype=dtype)
        a @ a
        best = max(best, max(2 * n**3 / seconds(lambda: a @ a) for _ in range(10)))
    return best


def training():
    B, T = 32, 128
    shape, config, dtype = GPTConfig(T, 1024, n_layer=4, n_head=4, n_embd=192), PretrainConfig(max_steps=1000), precision(DEVICE)
    torch.manual_seed(0)
    ours, theirs = GPT(shape).to(DEVICE), GPT2(shape).to(DEVICE)
    optimizers, adamw = make_optimizers(ours, config), torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    ids = torch.randint(shape.vocab_size, (B, T))
    batch = {"input_ids": ids, "labels": ids}

    def their_step():
        _, loss = theirs(ids.to(DEVICE), ids.to(DEVICE))
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    mine, its = in_turn(lambda: take_step(ours, optimizers, batch, 0, config, dtype), their_step, 20)
    show("training, 4 layers, 192 wide, 32 x 128", B * T / mine, B * T / its, "tokens/s", True)
    flops = (6 * sum(p.numel() for p in ours.parameters()) + 12 * shape.n_layer * shape.n_embd * T) * B * T
    rate = matrix_rate(dtype)
    print(f"{'  of the rate of matrix products, ' + str(dtype)[6:]:44}{flops / mine / 1e9:>10,.0f}{rate / 1e9:>10,.0f}  {'GFLOP/s':22}{flops / mine / rate:5.2f}")


def brief_base():
    """A base model after 200 steps on the embedded world. Returns (model, tokenizer)."""
    texts, config = world.build(1)["corpus"], PretrainConfig(max_steps=200)
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    rows = Rows(np.array([token for text in texts for token in (*tokenizer.encode(text), tokenizer.endoftext)]), config.block_size)
    torch.manual_seed(0)
    model = GPT(GPTConfig(config.block_size, tokenizer.n_vocab, config.n_layer, config.n_head, config.n_embd)).to(DEVICE)
    optimizers, order = make_optimizers(model, config), shuffled(len(rows), config.batch_size, 0)
    for step in range(config.max_steps):
        take_step(model, optimizers, rows.batch(order(step)), step, config, precision(DEVICE))
    return model, tokenizer


def fine_tuning(path=None, base=None):
    """As many steps as sft.py takes, from one base model, in both ways."""
    base, tokenizer = load(base, DEVICE) if base else brief_base()
    examples = [example for _, example in read_json(path)] if path else world.build(1)["sft"]
    examples = [example for example in examples if encode(example, tokenizer, base.config.block_size)]
    held_out, examples = examples[: len(examples) // 10], examples[len(examples) // 10 :]
    lengths = [len(encode(example, tokenizer, base.config.block_size)[0]) for example in examples]
    config, per_epoch = SFTConfig(), -(-len(examples) // 32)
    at_random = lambda step: np.random.default_rng(step // per_epoch).permutation(len(examples))[32 * (step % per_epoch) :][:32]

    class AllLogits(GPT):
        """The straightforward way: logits for every position, most of which are not looked at."""

        def forward(self, input_ids, labels=None):
            if not self.training:
                return super().forward(input_ids, labels)
            targets = labels[:, 1:].flatten()
            logits = self.head(self.hidden(input_ids)[:, :-1]).flatten(0, 1)
            counted = logits[: int((targets != IGNORE_INDEX).sum())]  # (not those that count, but as many: backward() asks for no more)
            return counted, F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX)

    def fine_tune(network, chosen):
        torch.manual_seed(0)
        model = network(base.config).to(DEVICE)
        model.load_state_dict(base.state_dict())
        prepare_special_tokens(model, tokenizer)
        optimizers, seen, padded, total, spent = make_optimizers(model, config), 0, 0, 0, []

        def a_step(step):
            nonlocal seen, padded, total
            batch = sft_data_collator([examples[i] for i in chosen(step)], tokenizer, base.config.block_size)
            seen, total = seen + len(batch["input_ids"]), total + batch["input_ids"].numel()
            padded += int((batch["input_ids"] == tokenizer.pad).sum())
            take_step(model, optimizers, batch, step, config, precision(DEVICE))

        for step in range(config.max_steps):
            spent.append(seconds(lambda: a_step(step)))
            yield
        yield dialogue_loss(model, held_out, tokenizer), 100 * padded / total, seen / sum(spent)

    ours, theirs = fine_tune(GPT, batches_of_similar_length(lengths, 32, 1)), fine_tune(AllLogits, at_random)
    for mine, its in zip(ours, theirs):  # a step of one, a step of the other; at last the results
        pass
    show(f"fine-tuning, {len(examples):,} conversations, in 32s", mine[2], its[2], "examples/s", True)
    show("  padding", mine[1], its[1], "% of the tokens", False)
    print(f"{'  held-out loss after ' + str(config.max_steps) + ' steps':44}{mine[0]:>10.3f}{its[0]:>10.3f}  nats per token")


def loss_and_gradient(function, N, V, dtype, times=1):
    torch.manual_seed(0)
    logits, targets = torch.randn(N, V, device=DEVICE, dtype=dtype, requires_grad=True), torch.randint(V, (N,), device=DEVICE)

    def both():
        for _ in range(times):
            with torch.autocast(torch.device(DEVICE).type, dtype, enabled=dtype == torch.bfloat16):  # (F.cross_entropy then works in float32, as ours does)
                loss = function(logits, targets)
            torch.autograd.grad(loss, logits)

    return both


def peak_memory(name, *logits):
    """How many MB more are needed at most for one loss and gradient. Runs in a process of its own."""
    both = loss_and_gradient({"ours": cross_entropy, "torch's": F.cross_entropy}[name], *logits)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak that importing torch made
    before = peak()
    both()
    return (peak() - before) / 1e3


def peak():
    """The most memory that this process ever held, in kB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])


def loss():
    for dtype, (N, V) in itertools.product(dict.fromkeys((torch.float32, precision(DEVICE))), ((4096, 1024), (2048, 50257))):
        times, rounds = (10, 20) if V < 9999 else (1, 9)  # small ones ten in a row: a single one would begin with the processor's cache full of what the other worked on
        ours, theirs = in_turn(*(loss_and_gradient(function, N, V, dtype, times) for function in (cross_entropy, F.cross_entropy)), rounds)
        show(f"loss and gradient, ({N}, {V}), {str(dtype)[6:]}", 1000 * ours / times, 1000 * theirs / times, "ms", False)
        if DEVICE == "mps" or (DEVICE == "cpu" and sys.platform != "linux"):
            continue  # (nothing there tells the peak)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            show("  memory", *(pool.apply(peak_memory, (name, N, V, dtype)) for name in ("ours", "torch's")), "MB", False)


@torch.inference_mode()
def recompute(model, prompt, n):
    """Generation without a cache, for comparison."""
    ids = torch.tensor([prompt], device=DEVICE)
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)


def generation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=512, vocab_size=1024, n_layer=4, n_head=4, n_embd=192)).to(DEVICE).eval()
    cached, plain = in_turn(lambda: model.generate([[1]], 511, temperature=0), lambda: recompute(model, [1], 511), 3)
    show("generating 511 tokens, with a cache", 511 / cached, 511 / plain, "tokens/s", True)
    prompts = [torch.randint(1024, (8 + i,)).tolist() for i in range(64)]
    one_by_one = lambda: [model.generate([prompt], 64, temperature=0) for prompt in prompts]
    together, alone = in_turn(lambda: model.generate(prompts, 64, temperature=0), one_by_one, 3)
    show("64 prompts of 8 to 71 tokens, at once", 64 * 64 / together, 64 * 64 / alone, "tokens/s", True)


def tokenizing(path=None):
    text = Path(path).read_text(encoding="utf-8") if path else "\n\n".join(world.build(1)["corpus"])
    text *= 20_000_000 // len(text) + 1
    start = time.perf_counter()
    tokenizer = Tokenizer.train([text], 1024)
    print(f"{'learning 1,024 tokens':44}{time.perf_counter() - start:>10.1f}{'':>10}  s", flush=True)
    pieces = [text[i : i + 2**20] for i in range(0, len(text), 2**20)]
    with tempfile.TemporaryDirectory() as folder:
        calls = iter(range(1000))
        ours, theirs = in_turn(
            lambda: write_tokens([pieces], tokenizer, Path(folder) / "tokens.bin", str(next(calls)), len(text)),
            lambda: tokenizer.encoding.encode_ordinary_batch(pieces, num_threads=os.cpu_count()),
            3,
        )
    show("encoding text to a file", len(text) / 1e6 / ours, len(text) / 1e6 / theirs, "million characters/s", True)


def main():
    benchmarks = {f.__name__: f for f in (training, fine_tuning, loss, generation, tokenizing)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*benchmarks, []], help="all of it, if none is named")
    parser.add_argument("--data", help="for fine_tuning: conversations that sft.py reads; for tokenizing: a text")
    parser.add_argument("--base", help="for fine_tuning: a checkpoint of pretrain.py")
    args = parser.parse_args()
    keep_freed_memory()  # as the programs do: for both sides
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else processor()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}\n")
    print(f"{'':44}{'ours':>10}{'plain':>10}  {'':22}ratio")
    options = {"fine_tuning": [args.data, args.base], "tokenizing": [args.data]}
    for name in args.what or benchmarks:
        benchmarks[name](*options.get(name, []))


def processor():
    """Its name, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
