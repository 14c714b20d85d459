"use strict";
// A click on a column's header sorts the table by it; the search hides rows that do not match.
const table = document.querySelector("#trajectories");
const body = table.tBodies[0];

function sort(head) {
  const column = head.cellIndex;
  const rising = head.getAttribute("aria-sort") !== "ascending";
  const key = (row) => row.cells[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // Unknown values come last.
    const order = head.dataset.kind === "number" ? x - y : x.localeCompare(y, undefined, {numeric: true});
    return rising ? order : -order;
  });
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  body.append(...rows);
}

for (const button of table.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button.parentElement));
}

document.querySelector("#search").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/);
  for (const item of document.querySelectorAll("[data-text]")) {
    item.hidden = !words.every((word) => item.dataset.text.includes(word));
  }
});
