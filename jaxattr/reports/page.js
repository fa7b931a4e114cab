// The page reads without this: it sorts, filters, moves by keys, and changes between dark and light.
(() => {
  "use strict";
  const at = (id) => document.getElementById(id);
  const holder = at("cards");
  const cards = [...document.querySelectorAll(".card")];
  const text = new Map(cards.map((card) => [card, card.querySelector(".query").textContent.toLowerCase()]));
  const [filter, label, sort, help, theme] = ["filter", "label", "sort", "help", "theme"].map(at);
  const visible = () => [...holder.children].filter((card) => !card.hidden);

  // Filtering: every word must occur in the query, its label or its prediction.
  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = label ? label.selectedOptions[0] : null;
    const any = !wanted || wanted.index === 0;
    for (const card of cards) {
      const named = any || card.dataset.label === wanted.value;
      card.hidden = !(named && words.every((word) => text.get(card).includes(word)));
    }
    const count = visible().length;
    at("count").textContent = `${count} of ${cards.length} queries`;
    at("empty").hidden = count > 0;
  };

  // Sorting: what has no value comes last; ties keep the order given.
  const order = (a, b) => Number(a.dataset.at) - Number(b.dataset.at);
  const value = (card, by, sign) => (card.dataset[by] === "" ? Infinity : sign * Number(card.dataset[by]));
  const by = {
    at: order,
    top: (a, b) => value(a, "top", -1) - value(b, "top", -1) || order(a, b),
    low: (a, b) => value(a, "low", 1) - value(b, "low", 1) || order(a, b),
    label: (a, b) => a.dataset.label.localeCompare(b.dataset.label, undefined, { numeric: true }) || order(a, b),
  };
  const arrange = () => holder.append(...cards.toSorted(by[sort.value]));

  // Weights: a click on a heading sorts by it.
  const table = document.querySelector(".weights");
  for (const heading of table.querySelectorAll("thead th")) {
    const button = document.createElement("button");
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    const column = Number(heading.dataset.by);
    const rows = [...table.tBodies[0].rows];
    button.addEventListener("click", () => {
      const up = column === 0 ? heading.ariaSort !== "ascending" : heading.ariaSort === "descending";
      for (const each of table.querySelectorAll("thead th")) each.ariaSort = null;
      heading.ariaSort = up ? "ascending" : "descending";
      const key = (row) => (column === 0 ? rows.indexOf(row) : Number(row.cells[column].dataset.v));
      table.tBodies[0].append(...rows.toSorted((a, b) => (up ? 1 : -1) * (key(a) - key(b))));
    });
  }

  // Keys.
  const move = (step) => {
    const there = visible();
    if (!there.length) return;
    const now = there.indexOf(document.activeElement.closest(".card"));
    const next = now < 0 ? 0 : Math.min(Math.max(now + step, 0), there.length - 1);
    there[next].focus({ preventScroll: true });
    there[next].scrollIntoView({ block: "start" });
  };
  const turn = () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const now = document.documentElement.dataset.theme || dark;
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  };
  const keys = {
    j: () => move(1), ArrowRight: () => move(1), k: () => move(-1), ArrowLeft: () => move(-1),
    "/": () => filter.focus(), "?": () => help.showModal(), t: turn,
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape" && typing) typing.blur();
    if (typing || help.open || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });

  // Print shows all that is folded away.
  const folded = () => [...document.querySelectorAll("details:not([open])")];
  let opened = [];
  addEventListener("beforeprint", () => { opened = folded(); opened.forEach((each) => { each.open = true; }); });
  addEventListener("afterprint", () => opened.forEach((each) => { each.open = false; }));

  filter.addEventListener("input", show);
  label?.addEventListener("change", show);
  sort.addEventListener("change", arrange);
  theme.addEventListener("click", turn);
  at("keys").addEventListener("click", () => help.showModal());
  at("tools").addEventListener("submit", (event) => event.preventDefault());
  at("tools").hidden = theme.hidden = false;
  arrange(); // browsers keep what was chosen over a reload
  show();
})();
