"use strict";
// The gallery: pictures of report-data, sorted, filtered, enlarged. And tables sorted by their headers.
const data = JSON.parse(document.getElementById("report-data").textContent);
const at = name => document.getElementById(name);
const [gallery, sort, of, order, filter, kind, more, viewer] =
  ["gallery", "sort", "of", "order", "filter", "kind", "more", "viewer"].map(at);
const FIRST = 12, MORE = 60, SETS = Object.keys(data.values), MAIN = SETS[0];
const visible = data.columns.map(column => column.on);
let shown = FIRST, chosen = [], open = null;

function element(tag, text, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- which images, in which order ---

// An order that has nothing to do with the ids, and is the same each time.
function scrambled(id) { return Math.imul(id ^ (id >>> 7), 2654435761) >>> 0; }

// What the images are sorted by: a metric of a set, or of the reconstructions minus that of a set.
function valueOf(i) {
  if (sort.value === "random") return scrambled(data.ids[i]);
  if (sort.value === "id") return data.ids[i];
  const values = label => data.values[label][sort.value][i];
  if (!of.value.startsWith("minus ")) return values(of.value);
  const pair = [values(MAIN), values(of.value.slice(6))];
  return pair.includes(null) ? null : pair[0] - pair[1];
}

function sortedBy() {
  const metric = data.titles[sort.value] !== undefined;
  const up = !metric || data.lower_is_better.includes(sort.value);
  const sign = (up ? 1 : -1) * (metric && order.getAttribute("aria-pressed") === "true" ? -1 : 1);
  const values = data.ids.map((_, i) => valueOf(i));
  return (a, b) => values[a] === null || values[b] === null
    ? (values[a] === null) - (values[b] === null) : sign * (values[a] - values[b]) || data.ids[a] - data.ids[b];
}

// Numbers are ids, of which any will do; words must all be in the captions.
function found(i) {
  if (kind.value !== "" && data.kinds[i] !== Number(kind.value)) return false;
  const words = filter.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const ids = words.filter(word => /^\d+$/.test(word)), others = words.filter(word => !/^\d+$/.test(word));
  if (ids.length && !ids.includes(String(data.ids[i]))) return false;
  const captions = data.captions ? data.captions[i].join(" ").toLowerCase() : "";
  return others.every(word => captions.includes(word));
}

// --- cards ---

function tile(column, i) {
  const cell = element("span");
  const picture = element("img", undefined, { loading: "lazy", src: column.files[i], alt: `${column.label}, image ${data.ids[i]}` });
  cell.append(picture, element("span", titleOf(column, i), { title: column.label }));
  return cell;
}

function titleOf(column, i) {
  if (column.kind === "seen") return "seen";
  return column.shows ? `nearest: ${column.shows[i]}` : column.label.replace(/^(control|ceiling): /, "");
}

function pictures(i, columns) {
  return [["large", true], ["small", false]].map(([name, large]) => {
    const row = element("div", undefined, { className: name });
    row.append(...columns.filter(column => column.large === large).map(column => tile(column, i)));
    return row;
  }).filter(row => row.childElementCount);
}

function card(i, place) {
  const figure = element("figure", undefined, { className: "card" });
  const button = element("button", undefined, { type: "button" });
  button.setAttribute("aria-label", `enlarge image ${data.ids[i]}`);
  button.append(...pictures(i, data.columns.filter((_, k) => visible[k])));
  button.addEventListener("click", () => enlarge(place));
  const caption = element("figcaption");
  if (data.captions) caption.append(element("q", data.captions[i][0]));
  const values = data.on_cards.filter(name => data.values[MAIN][name][i] !== null)
    .map(name => `${data.titles[name]} ${readable(data.values[MAIN][name][i])}`);
  caption.append([`id ${data.ids[i]}`, ...values].join(" · "));
  figure.append(button, caption);
  return figure;
}

function readable(value) { return value === null ? "–" : Number.isInteger(value) ? String(value) : value.toFixed(3); }

function draw() {
  const metric = data.titles[sort.value] !== undefined;
  at("of-label").hidden = order.hidden = !metric;
  chosen = data.ids.map((_, i) => i).filter(found).sort(sortedBy());
  gallery.replaceChildren(...chosen.slice(0, shown).map(card));
  at("count").textContent = `${Math.min(shown, chosen.length)} shown, ${chosen.length} of ${data.ids.length} images found`;
  more.hidden = chosen.length <= shown;
}

// What a metric can be taken of: the sets that have it, and the reconstructions minus each.
function offer() {
  const kept = of.value, having = SETS.filter(label => data.values[label][sort.value] !== undefined);
  const options = having.map(label => [label, label])
    .concat(having.slice(1).map(label => [`minus ${label}`, `${MAIN} minus ${label}`]));
  of.replaceChildren(...options.map(([value, text]) => element("option", text, { value })));
  if (options.some(([value]) => value === kept)) of.value = kept;
}

// --- one image, enlarged ---

function enlarge(place) {
  open = Math.max(0, Math.min(place, chosen.length - 1));
  const i = chosen[open];
  const about = data.kinds ? `, kind of scene ${data.kinds[i] + 1}` : "";
  at("viewer-title").textContent = `Image ${data.ids[i]}${about} (${open + 1} of ${chosen.length})`;
  at("viewer-pictures").replaceChildren(...pictures(i, data.columns));
  at("viewer-captions").replaceChildren(...(data.captions ? data.captions[i] : []).map(text => element("li", text)));
  at("viewer-values").replaceChildren(valuesOf(i));
  at("previous").disabled = open === 0;
  at("next").disabled = open === chosen.length - 1;
  if (!viewer.open) viewer.showModal();
}

function valuesOf(i) {
  const table = element("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  const metrics = Object.keys(data.titles);
  head.append(...["set", ...metrics.map(name => data.titles[name])].map(text => element("th", text, { scope: "col" })));
  for (const label of SETS) {
    const row = body.insertRow();
    row.className = label === MAIN ? "main" : "";
    row.append(element("th", label, { scope: "row" }));
    row.append(...metrics.map(name => element("td", readable((data.values[label][name] ?? [])[i] ?? null))));
  }
  return table;
}

at("previous").addEventListener("click", () => enlarge(open - 1));
at("next").addEventListener("click", () => enlarge(open + 1));
at("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", event => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  enlarge(open + step);
});
viewer.addEventListener("close", () => {  // to where the walk ended, if that is shown
  const card = gallery.children[open];
  if (card) card.querySelector("button").focus();
});

// --- controls ---

function redraw() { shown = FIRST; draw(); }
sort.addEventListener("change", () => { offer(); redraw(); });
for (const control of [of, kind]) control.addEventListener("change", redraw);
filter.addEventListener("input", redraw);
order.addEventListener("click", () => {
  const worst = order.getAttribute("aria-pressed") !== "true";
  order.setAttribute("aria-pressed", String(worst));
  order.textContent = worst ? "worst first" : "best first";
  redraw();
});
more.addEventListener("click", () => { shown += MORE; draw(); });

data.columns.forEach((column, k) => {
  if (column.large) return;
  const label = element("label"), box = element("input", undefined, { type: "checkbox", checked: column.on });
  box.addEventListener("change", () => { visible[k] = box.checked; draw(); });
  label.append(box, ` ${column.label}`);
  at("columns").append(label);
});
at("columns").hidden = data.columns.every(column => column.large);
at("kind-label").hidden = !data.kinds;
if (data.kinds) {
  const sizes = new Map();
  for (const number of data.kinds) sizes.set(number, (sizes.get(number) ?? 0) + 1);
  for (const number of [...sizes.keys()].sort((a, b) => a - b))
    kind.append(element("option", `kind ${number + 1} (${sizes.get(number)} images)`, { value: number }));
}
if (!data.captions) filter.placeholder = "ids";

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((header, column) => {
    const button = element("button", undefined, { type: "button" });
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") !== "descending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => {
        const cell = row.cells[column], number = parseFloat(cell.dataset.value);
        return Number.isNaN(number) ? cell.textContent : number;
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = key(a), y = key(b);
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;  // what is missing comes last
        return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1) * (typeof x === "number" ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    });
  });
}
offer();
draw();
