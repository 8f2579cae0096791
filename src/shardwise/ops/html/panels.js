// The panels around map and list: title, tensor, legend, change by layer, files.

const MOST_LAYERS = 1000;
const MOST_PLACES = 64;
const MOST_NAMES = 500;
const MOST_FILES = 2000;

function pairs(rows) {
  return rows.filter(([, value]) => value !== null).map(([name, ...value]) => element("div", {}, element("dt", {}, name), element("dd", {}, ...value)));
}

function fillTitle() {
  document.getElementById("name").textContent = shown(model.name);
  document.getElementById("path").textContent = shown(model.path);
  const held = model.files.reduce((sum, file) => sum + file.bytes, 0);
  const parameters = (component) => model.parameters.reduce((sum, n, t) => sum + (model.tensors.component[t] === component ? n : 0), 0);
  const totals = model.components.length && model.components.length <= 4
    ? model.components.map((name, c) => [model.components.length === 1 ? "Parameters" : `Values in ${shown(name)}`, amount(parameters(c))])
    : [["Components", count(model.components.length)], ["Values", amount(model.parameters.reduce((sum, n) => sum + n, 0))]];
  document.getElementById("totals").append(...pairs([...totals, ["Tensors", count(model.total)], ["Files", count(model.files.length)], ["On disk", size(held)]]));
  const compared = model.change === null ? [] : [["Compared with", shown(model.change.against)]];
  document.getElementById("facts").append(...pairs([...model.facts.map(([name, value]) => [shown(name), shown(value)]), ...compared]));
}

function fillMapNote(map) {
  const others = model.files.length - map.lanes.length;
  const unplaced = model.own.filter((own, t) => !own.length && model.nbytes[t] > 0).length;
  const unknown = map.lanes.filter((file) => file.last === file.first).length;
  document.getElementById("mapnote").textContent = [
    unknown ? `Hatched: ${unknown === 1 ? "a file" : `${unknown} files`} whose tensors could not be listed.` : "",
    unplaced ? `${count(unplaced)} tensors have no place here: where they lie in their files is not recorded.` : "",
    others && map.lanes.length ? `${count(others)} ${others === 1 ? "file" : "files"} without listed tensors ${others === 1 ? "is" : "are"} in the table below.` : "",
    map.lanes.length ? "" : "No file has tensors whose places are known.",
  ].filter(Boolean).join(" ");
}

/** Why a tensor has no digest of its own. */
function noDigest(t) {
  if (!model.manifest) return "none: there is no manifest";
  return model.own[t].some((i) => model.piece.crc[i] !== null) ? "one for each piece, below" : "not recorded for this tensor";
}

function fillDetails(t, goTo) {
  const body = document.getElementById("detailsbody");
  document.getElementById("details").classList.toggle("chosen", t >= 0);
  if (t < 0) {
    body.replaceChildren(element("p", { class: "empty" }, "Choose a tensor on the map or in the list."));
    return;
  }
  const { tensors, change } = model;
  const own = model.own[t];
  const crc = digest(digestOf(model, t));
  const rows = [
    ["Component", shown(model.components[tensors.component[t]])],
    ["Dtype", model.dtypes[tensors.dtype[t]][0]],
    ["Shape", element("code", {}, model.shapeText[tensors.shape[t]])],
    ["Values", count(model.parameters[t])],
    ["Size", `${size(model.nbytes[t])}${model.nbytes[t] >= 1000 ? ` (${count(model.nbytes[t])})` : ""}`],
    ["CRC-32C", crc === null ? noDigest(t) : element("code", {}, crc)],
    ...(change === null ? [] : changeRows(t)),
  ];
  body.replaceChildren(
    element("p", { class: "fullname" }, ...breakable(tensors.name[t])),
    element("dl", { class: "pairs" }, ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    places(own),
    own.length ? element("button", { class: "plain", type: "button", onclick: goTo }, "Show on the map") : "",
  );
}

function changeRows(t) {
  const { change } = model;
  if (change.status[t] !== STATUS.changed) return [["Change", shown(changeText(model, t))]];
  return [
    ["Change", `${relative(change.relative[t])} of its norm`],
    ["Largest", relative(change.largest[t])],
    ["Differing", `${count(change.elements[t])} values`],
  ];
}

function places(own) {
  const { piece } = model;
  if (!own.length) return element("p", { class: "places note" }, "Where it lies in its files is not recorded.");
  const items = own.slice(0, MOST_PLACES).map((i) => {
    const file = model.files[piece.file[i]];
    const from = piece.offset[i];
    const crc = own.length > 1 ? digest(piece.crc[i]) : null;
    return element("li", {},
      element("b", {}, ...breakable(file.path)),
      element("span", {}, `bytes ${count(from)} to ${count(from + piece.nbytes[i])}${file.writer ? `, ${file.writer}` : ""}${crc ? ", " : ""}`),
      crc ? element("code", {}, crc) : "");
  });
  if (own.length > MOST_PLACES) items.push(element("li", {}, element("span", {}, `and ${count(own.length - MOST_PLACES)} more pieces`)));
  return element("ul", { class: "places" }, ...items);
}

function fillLegend(legend, colours, mode, chosen, choose) {
  document.getElementById("legendhead").textContent = legend.title;
  const values = mode === "module" || mode === "dtype";
  const rows = legend.entries.map((each, i) => [each, i]).filter(([each]) => each.tensors);
  const most = mode === "module" ? [...rows].sort((a, b) => b[0].nbytes - a[0].nbytes) : rows;
  document.getElementById("legend").replaceChildren(...most.map(([each, i]) => element("button",
    { class: "entry", type: "button", "aria-pressed": String(i === chosen), onclick: () => choose(i === chosen ? -1 : i) },
    element("i", { class: "swatch", style: { background: colours[i] } }),
    element("span", { class: "label" }, ...breakable(each.label)),
    element("span", { class: "amount" }, values ? amount(each.parameters) : size(each.nbytes)),
    element("span", { class: "share" }, [each.note && shown(each.note), `${count(each.tensors)} ${each.tensors === 1 ? "tensor" : "tensors"}`, values ? size(each.nbytes) : ""].filter(Boolean).join(" · ")))));
}

/** What became of the tensors of each layer, layers as they are counted. */
function layers() {
  const { change } = model;
  const found = model.layers.map(([component, name], number) => ({ number, component, name, total: 0, changed: 0, largest: NaN, other: 0 }));
  for (let t = 0; t < model.total; t += 1) {
    const layer = found[model.tensors.layer[t]];
    layer.total += 1;
    if (change.status[t] === STATUS.changed) {
      layer.changed += 1;
      layer.largest = layer.largest >= change.relative[t] ? layer.largest : change.relative[t];
    } else if (change.status[t] !== STATUS.equal) layer.other += 1;
  }
  return found.sort((a, b) => a.component - b.component || natural.compare(a.name, b.name));
}

function fillChange(search) {
  const { change } = model;
  if (change === null) return;
  document.getElementById("change").hidden = false;
  const of = (...kinds) => change.status.filter((status) => kinds.includes(status)).length;
  const said = [
    [of(STATUS.changed), "changed"], [of(STATUS.equal), "equal"], [of(STATUS.differs), "differ, by how much was not read"], [of(STATUS.another), "of another shape or dtype"],
    [of(STATUS.added), "only here"], [change.gone.length, "only in the other"], [of(STATUS.unknown), "not compared"],
  ].filter(([number]) => number).map(([number, text]) => `${count(number)} ${text}`);
  document.getElementById("changehead").append(element("small", {}, said.join(", ")));
  const rows = layers();
  const largest = rows.map((row) => row.largest).filter((value) => value > 0 && value < Infinity);
  const low = Math.floor(Math.log10(largest.reduce((a, b) => Math.min(a, b), 0.1))) - 0.3;
  const high = Math.ceil(Math.log10(largest.reduce((a, b) => Math.max(a, b), 1e-9)) + 1e-9);
  const body = [
    element("p", { class: "note" }, `The largest relative difference of a tensor in each layer: the norm of the difference by the norm in ${shown(change.against)}. Bars are logarithmic.`),
    element("div", { class: "layers" }, ...rows.slice(0, MOST_LAYERS).map((row) => layerRow(row, low, high, search))),
    rows.length > MOST_LAYERS ? element("p", { class: "note" }, `and ${count(rows.length - MOST_LAYERS)} more layers`) : "",
    ...listed("Only in the other", change.gone.map(([component, name]) => `${component}  ${name}`)),
    ...listed("Differences of configuration", change.configs.map(([file, key, a, b]) => `${file}${key ? `: ${key}` : ""}  ${a} → ${b}`)),
    ...change.notes.map((note) => element("p", { class: "sub" }, shown(note))),
  ];
  document.getElementById("changebody").replaceChildren(...body);
}

function layerRow(row, low, high, search) {
  const infinite = row.largest === Infinity;
  const part = infinite ? 1 : row.largest > 0 ? Math.max(0.02, Math.min(1, (Math.log10(row.largest) - low) / Math.max(1, high - low))) : 0;
  const name = shown(row.name) || "(no module)";
  const said = row.changed ? relative(row.largest) : row.other === row.total ? "–" : "equal";
  const label = model.components.length > 1 ? `${shown(model.components[row.component])}  ${name}` : name;
  return element("button", { class: "layer", type: "button", title: label, onclick: () => search(row) },
    element("span", { class: "label" }, label),
    element("span", { class: "beam" }, element("i", { style: { width: `${part * 100}%`, background: part ? `var(--r${infinite ? 7 : decade(row.largest)})` : "none" } })),
    element("span", { class: "r" }, said),
    element("span", { class: "c" }, `${count(row.changed)} of ${count(row.total)}`));
}

function listed(title, names) {
  if (!names.length) return [];
  const more = names.length - MOST_NAMES;
  return [
    element("p", { class: "sub" }, title),
    element("div", { class: "names", tabindex: 0, role: "region", "aria-label": title }, ...names.slice(0, MOST_NAMES).map((name) => element("div", {}, shown(name))),
      more > 0 ? element("div", {}, `and ${count(more)} more`) : ""),
  ];
}

function fillFiles() {
  const counts = model.files.map((file) => new Set(model.piece.tensor.subarray(file.first, file.last)).size);
  const heads = [["File"], ["Size", "right"], ["Tensors", "right"], ["Format, by its first bytes"], ["Written by"], ["CRC-32C"]];
  const writers = model.files.some((file) => file.writer);
  const digests = model.manifest;
  const columns = [true, true, true, true, writers, digests];
  const row = (cells) => element("tr", {}, ...cells.filter((_, i) => columns[i]));
  document.getElementById("files").replaceChildren(element("table", {},
    element("thead", {}, row(heads.map(([text, kind]) => element("th", { class: kind ?? null, scope: "col" }, text)))),
    element("tbody", {}, ...model.files.slice(0, MOST_FILES).map((file, i) => row([
      element("td", { class: "p" }, ...breakable(file.path), file.why === null ? "" : element("em", {}, `Not read: ${shown(file.why)}`)),
      element("td", { class: "right", title: `${count(file.bytes)} bytes` }, size(file.bytes)),
      element("td", { class: "right" }, counts[i] ? count(counts[i]) : "–"),
      element("td", {}, file.format === null ? "unknown" : shown(file.format)),
      element("td", {}, file.writer ?? "–"),
      element("td", { class: "m", title: file.header ? "of the header; the rest of the file has one for each tensor" : "of the whole file" }, digest(file.crc) ?? "–"),
    ])))));
  if (model.files.length > MOST_FILES) {
    document.getElementById("files").append(element("p", { class: "note" }, `and ${count(model.files.length - MOST_FILES)} more files`));
  }
}
