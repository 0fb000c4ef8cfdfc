// Segments: how many users are in each, and whether their keeper keeps up.

import { at, h, table, tell } from "./dom.js";
import { count, span } from "./words.js";

const HEAD = [["segment", ""], ["users", "number"], ["expression", "text"]];

/** Shows segments, or how to name one. */
export function show(kept) {
  if (!kept) return table(at("segments-table"), HEAD, [], "No segment is named; `segments.expressions` names them.");
  const looked = kept.sweep_s ? `all users were evaluated in ${span(kept.sweep_s)}` : "not all users are evaluated yet";
  const waits = `${count(kept.lag)} records of the training log and ${count(kept.waiting)} users wait; ${looked}.`;
  tell(at("segments-told"), kept.problem ? `Nobody keeps them: ${kept.problem}.` : waits);
  table(
    at("segments-table"),
    HEAD,
    kept.segments.map((one) => [one.name, count(one.users), h("code", {}, one.expression)]),
    "No segment is named.",
  );
  return undefined;
}
