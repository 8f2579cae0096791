// The map: one lane for each file, all to one scale; what is in view is the same range of bytes of each.

const AXIS = 28;
const LABEL = 22;
const SMALLEST_SPAN = 64;

class FileMap {
  /**
   * @param {(tensor: number) => void} choose called with the tensor that was clicked or gone to
   */
  constructor(choose) {
    this.choose = choose;
    this.canvas = document.getElementById("canvas");
    this.scroll = document.getElementById("scroll");
    this.tip = document.getElementById("tip");
    this.lanes = model.files.filter((file) => file.last > file.first || (file.why !== null && file.bytes > 0));
    this.most = this.lanes.reduce((most, file) => Math.max(most, file.bytes), 1);
    this.from = 0;
    this.to = this.most;
    this.height = this.lanes.length <= 4 ? 52 : this.lanes.length <= 12 ? 34 : 18;
    this.hovered = -1;
    this.selected = -1;
    this.visible = null;
    this.content = AXIS + this.lanes.length * (LABEL + this.height + 10);
    document.getElementById("spacer").style.height = `${this.content}px`;
    this.listen();
    this.resize();
    new ResizeObserver(() => this.resize()).observe(this.scroll);
  }

  /** What is drawn: entries of pieces and their colours, and which tensors are in full colour (null: all). */
  show(legend, colours, visible, selected) {
    Object.assign(this, { legend, colours, visible, selected });
    this.redraw();
  }

  resize() {
    this.width = this.scroll.clientWidth;
    this.tall = Math.max(1, Math.min(this.content, this.scroll.clientHeight));
    this.ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * this.ratio);
    this.canvas.height = Math.round(this.tall * this.ratio);
    this.canvas.style.height = `${this.tall}px`;
    this.redraw();
  }

  redraw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      if (this.legend && this.width) this.draw();
    });
  }

  get scale() { return this.width / (this.to - this.from); }

  top(lane) { return AXIS + lane * (LABEL + this.height + 10) + LABEL - this.scroll.scrollTop; }

  draw() {
    const context = this.canvas.getContext("2d");
    const { ratio } = this;
    this.style = { ink: token("--ink"), soft: token("--soft"), faint: token("--faint"), line: token("--line"), track: token("--track"),
      card: token("--card"), dim: token("--dim"), head: token("--head"), mono: token("--mono"), sans: token("--sans") };
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.tall);
    this.lanes.forEach((file, lane) => {
      const top = this.top(lane);
      if (top + this.height >= AXIS && top - LABEL <= this.tall) this.drawLane(context, file, top);
    });
    this.drawAxis(context);
    this.drawWindow();
  }

  drawAxis(context) {
    const { style } = this;
    context.fillStyle = style.card;
    context.fillRect(0, 0, this.width, AXIS - 6);
    context.font = `11.5px ${style.sans}`;
    context.textBaseline = "middle";
    context.fillStyle = style.faint;
    const step = niceStep((this.to - this.from) / Math.max(2, this.width / 110));
    for (let at = Math.ceil(this.from / step) * step; at <= this.to; at += step) {
      const x = Math.round((at - this.from) * this.scale) + 0.5;
      const text = at === 0 ? "0" : tick(at, step);
      const wide = context.measureText(text).width;
      if (x + wide / 2 > this.width) continue;
      context.fillRect(x - 0.5, AXIS - 11, 1, 4);
      context.fillText(text, Math.max(0, x - wide / 2), 8);
    }
  }

  drawLane(context, file, top) {
    const { style } = this;
    const end = (file.bytes - this.from) * this.scale;
    context.font = `12px ${style.mono}`;
    context.textBaseline = "alphabetic";
    context.fillStyle = style.soft;
    const right = [file.writer, size(file.bytes)].filter(Boolean).join(" · ");
    const wide = context.measureText(right).width;
    context.fillText(middle(context, shown(file.path), this.width - wide - 24), 0, top - 7);
    context.fillStyle = style.faint;
    context.fillText(right, this.width - wide, top - 7);
    if (end <= 0) return;
    context.fillStyle = style.track;
    context.beginPath();
    context.roundRect(0, top, Math.min(this.width, Math.max(end, 2)), this.height, 4);
    context.fill();
    context.save();
    context.clip();
    if (file.header) {
      context.fillStyle = style.head;
      context.fillRect(-this.from * this.scale, top, Math.max(1, file.header * this.scale), this.height);
    }
    if (file.last === file.first) this.drawUnknown(context, top, end);
    this.drawPieces(context, file, top);
    context.restore();
    this.drawMarks(context, file, top);
  }

  drawUnknown(context, top, end) {
    context.strokeStyle = this.style.head;
    context.lineWidth = 1;
    context.beginPath();
    for (let x = -this.height; x < Math.min(end, this.width); x += 7) {
      context.moveTo(x, top + this.height);
      context.lineTo(x + this.height, top);
    }
    context.stroke();
  }

  drawPieces(context, file, top) {
    const { piece } = model;
    const { scale } = this;
    let drawn = -1;
    context.font = `11px ${this.style.mono}`;
    context.textBaseline = "middle";
    for (let i = this.firstIn(file); i < file.last && piece.offset[i] < this.to; i += 1) {
      const x = (piece.offset[i] - this.from) * scale;
      const wide = piece.nbytes[i] * scale;
      const full = this.visible === null || this.visible[piece.tensor[i]];
      if (wide < 1) {
        // Many on one pixel: the first one there counts, and one that was looked for before any other.
        const pixel = Math.round(x);
        if (pixel === drawn && !(full && this.visible !== null)) continue;
        drawn = pixel;
      }
      const colour = full ? this.colours[this.legend.pieces[i]] : this.style.dim;
      context.fillStyle = colour;
      // On whole pixels: between two that meet nothing of what is behind them is to be seen.
      const left = Math.round(x * this.ratio) / this.ratio;
      const right = Math.round((x + wide) * this.ratio) / this.ratio - (wide > 5 ? 1 : 0);
      context.fillRect(left, top, Math.max(right - left, 1), this.height);
      if (wide > 70 && this.height > 16) this.drawName(context, i, Math.max(0, x), Math.min(this.width, x + wide), top, full ? colour : null);
    }
  }

  drawName(context, i, left, right, top, colour) {
    const name = shown(model.tensors.name[model.piece.tensor[i]]).replace(/\.weight(?=$|\.[^.]+$)/, ""); // as most names end
    const text = ending(context, name, right - left - 16);
    if (!text) return;
    context.fillStyle = colour === null ? this.style.faint : isLight(colour) ? "rgb(20 18 14 / 82%)" : "rgb(255 255 255 / 94%)";
    context.fillText(text, left + 8, top + this.height / 2 + 0.5);
  }

  drawMarks(context, file, top) {
    const { piece } = model;
    for (const [tensor, thick] of [[this.hovered, 1], [this.selected, 2]]) {
      for (const i of tensor < 0 ? [] : model.own[tensor]) {
        if (piece.file[i] !== file.number) continue;
        const x = (piece.offset[i] - this.from) * this.scale;
        const wide = Math.max(piece.nbytes[i] * this.scale, 3);
        if (x > this.width || x + wide < 0) continue;
        context.lineWidth = thick + 2;
        context.strokeStyle = this.style.card;
        context.strokeRect(x, top - 1, wide, this.height + 2);
        context.lineWidth = thick;
        context.strokeStyle = this.style.ink;
        context.strokeRect(x, top - 1, wide, this.height + 2);
      }
    }
  }

  drawWindow() {
    const all = this.isAll;
    const part = document.getElementById("window").style;
    part.width = `${((this.to - this.from) / this.most) * 100}%`;
    part.marginLeft = `min(${(this.from / this.most) * 100}%, calc(100% - 10px))`;
    document.getElementById("span").textContent = all ? `${size(this.most)} across` : `${size(this.to - this.from)} across, from ${size(Math.round(this.from))}`;
    document.getElementById("fit").disabled = all;
  }

  get isAll() { return this.from === 0 && this.to === this.most; }

  /** The first piece of a file that reaches into view. */
  firstIn(file) {
    let [low, high] = [file.first, file.last];
    while (low < high) {
      const at = (low + high) >> 1;
      if (model.piece.offset[at] + model.piece.nbytes[at] < this.from) low = at + 1;
      else high = at;
    }
    return low;
  }

  /** Put a range of bytes in view. */
  view(from, to) {
    const span = Math.min(this.most, Math.max(SMALLEST_SPAN, to - from));
    this.from = Math.min(Math.max(0, from), this.most - span);
    this.to = this.from + span;
    this.redraw();
  }

  /** Zoom about a point, a part of the width. */
  zoom(factor, at = 0.5) {
    const middle = this.from + (this.to - this.from) * at;
    const span = Math.min(this.most, (this.to - this.from) * factor);
    this.view(middle - span * at, middle + span * (1 - at));
  }

  pan(bytes) { this.view(this.from + bytes, this.to + bytes); }

  /** Bring a tensor into view, large enough to be seen. */
  goTo(tensor, closer) {
    const i = model.own[tensor][0];
    if (i === undefined) return;
    const { piece } = model;
    const [offset, bytes] = [piece.offset[i], piece.nbytes[i]];
    const tiny = bytes * this.scale < 8;
    if (closer || tiny || offset < this.from || offset + bytes > this.to) {
      const span = closer || tiny ? Math.max(bytes * 6, SMALLEST_SPAN) : Math.max(this.to - this.from, bytes * 1.5);
      this.view(offset + bytes / 2 - span / 2, offset + bytes / 2 + span / 2);
    }
    const lane = this.lanes.findIndex((file) => file.number === piece.file[i]);
    const top = this.top(lane);
    if (top - LABEL < AXIS) this.scroll.scrollTop += top - LABEL - AXIS - 4;
    else if (top + this.height > this.tall) this.scroll.scrollTop += top + this.height - this.tall + 8;
    this.redraw();
  }

  /** The piece at a point of the canvas, or -1. */
  pieceAt(x, y) {
    if (y < AXIS - 8) return -1;
    const lane = this.lanes.findIndex((_, number) => y >= this.top(number) && y < this.top(number) + this.height);
    if (lane < 0) return -1;
    const { piece } = model;
    const file = this.lanes[lane];
    const at = this.from + x / this.scale;
    const near = 1.5 / this.scale;
    let [found, distance] = [-1, Infinity];
    for (let i = this.firstIn(file); i < file.last && piece.offset[i] <= at + near; i += 1) {
      const away = Math.max(piece.offset[i] - at, at - piece.offset[i] - piece.nbytes[i], 0) + (this.visible && !this.visible[piece.tensor[i]] ? near : 0);
      if (away <= near && away <= distance) [found, distance] = [i, away];
    }
    return found;
  }

  listen() {
    const { canvas } = this;
    this.scroll.addEventListener("scroll", () => this.redraw());
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(Math.exp(event.deltaY * (event.deltaMode ? 0.05 : 0.004)), event.offsetX / this.width);
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => this.zoom(event.shiftKey ? 2.5 : 0.4, event.offsetX / this.width));
    canvas.addEventListener("keydown", (event) => this.key(event));
    this.listenToPointers();
    this.listenToTrack();
    const buttons = { in: () => this.zoom(0.5), out: () => this.zoom(2), fit: () => this.view(0, this.most) };
    for (const [id, act] of Object.entries(buttons)) document.getElementById(id).addEventListener("click", act);
  }

  listenToPointers() {
    const { canvas } = this;
    const down = new Map();
    let moved = false;
    canvas.addEventListener("pointerdown", (event) => {
      down.set(event.pointerId, event.offsetX);
      moved = down.size > 1;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = down.get(event.pointerId);
      if (before === undefined) return this.hover(event);
      const others = [...down].filter(([id]) => id !== event.pointerId).map(([, x]) => x);
      if (others.length) {
        const [old, now] = [Math.abs(before - others[0]), Math.abs(event.offsetX - others[0])];
        if (old > 8 && now > 8) this.zoom(old / now, (event.offsetX + others[0]) / 2 / this.width);
      } else if (moved || Math.abs(event.offsetX - before) > 4) {
        moved = true;
        this.pan((before - event.offsetX) / this.scale);
      } else return undefined;
      down.set(event.pointerId, event.offsetX);
      return this.hover(null);
    });
    const up = (event) => {
      if (down.delete(event.pointerId) && !moved && event.type === "pointerup") {
        const i = this.pieceAt(event.offsetX, event.offsetY);
        if (i >= 0) this.choose(model.piece.tensor[i]);
      }
    };
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, up);
    canvas.addEventListener("pointerleave", () => this.hover(null));
  }

  listenToTrack() {
    const track = document.getElementById("track");
    const go = (event) => {
      const at = ((event.clientX - track.getBoundingClientRect().left) / track.clientWidth) * this.most;
      this.view(at - (this.to - this.from) / 2, at + (this.to - this.from) / 2);
    };
    track.addEventListener("pointerdown", (event) => {
      track.setPointerCapture(event.pointerId);
      go(event);
    });
    track.addEventListener("pointermove", (event) => { if (track.hasPointerCapture(event.pointerId)) go(event); });
  }

  hover(event) {
    const i = event === null ? -1 : this.pieceAt(event.offsetX, event.offsetY);
    const tensor = i < 0 ? -1 : model.piece.tensor[i];
    if (tensor !== this.hovered) {
      this.hovered = tensor;
      this.redraw();
    }
    this.tip.hidden = i < 0;
    if (i < 0) return;
    this.tip.replaceChildren(element("b", {}, shown(model.tensors.name[tensor])), element("span", {}, tipText(i)));
    const [wide, tall] = [this.tip.offsetWidth, this.tip.offsetHeight];
    const below = event.clientY + 18 + tall < window.innerHeight;
    this.tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, window.innerWidth - wide - 8))}px`;
    this.tip.style.top = `${below ? event.clientY + 18 : event.clientY - tall - 12}px`;
  }

  key(event) {
    const acts = {
      ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1),
      ArrowDown: () => this.stepLane(1), ArrowUp: () => this.stepLane(-1),
      "+": () => this.zoom(0.5, this.anchor), "=": () => this.zoom(0.5, this.anchor), "-": () => this.zoom(2, this.anchor),
      0: () => this.view(0, this.most), Enter: () => { if (this.selected >= 0) this.goTo(this.selected, true); },
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in acts)) return;
    event.preventDefault();
    acts[event.key]();
  }

  /** Where to zoom: at the selected tensor, where it is in view. */
  get anchor() {
    const i = this.selected < 0 ? undefined : model.own[this.selected][0];
    const at = i === undefined ? 0.5 : (model.piece.offset[i] + model.piece.nbytes[i] / 2 - this.from) / (this.to - this.from);
    return at >= 0 && at <= 1 ? at : 0.5;
  }

  /** Go to the next tensor in the order of places that is in full colour. */
  step(by) {
    const { piece } = model;
    const total = piece.tensor.length;
    let i = this.selected < 0 || !model.own[this.selected].length ? (by > 0 ? -1 : total) : model.own[this.selected][0];
    do i += by; while (i >= 0 && i < total && this.visible !== null && !this.visible[piece.tensor[i]]);
    if (i >= 0 && i < total) this.choose(piece.tensor[i]);
  }

  stepLane(by) {
    const i = this.selected < 0 ? undefined : model.own[this.selected][0];
    const lane = i === undefined ? -1 : this.lanes.findIndex((file) => file.number === model.piece.file[i]);
    for (let next = lane + by; next >= 0 && next < this.lanes.length; next += by) {
      const file = this.lanes[next];
      if (file.last > file.first) return this.choose(model.piece.tensor[Math.min(this.firstIn(file), file.last - 1)]);
    }
    return undefined;
  }
}

/** A round number of bytes near another. */
function niceStep(bytes) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, bytes)));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= bytes) ?? 10 * power;
}

/** An offset on the axis, with as many digits as its neighbours differ in. */
function tick(at, step) {
  const [unit, name] = at >= 1e12 ? [1e12, "TB"] : at >= 1e9 ? [1e9, "GB"] : at >= 1e6 ? [1e6, "MB"] : at >= 1e3 ? [1e3, "kB"] : [1, "B"];
  const digits = Math.max(0, Math.min(9, -Math.floor(Math.log10(step / unit) + 1e-9)));
  return `${(at / unit).toFixed(digits)} ${name}`;
}

/** A text that fits, with its middle left out. */
function middle(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  const keep = Math.max(4, Math.floor(room / context.measureText("m").width) - 1);
  return `${text.slice(0, Math.floor(keep / 3))}…${text.slice(text.length - Math.ceil((keep * 2) / 3))}`;
}

/** As many of a name's last parts as fit; empty if not even one does. */
function ending(context, name, room) {
  const wide = context.measureText("m").width;
  if (name.length * wide <= room) return name;
  const parts = name.split(".");
  let text = "";
  for (let i = parts.length - 1; i >= 0; i -= 1) {
    const longer = text ? `${parts[i]}.${text}` : parts[i];
    if (longer.length * wide > room) break;
    text = longer;
  }
  return text;
}

function tipText(i) {
  const t = model.piece.tensor[i];
  const whole = model.own[t].length === 1 ? "" : ` of ${size(model.nbytes[t])}`;
  const change = model.change === null ? "" : ` · ${changeText(model, t)}`;
  return `${model.dtypes[model.tensors.dtype[t]][0]} ${model.shapeText[model.tensors.shape[t]]} · ${size(model.piece.nbytes[i])}${whole} at ${count(model.piece.offset[i])}${change}`;
}

/** A name as text that may be broken behind its dots, dashes and the like, and only there while there is room. */
function breakable(name) {
  return shown(name).split(/(?<=[._/-])/).flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part]));
}

/** A DOM node; texts are texts, whatever is in them. */
function element(kind, attributes = {}, ...children) {
  const node = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(node.style, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}
