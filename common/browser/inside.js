"use strict";
/*
 * Look inside: how surprised each model is by a text, what a mask does, and attention.
 */

const IGNORE_INDEX = -100;

/** A text whose turns begin with "user:" or "assistant:", as messages. It may begin with "system:".
 * Throws an Error that says what the reader can do. */
function toMessages(text) {
  const [before, ...parts] = text.split(/(?:^|\n)(system|user|assistant):/i);
  const messages = [];
  for (let i = 0; i < parts.length; i += 2) {
    messages.push({ role: parts[i].toLowerCase(), content: parts[i + 1].trim() });
  }
  const turns = messages.slice(messages[0]?.role === "system" ? 1 : 0);
  const inTurns = turns.every(({ role }, i) => role === (i % 2 ? "assistant" : "user"));
  if (before.trim() || !turns.length || !inTurns) {
    throw new Error(
      'Begin each turn with "user:" or "assistant:". They alternate, and the user goes first.',
    );
  }
  if (messages.some(({ content }) => !content)) {
    throw new Error("One of the turns is empty. Write something after its colon.");
  }
  return messages;
}

/** The labels of a row. on: {turn: true or false}, for the turns that the reader switched. */
function labelsOf({ ids, turns, supervised, words }, on) {
  return ids.map((id, i) => {
    const counts = turns[i] in on ? on[turns[i]] && words[i] : supervised[i];
    return counts ? id : IGNORE_INDEX;
  });
}

class Inside {
  /** columns: of the other part, whose conversation the reader may take. */
  constructor(models, tokenizer, columns) {
    Object.assign(this, { models, tokenizer, row: null, on: {}, at: 0, jobs: new Map() });
    this.messages = null;
    find("kind").addEventListener("input", () => this.read());
    find("text").addEventListener("input", () => {
      this.messages = null; // from now on, what the reader typed
      this.read();
    });
    for (const { name } of models) find("who").append(make("option", { value: name }, name));
    find("who").value = models.at(-1).name;
    for (let i = 0; i < models[0].model.config.n_layer; i++) {
      find("layer").append(make("option", { value: i }, `${i + 1}`));
    }
    for (const name of ["who", "layer"]) find(name).addEventListener("input", () => this.heads());
    const column = columns.at(-1);
    find("take").textContent = `Take the conversation with ${column.name} from above`;
    find("take").addEventListener("click", () => {
      const messages = [...column.history, ...column.turn()];
      if (!messages.length) {
        find("loss").textContent = "There is no conversation yet. Ask something above first.";
        return;
      }
      const { system } = column.settings;
      if (system.trim()) messages.unshift({ role: "system", content: system });
      this.show(messages);
    });
    for (const type of ["pointerover", "focusin", "click"]) {
      find("heads").addEventListener(type, ({ target }) => {
        if (target.dataset.at) this.lookFrom(Number(target.dataset.at));
      });
    }
  }

  /** Show a conversation. messages: [{role, content}, ...]. */
  show(messages) {
    find("kind").value = "chat";
    find("text").value = messages.map(({ role, content }) => `${role}: ${content}`).join("\n");
    this.messages = messages; // as they are, even if one of them has "user:" in it
    return this.read();
  }

  /** The reader's text as a row: {ids, supervised, turns, words, note}. words: what may count.
   * note: what we left out. Throws an Error that says what the reader can do. */
  encode() {
    const { block_size } = this.models[0].model.config;
    const { user, assistant, endoftext } = this.tokenizer;
    const text = find("text").value;
    if (!text.trim()) throw new Error("Type something first.");
    if (find("kind").value === "text") {
      const all = [endoftext, ...this.tokenizer.encode(text)];
      const ids = all.slice(0, block_size);
      const note = all.length > block_size ? ` We show the first ${block_size} tokens.` : "";
      const yes = ids.map(() => true); // nothing is masked
      return { ids, turns: ids.map(() => 0), supervised: yes, words: yes, note };
    }
    const messages = this.messages ?? toMessages(text);
    const kept = fit(messages, this.tokenizer, block_size);
    const row = encodeChat(kept, this.tokenizer);
    if (row.ids.length > block_size) {
      throw new Error(`The last turns don't fit in ${block_size} tokens. Shorten them.`);
    }
    const words = row.ids.map((id) => id !== user && id !== assistant);
    const cut = kept.length < messages.length;
    return { ...row, words, note: cut ? " We left out the oldest turns: they didn't fit." : "" };
  }

  /** Read the text with every model, and draw it. A later call replaces this one. */
  async read() {
    const jobs = new Map();
    this.jobs.clear(); // of the call before
    this.jobs = jobs;
    await pause(200); // the reader may still be typing
    if (this.jobs !== jobs) return;
    const [losses, caches] = [{}, {}];
    let row = null;
    try {
      row = this.encode();
      find("loss").textContent = "Reading …";
    } catch (error) {
      find("loss").textContent = error.message;
    }
    for (const { name, model } of row ? this.models : []) {
      losses[name] = [null]; // nothing predicts the first token
      caches[name] = new Cache(model.config, true);
      jobs.set(name, this.score(model, row.ids, losses[name], caches[name]));
    }
    await takeTurns(jobs);
    if (this.jobs !== jobs) return;
    Object.assign(this, { row, losses, caches, on: {}, at: row ? row.ids.length - 1 : 0 });
    this.strip();
    this.heads();
  }

  /** Append the loss of each id but the first to losses. A generator. */
  *score(model, ids, losses, cache) {
    for (const logits of model.forward(ids, cache)) {
      if (losses.length < ids.length) losses.push(crossEntropy(logits, ids[losses.length]));
      yield;
    }
  }

  /** Each token with its label and its losses, turn by turn, and the mean over those that count. */
  strip() {
    const { row, losses } = this;
    find("strip").replaceChildren();
    if (!row) return;
    const labels = labelsOf(row, this.on);
    const names = this.models.map(({ name }) => name);
    const legend = make("li", { class: "legend" }, make("span", { class: "token" }, "token"));
    legend.append(...["label", ...names].map((name) => make("span", {}, name)));
    let list;
    row.ids.forEach((id, i) => {
      if (row.turns[i] !== row.turns[i - 1]) {
        list = make("ul", { class: "tokens" }, legend.cloneNode(true));
        const isCue = id === this.tokenizer.assistant && i === row.ids.length - 1;
        if (!isCue) find("strip").append(this.toggle(row.turns[i], labels));
        find("strip").append(list);
      }
      const counts = labels[i] !== IGNORE_INDEX;
      const box = make("li", counts ? { class: "supervised" } : {});
      box.append(make("span", { class: "token" }, shown(this.tokenizer.bytes(id))));
      box.append(make("span", {}, counts ? `${id}` : "−100"));
      for (const name of names) {
        const loss = losses[name][i];
        const figure = make("span", {}, loss === null ? "–" : loss.toFixed(2));
        figure.style.setProperty("--heat", Math.min(45, 8 * loss).toFixed(0));
        box.append(figure);
      }
      list.append(box);
    });
    const targets = [...labels.keys()].filter((i) => i && labels[i] !== IGNORE_INDEX);
    const means = names.map((name) => {
      const sum = targets.reduce((total, i) => total + losses[name][i], 0);
      return `${(sum / Math.max(1, targets.length)).toFixed(3)} (${name})`;
    });
    const over = `Over the ${targets.length} tokens that count, the mean loss in nats is `;
    find("loss").textContent = over + means.join(", ") + "." + row.note;
  }

  /** A checkbox that switches a turn between supervised and not. */
  toggle(turn, labels) {
    const { row } = this;
    const isText = find("kind").value === "text";
    const who = isText ? "the text" : turn % 2 ? "the assistant" : "the user";
    const box = make("input", { type: "checkbox", "data-turn": turn });
    box.checked = labels.some((label, i) => row.turns[i] === turn && label !== IGNORE_INDEX);
    box.addEventListener("change", () => {
      this.on[turn] = box.checked;
      this.strip();
      find("strip").querySelector(`[data-turn="${turn}"]`).focus();
    });
    return make("label", { class: "toggle" }, box, ` supervise ${who}`);
  }

  /** The text once for each head of the chosen layer. */
  heads() {
    find("heads").replaceChildren();
    if (!this.row) return;
    for (let head = 0; head < this.models[0].model.config.n_head; head++) {
      const label = `head ${head + 1}`;
      const row = make("div", { class: "boxes", role: "group", "aria-label": label });
      this.row.ids.forEach((id, i) => {
        const box = make("button", { type: "button", class: "look", "data-at": i, tabindex: -1 });
        box.append(shown(this.tokenizer.bytes(id)));
        row.append(box);
      });
      row.children[this.at].tabIndex = 0;
      arrowKeys(row, ".look");
      find("heads").append(make("p", { class: "note" }, label), row);
    }
    this.lookFrom(this.at);
  }

  /** Color every token by how much the one at this position looks at it. */
  lookFrom(at) {
    this.at = at;
    const { looks } = this.caches[find("who").value].layers[Number(find("layer").value)];
    find("heads").querySelectorAll(".boxes").forEach((row, head) => {
      [...row.children].forEach((box, i) => {
        const share = looks[at][head][i] ?? 0;
        box.style.setProperty("--look", Math.round(100 * share));
        box.classList.toggle("at", i === at);
        box.classList.toggle("later", i > at);
        box.title = i > at ? "later" : percent(share);
      });
    });
  }
}
