// The columns of the page. A tensor is its number: 0, 1, … through all series.

// A column of ids may come as runs: a value, and how often it stands there.
const column = ids => (ids.runs ? ids.runs.flatMap((x, i) => (i % 2 ? [] : new Array(ids.runs[i + 1]).fill(x))) : ids);
for (const s of [...DATA.series, ...(DATA.only ?? []).flat()]) s.ids = s.ids.map(column);

const T = (() => {
  const n = DATA.series.reduce((sum, s) => sum + s.n, 0);
  const t = { n, series: new Int32Array(n), at: new Int32Array(n), error: new Float64Array(n), largest: new Float64Array(n) };
  let i = 0;
  DATA.series.forEach((s, number) => {
    s.first = i;
    s.changed = changes(s.codec);
    for (let k = 0; k < s.n; k++, i++) {
      t.series[i] = number;
      t.at[i] = k;
      t.error[i] = s.error ? s.error[k] : 0;
      t.largest[i] = s.largest ? s.largest[k] : 0;
    }
  });
  return t;
})();

const seriesOf = i => DATA.series[T.series[i]];
const names = new Array(T.n);
const nameIn = (s, k) => s.parts.reduce((text, part, j) => text + s.ids[j - 1][k] + part);
const nameOf = i => (names[i] ??= nameIn(seriesOf(i), T.at[i]));
const roleOf = i => DATA.roles[seriesOf(i).role];
const codecOf = i => DATA.codecs[seriesOf(i).codec];
const showShape = i => seriesOf(i).shape.join(" × ");

// A name that may be broken after its dots.
function nameNode(i) {
  const parts = nameOf(i).split(/(?<=\.)/);
  return el("span", {}, ...parts.flatMap((part, j) => (j ? [el("wbr"), part] : [part])));
}

// --- what is expected and usual of a codec ---

const usualOf = (codec, kind = "error") => DATA.of_codecs[codec][kind] ?? null;
const timesGaussian = i => ratio(T.error[i], seriesOf(i).expected);
// of what makes up for errors before it: its weight is meant to differ, and its error is compared with nothing
const meant = (i, kind = "error") => Boolean(seriesOf(i).fitted) && kind === "error";
const timesMedian = i => (seriesOf(i).changed && !meant(i) ? ratio(T.error[i], usualOf(seriesOf(i).codec)?.median) : null);

// 1 for an outlier above what is usual, -1 for one below
function outlier(i, values = T.error, kind = "error") {
  const usual = seriesOf(i).changed && !meant(i, kind) ? usualOf(seriesOf(i).codec, kind) : null;
  if (usual === null || usual.low === null || !(values[i] > 0)) return 0;
  return values[i] > usual.high ? 1 : values[i] < usual.low ? -1 : 0;
}

const OUTLIER = { "1": "high", "-1": "low", "0": "" };
const SIGN = { "1": "▲", "-1": "▼" };
