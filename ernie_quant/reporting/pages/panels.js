// Where tensors lie: layer by expert for each projection, and layer by projection for all other linears.

const MOST_CELLS = 2e6;

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
