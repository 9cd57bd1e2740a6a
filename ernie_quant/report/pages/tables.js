// A table that is sorted by its heads. Columns: {head, value(row), cell(row), number, kind}; `rows` are anything.

function sortedTable(columns, rows, { sort, descending = true, low = false, pageSize = Infinity, label, onRender = () => {} }) {
  const state = { rows, sort, descending, shown: pageSize };
  const heads = columns.map((column, i) => {
    const button = el("button", { type: "button", textContent: column.head });
    button.addEventListener("click", () => {
      state.descending = state.sort === i ? !state.descending : Boolean(column.number || column.kind === "bar");
      state.sort = i;
      state.shown = pageSize;
      render();
    });
    return el("th", { scope: "col", className: column.number ? "number" : "" }, button);
  });
  const body = el("tbody");
  const table = el("table", { "aria-label": label }, el("thead", {}, el("tr", {}, ...heads)), body);
  const box = el("div", { className: low ? "scroll low" : "scroll", tabIndex: 0, role: "region", "aria-label": label }, table);
  let ordered = [];

  function order() {
    const { value } = columns[state.sort], sign = state.descending ? -1 : 1;
    const keyed = state.rows.map((row, i) => [value(row), i, row]);
    keyed.sort(([a, i], [b, j]) => {
      if (a === b) return i - j;
      if (a === null || b === null) return a === null ? 1 : -1; // what has no value comes last, either way
      return sign * (typeof a === "string" ? compareNames(a, b) : a - b);
    });
    ordered = keyed.map(([, , row]) => row);
  }

  function line(row) {
    const cells = columns.map(column => {
      const className = [column.number && "number", column.kind].filter(Boolean).join(" ");
      return el("td", { className }, column.cell(row));
    });
    return el("tr", {}, ...cells);
  }

  function render() {
    order();
    heads.forEach((head, i) => {
      if (i === state.sort) head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    body.replaceChildren(...ordered.slice(0, state.shown).map(line));
    onRender(ordered.length, Math.min(state.shown, ordered.length));
  }

  render();
  return {
    box,
    setRows(next) {
      state.rows = next;
      state.shown = pageSize;
      render();
    },
    showMore() {
      const from = state.shown;
      state.shown += pageSize;
      body.append(...ordered.slice(from, state.shown).map(line));
      onRender(ordered.length, Math.min(state.shown, ordered.length));
    },
  };
}

const compareNames = new Intl.Collator("en", { numeric: true }).compare;

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

function tensorTable() {
  const columns = [
    { head: "tensor", kind: "name", value: nameOf, cell: nameNode },
    { head: "rel. error", number: true, value: i => T.error[i], cell: i => (seriesOf(i).changed ? showError(T.error[i]) : NONE) },
    { head: "SQNR dB", number: true, value: i => decibels(T.error[i]), cell: i => showFixed(decibels(T.error[i]), 1) },
    { head: "max |error|", number: true, value: i => T.largest[i], cell: i => (seriesOf(i).changed ? showError(T.largest[i]) : NONE) },
    { head: "codec", value: codecOf, cell: i => el("span", {}, swatch(codecColor(seriesOf(i).codec)), codecOf(i)) },
    { head: "bits/weight", number: true, value: i => seriesOf(i).bits, cell: i => showFixed(seriesOf(i).bits, 3) },
    { head: "size", number: true, value: i => seriesOf(i).bytes, cell: i => showBytes(seriesOf(i).bytes) },
    { head: "shape", value: i => showShape(i), cell: i => showShape(i) },
    { head: "role", value: roleOf, cell: roleOf },
  ];
  const all = Array.from({ length: T.n }, (_, i) => i), more = byId("more"), matches = byId("matches");
  const changed = all.filter(i => seriesOf(i).changed);
  byId("kept").checked = changed.length === 0;

  const chosen = () => {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const from = byId("kept").checked ? all : changed;
    return words.length ? from.filter(i => words.every(word => haystack(i).includes(word))) : from;
  };
  const table = sortedTable(columns, chosen(), {
    sort: 1, pageSize: 100, low: true, label: "Tensors",
    onRender(found, shown) {
      matches.textContent = found > shown ? `${showCount(shown)} of ${plural(found, "tensor")}` : plural(found, "tensor");
      more.hidden = shown === found;
      more.textContent = `Show ${showCount(Math.min(100, found - shown))} more`;
    },
  });
  more.addEventListener("click", table.showMore);
  byId("filter").addEventListener("input", () => table.setRows(chosen()));
  byId("kept").addEventListener("change", () => table.setRows(chosen()));
  byId("tensor-table").append(table.box);
}

const haystacks = new Array(T.n);

function haystack(i) {
  haystacks[i] ??= `${nameOf(i)} ${roleOf(i)} ${codecOf(i)}`.toLowerCase();
  return haystacks[i];
}

const showShape = i => seriesOf(i).shape.join(" × ");
