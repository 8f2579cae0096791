// The page as a whole: what was searched, how it is coloured, what is chosen. All of it is in the address, behind the #.

const state = { search: "", colour: "module", tensor: -1, theme: "auto", entry: -1 };
const searchField = document.getElementById("search");
const map = new FileMap(choose);
const list = new TensorList(choose);
let legend = null;
let colours = [];

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state.search = given.get("search") ?? "";
  if (given.get("colour") in MODES && (given.get("colour") !== "change" || model.change)) state.colour = given.get("colour");
  else state.colour = model.change ? "change" : "module";
  if (["light", "dark"].includes(given.get("theme"))) state.theme = given.get("theme");
  state.tensor = given.has("tensor") ? model.tensors.name.indexOf(given.get("tensor")) : -1;
}

function writeAddress() {
  const parts = new URLSearchParams();
  if (state.search) parts.set("search", state.search);
  if (state.colour !== (model.change ? "change" : "module")) parts.set("colour", state.colour);
  if (state.theme !== "auto") parts.set("theme", state.theme);
  if (state.tensor >= 0) parts.set("tensor", model.tensors.name[state.tensor]);
  try {
    history.replaceState(null, "", `#${parts}`);
  } catch {
    // A frame without an address of its own: the page works, and its state cannot be passed on.
  }
}

/** The tensors that have every word that was typed in name, component, dtype or shape. */
function matching() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return null;
  return Uint8Array.from(model.lower, (text) => Number(words.every((word) => text.includes(word))));
}

/** Choose one of several with the arrow keys, as radio buttons are. */
function segments(id, choices, chosen, act) {
  const host = document.getElementById(id);
  const buttons = choices.map(([value, text, why]) => element("button", {
    type: "button", role: "radio", "data-value": value, "aria-checked": String(value === chosen), tabindex: value === chosen ? 0 : -1,
    disabled: Boolean(why), title: why ?? null, onclick: () => act(value),
  }, text));
  host.replaceChildren(...buttons);
  host.onkeydown = (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const open = choices.filter(([, , why]) => !why).map(([value]) => value);
    if (by === undefined || !open.length) return;
    event.preventDefault();
    act(open[(open.indexOf(chosen) + by + open.length) % open.length]);
    host.querySelector('[aria-checked="true"]').focus();
  };
}

function showTheme() {
  if (state.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = state.theme;
  const choices = [["auto", "Auto"], ["light", "Light"], ["dark", "Dark"]];
  segments("theme", choices, state.theme, (theme) => {
    state.theme = theme;
    showTheme();
    paint();
    writeAddress();
  });
}

function showColours() {
  const choices = Object.entries(MODES).filter(([mode]) => mode !== "change" || model.change).map(([mode, [text]]) => [mode, text]);
  segments("colour", choices, state.colour, (mode) => {
    state.colour = mode;
    state.entry = -1;
    showColours();
    writeAddress();
  });
  legend = MODES[state.colour][1]();
  paint();
}

/** Everything that has a colour, or depends on what was searched. */
function paint() {
  colours = paints(legend);
  const found = matching();
  const inEntry = state.entry < 0 ? null : (t) => legend.tensors[t] === state.entry || model.own[t].some((i) => legend.pieces[i] === state.entry);
  const isIn = (t) => (found === null || found[t]) && (inEntry === null || inEntry(t));
  const all = found === null && inEntry === null;
  const visible = all ? null : Uint8Array.from({ length: model.total }, (_, t) => Number(isIn(t)));
  const tensors = Array.from({ length: model.total }, (_, t) => t).filter((t) => all || visible[t]);
  map.show(legend, colours, visible, state.tensor);
  list.show(tensors, Array.from(legend.tensors, (e) => colours[e]), state.tensor);
  fillLegend(legend, colours, state.colour, state.entry, (entry) => {
    state.entry = entry;
    paint();
  });
  document.getElementById("count").textContent = all
    ? `${count(model.total)} ${model.total === 1 ? "tensor" : "tensors"}`
    : `${count(tensors.length)} of ${count(model.total)} tensors`;
  document.documentElement.dataset.shown = String(tensors.length);
}

function choose(tensor) {
  state.tensor = tensor;
  map.selected = tensor;
  if (tensor >= 0) map.goTo(tensor, false);
  list.select(tensor);
  fillDetails(tensor, () => {
    map.goTo(tensor, true);
    map.canvas.focus();
  });
  document.getElementById("spoken").textContent = tensor < 0 ? "" : `${shown(model.tensors.name[tensor])}, ${size(model.nbytes[tensor])}`;
  writeAddress();
}

function search(text) {
  state.search = text;
  searchField.value = text;
  list.host.scrollTop = 0;
  paint();
  writeAddress();
}

function listen() {
  searchField.addEventListener("input", () => search(searchField.value));
  searchField.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && list.order.length) choose(list.order[0]);
    if (event.key === "Escape") search("");
    if (event.key === "ArrowDown" && list.order.length) {
      event.preventDefault();
      list.host.focus();
      choose(list.order[0]);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target === searchField) return;
    event.preventDefault();
    searchField.focus();
    searchField.select();
  });
  document.getElementById("close").addEventListener("click", () => choose(-1));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint());
  window.addEventListener("hashchange", () => {
    readAddress();
    start();
  });
}

function start() {
  searchField.value = state.search;
  showTheme();
  showColours();
  choose(state.tensor);
}

readAddress();
fillTitle();
fillMapNote(map);
fillFiles();
fillChange((row) => search(row.name ? `${row.name}.` : ""));
start();
listen();
// How long it took from the first byte to here, for whoever asks.
document.documentElement.dataset.ready = String(Math.round(performance.now()));
