"""The network: its loss, what each position sees, and generation."""

import ast
import dataclasses
import math
import multiprocessing
import sys

import pytest
import torch
import torch.nn.functional as F

import bench
from conftest import ROOT
from model import GPT, PAIR_ROWS, Cache, GPTConfig, attend, cross_entropy, pad_left
from pretrain import PretrainConfig


def make_model(**sizes):
    """A small network. Its weights aren't the gentle initial ones, so it has opinions."""
    torch.manual_seed(0)
    defaults = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**{**defaults, **sizes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


# The loss


def test_worked_example_of_the_text():
    """ "The cat sat on", by hand. The Korean text prints other values, and they are wrong."""
    rows = [[0.1, 0.2, 2.0, 0.5, 0.3, 0.1]]
    rows += [[0.1, 0.1, 0.2, 2.5, 0.4, 0.2], [0.2, 0.1, 0.1, 0.3, 3.0, 0.5]]
    logits, targets = torch.tensor(rows), torch.tensor([2, 3, 4])
    losses = cross_entropy(logits, targets, reduction="none")
    assert torch.exp(-losses).tolist() == pytest.approx([0.535, 0.665, 0.757], abs=5e-4)
    assert losses.tolist() == pytest.approx([0.6261, 0.4084, 0.2777], abs=5e-5)
    assert cross_entropy(logits, targets).item() == pytest.approx(0.4374, abs=5e-5)


@pytest.mark.parametrize("shape", [(1, 2), (7, 5), (513, 50), (1030, 1024)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_is_torchs(shape, reduction, scale):
    torch.manual_seed(shape[0])
    a = (torch.randn(shape).clamp(-1, 1) * scale).requires_grad_()
    b = a.detach().clone().requires_grad_()
    targets = torch.randint(shape[1], shape[:1])
    targets[::3] = -100 if shape[0] > 1 else targets[0]
    ours = cross_entropy(a, targets, reduction=reduction)
    theirs = F.cross_entropy(b, targets, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(ours.shape)  # a gradient that differs from row to row
    ours.backward(upstream)
    theirs.backward(upstream)
    torch.testing.assert_close(a.grad, b.grad)
    assert torch.isfinite(a.grad).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_takes_no_more_memory_than_torchs(dtype):
    """Both work in float32, as in training."""
    megabytes = []
    for name in ("ours", "torch's"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # new: no freed memory to reuse
            megabytes.append(pool.apply(bench.peak_memory, (name, 1024, 20000, dtype)))
    ours, theirs = megabytes
    logits = 1024 * 20000 * dtype.itemsize / 1e6
    assert logits <= ours <= theirs + 5  # the gradient alone is as large as the logits


def test_the_loss_can_be_read_aloud():
    """The loss and its derivative: at most 25 lines, docstrings and blank lines aside."""
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    names, lines = ("CrossEntropy", "cross_entropy"), source.splitlines()
    found = [node for node in ast.parse(source).body if getattr(node, "name", "") in names]
    assert len(found) == 2
    code = set()
    for node in found:
        numbers = set(range(node.lineno, node.end_lineno + 1))
        for part in ast.walk(node):
            if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):  # a docstring
                numbers -= set(range(part.lineno, part.end_lineno + 1))
        code |= {number for number in numbers if lines[number - 1].strip()}
    assert len(code) <= 25


def test_the_ignored_label_has_one_home():
    """Only model.py says -100. Everybody else imports it."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py"), *(ROOT / "data").rglob("*.py")]
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-100":
                found.append(path.name)
    assert found == ["model.py"]


def test_cross_entropy_with_another_ignore_index():
    logits, targets = torch.randn(4, 9), torch.tensor([1, 7, 7, 2])
    ours = cross_entropy(logits, targets, ignore_index=7)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, ignore_index=7))


def test_cross_entropy_passes_a_numerical_check_of_its_derivative():
    logits = torch.randn(6, 5, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2, 2, 1])
    cross_entropy(logits, targets, reduction="sum").backward()

    def loss_at(i, j, change):
        moved = logits.detach().clone()
        moved[i, j] += change
        return cross_entropy(moved, targets, reduction="sum").item()

    eps = 1e-2
    for i in range(6):
        for j in range(5):
            slope = (loss_at(i, j, eps) - loss_at(i, j, -eps)) / (2 * eps)
            assert logits.grad[i, j].item() == pytest.approx(slope, abs=1e-3)


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


def test_the_networks_defaults_are_those_of_pretraining():
    for field in dataclasses.fields(GPTConfig):
        assert getattr(GPTConfig(), field.name) == getattr(PretrainConfig(), field.name)


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
    model, ids = make_model(), torch.randint(50, (1, 16))
    logits = model(ids, ids)[0]  # (15, V): positions 0 to 14
    for t in range(1, 16):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 50
        after = model(changed, ids)[0]  # the same positions are scored
        torch.testing.assert_close(after[:t], logits[:t], rtol=0, atol=0)
        if t < 15:
            assert not torch.equal(after[t], logits[t])


def test_the_shift_happens_inside():
    """Position t is scored against labels[t + 1]. The logits are those of the scored positions."""
    model, ids = make_model(), torch.randint(50, (3, 16))
    everything, loss = model(ids, ids)
    assert everything.shape == (3 * 15, 50)
    torch.testing.assert_close(loss, F.cross_entropy(everything, ids[:, 1:].reshape(-1)))
    labels = ids.clone()
    labels[0, :9] = labels[2] = -100
    labels[1, ::2] = -100
    some, loss = model(ids, labels)
    targets = labels[:, 1:].reshape(-1)
    torch.testing.assert_close(some, everything[targets != -100])
    torch.testing.assert_close(loss, F.cross_entropy(everything, targets))


def test_without_labels_only_the_last_position_is_projected():
    model, ids = make_model(), torch.randint(50, (3, 16))
    logits, loss = model(ids)
    assert loss is None and logits.shape == (3, 1, 50)
    torch.testing.assert_close(logits[:, 0], model.head(model.hidden(ids)[:, -1]))
    longer = torch.cat((ids, ids[:, :1]), dim=1)
    all_but_last = make_model(block_size=17)(longer, longer)[0].view(3, 16, 50)
    torch.testing.assert_close(logits[:, 0], all_but_last[:, -1])


def test_dropout_is_for_training_only():
    model, ids = make_model(dropout=0.5), torch.randint(50, (2, 16))
    assert torch.equal(model(ids)[0], model(ids)[0])
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


def test_fused_and_written_out_attention_agree():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, None, 0.0), fused)
    torch.testing.assert_close(attend(q, k, v, mask, 0.0), fused)


@pytest.mark.parametrize(
    "sizes",
    [dict(n_embd=30, n_head=4), dict(n_embd=6, n_head=2), dict(n_layer=0), dict(vocab_size=-1)],
)
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="must be"):
        GPT(GPTConfig(**sizes))


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match="block_size"):
        make_model()(torch.zeros(1, 17, dtype=torch.long))


def changed_rows(table, change):
    """Which rows of a table of values the loss of `change` looks up, as a set."""
    table.weight.grad = None
    change().backward()
    return set(table.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist())


def test_tokens_and_pairs_of_neighbors_are_looked_up():
    model, ids = make_model(), torch.tensor([[3, 7, 7, 9]])

    def loss(input_ids=ids):
        return model(input_ids, input_ids)[1]

    assert changed_rows(model.values, loss) == {3, 7}  # nothing is predicted after the 9
    pairs = [(0, 3), (3, 7), (7, 7)]  # the first id follows a 0
    rows = {(36313 * right + 27191 * left) % PAIR_ROWS for left, right in pairs}
    assert len(rows) == 3 and changed_rows(model.pair_values, loss) == rows
    model.alias[7] = 30
    pairs = [(0, 3), (3, 30), (30, 30)]
    rows = {(36313 * right + 27191 * left) % PAIR_ROWS for left, right in pairs}
    assert changed_rows(model.pair_values, loss) == rows
    assert changed_rows(model.values, loss) == {3, 7}  # the tokens themselves are who they are


def test_pairs_never_look_ahead_or_into_another_row():
    model = make_model()
    ids = torch.tensor([[3, 7, 9], [4, 8, 9]])
    alone = [model(row[None], row[None])[0] for row in ids]
    torch.testing.assert_close(model(ids, ids)[0], torch.cat(alone))


# Generation


def generate_slowly(model, prompt, n, stop=None):
    """The likeliest tokens, for one row, without a cache.

    The rule is the same: a context that outgrows block_size keeps its last half block.
    """
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


def random_prompts(lengths):
    torch.manual_seed(1)
    return [torch.randint(50, (n,)).tolist() for n in lengths]


def test_a_left_padded_batch_equals_its_rows_one_by_one():
    model, prompts = make_model(), random_prompts([1, 3, 15, 16, 7])
    input_ids, padding = pad_left(prompts, "cpu")
    together = model.hidden(input_ids, padding)
    assert torch.isfinite(together).all()  # a pad that sees nothing would be NaN
    for prompt, row, n_pad in zip(prompts, together, padding.tolist(), strict=True):
        alone = model.hidden(torch.tensor([prompt]))[0]
        torch.testing.assert_close(row[n_pad:], alone)


def test_cached_generation_in_a_ragged_batch_equals_the_slow_way(monkeypatch):
    """Also far beyond block_size, for prompts longer than block_size, and when rows stop early."""
    model, prompts = make_model(), random_prompts([1, 3, 15, 16, 17, 40, 7, *[3] * 13])
    expected = [generate_slowly(model, prompt, 50) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == len(prompts)
    from_cache, hidden = [], model.hidden

    def watched(input_ids, padding, caches, before):
        from_cache.append(caches[0].length > 0)
        return hidden(input_ids, padding, caches, before)

    monkeypatch.setattr(model, "hidden", watched)
    assert model.generate(prompts, 50, temperature=0) == expected
    assert from_cache.count(True) >= 20
    for stop in range(50):  # for some, the longest rows stop first, and shorter ones go on
        cut = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
        assert model.generate(prompts, 50, temperature=0, stop=stop) == cut


def test_several_tokens_after_a_cache_equal_reading_all_at_once():
    model, prompts = make_model(), random_prompts([5, 12, 9])
    input_ids, padding = pad_left(prompts, "cpu")
    model.alias[input_ids[0, -1]] = 3
    caches = [Cache() for _ in model.blocks]
    first = model.hidden(input_ids[:, :7], padding, caches)
    second = model.hidden(input_ids[:, 7:], padding, caches, input_ids[:, 6:7])
    together = model.hidden(input_ids, padding)
    torch.testing.assert_close(torch.cat((first, second), dim=1), together)


def test_each_row_ends_at_its_own_stop_token():
    model = make_model()
    prompts = [[i, i + 1, i + 2] for i in range(30)]
    endless = [generate_slowly(model, prompt, 12) for prompt in prompts]
    stop = endless[0][4]
    expected = [generate_slowly(model, prompt, 12, stop) for prompt in prompts]
    lengths = {len(row) for row in expected}
    assert len(lengths) > 1 and 12 in lengths  # some stop, in different places, and some don't
    assert model.generate(prompts, 12, temperature=0, stop=stop) == expected


def test_sampling():
    model = make_model()
    torch.manual_seed(0)
    rows = model.generate([[1, 2]] * 200, 1, temperature=1.0, top_k=3)
    likeliest = model(torch.tensor([[1, 2]]))[0].flatten().topk(3).indices.tolist()
    assert {row[0] for row in rows} == set(likeliest)
    greedy = model.generate([[1, 2]], 5, temperature=0)
    assert model.generate([[1, 2]], 5, top_k=1) == greedy
    for almost_zero in (1e-4, 1e-40):
        assert model.generate([[1, 2]], 5, temperature=almost_zero) == greedy
    with pytest.raises(ValueError, match="at least one token"):
        model.generate([[1], []], 5)


def test_generation_leaves_the_model_in_training_mode():
    model = make_model(dropout=0.9).train()
    once, twice = (model.generate([[1, 2]], 8, temperature=0) for _ in range(2))
    assert once == twice  # without dropout
    assert model.training


def test_an_interrupted_generation_leaves_the_model_in_training_mode():
    model = make_model().train()

    def interrupt(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate([[1, 2]], 8, on_token=interrupt)
    assert model.training
