// The page: asks for the state each second while it is looked at, and shows it.

import * as asking from "./asking.js";
import * as cause from "./cause.js";
import * as curves from "./curves.js";
import { at, tell } from "./dom.js";
import * as experiments from "./experiments.js";
import * as hosts from "./hosts.js";
import * as loop from "./loop.js";
import * as machine from "./machine.js";
import * as problems from "./problems.js";
import * as profile from "./profile.js";
import * as segments from "./segments.js";
import * as steer from "./steer.js";
import * as versions from "./versions.js";
import { clock, count } from "./words.js";

const STATE_MS = 1000, LISTS_MS = 5000;
let state = null, history = [], role = "", missed = 0, listed = "";

async function lookAtState() {
  state = await asking.read("api/state");
  const figures = state.figures;
  problems.show(state.problems, figures);
  tell(at("serving"), `version ${count(figures.version)}, epoch ${count(figures.epoch)}, ${figures.pinned ? "pinned" : "follows"}; ${clock(state.at_ms)}`);
  loop.show(state);
  experiments.show(state.experiments);
  segments.show(state.segments);
  hosts.show(state.hosts);
  hosts.showSnapshots(state.snapshots);
  machine.show(state);
  // A section without anything to show has no link either.
  document.querySelectorAll("nav a").forEach((link) => { link.parentElement.hidden = at(link.hash.slice(1)).hidden; });
}

async function lookAtLists() {
  const [series, kept, decided, masks, session, day] = await Promise.all([
    asking.read(`api/series?after_ms=${curves.newest()}`), asking.read("api/versions"), asking.read("api/history"), asking.read("api/masks"), asking.read("api/session"), asking.read("api/problems"),
  ]);
  history = decided;
  role = session.role;
  curves.add(series);
  curves.mark(history.map((one) => ({ at_ms: one.created_at_ms, word: one.action })));
  curves.draw(state?.processes);
  curves.restarted(history);
  problems.showDay(day);
  loop.sparks(curves.known());
  steer.show(history.at(-1) ?? null, Boolean(state?.figures.held), role);
  const now = JSON.stringify([kept.map(({ age_s, ...one }) => one), history, masks]);
  versions.showVersions(kept, history, { pin: steer.pin, back: steer.back });
  if (now === listed) return;
  listed = now;
  versions.showMasks(masks, steer.lift);
  versions.showAudit(history);
}

/** Does it now and again, less often while nobody answers or nobody looks. */
async function again(look, every_ms) {
  if (!document.hidden) {
    try {
      await look();
      missed = 0;
      document.body.classList.remove("away");
    } catch (error) {
      missed += 1;
      trouble(error);
    }
  }
  setTimeout(() => again(look, every_ms), every_ms * Math.min(8, 1 + missed));
}

function trouble(error) {
  document.body.classList.add("away");
  problems.forget();
  at("health").dataset.state = "away";
  tell(at("health"), error.status === 401 ? "■ a token is needed" : `■ ${error.message}`);
  if (error.status === 401 && !at("asking").open && missed === 1) steer.askToken("Reading needs a token here: `read` or `operate`.");
}

async function refresh() {
  await lookAtState();
  await lookAtLists();
}

loop.begin();
cause.begin();
curves.begin();
profile.begin();
steer.begin(refresh);
document.addEventListener("visibilitychange", () => document.hidden || refresh().catch(trouble));
again(lookAtState, STATE_MS);
again(lookAtLists, LISTS_MS);
