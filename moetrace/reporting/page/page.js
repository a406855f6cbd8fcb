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
// Values: what is nearest to the pointer. Points are places in parts of 10,000 of the figure, then values (pages.py).
for (const holder of document.querySelectorAll(".pointed script")) {
  const box = holder.parentElement, shown = box.appendChild(document.createElement("output")), mark = box.appendChild(document.createElement("i"));
  shown.hidden = mark.hidden = true;
  let panels;
  const described = (panel, label, [, , x, y, z]) => {
    const row = panel.names ? panel.names[y] : undefined, format = value => value.toLocaleString("en", {maximumSignificantDigits: 6});
    const parts = [label, `${panel.x} ${format(x)}`, row === undefined ? `${panel.y} ${format(y)}` : `${panel.y} ${row}`.trim()];
    return [...parts, z === undefined ? "" : `${format(z)} ${panel.z}`].filter(part => part).join(" \u00b7 ");
  };
  box.addEventListener("pointermove", event => {
    panels ??= JSON.parse(holder.textContent);
    const {left, top, width, height} = box.getBoundingClientRect();
    let best = {far: 40};
    for (const panel of panels) for (const [label, points] of panel.curves) for (const point of points) {
      const x = point[0] * width / 10000, y = point[1] * height / 10000;
      const far = Math.hypot(x - event.clientX + left, y - event.clientY + top);
      if (far < best.far) best = {far, x, y, panel, label, point};
    }
    shown.hidden = mark.hidden = !best.point;
    if (!best.point) return;
    shown.textContent = described(best.panel, best.label, best.point);
    mark.style.left = `${best.x}px`; mark.style.top = `${best.y}px`;
    shown.style.left = `${Math.max(0, Math.min(best.x + 10, width - shown.offsetWidth))}px`;
    shown.style.top = `${Math.max(0, best.y - shown.offsetHeight - 8)}px`;
  });
  box.addEventListener("pointerleave", () => { shown.hidden = mark.hidden = true; });
}
// A link to what is folded opens it.
const unfold = () => { const next = document.getElementById(location.hash.slice(1))?.nextElementSibling; if (next?.tagName === "DETAILS") next.open = true; };
addEventListener("hashchange", unfold);
unfold();
// Paper has no clicks.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.dataset.was = part.open; part.open = true; }));
addEventListener("afterprint", () => document.querySelectorAll("details").forEach(part => { part.open = part.dataset.was === "true"; }));
