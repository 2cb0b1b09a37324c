"""
The campaign of `python tests/long.py faults`: what can go wrong while the program runs.

Each function in KINDS yields one bool per fault: whether all was kept. That means: a file that was
whole stays whole, a run resumes from where it was saved to the same weights and the same log, and
bad input gets one line.
"""

import contextlib
import copy
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import stat
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
from data import world
from long import contents, log_rows, same_weights

MAINS = {"pretrain": pretrain.main, "sft": sft.main, "dpo": dpo.main, "compare": compare.main}
MADE = {"pretrain": "base.pt", "sft": "sft.pt", "dpo": "dpo.pt"}
SIZES = "--n_layer 2 --n_embd 32 --block_size 32 --vocab_size 290 --batch_size 8".split()
OFTEN = """  # saves after each row of the log
import sys, common.run, {0}
common.run.SAVE_EVERY = 0
{0}.main(sys.argv[1:])
"""
ONCE = """  # saves after its first row, and then only after Ctrl-C
import sys, common.run, {0}
common.run.SAVE_EVERY, save = 0, common.run.Run.save
def once(run):
    save(run)
    common.run.SAVE_EVERY = 1000
common.run.Run.save = once
{0}.main(sys.argv[1:])
"""


class Bench:
    """A folder with a text, conversations, pairs, a model of each stage and an unfinished run."""

    def __init__(self, folder, seed=0):
        torch.set_num_threads(1)  # as conftest.py sets it for the processes that we start
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
        self.n = 0
        for stage in MADE:
            assert self.run(stage, self.whole)[0] == 0

    def with_world(self):
        """The same for a pretraining run that reads a small embedded world."""
        other = copy.copy(self)
        other.inputs, other.whole = {"pretrain": SIZES}, self.folder / "whole world"
        other.folder = self.folder / "with world"
        assert other.run("pretrain", other.whole)[0] == 0
        return other

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

    def interrupt(self, stage, out, *more):
        """Leave an unfinished run of 50 steps."""
        with (
            mock.patch.object(common.run, "SAVE_EVERY", 0),
            mock.patch.object(common.run, "save", side_effect=KeyboardInterrupt),
        ):
            self.run(stage, out, *more)

    def start(self, code, stage, out, *more, **streams):
        """Start a stage as a process of its own. code: OFTEN or ONCE."""
        command = [sys.executable, "-c", code.format(stage), *self.arguments(stage, out, *more)]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return subprocess.Popen(command, cwd=ROOT, **{**quiet, **streams})

    def until_saved(self, process, unfinished):
        """Wait until a process has saved its state, or has ended. Returns the time of the save."""
        before = saved_at(unfinished)
        while process.poll() is None and saved_at(unfinished) == before:
            time.sleep(0.001)
        return saved_at(unfinished)

    def ends_the_same(self, stage, out, step=0):
        """Whether a run resumes from this step or later, and ends like one without faults.

        step: the last one that was saved. At 0, it may start again.
        """
        made, unfinished = out / MADE[stage], out / f"{stage}.resume.pt"
        if not made.exists() or unfinished.exists():
            if step and saved_step(unfinished) < step:
                return False
            if self.run(stage, out, *["--resume"] * unfinished.exists())[0]:
                return False
        return same(stage, out, self.whole)


def saved_at(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def saved_step(path):
    """The step of an unfinished run, or 0 if there is none."""
    return torch.load(path, weights_only=True)["rows"][-1]["step"] if path.exists() else 0


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


def same(stage, a, b):
    """Whether two folders have the same model, the same log and the same world."""
    logs = [log_rows(folder / f"{stage}.jsonl") for folder in (a, b)]
    worlds = [list(contents(folder / "world").values()) for folder in (a, b)]
    model = same_weights(a / MADE[stage], b / MADE[stage])
    return model and logs[0] == logs[1] and worlds[0] == worlds[1]


def one_line(code, said):
    """Whether a command worked, or refused its input in one line of a bearable length."""
    good = said.startswith("error: ") and said.count("\n") == 1 and len(said) < 1100
    return code == 0 or (code == 2 and good)


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
        bench.interrupt(stage, out)
        path = out / f"{stage}.resume.pt"
        state, whole = torch.load(path, weights_only=True), path.read_bytes()
        for i in range(100):
            torch.save(edited(state, rng), path) if i % 4 else path.write_bytes(broken(whole, rng))
            before = path.read_bytes()
            code, said = bench.run(stage, out, "--resume")
            if code == 0:  # then nothing but a number in its log was another one
                kept = same_weights(out / MADE[stage], bench.whole / MADE[stage])
            else:
                kept = path.read_bytes() == before
            yield one_line(code, said) and kept
            path.write_bytes(whole)


def full_disks(bench):
    """A file can take no more than so many bytes. What was there before stays as it was.

    It is too small for a run's state, or for its model. An older model and an unfinished run are
    there.
    """
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for stage, made in MADE.items():
        out = bench.new()
        bench.run(stage, out, "--seed", "2")
        bench.interrupt(stage, out)
        before = contents(out)
        for i in range(130):
            full = out / (made if i % 2 else f"{stage}.resume.pt")
            size = len(before[full]) * i // 130
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
            try:
                with mock.patch.object(common.run, "SAVE_EVERY", 1000 * (i % 2)):
                    code, said = bench.run(stage, out, "--lr", f"0.0{i:03}1")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            yield code == 2 and one_line(code, said) and contents(out) == before


def kills(bench, how=(signal.SIGKILL,), n=12, code=OFTEN):
    """Signals at random moments: a quarter while a run starts, the others while it trains."""
    for stage in MADE:
        tried, out = 0, bench.new()
        while tried < n:
            unfinished, sent = out / f"{stage}.resume.pt", bench.rng.choice(how)
            process = bench.start(code, stage, out, *["--resume"] * unfinished.exists())
            starting = tried % 4 == 0
            if starting:
                time.sleep(bench.rng.uniform(0, 3))
            else:
                bench.until_saved(process, unfinished)
                time.sleep(bench.rng.uniform(0, 0.05))
            step = saved_step(unfinished)
            process.send_signal(sent)
            ended = process.wait()
            if ended == 0:  # it had finished
                out = bench.new()
                continue
            must_save = sent == signal.SIGINT and not starting and not (out / MADE[stage]).exists()
            right = ended in ((130, -sent) if sent == signal.SIGINT else (-sent,))
            right &= not must_save or saved_step(unfinished) > step
            again = bench.new()
            if out.exists():
                shutil.copytree(out, again)
            tried += 1
            yield right and bench.ends_the_same(stage, again, step)


def signals(bench):
    """Ctrl-C, a closed terminal, a polite request to end."""
    yield from kills(bench, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), 12, ONCE)


def power_cuts(bench):
    """At every rename: only what was flushed to the disk is left, with or without that rename.

    An older model is there, and it must not be lost.
    """
    with (
        mock.patch.object(world, "ROUNDS", 1),
        mock.patch.object(world, "build", functools.cache(world.build)),
    ):
        for run in (bench, bench.with_world()):
            for stage in run.inputs:
                yield from power_cuts_of(run, stage)


def power_cuts_of(bench, stage):
    out = bench.new()
    bench.run(stage, out, "--seed", "2")
    old, n_old = (out / MADE[stage]).read_bytes(), len(contents(out))
    on_disk, flushed, moments = contents(out), {}, []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(opened):
        real_fsync(opened)
        if stat.S_ISREG(os.fstat(opened).st_mode):
            with open(f"/proc/self/fd/{opened}", "rb") as file:
                flushed[os.fstat(opened).st_ino] = file.read()

    def replace(source, target):
        moments.append(dict(on_disk))
        on_disk[target] = on_disk.pop(source, b"")  # empty, unless it was flushed
        on_disk[target] = flushed.pop(os.stat(source).st_ino, on_disk[target])
        moments.append(dict(on_disk))
        real_replace(source, target)

    with (
        mock.patch.object(os, "fsync", fsync),
        mock.patch.object(os, "replace", replace),
        mock.patch.object(common.run, "SAVE_EVERY", 0),
    ):
        bench.run(stage, out)
    assert len(moments) > 20 and len(moments[-1]) > n_old
    for moment in moments:
        after = bench.new()
        for path, content in moment.items():
            (after / path.relative_to(out)).parent.mkdir(parents=True, exist_ok=True)
            (after / path.relative_to(out)).write_bytes(content)
        unfinished, made = after / f"{stage}.resume.pt", after / MADE[stage]
        models = [path.read_bytes() for path in after.glob("*.pt")]
        untouched = made.exists() and made.read_bytes() == old and not unfinished.exists()
        yield old in models and (untouched or bench.ends_the_same(stage, after))


def streams(bench):
    """Nobody reads the output, or it is full or closed. Then Ctrl-C, which must save as ever."""
    cases = 2 * ("pipe", "full", "full stderr", "no stdout", "no stderr", "neither")
    for stage in MADE:
        for where in cases:
            out, opened = bench.new(), open("/dev/full", "w")
            given = {
                "pipe": dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
                "full": dict(stdout=opened, stderr=opened),
                "full stderr": dict(stderr=opened),
                "no stdout": dict(preexec_fn=lambda: os.close(1)),
                "no stderr": dict(preexec_fn=lambda: os.close(2)),
                "neither": dict(preexec_fn=lambda: os.closerange(1, 3)),
            }[where]
            env = {**os.environ, "PYTHONUNBUFFERED": ""}
            process = bench.start(ONCE, stage, out, "--max_steps", "100000", env=env, **given)
            unfinished = out / f"{stage}.resume.pt"
            before = bench.until_saved(process, unfinished)
            if where == "pipe":
                process.stdout.close()
            process.send_signal(signal.SIGINT)
            ended = process.wait()
            opened.close()
            yield ended in (1, 2, 130) and saved_at(unfinished) > before > 0


def pairs(bench):
    """Two runs in one folder, started within half a second: one runs, the other says why not."""
    longer = ("--max_steps", "300")
    for stage in MADE:
        whole = bench.new()
        bench.run(stage, whole, *longer)
        for _ in range(4):
            out, both = bench.new(), []
            for _ in range(2):
                both.append(bench.start(OFTEN, stage, out, *longer, stderr=subprocess.PIPE))
                time.sleep(bench.rng.uniform(0, 0.5))
            said = {process.communicate()[1].decode(): process.returncode for process in both}
            refused = [text for text, code in said.items() if code == 2]
            told = len(refused) == 1 and "another run writes here (process " in refused[0]
            yield told and 0 in said.values() and same(stage, out, whole)


KINDS = (inputs, full_disks, kills, power_cuts, signals, streams, pairs)


def campaign(folder, kinds=KINDS):
    """Print how many faults of each kind we tried, and after how many all was kept."""
    bench, lost = Bench(folder), []
    print("| | tried | kept |\n|---|---|---|")
    for kind in kinds:
        name, kept = kind.__name__.replace("_", " "), list(kind(bench))
        lost += [f"{name}, number {i}" for i, right in enumerate(kept) if not right]
        print(f"| {name} | {len(kept)} | {sum(kept)} |", flush=True)
    if lost:
        sys.exit(f"Not kept: {'; '.join(lost)}")
