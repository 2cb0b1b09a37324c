"""
Exercise 4: the collator. It turns conversations of different lengths into one batch.

    batch      [{"input_ids": [...], "labels": [...]}, ...]: B rows, already encoded, two lists each
    tokenizer  .pad is the id of <|pad|>

Return {"input_ids", "labels"}, two int64 tensors of shape (B, T). T is the length of the longest
row. Fill the shorter rows at the right: input_ids with <|pad|>, labels with -100, as nobody should
learn to say <|pad|>. Leave the rest alone. The shift by one is the model's job.

An example, where <|pad|> is 260:

    input_ids [5, 6, 7], labels [-100, 6, 7]    become    [[5, 6,   7], [[-100, 6,    7],
    input_ids [8, 9],    labels [-100, 9]                  [8, 9, 260]]  [-100, 9, -100]]

In the project: sft_data_collator() in sft.py. It takes conversations that aren't encoded, too.
"""

from types import SimpleNamespace

import torch

TOKENIZER = SimpleNamespace(pad=260)


def sft_data_collator(batch, tokenizer):
    raise NotImplementedError("your turn")


def rows():
    longer = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    return [longer, {"input_ids": [8, 9], "labels": [-100, 9]}]


def test_input_ids_are_padded_at_the_right():
    ids = sft_data_collator(rows(), TOKENIZER)["input_ids"].tolist()
    assert ids == [[5, 6, 7], [8, 9, 260]], f"not as in the example: {ids}"


def test_padding_is_not_supervised():
    labels = sft_data_collator(rows(), TOKENIZER)["labels"].tolist()
    assert labels == [[-100, 6, 7], [-100, 9, -100]], f"not as in the example: {labels}"


def test_both_are_tensors_of_int64():
    for key, value in sft_data_collator(rows(), TOKENIZER).items():
        assert value.dtype == torch.int64, f"{key} is {value.dtype}; an embedding needs int64"


def test_an_end_that_is_also_the_pad_stays_supervised():
    # In some vocabularies <|pad|> is <|end|>. To mask each pad would then mask each end.
    labels = sft_data_collator(rows(), SimpleNamespace(pad=9))["labels"].tolist()
    assert labels[1] == [-100, 9, -100], f"{labels[1]} should be [-100, 9, -100]"


def test_the_rows_stay_as_they_are():
    batch = rows()
    sft_data_collator(batch, TOKENIZER)
    assert batch == rows(), f"you changed the rows, and the next epoch needs them: {batch}"
