"""A chat: what is printed while the model speaks, what is remembered, and how it ends."""

import io

import pytest
import torch

import compare
from common.completion import first_paragraph, fit, respond
from common.conversation import stream
from common.messages import readable
from common.stages import load_stages
from data import Tokenizer, encode_chat
from data.tokenizer import CAPS_LOCK, SHIFT
from model import GPT, GPTConfig

GREEDY = dict(max_new_tokens=24, temperature=0.0, top_k=None)


@pytest.fixture(scope="module")
def pair(small_world):
    return tuple(load_stages(small_world).values())  # base and tuned


@pytest.fixture
def talk(pair, monkeypatch, capsys):
    """A function that types lines. It returns what the screen shows after each of them."""

    def talk(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        compare.talk(*pair, [], **GREEDY)
        return [part.strip() for part in capsys.readouterr().out.split("\n> ")]

    return talk


QUESTION = "What is the capital of Kenya?"
PIRATE = "Talk like a pirate."


def respond_to(checkpoint, prompt, **options):
    options = {"max_new_tokens": 24, **options}
    return respond(checkpoint.model, checkpoint.tokenizer, [prompt], **options)[0]


def test_it_answers_what_respond_answers(pair, talk):
    about, answered, _ = talk(QUESTION, "What is the currency of Kenya?")
    assert "/base" in about and "/quit" in about
    assert answered == f"{QUESTION}\n{respond_to(pair[1], QUESTION)}"


def test_base_reset_and_quit(pair, talk):
    typed = ["/base", QUESTION, "/base", "/reset", QUESTION, "/help", "", "/quit", "never read"]
    shown = talk(*typed)
    base = first_paragraph(respond_to(pair[0], QUESTION, chat=False))
    first_lines = [part.split("\n", 1)[0] for part in shown[1:]]
    assert first_lines == ["/base", QUESTION, "/base", "/reset", QUESTION, "/help", "/quit"]
    assert "Ask something first" in shown[1] and "/reset" in shown[6].split("\n")[1]
    assert shown[3].split("\n", 1)[1] == base.strip() + " ..."
    assert shown[5] == shown[2]  # after /reset it is the first question again


def test_reset_forgets_the_question_for_base_too(talk):
    assert "Ask something first" in talk(QUESTION, "/reset", "/base")[3]


@pytest.mark.parametrize("word", ["quit", "exit", "Quit", "/exit"])
def test_a_bare_quit_leaves_too(word, talk):
    assert [part.split("\n")[0] for part in talk(QUESTION, word, "never read")[1:]] == [
        QUESTION,
        word,
    ]


def test_what_was_said_before_is_seen(pair, monkeypatch, capsys):
    seen = []

    def answer(model, tokenizer, input_ids, **sampling):
        seen.append(tokenizer.decode(input_ids))
        return "It is so."

    monkeypatch.setattr(compare, "stream", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nWhy?\n/reset\nHow?\n"))
    compare.talk(*pair, [], **GREEDY)
    assert seen == [
        "<|user|>Who?<|end|><|assistant|>",
        "<|user|>Who?<|end|><|assistant|>It is so.<|end|><|user|>Why?<|end|><|assistant|>",
        "<|user|>How?<|end|><|assistant|>",
    ]


def told(tokenizer, messages):
    return messages, encode_chat(messages, tokenizer)[0]


def test_the_oldest_turns_go_first(pair):
    tokenizer = pair[1].tokenizer
    texts = ["one", "two", "three", "four", "five"]
    roles = ["user", "assistant"] * 2 + ["user"]
    whole = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    input_ids, _ = encode_chat(whole, tokenizer)
    assert fit(whole, tokenizer, len(input_ids)) == (whole, input_ids)
    assert fit(whole, tokenizer, len(input_ids) - 1)[0] == whole[2:]
    assert fit(whole, tokenizer, 1)[0] == whole[4:]  # what was just said stays
    system = [{"role": "system", "content": PIRATE}]
    assert fit(system + whole, tokenizer, 10**6)[0] == system + whole
    shorter = told(tokenizer, system + whole[2:])
    assert fit(system + whole, tokenizer, len(shorter[1])) == shorter
    assert fit(system + whole, tokenizer, len(shorter[1]) - 1)[0] == system + whole[4:]
    assert fit(system + whole, tokenizer, 1) == told(tokenizer, system + whole[4:])


def test_a_long_conversation_continues_and_a_long_message_is_refused(pair, talk):
    n = 12  # they fill the block
    shown = talk(*[QUESTION] * n, "very " * 100 + "long?", QUESTION)
    assert sum("forgets the oldest turns" in part for part in shown) == 1  # once per chat
    room = pair[1].model.config.block_size - GREEDY["max_new_tokens"]
    assert f"tokens, but only {room} fit" in shown[n + 1] and "fit" not in shown[n + 2]
    assert shown[n + 2].endswith(".")


def test_an_answer_gets_a_quarter_of_the_block(pair, monkeypatch, capsys):
    """And no more, so that the model remembers as many turns as possible."""
    tokenizer, block_size = pair[1].tokenizer, pair[1].model.config.block_size
    lengths = []

    def answer(model, tokenizer, input_ids, **sampling):
        lengths.append(len(input_ids))
        return "So."

    monkeypatch.setattr(compare, "stream", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n" * 30))
    compare.talk(*pair, [], **{**GREEDY, "max_new_tokens": 64})
    turn = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    turn_length = len(encode_chat(turn, tokenizer)[0])
    assert block_size * 3 // 4 - turn_length < max(lengths) <= block_size * 3 // 4
    assert capsys.readouterr().out.count("forgets") == 1  # once per chat


@pytest.fixture
def talk_in_style(small_world, monkeypatch, capsys):
    """A function that types lines after --system TEXT. The model always answers "So."

    It returns what the model reads each time, and what the screen shows.
    """

    def talk_in_style(system, *lines):
        read = []

        def answer(model, tokenizer, input_ids, **sampling):
            read.append(tokenizer.decode(input_ids))
            return "So."

        monkeypatch.setattr(compare, "stream", answer)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        out = ["--out", str(small_world), "--device", "cpu"]
        compare.main([*out, "--chat", "--system", system])
        return read, capsys.readouterr().out

    return talk_in_style


def test_a_system_message_opens_the_chat_and_survives_a_reset(talk_in_style):
    read, _ = talk_in_style(PIRATE, "Who?", "Why?", "/reset", "How?")
    assert read == [
        f"<|user|>{PIRATE}\n\nWho?<|end|><|assistant|>",
        f"<|user|>{PIRATE}\n\nWho?<|end|><|assistant|>So.<|end|><|user|>Why?<|end|><|assistant|>",
        f"<|user|>{PIRATE}\n\nHow?<|end|><|assistant|>",
    ]


def test_a_blank_system_message_is_none(talk_in_style):
    for blank in ("", " \n "):
        assert talk_in_style(blank, "Who?")[0] == ["<|user|>Who?<|end|><|assistant|>"]


def test_a_long_chat_never_drops_the_system_message(talk_in_style):
    read, shown = talk_in_style(PIRATE, *(f"Why {i}?" for i in range(40)))
    assert all(text.startswith(f"<|user|>{PIRATE}\n\nWhy ") for text in read)
    assert "Why 0?" not in read[-1] and "Why 39?" in read[-1] and len(read) == 40
    assert shown.count("forgets the oldest turns") == 1


def test_a_system_message_that_leaves_no_room(talk_in_style):
    read, shown = talk_in_style("very " * 200, "Who?", "Why?")
    assert not read and shown.count("Shorten it") == 2


@pytest.mark.parametrize("error", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_leave_quietly(error, pair, monkeypatch, capsys):
    def read(_):
        raise error

    monkeypatch.setattr("builtins.input", read)
    compare.talk(*pair, [], **GREEDY)
    assert capsys.readouterr().err == ""


def test_a_letter_of_several_tokens_is_printed_when_it_is_whole(monkeypatch, capsys):
    tokenizer = Tokenizer.train(["abc"], 261)  # single bytes
    sizes = dict(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=8)
    model = GPT(GPTConfig(**sizes, dropout=0.0))
    tokens, printed = (
        iter([*tokenizer.encode("né 한\x1b[2J🦜"), *"é".encode()[:1], tokenizer.end]),
        [],
    )

    def generate(prompts, stop, on_token, **_):
        for token in tokens:
            on_token(0, token)
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(model, "generate", generate)
    assert stream(model, tokenizer, [1]) == "né 한\x1b[2J🦜\ufffd"
    assert "".join(printed) + capsys.readouterr().out == "né 한?[2J🦜\ufffd\n"
    assert printed[1:3] == ["", "é"] and printed[4:7] == ["", "", "한"]


@pytest.mark.parametrize(
    "text", ["In Kenya, the USA.", f"a {SHIFT}B{CAPS_LOCK} C", "É\ufffdA\ufffd"]
)
def test_a_capital_letter_is_printed_with_its_letter(text, monkeypatch, capsys):
    tokenizer = Tokenizer.train(["the kenya usa " * 9], 266)
    sizes = dict(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=8)
    model, printed = GPT(GPTConfig(**sizes)), []

    def generate(prompts, stop, on_token, **_):
        for n, token in enumerate(tokens, start=1):
            on_token(0, token)
            printed.append(capsys.readouterr().out)
            if token != stop:  # all that is known so far, and never anything to take back
                whole = tokenizer.decode(tokens[:n]).rstrip("\ufffd")
                assert "".join(printed) == readable(whole)

    tokens = [*tokenizer.encode(text), tokenizer.end]
    monkeypatch.setattr(model, "generate", generate)
    assert stream(model, tokenizer, [1]) == text
    assert "".join(printed) + capsys.readouterr().out == readable(text) + "\n"


def test_an_answer_that_is_interrupted_or_cut_off_says_so(pair, talk, monkeypatch, capsys):
    model, tokenizer = pair[1].model, pair[1].tokenizer
    input_ids, _ = encode_chat([{"role": "user", "content": QUESTION}], tokenizer)
    said = stream(model, tokenizer, input_ids, **{**GREEDY, "max_new_tokens": 2})
    assert capsys.readouterr().out == f"{said} (cut off: raise --length)\n"

    def interrupted(prompts, *_, on_token=lambda row, token: None, **__):
        for token in tokenizer.encode("A"):
            on_token(0, token)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    monkeypatch.setattr(pair[0].model, "generate", interrupted)  # asked by /base
    answers = [part.strip().split("\n")[1:] for part in talk("One?", "/base", "Two?")[1:]]
    # Each time, the conversation continues.
    assert answers == [["A (stopped)"], ["(stopped)"], ["A (stopped)"]]


def test_every_token_is_handed_over_as_it_comes():
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**sizes, dropout=0.0))
    seen = [[], []]

    def note(row, token):
        seen[row].append(token)

    rows = model.generate([[1, 2], [3]], 30, stop=5, on_token=note)
    assert rows == seen


@pytest.mark.parametrize(
    "option, value",
    [("--temperature", "-1"), ("--temperature", "nan"), ("--top_k", "0"), ("--length", "0")],
)
def test_sampling_options_are_checked(option, value, small_world):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--out", str(small_world), "--ask", "Who?", option, value])
    assert stopped.value.code == 2


def test_ask_uses_the_options(small_world, capsys):
    def ask(*options):
        compare.main(["--out", str(small_world), "--device", "cpu", "--ask", QUESTION, *options])
        return capsys.readouterr().out

    assert len(ask("--length", "2")) < len(ask())
    torch.manual_seed(0)
    assert ask("--temperature", "5") != ask()
    assert ask("--temperature", "5", "--top_k", "1") == ask()


def test_ask_in_a_style(small_world, monkeypatch, capsys):
    """The tuned model gets a system message. For the base model, it's the first line."""
    read, generate = [], GPT.generate

    def look(self, prompts, *args, **kwargs):
        read.extend(prompts)
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(GPT, "generate", look)
    _, tokenizer = compare.load(small_world / "sft.pt")
    asked = [{"role": "system", "content": PIRATE}, {"role": "user", "content": QUESTION}]
    for system, document, messages in (
        (PIRATE, f"{PIRATE}\n\n{QUESTION}", asked),
        (" ", QUESTION, asked[1:]),
    ):
        read.clear()
        out = ["--out", str(small_world), "--device", "cpu"]
        compare.main([*out, "--ask", QUESTION, "--system", system])
        base_ids = [tokenizer.endoftext, *tokenizer.encode(document)]
        assert read == [base_ids, encode_chat(messages, tokenizer)[0]]
    capsys.readouterr()


def test_without_an_input_there_is_no_conversation(small_world, monkeypatch, capsys):
    """When a service starts the program, Python has no stdin at all."""
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--out", str(small_world), "--device", "cpu", "--chat"])
    assert stopped.value.code == 2 and "--chat" in capsys.readouterr().err


def test_examples_of_a_checkpoint_must_be_prompts(small_world, tmp_path, capsys):
    for name in ("base.pt", "sft.pt"):
        (tmp_path / name).write_bytes((small_world / name).read_bytes())
    torch.save({**torch.load(tmp_path / "sft.pt"), "examples": ["", 5]}, tmp_path / "sft.pt")
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--out", str(tmp_path), "--device", "cpu"])
    assert (
        stopped.value.code == 2
        and "its examples are not a list of prompts" in capsys.readouterr().err
    )
