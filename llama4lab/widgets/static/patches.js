// A picture under coloured cells: hover, click, arrow keys. The traits are those of widgets/vision/picture_cells.py.

const TALL = 440; // pixels of the picture that are seen at once, downwards
const LEAST = 7; // font size in pixels of what is written into cells

function render({ model, el }) {
  const root = make("div", "l4-root", el);
  const canvas = make("canvas", "l4-picture-cells", root);
  const legend = make("div", "l4-legend", root);
  const said = make("div", "l4-said", root); // what a screen reader says
  const tip = makeTip(root);
  const paint = canvas.getContext("2d");
  let [data, image, scale, hovered, closed] = [null, null, 1, null, false];
  said.ariaLive = "polite";
  Object.assign(canvas, { tabIndex: 0, role: "application" });
  canvas.dataset.lmSuppressShortcuts = "true"; // arrow keys move the selection here, not the notebook's

  async function load() {
    const read = await createImageBitmap(new Blob([bytes(model.get("picture"))], { type: "image/png" }));
    if (closed) return;
    image = read;
    draw();
  }

  function read() {
    const names = ["size", "labels", "texts", "frames", "marked"];
    data = { ...readColors(model), ...Object.fromEntries(names.map((name) => [name, model.get(name)])) };
    const boxes = bytes(model.get("boxes")).slice();
    Object.assign(data, { boxes: new Float32Array(boxes.buffer), opacities: bytes(model.get("opacities")), rgb: bytes(model.get("rgb")) });
    canvas.ariaLabel = `${data.title.replaceAll("\n", ", ")}: ${data.cells.length} cells on a picture; arrow keys select a cell`;
    if (hovered !== null) tip(null); // what it says is no longer true
    hovered = null;
    drawLegend(legend, data);
    if (data.rgb.length) legend.lastChild.remove(); // colours that are no scale
    draw();
  }

  const box = (cell) => [...data.boxes.subarray(4 * cell, 4 * cell + 4)];
  const middle = (cell) => [(box(cell)[0] + box(cell)[2]) / 2, (box(cell)[1] + box(cell)[3]) / 2];
  const seen = (cell) => box(cell)[2] > box(cell)[0] && box(cell)[3] > box(cell)[1];
  // Neighbours share their border, which lies on a whole pixel of the screen, so that no seam is left.
  const onScreen = (cell, ratio) => box(cell).map((x) => Math.round(x * scale * ratio) / ratio);

  function color(cell) {
    const level = data.cells[cell];
    if (data.rgb.length) return [data.rgb.subarray(3 * cell, 3 * cell + 3), data.opacities[0] / 255];
    return level === 255 ? null : [colorOf(data, level), data.opacities[level] / 255];
  }

  function draw() {
    if (!data || !image) return;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = data.size;
    scale = Math.min(((root.clientWidth || 640) - 4) / width, TALL / height);
    const size = [width * scale, height * scale];
    Object.assign(canvas, { width: Math.round(size[0] * ratio), height: Math.round(size[1] * ratio) });
    Object.assign(canvas.style, { width: `${size[0]}px`, height: `${size[1]}px` });
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint.imageSmoothingEnabled = image.width > size[0] * ratio;
    paint.drawImage(image, 0, 0, ...size);
    for (let cell = 0; cell < data.cells.length; cell++) {
      const found = color(cell);
      if (!found || !seen(cell)) continue;
      const [left, top, right, bottom] = onScreen(cell, ratio);
      Object.assign(paint, { fillStyle: css(found[0]), globalAlpha: found[1] });
      paint.fillRect(left, top, right - left, bottom - top);
    }
    paint.globalAlpha = 1;
    for (const frame of data.frames) outline(frame.map((x) => x * scale), "#fff", 1.5);
    data.texts.forEach((text, cell) => seen(cell) && write(text, cell));
    for (const cell of data.marked) if (seen(cell)) outline(onScreen(cell, ratio), "#ffa51f", 2);
    if (hovered !== null) outline(onScreen(hovered, ratio), "#fff", 1);
    const selected = model.get("selected");
    if (selected !== null && seen(selected)) outline(onScreen(selected, ratio), "#fff", 2);
    canvas.dataset.scale = scale;
    canvas.dataset.selected = selected ?? "";
    canvas.dataset.v = model.get("version");
  }

  function outline([left, top, right, bottom], strokeStyle, lineWidth) {
    for (const [color, width] of [["#111", lineWidth + 2], [strokeStyle, lineWidth]]) {
      Object.assign(paint, { strokeStyle: color, lineWidth: width });
      paint.strokeRect(left + 0.5, top + 0.5, right - left - 1, bottom - top - 1);
    }
  }

  function write(text, cell) {
    const [left, top, right, bottom] = box(cell).map((x) => x * scale);
    const size = Math.min(12, 0.45 * (bottom - top));
    if (!text || size < LEAST) return;
    Object.assign(paint, { font: `${size}px system-ui, sans-serif`, textAlign: "center", textBaseline: "middle", lineJoin: "round" });
    const { width } = paint.measureText(text);
    const room = right - left - 4;
    const shown = width <= room ? text : `${text.slice(0, Math.max(1, Math.floor((text.length * room) / width) - 1))}…`;
    if (paint.measureText(shown).width > room + 4) return;
    Object.assign(paint, { strokeStyle: "#222", lineWidth: 3, fillStyle: "#fff" });
    paint.strokeText(shown, (left + right) / 2, (top + bottom) / 2);
    paint.fillText(shown, (left + right) / 2, (top + bottom) / 2);
  }

  const described = (cell) => [data.labels[cell], data.texts[cell], ...(data.rgb.length ? [data.notes[cell]] : describedValue(data, cell))].filter(Boolean).join("\n");

  function cellAt(event) {
    const edge = canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - edge.left) / scale, (event.clientY - edge.top) / scale];
    for (let cell = 0; cell < data.cells.length; cell++) {
      const [left, top, right, bottom] = box(cell);
      if (left <= x && x < right && top <= y && y < bottom) return cell;
    }
    return null;
  }

  function point(cell, event) {
    if (cell !== hovered) {
      hovered = cell;
      draw();
    }
    tip(cell !== null && described(cell), event);
  }

  function select(cell) {
    model.set("selected", cell);
    model.save_changes();
  }

  // The nearest cell in a direction: straight on counts more than aside.
  function next(cell, [across, down]) {
    const [x, y] = middle(cell);
    let [best, least] = [cell, Infinity];
    for (let other = 0; other < data.cells.length; other++) {
      if (!seen(other)) continue;
      const [dx, dy] = [middle(other)[0] - x, middle(other)[1] - y];
      const ahead = dx * across + dy * down;
      const away = ahead + 4 * Math.abs(dx * down) + 4 * Math.abs(dy * across);
      if (ahead > 1e-3 && away < least) [best, least] = [other, away];
    }
    return best;
  }

  function press(event) {
    const steps = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    const selected = model.get("selected");
    if (event.key === "Escape") select(null);
    if (!(event.key in steps)) return;
    event.preventDefault();
    const first = data.labels.findIndex((_, cell) => seen(cell));
    const cell = selected === null ? first : next(selected, steps[event.key]);
    if (cell < 0) return;
    said.textContent = described(cell);
    select(cell);
  }

  canvas.addEventListener("pointermove", (event) => data && point(cellAt(event), event));
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("click", (event) => cellAt(event) !== null && select(cellAt(event)));
  canvas.addEventListener("keydown", press);
  const changes = { version: read, picture: load, selected: draw, marked: read };
  const end = follow(model, root, changes, { resized: draw, themed: () => data && read() });
  read();
  load();
  return () => {
    closed = true;
    end();
  };
}

export default { render };
