"""
Presets for pretrain.py: choose one with --preset, or let the amount of text decide.
"""

import math

from common.files import find_files

# "world" and "small" were tuned by measuring; the others are merely reasonable.
PRESETS = {
    "world": {},  # the defaults of PretrainConfig
    "tiny": {
        **dict(n_layer=3, n_embd=96, block_size=128, vocab_size=512, dropout=0.1),
        **dict(max_steps=300, lr=0.02, embed_lr=0.01, weight_decay=0.1, eval_every=50),
    },
    "small": {
        **dict(n_layer=3, n_embd=128, block_size=128, vocab_size=1024),
        **dict(max_steps=560, lr=0.02, embed_lr=0.01, weight_decay=0.1),
        **dict(cooldown=0.8, eval_every=70),
    },
    "medium": {
        **dict(n_layer=4, n_embd=256, n_head=4, block_size=256),
        **dict(max_steps=1500, lr=0.02, embed_lr=0.01, weight_decay=0.1),
        **dict(cooldown=0.8, eval_every=250),
    },
    "gpt2": {  # GPT-2's 124 million, and 64 million in value tables; for a GPU
        **dict(n_layer=12, n_embd=768, n_head=12, block_size=1024, tokenizer="gpt2"),
        **dict(batch_size=512, micro_batch_size=16, compile=True),
        **dict(max_steps=5000, lr=0.02, embed_lr=0.003, weight_decay=0.01, eval_every=250),
    },
}
FITS = {"tiny": 0.3, "small": 5.0, "medium": math.inf}  # fits texts up to this many megabytes


def sizes_for(args):
    """The settings of the preset that was asked for, or else of the one that fits the text."""
    if args.data and not args.preset:
        megabytes = sum(path.stat().st_size for path in find_files(args.data)) / 1e6
        args.preset = next(name for name, most in FITS.items() if megabytes < most)
    return PRESETS[args.preset or "world"]
