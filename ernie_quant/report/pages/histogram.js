// How the errors are spread: a row of bars for each role and codec, over one logarithmic axis.

const BINS = 60, MOST_STRIPS = 40;

function histograms() {
  const groups = new Map();
  for (let i = 0; i < T.n; i++) {
    const s = seriesOf(i);
    if (!s.changed || !(T.error[i] > 0)) continue;
    const key = `${s.role} ${s.codec}`;
    if (!groups.has(key)) groups.set(key, { role: s.role, codec: s.codec, errors: [] });
    groups.get(key).errors.push(T.error[i]);
  }
  const strips = [...groups.values()].sort((a, b) => b.errors.length - a.errors.length).slice(0, MOST_STRIPS);
  const place = byId("histograms");
  if (!strips.length) {
    byId("spread").hidden = true;
    return;
  }
  let low = Infinity, high = 0;
  for (const { errors } of strips) {
    errors.sort((a, b) => a - b);
    low = Math.min(low, errors[0]);
    high = Math.max(high, errors[errors.length - 1]);
  }
  const axis = logAxis(low / 1.02, high * 1.02);
  place.append(...strips.map(strip => histogram(strip, axis)), axisRow(axis));
}

function logAxis(low, high) {
  const from = Math.log(low), span = Math.log(high) - from;
  return { low, high, at: x => (Math.log(x) - from) / span };
}

function histogram({ role, codec, errors }, axis) {
  const counts = new Array(BINS).fill(0);
  for (const error of errors) counts[Math.min(BINS - 1, Math.floor(axis.at(error) * BINS))]++;
  const most = Math.max(...counts);
  const svg = svgEl("svg", { viewBox: `0 0 ${BINS} 1`, preserveAspectRatio: "none", role: "img", "aria-label": "histogram" });
  counts.forEach((count, bin) => {
    if (!count) return;
    const height = Math.max(0.03, count / most);
    const bar = svgEl("rect", { x: bin + 0.06, y: 1 - height, width: 0.88, height, fill: codecColor(codec) });
    const title = svgEl("title", {});
    const edge = k => showError(axis.low * (axis.high / axis.low) ** (k / BINS));
    title.textContent = `${edge(bin)} to ${edge(bin + 1)}: ${plural(count, "tensor")}`;
    bar.append(title);
    svg.append(bar);
  });
  const middle = errors[errors.length >> 1], [least, worst] = [errors[0], errors[errors.length - 1]];
  const text = el("p", {}, swatch(codecColor(codec)), `${DATA.roles[role]}, ${DATA.codecs[codec]}`,
    el("small", { textContent: `${plural(errors.length, "tensor")}; median ${showError(middle)}, ${showError(least)} to ${showError(worst)}` }));
  return el("div", { className: "strip" }, text, svg);
}

function svgEl(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function axisRow(axis) {
  const inside = ticks(axis.low, axis.high).filter(x => axis.at(x) > 0.03 && axis.at(x) < 0.97);
  const marks = inside.map(x => el("span", { textContent: showTick(x), style: { left: `${100 * axis.at(x)}%` } }));
  return el("div", { className: "strip axis-row" }, el("p"), el("div", { className: "axis" }, ...marks));
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
