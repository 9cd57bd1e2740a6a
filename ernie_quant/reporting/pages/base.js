"use strict";
// The data of the page, how numbers are written, elements, colours and the theme.

const DATA = JSON.parse(document.getElementById("data").textContent);
const KEPT = "kept";

// --- numbers ---

const NONE = "–", TIMES = "×";

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

function showTimes(x) {
  if (x === null || !Number.isFinite(x)) return NONE;
  return x >= 0.01 && x < 1e4 ? (x < 100 ? x.toFixed(2) : x.toFixed(0)) : showError(x);
}

function showWeights(n) {
  const [unit, name] = n >= 1e9 ? [1e9, " billion"] : n >= 1e6 ? [1e6, " million"] : [1, ""];
  return unit === 1 ? showCount(n) : (n / unit).toPrecision(3) + name;
}

const showFixed = (x, digits) => (x === null || !Number.isFinite(x) ? NONE : x.toFixed(digits));
const showCount = n => n.toLocaleString("en");
const plural = (n, word) => `${showCount(n)} ${word}${n === 1 ? "" : "s"}`;
const decibels = error => (error > 0 ? -10 * Math.log10(error) : null);
const ratio = (x, of) => (x > 0 && of > 0 ? x / of : null);

function logAxis(low, high) {
  const from = Math.log(low), span = Math.log(high) - from;
  return { low, high, at: x => (Math.log(x) - from) / span };
}

const showTick = x => (x >= 1e-3 && x < 1e3 ? String(x) : String(x.toExponential()).replace("e+", "e"));

// Round numbers between two bounds of a logarithmic axis, at most about six.
function ticks(low, high) {
  const decades = Math.log10(high / low);
  let found = [];
  if (decades >= 0.9) {
    const steps = decades > 2.5 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 5];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
      for (const step of steps) found.push(Number(`${step}e${e}`));
    }
  } else {
    const rough = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find(m => m * unit >= rough) * unit;
    for (let k = Math.ceil(low / step); k * step <= high && found.length < 9; k++) found.push(Number((k * step).toPrecision(6)));
  }
  found = found.filter(x => x >= low && x <= high);
  return found.filter((_, i) => i % Math.ceil(found.length / 6) === 0);
}

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

function svgEl(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const byId = id => document.getElementById(id);
const themeColor = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// --- colours ---

// categories: Okabe and Ito's, told apart by colour-blind readers; darkened where white text stands on them
const PALETTE = ["#0072b2", "#c25400", "#007a5a", "#a8497f", "#7a6a00", "#3f7fa8", "#5b4fa3", "#8a3b2e"];
const ROLE_COLORS = ["#5b4fa3", "#3f7fa8", "#8a3b2e", "#7a6a00", "#a8497f", "#007a5a", "#c25400", "#0072b2",
  "#4d6b2f", "#6b6f7a", "#94602b", "#2f6f73"];
const KEPT_COLOR = "#7d8793";
const changes = codec => DATA.of_codecs[codec].changed;
const CODEC_COLORS = (() => {
  let next = 0;
  return DATA.codecs.map((_, codec) => (changes(codec) ? PALETTE[next++ % PALETTE.length] : KEPT_COLOR));
})();
const codecColor = codec => CODEC_COLORS[codec];

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

const codecChip = codec => el("span", {}, swatch(codecColor(codec)), DATA.codecs[codec]);

function codecChips(codecs) {
  return el("span", { className: "chips" }, ...(codecs.length ? codecs.map(codecChip) : [KEPT]));
}

// --- theme and width ---

function onThemeAndWidth(redraw) {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  });
  dark.addEventListener("change", redraw);
  let drawnWidth = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== drawnWidth) redraw(); // not when a phone's address bar slides away
    drawnWidth = window.innerWidth;
  });
}
