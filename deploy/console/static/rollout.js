// The newest rollout: who answers whom, what users did then, and what is found of it.

import { at, table, tell } from "./dom.js";
import { count, decimal, moment, percent } from "./words.js";

const HEAD = [["arm", ""], ["users", "number"], ["answers", "number"], ["engagements", "number"], ["an answer", "number"], ["failures", "number"]];
const ARMS = ["trial", "live"];

const signed = (value) => `${value < 0 ? "−" : "+"}${percent(Math.abs(value))}`;

function lift(found) {
  if (!found) return "";
  const ends = found.low === null || found.high === null ? "" : ` (${signed(found.low)} to ${signed(found.high)})`;
  return `Engagements an answer of the trial beside those of the live versions: ${signed(found.value)}${ends}. `;
}

/** Shows a rollout; nothing of it where there is none. */
export function show(one) {
  at("rollout").hidden = !one;
  if (!one) return;
  tell(at("rollout-told"), `${one.stopped ? "▲ " : ""}${one.name} is ${one.phase}: the trial answers ${percent(one.share)} of the users. ${one.actor}, ${moment(one.at_ms)}: ${one.reason}`);
  const compared = one.compared;
  tell(at("rollout-found"), compared ? `${lift(compared.lift)}${compared.verdict}. Sample ratio: p = ${compared.mismatch_p.toPrecision(2)}.` : "Nobody was answered yet that is known of.");
  table(
    at("rollout-table"),
    HEAD,
    compared ? ARMS.map((arm) => [arm, ...["users", "answers", "engagements"].map((name) => count(compared.arms[arm][name])), decimal(compared.arms[arm].rate, 4), count(compared.arms[arm].failures)]) : [],
    "Nobody yet.",
  );
}
