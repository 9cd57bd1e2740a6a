// Errors of each codec beside what is expected of it, and how many of its tensors are outliers.

function codecTable() {
  const rows = DATA.codecs.map((_, codec) => ofCodec(codec)).filter(row => row !== null);
  if (!rows.length) {
    byId("by-codec").hidden = true;
    return;
  }
  const number = (head, value, show = showError) => ({ head, number: true, value, cell: r => show(value(r)) });
  const columns = [
    { head: "codec", kind: "words", value: r => r.codec, cell: r => codecChip(r.codec) },
    number("tensors", r => r.tensors, showCount),
    { head: "expected", number: true, value: r => r.expected[0] ?? null, cell: r => showRange(r.expected) },
    number("median here", r => r.median),
    number(`${TIMES} expected`, r => r.times, showTimes),
    { head: "least to largest", number: true, value: r => r.largest, cell: r => showRange([r.least, r.largest]) },
    { head: "usual", number: true, value: r => r.high, cell: r => (r.low === null ? (r.fitted ? "most are meant to differ" : "too few to say") : showRange([r.low, r.high])) },
    { head: "outliers", value: r => r.above + r.below, cell: outlierCell },
  ];
  byId("codec-table").append(sortedTable(columns, rows, { sort: 0, descending: false, label: "Codecs" }).box);
  byId("by-text").hidden = !rows.some(r => r.expected.length === 0 || r.fitted);
}

function ofCodec(codec) {
  const usual = changes(codec) ? usualOf(codec) : null;
  if (usual === null) return null;
  const found = { codec, ...usual, tensors: 0, above: 0, below: 0, fitted: false }, times = [], expected = new Set();
  for (const s of DATA.series) if (s.codec === codec) {
    found.tensors += s.n;
    found.fitted ||= Boolean(s.fitted);
    if (s.expected) expected.add(s.expected);
    for (let i = s.first; i < s.first + s.n; i++) {
      if (outlier(i) > 0) found.above++;
      if (outlier(i) < 0) found.below++;
      if (timesGaussian(i) !== null) times.push(timesGaussian(i));
    }
  }
  times.sort((a, b) => a - b);
  const ends = [...expected].sort((a, b) => a - b);
  return { ...found, expected: ends.length > 1 ? [ends[0], ends[ends.length - 1]] : ends, times: times[times.length >> 1] ?? null };
}

function showRange(values) {
  const words = [...new Set(values.map(showError))];
  return words.length ? words.join(" to ") : NONE;
}

function outlierCell(r) {
  if (r.low === null) return NONE;
  const counts = [[1, r.above], [-1, r.below]].filter(([, n]) => n > 0);
  return counts.length ? el("span", {}, ...counts.flatMap(([mark, n]) => [badge(mark), ` ${showCount(n)} `])) : "none";
}
