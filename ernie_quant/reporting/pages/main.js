// What is written once, and the order in which all is drawn.

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
    fact("Bits per weight", showFixed(f.bits, 2), `${showWeights(f.weights)} weights`),
    fact("Relative error", showError(f.error), f.error > 0 ? `${showFixed(decibels(f.error), 1)} dB, of what is quantized` : "every weight keeps its bits"),
    fact("Quantized", showCount(f.changed), `of ${plural(f.tensors, "tensor")}`),
  );
  byId("notes").hidden = f.notes.length === 0;
  byId("notes").append(...f.notes.map(note => el("li", { textContent: note })));
  byId("recipe").append(howItWasMade(f));
  byId("footer").textContent = `Made by ernie-quant ${f.version} from report.json.`;
}

function everythingElse() {
  const drawHeatmaps = heatmaps();
  drawHeatmaps();
  codecTable();
  histograms();
  layerTable();
  tensorTable();
  onThemeAndWidth(drawHeatmaps);
  document.documentElement.dataset.ready = "yes";
}

header();
bytesByRole();
requestAnimationFrame(() => setTimeout(everythingElse)); // when the first screen is painted
document.addEventListener("click", hideTip);
document.addEventListener("scroll", hideTip, { passive: true, capture: true });
