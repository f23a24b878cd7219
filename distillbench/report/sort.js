// Sorts a table by a click or a key press on a header. Cells without data-sort are empty and always go last.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headers.forEach((header, place) => {
    header.querySelector("button").addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") !== "ascending";
      const numeric = header.classList.contains("n");
      const key = (row) => row.cells[place].getAttribute("data-sort");
      const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en"));
      const rows = [...body.rows];
      rows.sort((a, b) => {
        const [one, other] = [key(a), key(b)];
        if (one === null || other === null) return Number(one === null) - Number(other === null);
        return up ? compare(one, other) : compare(other, one);
      });
      body.append(...rows);
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.setAttribute("data-sorted", "");
    });
  });
}
