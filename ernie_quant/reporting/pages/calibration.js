// What text adds to the page of a calibrated result. It stands before main.js, and pages of other results have none of it:
// functions of the files before it are taken and given back with more in them.

const CALIBRATION = DATA.calibration;
const outputs = new Float64Array(T.n).fill(NaN), tokensSeen = new Float64Array(T.n).fill(NaN);
for (const s of DATA.series) {
  if (s.output) s.output.forEach((x, k) => (outputs[s.first + k] = x === null ? NaN : x));
  for (let k = 0; k < s.n; k++) tokensSeen[s.first + k] = (Array.isArray(s.tokens) ? s.tokens[k] : s.tokens) ?? NaN; // or one for all
}
const orNull = x => (Number.isNaN(x) ? null : x);

// tokens of the text that an expert was given, whichever of its projections `i` is
function tokensOfExpert(i) {
  const s = seriesOf(i);
  if (s.expert === undefined || s.block !== "layer" || DATA.roles[s.role] !== "experts") return null;
  const counts = CALIBRATION.experts[s.ids[s.layer][T.at[i]]];
  return counts ? counts[s.ids[s.expert][T.at[i]]] ?? null : null;
}

// --- tables ---

errorColumns.push({ head: "output error", number: true, value: r => r.output ?? null, cell: r => showError(r.output ?? null) });

const plainTable = sortedTable;
sortedTable = (columns, rows, options) => {
  const after = columns.findIndex(column => column.head === "max |error|") + 1;
  if (options.label === "Tensors") columns = [
    ...columns.slice(0, after),
    { head: "output error", number: true, csv: "output_error", value: i => orNull(outputs[i]), cell: i => showError(orNull(outputs[i])) },
    ...columns.slice(after),
    { head: "tokens", number: true, csv: "calibration_tokens", value: i => orNull(tokensSeen[i]), cell: i => (Number.isNaN(tokensSeen[i]) ? NONE : showCount(tokensSeen[i])) },
    { csv: "fitted", plain: i => (seriesOf(i).fitted ? "yes" : "") },
  ];
  if (options.label === "Layers") columns = [
    ...columns.slice(0, -1),
    { head: "drift", number: true, value: r => r.drift ?? null, cell: r => showError(r.drift ?? null) },
    ...columns.slice(-1),
  ];
  return plainTable(columns, rows, options);
};

// --- heatmaps: of weights or of outputs ---

KINDS.output = outputs;

const plainHeatmaps = heatmaps;
heatmaps = () => {
  const choice = el("select", { id: "error-of" }, el("option", { value: "", textContent: "weights" }),
    el("option", { value: "outputs", textContent: "outputs, on tokens to judge by" }));
  const hint = el("span", { className: "hint", hidden: true, textContent: "Grey: kept, or not reached by the text." });
  byId("heatmaps").append(el("div", { className: "controls" }, el("label", {}, "Errors of: ", choice), hint));
  const draw = plainHeatmaps();
  choice.addEventListener("change", () => {
    kind = choice.value ? "output" : "error";
    hint.hidden = kind === "error";
    draw();
  });
  return draw;
};

const plainTip = showTip;
showTip = (i, x, y, cell) => {
  plainTip(i, x, y, cell);
  if (i < 0) return;
  const given = tokensOfExpert(i);
  if (!Number.isNaN(outputs[i])) tip.append(el("div", { textContent: `output error ${showError(outputs[i])}, fitted to ${plural(tokensSeen[i], "token")}` }));
  if (given !== null) tip.append(el("div", { textContent: `expert given ${plural(given, "token")} of the text` }));
  const above = y - tip.offsetHeight - 12;
  tip.style.top = `${above >= 8 ? above : y + cell + 12}px`;
};

// --- a section of its own ---

const plainLayers = layerTable;
layerTable = () => {
  plainLayers();
  const c = CALIBRATION, seen = [];
  for (const [layer, counts] of Object.entries(c.experts)) counts.forEach((n, expert) => seen.push({ layer: Number(layer), expert, n }));
  const words = [`${c.name}: ${plural(c.tokens, "token")} to fit to, ${showCount(c.judging)} to judge by`, c.method && `method ${c.method}`, c.fit && "o_proj and shared down_proj fitted too"];
  const section = el("section", { id: "calibration" }, el("h2", { textContent: "Calibration" }),
    el("p", { className: "hint", textContent: `${words.filter(Boolean).join("; ")}. Drift: energy of what differs between the hidden states of this model and of its source, in parts of theirs. Output error: the part of its output's energy that a weight's rounding costs; means count each weight matrix by its size.` }));
  byId("layers").before(section);
  if (c.drift.length) {
    const most = Math.max(1e-30, ...c.drift.map(([, x]) => x));
    const bar = ([layer, x]) => el("div", { className: "track", title: `layer ${layer}: ${showError(x)}` }, el("div", { style: { width: `${(100 * x) / most}%`, background: PALETTE[0] } }));
    section.append(el("h3", { textContent: "Drift after each layer" }), sortedTable([
      { head: "layer", number: true, value: r => r[0], cell: r => String(r[0]) },
      { head: "drift", number: true, value: r => r[1], cell: r => showError(r[1]) },
      { head: "of the largest", kind: "bar", value: r => r[1], cell: bar },
    ], c.drift, { sort: 0, descending: false, low: true, label: "Drift" }).box);
  }
  if (seen.length) section.append(el("h3", { textContent: "Experts with the fewest tokens" }), sortedTable([
    { head: "layer", number: true, value: r => r.layer, cell: r => String(r.layer) },
    { head: "expert", number: true, value: r => r.expert, cell: r => String(r.expert) },
    { head: "tokens", number: true, value: r => r.n, cell: r => showCount(r.n) },
  ], seen, { sort: 2, descending: false, low: true, pageSize: 100, label: "Experts" }).box);
};
