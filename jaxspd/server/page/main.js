// The page: what is asked for, the picture as it grows, and what was made before.

import { model, picture, Refusal, useKey, video } from "./api.js";
import { add } from "./gallery.js";

const SPEEDS = ["exact", "high", "fast", "fastest"];
const OWN = ["num_inference_steps", "progressive_levels", "progressive_delta"]; // instead of what the speed sets
const LOOKS = 24;
const at = (id) => document.getElementById(id);
const form = at("ask");
let served; // the model
let running; // what stops the one being made

for (const speed of SPEEDS) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "speed", value: speed });
  input.checked = speed === "fast";
  label.append(input, speed);
  at("speeds").append(label);
}

async function open() {
  try {
    served = await model();
  } catch (error) {
    refused(error);
    return;
  }
  const [width, height] = served.default_size.split("x");
  at("model").textContent = served.id === "demo" ? "the demo: mountain landscapes" : served.id;
  at("width").value ||= width;
  at("height").value ||= height;
  for (const id of ["width", "height"]) Object.assign(at(id), { min: served.pixel_multiple, step: served.pixel_multiple });
  at("prompt").placeholder = served.id === "demo" ? "a serene mountain lake at golden hour with snow" : "What to show";
  at("error").textContent = "";
}

function refused(error) {
  if (error.status === 401) {
    at("key-row").hidden = false;
    at("key").focus();
  }
  at("error").textContent = error instanceof Refusal ? error.message : "The server cannot be reached.";
}

function asked() {
  const seed = at("seed").value.trim();
  const request = {
    prompt: at("prompt").value,
    width: Number(at("width").value),
    height: Number(at("height").value),
    seed: BigInt(seed || die()), // of 64 bits, which no Number has
    speed: form.elements.speed.value,
  };
  for (const name of OWN) if (form.elements[name].value) request[name] = Number(form.elements[name].value);
  return request;
}

const die = () => Math.floor(Math.random() * 2 ** 32);

async function make(request) {
  running?.abort();
  const stopper = (running = new AbortController());
  const begin = performance.now();
  let stage;
  at("stop").disabled = false;
  at("error").textContent = "";
  clear(request);
  say("It is being made.");
  at("stage").scrollIntoView({ block: "nearest" });
  try {
    const events = served.videos ? video(request, stopper.signal) : picture(request, LOOKS, stopper.signal);
    for await (const event of events) {
      if (stopper.signal.aborted) return;
      at("fact-time").textContent = `${((performance.now() - begin) / 1000).toFixed(1)} s`;
      if (event.looked) {
        await look(event);
        if (event.stage !== stage) say(`Stage ${event.stage + 1} of ${event.stages}, on a grid of ${grid(event)}.`);
        stage = event.stage;
      } else {
        finished(request, event);
      }
    }
  } catch (error) {
    if (stopper.signal.aborted) return;
    refused(error);
    clear(request);
    at("empty").hidden = false;
  } finally {
    if (running === stopper) {
      running = undefined;
      at("stop").disabled = true;
    }
  }
}

const grid = ({ grid: [height, width] }) => `${width}×${height}`;

function say(text) {
  at("news").textContent = text;
}

function clear({ width, height }) {
  at("frame").style.aspectRatio = `${width} / ${height}`;
  at("look").hidden = true;
  at("made").replaceChildren();
  at("empty").hidden = true;
  at("progress").value = 0;
  for (const fact of at("facts").querySelectorAll("dd")) fact.textContent = "–";
}

async function look(event) {
  const image = at("look");
  URL.revokeObjectURL(image.src);
  const seen = new Promise((resolve) => (image.onload = image.onerror = resolve));
  image.src = URL.createObjectURL(event.blob);
  image.alt = `Preview, ${grid(event)}`;
  image.hidden = false;
  at("progress").value = (event.step + 1) / event.steps;
  at("fact-stage").textContent = `${event.stage + 1} of ${event.stages}`;
  at("fact-grid").textContent = grid(event);
  at("fact-sigma").textContent = event.sigma.toFixed(3);
  at("fact-step").textContent = `${event.step + 1} of ${event.steps}`;
  await seen; // each, however soon the next one comes
}

function finished(request, event) {
  at("progress").value = 1;
  at("fact-sigma").textContent = "0.000";
  const steps = at("fact-step").textContent.split(" of ")[1];
  if (steps) at("fact-step").textContent = `${steps} of ${steps}`;
  say(`It is made: ${request.prompt}`);
  const { prompt, width, height, seed } = request;
  const again = (changed) => {
    for (const [id, value] of Object.entries({ prompt, width, height })) at(id).value = value;
    make(changed);
  };
  const item = {
    blob: event.blob,
    video: served.videos,
    request,
    again: () => again({ ...request, seed: BigInt(die()) }),
    exact: () => again({ prompt, width, height, seed, speed: "exact" }),
  };
  at("made").append(add(at("gallery"), item));
  at("made-before").hidden = false;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (at("key").value) {
    useKey(at("key").value);
    at("key-row").hidden = true;
    at("key").value = "";
  }
  if (!served) await open();
  if (served && form.reportValidity()) make(asked());
});
at("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault(); // a field would submit once more by itself
  form.requestSubmit();
});

function stop() {
  if (!running) return;
  running.abort();
  running = undefined;
  at("stop").disabled = true;
  say("Stopped.");
  at("fact-time").textContent += " · stopped";
}

open();
