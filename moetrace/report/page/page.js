// Sorting: a click on a heading sorts its table, a second one turns the order round; what is missing stays last.
const number = text => parseFloat(text.replace(/[, ]/g, ""));
const missing = text => text === "-" || text === "" || text === "never";
function order(a, b, up) {
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const x = number(a), y = number(b);
  const by = isNaN(x) || isNaN(y) ? a.localeCompare(b) : x - y;
  return up ? by : -by;
}
for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, table = heading.closest("table");
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const whole = table.classList.contains("bodies");
    const units = whole ? [...table.tBodies] : [...table.tBodies[0].rows];
    const text = unit => (whole ? unit.rows[0] : unit).cells[heading.cellIndex].textContent.trim();
    units.sort((a, b) => order(text(a), text(b), up)).forEach(unit => unit.parentElement.append(unit));
  });
}
// Filtering: only layers whose row holds the text.
for (const filter of document.querySelectorAll(".filter")) {
  filter.hidden = false;
  const bodies = [...filter.parentElement.querySelector("table").tBodies], status = filter.querySelector("[role=status]");
  filter.querySelector("input").addEventListener("input", event => {
    const wanted = event.target.value.trim().toLowerCase();
    for (const body of bodies) body.hidden = !body.rows[0].textContent.toLowerCase().includes(wanted);
    status.textContent = `${bodies.filter(body => !body.hidden).length} of ${bodies.length}`;
  });
}
// Paper has no clicks.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.dataset.was = part.open; part.open = true; }));
addEventListener("afterprint", () => document.querySelectorAll("details").forEach(part => { part.open = part.dataset.was === "true"; }));
