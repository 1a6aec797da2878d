// The playground: one prompt, asked with full KV and then with a budget.

import { ServerError, post, stream } from "./api.js";
import { byId, element } from "./dom.js";
import { example } from "./examples.js";
import { explain, figures, showFigures, summary } from "./gain.js";

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
  byId("theta1").addEventListener("change", followTheta1);
  byId("example").addEventListener("click", () => insertExample(true));
  byId("stop").addEventListener("click", () => running?.abort());
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  });
  explain(byId("meanings"));
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
  const { kv_policy: policy, kv_recall: recall, kv_theta1, kv_theta2, kv_calibration } = config.defaults;
  if (policy !== "full") byId("policy").value = policy;
  byId("recall").value = recall;
  byId("theta1").value = kv_theta1;
  byId("theta2").value = kv_theta2;
  byId("calibration").checked = kv_calibration;
  if (!byId("prompt").value) insertExample(false);
}

// The values of a setting, as the server's schema lists them.
function offer(id, names) {
  byId(id).replaceChildren(...names.map((name) => element("option", { value: name }, name)));
}

async function insertExample(focus) {
  if (model === null) return;
  const { prompt, budget, chat } = await example(model);
  byId("prompt").value = prompt;
  byId("route").value = chat ? "chat/completions" : "completions";
  byId("budget").value = Math.min(Math.max(model.defaults.kv_budget ?? budget, byId("budget").min), byId("budget").max);
  byId("budget-slider").value = byId("budget").value;
  if (focus) byId("prompt").focus();
}

// A threshold to read again that is above the one to merge takes that along, as in a request that names only the first.
function followTheta1() {
  if (Number(byId("theta1").value) > Number(byId("theta2").value)) byId("theta2").value = byId("theta1").value;
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

// cache_salt: a new one for each answer, so that none finds the other's prompt in the prefix cache.
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
    cache_salt: `${Date.now()}-${Math.random()}`,
    ...extra,
  };
}

// The sentence about a form that cannot be asked, or null; the control that is wrong is marked.
function incomplete() {
  if (!byId("prompt").value.trim()) {
    byId("prompt").focus();
    return "Write a prompt first.";
  }
  for (const name of NUMBERS) {
    const control = byId("form").elements[name];
    if (control.value !== "") continue;
    blame(name);
    return name === "kv_budget"
      ? "Enter a budget: without one a request keeps full KV, and both answers would be the same."
      : `Enter a number for ${name}.`;
  }
  return null;
}

async function ask() {
  if (running) return;
  blame(null);
  const wrong = incomplete();
  byId("progress").textContent = wrong ?? "answering, first with full KV, then with the budget…";
  if (wrong) return;
  running = new AbortController();
  byId("ask").disabled = true;
  byId("stop").disabled = false;
  const { signal } = running;
  clear(byId("full"), "running");
  clear(byId("compressed"), "waiting");
  const fields = settings();
  const full = await fill(byId("full"), { kv_policy: "full" }, signal);
  const compressed = await fill(byId("compressed"), fields, signal);
  byId("progress").textContent = signal.aborted ? "stopped" : summary(full, compressed);
  running = null;
  byId("ask").disabled = false;
  byId("stop").disabled = true;
}

function clear(column, state) {
  column.querySelector(".answer").textContent = "";
  column.querySelector(".error").hidden = true;
  column.querySelector(".facts").replaceChildren();
  column.dataset.state = state;
}

// One column's answer: its text (null after an error), its report and what it held.
async function fill(column, fields, signal) {
  const answer = column.querySelector(".answer"), error = column.querySelector(".error");
  const facts = column.querySelector(".facts");
  clear(column, "running");
  const began = performance.now();
  let first = null, last = began, report = null, usage = null;
  try {
    signal.throwIfAborted();
    for await (const chunk of stream(`../v1/${byId("route").value}`, body(fields), signal)) {
      const text = chunk.choices[0]?.text ?? chunk.choices[0]?.delta?.content ?? "";
      if (text) {
        last = performance.now();
        first ??= last;
        answer.append(text);
        answer.scrollTop = answer.scrollHeight;
      }
      report = chunk.calidrop?.[0] ?? report;
      usage = chunk.usage ?? usage;
      if (!report && first !== null) showFigures(facts, figures(null, null, null, first - began, last - began));
    }
    const held = await whatItHeld(report, usage, fields, signal);
    showFigures(facts, figures(report, usage, held, first === null ? null : first - began, last - began));
    column.dataset.state = "done";
    return { text: answer.textContent, report, held };
  } catch (caught) {
    if (caught.name === "AbortError") {
      column.dataset.state = "stopped";
      return { text: null };
    }
    column.dataset.state = "error";
    error.textContent = caught.message;
    error.hidden = false;
    if (!(caught instanceof ServerError)) throw caught;
    if (caught.param) blame(caught.param);
    if (caught.kind === "key") onError(caught);
    return { text: null };
  }
}

// Null where there is nothing to ask about, or nobody to ask: a server that stops finishes its answers only.
async function whatItHeld(report, usage, fields, signal) {
  if (!report || !usage) return null;
  const lengths = { prompt_tokens: report.prompt_tokens, answer_tokens: usage.completion_tokens, mode: report.mode };
  try {
    return await post("held", { ...fields, ...lengths }, signal);
  } catch (caught) {
    if (caught instanceof ServerError) return null;
    throw caught;
  }
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
