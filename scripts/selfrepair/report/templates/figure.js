"use strict";
// The controls are a form because radio buttons of one name exclude each other within their form only.
// Draws one figure into its <figure>: controls first, then the picture, and a play button if there is a layer slider.
function drawFigure(element, payload) {
  const live = element.querySelector(".live"), controls = element.querySelector(".controls");
  controls.addEventListener("submit", (event) => event.preventDefault());
  live.setAttribute("role", "img");
  live.setAttribute("aria-label", payload.alt || payload.title);
  const room = element.clientWidth;
  return vegaEmbed(live, room && room < 640 ? narrow(payload.spec) : payload.spec, {
    mode: "vega-lite",
    renderer: "svg", // takes the page's text colour, light or dark
    bind: controls,
    actions: false,
    tooltip: { theme: "custom" },
  }).then((result) => {
    addPlay(result.view, controls);
    fitWidth(live);
    return result;
  }, (error) => {
    live.textContent = "This figure could not be drawn here: " + error.message;
  });
}

// On a narrow screen panels stand below one another, and legends below the panels.
function narrow(spec) {
  const changed = JSON.parse(JSON.stringify({ ...spec, datasets: undefined }));
  (function walk(node) {
    if (!node || typeof node !== "object") return;
    if (Array.isArray(node)) return node.forEach(walk);
    if (node.hconcat) { node.vconcat = node.hconcat; delete node.hconcat; }
    if (node.width > 340) {
      node.width = 340;
      for (const layer of [node, ...(node.layer || [])]) if (layer.mark && layer.mark.limit) layer.mark.limit = 340;
    }
    if (node.legend && typeof node.legend === "object") Object.assign(node.legend, { orient: "bottom", columns: 2 });
    ["vconcat", "layer", "encoding"].forEach((name) => walk(node[name]));
    if (node.encoding) Object.values(node.encoding).forEach(walk);
  })(changed);
  changed.config.legend = { ...changed.config.legend, orient: "bottom", columns: 2 };
  return { ...changed, datasets: spec.datasets };
}

// A picture grows with its column by at most a quarter. If it is wider it shrinks, but not below readable text; then it
// scrolls.
function fitWidth(live) {
  const svg = live.querySelector("svg");
  if (!svg) return;
  const width = Number(svg.getAttribute("width"));
  svg.style.maxWidth = "100%";
  svg.style.width = 1.25 * width + "px";
  svg.style.height = "auto";
  svg.style.minWidth = Math.min(width, 300) + "px";
}

function addPlay(view, controls) {
  const slider = controls.querySelector('input[type="range"][name="pick_layer"]');
  if (!slider) return;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "play";
  let timer = null;
  button.addEventListener("click", () => {
    if (timer) {
      clearInterval(timer);
      timer = null;
      button.textContent = "play";
      return;
    }
    button.textContent = "stop";
    timer = setInterval(() => {
      const first = Number(slider.min), last = Number(slider.max), now = view.signal("pick_layer");
      view.signal("pick_layer", now >= last ? first : now + 1).runAsync();
    }, 700);
  });
  controls.append(button);
}

if (document.querySelector('[data-figure="figure"]')) {
  const payload = JSON.parse(document.getElementById("figure").textContent);
  drawFigure(document.querySelector('[data-figure="figure"]'), payload);
}
