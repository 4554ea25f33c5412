// Asks the server about the text that is typed, and moves through its tokens.

import { byId, drawChosen, drawModel, drawRibbons, drawTokens, mark } from "/draw.js";

const WAIT = 200; // ms without a key before the server is asked
const AGAIN = 2000; // ms before it is asked whether the training text has been counted
const prompt = byId("prompt");
const list = byId("list");
let data = null; // the last answer
let at = null; // the chosen token, null = the last one
let asking = null; // of the request under way
let typed = 0; // timers
let again = 0;

const fail = (line) => {
  byId("error").textContent = line;
  byId("error").hidden = !line;
  byId("answer").classList.toggle("stale", Boolean(line));
  if (line) byId("length").textContent = "";
};

const ask = async (text, place) => {
  clearTimeout(again);
  asking?.abort();
  const mine = (asking = new AbortController());
  const slow = setTimeout(() => { byId("busy").textContent = "reading …"; }, 150);
  try {
    const answer = await fetch("/explore", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ prompt: text, at: place }),
      signal: mine.signal,
    });
    const found = await answer.json();
    if (mine !== asking) return;
    if (!answer.ok) throw new Error(found.error.message);
    fail("");
    draw(found, text);
  } catch (error) {
    if (mine !== asking) return; // the text has changed meanwhile
    const lost = error instanceof TypeError || error instanceof SyntaxError;
    fail(lost ? "The server does not answer; is it still running?" : error.message);
  } finally {
    clearTimeout(slow);
    if (mine === asking) byId("busy").textContent = "";
  }
};

const draw = (found, text) => {
  const first = data === null;
  const same = data?.text === text;
  data = Object.assign(found, { text });
  const { model, tokens, chosen } = found;
  // What each order multiplies: the chosen token's id, then the ids before it.
  for (const own of chosen?.layers ?? []) {
    for (const order of own.orders) {
      const items = chosen.ngrams.find((n) => n.order === order.order).items;
      order.ids = items.map((item) => item.id).reverse();
    }
  }
  if (first) {
    drawModel(model);
    if (!prompt.value && model.example) {
      prompt.value = model.example;
      ask(prompt.value, null);
      return;
    }
  }
  byId("length").textContent = tokens.length
    ? `${tokens.length} of at most ${model.capacity} tokens`
    : `Type a text of at most ${model.capacity} tokens.`;
  byId("answer").hidden = !chosen;
  if (!chosen) return;
  if (!same || list.children.length !== tokens.length) {
    drawBranches();
    drawTokens(tokens, choose);
    drawRibbons(data, byId("branch").value, choose);
  }
  at = chosen.at;
  drawChosen(data);
  show();
  if (found.training.state === "reading") again = setTimeout(() => ask(data.text, at), AGAIN);
};

const drawBranches = () => {
  const gates = Object.values(data.gates)[0];
  const branches = gates ? gates[0].length : 0;
  const select = byId("branch");
  if (select.options.length === branches + 1) return;
  const options = ["mean", ...Array(branches).keys()].map((value) => {
    const option = document.createElement("option");
    option.value = String(value);
    option.textContent = value === "mean" ? "the mean of the branches" : `branch ${value + 1}`;
    return option;
  });
  select.replaceChildren(...options);
};

const show = () => {
  mark(at);
  const option = byId(`token-${at}`);
  // Within the list alone: the page must not move under the reader.
  if (option.offsetTop < list.scrollTop) list.scrollTop = option.offsetTop - 8;
  const below = option.offsetTop + option.offsetHeight - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below + 8;
};

const choose = (place) => {
  if (!data?.tokens.length || prompt.value !== data.text) return; // another text is on its way
  at = Math.max(0, Math.min(place, data.tokens.length - 1));
  show();
  ask(data.text, at);
};

// The nearest token in the line above (-1) or below (1).
const beside = (direction) => {
  const here = byId(`token-${at}`);
  const options = [...list.children].filter((o) => (o.offsetTop - here.offsetTop) * direction > 0);
  if (!options.length) return at;
  const line = (direction > 0 ? options[0] : options.at(-1)).offsetTop;
  const distance = (o) => Math.abs(o.offsetLeft - here.offsetLeft);
  const nearest = options.filter((o) => o.offsetTop === line).sort((a, b) => distance(a) - distance(b))[0];
  return Number(nearest.id.slice("token-".length));
};

const MOVES = {
  ArrowLeft: () => at - 1,
  ArrowRight: () => at + 1,
  ArrowUp: () => beside(-1),
  ArrowDown: () => beside(1),
  Home: () => 0,
  End: () => Infinity,
};

list.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (!(event.key in MOVES)) return;
  event.preventDefault();
  choose(MOVES[event.key]());
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") prompt.focus();
});
prompt.addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(() => ask(prompt.value, null), WAIT);
});
addEventListener("resize", () => {
  if (data?.chosen) show();
});
byId("branch").addEventListener("change", () => {
  drawRibbons(data, byId("branch").value, choose);
  mark(at);
});

ask(prompt.value, null);
