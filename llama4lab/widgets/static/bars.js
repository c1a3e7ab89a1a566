// Bars side by side: hover, click, arrow keys. The traits are those of widgets/bars.py.

const TICKS = 4; // at most, and one
const LETTER = 6.5; // pixels for a letter of a label
const [NARROWEST, WIDEST] = [8, 34]; // pixels for a bar and what is between it and the next

function render({ model, el }) {
  const root = make("div", "l4-root", el);
  const legend = make("div", "l4-legend", root);
  const scroll = make("div", "l4-barscroll", root);
  const plot = make("div", "l4-barplot", scroll);
  const below = make("div", "l4-barbelow", root);
  const tip = makeTip(root);
  const id = `l4-bars-${Math.random().toString(36).slice(2)}`;
  let [data, bars, labels] = [null, [], []];
  Object.assign(plot, { tabIndex: 0, role: "listbox" });
  plot.dataset.lmSuppressShortcuts = "true"; // arrow keys move the selection here, not the notebook's

  const height = (value) => (100 * (clamp(value, ...data.limits) - data.limits[0])) / (data.limits[1] - data.limits[0]);
  const plain = (value) => (value && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4))));
  const written = (value) => (Number.isFinite(value) ? plain(value).replaceAll("-", "−") : "no value");
  const color = (series, bar) => data.palette.subarray(3 * (data.series.length > 1 ? series : bar)).subarray(0, 3);
  const value = (series, bar) => data.values[series * data.names.length + bar];

  const longest = () => Math.max(1, ...data.names.map((name) => Math.min(20, name.length)));

  function read() {
    const names = ["series", "names", "marks", "mark_names", "notes", "title", "titles", "limits", "line", "line_title"];
    data = Object.fromEntries(names.map((name) => [name, model.get(name)]));
    data.palette = bytes(model.get("palette"));
    data.values = new Float32Array(bytes(model.get("values")).slice().buffer);
    plot.ariaLabel = `${data.title}: ${data.names.length} bars; arrow keys select one`;
    below.textContent = data.titles[0];
    readLegend();
    plot.replaceChildren();
    const widest = Math.max(WIDEST, 8 + LETTER * longest());
    Object.assign(plot.style, { minWidth: `${NARROWEST * data.names.length}px`, maxWidth: `${widest * data.names.length}px` });
    drawAxis();
    [bars, labels] = [[], []];
    data.names.forEach((_, bar) => drawBar(bar));
    if (data.line !== null) make("div", "l4-barline", plot).style.bottom = `${height(data.line)}%`;
    label();
    outline();
    root.dataset.v = model.get("version");
  }

  function readLegend() {
    legend.replaceChildren();
    make("span", "", legend, data.title);
    data.series.forEach((name, series) => {
      if (data.series.length < 2) return;
      const item = make("span", "", legend);
      make("i", "l4-swatch", item).style.background = css(color(series, 0));
      item.append(name);
    });
    for (const [mark, name] of Object.entries(data.mark_names)) make("span", "", legend, `${mark} ${name}`);
    if (data.line !== null) make("span", "", legend, `┄ ${data.line_title}`);
  }

  function drawAxis() {
    const [low, high] = data.limits;
    const rough = (high - low) / TICKS;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((each) => each * power >= rough);
    for (let count = Math.ceil(low / step); count * step <= high; count++) {
      const tick = count * step;
      const place = make("div", "l4-bartick", plot);
      place.style.bottom = `${height(tick)}%`;
      make("span", "", place, written(tick));
    }
  }

  function drawBar(bar) {
    const column = make("div", "l4-bar-of", plot);
    Object.assign(column, { role: "option", id: `${id}-${bar}`, ariaLabel: described(bar).replaceAll("\n", ", ") });
    column.dataset.bar = bar;
    const base = height(0);
    data.series.forEach((_, series) => {
      const number = value(series, bar);
      if (!Number.isFinite(number)) return;
      const [from, to] = [base, height(number)].sort((a, b) => a - b);
      const share = 100 / data.series.length;
      const look = { bottom: `${from}%`, height: `max(1px, ${to - from}%)`, background: css(color(series, bar)) };
      Object.assign(make("i", "", column).style, look, { left: `${series * share}%`, width: `${share}%` });
    });
    const top = Math.max(base, ...data.series.map((_, series) => height(value(series, bar))).filter(Number.isFinite));
    if (data.marks[bar]) make("b", "", column, data.marks[bar]).style.bottom = `${top}%`;
    bars.push(column);
    labels.push(make("span", "", column, data.names[bar]));
  }

  // As many labels as have room.
  function label() {
    const room = (bars[0]?.getBoundingClientRect().width || 20) + 1;
    const step = [1, 2, 4, 5, 8, 10, 16].find((each) => each * room >= longest() * LETTER + 3) || 32;
    labels.forEach((each, bar) => (each.hidden = bar % step !== 0));
  }

  function described(bar) {
    const several = data.series.length > 1;
    const values = data.series.map((name, series) => `${several ? name : data.titles[1]}: ${written(value(series, bar))}`);
    const mark = data.mark_names[data.marks[bar]];
    return [`${data.titles[0]} ${data.names[bar]}${mark ? ` (${mark})` : ""}`, ...values, data.notes[bar]].filter(Boolean).join("\n");
  }

  function outline() {
    const selected = model.get("selected");
    bars.forEach((column, bar) => {
      column.classList.toggle("l4-selected", bar === selected);
      column.ariaSelected = bar === selected;
    });
    if (selected === null) plot.removeAttribute("aria-activedescendant");
    else plot.setAttribute("aria-activedescendant", `${id}-${selected}`);
    root.dataset.selected = selected ?? "";
  }

  function select(bar) {
    model.set("selected", bar);
    model.save_changes();
  }

  function press(event) {
    if (event.key === "Escape") return select(null);
    const [now, last] = [model.get("selected"), bars.length - 1];
    const moves = { ArrowLeft: (now ?? 1) - 1, ArrowRight: (now ?? -1) + 1, Home: 0, End: last };
    if (!(event.key in moves) || !bars.length) return;
    event.preventDefault();
    const bar = clamp(moves[event.key], 0, last);
    select(bar);
    bars[bar].scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  const barOf = (event) => event.target.closest?.("[data-bar]")?.dataset.bar;
  plot.addEventListener("pointermove", (event) => tip(barOf(event) !== undefined && described(Number(barOf(event))), event));
  plot.addEventListener("pointerleave", () => tip(null));
  plot.addEventListener("click", (event) => barOf(event) !== undefined && select(Number(barOf(event))));
  plot.addEventListener("keydown", press);
  const resized = new ResizeObserver(() => requestAnimationFrame(label));
  resized.observe(plot);
  model.on("change:version", read);
  model.on("change:selected", outline);
  read();
  return () => {
    resized.disconnect();
    model.off("change:version", read);
    model.off("change:selected", outline);
  };
}

export default { render };
