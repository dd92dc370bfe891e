// Puts the page together: theme, tabs, and the parts.

import * as chat from "./chat.js";
import * as compare from "./compare.js";
import * as http from "./http.js";
import * as settings from "./settings.js";
import * as status from "./status.js";

const THEME = "torchweave-theme";
const root = document.documentElement;

function theme() {
  const button = document.getElementById("theme");
  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => button.setAttribute("aria-label", `Change to the ${isDark() ? "light" : "dark"} theme`);
  try {
    const kept = localStorage.getItem(THEME);
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* storage is off */ }
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem(THEME, root.dataset.theme);
    } catch { /* storage is off */ }
    name();
  });
  name();
}

function tabs() {
  const all = [...document.querySelectorAll("[role=tab]")];
  const choose = (chosen) => {
    for (const tab of all) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
  };
  all.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = all[(i + step + all.length) % all.length];
      choose(next);
      next.focus();
    });
  });
}

theme();
tabs();
http.start();
settings.start();
chat.start();
compare.start();
document.getElementById("side").open = matchMedia("(min-width: 821px)").matches;
status.start();
