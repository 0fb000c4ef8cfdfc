// What is wrong now, in the header and above the loop, and what was wrong in the last day; each with its section of the runbook.

import { at, h, table, tell } from "./dom.js";
import { age, moment } from "./words.js";

const HEAD = [["from", ""], ["for", "number"], ["severity", ""], ["problem", "text"], ["runbook", ""]];
let told = "", listed = "";

const runbook = (problem) => `runbook.html#${problem.runbook.split("#")[1]}`;

/** Shows the problems of now; `figures` say whether clicks arrive at all. */
export function show(problems, figures) {
  const now = JSON.stringify([problems, !figures.events_per_s]);
  if (told === now) return;
  const holds = problems.filter((one) => one.severity === "hold").map((one) => one.text);
  const others = problems.filter((one) => one.severity !== "hold");
  // Announced when it changes, and not each second.
  if (told) tell(at("heard"), problems.map((one) => one.text).join("; ") || "nothing is wrong any more");
  told = now;
  const idle = figures.events_per_s ? "nothing is wrong" : "nothing is wrong, and no clicks arrive";
  at("health").dataset.state = others.length ? "slow" : "ok";
  at("health").replaceChildren(h("span", { "aria-hidden": "true" }, others.length ? "▲ " : "● "), others.length > 1 ? `${others.length} problems` : others[0]?.text ?? idle);
  tell(at("held"), holds.length ? `❚❚ ${holds.join("; ")}` : "");
  at("troubles").hidden = !others.length;
  const focused = at("troubles").contains(document.activeElement) ? document.activeElement.hash : null;
  at("troubles").replaceChildren(...others.map((one) => h("li", {}, `${one.text} `, h("a", { href: runbook(one), class: "tap" }, "what to do"))));
  // Figures in a text change each second; the link keeps the focus.
  if (focused) [...at("troubles").querySelectorAll("a")].find((one) => one.hash === focused)?.focus();
}

/** Forgets what was shown, so that it is shown again. */
export function forget() {
  told = "";
}

/** Shows the problems of the last day, the newest first. */
export function showDay({ since_ms, problems }) {
  const now = JSON.stringify(problems.map(({ last_ms, ...one }) => (one.open ? one : { ...one, last_ms })));
  if (listed === now) return;
  listed = now;
  tell(at("problems-told"), `Since ${moment(since_ms)}, when the console started, or one day ago; the newest first.`);
  table(
    at("problems-table"), HEAD,
    [...problems].reverse().map((one) => [
      moment(one.first_ms), one.open ? "until now" : age((one.last_ms - one.first_ms) / 1000),
      one.severity, one.text, h("a", { href: runbook(one), class: "tap" }, one.runbook.split("#")[1].replaceAll("-", " ")),
    ]),
    "Nothing was wrong.",
  );
}
