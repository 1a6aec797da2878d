// The playground: one prompt, asked with full KV and with a budget at the same time.

import { ServerError, stream } from "./api.js";
import { byId, bytes, count, element, percent, seconds } from "./dom.js";

// Names of the form's controls that a server may blame in `error.param`.
const NUMBERS = ["kv_budget", "kv_theta1", "kv_theta2", "max_tokens"];

let running = null;
let model = null;
let onError = () => {};

export function start(reportError) {
  onError = reportError;
  const slider = byId("budget-slider"), number = byId("budget");
  slider.addEventListener("input", () => (number.value = slider.value));
  number.addEventListener("input", () => (slider.value = number.value));
  byId("example").addEventListener("click", insertExample);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  });
}

// What the server allows and presets.
export function configure(config) {
  const first = model === null;
  model = config;
  const { min_budget: least, max_budget: most } = config.limits;
  for (const control of [byId("budget-slider"), byId("budget")]) {
    control.min = least ?? 1;
    control.max = most ?? config.max_model_len;
  }
  if (!first) return;
  offer("policy", config.fields.kv_policy.enum.filter((name) => name !== "full"));
  offer("recall", config.fields.kv_recall.enum);
  const { kv_budget: budget, kv_policy: policy, kv_recall: recall, kv_theta1, kv_theta2, kv_calibration } = config.defaults;
  if (budget) byId("budget").value = budget;
  byId("budget-slider").value = byId("budget").value;
  if (policy !== "full") byId("policy").value = policy;
  byId("recall").value = recall;
  byId("theta1").value = kv_theta1;
  byId("theta2").value = kv_theta2;
  byId("calibration").checked = kv_calibration;
}

// The values of a setting, as the server's schema lists them.
function offer(id, names) {
  byId(id).replaceChildren(...names.map((name) => element("option", { value: name }, name)));
}

async function insertExample() {
  const bundled = model !== null && /(^|\/)(smooth|plain)$/.test(model.model);
  if (bundled) {
    byId("prompt").value = (await (await fetch("example.txt")).text()).trim();
  } else {
    const line = (day) => `On day ${day} the harbour was quiet and the boats stayed in; nothing happened that was worth a note.`;
    const days = Array.from({ length: 60 }, (_, day) => line(day + 1));
    days[20] = "On day 21 the keeper hid the key of the lighthouse under the third stone of the north stairs.";
    byId("prompt").value = `${days.join("\n")}\n\nQuestion: where is the key of the lighthouse?\nAnswer:`;
  }
  byId("prompt").focus();
}

function settings() {
  const value = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  return {
    kv_budget: value("budget"),
    kv_policy: byId("policy").value,
    kv_recall: byId("recall").value,
    kv_theta1: value("theta1"),
    kv_theta2: value("theta2"),
    kv_calibration: byId("calibration").checked,
  };
}

function body(extra) {
  const prompt = byId("prompt").value;
  const asked = byId("route").value === "completions" ? { prompt } : { messages: [{ role: "user", content: prompt }] };
  return {
    model: model?.model,
    ...asked,
    max_tokens: Number(byId("max-tokens").value) || 1,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
    ...extra,
  };
}

async function ask() {
  if (running) return;
  blame(null);
  if (!byId("prompt").value.trim()) {
    byId("progress").textContent = "Write a prompt first.";
    byId("prompt").focus();
    return;
  }
  running = new AbortController();
  byId("ask").disabled = true;
  byId("stop").disabled = false;
  byId("progress").textContent = "answering…";
  const both = [
    fill(byId("full"), body({ kv_policy: "full" }), running.signal),
    fill(byId("compressed"), body(settings()), running.signal),
  ];
  const [full, compressed] = await Promise.all(both);
  byId("progress").textContent = outcome(full, compressed, running.signal.aborted);
  running = null;
  byId("ask").disabled = false;
  byId("stop").disabled = true;
}

function outcome(full, compressed, stopped) {
  if (stopped) return "stopped";
  if (full === null || compressed === null) return "";
  if (full === compressed) return "done: the answers are the same";
  let same = 0;
  while (full[same] === compressed[same]) same += 1;
  return `done: the answers differ after ${count(same)} characters`;
}

// One column's answer, or null after an error.
async function fill(column, request, signal) {
  const answer = column.querySelector(".answer"), error = column.querySelector(".error");
  const facts = column.querySelector(".facts");
  answer.textContent = "";
  error.hidden = true;
  facts.replaceChildren();
  column.dataset.state = "running";
  const began = performance.now();
  let first = null, last = began, report = null, usage = null;
  try {
    for await (const chunk of stream(`../v1/${byId("route").value}`, request, signal)) {
      const text = chunk.choices[0]?.text ?? chunk.choices[0]?.delta?.content ?? "";
      if (text) {
        last = performance.now();
        first ??= last;
        answer.append(text);
        answer.scrollTop = answer.scrollHeight;
      }
      report = chunk.calidrop?.[0] ?? report;
      usage = chunk.usage ?? usage;
      if (!report) showFacts(facts, null, null, first - began, last - began);
    }
    showFacts(facts, report, usage, first === null ? null : first - began, last - began);
    column.dataset.state = "done";
    return answer.textContent;
  } catch (caught) {
    column.dataset.state = "error";
    if (caught.name === "AbortError") {
      column.dataset.state = "stopped";
      return null;
    }
    error.textContent = caught.message;
    error.hidden = false;
    if (caught instanceof ServerError) {
      if (caught.param) blame(caught.param);
      if (caught.kind === "key") onError(caught);
    } else {
      throw caught;
    }
    return null;
  }
}

function showFacts(place, report, usage, first, total) {
  const rows = [];
  if (report) {
    const decided = report.recomputes + report.merges + report.plain;
    rows.push(["tokens kept", `${count(report.kept)} of ${count(report.prompt_tokens)}`]);
    if (report.evicted) {
      rows.push(["recompute rate", report.mode === "calidrop" ? percent(report.recomputes, decided) : "–"]);
      rows.push(["read again", bytes(report.bytes_read)]);
    }
    rows.push(["mode", report.reason ? `${report.mode} (${report.reason.replaceAll("_", " ")})` : report.mode]);
  }
  if (usage) rows.push(["answer", `${count(usage.completion_tokens)} tokens`]);
  if (first !== null) rows.push(["first token", seconds(first / 1000)]);
  rows.push(["time", seconds(total / 1000)]);
  place.replaceChildren(
    ...rows.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))),
  );
}

// Marks the control whose name the server blamed; null clears all.
function blame(param) {
  for (const control of byId("form").elements) {
    if (!control.name) continue;
    const wrong = control.name === param;
    if (wrong) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
    if (wrong && NUMBERS.includes(param)) control.focus();
  }
}
