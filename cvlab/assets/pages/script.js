"use strict";
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const cursor = svg.querySelector(".cursor");
  const readout = svg.closest("figure").querySelector(".readout");
  const xs = [...new Set(chart.lines.flatMap((line) => line.xs))].sort((a, b) => a - b);
  let current = -1;
  const short = (value) => Number(value.toPrecision(5)).toString();
  const show = (index) => {
    current = Math.max(0, Math.min(xs.length - 1, index));
    const x = xs[current];
    const at = chart.left + ((x - chart.from) / (chart.to - chart.from)) * chart.width;
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.style.visibility = "visible";
    const parts = [];
    for (const line of chart.lines) {
      let k = -1;
      line.xs.forEach((value, index) => { if (value <= x) k = index; });
      if (k >= 0) parts.push(`${line.name} ${short(line.ys[k])}`);
    }
    readout.textContent = `${chart.x} ${short(x)}: ${parts.join(", ")}`;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * chart.all;
    const x = chart.from + ((at - chart.left) / chart.width) * (chart.to - chart.from);
    let best = 0;
    xs.forEach((value, index) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = index; });
    show(best);
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(current < 0 ? 0 : current + step);
  });
}
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [row.cells[column].dataset.value ?? row.cells[column].textContent, row]);
      rows.sort(([a], [b]) => {
        const order = a !== "" && b !== "" && isFinite(a) && isFinite(b) ? a - b : String(a).localeCompare(String(b));
        return up ? order : -order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
for (const input of document.querySelectorAll("input[data-filter]")) {
  const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
  const count = document.getElementById("count");
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} runs`;
  };
  input.hidden = false;
  input.addEventListener("input", apply);
}
const seconds = Number(document.body.dataset.refresh);
if (seconds) {
  // Not while somebody reads: a word in the filter, an opened list, the scroll position would be lost.
  const isRead = () => window.scrollY > 0 || document.querySelector("details[open]") || [...document.querySelectorAll("input")].some((i) => i.value);
  setInterval(() => { if (!isRead()) location.reload(); }, 1000 * seconds);
}
