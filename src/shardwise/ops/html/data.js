"use strict";

// The checkpoint, as ops/page_data.py writes it: columns of numbers, and tables of what the numbers stand for.

const STATUS = { unknown: 0, equal: 1, changed: 2, differs: 3, another: 4, added: 5 };

/** Control characters, and those that turn the direction of text or cannot be seen, as what they are. */
function shown(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);
}

/** Bytes for people, in powers of 1000. */
function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  let value = bytes;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return unit === 0 ? `${value} ${bytes === 1 ? "byte" : "bytes"}` : `${value.toPrecision(3)} ${units[unit]}`;
}

/** A count with separators. */
function count(value) {
  return value.toLocaleString("en-US");
}

/** A large count in words: 134.5 million. */
function amount(value) {
  for (const [unit, length] of [["trillion", 1e12], ["billion", 1e9], ["million", 1e6]]) {
    if (value >= length) return `${(value / length).toPrecision(4).replace(/\.?0+$/, "")} ${unit}`;
  }
  return count(value);
}

/** A relative difference. */
function relative(value) {
  if (value === Infinity) return "infinite";
  return value === 0 ? "0" : value.toPrecision(3).replace(/e([+-])(\d)$/, "e$10$2");
}

/** A CRC-32C, or nothing. */
function digest(crc) {
  return crc === null || crc === undefined ? null : crc.toString(16).padStart(8, "0");
}

/** The digest of a tensor's bytes: its own, or that of its only piece. */
function digestOf(model, t) {
  const own = model.own[t];
  return model.tensors.crc[t] ?? (own.length === 1 ? model.piece.crc[own[0]] : null);
}

/** Columns as the page uses them; pieces are in the order of their places. */
function readModel(data) {
  const { tensors, pieces } = data;
  const total = tensors.name.length;
  const parameters = new Float64Array(total);
  const nbytes = new Float64Array(total);
  const elements = data.shapes.map((shape) => shape.reduce((product, n) => product * n, 1));
  const lower = new Array(total);
  const shapes = data.shapes.map((shape) => `[${shape.join(", ")}]`);
  for (let t = 0; t < total; t += 1) {
    parameters[t] = elements[tensors.shape[t]];
    nbytes[t] = parameters[t] * data.dtypes[tensors.dtype[t]][1];
    const kind = `${data.dtypes[tensors.dtype[t]][0]} ${shapes[tensors.shape[t]]}`;
    lower[t] = `${tensors.name[t]} ${data.components[tensors.component[t]]} ${kind}`.toLowerCase();
  }
  const order = Array.from(pieces.tensor.keys());
  order.sort((a, b) => pieces.file[a] - pieces.file[b] || pieces.offset[a] - pieces.offset[b] || pieces.nbytes[a] - pieces.nbytes[b]);
  const piece = {
    tensor: Int32Array.from(order, (i) => pieces.tensor[i]),
    file: Int32Array.from(order, (i) => pieces.file[i]),
    offset: Float64Array.from(order, (i) => pieces.offset[i]),
    nbytes: Float64Array.from(order, (i) => pieces.nbytes[i]),
    crc: order.map((i) => pieces.crc[i]),
  };
  const own = Array.from({ length: total }, () => []);
  piece.tensor.forEach((t, i) => own[t].push(i));
  return { ...data, total, parameters, nbytes, lower, shapeText: shapes, piece, own, files: readFiles(data, piece), change: readChange(data, total) };
}

/** Files, each with the range of its pieces. */
function readFiles(data, piece) {
  const files = data.files.map(([path, bytes, header, format, writer, crc], number) => ({
    number, path, bytes, header, format, writer, crc, first: 0, last: 0, why: null,
  }));
  let at = 0;
  for (const file of files) {
    file.first = at;
    while (at < piece.file.length && piece.file[at] === file.number) at += 1;
    file.last = at;
  }
  const unread = new Map(data.unread);
  for (const file of files) file.why = unread.get(file.path) ?? null;
  return files;
}

/** What became of each tensor; null where nothing is compared. */
function readChange(data, total) {
  const found = data.change;
  if (found === null) return null;
  const number = (value) => (value === "infinite" ? Infinity : value ?? NaN);
  const rows = new Map(found.tensor.map((t, row) => [t, row]));
  const column = (values) => Float64Array.from({ length: total }, (_, t) => (rows.has(t) ? number(values[rows.get(t)]) : NaN));
  return {
    ...found,
    relative: column(found.relative),
    largest: column(found.largest),
    elements: column(found.elements),
    was: (t) => found.was[rows.get(t)],
  };
}

/** What became of a tensor, in words. */
function changeText(model, t) {
  const { change } = model;
  switch (change.status[t]) {
    case STATUS.equal: return "equal";
    case STATUS.changed: return relative(change.relative[t]);
    case STATUS.differs: return "differs";
    case STATUS.another: return `was ${change.was(t)}`;
    case STATUS.added: return "only here";
    default: return "not compared";
  }
}

const model = readModel(JSON.parse(document.getElementById("data").textContent));
