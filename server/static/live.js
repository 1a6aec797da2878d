// The live part: pools, sequences and decisions per layer of every engine, from /calidrop/stats.

import { bytes, count, element, percent } from "./dom.js";

const WINDOW_MS = 30000;
const SHOWN_SEQUENCES = 20;
const KINDS = [
  ["recomputes", "read again"],
  ["merges", "merged"],
  ["plain", "kept tokens alone"],
];

// Readings of the last WINDOW_MS, oldest first: [time, stats].
let readings = [];
let span = "recent";

export function show(place, stats) {
  const now = performance.now();
  readings.push([now, stats]);
  readings = readings.filter(([time]) => now - time <= WINDOW_MS);
  draw(place, stats);
}

export function forget() {
  readings = [];
}

function draw(place, stats) {
  const before = readings[0][1];
  const many = stats.engines.length > 1;
  const focused = document.activeElement?.name === "span" ? document.activeElement.value : null;
  place.replaceChildren(
    ...stats.engines.map((engine) => {
      const earlier = before.engines.find((other) => other.engine === engine.engine);
      const parts = [pools(engine), layers(place, engine, earlier, stats), sequences(engine)];
      return many
        ? element("section", { className: "engine" }, element("h3", { textContent: `Engine ${engine.engine}` }), ...parts)
        : element("div", { className: "engine" }, ...parts);
    }),
  );
  if (focused) place.querySelector(`input[name="span"][value="${focused}"]`)?.focus();
}

function pools(engine) {
  const { swap, sketch, buffer, kv_blocks: kv, totals } = engine;
  const modes = totals.requests_by_mode;
  const fallbacks = Object.values(totals.fallbacks_by_reason).reduce((sum, value) => sum + value, 0);
  const meters = [
    meter("KV pool", kv.used, kv.total, `${count(kv.used)} of ${count(kv.total)} blocks`),
    meter(
      "Swap pool, host", swap.used_blocks, swap.total_blocks,
      `${bytes(swap.used_blocks * swap.block_bytes)} of ${bytes(swap.total_blocks * swap.block_bytes)}`,
    ),
  ];
  if (sketch.total_blocks) meters.push(meter("Sketches", sketch.used_blocks, sketch.total_blocks));
  if (buffer.total_pages) meters.push(meter("Page buffers", buffer.used_pages, buffer.total_pages));
  const evicted = totals.kept_tokens + totals.evicted_tokens;
  const figures = [
    ["running", count(engine.sequences.length)],
    ["waiting", count(engine.waiting)],
    ["compressed", count(modes.calidrop + modes.evict)],
    ["full KV", count(modes.full)],
    ["fell back", count(fallbacks)],
    ["evicted", evicted ? percent(totals.evicted_tokens, evicted) : "–"],
    ["blocks freed", count(kv.freed_total)],
    ["to host", bytes(totals.bytes_out)],
    ["read again", bytes(totals.bytes_in)],
  ];
  return element(
    "div",
    { className: "pools" },
    element("div", { className: "meters" }, ...meters),
    element(
      "dl",
      { className: "figures" },
      ...figures.map(([name, value]) =>
        element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })),
      ),
    ),
  );
}

function meter(name, used, total, text = `${count(used)} of ${count(total)}`) {
  const share = total ? used / total : 0;
  return element(
    "div",
    { className: "meter" },
    element("span", { textContent: name }),
    element("span", { className: "quiet", textContent: text }),
    element(
      "div",
      {
        className: "track", role: "meter", "aria-label": name, "aria-valuemin": 0, "aria-valuemax": total || 1,
        "aria-valuenow": used, "aria-valuetext": text,
      },
      element("div", { className: share > 0.9 ? "fill high" : "fill", style: `width: ${100 * share}%` }),
    ),
  );
}

// Decisions of one layer since `earlier`: one per query head and decode step.
function decisions(engine, earlier, layer) {
  return KINDS.map(([kind]) => engine.layers[kind][layer] - (earlier?.layers[kind][layer] ?? 0));
}

function layers(place, engine, earlier, stats) {
  const number = engine.layers.recomputes.length;
  const since = span === "recent" ? earlier : undefined;
  const rows = [];
  let any = false;
  for (let layer = 0; layer < number; layer += 1) {
    const parts = decisions(engine, since, layer);
    const all = parts.reduce((sum, value) => sum + value, 0);
    any ||= all > 0;
    const text = KINDS.map(([, name], index) => `${name} ${percent(parts[index], all)}`).join(", ");
    rows.push(
      element(
        "li",
        {},
        element("span", { className: "name", textContent: `layer ${layer}` }),
        element(
          "span",
          { className: "track stacked", role: "img", "aria-label": `layer ${layer}: ${all ? text : "no decisions"}`, title: text },
          ...KINDS.map(([kind], index) =>
            element("span", { className: kind, style: `width: ${all ? (100 * parts[index]) / all : 0}%` }),
          ),
        ),
        element("span", { className: "value", textContent: all ? percent(parts[0], all) : "–" }),
      ),
    );
  }
  const legend = element(
    "ul",
    { className: "legend" },
    ...KINDS.map(([kind, name]) => element("li", {}, element("span", { className: `dot ${kind}` }), name)),
  );
  const note = element("p", {
    className: "quiet",
    textContent: any ? "" : span === "recent" ? "No decode steps with a budget in the last 30 s." : "None yet.",
  });
  return element(
    "div",
    { className: "layers" },
    element(
      "div",
      { className: "over" },
      element("h3", { textContent: "Recompute rate by layer" }),
      element("div", { className: "switch", role: "radiogroup", "aria-label": "Period" },
        choice(place, stats, "recent", "last 30 s", engine), choice(place, stats, "start", "since start", engine)),
    ),
    legend,
    element("ol", { className: number > 12 ? "bars many" : "bars" }, ...rows),
    note,
  );
}

function choice(place, stats, value, text, engine) {
  const input = element("input", { type: "radio", name: "span", value, checked: span === value });
  if (engine.engine !== stats.engines[0].engine) input.name = `span-${engine.engine}`;
  input.addEventListener("change", () => {
    span = value;
    draw(place, readings.at(-1)[1]);
  });
  return element("label", {}, input, element("span", { textContent: text }));
}

function sequences(engine) {
  const columns = [
    ["request", (one) => one.request_id],
    ["state", (one) => one.state],
    ["prompt", (one) => count(one.prompt_tokens)],
    ["outputs", (one) => count(one.outputs)],
    ["kept", (one) => count(one.kept)],
    ["evicted", (one) => count(one.evicted)],
    ["mode", (one) => (one.reason ? `${one.mode} (${one.reason})` : one.mode)],
    ["policy", (one) => one.policy ?? "–"],
    ["swap blocks", (one) => count(one.swap_blocks)],
  ];
  if (!engine.sequences.length) {
    return element("p", { className: "quiet", textContent: "No sequence is running." });
  }
  const shown = engine.sequences.slice(0, SHOWN_SEQUENCES);
  const table = element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...columns.map(([name]) => element("th", { scope: "col", textContent: name })))),
    element(
      "tbody",
      {},
      ...shown.map((one) =>
        element("tr", {}, ...columns.map(([name, value]) => element("td", { className: name.split(" ")[0], textContent: value(one) }))),
      ),
    ),
  );
  const more = engine.sequences.length - shown.length;
  return element(
    "div",
    { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Running sequences" },
    table,
    ...(more > 0 ? [element("p", { className: "quiet", textContent: `and ${more} more` })] : []),
  );
}
