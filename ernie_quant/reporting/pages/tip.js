// What a cell of a heatmap tells.

const tip = byId("tip");

function showTip(i, x, y, cell) {
  const s = i >= 0 ? seriesOf(i) : null;
  const lines = s === null ? ["no tensor here"] : [
    ...(s.changed ? errorLines(i) : [codecOf(i) === KEPT ? "kept bit by bit" : `relative error ${showError(T.error[i])}`]),
    `${codecOf(i)}; ${showFixed(s.bits, 3)} bits per weight; ${showShape(i)}; ${showBytes(s.bytes)}`,
  ];
  tip.replaceChildren(...(s ? [el("b", {}, nameNode(i))] : []), ...lines.map(line => el("div", { textContent: line })));
  tip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = Math.max(8, Math.min(document.documentElement.clientWidth - width - 8, x - width / 2));
  const above = y - height - 12;
  Object.assign(tip.style, { left: `${left}px`, top: `${above >= 8 ? above : y + cell + 12}px` });
}

function errorLines(i) {
  const usual = usualOf(seriesOf(i).codec), { expected } = seriesOf(i), mark = outlier(i);
  const beside = [expected && `${showTimes(timesGaussian(i))}${TIMES} that of Gaussian weights`, usual && `${showTimes(timesMedian(i))}${TIMES} the median of its codec`];
  return [
    `relative error ${showError(T.error[i])} (${showFixed(decibels(T.error[i]), 1)} dB), max |error| ${showError(T.largest[i])}`,
    meant(i) ? "makes up for errors before it: it is meant to differ from the source" : beside.filter(Boolean).join(", "),
    mark && `${SIGN[mark]} outlier: ${mark > 0 ? "more" : "less"} than is usual, ${showError(usual.low)} to ${showError(usual.high)}`,
  ].filter(Boolean);
}

function hideTip() {
  tip.hidden = true;
}
