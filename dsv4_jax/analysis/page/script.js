"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const count = data.tokens.length;

// Arrays of 16-bit integers in base64; `scaled` ones are numbers from 0 to 1.
function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}
for (const layer of data.layers) {
  for (const name of ["masses", "near", "far", "far_ids", "ids", "weights"]) {
    if (layer[name]) layer[name] = unpack(layer[name]);
  }
}
const share = (x) => x / 65535;
const percent = (x) => (x >= 0.0995 ? (100 * x).toFixed(0) : (100 * x).toFixed(1)) + "%";
const label = (i) => `${i} ${data.layers[i].name}`;

// The state: one token and one layer, kept in the address so that a view can be shared.
const asked = new URLSearchParams(location.hash.slice(1));
const limit = (x, most, otherwise) => (Number.isInteger(x) && x >= 0 && x < most ? x : otherwise);
const late = Math.floor(count * 0.75);
const worded = data.tokens.findIndex((token, t) => t >= late && /\w{2}/.test(token));
const state = {
  token: limit(parseInt(asked.get("token")), count, worded < 0 ? late : worded),
  layer: limit(parseInt(asked.get("layer")), data.layers.length, Math.min(1, data.layers.length - 1)),
};
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
document.documentElement.dataset.theme = asked.get("theme") || (dark ? "dark" : "light");
at("theme").onclick = () => {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  draw();
};

function node(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "style") made.style.cssText = value;
    else if (key === "tip") tipped(made, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

function tipped(element, text) {
  const tip = at("tip");
  element.onmousemove = (event) => {
    tip.textContent = typeof text === "function" ? text() : text;
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 12, innerWidth - 310) + "px";
    tip.style.top = event.clientY + 16 + "px";
  };
  element.onmouseleave = () => { tip.style.display = "none"; };
}

// Tokens as spans; a line break is shown by a sign and then made.
const words = data.tokens.every((token) => /^\d+$/.test(token));
function textInto(box, click) {
  if (words) box.classList.add("ids");
  const spans = data.tokens.map((token, t) => {
    const shown = token.replace(/\n/g, "\u23ce\n").replace(/\t/g, "    ");
    const span = node("span", { textContent: shown || "\u00b7", onclick: () => click(t) });
    if (/^\s*\n\s*$/.test(token)) span.className = "break";
    return span;
  });
  box.replaceChildren(...spans);
  return spans;
}
const reading = textInto(at("text"), (t) => choose({ token: t }));
const colouring = textInto(at("expert-text"), (t) => choose({ token: t }));

function choose(change) {
  Object.assign(state, change);
  const theme = document.documentElement.dataset.theme;
  history.replaceState(null, "", `#token=${state.token}&layer=${state.layer}&theme=${theme}`);
  draw();
}
at("text").onkeydown = (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  choose({ token: Math.min(count - 1, Math.max(0, state.token + step)) });
};

// Attention of token t in a layer: single tokens [{token, mass}] and entries [{first, last, mass}].
function attention(layer, t) {
  const near = [], far = [], W = data.window;
  for (let j = 0; j < W; j++) {
    const token = t - W + 1 + j;
    if (token >= 0) near.push({ first: token, last: token, mass: share(layer.near[t * W + j]) });
  }
  for (let j = 0; j < (layer.far_count || 0); j++) {
    const entry = layer.far_ids[t * layer.far_count + j] - 1;
    if (entry < 0) continue;
    const first = entry * layer.ratio;
    far.push({ first, last: first + layer.ratio - 1, mass: share(layer.far[t * layer.far_count + j]) });
  }
  return { near, far };
}

function drawLooked() {
  const layer = data.layers[state.layer], t = state.token, { near, far } = attention(layer, t);
  const nearMass = new Float64Array(count), farMass = new Float64Array(count);
  for (const one of near) nearMass[one.first] += one.mass;
  for (const one of far) for (let i = one.first; i <= one.last && i < count; i++) farMass[i] += one.mass;
  const top = Math.max(1e-9, ...nearMass, ...farMass);
  const tint = (mass) => Math.min(0.85, 0.85 * Math.sqrt(mass / top));
  reading.forEach((span, i) => {
    const layers = [];
    if (nearMass[i] > 0) layers.push(`rgba(var(--near), ${tint(nearMass[i]).toFixed(3)})`);
    if (farMass[i] > 0) layers.push(`rgba(var(--far), ${tint(farMass[i]).toFixed(3)})`);
    span.style.background = layers.length === 2 ? `linear-gradient(${layers[0]} 50%, ${layers[1]} 50%)` : layers[0] || "";
    span.classList.toggle("picked", i === t);
    span.classList.toggle("later", i > t);
    const said = [`token ${i}`];
    if (nearMass[i]) said.push(`window ${percent(nearMass[i])}`);
    if (farMass[i]) said.push(`its entry ${percent(farMass[i])}`);
    tipped(span, said.join("\n"));
  });
  const nats = data.nats[t];
  at("picked").textContent = `Token ${t}, ${quoted(t, t)}` + (nats == null ? "" : `, seen coming with ${percent(Math.exp(-nats))}`);
  at("bars").replaceChildren(...data.layers.map((layer, i) => {
    const parts = ["rgb(var(--near))", "rgb(var(--far))", "var(--sink)"].map((colour, p) => {
      return node("i", { style: `width:${100 * share(layer.masses[3 * t + p])}%;background:${colour}` });
    });
    const said = ["window", "compressed entries", "sink"].map((name, p) => `${name} ${percent(share(layer.masses[3 * t + p]))}`);
    const bar = node("div", { className: "bar", onclick: () => choose({ layer: i }), tip: said.join("\n") },
      node("label", { textContent: label(i) }), node("div", {}, ...parts));
    bar.classList.toggle("picked", i === state.layer);
    return bar;
  }));
  const strongest = [...near.map((one) => ({ ...one, colour: "--near" })), ...far.map((one) => ({ ...one, colour: "--far" }))];
  strongest.sort((a, b) => b.mass - a.mass);
  at("strongest").replaceChildren(...strongest.slice(0, 7).map((one) => node("li", {},
    node("b", { textContent: percent(one.mass), style: `color:rgb(var(${one.colour}))` }),
    node("code", { textContent: quoted(one.first, one.last) }))));
}
const quoted = (first, last) => "\u201c" + data.tokens.slice(first, last + 1).join(words ? " " : "").replace(/\n/g, "\u23ce") + "\u201d";

// Experts far apart in number get hues far apart.
const hue = (expert) => (expert * 137.508) % 360;
const colour = (expert, strength = 1) => `hsl(${hue(expert)} var(--rich) var(--light) / ${strength})`;
const k = data.experts_per_token;
function drawExperts() {
  const layer = data.layers[state.layer];
  const choice = node("select", { onchange: (event) => choose({ layer: +event.target.value }) },
    ...data.layers.map((_, i) => node("option", { value: i, textContent: "layer " + label(i) + (data.hashed[i] ? " (by table)" : "") })));
  choice.value = state.layer;
  const used = [...new Set(Array.from({ length: count }, (_, t) => strongestExpert(layer, t)))].sort((a, b) => a - b);
  const chips = used.slice(0, 24).map((e) => node("span", { className: "chip", textContent: e, style: `background:${colour(e)}` }));
  if (used.length > 24) chips.push(node("span", { textContent: `and ${used.length - 24} more` }));
  at("expert-legend").replaceChildren(choice, ...chips);
  colouring.forEach((span, t) => {
    span.style.background = colour(strongestExpert(layer, t), 0.75);
    span.classList.toggle("picked", t === state.token);
    tipped(span, () => `token ${t}: ` + expertsOf(layer, t).map((e) => `${e.id} (${percent(e.share)})`).join(", "));
  });
  at("expert-table").replaceChildren(
    node("tr", {}, ...["layer", "experts and shares", "entropy"].map((name) => node("th", { textContent: name }))),
    ...data.layers.map((layer, i) => {
      const cells = expertsOf(layer, state.token).flatMap((e) => [
        node("span", { className: "chip", textContent: e.id, style: `background:${colour(e.id)}` }), percent(e.share) + " "]);
      const row = node("tr", { style: "cursor:pointer", onclick: () => choose({ layer: i }) },
        node("td", { textContent: label(i) }), node("td", { style: "white-space:normal" }, ...cells),
        node("td", { textContent: layer.entropy[state.token].toFixed(2), tip: "of the router, in nats; " + Math.log(data.experts).toFixed(2) + " is no preference at all" }));
      row.classList.toggle("picked", i === state.layer);
      return row;
    }));
}
function expertsOf(layer, t) {
  const found = [];
  for (let j = 0; j < k; j++) found.push({ id: layer.ids[t * k + j], share: share(layer.weights[t * k + j]) });
  return found.sort((a, b) => b.share - a.share);
}
const strongestExpert = (layer, t) => expertsOf(layer, t)[0].id;

function drawLoad() {
  const box = node("div", { className: "grid" });
  box.style.gridTemplateColumns = `max-content repeat(${data.experts}, 1fr) max-content`;
  data.load.forEach((row, i) => {
    box.append(node("span", { textContent: label(i) + (data.hashed[i] ? ", by table" : "") }));
    row.forEach((x, e) => {
      const hot = x > 1 ? `rgba(var(--warm), ${Math.min(0.9, (x - 1) * 0.6)})` : `rgba(var(--heat), ${Math.min(0.9, (1 - x) * 0.9)})`;
      box.append(node("i", { style: `background:${hot};box-shadow:inset 0 0 0 1px var(--line)`, textContent: data.experts <= 16 ? x.toFixed(2) : "", tip: `layer ${i}, expert ${e}: ${x.toFixed(2)} of a fair share` }));
    });
    box.append(node("span", { textContent: `\u2003most ${Math.max(...row).toFixed(2)}` }));
  });
  at("load-map").replaceChildren(box);
}

// A small plot: series of {points [[x, y], ..], kind}, x and y mapped from the given ranges.
function plot(title, series, { x, y, xName, yName, xText, yText, width = 330, height = 220 }) {
  const inner = { left: 44, right: 12, top: 26, bottom: 38 };
  const across = (v) => inner.left + ((v - x[0]) / (x[1] - x[0] || 1)) * (width - inner.left - inner.right);
  const up = (v) => height - inner.bottom - ((v - y[0]) / (y[1] - y[0] || 1)) * (height - inner.top - inner.bottom);
  const parts = [`<text class="title" x="${inner.left}" y="14">${title}</text>`];
  for (let i = 0; i <= 4; i++) {
    const v = y[0] + ((y[1] - y[0]) * i) / 4, w = x[0] + ((x[1] - x[0]) * i) / 4;
    parts.push(`<line class="axis" x1="${inner.left}" x2="${width - inner.right}" y1="${up(v)}" y2="${up(v)}"/>`);
    parts.push(`<text x="${inner.left - 6}" y="${up(v) + 4}" text-anchor="end">${yText(v)}</text>`);
    parts.push(`<text x="${across(w)}" y="${height - inner.bottom + 15}" text-anchor="middle">${xText(w)}</text>`);
  }
  parts.push(`<text x="${(width + inner.left) / 2}" y="${height - 6}" text-anchor="middle">${xName}</text>`);
  for (const { points, kind } of series) {
    parts.push(`<polyline class="${kind}" points="${points.map(([a, b]) => `${across(a).toFixed(1)},${up(b).toFixed(1)}`).join(" ")}"/>`);
  }
  const box = node("div");
  box.innerHTML = `<svg width="${width}" height="${height}" role="img" aria-label="${title}: ${yName}">${parts.join("")}</svg>`;
  return box;
}

function drawRecall() {
  if (!data.recall.length) {
    at("recall-plots").textContent = "This model or these texts leave an indexer nothing to choose.";
    return;
  }
  at("recall-plots").replaceChildren(...data.recall.map(({ layer, curve, at_k }) => {
    const line = (column) => [[0, 0], ...curve.map((row, i) => [data.shares[i], row[column]])];
    const box = plot(`layer ${label(layer)}`, [
      { points: line(2), kind: "chance" }, { points: line(1), kind: "best" }, { points: line(0), kind: "line" },
    ], { x: [0, 1], y: [0, 1], xName: "share of entries chosen", yName: "share of attention held", xText: percent, yText: percent });
    const said = at_k == null
      ? `No token saw more than ${data.topk} entries, so all of them were attended.`
      : `With its ${data.topk} entries the indexer held ${percent(at_k)} of the attention.`;
    box.append(node("div", { textContent: said, style: "font-size:12.5px;max-width:330px" }));
    return box;
  }));
}

function drawMixing() {
  const { comb, pre, post, gain, largest, error } = data.mixing, sites = gain.length * 2;
  const flat = (values, way) => values.flatMap((layer, l) => [0, 1].map((site) => [2 * l + site + 1, layer[site][way]]));
  const curves = [0, 1].map((way) => {
    const most = flat(largest, way), mean = flat(gain, way);
    const reach = Math.max(0.002, ...most.map(([, v]) => Math.abs(v - 1)), ...mean.map(([, v]) => Math.abs(v - 1))) * 1.2;
    return plot(way ? "Backwards: largest column sum" : "Forwards: largest row sum",
      [{ points: [[1, 1], [sites, 1]], kind: "best" }, { points: most, kind: "second" }, { points: mean, kind: "line" }],
      { x: [1, sites], y: [1 - reach, 1 + reach], xName: "sublayers multiplied", yName: "gain", xText: (v) => v.toFixed(0), yText: (v) => v.toFixed(reach < 0.02 ? 4 : 2), width: 400 });
  });
  const note = node("div", { style: "font-size:12.5px;max-width:250px;align-self:center" });
  note.innerHTML = `<b class="near">Blue</b>: mean of the tokens. <b class="far">Orange</b>: the worst token. Dashed: 1.<br><br>` +
    `Of all single matrices the row or column sum furthest from 1 was off by ${error.toExponential(1)}.`;
  at("gain").replaceChildren(...curves, note);
  const n = comb[0][0].length;
  at("maps").replaceChildren(...comb.flatMap((layer, l) => layer.map((matrix, site) => {
    const cells = matrix.flatMap((row, i) => row.map((x, j) => node("i", {
      style: `background:rgba(var(--heat), ${(0.05 + 0.85 * Math.min(1, x)).toFixed(3)});color:${x > 0.5 ? "var(--paper)" : "var(--soft)"}`,
      textContent: x >= 0.005 ? x.toFixed(2).replace(/^0/, "") : "", tip: `stream ${i} into stream ${j}: ${x.toFixed(4)}` })));
    const grid = node("div", { className: "cells" }, ...cells);
    grid.style.gridTemplateColumns = `repeat(${n}, 25px)`;
    const weights = `read ${pre[l][site].map((x) => x.toFixed(2)).join(" ")}\nwritten ${post[l][site].map((x) => x.toFixed(2)).join(" ")}`;
    return node("div", { className: "map" }, node("div", { textContent: `${l} ${site ? "experts" : "attention"}`, tip: weights }), grid);
  })));
}

function drawRounding() {
  const roles = [...new Set(data.rounding.flatMap(Object.keys))].sort();
  if (!roles.length) {
    at("rounding").remove();
    return;
  }
  at("rounding-table").replaceChildren(
    node("tr", {}, node("th", { textContent: "layer" }), ...roles.map((role) => node("th", { textContent: role }))),
    ...data.rounding.map((row, i) => node("tr", {}, node("td", { textContent: label(i) }), ...roles.map((role) => node("td", {
      textContent: role in row ? percent(row[role]) : "", style: role in row ? `background:rgba(var(--warm), ${Math.min(0.6, row[role] * 4)})` : "" })))));
}

function draw() {
  drawLooked();
  drawExperts();
}
drawLoad();
drawRecall();
drawMixing();
drawRounding();
draw();
for (const spans of [reading, colouring]) spans[state.token].scrollIntoView({ block: "center" });
scrollTo(0, 0);
