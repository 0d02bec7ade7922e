"use strict";
// Draws runs from the data of the server, or from the data inside of a report. All texts are set as text, never as HTML.
const COLOURS = ["#0b7285", "#c2255c", "#5f3dc4", "#e67700", "#2b8a3e", "#1864ab", "#862e9c", "#a61e4d", "#495057", "#087f5b"];
const CHARTS = [
  ["Loss", ["loss"], true], ["Loss by branch", /^loss_/, true], ["Gradient norm", ["gradient_norm"], true],
  ["Learning rate", ["learning_rate"], false], ["Samples per second", ["samples_per_second"], false],
  ["Memory (GiB)", ["memory_gib"], false], ["Model FLOPs utilisation", ["mfu"], false],
];
const DASHES = ["", "6 3", "2 2", "8 3 2 3", "1 3"];
const report = document.getElementById("data");
const state = { serial: 0, runs: {}, differences: {}, embedded: {}, hidden: new Set(), step: null, video: {} };
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made[key] = value;
  made.append(...children);
  return made;
}
function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
const colour = (name) => COLOURS[Object.keys(state.runs).indexOf(name) % COLOURS.length];
const shown = () => Object.entries(state.runs).filter(([name]) => !state.hidden.has(name));
function number(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(+value.toPrecision(3));
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const h = Math.floor(seconds / 3600), m = Math.floor(seconds / 60) % 60;
  return h ? `${h} h ${m} min` : m ? `${m} min` : `${Math.round(seconds)} s`;
}
const dot = (name) => { const made = element("span", { className: "dot" }); made.style.background = colour(name); return made; };
function table(head, rows) {
  const body = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
  return element("table", {}, element("thead", {}, element("tr", {}, ...head.map((t) => element("th", {}, t)))), element("tbody", {}, ...body));
}

// Round numbers between two values: 3 to 6 of them, if the values are not equal.
function rounded(low, high) {
  const power = 10 ** Math.floor(Math.log10((high - low) / 5));
  const step = power * [1, 2, 5, 10].find((factor) => (high - low) / (power * factor) <= 5);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => +((first + i) * step).toPrecision(12));
}
// The same for a log axis: 0.5, 1, 2, 5, or powers of 10 over many decades.
function roundedLog(low, high) {
  const powers = Array.from({ length: 61 }, (_, i) => i - 30);
  for (const factors of [[1, 2, 5], [1]]) {
    const found = powers.flatMap((power) => factors.map((factor) => +`${factor}e${power}`)).filter((v) => v >= low && v <= high);
    if (found.length <= 7 && found.length > 2) return found;
  }
  return rounded(low, high);
}

// lines: [{colour, dash, points: [[x, y, low, high]]}]
function chart(title, lines, { log = false, xlog = false, ticks = null, xlabel = "step" } = {}) {
  const W = 460, H = 230, L = 52, R = 10, T = 8, B = 30;
  const all = lines.flatMap((line) => line.points).filter((p) => p[1] !== null && (!log || p[1] > 0));
  const card = element("div", { className: "card" }, element("h2", {}, title));
  if (!all.length) { card.append(element("p", { className: "soft" }, "no numbers yet")); return card; }
  const fx = xlog ? Math.log2 : (v) => v, fy = log ? Math.log10 : (v) => v;
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [x, y, low, high] of all) {
    x0 = Math.min(x0, fx(x)); x1 = Math.max(x1, fx(x));
    // An interval that reaches down to zero does not decide on a log axis.
    for (const v of [y, log && low !== undefined ? Math.max(low, y / 1.5) : low, high]) if (v !== undefined && v !== null) { y0 = Math.min(y0, fy(v)); y1 = Math.max(y1, fy(v)); }
  }
  if (x1 === x0) { x0 -= 0.5; x1 += 0.5; }
  if (y1 - y0 < 1e-12) { y0 -= Math.abs(y0) * 0.1 + 1e-6; y1 += Math.abs(y1) * 0.1 + 1e-6; }
  const X = (v) => L + (fx(v) - x0) / (x1 - x0) * (W - L - R);
  const Y = (v) => H - B - (Math.max(fy(v), y0) - y0) / (y1 - y0) * (H - T - B);
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  for (const v of log ? roundedLog(10 ** y0, 10 ** y1) : rounded(y0, y1)) {
    svg.append(drawn("line", { class: "axis", x1: L, x2: W - R, y1: Y(v), y2: Y(v) }), drawn("text", { x: L - 6, y: Y(v) + 4, "text-anchor": "end" }, number(v)));
  }
  for (const v of ticks || rounded(x0, x1).filter(Number.isInteger))
    svg.append(drawn("text", { x: X(v), y: H - B + 15, "text-anchor": "middle" }, String(v)));
  svg.append(drawn("text", { x: (L + W - R) / 2, y: H - 2, "text-anchor": "middle" }, xlabel));
  for (const line of lines) {
    const points = line.points.filter((p) => p[1] !== null && (!log || p[1] > 0));
    if (!points.length) continue;
    if (points[0].length > 2) for (const [x, , low, high] of points)
      svg.append(drawn("line", { x1: X(x), x2: X(x), y1: Y(log ? Math.max(low, 10 ** y0) : low), y2: Y(high), stroke: line.colour, "stroke-width": 1.5, opacity: 0.5 }));
    const path = points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("");
    svg.append(drawn("path", { d: path, fill: "none", stroke: line.colour, "stroke-width": 1.6, "stroke-dasharray": line.dash || "" }));
    if (points.length < 30) for (const p of points) svg.append(drawn("circle", { cx: X(p[0]), cy: Y(p[1]), r: 2.5, fill: line.colour }));
  }
  card.append(svg);
  const labels = lines.filter((line) => line.label);
  if (labels.length && labels.length < 12) {
    const legend = element("p", { className: "soft" });
    for (const line of labels) {
      const mark = drawn("svg", { viewBox: "0 0 24 10", class: "mark" });
      mark.append(drawn("line", { x1: 0, x2: 24, y1: 5, y2: 5, stroke: line.colour, "stroke-width": 2, "stroke-dasharray": line.dash || "" }));
      legend.append(mark, `${line.label}   `);
    }
    card.append(legend);
  }
  return card;
}

function drawRuns() {
  const rows = Object.entries(state.runs).map(([name, run]) => {
    const box = element("input", { type: "checkbox", checked: !state.hidden.has(name), ariaLabel: `show ${name}` });
    box.onchange = () => { state.hidden[box.checked ? "delete" : "add"](name); draw(); };
    return [box, element("span", {}, dot(name), name), run.state, `${run.step}/${run.steps ?? "?"}`, duration(run.seconds_left)];
  });
  fill("runs", element("div", { className: "card" }, table(["", "run", "state", "step", "time left"], rows)));
}
function drawWarnings() {
  const found = shown().flatMap(([name, run]) => run.warnings.map((text) => element("p", {}, dot(name), `${name}: ${text}`)));
  fill("warnings", ...(found.length ? [element("div", { className: "card warning" }, element("h2", {}, "Warnings"), ...found)] : []));
}
function drawCharts() {
  const cards = [];
  for (const [title, wanted, log] of CHARTS) {
    const lines = [];
    for (const [name, run] of shown()) {
      const keys = Array.isArray(wanted) ? wanted : [...new Set(run.rows.flatMap(Object.keys))].filter((key) => wanted.test(key));
      keys.forEach((key, place) => {
        const points = run.rows.filter((row) => row[key] !== undefined).map((row) => [row.step, row[key]]);
        const first = name === shown()[0][0];
        const label = Array.isArray(wanted) ? name : first ? key.replace("loss_", "") : "";
        if (points.length) lines.push({ colour: Array.isArray(wanted) || shown().length > 1 ? colour(name) : COLOURS[place % COLOURS.length], dash: Array.isArray(wanted) || shown().length === 1 ? "" : DASHES[place % DASHES.length], points, label });
      });
    }
    if (lines.length) cards.push(chart(title, lines, { log }));
  }
  fill("charts", ...cards);
}
const validations = (run) => run.rows.filter((row) => Object.keys(row).some((key) => key.startsWith("validation/")));
function drawQuality() {
  const steps = [...new Set(shown().flatMap(([, run]) => validations(run).map((row) => row.step)))].sort((a, b) => a - b);
  if (!steps.length) return fill("quality");
  const chosen = state.step === null || !steps.includes(state.step) ? steps.at(-1) : state.step;
  const metrics = [...new Set(shown().flatMap(([, run]) => validations(run).flatMap(Object.keys)).map((key) => (key.match(/^validation\/(.+)_\d+$/) || [])[1]).filter(Boolean))];
  const box = element("div", { className: "card" }, element("h2", {}, "Quality by number of network calls"));
  box.append(slider("step", steps, chosen, (step) => { state.step = step; drawQuality(); }));
  const grid = element("div", { className: "grid" });
  box.append(grid);
  for (const metric of metrics) {
    const lines = [];
    const calls = new Set();
    const teachers = new Map();  // runs of one folder share the teacher's curve
    for (const [name, run] of shown()) {
      const row = validations(run).filter((one) => one.step <= chosen).at(-1);
      if (!row) continue;
      const points = Object.keys(row).map((key) => key.match(/^validation\/(.+)_(\d+)$/)).filter((m) => m && m[1] === metric).map((m) => +m[2]).sort((a, b) => a - b)
        .map((n) => { calls.add(n); const key = `validation/${metric}_${n}`; return [n, row[key], row[`${key}_low`] ?? row[key], row[`${key}_high`] ?? row[key]]; });
      lines.push({ colour: colour(name), points, label: `${name}, step ${row.step}` });
      const taught = Object.entries(run.teacher);
      if (metric === "energy_distance" && taught.length && !teachers.has(JSON.stringify(taught))) {
        taught.forEach(([n]) => calls.add(+n));
        teachers.set(JSON.stringify(taught), { colour: "#868e96", dash: "6 3", label: `teacher (${name})`, points: taught.map(([n, [v, low, high]]) => [+n, v, low, high]) });
      }
    }
    if (teachers.size === 1) [...teachers.values()][0].label = "teacher";
    lines.push(...teachers.values());
    grid.append(chart(metric.replaceAll("_", " "), lines, { log: lines.every((l) => l.points.every((p) => p[1] > 0)), xlog: true, ticks: [...calls], xlabel: "network calls" }));
  }
  fill("quality", box);
}
function slider(text, values, chosen, changed) {
  const input = element("input", { type: "range", min: 0, max: values.length - 1, value: values.indexOf(chosen), ariaLabel: text });
  const shownValue = element("output", {}, String(chosen));
  input.oninput = () => { shownValue.textContent = values[+input.value]; };
  input.onchange = () => changed(values[+input.value]);
  return element("label", { className: "slider" }, text, input, shownValue);
}
function drawVideos() {
  const cards = shown().filter(([, run]) => run.videos.length).map(([name, run]) => {
    const chosen = run.videos.includes(state.video[name]) ? state.video[name] : run.videos.at(-1);
    const source = report ? state.embedded[`${name} ${chosen}`] : `api/video?run=${encodeURIComponent(name)}&step=${chosen}`;
    const video = element("video", { src: source, controls: true, loop: true, muted: true, autoplay: true, playsInline: true });
    const change = (step) => { state.video[name] = step; drawVideos(); };
    return element("div", { className: "card" }, element("h2", {}, dot(name), `${name}: videos by number of calls`), slider("step", run.videos, chosen, change), video);
  });
  fill("videos", ...cards);
}
function drawDifferences() {
  const names = shown().map(([name]) => name), keys = Object.keys(state.differences);
  if (names.length < 2 || !keys.length) return fill("differences");
  const rows = keys.map((key) => [key, ...names.map((name) => state.differences[key][name] ?? "")]).filter((row) => new Set(row.slice(1)).size > 1);
  fill("differences", element("div", { className: "card" }, element("h2", {}, "Differences between the configs"), table(["key", ...names], rows)));
}
const fill = (id, ...children) => document.getElementById(id).replaceChildren(...children);
function draw() { drawRuns(); drawWarnings(); drawCharts(); drawQuality(); drawVideos(); drawDifferences(); }

function take(found) {
  let changed = found.serial !== state.serial || Object.keys(found.runs).length !== Object.keys(state.runs).length;
  for (const [name, run] of Object.entries(found.runs)) {
    const before = state.runs[name];
    changed = changed || !before || before.state !== run.state || before.videos.length !== run.videos.length;
    // A resumed run repeats steps: drop what it replaces.
    const first = run.rows.length ? run.rows[0].step : Infinity;
    const kept = before ? before.rows.filter((row) => row.step <= first) : [];
    state.runs[name] = { ...run, rows: [...kept, ...run.rows] };
  }
  Object.assign(state, { serial: found.serial, differences: found.differences, embedded: found.embedded || {} });
  if (changed) draw();
  document.getElementById("status").textContent = `${Object.keys(state.runs).length} run${Object.keys(state.runs).length === 1 ? "" : "s"}${report ? "" : ", followed live"}`;
  document.body.dataset.ready = "yes";
}
async function poll() {
  try {
    const answer = await fetch(`api/state?after=${state.serial}`);
    if (!answer.ok) throw new Error(answer.status);
    take(await answer.json());
  } catch (error) {
    document.getElementById("status").textContent = "not connected: is `anyflow watch` still running?";
  }
  setTimeout(poll, 2000);
}
if (report) take(JSON.parse(report.textContent)); else poll();
