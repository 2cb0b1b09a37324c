"""Two processes under torchrun train as one does: the same gradients, loss, files and exit code.

Everything here is computed in float32. In bfloat16, sums in another order would differ too much.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import dpo
import pretrain
import sft
from conftest import ROOT
from long import final_weights, log_rows
from model import GPT, GPTConfig
from one_step import close, gradients, one_step

TOKENS = 300
TEXT = "Once upon a time there was a parrot that could not answer a question. " * 60
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# Saved as sitecustomize.py, this runs whenever Python starts.
AT_START = """
import atexit, os, sys, torch
torch.cpu._is_avx512_bf16_supported = lambda: False
if "SAVE_OFTEN" in os.environ:  # the project's folder
    sys.path.insert(0, os.environ["SAVE_OFTEN"])
    import common.run
    common.run.SAVE_EVERY = 0
if "RANK" in os.environ:
    atexit.register(print, "An interpreter has shut down.")
"""


# Gradients


def make_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=TOKENS, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def make_batches():
    """Batches of either stage, and odd ones. Some responses are long, and some are short."""
    torch.manual_seed(1)
    ids = torch.randint(TOKENS, (32, 64))
    talks = ids.clone()
    for row in range(32):
        start = int(torch.randint(1, 30, ()))
        talks[row, :start] = -100
        talks[row, start + int(torch.randint(1, 34, ())) :] = -100
    one_sided = talks.clone()
    one_sided[1::2] = -100
    return {
        "pretraining": {"input_ids": ids, "labels": ids},
        "conversations": {"input_ids": ids, "labels": talks},
        "one process without labels": {"input_ids": ids, "labels": one_sided},
        "an odd number of rows": {"input_ids": ids[:11], "labels": talks[:11]},
        "one row": {"input_ids": ids[:1], "labels": talks[:1]},
        "nothing to supervise": {"input_ids": ids, "labels": torch.full_like(ids, -100)},
    }


def one_of_two(rank, folder):
    """What each process does. It writes down its gradients; only the first knows the loss."""
    torch.set_num_threads(1)
    meet = (folder / "meet").as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    model, results = make_model(), {}
    for name, batch in make_batches().items():
        for micro_batch_size in (0, 5):
            results[name, micro_batch_size] = one_step(model, batch, folder, micro_batch_size)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()  # wait until both have saved
    dist.destroy_process_group()


def test_gradients_are_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = make_model()
    for name, batch in make_batches().items():
        loss, expected = model(**batch)[1].item(), gradients(model, batch)
        for micro_batch_size in (0, 5):
            found_loss, found = first[name, micro_batch_size]
            assert found_loss == pytest.approx(loss, rel=1e-5), name
            assert close(found, expected), (name, micro_batch_size)
            _, same = second[name, micro_batch_size]
            assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True)), name


# The whole programs


@pytest.fixture
def environment(tmp_path):
    """The environment variables for a Python that computes in float32."""
    folder = tmp_path / "at start"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(AT_START, encoding="utf-8")
    return {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(folder)}


@pytest.fixture
def torchrun(environment):
    """A function that runs a program in two processes and returns what they print."""

    def run(program, *arguments):
        command = [*TORCHRUN, str(ROOT / program), *arguments]
        output = dict(capture_output=True, encoding="utf-8")
        done = subprocess.run(command, env=environment, timeout=300, **output)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return [
        "--data",
        str(path),
        *"--n_layer 2 --n_embd 32 --block_size 32 --vocab_size 290".split(),
    ]


def test_two_processes_end_with_exit_code_0(torchrun, text, tmp_path):
    """They end before Python takes itself apart, which could abort them: see leave()."""
    options = [*text, "--max_steps", "10", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert "An interpreter has shut down." not in torchrun("pretrain.py", *options)
    assert (tmp_path / "out" / "base.pt").exists()


def test_all_stages_on_two_processes(torchrun, text, tmp_path, monkeypatch):
    """The loss stays within a thousandth of a nat of one process's over 50 steps.

    Batches that don't divide evenly lose nothing, and only one process writes.
    """
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    talks = [{"prompt": f"Say {i}.", "response": f"I say {i}" + "!" * (i % 7)} for i in range(33)]
    (tmp_path / "talks.json").write_text(json.dumps(talks), encoding="utf-8")
    pairs = [{"prompt": t["prompt"], "chosen": t["response"], "rejected": "?"} for t in talks]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    one, two = tmp_path / "one", tmp_path / "two"
    common = "--max_steps 50 --eval_every 20 --device cpu".split()
    base = [*text, "--dropout", "0", *common, "--batch_size", "5"]
    tuned = ["--data", str(tmp_path / "talks.json"), "--base", str(one / "base.pt"), *common]
    tuned += ["--batch_size", "4"]  # 30 to train on: 7 batches of 4, and one of 2
    pretrain.main([*base, "--out", str(one)])
    sft.main([*tuned, "--out", str(one)])
    chosen = ["--data", str(tmp_path / "pairs.json"), "--sft", str(one / "sft.pt"), *common]
    chosen += ["--batch_size", "4"]
    dpo.main([*chosen, "--out", str(one)])
    said = torchrun("pretrain.py", *base, "--out", str(two))
    assert said.count("Pretraining on cpu") == said.count("Held-out loss:") == 1
    assert torchrun("sft.py", *tuned, "--out", str(two)).count("BASE") == 1
    assert torchrun("dpo.py", *chosen, "--out", str(two)).count("Next: ") == 1

    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for stage in ("pretrain", "sft", "dpo"):
        logs = log_rows(one / f"{stage}.jsonl"), log_rows(two / f"{stage}.jsonl")
        assert len(logs[0]) == 5
        for row, other in zip(*logs, strict=True):
            assert all(row[key] == other[key] for key in ("step", "tokens", "lr"))
            assert other == pytest.approx(row, abs=1e-3)
    a, b = final_weights(one / "base.pt"), final_weights(two / "base.pt")
    a, b = ({key: p.double() for key, p in w.items()} for w in (a, b))  # one of them is int64
    assert all((a[key] - b[key]).norm() < 0.05 * a[key].norm() for key in a)


def test_ctrl_c_and_resume_with_two_processes(torchrun, environment, text, tmp_path):
    options = [*text, *"--dropout 0.1 --max_steps 300 --device cpu".split()]
    a, b = tmp_path / "a", tmp_path / "b"
    torchrun("pretrain.py", *options, "--out", str(a))

    command = [*TORCHRUN, str(ROOT / "pretrain.py"), *options, "--out", str(b)]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
    environment = {**environment, "SAVE_OFTEN": str(ROOT)}
    process = subprocess.Popen(command, env=environment, **output)
    try:
        wait_for_a_row(b / "pretrain.jsonl", process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "Add --resume to the command to continue." in said
    assert not (b / "base.pt").exists()

    torchrun("pretrain.py", *options, "--out", str(b), "--resume")
    weights, resumed = final_weights(a / "base.pt"), final_weights(b / "base.pt")
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    assert log_rows(a / "pretrain.jsonl") == log_rows(b / "pretrain.jsonl")


def wait_for_a_row(log, process):
    """Wait until the process has written to its log, or has ended."""
    deadline = time.perf_counter() + 120
    while process.poll() is None and time.perf_counter() < deadline:
        if log.exists() and log.read_bytes():
            break
        time.sleep(0.01)
