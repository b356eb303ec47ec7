// The controls and their effects.

const data = JSON.parse(document.getElementById("data").textContent);
const LAST = 2 ** 31 - 1; // the last position, as in rope_ext.cos_sin
// Values of the sliders that are not evenly spaced; the model's own are added.
const CHOICES = {
  base: [100, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7],
  dim: Array.from({ length: 32 }, (_, i) => 8 * (i + 1)),
  factor: [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64],
  trained: [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072],
};
const own = {
  base: data.base, dim: data.rotary_dim, factor: data.factor, trained: data.trained,
};
const state = { m: 20, n: 12, pair: Math.floor(data.rotary_dim / 16), together: false, method: data.rope_type, ...own };
if (data.inv_freq) { // a method without a formula on this page
  state.method = "config";
  METHODS.config = () => ({ inverse: data.inv_freq, scaling: data.attention_scaling });
}

const byId = (id) => document.getElementById(id);
const show = (id, shown) => { byId(id).textContent = shown; };
const number = (value, digits) =>
  value.toLocaleString("en-US", { maximumSignificantDigits: digits });

// Tokens: the config's own value until the context or the factor is changed.
function extendedContext() {
  const { trained, factor } = state;
  return trained === own.trained && factor === own.factor ? data.extended : trained * factor;
}

function frequenciesOf(method) {
  const { base, dim: channels, factor, trained } = state;
  const { yarn, llama3 } = data;
  return METHODS[method]({ base, channels, factor, trained, yarn, llama3 });
}

function update() {
  const fixed = state.method === "config"; // the config's method has one head and one base
  if (fixed) Object.assign(state, own);
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

  const methods = {};
  for (const name of Object.keys(METHODS)) {
    if (name !== "config" || state.dim === own.dim) methods[name] = frequenciesOf(name).inverse;
  }
  drawWavelengths(byId("wavelength-chart"), methods, { ...state, extended: extendedContext() });
  drawScores(byId("score-chart"), state, score, data.q, data.k, frequencies);
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
  byId("together").checked = state.together;
  byId("pair").max = pairs - 1;
  byId("pair").value = state.pair;
  show("pair-value", `${state.pair} of 0 to ${pairs - 1}`);
  byId("method").value = state.method;
  for (const [id, values] of Object.entries(CHOICES)) {
    const shown = number(state[id], 10);
    byId(id).value = values.indexOf(state[id]);
    byId(id).disabled = fixed;
    byId(id).setAttribute("aria-valuetext", shown);
    show(`${id}-value`, shown);
  }
}

// Sets m or n to a position, and moves the other by as much if both move; both stay in 0 to LAST.
function moveTo(id, position) {
  const ids = state.together ? ["m", "n"] : [id];
  const least = Math.max(...ids.map((each) => -state[each]));
  const most = Math.min(...ids.map((each) => LAST - state[each]));
  const by = Math.min(Math.max(Math.round(position) - state[id], least), most);
  for (const each of ids) state[each] += by;
}

function connect() {
  for (const [id, values] of Object.entries(CHOICES)) {
    if (!values.includes(own[id])) values.push(own[id]);
    values.sort((a, b) => a - b);
    byId(id).max = values.length - 1;
    byId(id).addEventListener("input", (event) => {
      state[id] = values[event.target.valueAsNumber];
      update();
    });
  }
  for (const id of ["m", "n"]) {
    byId(id).addEventListener("input", (event) => {
      moveTo(id, event.target.valueAsNumber);
      update();
    });
    const exact = byId(`${id}-exact`);
    exact.addEventListener("input", () => {
      if (Number.isNaN(exact.valueAsNumber)) return; // nothing typed yet
      moveTo(id, exact.valueAsNumber);
      const longest = Math.max(1023, state.m, state.n);
      byId("m").max = byId("n").max = 2 ** Math.ceil(Math.log2(longest + 1)) - 1;
      update();
    });
    exact.addEventListener("change", () => { exact.value = state[id]; });
  }
  for (const name of Object.keys(METHODS)) {
    const label = name === "config" ? `${data.rope_type}, as in the config` : name;
    byId("method").append(new Option(label, name));
    const item = document.createElement("li");
    item.innerHTML =
      `<svg aria-hidden="true" viewBox="0 0 48 12"><path class="method" d="M0 6H48" ` +
      `style="stroke: var(--${name})" stroke-width="3" stroke-dasharray="${DASHES[name]}"/></svg>`;
    item.append(label);
    byId("legend").append(item);
  }
  byId("method").addEventListener("input", (event) => {
    state.method = event.target.value;
    update();
  });
  byId("pair").addEventListener("input", (event) => {
    state.pair = event.target.valueAsNumber;
    update();
  });
  byId("together").addEventListener("input", (event) => {
    state.together = event.target.checked;
    update();
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["cos-table", "sin-table"]) {
    byId(id).addEventListener("click", ({ target, offsetX, offsetY }) => {
      const [column, row] = [offsetX / target.clientWidth, offsetY / target.clientHeight];
      moveTo("m", firstColumn() + Math.min(Math.floor(COLUMNS * column), COLUMNS - 1));
      state.pair = Math.min(Math.floor((row * state.dim) / 2), state.dim / 2 - 1);
      update();
    });
  }
  new ResizeObserver(update).observe(document.querySelector("main"));
  update();
}

connect();
