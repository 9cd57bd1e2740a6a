"use strict";
// The columns of the page, and how numbers are written. A tensor is its number: 0, 1, … through all series.

const DATA = JSON.parse(document.getElementById("data").textContent);
const KEPT = "kept";

const T = (() => {
  const n = DATA.series.reduce((sum, s) => sum + s.n, 0);
  const t = { n, series: new Int32Array(n), at: new Int32Array(n), error: new Float64Array(n), largest: new Float64Array(n) };
  let i = 0;
  DATA.series.forEach((s, number) => {
    s.first = i;
    s.changed = DATA.codecs[s.codec] !== KEPT;
    for (let k = 0; k < s.n; k++, i++) {
      t.series[i] = number;
      t.at[i] = k;
      t.error[i] = s.error ? s.error[k] : 0;
      t.largest[i] = s.largest ? s.largest[k] : 0;
    }
  });
  return t;
})();

const seriesOf = i => DATA.series[T.series[i]];
const names = new Array(T.n);

function nameOf(i) {
  if (names[i] === undefined) {
    const s = seriesOf(i), k = T.at[i];
    names[i] = s.parts.reduce((text, part, j) => text + s.ids[j - 1][k] + part);
  }
  return names[i];
}

const roleOf = i => DATA.roles[seriesOf(i).role];
const codecOf = i => DATA.codecs[seriesOf(i).codec];
const decibels = error => (error > 0 ? -10 * Math.log10(error) : null);

// --- numbers ---

const NONE = "–";

function showError(x) {
  if (x === null || !Number.isFinite(x)) return NONE;
  if (x === 0) return "0";
  if (x >= 1e-3 && x < 1e3) return x.toPrecision(3);
  const [mantissa, exponent] = x.toExponential(2).split("e");
  return `${mantissa}e${Number(exponent)}`;
}

function showBytes(n) {
  const [unit, name] = n >= 1e9 ? [1e9, "GB"] : n >= 1e6 ? [1e6, "MB"] : n >= 1e3 ? [1e3, "kB"] : [1, "B"];
  const digits = unit === 1 || n / unit >= 100 ? 0 : n / unit >= 10 ? 1 : 2;
  return `${(n / unit).toFixed(digits)} ${name}`;
}

const showFixed = (x, digits) => (x === null || !Number.isFinite(x) ? NONE : x.toFixed(digits));
const showCount = n => n.toLocaleString("en");
const plural = (n, word) => `${showCount(n)} ${word}${n === 1 ? "" : "s"}`;

// --- elements: strings become text, never markup ---

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "style") Object.assign(node.style, value);
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter(child => child !== null));
  return node;
}

// A name that may be broken after its dots.
function nameNode(i) {
  const parts = nameOf(i).split(/(?<=\.)/);
  return el("span", {}, ...parts.flatMap((part, j) => (j ? [el("wbr"), part] : [part])));
}

const byId = id => document.getElementById(id);
const themeColor = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// --- colours ---

// categories: Okabe and Ito's, told apart by colour-blind readers; darkened where white text stands on them
const PALETTE = ["#0072b2", "#c25400", "#007a5a", "#a8497f", "#7a6a00", "#3f7fa8", "#5b4fa3", "#8a3b2e"];
const ROLE_COLORS = ["#5b4fa3", "#3f7fa8", "#8a3b2e", "#7a6a00", "#a8497f", "#007a5a", "#c25400", "#0072b2",
  "#4d6b2f", "#6b6f7a", "#94602b", "#2f6f73"];
const KEPT_COLOR = "#7d8793";
const codecColor = codec => (DATA.codecs[codec] === KEPT ? KEPT_COLOR : PALETTE[(codec - (DATA.codecs[0] === KEPT ? 1 : 0)) % PALETTE.length]);

// viridis: its lightness rises evenly, with and without red-green vision
const VIRIDIS = (() => { // [r, g, b] of 256 steps
  const stops = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
  const rgb = stops.map(hex => [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const x = (i / 255) * (rgb.length - 1), left = Math.min(Math.floor(x), rgb.length - 2);
    return rgb[left].map((c, j) => Math.round(c + (rgb[left + 1][j] - c) * (x - left)));
  });
})();

function swatch(color) {
  return el("span", { className: "swatch", style: { background: color } });
}

function codecChips(codecs) {
  const chips = codecs.map(codec => el("span", {}, swatch(codecColor(codec)), DATA.codecs[codec]));
  return el("span", { className: "chips" }, ...(chips.length ? chips : [KEPT]));
}
