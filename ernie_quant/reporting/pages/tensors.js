// The tables of layers and of tensors.

const errorColumns = [
  { head: "rel. error", number: true, value: r => r.error, cell: r => showError(r.error) },
  { head: "worst", number: true, value: r => r.worst, cell: r => showError(r.worst) },
];
const sizeColumns = [
  { head: "tensors", number: true, value: r => r.tensors, cell: r => showCount(r.tensors) },
  { head: "size", number: true, value: r => r.bytes, cell: r => showBytes(r.bytes) },
  { head: "bits/weight", number: true, value: r => r.bits, cell: r => showFixed(r.bits, 3) },
];

function layerTable() {
  const columns = [
    { head: "layer", value: r => DATA.by_layer.indexOf(r), cell: r => r.name },
    ...sizeColumns,
    ...errorColumns,
    { head: "codecs", value: r => r.codecs.map(c => DATA.codecs[c]).join(), cell: r => codecChips(r.codecs) },
  ];
  const options = { sort: 0, descending: false, low: true, label: "Layers" };
  byId("layer-table").append(sortedTable(columns, DATA.by_layer, options).box);
}

// A sign and a word: `▲ high`.
function badge(mark) {
  return el("span", { className: "badge", textContent: `${SIGN[mark]} ${OUTLIER[mark]}` });
}

const lossy = (i, value) => (seriesOf(i).changed || T.error[i] > 0 ? value : null);

// of tensors: how far from the others of its codec, and from what Gaussian weights lose
const comparedColumns = [
  { head: `${TIMES} median`, number: true, csv: "times_median", value: timesMedian,
    cell: i => el("span", {}, outlier(i) ? badge(outlier(i)) : null, ` ${showTimes(timesMedian(i))}`) },
  { csv: "outlier", plain: i => OUTLIER[outlier(i)] },
  { csv: "gaussian_error", plain: i => seriesOf(i).expected ?? null },
  { head: `${TIMES} Gaussian`, number: true, csv: "times_gaussian", value: timesGaussian, cell: i => showTimes(timesGaussian(i)) },
];

function tensorTable() {
  const columns = [
    { head: "tensor", kind: "name", csv: "name", value: nameOf, cell: nameNode },
    { head: "rel. error", number: true, csv: "rel_error", value: i => T.error[i], cell: i => showError(lossy(i, T.error[i])) },
    ...comparedColumns,
    { head: "SQNR dB", number: true, csv: "sqnr_db", value: i => decibels(T.error[i]), cell: i => showFixed(decibels(T.error[i]), 1) },
    { head: "max |error|", number: true, csv: "max_abs_error", value: i => T.largest[i], cell: i => showError(lossy(i, T.largest[i])) },
    { head: "codec", csv: "codec", value: codecOf, cell: i => codecChip(seriesOf(i).codec) },
    { head: "bits/weight", number: true, csv: "bits_per_weight", value: i => seriesOf(i).bits, cell: i => showFixed(seriesOf(i).bits, 3) },
    { head: "size", number: true, csv: "bytes", value: i => seriesOf(i).bytes, cell: i => showBytes(seriesOf(i).bytes) },
    { head: "shape", csv: "shape", value: showShape, plain: i => seriesOf(i).shape.join("x"), cell: showShape },
    { head: "role", csv: "role", value: roleOf, cell: roleOf },
  ];
  const all = Array.from({ length: T.n }, (_, i) => i), outliers = all.reduce((n, i) => n + Math.abs(outlier(i)), 0);
  byId("kept").checked = !all.some(i => seriesOf(i).changed);
  byId("outliers").parentElement.hidden = outliers === 0;
  byId("outliers").parentElement.append(` outliers only (${showCount(outliers)})`);
  filteredTable(columns, "tensor-table", {
    all, sort: 1, words: haystack, file: DATA.facts.name,
    boxes: [["kept", (i, on) => on || seriesOf(i).changed], ["outliers", (i, on) => !on || outlier(i) !== 0]],
  });
}

const haystacks = new Array(T.n);

function haystack(i) {
  haystacks[i] ??= `${nameOf(i)} ${roleOf(i)} ${codecOf(i)} ${outlier(i) ? "outlier" : ""}`.toLowerCase();
  return haystacks[i];
}
