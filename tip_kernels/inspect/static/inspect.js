"use strict";
// The page of rollouts. Tokens are numbered 0..N-1 in reading order; every text goes in as textContent.
(() => {
  const PAGE = 2500; // tokens on a page: what a browser lays out at once
  const POINTS = 20000; // drawn in the scatter
  const FLOOR = 1e-4; // nats: what is smaller sits on the edge of the logarithmic scatter
  const MEANING = ["not measured", "uncertain and wrong", "uncertain, agrees", "overconfident and wrong", "solved"];
  const SHAPE = ["crossRot", "triangle", "circle", "rectRot", "circle"];
  const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const viridis = VIRIDIS.map(rgb);

  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const N = data.text.length;
  const number = (v) => (v === null ? NaN : Number(v));
  const stats = new Map(data.statistics.map((s) => [s.name, { ...s, values: Float64Array.from(s.values, number) }]));
  const value = (name, i) => (stats.has(name) ? stats.get(name).values[i] : NaN);
  const textOf = (i) => data.strings[data.text[i]];
  const quadrant = (i) => Number(data.quadrant[i]);
  const kept = (i) => data.kept !== null && data.kept[i] === "1";
  const measured = stats.has("entropy_s") && stats.has("kl_rev");

  const rolloutOf = new Int32Array(N);
  const rollouts = data.rollouts.map((facts, index) => {
    const seen = { ...facts, index, shares: [0, 0, 0, 0, 0], kept: 0, kl: 0, most: 0, entropy: 0, length: facts.end - facts.first };
    let finite = 0, known = 0;
    for (let i = facts.first; i < facts.end; i++) {
      rolloutOf[i] = index;
      seen.shares[quadrant(i)] += 1;
      seen.kept += kept(i);
      const kl = value("kl_rev", i), h = value("entropy_s", i);
      if (kl > seen.most) seen.most = kl;
      if (Number.isFinite(kl)) { seen.kl += kl; finite += 1; }
      if (Number.isFinite(h)) { seen.entropy += h; known += 1; }
    }
    seen.kl /= finite || 1;
    seen.entropy /= known || 1;
    return seen;
  });
  const searchable = (r) => (r.plain ??= `${r.prompt ?? ""}\n${Array.from({ length: r.length }, (_, k) => textOf(r.first + k)).join("")}`.toLowerCase());

  // What the reader chose
  let colourBy = measured ? "quadrant" : data.statistics[0].name;
  let descending = false;
  let shown = []; // rollouts that pass the filters, in order
  let pages = []; // of pieces [rollout, from, to]: a long rollout is cut
  let page = 0;
  let held = -1, looked = -1; // the token that was clicked or walked to; the one that is described
  const lit = new Set(); // legend entries that are pressed

  function element(tag, props = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, v] of Object.entries(props)) {
      if (name in node && name !== "role") node[name] = v;
      else node.setAttribute(name, v);
    }
    node.append(...children);
    return node;
  }

  // Characters that cannot be seen, or that would turn their neighbours around, are shown as signs.
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\ufffb]/u;
  function visible(text, running) {
    if (text === "") return "·";
    return Array.from(text, (c) => {
      if (c === "\n") return running ? "↵\n" : "↵";
      if (c === "\t") return running ? "→\t" : "→";
      if (c === " ") return running ? " " : "␣";
      if (!HIDDEN.test(c)) return c;
      const code = c.codePointAt(0);
      if (code < 0x20) return String.fromCodePoint(0x2400 + code);
      return code === 0x7f ? "␡" : `‹${code.toString(16).toUpperCase().padStart(4, "0")}›`;
    }).join("");
  }
  function figure(v) {
    if (Number.isNaN(v)) return "–";
    if (!Number.isFinite(v)) return v > 0 ? "∞" : "−∞";
    const size = Math.abs(v);
    if (v === 0) return "0";
    if (size < 1e-3) return v.toExponential(1).replace("-", "−");
    return (size >= 100 ? v.toFixed(0) : v.toPrecision(3)).replace("-", "−");
  }
  const percent = (p) => (Number.isNaN(p) ? "" : p < 0.0005 ? "<0.1 %" : `${(100 * p).toFixed(p > 0.9995 && p < 1 ? 2 : 1)} %`);

  // Colour of a statistic: viridis, its low end towards the page, its high end away from it
  const ranges = new Map();
  function range(name) {
    if (!ranges.has(name)) {
      const sorted = stats.get(name).values.filter(Number.isFinite).sort();
      const low = sorted.length ? sorted[0] : 0;
      const high = sorted.length ? sorted[Math.floor(0.99 * (sorted.length - 1))] : 1;
      ranges.set(name, [low, high > low ? high : low + 1]);
    }
    return ranges.get(name);
  }
  const negative = (name) => name.startsWith("logp"); // near 0 is the ordinary case
  function share(name, i) {
    const v = value(name, i);
    const [low, high] = range(name);
    const t = Math.min(1, Math.max(0, (v - low) / (high - low)));
    return negative(name) ? 1 - t : t;
  }
  function solid(t) {
    if (Number.isNaN(t)) return [128, 128, 128];
    const place = (theme.isDark() ? 0.12 + 0.88 * t : 0.95 * (1 - t)) * (viridis.length - 1);
    const k = Math.min(viridis.length - 2, Math.floor(place));
    return viridis[k].map((c, j) => Math.round(c + (place - k) * (viridis[k + 1][j] - c)));
  }
  function paint(t) { // a small value hardly marks a token
    if (Number.isNaN(t)) return { back: "transparent", ink: "inherit" };
    const strength = Math.min(1, 0.04 + 2.4 * t);
    const ground = theme.isDark() ? [24, 28, 34] : [255, 255, 255];
    const mixed = solid(t).map((c, j) => Math.round(strength * c + (1 - strength) * ground[j]));
    const [r, g, b] = mixed.map((c) => ((c /= 255) <= 0.04 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    const light = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18;
    return { back: `rgb(${mixed})`, ink: light ? "#101418" : "#ffffff" };
  }

  // Text
  const list = $("list");
  function dress(node, i) {
    const byQuadrant = colourBy === "quadrant";
    const q = quadrant(i), text = textOf(i);
    let classes = "t";
    if (byQuadrant && q) classes += ` q${q}`;
    if (kept(i)) classes += " k";
    if (text === "") classes += " odd";
    if (lit.has(`q${q}`) || (lit.has("kept") && kept(i))) classes += " lit";
    if (i === held) classes += " held";
    node.className = classes;
    const colours = byQuadrant ? { back: "", ink: "" } : paint(share(colourBy, i));
    node.style.background = colours.back;
    node.style.color = colours.ink;
  }
  function token(i) {
    const node = element("span", { role: "button", textContent: visible(textOf(i), true), tabIndex: -1 });
    node.dataset.i = i;
    dress(node, i);
    return node;
  }
  function verdict(r) {
    if (typeof r.right !== "boolean") return [];
    return [element("span", { className: r.right ? "right" : "wrong", textContent: r.right ? "✓ right" : "✗ wrong" })];
  }
  function article([r, from, to]) {
    const title = `Rollout ${r.index + 1}`;
    const facts = [`${r.length} tokens`];
    if (data.kept !== null) facts.push(`${r.kept} kept`);
    if (stats.has("kl_rev")) facts.push(`mean KL ${figure(r.kl)}`);
    if (stats.has("entropy_s")) facts.push(`mean entropy ${figure(r.entropy)}`);
    if (r.ended === false) facts.push("cut at its longest");
    const shares = element("span", { className: "shares", title: [3, 1, 2, 4].map((q) => `Q${q} ${r.shares[q]}`).join(", ") });
    for (const q of [3, 1, 2, 4]) {
      const part = element("i");
      part.style.cssText = `width:${(100 * r.shares[q]) / r.length}%;background:var(--q${q})`;
      shares.append(part);
    }
    const part = to - from < r.length ? [element("span", { textContent: `tokens ${from - r.first + 1} to ${to - r.first}` })] : [];
    const group = r.group ? [element("span", { textContent: r.group })] : [];
    const head = element("header", {}, element("h2", { textContent: title }), ...group, ...verdict(r), ...part,
      element("span", { textContent: facts.join(" · ") }), ...(measured ? [shares] : []));
    const text = element("p", { className: "text", dir: "auto", role: "group", "aria-label": `${title}, its tokens` });
    for (let i = from; i < to; i++) text.append(token(i));
    const prompt = r.prompt && from === r.first ? [element("p", { className: "prompt", dir: "auto", textContent: visible(r.prompt, true) })] : [];
    return element("article", { className: "card rollout" }, head, ...prompt, text);
  }
  const nodeOf = (i) => list.querySelector(`.t[data-i="${i}"]`);
  function draw() {
    list.replaceChildren(...(pages[page] ?? []).map(article));
    if (!shown.length) list.append(element("p", { className: "card empty", textContent: "No rollout passes these filters." }));
    const numbers = (pages[page] ?? []).map(([r]) => shown.indexOf(r) + 1);
    $("where").textContent = shown.length
      ? `${numbers[0]}–${numbers.at(-1)} of ${shown.length} rollouts · page ${page + 1} of ${pages.length}` : "";
    $("previous").disabled = page === 0;
    $("next").disabled = page >= pages.length - 1;
    const first = nodeOf(held) ?? list.querySelector(".t");
    if (first) first.tabIndex = 0;
  }
  function redress() {
    for (const node of list.querySelectorAll(".t")) dress(node, Number(node.dataset.i));
    list.classList.toggle("dimming", lit.size > 0);
  }

  // Sorting and filtering
  const KEYS = { index: (r) => r.index, prompt: (r) => r.prompt ?? "", kl: (r) => r.kl, most: (r) => r.most, entropy: (r) => r.entropy,
    q3: (r) => r.shares[3], kept: (r) => r.kept / r.length, length: (r) => r.length };
  function choose() {
    const query = $("find").value.toLowerCase(), answer = $("verdict").value, group = $("group").value, having = $("having").value;
    const key = KEYS[$("sort").value];
    shown = rollouts.filter((r) => (!answer || r.right === (answer === "right")) && (!group || r.group === group)
      && (!having || r.shares[having] > 0) && (!query || searchable(r).includes(query)));
    const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0) * (descending ? -1 : 1);
    shown.sort((a, b) => compare(key(a), key(b)) || a.index - b.index);
    pages = [];
    let room = 0;
    for (const r of shown) {
      for (let from = r.first; from < r.end; from += PAGE) {
        const to = Math.min(from + PAGE, r.end);
        if (room < to - from) { pages.push([]); room = PAGE; }
        pages.at(-1).push([r, from, to]);
        room -= to - from;
      }
    }
    page = 0;
    draw();
    legend();
    plot();
  }
  function legend() {
    const box = $("legend"), counts = [0, 0, 0, 0, 0];
    let keptCount = 0, total = 0;
    for (const r of shown) {
      r.shares.forEach((n, q) => { counts[q] += n; });
      keptCount += r.kept;
      total += r.length;
    }
    const entry = (name, label, count, swatch) => {
      const press = element("button", { type: "button", "aria-pressed": String(lit.has(name)) }, ...swatch,
        element("span", { textContent: label }), element("span", { className: "count", textContent: `${count.toLocaleString("en")} · ${(100 * count / (total || 1)).toFixed(1)} %` }));
      press.dataset.entry = name;
      press.addEventListener("click", () => {
        if (!lit.delete(name)) lit.add(name);
        redress();
        legend();
        plot();
        box.querySelector(`[data-entry="${name}"]`).focus();
      });
      return press;
    };
    const entries = [];
    if (measured) {
      for (const q of [3, 1, 2, 4]) {
        const swatch = element("i", { className: "swatch" });
        swatch.style.background = `var(--q${q})`;
        entries.push(entry(`q${q}`, `Q${q} ${MEANING[q]}`, counts[q], colourBy === "quadrant" ? [swatch] : []));
      }
    }
    if (data.kept !== null) entries.push(entry("kept", "kept", keptCount, [element("span", { className: "chip kept", textContent: "a" })]));
    if (colourBy !== "quadrant") {
      const [low, high] = range(colourBy), bar = element("i");
      const stops = Array.from({ length: 21 }, (_, k) => paint(k / 20).back);
      bar.style.background = `linear-gradient(to right, ${stops})`;
      const ends = negative(colourBy) ? [high, low] : [low, high];
      entries.unshift(element("span", { className: "scale", title: "from the smallest value to the 99th percentile" },
        figure(ends[0]), bar, figure(ends[1])));
    }
    box.replaceChildren(...entries);
  }

  // One token in full
  function butterfly(i) {
    if (!data.top_s && !data.top_t) return [];
    const found = new Map();
    for (const side of ["top_s", "top_t"]) {
      const top = data[side];
      for (let k = 0; top && k < top.k; k++) {
        const place = top.places[i * top.k + k], p = number(top.p[i * top.k + k]);
        if (place >= 0 && !Number.isNaN(p)) found.set(place, { ...found.get(place), [side]: p });
      }
    }
    const largest = (row) => Math.max(row.top_s ?? 0, row.top_t ?? 0);
    const rows = [...found].sort((a, b) => largest(b[1]) - largest(a[1]));
    const body = element("tbody");
    for (const [place, row] of rows) {
      const text = data.strings[place], drawn = text === textOf(i);
      const cell = (p, side) => {
        const bar = element("i");
        bar.style.width = `${(p ?? 0) * 55}%`;
        const label = element("span", { textContent: p === undefined ? "" : percent(p) });
        return element("td", {}, element("div", { className: `bar ${side}` }, ...(p === undefined ? [] : side === "s" ? [label, bar] : [bar, label])));
      };
      const name = element("div", { className: "name", title: visible(text, false), textContent: (drawn ? "▸" : "") + visible(text, false) });
      body.append(element("tr", { className: drawn ? "drawn" : "" }, cell(row.top_s, "s"), element("td", {}, name), cell(row.top_t, "t-side")));
    }
    const columns = ["Student", "token", "Teacher"].map((name) => element("th", { scope: "col", textContent: name }));
    const k = (data.top_s ?? data.top_t).k;
    return [element("table", { className: "tops" }, element("caption", { textContent: `Likeliest ${k} of each; ▸ was drawn` }),
      element("thead", {}, element("tr", {}, ...columns)), body)];
  }
  function describe(i) {
    looked = i;
    const box = $("detail");
    box.dataset.i = i;
    if (i < 0) {
      box.replaceChildren(element("h2", { textContent: "A token" }), element("p", { className: "note", textContent: "Point at a token in the text or in the scatter, or walk there with the arrow keys." }));
      ring();
      return;
    }
    const r = rollouts[rolloutOf[i]], q = quadrant(i);
    const swatch = element("i", { className: "swatch" });
    swatch.style.background = q ? `var(--q${q})` : "var(--soft)";
    const chips = [element("span", { className: "token", textContent: visible(textOf(i), false) })];
    if (measured) chips.push(element("span", { className: "chip" }, swatch, `Q${q || "–"} ${MEANING[q]}`));
    if (kept(i)) chips.push(element("span", { className: "chip kept", textContent: "kept" }));
    const numbers = element("dl", { className: "numbers" });
    for (const [name, s] of stats) {
      const shownValue = name === "agree" && !Number.isNaN(s.values[i]) ? (s.values[i] ? "yes" : "no") : figure(s.values[i]);
      numbers.append(element("div", {}, element("dt", { textContent: s.label }), element("dd", { textContent: shownValue })));
    }
    const place = `Rollout ${r.index + 1}, token ${i - r.first + 1} of ${r.length}${r.group ? `, ${r.group}` : ""}${i === held ? " · held" : ""}`;
    box.replaceChildren(element("div", { className: "chips" }, ...chips), element("p", { className: "note", textContent: place }), numbers, ...butterfly(i));
    const node = nodeOf(i);
    if (node) {
      const spoken = [`token ${visible(textOf(i), false)}`, measured ? `quadrant ${q}, ${MEANING[q]}` : "", kept(i) ? "kept" : "not kept",
        ...["entropy_s", "kl_rev"].filter((name) => stats.has(name)).map((name) => `${stats.get(name).label} ${figure(value(name, i))}`)];
      node.setAttribute("aria-label", spoken.filter(Boolean).join(", "));
    }
    ring();
  }
  function hold(i, move = true) {
    const before = nodeOf(held);
    held = i;
    if (before) { before.classList.remove("held"); before.removeAttribute("aria-current"); }
    if (i >= 0 && !nodeOf(i)) {
      const at = () => pages.findIndex((pieces) => pieces.some(([, from, to]) => from <= i && i < to));
      if (at() < 0) { // a filter hides it
        for (const id of ["find", "verdict", "group", "having"]) $(id).value = "";
        choose();
      }
      page = at();
      draw();
    }
    const node = nodeOf(i);
    if (node) {
      for (const other of list.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
      node.tabIndex = 0;
      node.classList.add("held");
      node.setAttribute("aria-current", "true");
      if (move) {
        node.focus({ preventScroll: true });
        node.scrollIntoView({ block: "nearest" });
        const box = node.getBoundingClientRect();
        if (box.top < 110 || box.bottom > innerHeight - 60) node.scrollIntoView({ block: "center" });
      }
    }
    describe(i);
  }

  // Scatter
  let chart = null, points = [];
  const colours = (q) => theme.colour(q ? `q${q}` : "soft");
  const clamp = (v, log) => (log ? Math.max(v, FLOOR) : v);
  function plot() {
    if (!measured) { $("plot").hidden = true; return; }
    const log = $("log").checked;
    const x = stats.get("entropy_s").values, y = stats.get("kl_rev").values;
    points = [];
    let finiteTop = 0;
    for (const r of shown) for (let i = r.first; i < r.end; i++) {
      if (Number.isNaN(x[i]) || Number.isNaN(y[i])) continue;
      points.push(i);
      if (Number.isFinite(y[i]) && y[i] > finiteTop) finiteTop = y[i];
    }
    const all = points.length;
    if (all > POINTS) { // every kept token, and an even sample of the rest
      const chosen = points.filter(kept).slice(0, POINTS), rest = points.filter((i) => !kept(i));
      const every = rest.length / Math.max(1, POINTS - chosen.length);
      for (let k = 0; k < POINTS - chosen.length && k < rest.length; k++) chosen.push(rest[Math.floor(k * every)]);
      points = chosen;
    }
    const top = Math.max(finiteTop * (log ? 2 : 1.05), 2 * data.cuts.divergence);
    const right = Math.max(points.reduce((most, i) => Math.max(most, x[i]), 0) * (log ? 1.5 : 1.05), 2 * data.cuts.entropy);
    const low = log ? FLOOR / 1.5 : -0.02 * top, left = log ? FLOOR / 1.5 : -0.02 * right;
    const classes = new Map();
    for (const i of points) {
      const t = colourBy === "quadrant" ? quadrant(i) : share(colourBy, i);
      const bin = colourBy === "quadrant" ? t : Number.isNaN(t) ? -1 : Math.min(11, Math.floor(12 * t));
      const dim = lit.size > 0 && !lit.has(`q${quadrant(i)}`) && !(lit.has("kept") && kept(i));
      const key = `${dim ? 0 : 1}${kept(i) ? 1 : 0} ${bin}`;
      if (!classes.has(key)) classes.set(key, { dim, kept: kept(i), bin, data: [] });
      classes.get(key).data.push({ x: clamp(x[i], log), y: clamp(Math.min(y[i], top), log), i });
    }
    const ink = theme.colour("ink");
    const datasets = [...classes].sort(([a], [b]) => (a < b ? -1 : 1)).map(([, c]) => {
      const fill = colourBy === "quadrant" ? colours(c.bin) : `rgb(${solid(c.bin < 0 ? NaN : (c.bin + 0.5) / 12)})`;
      return {
        data: c.data, parsing: false, normalized: true,
        pointStyle: colourBy === "quadrant" ? SHAPE[c.bin] : "circle",
        pointRadius: c.dim ? 1.2 : c.kept ? 3.6 : 2.2,
        pointBackgroundColor: c.dim ? theme.colour("line") : fill,
        pointBorderColor: c.kept && !c.dim ? ink : "transparent", pointBorderWidth: c.kept && !c.dim ? 0.7 : 0,
      };
    });
    const cut = (from, to) => ({ type: "line", data: [from, to], parsing: false, pointRadius: 0, pointHitRadius: 0, borderColor: theme.colour("ink"), borderWidth: 1, borderDash: [5, 4] });
    const lines = [
      cut({ x: data.cuts.entropy, y: low }, { x: data.cuts.entropy, y: top }),
      cut({ x: left, y: data.cuts.divergence }, { x: right, y: data.cuts.divergence }),
    ];
    theme.chart();
    const ticks = { maxTicksLimit: 8, callback: (v) => (log ? (Number.isInteger(Math.round(1e6 * Math.log10(v)) / 1e6) ? String(v) : "") : figure(v)) };
    const axis = (title, min, max) => ({ type: log ? "logarithmic" : "linear", min, max, ticks: { ...ticks, color: theme.colour("soft") },
      title: { display: true, text: title, color: theme.colour("soft") }, grid: { color: theme.colour("grid") } });
    const corners = { id: "corners", afterDraw({ ctx, chartArea: area }) {
      ctx.save();
      ctx.font = `600 11px ${Chart.defaults.font.family}`;
      ctx.fillStyle = ink;
      ctx.strokeStyle = theme.colour("card");
      ctx.lineWidth = 4;
      for (const [q, h, v] of [[3, "left", "top"], [1, "right", "top"], [2, "right", "bottom"], [4, "left", "bottom"]]) {
        ctx.textAlign = h;
        ctx.textBaseline = v;
        const at = [`Q${q}`, area[h] + (h === "left" ? 6 : -6), area[v] + (v === "top" ? 6 : -6)];
        ctx.strokeText(...at);
        ctx.fillText(...at);
      }
      ctx.restore();
    } };
    const near = (event) => {
      const [hit] = chart.getElementsAtEventForMode(event, "nearest", { intersect: false, axis: "xy" }, false)
        .filter(({ datasetIndex }) => datasetIndex >= 2);
      if (!hit || Math.hypot(hit.element.x - event.x, hit.element.y - event.y) > 14) return -1;
      return chart.data.datasets[hit.datasetIndex].data[hit.index].i;
    };
    chart?.destroy();
    chart = new Chart($("scatter"), {
      type: "scatter",
      data: { datasets: [...lines, ...datasets] },
      plugins: [corners],
      options: {
        events: ["mousemove", "mouseout", "click", "touchstart"],
        hover: { mode: null },
        plugins: { legend: { display: false }, tooltip: { enabled: false } },
        scales: { x: axis("entropy of the student, nats", left, right), y: axis("KL(student ‖ teacher), nats", low, top) },
        onHover: (event) => {
          if (event.type === "mouseout") { describe(held); return; }
          const i = near(event);
          if (i >= 0 && i !== looked) describe(i);
          if (i < 0 && looked !== held) describe(held);
        },
        onClick: (event) => { const i = near(event); if (i >= 0) hold(i); },
        onResize: () => requestAnimationFrame(ring),
      },
    });
    $("scatter").setAttribute("aria-label", `Scatter of ${points.length} tokens, entropy against divergence, with the quadrants' lines. Arrow keys go from point to point, Enter to the token's text.`);
    const infinite = points.some((i) => y[i] === Infinity) ? " ∞ is at the upper edge." : "";
    const sampled = all > POINTS ? `${points.length.toLocaleString("en")} of ${all.toLocaleString("en")} tokens drawn: ${data.kept === null ? "" : "the kept ones and "}an even sample.` : `${all.toLocaleString("en")} tokens.`;
    $("drawn").textContent = `${sampled} Lines at ${data.cuts.entropy} and ${data.cuts.divergence} nats; kept tokens have a rim.${infinite}`;
    ring();
  }
  function ring() { // around the described token's point
    const mark = $("ring");
    const x = value("entropy_s", looked), y = value("kl_rev", looked);
    mark.hidden = looked < 0 || !chart || Number.isNaN(x) || Number.isNaN(y);
    if (mark.hidden) return;
    const log = $("log").checked, { scales } = chart;
    mark.style.left = `${scales.x.getPixelForValue(clamp(x, log))}px`;
    mark.style.top = `${scales.y.getPixelForValue(clamp(Math.min(y, scales.y.max), log))}px`;
  }

  // Pointer and keyboard
  const numberOf = (target) => Number(target.closest?.(".t")?.dataset.i ?? -1);
  list.addEventListener("mouseover", (event) => { const i = numberOf(event.target); if (i >= 0) describe(i); });
  list.addEventListener("mouseleave", () => describe(held));
  list.addEventListener("click", (event) => { const i = numberOf(event.target); if (i >= 0) hold(i === held ? -1 : i, false); });
  list.addEventListener("focusin", (event) => { const i = numberOf(event.target); if (i >= 0 && i !== looked) describe(i); });

  const order = () => pages.flat();
  function neighbour(i, step) { // along the rollouts as they are shown
    const pieces = order(), at = pieces.findIndex(([, from, to]) => from <= i && i < to);
    const [, from, to] = pieces[at];
    if (from <= i + step && i + step < to) return i + step;
    const next = pieces[at + step];
    return next ? (step > 0 ? next[1] : next[2] - 1) : i;
  }
  function nextKept(i, step) {
    for (let at = i, next; (next = neighbour(at, step)) !== at; at = next) if (kept(next)) return next;
    return i;
  }
  function lineAway(i, step) {
    const box = nodeOf(i).getBoundingClientRect(), middle = (box.left + box.right) / 2;
    const nodes = [...list.querySelectorAll(".t")];
    let best = i, line = null, nearest = Infinity;
    for (let k = nodes.findIndex((node) => Number(node.dataset.i) === i) + step; k >= 0 && k < nodes.length; k += step) {
      const other = nodes[k].getBoundingClientRect();
      if (step > 0 ? other.top < box.bottom - 3 : other.bottom > box.top + 3) continue;
      line ??= other.top;
      if (Math.abs(other.top - line) > 6) break;
      const away = Math.abs((other.left + other.right) / 2 - middle);
      if (away < nearest) { nearest = away; best = Number(nodes[k].dataset.i); }
    }
    return best;
  }
  list.addEventListener("keydown", (event) => {
    const i = numberOf(event.target);
    if (i < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const r = rollouts[rolloutOf[i]];
    const back = getComputedStyle(event.target.parentNode).direction === "rtl" ? 1 : -1;
    const to = {
      ArrowLeft: () => neighbour(i, back), ArrowRight: () => neighbour(i, -back), ArrowUp: () => lineAway(i, -1), ArrowDown: () => lineAway(i, 1),
      Home: () => r.first, End: () => r.end - 1, n: () => nextKept(i, 1), p: () => nextKept(i, -1), Enter: () => i, " ": () => i,
    }[event.key];
    if (!to) return;
    event.preventDefault();
    hold(to());
  });
  const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && held >= 0) hold(-1, false);
    const idle = event.target === document.body || event.target === document.documentElement;
    if (!idle || !WAYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    const first = nodeOf(held) ?? list.querySelector(".t"); // nothing has the focus: a walk begins where one left off
    if (first) { event.preventDefault(); hold(Number(first.dataset.i)); }
  });
  function pointTowards(i, [right, down]) { // the nearest point that way; aside counts twice
    const { x, y } = chart.scales, log = $("log").checked;
    const at = (k) => [x.getPixelForValue(clamp(value("entropy_s", k), log)), y.getPixelForValue(clamp(Math.min(value("kl_rev", k), y.max), log))];
    const [left, top] = at(i);
    let best = i, least = Infinity;
    for (const k of points) {
      const [px, py] = at(k), along = (px - left) * right + (py - top) * down, aside = Math.abs((px - left) * down) + Math.abs((py - top) * right);
      if (along < 0.5) continue;
      const away = along + 2 * aside;
      if (away < least) { least = away; best = k; }
    }
    return best;
  }
  $("scatter").addEventListener("keydown", (event) => {
    if (!points.length || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" && held >= 0) { event.preventDefault(); hold(held); return; }
    if (!WAYS[event.key]) return;
    event.preventDefault();
    hold(points.includes(held) ? pointTowards(held, WAYS[event.key]) : points[0], false);
  });

  // Controls
  const options = measured ? [["quadrant", "quadrant"]] : [];
  for (const [name, s] of stats) options.push([name, s.label]);
  for (const [name, label] of options) $("colour").append(element("option", { value: name, textContent: label }));
  const groups = [...new Set(rollouts.map((r) => r.group).filter(Boolean))];
  for (const group of groups) $("group").append(element("option", { value: group, textContent: group }));
  $("groups").hidden = groups.length < 2;
  $("verdicts").hidden = !rollouts.some((r) => typeof r.right === "boolean");
  $("having").parentNode.hidden = !measured;
  $("colour").addEventListener("change", (event) => { colourBy = event.target.value; redress(); legend(); plot(); });
  $("order").addEventListener("click", () => {
    descending = !descending;
    $("order").textContent = descending ? "↓" : "↑";
    $("order").setAttribute("aria-label", `${descending ? "Descending" : "Ascending"}; press to reverse`);
    choose();
  });
  $("sort").addEventListener("change", (event) => { if (!["index", "prompt"].includes(event.target.value) !== descending) $("order").click(); else choose(); });
  for (const id of ["verdict", "group", "having"]) $(id).addEventListener("change", choose);
  let waiting = 0;
  $("find").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(choose, 120); });
  const turn = (step) => () => { page += step; draw(); redress(); scrollTo({ top: 0 }); };
  $("previous").addEventListener("click", turn(-1));
  $("next").addEventListener("click", turn(1));
  $("csv").addEventListener("click", () => {
    const names = [...stats.keys()];
    const rows = [["rollout", "group", "right", "token", "text_json", "quadrant", "kept", ...names]];
    for (const r of shown) for (let i = r.first; i < r.end; i++) {
      rows.push([r.index + 1, r.group ?? "", r.right ?? "", i - r.first + 1, JSON.stringify(textOf(i)), quadrant(i) || "", data.kept === null ? "" : Number(kept(i)),
        ...names.map((name) => value(name, i))]);
    }
    theme.download("tokens.csv", rows);
  });
  $("log").addEventListener("change", plot);
  theme.onChange(() => { redress(); legend(); plot(); });

  const guide = $("guide"), STORED = "tip-kernels guide"; // open for a first reader, as it was left for others
  try { guide.open = (localStorage.getItem(STORED) ?? (innerWidth > 960 ? "open" : "")) === "open"; } catch { /* a browser may forbid it to files */ }
  guide.addEventListener("toggle", () => { try { localStorage.setItem(STORED, guide.open ? "open" : "closed"); } catch { /* likewise */ } });

  choose();
  describe(-1);
})();
