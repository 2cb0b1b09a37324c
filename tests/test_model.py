"""The network: its loss, what a position may see, and generation."""

import math
import multiprocessing
import sys

import pytest
import torch
import torch.nn.functional as F

import bench
from model import GPT, GPTConfig, cross_entropy, slices


def tiny(**sizes):
    """A small network with weights that are not the gentle initial ones, so that it has opinions."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32), **sizes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


# The loss


def test_worked_example_of_the_text():
    """ "The cat sat on", by hand; the text itself prints 0.522, 0.232, 0.257 and 0.337, which are not the values."""
    logits = torch.tensor(
        [[0.1, 0.2, 2.0, 0.5, 0.3, 0.1], [0.1, 0.1, 0.2, 2.5, 0.4, 0.2], [0.2, 0.1, 0.1, 0.3, 3.0, 0.5]]
    )
    targets = torch.tensor([2, 3, 4])
    probabilities = torch.exp(-cross_entropy(logits, targets, reduction="none"))
    assert probabilities.tolist() == pytest.approx([0.535, 0.665, 0.757], abs=5e-4)
    assert cross_entropy(logits, targets, reduction="none").tolist() == pytest.approx([0.6261, 0.4084, 0.2777], abs=5e-5)
    assert cross_entropy(logits, targets).item() == pytest.approx(0.4374, abs=5e-5)


@pytest.mark.parametrize("shape", [(1, 2), (7, 5), (513, 50), (1030, 1024)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_is_torchs(shape, reduction, scale):
    torch.manual_seed(shape[0])
    a = (torch.randn(shape).clamp(-1, 1) * scale).requires_grad_()
    assert len(slices(a)) > 1 or shape[0] < 1030  # the last shape is worked through in several slices
    b = a.detach().clone().requires_grad_()
    targets = torch.randint(shape[1], shape[:1])
    targets[::3] = -100 if shape[0] > 1 else targets[0]
    ours, theirs = cross_entropy(a, targets, reduction=reduction), F.cross_entropy(b, targets, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(ours.shape)  # an upstream gradient that differs from row to row
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert torch.isfinite(a.grad).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_holds_no_copy_of_the_logits_in_float32(dtype):
    """What it needs at most, beside the logits: their gradient, of the same size, and a slice of some rows."""
    logits = 1024 * 20000 * torch.empty(0, dtype=dtype).element_size() / 1e6
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # (in a process without memory to spare from other tests)
        assert logits <= pool.apply(bench.peak_memory, ("ours", 1024, 20000, dtype)) < logits + 35


def test_cross_entropy_with_another_ignore_index():
    logits, targets = torch.randn(4, 9), torch.tensor([1, 7, 7, 2])
    torch.testing.assert_close(cross_entropy(logits, targets, ignore_index=7), F.cross_entropy(logits, targets, ignore_index=7))


def test_cross_entropy_passes_a_numerical_check_of_its_derivative():
    logits = torch.randn(6, 5, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2, 2, 1])
    (grad,) = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), logits)
    eps = 1e-2
    for i in range(6):
        for j in range(5):
            bump = torch.zeros(6, 5)
            bump[i, j] = eps
            up, down = (cross_entropy((logits + s * bump).detach(), targets, reduction="sum") for s in (1, -1))
            assert grad[i, j].item() == pytest.approx(((up - down) / (2 * eps)).item(), abs=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_targets_ignored_is_zero_and_not_nan(reduction):
    logits = torch.randn(5, 8, requires_grad=True)
    loss = cross_entropy(logits, torch.full((5,), -100), reduction=reduction)
    assert (loss == 0).all()
    loss.sum().backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cross_entropy_keeps_the_dtype_of_the_gradient_and_computes_in_float32(dtype):
    logits = torch.randn(20, 100, dtype=dtype, requires_grad=True)
    loss = cross_entropy(logits, torch.arange(20))
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    wide = logits.detach().float().requires_grad_()
    theirs = F.cross_entropy(wide, torch.arange(20))
    theirs.backward()
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(logits.grad, wide.grad.to(dtype))


def test_cross_entropy_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), reduction="median")
    with pytest.raises(ValueError, match="logits must be"):
        cross_entropy(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))


# The network


def test_a_fresh_model_is_equally_surprised_by_everything():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=1000, n_layer=2, n_head=2, n_embd=64))
    ids = torch.randint(1000, (8, 32))
    assert model(ids, ids)[1].item() == pytest.approx(math.log(1000), abs=0.05)


def test_it_can_learn_one_batch_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
    ids = torch.randint(64, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(ids, ids)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_a_later_token_never_changes_an_earlier_logit():
    model, ids = tiny(), torch.randint(50, (1, 16))
    logits = model(ids, ids)[0]  # (15, V): positions 0 to 14
    for t in range(1, 16):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 50
        labels = ids  # the same positions are scored
        after = model(changed, labels)[0]
        torch.testing.assert_close(after[:t], logits[:t], rtol=0, atol=0)
        if t < 15:
            assert not torch.equal(after[t], logits[t])


def test_the_shift_happens_inside():
    """Position t is scored against labels[t + 1], and the logits are those of the scored positions, row by row."""
    model, ids = tiny(), torch.randint(50, (3, 16))
    everything, loss = model(ids, ids)
    assert everything.shape == (3 * 15, 50)
    torch.testing.assert_close(loss, F.cross_entropy(everything, ids[:, 1:].reshape(-1)))
    labels = ids.clone()
    labels[0, :9] = labels[2] = -100
    labels[1, ::2] = -100
    some, loss = model(ids, labels)
    scored = (labels[:, 1:] != -100).reshape(-1)
    torch.testing.assert_close(some, everything[scored])
    torch.testing.assert_close(loss, F.cross_entropy(everything, labels[:, 1:].reshape(-1)))


def test_without_labels_only_the_last_position_is_projected():
    model, ids = tiny(), torch.randint(50, (3, 16))
    logits, loss = model(ids)
    assert loss is None and logits.shape == (3, 1, 50)
    last = model(torch.cat((ids[:, 1:], ids[:, :1]), dim=1), None)[0]
    assert not torch.equal(last, logits)
    torch.testing.assert_close(logits[:, 0], model(ids, ids)[0].view(3, 15, 50)[:, -1] * 0 + model.head(model.hidden(ids)[:, -1]))


def test_dropout_is_for_training_alone():
    model, ids = tiny(dropout=0.5), torch.randint(50, (2, 16))
    assert torch.equal(model(ids)[0], model(ids)[0])
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


def test_fused_and_written_out_attention_agree():
    from model import attend

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, mask, 0.0), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    torch.testing.assert_close(attend(q, k, v, None, 0.0), F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("sizes", [dict(n_embd=30, n_head=4), dict(n_embd=6, n_head=2), dict(n_layer=0), dict(vocab_size=-1)])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="must be"):
        GPT(GPTConfig(**sizes))


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match="block_size"):
        tiny()(torch.zeros(1, 17, dtype=torch.long))


# Generation


def generate_slowly(model, prompt, n, stop=None):
    """Greedy, one row, no cache, by the same rule: a context over block_size keeps its last half block."""
    context, new = list(prompt), []
    for _ in range(n):
        if len(context) > model.config.block_size:
            context = context[-(model.config.block_size // 2) :]
        token = model(torch.tensor([context]))[0].argmax().item()
        context.append(token)
        new.append(token)
        if token == stop:
            break
    return new


def test_cached_generation_in_a_ragged_batch_equals_the_slow_way(monkeypatch):
    """Also long past block_size, where prompts are longer than it, and where rows stop."""
    model = tiny()
    torch.manual_seed(1)
    prompts = [torch.randint(50, (n,)).tolist() for n in (1, 3, 15, 16, 17, 40, 7, *[3] * 13)]  # 20: more than are put into the cache at once
    expected = [generate_slowly(model, prompt, 50) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == len(prompts)
    from_cache, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, padding, caches: from_cache.append(caches[0].past > 0) or hidden(ids, padding, caches))
    assert model.generate(prompts, 50, temperature=0) == expected
    assert from_cache.count(True) >= 20
    for stop in range(50):  # (of some, the longest rows stop, and a full cache is left to shorter ones)
        cut = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
        assert model.generate(prompts, 50, temperature=0, stop=stop) == cut


def test_each_row_ends_at_its_own_stop_token():
    model = tiny()
    prompts = [[i, i + 1, i + 2] for i in range(30)]
    endless = [generate_slowly(model, prompt, 12) for prompt in prompts]
    stop = endless[0][4]
    expected = [generate_slowly(model, prompt, 12, stop) for prompt in prompts]
    lengths = {len(row) for row in expected}
    assert len(lengths) > 1 and 12 in lengths  # some stop, at different places, and some do not
    assert model.generate(prompts, 12, temperature=0, stop=stop) == expected


def test_sampling():
    model = tiny()
    torch.manual_seed(0)
    rows = model.generate([[1, 2]] * 200, 1, temperature=1.0, top_k=3)
    likeliest = model(torch.tensor([[1, 2]]))[0].flatten().topk(3).indices.tolist()
    assert {row[0] for row in rows} == set(likeliest)
    assert model.generate([[1, 2]], 5, top_k=1) == model.generate([[1, 2]], 5, temperature=0)
    for next_to_none in (1e-4, 1e-40):
        assert model.generate([[1, 2]], 5, temperature=next_to_none) == model.generate([[1, 2]], 5, temperature=0)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate([[1], []], 5)


def test_generation_leaves_the_model_as_it_was():
    model = tiny(dropout=0.9)
    model.train()
    assert model.generate([[1, 2]], 8, temperature=0) == model.generate([[1, 2]], 8, temperature=0)
    assert model.training
