"""The training loop: one loss however it is split, the optimizer, order, schedule, interruption."""

import json
import signal

import pytest
import torch

import pretrain
from model import GPT, GPTConfig
from pretrain import Muon, PretrainConfig, backward, lr_scale, orthogonalize, shuffled, train


def small_model(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32, dropout=dropout))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def uneven_batch():
    """Eight rows with between none and all of their tokens supervised."""
    torch.manual_seed(1)
    ids = torch.randint(64, (8, 32))
    labels = ids.clone()
    for row, n in enumerate([31, 1, 0, 5, 30, 2, 0, 12]):
        labels[row, n:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 8])
def test_one_loss_however_it_is_split(micro_batch_size):
    batch, model = uneven_batch(), small_model()
    loss = model(batch["input_ids"], batch["labels"])[1]
    loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    config = PretrainConfig(micro_batch_size=micro_batch_size)
    part = backward(model, batch, config, torch.device("cpu"), torch.float32)
    assert part.item() == pytest.approx(loss.item(), rel=1e-6)
    for a, p in zip(whole, model.parameters()):
        torch.testing.assert_close(p.grad, a, rtol=1e-4, atol=1e-7)


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(3, 32, 32), (2, 128, 32), (2, 32, 128)]:
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape) * 1e-3))
        assert 0.5 < singular.median() < 1.3 and singular.max() < 1.3


def test_muon_takes_the_steps_of_torchs():
    torch.manual_seed(0)
    shapes = [(32, 32), (32, 32), (128, 32), (32, 128)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.1, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    before = [p.detach().clone() for p in ours]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, before):
        moved = (p - start).norm()
        assert (p - q).norm() < 0.03 * moved  # torch's iteration runs in bfloat16


def test_learning_rate_rises_stays_and_falls():
    config = PretrainConfig(max_steps=100, warmup=0.1, cooldown=0.5)
    scales = [lr_scale(step, config) for step in range(100)]
    assert scales[0] == pytest.approx(0.1) and scales[9:50] == [1.0] * 41
    assert scales[-1] == pytest.approx(0.02) and all(a >= b for a, b in zip(scales[50:], scales[51:]))


def test_order_is_a_function_of_the_step_and_visits_everything():
    order = shuffled(10, 4, seed=1)
    first = [i for step in range(5) for i in order(step)]
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10)) and first[:10] != first[10:20]
    assert shuffled(10, 4, seed=1)(3) == order(3) and shuffled(10, 4, seed=2)(0) != order(0)


def run_training(folder, steps, resume=False, stop_at=None, dropout=0.1):
    folder.mkdir(exist_ok=True)
    config = PretrainConfig(out=str(folder), max_steps=steps, batch_size=4, resume=resume, device="cpu")
    model = small_model(dropout=dropout)
    torch.manual_seed(3)
    data = torch.randint(64, (50, 4, 32))

    def batches(step):
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return {"input_ids": data[step], "labels": data[step]}

    train(model, batches, config, "pretrain", lambda model: {"val_loss": 1.0, "val_bpb": 2.0})
    return model


def test_the_same_seed_gives_the_same_weights(tmp_path):
    a, b = run_training(tmp_path / "a", 12), run_training(tmp_path / "b", 12)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    rows = [json.loads(line) for line in (tmp_path / "a" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [10, 12] and rows[-1]["tokens"] == 12 * 4 * 32
    assert {"step", "tokens", "seconds", "loss", "lr", "tokens_per_s", "val_loss", "val_bpb"} == set(rows[-1])


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, capsys):
    straight = run_training(tmp_path / "a", 30)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "b", 30, stop_at=17)
    assert "--resume" in capsys.readouterr().out
    resumed = run_training(tmp_path / "b", 30, resume=True)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters()))
    a, b = ([json.loads(line)["step"] for line in (tmp_path / n / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()] for n in "ab")
    assert a == b == [10, 20, 30]


def test_a_changed_setting_is_refused_by_name(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path, 30, stop_at=11)
    with pytest.raises(pretrain.InputError, match="max_steps was 30 and is now 40"):
        run_training(tmp_path, 40, resume=True)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    config = PretrainConfig(out=str(tmp_path), max_steps=20, device="cpu")
    model = small_model()
    model.embed.weight.data[3] = float("nan")
    ids = torch.full((2, 8), 3)
    with pytest.raises(pretrain.InputError, match="the loss is nan"):
        train(model, lambda step: {"input_ids": ids, "labels": ids}, config, "pretrain")
