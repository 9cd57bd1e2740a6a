// Errors by place: layer by expert for each projection, and layer by projection for all other linears.

const MOST_CELLS = 2e6, LEAST_RANGE = 1.2, BAND = 6, GAP = 3, SLANT = Math.PI / 3.2;

// A panel: sorted labels of both axes, and `cells[y * columns + x]`: a tensor, or -1.
function panel(title, series, columnsOf, byProjection) {
  const ys = new Map(), xs = new Map(), points = [];
  for (const s of series) {
    const columns = columnsOf(s);
    for (let k = 0; k < s.n; k++) {
      const layer = s.ids[s.layer][k], x = columns(k), y = s.block === "layer" ? layer : 1e7 + layer;
      ys.set(y, s.block === "layer" ? String(layer) : `${s.block} ${layer}`);
      xs.set(x, x);
      points.push([y, x, s.first + k]);
    }
  }
  const sortedYs = [...ys.keys()].sort((a, b) => a - b);
  const sortedXs = [...xs.keys()].sort(byProjection ? undefined : (a, b) => a - b);
  if (byProjection) sortedXs.sort((a, b) => projectionOrder(a) - projectionOrder(b));
  const rows = sortedYs.length, columns = sortedXs.length;
  if (rows * columns > MOST_CELLS) return null;
  const yAt = new Map(sortedYs.map((y, i) => [y, i])), xAt = new Map(sortedXs.map((x, i) => [x, i]));
  const cells = new Int32Array(rows * columns).fill(-1);
  for (const [y, x, i] of points) cells[yAt.get(y) * columns + xAt.get(x)] = i;
  return { title, rows, columns, cells, yLabels: sortedYs.map(y => ys.get(y)), xLabels: sortedXs.map(x => String(x).replace(/^(self_attn|mlp)\./, "")), byProjection };
}

const ORDER = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "up_gate_proj", "gate_proj", "up_proj", "down_proj"];

function projectionOrder(name) {
  const at = ORDER.findIndex(end => name.endsWith(end));
  return (name.includes("shared") ? 100 : 0) + (at < 0 ? 50 : at);
}

function panelGroups() {
  const placed = DATA.series.filter(s => s.layer !== undefined);
  const groups = [];
  DATA.roles.forEach((name, role) => {
    const experts = placed.filter(s => s.role === role && s.expert !== undefined);
    if (!experts.some(s => s.changed)) return;
    const projections = [...new Set(experts.map(s => s.projection))].sort((a, b) => projectionOrder(a) - projectionOrder(b));
    const panels = projections.map(p => panel(p, experts.filter(s => s.projection === p), s => k => s.ids[s.expert][k], false));
    groups.push({ title: `${name}: layer by expert`, panels });
  });
  const others = placed.filter(s => s.expert === undefined && s.shape.length === 2);
  const lossy = new Set(others.filter(s => s.changed).map(s => s.projection));
  if (lossy.size) {
    const shown = others.filter(s => lossy.has(s.projection));
    groups.push({ title: groups.length ? "other linears: layer by projection" : "layer by projection", panels: [panel("", shown, s => () => s.projection, true)] });
  }
  return groups.map(g => ({ ...g, panels: g.panels.filter(Boolean) })).filter(g => g.panels.length);
}

// What a cell shows: its error, or how many times the median of its row (of the same codec) it is.
function values(p, relative) {
  const shown = new Float64Array(p.cells.length).fill(NaN);
  for (let y = 0; y < p.rows; y++) {
    const medians = relative ? rowMedians(p, y) : null;
    for (let at = y * p.columns; at < (y + 1) * p.columns; at++) {
      const i = p.cells[at];
      if (i >= 0 && seriesOf(i).changed) shown[at] = relative ? T.error[i] / medians.get(seriesOf(i).codec) : T.error[i];
    }
  }
  return shown;
}

function rowMedians(p, y) {
  const byCodec = new Map();
  for (const i of p.cells.subarray(y * p.columns, (y + 1) * p.columns)) {
    if (i < 0) continue;
    const { codec } = seriesOf(i);
    byCodec.has(codec) ? byCodec.get(codec).push(T.error[i]) : byCodec.set(codec, [T.error[i]]);
  }
  return new Map([...byCodec].map(([codec, errors]) => [codec, errors.sort((a, b) => a - b)[errors.length >> 1] || 1]));
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

function groupOfPanels(place, group) {
  const mode = el("select", {}, el("option", { value: "", textContent: "relative error" }),
    el("option", { value: "relative", textContent: "times the median of its row" }));
  const legend = el("div", { className: "legend" });
  const several = group.panels.some(p => p.cells.length > p.rows) && group.panels.some(p => !p.byProjection);
  const head = el("div", { className: "group-head" }, el("h3", { textContent: group.title }),
    several ? el("label", {}, "Colour: ", mode) : null, legend);
  const box = el("div", { className: group.panels.length > 1 ? "panels" : "panels single" });
  place.append(el("div", { className: "group" }, head, box));
  const views = group.panels.map(p => new Heatmap(p, box));

  function draw() {
    const relative = mode.value === "relative";
    const shown = group.panels.map(p => values(p, relative));
    let low = Infinity, high = 0;
    for (const list of shown) for (const x of list) if (x > 0) { low = Math.min(low, x); high = Math.max(high, x); }
    if (!(high > 0)) low = high = 1;
    const widen = Math.max(1, Math.sqrt((LEAST_RANGE * low) / high)); // or noise would look like a difference
    [low, high] = [low / widen, high * widen];
    const axis = logAxis(low, high);
    drawLegend(legend, axis, group.panels, relative);
    views.forEach((view, i) => view.draw(shown[i], axis));
  }
  mode.addEventListener("change", draw);
  return draw;
}

function drawLegend(legend, axis, panels, relative) {
  const ramp = el("canvas", { width: 160, height: 12 }), context = ramp.getContext("2d");
  for (let x = 0; x < 160; x++) {
    context.fillStyle = `rgb(${VIRIDIS[Math.round((x / 159) * 255)].join()})`;
    context.fillRect(x, 0, 1, 12);
  }
  const times = relative ? "×" : "";
  const items = [el("span", { className: "scale" }, showError(axis.low) + times, ramp, showError(axis.high) + times)];
  const codecs = new Set();
  let kept = false;
  for (const p of panels) for (const i of p.cells) if (i >= 0) seriesOf(i).changed ? codecs.add(seriesOf(i).codec) : (kept = true);
  if (codecs.size > 1) for (const c of [...codecs].sort((a, b) => a - b)) items.push(el("span", {}, swatch(codecColor(c)), DATA.codecs[c]));
  else for (const c of codecs) items.push(el("span", { textContent: DATA.codecs[c] }));
  if (kept) items.push(el("span", {}, swatch("var(--cell-kept)"), "kept bit by bit"));
  legend.replaceChildren(...items);
}

class Heatmap {
  constructor(p, box) {
    this.p = p;
    this.codecs = new Set(Array.from(p.cells).filter(i => i >= 0 && seriesOf(i).changed).map(i => seriesOf(i).codec));
    this.band = this.codecs.size > 1 ? BAND + GAP : 0;
    this.canvas = el("canvas", { tabIndex: 0, role: "img" });
    const worst = p.cells.reduce((best, i) => (i >= 0 && (best < 0 || T.error[i] > T.error[best]) ? i : best), -1);
    this.canvas.setAttribute("aria-label",
      `Heatmap ${p.title}: ${p.rows} rows, ${p.columns} columns; the largest error is ${showError(T.error[worst])}, of ${nameOf(worst)}. The table of layers below has the numbers.`);
    this.cursor = el("div", { className: "cursor", hidden: true });
    this.plot = el("div", { className: "plot" }, this.canvas, this.cursor);
    const axes = p.byProjection ? null : el("figcaption", { textContent: `${plural(p.rows, "layer")} down, ${plural(p.columns, "expert")} across` });
    box.append(el("figure", {}, p.title ? el("h3", { textContent: p.title }) : null, this.plot, axes));
    this.x = this.y = 0;
    this.listen();
  }

  // Sizes follow the box: cells as wide as fit, at most 30 pixels (90 where a column is a projection).
  layout() {
    const { rows, columns, byProjection, xLabels, yLabels } = this.p;
    const few = Math.max(...yLabels.map(label => label.length));
    const text = Math.max(...xLabels.map(label => label.length)) * 6; // of the slanted labels, in pixels
    this.left = Math.max(22, few * 7 + 6) + this.band;
    this.head = byProjection ? Math.min(180, text * Math.sin(SLANT) + 12) : 7;
    this.foot = byProjection ? 0 : 18;
    const width = this.plot.clientWidth - this.left - (byProjection ? text * Math.cos(SLANT) - 10 : 1);
    this.width = Math.min(width, columns * (byProjection ? 90 : 30));
    this.cell = Math.max(byProjection ? 8 : 5, Math.min(24, Math.floor(340 / rows)));
    this.height = this.cell * rows;
  }

  draw(shown, axis) {
    this.layout();
    this.hide();
    const { rows, columns, yLabels } = this.p;
    const ratio = window.devicePixelRatio || 1, outer = this.plot.clientWidth, total = this.head + this.height + this.foot;
    Object.assign(this.canvas, { width: Math.round(outer * ratio), height: Math.round(total * ratio) });
    Object.assign(this.canvas.style, { width: `${outer}px`, height: `${total}px` });
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const edge = x => Math.round((this.left + (x * this.width) / columns) * ratio) / ratio;
    const edges = Array.from({ length: columns + 1 }, (_, x) => edge(x));
    context.imageSmoothingEnabled = false;
    context.drawImage(this.small(shown, axis), edges[0], this.head, edges[columns] - edges[0], this.height);
    if (this.cell >= 10 && this.width / columns >= 8) {
      context.fillStyle = themeColor("--card"); // lines between the cells
      for (let x = 1; x < columns; x++) context.fillRect(edges[x] - 1, this.head, 1, this.height);
      for (let y = 1; y < rows; y++) context.fillRect(edges[0], this.head + y * this.cell - 1, this.width, 1);
    }
    if (this.band) this.drawBand(context);
    context.fillStyle = themeColor("--soft");
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    const every = niceStep(rows, Math.ceil(13 / this.cell)), labelsEnd = this.left - 5 - this.band;
    yLabels.forEach((label, y) => {
      if (y % every === 0 || Number.isNaN(Number(label))) context.fillText(label, labelsEnd, this.head + (y + 0.5) * this.cell);
    });
    this.p.byProjection ? this.drawProjections(context, edges) : this.drawExperts(context, edges);
  }

  // The picture with a pixel for each cell.
  small(shown, axis) {
    const { rows, columns, cells } = this.p, canvas = el("canvas", { width: columns, height: rows });
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    const kept = [1, 3, 5].map(at => parseInt(themeColor("--cell-kept").slice(at, at + 2), 16));
    for (let at = 0; at < cells.length; at++) {
      if (cells[at] < 0) continue; // transparent
      const step = shown[at] > 0 ? Math.round(axis.at(shown[at]) * 255) : 0;
      image.data.set(Number.isNaN(shown[at]) ? kept : VIRIDIS[Math.max(0, Math.min(255, step))], 4 * at);
      image.data[4 * at + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // Beside each row, the codecs of its tensors, each its share of the width.
  drawBand(context) {
    const { rows, columns, cells } = this.p;
    for (let y = 0; y < rows; y++) {
      const counts = new Map();
      for (const i of cells.subarray(y * columns, (y + 1) * columns)) {
        if (i >= 0) counts.set(seriesOf(i).codec, (counts.get(seriesOf(i).codec) || 0) + 1);
      }
      const all = [...counts.values()].reduce((sum, n) => sum + n, 0);
      let x = this.left - BAND - GAP;
      for (const [codec, n] of [...counts].sort(([a], [b]) => a - b)) {
        context.fillStyle = codecColor(codec);
        context.fillRect(x, this.head + y * this.cell, (BAND * n) / all, this.cell);
        x += (BAND * n) / all;
      }
    }
  }

  drawExperts(context, edges) {
    const { columns, xLabels } = this.p;
    context.textBaseline = "top";
    context.textAlign = "center";
    const every = niceStep(columns, Math.ceil(30 / (this.width / columns)));
    for (let x = 0; x < columns; x += every) context.fillText(xLabels[x], (edges[x] + edges[x + 1]) / 2, this.head + this.height + 5);
  }

  drawProjections(context, edges) {
    context.textAlign = "left";
    context.textBaseline = "middle";
    this.p.xLabels.forEach((label, x) => {
      context.save();
      context.translate((edges[x] + edges[x + 1]) / 2, this.head - 6);
      context.rotate(-SLANT);
      context.fillText(label, 0, 0);
      context.restore();
    });
  }

  // --- pointing ---

  listen() {
    const { canvas } = this;
    const at = event => {
      const box = canvas.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left - this.left) / this.width) * this.p.columns);
      const y = Math.floor((event.clientY - box.top - this.head) / this.cell);
      if (x < 0 || y < 0 || x >= this.p.columns || y >= this.p.rows) return this.hide();
      [this.x, this.y] = [x, y];
      return this.show();
    };
    canvas.addEventListener("pointermove", event => event.pointerType === "mouse" && at(event));
    canvas.addEventListener("pointerleave", event => event.pointerType === "mouse" && this.hide());
    canvas.addEventListener("click", event => {
      event.stopPropagation();
      at(event);
    });
    canvas.addEventListener("blur", () => this.hide());
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.show());
    canvas.addEventListener("keydown", event => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") this.hide();
      if (!step) return;
      event.preventDefault();
      this.x = Math.max(0, Math.min(this.p.columns - 1, this.x + step[0]));
      this.y = Math.max(0, Math.min(this.p.rows - 1, this.y + step[1]));
      this.show();
    });
  }

  show() {
    const { columns, cells } = this.p, i = cells[this.y * columns + this.x];
    const width = this.width / columns, left = this.left + this.x * width, top = this.head + this.y * this.cell;
    this.cursor.hidden = false;
    Object.assign(this.cursor.style, { left: `${left - 2}px`, top: `${top - 2}px`, width: `${width + 4}px`, height: `${this.cell + 4}px` });
    const box = this.canvas.getBoundingClientRect();
    showTip(i, box.left + left + width / 2, box.top + top, this.cell);
  }

  hide() {
    this.cursor.hidden = true;
    hideTip();
  }
}

function niceStep(n, least) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 500, 1000].find(step => step >= least) || n;
}

const tip = byId("tip");

function showTip(i, x, y, cell) {
  const s = i >= 0 ? seriesOf(i) : null;
  const lines = s === null ? ["no tensor here"] : [
    s.changed ? `relative error ${showError(T.error[i])} (${showFixed(decibels(T.error[i]), 1)} dB), max |error| ${showError(T.largest[i])}` : "kept bit by bit",
    `${codecOf(i)}; ${showFixed(s.bits, 3)} bits per weight; ${showShape(i)}; ${showBytes(s.bytes)}`,
  ];
  tip.replaceChildren(...(s ? [el("b", {}, nameNode(i))] : []), ...lines.map(line => el("div", { textContent: line })));
  tip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = Math.max(8, Math.min(document.documentElement.clientWidth - width - 8, x - width / 2));
  const above = y - height - 12;
  Object.assign(tip.style, { left: `${left}px`, top: `${above >= 8 ? above : y + cell + 12}px` });
}

function hideTip() {
  tip.hidden = true;
}
