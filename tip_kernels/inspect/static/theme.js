"use strict";
// Light, dark or as the system says; charts ask `theme` for resolved colours and are told when they change.
const theme = (() => {
  const button = document.getElementById("theme");
  const names = { "light dark": "Auto", light: "Light", dark: "Dark" };
  const said = { "light dark": "as the system says", light: "light", dark: "dark" };
  const listeners = [];
  const system = matchMedia("(prefers-color-scheme: dark)");
  let choice = "light dark";
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;

  function apply(next) {
    choice = next in names ? next : "light dark";
    document.documentElement.style.colorScheme = choice;
    button.querySelector("span").textContent = names[choice];
    button.setAttribute("aria-label", `Theme: ${said[choice]}; press to change`);
    try { localStorage.setItem("tip-kernels theme", choice); } catch { /* a browser may forbid it to files */ }
    listeners.forEach((listener) => listener());
  }
  function colour(name) {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  }
  let stored = null;
  try { stored = localStorage.getItem("tip-kernels theme"); } catch { /* likewise */ }
  apply(stored ?? "light dark");
  button.addEventListener("click", () => {
    const order = Object.keys(names);
    apply(order[(order.indexOf(choice) + 1) % order.length]);
  });
  system.addEventListener("change", () => apply(choice));
  function download(name, rows) { // RFC 4180; a text that a spreadsheet would compute stays a text
    const cell = (v) => {
      if (typeof v !== "string") return Number.isNaN(v) ? "" : String(v);
      const text = /^[=+\-@\t\r]/.test(v) ? `'${v}` : v;
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`\ufeff${rows.map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`], { type: "text/csv" }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }
  return {
    colour,
    download,
    isDark: () => choice === "dark" || (choice !== "light" && system.matches),
    onChange: (listener) => listeners.push(listener),
    chart() { // what every chart takes from the page
      Object.assign(Chart.defaults, { color: colour("soft"), borderColor: colour("grid"), animation: false, maintainAspectRatio: false });
      Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
      Chart.defaults.font.size = 11;
    },
  };
})();
