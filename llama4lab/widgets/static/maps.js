// Small maps side by side, on one scale: hover, click, arrow keys. The traits are those of widgets/attention/maps.py.

const [NARROW, WIDE] = [84, 150]; // pixels for the width of a map
const TALLEST = 1.5; // times the width

function render({ model, el }) {
  const root = make("div", "l4-root", el);
  const list = make("div", "l4-maps", root);
  const legend = make("div", "l4-legend", root);
  const tip = makeTip(root);
  const image = document.createElement("canvas"); // one pixel a cell
  const id = `l4-maps-${Math.random().toString(36).slice(2)}`;
  let [data, maps] = [null, []];
  Object.assign(list, { tabIndex: 0, role: "listbox" });
  list.dataset.lmSuppressShortcuts = "true"; // arrow keys move the selection here, not the notebook's

  function read() {
    const names = ["labels", "rows", "columns", "tips", "titles", "shape", "frames"];
    data = { ...readColors(model), ...Object.fromEntries(names.map((name) => [name, model.get(name)])) };
    [data.count, data.height, data.width] = data.shape;
    list.ariaLabel = `${data.title}: ${data.count} maps; arrow keys select one`;
    while (maps.length > data.count) maps.pop().box.remove();
    while (maps.length < data.count) maps.push(newMap(maps.length));
    maps.forEach(({ box, label }, map) => {
      label.textContent = data.labels[map];
      box.ariaLabel = [data.labels[map], data.tips[map]].join(", ").replaceAll("\n", ", ");
    });
    paintAll();
    outline();
  }

  // Boxes stay where they are when another picture comes, so that a click never misses.
  function newMap(map) {
    const box = make("div", "l4-map", list);
    Object.assign(box, { role: "option", id: `${id}-${map}` });
    box.dataset.map = map;
    return { box, canvas: make("canvas", "", box), label: make("span", "", box) };
  }

  function paintAll() {
    data.dark = isDark(root);
    if (model.get("scale")) drawLegend(legend, data);
    const across = Math.max(1, Math.min(data.count, Math.floor((root.clientWidth || 640) / (NARROW + 10))));
    const width = clamp(Math.floor((root.clientWidth || 640) / across) - 12, NARROW, WIDE);
    const height = clamp(Math.round((width * data.height) / data.width), 24, TALLEST * width);
    maps.forEach(({ canvas }, map) => paint(canvas, map, width, height));
    root.dataset.v = model.get("version");
  }

  function paint(canvas, map, width, height) {
    const ratio = window.devicePixelRatio || 1;
    Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    Object.assign(image, { width: data.width, height: data.height });
    const picture = new ImageData(data.width, data.height);
    const [first, count] = [map * data.height * data.width, data.height * data.width];
    for (let cell = 0; cell < count; cell++) {
      const rgb = cellColor(data, first + cell);
      if (rgb) picture.data.set([rgb[0], rgb[1], rgb[2], 255], 4 * cell);
    }
    image.getContext("2d").putImageData(picture, 0, 0);
    const paint = canvas.getContext("2d");
    Object.assign(paint, { fillStyle: getComputedStyle(root).color, globalAlpha: 0.16 }); // cells without a value
    paint.fillRect(0, 0, canvas.width, canvas.height);
    Object.assign(paint, { globalAlpha: 1, imageSmoothingEnabled: canvas.width < data.width });
    paint.drawImage(image, 0, 0, canvas.width, canvas.height);
    drawFrames(paint, data.frames, (row, column) => [(column * canvas.width) / data.width, (row * canvas.height) / data.height]);
  }

  function described(map, event) {
    const edge = maps[map].canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - edge.top) / edge.height) * data.height);
    const column = Math.floor(((event.clientX - edge.left) / edge.width) * data.width);
    const lines = [data.labels[map], data.tips[map]];
    if (row >= 0 && column >= 0 && row < data.height && column < data.width) {
      const cell = (map * data.height + row) * data.width + column;
      lines.push(`${data.titles[0]} ${data.rows[row]}`, `${data.titles[1]} ${data.columns[column]}`, ...describedValue(data, cell));
    }
    return lines.filter(Boolean).join("\n");
  }

  function outline() {
    const selected = model.get("selected");
    maps.forEach(({ box }, map) => {
      box.classList.toggle("l4-selected", map === selected);
      box.ariaSelected = map === selected;
    });
    if (selected === null) list.removeAttribute("aria-activedescendant");
    else list.setAttribute("aria-activedescendant", `${id}-${selected}`);
    root.dataset.selected = selected ?? "";
  }

  function select(map) {
    model.set("selected", map);
    model.save_changes();
  }

  function press(event) {
    const [now, last] = [model.get("selected"), maps.length - 1];
    const across = maps.filter(({ box }) => box.offsetTop === maps[0].box.offsetTop).length;
    const [at, steps] = [now ?? 0, { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }];
    const moves = { Home: 0, End: last, ...Object.fromEntries(Object.entries(steps).map(([key, step]) => [key, at + step])) };
    if (!(event.key in moves) || !maps.length) return;
    event.preventDefault();
    select(clamp(moves[event.key], 0, last));
  }

  const mapOf = (event) => event.target.closest?.("[data-map]")?.dataset.map;
  list.addEventListener("pointermove", (event) => tip(mapOf(event) !== undefined && described(Number(mapOf(event)), event), event));
  list.addEventListener("pointerleave", () => tip(null));
  list.addEventListener("click", (event) => mapOf(event) !== undefined && select(Number(mapOf(event))));
  list.addEventListener("keydown", press);
  const end = follow(model, root, { version: read, selected: outline }, { resized: paintAll, themed: paintAll });
  read();
  return end;
}

export default { render };
