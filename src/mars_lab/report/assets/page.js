// The page: which lines the charts show, and the switches that choose them.

const DATA = JSON.parse(document.getElementById("data").textContent);
const AXES = {
  tokens: { label: `training ${DATA.unit}`, format: (v) => short(v), tell: (v) => `${short(v)} ${DATA.unit}` },
  steps: { label: "steps", format: (v) => short(v), tell: (v) => `step ${Math.round(v)}` },
  seconds: { label: "wall-clock in training steps", format: clock, tell: clock },
};
const charts = [];
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

function swatch(line) {
  const namespace = "http://www.w3.org/2000/svg", svg = document.createElementNS(namespace, "svg");
  const stroke = `var(--series-${line.color})`, fill = line.hollow ? "var(--paper)" : stroke;
  const add = (tag, attributes) => {
    const part = svg.appendChild(document.createElementNS(namespace, tag));
    Object.entries(attributes).forEach(([name, value]) => part.setAttribute(name, value));
  };
  svg.setAttribute("viewBox", "-20 -7 40 14");
  svg.setAttribute("class", "swatch");
  const dashes = DASHES[line.dash % DASHES.length].join(" ");
  add("path", { d: "M-20,0h40", style: `stroke:${stroke};stroke-width:2;stroke-dasharray:${dashes || "none"}` });
  add("path", { d: MARKERS[line.marker % MARKERS.length], style: `fill:${fill};stroke:${stroke};stroke-width:1.6` });
  return svg;
}

function lossChart() {
  const chart = new Chart(document.getElementById("curves"), {
    description: "Curves of all runs; the tables below have the numbers",
    tell: (line, i) =>
      `${line.label}\n${short(line.y[i], 5)} at ${Object.keys(AXES).map((axis) => AXES[axis].tell(line.all[axis][i])).join(", ")}`,
  });
  const choice = (name) => document.querySelector(`[name=${name}]:checked`).value;
  const show = () => {
    const axis = AXES[choice("axis")], metric = choice("metric");
    const lines = DATA.runs.filter((run) => run.curves[metric]).map((run) => {
      const [steps, tokens, seconds, y] = run.curves[metric], all = { steps, tokens, seconds };
      return { ...run, all, x: all[choice("axis")], y, visible: run.visible };
    });
    chart.show(lines, {
      xLabel: axis.label, yLabel: DATA.metrics[metric], xFormat: axis.format, skipsStart: !document.getElementById("whole").checked,
    });
  };
  document.querySelectorAll("[name=axis], [name=metric], #whole").forEach((input) => input.addEventListener("change", show));
  document.getElementById("reset").addEventListener("click", () => chart.reset());
  legend(show);
  show();
  charts.push(chart);
}

// One switch an optimizer, one a run; a switch of many is half-way when its runs differ.
function legend(show) {
  const list = document.getElementById("legend"), boxes = new Map(), updates = [];
  const set = (runs, isVisible) => {
    runs.forEach((run) => (run.visible = isVisible));
    updates.forEach((update) => update());
    show();
  };
  const toggle = (runs, ...content) => {
    const box = make("input", { type: "checkbox", onchange: () => set(runs, box.checked) });
    updates.push(() => {
      const count = runs.filter((run) => run.visible).length;
      box.checked = count === runs.length;
      box.indeterminate = count > 0 && count < runs.length;
    });
    return make("label", {}, box, ...content);
  };
  for (const run of DATA.runs) boxes.set(run.optimizer, [...(boxes.get(run.optimizer) || []), run]);
  for (const [optimizer, runs] of boxes) {
    const each = runs.map((run) => make("li", {}, toggle([run], swatch(run), run.label)));
    const more = make("details", {}, make("summary", {}, `${runs.length} run${runs.length > 1 ? "s" : ""}`), make("ul", {}, ...each));
    list.append(make("li", {}, toggle(runs, swatch(runs[0]), make("b", {}, optimizer)), more));
  }
  document.getElementById("all").addEventListener("click", () => set(DATA.runs, true));
  document.getElementById("none").addEventListener("click", () => set(DATA.runs, false));
  updates.forEach((update) => update());
}

function sensitivityCharts() {
  DATA.sensitivities.forEach(({ name, isLog, ticks, lines }, i) => {
    const chart = new Chart(document.getElementById(`sensitivity-${i}`), {
      description: `Final validation loss against ${name}`,
      isLog, ticks, xLabel: name, yLabel: "final validation loss", xFormat: (v) => short(v, 3),
      tell: (line, j) => `${line.label}\n${short(line.y[j], 5)} at ${name} ${short(line.x[j])}`,
    });
    const keys = document.getElementById(`keys-${i}`);
    lines.forEach((line) => {
      const box = make("input", { type: "checkbox", checked: true, onchange: () => { line.visible = box.checked; chart.reset(); } });
      keys.append(make("li", {}, make("label", {}, box, swatch(line), line.label)));
    });
    chart.show(lines.map((line) => Object.assign(line, { visible: true })));
    charts.push(chart);
  });
}

lossChart();
sensitivityCharts();
for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", () => charts.forEach((chart) => chart.draw()));
}
document.documentElement.dataset.ready = "true";
