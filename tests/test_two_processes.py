"""Two processes under torchrun train as one does: the same gradients, the same loss, nothing lost, one that writes."""

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
from torch.nn.parallel import DistributedDataParallel

import pretrain
import sft
from conftest import ROOT
from data.machine import leave, precision
from long import final_weights, log_rows
from model import GPT, GPTConfig
from pretrain import PretrainConfig, backward

TOKENS = 300


def make_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=TOKENS, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def make_batches():
    """Batches of either stage: all tokens count, or those of responses of very different lengths; and odd ones."""
    torch.manual_seed(1)
    ids = torch.randint(TOKENS, (32, 64))
    talks = ids.clone()
    for row in range(32):
        start = int(torch.randint(1, 30, ()))
        talks[row, :start] = -100
        talks[row, start + int(torch.randint(1, 34, ())) :] = -100
    one_sided = talks.clone()
    one_sided[1::2] = -100  # the second process has nothing to supervise
    return {
        "pretraining": {"input_ids": ids, "labels": ids},
        "conversations": {"input_ids": ids, "labels": talks},
        "one process without labels": {"input_ids": ids, "labels": one_sided},
        "an odd number of rows": {"input_ids": ids[:11], "labels": talks[:11]},
        "one row": {"input_ids": ids[:1], "labels": talks[:1]},
        "nothing to supervise": {"input_ids": ids, "labels": torch.full_like(ids, -100)},
    }


def gradients(network, model, batch, micro_batch_size):
    model.zero_grad()
    config = PretrainConfig(micro_batch_size=micro_batch_size)
    part = backward(network, batch, config, torch.float32)
    return part, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def one_of_two(rank, folder):
    """What each process does; the first writes down what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = make_model()
    network, results = DistributedDataParallel(model), {}
    for name, batch in make_batches().items():
        for micro_batch_size in (0, 5):
            loss, grads = gradients(network, model, batch, micro_batch_size)
            dist.all_reduce(loss)
            results[f"{name} {micro_batch_size}"] = [loss, *grads]
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    leave()


def test_gradients_are_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    results, model = torch.load(tmp_path / "results.pt"), make_model()
    for name, batch in make_batches().items():
        loss, expected = gradients(model, model, batch, 0)
        for micro_batch_size in (0, 5):
            part, *grads = results[f"{name} {micro_batch_size}"]
            torch.testing.assert_close(part, loss, rtol=1e-5, atol=0)
            assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(grads, expected)), (name, micro_batch_size)


def torchrun(program, arguments, folder):
    """On two processes. (The port is chosen by torchrun.) Each must leave before its interpreter is taken apart, see leave()."""
    watch = 'import atexit, os\nif "RANK" in os.environ: atexit.register(print, "taken apart")\n'
    (folder / "sitecustomize.py").write_text(watch, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / program), *arguments]
    done = subprocess.run(run, capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(folder)}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "taken apart" not in done.stdout
    return done.stdout


IN_FLOAT32 = pytest.mark.skipif(precision("cpu") != torch.float32, reason="in bfloat16, sums in another order differ by more")


@IN_FLOAT32
def test_both_stages_on_two_processes(tmp_path):
    """Within a thousandth of a nat of one process over 50 steps; a tail that does not divide evenly loses nothing; one process writes."""
    (tmp_path / "text.txt").write_text("Once upon a time there was a parrot that could not answer a question. " * 60, encoding="utf-8")
    talks = [{"prompt": f"Say {i}.", "response": f"I say {i}" + "!" * (i % 7)} for i in range(33)]  # 30 to train on: 7 batches of 4, and 2
    (tmp_path / "talks.json").write_text(json.dumps(talks), encoding="utf-8")
    sizes = "--n_layer 2 --n_embd 32 --block_size 32 --vocab_size 290 --dropout 0".split()  # (each process would draw its own)
    common = "--max_steps 50 --eval_every 20 --device cpu".split()
    one, two = tmp_path / "one", tmp_path / "two"
    base = ["--data", str(tmp_path / "text.txt"), *sizes, *common, "--batch_size", "5"]
    tuned = ["--data", str(tmp_path / "talks.json"), "--base", str(one / "base.pt"), *common, "--batch_size", "4"]
    pretrain.main([*base, "--out", str(one)])
    sft.main([*tuned, "--out", str(one)])
    said = torchrun("pretrain.py", [*base, "--out", str(two)], tmp_path)
    assert said.count("Pretraining on cpu") == 1 and said.count("What it makes of a prompt") == 1
    assert torchrun("sft.py", [*tuned, "--out", str(two)], tmp_path).count("BASE") == 1
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for stage in ("pretrain", "sft"):
        a, b = log_rows(one / f"{stage}.jsonl"), log_rows(two / f"{stage}.jsonl")
        assert len(a) == len(b) == 5
        for row, other in zip(a, b):
            assert row["step"] == other["step"] and row["tokens"] == other["tokens"] and row["lr"] == other["lr"]
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-3) and row.get("val_loss") == pytest.approx(other.get("val_loss"), abs=1e-3)
    a, b = final_weights(one / "base.pt"), final_weights(two / "base.pt")
    assert all((a[key] - b[key]).norm() < 0.05 * a[key].norm() for key in a)


def test_a_process_of_several_leaves_before_the_interpreter_is_taken_apart(tmp_path):
    """Where the threads of the exchange could still be at work. What it has printed is not lost; a process alone ends as ever."""
    code = """
import atexit, sys, torch.distributed as dist
from data.machine import leave
atexit.register(print, "taken apart")
if len(sys.argv) > 1:
    dist.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)
print("done")
leave()"""
    said = lambda *where: subprocess.run([sys.executable, "-c", code, *where], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout.split("\n")
    assert said((tmp_path / "meet").as_uri()) == ["done", ""]
    assert said() == ["done", "taken apart", ""]


def test_ctrl_c_and_going_on_with_two_processes(tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a parrot that could not answer a question. " * 60, encoding="utf-8")
    sizes = "--n_layer 2 --n_embd 32 --block_size 32 --vocab_size 290 --dropout 0.1 --max_steps 300 --device cpu".split()
    arguments = ["--data", str(tmp_path / "text.txt"), *sizes]
    torchrun("pretrain.py", [*arguments, "--out", str(tmp_path / "a")], tmp_path)
    log = tmp_path / "b" / "pretrain.jsonl"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "pretrain.py"), *arguments]
    process = subprocess.Popen([*run, "--out", str(tmp_path / "b")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
    try:
        deadline = time.perf_counter() + 120
        while process.poll() is None and time.perf_counter() < deadline and not (log.exists() and log.read_bytes()):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "The same command with --resume goes on from here." in process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert not (tmp_path / "b" / "base.pt").exists()
    torchrun("pretrain.py", [*arguments, "--out", str(tmp_path / "b"), "--resume"], tmp_path)
    a, b = final_weights(tmp_path / "a" / "base.pt"), final_weights(tmp_path / "b" / "base.pt")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert log_rows(tmp_path / "a" / "pretrain.jsonl") == log_rows(log)
