"use strict";
// The address holds the view (#sort=downtime&dir=desc&outcome=failed&q=gpu1), so that it can be shared.
// Text of the report is only read here, never made into markup.
(() => {
  const table = document.querySelector("table");
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows].map((row, place) => ({
    row,
    place,
    outcome: row.className,
    text: row.textContent.toLowerCase(),
    keys: heads.map((_, column) => {
      const cell = row.cells[column];
      return cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v);
    }),
    bars: [],
  }));
  const byName = new Map(rows.map((entry) => [entry.keys[0], entry]));
  for (const bar of document.querySelectorAll("[data-host]")) {
    byName.get(bar.dataset.host.trim())?.bars.push(bar);
  }
  const chips = [...document.querySelectorAll(".chips button")];
  const known = new Set(chips.map((chip) => chip.dataset.outcome).filter(Boolean));
  const search = document.querySelector("#q");
  const shown = document.querySelector("#shown");
  const list = document.querySelector("#list");
  const collator = new Intl.Collator("en", { numeric: true });
  // The largest of these matter most.
  const largestFirst = ["downtime", "duration"];
  let state;

  const read = () => {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const column = heads.findIndex((head) => head.dataset.key === wanted.get("sort"));
    state = {
      column: column < 0 ? heads.findIndex((head) => head.dataset.key === "outcome") : column,
      down: wanted.get("dir") === "desc",
      outcomes: new Set((wanted.get("outcome") ?? "").split(",").filter((outcome) => known.has(outcome))),
      q: wanted.get("q") ?? "",
    };
  };

  const save = () => {
    const parameters = new URLSearchParams();
    const key = heads[state.column].dataset.key;
    if (key !== "outcome" || state.down) parameters.set("sort", key);
    if (state.down) parameters.set("dir", "desc");
    if (state.outcomes.size) parameters.set("outcome", [...state.outcomes].join(","));
    if (state.q) parameters.set("q", state.q);
    history.replaceState(null, "", `#${parameters}`.replaceAll("%2C", ","));
  };

  const compare = (a, b) => {
    const [x, y] = [a.keys[state.column], b.keys[state.column]];
    // Unknown values come last in both directions.
    if (x === "" || y === "") return (x === "") - (y === "") || a.place - b.place;
    const order = typeof x === "number" ? x - y : collator.compare(x, y);
    return (state.down ? -order : order) || a.place - b.place;
  };

  const show = () => {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const entry of rows) {
      const match =
        (!state.outcomes.size || state.outcomes.has(entry.outcome)) && words.every((word) => entry.text.includes(word));
      entry.row.hidden = !match;
      for (const bar of entry.bars) bar.classList.toggle("off", !match);
      count += match;
    }
    table.tBodies[0].append(...[...rows].sort(compare).map((entry) => entry.row));
    heads.forEach((head, column) => {
      if (column === state.column) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    for (const chip of chips) {
      const { outcome } = chip.dataset;
      chip.setAttribute("aria-pressed", outcome ? state.outcomes.has(outcome) : !state.outcomes.size);
    }
    if (search.value !== state.q) search.value = state.q;
    const all = rows.length.toLocaleString("en");
    shown.textContent = `${count.toLocaleString("en")} of ${all}`;
    document.querySelector(".none").hidden = count > 0;
  };

  const change = (what) => {
    Object.assign(state, what);
    show();
    save();
  };

  const goToList = () => {
    list.focus({ preventScroll: true });
    list.scrollIntoView();
  };

  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const same = column === state.column;
      change({ column, down: same ? !state.down : largestFirst.includes(head.dataset.key) });
    });
  });
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      const outcomes = new Set(chip.dataset.outcome ? state.outcomes : []);
      if (chip.dataset.outcome && !outcomes.delete(chip.dataset.outcome)) outcomes.add(chip.dataset.outcome);
      change({ outcomes });
    });
  }
  search.addEventListener("input", () => change({ q: search.value }));
  shown.addEventListener("click", goToList);
  document.querySelector("#clear").addEventListener("click", () => {
    change({ outcomes: new Set(), q: "" });
    search.focus();
  });
  document.querySelector(".waves")?.addEventListener("click", (event) => {
    const bar = event.target.closest("[data-host]");
    if (!bar) return;
    change({ outcomes: new Set(), q: bar.dataset.host });
    goToList();
  });
  addEventListener("hashchange", () => {
    read();
    show();
  });
  const page = document.documentElement;
  // The table's head stays below the tools, whose height varies.
  const tools = document.querySelector(".tools");
  new ResizeObserver(() => page.style.setProperty("--tools", `${tools.offsetHeight}px`)).observe(tools);
  page.classList.add("js");
  read();
  show();
})();
