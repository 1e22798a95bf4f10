// BitExplorer's front end, behind bits_plot.js: its controls, the stored bytes, and what goes to and fro. It draws what
// Python computed and sends back what the hand did.
const PATIENCE = 300; // ms after which the page says that it waits for Python

function labelled(parent, text, control) {
  const label = make("label", "gqk-bits-field", parent);
  make("span", "", label).textContent = text;
  label.append(control);
  return control;
}

function fill(select, names) {
  select.replaceChildren(...names.map((name) => new Option(name, name)));
}

// What goes to Python. While an answer takes long, a busy kernel for one, the page says so.
class Link {
  constructor(model, onWait) {
    this.model = model;
    this.onWait = onWait;
  }

  set(name, value) {
    if (this.model.get(name) === value) return;
    this.wait();
    this.model.set(name, value);
    this.model.save_changes();
  }

  act(action) {
    this.wait();
    this.model.send({ do: action });
  }

  wait() {
    this.timer ??= setTimeout(this.onWait, PATIENCE);
  }

  answered() {
    clearTimeout(this.timer);
    this.timer = null;
  }
}

class Controls {
  constructor(model, link, parent) {
    this.model = model;
    this.link = link;
    const row = make("div", "gqk-bits-controls", parent);
    this.layer = labelled(row, "Layer", make("select", "gqk-bits-layer"));
    this.row = labelled(row, "Row", make("input", "gqk-bits-row", null, { type: "number", min: 0, step: 1 }));
    this.group = labelled(row, "Group", make("input", "gqk-bits-group", null, { type: "number", min: 0, step: 1 }));
    const steps = make("div", "gqk-bits-steps", row);
    for (const [action, text] of [["previous", "Previous"], ["next", "Next"], ["random", "Random"]])
      this.button(steps, action, text);
    const how = make("div", "gqk-bits-controls", parent);
    this.format = labelled(how, "Format", make("select", "gqk-bits-format"));
    this.recover = make("input", "gqk-bits-recover", null, { type: "checkbox" });
    const toggle = make("label", "gqk-bits-field gqk-bits-toggle", how);
    toggle.append(this.recover, "Recover the grid (q4_0)");
    this.reset = this.button(how, "reset", "Reset");
    fill(this.layer, model.get("layers"));
    fill(this.format, model.get("formats"));
    this.layer.onchange = () => this.send("layer", this.layer.value);
    this.format.onchange = () => this.send("format", this.format.value);
    this.recover.onchange = () => this.send("recover_grid", this.recover.checked);
    for (const name of ["row", "group"]) {
      const go = () => this.send(name, this.whole(this[name]));
      this[name].onchange = go;
      this[name].onkeydown = (event) => {
        if (event.key === "Enter") go(); // JupyterLab keeps it from being a change; a false returned would undo every key
      };
    }
  }

  button(parent, action, text) {
    const button = make("button", `gqk-bits-button gqk-bits-${action}`, parent, { type: "button" });
    button.textContent = text;
    button.onclick = () => this.link.act(action);
    return button;
  }

  whole(input) {
    return Math.min(Math.max(Math.round(Number(input.value) || 0), 0), Number(input.max));
  }

  send(name, value) {
    this.link.set(name, value);
    this.show(this.model.get("shown"));
  }

  show(shown) {
    for (const name of ["layer", "format", "row", "group"]) this[name].value = this.model.get(name);
    this.row.max = shown.num_rows - 1;
    this.group.max = shown.num_groups - 1;
    this.recover.checked = this.model.get("recover_grid");
    this.recover.disabled = this.model.get("format") !== "q4_0";
    this.reset.disabled = !shown.is_edited;
  }
}

class Bytes {
  constructor(parent, onHover, onPick) {
    this.caption = make("div", "gqk-bits-caption", parent);
    this.row = make("div", "gqk-bits-bytes", parent);
    this.onHover = onHover;
    this.onPick = onPick;
    this.row.addEventListener("pointerleave", () => onHover(null));
  }

  show(shown) {
    this.caption.textContent = shown.bytes_caption;
    const layout = JSON.stringify(shown.bytes.map((byte) => byte.parts.map((part) => part.weights)));
    if (layout !== this.layout) this.row.replaceChildren(...shown.bytes.map((byte) => this.makeByte(byte)));
    this.layout = layout;
    const digits = this.row.querySelectorAll(".gqk-bits-part");
    shown.bytes.flatMap((byte) => byte.parts).forEach((part, i) => (write(digits[i], part.text)));
  }

  makeByte(byte) {
    const kind = byte.parts[0].weights.length ? "gqk-bits-byte" : "gqk-bits-byte gqk-bits-scale";
    const box = make("span", kind, null, { title: byte.title });
    const digits = make("span", "gqk-bits-digits", box);
    for (const part of byte.parts) {
      const digit = make("span", "gqk-bits-part", digits, { "data-weights": part.weights.join(" ") });
      digit.addEventListener("pointerenter", () => this.onHover(part.weights));
      digit.addEventListener("click", () => part.weights.length && this.onPick(part.weights[0]));
    }
    make("span", "gqk-bits-owner", box).textContent = byte.owner;
    return box;
  }

  mark(indexes) {
    for (const digit of this.row.querySelectorAll(".gqk-bits-part")) {
      const weights = digit.dataset.weights.split(" ");
      digit.classList.toggle("gqk-bits-lit", indexes.some((i) => weights.includes(String(i))));
    }
  }
}

function render({ model, el }) {
  const root = make("div", "gqk-panel-box gqk-bits", el);
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab would move to the next cell on an arrow key
  const link = new Link(model, () => write(status, "Waiting for Python; it is busy with something else."));
  const controls = new Controls(model, link, root);
  const facts = make("div", "gqk-text gqk-bits-facts", root);
  const mark = (indexes) => {
    plot.mark(indexes);
    bytes.mark(indexes);
    write(status, plot.shown.lines[indexes.length ? indexes[0] : plot.selected]);
  };
  const plot = new Plot(link, root, (index) => mark([index]));
  const bytes = new Bytes(root, (weights) => mark(weights ?? [plot.selected]), (index) => plot.select(index, true));
  const status = make("div", "gqk-text gqk-status gqk-bits-status", root, { role: "status", "aria-live": "polite" });
  const show = () => {
    const shown = model.get("shown");
    link.answered();
    controls.show(shown);
    status.classList.toggle("gqk-error", Boolean(shown.problem));
    root.classList.toggle("gqk-bits-stale", Boolean(shown.problem));
    if (shown.problem) return showProblem(status, shown.problem);
    root.style.setProperty("--gqk-format", shown.colour);
    facts.replaceChildren(...shown.facts.map(([name, text]) => makeFact(name, text)));
    plot.show(shown);
    bytes.show(shown);
    mark([plot.selected]);
  };
  model.on("change:shown", show);
  show();
  const sizes = new ResizeObserver(() => plot.shown && plot.draw());
  sizes.observe(plot.svg);
  return () => {
    model.off("change:shown", show);
    link.answered();
    sizes.disconnect();
  };
}

function makeFact(name, text) {
  const fact = make("span", "gqk-bits-fact");
  make("span", "gqk-quiet", fact).textContent = `${name} `;
  make("span", "", fact).textContent = text;
  return fact;
}

function showProblem(status, parts) {
  status.classList.add("gqk-error");
  status.replaceChildren(...parts.map((part) => Object.assign(make("p"), { textContent: part })));
}

export default { render };
