// A matrix of coloured cells on a canvas: hover, click, arrow keys. The traits are those of widgets/grid.py.
// Only what is in view is drawn; the labels stay in view while a large grid scrolls.

const FONT = "11px system-ui, sans-serif";
const LINE = 12; // pixels for one line of text
const [SIDE, BELOW] = [150, 90]; // pixels for the longest row and column label
const VIEW = 520; // pixels of cells that are seen at once, downwards

function render({ model, el }) {
  const root = make("div", "l4-root", el);
  const scroll = make("div", "l4-scroll", root);
  const space = make("div", "", scroll); // as large as all cells, so that there is something to scroll
  const canvas = make("canvas", "", space);
  const legend = make("div", "l4-legend", root);
  const said = make("div", "l4-said", root); // what a screen reader says
  const tip = makeTip(root);
  const paint = canvas.getContext("2d");
  const image = document.createElement("canvas"); // one pixel a cell
  let [data, at, hovered] = [null, null, null];
  said.ariaLive = "polite";
  Object.assign(canvas, { tabIndex: 0, role: "application" });
  canvas.dataset.lmSuppressShortcuts = "true"; // arrow keys move the selection here, not the notebook's

  function read() {
    const names = ["rows", "columns", "texts", "titles", "upward", "shape"];
    data = { ...readColors(model), ...Object.fromEntries(names.map((name) => [name, model.get(name)])) };
    [data.height, data.width] = data.shape;
    const [row, column] = data.titles;
    canvas.ariaLabel = `${data.title}: ${data.height} ${row} by ${data.width} ${column}; arrow keys select a cell`;
    paintAll();
  }

  function paintAll() {
    data.dark = isDark(root);
    drawLegend(legend, data);
    draw();
  }

  // Cells take the room there is, but are large enough to be pointed at; whole device pixels keep edges sharp.
  function layout() {
    paint.font = FONT;
    const longest = (texts, most) => Math.min(most, Math.max(0, ...texts.slice(0, 4000).map((t) => paint.measureText(t).width)));
    const ratio = window.devicePixelRatio || 1;
    const whole = (x) => Math.max(1, Math.floor(x * ratio)) / ratio;
    const left = 24 + longest(data.rows, SIDE);
    const room = Math.max(120, (root.clientWidth || 640) - left - 20);
    const written = data.texts.length > 0;
    const w = whole(Math.max(written ? longest(data.texts, 80) + 8 : 0, clamp(room / data.width, 5, 34)));
    const h = whole(written ? 20 : clamp(VIEW / data.height, 5, 22));
    const label = longest(data.columns, BELOW);
    const flat = label + 6 <= w || label < 2 * LINE; // numbers lie, words stand
    const seen = [Math.min(room, w * data.width), Math.min(VIEW, h * data.height)];
    return { ratio, left, w, h, label, flat, top: 4, below: 24 + (flat ? LINE : label), seen };
  }

  const line = (row) => (data.upward ? data.height - 1 - row : row); // lines count from the top
  const box = (row, column) => [at.left + column * at.w - at.x, at.top + line(row) * at.h - at.y];

  function draw() {
    if (!data) return;
    at = layout();
    const { ratio, left, top, w, h, seen } = at;
    const size = [left + seen[0] + 4, top + seen[1] + at.below];
    const hidden = [w * data.width - seen[0], h * data.height - seen[1]];
    const bars = hidden.map((x) => (x > 0 ? 17 : 0)); // room for the scroll bars, which some systems lay over the page
    Object.assign(scroll.style, { width: `${size[0] + bars[1]}px`, height: `${size[1] + bars[0]}px` });
    const inner = [scroll.clientWidth, scroll.clientHeight].map((x, i) => (hidden[i] > 0 ? x : size[i]) + hidden[i]);
    Object.assign(space.style, { width: `${inner[0]}px`, height: `${inner[1]}px` }); // so that the end can be reached
    const [wide, high] = size.map((x) => Math.round(x * ratio));
    if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
    Object.assign(canvas.style, { width: `${size[0]}px`, height: `${size[1]}px` });
    Object.assign(at, { ink: getComputedStyle(root).color, x: scroll.scrollLeft, y: scroll.scrollTop });
    at.lines = [Math.floor(at.y / h), Math.min(data.height, Math.ceil((at.y + seen[1]) / h))];
    at.columns = [Math.floor(at.x / w), Math.min(data.width, Math.ceil((at.x + seen[0]) / w))];
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint.clearRect(0, 0, ...size);
    paint.save();
    paint.beginPath();
    paint.rect(left - 1, top - 1, seen[0] + 2, seen[1] + 2);
    paint.clip();
    drawCells();
    drawFrames(paint, model.get("frames"), (row, column) => box(data.upward ? row - 1 : row, column));
    if (hovered) outline(hovered, 1);
    if (model.get("selected").length) outline(model.get("selected"), 2);
    paint.restore();
    drawLabels();
    canvas.dataset.layout = JSON.stringify({ left, top, w, h, x: at.x, y: at.y, rows: data.height, up: data.upward });
    canvas.dataset.selected = model.get("selected").join();
    canvas.dataset.v = model.get("version");
  }

  function drawCells() {
    const [[y0, y1], [x0, x1]] = [at.lines, at.columns];
    Object.assign(paint, { fillStyle: at.ink, globalAlpha: 0.16 }); // cells without a value stay grey
    paint.fillRect(at.left, at.top, ...at.seen);
    paint.globalAlpha = 1;
    if (y1 <= y0 || x1 <= x0) return;
    Object.assign(image, { width: x1 - x0, height: y1 - y0 });
    const picture = new ImageData(x1 - x0, y1 - y0);
    for (let y = y0, i = 0; y < y1; y++)
      for (let x = x0; x < x1; x++, i += 4) {
        const rgb = cellColor(data, line(y) * data.width + x);
        if (rgb) picture.data.set([rgb[0], rgb[1], rgb[2], 255], i);
      }
    image.getContext("2d").putImageData(picture, 0, 0);
    paint.imageSmoothingEnabled = false;
    paint.drawImage(image, ...box(line(y0), x0), (x1 - x0) * at.w, (y1 - y0) * at.h);
    Object.assign(paint, { strokeStyle: "#808080", lineWidth: 1, globalAlpha: 0.18 });
    const apart = at.w >= 12 && at.h >= 12; // thin lines between large cells, so that equal neighbours are two
    for (let x = apart ? x0 + 1 : x1; x < x1; x++) paint.strokeRect(box(0, x)[0], at.top, 0, at.seen[1]);
    for (let y = apart ? y0 + 1 : y1; y < y1; y++) paint.strokeRect(at.left, box(line(y), 0)[1], at.seen[0], 0);
    Object.assign(paint, { strokeStyle: at.ink, globalAlpha: 0.4 });
    paint.strokeRect(at.left - 0.5, at.top - 0.5, at.seen[0] + 1, at.seen[1] + 1);
    paint.globalAlpha = 1;
    if (data.texts.length) for (let y = y0; y < y1; y++) for (let x = x0; x < x1; x++) drawText(line(y), x);
  }

  function drawText(row, column) {
    const cell = row * data.width + column;
    const rgb = cellColor(data, cell);
    Object.assign(paint, { textAlign: "center", textBaseline: "middle", fillStyle: rgb ? inkOn(rgb) : at.ink });
    const [x, y] = box(row, column);
    paint.fillText(short(data.texts[cell], at.w - 4), x + at.w / 2, y + at.h / 2);
  }

  function outline([row, column], width) {
    const [x, y] = box(row, column);
    for (const [strokeStyle, lineWidth] of [["#fff", width + 2], ["#111", width]]) {
      Object.assign(paint, { strokeStyle, lineWidth });
      paint.strokeRect(x + 0.5, y + 0.5, at.w - 1, at.h - 1);
    }
  }

  function short(text, room) {
    const { width } = paint.measureText(text);
    return width <= room ? text : `${text.slice(0, Math.max(1, Math.floor((text.length * room) / width) - 1))}…`;
  }

  function drawLabels() {
    const { left, top, w, h, flat, seen } = at;
    Object.assign(paint, { fillStyle: at.ink, textBaseline: "middle", textAlign: "right" });
    const down = Math.ceil(LINE / h); // every how many rows has a label, so that none touch
    for (let y = at.lines[0]; y < at.lines[1]; y++) {
      const middle = top + (y + 0.5) * h - at.y;
      if (line(y) % down === 0 && middle > top && middle < top + seen[1]) paint.fillText(short(data.rows[line(y)], SIDE), left - 6, middle);
    }
    const along = Math.ceil((flat ? at.label + 6 : LINE) / w);
    for (let x = at.columns[0]; x < at.columns[1]; x++) {
      const middle = left + (x + 0.5) * w - at.x;
      if (x % along || middle < left || middle > left + seen[0]) continue;
      paint.save();
      paint.translate(middle, top + seen[1] + 5);
      if (flat) Object.assign(paint, { textAlign: "center", textBaseline: "top" });
      else paint.rotate(-Math.PI / 2);
      paint.fillText(short(data.columns[x], BELOW), 0, 0);
      paint.restore();
    }
    Object.assign(paint, { textAlign: "center", textBaseline: "bottom", globalAlpha: 0.7 });
    paint.fillText(data.titles[1], left + seen[0] / 2, top + seen[1] + at.below);
    paint.translate(14, top + seen[1] / 2);
    paint.rotate(-Math.PI / 2);
    paint.fillText(data.titles[0], 0, 0);
    paint.globalAlpha = 1;
  }

  function described([row, column]) {
    const cell = row * data.width + column;
    const [rowTitle, columnTitle] = data.titles;
    const places = [`${rowTitle} ${data.rows[row]}`, `${columnTitle} ${data.columns[column]}`];
    const text = data.texts[cell] && data.texts[cell] !== data.names[data.cells[cell]] ? [data.texts[cell]] : [];
    return [...places, ...text, ...describedValue(data, cell)].join("\n");
  }

  function cellAt(event) {
    const edge = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - edge.left - at.left, event.clientY - edge.top - at.top];
    if (x < 0 || y < 0 || x >= at.seen[0] || y >= at.seen[1]) return null;
    return [line(Math.floor((y + at.y) / at.h)), Math.floor((x + at.x) / at.w)];
  }

  function point(cell, event) {
    if (String(cell) !== String(hovered)) {
      hovered = cell;
      draw();
    }
    tip(cell && described(cell), event);
  }

  function select(cell) {
    model.set("selected", cell);
    model.save_changes();
  }

  // Scrolls the selected cell into view.
  function reveal() {
    const cell = model.get("selected");
    if (!cell.length || !at) return;
    const [x, y] = box(...cell);
    scroll.scrollLeft += Math.min(0, x - at.left) + Math.max(0, x + at.w - at.left - at.seen[0]);
    scroll.scrollTop += Math.min(0, y - at.top) + Math.max(0, y + at.h - at.top - at.seen[1]);
  }

  const revealed = () => (reveal(), draw());

  function press(event) {
    const up = data.upward ? 1 : -1;
    const steps = { ArrowUp: [up, 0], ArrowDown: [-up, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const [row, column] = model.get("selected");
    if (event.key === "Escape") select([]);
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [down, along] = steps[event.key];
    const cell = row === undefined ? [line(0), 0] : [clamp(row + down, 0, data.height - 1), clamp(column + along, 0, data.width - 1)];
    said.textContent = described(cell);
    select(cell);
  }

  canvas.addEventListener("pointermove", (event) => point(cellAt(event), event));
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("click", (event) => cellAt(event) && select(cellAt(event)));
  canvas.addEventListener("keydown", press);
  scroll.addEventListener("scroll", () => (point(null), draw()));
  const changes = { version: read, selected: revealed, frames: draw };
  const end = follow(model, root, changes, { resized: () => (draw(), revealed()), themed: paintAll });
  read();
  return end;
}

export default { render };
