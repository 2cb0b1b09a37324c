"""The parts of the training loop: one loss however it is split, the optimizer, order, schedule. (Interruptions: test_interruption.py.)"""

import argparse

import pytest
import tiktoken
import torch

from data.terminal import InputError, Parser, parse_options
from model import GPT, GPTConfig
from pretrain import PRESETS, Muon, PretrainConfig, backward, lr_scale, make_tokenizer, orthogonalize, shuffled, sizes_for


def small_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8, 16])
def test_one_loss_however_it_is_split(micro_batch_size):
    """Where every token counts; for conversations see test_sft_bugs.py, for processes test_two_processes.py."""
    model, ids = small_model(), torch.randint(64, (32, 32), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    loss = model(ids, ids)[1]
    loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    part = backward(model, batch, PretrainConfig(micro_batch_size=micro_batch_size), torch.float32)
    assert part.item() == pytest.approx(loss.item(), rel=1e-5)
    assert all((p.grad - g).norm() <= 1e-5 * g.norm() for p, g in zip(model.parameters(), whole))


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(3, 32, 32), (2, 128, 32), (2, 32, 128)]:
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape) * 1e-3).float())
        assert 0.5 < singular.median() < 1.3 and singular.max() < 1.3


def test_muon_takes_the_steps_of_torchs():
    torch.manual_seed(0)
    shapes = [(32, 32), (32, 32), (128, 32), (32, 128)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.1, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.9)
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


def test_what_is_typed_beats_the_preset_which_beats_the_default():
    options = lambda *argv: parse_options(Parser("x"), PretrainConfig, argv, preset=lambda args: {"n_layer": 7, "n_embd": 64})[0]
    assert (options().n_layer, options().n_embd, options().n_head) == (7, 64, PretrainConfig.n_head)
    assert (options("--n_layer", "3").n_layer, options("--n_layer", "3").n_embd) == (3, 64)
    assert options("--resume").resume and not options().resume


def test_order_is_a_function_of_the_step_and_visits_everything():
    order = shuffled(10, 4, seed=1)
    first = [i for step in range(5) for i in order(step)]
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10)) and first[:10] != first[10:20]
    assert shuffled(10, 4, seed=1)(3) == order(3) and shuffled(10, 4, seed=2)(0) != order(0)


def test_sizes_fit_the_amount_of_text(tmp_path):
    for name, size in (("a.txt", 10_000), ("b.txt", 1_000_000), ("c.txt", 6_000_000)):
        (tmp_path / name).write_bytes(b"some words\n" * (size // 11))
    chosen = []
    for data, preset in (([], None), (["a.txt"], None), (["b.txt"], None), (["a.txt", "c.txt"], None), (["c.txt"], "tiny")):
        args = argparse.Namespace(data=[tmp_path / name for name in data], preset=preset)
        sizes = sizes_for(args)
        chosen.append(args.preset)
        assert sizes is PRESETS[args.preset or "world"]
        PretrainConfig(**sizes)
    assert chosen == [None, "tiny", "small", "medium", "tiny"]


def test_the_preset_gpt2_has_gpt2s_size():
    config = PretrainConfig(**PRESETS["gpt2"])
    with torch.device("meta"):
        model = GPT(GPTConfig(config.block_size, 50257, config.n_layer, config.n_head, config.n_embd))
    assert sum(p.numel() for p in model.parameters()) == 12 * 12 * 768**2 + 50257 * 768  # 123.5 million


def test_an_encoding_of_tiktokens_own(tmp_path, monkeypatch):
    """With the bytes and two merges for its vocabulary, as nothing can be downloaded here; then with nothing to download it from."""
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 258}  # (ranks may have gaps)
    own = tiktoken.Encoding("gpt2", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={})
    config = PretrainConfig(tokenizer="gpt2", vocab_size=7)
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", {"gpt2": own}.__getitem__)
        tokenizer = make_tokenizer(config, [])
    assert tokenizer.encode("abc ab") == [257, 32, 256] and tokenizer.n_vocab == 263
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name, value in (("HTTPS_PROXY", "http://127.0.0.1:9"), ("https_proxy", "http://127.0.0.1:9"), ("NO_PROXY", ""), ("no_proxy", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)  # (a test before may have had it)
    with pytest.raises(InputError, match="gpt2 cannot be downloaded .ProxyError.; go online for its first use"):
        make_tokenizer(config, [])
