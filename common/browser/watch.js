"use strict";
/*
 * Type and watch: all models answer at once, token by token, in columns.
 */

const MAX_NEW_TOKENS = 64;
const CAPTIONS = {
  base: ["base", "continues your last prompt as plain text. It remembers no conversation."],
  tuned: ["tuned", "answers: it was fine-tuned on conversations."],
  dpo: ["dpo", "answers: it then learned which of two answers is better."],
};

const jobs = new Map(); // column -> the generator that writes its answer
let looping = false;

/** Let columns write. pairs: [[column, generator], ...]. Other columns continue what they do. */
async function run(pairs) {
  for (const [column, job] of pairs) {
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
    const [label, caption] = CAPTIONS[name];
    this.element = make("section", { class: `said ${name}`, "aria-label": label });
    this.element.append(make("p", { class: "note" }, make("strong", {}, label), ` ${caption}`));
    // The boxes come first: below the text, they would jump whenever it fills another line.
    this.element.append(this.earlier, this.question, this.boxes, this.text, this.note);
    arrowKeys(this.boxes, ".box");
    this.listen();
    this.clear();
  }

  clear() {
    const nothing = { history: [], forgot: false, prompt: "", settings: {}, ids: [], tokens: [] };
    Object.assign(this, nothing);
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
    on("pointermove", ({ target }) => {
      after(150, () => {
        if (!this.menu.contains(document.activeElement)) this.showMenu(target);
      });
    });
    on("pointerleave", () => after(400, hide));
    on("click", ({ target }) => target.closest(".box")?.focus()); // Safari doesn't by itself
    on("focusin", ({ target }) => this.showMenu(target));
    on("focusout", () => after(0, hide));
    on("keydown", (event) => this.moveInMenu(event));
  }

  /** What the model would read: {ids, history, forgot, prompt, settings}. again: in place of the
   * last turn. Throws an Error that says what the reader can do, if it is too long. */
  prepare(prompt, settings, again) {
    const { tokenizer } = this;
    const { block_size } = this.model.config;
    const room = block_size - Math.min(MAX_NEW_TOKENS, block_size >> 2); // most answers are short
    const system = settings.system.trim() && settings.system;
    let history = [...this.history, ...(again ? [] : this.turn())];
    let forgot = this.forgot && history.length > 0;
    let ids;
    if (settings.mode === "continue") {
      ids = [tokenizer.endoftext, ...tokenizer.encode(prompt)];
    } else if (!this.chats) { // a system message is just its first line
      const text = system ? `${system}\n\n${prompt}` : prompt;
      ids = [tokenizer.endoftext, ...tokenizer.encode(text)];
    } else {
      const first = system ? [{ role: "system", content: system }] : [];
      const last = { role: "user", content: prompt };
      const fitted = fit([...first, ...history, last], tokenizer, room);
      forgot ||= fitted.length < first.length + history.length + 1;
      history = fitted.slice(first.length, -1);
      ids = encodeChat(fitted, tokenizer).ids;
    }
    if (ids.length > room) {
      throw new Error(`That takes ${ids.length} tokens, but only ${room} fit. Shorten it.`);
    }
    return { ids, history, forgot, prompt, settings };
  }

  /** Begin an answer. prepared: what prepare() returned. Returns the generator that writes it. */
  begin(prepared) {
    Object.assign(this, prepared);
    const isChat = this.settings.mode === "answer";
    this.earlier.replaceChildren();
    if (isChat && this.forgot) {
      this.earlier.append(make("p", { class: "note" }, "(The oldest turns no longer fit.)"));
    }
    for (const { role, content } of isChat ? this.history : []) {
      this.earlier.append(make("p", { class: role, dir: "auto" }, content));
    }
    this.question.textContent = this.prompt;
    this.question.classList.toggle("asked", isChat);
    return this.write([]);
  }

  /** The last question and answer, as two messages. None, if the model said nothing, or still
   * writes. */
  turn() {
    const answer = this.answer();
    const isTurn = this.chats && this.settings.mode === "answer" && !jobs.has(this);
    if (!isTurn || !answer.trim()) return [];
    return [
      { role: "user", content: this.prompt },
      { role: "assistant", content: answer },
    ];
  }

  answer() {
    const ids = this.tokens.map((token) => token.id);
    return this.tokenizer.decode(this.hasEnded() ? ids.slice(0, -1) : ids);
  }

  /** The id that ends what the model writes. */
  lastId() {
    return this.chats ? this.tokenizer.end : this.tokenizer.endoftext;
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
    for (const _ of tokens) random(); // those that these tokens used
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
    const here = this.tokens[at];
    const isLikely = here.top.some((other) => other.id === here.id);
    const options = [...here.top, ...(isLikely ? [] : [here])].map(({ id, share }) => {
      const isHere = id === here.id;
      const option = make("button", { type: "button", tabindex: -1, "aria-pressed": isHere });
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
    this.menu.remove(); // it would hide what comes
  }

  moveInMenu(event) {
    const box = event.target.closest(".token")?.firstChild;
    const inMenu = event.target !== box;
    const steps = { ArrowDown: 1, ArrowUp: -1, ...(inMenu && { ArrowRight: 1, ArrowLeft: -1 }) };
    const step = steps[event.key];
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

  /** Whether the settings make sense. If not, the browser says why. */
  function check() {
    if (!find("ask").checkValidity()) find("settings").open = true;
    return find("ask").reportValidity();
  }

  /** Ask all models. again: the last prompt once more, in place of the last turn. */
  function ask(again = false) {
    const prompt = again ? columns[0].prompt : find("prompt").value;
    const settings = {};
    for (const name of ["mode", "system", "temperature", "seed"]) settings[name] = find(name).value;
    if (!prompt.trim()) {
      find("status").textContent = "Type something first.";
      find("prompt").focus();
      return;
    }
    try {
      const prepared = columns.map((column) => column.prepare(prompt, settings, again));
      run(columns.map((column, i) => [column, column.begin(prepared[i])]));
      find("again").disabled = false;
    } catch (error) {
      find("status").textContent = error.message;
    }
  }

  function startOver() {
    stop();
    for (const column of columns) column.clear();
    find("status").textContent = "";
    find("again").disabled = true;
  }

  /** After the reader did something: show the answers, if they are far down. */
  function look() {
    const { top } = find("columns").getBoundingClientRect();
    if (top > 0.6 * innerHeight) find("status").scrollIntoView({ behavior: "smooth" });
  }

  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (jobs.size) return stop();
    if (!check()) return;
    ask();
    look();
  });
  find("prompt").addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // 229: in Safari
    if (event.key !== "Enter" || event.shiftKey || event.repeat || composing) return;
    event.preventDefault();
    if (!check()) return;
    ask();
    find("prompt").select(); // so the next one replaces it
    look();
  });
  find("again").addEventListener("click", () => {
    if (!check()) return;
    find("seed").value = (Number(find("seed").value) + 1) % 1e9;
    ask(true);
    if (Number(find("temperature").value) === 0) {
      find("status").textContent = "At temperature 0, every seed gives the same answer.";
    }
  });
  find("fresh").addEventListener("click", () => {
    startOver();
    find("prompt").value = "";
    find("prompt").focus();
  });
  find("mode").addEventListener("input", () => {
    find("system").disabled = find("mode").value !== "answer";
  });
  for (const prompt of prompts) {
    const chip = make("button", { type: "button", dir: "auto" }, prompt);
    chip.addEventListener("click", () => {
      if (!check()) return;
      startOver();
      find("prompt").value = prompt;
      ask();
      look();
    });
    find("prompts").append(chip);
  }
  if (prompts.length) {
    find("prompt").value = prompts[0];
    ask(); // something to see at once
  }
  return columns;
}
