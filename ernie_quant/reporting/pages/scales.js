// Colours of errors: every codec has a scale of its own, over the errors of its tensors but for outliers, as one scale would only
// tell codecs apart. An outlier has the colour of the end and a frame.

const LEAST_RANGE = 1.2;
const KINDS = { error: T.error }; // what is shown; a calibrated result has errors of outputs too
let kind = "error";

// What a cell shows: its error, or how many times what is expected, or the median of its row (of the same codec), it is.
function values(p, mode) {
  const shown = new Float64Array(p.cells.length).fill(NaN), errors = KINDS[kind];
  for (let y = 0; y < p.rows; y++) {
    const medians = mode === "relative" ? rowMedians(p, y) : null;
    for (let at = y * p.columns; at < (y + 1) * p.columns; at++) {
      const i = p.cells[at];
      if (i < 0 || !seriesOf(i).changed || setAside(i)) continue;
      const of = mode === "relative" ? medians.get(seriesOf(i).codec) : mode === "expected" ? seriesOf(i).expected ?? NaN : 1;
      shown[at] = errors[i] / of;
    }
  }
  return shown;
}

function rowMedians(p, y) {
  const byCodec = new Map();
  for (const i of p.cells.subarray(y * p.columns, (y + 1) * p.columns)) {
    if (i < 0) continue;
    const { codec } = seriesOf(i);
    byCodec.has(codec) ? byCodec.get(codec).push(KINDS[kind][i]) : byCodec.set(codec, [KINDS[kind][i]]);
  }
  return new Map([...byCodec].map(([codec, errors]) => [codec, errors.sort((a, b) => a - b)[errors.length >> 1] || 1]));
}

// Codec -> axis of its colours; the same one for all unless each has its own.
function scalesOf(panels, shown, mode) {
  const ends = new Map(), usualOnly = mode === "" || mode === "same";
  panels.forEach((p, n) => p.cells.forEach((i, at) => {
    if (i < 0 || !(shown[n][at] > 0) || (usualOnly && outlier(i, KINDS[kind], kind))) return;
    const { codec } = seriesOf(i), of = ends.get(codec) ?? { low: Infinity, high: 0 };
    ends.set(codec, { low: Math.min(of.low, shown[n][at]), high: Math.max(of.high, shown[n][at]) });
  }));
  const all = [...ends.values()], lows = Math.min(...all.map(of => of.low)), highs = Math.max(...all.map(of => of.high));
  const codecs = codecsIn(panels), one = all.length ? widened(lows, highs) : widened(1, 1);
  return new Map(codecs.map(codec => [codec, mode === "" && ends.has(codec) ? widened(ends.get(codec).low, ends.get(codec).high) : one]));
}

// Grey as what is kept, beside tensors of its codec that can be compared.
const setAside = i => meant(i, kind) && usualOf(seriesOf(i).codec, kind)?.low != null;

function widened(low, high) {
  const by = Math.max(1, Math.sqrt((LEAST_RANGE * low) / high)); // or noise would look like a difference
  return logAxis(low / by, high * by);
}

function heatmaps() {
  const place = byId("heatmaps"), groups = panelGroups();
  if (!groups.length) {
    place.append(el("p", { textContent: "No weight matrix of a layer was changed: every tensor keeps its bits." }));
    return () => {};
  }
  const draws = groups.map(group => groupOfPanels(place, group));
  const kept = DATA.roles.filter((_, role) => DATA.by_role[role].changed === 0);
  if (kept.length) place.append(el("p", { className: "hint after", textContent: `Kept bit by bit, and not shown here: ${kept.join(", ")}.` }));
  return () => draws.forEach(draw => draw());
}

function codecsIn(panels) {
  const found = new Set(panels.flatMap(p => [...p.cells].filter(i => i >= 0 && seriesOf(i).changed).map(i => seriesOf(i).codec)));
  return [...found].sort((a, b) => a - b);
}

function modesOf(group, codecs) {
  const option = (value, textContent) => el("option", { value, textContent });
  const isGrid = group.panels.some(p => p.cells.length > p.rows && !p.byProjection);
  const expected = DATA.series.some(s => s.expected && codecs.includes(s.codec));
  return [
    option("", codecs.length > 1 ? "relative error, each codec on its own scale" : "relative error"),
    codecs.length > 1 ? option("same", "relative error, all codecs on one scale") : null,
    expected ? option("expected", "times the error of Gaussian weights") : null,
    isGrid ? option("relative", "times the median of its row") : null,
  ].filter(Boolean);
}

function groupOfPanels(place, group) {
  const codecs = codecsIn(group.panels), modes = modesOf(group, codecs);
  const mode = el("select", {}, ...modes), legend = el("div", { className: "legend" });
  const head = el("div", { className: "group-head" }, el("h3", { textContent: group.title }),
    modes.length > 1 ? el("label", {}, "Colour: ", mode) : null, legend);
  const box = el("div", { className: group.panels.length > 1 ? "panels" : "panels single" });
  place.append(el("div", { className: "group" }, head, box));
  const views = group.panels.map(p => new Heatmap(p, box));

  function draw() {
    const shown = group.panels.map(p => values(p, mode.value)), scales = scalesOf(group.panels, shown, mode.value);
    drawLegend(legend, scales, codecs, group.panels, mode.value);
    views.forEach((view, n) => view.draw(shown[n], scales));
  }
  mode.addEventListener("change", draw);
  return draw;
}

function drawLegend(legend, scales, codecs, panels, mode) {
  const times = mode === "" || mode === "same" ? "" : TIMES;
  const scale = (codec, ...names) => {
    const { low, high } = scales.get(codec);
    return el("span", { className: "scale" }, ...names, el("span", { className: "ramp" }, showError(low) + times, ramp(), showError(high) + times));
  };
  const name = codec => (codecs.length > 1 ? codecChip(codec) : el("span", { textContent: DATA.codecs[codec] }));
  const items = mode === "" ? codecs.map(codec => scale(codec, name(codec))) : [scale(codecs[0]), ...codecs.map(name)];
  const cells = panels.flatMap(p => [...p.cells]).filter(i => i >= 0);
  if (cells.some(i => outlier(i, KINDS[kind], kind))) items.push(el("span", {}, el("span", { className: "framed" }), "outlier of its codec"));
  const grey = [["kept", i => !seriesOf(i).changed], ["meant to differ", setAside]].filter(([, is]) => cells.some(is)).map(([words]) => words);
  if (grey.length) items.push(el("span", {}, swatch("var(--cell-kept)"), grey.join(", or ")));
  legend.replaceChildren(...items);
}

function ramp() {
  const canvas = el("canvas", { width: 120, height: 12 }), context = canvas.getContext("2d");
  for (let x = 0; x < 120; x++) {
    context.fillStyle = `rgb(${VIRIDIS[Math.round((x / 119) * 255)].join()})`;
    context.fillRect(x, 0, 1, 12);
  }
  return canvas;
}
