"""
Check the models in a page against torch's, in a real browser, and print how they do.

    python tests/same_numbers.py         # out/report.html, made by python compare.py
    python tests/same_numbers.py FOLDER  # FOLDER/report.html
"""

import argparse
import base64
import json
import random
import re
import sys
import tempfile
import time
import unicodedata
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from browser import CHROMIUM, MISSING, Browser
from common.stages import load_stages
from common.weights import pack
from data import encode_chat
from data.world.strangers import load_strangers
from model import GPT, GPTConfig, cross_entropy

MAX_NEW_TOKENS = 64


def read_page(path):
    """The models in a page, decoded in Python: {name: GPT}."""
    html = path.read_text(encoding="utf-8")
    parts = dict(re.findall(r'<script type="text/plain" id="(\w+)">([^<]*)</script>', html))
    about = json.loads(parts["about"])
    low, high = np.frombuffer(
        zlib.decompress(base64.b64decode(parts["weights"])), np.uint8
    ).reshape(2, -1)
    packed = low.astype(np.int32) + 256 * high.astype(np.int32)
    changes = (packed >> 1) ^ -(packed & 1)
    models, counts, weights, start = {}, {}, {}, 0
    for stage in about["models"]:
        for table in stage["tables"]:
            key, shape = table["key"], (table["rows"], table["columns"])
            end = start + shape[0] * shape[1]
            counts[key] = counts.get(key, 0) + changes[start:end].reshape(shape)
            weights[key] = torch.from_numpy((counts[key] * table["step"]).astype(np.float32))
            start = end
        model = GPT(GPTConfig(**about["config"])).eval()
        alias = model.alias.clone()
        for i, other in stage["alias"].items():
            alias[int(i)] = other
        tables = {**weights, "alias": alias, "head.weight": weights["embed.weight"]}
        model.load_state_dict({key: tensor.clone() for key, tensor in tables.items()})
        models[stage["name"]] = model
    assert start == len(changes)
    return models


def odd_texts(n, seed=1):
    """n texts: words, scripts, emoji, odd white space, and control tokens that somebody typed."""
    rng = random.Random(seed)
    assigned = [c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] not in "C"]
    parts = [
        *"the cat's CAT Cat cAT I'll WE'VE don't 3.14 1999 NASA nASA aB ABc".split(),
        *"고양이가 고개를 끄덕인다 앵무새 日本語 Ελλάδα Москва café cafe\u0301 नमस्ते ٣٤ ½ ²".split(),
        *("🦜", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "\u200b", "\ufeff", "\u200d", "\x00", "\x7f", "\ufffd"),
        *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u3000", "\x85", "\u2028", "\v"),
        *("\x0e", "\x0f", "\x0ea", "\x0f abc", "\x1c", "\x1f", "\u180e", "!?", "...", "'s", "'S"),
        *("<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>", "<|pad|>", "</script>", "&lt;"),
    ]
    texts = []
    for _ in range(n):
        chosen = rng.choices(parts, k=rng.randrange(12)) + rng.choices(assigned, k=rng.randrange(4))
        rng.shuffle(chosen)
        texts.append(rng.choice(["", "", " "]).join(chosen))
    return texts


def same_ids(browser, tokenizer, texts):
    """For how many texts JavaScript gives the same ids, and the same text back from them."""
    code = "texts => texts.map(text => [tokenizer.encode(text), tokenizer.decode("
    code += "tokenizer.encode(text))])"
    found = browser.value(f"({code})({json.dumps(texts)})")
    return sum(
        ids == tokenizer.encode(text) and back == tokenizer.decode(ids)
        for text, (ids, back) in zip(texts, found, strict=True)
    )


def rows_for(name, tokenizer, prompts):
    """What a model reads of each prompt: the base model the plain text, the others the template."""
    if name == "base":
        return [[tokenizer.endoftext, *tokenizer.encode(prompt)] for prompt in prompts]
    return [encode_chat([{"role": "user", "content": p}], tokenizer)[0] for p in prompts]


@torch.inference_mode()
def largest_difference(browser, name, model, rows):
    """Between JavaScript's logits and torch's: at the end of each row, and of all its losses."""
    code = f"""(rows => {{
      const {{ model }} = models.find(({{ name }}) => name === "{name}");
      return rows.map(row => {{
        const logits = [...model.forward(row)];
        const losses = row.slice(1).map((id, i) => crossEntropy(logits[i], id));
        return [[...logits.at(-1)], losses];
      }});
    }})"""
    worst = [0.0, 0.0]
    for row in rows:
        ((logits, losses),) = browser.value(f"{code}({json.dumps([row])})")
        ids = torch.tensor([row])
        ours = model.head(model.hidden(ids))[0]  # (T, V)
        expected = cross_entropy(ours[:-1], ids[0, 1:], reduction="none")
        worst[0] = max(worst[0], (ours[-1] - torch.tensor(logits)).abs().max().item())
        if losses:
            worst[1] = max(worst[1], (expected - torch.tensor(losses)).abs().max().item())
    return worst


def greedy(browser, name, rows, stop):
    """JavaScript's likeliest continuation of each row, lists of ids."""
    code = f"""(rows => {{
      const {{ model }} = models.find(({{ name }}) => name === "{name}");
      return rows.map(row => {{
        const ids = [];
        for (const next of model.generate(row, 0, {stop})) {{
          if (next) ids.push(next.id);
          if (ids.length === {MAX_NEW_TOKENS}) break;
        }}
        return ids;
      }});
    }})"""
    return browser.value(f"{code}({json.dumps(rows)})")


LONGEST_PAUSE = """new Promise(done => {
  let [last, longest] = [performance.now(), 0];
  const tick = () => {
    const now = performance.now();
    longest = Math.max(longest, now - last);
    last = now;
    if (jobs.size) setTimeout(tick); else done(longest);
  };
  find("run").click();
  tick();
})"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out"))
    folder = parser.parse_args().folder
    if not CHROMIUM:
        sys.exit(MISSING)
    torch.set_num_threads(1)
    path, models = folder / "report.html", load_stages(folder)
    tokenizer, rounded = models["base"].tokenizer, read_page(path)
    started = time.perf_counter()
    pack(models)
    packing = time.perf_counter() - started
    print(
        f"the page is {path.stat().st_size / 1e6:.2f} MB; packing the models took {packing:.1f} s"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(Path(profile))
        try:
            started = time.perf_counter()
            browser.open(path.absolute(), 1000)
            browser.wait_for("globalThis.inside?.row && !jobs.size")
            print(f"open, unpacked and drawn after {time.perf_counter() - started:.1f} s")
            texts = odd_texts(2000)
            print(f"the same ids for {same_ids(browser, tokenizer, texts):,} of 2,000 texts")
            prompts = [question["turns"][0] for question in load_strangers()][:200]
            for name, model in rounded.items():
                rows = rows_for(name, tokenizer, prompts)
                logits, losses = largest_difference(browser, name, model, rows[:50])
                stop = tokenizer.endoftext if name == "base" else tokenizer.end
                ours = greedy(browser, name, rows, stop)
                same = [
                    sum(map(list.__eq__, ours, m.generate(rows, MAX_NEW_TOKENS, 0, stop=stop)))
                    for m in (model, models[name].model)
                ]
                print(
                    f"{name}: 50 prompts, logits differ by at most {logits:.1e}, losses by "
                    f"{losses:.1e}; the same greedy answers to {same[0]} of 200 questions, and "
                    f"to {same[1]} before its weights were rounded"
                )
            pause = browser.value(LONGEST_PAUSE)
            notes = browser.value("columns.map(column => column.note.textContent)")
            print(f"{' | '.join(notes)} | longest pause {pause:.0f} ms")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
