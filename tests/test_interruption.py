"""
Interrupted runs lose nothing: Ctrl-C, kill -9, a full disk, a loss that is NaN, and --resume after
them.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import common.run
import compare
import dpo
import pretrain
import sft
from common.messages import InputError
from common.run import Run
from conftest import ROOT
from long import contents, log_rows, run_and_kill, same_weights
from model import GPT, GPTConfig
from pretrain import PretrainConfig, train

SIZES = (
    "--n_layer 2 --n_embd 32 --block_size 32 --vocab_size 290 --batch_size 8 --dropout 0.1 "
    "--device cpu"
).split()


@pytest.fixture
def stages(tmp_path):
    """{stage: (its main, its arguments without --out, the checkpoint it makes)}

    A base model to tune is in base/, and a tuned model is in tuned/.
    """
    text, talks, choices = (tmp_path / name for name in ("text.txt", "talks.json", "choices.json"))
    text.write_text(
        "Once upon a time there was a parrot that could not answer. " * 100, encoding="utf-8"
    )
    pairs = [{"prompt": f"Say {i}.", "response": f"I say {i}" + "!" * (i % 7)} for i in range(50)]
    talks.write_text(json.dumps(pairs), encoding="utf-8")
    pairs = [{"prompt": p["prompt"], "chosen": p["response"], "rejected": "?"} for p in pairs]
    choices.write_text(json.dumps(pairs), encoding="utf-8")
    pretraining = ["--data", str(text), *SIZES]
    pretrain.main([*pretraining, "--out", str(tmp_path / "base"), "--max_steps", "5"])
    base = tmp_path / "base" / "base.pt"
    tuning = ["--data", str(talks), "--base", str(base), "--batch_size", "8", "--device", "cpu"]
    sft.main([*tuning, "--out", str(tmp_path / "tuned"), "--max_steps", "5"])
    tuned = tmp_path / "tuned" / "sft.pt"
    choosing = ["--data", str(choices), "--sft", str(tuned), "--batch_size", "8", "--device", "cpu"]
    return {
        "pretrain": (pretrain.main, pretraining, "base.pt"),
        "sft": (sft.main, tuning, "sft.pt"),
        "dpo": (dpo.main, choosing, "dpo.pt"),
    }


def ctrl_c_at(monkeypatch, step):
    """Press Ctrl-C in this step of the next run."""
    real, calls = pretrain.micro_batches, 0

    def micro_batches(*arguments):
        nonlocal calls
        calls += 1
        if calls == step:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(pretrain, "micro_batches", micro_batches)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_ctrl_c_saves_and_resume_continues(stage, stages, tmp_path, monkeypatch, capsys):
    main, arguments, made = stages[stage]
    arguments += ["--max_steps", "35", "--eval_every", "10"]
    whole, stopped = tmp_path / "a", tmp_path / "b"
    main([*arguments, "--out", str(whole)])
    with monkeypatch.context() as patch:
        patch.setattr(common.run, "STARTED", time.perf_counter() - 1000)
        ctrl_c_at(patch, 13)
        with pytest.raises(SystemExit) as exit:
            main([*arguments, "--out", str(stopped)])
    assert exit.value.code == 130 and not (stopped / made).exists()
    shown = capsys.readouterr().out
    assert "Stopped at step 20. Add --resume to the command to continue." in shown
    monkeypatch.setattr(common.run, "STARTED", time.perf_counter())
    main([*arguments, "--out", str(stopped), "--resume"])
    assert same_weights(whole / made, stopped / made)
    log = stopped / f"{stage}.jsonl"
    assert log_rows(log) == log_rows(whole / f"{stage}.jsonl")
    assert [row["step"] for row in log_rows(log)] == [10, 20, 30, 35]
    assert not list(stopped.glob("*.resume.pt*")) and not list(stopped.glob("*.tmp"))
    # The resumed run keeps counting the seconds.
    seconds = [json.loads(line)["seconds"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert 1000 < seconds[0] < seconds[1] < seconds[2] < seconds[3] < 2000


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_ctrl_c_in_the_last_steps(stage, stages, tmp_path, monkeypatch, capsys):
    """The model is saved, and nothing else is done: sft.py doesn't compare."""
    main, arguments, made = stages[stage]
    arguments += ["--max_steps", "15", "--out", str(tmp_path / "a")]
    ctrl_c_at(monkeypatch, 13)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 130 and (tmp_path / "a" / made).exists()
    said = capsys.readouterr().out
    assert f"Finished: the model is in {tmp_path / 'a' / made}." in said and "BASE" not in said
    assert not list((tmp_path / "a").glob("*.resume.pt"))


def test_ctrl_c_while_the_model_is_written(stages, tmp_path, monkeypatch, capsys):
    main, arguments, made = stages["pretrain"]
    real = common.run.save

    def save(*arguments):
        signal.raise_signal(signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(common.run, "save", save)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--max_steps", "15", "--out", str(tmp_path / "a")])
    assert stopped.value.code == 130 and compare.load(tmp_path / "a" / made)
    assert "Finished: the model is in" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="these streams are POSIX's")
def test_ctrl_c_with_closed_streams_stays_out_of_the_model(stages, tmp_path):
    """The next file that is opened would get the number of a closed stream."""
    _, arguments, made = stages["pretrain"]
    arguments = [*arguments, "--max_steps", "15", "--out", str(tmp_path / "a")]
    code = """
import common, signal, sys, torch, pretrain
real = torch.save
def save(state, file):
    signal.raise_signal(signal.SIGINT)
    real(state, file)
torch.save = save
pretrain.main(sys.argv[1:])
"""

    def close():
        for stream in (1, 2):
            os.close(stream)

    command = [sys.executable, "-c", code, *arguments]
    assert subprocess.run(command, cwd=ROOT, preexec_fn=close).returncode == 130
    assert compare.load(tmp_path / "a" / made)


@pytest.mark.parametrize(
    "changes",
    [
        {"about": 5},
        {"model": {}},
        {"model": []},
        {"optimizers": []},
        {"optimizers": [{0: {}}, {}]},
        {"optimizers": [{}, {}]},
        {"optimizers": [{99: {"momentum": torch.zeros(1)}}, {}]},
        {"optimizers": [{0: {"momentum": torch.zeros(3)}}, {}]},
        {"threads": 0},
        {"threads": 4096},
        {"dtype": torch.int8},
        {"rows": []},
        {"rows": 5},
        {"rows": [{"step": "x", "tokens": 1, "seconds": 1.0}]},
        {"rows": [{"step": 10**9, "tokens": 1, "seconds": 1.0}]},
        {"rows": [{"step": 35, "tokens": 1, "seconds": 1.0}]},
        {"rows": [{"step": 10, "loss": "x"}, {"step": 20, "tokens": 1, "seconds": 1.0}]},
        {"rows": ({"step": 20, "tokens": 1, "seconds": 1.0},)},
        {"rows": [{"step": 20, "tokens": 1, "seconds": float("inf")}]},
        {"rows": [5, {"step": 10, "tokens": 1, "seconds": 1.0}]},
    ],
    ids=str,
)
def test_an_edited_resume_file(changes, stages, tmp_path, monkeypatch, capsys):
    main, arguments, _ = stages["pretrain"]
    arguments += ["--max_steps", "35", "--out", str(tmp_path / "a")]
    with monkeypatch.context() as patch:
        ctrl_c_at(patch, 3)
        with pytest.raises(SystemExit):
            main(arguments)
    unfinished = tmp_path / "a" / "pretrain.resume.pt"
    torch.save({**torch.load(unfinished, weights_only=True), **changes}, unfinished)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--resume"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {unfinished}: its parts do not fit together")


def test_a_resume_file_that_repeats_one_number(stages, tmp_path, monkeypatch, capsys):
    """Its shapes are right, but AdamW would write beyond it."""
    main, arguments, _ = stages["pretrain"]
    arguments += ["--max_steps", "35", "--out", str(tmp_path / "a")]
    ctrl_c_at(monkeypatch, 3)
    with pytest.raises(SystemExit):
        main(arguments)
    unfinished = tmp_path / "a" / "pretrain.resume.pt"
    state = torch.load(unfinished, weights_only=True)
    kept = state["optimizers"][1][0]
    kept["exp_avg"] = torch.zeros(1).expand(kept["exp_avg"].shape)
    torch.save(state, unfinished)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--resume"])
    assert stopped.value.code == 2 and "its parts do not fit" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["base.pt", "pretrain.jsonl", "val.bin"])
def test_a_folder_in_the_way_is_noticed_before_training(name, stages, tmp_path, capsys):
    main, arguments, _ = stages["pretrain"]
    (tmp_path / "a" / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(tmp_path / "a")])
    assert stopped.value.code == 2 and f"{name}: is a folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "a").iterdir()] == [name]  # nothing was written


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_killed_is_not_lost(stage, stages, tmp_path):
    """kill -9 at random moments, also while the state is being saved. (long.py does 20 of them.)"""
    main, arguments, made = stages[stage]
    arguments += ["--max_steps", "300"]
    whole, killed = tmp_path / "a", tmp_path / "b"
    main([*arguments, "--out", str(whole)])
    arguments += ["--out", str(killed)]
    kills = run_and_kill(stage, arguments, killed / made, n_kills=4, seed=1)
    assert len(kills) == 4 and "while saving" in kills
    assert same_weights(whole / made, killed / made)
    assert log_rows(whole / f"{stage}.jsonl") == log_rows(killed / f"{stage}.jsonl")
    assert not list(killed.glob("*.tmp"))


def test_the_same_seed_gives_the_same_weights_and_another_does_not(stages, tmp_path):
    for main, arguments, made in stages.values():
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
            out = ["--out", str(tmp_path / name)]
            main([*arguments, *out, "--max_steps", "12", "--seed", seed])
        assert same_weights(tmp_path / "a" / made, tmp_path / "b" / made)
        assert not same_weights(tmp_path / "a" / made, tmp_path / "c" / made)


def test_resume_takes_precision_and_threads_from_before(stages, tmp_path, monkeypatch):
    main, arguments, _ = stages["pretrain"]
    arguments += ["--max_steps", "30", "--out", str(tmp_path / "a")]
    threads, used = torch.get_num_threads(), []
    try:
        with monkeypatch.context() as patch:
            patch.setattr(common.run, "precision", lambda device: torch.bfloat16)
            ctrl_c_at(patch, 11)
            torch.set_num_threads(3)
            with pytest.raises(SystemExit):
                main(arguments)
        torch.set_num_threads(1)
        real = pretrain.micro_batches

        def micro_batches(batch, config, run):
            used.append((run.dtype, torch.get_num_threads()))
            return real(batch, config, run)

        monkeypatch.setattr(common.run, "precision", lambda device: torch.float32)
        monkeypatch.setattr(pretrain, "micro_batches", micro_batches)
        main([*arguments, "--resume"])
    finally:
        torch.set_num_threads(threads)
    assert len(used) == 10 and set(used) == {(torch.bfloat16, 3)}


def test_what_was_logged_after_the_last_save_is_cut(stages, tmp_path, monkeypatch):
    """The saved state has the rows of the log. So a log that is damaged, or gone, does no harm."""
    main, arguments, made = stages["pretrain"]
    arguments += ["--max_steps", "35"]
    main([*arguments, "--out", str(tmp_path / "a")])
    for i, damage in enumerate((b"", b'{"step": 10}\n{"st', None)):
        out = tmp_path / f"b{i}"
        with monkeypatch.context() as patch:
            ctrl_c_at(patch, 13)
            with pytest.raises(SystemExit):
                main([*arguments, "--out", str(out)])
        log = out / "pretrain.jsonl"
        log.unlink() if damage is None else log.write_bytes(damage)
        main([*arguments, "--out", str(out), "--resume"])
        assert same_weights(tmp_path / "a" / made, out / made)
        assert log_rows(log) == log_rows(tmp_path / "a" / "pretrain.jsonl")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_a_run_that_fails_leaves_the_earlier_ones(stage, stages, tmp_path, monkeypatch, capsys):
    """A finished model and an unfinished run are in the folder, and the next run gets NaN."""
    main, arguments, made = stages[stage]
    arguments += ["--out", str(tmp_path / "a")]
    main([*arguments, "--max_steps", "15"])
    with monkeypatch.context() as patch:
        ctrl_c_at(patch, 13)
        with pytest.raises(SystemExit):
            main([*arguments, "--max_steps", "35"])
    before = contents(tmp_path / "a")
    assert tmp_path / "a" / f"{stage}.resume.pt" in before
    for rates in (["--lr", "1e6", "--embed_lr", "1e6"], ["--lr", "0.0123"]):
        with monkeypatch.context() as patch:
            if len(rates) == 2:  # and one that is stopped before it saves anything
                ctrl_c_at(patch, 3)
            with pytest.raises(SystemExit) as stopped:
                main([*arguments, "--max_steps", "35", *rates])
        assert stopped.value.code == (130 if len(rates) == 2 else 2)
        assert contents(tmp_path / "a") == before
        assert "An unfinished run is here. It stays until this one saves" in capsys.readouterr().out
    main([*arguments, "--max_steps", "35", "--resume"])
    main([*arguments, "--max_steps", "35", "--out", str(tmp_path / "b")])
    assert same_weights(tmp_path / "a" / made, tmp_path / "b" / made)


@pytest.mark.parametrize(
    "stage, streams",
    [("pretrain", "closed pipe"), ("pretrain", "full"), ("sft", "closed pipe"), ("dpo", "full")],
)
def test_ctrl_c_saves_though_nobody_reads(stage, streams, stages, tmp_path):
    """As under `2>&1 | tee log`: Ctrl-C ends tee, too, and then every write fails."""
    if streams == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    main, arguments, made = stages[stage]
    out = tmp_path / "a"
    arguments = [*arguments, "--max_steps", "100000", "--out", str(out)]
    code = f"import sys; import {stage}; import common.run; common.run.LOG_EVERY = 10\n"
    code += "common.run.SAVE_EVERY = 0.5\n"
    code += f"{stage}.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    if streams == "full":  # from the first progress on: a buffer holds what is printed before
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        with open("/dev/full", "w") as full:
            both = dict(stdout=full, stderr=full, env=buffered)
            process = subprocess.Popen(command, cwd=ROOT, **both)
    else:
        both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, cwd=ROOT, **both)
    unfinished = out / f"{stage}.resume.pt"
    while process.poll() is None and not unfinished.exists():
        time.sleep(0.01)
    assert process.poll() is None
    before = unfinished.stat().st_mtime_ns
    if streams == "closed pipe":
        process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (1, 2, 130)
    assert unfinished.stat().st_mtime_ns > before  # it was saved once more
    steps = [row["step"] for row in torch.load(unfinished, weights_only=True)["rows"]]
    assert steps == list(range(10, 10 * len(steps) + 1, 10))


class FileSizeLimit:
    """Like a full disk: no file can grow beyond n bytes."""

    def __init__(self, n):
        self.n = n

    def __enter__(self):
        import resource  # Windows doesn't have it

        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.n, self.before[1]))

    def __exit__(self, *_):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


needs_limits = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no limit on the size of files"
)


@needs_limits
def test_a_full_disk_leaves_an_unfinished_run(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common.run, "SAVE_EVERY", 0)
    main, arguments, made = stages["pretrain"]
    arguments += ["--max_steps", "35"]
    main([*arguments, "--out", str(tmp_path / "a")])
    arguments += ["--out", str(tmp_path / "b")]
    with monkeypatch.context() as patch:
        ctrl_c_at(patch, 3)
        with pytest.raises(SystemExit):
            main(arguments)
    unfinished = tmp_path / "b" / "pretrain.resume.pt"
    before = unfinished.read_bytes()
    capsys.readouterr()
    with FileSizeLimit(20_000), pytest.raises(SystemExit) as stopped:
        main([*arguments, "--resume"])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {unfinished}: cannot be written (File too large); ")
    assert stopped.value.code == 2 and "intact" in error
    assert unfinished.read_bytes() == before and not list((tmp_path / "b").glob("*.tmp"))
    main([*arguments, "--resume"])
    assert same_weights(tmp_path / "a" / made, tmp_path / "b" / made)


@needs_limits
@pytest.mark.parametrize("lr", ["0.02", "0.01"])
def test_a_full_disk_leaves_a_finished_model(lr, stages, tmp_path, capsys):
    """The disk fills up when a second run, with the same or another rate, saves its model."""
    main, arguments, made = stages["pretrain"]
    arguments += ["--max_steps", "35", "--out", str(tmp_path / "a")]
    main(arguments)
    finished = (tmp_path / "a" / made).read_bytes()
    with FileSizeLimit(20_000), pytest.raises(SystemExit) as stopped:
        main([*arguments, "--lr", lr])
    assert stopped.value.code == 2
    assert f"{made}: cannot be written (File too large)" in capsys.readouterr().err
    assert (tmp_path / "a" / made).read_bytes() == finished


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_nan_stops_the_run_and_is_never_saved(where, tmp_path, monkeypatch):
    """The error names the step. What was saved before is good."""
    monkeypatch.setattr(common.run, "SAVE_EVERY", 0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    config = PretrainConfig(out=str(tmp_path), max_steps=40, batch_size=2, device="cpu")
    ids = torch.randint(16, (2, 8))
    real = pretrain.micro_batches

    def batches(step):
        if where == "loss" and step == 16:
            model.embed.weight.data[ids[0, 0]] = float("nan")
        return {"input_ids": ids, "labels": ids}

    def micro_batches(batch, config, run):
        yield from real(batch, config, run)
        if where == "weight" and run.step == 19:  # a gradient is NaN, though the loss is not
            for p in model.parameters():
                p.grad.fill_(float("nan"))

    monkeypatch.setattr(pretrain, "micro_batches", micro_batches)
    complaint = {
        "loss": "step 17: the loss is nan; lower --lr",
        "weight": "step 20: a weight is NaN or infinite; lower --lr",
    }
    with pytest.raises(InputError, match=complaint[where]):
        train(model, batches, config, Run(config, "pretrain", "base.pt", {}))
    state = torch.load(tmp_path / "pretrain.resume.pt", weights_only=True)
    assert state["rows"][-1]["step"] == 10 and all(
        p.isfinite().all() for p in state["model"].values()
    )
    assert [row["step"] for row in log_rows(tmp_path / "pretrain.jsonl")] == [10]


def test_a_resume_file_is_only_data(stages, tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return open, ("stolen", "w")

    monkeypatch.chdir(tmp_path)
    main, arguments, _ = stages["pretrain"]
    (tmp_path / "c").mkdir()
    torch.save({"about": Payload()}, tmp_path / "c" / "pretrain.resume.pt")
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(tmp_path / "c"), "--resume"])
    assert stopped.value.code == 2 and not (tmp_path / "stolen").exists()


def test_nothing_outside_the_output_folder_is_written(stages, tmp_path, monkeypatch):
    def others():
        paths = [path for path in tmp_path.rglob("*") if "my out" not in path.parts]
        return {path: path.stat().st_mtime_ns for path in paths}

    monkeypatch.chdir(tmp_path)
    for main, arguments, _ in stages.values():
        before = others()
        main([*arguments, "--max_steps", "2", "--out", str(tmp_path / "my out")])
        assert others() == before
