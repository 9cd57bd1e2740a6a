// How the errors are spread: a row of bars for each role and codec, over one logarithmic axis.

const BINS = 60, MOST_STRIPS = 40;

function histograms() {
  const groups = new Map();
  for (let i = 0; i < T.n; i++) {
    const s = seriesOf(i);
    if (!s.changed || !(T.error[i] > 0)) continue;
    const key = `${s.role} ${s.codec}`;
    if (!groups.has(key)) groups.set(key, { role: s.role, codec: s.codec, errors: [], expected: new Set(), outliers: 0 });
    const group = groups.get(key);
    group.errors.push(T.error[i]);
    if (s.expected) group.expected.add(s.expected);
    if (outlier(i)) group.outliers++;
  }
  const strips = [...groups.values()].sort((a, b) => b.errors.length - a.errors.length).slice(0, MOST_STRIPS);
  const place = byId("histograms");
  if (!strips.length) {
    byId("spread").hidden = true;
    return;
  }
  let low = Infinity, high = 0;
  for (const { errors, expected } of strips) {
    errors.sort((a, b) => a - b);
    low = Math.min(low, errors[0], ...expected);
    high = Math.max(high, errors[errors.length - 1], ...expected);
  }
  const axis = logAxis(low / 1.02, high * 1.02);
  place.append(...strips.map(strip => histogram(strip, axis)), axisRow(axis));
}

function histogram({ role, codec, errors, expected, outliers }, axis) {
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
  for (const x of expected) {
    svg.append(...["halo", "gauss"].map(kind => svgEl("line", { class: kind, x1: BINS * axis.at(x), x2: BINS * axis.at(x), y1: 0, y2: 1 })));
  }
  const middle = errors[errors.length >> 1], [least, worst] = [errors[0], errors[errors.length - 1]];
  const text = el("p", {}, swatch(codecColor(codec)), `${DATA.roles[role]}, ${DATA.codecs[codec]}`,
    el("small", { textContent: `${plural(errors.length, "tensor")}; median ${showError(middle)}, ${showError(least)} to ${showError(worst)}${outliers ? `; ${plural(outliers, "outlier")}` : ""}` }),
    expected.size ? el("small", { textContent: `Gaussian weights: ${showRange([...expected].sort((a, b) => a - b).filter((_, i, all) => i === 0 || i === all.length - 1))}` }) : null);
  return el("div", { className: "strip" }, text, svg);
}

function axisRow(axis) {
  const inside = ticks(axis.low, axis.high).filter(x => axis.at(x) > 0.03 && axis.at(x) < 0.97);
  const marks = inside.map(x => el("span", { textContent: showTick(x), style: { left: `${100 * axis.at(x)}%` } }));
  return el("div", { className: "strip axis-row" }, el("p"), el("div", { className: "axis" }, ...marks));
}
