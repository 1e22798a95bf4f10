// The plot of BitExplorer: 32 weights over the levels of their format, to select and to drag. Comes before
// bit_explorer.js, and like it draws what Python computed: no number format is known here.
const SVG = "http://www.w3.org/2000/svg";
const TOP = 8, PLOT = 240, CODES = 34, ERRORS = 44, HEIGHT = TOP + PLOT + CODES + ERRORS + 14;
const LEFT = 48, RIGHT = 36;
const SMALLEST_GAP = 11; // px between two labels that can still be read
const DIGIT = 6.7; // px, the width of one in a code

function make(tag, className, parent, attributes = {}) {
  const is_svg = ["svg", "g", "line", "rect", "circle", "text"].includes(tag);
  const node = is_svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  if (className) node.setAttribute("class", className);
  set(node, attributes);
  parent?.append(node);
  return node;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes))
    if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  return node;
}

function write(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

class Plot {
  constructor(link, parent, onSelect) {
    this.link = link;
    this.onSelect = onSelect;
    this.selected = 0;
    this.seq = link.model.get("shown").seq;
    this.svg = make("svg", "gqk-bits-plot", parent, { height: HEIGHT, role: "group" });
    this.ticks = make("g", "", this.svg);
    this.levels = make("g", "", this.svg);
    this.zero = make("line", "gqk-bits-zero", this.svg);
    this.errorZero = make("line", "gqk-bits-zero", this.svg);
    this.captions = ["code", "error"].map((text) => {
      const caption = make("text", "gqk-bits-tick", this.svg, { x: LEFT - 8, "text-anchor": "end" });
      caption.textContent = text;
      return caption;
    });
    this.columns = [];
    this.svg.addEventListener("pointerdown", (event) => this.grab(event));
    this.svg.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) this.svg.addEventListener(end, () => this.release());
    this.svg.addEventListener("pointerleave", () => this.shown && this.onSelect(this.selected));
    this.svg.addEventListener("keydown", (event) => this.press(event));
    this.svg.setAttribute("tabindex", -1); // else Chromium stops at the whole plot, because it listens for the focus
    this.svg.addEventListener("focusin", ({ target: { dataset } }) => dataset.index && this.select(Number(dataset.index)));
  }

  // ---- what the hand does
  columnAt(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    return Math.min(Math.max(Math.floor((x - LEFT) / this.step), 0), this.shown.values.length - 1);
  }

  grab(event) {
    if (event.button !== 0 || !this.shown) return;
    event.preventDefault();
    this.select(this.columnAt(event), true);
    this.svg.setPointerCapture(event.pointerId);
    this.drag = { index: this.selected, from: event.clientY, value: this.valueOf(this.selected) };
  }

  move(event) {
    if (!this.shown) return;
    if (!this.drag) return this.onSelect(this.columnAt(event));
    this.put(this.drag.index, this.drag.value - ((event.clientY - this.drag.from) / (PLOT / 2)) * this.shown.limit);
  }

  release() {
    this.drag = null;
  }

  press(event) {
    const last = this.shown.values.length - 1;
    const aside = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const up = { ArrowUp: 1, ArrowDown: -1, PageUp: 8, PageDown: -8 }[event.key];
    if (aside) this.select(Math.min(Math.max(this.selected + aside, 0), last), true);
    else if (up) this.put(this.selected, this.valueOf(this.selected) + up * this.shown.key_step);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  valueOf(index) {
    return this.moved?.index === index ? this.moved.value : this.shown.values[index];
  }

  // Moves the handle at once. Python is asked once a frame at most; the widget manager keeps one message in flight.
  put(index, value) {
    const limit = this.shown.limit;
    const { look } = this.shown;
    this.moved = { look, index, value: Math.min(Math.max(value, -limit), limit), seq: ++this.seq };
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (!this.moved) return;
      this.link.set("edit", { ...this.moved });
      this.draw();
    });
  }

  select(index, focus = false) {
    this.columns[this.selected]?.node.setAttribute("tabindex", -1);
    this.selected = index;
    set(this.columns[index].node, { tabindex: 0 });
    if (focus) this.columns[index].node.focus({ preventScroll: true });
    this.onSelect(index);
  }

  mark(indexes) {
    this.columns.forEach((column, i) => {
      column.node.classList.toggle("gqk-bits-marked", indexes.includes(i));
      column.node.classList.toggle("gqk-bits-selected", i === this.selected);
    });
  }

  // ---- what Python computed
  show(shown) {
    const before = this.shown;
    this.shown = shown;
    if (this.moved && (shown.look !== this.moved.look || shown.seq >= this.moved.seq)) this.moved = null;
    if (this.columns.length !== shown.values.length) this.makeColumns(shown.values.length);
    set(this.svg, { "aria-label": shown.title });
    this.draw();
    if (before?.title !== shown.title) return;
    shown.codes.forEach((code, i) => code !== before.codes[i] && this.flip(this.columns[i].code));
  }

  flip(text) {
    text.classList.remove("gqk-bits-flip");
    void text.getBoundingClientRect(); // restarts the animation
    text.classList.add("gqk-bits-flip");
  }

  makeColumns(count) {
    this.columns.forEach((column) => column.node.remove());
    this.columns = Array.from({ length: count }, (_, i) => {
      const node = make("g", "gqk-bits-weight", this.svg, { role: "slider", tabindex: i ? -1 : 0, "data-index": i });
      set(node, { "aria-label": `weight ${i}`, "aria-orientation": "vertical" });
      const part = (tag, name) => make(tag, `gqk-bits-${name}`, node);
      return {
        node, band: part("rect", "band"), stem: part("line", "stem"), gap: part("line", "gap"),
        snapped: part("line", "snapped"), handle: part("circle", "handle"),
        code: part("text", "code"), error: part("rect", "error"),
      };
    });
    // Without its class the animation would run again whenever a notebook takes the widget out of the page and back.
    this.columns.forEach(({ code }) => (code.onanimationend = () => code.classList.remove("gqk-bits-flip")));
    this.selected = Math.min(this.selected, count - 1);
  }

  y(value) {
    return TOP + (PLOT / 2) * (1 - Math.min(Math.max(value / this.shown.limit, -1), 1));
  }

  draw() {
    const width = this.svg.getBoundingClientRect().width, shown = this.shown;
    if (!width) return; // not laid out yet; the size observer calls again
    this.step = (width - LEFT - RIGHT) / shown.values.length;
    this.drawLevels(width);
    const needed = Math.max(...shown.codes.map((code) => String(code).length)) * DIGIT;
    const place = needed <= this.step ? this.inOneRow : needed <= 2 * this.step ? this.inTwoRows : this.turned;
    shown.values.forEach((_, i) => this.drawColumn(i, place.bind(this)));
  }

  drawLevels(width) {
    const shown = this.shown, right = width - RIGHT;
    const visible = shown.levels.filter(([, value]) => Math.abs(value) <= shown.limit);
    const span = visible.length ? Math.abs(this.y(visible[0][1]) - this.y(visible.at(-1)[1])) : 0;
    const gap = Math.max(span, 1) / Math.max(visible.length - 1, 1);
    const every = gap < 4 ? Math.ceil(SMALLEST_GAP / gap / 8) * 8 : 1;
    const lines = every > 1 ? visible.filter(([code]) => code % every === 0) : visible;
    while (this.levels.childElementCount > lines.length) this.levels.lastChild.remove();
    let last = Infinity;
    [...lines].sort((a, b) => a[1] - b[1]).forEach(([code, value], i) => {
      const level = this.levels.children[i] ?? this.makeLevel();
      const y = this.y(value), isFree = last - y >= SMALLEST_GAP;
      if (isFree) last = y;
      level.style.transform = `translateY(${y}px)`;
      set(level.firstChild, { x1: LEFT, x2: right });
      set(level.lastChild, { x: right + 6, y: 3.5 }).textContent = isFree ? code : "";
    });
    this.ticks.replaceChildren();
    for (const [value, text] of shown.ticks) {
      const place = { x: LEFT - 8, y: this.y(value) + 3.5, "text-anchor": "end" };
      write(make("text", "gqk-bits-tick", this.ticks, place), text);
    }
    set(this.zero, { x1: LEFT, x2: right, y1: this.y(0), y2: this.y(0) });
    const middle = TOP + PLOT + CODES + ERRORS / 2;
    set(this.errorZero, { x1: LEFT, x2: right, y1: middle, y2: middle });
    set(this.captions[0], { y: TOP + PLOT + 20 });
    set(this.captions[1], { y: middle + 3.5 });
  }

  makeLevel() {
    const level = make("g", "gqk-bits-level", this.levels);
    make("line", "", level);
    make("text", "gqk-bits-tick", level);
    return level;
  }

  inOneRow(x) {
    return { x, y: TOP + PLOT + 22, transform: "" };
  }

  inTwoRows(x, i) {
    return { x, y: TOP + PLOT + (i % 2 ? 28 : 15), transform: "" };
  }

  turned(x) {
    const y = TOP + PLOT + 18;
    return { x, y: y + 3.5, transform: `rotate(-90 ${x} ${y})` };
  }

  drawColumn(i, place) {
    const { shown, step } = this, column = this.columns[i], x = LEFT + (i + 0.5) * step;
    const value = this.valueOf(i), y = this.y(value), snapped = this.y(shown.snapped[i]);
    const half = Math.min(step * 0.4, 9);
    const middle = TOP + PLOT + CODES + ERRORS / 2;
    const size = (shown.errors[i] / shown.error_limit) * (ERRORS / 2);
    set(column.band, { x: x - step / 2, y: TOP, width: step, height: PLOT + CODES + ERRORS });
    set(column.stem, { x1: x, x2: x, y1: this.y(0), y2: y });
    set(column.gap, { x1: x, x2: x, y1: y, y2: snapped });
    set(column.snapped, { x1: x - half, x2: x + half });
    column.snapped.style.transform = `translateY(${snapped}px)`;
    set(column.handle, { cx: x, cy: y, r: Math.min(step * 0.34, 5.5) });
    set(column.code, place(x, i));
    column.code.style.fontSize = `${Math.min(11, Math.max(9, step))}px`;
    write(column.code, shown.codes[i]);
    set(column.error, { x: x - half * 0.7, width: half * 1.4 });
    set(column.error, { y: Math.min(middle, middle - size), height: Math.abs(size) });
    const limits = { "aria-valuemin": -shown.limit, "aria-valuemax": shown.limit, "aria-valuenow": value };
    set(column.node, { ...limits, "aria-valuetext": shown.lines[i] });
  }
}
