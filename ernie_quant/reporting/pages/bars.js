// Where the bytes are: one bar of all roles, and a table with a bar of each. A width is its share of the bytes and nothing else:
// no padding, border or gap takes part, so that what is small may not be seen.

const BF16_BYTES = 2;

function bytesByRole() {
  const rows = DATA.by_role.map((sums, i) => ({ ...sums, name: DATA.roles[i] })).sort((a, b) => b.bytes - a.bytes);
  const all = rows.reduce((sum, r) => sum + r.bytes, 0) || 1;
  const widest = Math.max(1, ...rows.map(r => Math.max(r.bytes, r.weights * BF16_BYTES)));
  rows.forEach((row, i) => (row.color = ROLE_COLORS[i % ROLE_COLORS.length]));

  const parts = rows.filter(row => row.bytes).map(row => {
    const share = row.bytes / all, percent = `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
    return el("div", { title: `${row.name}: ${showBytes(row.bytes)}, ${percent}`, style: { width: `${100 * share}%`, background: row.color } },
      el("span", { textContent: `${row.name} ${percent}` }));
  });
  byId("whole").append(...parts);
  parts.filter(part => part.scrollWidth > part.clientWidth).forEach(part => part.replaceChildren()); // the table says it

  const percent = n => `${(100 * n) / widest}%`;
  const bar = row => el("div", { className: "track", title: `${showBytes(row.bytes)}; in bf16 ${showBytes(row.weights * BF16_BYTES)}` },
    el("div", { className: "before", style: { width: percent(row.weights * BF16_BYTES) } }),
    el("div", { style: { width: percent(row.bytes), background: row.color } }));
  const [tensors, size, bits] = sizeColumns;
  const columns = [
    { head: "role", value: r => r.name, cell: r => el("span", {}, swatch(r.color), r.name) },
    size,
    { head: "of bf16", kind: "bar", value: r => r.bytes, cell: bar },
    bits,
    tensors,
    { head: "quantized", number: true, value: r => r.changed, cell: r => (r.changed ? showCount(r.changed) : NONE) },
    ...errorColumns,
  ];
  byId("roles").append(sortedTable(columns, rows, { sort: 1, label: "Roles" }).box);
}
