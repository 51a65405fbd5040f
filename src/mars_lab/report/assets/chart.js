// Lines on a canvas: hover, zoom, toggle. A second canvas above has what follows the pointer.

const MARKERS = [
  "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", "M-3.5,-3.5h7v7h-7z", "M0,-5L5,0L0,5L-5,0z", "M0,-4.5L4.5,3.5h-9z",
  "M0,4.5L4.5,-3.5h-9z", "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z", "M-4.5,-4.5L0,-1L4.5,-4.5L1,0L4.5,4.5L0,1L-4.5,4.5L-1,0z",
];
const SHAPES = MARKERS.map((marker) => new Path2D(marker));
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 4]];
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = (line) => style(`--series-${line.color}`);
const extent = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);

class Chart {
  // lines: {label, color, marker, dash, hollow, x, y, low?, high?, visible}; x and y in rising order of x.
  constructor(box, options) {
    this.box = box;
    this.options = options;
    this.lines = [];
    this.view = { x: [0, 1], y: [0, 1] };
    [this.canvas, this.overlay] = [0, 1].map(() => box.appendChild(document.createElement("canvas")));
    this.tip = box.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
    this.overlay.tabIndex = 0;
    this.overlay.setAttribute("role", "img");
    this.overlay.setAttribute("aria-label", options.description);
    new ResizeObserver(() => this.lines.length && this.draw()).observe(box);
    this.listen();
  }

  show(lines, options = {}) {
    Object.assign(this.options, options);
    this.lines = lines;
    this.reset();
  }

  reset() {
    this.view = this.home();
    this.draw();
  }

  get visible() {
    return this.lines.filter((line) => line.visible && line.x.length);
  }

  // What is shown at first: all of x; of y what the second half of the lines needs, or all.
  home() {
    const lines = this.visible;
    if (!lines.length) return { x: this.options.isLog ? [1, 10] : [0, 1], y: [0, 1] };
    const x = extent(lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]));
    const from = this.options.skipsStart ? (line) => line.x[line.x.length - 1] / 2 : () => -Infinity;
    return { x: this.options.isLog ? [x[0] / 1.2, x[1] * 1.2] : [x[0], x[1] || 1], y: this.fitted(from) };
  }

  fitted(from, to = Infinity) {
    const ranges = this.visible.map((line) => {
      const inside = (_, i) => line.x[i] >= from(line) && line.x[i] <= to;
      return extent([line.y, line.low, line.high].flatMap((values) => (values || []).filter(inside)));
    });
    const [low, high] = extent(ranges.flat().filter(Number.isFinite));
    if (!(high >= low)) return [0, 1];
    const margin = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
    return [low - margin, high + margin];
  }

  size() {
    const { clientWidth: width, clientHeight: height } = this.box, ratio = window.devicePixelRatio || 1;
    for (const canvas of [this.canvas, this.overlay]) {
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
      }
    }
    this.frame = { left: 58, right: width - 14, top: 26, bottom: height - 44, width, height, ratio };
    this.x = new Scale(this.view.x, this.frame.left, this.frame.right, this.options.isLog);
    this.y = new Scale(this.view.y, this.frame.bottom, this.frame.top, false);
  }

  context(canvas) {
    const context = canvas.getContext("2d");
    context.setTransform(this.frame.ratio, 0, 0, this.frame.ratio, 0, 0);
    context.clearRect(0, 0, this.frame.width, this.frame.height);
    context.lineJoin = "round";
    return context;
  }

  draw() {
    if (!this.box.clientWidth) return;
    this.size();
    const context = this.context(this.canvas);
    this.drawAxes(context);
    this.clip(context, () => this.visible.forEach((line, i) => this.drawLine(context, line, i, 1.6)));
    this.point(null);
  }

  clip(context, paint) {
    const { left, right, top, bottom } = this.frame;
    context.save();
    context.beginPath();
    context.rect(left, top - 6, right - left + 6, bottom - top + 6);
    context.clip();
    paint();
    context.restore();
  }

  drawAxes(context) {
    const { left, right, top, bottom, width } = this.frame;
    context.font = "12px system-ui, sans-serif";
    context.lineWidth = 1;
    context.strokeStyle = style("--grid");
    context.fillStyle = style("--muted");
    context.textAlign = "center";
    for (const tick of this.options.ticks || this.x.ticks(width / 110)) {
      this.rule(context, this.x.pixel(tick), top, this.x.pixel(tick), bottom);
      context.fillText(this.options.xFormat(tick), this.x.pixel(tick), bottom + 16);
    }
    context.textAlign = "right";
    for (const tick of this.y.ticks(6)) {
      this.rule(context, left, this.y.pixel(tick), right, this.y.pixel(tick));
      context.fillText(short(tick, 5), left - 7, this.y.pixel(tick) + 4);
    }
    context.fillStyle = style("--ink");
    context.fillText(this.options.xLabel, right, bottom + 36);
    context.textAlign = "left";
    context.fillText(this.options.yLabel, 4, 12);
  }

  rule(context, x0, y0, x1, y1) {
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.stroke();
  }

  drawLine(context, line, index, width) {
    context.strokeStyle = context.fillStyle = color(line);
    context.lineWidth = width;
    // Dashes on thousands of points take long and cannot be told apart.
    context.setLineDash(line.x.length <= 400 ? DASHES[line.dash % DASHES.length] : []);
    context.beginPath();
    for (let i = 0; i < line.x.length; i++) context.lineTo(this.x.pixel(line.x[i]), this.y.pixel(line.y[i]));
    context.stroke();
    context.setLineDash([]);
    for (let i = 0; line.low && i < line.x.length; i++) {
      this.rule(context, this.x.pixel(line.x[i]), this.y.pixel(line.low[i]), this.x.pixel(line.x[i]), this.y.pixel(line.high[i]));
    }
    this.drawMarkers(context, line, index);
  }

  // At most eight a line, at other places for other lines, so that they don't hide each other.
  drawMarkers(context, line, index) {
    const every = Math.max(1, Math.ceil(line.x.length / 8));
    for (let i = every === 1 ? 0 : (index * 3) % every; i < line.x.length; i += every) {
      context.save();
      context.translate(this.x.pixel(line.x[i]), this.y.pixel(line.y[i]));
      const path = SHAPES[line.marker % SHAPES.length];
      context.fillStyle = line.hollow ? style("--paper") : color(line);
      context.fill(path);
      context.stroke(path);
      context.restore();
    }
  }

  // The point nearest to the pixel (px, py), no farther than a finger is wide.
  nearest(px, py) {
    let found = null, distance = 40;
    for (const line of this.visible) {
      const target = this.x.value(px);
      let low = 0, high = line.x.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (line.x[middle] < target) low = middle + 1;
        else high = middle;
      }
      for (const i of [low - 1, low, low + 1]) {
        if (i < 0 || i >= line.x.length) continue;
        const d = Math.hypot(this.x.pixel(line.x[i]) - px, this.y.pixel(line.y[i]) - py);
        if (d < distance) [found, distance] = [{ line, i }, d];
      }
    }
    return found;
  }

  point(found) {
    const context = this.context(this.overlay);
    this.tip.hidden = !found;
    if (!found) return;
    const { line, i } = found, x = this.x.pixel(line.x[i]), y = this.y.pixel(line.y[i]);
    this.clip(context, () => this.drawLine(context, line, 0, 3.2));
    context.beginPath();
    context.arc(x, y, 6, 0, 7);
    context.stroke();
    this.tip.textContent = this.options.tell(line, i);
    this.tip.style.left = `${Math.max(4, Math.min(x + 12, this.frame.width - this.tip.offsetWidth - 4))}px`;
    this.tip.style.top = `${y > 90 ? y - this.tip.offsetHeight - 12 : y + 14}px`;
  }

  listen() {
    let start = null;
    const at = (event) => [event.offsetX, event.offsetY];
    this.overlay.addEventListener("pointerdown", (event) => {
      start = at(event);
      this.overlay.setPointerCapture(event.pointerId);
    });
    this.overlay.addEventListener("pointermove", (event) => {
      const now = at(event);
      if (start && Math.abs(now[0] - start[0]) > 6) this.drawSelection(start, now, event.pointerType);
      else this.point(this.nearest(...now));
    });
    this.overlay.addEventListener("pointerup", (event) => {
      const now = at(event);
      if (start && Math.abs(now[0] - start[0]) > 6) this.zoomTo(this.selection(start, now, event.pointerType));
      else this.point(this.nearest(...now));
      start = null;
    });
    this.overlay.addEventListener("pointercancel", () => (start = null));
    this.overlay.addEventListener("pointerleave", () => start || this.point(null));
    this.overlay.addEventListener("dblclick", () => this.reset());
    this.overlay.addEventListener("keydown", (event) => this.key(event));
  }

  // A rectangle; where it is flat, or drawn by a finger, all heights.
  selection(a, b, pointerType) {
    const { left, right, top, bottom } = this.frame;
    const within = (v, low, high) => Math.max(low, Math.min(high, v));
    const xs = [a[0], b[0]].map((v) => within(v, left, right)).sort((p, q) => p - q);
    const ys = [a[1], b[1]].map((v) => within(v, top, bottom)).sort((p, q) => p - q);
    const isFlat = pointerType === "touch" || ys[1] - ys[0] < 12;
    return { xs, ys: isFlat ? [top, bottom] : ys, isFlat };
  }

  drawSelection(a, b, pointerType) {
    const { xs, ys } = this.selection(a, b, pointerType), context = this.context(this.overlay);
    this.tip.hidden = true;
    context.fillStyle = style("--selection");
    context.fillRect(xs[0], ys[0], xs[1] - xs[0], ys[1] - ys[0]);
  }

  zoomTo({ xs, ys, isFlat }) {
    if (xs[1] - xs[0] < 3) return;
    const x = xs.map(this.x.value);
    this.view = { x, y: isFlat ? this.fitted(() => x[0], x[1]) : [ys[1], ys[0]].map(this.y.value) };
    this.draw();
  }

  key(event) {
    const { left, right, top, bottom } = this.frame, width = right - left;
    const moves = { "+": [0.25, -0.25], "-": [-0.5, 0.5], ArrowLeft: [-0.2, -0.2], ArrowRight: [0.2, 0.2] };
    if (event.key === "0") this.reset();
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [a, b] = moves[event.key];
    this.zoomTo({ xs: [left + a * width, right + b * width], ys: [top, bottom], isFlat: false });
  }
}
