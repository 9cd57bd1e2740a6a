// One panel as a picture, with a frame around each outlier; its cells are pointed at by mouse, finger and arrow keys.

const BAND = 6, GAP = 3, SLANT = Math.PI / 3.2;

class Heatmap {
  constructor(p, box) {
    this.p = p;
    this.codecs = new Set(Array.from(p.cells).filter(i => i >= 0 && seriesOf(i).changed).map(i => seriesOf(i).codec));
    this.band = this.codecs.size > 1 ? BAND + GAP : 0;
    this.canvas = el("canvas", { tabIndex: 0, role: "img" });
    const worst = p.cells.reduce((best, i) => (i >= 0 && (best < 0 || T.error[i] > T.error[best]) ? i : best), -1);
    this.canvas.setAttribute("aria-label",
      `Heatmap ${p.title}: ${p.rows} rows, ${p.columns} columns; the largest error is ${showError(T.error[worst])}, of ${nameOf(worst)}. The table of layers below has the numbers.`);
    this.cursor = el("div", { className: "cursor", hidden: true });
    this.plot = el("div", { className: "plot" }, this.canvas, this.cursor);
    const axes = p.byProjection ? null : el("figcaption", { textContent: `${plural(p.rows, "layer")} down, ${plural(p.columns, "expert")} across` });
    box.append(el("figure", {}, p.title ? el("h3", { textContent: p.title }) : null, this.plot, axes));
    this.x = this.y = 0;
    this.listen();
  }

  // Sizes follow the box: cells as wide as fit, at most 30 pixels (90 where a column is a projection).
  layout() {
    const { rows, columns, byProjection, xLabels, yLabels } = this.p;
    const few = Math.max(...yLabels.map(label => label.length));
    const text = Math.max(...xLabels.map(label => label.length)) * 6; // of the slanted labels, in pixels
    this.left = Math.max(22, few * 7 + 6) + this.band;
    this.head = byProjection ? Math.min(180, text * Math.sin(SLANT) + 12) : 7;
    this.foot = byProjection ? 0 : 18;
    const width = this.plot.clientWidth - this.left - (byProjection ? text * Math.cos(SLANT) - 10 : 1);
    this.width = Math.min(width, columns * (byProjection ? 90 : 30));
    this.cell = Math.max(byProjection ? 8 : 5, Math.min(24, Math.floor(340 / rows)));
    this.height = this.cell * rows;
  }

  draw(shown, scales) {
    this.layout();
    this.hide();
    const { rows, columns, yLabels } = this.p;
    const ratio = window.devicePixelRatio || 1, outer = this.plot.clientWidth, total = this.head + this.height + this.foot;
    Object.assign(this.canvas, { width: Math.round(outer * ratio), height: Math.round(total * ratio) });
    Object.assign(this.canvas.style, { width: `${outer}px`, height: `${total}px` });
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const edge = x => Math.round((this.left + (x * this.width) / columns) * ratio) / ratio;
    const edges = Array.from({ length: columns + 1 }, (_, x) => edge(x));
    context.imageSmoothingEnabled = false;
    context.drawImage(this.small(shown, scales), edges[0], this.head, edges[columns] - edges[0], this.height);
    if (this.cell >= 10 && this.width / columns >= 8) {
      context.fillStyle = themeColor("--card"); // lines between the cells
      for (let x = 1; x < columns; x++) context.fillRect(edges[x] - 1, this.head, 1, this.height);
      for (let y = 1; y < rows; y++) context.fillRect(edges[0], this.head + y * this.cell - 1, this.width, 1);
    }
    this.drawOutliers(context, edges);
    if (this.band) this.drawBand(context);
    context.fillStyle = themeColor("--soft");
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    const every = niceStep(rows, Math.ceil(13 / this.cell)), labelsEnd = this.left - 5 - this.band;
    yLabels.forEach((label, y) => {
      if (y % every === 0 || Number.isNaN(Number(label))) context.fillText(label, labelsEnd, this.head + (y + 0.5) * this.cell);
    });
    this.p.byProjection ? this.drawProjections(context, edges) : this.drawExperts(context, edges);
  }

  // The picture with a pixel for each cell.
  small(shown, scales) {
    const { rows, columns, cells } = this.p, canvas = el("canvas", { width: columns, height: rows });
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    const kept = [1, 3, 5].map(at => parseInt(themeColor("--cell-kept").slice(at, at + 2), 16));
    for (let at = 0; at < cells.length; at++) {
      if (cells[at] < 0) continue; // transparent
      const step = shown[at] > 0 ? Math.round(scales.get(seriesOf(cells[at]).codec).at(shown[at]) * 255) : 0;
      image.data.set(Number.isNaN(shown[at]) ? kept : VIRIDIS[Math.max(0, Math.min(255, step))], 4 * at);
      image.data[4 * at + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // A frame of two colours, seen on dark and light cells.
  drawOutliers(context, edges) {
    const { columns, cells } = this.p, frames = [[themeColor("--card"), 1.5], [themeColor("--ink"), 0.5]];
    cells.forEach((i, at) => {
      if (i < 0 || !outlier(i, KINDS[kind], kind)) return;
      const x = at % columns, y = Math.floor(at / columns), left = edges[x], width = edges[x + 1] - left, top = this.head + y * this.cell;
      for (const [color, out] of frames) {
        context.strokeStyle = color;
        context.strokeRect(left - out, top - out, width + 2 * out, this.cell + 2 * out);
      }
    });
  }

  // Beside each row, the codecs of its tensors, each its share of the width.
  drawBand(context) {
    const { rows, columns, cells } = this.p;
    for (let y = 0; y < rows; y++) {
      const counts = new Map();
      for (const i of cells.subarray(y * columns, (y + 1) * columns)) {
        if (i >= 0) counts.set(seriesOf(i).codec, (counts.get(seriesOf(i).codec) || 0) + 1);
      }
      const all = [...counts.values()].reduce((sum, n) => sum + n, 0);
      let x = this.left - BAND - GAP;
      for (const [codec, n] of [...counts].sort(([a], [b]) => a - b)) {
        context.fillStyle = codecColor(codec);
        context.fillRect(x, this.head + y * this.cell, (BAND * n) / all, this.cell);
        x += (BAND * n) / all;
      }
    }
  }

  drawExperts(context, edges) {
    const { columns, xLabels } = this.p;
    context.textBaseline = "top";
    context.textAlign = "center";
    const every = niceStep(columns, Math.ceil(30 / (this.width / columns)));
    for (let x = 0; x < columns; x += every) context.fillText(xLabels[x], (edges[x] + edges[x + 1]) / 2, this.head + this.height + 5);
  }

  drawProjections(context, edges) {
    context.textAlign = "left";
    context.textBaseline = "middle";
    this.p.xLabels.forEach((label, x) => {
      context.save();
      context.translate((edges[x] + edges[x + 1]) / 2, this.head - 6);
      context.rotate(-SLANT);
      context.fillText(label, 0, 0);
      context.restore();
    });
  }

  // --- pointing ---

  listen() {
    const { canvas } = this;
    const at = event => {
      const box = canvas.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left - this.left) / this.width) * this.p.columns);
      const y = Math.floor((event.clientY - box.top - this.head) / this.cell);
      if (x < 0 || y < 0 || x >= this.p.columns || y >= this.p.rows) return this.hide();
      [this.x, this.y] = [x, y];
      return this.show();
    };
    canvas.addEventListener("pointermove", event => event.pointerType === "mouse" && at(event));
    canvas.addEventListener("pointerleave", event => event.pointerType === "mouse" && this.hide());
    canvas.addEventListener("click", event => {
      event.stopPropagation();
      at(event);
    });
    canvas.addEventListener("blur", () => this.hide());
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.show());
    canvas.addEventListener("keydown", event => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") this.hide();
      if (!step) return;
      event.preventDefault();
      this.x = Math.max(0, Math.min(this.p.columns - 1, this.x + step[0]));
      this.y = Math.max(0, Math.min(this.p.rows - 1, this.y + step[1]));
      this.show();
    });
  }

  show() {
    const { columns, cells } = this.p, i = cells[this.y * columns + this.x];
    const width = this.width / columns, left = this.left + this.x * width, top = this.head + this.y * this.cell;
    this.cursor.hidden = false;
    Object.assign(this.cursor.style, { left: `${left - 2}px`, top: `${top - 2}px`, width: `${width + 4}px`, height: `${this.cell + 4}px` });
    const box = this.canvas.getBoundingClientRect();
    showTip(i, box.left + left + width / 2, box.top + top, this.cell);
  }

  hide() {
    this.cursor.hidden = true;
    hideTip();
  }
}

function niceStep(n, least) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 500, 1000].find(step => step >= least) || n;
}
