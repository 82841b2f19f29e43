// The list of captions. Everything shown comes in as text (textContent), never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const metrics = Object.keys(data.systems[0].scores);
const columns = ["BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE"].filter((name) => metrics.includes(name));
const two = data.systems.length === 2;
const PAGE = 40;
const WORDS = 200; // the most that are shown of a caption; only broken captioners write more
const state = {};
const blocks = new Map();
const find = (id) => document.getElementById(id);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function image(place) {
  const number = Math.floor(place / data.block);
  if (!blocks.has(number)) blocks.set(number, JSON.parse(find(`images-${number}`).textContent));
  return blocks.get(number)[place % data.block];
}

// The value by which a row is sorted; null sorts last in both directions.
function key(place) {
  if (state.metric === "image id") return data.ids[place];
  const values = data.systems.map((system) => {
    if (state.metric === "words") return system.tokens[place].split(" ").filter(Boolean).length;
    return (system.scores[state.metric] || [])[place];
  });
  if (values.some((value) => value === null || value === undefined)) return null;
  if (!two || state.of === "a") return values[0];
  if (state.of === "b") return values[1];
  return state.of === "gain" ? values[1] - values[0] : Math.abs(values[1] - values[0]);
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  const way = state.order === "asc" ? 1 : -1;
  if (typeof a === typeof b) return a < b ? -way : a > b ? way : 0;
  return typeof a === "number" ? -way : way;
}

function matching() {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  const places = data.ids.map((_, place) => place);
  if (!words.length) return places;
  return places.filter((place) => {
    const own = data.systems.flatMap((system) => [system.tokens[place], system.captions[place]]);
    const text = [String(data.ids[place]), ...own, ...data.references[place]].join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

// For each word, the length of the longest run around it (4 at most) that stands in one of the other captions.
function runs(words, others) {
  const longest = new Array(words.length).fill(0);
  for (let n = 1; n <= 4; n++) {
    const known = new Set();
    for (const other of others) {
      for (let i = 0; i + n <= other.length; i++) known.add(other.slice(i, i + n).join(" "));
    }
    for (let i = 0; i + n <= words.length; i++) {
      if (known.has(words.slice(i, i + n).join(" "))) longest.fill(n, i, i + n);
    }
  }
  return longest;
}

function shaded(tokens, others, className) {
  const line = make("p", className);
  const split = (text) => text.split(" ").filter(Boolean).slice(0, WORDS);
  const words = split(tokens);
  const lengths = runs(words, others.map(split));
  words.forEach((word, i) => {
    const run = make("span", `run run-${lengths[i]}`, word);
    run.title = lengths[i] ? `in a run of ${lengths[i]} that a reference has` : "in no reference";
    line.append(run, " ");
  });
  if (!words.length) line.append(make("em", "", "no words"));
  if (words.length === WORDS) line.append("\u2026");
  return line;
}

function details(place) {
  const box = make("details");
  const others = data.references[place];
  box.append(make("summary", "", others.length === 1 ? "1 reference" : `${others.length} references`));
  box.addEventListener("toggle", () => {
    if (!box.open || box.childElementCount > 1) return;
    const list = make("ul");
    for (const reference of others) {
      const item = make("li");
      item.append(shaded(reference, data.systems.map((system) => system.tokens[place]), "reference"));
      list.append(item);
    }
    box.append(list);
    data.systems.forEach((system, n) => {
      const line = make("p", "written", `${two ? `${system.name} wrote: ` : "As written: "}`);
      line.append(make("q", `name-${n}`, system.captions[place].slice(0, 20 * WORDS)));
      box.append(line);
    });
    const all = make("p", "written");
    data.systems.forEach((system) => {
      const scores = metrics.map((name) => `${name} ${number((system.scores[name] || [])[place])}`).join(", ");
      all.append(make("span", "", two ? `${system.name}: ${scores}` : scores), make("br"));
    });
    box.append(all);
  });
  return box;
}

function number(value) {
  return value === null || value === undefined ? "none" : value.toFixed(3);
}

function row(place) {
  const line = make("tr");
  line.dataset.id = data.ids[place];
  if (data.images) {
    const cell = make("td", "image");
    const source = image(place);
    if (source) {
      const image = make("img");
      image.loading = "lazy";
      image.decoding = "async";
      image.alt = `Image ${data.ids[place]}`;
      image.src = `data:image/webp;base64,${source}`;
      cell.append(image);
    } else {
      cell.append(make("span", "missing", "no image"));
    }
    line.append(cell);
  }
  const cell = make("th", "caption");
  cell.scope = "row";
  data.systems.forEach((system, n) => {
    const text = shaded(system.tokens[place], data.references[place], `text text-${n}`);
    if (two) text.prepend(make("b", `letter name-${n}`, "AB"[n]), " ");
    cell.append(text);
  });
  cell.append(make("small", "id", `image ${data.ids[place]}`), details(place));
  line.append(cell);
  for (const name of columns) {
    const scores = make("td", state.metric === name ? "number sorted" : "number");
    scores.dataset.label = name;
    const values = data.systems.map((system) => (system.scores[name] || [])[place]);
    values.forEach((value, n) => scores.append(make("span", `value value-${n}`, number(value))));
    if (two && values.every((value) => typeof value === "number")) {
      const gain = values[1] - values[0];
      scores.append(make("span", "gain", `${gain < 0 ? "−" : "+"}${Math.abs(gain).toFixed(3)}`));
    }
    line.append(scores);
  }
  return line;
}

let places = [];
let shown = 0;

function more(focus) {
  const added = places.slice(shown, shown + PAGE).map(row);
  find("rows").append(...added);
  shown += added.length;
  const left = places.length - shown;
  find("more").hidden = left <= 0;
  find("more").textContent = `Show ${Math.min(PAGE, left)} more of ${left.toLocaleString("en")}`;
  if (focus && added.length) added[0].querySelector("summary").focus();
}

function show() {
  const keys = new Map();
  places = matching();
  for (const place of places) keys.set(place, key(place));
  places.sort((a, b) => compare(keys.get(a), keys.get(b)) || a - b);
  shown = 0;
  find("rows").replaceChildren();
  more(false);
  const order = find("order").selectedOptions[0].textContent;
  const of = two && state.metric !== "image id" ? `, ${find("of").selectedOptions[0].textContent}` : "";
  const which = state.query ? `${places.length.toLocaleString("en")} of ` : "";
  const all = `${data.ids.length.toLocaleString("en")} images`;
  find("status").textContent = `${which}${all}, sorted by ${state.metric}${of}, ${order}.`;
  for (const head of find("heads").children) {
    const sorted = head.dataset.metric === state.metric;
    if (sorted) head.setAttribute("aria-sort", state.order === "asc" ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
  for (const preset of find("presets").children) {
    const order = Object.entries(JSON.parse(preset.dataset.state));
    preset.setAttribute("aria-pressed", String(order.every(([name, value]) => state[name] === value)));
  }
}

function update(change) {
  Object.assign(state, change);
  for (const name of ["metric", "of", "order", "query"]) find(name).value = state[name];
  show();
  // The address holds the order, so that it can be linked to; some browsers refuse that for local files.
  try {
    history.replaceState(null, "", `#${new URLSearchParams(state)}`);
  } catch {}
}

function options(select, entries) {
  for (const [value, text] of entries) {
    const option = make("option", "", text);
    option.value = value;
    select.append(option);
  }
}

const main = columns.includes("CIDEr") ? "CIDEr" : columns[columns.length - 1] || metrics[0];
const names = data.systems.map((system) => system.name);
options(find("metric"), [...metrics, "words", "image id"].map((name) => [name, name]));
options(find("of"), two ? [["size", "the difference"], ["gain", "B - A"], ["a", `A: ${names[0]}`], ["b", `B: ${names[1]}`]] : [["a", names[0]]]);
find("of-label").hidden = !two;
const presets = two
  ? [["Most different", "size", "desc"], ["B better", "gain", "desc"], ["A better", "gain", "asc"], ["Worst of B", "b", "asc"], ["Best of B", "b", "desc"]]
  : [["Worst", "a", "asc"], ["Best", "a", "desc"]];
for (const [text, of, order] of presets) {
  const button = make("button", "", text);
  button.type = "button";
  button.dataset.state = JSON.stringify({ of, order });
  button.addEventListener("click", () => update({ of, order, metric: metrics.includes(state.metric) ? state.metric : main }));
  find("presets").append(button);
}

if (data.images) find("heads").append(make("th", "", "Image"));
find("heads").append(make("th", "", two ? "Captions" : "Caption"));
for (const head of find("heads").children) head.scope = "col";
for (const name of columns) {
  const head = make("th", "number");
  head.scope = "col";
  head.dataset.metric = name;
  const button = make("button", "", name);
  button.type = "button";
  button.addEventListener("click", () => {
    const again = state.metric === name;
    update({ metric: name, order: again && state.order === "desc" ? "asc" : "desc" });
  });
  head.append(button);
  find("heads").append(head);
}

for (const name of ["metric", "of", "order"]) find(name).addEventListener("change", (event) => update({ [name]: event.target.value }));
let typing;
find("query").addEventListener("input", (event) => {
  clearTimeout(typing);
  typing = setTimeout(() => update({ query: event.target.value }), 150);
});
find("controls").addEventListener("submit", (event) => event.preventDefault());
find("more").addEventListener("click", () => more(true));

// The address may name an order; only what the page offers is taken.
const address = new URLSearchParams(location.hash.slice(1));
const start = { metric: main, of: two ? "size" : "a", order: two ? "desc" : "asc", query: (address.get("query") || "").slice(0, 200) };
for (const name of ["metric", "of", "order"]) {
  if ([...find(name).options].some((option) => option.value === address.get(name))) start[name] = address.get(name);
}
update(start);
