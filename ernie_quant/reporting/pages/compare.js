// Two results side by side: tables of totals, roles, layers and tensors. A is always the first of a pair, blue, and B orange.

const SIDES = ["A", "B"], SIDE_COLORS = ["var(--a)", "var(--b)"];
const side = n => el("span", { className: `side ${SIDES[n].toLowerCase()}`, textContent: SIDES[n] });

// A column for each side, and one for B / A.
function pairOf(head, value, show) {
  const columns = SIDES.map((name, n) => ({ head: `${head} ${name}`, number: true, value: r => value(r, n), cell: r => show(value(r, n)) }));
  return [...columns, timesOf("B / A", value)];
}

const timesOf = (head, value) => ({ head, number: true, value: r => ratio(value(r, 1), value(r, 0)), cell: r => showTimes(ratio(value(r, 1), value(r, 0))) });
const ofSide = key => (r, n) => r.of[n]?.[key] ?? null;
const showSize = n => (n === null ? NONE : showBytes(n));

function totals() {
  const [a, b] = DATA.facts, rows = [
    ["tensors on disk", f => f.bytes, showBytes], ["bits per weight", f => f.bits, x => showFixed(x, 3)],
    ["relative error, of what is quantized", f => f.error, showError], ["SQNR dB, of what is quantized", f => decibels(f.error), x => showFixed(x, 1), true],
    [`relative error, of the ${plural(DATA.both.tensors, "tensor")} that both quantized`, f => DATA.both.error[DATA.facts.indexOf(f)], showError],
    ["weights", f => f.weights, showWeights], ["tensors", f => f.tensors, showCount], ["quantized", f => f.changed, showCount],
  ];
  const cell = (f, [, value, show]) => el("td", { className: "number" }, show(value(f)));
  const lines = rows.map(row => el("tr", {}, el("td", { className: "label", textContent: row[0] }), cell(a, row), cell(b, row),
    el("td", { className: "number" }, row[3] ? NONE : showTimes(ratio(row[1](b), row[1](a))))));
  const head = name => el("th", { scope: "col", className: "plain number" }, name);
  const table = el("table", { "aria-label": "Totals" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col", className: "plain" }), head(side(0)), head(side(1)), head("B / A"))), el("tbody", {}, ...lines));
  byId("total-table").append(el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Totals" }, table));
}

function roleTable() {
  const widest = Math.max(1, ...DATA.by_role.flatMap(r => r.of.map(sums => sums?.bytes ?? 0)));
  const bar = r => el("div", {}, ...r.of.map((sums, n) => el("div", { className: "track thin", title: `${SIDES[n]}: ${showSize(sums?.bytes ?? null)}` },
    el("div", { style: { width: `${(100 * (sums?.bytes ?? 0)) / widest}%`, background: SIDE_COLORS[n] } }))));
  const size = r => Math.max(...r.of.map(sums => sums?.bytes ?? 0));
  const columns = [
    { head: "role", value: r => r.name, cell: r => r.name },
    { head: "sizes", kind: "bar", value: size, cell: bar },
    ...pairOf("size", ofSide("bytes"), showSize),
    ...pairOf("rel. error", ofSide("error"), showError),
    ...pairOf("bits", ofSide("bits"), x => showFixed(x, 3)).slice(0, 2),
    codecsColumn,
  ];
  byId("roles").append(sortedTable(columns, DATA.by_role, { sort: 1, label: "Roles" }).box);
}

const codecWords = sums => (sums ? sums.codecs.map(codec => DATA.codecs[codec]).join("; ") || KEPT : NONE);

// Once where both have the same, or a line for each.
const codecsColumn = {
  head: "codecs", kind: "words", value: r => r.of.map(codecWords).join(),
  cell: r => {
    const [a, b] = r.of.map(codecWords);
    return a === b ? a : el("span", {}, ...[a, b].map((words, n) => el("span", { className: "line" }, side(n), ` ${words}`)));
  },
};

function layersTable() {
  const columns = [
    { head: "layer", value: r => DATA.by_layer.indexOf(r), cell: r => r.name },
    ...pairOf("rel. error", ofSide("error"), showError),
    ...pairOf("worst", ofSide("worst"), showError).slice(0, 2),
    ...pairOf("size", ofSide("bytes"), showSize),
    codecsColumn,
  ];
  byId("layer-table").append(sortedTable(columns, DATA.by_layer, { sort: 0, descending: false, low: true, label: "Layers" }).box);
}

// --- tensors ---

const errorB = new Float64Array(T.n);
for (const s of DATA.series) if (s.error_b) errorB.set(s.error_b, s.first);
const errorsOf = [T.error, errorB];
const codecOn = (i, n) => (n ? seriesOf(i).codec_b : seriesOf(i).codec);
const bytesOn = (i, n) => (n ? seriesOf(i).bytes_b : seriesOf(i).bytes);
const errorOn = (i, n) => (changes(codecOn(i, n)) || errorsOf[n][i] > 0 ? errorsOf[n][i] : null);
const apart = i => errorB[i] - T.error[i];
const quantizedByBoth = i => changes(codecOn(i, 0)) && changes(codecOn(i, 1));
const agree = i => apart(i) === 0 && codecOn(i, 0) === codecOn(i, 1) && bytesOn(i, 0) === bytesOn(i, 1);

function tensorsTable() {
  const sides = (head, csv, rest) => SIDES.map((name, n) => ({ head: `${head} ${name}`, csv: `${csv}_${name.toLowerCase()}`, ...rest(n) }));
  const columns = [
    { head: "tensor", kind: "name", csv: "name", value: nameOf, cell: nameNode },
    { head: "apart by", number: true, value: i => Math.abs(apart(i)), cell: i => (apart(i) ? `${apart(i) > 0 ? "+" : "−"}${showError(Math.abs(apart(i)))}` : "0"), csv: "difference", plain: apart },
    ...sides("rel. error", "rel_error", n => ({ number: true, value: i => errorOn(i, n), cell: i => showError(errorOn(i, n)) })),
    { ...timesOf("B / A", errorOn2), csv: "ratio" },
    ...sides("codec", "codec", n => ({ kind: "words", value: i => DATA.codecs[codecOn(i, n)], cell: i => DATA.codecs[codecOn(i, n)] })),
    ...sides("size", "bytes", n => ({ number: true, value: i => bytesOn(i, n), cell: i => showBytes(bytesOn(i, n)) })),
    { head: "shape", csv: "shape", value: showShape, plain: i => seriesOf(i).shape.join("x"), cell: showShape },
    { head: "role", csv: "role", value: roleOf, cell: roleOf },
  ];
  const all = Array.from({ length: T.n }, (_, i) => i);
  byId("alike").checked = all.every(agree);
  byId("both").parentElement.hidden = !all.some(i => changes(codecOn(i, 0)) !== changes(codecOn(i, 1)));
  const words = i => `${nameOf(i)} ${roleOf(i)} ${DATA.codecs[codecOn(i, 0)]} ${DATA.codecs[codecOn(i, 1)]}`.toLowerCase();
  const file = DATA.facts.map(f => f.name).join("-against-");
  filteredTable(columns, "tensor-table", { all, sort: 1, words, file, boxes: [["alike", (i, on) => on || !agree(i)], ["both", (i, on) => !on || quantizedByBoth(i)]] });
}

const errorOn2 = (i, n) => errorsOf[n][i];

function onlyOne() {
  byId("alone").hidden = DATA.only.every(list => list.length === 0);
  DATA.only.forEach((list, n) => {
    const rows = list.flatMap(s => Array.from({ length: s.n }, (_, k) => ({ s, name: nameIn(s, k) })));
    const columns = [
      { head: "tensor", kind: "name", value: r => r.name, cell: r => el("span", {}, ...r.name.split(/(?<=\.)/).flatMap(part => [part, el("wbr")])) },
      { head: "codec", value: r => DATA.codecs[r.s.codec], cell: r => DATA.codecs[r.s.codec] },
      { head: "shape", value: r => r.s.shape.join(" × "), cell: r => r.s.shape.join(" × ") },
      { head: "size", number: true, value: r => r.s.bytes, cell: r => showBytes(r.s.bytes) },
    ];
    const title = el("h3", {}, side(n), ` only in ${DATA.facts[n].name}: ${plural(rows.length, "tensor")}`);
    const most = 1000, more = rows.length > most ? el("p", { className: "hint", textContent: `The first ${showCount(most)} of the order chosen are shown.` }) : null;
    const table = rows.length ? sortedTable(columns, rows, { sort: 0, descending: false, low: true, pageSize: most, label: `Only in ${SIDES[n]}` }).box : null;
    byId("only").append(el("div", {}, title, ...[more, table].filter(Boolean)));
  });
}
