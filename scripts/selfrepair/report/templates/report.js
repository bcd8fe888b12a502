// ---- state: the page's controls, kept in the URL fragment as #section&name=value ------------------------
const pageControls = document.getElementById("page-controls");
const views = new Map(); // figure name -> Vega view
const own = new Map(); // "figure.control" -> value, where a figure differs from the page's controls or its first choice

function readFragment() {
  const [anchor, ...pairs] = location.hash.slice(1).split("&");
  const state = new Map(pairs.map((pair) => pair.split("=").map(decodeURIComponent)));
  return { anchor: anchor.includes("=") ? "" : anchor, state };
}
function pageState() {
  const data = new FormData(pageControls);
  const state = { full_scale: data.has("full_scale"), left_out: data.getAll("left_out").map(Number) };
  for (const name of ["pick_source", "pick_ablation"]) if (data.has(name)) state[name] = data.get(name);
  return state;
}
function writeFragment(anchor) {
  const pairs = [];
  for (const [name, value] of Object.entries(pageState())) {
    const text = Array.isArray(value) ? value.join(",") : value === false ? "" : value === true ? "1" : value;
    const select = pageControls.elements[name];
    const isDefault = select && select.options ? select.selectedIndex === 0 : text === "";
    if (!isDefault) pairs.push(name + "=" + encodeURIComponent(text));
  }
  for (const [name, value] of own) pairs.push(name + "=" + encodeURIComponent(value));
  const shown = document.querySelector("#explorer tr[aria-selected=true]");
  if (shown) pairs.push("prompt=" + encodeURIComponent(shown.dataset.prompt));
  history.replaceState(null, "", "#" + [anchor ?? readFragment().anchor, ...pairs].join("&"));
}
function applyState(view, state, skip) {
  for (const [name, value] of Object.entries(state)) {
    if (name === skip) continue;
    try { view.signal(name, value); } catch { /* this figure does not have the control */ }
  }
  return view.runAsync();
}
// Applies a figure's own choices of the fragment, and records further ones.
function followOwn(name, view, spec) {
  for (const param of spec.params.filter((one) => one.bind && one.bind !== "legend")) {
    const key = `${name}.${param.name}`;
    const initial = () => (pageControls && pageState()[param.name]) ?? param.value;
    if (own.has(key)) {
      const text = own.get(key), now = view.signal(param.name);
      view.signal(param.name, typeof now === "number" ? Number(text) : typeof now === "boolean" ? text === "true" : text);
    }
    view.addSignalListener(param.name, (_, value) => {
      if (value === initial()) own.delete(key);
      else own.set(key, String(value));
      writeFragment();
    });
  }
  return view.runAsync();
}
if (pageControls) {
  const { state } = readFragment();
  for (const [name, value] of state) {
    if (name.includes(".")) own.set(name, value);
    const element = pageControls.elements[name];
    if (!element) continue;
    if (name === "left_out") {
      const layers = value.split(",");
      pageControls.querySelectorAll("[name=left_out]").forEach((box) => { box.checked = layers.includes(box.value); });
    } else if (element.type === "checkbox") element.checked = value === "1";
    else element.value = value;
  }
  pageControls.addEventListener("submit", (event) => event.preventDefault());
  // Another source: its default ablation follows if the default of the source before it was shown.
  const { pick_source: source, pick_ablation: ablation } = pageControls.elements;
  let shownSource = source && source.value;
  pageControls.addEventListener("change", () => {
    if (source && ablation && source.value !== shownSource) {
      if (ablation.value === store.ablations[shownSource]) ablation.value = store.ablations[source.value];
      shownSource = source.value;
    }
    writeFragment();
    const state = pageState();
    views.forEach((view) => applyState(view, state));
  });
  window.addEventListener("hashchange", () => writeFragment());
}

// ---- figures: drawn when they come near the view, so that the page opens at once ------------------------
const figures = document.querySelectorAll("figure[data-figure]");
function draw(element) {
  const holder = document.getElementById("payload-" + element.dataset.figure);
  const payload = JSON.parse(holder.textContent);
  return drawFigure(element, payload).then((result) => {
    if (!result) return;
    element.classList.add("drawn");
    views.set(element.dataset.figure, result.view);
    if (pageControls) applyState(result.view, pageState());
    followOwn(element.dataset.figure, result.view, payload.spec);
    result.view.addEventListener("click", (event, item) => {
      const datum = item && item.datum;
      if (datum && datum.key && String(datum.key).includes(":")) showPrompt(datum.key, true);
    });
    element.querySelectorAll("[data-export]").forEach((button) => button.addEventListener("click", () => {
      if (button.dataset.export === "pdf") printFigure(element.dataset.figure, element);
      else exportFigure(button.dataset.export, element.dataset.figure, result.view, payload);
    }));
  });
}
if ("IntersectionObserver" in window) {
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "600px" });
  figures.forEach((element) => near.observe(element));
} else {
  figures.forEach(draw);
}

function save(name, content, kind) {
  const link = document.createElement("a");
  link.href = typeof content === "string" && content.startsWith("data:") ? content : URL.createObjectURL(new Blob([content], { type: kind }));
  link.download = name;
  link.click();
}
function exportFigure(kind, name, view, payload) {
  if (kind === "csv") {
    for (const [key, text] of Object.entries(payload.spec.datasets)) {
      if (key !== "texts" && typeof text === "string") save(`${name}-${key}.csv`, text, "text/csv");
    }
  } else if (kind === "svg") {
    view.toSVG().then((text) => save(`${name}.svg`, text.replaceAll("currentColor", "#222").replaceAll("Canvas", "#fff"), "image/svg+xml"));
  } else {
    view.toImageURL("png", 2).then((address) => save(`${name}.png`, address));
  }
}

// PDF: the browser prints this figure as it is shown, on a page of its size.
function printFigure(name, figure) {
  const drawing = figure.querySelector(".live svg").cloneNode(true);
  const [width, height] = ["width", "height"].map((side) => Math.ceil(Number(drawing.getAttribute(side))));
  drawing.removeAttribute("style");
  const sheet = document.createElement("div");
  sheet.className = "sheet";
  sheet.append(drawing);
  const size = element("style", `@page { size: ${width + 24}px ${height + 24}px; margin: 12px; }`);
  document.head.append(size);
  document.body.append(sheet);
  document.body.classList.add("one-figure");
  const title = document.title;
  document.title = name; // proposed as the name of the file
  window.addEventListener("afterprint", () => {
    document.title = title;
    document.body.classList.remove("one-figure");
    sheet.remove();
    size.remove();
  }, { once: true });
  window.print();
}

// ---- tables ---------------------------------------------------------------------------------------------
function key(row, column) {
  const cell = row.cells[column];
  if (!("key" in cell.dataset)) return null; // sorted last in either direction
  const value = Number(cell.dataset.key);
  return cell.dataset.key !== "" && !Number.isNaN(value) ? value : cell.dataset.key;
}
function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => (a === null) - (b === null) || (up ? compare(a, b) : compare(b, a)) || 0);
    body.append(...rows.map(([, row]) => row));
  }));
}
const LATEX = { "−": "$-$", "Δ": "$\\Delta$", "–": "--", "%": "\\%", "&": "\\&", "_": "\\_", "#": "\\#", "$": "\\$" };
function latex(table) {
  const rows = [...table.rows].map((row) => [...row.cells]
    .map((cell) => cell.textContent.trim().replace(/[−Δ–%&_#$]/g, (sign) => LATEX[sign])).join(" & ") + " \\\\");
  const columns = [...table.tBodies[0].rows[0].cells].map((cell) => (cell.className === "number" ? "r" : "l")).join("");
  return [`\\begin{tabular}{${columns}}`, "\\toprule", rows[0], "\\midrule", ...rows.slice(1), "\\bottomrule", "\\end{tabular}"].join("\n");
}
document.querySelectorAll("[data-latex]").forEach((button) => button.addEventListener("click", () => {
  const text = latex(document.getElementById(button.dataset.latex));
  const done = () => { button.textContent = "Copied"; };
  const fallback = () => save(`${button.dataset.latex}.tex`, text, "text/x-tex");
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, fallback);
  else fallback();
}));

// ---- prompts --------------------------------------------------------------------------------------------
const explorer = document.getElementById("explorer");
const store = explorer ? JSON.parse(document.getElementById("explorer-data").textContent) : null;
function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  Object.assign(made, attributes);
  return made;
}
function siteName([layer, component]) {
  return (component === "attn" ? "attention " : "MLP ") + layer;
}
function signed(value) {
  if (value === null || value === undefined) return "–";
  return Number(value) === 0 ? "0" : Number(value).toPrecision(3).replace("-", "−");
}
// The text in pieces: every second token has a ground of its own, so that boundaries show. `ends` counts characters.
function tokensOf(prompt) {
  const holder = element("span", "", { className: "tokens" });
  if (!prompt.ends) {
    holder.textContent = prompt.text;
    return holder;
  }
  const characters = Array.from(prompt.text);
  let start = 0;
  prompt.ends.forEach((end, i) => {
    if (end <= start) return; // a part of a character
    const text = characters.slice(start, end).join("");
    holder.append(element("span", text, { className: "token", title: `token ${i + 1} of ${prompt.ends.length}: ${JSON.stringify(text)}` }));
    start = end;
  });
  holder.append(element("span", characters.slice(start).join(""), { className: "unread", title: "not part of the prompt" }));
  return holder;
}
function fillExplorer() {
  const body = explorer.querySelector("tbody");
  for (const prompt of store.prompts) {
    const row = element("tr", "", { tabIndex: 0 });
    row.dataset.prompt = prompt.source + ":" + prompt.prompt;
    row.dataset.text = (prompt.text + " " + prompt.target + " " + prompt.source).toLowerCase();
    const end = prompt.text.length > 90 ? "…" + prompt.text.slice(-89) : prompt.text;
    const known = prompt.correct === null ? "–" : prompt.correct ? "yes" : "no";
    const drops = store.every.map((_, i) => prompt.drops[i]).map((best) => (best ? `${signed(best[0])} (${siteName(store.sites[best[1]])})` : "–"));
    const cells = [prompt.source, end, prompt.target, prompt.tokens, prompt.p.toFixed(3), known, ...drops];
    cells.forEach((text, i) => row.append(element("td", text, { className: i > 2 && i !== 5 ? "number" : "" })));
    row.addEventListener("click", () => showPrompt(row.dataset.prompt, false));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") showPrompt(row.dataset.prompt, false); });
    body.append(row);
  }
  search("");
}
function search(words) {
  let shown = 0;
  for (const row of explorer.querySelectorAll("tbody tr")) {
    row.hidden = !row.dataset.text.includes(words.toLowerCase());
    shown += !row.hidden;
  }
  explorer.querySelector(".count").textContent = `${shown} of ${store.prompts.length} shown. ${store.sampled ? store.sampled + " " : ""}Click a row to see its ledger.`;
}
function showPrompt(id, scroll) {
  const prompt = store.prompts.find((one) => one.source + ":" + one.prompt === id);
  if (!prompt) return;
  for (const row of explorer.querySelectorAll("tbody tr")) row.setAttribute("aria-selected", row.dataset.prompt === id);
  const panel = explorer.querySelector(".ledger");
  const text = element("p", "", { className: "prompt" });
  text.append(tokensOf(prompt), " ", element("mark", prompt.target));
  const table = element("table", "");
  const heads = ["contribution", "Δunembed", "drop T", "direct loss D", "repair by attention", "repair by MLPs", "norm N"];
  const head = element("tr", "");
  heads.forEach((name) => head.append(element("th", name, { scope: "col" })));
  table.createTHead().append(head);
  const body = table.createTBody();
  const add = (name, values) => {
    const row = element("tr", "");
    row.append(element("td", name));
    values.forEach((value) => row.append(element("td", signed(value), { className: "number" })));
    body.append(row);
  };
  prompt.ledger.forEach((values, i) => add(siteName(store.sites[i]), values));
  if (prompt.heads.length) {
    const row = element("tr", "");
    row.append(element("th", `The ${prompt.heads.length} heads with the largest drop or direct loss`, { colSpan: heads.length, scope: "rowgroup" }));
    body.append(row);
  }
  prompt.heads.forEach(([layer, number, ...values]) => add(`layer ${layer}, head ${number}`, values));
  const holder = element("div", "", { className: "scroll" });
  holder.append(table);
  const title = `Prompt ${prompt.prompt} of ${prompt.source}, ${store.ablations[prompt.source]} (logits, means over draws)`;
  panel.replaceChildren(element("h3", title), text, holder);
  if (scroll) panel.scrollIntoView({ block: "nearest", behavior: "smooth" });
  writeFragment();
}
if (explorer) {
  fillExplorer();
  explorer.querySelector("[type=search]").addEventListener("input", (event) => search(event.target.value));
  const chosen = readFragment().state.get("prompt");
  if (chosen) showPrompt(chosen, false);
  const { anchor } = readFragment();
  const target = anchor && document.getElementById(anchor);
  if (target) target.scrollIntoView();
}
window.addEventListener("beforeprint", () => {
  if (document.body.classList.contains("one-figure")) return;
  document.querySelectorAll("details").forEach((element) => { element.open = true; });
});
