// The server's endpoints, as OpenAI's clients call them.

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let key = sessionStorage.getItem("key");

export function useKey(given) {
  key = given;
  sessionStorage.setItem("key", given);
}

async function call(path, options = {}) {
  const headers = { ...(options.body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Refusal(answer.status, body?.error?.message ?? `${answer.status} ${answer.statusText}`);
}

export async function model() {
  return (await (await call("/v1/models")).json()).data[0];
}

const json = (request) => JSON.stringify(request, (_, value) => (typeof value === "bigint" ? JSON.rawJSON(value) : value));

// The events of one picture, as they come: looks, then the picture.
export async function* picture(request, looks, signal) {
  const body = json({ ...request, stream: true, partial_images: looks });
  const answer = await call("/v1/images/generations", { method: "POST", body, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const line = block.split("\n").find((one) => one.startsWith("data: "));
      if (!line) continue; // a sign of life
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refusal(500, event.error.message);
      const looked = event.type === "image_generation.partial_image";
      yield { ...event, looked, blob: fromBase64(event.b64_json) };
    }
  }
}

// The same of a video, which is asked after until it is made.
export async function* video(request, signal) {
  const body = json(request);
  let made = await (await call("/v1/videos", { method: "POST", body, signal })).json();
  const path = `/v1/videos/${made.id}`;
  try {
    for (let step = -1; made.status === "queued" || made.status === "in_progress";) {
      if (made.look && made.look.step !== step) {
        step = made.look.step;
        yield { ...made.look, looked: true, blob: fromBase64(made.look.b64_json) };
      }
      await new Promise((resolve) => setTimeout(resolve, 300));
      made = await (await call(path, { signal })).json();
    }
    if (made.status === "failed") throw new Refusal(500, made.error.message);
    const blob = await (await call(`${path}/content`, { signal })).blob();
    yield { ...made, looked: false, blob };
  } finally {
    call(path, { method: "DELETE" }).catch(() => {}); // what was not made, and what is here by now
  }
}

function fromBase64(text) {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}
