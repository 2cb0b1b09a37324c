"""
The models for the page: their weights as 16-bit numbers, and what else JavaScript needs.

A weight becomes a whole number of small steps. A later stage holds only what it changed: that is
little, and compresses well.
"""

import base64
import zlib

import numpy as np

LARGEST = 12_000_000  # parameters; with more, the page would be too large to send to a friend
STEPS = 400  # a table's typical number is this many steps
PAIR_STEPS = 40  # the table for pairs of tokens is most of a model, and tolerates coarser steps


def why_not(models):
    """Why these models can't be in the page, or "". models: {name: Checkpoint}"""
    base = models["base"]
    n = sum(p.numel() for p in base.model.parameters())
    if n > LARGEST:
        return f"They have {n:,} parameters, and a page takes at most {LARGEST:,}."
    if any(model.model.config != base.model.config for model in models.values()):
        return "Their sizes differ. Train all stages from one base model."
    if not base.tokenizer.marks:
        return "Their tokenizer is one of tiktoken's, and the page only runs our own."
    return ""


def pack(models):
    """Returns (about, numbers): a dict for JSON, and base64 text, for unpack() in weights.js.

    models: {name: Checkpoint}, in the order of the stages, all with the same sizes and tokenizer.
    """
    weights = {
        name: {key: p.detach().float().cpu().numpy() for key, p in model.model.named_parameters()}
        for name, model in models.items()
    }
    keys = weights["base"]
    steps = {key: step_for(key, [tables[key] for tables in weights.values()]) for key in keys}
    before = {key: np.int16(0) for key in keys}  # the stage before, in steps
    about, low, high = {"models": []}, [], []
    for name, checkpoint in models.items():
        tables = []
        for key, weight in weights[name].items():
            counts = np.rint(weight / steps[key]).astype(np.int16)
            change = counts - before[key]
            if name == "base" or change.any():
                rows, columns = weight.shape
                tables.append({"key": key, "rows": rows, "columns": columns, "step": steps[key]})
                # The sign goes to the lowest bit, so that small numbers have an empty high byte.
                packed = ((change << 1) ^ (change >> 15)).astype(np.uint16).ravel()
                low.append(packed & 255)
                high.append(packed >> 8)
            before[key] = counts
        alias = checkpoint.model.alias.tolist()
        alias = {i: other for i, other in enumerate(alias) if other != i}
        about["models"].append({"name": name, "tables": tables, "alias": alias})
    config = models["base"].model.config
    about["config"] = vars(config)
    about["merges"] = models["base"].tokenizer.state()["merges"]
    # All low bytes, then all high bytes: the high ones are alike, and compress to little.
    numbers = np.concatenate(low + high).astype(np.uint8).tobytes()
    return about, base64.b64encode(zlib.compress(numbers)).decode("ascii")


def step_for(key, weights):
    """The size of one step for the tables of this name, arrays of floats."""
    typical = max(float(np.sqrt(np.square(weight, dtype=float).mean())) for weight in weights)
    largest = max(float(np.abs(weight).max()) for weight in weights)
    steps = PAIR_STEPS if key == "pair_values.weight" else STEPS
    return max(typical / steps, largest / 16383, 1e-12)  # 14 bits: a change may be twice as large
