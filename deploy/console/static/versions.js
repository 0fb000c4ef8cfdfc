// The versions with their lineage, and what was decided: pins, holds, masks, who did it and why.

import { at, h, s, table, tell } from "./dom.js";
import { age, count, decimal, moment } from "./words.js";

const LANE = 14, ROW = 31;
const hidden = (text) => () => h("span", { class: "unseen" }, text);
const HEAD = [["lineage", "lineage"], ["version", "number"], ["age", "number"], ["kind", ""], ["log loss", "number"], ["AUC", "number"], ["top 1", "number"], ["marks", ""], [hidden("what can be done"), "acts"]];

/** Where each epoch began: epoch -> the version that it went on from. */
function beginnings(history) {
  const found = new Map();
  for (const one of history) if (!found.has(one.epoch)) found.set(one.epoch, one.base);
  return found;
}

/** Whether what is learned now descends from a version: those after the branch point of a later epoch are abandoned. */
function kept(version, epoch, bases, newest) {
  let most = Infinity;
  for (let now = newest; now !== undefined && now >= epoch; ) {
    if (now === epoch) return version <= most;
    const base = bases.get(now);
    if (base === null || base === undefined) return false;
    most = Math.min(most, base);
    now -= 1;
  }
  return false;
}

/** The lanes of one row: a dot in the version's own, a line where an epoch goes on, a bend where a later one begins. */
function lanes(row, rows, epochs, bases) {
  const lane = new Map(epochs.map((epoch, place) => [epoch, LANE * (place + 0.5)]));
  const drawn = [];
  for (const epoch of epochs) {
    const own = rows.map((one, place) => (one.epoch === epoch ? place : -1)).filter((place) => place >= 0);
    const base = rows.findIndex((one) => one.version === bases.get(epoch));
    const last = base >= 0 ? base : epoch === epochs.at(-1) && own.length ? own.at(-1) : own.at(-1);
    const x = lane.get(epoch), place = rows.indexOf(row);
    if (!own.length || place < own[0] || place > last) continue;
    const top = place === own[0] ? ROW / 2 : 0;
    if (place === base) {
      const to = lane.get(row.epoch);
      drawn.push(s("path", { d: `M${x} ${top} C${x} ${ROW / 2} ${x} ${ROW / 2} ${to} ${ROW / 2}` }));
    } else drawn.push(s("path", { d: `M${x} ${top} V${place === last ? ROW / 2 : ROW}` }));
  }
  const dot = s("circle", { cx: lane.get(row.epoch), cy: ROW / 2, r: 4, class: row.marks.includes("served") ? "served" : "" });
  return s("svg", { width: LANE * epochs.length, height: ROW, "aria-hidden": "true" }, drawn, dot);
}

/** Shows versions, newest first. */
export function showVersions(found, history, acts) {
  const rows = [...found].reverse();
  const bases = beginnings(history);
  const newest = history.at(-1)?.epoch ?? rows[0]?.epoch;
  const epochs = [...new Set(rows.map((one) => one.epoch).filter((one) => one !== undefined))].sort((a, b) => b - a);
  const focused = document.activeElement?.dataset?.act;
  table(
    at("versions-table"),
    HEAD,
    rows.map((one) => {
      const left = one.epoch !== undefined && !kept(one.version, one.epoch, bases, newest);
      const marks = [...one.marks, ...(left ? ["abandoned"] : [])];
      const metrics = one.metrics ?? {};
      return [
        one.epoch === undefined ? "" : h("span", {}, lanes(one, rows, epochs, bases), h("span", { class: "unseen" }, `epoch ${one.epoch}`)),
        String(one.version), age(one.age_s), one.kind ?? "?", decimal(metrics.log_loss ?? null), decimal(metrics.auc ?? null), decimal(metrics.top1 ?? null),
        h("span", { class: "marks" }, marks.map((mark) => h("span", { class: `mark ${mark.split(" ")[0]}` }, mark))),
        h("span", {}, act("Pin", one.version, acts.pin), left ? null : act("Go back", one.version, acts.back)),
      ];
    }),
    "No version yet; the trainer publishes the first after the bootstrap.",
  );
  if (focused) document.querySelector(`[data-act="${focused}"]`)?.focus();
  tell(at("versions-told"), rows.length ? `The newest ${rows.length} that are kept, newest first. Lanes are epochs, the newest on the left.` : "");
}

function act(name, version, does) {
  return h("button", { type: "button", class: "small", "data-act": `${name} ${version}`, "aria-label": `${name} ${name === "Pin" ? "answers at" : "to"} version ${version}`, onclick: () => does(version) }, name);
}

const MASKS = [["mask", "number"], ["leaves out", ""], ["examples", "number"], ["users", "number"], ["set", ""], ["by", ""], ["reason", "text"], [hidden("what can be done"), "acts"]];

export function showMasks(masks, lift) {
  table(
    at("masks-table"),
    MASKS,
    masks.map((one) => [
      String(one.id), one.what, count(one.rows), count(one.users), one.at_ms === null ? "?" : moment(one.at_ms), one.actor ?? "?", one.reason ?? "?",
      one.lifted ? `lifted by generation ${one.lifted}` : h("button", { type: "button", class: "small", "aria-label": `Lift mask ${one.id}`, onclick: () => lift(one.id) }, "Lift"),
    ]),
    "Nothing is left out.",
  );
}

const AUDIT = [["generation", "number"], ["at", ""], ["by", ""], ["action", ""], ["epoch", "number"], ["answers", ""], ["reason", "text"], ["outcome", "text"]];

export function showAudit(history) {
  table(
    at("audit-table"),
    AUDIT,
    [...history].reverse().map((one) => [
      String(one.generation), moment(one.created_at_ms), one.actor, one.action, String(one.epoch),
      one.serving.version === null || one.serving.version === undefined ? "the newest" : `version ${one.serving.version}`, one.reason, outcome(one.outcome),
    ]),
    "Nothing was decided yet.",
  );
}

function outcome(found) {
  if (!found) return "";
  const { planned, answered, learned } = found;
  const said = [answered ? `answers after ${answered.seconds.toFixed(1)} s` : "the time at which answers switched is unknown"];
  said.push(learned ? `caught up after ${age(learned.seconds)}` : "not caught up yet");
  if (learned?.again) said.push(`${count(learned.again.rows)} examples read again${planned?.rows === undefined ? "" : ` (planned ${count(planned.rows)})`}`);
  return said.join("; ");
}
