// The controls and their effects.

const data = JSON.parse(document.getElementById("data").textContent);
const LAST = 2 ** 31 - 1; // the last position, as in rope_ext.cos_sin
const STEP = 150; // milliseconds a token while the positions advance
// Values of the sliders that are not evenly spaced; those of the model or the address are added.
const STEPS = {
  base: [100, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7],
  dim: Array.from({ length: 32 }, (_, i) => 8 * (i + 1)),
  factor: [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64],
  trained: [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072],
};
// What an address may ask for: the least, the most, and of what it is a multiple.
const BOUNDS = {
  m: [0, LAST, 1], n: [0, LAST, 1], pair: [0, 255, 1], together: [0, 1, 1],
  base: [1.01, 1e15, 0], dim: [4, 512, 2], factor: [1, 1e6, 0], trained: [2, LAST, 1],
};

let choices; // as STEPS
const state = {};
const own = () => data.models[state.model];
METHODS.config = () => ({ inverse: own().inv_freq, scaling: own().attention_scaling });

const byId = (id) => document.getElementById(id);
const show = (id, shown) => { byId(id).textContent = shown; };
const number = (value, digits) =>
  value.toLocaleString("en-US", { maximumSignificantDigits: digits });

function startOf(model) {
  const { rotary_dim: dim, base, factor, trained, rope_type, inv_freq } = data.models[model];
  const method = inv_freq ? "config" : rope_type; // config: a method without a formula on this page
  const pair = Math.floor(dim / 16);
  return { model, m: 20, n: 12, pair, together: 0, method, base, dim, factor, trained };
}

// Shows a model, with what differs from its start.
function start(model, changes = {}) {
  Object.assign(state, startOf(model), changes);
  choices = {};
  for (const [id, steps] of Object.entries(STEPS)) {
    choices[id] = [...new Set([...steps, startOf(model)[id], state[id]])].sort((a, b) => a - b);
    byId(id).max = choices[id].length - 1;
  }
  byId("method").replaceChildren(...methods().map((name) => new Option(labelOf(name), name)));
  fitSliders();
  update();
}

const methods = () => Object.keys(METHODS).filter((name) => name !== "config" || own().inv_freq);
const labelOf = (name) => (name === "config" ? `${own().rope_type}, as in the config` : name);

// The address holds what differs from the start of a model, and the model if it is not the first.
function toAddress() {
  const first = startOf(state.model);
  const differs = Object.keys(state).filter((id) => id !== "model" && state[id] !== first[id]);
  const shown = differs.map((id) => [id, state[id]]);
  if (state.model) shown.unshift(["model", own().name]);
  history.replaceState(null, "", `#${new URLSearchParams(shown)}`);
}

function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const model = Math.max(data.models.findIndex(({ name }) => name === asked.get("model")), 0);
  const changes = {};
  for (const [id, [least, most, step]] of Object.entries(BOUNDS)) {
    const value = Number(asked.get(id) ?? NaN);
    if (value >= least && value <= most && (!step || value % step === 0)) changes[id] = value;
  }
  state.model = model;
  if (methods().includes(asked.get("method"))) changes.method = asked.get("method");
  start(model, changes);
}

// Tokens: the model's own value until the context or the factor is changed.
function extendedContext() {
  const { trained, factor } = state;
  return trained === own().trained && factor === own().factor ? own().extended : trained * factor;
}

function frequenciesOf(method) {
  const { base, dim: channels, factor, trained } = state;
  const { yarn, llama3 } = own();
  return METHODS[method]({ base, channels, factor, trained, yarn, llama3 });
}

let toWrite;
function update() {
  const fixed = state.method === "config"; // the config's method has one head and one base
  if (fixed) {
    const { base, dim, factor, trained } = startOf(state.model);
    Object.assign(state, { base, dim, factor, trained });
  }
  const pairs = state.dim / 2;
  state.pair = Math.min(state.pair, pairs - 1);
  const frequencies = frequenciesOf(state.method);
  const { inverse, scaling } = frequencies;
  showControls(fixed, pairs);

  const frequency = inverse[state.pair];
  const [cos, sin] = turn(state.m, frequency);
  show("first-wavelength", number(TURN / inverse[0], 4));
  show("last-wavelength", number(TURN / inverse[pairs - 1], 4));
  show("frequency", frequency.toPrecision(7));
  show("wavelength", number(TURN / frequency, 7));
  show("cos", (scaling * cos).toFixed(6));
  show("sin", (scaling * sin).toFixed(6));
  show("between", ((state.m - state.n) * frequency).toPrecision(7));
  show("attention-scaling", number(scaling, 7));
  const score = scoreOf(data.q, data.k, state.m, state.n, frequencies);
  show("distance", state.m - state.n);
  show("score", score.toFixed(4));
  drawAll(frequencies, score);
  clearTimeout(toWrite); // browsers refuse an address for each move of a slider
  toWrite = setTimeout(toAddress, 250);
}

function drawAll(frequencies, score) {
  drawPair(byId("pair-picture"), state, frequencies.inverse[state.pair]);
  const where = `pair ${state.pair} at position ${state.m}`;
  byId("pair-picture").setAttribute("aria-label", `${where}, solid, and ${state.n}, dashed`);

  const first = firstColumn();
  drawTable(byId("cos-table"), 0, first, state, frequencies.inverse);
  drawTable(byId("sin-table"), 1, first, state, frequencies.inverse);
  const most = number(frequencies.scaling, 4); // the shades show cos and sin times this
  show(
    "table-text",
    `Columns: positions ${first} to ${first + COLUMNS - 1}. Rows: pair 0 at the top, which is fast, to ` +
      `pair ${frequencies.inverse.length - 1}, which is slow. Dark is −${most}, light is ${most}. The frame: ` +
      `${where}.`,
  );

  const drawn = {};
  for (const name of methods()) {
    if (name !== "config" || state.dim === own().rotary_dim) drawn[name] = frequenciesOf(name).inverse;
  }
  const labels = Object.fromEntries(Object.keys(drawn).map((name) => [name, labelOf(name)]));
  const chart = byId("wavelength-chart");
  drawWavelengths(chart, drawn, labels, { ...state, extended: extendedContext() });
  const lines = Object.values(labels).join(", ");
  chart.setAttribute("aria-label", `wavelength against pair, a line a method: ${lines}`);
  show("coincidences", coincidences(drawn));
  drawScores(byId("score-chart"), state, score, data.q, data.k, frequencies);
}

// Where lines look like one, as in rope_ext.viz.figures.methods.
function coincidences(drawn) {
  const names = Object.keys(drawn);
  const parts = names.slice(1).map((name, i) => {
    const found = names.slice(0, i + 1).flatMap((other) => {
      const same = drawn[name].map((w, j) => Math.abs(w - drawn[other][j]) <= 0.02 * drawn[other][j]);
      const [before, after] = [[...same, false].indexOf(false), same.length - 1 - same.lastIndexOf(false)];
      if (before === same.length) return [`the line of ${other}`];
      if (other !== "default" && other !== "linear") return [];
      return [
        ...(before > 1 ? [`like ${other} up to pair ${before - 1}`] : []),
        ...(after > 1 ? [`like ${other} from pair ${same.length - after}`] : []),
      ];
    });
    const whole = found.find((part) => part.startsWith("the"));
    return [labelOf(name), whole ? [whole] : found];
  });
  const lines = parts.filter(([, found]) => found.length).map(([name, found]) => `${name}: ${found.join(", ")}`);
  return lines.length ? `Lines that coincide: ${lines.join("; ")}.` : "";
}

function firstColumn() {
  return COLUMNS * Math.floor(state.m / COLUMNS);
}

function showControls(fixed, pairs) {
  for (const id of ["m", "n"]) {
    byId(id).value = state[id];
    const exact = byId(`${id}-exact`);
    if (exact !== document.activeElement) exact.value = state[id]; // otherwise the user may still type
  }
  byId("model").value = state.model;
  byId("together").checked = state.together;
  byId("pair").max = pairs - 1;
  byId("pair").value = state.pair;
  show("pair-value", `${state.pair} of 0 to ${pairs - 1}`);
  byId("method").value = state.method;
  for (const [id, values] of Object.entries(choices)) {
    const shown = number(state[id], 10);
    byId(id).value = values.indexOf(state[id]);
    byId(id).disabled = fixed;
    byId(id).setAttribute("aria-valuetext", shown);
    show(`${id}-value`, shown);
  }
}

// Sets m or n to a position, and moves the other by as much if both move; both stay in 0 to LAST.
function moveTo(id, position, together = state.together) {
  const ids = together ? ["m", "n"] : [id];
  const least = Math.max(...ids.map((each) => -state[each]));
  const most = Math.min(...ids.map((each) => LAST - state[each]));
  const by = Math.min(Math.max(Math.round(position) - state[id], least), most);
  for (const each of ids) state[each] += by;
}

function fitSliders() {
  const longest = Math.max(1023, state.m, state.n);
  byId("m").max = byId("n").max = 2 ** Math.ceil(Math.log2(longest + 1)) - 1;
}

let playing;
function play() {
  playing = playing ? clearInterval(playing) : setInterval(advance, STEP);
  show("play", playing ? "Pause" : "Play");
}

// Both tokens go on by one position: the pair turns, the score stays.
function advance() {
  moveTo("m", state.m + 1, true);
  fitSliders();
  update();
}

async function save(ids) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await pictureOf(ids.map(byId)));
  link.download = `rope-${ids[0]}.png`;
  link.click();
  URL.revokeObjectURL(link.href);
}

function connect() {
  const on = (id, event, change) => byId(id).addEventListener(event, ({ target }) => change(target));
  const changes = (id, change) => on(id, "input", (target) => { change(target); update(); });
  for (const id of Object.keys(STEPS)) {
    changes(id, ({ valueAsNumber }) => { state[id] = choices[id][valueAsNumber]; });
  }
  for (const id of ["m", "n"]) {
    changes(id, ({ valueAsNumber }) => moveTo(id, valueAsNumber));
    on(`${id}-exact`, "input", ({ valueAsNumber }) => {
      if (Number.isNaN(valueAsNumber)) return; // nothing typed yet
      moveTo(id, valueAsNumber);
      fitSliders();
      update();
    });
    on(`${id}-exact`, "change", (target) => { target.value = state[id]; });
  }
  changes("method", ({ value }) => { state.method = value; });
  changes("pair", ({ valueAsNumber }) => { state.pair = valueAsNumber; });
  changes("together", ({ checked }) => { state.together = Number(checked); });
  data.models.forEach(({ name }, i) => byId("model").append(new Option(name, i)));
  on("model", "input", ({ value }) => start(Number(value)));
  on("reset", "click", () => start(state.model));
  on("play", "click", play);
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", () => save(button.dataset.save.split(" ")));
  }
  for (const id of ["cos-table", "sin-table"]) {
    byId(id).addEventListener("click", ({ target, offsetX, offsetY }) => {
      const [column, row] = [offsetX / target.clientWidth, offsetY / target.clientHeight];
      moveTo("m", firstColumn() + Math.min(Math.floor(COLUMNS * column), COLUMNS - 1));
      state.pair = Math.min(Math.floor((row * state.dim) / 2), state.dim / 2 - 1);
      update();
    });
  }
  window.addEventListener("hashchange", fromAddress);
  fromAddress();
  new ResizeObserver(update).observe(document.querySelector("main"));
}

connect();
