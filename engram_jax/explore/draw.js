// Draws an answer of the server. All text is set as text: nothing of it is read as HTML.

const el = (name, given = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (key === "v") made.style.setProperty("--v", value ?? 0);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
};
export const byId = (id) => document.getElementById(id);
const fill = (id, ...children) => byId(id).replaceChildren(...children.filter((c) => c !== null));
const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const percent = (p) => (p === null ? "–" : p >= 0.9995 ? "100 %" : `${(100 * p).toFixed(p < 0.001 ? 3 : 1)} %`);
const fixed = (x, digits = 2) => (x === null || x === undefined ? "–" : x.toFixed(digits));
const wide = (given, ...children) => el("table", { role: "table", class: "blocks", ...given }, ...children);
const row = (...cells) => el("tr", { role: "row" }, ...cells);
const head = (text, kind) => el("th", { role: "columnheader", scope: "col", class: kind }, text);
const cell = (label, kind, ...children) => el("td", { role: "cell", "data-label": label, class: kind }, ...children);
const headRow = (...names) => el("thead", { role: "rowgroup" }, row(...names.map((n) => head(...[n].flat()))));
const body = (...rows) => el("tbody", { role: "rowgroup" }, ...rows);

// A token's text with its white space and bytes made visible.
const marks = { " ": "␣", "\n": "↵", "\t": "⇥" };
const control = (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`;
const token = (shown) => {
  const made = el("span", { class: "token" });
  if (shown.start) made.append(el("span", { class: "mark", title: "nothing: the document starts" }, "⊢"));
  else if (shown.bytes) made.append(el("span", { class: "bytes", title: "bytes of a character" }, `‹${shown.bytes}›`));
  else if (!shown.text) made.append(el("span", { class: "mark" }, "∅"));
  else {
    for (const part of shown.text.split(/([ \p{Cc}])/u).filter(Boolean)) {
      const unseen = /^[ \p{Cc}]$/u.test(part);
      made.append(unseen ? el("span", { class: "mark" }, marks[part] ?? control(part)) : part);
    }
  }
  return made;
};
const named = (shown) => (shown.start ? "start" : shown.bytes ? `bytes ${shown.bytes}` : JSON.stringify(shown.text));
const gram = (items) => el("span", { class: "gram" }, ...items.map((item) => el("span", { title: `canonical id ${item.id}` }, token(item))));
const mean = (values) => values.reduce((sum, v) => sum + (v ?? 0), 0) / values.length;
const gateOf = (gates, branch) => (branch === "mean" ? mean(gates) : gates[Number(branch)] ?? 0);

export const drawModel = (model) => {
  byId("model").textContent = `${model.name}, run ${model.run}, step ${model.step.toLocaleString("en")}`;
};

export const drawTokens = (tokens, choose) => {
  fill("list", ...tokens.map((shown, place) => {
    const made = el("div", { role: "option", id: `token-${place}`, "aria-selected": "false" },
      token(shown), el("small", {}, String(shown.canonical.id)));
    made.setAttribute("aria-label", `${named(shown)}, canonical id ${shown.canonical.id}`);
    made.addEventListener("click", () => choose(place));
    return made;
  }));
};

export const drawRibbons = (data, branch, choose) => {
  const layers = data.model.layers.map(({ layer, off }) => {
    const gates = data.gates[layer];
    const title = el("h3", {}, `Layer ${layer} `);
    if (!gates) return [title, el("p", { class: "quiet" }, off ? "switched off" : "this form of memory has no gate")];
    const values = gates.map((each) => gateOf(each, branch));
    title.append(el("span", { class: "quiet" }, `mean ${fixed(mean(values))}`));
    return [title, el("ol", { class: "ribbon", "data-layer": layer }, ...data.tokens.map((shown, place) => {
      const made = el("li", { v: values[place], title: `gate ${fixed(values[place], 3)}`, "data-at": place },
        token(shown), el("span", { class: "sr" }, ` ${fixed(values[place])}`));
      made.addEventListener("click", () => choose(place));
      return made;
    }))];
  });
  const effect = data.effect.map((x) => x ?? 0);
  const most = Math.max(...effect, 1e-9);
  const title = el("h3", {}, "Effect ", el("span", { class: "quiet" }, `KL of the next token's two distributions, at most ${fixed(most)} nats here`));
  const ribbon = el("ol", { class: "ribbon", "data-layer": "effect" }, ...data.tokens.map((shown, place) => {
    const made = el("li", { v: effect[place] / most, title: `${fixed(effect[place], 3)} nats`, "data-at": place },
      token(shown), el("span", { class: "sr" }, ` ${fixed(effect[place])} nats`));
    made.addEventListener("click", () => choose(place));
    return made;
  }));
  fill("ribbons", ...layers.flat(), title, ribbon);
};

export const mark = (at) => {
  for (const option of byId("list").children) option.setAttribute("aria-selected", String(option.id === `token-${at}`));
  for (const item of document.querySelectorAll(".ribbon li")) item.classList.toggle("chosen", item.dataset.at === String(at));
  byId("list").setAttribute("aria-activedescendant", `token-${at}`);
};

// Everything about the chosen token.
export const drawChosen = (data) => {
  const { chosen, training, model } = data;
  const shown = data.tokens[chosen.at];
  const same = chosen.same.flatMap((other, i) => [i ? ", " : "", el("span", { class: "gram" }, el("span", {}, token(other)))]);
  fill("chosen", `Token ${chosen.at + 1} of ${data.tokens.length}: `, el("span", { class: "gram" }, el("span", {}, token(shown))),
    ` is id ${shown.id}, canonical id ${shown.canonical.id}, which is that of `, ...same,
    chosen.sameMore ? ` and ${count(chosen.sameMore, "other token")}.` : ".");
  fill("ngram-list", ...chosen.ngrams.flatMap(({ order, items, count: n }) => [
    el("dt", {}, `${order}-gram`),
    el("dd", {}, gram(items), n === null ? "" : ` ${n ? count(n, "time") : "never"} in the training text`)]));
  fill("hash-list", ...chosen.layers.flatMap(hashes));
  byId("training").textContent = training.state === "ready"
    ? `Bars show a row's length (an untouched row has about ${fixed(model.untouchedNorm)}). Rows are shared: the last column has other n-grams that are sent to the same row, each with how often it occurs; ${training.line}.`
    : `Bars show a row's length (an untouched row has about ${fixed(model.untouchedNorm)}). Who else reads them: ${training.line}.`;
  const longest = Math.max(...chosen.layers.flatMap((l) => l.orders.flatMap((o) => o.heads.map((h) => h.norm ?? 0))), 1e-9);
  fill("row-list", ...chosen.layers.map((own) => rowTable(own, model, longest, training.state === "ready")));
  fill("gate-table", gateTable(data));
  nextTable(chosen);
};

const hashes = ({ layer, orders }) => [
  el("h3", {}, `Layer ${layer}`),
  ...orders.map(({ order, multipliers, mixed, heads, ids }) => el("p", { class: "formula" },
    el("code", {}, `h${"₀₁₂₃₄₅₆₇₈₉"[order] ?? order} = ${multipliers.map((m, back) => `${ids[back]}·${m}`).join(" ⊕ ")}`),
    el("code", {}, `   = ${mixed}`),
    ...heads.map((h) => el("span", { class: "row" }, el("code", {}, `${h.offset} + h mod ${h.prime} = `, el("b", {}, String(h.row))))))),
];

const rowTable = ({ layer, orders }, model, longest, known) => {
  const about = model.layers.find((own) => own.layer === layer);
  const rows = orders.flatMap(({ order, heads }) => heads.map((h) => row(
    cell("n-gram", null, model.offOrders.includes(order) ? `${order} (off)` : String(order)), cell("head", null, String(h.head)),
    cell("row", "number", h.row.toLocaleString("en")),
    cell("norm", null, el("span", { class: "bar", v: (h.norm ?? 0) / longest, "aria-hidden": "true" }), fixed(h.norm)),
    cell("reads", "number", h.reads === null ? "–" : h.reads.toLocaleString("en")),
    cell(null, null, others(h, known)))));
  return wide({ "data-layer": layer },
    el("caption", {}, `Layer ${layer}: ${orders.reduce((n, o) => n + o.heads.length, 0)} of ${about.rows.toLocaleString("en")} rows${about.off ? " (switched off)" : ""}`),
    headRow("n-gram", "head", ["row", "number"], "norm", ["reads", "number"], "also read by"), body(...rows));
};

const others = (h, known) => {
  if (!known) return el("span", { class: "quiet" }, "not known");
  if (!h.others.length) return el("span", { class: "quiet" }, "no other n-gram");
  return el("span", { class: "others" },
    ...h.others.map((o) => el("span", { title: count(o.count, "time") }, gram(o.items), el("span", { class: "quiet" }, ` ${o.count.toLocaleString("en")}`))),
    h.othersMore ? el("span", { class: "quiet" }, `and ${h.othersMore.toLocaleString("en")} more`) : null);
};

const gateTable = (data) => {
  const at = data.chosen.at;
  const layers = data.model.layers.filter(({ layer }) => data.gates[layer]);
  if (!layers.length) return null;
  const branches = data.gates[layers[0].layer][0].length;
  return el("table", {},
    el("caption", {}, "At the chosen token"),
    el("thead", {}, el("tr", {}, head("layer"), ...Array.from({ length: branches }, (_, m) => head(`branch ${m + 1}`, "middle")), head("mean", "middle"))),
    el("tbody", {}, ...layers.map(({ layer }) => {
      const gates = data.gates[layer][at];
      return el("tr", {}, el("th", { scope: "row" }, String(layer)),
        ...[...gates, mean(gates)].map((g) => el("td", { class: "heat", v: g }, fixed(g))));
    })));
};

const nextTable = (chosen) => {
  const { coming } = chosen;
  const line = [`After this token the two differ by ${fixed(chosen.effect, 3)} nats (KL).`];
  if (coming) line.push(" What does come next, ", el("span", { class: "gram" }, el("span", {}, token(coming))), `, has ${percent(coming.with)} with the memory and ${percent(coming.without)} without.`);
  fill("effect-line", ...line);
  const bar = (p, kind) => el("span", { class: `bar ${kind}`, v: p ?? 0, "aria-hidden": "true" });
  fill("next", wide({ id: "next-table" },
    headRow("next token", "with the memory", "without", ["difference", "number"]),
    body(...chosen.next.map((n) => {
      const difference = n.with === null || n.without === null ? null : 100 * (n.with - n.without);
      const sign = difference === null ? "–" : `${difference < 0 ? "−" : "+"}${Math.abs(difference).toFixed(1)}`;
      return row(cell(null, null, el("span", { class: "gram" }, el("span", {}, token(n)))),
        cell("with", null, bar(n.with, "with"), percent(n.with)), cell("without", null, bar(n.without, "without"), percent(n.without)),
        cell("difference", `number ${difference > 0 ? "up" : "down"}`, `${sign} points`));
    }))));
};
