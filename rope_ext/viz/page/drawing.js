// The pictures. Each fills an <svg> or <canvas> at its size; the colours are those of page.css.

const COLUMNS = 128; // positions of a table
// cividis (Nuñez, Anderton, Renslow, 2018), at 0, 1/8, ..., 1: for all readers, increasingly light
const CIVIDIS = [
  [0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120],
  [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56],
];
const DASHES = {
  default: "", linear: "10 4", ntk: "2 3", yarn: "10 3 2 3", llama3: "5 4", config: "10 3 2 3 2 3",
};

function sized(svg) {
  const [width, height] = [svg.clientWidth, svg.clientHeight];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  return [width, height];
}

function line(x1, y1, x2, y2, of) {
  return `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" ${of}/>`;
}

function text(x, y, content, of = "") {
  return `<text x="${x}" y="${y}" ${of}>${content}</text>`;
}

function path(points) {
  return "M" + points.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`).join("L");
}

// Two vectors that point right at position 0: the query's at m is solid, the key's at n dashed. The
// radius of the circle is the attention scaling.
function drawPair(svg, { m, n }, frequency) {
  const [width, height] = sized(svg);
  const [x, y] = [width / 2, height / 2];
  const radius = Math.min(width, height) / 2 - 28;
  const arrow = (position, kind, dashes, name, reach, aside) => {
    const [cos, sin] = turn(position, frequency);
    const [tipX, tipY] = [x + radius * cos, y - radius * sin];
    const label = `text-anchor="middle" dominant-baseline="central"`;
    const [labelX, labelY] = [reach * cos + aside * sin, aside * cos - reach * sin];
    return (
      line(x, y, tipX, tipY, `class="${kind}" stroke-dasharray="${dashes}"`) +
      `<circle class="${kind}" cx="${tipX}" cy="${tipY}" r="5"/>` +
      text(x + labelX, y + labelY, name, label)
    );
  };
  svg.innerHTML =
    line(x - radius - 8, y, x + radius + 8, y, `class="grid"`) +
    line(x, y - radius - 8, x, y + radius + 8, `class="grid"`) +
    `<circle class="edge" cx="${x}" cy="${y}" r="${radius}"/>` +
    arrow(n, "key", "6 4", "n", radius - 30, 12) +
    arrow(m, "query", "", "m", radius + 17, 0);
}

function shade(value) { // of -1 to 1
  const place = Math.min((value + 1) * 4, 7.999);
  const [from, part] = [Math.floor(place), place % 1];
  return CIVIDIS[from].map((start, i) => Math.round(start + part * (CIVIDIS[from + 1][i] - start)));
}

// cos (which = 0) or sin (1) of pairs, from the top, at the positions from `first`; a frame around the
// cell of m and the chosen pair.
function drawTable(canvas, which, first, { m, pair }, inverse) {
  const cells = new OffscreenCanvas(COLUMNS, inverse.length);
  const image = new ImageData(COLUMNS, inverse.length);
  inverse.forEach((frequency, row) => {
    for (let column = 0; column < COLUMNS; column++) {
      const value = turn(first + column, frequency)[which];
      image.data.set([...shade(value), 255], 4 * (row * COLUMNS + column));
    }
  });
  cells.getContext("2d").putImageData(image, 0, 0);

  canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
  canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(cells, 0, 0, canvas.width, canvas.height);
  const [wide, high] = [canvas.width / COLUMNS, canvas.height / inverse.length];
  const [x, y] = [(m - first) * wide, pair * high];
  for (const [color, grow] of [["#ffffff", 3], ["#000000", 5]]) {
    const by = grow * devicePixelRatio;
    context.strokeStyle = color;
    context.lineWidth = 2 * devicePixelRatio;
    context.strokeRect(x - by, y - by, wide + 2 * by, high + 2 * by);
  }
}

// One line for each method (name -> inv_freq), on a logarithmic scale; the chosen one is thick and has a dot.
// The legend is below the lines, which rise; the names of the contexts are above all of them.
function drawWavelengths(svg, methods, labels, { pair, method, trained, extended }) {
  const [width, height] = sized(svg);
  const [left, right, top, bottom] = [50, width - 14, 66, height - 40];
  const pairs = methods[method].length;
  const finite = Object.values(methods).flat().filter((frequency) => frequency > 0);
  const decades = Math.ceil(Math.log10(Math.max(TURN / Math.min(...finite), extended)));
  const across = (i) => left + ((right - left) * i) / Math.max(pairs - 1, 1);
  const up = (tokens) => bottom - ((bottom - top) * Math.log10(tokens)) / decades;

  let drawn = "";
  for (let power = 0; power <= decades; power++) {
    const y = up(10 ** power);
    drawn += line(left, y, right, y, `class="grid"`);
    const ten = `10<tspan dy="-5" font-size="10">${power}</tspan>`;
    drawn += text(left - 6, y + 4, ten, `text-anchor="end"`);
  }
  for (let i = 0; i < pairs; i += Math.ceil(pairs / 8)) {
    drawn += text(across(i), bottom + 16, i, `text-anchor="middle"`);
  }
  drawn += text((left + right) / 2, height - 6, "pair", `text-anchor="middle" class="quiet"`);
  let above = text(left, top - 8, "tokens a turn", `class="quiet"`); // the lines
  for (const [row, [name, tokens]] of Object.entries({ trained, extended }).entries()) {
    const [at, y] = [`class="context ${name}"`, 10 + 18 * row];
    drawn += line(left, up(tokens), right, up(tokens), `${at} data-tokens="${tokens}"`);
    above += line(left, y, left + 40, y, at);
    above += text(left + 48, y + 4, `${name} context: ${number(tokens, 10)}`, `class="quiet"`);
  }
  drawn += line(across(pair), top, across(pair), bottom, `class="edge"`);
  for (const [name, inverse] of Object.entries(methods)) {
    const points = inverse.flatMap((w, i) => (w > 0 ? [[across(i), up(TURN / w)]] : []));
    const chosen = name === method ? " chosen" : "";
    drawn +=
      `<path class="method${chosen}" data-method="${name}" style="stroke: var(--${name})" ` +
      `stroke-dasharray="${DASHES[name]}" d="${path(points)}"/>`;
  }
  Object.keys(methods).reverse().forEach((name, row) => {
    const y = bottom - 14 - 18 * row;
    const stroke = `class="method" style="stroke: var(--${name})" stroke-dasharray="${DASHES[name]}"`;
    above += line(right - 50, y, right, y, stroke) + text(right - 58, y + 4, labels[name], `text-anchor="end"`);
  });
  const frequency = methods[method][pair];
  if (frequency > 0) {
    drawn += `<circle class="dot" cx="${across(pair)}" cy="${up(TURN / frequency)}" r="6"/>`;
  }
  svg.innerHTML = drawn + above;
}

// A curve of the scores of q at distance d from k at 0, with a dot for m and n.
function drawScores(svg, { m, n }, score, q, k, frequencies) {
  const [width, height] = sized(svg);
  const [left, right, top, bottom] = [50, width - 14, 16, height - 40];
  const span = Math.max(64, 2 ** Math.ceil(Math.log2(Math.abs(m - n) || 1)));
  const even = Array.from({ length: 129 }, (_, i) => (span * (i - 64)) / 64);
  const distances = [...even, m - n].sort((a, b) => a - b); // the dot is on the curve
  const scores = distances.map((distance) => scoreOf(q, k, distance, 0, frequencies));
  const [least, most] = [Math.min(...scores, score), Math.max(...scores, score)];
  const across = (distance) => left + ((right - left) * (distance + span)) / (2 * span);
  const up = (value) => bottom - ((bottom - top) * (value - least)) / (most - least || 1);

  let drawn = "";
  for (const distance of [-span, 0, span]) {
    const anchor = distance < 0 ? "start" : distance > 0 ? "end" : "middle";
    drawn += line(across(distance), top, across(distance), bottom, `class="grid"`);
    const shown = number(distance, 10).replace("-", "−");
    drawn += text(across(distance), bottom + 16, shown, `text-anchor="${anchor}"`);
  }
  for (const value of [least, most]) {
    drawn += line(left, up(value), right, up(value), `class="grid"`);
    const shown = value.toPrecision(2).replace("-", "−");
    drawn += text(left - 6, up(value) + 4, shown, `text-anchor="end"`);
  }
  const label = "m − n (tokens)";
  drawn += text((left + right) / 2, height - 6, label, `text-anchor="middle" class="quiet"`);
  drawn += `<path class="curve" d="${path(distances.map((d, i) => [across(d), up(scores[i])]))}"/>`;
  const [x, y] = [across(m - n).toFixed(2), up(score).toFixed(2)];
  drawn += `<circle class="dot" cx="${x}" cy="${y}" r="6"/>`;
  drawn += text(left + 6, top + 13, "score", `class="quiet"`);
  svg.innerHTML = drawn;
}

// A PNG of SVGs and canvases side by side, on the colour of a card, with two dots a pixel of the page.
async function pictureOf(elements) {
  const gap = 16;
  const sizes = elements.map(({ clientWidth, clientHeight }) => [clientWidth, clientHeight]);
  const canvas = document.createElement("canvas");
  canvas.width = 2 * (sizes.reduce((sum, [width]) => sum + width + gap, gap));
  canvas.height = 2 * (Math.max(...sizes.map(([, height]) => height)) + 2 * gap);
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--card");
  context.fillRect(0, 0, canvas.width, canvas.height);
  let left = gap;
  for (const [i, element] of elements.entries()) {
    const image = element.matches("svg") ? await imageOf(element, sizes[i]) : element;
    context.drawImage(image, left, gap, ...sizes[i]);
    left += sizes[i][0] + gap;
  }
  return new Promise((done) => { canvas.toBlob(done); });
}

// An SVG as an image, with the styles of the page and its colours of this moment, light or dark.
async function imageOf(svg, [width, height]) {
  const copy = svg.cloneNode(true);
  const root = getComputedStyle(document.documentElement);
  for (const name of document.styleSheets[0].cssRules[0].style) {
    copy.style.setProperty(name, root.getPropertyValue(name));
  }
  copy.style.fontFamily = getComputedStyle(svg).fontFamily;
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  const style = document.createElementNS(copy.namespaceURI, "style");
  style.textContent = document.querySelector("style").textContent;
  copy.prepend(style);
  const image = new Image();
  image.src = "data:image/svg+xml," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
  await image.decode();
  return image;
}
