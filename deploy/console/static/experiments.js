// The experiments that run: what their trainer and the live one lost on the same rows, and the arms of an open rollout.

import { at, table, tell } from "./dom.js";
import { count, decimal, moment, percent } from "./words.js";

const HEAD = [["experiment", ""], ["with", ""], ["examples", "number"], ["log loss", "number"], ["live", "number"], ["difference", "number"], ["it is", ""], ["reason", "text"]];
const ARMS_HEAD = [["arm", ""], ["users", "number"], ["answers", "number"], ["engagements", "number"], ["per answer", "number"], ["failures", "number"]];
const ARMS = ["trial", "live"];

const STANDINGS = { held: "held by its guard", paused: "paused", down: "no trainer" };

const signed = (value, form) => `${value < 0 ? "−" : "+"}${form(Math.abs(value))}`;

/** A value with the ends of its interval, where it has any. */
function interval(value, low, high, form) {
  if (value === null || value === undefined) return "–";
  const shown = signed(value, form);
  return low === null || high === null ? shown : `${shown} (${signed(low, form)} to ${signed(high, form)})`;
}

function row(one) {
  const compared = one.compared ?? {};
  const tried = Object.entries(one.overrides).map(([name, value]) => `${name} ${value}`).join(", ") || "the same settings";
  return [
    one.name, tried, count(compared.rows ?? 0), decimal(compared.trial_log_loss), decimal(compared.live_log_loss),
    interval(compared.difference, compared.low, compared.high, (value) => value.toFixed(4)),
    STANDINGS[one.standing] ?? compared.verdict ?? "waiting", one.problem || one.reason,
  ];
}

/** Shows experiments, and the open rollout if there is one. */
export function show(experiments) {
  // Without a name it is the error of a damaged document.
  const damaged = experiments.find((one) => !one.name);
  tell(at("experiments-problem"), damaged ? `▲ ${damaged.problem}` : "");
  table(at("experiments-table"), HEAD, experiments.filter((one) => one.name).map(row), "No experiment runs; `springtide experiment start NAME` starts one.");
  const rolledOut = experiments.find((one) => one.rollout);
  at("rollout").hidden = !rolledOut;
  if (rolledOut) showRollout(rolledOut, rolledOut.rollout);
}

function showRollout(one, rollout) {
  const compared = rollout.compared;
  tell(at("rollout-told"), `${rollout.stopped ? "▲ " : ""}${one.name} is ${rollout.phase}: it answers ${percent(one.share)} of the users. ${one.actor}, ${moment(one.at_ms)}: ${one.reason}`);
  const lift = compared?.lift ? `Engagements per answer relative to the live versions: ${interval(compared.lift.value, compared.lift.low, compared.lift.high, percent)}. ` : "";
  tell(at("rollout-found"), compared ? `${lift}${compared.verdict}. Sample ratio: p = ${compared.mismatch_p.toPrecision(2)}.` : "No answer to a user is known yet.");
  table(
    at("rollout-table"),
    ARMS_HEAD,
    compared ? ARMS.map((arm) => [arm, ...["users", "answers", "engagements"].map((name) => count(compared.arms[arm][name])), decimal(compared.arms[arm].rate, 4), count(compared.arms[arm].failures)]) : [],
    "No users yet.",
  );
}
