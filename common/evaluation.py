"""
How well a model predicts what it was not trained on.
"""

import math

import torch

from data.text import Rows


@torch.inference_mode()
def mean_loss(model, batches):
    """The mean loss over all targets in some batches, in nats per token. Dropout is off.

    batches: an iterable of {"input_ids", "labels"}, (B, T) int64 each.
    """
    total, count, device = 0.0, 0, model.embed.weight.device
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            logits, loss = model(batch["input_ids"].to(device), batch["labels"].to(device))
            total, count = total + loss.item() * len(logits), count + len(logits)
    finally:
        model.train(was_training)
    return total / count


def text_loss(model, tokens, tokenizer):
    """How well a model predicts a text, except its first token and leftovers that don't fill a row.

    tokens: (n,) integers. Returns (nats per token, bits per byte of the text).
    """
    rows = Rows(tokens, model.config.block_size)
    size = max(1, 4096 // model.config.block_size)  # rows at a time
    starts = range(0, len(rows), size)
    parts = (rows.take(range(i, min(i + size, len(rows)))) for i in starts)
    nats = mean_loss(model, ({"input_ids": ids, "labels": ids} for ids in parts))
    n = len(rows) * (model.config.block_size - 1)  # tokens that were predicted
    return nats, nats * n / math.log(2) / tokenizer.count_bytes(tokens[1 : n + 1])
