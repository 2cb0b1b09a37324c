"""The models in the page: the same numbers as torch's, and a page that anybody can use."""

import json
import math
import re
import socket
from pathlib import Path

import pytest
import torch

import common.weights
import model as network
from common.checkpoint import Checkpoint
from common.completion import fit
from common.page import FOLDER, SCRIPTS, page
from common.stages import load_stages
from common.weights import pack, why_not
from data import Tokenizer, encode_chat
from data.world.strangers import load_strangers
from model import GPT, GPTConfig
from same_numbers import greedy, largest_difference, odd_texts, read_page, rows_for, same_ids
from sft import encode, sft_data_collator
from test_report import EVIL, LOGS, TOKENS

TALK = {"source": "", "tokens": TOKENS}
NAMES = ("base", "tuned", "dpo")
QUESTION = "What is the capital of Kenya?"
STYLE = "Talk like a pirate."


def make_models(text="the cat nods and the cat sits", vocab_size=275, **sizes):
    """Three models with random weights, as if of three stages."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([text], vocab_size)
    sizes = dict(block_size=64, n_layer=2, n_head=2, n_embd=16) | sizes
    models = {}
    for name in NAMES:
        model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, dropout=0.0, **sizes)).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.7)
        models[name] = Checkpoint(Path(f"{name}.pt"), model, tokenizer, {})
    models["dpo"].model.load_state_dict(models["tuned"].model.state_dict())
    models["dpo"].model.blocks[1].mlp.up.weight.data += 0.01  # all that this stage changed
    models["tuned"].model.alias[tokenizer.end] = 10
    return models


def write_page(path, models, prompts=("the cat?", "nods")):
    examples = [{"prompt": p, **{name: f"It is {p}." for name in models}} for p in prompts]
    paths = {name: checkpoint.path for name, checkpoint in models.items()}
    path.write_text(page(paths, LOGS, TALK, examples, None, pack(models)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def random_page(tmp_path_factory):
    """A page with three small models of random weights, and the models."""
    models = make_models()
    return write_page(tmp_path_factory.mktemp("live") / "a # page.html", models), models


@pytest.fixture
def opened(browser, random_page):
    """The browser with that page, when its models are there."""
    open_page(browser, random_page[0])
    browser.value("find('fresh').click()")
    yield browser
    assert "Runtime.exceptionThrown" not in methods(browser)


def open_page(browser, path, width=1000, scheme="light"):
    """Open a page, and wait until its models have answered the first prompt by themselves."""
    browser.open(path, width, scheme)
    browser.wait_for("globalThis.inside?.row && !jobs.size")


def methods(browser):
    """What happened since the page was opened."""
    browser.value("new Promise(done => setTimeout(done, 20))")
    return [event["method"] for event in browser.events]


def run(browser, prompt, **settings):
    """Ask all models, and wait for their answers."""
    for name, value in {"prompt": prompt, **settings}.items():
        browser.value(f"find('{name}').value = {json.dumps(value)}")
    browser.value("find('run').click()")
    browser.wait_for("!jobs.size")
    return browser.value("columns.map(column => column.answer())")


@pytest.fixture
def in_small_world(browser, small_world):
    """The browser with the page of a run, when its models are there."""
    open_page(browser, small_world / "report.html")
    browser.value("find('fresh').click()")
    yield browser
    assert "Runtime.exceptionThrown" not in methods(browser)


# -------------------------------------------------------------------------------------------------
# Packing


def test_a_stage_holds_only_what_it_changed():
    models = make_models()
    about, numbers = pack(models)
    base, tuned, dpo = about["models"]
    assert len(base["tables"]) == len(tuned["tables"]) == 15
    assert [table["key"] for table in dpo["tables"]] == ["blocks.1.mlp.up.weight"]
    assert (base["alias"], tuned["alias"]) == ({}, {models["base"].tokenizer.end: 10})
    steps = {table["key"]: table["step"] for table in base["tables"]}
    assert steps["pair_values.weight"] == pytest.approx(0.7 / 40, rel=0.1)
    assert steps["embed.weight"] == pytest.approx(0.7 / 400, rel=0.1)
    assert numbers.isascii() and len(numbers) % 4 == 0


def test_what_was_packed_is_what_the_page_holds(random_page):
    path, models = random_page
    about, _ = pack(models)
    steps = {table["key"]: table["step"] for table in about["models"][0]["tables"]}
    for name, rounded in read_page(path).items():
        for key, p in models[name].model.named_parameters():
            error = (rounded.state_dict()[key] - p).abs().max().item()
            assert 0.3 * steps[key] < error < 0.51 * steps[key]
        assert torch.equal(rounded.alias, models[name].model.alias)


@pytest.mark.parametrize("stage", NAMES)
def test_odd_weights(stage, browser, tmp_path):
    """Tables of zeros, of huge numbers, and of numbers that turn around between stages."""
    models = make_models()
    weights = dict(models[stage].model.named_parameters())
    with torch.no_grad():
        weights["values.weight"].zero_()
        weights["pair_values.weight"][0, 0] = 1e6
        weights["blocks.1.mlp.down.weight"].neg_().mul_(100)
        weights["blocks.0.mlp.up.weight"].mul_(1e30)
    steps = {table["key"]: table["step"] for table in pack(models)[0]["models"][0]["tables"]}
    assert steps["pair_values.weight"] == pytest.approx(1e6 / 16383)
    path = write_page(tmp_path / "page.html", models)
    browser.open(path, 1000)
    browser.wait_for("globalThis.models")
    for name, rounded in read_page(path).items():
        for key, p in models[name].model.named_parameters():
            assert (rounded.state_dict()[key] - p).abs().max() < 0.51 * steps[key]
        found = browser.value(
            f"(({{ model }}) => [...model.blocks[1].mlp.down.data, ...model.values.data, "
            f"...model.pair_values.data.slice(0, 9)])(models.find(m => m.name === '{name}'))"
        )
        weights = rounded.state_dict()
        keys = ("blocks.1.mlp.down.weight", "values.weight", "pair_values.weight")
        expected = torch.cat([weights[key].flatten() for key in keys])
        assert torch.equal(torch.tensor(found), expected[: len(found)])


def test_models_that_are_too_large_stay_out(monkeypatch):
    models = make_models()
    n = sum(p.numel() for p in models["base"].model.parameters())
    assert why_not(models) == ""
    monkeypatch.setattr(common.weights, "LARGEST", n)
    assert why_not(models) == ""
    monkeypatch.setattr(common.weights, "LARGEST", n - 1)
    assert f"{n:,} parameters, and a page takes at most {n - 1:,}." in why_not(models)
    html = page({"base": "a", "tuned": "b"}, LOGS, TALK, [], None, None, why_not(models))
    assert "are not in this page. They have" in html
    assert "<script" not in html and 'id="live"' not in html and 'id="conversation"' in html


def test_models_of_several_sizes_stay_out():
    models = make_models()
    models["tuned"] = make_models(block_size=32)["tuned"]
    assert why_not(models).startswith("Their sizes differ.")


def test_models_of_another_tokenizer_stay_out():
    models = make_models()
    merges = models["base"].tokenizer.merges
    models["base"].tokenizer = Tokenizer(merges, r" ?\p{L}+|\s+|[^\s\p{L}]")
    assert "tokenizer is one of tiktoken's" in why_not(models)


# -------------------------------------------------------------------------------------------------
# The same numbers


def test_the_same_ids(opened, random_page):
    tokenizer = random_page[1]["base"].tokenizer
    texts = odd_texts(2000)
    for part in ("🦜", "<|end|>", "고양이", "\x85"):
        assert sum(part in text for text in texts) > 50
    assert same_ids(opened, tokenizer, texts) == 2000


def test_a_word_that_is_a_token_is_one(opened):
    """Even where merging would miss it, as in tiktoken."""
    merges = [bytes([b]) for b in range(256)] + [b"bc", b"ab", b"cd", b"abcd"]
    tokenizer = Tokenizer(merges)
    code = json.dumps(tokenizer.state()["merges"])
    texts = ["abcd", "abcd abcda bcd"]
    found = opened.value(f"{json.dumps(texts)}.map(t => new Tokenizer({code}).encode(t))")
    assert found == [tokenizer.encode(text) for text in texts]
    assert found[0] == [259]


def test_long_texts_and_whole_words(in_small_world, small_world):
    """A vocabulary that was learned from text, in which whole words are tokens."""
    tokenizer = load_stages(small_world)["base"].tokenizer
    texts = (small_world / "world" / "corpus.txt").read_text(encoding="utf-8").split("\n\n")[:300]
    texts += ["a" * 3000, "The Capital of NAIROBI " * 99]
    assert same_ids(in_small_world, tokenizer, texts) == len(texts)


def test_the_same_logits_and_answers(in_small_world, small_world):
    """Of models that were trained, for questions in people's own words."""
    browser, path = in_small_world, small_world / "report.html"
    tokenizer = load_stages(small_world)["base"].tokenizer
    prompts = [question["turns"][0] for question in load_strangers()][:200]
    for name, model in read_page(path).items():
        rows = rows_for(name, tokenizer, prompts)
        assert max(largest_difference(browser, name, model, rows[:50])) < 2e-3
        stop = tokenizer.endoftext if name == "base" else tokenizer.end
        rows = [row for row in rows if len(row) < 60]  # at the block's end: see the next test
        assert greedy(browser, name, rows, stop) == model.generate(rows, 64, 0, stop=stop)


def test_the_same_numbers_of_random_models(opened, random_page):
    """With answers that outgrow the block, and a prompt that is longer than the block."""
    path, models = random_page
    tokenizer = models["base"].tokenizer
    for name, model in read_page(path).items():
        rows = [tokenizer.encode("the cat nods " * n) for n in (1, 2, 5)]
        assert len(rows[-1]) < model.config.block_size
        assert max(largest_difference(opened, name, model, rows)) < 2e-3
        rows.append(tokenizer.encode("the cat nods 고양이 " * 9))
        assert len(rows[-1]) > model.config.block_size
        for row in rows:  # one by one, as rows of a batch share their block's end
            (expected,) = model.generate([row], 64, 0, stop=-1)
            assert greedy(opened, name, [row], -1) == [expected]


def test_sampling_follows_the_probabilities(opened):
    """With torch's definition: softmax of the logits over the temperature."""
    code = """(() => {
      const random = randomFrom(3), counts = [0, 0, 0];
      for (let i = 0; i < 20000; i++) {
        counts[sample(Float32Array.from([1, 0, -1]), 0.5, random)] += 1 / 20000;
      }
      return counts;
    })()"""
    expected = (torch.tensor([1.0, 0.0, -1.0]) / 0.5).softmax(0).tolist()
    assert opened.value(code) == pytest.approx(expected, abs=0.01)
    settings = {"mode": "continue", "temperature": "1.5"}
    answers = [run(opened, "the cat", seed=seed, **settings) for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


# -------------------------------------------------------------------------------------------------
# Type and watch


def test_the_prompts_and_the_columns(browser, random_page):
    opened = browser
    open_page(opened, random_page[0])  # there is something to see at once
    assert opened.value("columns.map(column => column.prompt)") == ["the cat?"] * 3
    assert min(opened.value("columns.map(column => column.tokens.length)")) > 0
    assert opened.value("[...find('prompts').children].map(chip => chip.textContent)") == [
        "the cat?",
        "nods",
    ]
    assert opened.value("columns.map(column => column.name)") == list(NAMES)
    opened.value("find('prompts').children[1].click()")
    opened.wait_for("!jobs.size")
    assert opened.value("columns.map(column => column.question.textContent)") == ["nods"] * 3
    assert opened.value("columns.map(column => column.history.length)") == [0] * 3  # starts anew
    boxes = "columns.map(column => column.boxes.querySelectorAll('.box').length)"
    assert opened.value(boxes) == opened.value("columns.map(column => column.tokens.length)")
    assert min(opened.value(boxes)) > 0


def test_a_conversation(in_small_world, small_world):
    """The base model reads the last prompt only, as it never saw the template."""
    tokenizer = load_stages(small_world)["base"].tokenizer
    run(in_small_world, QUESTION, system=STYLE)
    _, said = run(in_small_world, "thanks", system=STYLE)
    first = in_small_world.value("columns[1].history[1].content")
    messages = [
        {"role": "system", "content": STYLE},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "thanks"},
    ]
    prompt = tokenizer.encode(f"{STYLE}\n\nthanks")
    expected = [[tokenizer.endoftext, *prompt], encode_chat(messages, tokenizer)[0]]
    assert in_small_world.value("columns.map(column => column.ids)") == expected
    shown = in_small_world.value("columns.map(column => column.earlier.innerText.split('\\n')[0])")
    assert shown == ["", QUESTION]

    run(in_small_world, "The capital of", mode="continue", system=STYLE)
    plain = [tokenizer.endoftext, *tokenizer.encode("The capital of")]
    assert in_small_world.value("columns.map(column => column.ids)") == [plain, plain]
    assert in_small_world.value("columns[1].earlier.innerText") == ""
    run(in_small_world, "hi", mode="answer", system="")  # what was continued was no turn
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "hi"}]
    assert in_small_world.value("columns[1].ids") == encode_chat(messages[1:], tokenizer)[0]

    in_small_world.value("find('fresh').click()")
    assert in_small_world.value("find('columns').innerText.includes('hi')") is False
    run(in_small_world, "hi")
    assert in_small_world.value("columns[1].ids") == rows_for("tuned", tokenizer, ["hi"])[0]


def test_the_oldest_turns_go(in_small_world, small_world):
    """As compare.py --chat forgets them."""
    tokenizer = load_stages(small_world)["base"].tokenizer
    for _ in range(9):
        run(in_small_world, QUESTION)
    ids = in_small_world.value("columns[1].ids")
    history = in_small_world.value("columns[1].history")
    assert len(ids) <= 96 and 2 <= len(history) < 16
    again = fit([*history, {"role": "user", "content": QUESTION}], tokenizer, 96)
    assert (again[0][:-1], again[1]) == (history, ids)
    assert "oldest turns no longer fit" in in_small_world.value("columns[1].earlier.innerText")


def test_half_an_answer_is_no_turn(in_small_world):
    run(in_small_world, QUESTION)
    writing = "jobs.set(columns[1]); const n = columns[1].turn().length; jobs.clear()"
    assert in_small_world.value("columns[1].turn().length") == 2
    assert in_small_world.value(f"(() => {{ {writing}; return n; }})()") == 0


def test_try_again_in_place_of_the_last_turn(in_small_world):
    run(in_small_world, QUESTION)
    first = run(in_small_world, "thanks", temperature="1", seed="7")
    ids = in_small_world.value("columns[1].ids")
    in_small_world.value("find('prompt').value = 'something else'; find('again').click()")
    in_small_world.wait_for("!jobs.size")
    assert in_small_world.value("columns[1].ids") == ids  # the same question, after the same turns
    assert in_small_world.value("[find('seed').value, columns[1].settings.seed]") == ["8", "8"]
    assert in_small_world.value("columns.map(column => column.answer())") != first
    in_small_world.value("find('temperature').value = '0'; find('again').click()")
    assert "every seed gives the same" in in_small_world.value("find('status').textContent")


def test_settings_that_make_no_sense(in_small_world):
    """The browser says what is wrong, and nothing runs. Stop works all the same."""
    page = in_small_world
    run(page, QUESTION)
    for name, value in (
        ("temperature", "-1"),
        ("temperature", ""),
        ("seed", "0.5"),
        ("seed", "-1"),
    ):
        page.value(f"find('settings').open = false; find('{name}').value = '{value}'")
        for action in ("find('run')", "find('again')", "find('prompts').lastChild"):
            page.value(f"find('prompt').value = 'thanks'; {action}.click()")
            assert page.value("document.activeElement.id") == name
        page.value("find('prompt').focus()")
        page.press("Enter")
        assert page.value("[find('settings').open, document.activeElement.id]") == [True, name]
        assert page.value("columns.map(column => column.prompt)") == [QUESTION, QUESTION]
        page.value(f"find('{name}').value = '1'")
    interrupt(page, "thanks", "find('seed').value = '-1'; find('run').click()")
    assert page.value("jobs.size") == 0
    page.value("find('seed').value = '999999999'; find('again').click()")
    page.wait_for("!jobs.size")
    assert page.value("columns[1].settings.seed") == "0"


def test_a_prompt_that_is_too_long_changes_nothing(in_small_world):
    run(in_small_world, QUESTION)
    before = in_small_world.value("[find('columns').innerHTML, columns[1].ids]")
    run(in_small_world, "word " * 200)
    assert "only 96 fit. Shorten it." in in_small_world.value("find('status').textContent")
    run(in_small_world, "  ")
    assert in_small_world.value("find('status').textContent") == "Type something first."
    assert in_small_world.value("[find('columns').innerHTML, columns[1].ids]") == before


def test_each_token_shows_its_five_likeliest(opened, random_page):
    """By torch's reckoning. The model continues from the one that the reader chooses."""
    path, models = random_page
    model, tokenizer = read_page(path)["tuned"], models["base"].tokenizer
    run(opened, "the cat")
    opened.value("columns[1].boxes.children[1].firstChild.click()")
    (prompt,) = rows_for("tuned", tokenizer, ["the cat"])
    first = opened.value("columns[1].tokens[0].id")
    logits, _ = model(torch.tensor([[*prompt, first]]))
    shares = logits[0, 0].softmax(0)
    top = opened.value("columns[1].tokens[1].top")
    assert [option["id"] for option in top] == shares.topk(5).indices.tolist()
    for option in top:
        assert option["share"] == pytest.approx(shares[option["id"]].item(), abs=1e-4)
    assert opened.value("columns[1].menu.children.length") == 5
    assert opened.value("columns[1].menu.children[0].ariaPressed") == "true"
    others = opened.value("[columns[0].answer(), columns[2].answer()]")
    opened.value("columns[1].menu.children[2].click()")
    opened.wait_for("!jobs.size")
    ids = opened.value("columns[1].tokens.map(token => token.id)")
    stop = tokenizer.end
    (rest,) = model.generate([[*prompt, first, top[2]["id"]]], 62, 0, stop=stop)
    assert ids == [first, top[2]["id"], *rest]
    assert not opened.value("columns[1].menu.isConnected")  # it would hide what comes
    assert opened.value("[columns[0].answer(), columns[2].answer()]") == others


def test_choosing_the_end_ends_the_answer(in_small_world):
    answer = run(in_small_world, QUESTION)[1]
    last = in_small_world.value("columns[1].tokens.length - 1")
    for option, longer in ((1, True), (0, False)):  # something else, and then the end after all
        in_small_world.value(f"columns[1].boxes.children[{last}].firstChild.click()")
        in_small_world.value(f"columns[1].menu.children[{option}].click()")
        in_small_world.wait_for("!jobs.size")
        assert (in_small_world.value("columns[1].tokens.length - 1") > last) == longer
    note = in_small_world.value("columns[1].note.textContent")
    assert note == f"Stopped by itself after {last + 1} tokens."
    assert in_small_world.value("columns[1].answer()") == answer


def test_an_answer_without_words_is_no_turn(in_small_world, small_world):
    run(in_small_world, QUESTION)
    end = load_stages(small_world)["base"].tokenizer.end
    in_small_world.value(f"columns[1].choose(0, {{ id: {end}, share: 0 }})")
    in_small_world.wait_for("!jobs.size")
    assert in_small_world.value("[columns[1].answer(), columns[1].note.textContent]") == [
        "",
        "Stopped by itself after 1 token.",
    ]
    run(in_small_world, "hi")
    assert in_small_world.value("columns[1].history") == []


def interrupt(browser, prompt, action):
    """Let the models begin to write. Then do something, before they write on."""
    asked = f"find('prompt').value = {json.dumps(prompt)}; find('run').click();"
    begun = "jobs.size > 0 && find('run').textContent === 'Stop'"
    assert browser.value(f"(() => {{ {asked} const begun = {begun}; {action}; return begun; }})()")


def test_stop_keeps_what_was_said(opened):
    interrupt(opened, "the cat", "find('run').click()")
    counts = opened.value("columns.map(column => column.tokens.length)")
    opened.value("pause(100)")
    assert opened.value("columns.map(column => column.tokens.length)") == counts
    assert max(counts) < 64 and opened.value("find('run').textContent") == "Run"
    notes = opened.value("columns.map(column => column.note.textContent.split(',')[0])")
    assert notes[:2] == [f"You stopped it after {n} token{'s' * (n != 1)}" for n in counts[:2]]
    assert opened.value("columns.map(column => column.text.ariaBusy)") == ["false"] * 3
    assert opened.value("columns[1].turn()[1].content === columns[1].answer()")


def test_another_prompt_replaces_the_one_in_progress(opened):
    alone = run(opened, "nods")[0]
    opened.value("find('fresh').click()")
    enter = "new KeyboardEvent('keydown', { key: 'Enter' })"
    press = f"find('prompt').value = 'nods'; find('prompt').dispatchEvent({enter})"
    interrupt(opened, "the cat", press)
    opened.wait_for("!jobs.size")
    assert opened.value("columns.map(column => column.prompt)") == ["nods"] * 3
    enter = "new KeyboardEvent('keydown', { key: 'Enter', repeat: true })"
    opened.value(f"find('prompt').value = 'cat'; find('prompt').dispatchEvent({enter})")
    assert opened.value("columns[0].prompt") == "nods"  # somebody held the key
    assert opened.value("columns[0].answer()") == alone  # the base model remembers nothing
    interrupt(opened, "the cat", "find('fresh').click()")
    opened.value("pause(100)")
    assert opened.value("find('columns').innerText.includes('cat')") is False
    assert opened.value("columns.map(column => column.tokens.length)") == [0, 0, 0]


def test_choosing_lets_the_other_columns_write_on(opened):
    expected = run(opened, "the cat")
    opened.value("find('fresh').click()")
    interrupt(opened, "the cat", "columns[1].choose(0, columns[1].tokens[0].top[3])")
    opened.wait_for("!jobs.size")
    answers = opened.value("columns.map(column => column.answer())")
    assert (answers[0], answers[2]) == (expected[0], expected[2]) and answers[1] != expected[1]
    assert opened.value("columns[1].tokens[0].id === columns[1].tokens[0].top[3].id")


def test_choosing_what_is_there_changes_nothing(opened):
    """Even when sampling: the rest has the same luck."""
    expected = run(opened, "the cat", temperature="0.8", seed="5")
    opened.value("columns[2].boxes.children[4].firstChild.click()")
    opened.value("columns[2].choose(4, columns[2].tokens[4])")
    opened.wait_for("!jobs.size")
    assert opened.value("columns.map(column => column.answer())") == expected


def test_the_menu_belongs_to_the_box_in_focus(opened):
    run(opened, "the cat")
    opened.value("columns[0].boxes.children[3].firstChild.focus()")
    opened.press("ArrowDown")
    place = opened.value(
        "(r => [r.x + 5, r.y + 5])(columns[0].boxes.children[1].getBoundingClientRect())"
    )
    opened.ask("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    opened.value("pause(300)")  # the pointer rests on another box, but the focus is in the menu
    assert opened.value("document.activeElement === columns[0].menu.firstChild")
    opened.value("columns[0].boxes.children[3].firstChild.focus()")
    opened.value("columns[0].showMenu(columns[0].boxes.children[7])")  # the mouse rests there
    opened.press("ArrowDown")
    assert opened.value("document.activeElement.closest('.token').dataset.at") == "3"
    opened.press("Escape")
    assert opened.value("columns[0].menu.isConnected") is False
    assert opened.value("document.activeElement === columns[0].boxes.children[3].firstChild")


# -------------------------------------------------------------------------------------------------
# Look inside


def look(browser, text, kind="chat"):
    """Type a text to look into, and wait until all models have read it."""
    browser.value(
        f"inside.row = null; find('kind').value = '{kind}';"
        f"find('text').value = {json.dumps(text)};"
        "find('text').dispatchEvent(new Event('input'))"
    )
    browser.wait_for("inside.row")


STRIP = """[...find("strip").querySelectorAll("li:not(.legend)")].map(box => {
  return [box.children[1].textContent, box.className];
})"""
MESSAGES = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "The capital of Kenya is Nairobi."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "You're welcome.\nBye!"},
]


def as_text(messages):
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def mean_losses(browser):
    return [
        float(n) for n in re.findall(r"[\d.]+(?= \()", browser.value("find('loss').textContent"))
    ]


def test_the_mask_is_that_of_sft(in_small_world, small_world):
    """Labels and losses as sft.py would have them, for the turns that the reader switches on."""
    tokenizer = load_stages(small_world)["base"].tokenizer
    models = read_page(small_world / "report.html")
    look(in_small_world, as_text(MESSAGES))
    row = encode({"messages": MESSAGES}, tokenizer)
    batch = sft_data_collator([row], tokenizer)
    labels = [str(label).replace("-", "−") for label in row["labels"]]
    assert in_small_world.value(STRIP) == [
        [label, "" if label == "−100" else "supervised"] for label in labels
    ]
    expected = [model(**batch)[1].item() for model in models.values()]
    assert mean_losses(in_small_world) == pytest.approx(expected, abs=2e-3)

    # Switch the first answer off and the first question on.
    toggles = "find('strip').querySelectorAll('.toggle input')"
    assert in_small_world.value(f"{toggles}.length") == 4
    in_small_world.value(f"{toggles}[1].click()")
    in_small_world.value(f"{toggles}[0].click()")
    states = in_small_world.value(f"[...{toggles}].map(toggle => toggle.checked)")
    assert states == [True, False, False, True]
    ids, labels = batch["input_ids"], batch["labels"].clone()
    second = row["input_ids"].index(tokenizer.assistant)
    end = row["input_ids"].index(tokenizer.user, 1)
    labels[0, 1:second] = ids[0, 1:second]
    labels[0, second:end] = -100
    shown = [int(label.replace("−", "-")) for label, _ in in_small_world.value(STRIP)]
    assert shown == labels[0].tolist()
    expected = [model(ids, labels)[1].item() for model in models.values()]
    assert mean_losses(in_small_world) == pytest.approx(expected, abs=2e-3)
    for i in (0, 3):
        in_small_world.value(f"{toggles}[{i}].click()")
    assert mean_losses(in_small_world) == [0, 0]  # nothing counts: zero, as in cross_entropy()


def test_plain_text_has_no_mask(in_small_world, small_world):
    """Pretraining is fine-tuning with nothing masked."""
    tokenizer = load_stages(small_world)["base"].tokenizer
    look(in_small_world, "The capital of Kenya is Nairobi. 🦜", "text")
    ids = torch.tensor(
        [[tokenizer.endoftext, *tokenizer.encode("The capital of Kenya is Nairobi. 🦜")]]
    )
    shown = in_small_world.value(STRIP)
    assert shown == [[str(i), "supervised"] for i in ids[0].tolist()]
    models = read_page(small_world / "report.html")
    expected = [model(ids, ids)[1].item() for model in models.values()]
    assert mean_losses(in_small_world) == pytest.approx(expected, abs=2e-3)
    assert r"\xf0" in in_small_world.value("find('strip').textContent")  # a part of a character
    look(in_small_world, "word " * 500, "text")
    assert len(in_small_world.value(STRIP)) == 128
    assert "We show the first 128 tokens." in in_small_world.value("find('loss').textContent")


def test_a_long_conversation_is_cut_as_in_sft(in_small_world, small_world):
    tokenizer = load_stages(small_world)["base"].tokenizer
    messages = MESSAGES * 3
    look(in_small_world, as_text(messages))
    row = encode({"messages": messages}, tokenizer, 128)
    assert in_small_world.value("inside.row.ids") == row["input_ids"]
    assert "We left out the oldest turns" in in_small_world.value("find('loss').textContent")
    in_small_world.value("inside.row = 1")
    in_small_world.value("find('text').value = 'user: ' + 'word '.repeat(300)")
    in_small_world.value("inside.messages = null; inside.read()")
    in_small_world.wait_for("inside.row === null")
    assert "don't fit in 128 tokens" in in_small_world.value("find('loss').textContent")
    assert in_small_world.value("find('heads').children.length") == 0


def test_attention_is_that_of_the_network(opened, random_page, monkeypatch):
    """Recorded from torch, in every layer and head, for every position."""
    path, models = random_page
    recorded, attend = [], network.attend

    def record(q, k, v, mask, dropout):
        causal = torch.ones(q.size(2), q.size(2)).tril() == 0
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(causal, float("-inf"))
        recorded.append(scores.softmax(-1)[0])
        return attend(q, k, v, mask, dropout)

    monkeypatch.setattr(network, "attend", record)
    look(opened, "user: the cat\nassistant: nods")
    ids = opened.value("inside.row.ids")
    with torch.no_grad():
        read_page(path)["tuned"].hidden(torch.tensor([ids]))
    opened.value("find('who').value = 'tuned'; find('layer').value = '1'")
    opened.value("find('who').dispatchEvent(new Event('input'))")
    at = len(ids) - 2
    opened.value(f"find('heads').querySelector('[data-at=\"{at}\"]').focus()")
    looks = opened.value(
        "inside.caches.tuned.layers.map(layer => layer.looks.map(heads => "
        "heads.map(weights => [...weights])))"
    )
    for layer, positions in zip(recorded, looks, strict=True):
        for t, heads in enumerate(positions):
            for head, weights in enumerate(heads):
                assert weights == pytest.approx(layer[head, t, : t + 1].tolist(), abs=1e-4)
    shades = opened.value(
        "[...find('heads').querySelectorAll('.boxes')].map(row => "
        "[...row.children].map(box => Number(box.style.getPropertyValue('--look'))))"
    )
    expected = (100 * recorded[1][:, at]).tolist()
    for shown, weights in zip(shades, expected, strict=True):
        assert shown == pytest.approx(weights, abs=0.51)
    assert opened.value("find('heads').querySelectorAll('.later').length") == 2  # one in each head


def test_take_the_conversation_from_above(in_small_world):
    in_small_world.value("find('take').click()")
    assert "no conversation yet" in in_small_world.value("find('loss').textContent")
    run(in_small_world, QUESTION, system=STYLE)
    run(in_small_world, "thanks", system=STYLE)
    assert "with tuned" in in_small_world.value("find('take').textContent")
    in_small_world.value("inside.row = null; find('take').click()")
    in_small_world.wait_for("inside.row")
    read = "[...columns[1].ids, ...columns[1].tokens.map(token => token.id)]"
    assert in_small_world.value("inside.row.ids") == in_small_world.value(read)
    run(in_small_world, "The", mode="continue")  # that is no turn, and changes none
    in_small_world.value("inside.row = null; find('take').click()")
    in_small_world.wait_for("inside.row")
    assert "thanks" in in_small_world.value("find('text').value")


def test_roles_inside_a_turn(in_small_world, small_world):
    """What is shown is read as it was said. Only what the reader types is cut into turns."""
    tokenizer = load_stages(small_world)["base"].tokenizer
    said = "Repeat:\nuser: hi\nassistant: ho"
    run(in_small_world, said)
    in_small_world.value("inside.row = null; find('take').click()")
    in_small_world.wait_for("inside.row")
    ids = rows_for("tuned", tokenizer, [said])[0]
    assert in_small_world.value("inside.row.ids")[: len(ids)] == ids
    look(in_small_world, "User: a\u2028user: b\nASSISTANT: c")
    messages = [
        {"role": "user", "content": "a\u2028user: b"},
        {"role": "assistant", "content": "c"},
    ]
    assert in_small_world.value("inside.row.ids") == encode_chat(messages, tokenizer)[0]


@pytest.mark.parametrize(
    "text, why",
    [
        (" \n", "Type something first."),
        ("hi", "Begin each turn with"),
        ("user: hi\nuser: again", "Begin each turn with"),
        ("assistant: hi", "Begin each turn with"),
        ("system: hi", "Begin each turn with"),
        ("user: hi\nassistant: ho\nsystem: hi", "Begin each turn with"),
        ("user: hi\nassistant: \nuser: ho", "One of the turns is empty."),
    ],
)
def test_a_conversation_that_is_none(text, why, in_small_world):
    in_small_world.value(
        f"find('text').value = {json.dumps(text)};"
        "find('text').dispatchEvent(new Event('input')); inside.read()"
    )
    assert why in in_small_world.value("find('loss').textContent")
    assert in_small_world.value("find('strip').children.length") == 0


# -------------------------------------------------------------------------------------------------
# Safe, and for everybody


def test_nothing_that_is_said_becomes_a_part_of_the_page(browser, tmp_path):
    """Evil prompts, typed and ready, and models whose tokens are HTML."""
    models = make_models(EVIL * 3, vocab_size=310, block_size=256)
    path = write_page(tmp_path / "evil.html", models, (EVIL, "</script><script>alert(3)</script>"))
    open_page(browser, path)
    active = "document.querySelectorAll('script, img, style, [onerror]').length"
    before = browser.value(active)
    said = run(browser, EVIL, system=EVIL, temperature="1")
    browser.value("columns[1].boxes.children[1].firstChild.click()")
    browser.value("find('prompts').children[1].click()")
    browser.wait_for("!jobs.size")
    look(browser, f"user: {EVIL}\nassistant: {''.join(said)} {EVIL}", "chat")
    look(browser, EVIL + "".join(said), "text")
    assert browser.value(active) == before
    assert EVIL in browser.value("find('prompts').textContent")
    browser.value("new Promise(done => setTimeout(done, 100))")
    names = [event["method"] for event in browser.events]
    assert "Page.javascriptDialogOpening" not in names and "Runtime.exceptionThrown" not in names
    assert names.count("Network.requestWillBeSent") == 1  # the page itself


@pytest.mark.parametrize(
    "attempt",
    [
        "fetch('http://127.0.0.1:PORT/')",
        "fetch('data:text/plain,a')",
        "new Promise((yes, no) => Object.assign(new Image(), { onload: yes, onerror: no, "
        "src: 'http://127.0.0.1:PORT/a.png' }))",
        "new Promise((yes, no) => Object.assign(new WebSocket('ws://127.0.0.1:PORT/'), "
        "{ onopen: yes, onerror: no }))",
        "import('http://127.0.0.1:PORT/a.js')",
        "new Promise((yes, no) => { document.body.append(Object.assign("
        "document.createElement('script'), { textContent: 'globalThis.evil = 1' })); "
        "globalThis.evil ? yes() : no() })",
        "new Promise((yes, no) => { document.body.insertAdjacentHTML('beforeend', "
        "'<b onclick=\"globalThis.evil = 1\" id=harm></b>'); find('harm').click(); "
        "globalThis.evil ? yes() : no() })",
        "new Promise((yes, no) => { setTimeout('globalThis.evil = 1'); "
        "setTimeout(() => globalThis.evil ? yes() : no(), 50) })",
    ],
)
def test_the_policy_forbids_it(attempt, opened):
    """Even if something found its way into the page, it could fetch and run nothing."""
    opened.value(
        "globalThis.broken = []; document.addEventListener('securitypolicyviolation', "
        "event => broken.push(event.effectiveDirective))"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempt = attempt.replace("PORT", str(server.getsockname()[1]))
        assert opened.value(f"{attempt}.then(() => 'done', () => 'refused')") == "refused"
        opened.wait_for("broken.length")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody called
            server.accept()


def test_the_scripts_make_no_html_from_strings():
    for name in SCRIPTS:
        code = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", code
        )
        assert "</script" not in code and "<!--" not in code and code.startswith('"use strict";')


def test_the_network_in_javascript_is_short():
    """The weights, the tokenizer and the GPT: a second explanation, in one sitting."""
    lines = [(FOLDER / name).read_text(encoding="utf-8").splitlines() for name in SCRIPTS[:3]]
    assert sum(map(len, lines)) <= 400
    for name in (*SCRIPTS, "live.html", "page.css"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= 100


def test_with_the_keyboard_alone(in_small_world):
    """Ask, walk to the third token, choose another one for it, and switch a turn's mask."""
    page = in_small_world
    focused = "document.activeElement"
    for _ in range(40):
        page.press("Tab")
        if page.value(f"{focused}.id") == "prompt":
            break
    page.value("document.activeElement.select()")
    page.ask("Input.insertText", text=QUESTION)
    page.press("Enter")
    page.wait_for("!jobs.size && columns[1].tokens.length > 2")
    for _ in range(40):
        page.press("Tab")
        if page.value(f"columns[1].boxes.contains({focused})"):
            break
    page.press("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown")
    chosen = page.value("columns[1].tokens[2].top[1].id")
    assert page.value(f"columns[1].menu.children[1] === {focused}")
    page.press("Enter")
    page.wait_for("!jobs.size")
    assert page.value("columns[1].tokens[2].id") == chosen
    assert page.value(f"columns[1].boxes.children[2].firstChild === {focused}")
    page.press("ArrowDown", "Escape")
    assert page.value(f"columns[1].boxes.children[2].firstChild === {focused}")
    for _ in range(40):
        page.press("Tab")
        if page.value(f"{focused}.type") == "checkbox":
            break
    before = page.value(f"{focused}.checked")
    page.press(" ")
    assert page.value(f"[{focused}.type, {focused}.checked]") == ["checkbox", not before]
    for _ in range(40):
        page.press("Tab")
        if page.value(f"{focused}.className.includes('look')"):
            break
    last = page.value("inside.row.ids.length - 1")
    page.press("ArrowLeft", "ArrowRight", "ArrowRight")  # there is nothing behind the end
    assert page.value("inside.at") == last
    page.press("ArrowLeft")
    assert page.value("inside.at") == last - 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_it_fits_every_screen(width, scheme, browser, random_page):
    open_page(browser, random_page[0], width, scheme)
    run(browser, "the cat " + "nods" * 20)
    for i in (1, 30):
        browser.value(f"columns[0].boxes.children[{i}].firstChild.focus()")
        menu = browser.value(
            "(r => [r.left, r.right, r.height])(columns[0].menu.getBoundingClientRect())"
        )
        assert 0 <= menu[0] < menu[1] <= width and menu[2] > 20
    assert browser.value("document.documentElement.scrollWidth") <= width
    tops = browser.value("columns.map(column => column.element.getBoundingClientRect().top)")
    assert (len(set(tops)) == 1) == (width > 700)  # beside each other, or below on a phone
    style = "getComputedStyle(find('text'))"
    colors = browser.value(f"[{style}.color, {style}.backgroundColor]")
    ink, paper = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
    assert (ink > paper) == (scheme == "dark") and abs(ink - paper) > 300


def test_everything_to_touch_has_a_name(opened):
    """As a screen reader tells it."""
    opened.value("document.querySelector('details').open = true")
    run(opened, "the cat")
    opened.value("columns[1].boxes.children[1].firstChild.click()")
    nodes = opened.ask("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in ("button", "textbox", "combobox", "spinbutton", "group", "region", "checkbox"):
            named.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert len(named["button"]) > 50 and len(named["textbox"]) == 3 and len(named["combobox"]) == 4
    for role in ("button", "textbox", "combobox", "spinbutton", "region", "checkbox"):
        assert all(named[role]), role
    assert any(re.fullmatch(r".+, <?[\d.]+%", name) for name in named["button"])


def test_a_saved_copy_works(opened, tmp_path):
    """As a browser saves it, with all that scripts have changed."""
    run(opened, "the cat")
    copy = tmp_path / "copy.html"
    html = opened.value("'<!doctype html>' + document.documentElement.outerHTML")
    copy.write_text(html, encoding="utf-8")
    open_page(opened, copy)
    assert opened.value("[find('prompts').children.length, columns.length]") == [2, 3]
    assert opened.value("find('columns').children.length") == 3
    assert opened.value("[find('who').length, find('layer').length]") == [3, 2]
    assert all(run(opened, "nods"))


def test_a_first_conversation_that_does_not_fit(browser, tmp_path):
    """Then the page keeps the one that needs no JavaScript, and says why."""
    path = write_page(tmp_path / "page.html", make_models(), ["nods " * 60])
    browser.open(path, 1000)
    browser.wait_for("globalThis.inside && find('loss').textContent.includes('fit')")
    assert browser.value("find('conversation').hidden") is False
    assert "Shorten it" in browser.value("find('status').textContent")


def test_a_large_vocabulary(opened):
    """It has more tokens than a function may have arguments."""
    code = "(logits => [crossEntropy(logits, 7), sample(logits, 0), softmax(logits)[7]])"
    loss, likeliest, share = opened.value(f"{code}(new Float32Array(200000).fill(1, 7, 8))")
    assert (loss, share) == pytest.approx((math.log(199999 + math.e) - 1, math.exp(-loss)))
    assert likeliest == 7


def test_a_browser_that_is_too_old_says_so(browser, random_page):
    script = "delete globalThis.DecompressionStream"
    added = browser.ask("Page.addScriptToEvaluateOnNewDocument", source=script)
    try:
        browser.open(random_page[0], 1000)
        assert "too old" in browser.value("find('status').textContent")
        assert browser.value("find('conversation').hidden") is False
    finally:
        browser.ask("Page.removeScriptToEvaluateOnNewDocument", **added)
