
"use strict";
// Draws the report from the JSON beside it. Text enters the page as text nodes alone.
const { words, runs } = JSON.parse(document.getElementById("data").textContent);
const W = words.page;
const SIGNS = [["relaxed", 1], ["kept", 0], ["tightened", -1]];
const NAME = { 1: "relaxed", 0: "kept", "-1": "tightened" };
const SHAPE = { relaxed: "▲", kept: "●", tightened: "▼" };
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const PAGE = 50;
let current = 0;

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
// What comes from outside keeps its writing direction to itself.
const foreign = (text) => el("bdi", null, String(text));
const say = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text = String(value);
  if (size < 1e-4 || size >= 1e9) text = value.toExponential(digits - 2);
  else if (!Number.isInteger(value)) text = String(Number(value.toPrecision(digits)));
  return text.replace("-", "−");
}
const percent = (share) => (share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0) + "%";
const decision = (value) => {
  const name = NAME[value];
  return name ? el("span", { class: "decision " + name }, SHAPE[name] + " " + W[name]) : foreign(value);
};
const state = (name) =>
  el("span", { class: "state " + name }, { look: "▲ ", fine: "✓ ", none: "– " }[name] + W[name]);
const table = (head, rows, attributes) =>
  el("div", { class: "scroll", tabindex: "0", role: "group", ...attributes },
    el("table", null, el("thead", null, el("tr", null, head)), el("tbody", null, rows)));
const th = (text, kind) => el("th", { scope: "col", class: kind }, text);
const td = (text, kind) => el("td", { class: kind }, text);
const section = (id, ...children) =>
  el("section", { id, "aria-labelledby": id + "-title" }, el("h2", { id: id + "-title" }, W[id]), ...children);
const note = (text) => el("p", { class: "note" }, text);

// Charts: SVG at the width there is, drawn again when that changes.

function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted), power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function extent(values, room = 0.06) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return [0, 1];
  const margin = (high - low) * room || Math.abs(high) * room || 0.5;
  return [low - margin, high + margin];
}

// spec: label, x and y ranges, axis titles, height, draw(plot) -> SVG nodes; read: {xs, text(i)} for the pointer and keys.
function chart(spec) {
  const output = el("output", { "aria-live": "polite" });
  const plot = el("div", { class: "plot", tabindex: spec.read ? "0" : null, role: "img", "aria-label": spec.label });
  let width = 0, scale = null, mark = null, at = -1;
  function draw() {
    width = Math.max(220, plot.clientWidth);
    const height = spec.height, left = 58, right = 10, top = 8, bottom = 42;
    const [x0, x1] = spec.x, [y0, y1] = spec.y;
    scale = {
      left, right: width - right, top, bottom: height - bottom,
      X: (v) => left + ((v - x0) / (x1 - x0 || 1)) * (width - left - right),
      Y: (v) => height - bottom - ((v - y0) / (y1 - y0 || 1)) * (height - top - bottom),
    };
    const { X, Y } = scale;
    const nodes = [];
    for (const t of ticks(y0, y1, height / 45)) nodes.push(
      svg("line", { class: "grid", x1: left, x2: width - right, y1: Y(t), y2: Y(t) }),
      svg("text", { x: left - 7, y: Y(t) + 4, "text-anchor": "end" }, spec.percent ? percent(t) : number(t)));
    for (const t of ticks(x0, x1, width / 110)) nodes.push(
      svg("line", { class: "axis", x1: X(t), x2: X(t), y1: height - bottom, y2: height - bottom + 4 }),
      svg("text", { x: X(t), y: height - bottom + 18, "text-anchor": "middle" }, number(t)));
    nodes.push(
      svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
      svg("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, spec.xTitle));
    const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" }, nodes, spec.draw(scale));
    mark = svg("line", { class: "mark", y1: top, y2: height - bottom, visibility: "hidden" });
    drawn.append(mark);
    plot.replaceChildren(drawn);
    if (at >= 0) read(at);
  }
  function read(i) {
    at = Math.min(Math.max(i, 0), spec.read.xs.length - 1);
    const x = scale.X(spec.read.xs[at]);
    for (const side of ["x1", "x2"]) mark.setAttribute(side, x);
    mark.setAttribute("visibility", "visible");
    output.textContent = spec.read.text(at);
  }
  if (spec.read && spec.read.xs.length) {
    plot.addEventListener("pointermove", (event) => {
      const x = event.clientX - plot.getBoundingClientRect().left;
      let best = 0;
      spec.read.xs.forEach((v, i) => { if (Math.abs(scale.X(v) - x) < Math.abs(scale.X(spec.read.xs[best]) - x)) best = i; });
      read(best);
    });
    plot.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spec.read.xs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      read(to);
    });
  }
  if (spec.pick) plot.addEventListener("click", (event) => {
    const box = plot.getBoundingClientRect();
    spec.pick(scale, event.clientX - box.left, event.clientY - box.top);
  });
  new ResizeObserver(() => { if (Math.abs(plot.clientWidth - width) > 1) draw(); }).observe(plot);
  return el("figure", null, spec.caption ? el("figcaption", null, spec.caption) : null,
    spec.yTitle ? el("div", { class: "note" }, "↑ " + spec.yTitle) : null, plot, spec.read ? output : null);
}

function path(xs, ys, { X, Y }) {
  let d = "", pen = "M";
  xs.forEach((x, i) => {
    if (ys[i] === null) { pen = "M"; return; }
    d += `${pen}${X(x).toFixed(1)} ${Y(ys[i]).toFixed(1)}`;
    pen = "L";
  });
  return d;
}

function shape(name, x, y, r) {
  const [a, b] = [x.toFixed(1), y.toFixed(1)];
  if (name === "kept") return `M${(x - r).toFixed(1)} ${b}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`;
  const s = name === "relaxed" ? -1 : 1;
  return `M${a} ${(y + s * r * 1.25).toFixed(1)}l${r * 1.2} ${-s * r * 2.1}h${-r * 2.4}z`;
}

// The mark of one evaluation set among several.
function setMark(k, x, y) {
  return [shape("kept", x, y, 4), `M${x - 4} ${y - 4}h8v8h-8z`, `M${x} ${y - 5}l5 5l-5 5l-5 -5z`, shape("relaxed", x, y, 4)][k % 4];
}

const decisionLegend = (counts, ...more) => el("ul", { class: "legend" }, SIGNS.map(([name]) =>
  el("li", null, svg("svg", { viewBox: "0 0 28 14", "aria-hidden": "true" }, svg("path", { class: name, d: shape(name, 14, 7, 5) })),
    W[name] + (counts ? " " + counts[name] : ""))), more);
const lineKey = (i) => ({ stroke: `var(--run${i % 7})`, "stroke-dasharray": DASHES[i % 4] || null });

function styled(node, values) {
  for (const [name, value] of Object.entries(values)) if (value) node.style.setProperty(name, value);
  return node;
}

// Sections.

function summary() {
  return section("summary", el("div", { class: "cards" }, runs.map((run) => {
    const look = run.alarms.some((alarm) => alarm.state === "look");
    return el("article", { class: look ? "card look" : "card" },
      el("h3", null, foreign(run.name), ` (${W.method}: `, foreign(run.method), ") ", state(look ? "look" : "fine")),
      el("ul", null, run.summary.map((line) => el("li", null, line))));
  })));
}

function alarms() {
  const head = [th(W.alarm), ...runs.map((run) => el("th", { scope: "col" }, foreign(run.name))), th(W.rule)];
  const rows = runs[0].alarms.map((alarm, i) => el("tr", null, el("th", { scope: "row" }, alarm.name),
    runs.map((run) => el("td", { class: "wide" }, state(run.alarms[i].state), el("div", null, run.alarms[i].measured))),
    td(alarm.rule, "rule")));
  return section("alarms", table(head, rows, { "aria-label": W.alarms }));
}

function chooser() {
  if (runs.length < 2) return null;
  return el("fieldset", { class: "runs" }, el("legend", null, W.run), runs.map((run, i) =>
    el("label", null, el("input", { type: "radio", name: "run", value: i, checked: i === current, onchange: () => choose(i) }),
      foreign(run.name))));
}

function picture(run) {
  const { x, y, decision: kind, pair, step } = run.dots;
  const counts = Object.fromEntries(SIGNS.map(([name, sign]) => [name, kind.filter((k) => k === sign).length]));
  const [xs, ys] = [extent(x), extent(y)];
  const low = Math.max(xs[0], ys[0]), high = Math.min(xs[1], ys[1]);
  const spec = {
    label: `${W.picture}: ` + SIGNS.map(([name]) => `${W[name]} ${counts[name]}`).join(", "),
    x: xs, y: ys, xTitle: W.axis_kl, yTitle: W.axis_margin, height: 440,
    draw: (scale) => [
      ...[["kept", 0], ["relaxed", 1], ["tightened", -1]].map(([name, sign]) => svg("path", {
        class: "dots " + name, d: kind.map((k, i) => (k === sign ? shape(name, scale.X(x[i]), scale.Y(y[i]), 3) : "")).join("") })),
      low < high ? svg("line", { class: "boundary", x1: scale.X(low), y1: scale.Y(low), x2: scale.X(high), y2: scale.Y(high) }) : null,
    ],
    pick: (scale, a, b) => {
      let best = -1, nearest = 400;
      x.forEach((_, i) => {
        const d = (scale.X(x[i]) - a) ** 2 + (scale.Y(y[i]) - b) ** 2;
        if (d < nearest && pair[i] >= 0) { best = i; nearest = d; }
      });
      if (best >= 0) openPair(run, pair[best], step[best]);
    },
  };
  const line = el("li", null, svg("svg", { viewBox: "0 0 28 14", "aria-hidden": "true" },
    svg("line", { class: "boundary", x1: 2, y1: 12, x2: 26, y2: 2 })), W.line);
  return section("picture", note(W.dot_hint + " " + run.dots_note), decisionLegend(counts, line), chart(spec));
}

function beta(run) {
  const { step, beta: level, share } = run.map;
  return section("beta", note(W.map_hint), chart({
    label: `${W.running_beta}: ${number(run.series.beta[0])} → ${number(run.series.beta.at(-1))}`,
    x: [step[0], step.at(-1)], y: [level[0], level.at(-1)], xTitle: W.optimizer_step, yTitle: "β", height: 300,
    draw: (scale) => [
      ...share.flatMap((column, i) => column.map((s, j) => s ? svg("rect", {
        class: "cell", "fill-opacity": (0.08 + 0.6 * s).toFixed(2), x: scale.X(step[i]), y: scale.Y(level[j + 1]),
        width: Math.max(1, scale.X(step[i + 1]) - scale.X(step[i])), height: Math.max(1, scale.Y(level[j]) - scale.Y(level[j + 1])) }) : null)),
      styled(svg("path", { class: "curve", d: path(run.series.step, run.series.beta, scale) }), { stroke: "var(--relaxed)" }),
    ],
    read: { xs: run.series.step, text: (i) => `${W.step} ${run.series.step[i]}: ${W.running_beta} ${number(run.series.beta[i])}` },
  }));
}

function shares(run) {
  const s = run.series;
  return section("shares", decisionLegend(), chart({
    label: W.shares, x: extent(s.step, 0), y: [0, 1], percent: true, xTitle: W.optimizer_step, yTitle: W.share, height: 260,
    draw: (scale) => SIGNS.flatMap(([name]) => [
      styled(svg("path", { class: "curve", d: path(s.step, s[name], scale) }), { stroke: `var(--${name})` }),
      svg("path", { class: name, d: s.step.map((x, i) => i % Math.ceil(s.step.length / 14) ? "" : shape(name, scale.X(x), scale.Y(s[name][i]), 4)).join("") }),
    ]),
    read: { xs: s.step, text: (i) => `${W.step} ${s.step[i]}: ` + SIGNS.map(([name]) => `${W[name]} ${percent(s[name][i])}`).join(", ") },
  }));
}

function curves() {
  const sets = [...new Set(runs.flatMap((run) => run.evaluation.map((one) => one.name)))];
  const legend = el("ul", { class: "legend" }, runs.map((run, i) => el("li", null,
    svg("svg", { viewBox: "0 0 28 14", "aria-hidden": "true" }, styled(svg("path", { class: "curve", d: "M1 7H27" }), lineKey(i))), foreign(run.name))),
    sets.map((name, k) => el("li", null, svg("svg", { viewBox: "0 0 28 14", "aria-hidden": "true" },
      svg("path", { class: "kept", d: setMark(k, 14, 7) })), W.evaluation, sets.length > 1 ? foreign(name) : null)));
  // Those of any run: of another, the point that a step is part of.
  const steps = [...new Set(runs.flatMap((run) => run.series.step))].sort((a, b) => a - b);
  const names = ["reward_margin", "accuracy", "kl_chosen", "kl_rejected", "entropy_chosen", "entropy_rejected"];
  return section("curves", note(W.chart_hint), legend, el("div", { class: "charts" }, names.map((name) => chart({
    caption: W[name], label: `${W[name]}: ` + runs.map((run) => `${run.name} ${number(run.series[name].at(-1))}`).join(", "),
    x: extent(runs.flatMap((run) => [...run.series.step, ...run.evaluation.flatMap((one) => one.step)]), 0),
    y: extent(runs.flatMap((run) => [...run.series[name], ...run.evaluation.flatMap((one) => one[name])])),
    percent: name === "accuracy", xTitle: W.optimizer_step, height: 220,
    draw: (scale) => runs.flatMap((run, i) => [
      styled(svg("path", { class: "curve", d: path(run.series.step, run.series[name], scale) }), lineKey(i)),
      ...run.evaluation.flatMap((one) => one.step.map((step, k) => one[name][k] === null ? null : styled(
        svg("path", { class: "evaluated", d: setMark(sets.indexOf(one.name), scale.X(step), scale.Y(one[name][k])) }),
        { fill: `var(--run${i % 7})`, stroke: "var(--paper)" }))),
    ]),
    read: {
      xs: steps,
      text: (i) => `${W.step} ${steps[i]}: ` + runs.map((run) => {
        const k = run.series.step.findIndex((step) => Math.abs(step - steps[i]) <= run.series.steps_a_point / 2);
        return (runs.length > 1 ? run.name + " " : "") + (k < 0 ? "–" : number(run.series[name][k]));
      }).join(", "),
    },
  }))));
}

function labels(run) {
  if (!run.labels.length) return section("labels", note(W.no_labels));
  const bar = (one) => el("div", { class: "bar", "aria-hidden": "true" },
    SIGNS.map(([name]) => styled(el("i", { class: name }), { width: one[name] * 100 + "%" })));
  const rows = run.labels.map((one) => el("tr", null, el("th", { scope: "row" }, foreign(one.label)), td(number(one.n), "number"),
    SIGNS.map(([name]) => td(percent(one[name]), "number")), el("td", null, bar(one))));
  const head = [th(W.label), th(W.decisions, "number"), ...SIGNS.map(([name]) => el("th", { scope: "col", class: "number" },
    el("span", { class: name }, SHAPE[name]), " " + W[name])), th("")];
  return section("labels", run.categories > run.labels.length ? note(say(W.labels_more, { n: run.labels.length, of: run.categories })) : null,
    table(head, rows, { "aria-label": W.labels }));
}

function pairLink(run, i) {
  return el("button", { type: "button", class: "link", "aria-label": `${W.open} ${run.pairs.id[i]}`, onclick: (event) => {
    event.stopPropagation();
    openPair(run, i);
  } }, foreign(run.pairs.id[i]));
}

function short(run, places, caption) {
  if (!places.length) return el("div", null, el("h3", null, caption), note(W.nothing));
  const p = run.pairs;
  const head = [th(W.pair), th(W.row, "number"), ...SIGNS.map(([name]) => el("th", { scope: "col", class: "number", title: W[name], "aria-label": W[name] }, el("span", { class: name }, SHAPE[name]))),
    th(W.changes, "number"), th(W.lean, "number")];
  const rows = places.map((i) => el("tr", null, el("td", { class: "id" }, pairLink(run, i)), td(number(p.row[i]), "number"),
    SIGNS.map(([name]) => td(number(p[name][i]), "number")), td(number(p.flips[i]), "number"), td(number(p.lean[i]), "number")));
  return el("div", null, el("h3", null, caption), table(head, rows, { "aria-label": caption }));
}

function flips(run) {
  const { matrix, seen_again, known } = run.flips;
  if (!seen_again) return section("flips", note(known ? W.once : W.unknown_pairs));
  const rows = SIGNS.map(([name], i) => el("tr", null, el("th", { scope: "row" }, decision(SIGNS[i][1])),
    matrix[i].map((n) => td(number(n), "number"))));
  return section("flips", el("div", { class: "columns" },
    el("div", null, el("h3", null, W.shares), table([th(W.from_to), ...SIGNS.map(([, sign]) => el("th", { scope: "col", class: "number" }, decision(sign)))], rows, { "aria-label": W.from_to })),
    short(run, run.most.flips, W.flips)));
}

function extremes(run) {
  return section("extremes", note(W.lean_hint), el("div", { class: "columns" },
    short(run, run.most.relaxed, `${SHAPE.relaxed} ${W.relaxed}`), short(run, run.most.tightened, `${SHAPE.tightened} ${W.tightened}`)));
}

function pairTable(run) {
  const p = run.pairs, n = p.id.length, labelled = p.label.some((label) => label !== null);
  const every = Array.from({ length: n }, (_, i) => i);
  const columns = [
    ["id", W.pair], ["row", W.row], ...(labelled ? [["label", W.label]] : []), ["decision", W.last_decision], ["visits", W.visits],
    ["flips", W.changes], ["margin", W.margin], ["kl_difference", W.kl_difference], ["lean", W.lean]];
  let sorted = ["row", 1], at = 0, shown = every;
  const body = el("tbody"), count = el("output", { "aria-live": "polite", class: "count" }), place = el("span");
  const input = (name, attributes) => el("input", { name, autocomplete: "off", oninput: update, ...attributes });
  const range = (name, text) => el("fieldset", null, el("legend", null, text), el("div", null,
    input(name + "_least", { type: "number", step: "any", "aria-label": `${text} ${W.least}`, placeholder: W.least }), "–",
    input(name + "_most", { type: "number", step: "any", "aria-label": `${text} ${W.most}`, placeholder: W.most })));
  const options = [["any", ""], ...SIGNS, ["flipped", "flips"], ["vetoed", "vetoed"]];
  const form = el("form", { class: "filter", onsubmit: (event) => event.preventDefault(), onreset: () => setTimeout(update) },
    el("label", null, W.decision, el("select", { name: "decision", onchange: update }, options.map(([name, value]) => el("option", { value }, W[name])))),
    range("margin", W.margin), range("kl_difference", W.kl_difference),
    el("label", null, W.search + (labelled ? ` / ${W.label}` : ""), input("search", { type: "search", spellcheck: "false" })),
    el("button", { type: "reset" }, W.clear));
  const heads = columns.map(([name, text]) => el("th", { scope: "col", class: ["id", "label", "decision"].includes(name) ? null : "number" },
    el("button", { type: "button", class: "sort", "data-column": name, onclick: () => {
      sorted = [name, sorted[0] === name ? -sorted[1] : 1];
      update();
    } }, text)));
  const [back, on] = [[-1, W.previous], [1, W.next]].map(([by, text]) => el("button", { type: "button", onclick: () => { at += by; draw(); } }, text));

  function update() {
    const value = (name) => form.elements[name].value.trim();
    // What is not finite passes no bound, where null would pass as 0.
    const bounds = ["margin", "kl_difference"].map((name) => [p[name].map((v) => v ?? NaN), value(name + "_least"), value(name + "_most")]);
    const kind = value("decision"), search = value("search").toLowerCase();
    shown = every.filter((i) =>
      (kind === "" || (kind === "flips" || kind === "vetoed" ? p[kind][i] > 0 : p.decision[i] === Number(kind))) &&
      bounds.every(([values, least, most]) => (least === "" || values[i] >= Number(least)) && (most === "" || values[i] <= Number(most))) &&
      (search === "" || p.id[i].toLowerCase().includes(search) || String(p.row[i] ?? "") === search || (p.label[i] || "").toLowerCase().includes(search)));
    const [name, way] = sorted, values = p[name];
    shown.sort((i, j) => {
      const [a, b] = [values[i], values[j]];
      if (a === b) return i - j;
      if (a === null || b === null) return a === null ? 1 : -1;
      return (a < b ? -1 : 1) * way;
    });
    at = 0;
    draw();
  }
  function draw() {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    at = Math.min(Math.max(at, 0), pages - 1);
    body.replaceChildren(...shown.slice(at * PAGE, (at + 1) * PAGE).map((i) => el("tr", { class: "open", onclick: () => openPair(run, i) },
      columns.map(([name]) => el("td", { class: name === "id" ? "id" : ["label", "decision"].includes(name) ? null : "number" },
        name === "id" ? pairLink(run, i) : name === "decision" ? decision(p.decision[i])
          : name === "label" ? foreign(p.label[i] ?? "–") : number(p[name][i]))))));
    if (!shown.length) body.append(el("tr", null, el("td", { colspan: columns.length }, W.nothing)));
    count.textContent = say(W.found, { n: shown.length.toLocaleString("en"), of: n.toLocaleString("en") });
    place.textContent = say(W.page_of, { n: at + 1, of: pages });
    back.disabled = at === 0;
    on.disabled = at >= pages - 1;
    heads.forEach((head, k) => {
      const own = columns[k][0] === sorted[0];
      head.setAttribute("aria-sort", own ? (sorted[1] > 0 ? "ascending" : "descending") : "none");
      head.firstChild.textContent = columns[k][1] + (own ? (sorted[1] > 0 ? " ↑" : " ↓") : "");
    });
  }
  update();
  return section("table", note(W.sort_hint + " " + run.table_note), form, count,
    el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": W.table },
      el("table", { id: "pairs" }, el("thead", null, el("tr", null, heads)), body)),
    el("div", { class: "pager" }, back, place, on));
}

function openPair(run, i) {
  const p = run.pairs;
  // The visits lie pair after pair.
  let start = 0;
  for (let k = 0; k < i; k++) start += p.visits[k];
  const names = Object.keys(words.history), places = Array.from({ length: p.visits[i] }, (_, k) => start + k);
  const show = (name, value) => name === "decision" ? decision(value) : name === "vetoed" ? (value ? "✓" : "–") : number(value, 5);
  const history = table(names.map((name) => th(words.history[name], "number")),
    places.map((k) => el("tr", null, names.map((name) => td(show(name, run.visits[name][k]), "number")))), { "aria-label": W.history });
  const texts = run.texts && run.texts[i];
  const body = texts ? ["prompt", "chosen", "rejected"].flatMap((name, k) => [el("h3", null, W[name]),
    el("pre", { class: "text", dir: "auto", tabindex: "0" }, texts[k])]) : [note(run.texts ? W.no_text_of_pair : W.no_texts)];
  const facts = [[W.run, foreign(run.name)], [W.row, number(p.row[i])], [W.label, p.label[i] === null ? null : foreign(p.label[i])],
    [W.last_decision, decision(p.decision[i])], [W.visits, number(p.visits[i])], [W.changes, number(p.flips[i])], [W.lean, number(p.lean[i])]];
  const dialog = el("dialog", { "aria-labelledby": "pair-title", onclose: () => dialog.remove(),
    onclick: (event) => { if (event.target === dialog) dialog.close(); } },
    el("div", null,
      el("div", { class: "head" }, el("h2", { id: "pair-title" }, foreign(p.id[i])),
        el("button", { type: "button", onclick: () => dialog.close() }, W.close)),
      el("dl", null, facts.filter(([, value]) => value !== null).flatMap(([name, value]) => [el("dt", null, name), el("dd", null, value)])),
      el("h3", null, W.history), history, body));
  document.body.append(dialog);
  dialog.showModal();
}

function auditSection() {
  return section("audit", runs.map((run) => {
    const { ok, text, findings, limits, digest } = run.audit;
    const head = ["kind", "part", "place", "epoch", "step", "row", "pair", "column", "holds", "follows"].map((name) => th(W[name]));
    const rows = findings.map((f) => el("tr", null, td(words.findings[f.kind], "wide"),
      [f.part, f.place, f.epoch, f.step, f.row, f.pair_id, f.column, f.holds, f.follows].map((value) => el("td", { class: String(value).length > 40 ? "wide" : "id" }, value === null || value === "" ? "–" : foreign(value)))));
    return el("div", null, el("p", null, state(ok ? "fine" : "look"), " ", foreign(run.name), ": ", text),
      findings.length ? table(head, rows, { "aria-label": W.audit }) : null,
      limits.length ? el("div", null, el("h3", null, W.unchecked), el("ul", { class: "note" }, limits.map((line) => el("li", null, line)))) : null,
      el("p", { class: "note" }, `${W.digest}: `, el("code", null, digest)));
  }));
}

function settings(run) {
  return section("settings", el("ul", { class: "note" }, run.notes.map((text) => el("li", null, text))),
    table([th(W.option), th(W.value)], run.settings.map(([name, value]) => el("tr", null, el("th", { scope: "row" }, foreign(name)), el("td", null, foreign(value)))), { "aria-label": W.settings }));
}

const own = el("div", { id: "own" });

function choose(i) {
  current = i;
  const run = runs[i];
  own.replaceChildren(picture(run), beta(run), shares(run), labels(run), flips(run), extremes(run), pairTable(run), settings(run));
}

const contents = ["summary", "alarms", "curves", "audit", "picture", "beta", "shares", "labels", "flips", "extremes", "table", "settings"];
document.getElementById("report").append(
  el("header", null, el("a", { class: "skip", href: "#summary" }, W.skip), el("h1", null, W.title), el("p", null, W.subtitle),
    el("nav", { "aria-label": W.contents }, el("ul", null, contents.map((id) => el("li", null, el("a", { href: "#" + id }, W[id])))))),
  el("main", null, summary(), alarms(), curves(), auditSection(), chooser(), own));
choose(0);
