// Sorts a table by the column whose heading is clicked: numbers by value, then ∞, then –.
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const text = row.cells[column].textContent.trim().replace("−", "-");
        if (text === "∞") return Infinity;
        return text === "–" ? NaN : text !== "" && !isNaN(text) ? Number(text) : text;
      };
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      const place = (a) => (Number.isNaN(a) ? 1 : 0);
      rows.sort(([a], [b]) => {
        if (place(a) || place(b)) return place(a) - place(b);
        const order = typeof a === "number" && typeof b === "number" ? a - b || 0 : String(a).localeCompare(String(b), undefined, { numeric: true });
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

// A link to a picture opens the collapsed list that holds it.
const reveal = () => document.getElementById(location.hash.slice(1))?.closest("details")?.setAttribute("open", "");
addEventListener("hashchange", reveal);
reveal();
