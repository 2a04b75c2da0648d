"use strict";
// The gallery: pictures of report-data, sorted, filtered, in tabs. And tables sorted by their headers.
const data = JSON.parse(document.getElementById("report-data").textContent);
const gallery = document.getElementById("gallery");
const count = document.getElementById("count");
const sort = document.getElementById("sort");
const filter = document.getElementById("filter");
const more = document.getElementById("more");
const FEW = 12, PAGE = 60;
let tab = "all", shown = PAGE;

function better(name) { return data.lower_is_better.includes(name) ? -1 : 1; }

// The same "random" images each time, in an order that has nothing to do with the ids.
function scrambled(id) { return Math.imul(id + 1, 2654435761) >>> 0; }

function chosen() {
  const name = sort.value;
  let images = data.images.slice();
  const wanted = filter.value.split(/[\s,]+/).filter(Boolean);
  if (wanted.length) images = images.filter(image => wanted.includes(String(image.id)));
  const value = image => image.metrics[name] === null ? -Infinity : better(name) * image.metrics[name];
  const byMetric = (a, b) => value(b) - value(a) || a.id - b.id;
  if (tab === "random") return images.sort((a, b) => scrambled(a.id) - scrambled(b.id)).slice(0, FEW);
  if (name === "id" && tab === "all") return images.sort((a, b) => a.id - b.id);
  images.sort(byMetric);
  if (tab === "worst") images.reverse();
  return tab === "all" ? images : images.slice(0, FEW);
}

function card(image) {
  const figure = document.createElement("figure");
  const row = document.createElement("div");
  for (const [label, file] of image.pictures) {
    const cell = document.createElement("span");
    const picture = document.createElement("img");
    picture.src = file;
    picture.loading = "lazy";
    picture.alt = label + ", image " + image.id;
    cell.append(picture, label);
    row.append(cell);
  }
  const caption = document.createElement("figcaption");
  const values = data.shown.filter(name => image.metrics[name] !== undefined && image.metrics[name] !== null)
    .map(name => data.titles[name] + " " + image.metrics[name].toFixed(3));
  caption.textContent = "id " + image.id + (values.length ? " · " + values.join(" · ") : "");
  figure.append(row, caption);
  return figure;
}

function draw() {
  if (tab !== "all" && tab !== "random" && sort.value === "id") sort.value = data.shown[0];
  const images = chosen();
  gallery.replaceChildren(...images.slice(0, shown).map(card));
  count.textContent = Math.min(shown, images.length) + " of " + data.images.length + " images";
  more.hidden = images.length <= shown;
}

for (const button of document.querySelectorAll("[data-tab]")) {
  button.addEventListener("click", () => {
    tab = button.dataset.tab;
    shown = PAGE;
    for (const other of document.querySelectorAll("[data-tab]"))
      other.setAttribute("aria-pressed", String(other === button));
    draw();
  });
}
sort.addEventListener("change", draw);
filter.addEventListener("input", draw);
more.addEventListener("click", () => { shown += PAGE; draw(); });

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
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
draw();
