"""The parts of pretraining: one loss however it is split, other objectives, the optimizers, sizes.

For interruptions, see test_interruption.py.
"""

import argparse

import pytest
import tiktoken
import torch
import torch.nn.functional as F

import pretrain
from common.messages import InputError
from common.optimizer import Muon, orthogonalize
from common.options import Parser, parse_options
from common.presets import PRESETS, sizes_for
from common.run import Run
from data.corpus import make_tokenizer
from data.order import in_order, shuffled
from model import GPT, PAIR_ROWS, GPTConfig
from one_step import close, gradients, one_step
from pretrain import PretrainConfig, lr_scale


def make_model(Model=GPT):
    torch.manual_seed(0)
    model = Model(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


# The loop


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2, 3, 8, 16])
def test_one_loss_however_it_is_split(micro_batch_size, tmp_path):
    """Here every token counts. test_sft_bugs.py asks the same of masked labels."""
    model, random = make_model(), torch.Generator().manual_seed(1)
    ids = torch.randint(64, (32, 32), generator=random)
    batch = {"input_ids": ids, "labels": ids}
    loss, found = one_step(model, batch, tmp_path, micro_batch_size)
    assert loss == pytest.approx(model(**batch)[1].item(), rel=1e-5)
    assert close(found, gradients(model, batch))


class Chooser(GPT):
    """Another objective: of two texts, the first should be the likelier one, by a margin."""

    def forward(self, input_ids, labels, worse, margin):
        """worse: (B, T), other texts. margin: (B,). Returns how far apart they are, and a loss."""
        apart = self.score(input_ids, labels) - self.score(worse, labels) - margin  # (B,)
        return apart, -F.logsigmoid(apart).mean()

    def score(self, input_ids, labels):
        """The log-probability of the tokens that labels doesn't mask, for each row: (B,)."""
        log_p = self.head(self.hidden(input_ids)[:, :-1]).log_softmax(dim=-1)  # (B, T - 1, V)
        log_p = log_p.gather(2, input_ids[:, 1:, None]).squeeze(2)
        return (log_p * (labels[:, 1:] >= 0)).sum(dim=1)


def make_pairs():
    random = torch.Generator().manual_seed(2)
    better, worse = torch.randint(64, (2, 11, 16), generator=random)
    labels = better.clone()
    labels[:, :9] = -100
    margin = torch.linspace(-1, 1, 11)
    return {"input_ids": better, "labels": labels, "worse": worse, "margin": margin}


@pytest.mark.parametrize("micro_batch_size", [0, 1, 4])
def test_another_objective_needs_no_other_loop(micro_batch_size, tmp_path):
    """A model whose forward takes more of the batch and returns a value for each pair of rows."""
    model, pairs = make_model(Chooser), make_pairs()
    loss, found = one_step(model, pairs, tmp_path, micro_batch_size)
    assert loss == pytest.approx(model(**pairs)[1].item(), rel=1e-5)
    assert close(found, gradients(model, pairs))


def test_another_objective_is_learned(tmp_path):
    model, pairs = make_model(Chooser), make_pairs()
    config = PretrainConfig(out=str(tmp_path), max_steps=20, micro_batch_size=4)
    before = model(**pairs)[1].item()
    pretrain.train(model, lambda step: pairs, config, Run(config, "log", "", {}))
    assert model(**pairs)[1].item() < before / 10


def test_frozen_parameters_stay(tmp_path):
    model, random = make_model(), torch.Generator().manual_seed(1)
    ids = torch.randint(64, (8, 32), generator=random)
    model.pair_values.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = PretrainConfig(out=str(tmp_path), max_steps=3)
    batch = {"input_ids": ids, "labels": ids}
    pretrain.train(model, lambda step: batch, config, Run(config, "log", "", {}))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys() - {"pair_values.weight"}


# The optimizers and their rates


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(3, 32, 32), (2, 128, 32), (2, 32, 128)]:
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape) * 1e-3).float())
        assert 0.5 < singular.median() < 1.3 and singular.max() < 1.3


def test_muon_takes_the_steps_of_torchs():
    torch.manual_seed(0)
    shapes = [(32, 32), (32, 32), (128, 32), (32, 128)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.1, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.9)
    before = [p.detach().clone() for p in ours]
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        moved = (p - start).norm()
        assert (p - q).norm() < 0.03 * moved  # torch's iteration runs in bfloat16


def test_learning_rate_rises_stays_and_falls():
    config = PretrainConfig(max_steps=100, warmup=0.1, cooldown=0.5)
    scales = [lr_scale(step, config) for step in range(100)]
    assert scales[0] == pytest.approx(0.1) and scales[9:50] == [1.0] * 41
    assert scales[-1] == pytest.approx(0.02)
    assert scales[50:] == sorted(scales[50:], reverse=True)


# What is trained, and on what


def test_what_is_typed_beats_the_preset_which_beats_the_default():
    def options(*argv):
        sizes = {"n_layer": 7, "n_embd": 64}
        return parse_options(Parser("x"), PretrainConfig, argv, preset=lambda args: sizes)[0]

    assert (options().n_layer, options().n_embd) == (7, 64)
    assert options().n_head == PretrainConfig.n_head
    assert (options("--n_layer", "3").n_layer, options("--n_layer", "3").n_embd) == (3, 64)
    assert options("--resume").resume and not options().resume


def test_order_is_a_function_of_the_step_and_visits_everything():
    order = shuffled(10, 4, seed=1)
    first = [i for step in range(5) for i in order(step)]
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10))
    assert first[:10] != first[10:20]
    assert shuffled(10, 4, seed=1)(3) == order(3) and shuffled(10, 4, seed=2)(0) != order(0)


def test_texts_with_an_order_are_read_in_it():
    def read(n, batch_size, max_steps):
        return sum(map(in_order(n, batch_size, max_steps), range(max_steps)), [])

    assert read(10, 2, 5) == list(range(10))
    assert read(10, 2, 10) == 2 * list(range(10))
    assert read(10, 2, 2) == [0, 2, 5, 7]  # a short run reads from all parts
    assert read(10, 2, 6) == [0, 1, 3, 5, 6, 8, 0, 1, 3, 5, 6, 8]  # and ends near the last one


def test_sizes_fit_the_amount_of_text(tmp_path):
    for name, size in (("a.txt", 10_000), ("b.txt", 1_000_000), ("c.txt", 6_000_000)):
        (tmp_path / name).write_bytes(b"some words\n" * (size // 11))
    for names, asked, expected in (
        ([], None, None),
        (["a.txt"], None, "tiny"),
        (["b.txt"], None, "small"),
        (["a.txt", "c.txt"], None, "medium"),
        (["c.txt"], "tiny", "tiny"),
    ):
        args = argparse.Namespace(data=[tmp_path / name for name in names], preset=asked)
        sizes = sizes_for(args)
        assert args.preset == expected
        assert sizes is PRESETS[expected or "world"]
        PretrainConfig(**sizes)


def test_the_preset_gpt2_has_gpt2s_size():
    config = PretrainConfig(**PRESETS["gpt2"])
    sizes = (config.block_size, 50257, config.n_layer, config.n_head, config.n_embd)
    with torch.device("meta"):
        model = GPT(GPTConfig(*sizes))
    n = sum(p.numel() for p in model.parameters())
    tables = model.values.weight.numel() + model.pair_values.weight.numel()
    assert n - tables == 12 * 12 * 768**2 + 50257 * 768  # 123.5 million
    assert tables == (50257 + PAIR_ROWS) * 768  # 64 million more


@pytest.mark.parametrize("name", PRESETS)
def test_the_memory_is_checked_for_every_parameter(name, monkeypatch):
    config, checked = PretrainConfig(**PRESETS[name]), []
    monkeypatch.setattr("common.device.check_memory", lambda n, *rest: checked.append(n))
    with torch.device("meta"):
        model = pretrain.make_model(config, 300, "meta")
    assert checked == [sum(p.numel() for p in model.parameters())]


def test_an_encoding_of_tiktokens_own(tmp_path, monkeypatch):
    """First one with bytes and two merges, made here. Then one that would have to be downloaded."""
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 258}  # ranks can have gaps
    own = tiktoken.Encoding("gpt2", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={})
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", {"gpt2": own}.__getitem__)
        tokenizer = make_tokenizer(None, 7, "gpt2")
    assert tokenizer.encode("abc ab") == [257, 32, 256] and tokenizer.n_vocab == 263

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)  # if already loaded
    error = "gpt2 cannot be downloaded .ProxyError.; go online for its first use"
    with pytest.raises(InputError, match=error):
        make_tokenizer(None, 7, "gpt2")
