// What a budget gained: the figures under an answer, and what each of them means.

import { bytes, count, element, percent, seconds } from "./dom.js";

// name: [one line, the document and part that says more].
export const MEANINGS = {
  "tokens kept": ["Prompt tokens whose KV stays on the device, per KV head; the others were evicted.", "life-of-a-request.md"],
  "device KV": ["KV cache that this request holds at its last token: what is kept of its prompt, and all of its answer.", "operations.md"],
  "of full KV": ["Device KV as a share of what the same request holds with full KV; blocks are handed out whole.", "operations.md"],
  "host memory": ["Evicted KV of this request in host memory, in whole swap blocks; it is read again from there.", "swap.md"],
  "read again": ["Bytes of evicted KV read during the answer: what calibration costs. 0 with full KV.", "operations.md"],
  "recompute rate": ["Share of decisions (one per query head, layer and step) that read evicted KV again.", "life-of-a-request.md"],
  "pool holds": ["Requests of these lengths that this server's pools hold at once, by the arithmetic of calidrop-server plan.", "operations.md"],
  "mode": ["calidrop: evicted KV is read again or its stored state is merged. evict: evicted only. full: nothing was evicted.", "server.md"],
  "answer": ["Length of the answer.", "server.md"],
  "first token": ["Time to the first token: queue and prefill. Both prompts are computed whole, without the prefix cache.", "performance.md"],
  "time": ["Time of the whole answer. The two answers run one after the other, so they do not compete.", "performance.md"],
};

// The figures of one answer: [name, text]. held: what /calidrop/held says, or null; report, usage: null while it runs.
export function figures(report, usage, held, first, total) {
  const rows = [];
  if (report) {
    rows.push(["tokens kept", `${count(report.kept)} of ${count(report.prompt_tokens)}`]);
    if (held) {
      const { full, held: own } = held;
      rows.push(["device KV", `${count(own.tokens)} tokens, ${bytes(own.bytes + held.recall_bytes)}, ${count(own.blocks)} blocks`]);
      rows.push(["of full KV", `${percent(own.bytes + held.recall_bytes, full.bytes)} of ${count(full.tokens)} tokens, ${bytes(full.bytes)}, ${count(full.blocks)} blocks`]);
      rows.push(["host memory", bytes(held.host_bytes)]);
    }
    rows.push(["read again", bytes(report.bytes_read)]);
    if (report.mode === "calidrop") {
      rows.push(["recompute rate", percent(report.recomputes, report.recomputes + report.merges + report.plain)]);
    }
    if (held) rows.push(["pool holds", `${count(held.held.fit)} such requests`]);
    rows.push(["mode", report.reason ? `${report.mode} (${report.reason.replaceAll("_", " ")})` : report.mode]);
  }
  if (usage) rows.push(["answer", `${count(usage.completion_tokens)} tokens`]);
  if (first !== null) rows.push(["first token", seconds(first / 1000)]);
  rows.push(["time", seconds(total / 1000)]);
  return rows;
}

export function showFigures(place, rows) {
  place.replaceChildren(
    ...rows.map(([name, value]) =>
      element(
        "div",
        { title: MEANINGS[name][0] },
        element("dt", { textContent: name }),
        element("dd", { textContent: value }),
      ),
    ),
  );
}

// One sentence about both answers.
export function summary(full, compressed) {
  if (full.text === null || compressed.text === null) return "";
  const saved = gained(compressed);
  if (full.text === compressed.text) return `done: the answers are the same${saved}`;
  let same = 0;
  while (full.text[same] === compressed.text[same]) same += 1;
  return `done: the answers differ after ${count(same)} characters${saved}`;
}

function gained({ held, report }) {
  if (!held || !report) return "";
  if (!report.evicted) return "; nothing was evicted, so this was full KV twice";
  const { full, held: own } = held;
  return `; with the budget the request held ${percent(own.bytes + held.recall_bytes, full.bytes)} of the KV, `
    + `and the pool holds ${count(own.fit)} such requests instead of ${count(full.fit)}`;
}

// The help panel: every figure with its line, linked to the document that says more.
export function explain(place) {
  place.replaceChildren(
    ...Object.entries(MEANINGS).map(([name, [line, file]]) =>
      element(
        "div",
        {},
        element("dt", { textContent: name }),
        element("dd", {}, `${line} `, element("a", { href: `docs/${file}`, textContent: file, title: `${name}: ${file}` })),
      ),
    ),
  );
}
