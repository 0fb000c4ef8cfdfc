// Curves over the last hour by uPlot, with marks where control changed.

import { at, h, tell } from "./dom.js";
import { NONE, clock, count, decimal, rate, span } from "./words.js";

const HEIGHT = 150;
const PLOTS = [
  { title: "Traffic", of: ["stream", "trainer"], none: "no click was read and no example learned", told: rate, curves: { clicks: "events_per_s", learned: "rows_per_s" } },
  { title: "Freshness", of: ["applier"], none: "serving does not know a click yet", told: span, curves: { features: "features_s", weights: "weights_s" } },
  { title: "Log loss", of: ["trainer"], none: "the trainer has not scored an example yet", told: (value) => decimal(value), free: true, curves: { "log loss": "log_loss" } },
  { title: "Ranking", of: ["trainer"], none: "the trainer has not scored an example yet", told: (value) => decimal(value), free: true, curves: { AUC: "auc", "top 1": "top1" } },
  { title: "Lift over simple baselines", of: ["trainer"], none: "the trainer has not scored an example yet", told: (value) => (value === null || value === undefined ? NONE : `${(100 * value).toFixed(1)} pp`), free: true, curves: { "top 1": "lift_top1" } },
  { title: "Answers", of: ["worker"], none: "no profile was requested", told: rate, curves: { answers: "answers_per_s", failed: "failed_per_s" } },
  { title: "Time of an answer", of: ["worker"], none: "no profile was requested", told: span, curves: { median: "answer_p50_s", p99: "answer_p99_s" } },
  { title: "Behind", of: ["stream", "trainer", "applier"], none: "no position in the topics is known yet", told: count, curves: { clicks: "lag_events", trainer: "trainer_lag", serving: "serving_lag" } },
  { title: "Versions", of: ["trainer", "applier"], none: "no version is published yet", told: count, free: true, curves: { newest: "newest_version", answering: "version" } },
];
const KEEP = 720;

let processesNow = {};
const series = { at_ms: [], curves: {} };
let marks = [];
let drawn = [];

export const known = () => series;
export const newest = () => series.at_ms.at(-1) ?? 0;

/** Takes more points. */
export function add(found) {
  series.at_ms = [...series.at_ms, ...found.at_ms].slice(-KEEP);
  for (const [name, values] of Object.entries(found.curves)) series.curves[name] = [...(series.curves[name] ?? []), ...values].slice(-KEEP);
}

/** Says which figures a rollback has restarted, as long as it is in the span. */
export function restarted(history) {
  const first = history.findLastIndex((one, place) => place && one.epoch !== history[place - 1].epoch);
  const began = first < 0 ? null : history[first];
  const recent = began && began.created_at_ms >= newest() - 1000 * wanted();
  tell(at("restarted"), recent ? `Since ${clock(began.created_at_ms)} (${began.action}) log loss, ranking and lift are measured again from version ${began.base} on, and version numbers continue in epoch ${began.epoch}.` : "");
}

/** Marks moments of control: each with its time and a word. */
export function mark(found) {
  marks = found;
}

const wanted = () => Number(document.querySelector("input[name=span]:checked").value);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function values(plot) {
  const first = series.at_ms.findIndex((ms) => ms >= newest() - 1000 * wanted());
  const from = first < 0 ? series.at_ms.length : first;
  return [series.at_ms.slice(from).map((ms) => ms / 1000), ...Object.values(plot.curves).map((name) => (series.curves[name] ?? []).slice(from))];
}

/** A moment of control is a dashed line with its word. */
function drawMarks(u) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = color("--mark");
  ctx.font = `${11 * devicePixelRatio}px system-ui`;
  ctx.textAlign = "left";
  ctx.setLineDash([4, 4]);
  // Where each row of words is free: words that would cover one another take the next row.
  const free = [-Infinity, -Infinity, -Infinity];
  const right = bbox.left + bbox.width;
  for (const { at_ms, word } of marks) {
    const x = Math.round(u.valToPos(at_ms / 1000, "x", true));
    if (x < bbox.left || x > right) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    const width = ctx.measureText(word).width, begin = x + 4 + width > right ? x - 4 - width : x + 4;
    const row = free.findIndex((end) => begin >= end);
    // The list of decisions has those for which no row is free.
    if (row < 0) continue;
    ctx.fillText(word, begin, bbox.top + 12 * (row + 1) * devicePixelRatio);
    free[row] = begin + width + 8;
  }
  ctx.restore();
}

/** Whether a curve has one value only, which no line can show. */
const isSingle = (u, place) => u.data[place].filter((value) => value !== null && value !== undefined).length === 1;

function options(plot, width) {
  const axis = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  const lines = Object.keys(plot.curves).map((label, place) => ({
    label, stroke: color(`--curve-${place + 1}`), width: 1.75, points: { show: isSingle, size: 6 }, dash: place === 1 ? [6, 3] : place === 2 ? [2, 3] : undefined,
    value: (_, value) => plot.told(value),
  }));
  return {
    width, height: HEIGHT, legend: { show: false }, padding: [8, 22, 0, 0],
    cursor: { sync: { key: "springtide" }, y: false, points: { size: 5 } },
    scales: { x: { time: true }, y: plot.free ? {} : { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] } },
    axes: [
      { ...axis, size: 24, values: (_, ticks) => ticks.map((at_s) => clock(1000 * at_s).slice(0, ticks[1] - ticks[0] < 60 ? 8 : 5)), space: 70 },
      { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => plot.told(tick)), space: 30 },
    ],
    series: [{}, ...lines],
    hooks: { draw: [drawMarks], setCursor: [(u) => legend(plot, u)] },
  };
}

/** The values under the cursor, or the newest. */
function legend(plot, u) {
  const place = u.cursor.idx ?? u.data[0].length - 1;
  Object.keys(plot.curves).forEach((_, curve) => tell(plot.said[curve], plot.told(u.data[curve + 1][place] ?? null)));
}

export function begin() {
  at("plots").replaceChildren(
    ...PLOTS.map((plot) => {
      plot.said = Object.keys(plot.curves).map(() => h("span", { class: "value" }, NONE));
      const names = Object.keys(plot.curves).map((name, place) => h("span", { class: "key" }, h("i", { class: `swatch c${place + 1}`, "aria-hidden": "true" }), `${name} `, plot.said[place]));
      plot.box = h("div", { class: "plot", role: "img", "aria-label": plot.title });
      plot.reason = h("p", { class: "quiet reason", hidden: true });
      return h("figure", {}, h("figcaption", {}, h("b", {}, plot.title), names), plot.reason, plot.box);
    }),
  );
  document.querySelectorAll("input[name=span]").forEach((one) => one.addEventListener("change", () => draw()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", anew);
  new ResizeObserver(() => drawn.forEach(({ u, plot }) => u.setSize({ width: plot.box.clientWidth, height: HEIGHT }))).observe(at("plots"));
}

function anew() {
  drawn.forEach(({ u }) => u.destroy());
  drawn = [];
  draw();
}

/** Draws the curves, or why there are none; `processes` says which of them answer. */
export function draw(processes = processesNow) {
  processesNow = processes;
  if (!drawn.length) drawn = PLOTS.map((plot) => ({ plot, u: new uPlot(options(plot, plot.box.clientWidth || 300), values(plot), plot.box) }));
  for (const { plot, u } of drawn) {
    const data = values(plot);
    u.setData(data);
    const empty = !data.slice(1).some((values) => values.some((value) => value !== null && value !== undefined));
    plot.reason.hidden = !empty;
    plot.box.hidden = empty;
    if (!empty && u.width !== plot.box.clientWidth) u.setSize({ width: plot.box.clientWidth, height: HEIGHT });
    tell(plot.reason, data[0].length ? `No values in the last ${wanted() / 60} min: ${reason(plot, processes)}.` : "The first point comes within 5 s.");
    if (u.cursor.idx === null || u.cursor.left < 0) legend(plot, { cursor: {}, data });
    const spoken = Object.keys(plot.curves).map((name, place) => `${name} ${plot.told(data[place + 1].at(-1) ?? null)}${swing(plot, data[place + 1])}`);
    plot.box.setAttribute("aria-label", `${plot.title}, the last ${wanted() / 60} minutes: ${spoken.join("; ")}`);
  }
}

function reason(plot, processes) {
  const away = plot.of.filter((name) => processes[name] && !processes[name].answers);
  return away.length ? `${away.join(" and ")} ${away.length > 1 ? "do" : "does"} not answer` : plot.none;
}

function swing(plot, found) {
  const there = found.filter((one) => one !== null && one !== undefined);
  return there.length > 1 ? `, between ${plot.told(Math.min(...there))} and ${plot.told(Math.max(...there))}` : "";
}
