// Error by layer: a line for each result, A with dots and B, dashed, with hollow squares.

const CHART = { height: 240, left: 58, right: 14, top: 12, bottom: 26 };

function curves() {
  const numbered = DATA.by_layer.filter(line => /^layer \d+$/.test(line.name)).map(line => ({ layer: Number(line.name.slice(6)), of: line.of }));
  const points = SIDES.map((_, n) => numbered.filter(line => line.of[n]?.error > 0).map(line => [line.layer, line.of[n].error]));
  const errors = points.flat().map(([, error]) => error), layers = points.flat().map(([layer]) => layer);
  if (!errors.length) return () => {};
  const place = byId("curves"), legend = el("div", { className: "legend" }, ...SIDES.map((_, n) => el("span", {}, side(n), ` ${DATA.facts[n].name}`)));
  const box = el("div", { className: "chart" });
  place.append(legend, box);
  const axis = logAxis(Math.min(...errors) / 1.15, Math.max(...errors) * 1.15), ends = [Math.min(...layers), Math.max(...layers)];
  return () => box.replaceChildren(drawCurves(points, axis, ends, box.clientWidth));
}

function drawCurves(points, axis, [first, last], width) {
  const { height, left, right, top, bottom } = CHART;
  const x = layer => left + ((layer - first + 0.5) / (last - first + 1)) * (width - left - right), y = error => top + (1 - axis.at(error)) * (height - top - bottom);
  const svg = svgEl("svg", { width, height, role: "img", "aria-label": "Relative error by layer, of A and of B; the table below has the numbers." });
  const text = (content, attributes) => {
    const node = svgEl("text", attributes);
    node.textContent = content;
    svg.append(node);
  };
  for (const mark of ticks(axis.low, axis.high)) {
    svg.append(svgEl("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }));
    text(showTick(mark), { x: left - 8, y: y(mark) + 4, "text-anchor": "end" });
  }
  const step = [1, 2, 5, 10, 20, 50, 100, 1000].find(n => ((last - first + 1) / n) * 34 < width) ?? 10000;
  for (let layer = Math.ceil(first / step) * step; layer <= last; layer += step) text(layer, { x: x(layer), y: height - 8, "text-anchor": "middle" });
  points.forEach((list, n) => {
    if (!list.length) return;
    const kind = SIDES[n].toLowerCase();
    svg.append(svgEl("path", { class: `curve ${kind}`, d: list.map(([layer, error], i) => `${i ? "L" : "M"}${x(layer)} ${y(error)}`).join("") }));
    for (const [layer, error] of list) {
      const dot = n ? svgEl("rect", { class: `dot ${kind}`, x: x(layer) - 4, y: y(error) - 4, width: 8, height: 8 }) : svgEl("circle", { class: `dot ${kind}`, cx: x(layer), cy: y(error), r: 3 });
      const title = svgEl("title", {});
      title.textContent = `${SIDES[n]}, layer ${layer}: ${showError(error)}`;
      dot.append(title);
      svg.append(dot);
    }
  });
  return svg;
}
