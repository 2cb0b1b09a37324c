"""
How well a model predicts what it was not trained on.
"""

import math

import torch

from data.text import Rows
from model import eval_mode


@torch.inference_mode()
def mean_loss(model, batches):
    """The mean loss over all targets in some batches, in nats per token. Dropout is off.

    batches: an iterable of {"input_ids", "labels"}, (B, T) int64 each.
    """
    total, count, device = 0.0, 0, model.embed.weight.device
    with eval_mode(model):
        for batch in batches:
            logits, loss = model(batch["input_ids"].to(device), batch["labels"].to(device))
            total, count = total + loss.item() * len(logits), count + len(logits)
    return total / count


def text_loss(model, tokens, tokenizer):
    """How well the model predicts a text, every token of it but the first. tokens: (n,) integers.

    Returns (nats per token, bits per byte of the text).
    """
    rows = Rows(tokens, model.config.block_size)
    size = max(1, 4096 // model.config.block_size)  # rows at a time
    starts = range(0, len(rows), size)
    batches = (rows.batch(range(i, min(i + size, len(rows)))) for i in starts)
    nats = mean_loss(model, batches)
    bits = nats * (len(tokens) - 1) / math.log(2)
    return nats, bits / tokenizer.count_bytes(tokens[1:])
