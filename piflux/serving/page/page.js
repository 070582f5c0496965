// The page of `piflux serve`: asks for pictures by the same API as everyone, with events.

const $ = (id) => document.getElementById(id);
const NAMES = { lossless: "Lossless", high: "High", medium: "Medium", low: "Low" };
let limits = {};
let drawing = null; // aborts what is under way
let shown = null; // the seed of what is to be seen

// ------------------------------------------------------------------------------------- the server

function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function fails(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no JSON: a proxy's page, say
  }
  if (response.status === 401) {
    $("keyed").hidden = false;
    $("key").focus();
    message = "This server wants an API key.";
  }
  const wait = Number(response.headers.get("retry-after"));
  return Object.assign(new Error(message), { status: response.status, wait });
}

// Calls `each` with every event of one picture; ends with the last.
async function draw(asked, signal, each) {
  const response = await fetch("v1/images/generations", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify({ ...asked, stream: true, partial_images: limits.partial_images }),
    signal,
  });
  if (!response.ok) throw await fails(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server went away before the picture was there.");
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((x) => x.startsWith("data: "));
      if (!line) continue; // it says that it is still there
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      each(data);
      if (data.type.endsWith(".completed")) return;
    }
  }
}

// ---------------------------------------------------------------------------------------- the form

function tell(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function option(select, value, text) {
  select.append(Object.assign(document.createElement("option"), { value, textContent: text }));
}

function sizes(card) {
  const [width, height] = card.default_size.split("x").map(Number);
  const near = (x) => Math.max(1, Math.round(x / card.size_multiple)) * card.size_multiple;
  const long = near(width * 1.25);
  const short = near(height * 0.8);
  $("size").replaceChildren();
  option($("size"), "auto", `${width} × ${height}`);
  option($("size"), `${long}x${short}`, `${long} × ${short}`);
  option($("size"), `${short}x${long}`, `${short} × ${long}`);
}

function setUp(model) {
  const card = model.piflux;
  limits = card.limits;
  $("model").textContent = `${model.id} · ${card.pipeline}`;
  $("prompt").maxLength = limits.prompt;
  if (!$("prompt").value) $("prompt").value = card.example;
  $("note").textContent = card.note;
  const choices = $("qualities").querySelector(".choices");
  const names = Object.keys(card.qualities);
  choices.replaceChildren();
  $("other").replaceChildren();
  option($("other"), "", "Nothing");
  for (const name of names) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), {
      type: "radio", name: "quality", value: name, checked: name === card.default_quality,
    });
    const span = Object.assign(document.createElement("span"), { textContent: NAMES[name] ?? name });
    label.append(input, span);
    choices.append(label);
    option($("other"), name, NAMES[name] ?? name);
  }
  const promise = () => { $("promise").textContent = card.qualities[quality()]; };
  choices.onchange = promise;
  promise();
  sizes(card);
  $("draw").disabled = false;
}

function quality() {
  return new FormData($("form")).get("quality");
}

async function begin() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 503) return warm();
  if (!response.ok) return tell((await fails(response)).message, true);
  $("keyed").hidden = !sessionStorage.getItem("key");
  setUp((await response.json()).data[0]);
  const ready = await fetch("readyz");
  if (ready.ok) return tell("");
  return warm();
}

function warm() {
  tell("The server loads its model and warms up.");
  setTimeout(start, 2000);
}

function start() {
  begin().catch(() => {
    tell("The server can't be reached.", true);
    setTimeout(start, 5000);
  });
}

// --------------------------------------------------------------------------------------- the stage

function shape(size) {
  const [width, height] = size.split("x").map(Number);
  $("frame").style.setProperty("--shape", `${width} / ${height}`);
  $("stage").style.setProperty("--ratio", width / height);
}

function clear() {
  for (const id of ["first", "second", "seam", "slider", "left", "right", "actions"]) $(id).hidden = true;
  $("empty").hidden = false;
  $("facts").replaceChildren();
}

function put(image, data, early) {
  image.src = `data:image/${data.output_format};base64,${data.b64_json}`;
  image.classList.toggle("early", early);
  image.hidden = false;
  $("empty").hidden = true;
}

function fact(name, text) {
  $("facts").append(
    Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: text }),
  );
}

const seconds = (x) => `${x.toFixed(x < 10 ? 2 : 1)} s`;

function facts(drawn) {
  const name = NAMES[drawn.quality] ?? drawn.quality;
  const ranks = drawn.ranks === 1 ? "one rank" : `${drawn.ranks} ranks, ${drawn.policy}`;
  const steps = drawn.computed === drawn.steps
    ? `${drawn.steps} steps` : `${drawn.computed} of ${drawn.steps} steps computed`;
  const drift = drawn.lpips === null ? "drift not measured"
    : drawn.lpips === 0 ? "exact" : `LPIPS ${Number(drawn.lpips.toPrecision(2))}`;
  fact(name, `${seconds(drawn.drawn_s)} on ${ranks}, ${steps}, ${drift}`);
}

function seam(percent) {
  $("frame").style.setProperty("--seam", `${percent}%`);
}

function compare(first, second) {
  for (const id of ["seam", "slider", "left", "right"]) $(id).hidden = false;
  $("left").textContent = `${NAMES[first.quality]} · ${seconds(first.drawn_s)}`;
  $("right").textContent = `${NAMES[second.quality]} · ${seconds(second.drawn_s)}`;
  $("slider").value = 50;
  seam(50);
}

// Draws one picture into `image`, and gives how it was drawn.
async function one(asked, image, signal, which) {
  let drawn;
  await draw(asked, signal, (event) => {
    const kind = event.type.split(".").pop();
    if (kind === "queued") {
      tell(event.before ? `Waits; ${event.before} before it.` : "Begins.");
    } else if (kind === "progress") {
      $("progress").value = event.step / event.steps;
      tell(`${which}Step ${event.step} of ${event.steps}`);
    } else if (kind === "partial_image") {
      shape(event.size);
      put(image, event, true);
    } else if (kind === "completed") {
      shape(event.size);
      put(image, event, false);
      drawn = event.piflux;
    }
  });
  return drawn;
}

async function run() {
  if (drawing) return drawing.abort();
  const asked = { prompt: $("prompt").value, quality: quality(), size: $("size").value };
  const other = $("other").value;
  const seed = $("seed").value.trim();
  const any = crypto.getRandomValues(new Uint32Array(1))[0];
  shown = seed || String(any);
  // A seed may have more digits than a number of JavaScript holds: it is written as it stands.
  asked.seed = JSON.rawJSON ? JSON.rawJSON(BigInt(shown).toString()) : Number(shown);
  drawing = new AbortController();
  clear();
  tell("Asks.");
  $("draw").textContent = "Stop";
  $("draw").classList.add("stops");
  $("progress").hidden = false;
  $("progress").value = 0;
  // On a phone the stage is below the form.
  if ($("frame").getBoundingClientRect().bottom > innerHeight) $("stage").scrollIntoView();
  try {
    const both = other && other !== asked.quality;
    const first = await one(asked, $("first"), drawing.signal, both ? `${NAMES[asked.quality]}: ` : "");
    $("first").alt = asked.prompt;
    facts(first);
    $("save").href = $("first").src;
    $("actions").hidden = false;
    if (both) {
      $("progress").value = 0;
      seam(0);
      const second = await one(
        { ...asked, quality: other }, $("second"), drawing.signal, `${NAMES[other]}: `);
      $("second").alt = `${asked.prompt}, in quality ${other}`;
      facts(second);
      compare(first, second);
    }
    fact("Seed", shown);
    tell("Done.");
  } catch (error) {
    if (error.name === "AbortError") tell("Stopped.");
    else tell(error.wait ? `${error.message} Try again in ${error.wait} s.` : error.message, true);
  } finally {
    drawing = null;
    $("draw").textContent = "Draw";
    $("draw").classList.remove("stops");
    $("progress").hidden = true;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("slider").addEventListener("input", () => seam($("slider").value));
$("again").addEventListener("click", () => { $("seed").value = shown; });
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value.trim());
  start();
});

start();
