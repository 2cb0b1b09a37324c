"""
Which examples make up the batch of each step: pure functions of the step's number.

So a run that was stopped can resume exactly, and several processes agree without talking.
"""

import functools
import json

import numpy as np


def shuffled(n, batch_size, seed):
    """A function from a step to the indices of its batch. Each of n items comes once per epoch."""

    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return np.random.default_rng([seed, epoch]).permutation(n)

    def indices(step):
        places = range(step * batch_size, (step + 1) * batch_size)
        return [order(place // n)[place % n] for place in places]

    return indices


def in_order(n, batch_size, max_steps):
    """Like shuffled(), but from the first of n items to the last.

    A run reads all items once, or several times, and ends at the last one. If its length isn't a
    multiple of n, it skips some, evenly.
    """
    total = max_steps * batch_size
    stride = -(-total // n) * n / total  # 1 or more

    def indices(step):
        places = range(step * batch_size, (step + 1) * batch_size)
        return [int(place * stride) % n for place in places]

    return indices


def similar_lengths(lengths, batch_size, seed):
    """Like shuffled(), but with items of similar length in each batch.

    Padding costs as much as text. So we shuffle the items, sort each stretch of 32 batches by
    length, cut the stretches into batches, and shuffle the batches.
    """
    lengths = np.array(lengths)
    per_epoch = -(-len(lengths) // batch_size)

    @functools.lru_cache(maxsize=2)
    def plan(epoch):
        rng = np.random.default_rng([seed, epoch])
        order, stretch = rng.permutation(len(lengths)), 32 * batch_size
        stretches = np.split(order, range(stretch, len(order), stretch))
        order = np.concatenate([s[np.argsort(lengths[s], kind="stable")] for s in stretches])
        batches = np.split(order, range(batch_size, len(order), batch_size))
        return [batches[i] for i in rng.permutation(per_epoch)]

    def indices(step):
        return plan(step // per_epoch)[step % per_epoch]

    return indices


def hold_out(examples, seed):
    """Hold out a random tenth of the examples, but none that we also train on.

    Returns (examples to train on, examples held out).
    """
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    n = len(order) // 10
    rest = [examples[i] for i in sorted(order[n:])]
    seen = {json.dumps(example) for example in rest}
    return rest, [examples[i] for i in order[:n] if json.dumps(examples[i]) not in seen]
