// Users, items and categories whose share of the clicks jumped, each with its profile and a rollback without it.

import { read } from "./asking.js";
import { at, h, table, tell } from "./dom.js";
import { lookUpUser } from "./profile.js";
import * as steer from "./steer.js";
import { age, count, percent } from "./words.js";

const KINDS = { users: "user", items: "item", categories: "category" };
const HEAD = [["kind", ""], ["name", "text"], ["clicks", "number"], ["share", "number"], ["before", "number"], ["by", ""], [() => h("span", { class: "unseen" }, "actions"), "acts"]];

function row(kind, jump, sinceMs) {
  const name = jump.name ?? `${jump.id}, unknown: its click is no longer kept`, users = jump.users.length;
  const whose = users === 1 ? "its user" : `its ${users} users`;
  const covered = jump.covered < 0.995 ? `, with ${percent(jump.covered, 0)} of its clicks` : "";
  const button = (text, does) => h("button", { type: "button", class: "small", "aria-label": `${text}: ${kind} ${name}`, onclick: does }, text);
  return [
    kind, name, count(jump.clicks), percent(jump.share), percent(jump.before), kind === "user" ? "" : `${users === 1 ? "1 user" : `${users} users`}${covered}`,
    h("span", {}, jump.user === null ? null : button("Show profile", () => lookUpUser(jump.user)), kind === "user" || jump.name === null ? null : button(`Plan without this ${kind}`, () => steer.planWithout({ [`skip_${kind}`]: `${jump.name}=${sinceMs}..now` })),
      button(`Plan without ${kind === "user" ? "this user" : whose}`, () => steer.planWithout({ pseudonyms: jump.users.join(" ") }))),
  ];
}

async function find(event) {
  event.preventDefault();
  if (!steer.mayOperate()) return steer.askToken("This reads the training log: it needs the token `operate`.");
  const send = at("jumps").querySelector("button"), minutes = Number(at("jumps").elements.minutes.value);
  send.disabled = true;
  tell(at("jumps-told"), "The training log is read.");
  try {
    const found = await read(`api/jumps?minutes=${minutes}`);
    const rows = Object.entries(KINDS).flatMap(([section, kind]) => found[section].map((jump) => row(kind, jump, found.recent_ms)));
    const before = found.clicks_before ? `compared with ${count(found.clicks_before)} in the ${age((found.recent_ms - found.first_ms) / 1000)} before` : "and none before to compare with: choose fewer minutes";
    tell(at("jumps-told"), `${count(found.clicks)} clicks in the last ${minutes} min, ${before}. Clicks that are left out already do not count.`);
    table(at("jumps-table"), HEAD, rows, found.clicks_before ? "No share of the clicks jumped." : "Nothing was compared.");
    at("jumps-found").hidden = false;
    at("jumps-told").focus();
  } catch (error) {
    tell(at("jumps-told"), error.message);
  } finally {
    send.disabled = false;
  }
  return undefined;
}

export function begin() {
  at("jumps").addEventListener("submit", find);
}
