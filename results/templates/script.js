"use strict";
const below = new Map();  // a row -> the row below it that tells what it was made from

// Sorting. Rows without a number stay last; what a row has opened goes with it.
function sort(heading) {
  const body = heading.closest("table").tBodies[0], column = heading.cellIndex;
  const numeric = heading.classList.contains("number"), ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const value = row => numeric ? parseFloat(row.cells[column].dataset.value) : row.cells[column].textContent.trim();
  const keyed = [...body.rows].filter(row => "group" in row.dataset).map(row => [value(row), row]);
  keyed.sort(([a], [b]) => {
    if (numeric && (isNaN(a) || isNaN(b))) return isNaN(a) - isNaN(b);
    return (ascending ? 1 : -1) * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  });
  body.append(...keyed.flatMap(([, row]) => below.has(row) ? [row, below.get(row)] : [row]));
}

// Filters. A row is shown if it is of a ticked group (or none is ticked) and has every word; parts without a row go.
function filter(form) {
  const scope = form.closest("section"), rows = [...scope.querySelectorAll("[data-group]")], texts = new Map();
  const said = form.querySelector("[role=status]");
  const text = row => {
    if (!texts.has(row)) texts.set(row, [...row.children].map(part => part.textContent).join(" ").toLowerCase());
    return texts.get(row);
  };
  const apply = () => {
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(word => word);
    const groups = [...form.querySelectorAll(":checked")].map(box => box.value);
    const active = words.length + groups.length > 0;
    let shown = 0;
    for (const row of rows) {
      const show = (!groups.length || groups.includes(row.dataset.group)) && words.every(word => text(row).includes(word));
      row.hidden = !show;
      if (below.has(row)) below.get(row).hidden = !show;
      shown += show;
    }
    for (const part of scope.querySelectorAll("[data-part]")) {
      const own = [...part.querySelectorAll("[data-group]")], found = own.filter(row => !row.hidden).length;
      part.hidden = active && !found;
      const hits = part.querySelector("summary > .hits");
      if (hits) hits.textContent = active ? ` (${found} of ${own.length} rows)` : "";
    }
    const chosen = [...groups, ...words.map(word => `“${word}”`)].join(", ");
    said.textContent = active ? `${shown} of ${rows.length} ${said.dataset.of}: ${chosen}` : `${rows.length} ${said.dataset.of}`;
    form.classList.toggle("active", active);
    form.querySelector("[type=reset]").hidden = !active;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { apply(); form.elements.words.focus(); }));
  if (form.elements.words.value || form.querySelector(":checked")) apply();  // what a browser kept over a reload
}

// What a row was made from: the origin of each of its records, from the list of records at the end.
function toggle(name) {
  const row = name.closest("tr"), opening = !below.has(row);
  name.ariaExpanded = String(opening);
  if (!opening) {
    below.get(row).remove();
    below.delete(row);
    return;
  }
  const line = document.createElement("tr"), cards = document.createElement("div");
  for (const key of row.dataset.records.split(" ")) {
    const record = document.getElementById(`record-${key}`), card = cards.appendChild(document.createElement("div"));
    const link = document.createElement("a");
    link.href = `#${record.id}`;
    link.textContent = "All that the record holds";
    card.append(record.querySelector("dl.origin").cloneNode(true), link);
  }
  line.className = "origin";
  cards.className = "cards";
  const cell = line.insertCell();
  cell.colSpan = row.cells.length;
  cell.append(cards);
  below.set(row, line);
  row.after(line);
}

// A link into something folded or filtered away shows it.
function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  for (let part = target; part; part = part.parentElement) {
    part.hidden = false;
    if (part.tagName === "DETAILS") part.open = true;
  }
  if (target) target.scrollIntoView();
}

for (const link of document.querySelectorAll("a.more")) {
  link.role = "button";
  link.ariaExpanded = "false";
}
for (const form of document.querySelectorAll("form.filter")) filter(form);
document.addEventListener("click", event => {
  const heading = event.target.closest("thead button"), name = event.target.closest("a.more");
  if (heading) sort(heading.parentElement);
  if (!name) return;
  event.preventDefault();
  toggle(name);
});
document.addEventListener("keydown", event => {
  if (event.key !== " " || !event.target.matches("a.more")) return;
  event.preventDefault();
  toggle(event.target);
});
addEventListener("hashchange", reveal);
reveal();
