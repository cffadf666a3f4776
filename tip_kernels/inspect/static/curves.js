"use strict";
// The page of a run's or of several runs' curves: a chart a panel, redrawn when the axis or the theme changes.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const axis = document.getElementById("axis");
  let charts = [];
  const short = (v) => (v === 0 ? "0" : Math.abs(v) >= 1000 ? v.toLocaleString("en") : String(Number(v.toPrecision(3))));
  const clear = (colour, part) => colour + Math.round(255 * part).toString(16).padStart(2, "0");

  const lighter = (hex) => `#${[1, 3, 5].map((i) => Math.round(0.7 * parseInt(hex.slice(i, i + 2), 16) + 76).toString(16).padStart(2, "0")).join("")}`;
  const tone = (hex) => (theme.isDark() ? lighter(hex) : hex);

  function datasets(panel) {
    const area = panel.kind === "area", sets = [];
    for (const series of panel.series) {
      const colour = tone(series.colour);
      const x = panel.kind === "bars" ? series.x : series.x[axis.value];
      const points = (values) => values.map((y, i) => ({ x: x[i], y }));
      const line = { label: series.label, data: points(series.y), borderColor: colour, backgroundColor: clear(colour, area ? 0.75 : 0.9) };
      if (panel.kind === "bars") {
        sets.push({ ...line, data: series.y, categoryPercentage: 0.95, barPercentage: 0.95 });
        continue;
      }
      const few = x.length < 15;
      sets.push({ ...line, borderWidth: area ? 0 : 2, pointRadius: area ? 0 : few ? 3 : 0, pointHoverRadius: 4, tension: 0, fill: area ? (sets.length ? "-1" : "origin") : false });
      if (!area && series.low.some((v, i) => v !== series.high[i])) {
        const edge = { ...line, borderWidth: 0, pointRadius: 0, pointHoverRadius: 0, backgroundColor: clear(colour, 0.2), band: true };
        sets.push({ ...edge, data: points(series.high), fill: "+1" }, { ...edge, data: points(series.low), fill: false });
      }
    }
    return sets;
  }

  // Names stand beside the ends of their curves, pushed apart, where there is room for them.
  function names(chart) {
    const { ctx, chartArea: area } = chart;
    const ends = chart.data.datasets.map((set, k) => ({ set, last: chart.getDatasetMeta(k).data.at(-1) }))
      .filter(({ set, last }) => !set.band && last).map(({ set, last }) => ({ text: set.label, colour: set.borderColor, y: last.y, x: last.x }));
    ends.sort((a, b) => a.y - b.y);
    const step = 13;
    ends.forEach((end, k) => { if (k) end.y = Math.max(end.y, ends[k - 1].y + step); });
    for (let k = ends.length - 1, most = area.bottom; k >= 0; k--, most = ends[k + 1].y - step) ends[k].y = Math.min(ends[k].y, most);
    ctx.save();
    ctx.font = `600 11px ${Chart.defaults.font.family}`;
    ctx.textBaseline = "middle";
    for (const end of ends) {
      ctx.fillStyle = end.colour;
      ctx.fillText(end.text, area.right + 8, end.y);
    }
    ctx.restore();
  }
  function room(canvas, panel) { // how wide the names are; 0 where they would leave too little to the curves
    if (panel.kind !== "line" || panel.series.length < 2) return 0;
    const ctx = canvas.getContext("2d");
    ctx.font = `600 11px ${Chart.defaults.font.family}`;
    const widest = Math.max(...panel.series.map((s) => ctx.measureText(s.label).width));
    return widest < 0.45 * canvas.parentNode.clientWidth ? Math.ceil(widest) + 12 : 0;
  }

  function draw() {
    charts.forEach((chart) => chart.destroy());
    theme.chart();
    charts = [...document.querySelectorAll("canvas[data-panel]")].map((canvas) => {
      const panel = page.panels[canvas.dataset.panel];
      const bars = panel.kind === "bars";
      const form = (v) => (panel.share ? `${short(100 * v)} %` : short(v));
      const sets = datasets(panel), beside = room(canvas, panel);
      const ends = panel.series.map((s) => `${s.label}: ${form(s.y[0])} to ${form(s.y.at(-1))}`);
      canvas.setAttribute("aria-label", bars ? panel.title : `${panel.title}. ${ends.join("; ")}`);
      return new Chart(canvas, {
        type: bars ? "bar" : "line",
        plugins: beside ? [{ id: "names", afterDatasetsDraw: names }] : [],
        data: { labels: bars ? panel.series[0].x.map((v) => v.toFixed(2)) : undefined, datasets: sets },
        options: {
          layout: { padding: { right: beside } },
          interaction: { mode: "index", intersect: false },
          scales: {
            x: { type: bars ? "category" : "linear", stacked: false, ticks: { maxTicksLimit: 9, ...(bars ? {} : { callback: short }) },
              title: { display: true, text: bars ? "nats" : page.axes[axis.value] }, ...(bars ? {} : { min: 0 }) },
            y: { type: bars ? "logarithmic" : "linear", stacked: panel.kind === "area", ticks: { callback: (v) => (bars && !Number.isInteger(Math.round(1e6 * Math.log10(v)) / 1e6) ? "" : form(v)) },
              ...(panel.kind === "area" ? { min: 0, max: 1 } : {}), ...(panel.kind === "line" && panel.share ? { suggestedMin: 0, suggestedMax: 1 } : {}) },
          },
          plugins: {
            legend: { display: panel.series.length > 1 && !beside, position: "bottom", labels: { boxWidth: 12, filter: (item, data) => !data.datasets[item.datasetIndex].band } },
            tooltip: { filter: (item) => !item.dataset.band, callbacks: {
              title: (items) => (items.length ? `${items[0].label} ${bars ? "nats" : page.axes[axis.value]}` : ""),
              label: (item) => {
                const found = panel.series.find((s) => s.label === item.dataset.label), i = item.dataIndex;
                const spread = found.low && found.low[i] !== found.high[i] ? ` (${form(found.low[i])} to ${form(found.high[i])})` : "";
                return ` ${item.dataset.label}: ${form(item.parsed.y)}${spread}`;
              },
            } },
          },
        },
      });
    });
  }
  document.getElementById("csv").addEventListener("click", () => {
    const rows = [["panel", "curve", "steps", "tokens", "seconds", "nats", "value", "low", "high"]];
    for (const panel of page.panels) for (const s of panel.series) s.y.forEach((y, i) => {
      const at = panel.kind === "bars" ? ["", "", "", s.x[i]] : [s.x.steps[i], s.x.tokens[i], s.x.seconds[i], ""];
      rows.push([panel.title, s.label, ...at, y, s.low ? s.low[i] : "", s.high ? s.high[i] : ""]);
    });
    theme.download("curves.csv", rows);
  });
  axis.addEventListener("change", draw);
  theme.onChange(draw);
  draw();
})();
