"use strict";
/*
 * Type and watch: all models answer at once, token by token, in columns.
 */

const MAX_NEW_TOKENS = 64;
const TITLES = { base: "base: the parrot", tuned: "tuned: the assistant", dpo: "dpo: preferences" };

const jobs = new Map(); // column -> the generator that writes its answer
let looping = false;

/** Let columns write. pairs: [[column, generator], ...]. Other columns continue what they do. */
async function run(pairs) {
  for (const [column, job] of pairs) {
    jobs.get(column)?.return();
    jobs.set(column, job);
    job.next();
  }
  find("status").textContent = "";
  find("run").textContent = "Stop";
  if (looping) return;
  looping = true;
  await takeTurns(jobs);
  looping = false;
  find("run").textContent = "Run";
}

function stop() {
  for (const job of jobs.values()) job.return();
  jobs.clear();
}

/** One model's column: the conversation so far, and the answer that is being written. */
class Column {
  constructor(name, model, tokenizer) {
    Object.assign(this, { name, model, tokenizer });
    this.chats = name !== "base"; // the base model has never seen the chat template
    this.earlier = make("div", { class: "earlier" });
    this.question = make("p", { class: "question", dir: "auto" });
    this.text = make("p", { class: "answer", dir: "auto", "aria-live": "polite" });
    this.boxes = make("div", { class: "boxes", role: "group", "aria-label": "tokens" });
    this.note = make("p", { class: "note" });
    this.menu = make("span", { class: "menu", role: "group", "aria-label": "likeliest tokens" });
    const label = TITLES[name];
    this.element = make("section", { class: `said ${name}`, "aria-label": label });
    this.element.append(make("b", {}, label));
    this.element.append(this.earlier, this.question, this.text, this.boxes, this.note);
    arrowKeys(this.boxes, ".box");
    this.listen();
    this.clear();
  }

  clear() {
    Object.assign(this, { history: [], prompt: "", settings: {}, ids: [], tokens: [] });
    for (const part of [this.earlier, this.question, this.text, this.boxes, this.note]) {
      part.replaceChildren();
    }
  }

  listen() {
    // On its way to the menu, the pointer crosses other boxes. So a box takes the menu only when
    // the pointer rests on it.
    let timer;
    const after = (wait, action) => {
      clearTimeout(timer);
      timer = setTimeout(action, wait);
    };
    const hide = () => {
      if (!this.boxes.contains(document.activeElement)) this.menu.remove();
    };
    const on = (type, action) => this.boxes.addEventListener(type, action);
    on("pointerover", ({ target }) => after(150, () => this.showMenu(target)));
    on("pointerleave", () => after(400, hide));
    on("click", ({ target }) => target.closest(".box")?.focus()); // Safari doesn't by itself
    on("focusin", ({ target }) => this.showMenu(target));
    on("focusout", () => after(0, hide));
    on("keydown", (event) => this.moveInMenu(event));
  }

  /** What the model would read: {ids, history, prompt, settings}. Throws an Error that says what
   * the reader can do, if it is too long. */
  prepare(prompt, settings) {
    const { tokenizer } = this;
    const { block_size } = this.model.config;
    const room = block_size - Math.min(MAX_NEW_TOKENS, block_size >> 2); // most answers are short
    const system = settings.system.trim();
    let history = [...this.history, ...this.turn()];
    let ids;
    if (settings.mode === "continue") {
      ids = [tokenizer.endoftext, ...tokenizer.encode(prompt)];
    } else if (!this.chats) { // a system message is just its first line
      const text = system ? `${system}\n\n${prompt.trim()}` : prompt.trim();
      ids = [tokenizer.endoftext, ...tokenizer.encode(text)];
    } else {
      const first = system ? [{ role: "system", content: system }] : [];
      const last = { role: "user", content: prompt.trim() };
      const fitted = fit([...first, ...history, last], tokenizer, room);
      history = fitted.slice(first.length, -1);
      ids = encodeChat(fitted, tokenizer).ids;
    }
    if (ids.length > room) {
      throw new Error(`That takes ${ids.length} tokens, but only ${room} fit. Shorten it.`);
    }
    return { ids, history, prompt, settings };
  }

  /** Begin an answer. prepared: what prepare() returned. Returns the generator that writes it. */
  begin(prepared) {
    Object.assign(this, prepared);
    const before = this.settings.mode === "answer" ? this.history : [];
    this.earlier.replaceChildren(
      ...before.map(({ role, content }) => make("p", { class: role, dir: "auto" }, content)),
    );
    this.question.textContent = this.prompt;
    return this.write([]);
  }

  /** The last question and answer, as two messages. None, if the model said nothing. */
  turn() {
    const answer = this.answer().trim();
    if (!this.chats || !answer || this.settings.mode !== "answer") return [];
    return [
      { role: "user", content: this.prompt.trim() },
      { role: "assistant", content: answer },
    ];
  }

  answer() {
    const ids = this.tokens.map((token) => token.id);
    return this.tokenizer.decode(this.hasEnded() ? ids.slice(0, -1) : ids);
  }

  /** The id that ends what the model writes. */
  lastId() {
    const inTemplate = this.chats && this.settings.mode === "answer";
    return inTemplate ? this.tokenizer.end : this.tokenizer.endoftext;
  }

  hasEnded() {
    return this.tokens.at(-1)?.id === this.lastId();
  }

  /** Write the rest of an answer after these tokens, [{id, share, top}]. A generator: it yields
   * after each position, so the columns can take turns. */
  *write(tokens) {
    this.tokens = tokens;
    this.boxes.replaceChildren(...tokens.map((token, i) => this.box(token, i)));
    this.text.textContent = this.answer().trim();
    this.text.setAttribute("aria-busy", "true");
    this.note.textContent = "…";
    const random = randomFrom(Number(this.settings.seed));
    for (const _ of tokens) random(); // the rest has the same luck as before
    const context = [...this.ids, ...tokens.map((token) => token.id)];
    const temperature = Number(this.settings.temperature);
    const writing = this.model.generate(context, temperature, this.lastId(), random);
    let how = "You stopped it";
    let [spent, count] = [0, 0]; // milliseconds, new tokens
    try {
      while (this.tokens.length < MAX_NEW_TOKENS && !this.hasEnded()) {
        const started = performance.now();
        const next = writing.next().value;
        if (next) {
          this.add(next);
          spent += performance.now() - started;
          count += 1;
        }
        yield;
      }
      how = this.hasEnded() ? "Stopped by itself" : "Cut off";
    } finally {
      const n = this.tokens.length;
      const rate = count ? `, ${Math.round((1000 * count) / spent)} tokens/s` : "";
      this.note.textContent = `${how} after ${n} token${n === 1 ? "" : "s"}${rate}.`;
      this.text.setAttribute("aria-busy", "false");
    }
  }

  add({ id, logits }) {
    const shares = softmax(logits);
    const likeliest = [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, 5);
    const top = likeliest.map((other) => ({ id: other, share: shares[other] }));
    const token = { id, share: shares[id], top };
    this.tokens.push(token);
    this.boxes.append(this.box(token, this.tokens.length - 1));
    this.text.textContent = this.answer().trim();
  }

  box({ id, share }, i) {
    const name = shown(this.tokenizer.bytes(id));
    const label = `${name}, ${percent(share)}`;
    const box = make("button", { class: "box", type: "button", "aria-label": label }, name);
    box.tabIndex = i ? -1 : 0;
    box.style.setProperty("--heat", Math.round(45 * (1 - share)));
    return make("span", { class: "token", "data-at": i }, box);
  }

  /** Put the five likeliest tokens below the box that the reader points at. */
  showMenu(target) {
    const place = target.closest(".token");
    if (!place?.isConnected || this.menu.parentElement === place) return;
    const at = Number(place.dataset.at);
    const options = this.tokens[at].top.map(({ id, share }) => {
      const option = make("button", { type: "button", tabindex: -1 });
      option.append(shown(this.tokenizer.bytes(id)), " ", make("small", {}, percent(share)));
      option.addEventListener("click", () => this.choose(at, { id, share }));
      return option;
    });
    this.menu.replaceChildren(...options);
    place.append(this.menu);
  }

  /** Put another token in the place of one, and continue from there. */
  choose(at, other) {
    const chosen = { ...this.tokens[at], ...other };
    run([[this, this.write([...this.tokens.slice(0, at), chosen])]]);
    this.boxes.children[at].firstChild.focus();
  }

  moveInMenu(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const box = event.target.closest(".token")?.firstChild;
    if (event.key === "Escape" && box) {
      box.focus();
      this.menu.remove();
    }
    if (!step) return;
    event.preventDefault();
    this.showMenu(event.target);
    const stops = [box, ...this.menu.children];
    stops[stops.indexOf(event.target) + step]?.focus();
  }
}

/** Set up the columns and the form. Returns the columns. */
function typeAndWatch(models, tokenizer, prompts) {
  const columns = models.map(({ name, model }) => new Column(name, model, tokenizer));
  find("columns").append(...columns.map((column) => column.element));

  function ask() {
    const prompt = find("prompt").value;
    const settings = {};
    for (const name of ["mode", "system", "temperature", "seed"]) settings[name] = find(name).value;
    if (!find("ask").reportValidity()) return;
    if (!prompt.trim()) {
      find("status").textContent = "Type something first.";
      return;
    }
    try {
      const prepared = columns.map((column) => column.prepare(prompt, settings));
      run(columns.map((column, i) => [column, column.begin(prepared[i])]));
    } catch (error) {
      find("status").textContent = error.message;
    }
  }

  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (jobs.size) stop();
    else ask();
  });
  find("prompt").addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // 229: in Safari
    if (event.key !== "Enter" || event.shiftKey || event.repeat || composing) return;
    event.preventDefault();
    ask();
  });
  find("fresh").addEventListener("click", () => {
    stop();
    for (const column of columns) column.clear();
    find("status").textContent = "";
    find("prompt").value = "";
    find("prompt").focus();
  });
  for (const prompt of prompts) {
    const chip = make("button", { type: "button", dir: "auto" }, prompt);
    chip.addEventListener("click", () => {
      find("prompt").value = prompt;
      ask();
    });
    find("prompts").append(chip);
  }
  find("prompt").value = prompts[0] ?? "";
  return columns;
}
