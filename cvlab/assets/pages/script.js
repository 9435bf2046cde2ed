"use strict";
const size = {{ size | tojson }};
const SVG = "http://www.w3.org/2000/svg";
const element = (name, attributes = {}, text = "") => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
};
const label = (value) => {
  const large = Math.abs(value);
  if (value !== 0 && (large < 1e-4 || large >= 1e6)) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  return Number(value.toPrecision(large >= 1000 ? 6 : 4)).toLocaleString("en-US", { maximumFractionDigits: 12 });
};
// As svg.ticks does.
const linearTicks = (low, high, isWhole) => {
  if (low === 0 && high === 0) high = 1;
  if (isWhole && high - low < 1) [low, high] = [Math.floor(low), Math.floor(low) + 1];
  if (high - low <= 1e-12 * Math.max(Math.abs(low), Math.abs(high), 1e-300)) {
    const spread = Math.abs(high) || 1;
    [low, high] = [low - spread / 2, high + spread / 2];
  }
  const raw = (high - low) / 4, power = 10 ** Math.floor(Math.log10(raw));
  const factors = isWhole && power < 10 ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10];
  let step = power * factors.find((factor) => raw <= power * factor * (1 + 1e-9));
  if (isWhole) step = Math.max(1, step);
  const first = Math.floor(low / step + 1e-9), last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, k) => (first + k) * step);
};
const logTicks = (low, high) => {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)) + 1;
  const factors = last - first > 4 ? [1] : [1, 2, 5];
  const all = [];
  for (let k = first; k <= last; k += Math.max(1, Math.ceil((last - first) / 6))) for (const factor of factors) all.push(factor * 10 ** k);
  const from = all.filter((tick) => tick <= low * (1 + 1e-9)).length - 1;
  const to = all.findIndex((tick, k) => k > from && tick >= high * (1 - 1e-9));
  return all.slice(Math.max(0, from), to < 0 ? all.length : to + 1);
};
const smoothed = (values, weight) => {
  let sum = 0, total = 0;
  return values.map((value) => {
    [sum, total] = [sum * weight + value, total * weight + 1];
    return sum / total;
  });
};
const charts = [...document.querySelectorAll("svg[data-chart]")].map((svg) => {
  const chart = JSON.parse(svg.dataset.chart);
  const cursor = svg.querySelector(".cursor");
  const readout = svg.closest("figure").querySelector(".readout");
  const xs = [...new Set(chart.lines.flatMap((line) => line.xs))].sort((a, b) => a - b);
  const right = size.width - size.right, bottom = size.height - size.bottom;
  const scale = (ticks, isLog, from, to) => {
    const [low, high] = [ticks[0], ticks[ticks.length - 1]].map(isLog ? Math.log10 : Number);
    return (value) => from + (((isLog ? Math.log10(value) : value) - low) / (high - low)) * (to - from);
  };
  let toPx = scale([chart.from, chart.to], false, size.left, right);
  let current = -1;
  const short = (value) => Number(value.toPrecision(5)).toString();
  const show = (index) => {
    current = Math.max(0, Math.min(xs.length - 1, index));
    const x = xs[current], at = toPx(x);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.style.visibility = isFinite(at) ? "visible" : "hidden";
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
    const at = ((event.clientX - box.left) / box.width) * size.width;
    let best = 0;
    xs.forEach((value, index) => { if (!(Math.abs(toPx(value) - at) >= Math.abs(toPx(xs[best]) - at))) best = index; });
    show(best);
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(current < 0 ? 0 : current + step);
  });
  const classes = [...svg.querySelectorAll(".lines > *")].map((line) => line.getAttribute("class"));
  return (weight, isLogX, isLogY) => {
    const shown = chart.lines.map((line) => {
      const means = smoothed(line.ys, weight);
      const points = line.xs.map((x, k) => [x, line.ys[k], means[k]]);
      return points.filter(([x, y, mean]) => (!isLogX || x > 0) && (!isLogY || (y > 0 && mean > 0)));
    });
    const all = shown.flat();
    const axes = svg.querySelector(".axes"), lines = svg.querySelector(".lines");
    axes.replaceChildren();
    lines.replaceChildren();
    cursor.style.visibility = "hidden";
    if (!all.length) {
      axes.append(element("text", { x: (size.left + right) / 2, y: size.height / 2, "text-anchor": "middle" }, "no positive values"));
      return;
    }
    const range = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
    const xTicks = isLogX ? logTicks(...range(all.map(([x]) => x))) : linearTicks(...range(all.map(([x]) => x)), true);
    const yTicks = isLogY ? logTicks(...range(all.map(([, y]) => y))) : linearTicks(...range(all.map(([, y]) => y)), false);
    toPx = scale(xTicks, isLogX, size.left, right);
    const toPxY = scale(yTicks, isLogY, bottom, size.top);
    for (const tick of yTicks) {
      const y = toPxY(tick);
      axes.append(element("line", { class: "rule", x1: size.left, x2: right, y1: y, y2: y }));
      axes.append(element("text", { x: size.left - 6, y: y + 4, "text-anchor": "end" }, label(tick)));
    }
    for (const tick of xTicks) axes.append(element("text", { x: toPx(tick), y: bottom + 18, "text-anchor": "middle" }, label(tick)));
    const polyline = (points, k, name) => points.length === 1
      ? element("circle", { class: name, cx: toPx(points[0][0]), cy: toPxY(points[0][k]), r: 3 })
      : element("polyline", { class: name, points: points.map((point) => `${toPx(point[0]).toFixed(1)},${toPxY(point[k]).toFixed(1)}`).join(" ") });
    if (weight > 0) shown.forEach((points, k) => lines.append(polyline(points, 1, `${classes[k]} faint`)));
    shown.forEach((points, k) => lines.append(polyline(points, 2, classes[k])));
  };
});
for (const svg of document.querySelectorAll("svg[data-parallel]")) {
  const figure = svg.closest("figure"), readout = figure.querySelector(".readout");
  const lines = [...svg.querySelectorAll(".trials > *")].map((line) => ({ line, points: [...line.points] }));
  const axes = [...svg.querySelectorAll(".axis")].map((group) => ({ group, x: Number(group.dataset.x), range: null }));
  let current = -1, brushed = null;
  figure.querySelector(".scripted").hidden = false;
  const place = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const isSelected = ({ points }) => axes.every(({ range }, k) => range === null || (points[k].y >= range[0] && points[k].y <= range[1]));
  const select = () => {
    for (const axis of axes) {
      axis.group.querySelector(".brush")?.remove();
      if (axis.range) axis.group.append(element("rect", { class: "brush", x: axis.x - 6, width: 12, y: axis.range[0], height: axis.range[1] - axis.range[0] }));
    }
    for (const item of lines) item.line.classList.toggle("faint", !isSelected(item));
    readout.textContent = axes.some(({ range }) => range) ? `${lines.filter(isSelected).length} of ${lines.length} trials` : "";
  };
  const show = (index) => {
    lines[current]?.line.classList.remove("active");
    current = index;
    lines[current].line.classList.add("active");
    readout.textContent = lines[current].line.dataset.text;
  };
  svg.addEventListener("pointerdown", (event) => {
    const at = place(event);
    brushed = axes.find(({ x }) => Math.abs(x - at.x) < 12) ?? null;
    if (!brushed) return;
    brushed.start = at.y;
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    const at = place(event);
    if (brushed) {
      brushed.range = Math.abs(at.y - brushed.start) < 3 ? null : [Math.min(at.y, brushed.start), Math.max(at.y, brushed.start)];
      select();
      return;
    }
    const right = axes.findIndex(({ x }) => x >= at.x);
    if (right < 1) return;
    const share = (at.x - axes[right - 1].x) / (axes[right].x - axes[right - 1].x);
    let nearest = -1, distance = 12;
    lines.forEach((item, k) => {
      const away = Math.abs(item.points[right - 1].y * (1 - share) + item.points[right].y * share - at.y);
      if (isSelected(item) && away <= distance) [nearest, distance] = [k, away];
    });
    if (nearest >= 0) show(nearest);
  });
  svg.addEventListener("pointerup", (event) => {
    if (brushed && Math.abs(place(event).y - brushed.start) < 3) {
      brushed.range = null;
      select();
    }
    brushed = null;
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    let index = current < 0 ? (step > 0 ? -1 : lines.length) : current;
    do index += step; while (lines[index] && !isSelected(lines[index]));
    if (lines[index]) show(index);
  });
}
for (const controls of document.querySelectorAll(".controls")) {
  const weight = controls.querySelector("input[type=range]");
  const isLog = (axis) => controls.querySelector(`[data-log=${axis}]`).checked;
  controls.hidden = false;
  controls.addEventListener("input", () => {
    controls.querySelector("output").textContent = weight.value;
    for (const draw of charts) draw(Number(weight.value), isLog("x"), isLog("y"));
  });
}
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
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
  const runs = (number) => `${number} ${number === 1 ? "run" : "runs"}`;
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = words.length ? `${shown} of ${runs(rows.length)}` : runs(rows.length);
  };
  input.hidden = false;
  input.addEventListener("input", apply);
}
for (const form of document.querySelectorAll("form.compare")) {
  const button = form.querySelector("button");
  const chosen = () => [...document.querySelectorAll("input[name=run]:checked")];
  const update = () => { button.disabled = chosen().length < 2; };
  form.hidden = false;
  for (const input of document.querySelectorAll("input[name=run]")) {
    input.hidden = false;
    input.addEventListener("change", update);
  }
  update();
  const data = document.getElementById("compared");
  if (data === null) continue;  // the server compares
  const { metrics, better } = JSON.parse(data.textContent);
  const section = document.getElementById("comparison");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const inputs = chosen().reverse();
    const runs = inputs.map((input) => input.value);
    const table = section.querySelector("table");
    const row = (name, cells) => {
      const tr = document.createElement("tr");
      tr.append(name, ...cells);
      return tr;
    };
    const cell = (kind, content, classes = "") => {
      const made = document.createElement(kind);
      made.append(content);
      made.className = classes;
      return made;
    };
    const heads = inputs.map((input) => cell("th", input.closest("tr").querySelector("a, .name").cloneNode(true), "number"));
    table.tHead.replaceChildren(row(cell("th", "metric"), heads));
    const names = [...new Set(runs.flatMap((run) => Object.keys(metrics[run] ?? {})))];
    table.tBodies[0].replaceChildren(...names.map((name) => {
      const values = runs.map((run) => metrics[run]?.[name] ?? null);
      const numbers = values.filter((value) => typeof value === "number");
      const isRanked = name in better && new Set(numbers).size > 1;
      const best = isRanked ? Math[better[name] === "higher" ? "max" : "min"](...numbers) : NaN;
      return row(cell("td", name), values.map((value) => cell("td", typeof value === "number" ? label(value) : String(value ?? "-"), value === best ? "number best" : "number")));
    }));
    section.querySelector("code").textContent = `cvlab report ${runs.join(" ")}`;
    section.hidden = false;
    section.scrollIntoView();
  });
}
const seconds = Number(document.body.dataset.refresh);
if (seconds) {
  // Not while somebody reads: a word in the filter, a chosen run, an opened list, the scroll position would be lost.
  const isSet = (input) => (input.type === "checkbox" ? input.checked : input.type === "range" ? Number(input.value) > 0 : input.value !== "");
  const isRead = () => window.scrollY > 0 || document.querySelector("details[open]:not([data-open])") || [...document.querySelectorAll("input")].some(isSet);
  setInterval(() => { if (!isRead()) location.reload(); }, 1000 * seconds);
}
