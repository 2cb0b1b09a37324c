"""
Checks that take too long for the tests. Each prints its figures.

    python tests/long.py kills     # kill -9, 20 times in each stage at full size, and resume
    python tests/long.py corpus    # 1 MB to 1 GB of text: memory, startup time, tokens per second
    python tests/long.py memory    # 2,000 steps: memory doesn't grow
    python tests/long.py faults    # odd files, full disks, kills, power cuts, and what is kept
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
SAVING_OFTEN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import common.run, {{stage}}
common.run.SAVE_EVERY = 0
{{stage}}.main(sys.argv[1:])
"""


def final_weights(path):
    return torch.load(path, weights_only=True)["weights"]


def same_weights(a, b):
    """Whether two checkpoints have the same weights, bit for bit."""
    a, b = final_weights(a), final_weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def contents(folder):
    """{path: bytes} of all files but the locks."""
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock")]
    return {path: path.read_bytes() for path in paths}


def log_rows(path):
    """The rows of a log, without the times."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    times = ("seconds", "tokens_per_s")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def n_rows(log):
    return log.read_bytes().count(b"\n") if log.exists() else 0


def run_and_kill(stage, arguments, made, n_kills, seed):
    """Kill a stage n_kills times, resume it each time, and then let it finish.

    made: the checkpoint that the stage writes. The stage saves its state after every row of its
    log. Every third kill comes at a random moment of the first three seconds, when the process
    starts and reads the saved state. The others come after a few more rows, half of them while the
    state is being saved. Returns what the process was doing at each kill. Raises RuntimeError if
    the stage failed, or finished before all kills.
    """
    rng, happened, out = random.Random(seed), [], made.parent
    unfinished, log = out / f"{stage}.resume.pt", out / f"{stage}.jsonl"
    steps = int(arguments[arguments.index("--max_steps") + 1])
    goals = sorted(rng.sample(range(1, steps // 10 - 2), n_kills))  # rows of the log
    for i, goal in enumerate([*goals, None]):
        command = [sys.executable, "-c", SAVING_OFTEN.format(stage=stage), *arguments]
        command += ["--resume"] if unfinished.exists() else []
        saving = watch_saves(unfinished)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if goal is not None:
            early, until_saving = i % 3 == 2, i % 3 == 0
            patience = rng.uniform(0.0, 3.0) if early else 600.0
            deadline = time.perf_counter() + patience
            while process.poll() is None and time.perf_counter() < deadline:
                if n_rows(log) >= goal and (saving() or not until_saving):
                    break
                time.sleep(0.0005)
            if process.poll() is None:
                process.kill()
                process.communicate()
                other = "in the first seconds" if early else "training"
                happened.append("while saving" if saving() else other)
                continue
        errors = process.communicate()[1].decode()
        if process.returncode or goal is not None:
            raise RuntimeError(f"after {len(happened)} kills: {errors}")
    return happened


def watch_saves(path):
    """A function that tells whether a file is being written now."""
    stale = set(path.parent.glob(f"{path.name}.*.tmp"))  # left by earlier kills

    def saving():
        return bool(set(path.parent.glob(f"{path.name}.*.tmp")) - stale)

    return saving


def anonymous_memory(pid):
    """Bytes of memory that belong to one process and to no file (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def run_and_watch(arguments):
    """Run pretrain.py. Returns (most anonymous memory, in bytes; memory at each row; the log).

    It saves after every row of the log, or we would see the log only at the end.
    """
    out = Path(arguments[arguments.index("--out") + 1])
    log, most, at_row = out / "pretrain.jsonl", 0, {}
    log.unlink(missing_ok=True)
    command = [sys.executable, "-c", SAVING_OFTEN.format(stage="pretrain"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            now = anonymous_memory(process.pid)
        except (OSError, StopIteration):
            break
        most = max(most, now)
        at_row.setdefault(n_rows(log), now)
        time.sleep(0.01)
    if process.wait():
        raise RuntimeError(f"pretrain.py ended with {process.returncode}")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return most, at_row, rows


def kills(folder):
    import dpo
    import pretrain
    import sft

    for stage, main, name, n_steps in (
        ("pretrain", pretrain.main, "base.pt", 600),
        ("sft", sft.main, "sft.pt", 250),
        ("dpo", dpo.main, "dpo.pt", 250),
    ):
        whole, killed = folder / "a", folder / "b"
        arguments = ["--max_steps", str(n_steps)]
        if stage == "sft":
            arguments += ["--base", str(whole / "base.pt")]
        if stage == "dpo":
            arguments += ["--sft", str(whole / "sft.pt")]
        main([*arguments, "--out", str(whole)])
        arguments += ["--out", str(killed)]
        happened = run_and_kill(stage, arguments, killed / name, n_kills=20, seed=1)
        same = same_weights(whole / name, killed / name)
        same &= log_rows(whole / f"{stage}.jsonl") == log_rows(killed / f"{stage}.jsonl")
        counts = {kind: happened.count(kind) for kind in sorted(set(happened))}
        verdict = "the same as without kills" if same else "NOT the same as without kills"
        print(f"{stage}: {len(happened)} kills ({counts}); weights and log are {verdict}")


def some_text(path, size):
    """Write size bytes of text: 50,000 made-up words, some more frequent than others."""
    rng, letters = random.Random(0), "etaoinshrdlucmfwypvbgkjqxz"
    words = []
    for _ in range(50_000):
        length = rng.randint(1, 9)
        words.append("".join(rng.choices(letters, weights=range(26, 0, -1), k=length)))
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
            figures = f"{rate:,} tokens/s, at most {most / 1e9:.2f} GB of memory"
            print(f"{megabytes:5} MB, {what}: {start:6.1f} s to the first step, {figures}")


def memory(folder):
    some_text(folder / "text.txt", 10**6)
    sizes = "--n_layer 2 --n_embd 64 --block_size 64 --batch_size 8 --vocab_size 512".split()
    sizes += ["--max_steps", "2000", "--eval_every", "5000"]
    where = ["--data", str(folder / "text.txt"), "--out", str(folder / "out")]
    _, at_row, _ = run_and_watch([*where, *sizes])
    early, late = (
        next(now for row, now in sorted(at_row.items()) if row >= wanted) for wanted in (20, 199)
    )
    growth = f"{100 * (late / early - 1):+.1f}%"
    print(f"after 200 steps {early / 1e6:.1f} MB, after 1,990 {late / 1e6:.1f} MB: {growth}")


def faults(folder):
    from faults import campaign

    campaign(folder)


CHECKS = {"kills": kills, "corpus": corpus, "memory": memory, "faults": faults}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CHECKS:
        sys.exit(__doc__)
    sys.path.insert(0, str(ROOT))
    scratch = Path(tempfile.mkdtemp())
    try:
        CHECKS[sys.argv[1]](scratch)
    finally:
        shutil.rmtree(scratch)
