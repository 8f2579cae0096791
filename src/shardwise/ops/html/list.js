// The list of tensors: as many rows in the document as are in view.

const natural = new Intl.Collator("en", { numeric: true });

/** Columns: what they are sorted by, their heads, their classes and widths. */
const HEADS = [
  ["place", "Name", "n", "minmax(0, 1fr)"], ["dtype", "Dtype", "d", "62px"], ["shape", "Shape", "s", "120px"], ["size", "Size", "b r", "82px"],
  ["digest", "CRC-32C", "x", "76px"], ["change", "Change", "v r", "88px"],
];

class TensorList {
  /**
   * @param {(tensor: number) => void} choose called with the tensor that was clicked or gone to
   */
  constructor(choose) {
    this.choose = choose;
    this.host = document.getElementById("list");
    this.rows = document.getElementById("rows");
    this.sort = { by: "place", down: false };
    this.order = [];
    this.selected = -1;
    this.heads();
    this.host.addEventListener("scroll", () => this.redraw());
    this.host.addEventListener("keydown", (event) => this.key(event));
    this.rows.addEventListener("click", (event) => {
      const row = event.target.closest("[data-tensor]");
      if (row) this.choose(Number(row.dataset.tensor));
    });
    new ResizeObserver(() => this.layout()).observe(this.host);
  }

  heads() {
    const absent = [model.manifest ? null : "digest", model.change === null ? "change" : null];
    const shownHeads = HEADS.filter(([by]) => !absent.includes(by));
    this.host.parentElement.classList.toggle("with-change", model.change !== null);
    this.host.parentElement.style.setProperty("--columns", ["11px", ...shownHeads.map((head) => head[3])].join(" "));
    this.buttons = shownHeads.map(([by, text, kind]) => element("button", { type: "button", class: kind, "aria-pressed": "false", onclick: () => this.sortBy(by) }, text));
    document.getElementById("heads").replaceChildren(element("span"), ...this.buttons);
    this.keys = shownHeads.map(([by]) => by);
  }

  /** A click: by size and change the largest first, by name as it is read; another turns it round. */
  sortBy(by) {
    const first = by === "place" ? (this.sort.by === "place" ? "name" : "place") : by;
    const down = this.sort.by === first ? !this.sort.down : first === "size" || first === "change";
    this.sort = { by: first, down };
    this.arrange();
  }

  /** Show these tensors. */
  show(tensors, swatches, selected) {
    Object.assign(this, { tensors, swatches });
    this.selected = selected;
    this.arrange();
  }

  arrange() {
    const { by, down } = this.sort;
    this.order = Array.from(this.tensors);
    if (by !== "place") this.order.sort(this.comparison(by));
    else if (this.places === undefined) this.places = placesOf();
    if (by === "place") this.order.sort((a, b) => this.places[a] - this.places[b]);
    if (down) this.order.reverse();
    this.buttons.forEach((button, i) => {
      const here = this.keys[i] === by || (by === "name" && i === 0);
      button.setAttribute("aria-pressed", String(here));
      const text = HEADS.find(([key]) => key === this.keys[i])[1];
      button.textContent = i === 0 && by === "place" ? `${text}, as in the files` : here ? `${text} ${down ? "↓" : "↑"}` : text;
    });
    this.layout();
  }

  comparison(by) {
    const { tensors } = model;
    const value = {
      size: (t) => model.nbytes[t],
      dtype: (t) => tensors.dtype[t],
      shape: (t) => model.parameters[t],
      digest: (t) => digestOf(model, t) ?? -1,
      change: (t) => (Number.isNaN(model.change.relative[t]) ? -model.change.status[t] - 1 : model.change.relative[t]),
    }[by];
    if (by === "name") return (a, b) => natural.compare(tensors.name[a], tensors.name[b]);
    // The difference of two infinities is none.
    return (a, b) => Number(value(a) > value(b)) - Number(value(a) < value(b)) || a - b;
  }

  layout() {
    this.step = parseFloat(token("--row"));
    this.rows.style.height = `${this.order.length * this.step}px`;
    this.host.style.maxHeight = `${Math.max(2, model.total) * this.step}px`;
    this.redraw();
  }

  redraw() {
    const first = Math.max(0, Math.floor(this.host.scrollTop / this.step) - 4);
    const last = Math.min(this.order.length, Math.ceil((this.host.scrollTop + this.host.clientHeight) / this.step) + 4);
    const rows = [];
    for (let at = first; at < last; at += 1) rows.push(this.row(at));
    this.rows.replaceChildren(...(rows.length ? rows : [element("p", { class: "none" }, model.total ? "No tensor matches." : "No tensors could be listed.")]));
    const active = this.rows.querySelector('[aria-selected="true"]');
    if (active) this.host.setAttribute("aria-activedescendant", active.id);
    else this.host.removeAttribute("aria-activedescendant");
  }

  row(at) {
    const t = this.order[at];
    const { tensors } = model;
    const name = shown(tensors.name[t]);
    const cut = name.lastIndexOf(".", name.lastIndexOf(".") - 1) + 1;
    const cells = [
      element("i", { class: "swatch", style: { background: this.swatches[t] } }),
      element("span", { class: "n", title: name }, element("small", {}, name.slice(0, cut)), name.slice(cut)),
      element("span", { class: "d m" }, model.dtypes[tensors.dtype[t]][0]),
      element("span", { class: "s m" }, model.shapeText[tensors.shape[t]]),
      element("span", { class: "b r" }, size(model.nbytes[t])),
    ];
    if (model.manifest) cells.push(element("span", { class: "x m" }, digest(digestOf(model, t)) ?? "–"));
    if (model.change !== null) cells.push(element("span", { class: "v r", title: changeText(model, t) }, changeText(model, t)));
    return element("div", {
      class: "row", role: "option", id: `t${t}`, "data-tensor": t, style: { top: `${at * this.step}px` },
      "aria-selected": String(t === this.selected), "aria-setsize": this.order.length, "aria-posinset": at + 1,
    }, ...cells);
  }

  /** Mark a tensor, and scroll to it. */
  select(tensor) {
    this.selected = tensor;
    const at = this.order.indexOf(tensor);
    const { scrollTop, clientHeight } = this.host;
    if (at >= 0 && (at * this.step < scrollTop || (at + 1) * this.step > scrollTop + clientHeight)) {
      this.host.scrollTop = at * this.step - clientHeight / 2;
    }
    this.redraw();
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.host.clientHeight / this.step) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.order.length) return;
    event.preventDefault();
    const now = this.order.indexOf(this.selected);
    const next = now < 0 && Number.isFinite(moves[event.key]) ? 0 : Math.min(this.order.length - 1, Math.max(0, now + moves[event.key]));
    this.choose(this.order[next]);
  }
}

/** The rank of each tensor in the order of files and offsets; those without a place come last. */
function placesOf() {
  return Float64Array.from({ length: model.total }, (_, t) => (model.own[t].length ? model.own[t][0] : model.piece.tensor.length + t));
}
