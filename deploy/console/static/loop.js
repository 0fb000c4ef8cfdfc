// The loop as a picture that moves: six stages, what flows between them, and the state of each in words and a sign.

import { at, h, s, tell } from "./dom.js";
import { NONE, count, decimal, rate, span } from "./words.js";

const SIGNS = { ok: "●", held: "❚❚", slow: "▲", away: "■" };
const SPARK = { width: 96, height: 22, points: 60 };

// Each: the key of its problems, its processes, what flows out of it, its curve, and what is known of it now.
const STAGES = [
  {
    name: "Clicks", key: "clicks", processes: [], kafka: true, curve: "events_per_s", well: (f) => (f.events_per_s ? "arriving" : "none arrive now"),
    known: (f) => f.events, main: (f) => rate(f.events_per_s),
    facts: (f) => [["read", count(f.events)], ["dead letters", rate(f.dead_per_s)]],
  },
  {
    name: "Stream", key: "stream", processes: ["stream"], curve: "lag_events", well: (f) => (f.events_per_s ? "keeps up" : "waits for clicks"),
    known: (f) => f.lag_events, main: (f) => `${count(f.lag_events)} waiting`,
    facts: (f) => [["lag", span(f.lag_s)], ["commit", span(f.spreads.commit_s?.p50)]],
  },
  {
    name: "Micro-batches", key: "microbatches", processes: [], kafka: true, curve: "microbatches_per_s", well: (f) => (f.microbatches_per_s ? "in the log" : "none is written now"),
    known: (f) => f.trainer_lag, main: (f) => rate(f.microbatches_per_s),
    facts: (f) => [["examples each", decimal(f.microbatch_rows, 1)], ["unread", count(f.trainer_lag)]],
  },
  {
    name: "Training", key: "trainer", processes: ["trainer"], curve: "rows_per_s",
    well: (f) => [f.rows_per_s ? "learning" : "waits for examples", f.budget && `epsilon ${decimal(f.budget.left, 2)} of ${decimal(f.budget.epsilon, 2)} left`, workers(f)].filter(Boolean).join(", "),
    known: (f) => f.trainer_lag, main: (f) => rate(f.rows_per_s),
    facts: (f) => [["step", span(f.spreads.step_s?.p50)], ["log loss", decimal(f.log_loss)]],
  },
  {
    name: "Versions", key: "versions", processes: ["trainer"], curve: "newest_version", well: (f) => (f.steps_per_s ? "published" : "no new one now"),
    known: (f) => f.newest_version, main: (f) => count(f.newest_version),
    facts: (f) => [["epoch", count(f.epoch)], ["publication", span(f.spreads.publication_s?.p50)]],
  },
  {
    name: "Answers", key: "answers", processes: ["worker", "applier"], curve: "answers_per_s", well: (f) => (f.answers_per_s ? "following" : "following, idle"),
    known: (f) => f.version, main: (f) => rate(f.answers_per_s),
    facts: (f) => [["version", count(f.version)], ["p99", span(f.spreads.answer_s?.p99)]],
  },
];

/** The time of a step in each of several workers. */
function workers({ trainer_workers: shares, steps_per_s: steps }) {
  const times = Object.entries(shares).map(([worker, share]) => `${worker} ${steps ? span(share / steps) : NONE}`);
  return times.length ? `workers ${times.join(", ")}` : "";
}

/** The state of a stage in words: its worst problem, or that nothing is wrong with it. */
function stateOf(stage, { figures, problems, processes }) {
  if (stage.kafka && figures.kafka_away) return ["away", "Kafka unreachable"];
  if (stage.processes.some((name) => !processes[name].answers)) return figures.up === "starting" ? ["slow", "not started yet"] : ["away", "unreachable"];
  const problem = problems.find((one) => one.stage === stage.key);
  if (problem) return [problem.severity === "hold" ? "held" : "slow", problem.text];
  return stage.known(figures) === null ? ["slow", "unknown"] : ["ok", stage.well(figures)];
}

const made = STAGES.map((stage) => {
  const line = s("polyline", { fill: "none" });
  const parts = { main: h("p", { class: "main" }, NONE), state: h("p", { class: "state" }), line };
  parts.facts = stage.facts({ spreads: {} }).map(([name]) => [h("dt", {}, name), h("dd", {}, NONE)]);
  const spark = s("svg", { class: "spark", viewBox: `0 0 ${SPARK.width} ${SPARK.height}`, preserveAspectRatio: "none", "aria-hidden": "true" }, line);
  parts.item = h("li", { class: "stage" }, h("h3", {}, stage.name), parts.state, parts.main, spark, h("dl", { class: "facts" }, parts.facts.flat()));
  return parts;
});
const freshness = ["Newest click that answers know", "Newest click that weights have learned", "Versions that answers are behind"].map((name) => [h("dt", {}, name), h("dd", {}, NONE)]);

export function begin() {
  at("stages").replaceChildren(...made.map((one) => one.item));
  at("freshness").replaceChildren(...freshness.map((pair) => h("div", {}, pair)));
}

/** Shows the state of now. */
export function show(state) {
  const figures = state.figures;
  STAGES.forEach((stage, place) => {
    const parts = made[place];
    const [kind, words] = stateOf(stage, state);
    tell(parts.main, stage.main(figures));
    parts.item.dataset.state = kind;
    const said = `${SIGNS[kind]} ${words}`;
    if (parts.state.textContent !== said) parts.state.replaceChildren(h("span", { "aria-hidden": "true" }, `${SIGNS[kind]} `), words);
    stage.facts(figures).forEach(([, value], fact) => tell(parts.facts[fact][1], value));
    flow(parts.item, kind === "away" ? 0 : flowing(figures)[place]);
  });
  first(state);
  tell(freshness[0][1], span(figures.features_s));
  tell(freshness[1][1], span(figures.weights_s));
  tell(freshness[2][1], figures.newest_version === null || figures.version === null ? NONE : count(Math.max(0, figures.newest_version - figures.version)));
}

const FIRST = [
  ["Kafka answers", ({ kafka }) => kafka.answers],
  ["The stream has read a click", ({ figures }) => figures.events > 0],
  ["The training log has a record", ({ kafka }) => kafka.training_log > 0],
  ["The trainer has published a version", ({ registry }) => registry.newest > 0],
  ["Serving answers from a version", ({ figures }) => figures.version > 0],
];

/** Until the first answer: what has happened, and what the loop waits for. */
function first(state) {
  const done = FIRST.map(([, has]) => Boolean(has(state)));
  at("first").hidden = done.at(-1) || state.registry.newest > 0;
  if (at("first").hidden) return;
  const next = done.indexOf(false);
  const steps = FIRST.map(([words], place) => h("li", {}, `${words}: ${done[place] ? "yes" : place === next ? "not yet; the loop waits for this" : "not yet"}`));
  at("first").replaceChildren(h("h3", {}, "First start"), h("p", {}, "No version answers yet. "), h("ol", {}, steps), h("p", { class: "quiet" }, "The first answer comes some 30 s after the start of ", h("code", {}, "springtide up"), ". ", h("a", { href: "runbook.html#a-process-starts", class: "tap" }, "If it takes longer")));
}

const flowing = (f) => [f.events_per_s, f.microbatches_per_s, f.steps_per_s, f.steps_per_s, f.steps_per_s, f.answers_per_s];

/** The more, the faster; nothing moves where nothing flows. */
function flow(item, perSecond) {
  const moves = (perSecond ?? 0) > 0;
  item.classList.toggle("flows", moves);
  if (moves) item.style.setProperty("--turn", `${Math.max(0.35, 2.4 - 0.6 * Math.log10(1 + perSecond)).toFixed(1)}s`);
}

/** Draws the last minutes of each stage. */
export function sparks(series) {
  STAGES.forEach((stage, place) => {
    const values = (series.curves[stage.curve] ?? []).slice(-SPARK.points).map((one) => one ?? 0);
    const low = Math.min(...values), high = Math.max(...values);
    const y = (value) => (high > low ? SPARK.height - 2 - ((SPARK.height - 4) * (value - low)) / (high - low) : SPARK.height / 2);
    const x = (step) => (values.length > 1 ? (SPARK.width * step) / (values.length - 1) : 0);
    made[place].line.setAttribute("points", values.map((value, step) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" "));
  });
}
