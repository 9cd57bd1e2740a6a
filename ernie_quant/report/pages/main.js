// What is written once, the theme, and the order in which all is drawn.

function header() {
  const f = DATA.facts;
  document.title = `${f.name}: ernie-quant report`;
  byId("name").textContent = f.name;
  const source = f.source + (f.revision ? ` at ${f.revision}` : "");
  byId("made").textContent = [source && `from ${source}`, f.recipe && `recipe ${f.recipe}`, f.runtime && `for ${f.runtime}`].filter(Boolean).join(" · ");
  const fact = (name, value, below) => el("div", {}, el("dt", { textContent: name }), el("dd", {}, value, el("small", { textContent: below })));
  const shrunk = f.source_bytes > 0 ? `from ${showBytes(f.source_bytes)}` : "";
  byId("facts").append(
    fact("Tensors on disk", showBytes(f.bytes), shrunk),
    fact("Bits per weight", showFixed(f.bits, 2), `${weights(f.weights)} weights`),
    fact("Relative error", showError(f.error), f.error > 0 ? `${showFixed(decibels(f.error), 1)} dB, of what is quantized` : "every weight keeps its bits"),
    fact("Quantized", showCount(f.changed), `of ${plural(f.tensors, "tensor")}`),
  );
  byId("notes").hidden = f.notes.length === 0;
  byId("notes").append(...f.notes.map(note => el("li", { textContent: note })));
  const rules = f.rules.map(([what, codec]) => `${what}: ${codec}`).join("; ");
  byId("footer").textContent = `${rules ? `Rules: ${rules}. ` : ""}Made by ernie-quant ${f.version} from report.json.`;
}

function weights(n) {
  const [unit, name] = n >= 1e9 ? [1e9, " billion"] : n >= 1e6 ? [1e6, " million"] : [1, ""];
  return unit === 1 ? showCount(n) : (n / unit).toPrecision(3) + name;
}

function theme(redraw) {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  });
  dark.addEventListener("change", redraw);
}

function everythingElse() {
  const drawHeatmaps = heatmaps();
  drawHeatmaps();
  histograms();
  layerTable();
  tensorTable();
  theme(drawHeatmaps);
  let drawnWidth = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== drawnWidth) drawHeatmaps(); // not when a phone's address bar slides away
    drawnWidth = window.innerWidth;
  });
  document.documentElement.dataset.ready = "yes";
}

header();
bytesByRole();
requestAnimationFrame(() => setTimeout(everythingElse)); // when the first screen is painted
document.addEventListener("click", hideTip);
document.addEventListener("scroll", hideTip, { passive: true, capture: true });
