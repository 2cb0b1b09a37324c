"""
The exercises: red with the hole, green with an answer, and red again with each usual mistake.

We import an exercise by its path, fill its hole with a function, and call its tests one by one.
"""

import contextlib
import importlib.util
import inspect
import re
from types import SimpleNamespace

import pytest
import torch

import model
import pretrain
from conftest import ROOT
from data import chat
from dpo import Chooser
from sft import sft_data_collator

FOLDER = ROOT / "docs" / "exercises"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
SECTION = r"^## \d+\. \[(\w+)\.py\]\(\1\.py\)\n(.*?)(?=^## |\Z)"
SECTIONS = dict(re.findall(SECTION, PAGE, re.MULTILINE | re.DOTALL))


class OneStep:
    """Stands in for the Run that train() wants: one step, without a log or a file."""

    def steps(self, model, optimizers):
        yield 0

    def autocast(self):
        return contextlib.nullcontext()

    def all_reduce(self, loss_sum, count):
        return loss_sum, count

    def end_step(self, loss, batch, evaluate):
        self.row = loss  # train() returns it


def one_step_of_train(model, optimizer, batches):
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "make_optimizers", lambda model, config: [optimizer])
        patch.setattr(pretrain, "micro_batches", lambda batch, config, run: batch)
        config = pretrain.PretrainConfig(max_steps=1)
        return pretrain.train(model, lambda step: batches, config, OneStep())


def loss_of_dpo(chosen, rejected, chosen_before, rejected_before, beta):
    settings = SimpleNamespace(beta=beta, likelihood=0.0)
    now = torch.stack((chosen, rejected), dim=1)
    before = torch.stack((chosen_before, rejected_before), dim=1)
    return Chooser.preference(settings, now, before)[1]


# For each exercise, the function with the hole, and our own code for it.
OURS = {
    "cross_entropy": ("cross_entropy", model.cross_entropy),
    "attention": ("attend", lambda q, k, v: model.attend(q, k, v, None, 0.0)),
    "template": ("encode_chat", chat.encode_chat),
    "collator": ("sft_data_collator", sft_data_collator),
    "step": ("training_step", one_step_of_train),
    "preference": ("dpo_loss", loss_of_dpo),
}


def load(exercise):
    """A fresh module, so that no answer stays in it."""
    path = FOLDER / f"{exercise}.py"
    spec = importlib.util.spec_from_file_location(f"exercise_{exercise}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def its_tests(module):
    return {name: test for name, test in vars(module).items() if name.startswith("test_")}


def run_tests(module):
    """Call all tests of an exercise. Returns {name: the error} of the red ones."""
    red = {}
    for name, test in its_tests(module).items():
        try:
            test()
        except Exception as error:  # a wrong answer may fail in any way
            red[name] = error
    return red


def solution_of(exercise):
    [code] = re.findall(r"^```python\n(.*?)^```$", SECTIONS[exercise], re.MULTILINE | re.DOTALL)
    return code


# Red, then green


@pytest.mark.parametrize("exercise", OURS)
def test_with_the_hole_every_test_is_red(exercise):
    module = load(exercise)
    red = run_tests(module)
    todo = f"{exercise}.py has no hole. If your answer is in it: git restore docs/exercises"
    assert any(isinstance(error, NotImplementedError) for error in red.values()), todo
    assert red.keys() == its_tests(module).keys()
    assert {str(error) for error in red.values()} == {"your turn"}


@pytest.mark.parametrize("exercise", OURS)
def test_with_our_code_every_test_is_green(exercise):
    module = load(exercise)
    setattr(module, *OURS[exercise])
    assert run_tests(module) == {}


@pytest.mark.parametrize("exercise", OURS)
def test_with_the_solution_every_test_is_green(exercise):
    """It has the signature of the hole, and needs no import that the file doesn't have."""
    module, name = load(exercise), OURS[exercise][0]
    hole = getattr(module, name)
    exec(compile(solution_of(exercise), f"README.md, {exercise}", "exec"), vars(module))
    assert getattr(module, name) is not hole
    assert inspect.signature(getattr(module, name)) == inspect.signature(hole)
    assert run_tests(module) == {}


# Red again: the usual mistakes

MISTAKES = []  # (exercise, the test that catches it, the wrong answer)


def mistake(exercise, caught_by):
    """Note the function below as a wrong answer to an exercise."""

    def note(answer):
        MISTAKES.append((exercise, caught_by, answer))
        return answer

    return note


@mistake("cross_entropy", "test_logits_of_ten_thousand")
def exp_overflows(logits, targets):
    logits, targets = logits[targets != -100], targets[targets != -100]
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    return -p[range(len(targets)), targets].log().sum() / max(1, len(targets))


@mistake("cross_entropy", "test_logits_of_ten_thousand")
def probability_is_clamped(logits, targets):
    logits, targets = logits[targets != -100], targets[targets != -100]
    p = logits.softmax(dim=1)[range(len(targets)), targets]
    return -p.clamp(min=1e-9).log().sum() / max(1, len(targets))


@mistake("cross_entropy", "test_the_worked_example")
def divides_by_all_rows(logits, targets):
    counts = targets != -100
    losses = -logits.log_softmax(dim=1)[range(len(targets)), targets.where(counts, 0)]
    return losses.where(counts, 0).mean()


@mistake("cross_entropy", "test_no_row_counts")
def divides_by_zero(logits, targets):
    logits, targets = logits[targets != -100], targets[targets != -100]
    return -logits.log_softmax(dim=1)[range(len(targets)), targets].mean()


@mistake("cross_entropy", "test_rows_that_do_not_count_change_nothing")
def masked_rows_count_as_token_0(logits, targets):
    losses = -logits.log_softmax(dim=1)[range(len(targets)), targets.clamp(min=0)]
    return losses.sum() / max(1, (targets != -100).sum())


def attention(q, k, v, scale=None, diagonal=1, hidden=float("-inf"), dim=-1, softmax=torch.softmax):
    """Right with its default settings. Each mistake changes one of them."""
    scores = q @ k.transpose(-2, -1) / (scale or q.size(-1) ** 0.5)
    future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal)
    return softmax(scores.masked_fill(future, hidden), dim) @ v


@mistake("attention", "test_the_worked_example")
def scores_are_not_scaled(q, k, v):
    return attention(q, k, v, scale=1.0)


@mistake("attention", "test_no_position_sees_the_future")
def nothing_is_hidden(q, k, v):
    return attention(q, k, v, diagonal=q.size(2))


@mistake("attention", "test_no_position_sees_the_future")
def the_next_position_is_seen(q, k, v):
    return attention(q, k, v, diagonal=2)


@mistake("attention", "test_without_preferences_it_is_the_mean_up_to_here")
def a_position_does_not_see_itself(q, k, v):
    return attention(q, k, v, diagonal=0)


@mistake("attention", "test_without_preferences_it_is_the_mean_up_to_here")
def hidden_scores_are_zero(q, k, v):
    return attention(q, k, v, hidden=0.0)


@mistake("attention", "test_without_preferences_it_is_the_mean_up_to_here")
def softmax_goes_along_the_wrong_side(q, k, v):
    return attention(q, k, v, dim=-2)


@mistake("attention", "test_without_preferences_it_is_the_mean_up_to_here")
def mask_comes_after_the_softmax(q, k, v):
    return attention(q, k, v, softmax=lambda x, dim: x.exp().tril() / x.size(-1))


@mistake("attention", "test_large_scores")
def exp_of_scores_overflows(q, k, v):
    return attention(q, k, v, softmax=lambda x, dim: x.exp() / x.exp().sum(dim, keepdim=True))


@mistake("attention", "test_large_scores")
def one_maximum_for_all_rows(q, k, v):
    def softmax(x, dim):
        x = (x - x.max()).exp()
        return x / x.sum(dim, keepdim=True)

    return attention(q, k, v, softmax=softmax)


def template(messages, tokenizer, masked=lambda ids, last: [], encode=None, cue=True, between=()):
    """The ids of the template. masked(answer, last) is the mask of an answer's tokens."""
    input_ids, supervised = [], []
    for i, message in enumerate(messages):
        by_user, last = message["role"] == "user", i == len(messages) - 1
        text = (encode or tokenizer.encode)(message["content"])
        ids = [tokenizer.user if by_user else tokenizer.assistant, *text, tokenizer.end, *between]
        input_ids += ids
        supervised += [False] * len(ids) if by_user else masked(ids, last)
    if by_user and cue:
        input_ids, supervised = [*input_ids, tokenizer.assistant], [*supervised, False]
    return input_ids, supervised


def right_mask(ids, last):
    return [False] + [True] * (len(ids) - 1)


@mistake("template", "test_the_mask")
def end_is_not_supervised(messages, tokenizer):
    return template(messages, tokenizer, lambda ids, _: right_mask(ids, _)[:-1] + [False])


@mistake("template", "test_the_mask")
def role_is_supervised(messages, tokenizer):
    return template(messages, tokenizer, lambda ids, _: [True] * len(ids))


@mistake("template", "test_the_mask")
def everything_is_supervised(messages, tokenizer):
    input_ids, _ = template(messages, tokenizer, right_mask)
    return input_ids, [True] * len(input_ids)


@mistake("template", "test_every_answer_is_supervised")
def only_the_last_answer_is_supervised(messages, tokenizer):
    def masked(ids, last):
        return right_mask(ids, last) if last else [False] * len(ids)

    return template(messages, tokenizer, masked)


@mistake("template", "test_the_cue_to_answer")
def cue_is_missing(messages, tokenizer):
    return template(messages, tokenizer, right_mask, cue=False)


@mistake("template", "test_a_typed_end_is_only_text")
def typed_end_ends_the_turn(messages, tokenizer):
    def encode(text):
        return tokenizer.encoding.encode(text, allowed_special="all")

    return template(messages, tokenizer, right_mask, encode)


@mistake("template", "test_the_ids")
def line_break_after_each_turn(messages, tokenizer):
    return template(messages, tokenizer, right_mask, between=tokenizer.encode("\n"))


def collate(batch, pad, left=False, label=-100):
    T = max(len(row["input_ids"]) for row in batch)
    padded = {}
    for key, value in (("input_ids", pad), ("labels", label)):
        fill = [[value] * (T - len(row[key])) for row in batch]
        pairs = [(row[key], more) for row, more in zip(batch, fill, strict=True)]
        padded[key] = torch.tensor([more + ids if left else ids + more for ids, more in pairs])
    return padded


@mistake("collator", "test_input_ids_are_padded_at_the_right")
def padded_at_the_left(batch, tokenizer):
    return collate(batch, tokenizer.pad, left=True)


@mistake("collator", "test_padding_is_not_supervised")
def padding_is_supervised(batch, tokenizer):
    return collate(batch, tokenizer.pad, label=tokenizer.pad)


@mistake("collator", "test_padding_is_not_supervised")
def labels_are_shifted_already(batch, tokenizer):
    padded = collate(batch, tokenizer.pad)
    end = torch.full((len(batch), 1), -100)
    return {**padded, "labels": torch.cat((padded["labels"][:, 1:], end), dim=1)}


@mistake("collator", "test_both_are_tensors_of_int64")
def ids_are_floats(batch, tokenizer):
    return {key: value.float() for key, value in collate(batch, tokenizer.pad).items()}


@mistake("collator", "test_an_end_that_is_also_the_pad_stays_supervised")
def every_pad_is_masked(batch, tokenizer):
    padded = collate(batch, tokenizer.pad, label=tokenizer.pad)
    padded["labels"][padded["input_ids"] == tokenizer.pad] = -100
    return padded


@mistake("collator", "test_the_rows_stay_as_they_are")
def rows_are_made_longer(batch, tokenizer):
    T = max(len(row["input_ids"]) for row in batch)
    for row in batch:
        row["input_ids"] += [tokenizer.pad] * (T - len(row["input_ids"]))
        row["labels"] += [-100] * (T - len(row["labels"]))
    return {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}


def step(model, optimizer, batches, weight, clean=True):
    """One update. weight(labels, n) is what the mean loss of n targets is multiplied by."""
    if clean:
        optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        logits, loss = model(**batch)
        loss = loss * weight(batch["labels"], len(logits))
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def targets_in(batches):
    return max(1, sum((batch["labels"][:, 1:] != -100).sum().item() for batch in batches))


@mistake("step", "test_the_loss_is_a_sum_over_a_count")
def mean_of_means(model, optimizer, batches):
    return step(model, optimizer, batches, lambda labels, n: 1 / len(batches))


@mistake("step", "test_the_loss_is_a_sum_over_a_count")
def first_labels_are_counted(model, optimizer, batches):
    count = max(1, sum((batch["labels"] != -100).sum().item() for batch in batches))
    return step(model, optimizer, batches, lambda labels, n: n / count)


@mistake("step", "test_the_gradient_is_one_too")
def only_the_loss_is_divided(model, optimizer, batches):
    return step(model, optimizer, batches, lambda labels, n: n) / targets_in(batches)


@mistake("step", "test_the_gradient_is_one_too")
def each_micro_batch_is_a_step(model, optimizer, batches):
    count = targets_in(batches)
    return sum(step(model, optimizer, [b], lambda labels, n: n / count) for b in batches)


@mistake("step", "test_the_next_step_has_no_old_gradients")
def old_gradients_stay(model, optimizer, batches):
    count = targets_in(batches)
    return step(model, optimizer, batches, lambda labels, n: n / count, clean=False)


@mistake("step", "test_nothing_counts")
def count_is_zero(model, optimizer, batches):
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    return step(model, optimizer, batches, lambda labels, n: n / count)


@mistake("preference", "test_the_worked_example")
def beta_is_outside(chosen, rejected, chosen_before, rejected_before, beta):
    gain = chosen - chosen_before - (rejected - rejected_before)
    return -beta * torch.nn.functional.logsigmoid(gain).mean()


@mistake("preference", "test_the_worked_example")
def margin_has_the_wrong_sign(chosen, rejected, chosen_before, rejected_before, beta):
    return loss_of_dpo(rejected, chosen, rejected_before, chosen_before, beta)


@mistake("preference", "test_it_starts_at_ln_2")
def reference_is_forgotten(chosen, rejected, chosen_before, rejected_before, beta):
    return torch.nn.functional.softplus(-beta * (chosen - rejected)).mean()


@mistake("preference", "test_each_pair_has_its_own_loss")
def margins_are_averaged_first(chosen, rejected, chosen_before, rejected_before, beta):
    margins = beta * (chosen - chosen_before - rejected + rejected_before)
    return torch.nn.functional.softplus(-margins.mean())


@mistake("preference", "test_margins_of_a_thousand")
def logarithm_of_zero(chosen, rejected, chosen_before, rejected_before, beta):
    margins = beta * (chosen - chosen_before - rejected + rejected_before)
    return -margins.sigmoid().log().mean()


@mistake("preference", "test_it_pushes_one_answer_up_and_the_other_down")
def rejected_answer_gets_no_gradient(chosen, rejected, chosen_before, rejected_before, beta):
    return loss_of_dpo(chosen, rejected.detach(), chosen_before, rejected_before, beta)


@pytest.mark.parametrize(
    "exercise, caught_by, answer", MISTAKES, ids=[answer.__name__ for *_, answer in MISTAKES]
)
def test_a_mistake_is_caught(exercise, caught_by, answer):
    """By the test that is meant for it, with a message."""
    module = load(exercise)
    setattr(module, OURS[exercise][0], answer)
    red = run_tests(module)
    assert caught_by in red
    assert isinstance(red[caught_by], AssertionError) and str(red[caught_by])


@pytest.mark.parametrize("exercise", OURS)
def test_every_test_catches_a_mistake(exercise):
    caught_by = {test for name, test, _ in MISTAKES if name == exercise}
    assert caught_by == its_tests(load(exercise)).keys()


# The page and the files


def test_every_exercise_has_a_section_and_every_section_an_exercise():
    assert list(SECTIONS) == list(OURS)  # in this order
    assert {path.stem for path in FOLDER.glob("*.py")} == set(OURS)
    assert len(re.findall(r"^## ", PAGE, re.MULTILINE)) == len(OURS)
    for section in SECTIONS.values():
        summaries = re.findall(r"<details>\n<summary>(.*)</summary>\n\n", section)
        assert summaries == ["A hint", "A solution"] and section.count("\n\n</details>") == 2
        hint, _, solution = section.partition("<summary>A solution</summary>")
        assert "```" not in hint and solution.count("```python") == 1


def test_the_page_links_to_our_code():
    for file in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (FOLDER / file).exists(), file
    for exercise, section in SECTIONS.items():
        [(name, file)] = re.findall(r"^Ours: \[`(\w+)\(\)` in [\w/.]+\]\(([^)]+)\)", section, re.M)
        assert f"def {name}(" in (FOLDER / file).read_text(encoding="utf-8"), name
        text = load(exercise).__doc__
        assert f"{name}() in {file.removeprefix('../../')}." in text, "the file says the same"


def test_the_files_are_short():
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path
    assert max(map(len, PAGE.splitlines())) <= 120
