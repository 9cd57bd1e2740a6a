// An allocation: the curve of KL over bytes, what an error costs by layer, and the groups that were chosen.

const BOX = { height: 300, left: 62, right: 16, top: 12, bottom: 28 };
const axes = (width, x, y) => ({
  x: value => BOX.left + x.at(value) * (width - BOX.left - BOX.right),
  y: value => BOX.top + (1 - y.at(value)) * (BOX.height - BOX.top - BOX.bottom),
});

function frame(width, x, y, label, xTicks, showX) {
  const svg = svgEl("svg", { width, height: BOX.height, role: "img", "aria-label": label }), at = axes(width, x, y);
  const write = (content, attributes) => {
    const node = svgEl("text", attributes);
    node.textContent = content;
    svg.append(node);
  };
  for (const mark of ticks(y.low, y.high)) {
    svg.append(svgEl("line", { class: "grid", x1: BOX.left, x2: width - BOX.right, y1: at.y(mark), y2: at.y(mark) }));
    write(showTick(mark), { x: BOX.left - 8, y: at.y(mark) + 4, "text-anchor": "end" });
  }
  for (const mark of xTicks) write(showX(mark), { x: at.x(mark), y: BOX.height - 8, "text-anchor": "middle" });
  return { svg, at };
}

// Five bytes on a logarithmic axis, whatever their digits.
const evenly = (low, high) => Array.from({ length: 5 }, (_, i) => low * (high / low) ** ((i + 0.5) / 5));

function titled(node, text) {
  const title = svgEl("title", {});
  title.textContent = text;
  node.append(title);
  return node;
}

const path = (points, kind) => svgEl("path", { class: `curve ${kind}`, d: points.map(([x, y], i) => `${i ? "L" : "M"}${x} ${y}`).join("") });
const disc = (x, y, r, kind) => svgEl("circle", { class: `dot ${kind}`, cx: x, cy: y, r });
const square = (x, y) => svgEl("rect", { class: "dot b", x: x - 4, y: y - 4, width: 8, height: 8 });
const said = row => `${row.name}: ${showBytes(row.bytes)}, ${showError(row.kl)} nats`;

function drawCurve(width) {
  const positive = rows => rows.filter(row => row.kl > 0);
  const all = positive([...DATA.curve, ...DATA.rows]);
  const x = logAxis(Math.min(...all.map(r => r.bytes)) / 1.03, Math.max(...all.map(r => r.bytes)) * 1.03);
  const y = logAxis(Math.min(...all.map(r => r.kl)) / 1.3, Math.max(...all.map(r => r.kl)) * 1.3);
  const { svg, at } = frame(width, x, y, "KL divergence in nats per token over bytes; the table below has the numbers.", evenly(x.low, x.high), showBytes);
  svg.append(path(positive(DATA.curve).map(row => [at.x(row.bytes), at.y(row.kl)]), "a"));
  for (const row of positive(DATA.rows)) {
    const place = [at.x(row.bytes), at.y(row.kl)];
    svg.append(titled(row.kind === "uniform" ? square(...place) : disc(...place, row.kind === "chosen" ? 6 : 4, "a"), said(row)));
  }
  return svg;
}

function drawLayers(width) {
  const sides = ["attention", "ffn"].map(place => DATA.gains.filter(gain => gain.place === place && gain.kl > 0));
  const all = sides.flat();
  if (!all.length) return el("p", { textContent: "No layer had a choice." });
  const last = Math.max(...all.map(gain => gain.layer)), linear = { low: 0, high: last, at: layer => (layer + 0.5) / (last + 1) };
  const y = logAxis(Math.min(...all.map(g => g.kl)) / 1.3, Math.max(...all.map(g => g.kl)) * 1.3);
  const step = [1, 2, 5, 10, 20, 50].find(n => ((last + 1) / n) * 34 < width) ?? 100;
  const marks = Array.from({ length: Math.floor(last / step) + 1 }, (_, i) => i * step);
  const { svg, at } = frame(width, linear, y, "What an error costs by layer.", marks, String);
  sides.forEach((list, n) => {
    if (list.length) svg.append(path(list.map(gain => [at.x(gain.layer), at.y(gain.kl)]), n ? "b" : "a"));
    for (const gain of list) {
      const place = [at.x(gain.layer), at.y(gain.kl)];
      svg.append(titled(n ? square(...place) : disc(...place, 3, "a"), `${gain.place} of layer ${gain.layer}: ${showError(gain.kl)} nats`));
    }
  });
  return svg;
}

const column = (head, value, shown, number = true) => ({ head, value, cell: row => shown(value(row)), number });

function all() {
  document.title = `${DATA.name}: ernie-quant allocation`;
  byId("name").textContent = DATA.name;
  byId("made").textContent = DATA.made;
  byId("notes").hidden = DATA.notes.length === 0;
  byId("notes").append(...DATA.notes.map(text => el("li", { textContent: text })));
  byId("footer").textContent = DATA.footer;
  const places = [[byId("curve"), drawCurve], [byId("layers"), drawLayers]].map(([place, draw]) => {
    const box = el("div", { className: "chart" });
    place.append(box);
    return () => box.replaceChildren(draw(box.clientWidth));
  });
  const redraw = () => places.forEach(draw => draw());
  redraw();
  byId("curve-table").append(sortedTable(
    [column("result", row => row.name, String, false), column("bytes", row => row.bytes, showBytes), column("KL", row => row.kl, showError)],
    DATA.rows, { sort: 1, descending: false, label: "Results" }).box);
  byId("groups").append(sortedTable(
    [column("weights", row => row.weights, String, false), column("layers", row => row.layers, String, false), column("codec", row => row.codec, String, false),
      column("bytes", row => row.bytes, showBytes), column("predicted KL", row => row.kl, showError)],
    DATA.groups, { sort: 3, label: "Groups of weights" }).box);
  onThemeAndWidth(redraw);
  document.documentElement.dataset.ready = "yes";
}

all();
