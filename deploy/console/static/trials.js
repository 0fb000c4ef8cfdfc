// The trials that run: what the trial's trainer and the live one lost on the same rows, and how sure the difference is.

import { at, table } from "./dom.js";
import { count, decimal } from "./words.js";

const HEAD = [["trial", ""], ["with", ""], ["rows", "number"], ["log loss", "number"], ["live", "number"], ["difference", "number"], ["it is", ""], ["reason", "text"]];

const STANDINGS = { held: "held by its guard", paused: "paused", down: "no trainer" };

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(4)}`;

function difference(compared) {
  if (compared.difference === null || compared.difference === undefined) return "–";
  const mean = signed(compared.difference);
  return compared.low === null ? mean : `${mean} (${signed(compared.low)} to ${signed(compared.high)})`;
}

/** Shows trials; nothing of them where none runs. */
export function show(trials) {
  at("trials").hidden = !trials.length;
  table(
    at("trials-table"),
    HEAD,
    trials.map((one) => {
      const compared = one.compared ?? {};
      const tried = Object.entries(one.overrides).map(([name, value]) => `${name} ${value}`).join(", ") || "the same settings";
      return [
        one.name, tried, count(compared.rows ?? 0), decimal(compared.trial_log_loss), decimal(compared.live_log_loss), difference(compared),
        STANDINGS[one.standing] ?? compared.verdict ?? "waiting", one.reason,
      ];
    }),
    "No trial runs.",
  );
}
