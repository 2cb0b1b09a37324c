"""
Stage 1: a network that continues text. It reads plain text, learns to predict the next token,
and becomes a parrot.

    python pretrain.py                       # the embedded world: facts, told and quizzed
    python pretrain.py --data my.txt notes/  # your own UTF-8 text: files or folders
    torchrun --nproc_per_node=2 pretrain.py  # on two processes, or two GPUs
    python pretrain.py --resume              # continue a run that was stopped

Writes out/base.pt (the model), out/pretrain.jsonl (the log), out/train.bin and out/val.bin (token
ids) and, for the embedded world, out/world (its texts and questions). The loop is train(), and
fine-tuning (sft.py) runs the same one: pretraining is fine-tuning with nothing masked.
"""

import common  # noqa: F401  # isort: skip  (before torch)

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from common.device import leave, make_model, processes, say, start
from common.evaluation import text_loss
from common.messages import clock, command
from common.optimizer import make_optimizers
from common.options import Parser, not_empty, parse_options, setting
from common.presets import FITS, PRESETS, sizes_for
from common.report import beginnings, show_parrot
from common.run import Run
from data import world
from data.corpus import make_tokenizer, read_corpus
from data.order import in_order, shuffled
from data.text import Rows, open_tokens
from model import GPTConfig


@dataclass
class TrainConfig:
    """What all stages need to know. Each field is an option of the command line."""

    out: str = setting("out", "folder to write everything to", metavar="FOLDER")
    device: str = setting("auto", "cuda, mps or cpu; auto takes the first one available")
    seed: int = setting(1, "random seed for the weights, order, dropout and world", 0, 2**62)
    resume: bool = setting(False, "continue a run that was stopped")
    batch_size: int = setting(16, "rows in one optimizer step, over all processes", 1, 10**6)
    micro_batch_size: int = setting(0, "rows per forward pass, to save memory; 0 means all", 0)
    max_steps: int = setting(1800, "optimizer steps")
    lr: float = setting(0.03, "learning rate of the matrices inside the blocks (Muon)")
    embed_lr: float = setting(0.1, "learning rate of the tables, the embedding among them (AdamW)")
    weight_decay: float = setting(0.0, "how strongly to pull the matrices toward zero")
    warmup: float = setting(0.02, "fraction of steps for warmup: at the start, rates rise", 0, 1)
    cooldown: float = setting(0.6, "fraction of steps for cooldown: at the end, rates fall", 0, 1)
    eval_every: int = setting(600, "steps between validations; they fall on multiples of 10")


@dataclass
class PretrainConfig(TrainConfig):
    block_size: int = setting(GPTConfig.block_size, "the longest context, in tokens", 2, 10**6)
    vocab_size: int = setting(GPTConfig.vocab_size, "vocabulary size, special tokens included")
    tokenizer: str = setting("", "a tiktoken encoding, such as gpt2, instead of learning one")
    n_layer: int = setting(GPTConfig.n_layer, "blocks")
    n_head: int = setting(GPTConfig.n_head, "attention heads in each block")
    n_embd: int = setting(GPTConfig.n_embd, "width of the residual stream")
    dropout: float = setting(GPTConfig.dropout, "share of activations to drop", 0, below=1)
    compile: bool = setting(False, "on CUDA, compile the blocks: a minute's wait, then faster")


def lr_scale(step, config):
    """The factor on every learning rate at a step: rises to 1, stays there, falls toward 0."""
    warmup, cooldown = config.warmup * config.max_steps, config.cooldown * config.max_steps
    return min(1, (step + 1) / max(1, warmup), (config.max_steps - step) / max(1, cooldown))


def micro_batches(batch, config, run):
    """This process's rows of a batch, at most micro_batch_size at a time, on the device.

    Of n processes, process r takes rows r, r + n, r + 2n, ... Yields dicts like batch.
    """
    mine = {key: rows[run.rank :: run.world_size] for key, rows in batch.items()}
    n = len(mine["input_ids"])  # 0 if there are fewer rows than processes
    size = config.micro_batch_size or max(n, 1)
    for i in range(0, n, size):
        yield {key: rows[i : i + size].to(run.device) for key, rows in mine.items()}


def train(model, batches, config, run, evaluate=None):
    """The only training loop. Trains the model in place and leaves it in eval mode.

    batches(step) is the step's whole batch, {"input_ids", "labels"}, (B, T) int64 each: a pure
    function of the step, so a run can resume exactly. model(**batch) returns (logits, loss): a row
    per target (in dpo.py, per pair), and the mean loss. evaluate(model) returns a dict for the log,
    every config.eval_every steps and at the end. Returns the last row of the log.
    """
    optimizers = make_optimizers(model, config)
    model.train()
    for step in run.steps(model, optimizers):  # from 0, or from where a run was stopped
        batch = batches(step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale(step, config)

        loss_sum, count = 0, 0
        for rows in micro_batches(batch, config, run):
            with run.autocast():
                logits, loss = model(**rows)
            loss = loss * len(logits)  # from the mean to the sum over the targets in these rows
            loss.backward()  # adds to the gradients
            loss_sum, count = loss_sum + loss.detach(), count + len(logits)
        loss_sum, count = run.all_reduce(loss_sum, count)  # also sums the gradients
        for p in model.parameters():
            if p.requires_grad:  # fine-tuning freezes a table
                p.grad /= max(count, 1)  # now the gradient of the mean, loss_sum / count

        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.end_step(loss_sum / max(count, 1), batch, evaluate)  # log, save, stop after Ctrl-C
    model.eval()
    return run.row


@command
def main(argv=None):
    parser = Parser("pretrain.py", __doc__)
    what = "UTF-8 text files or folders (default: the embedded world)"
    parser.add_argument("--data", nargs="+", type=not_empty, metavar="PATH", help=what)
    what = f"settings to start from (default: world; with --data, {'/'.join(FITS)} by text size)"
    parser.add_argument("--preset", choices=PRESETS, help=what)
    config, args = parse_options(parser, PretrainConfig, argv, sizes_for)
    device = start(config.device, config.seed)
    rank, world_size = processes()
    out = Path(config.out)

    say(f"Reading and tokenizing {', '.join(args.data or ['the embedded world'])}.")
    corpus = read_corpus(args.data, config.seed)
    tokenizer = make_tokenizer(corpus, config.vocab_size, config.tokenizer)
    corpus.check_length(tokenizer, config.block_size)
    model = make_model(config, tokenizer.n_vocab, device)
    run = Run(config, "pretrain", "base.pt", {"text_sha256": corpus.fingerprint(tokenizer)})
    run.claim_files(corpus.files, ["train.bin", "train.sha256", "val.bin", "val.sha256"])
    if rank == 0:
        corpus.write(tokenizer, out)
    if world_size > 1:
        dist.barrier()  # wait for the files
    tokens, val_tokens = (open_tokens(out / f"{side}.bin", tokenizer) for side in corpus.sides)

    rows = Rows(tokens, config.block_size)
    indices = shuffled(len(rows), config.batch_size, config.seed)
    if corpus.world:  # its texts have an order: first they tell, then they ask
        indices = in_order(len(rows), config.batch_size, config.max_steps)
    seen = config.max_steps * config.batch_size * config.block_size
    if args.data:
        say(f"Using the settings of --preset {args.preset}; the options you typed override them.")
    say(
        f"Pretraining on {device}: {config.n_layer} layers, {config.n_embd} wide, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(tokens):,} tokens, "
        f"each read about {seen / len(tokens):.1f} times."
    )

    def batches(step):
        input_ids = rows.take(indices(step))  # (B, T)
        return {"input_ids": input_ids, "labels": input_ids}  # nothing is masked

    def evaluate(model):
        nats, bits = text_loss(model, val_tokens, tokenizer)
        return {"val_loss": nats, "val_bpb": bits}

    last = train(model, batches, config, run, evaluate)
    if rank > 0:
        return
    run.finish(tokenizer, corpus.write_world, stage="base", trained_on=corpus.trained_on)
    prompts = world.PROMPTS if corpus.world else beginnings(val_tokens, tokenizer)
    scores = f"{last['val_loss']:.3f} nats per token, {last['val_bpb']:.3f} bits per byte"
    say(f"\nHeld-out loss: {scores}. Here is how the model continues some prompts:")
    show_parrot(model, tokenizer, prompts)
    say(f"\nThe model continues; it doesn't answer. Saved as {run.path} ({clock(run.elapsed())}).")
    more = f" --out {out}" if config.out != "out" else ""
    say(f"Next: python sft.py{more}{' --data YOUR_CONVERSATIONS' if args.data else ''}")


if __name__ == "__main__":
    main()
    leave()
