// The order in which two results are drawn side by side.

function headerOfTwo() {
  const [a, b] = DATA.facts;
  document.title = `${a.name} against ${b.name}: ernie-quant report`;
  byId("name").append(side(0), ` ${a.name} `, el("small", { textContent: "against " }), side(1), ` ${b.name}`);
  const of = text => DATA.facts.flatMap((f, n) => (f.notes.includes(text) ? [n] : []));
  const texts = new Set([...a.notes, ...b.notes]), notes = [...DATA.warnings.map(text => [[], text]), ...[...texts].map(text => [of(text), text])];
  byId("notes").hidden = notes.length === 0;
  byId("notes").append(...notes.map(([sides, text]) => el("li", {}, ...sides.flatMap(n => [side(n), " "]), sides.length ? text : el("b", { textContent: text }))));
  byId("footer").textContent = `Made by ernie-quant from report.json of both; A by version ${a.version || NONE}, B by ${b.version || NONE}.`;
}

function allOfTwo() {
  const drawCurvesAgain = curves();
  drawCurvesAgain();
  roleTable();
  layersTable();
  tensorsTable();
  onlyOne();
  byId("recipes").append(...DATA.facts.map((f, n) => el("div", {}, el("h3", {}, side(n), ` ${f.name}`), howItWasMade(f))));
  onThemeAndWidth(drawCurvesAgain);
  document.documentElement.dataset.ready = "yes";
}

headerOfTwo();
totals();
requestAnimationFrame(() => setTimeout(allOfTwo)); // when the first screen is painted
