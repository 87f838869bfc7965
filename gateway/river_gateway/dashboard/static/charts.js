// The curves of a run: one chart for each metric, zoomed together, with other runs laid over them.
"use strict";

(() => {
  const holder = document.querySelector("[data-series]");
  if (!holder) return;

  // What people look at first comes first; the others follow by name.
  const FIRST = ["reward", "loss_mean", "kl", "grad_norm", "entropy", "clip_frac", "mean_ratio"];
  const HEIGHT_PX = 190;
  const COLOURS = ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6", "--series-7", "--series-8"];

  const runs = [{ name: holder.dataset.name, address: holder.dataset.series, columns: null }];
  for (let index = 1; holder.hasAttribute(`data-other-${index}`); index += 1) {
    runs.push({
      name: holder.getAttribute(`data-other-name-${index}`),
      address: holder.getAttribute(`data-other-${index}`),
      columns: null,
    });
  }
  const charts = new Map();
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const rank = (name) => {
    const index = FIRST.findIndex((first) => name === first || name.startsWith(`${first}_`) || name.startsWith(`${first}/`));
    return index < 0 ? FIRST.length : index;
  };

  const fetchSeries = async (run) => {
    const steps = run.columns?.step ?? [];
    // The newest step may still be getting values: it is read again.
    const after = steps.length ? steps[steps.length - 1] - 1 : -1;
    const answer = await fetch(`${run.address}?after=${after}`);
    if (!answer.ok) return;
    merge(run, await answer.json(), after);
  };

  const merge = (run, { step, metrics }, after) => {
    const old = run.columns ?? { step: [], metrics: {} };
    const kept = old.step.findIndex((one) => one > after);
    const length = kept < 0 ? old.step.length : kept;
    const names = new Set([...Object.keys(old.metrics), ...Object.keys(metrics)]);
    run.columns = { step: old.step.slice(0, length).concat(step), metrics: {} };
    for (const name of names) {
      const before = (old.metrics[name] ?? new Array(length).fill(null)).slice(0, length);
      run.columns.metrics[name] = before.concat(metrics[name] ?? new Array(step.length).fill(null));
    }
  };

  const metricNames = () => {
    const names = new Set(runs.flatMap((run) => Object.keys(run.columns?.metrics ?? {})));
    return [...names].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  };

  const dataOf = (metric) => {
    const tables = runs
      .filter((run) => run.columns?.metrics[metric])
      .map((run) => [run.columns.step, run.columns.metrics[metric]]);
    return tables.length ? uPlot.join(tables) : [[], []];
  };

  const optionsOf = (metric, width) => {
    const shown = runs.filter((run) => run.columns?.metrics[metric]);
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line") }, ticks: { stroke: colour("--line") } };
    return {
      width,
      height: HEIGHT_PX,
      cursor: { sync: { key: "run", setSeries: false } },
      scales: { x: { time: false } },
      legend: { show: false },
      axes: [axis, { ...axis, size: 62 }],
      series: [
        { label: "step" },
        ...shown.map((run) => ({
          label: run.name,
          stroke: colour(COLOURS[runs.indexOf(run) % COLOURS.length]),
          width: 1.5,
          spanGaps: true,
          points: { show: run.columns.step.length < 40 },
        })),
      ],
      hooks: { setScale: [(chart, key) => key === "x" && zoomAll(chart)] },
    };
  };

  let zooming = false;
  const zoomAll = (from) => {
    if (zooming) return;
    zooming = true;
    const { min, max } = from.scales.x;
    for (const { plot } of charts.values()) if (plot !== from) plot.setScale("x", { min, max });
    zooming = false;
  };

  const row = (section, tag, values) => {
    const line = document.createElement("tr");
    values.forEach((value, index) => {
      const cell = document.createElement(index ? tag : "th");
      if (cell.tagName === "TH") cell.scope = tag === "th" ? "col" : "row";
      if (index) cell.className = "n";
      cell.textContent = value;
      line.append(cell);
    });
    section.append(line);
  };

  const fillTable = (box, metric) => {
    const table = document.createElement("table");
    row(table.createTHead(), "th", ["Run", "First", "Lowest", "Highest", "Last"]);
    const body = table.createTBody();
    for (const run of runs.filter((one) => one.columns?.metrics[metric])) {
      const values = run.columns.metrics[metric].filter((value) => value !== null);
      const shown = [values[0], Math.min(...values), Math.max(...values), values.at(-1)];
      row(body, "td", [run.name, ...shown.map((value) => value.toPrecision(4))]);
    }
    box.replaceChildren(table);
  };

  const frame = (metric) => {
    const figure = document.createElement("figure");
    figure.className = "card chart";
    figure.dataset.metric = metric;
    const caption = document.createElement("figcaption");
    caption.textContent = metric;
    const plot = document.createElement("div");
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = "Numbers";
    const numbers = document.createElement("div");
    details.append(summary, numbers);
    figure.append(caption, plot, details);
    holder.append(figure);
    return { figure, box: plot, numbers };
  };

  const key = () => {
    const list = document.createElement("ul");
    list.className = "key";
    runs.forEach((run, index) => {
      const entry = document.createElement("li");
      entry.textContent = run.name;
      entry.dataset.series = 1 + (index % COLOURS.length);
      list.append(entry);
    });
    holder.before(list);
  };

  const draw = () => {
    const names = metricNames();
    holder.querySelector(".empty").hidden = names.length > 0;
    for (const metric of names) {
      const known = charts.get(metric);
      const data = dataOf(metric);
      const shown = data.length - 1;
      if (known && known.shown === shown) {
        const zoomed = known.plot.scales.x.min > known.plot.data[0][0] || known.plot.scales.x.max < known.plot.data[0].at(-1);
        known.plot.setData(data, !zoomed);
        fillTable(known.numbers, metric);
        continue;
      }
      known?.plot.destroy();
      const parts = known ?? frame(metric);
      const plot = new uPlot(optionsOf(metric, parts.box.clientWidth), data, parts.box);
      fillTable(parts.numbers, metric);
      charts.set(metric, { ...parts, plot, shown });
    }
    // New metrics may have come before old ones.
    for (const metric of names) if (holder.lastElementChild !== charts.get(metric).figure) holder.append(charts.get(metric).figure);
  };

  let updating = false;
  let again = false;
  const update = async (which) => {
    if (updating) {
      again = true;
      return;
    }
    updating = true;
    await Promise.all(which.map(fetchSeries));
    draw();
    updating = false;
    if (again) {
      again = false;
      update(runs);
    }
  };

  addEventListener("resize", () => {
    for (const { plot, box } of charts.values()) plot.setSize({ width: box.clientWidth, height: HEIGHT_PX });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const chart of charts.values()) chart.shown = -1;
    draw();
  });
  document.addEventListener("river:part", (event) => {
    if (event.detail.id === "run") update(runs);
  });
  if (runs.length > 1) key();
  update(runs);
})();
