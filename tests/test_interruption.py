"""Interrupted is not lost: Ctrl-C, kill -9, a full disk, a loss that is no number, and what --resume makes of them."""

import json
import signal
import sys

import pytest
import torch

import pretrain
import sft
from data.run import Run
from data.terminal import InputError
from long import final_weights, log_rows, run_and_kill
from model import GPT, GPTConfig
from pretrain import PretrainConfig, train

SIZES = "--n_layer 2 --n_embd 32 --block_size 32 --vocab_size 290 --batch_size 8 --dropout 0.1 --device cpu".split()


@pytest.fixture
def stages(tmp_path):
    """{stage: (its main, its arguments but --out, the name of what it makes)}; a base model is in base/."""
    (tmp_path / "text.txt").write_text("Once upon a time there was a parrot that could not answer. " * 100, encoding="utf-8")
    talks = [{"prompt": f"Say {i}.", "response": f"I say {i}" + "!" * (i % 7)} for i in range(50)]
    (tmp_path / "talks.json").write_text(json.dumps(talks), encoding="utf-8")
    pretraining = ["--data", str(tmp_path / "text.txt"), *SIZES]
    pretrain.main([*pretraining, "--out", str(tmp_path / "base"), "--max_steps", "5"])
    tuning = ["--data", str(tmp_path / "talks.json"), "--base", str(tmp_path / "base" / "base.pt"), "--batch_size", "8", "--device", "cpu"]
    return {"pretrain": (pretrain.main, pretraining, "base.pt"), "sft": (sft.main, tuning, "sft.pt")}


def same_weights(a, b):
    a, b = final_weights(a), final_weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ctrl_c_at(monkeypatch, step):
    """Press Ctrl-C in this step of the next run."""
    calls, real = [], pretrain.backward

    def backward(*arguments):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(pretrain, "backward", backward)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_ctrl_c_saves_and_the_run_goes_on(stage, stages, tmp_path, monkeypatch, capsys):
    main, arguments, made = stages[stage]
    arguments += ["--max_steps", "35", "--eval_every", "10"]
    main([*arguments, "--out", str(tmp_path / "a")])
    with monkeypatch.context() as patch:
        ctrl_c_at(patch, 13)
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--out", str(tmp_path / "b")])
    assert stopped.value.code == 130 and not (tmp_path / "b" / made).exists()
    assert "Stopped at step 20. The same command with --resume goes on from here." in capsys.readouterr().out
    main([*arguments, "--out", str(tmp_path / "b"), "--resume"])
    assert same_weights(tmp_path / "a" / made, tmp_path / "b" / made)
    a, b = (log_rows(tmp_path / folder / f"{stage}.jsonl") for folder in "ab")
    assert a == b and [row["step"] for row in a] == [10, 20, 30, 35]
    assert not list((tmp_path / "b").glob("*.resume.pt*")) and not list((tmp_path / "b").glob("*.tmp"))


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_killed_is_not_lost(stage, stages, tmp_path):
    """kill -9 at random moments, while the file that --resume needs is being written among them. (20 at full size: tests/long.py.)"""
    main, arguments, made = stages[stage]
    arguments += ["--max_steps", "300"]
    main([*arguments, "--out", str(tmp_path / "a")])
    kills = run_and_kill(stage, [*arguments, "--out", str(tmp_path / "b")], tmp_path / "b" / made, kills=4, seed=1)
    assert len(kills) == 4 and "while saving" in kills
    assert same_weights(tmp_path / "a" / made, tmp_path / "b" / made)
    assert log_rows(tmp_path / "a" / f"{stage}.jsonl") == log_rows(tmp_path / "b" / f"{stage}.jsonl")
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_twice_the_same_seed_gives_the_same_weights_and_another_does_not(stages, tmp_path):
    for stage, (main, arguments, made) in stages.items():
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
            main([*arguments, "--out", str(tmp_path / name), "--max_steps", "12", "--seed", seed])
        assert same_weights(tmp_path / "a" / made, tmp_path / "b" / made)
        assert not same_weights(tmp_path / "a" / made, tmp_path / "c" / made)


def test_precision_and_threads_are_those_of_before(stages, tmp_path, monkeypatch):
    main, arguments, made = stages["pretrain"]
    arguments += ["--max_steps", "30", "--out", str(tmp_path / "a")]
    threads, used = torch.get_num_threads(), []
    try:
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "precision", lambda device: torch.bfloat16)
            ctrl_c_at(patch, 11)
            torch.set_num_threads(3)
            with pytest.raises(SystemExit):
                main(arguments)
        torch.set_num_threads(1)
        backward = pretrain.backward
        monkeypatch.setattr(pretrain, "backward", lambda *a: used.append((a[-1], torch.get_num_threads())) or backward(*a))
        main([*arguments, "--resume"])
    finally:
        torch.set_num_threads(threads)
    assert len(used) == 10 and set(used) == {(torch.bfloat16, 3)}


def test_what_was_logged_after_the_last_save_is_cut(tmp_path, capsys):
    run = Run(PretrainConfig(out=str(tmp_path)), "pretrain", {})
    rows = [json.dumps({"step": step}) + "\n" for step in (10, 20, 30)]
    run.log.write_text("".join(rows) + '{"step": 4', encoding="utf-8")  # killed while writing
    run.state = {"step": 20}
    run.start_log()
    assert run.log.read_text(encoding="utf-8") == "".join(rows[:2])
    run.state = {"step": 40}
    with pytest.raises(InputError, match="has lost some of its first 4 rows"):
        run.start_log()
    run.state = None
    run.unfinished.write_text("", encoding="utf-8")
    run.start_log()
    assert run.log.read_text(encoding="utf-8") == "" and not run.unfinished.exists()
    assert "An unfinished run was here. It is given up" in capsys.readouterr().out


class FileSizeLimit:
    """As if the disk were full: no file can grow beyond so many bytes."""

    def __init__(self, n):
        self.n = n

    def __enter__(self):
        import resource

        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.n, self.before[1]))

    def __exit__(self, *_):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_leaves_what_was_there(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 0)
    main, arguments, made = stages["pretrain"]
    whole, arguments = [*arguments, "--max_steps", "35", "--out", str(tmp_path / "a")], [*arguments, "--max_steps", "35", "--out", str(tmp_path / "b")]
    main(whole)
    with monkeypatch.context() as patch:
        ctrl_c_at(patch, 3)
        with pytest.raises(SystemExit):
            main(arguments)
    unfinished = tmp_path / "b" / "pretrain.resume.pt"
    before = unfinished.read_bytes()
    capsys.readouterr()
    with FileSizeLimit(20_000), pytest.raises(SystemExit) as stopped:
        main([*arguments, "--resume"])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.startswith(f"error: {unfinished}: cannot be written (File too large); ") and "intact" in errors
    assert unfinished.read_bytes() == before and not list((tmp_path / "b").glob("*.tmp"))
    main([*arguments, "--resume"])
    assert same_weights(tmp_path / "a" / made, tmp_path / "b" / made)

    base = (tmp_path / "a" / made).read_bytes()  # a finished model outlives a later run that cannot be saved
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 60)
    with FileSizeLimit(20_000), pytest.raises(SystemExit) as stopped:
        main(whole)
    assert stopped.value.code == 2 and f"{made}: cannot be written (File too large)" in capsys.readouterr().err
    assert (tmp_path / "a" / made).read_bytes() == base


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_no_number_stops_the_run_and_is_never_saved(where, tmp_path, monkeypatch):
    """With the step, and before a good checkpoint is overwritten."""
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    config = PretrainConfig(out=str(tmp_path), max_steps=40, batch_size=2, device="cpu")
    ids = torch.randint(16, (2, 8))

    def batches(step):
        if where == "loss" and step == 16:  # the 17th step
            model.embed.weight.data[ids[0, 0]] = float("nan")
        return {"input_ids": ids, "labels": ids}

    if where == "weight":
        check = pretrain.backward
        monkeypatch.setattr(pretrain, "backward", lambda *a: check(*a) * (1 if len(steps.append(1) or steps) < 20 else poison(model)))
    steps = []
    complaint = {"loss": "step 17: the loss is nan: the steps are likely too large; lower --lr", "weight": "step 20: a weight is no number any more"}
    with pytest.raises(InputError, match=complaint[where]):
        train(model, batches, config, Run(config, "pretrain", {}))
    state = torch.load(tmp_path / "pretrain.resume.pt", weights_only=True)
    assert state["step"] == 10 and all(p.isfinite().all() for p in state["model"].values())
    assert [row["step"] for row in log_rows(tmp_path / "pretrain.jsonl")] == [10]


def poison(model):
    """A gradient that is no number, though the loss is one."""
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    return 1


def test_a_resume_file_is_data_and_nothing_else(stages, tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return open, ("stolen", "w")

    monkeypatch.chdir(tmp_path)
    main, arguments, made = stages["pretrain"]
    (tmp_path / "c").mkdir()
    torch.save({"about": Payload()}, tmp_path / "c" / "pretrain.resume.pt")
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(tmp_path / "c"), "--resume"])
    assert stopped.value.code == 2 and not (tmp_path / "stolen").exists()


def test_nothing_outside_the_output_folder_is_written(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for main, arguments, _ in stages.values():
        files = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "my out" not in path.parts}
        before = files()
        main([*arguments, "--max_steps", "2", "--out", str(tmp_path / "my out")])
        assert files() == before
