// Colours: by module, by writer, by dtype, by change. Each gives every piece an entry of the legend.

const COLOURS = 10;

/** The value of a custom property of the style sheet. */
function token(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A colour for the i-th of many; beyond the palette, evenly around the circle. */
function ofMany(i, total) {
  return total <= COLOURS ? `--c${i}` : `oklch(0.66 0.12 ${Math.round((i * 360) / total + 250) % 360})`;
}

/** An entry of the legend. */
function entry(label, colour, note = "") {
  return { label, colour, note, tensors: 0, parameters: 0, nbytes: 0 };
}

/** Entries, and of each piece and tensor the number of its entry; what each has is added up. */
function legendOf(entries, entryOf) {
  const { piece, own } = model;
  const pieces = Int32Array.from(piece.tensor, (t, i) => entryOf(t, i));
  const tensors = new Int32Array(model.total);
  for (let t = 0; t < model.total; t += 1) {
    const of = own[t].length ? own[t].map((i) => pieces[i]) : [entryOf(t, -1)];
    tensors[t] = of[0];
    for (const e of new Set(of)) entries[e].tensors += 1;
    entries[of[0]].parameters += model.parameters[t];
    if (!own[t].length) entries[of[0]].nbytes += model.nbytes[t];
  }
  piece.nbytes.forEach((bytes, i) => { entries[pieces[i]].nbytes += bytes; });
  return { entries, pieces, tensors };
}

function byModule() {
  const { module, component } = model.tensors;
  const several = model.components.length > 1;
  const bytes = new Map();
  const key = (t) => `${module[t]} ${component[t]}`;
  for (let t = 0; t < model.total; t += 1) bytes.set(key(t), (bytes.get(key(t)) ?? 0) + model.nbytes[t]);
  const largest = [...bytes].sort((a, b) => b[1] - a[1]);
  const coloured = largest.length > COLOURS ? largest.slice(0, COLOURS - 1) : largest;
  const entries = coloured.map(([id], i) => {
    const [m, c] = id.split(" ").map(Number);
    return entry(model.modules[m] || "(no module)", `--c${i}`, several ? model.components[c] : "");
  });
  if (largest.length > coloured.length) entries.push(entry(`${largest.length - coloured.length} smaller modules`, "--grey"));
  const numbers = new Map(coloured.map(([id], i) => [id, i]));
  return { title: several ? "Values by module" : "Parameters by module", ...legendOf(entries, (t) => numbers.get(key(t)) ?? coloured.length) };
}

function byDtype() {
  const names = model.dtypes.map(([code]) => code);
  const entries = names.map((code, i) => entry(code, ofMany(i, names.length)));
  return { title: "Dtypes", ...legendOf(entries, (t) => model.tensors.dtype[t]) };
}

function byWriter() {
  const writers = [...new Set(model.files.filter((f) => f.last > f.first && f.writer).map((f) => f.writer))];
  writers.sort(new Intl.Collator("en", { numeric: true }).compare);
  const entries = writers.map((name, i) => entry(name, ofMany(i, writers.length)));
  const numbers = new Map(writers.map((name, i) => [name, i]));
  entries.push(entry("not recorded", "--grey", "all ranks write to these files together, or nobody noted who did"));
  const unknown = writers.length;
  const found = legendOf(entries, (t, i) => (i < 0 ? unknown : numbers.get(model.files[model.piece.file[i]].writer) ?? unknown));
  return { title: "Written by, as the files' names say", ...found };
}

const DECADES = [-6, -5, -4, -3, -2, -1, 0];

/** The step of the ramp for a relative difference. */
function decade(value) {
  return DECADES.filter((power) => value >= 10 ** power).length;
}

function byChange() {
  const power = (p) => (p < -3 ? `1e${p}` : String(10 ** p));
  const steps = ["below 1e-6", ...DECADES.slice(0, -1).map((p) => `${power(p)} to ${power(p + 1)}`), "1 and above"];
  const entries = [
    entry("equal", "--equal"),
    ...steps.map((text, i) => entry(text, `--r${i}`)),
    entry("differs", "--other", "shape or dtype, or nobody read by how much"),
    entry("only here", "--added"),
    entry("not compared", "--grey"),
  ];
  const { change } = model;
  const [differs, added, unknown] = [9, 10, 11];
  const of = (t) => {
    switch (change.status[t]) {
      case STATUS.equal: return 0;
      case STATUS.changed: return 1 + decade(change.relative[t]);
      case STATUS.differs: case STATUS.another: return differs;
      case STATUS.added: return added;
      default: return unknown;
    }
  };
  return { title: "Relative difference", ...legendOf(entries, of) };
}

const MODES = { module: ["Module", byModule], rank: ["Rank", byWriter], dtype: ["Dtype", byDtype], change: ["Change", byChange] };

/** What the canvas and the swatches are painted with, which differs between light and dark. */
function paints(legend) {
  return legend.entries.map(({ colour }) => (colour.startsWith("--") ? token(colour) : colour));
}

/** Whether dark text is read better on a colour. */
function isLight(colour) {
  const hex = /^#(..)(..)(..)$/.exec(colour);
  if (hex === null) return true;
  const [r, g, b] = hex.slice(1).map((part) => parseInt(part, 16));
  return 0.299 * r + 0.587 * g + 0.114 * b > 140;
}
