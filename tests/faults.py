"""
The campaign of `python tests/long.py faults`: what can go wrong while the program runs.

Each function below yields one bool per fault: whether all was kept. That means: a file that was
whole stays whole, a run resumes to the same weights, and bad input gets one line.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import torch

import common.run
import compare
import dpo
import pretrain
import sft
from conftest import ROOT

MAINS = {"pretrain": pretrain.main, "sft": sft.main, "dpo": dpo.main, "compare": compare.main}
MADE = {"pretrain": "base.pt", "sft": "sft.pt", "dpo": "dpo.pt"}
SIZES = "--n_layer 2 --n_embd 32 --block_size 32 --vocab_size 290 --batch_size 8".split()
OFTEN = "import sys, common.run, {0}; common.run.SAVE_EVERY = 0; {0}.main(sys.argv[1:])"


class Bench:
    """A folder with a text, conversations, pairs, a model of each stage and an unfinished run."""

    def __init__(self, folder, seed=0):
        self.folder, self.rng = folder, random.Random(seed)
        text, talks, pairs = (folder / name for name in ("text.txt", "talks.jsonl", "pairs.jsonl"))
        text.write_text("Once there was a parrot that could not answer. " * 200, encoding="utf-8")
        said = [{"prompt": f"Say {i}.", "response": f"I say {i}{'!' * (i % 7)}"} for i in range(60)]
        better = [{"prompt": s["prompt"], "chosen": s["response"], "rejected": "?"} for s in said]
        for path, rows in ((talks, said), (pairs, better)):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.whole = folder / "whole"
        self.inputs = {
            "pretrain": ["--data", str(text), *SIZES],
            "sft": ["--data", str(talks), "--base", str(self.whole / "base.pt")],
            "dpo": ["--data", str(pairs), "--sft", str(self.whole / "sft.pt")],
        }
        for stage in MADE:
            assert self.run(stage, self.whole) == (0, "")
        self.n = 0

    def new(self):
        self.n += 1
        return self.folder / f"out{self.n}"

    def arguments(self, stage, out, *more):
        steps = [] if "--max_steps" in more else ["--max_steps", "60"]
        common_ones = ["--device", "cpu", "--out", str(out), *steps]
        return [*self.inputs[stage], *common_ones, *more]

    def run(self, stage, out, *more):
        """Run a stage in this process. Returns (exit code, what it said on stderr)."""
        return call(MAINS[stage], self.arguments(stage, out, *more))

    def start(self, stage, out, *more, **streams):
        """Start a stage that saves after each row of its log, as a process of its own."""
        command = [sys.executable, "-c", OFTEN.format(stage), *self.arguments(stage, out, *more)]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return subprocess.Popen(command, cwd=ROOT, **{**quiet, **streams})

    def ends_the_same(self, stage, out):
        """Whether a run resumes, or starts again if it saved nothing, to the same weights."""
        made = out / MADE[stage]
        if not made.exists() or (out / f"{stage}.resume.pt").exists():
            unfinished = (out / f"{stage}.resume.pt").exists()
            if self.run(stage, out, *["--resume"] * unfinished)[0]:
                return False
        return same_weights(made, self.whole / MADE[stage])


def call(main, arguments):
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main(arguments)
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:  # a traceback: what must never happen
            code = repr(error)
    return code, "" if code == 0 else said.getvalue()


def same_weights(a, b):
    a, b = (torch.load(path, weights_only=True)["weights"] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_line(code, said):
    """Whether a command worked, or refused its input in one line of a bearable length."""
    line = said.splitlines()[-1] if said else ""
    return code == 0 or (code == 2 and line.startswith("error: ") and len(line) < 1100)


def broken(content, rng):
    """A damaged copy of a file's bytes."""
    kind, at = rng.randrange(5), rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.randbytes(rng.randint(1, 9)) + content[at:]
    if kind == 2:
        return content[:at] + content[at + rng.randint(1, 99) :]
    if kind == 3:
        return content[:at] + b"\0" * rng.randint(1, 99) + content[at:]
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def odd_values(rng):
    values = [None, True, -1, 10**30, float("nan"), "", "x" * 10**6, [], {}, [[]], {"a": {}}]
    values += ["\u202e" + "abc", "\x00", 0.5, torch.zeros(3), torch.zeros(1).expand(10**6)]
    return rng.choice(values)


def edited(state, rng):
    """A copy of a nested state in which one value, anywhere, is an odd one, or is missing."""
    if isinstance(state, dict) and state and rng.random() < 0.8:
        key = rng.choice(list(state))
        if rng.random() < 0.15:
            return {k: v for k, v in state.items() if k != key}
        return {**state, key: edited(state[key], rng)}
    if isinstance(state, list) and state and rng.random() < 0.7:
        at = rng.randrange(len(state))
        return [*state[:at], edited(state[at], rng), *state[at + 1 :]]
    return odd_values(rng)


def inputs(bench):
    """Damaged and edited files of each kind, read by each command that reads such files."""
    rng, out = bench.rng, bench.new()
    shutil.copytree(bench.whole, out)
    for i in range(300):  # texts, conversations, pairs
        stage = rng.choice(list(MADE))
        _, path, *rest = bench.inputs[stage]
        with open(path, "rb") as file:
            content = file.read()
        odd = bench.folder / "odd"
        if i % 3 == 0 and stage != "pretrain":
            rows = [json.loads(line) for line in content.splitlines()]
            rows[5] = edited(rows[5], random.Random(i))
            lines = [json.dumps(row, default=str) for row in rows]
            odd.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        else:
            odd.write_bytes(broken(content, rng))
        options = ["--out", str(bench.new()), "--device", "cpu", "--max_steps", "1"]
        yield one_line(*call(MAINS[stage], ["--data", str(odd), *rest, *options]))
    for i in range(300):  # checkpoints
        name = rng.choice(list(MADE.values()))
        if i % 3 == 0:
            (out / name).write_bytes(broken((bench.whole / name).read_bytes(), rng))
        else:
            torch.save(edited(torch.load(bench.whole / name, weights_only=True), rng), out / name)
        yield one_line(*call(compare.main, ["--out", str(out), "--ask", "hi", "--length", "2"]))
        shutil.copy(bench.whole / name, out / name)
    for stage in MADE:  # unfinished runs
        out = bench.new()
        with (
            mock.patch.object(common.run, "SAVE_EVERY", 0),
            mock.patch.object(common.run, "save", side_effect=KeyboardInterrupt),
        ):
            bench.run(stage, out)
        path = out / f"{stage}.resume.pt"
        state, whole = torch.load(path, weights_only=True), path.read_bytes()
        for i in range(100):
            torch.save(edited(state, rng), path) if i % 4 else path.write_bytes(broken(whole, rng))
            before = path.read_bytes()
            code, said = bench.run(stage, out, "--resume")
            yield one_line(code, said) and (code == 0 or path.read_bytes() == before)
            path.write_bytes(whole)


def full_disks(bench):
    """A file can take no more than so many bytes. What was there before stays as it was."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for stage, made in MADE.items():
        out = bench.new()
        bench.run(stage, out)
        size, before = (out / made).stat().st_size, (out / made).read_bytes()
        for i in range(50):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * i // 50, unlimited[1]))
            try:
                code, said = bench.run(stage, out, "--lr", f"0.0{i}1")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            whole = (out / made).read_bytes() == before and not list(out.rglob("*.tmp"))
            yield whole and code == 2 and said.splitlines()[-1].startswith("error: ")


def kills(bench, how=(signal.SIGKILL,), n=12):
    """Signals at random moments, again and again until a run is finished."""
    for stage in MADE:
        out = bench.new()
        for i in range(n):
            unfinished = (out / f"{stage}.resume.pt").exists()
            process = bench.start(stage, out, *["--resume"] * unfinished)
            time.sleep(bench.rng.uniform(0.5, 3.5))
            process.send_signal(bench.rng.choice(how))
            process.wait()
            again = bench.folder / "again"
            shutil.rmtree(again, ignore_errors=True)
            if out.exists():
                shutil.copytree(out, again)
            yield bench.ends_the_same(stage, again)
            if i % 4 == 3:  # it may be finished by now
                out = bench.new()


def signals(bench):
    """Ctrl-C, a closed terminal, a polite request to end."""
    yield from kills(bench, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), n=10)


def power_cuts(bench):
    """At every rename: only what was flushed to the disk is left, with or without that rename."""
    real = os.replace
    for stage in MADE:
        moments, out = [], bench.new()

        def replace(source, target, out=out, moments=moments):
            before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p != source}
            moments.append(before)
            real(source, target)
            moments.append({**before, target: target.read_bytes()})

        with (
            mock.patch.object(os, "replace", replace),
            mock.patch.object(common.run, "SAVE_EVERY", 0),
        ):
            bench.run(stage, out)
        for moment in moments:
            after = bench.new()
            for path, content in moment.items():
                if path.suffix != ".tmp" and not path.name.startswith(".lock"):
                    copy = after / path.relative_to(out)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(content)
            yield bench.ends_the_same(stage, after)


def streams(bench):
    """Nobody reads the output, or it is full. Then Ctrl-C, which must save as ever."""
    for stage in MADE:
        for i in range(8):
            out, where = bench.new(), ("pipe", "full", "stderr", "none")[i % 4]
            opened = open("/dev/full", "w")
            given = {
                "pipe": dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
                "full": dict(stdout=opened, stderr=opened),
                "stderr": dict(stderr=opened),
                "none": dict(preexec_fn=lambda: os.close(1)),
            }[where]
            env = {**os.environ, "PYTHONUNBUFFERED": ""}
            process = bench.start(stage, out, "--max_steps", "100000", env=env, **given)
            unfinished = out / f"{stage}.resume.pt"
            while process.poll() is None and not unfinished.exists():
                time.sleep(0.01)
            if where == "pipe":
                process.stdout.close()
            before = unfinished.stat().st_mtime_ns if unfinished.exists() else 0
            process.send_signal(signal.SIGINT)
            process.wait()
            opened.close()
            yield unfinished.exists() and unfinished.stat().st_mtime_ns > before


def pairs(bench):
    """Two runs in one folder, started one after the other within a second: one of them runs."""
    for i in range(12):
        stage, out = list(MADE)[i % 3], bench.new()
        first = bench.start(stage, out, stderr=subprocess.PIPE)
        time.sleep(bench.rng.uniform(0, 1))
        second = bench.start(stage, out, stderr=subprocess.PIPE)
        said = [process.communicate()[1].decode() for process in (first, second)]
        codes = [first.returncode, second.returncode]
        told = all("another run writes here" in s for s, c in zip(said, codes, strict=True) if c)
        yield 0 in codes and set(codes) <= {0, 2} and told and bench.ends_the_same(stage, out)


KINDS = (inputs, full_disks, kills, power_cuts, signals, streams, pairs)


def campaign(folder, kinds=KINDS):
    """Print how many faults of each kind we tried, and after how many all was kept."""
    bench = Bench(folder)
    print("| | tried | kept |\n|---|---|---|")
    for kind in kinds:
        kept = list(kind(bench))
        print(f"| {kind.__name__.replace('_', ' ')} | {len(kept)} | {sum(kept)} |", flush=True)
