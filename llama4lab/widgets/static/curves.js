// Lines over one axis: hover, click, arrow keys. The traits are those of widgets/attention/curves.py.

const SVG = "http://www.w3.org/2000/svg";
const [LEFT, RIGHT, TOP, BOTTOM, HEIGHT, WIDEST] = [46, 10, 8, 20, 230, 900]; // pixels around and of the plot
const NEAR = 24; // pixels from the pointer to the point that it means
const LETTER = 6.5; // pixels for a letter of a label

function render({ model, el }) {
  const root = make("div", "l4-root", el);
  const legend = make("div", "l4-legend", root);
  const holder = make("div", "l4-curves-of", root);
  const below = make("div", "l4-barbelow", root);
  const tip = makeTip(root);
  const id = `l4-curves-${Math.random().toString(36).slice(2)}`;
  let [data, lines, items] = [null, [], []];
  Object.assign(holder, { tabIndex: 0, role: "listbox" });
  holder.dataset.lmSuppressShortcuts = "true"; // arrow keys move the selection here, not the notebook's

  const draw = (tag, parent, attributes) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    parent.append(node);
    return node;
  };
  const plain = (value) => (value && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4))));
  const written = (value) => (Number.isFinite(value) ? plain(value).replaceAll("-", "−") : "no value");
  const value = (line, point) => data.values[line * data.x.length + point];

  function read() {
    const names = ["names", "x", "x_names", "dashes", "notes", "title", "titles", "limits"];
    data = Object.fromEntries(names.map((name) => [name, model.get(name)]));
    data.palette = bytes(model.get("palette"));
    data.values = new Float32Array(bytes(model.get("values")).slice().buffer);
    holder.ariaLabel = `${data.title}: ${data.names.length} lines; arrow keys select one`;
    below.textContent = data.titles[1];
    readLegend();
    paint();
    root.dataset.v = model.get("version");
  }

  function readLegend() {
    legend.replaceChildren();
    make("span", "", legend, data.title);
    items = data.names.map((name, line) => {
      const item = make("span", "l4-line-name", legend);
      item.dataset.line = line;
      const swatch = make("i", "l4-dash", item);
      Object.assign(swatch.style, { borderTopColor: color(line), borderTopStyle: data.dashes[line] ? "dashed" : "solid" });
      item.append(name);
      Object.assign(item, { role: "option", id: `${id}-${line}` });
      return item;
    });
  }

  // Lines are lightened on a dark page: their colours are made for paper.
  function color(line) {
    const rgb = [...data.palette.subarray(3 * line, 3 * line + 3)];
    return css(isDark(root) && luminance(rgb) < 0.2 ? rgb.map((x) => x + 0.45 * (255 - x)) : rgb);
  }

  function places() {
    const width = clamp(root.clientWidth || 640, 260, WIDEST);
    const [first, last] = [data.x[0], data.x[data.x.length - 1]];
    const [low, high] = data.limits;
    const across = (x) => LEFT + 6 + ((width - LEFT - RIGHT - 12) * (x - first)) / (last - first || 1);
    const up = (y) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - low) / (high - low));
    return { width, across, up };
  }

  function paint() {
    const { width, across, up } = places();
    holder.replaceChildren();
    const svg = draw("svg", holder, { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}` });
    const axes = draw("g", svg, { class: "l4-axes" });
    for (const tick of ticks(...data.limits)) {
      draw("line", axes, { x1: LEFT, x2: width - RIGHT, y1: up(tick), y2: up(tick) });
      draw("text", axes, { x: LEFT - 6, y: up(tick) + 4, "text-anchor": "end" }).textContent = written(tick);
    }
    let free = 0; // as many labels as have room
    data.x_names.forEach((name, point) => {
      const [x, half] = [across(data.x[point]), (name.length * LETTER) / 2];
      if (x - half < free) return;
      free = x + half + 6;
      const anchor = x + half > width ? "end" : "middle";
      draw("text", axes, { x: anchor === "end" ? width : x, y: HEIGHT - 5, "text-anchor": anchor }).textContent = name;
    });
    lines = data.names.map((_, line) => drawLine(svg, line, across, up));
    outline();
  }

  function drawLine(svg, line, across, up) {
    const group = draw("g", svg, { class: "l4-line", stroke: color(line), fill: color(line), "data-line": line });
    const points = data.x.map((x, point) => [across(x), up(value(line, point))]);
    const known = points.map(([, y]) => Number.isFinite(y));
    const path = points.map(([x, y], i) => (known[i] ? `${known[i - 1] ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}` : "")).join("");
    const look = { d: path, fill: "none", "stroke-width": 1.8, "stroke-linejoin": "round" };
    draw("path", group, data.dashes[line] ? { ...look, "stroke-dasharray": "6 4" } : look);
    const small = data.x.length > 60 ? 1.2 : 2.8;
    points.forEach(([cx, cy], i) => known[i] && draw("circle", group, { cx, cy, r: small, stroke: "none" }));
    return group;
  }

  function ticks(low, high) {
    const rough = (high - low) / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((each) => each * power >= rough * 0.999);
    const first = Math.ceil(low / step - 1e-6);
    return Array.from({ length: Math.floor(high / step + 1e-6) - first + 1 }, (_, i) => (first + i) * step);
  }

  // The point nearest to the pointer; of the selected line, if that is as near.
  function nearest(event) {
    const edge = holder.getBoundingClientRect();
    const [x, y] = [event.clientX - edge.left, event.clientY - edge.top];
    const { across, up } = places();
    let best = [NEAR, null];
    data.names.forEach((_, line) =>
      data.x.forEach((at, point) => {
        const far = Math.hypot(across(at) - x, up(value(line, point)) - y) - (line === model.get("selected") ? 3 : 0);
        if (far < best[0]) best = [far, [line, point]];
      })
    );
    return best[1];
  }

  function described([line, point]) {
    const note = data.notes[line * data.x.length + point];
    return [data.names[line], `${data.titles[1]}: ${data.x_names[point]}`, `${data.titles[0]}: ${written(value(line, point))}`, note].filter(Boolean).join("\n");
  }

  function outline() {
    const selected = model.get("selected");
    const known = selected !== null && selected < lines.length;
    lines.forEach((group, line) => group.classList.toggle("l4-faint", known && line !== selected));
    items.forEach((item, line) => {
      item.classList.toggle("l4-selected", line === selected);
      item.ariaSelected = line === selected;
    });
    if (known) lines[selected].parentNode.append(lines[selected]); // on top
    if (known) holder.setAttribute("aria-activedescendant", `${id}-${selected}`);
    else holder.removeAttribute("aria-activedescendant");
    root.dataset.selected = selected ?? "";
  }

  function select(line) {
    model.set("selected", line);
    model.save_changes();
  }

  function press(event) {
    if (event.key === "Escape") return select(null);
    const [now, last] = [model.get("selected"), data.names.length - 1];
    const moves = { ArrowUp: (now ?? 1) - 1, ArrowDown: (now ?? -1) + 1, Home: 0, End: last };
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    select(clamp(moves[event.key], 0, last));
  }

  legend.addEventListener("click", (event) => {
    const line = event.target.closest?.("[data-line]")?.dataset.line;
    if (line !== undefined) select(Number(line) === model.get("selected") ? null : Number(line));
  });
  holder.addEventListener("pointermove", (event) => {
    const found = nearest(event);
    tip(found && described(found), event);
  });
  holder.addEventListener("pointerleave", () => tip(null));
  holder.addEventListener("click", (event) => nearest(event) && select(nearest(event)[0]));
  holder.addEventListener("keydown", press);
  const themed = () => (readLegend(), paint());
  const end = follow(model, root, { version: read, selected: outline }, { resized: paint, themed });
  read();
  return end;
}

export default { render };
