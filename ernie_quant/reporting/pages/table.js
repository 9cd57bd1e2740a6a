// A table that is sorted by its heads, and saved as CSV. Columns: {head, value(row), cell(row), number, kind, csv, plain(row)};
// `rows` are anything. A column with a name `csv` stands in the file, with `plain` of a row, or its `value`.

function sortedTable(columns, rows, { sort, descending = true, low = false, pageSize = Infinity, label, onRender = () => {} }) {
  const shown = columns.filter(column => column.head);
  const state = { rows, sort, descending, shown: pageSize };
  const heads = shown.map((column, i) => {
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
    const { value } = shown[state.sort], sign = state.descending ? -1 : 1;
    const keyed = state.rows.map((row, i) => [value(row), i, row]);
    keyed.sort(([a, i], [b, j]) => {
      if (a === b) return i - j;
      if (a === null || b === null) return a === null ? 1 : -1; // what has no value comes last, either way
      return sign * (typeof a === "string" ? compareNames(a, b) : a - b);
    });
    ordered = keyed.map(([, , row]) => row);
  }

  function line(row) {
    const cells = shown.map(column => {
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
    csv: () => csvOf(columns.filter(column => column.csv), ordered),
  };
}

const compareNames = new Intl.Collator("en", { numeric: true }).compare;

// The table of tensors: by the hundred, filtered by words and by `boxes` [id, keep(row)], and saved as it stands.
function filteredTable(columns, place, { all, words, boxes, file, sort }) {
  const more = byId("more"), matches = byId("matches"), save = byId("save"), filter = byId("filter");
  const chosen = () => {
    const asked = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = boxes.reduce((rows, [id, keep]) => rows.filter(row => keep(row, byId(id).checked)), all);
    return asked.length ? kept.filter(row => asked.every(word => words(row).includes(word))) : kept;
  };
  const table = sortedTable(columns, chosen(), {
    sort, pageSize: 100, low: true, label: "Tensors",
    onRender(found, shown) {
      matches.textContent = found > shown ? `${showCount(shown)} of ${plural(found, "tensor")}` : plural(found, "tensor");
      more.hidden = shown === found;
      more.textContent = `Show ${showCount(Math.min(100, found - shown))} more`;
      save.textContent = `Save ${plural(found, "row")} as CSV`;
    },
  });
  more.addEventListener("click", table.showMore);
  save.addEventListener("click", () => download(table.csv(), file));
  filter.addEventListener("input", () => table.setRows(chosen()));
  for (const [id] of boxes) byId(id).addEventListener("change", () => table.setRows(chosen()));
  byId(place).append(table.box);
}

// --- CSV, as `report --csv` writes it: RFC 4180, text in quotes, and an apostrophe before what a spreadsheet would run ---

const FORMULA = /(^|[,;|])(?=[\s"']*[=+\-@＝＋－＠])/g;

function csvCell(value) {
  if (value === null || value === undefined || value === "" || Number.isNaN(value)) return "";
  return typeof value === "number" ? String(value) : `"${value.replace(FORMULA, "$1'").replaceAll('"', '""')}"`;
}

function csvOf(columns, rows) {
  const lines = [columns.map(column => column.csv), ...rows.map(row => columns.map(column => (column.plain ?? column.value)(row)))];
  return lines.map(line => `${line.map(csvCell).join(",")}\r\n`).join("");
}

function download(text, name) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  el("a", { href: url, download: `${name.replace(/[^\w.-]+/g, "_").slice(0, 80)}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
