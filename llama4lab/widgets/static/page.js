// What the pictures share: elements, colours, legend, tooltip. It is put before each of the other scripts.

const MOST_NAMED = 16; // classes in a legend
const FRAME = "#c4366f"; // borders of chunks, as in viz/style.py
const PAPER = { false: [255, 255, 255], true: [24, 24, 24] }; // what a weak colour fades into, by whether the theme is dark

const bytes = (view) => (view ? new Uint8Array(view.buffer, view.byteOffset, view.byteLength) : new Uint8Array());
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const make = (tag, name, parent, text = "") => {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text; // never as HTML: labels hold tokens, and tokens hold anything
  parent.append(node);
  return node;
};
const css = (rgb) => `rgb(${[...rgb].map(Math.round).join()})`;
const luminance = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * (rgb[i] / 255) ** 2.2, 0);
const inkOn = (rgb) => (luminance(rgb) < 0.3 ? "#fff" : "#222");
const isDark = (node) => luminance((getComputedStyle(node).color.match(/[\d.]+/g) ?? [0, 0, 0]).map(Number)) > 0.3;
const faded = (rgb, strength, dark) => PAPER[dark].map((paper, i) => paper + (0.25 + 0.75 * strength) * (rgb[i] - paper));

// The traits of widgets/colored.py, which every coloured picture has.
function readColors(model) {
  const names = ["names", "notes", "limits", "ticks", "title", "strength_title"];
  const data = Object.fromEntries(names.map((name) => [name, model.get(name)]));
  for (const name of ["cells", "palette", "strengths"]) data[name] = bytes(model.get(name));
  const numbers = bytes(model.get("numbers")).slice();
  data.numbers = numbers.length ? new Float32Array(numbers.buffer) : null;
  return data;
}

const colorOf = (data, level) => data.palette.subarray(3 * level, 3 * level + 3);

// The colour of a cell, as strong as the cell says; null for a cell without a value.
function cellColor(data, cell) {
  const level = data.cells[cell];
  if (level === 255) return null;
  const rgb = colorOf(data, level);
  return data.strengths.length ? faded(rgb, data.strengths[cell] / 255, data.dark) : rgb;
}

// The value of a cell in words, and the lines that belong to it.
function describedValue(data, cell) {
  const level = data.cells[cell];
  const [low, high] = data.limits;
  const number = data.numbers ? data.numbers[cell] : low + (level / 254) * (high - low);
  const exactly = `${data.numbers ? "" : "about "}${Number(number.toPrecision(4))}`;
  const value = level === 255 ? "no value" : data.names.length ? data.names[level] : exactly;
  const strong = data.strengths.length && !data.notes.length && level < 255;
  const strength = strong ? `${data.strength_title}: about ${(data.strengths[cell] / 255).toFixed(2)}` : "";
  return [`${data.title.split("\n")[0]}: ${value}`, strength, data.notes[cell]].filter(Boolean);
}

function drawLegend(node, data) {
  node.replaceChildren();
  make("span", "", node, data.title);
  if (data.names.length) return drawNames(node, data);
  const scale = make("div", "l4-scale", node);
  const stops = Array.from({ length: 17 }, (_, i) => css(colorOf(data, Math.round((i * 254) / 16))));
  make("div", "l4-bar", scale).style.background = `linear-gradient(to right, ${stops.join()})`;
  const ticks = make("div", "l4-ticks", scale);
  for (const [place, text] of data.ticks) make("span", "", ticks, text).style.left = `${100 * place}%`;
}

// The classes that are there; of many, the most frequent ones.
function drawNames(node, data) {
  const counts = new Array(256).fill(0);
  for (const level of data.cells) counts[level] += 1;
  const found = data.names.map((_, level) => level).filter((level) => counts[level]);
  const shown = [...found].sort((a, b) => counts[b] - counts[a]).slice(0, MOST_NAMED).sort((a, b) => a - b);
  const swatch = (rgb, text) => {
    const item = make("span", "", node);
    make("i", "l4-swatch", item).style.background = css(rgb);
    item.append(text);
  };
  for (const level of shown) swatch(colorOf(data, level), data.names[level]);
  if (found.length > shown.length) make("span", "", node, `+ ${found.length - shown.length} more`);
  if (!data.strengths.length) return;
  make("span", "l4-apart", node, data.strength_title);
  for (const strength of [1, 0.5, 0]) swatch(faded([90, 90, 90].map((x) => (data.dark ? 255 - x : x)), strength, data.dark), strength);
}

// Frames around parts of a map, as [row, column, rows, columns, whether dotted]; `at` gives the place of a cell.
function drawFrames(paint, frames, at) {
  paint.save();
  Object.assign(paint, { strokeStyle: FRAME, lineWidth: 1.5, globalAlpha: 1 });
  for (const [row, column, rows, columns, dotted] of frames ?? []) {
    const [[x0, y0], [x1, y1]] = [at(row, column), at(row + rows, column + columns)];
    paint.setLineDash(dotted ? [2, 3] : []);
    paint.strokeRect(x0, y0, x1 - x0, y1 - y0);
  }
  paint.restore();
}

// A tooltip in the top layer, where no output area cuts it off.
function makeTip(root) {
  const tip = make("div", "l4-tip", root);
  tip.popover = "manual";
  return (text, event) => {
    if (!text) return tip.togglePopover(false);
    tip.textContent = text;
    tip.togglePopover(true);
    const { width, height } = tip.getBoundingClientRect();
    const left = event.clientX + 14 + width < window.innerWidth ? event.clientX + 14 : event.clientX - 14 - width;
    Object.assign(tip.style, { left: `${Math.max(0, left)}px`, top: `${Math.min(event.clientY + 16, window.innerHeight - height)}px` });
  };
}

// Calls `draw` when the theme changes: JupyterLab and VS Code name theirs on the body. Gives what ends it.
// A picture is first drawn before it is in the page, where it has no theme yet: it gets a size when it comes there.
function onTheme(root, draw) {
  let dark = false;
  const placed = new ResizeObserver(() => {
    if (isDark(root) !== dark) draw();
    dark = isDark(root);
  });
  placed.observe(root);
  const themed = new MutationObserver(draw);
  themed.observe(document.body, { attributes: true });
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", draw);
  return () => {
    placed.disconnect();
    themed.disconnect();
    scheme.removeEventListener("change", draw);
  };
}

// Follows a picture's model and page: `changes` says what to call for each trait, `resized` what for another width,
// `themed` what for another theme. Gives what ends it.
function follow(model, root, changes, { resized, themed }) {
  let width = 0;
  const observer = new ResizeObserver(() => {
    if (root.clientWidth !== width) requestAnimationFrame(resized);
    width = root.clientWidth;
  });
  observer.observe(root);
  const untheme = onTheme(root, themed);
  const events = Object.entries(changes).map(([trait, act]) => [`change:${trait}`, act]);
  for (const [event, act] of events) model.on(event, act);
  return () => {
    observer.disconnect();
    untheme();
    for (const [event, act] of events) model.off(event, act);
  };
}
