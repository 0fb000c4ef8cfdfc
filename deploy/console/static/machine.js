// Memory of each process, and what each part takes of its share of the disk.

import { at, h, table, tell } from "./dom.js";
import { NONE, age, bytes, percent } from "./words.js";

const PROCESSES = [["process", ""], ["state", ""], ["up", "number"], ["memory", "number"]];
const PARTS = [["part", ""], ["on disk", "number"], ["of its share", "number"], ["full", "number"], [() => h("span", { class: "unseen" }, "bar"), "bar"]];

export function show({ processes, storage, rows, histories }) {
  table(
    at("processes-table"), PROCESSES,
    Object.entries(processes).map(([name, one]) => [name, one.answers ? "runs" : "unreachable", age(one.up_s), bytes(one.memory_bytes)]),
    "No process is configured.",
  );
  const parts = Object.entries(storage?.parts ?? {}).map(([name, part]) => {
    const share = part.used_bytes / part.limit_bytes;
    return [name, bytes(part.used_bytes), bytes(part.limit_bytes), percent(share, 0), h("meter", { min: 0, max: 1, high: 0.8, optimum: 0, value: Math.min(1, share), "aria-label": `${name} is ${percent(share, 0)} full` })];
  });
  table(at("disk-table"), PARTS, parts, "Nothing is stored on this machine yet.");
  tell(at("disk-told"), storage ? `${bytes(storage.used_bytes)} of ${bytes(storage.budget_bytes)}; ${bytes(storage.free_bytes)} are free on the disk.` : "");
  const stores = [...(rows ? [{ name: "serving/rows", ...rows }] : []), ...(histories ?? [])];
  tell(at("stores-told"), `Stores in memory: ${stores.filter((one) => one.in_memory).map((one) => `${one.name} ${bytes(one.bytes)}`).join(", ") || NONE}.`);
}
