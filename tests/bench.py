"""
How fast. Each figure is a ratio of two things that are measured in turn, in one run, on one machine; medians.

    python tests/bench.py loss                        # the hand-written cross-entropy beside torch's, time and memory
    python tests/bench.py generate                    # with the cache beside recomputing; many prompts at once beside one by one
    python tests/bench.py tokens TEXT                 # encoding 100 MB beside tiktoken's own batches; learning merges
    python tests/bench.py talks CONVERSATIONS         # fine-tuning beside the straightforward way
    python tests/bench.py train NANOGPT               # training tokens/s beside nanoGPT's model, and the machine's rate
    python tests/bench.py shakespeare NANOGPT TEXT    # the time to nanoGPT's final loss, and where a default run ends

NANOGPT is a copy of github.com/karpathy/nanoGPT; TEXT its tiny shakespeare; CONVERSATIONS a file that sft.py reads.
"""

import importlib.util
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import Tokenizer  # noqa: E402
from data.text import read_json, write_tokens  # noqa: E402
from model import GPT, GPTConfig, cross_entropy  # noqa: E402
from pretrain import PretrainConfig, make_optimizers, precision, take_step  # noqa: E402
from sft import SFTConfig, batches_of_similar_length, dialogue_loss, encode, sft_data_collator  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(function):
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


def peak_memory(function):
    """How many bytes more a process of its own needs at most while it calls the function (not on Windows)."""
    read, write = os.pipe()
    if os.fork() == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function()
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(read, 100)) * (1 if sys.platform == "darwin" else 1024)


def loss():
    for N, V in ((4096, 1024), (2048, 50257)):
        logits = torch.randn(N, V, device=DEVICE, requires_grad=True)
        targets = torch.randint(V, (N,), device=DEVICE)

        def both_ways(function):
            logits.grad = None
            function(logits, targets).backward()

        ours, theirs = in_turn(lambda: both_ways(cross_entropy), lambda: both_ways(F.cross_entropy), 15)
        line = f"({N}, {V}): {1000 * ours:.1f} ms, torch's {1000 * theirs:.1f} ms, ratio {ours / theirs:.2f}"
        if DEVICE == "cpu":
            torch.set_num_threads(1)  # (a child of fork has one thread)
            logits.grad = None
            memory = [peak_memory(lambda: both_ways(function)) for function in (cross_entropy, F.cross_entropy)]
            torch.set_num_threads(os.cpu_count())
            line += f"; memory {memory[0] / 1e6:.0f} MB, torch's {memory[1] / 1e6:.0f} MB"
        print(line, flush=True)


@torch.inference_mode()
def recompute(model, prompt, n):
    """Generation without a cache, for comparison."""
    ids = torch.tensor([prompt], device=DEVICE)
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)


def generate():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=512, vocab_size=1024, n_layer=4, n_head=4, n_embd=192)).to(DEVICE).eval()
    cached, plain = in_turn(lambda: model.generate([[1]], 511, temperature=0), lambda: recompute(model, [1], 511), 3)
    print(f"one prompt, 511 tokens: {511 / cached:,.0f} tokens/s, recomputing {511 / plain:,.0f}, ratio {plain / cached:.1f}", flush=True)
    prompts = [torch.randint(1024, (8 + i,)).tolist() for i in range(64)]
    together, alone = in_turn(lambda: model.generate(prompts, 64, temperature=0), lambda: [model.generate([p], 64, temperature=0) for p in prompts], 3)
    n = 64 * len(prompts)
    print(f"64 prompts of 8 to 71 tokens: {n / together:,.0f} tokens/s, one by one {n / alone:,.0f}, ratio {alone / together:.1f}")


def tokens(path):
    text = Path(path).read_text(encoding="utf-8")
    text *= 100_000_000 // len(text.encode()) + 1
    start = time.perf_counter()
    tokenizer = Tokenizer.train([text], 1024)
    print(f"1,024 tokens learned from {len(text) / 1e6:.0f} million characters in {time.perf_counter() - start:.1f} s", flush=True)
    pieces = [text[i : i + 2**20] for i in range(0, len(text), 2**20)]
    with tempfile.TemporaryDirectory() as folder:
        calls = iter(range(1000))
        ours, theirs = in_turn(
            lambda: write_tokens([pieces], tokenizer, Path(folder) / "tokens.bin", str(next(calls)), len(text)),
            lambda: tokenizer.encoding.encode_ordinary_batch(pieces, num_threads=os.cpu_count()),
            3,
        )
    n = len(text) / 1e6
    print(f"encoded and written: {n / ours:.1f} million characters/s; encode_ordinary_batch {n / theirs:.1f}; ratio {theirs / ours:.2f}")


def talks(path):
    """An epoch over the conversations, from the same weights, in both ways."""
    examples = [example for _, example in read_json(path)]
    tokenizer = Tokenizer.train([json.dumps(example, ensure_ascii=False) for example in examples], 1024)
    examples = [example for example in examples if encode(example, tokenizer, 512)]
    held_out, examples = examples[: len(examples) // 10], examples[len(examples) // 10 :]
    lengths = [len(encode(example, tokenizer)[0]) for example in examples]
    steps = -(-len(examples) // 32)
    config = SFTConfig(max_steps=steps, lr=0.02, embed_lr=0.01)
    similar, order = batches_of_similar_length(lengths, 32, 1), np.random.default_rng(1).permutation(len(examples))

    def all_logits(model):
        """The straightforward way: a logit for every position and token, and most of them thrown away."""

        def forward(input_ids, labels):
            logits = model.head(model.hidden(input_ids)[:, :-1]).flatten(0, 1)
            targets = labels[:, 1:].flatten()
            counts = targets != -100
            return logits[: int(counts.sum())], F.cross_entropy(logits.float(), targets)

        forward.parameters = model.parameters
        return forward

    def fine_tune(chosen, wrap):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=512, vocab_size=tokenizer.n_vocab, n_layer=4, n_head=2, n_embd=128)).to(DEVICE)
        optimizers, padded, total = make_optimizers(model, config), 0, 0
        for step in range(steps):
            batch = sft_data_collator([examples[i] for i in chosen(step)], tokenizer, 512)
            padded, total = padded + int((batch["input_ids"] == tokenizer.pad).sum()), total + batch["input_ids"].numel()
            take_step(wrap(model), optimizers, batch, step, config, precision(DEVICE))
        return dialogue_loss(model, held_out, tokenizer), padded / total

    ways = {"ours": (similar, lambda model: model), "straightforward": (lambda step: order[32 * step : 32 * step + 32], all_logits)}
    results, times = {}, {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            times[name].append(seconds(lambda: results.update({name: fine_tune(*way)})))
    rates = {name: len(examples) / statistics.median(t) for name, t in times.items()}
    for name, (val_loss, padding) in results.items():
        print(f"{name}: {rates[name]:.1f} examples/s, {100 * padding:.1f}% padding, validation loss {val_loss:.3f}")
    print(f"ratio {rates['ours'] / rates['straightforward']:.2f}")


def nanogpt_model(folder):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def matrix_rate(dtype):
    """FLOP/s of products of square matrices, the best of some sizes."""
    best = 0.0
    for n in (512, 1024, 2048) if DEVICE == "cpu" else (4096, 8192):
        a = torch.randn(n, n, device=DEVICE, dtype=dtype)
        a @ a
        best = max(best, max(2 * n**3 / seconds(lambda: a @ a) for _ in range(10)))
    return best


def train(folder):
    B, T, V, layers, heads, width = 32, 128, 1024, 4, 4, 192
    torch.manual_seed(0)
    ids = torch.randint(V, (B, T + 1))
    batch = {"input_ids": ids[:, :T], "labels": ids[:, :T]}
    config, dtype = PretrainConfig(max_steps=1000), precision(DEVICE)
    ours = GPT(GPTConfig(T, V, layers, heads, width)).to(DEVICE)
    optimizers = make_optimizers(ours, config)
    module = nanogpt_model(folder)
    theirs = module.GPT(module.GPTConfig(block_size=T, vocab_size=V, n_layer=layers, n_head=heads, n_embd=width, dropout=0.0, bias=False)).to(DEVICE)
    adamw = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.99), DEVICE)

    def their_step():  # as its train.py does it
        with torch.autocast(DEVICE, dtype=dtype, enabled=DEVICE == "cuda" and dtype == torch.bfloat16):
            _, loss = theirs(ids[:, :T].contiguous().to(DEVICE), ids[:, 1:].contiguous().to(DEVICE))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    our_step = lambda: take_step(ours, optimizers, batch, 0, config, dtype)
    mine, its = in_turn(our_step, their_step, 25)
    print(f"{B * T / mine:,.0f} tokens/s, nanoGPT {B * T / its:,.0f}, ratio {its / mine:.2f}")
    flops = 6 * sum(p.numel() for p in ours.parameters() if p.dim() == 2) * B * T + 12 * layers * width * T * B * T
    rate = matrix_rate(dtype)
    print(f"{flops / mine / 1e9:.0f} GFLOP/s of the {rate / 1e9:.0f} of matrix products in {str(dtype)[6:]}: {100 * flops / mine / rate:.0f}%")


def shakespeare(folder, path):
    text = Path(path).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "nanoGPT"
        subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
        data, index = copy / "data" / "shakespeare_char", {c: i for i, c in enumerate(sorted(set(text)))}
        ids = np.array([index[c] for c in text], dtype=np.uint16)  # the split and the files of its prepare.py
        ids[: int(len(ids) * 0.9)].tofile(data / "train.bin")
        ids[int(len(ids) * 0.9) :].tofile(data / "val.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(index), "itos": dict(enumerate(index)), "stoi": index}))
        options = "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4"
        options += " --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
        run = [sys.executable, "train.py", "config/train_shakespeare_char.py", *options.split()]
        start = time.perf_counter()
        said = subprocess.run(run, cwd=copy, capture_output=True, encoding="utf-8", check=True).stdout
        their_seconds = time.perf_counter() - start
        print(f"nanoGPT: {their_seconds:.1f} s, {[line for line in said.splitlines() if 'val loss' in line][-1]}", flush=True)
        out = Path(scratch) / "out"
        start = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "pretrain.py"), "--data", str(path), "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
        our_seconds = time.perf_counter() - start
        for line in (out / "pretrain.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "val_bpb" in row:
                share = their_seconds / row["seconds"]
                print(f"ours: step {row['step']}, {row['seconds']:.1f} s (1/{share:.1f}): {row['val_bpb'] * np.log(2):.4f} nats per character")
        print(f"ours: {our_seconds:.1f} s in all")


if __name__ == "__main__":
    benchmarks = {f.__name__: f for f in (loss, generate, tokens, talks, train, shakespeare)}
    if len(sys.argv) < 2 or sys.argv[1] not in benchmarks:
        sys.exit(__doc__)
    benchmarks[sys.argv[1]](*sys.argv[2:])
