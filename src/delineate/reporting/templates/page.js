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
        const text = row.cells[column].textContent.trim();
        if (text === "∞" || text === "–") return text === "∞" ? Infinity : NaN;
        // The number that it is or begins with: 2,200,000, −4.20 (−5.00 to −3.40), 0.85 ± 0.03, 0.8 to 0.9, 3 of 20.
        const number = text.split(/ (?:\(|±|to |of )/)[0].replace(/−/g, "-").replace(/(\d),(?=\d{3})/g, "$1");
        return number !== "" && !isNaN(number) ? Number(number) : text;
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

// Pictures or tables first: what the reader chose last, on this page or another; some browsers keep nothing for files.
const choices = [...document.querySelectorAll(".switch input")];
try {
  const kept = localStorage.getItem("delineate-first");
  for (const choice of choices) if (choice.value === kept) choice.checked = true;
} catch {}
for (const choice of choices) {
  choice.addEventListener("change", () => {
    try {
      localStorage.setItem("delineate-first", choice.value);
    } catch {}
  });
}

// A slider shows one slice at a time.
for (const slices of document.querySelectorAll(".slices")) {
  const [slider, said] = [slices.querySelector("input"), slices.querySelector("output")];
  const pictures = slices.querySelectorAll("img");
  const show = () => {
    pictures.forEach((picture, i) => (picture.hidden = i !== slider.value - 1));
    said.textContent = pictures[slider.value - 1].dataset.said;
    slider.setAttribute("aria-valuetext", said.textContent);
  };
  slider.addEventListener("input", show);
  slices.querySelector("label").hidden = false;
  show();
}

// Which tables are wider than the page is known only once they are laid out.
const widths = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const wider = target.scrollWidth > target.clientWidth + 1;
    target.classList.toggle("scrolls", wider);
    target.classList.toggle("fits", !wider);
  }
});
for (const table of document.querySelectorAll(".scroll")) widths.observe(table);
