"""
Checks that take too long for the tests. Each prints its figures.

    python tests/long.py kills     # 20 times kill -9 for each stage, at full size: the weights are those of a run that was never killed
    python tests/long.py corpus    # a text of 1 GB: memory, time to start again, tokens/s beside a text of 1 MB
    python tests/long.py memory    # 2,000 steps: memory does not grow
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SAVING_OFTEN = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pretrain, {{stage}}; pretrain.SAVE_EVERY = 0; {{stage}}.main(sys.argv[1:])"


def final_weights(path):
    return torch.load(path, weights_only=True)["weights"]


def log_rows(path):
    """What a log holds, but for the times."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_s")} for row in rows]


def run_and_kill(stage, arguments, made, kills, seed):
    """Run a stage in a process that saves after every row of its log, kill it so often, go on with --resume, and let it end.

    made: the file that it writes when it is done. Every third kill comes at a random moment of the first three seconds, when the
    process starts and reads what was saved; the others when it has logged some more rows, half of these while a checkpoint is
    being written. Returns what was going on at each kill. Raises RuntimeError if the stage failed, or was done before all kills.
    """
    rng, happened, out = random.Random(seed), [], made.parent
    unfinished, log = out / f"{stage}.resume.pt", out / f"{stage}.jsonl"
    aside = unfinished.with_name(unfinished.name + ".tmp")
    n_rows = lambda: log.read_bytes().count(b"\n") if log.exists() else 0
    steps = int(arguments[arguments.index("--max_steps") + 1])
    goals = sorted(rng.sample(range(1, steps // 10 - 2), kills))  # rows of the log
    for i, goal in enumerate([*goals, None]):
        stale = aside.stat().st_mtime_ns if aside.exists() else None  # left by the last kill
        saving = lambda: aside.exists() and aside.stat().st_mtime_ns != stale
        run = [sys.executable, "-c", SAVING_OFTEN.format(stage=stage), *arguments, *(["--resume"] if unfinished.exists() else [])]
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if goal is not None:
            early, until_saving = i % 3 == 2, i % 3 == 0
            deadline = time.perf_counter() + (rng.uniform(0.0, 3.0) if early else 600.0)
            while process.poll() is None and time.perf_counter() < deadline and not (n_rows() >= goal and (not until_saving or saving())):
                time.sleep(0.0005)
            if process.poll() is None:
                process.kill()
                process.wait()
                happened.append("while saving" if saving() else "in the first seconds" if early else "training")
                continue
        errors = process.communicate()[1].decode()
        if process.returncode or goal is not None:
            raise RuntimeError(f"after {len(happened)} kills: {errors}")
    return happened


def anonymous_memory(pid):
    """Bytes of memory that belong to a process alone and are backed by no file (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def run_and_watch(arguments):
    """Run pretrain.py. Returns (most anonymous memory in bytes, memory at each row of its log, the log)."""
    out = Path(arguments[arguments.index("--out") + 1])
    log, most, at_row = out / "pretrain.jsonl", 0, {}
    log.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, str(ROOT / "pretrain.py"), *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            now = anonymous_memory(process.pid)
        except (OSError, StopIteration):
            break
        most = max(most, now)
        rows = log.read_bytes().count(b"\n") if log.exists() else 0
        at_row.setdefault(rows, now)
        time.sleep(0.01)
    if process.wait():
        raise RuntimeError(f"pretrain.py ended with {process.returncode}")
    return most, at_row, [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def kills(folder):
    import pretrain
    import sft

    for stage, main, name, n in (("pretrain", pretrain.main, "base.pt", 600), ("sft", sft.main, "sft.pt", 250)):
        arguments = ["--max_steps", str(n)] + (["--base", str(folder / "a" / "base.pt")] if stage == "sft" else [])
        main([*arguments, "--out", str(folder / "a")])
        happened = run_and_kill(stage, [*arguments, "--out", str(folder / "b")], folder / "b" / name, kills=20, seed=1)
        a, b = (final_weights(folder / x / name) for x in "ab")
        same = all(torch.equal(a[key], b[key]) for key in a) and log_rows(folder / "a" / f"{stage}.jsonl") == log_rows(folder / "b" / f"{stage}.jsonl")
        counts = {kind: happened.count(kind) for kind in sorted(set(happened))}
        print(f"{stage}: killed {len(happened)} times ({counts}); weights and log are {'the same' if same else 'NOT the same'}", flush=True)


def some_text(path, size):
    """A text of size bytes that nobody has written, of 50,000 words that are more or less frequent."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", weights=range(26, 0, -1), k=rng.randint(1, 9))) for _ in range(50_000)]
    weights = [1 / (i + 10) for i in range(len(words))]
    with open(path, "w", encoding="utf-8") as file:
        written = 0
        while written < size:
            sentences = " ".join(rng.choices(words, weights, k=100_000)).replace(" e ", ".\n")
            written += file.write(sentences[: size - written])


def corpus(folder):
    sizes = "--preset small --max_steps 60 --eval_every 1000".split()
    for megabytes in (1, 100, 1000):
        path, out = folder / f"{megabytes}.txt", folder / f"out{megabytes}"
        some_text(path, megabytes * 10**6)
        arguments = ["--data", str(path), "--out", str(out), *sizes]
        for what in ("first", "again"):
            most, _, log = run_and_watch(arguments)
            start = log[0]["seconds"] - log[0]["tokens"] / log[0]["tokens_per_s"]
            rate = sorted(row["tokens_per_s"] for row in log)[len(log) // 2]
            print(f"{megabytes:5} MB, {what}: {start:6.1f} s to the first step, {rate:,} tokens/s, at most {most / 1e9:.2f} GB of memory", flush=True)


def memory(folder):
    some_text(folder / "text.txt", 10**6)
    sizes = "--n_layer 2 --n_embd 64 --block_size 64 --batch_size 8 --vocab_size 512 --max_steps 2000 --eval_every 5000".split()
    _, at_row, _ = run_and_watch(["--data", str(folder / "text.txt"), "--out", str(folder / "out"), *sizes])
    early, late = (next(now for row, now in sorted(at_row.items()) if row >= n) for n in (20, 199))
    print(f"after 200 steps {early / 1e6:.1f} MB, after 1,990 {late / 1e6:.1f} MB: {100 * (late / early - 1):+.1f}%")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("kills", "corpus", "memory"):
        sys.exit(__doc__)
    sys.path.insert(0, str(ROOT))
    scratch = Path(tempfile.mkdtemp())
    try:
        {"kills": kills, "corpus": corpus, "memory": memory}[sys.argv[1]](scratch)
    finally:
        shutil.rmtree(scratch)
