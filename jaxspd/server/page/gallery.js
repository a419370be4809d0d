// What was made in this session, newest first.

// Adds `item` to `list`; returns what shows it large.
export function add(list, { blob, video, request, again, exact }) {
  const address = URL.createObjectURL(blob);
  const entry = document.createElement("li");
  const words = Object.assign(document.createElement("p"), { textContent: request.prompt });
  const facts = Object.assign(document.createElement("p"), { className: "hint", textContent: told(request) });
  const tools = Object.assign(document.createElement("div"), { className: "tools" });
  const save = Object.assign(document.createElement("a"), { href: address, textContent: "download" });
  save.download = `${name(request)}.${blob.type.split("/")[1]}`;
  save.ariaLabel = `download ${request.prompt}`;
  tools.append(button("again", request, again), button("same seed, exact", request, exact), save);
  entry.append(shown(address, video, request), words, facts, tools);
  list.prepend(entry);
  return shown(address, video, request);
}

function shown(address, video, request) {
  const kind = video ? "video" : "img";
  const element = Object.assign(document.createElement(kind), { src: address });
  if (video) Object.assign(element, { loop: true, muted: true, autoplay: true, controls: true, ariaLabel: request.prompt });
  else element.alt = request.prompt;
  return element;
}

function button(text, request, act) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.ariaLabel = `${text}: ${request.prompt}`;
  made.addEventListener("click", act);
  return made;
}

function told({ width, height, seed, speed, ...own }) {
  const names = { num_inference_steps: "steps", progressive_levels: "halvings", progressive_delta: "δ" };
  const changed = Object.keys(names).filter((key) => key in own).map((key) => `${names[key]} ${own[key]}`);
  return [`${width}×${height}`, speed, ...changed, `seed ${seed}`].join(" · ");
}

function name({ prompt, seed }) {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "");
  return `${words || "picture"}_${seed}`;
}
