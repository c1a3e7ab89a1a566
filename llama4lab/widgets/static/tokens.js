// Text whose tokens are coloured: hover, click, arrow keys. The traits are those of widgets/tokens.py.
// It wraps as text does. A fold (a long run of image tokens) is one mark, striped with its tokens' colours, until opened.

const STRIPES = 64; // in the mark of a fold

function render({ model, el }) {
  const root = make("div", "l4-root", el);
  const text = make("div", "l4-text", root);
  const legend = make("div", "l4-legend", root);
  const said = make("div", "l4-said", root); // what a screen reader says
  const tip = makeTip(root);
  let [data, spans, folds] = [null, [], []];
  said.ariaLive = "polite";
  Object.assign(text, { tabIndex: 0, role: "application" });
  text.dataset.lmSuppressShortcuts = "true"; // arrow keys move the selection here, not the notebook's

  function write() {
    const tokens = model.get("tokens");
    const starts = new Map(model.get("folds"));
    [spans, folds] = [[], []];
    text.replaceChildren();
    for (let place = 0; place < tokens.length; place++) {
      const count = starts.get(place);
      if (count) folds.push(makeFold(place, count, tokens[place]));
      const parent = folds.length && place < folds.at(-1).end ? folds.at(-1).inside : text;
      const span = make("span", "l4-token", parent, tokens[place]);
      span.dataset.place = place;
      spans.push(span);
    }
  }

  // A real <details> would break the line; this one opens in the line.
  function makeFold(start, count, token) {
    const mark = make("button", "l4-fold", text, `${token} × ${count}`);
    const inside = make("span", "", text);
    const fold = { start, end: start + count, mark, inside };
    mark.dataset.lmSuppressShortcuts = "true";
    const toggle = (open) => {
      inside.hidden = !open;
      mark.ariaExpanded = open;
    };
    mark.addEventListener("click", () => toggle(inside.hidden));
    toggle(false);
    return Object.assign(fold, { toggle });
  }

  function read() {
    data = readColors(model);
    text.ariaLabel = `${data.title}: text of ${spans.length} tokens; arrow keys select a token`;
    paintAll();
  }

  function paintAll() {
    data.dark = isDark(root);
    drawLegend(legend, data);
    spans.forEach((span, place) => {
      const rgb = cellColor(data, place);
      Object.assign(span.style, { background: rgb ? css(rgb) : "", color: rgb ? inkOn(rgb) : "" });
    });
    for (const { start, end, mark } of folds) {
      const stripes = Math.min(STRIPES, end - start);
      const stops = Array.from({ length: stripes }, (_, i) => {
        const rgb = cellColor(data, start + Math.floor((i * (end - start)) / stripes));
        return `${rgb ? css(rgb) : "#8884"} ${(100 * i) / stripes}% ${(100 * (i + 1)) / stripes}%`;
      });
      mark.style.background = `linear-gradient(to right, ${stops.join()}) bottom / 100% 6px no-repeat`;
    }
    outline();
    root.dataset.v = model.get("version");
  }

  const chosen = () => (model.get("selected") === null ? undefined : spans[model.get("selected")]);

  function outline() {
    text.querySelector(".l4-selected")?.classList.remove("l4-selected");
    chosen()?.classList.add("l4-selected");
    for (const fold of folds) {
      const has = fold.start <= model.get("selected") && model.get("selected") < fold.end && model.get("selected") !== null;
      if (has) fold.toggle(true);
    }
    root.dataset.selected = model.get("selected") ?? "";
  }

  const described = (place) => [`position ${model.get("positions")[place]}`, `token ${model.get("labels")[place]}`, ...describedValue(data, place)].join("\n");

  function select(place) {
    model.set("selected", place);
    model.save_changes();
  }

  const placeOf = (event) => (event.target.dataset?.place === undefined ? null : Number(event.target.dataset.place));
  const shown = (place) => !folds.some(({ start, end, inside }) => inside.hidden && start <= place && place < end);

  // The token nearest to a place in the line above or below.
  function across(place, step) {
    const from = spans[place].getBoundingClientRect();
    let best = null;
    for (let next = place + step; next >= 0 && next < spans.length; next += step) {
      const box = spans[next].getClientRects()[0];
      if (!box || step * (box.top - from.top) < from.height / 2) continue;
      if (best && Math.abs(box.top - best.top) > box.height / 2) break;
      const distance = Math.abs(box.left - from.left);
      if (!best || distance < best.distance) best = { next, distance, top: box.top };
    }
    return best ? best.next : place;
  }

  function press(event) {
    if (event.key === "Escape") return select(null);
    const now = model.get("selected");
    const along = (step) => {
      let next = now + step;
      while (next > 0 && next < spans.length - 1 && !shown(next)) next += step;
      return clamp(next, 0, spans.length - 1);
    };
    const moves = { ArrowLeft: () => along(-1), ArrowRight: () => along(1), ArrowUp: () => across(now, -1), ArrowDown: () => across(now, 1) };
    Object.assign(moves, { Home: () => 0, End: () => spans.length - 1 });
    if (!(event.key in moves) || !spans.length || event.target !== text) return;
    event.preventDefault();
    const place = now === null ? 0 : moves[event.key]();
    said.textContent = described(place);
    select(place);
    spans[place].scrollIntoView({ block: "nearest" });
  }

  text.addEventListener("pointermove", (event) => tip(placeOf(event) !== null && described(placeOf(event)), event));
  text.addEventListener("pointerleave", () => tip(null));
  text.addEventListener("click", (event) => placeOf(event) !== null && select(placeOf(event)));
  text.addEventListener("keydown", press);
  const untheme = onTheme(root, paintAll);
  const rewrite = () => {
    if (model.get("tokens").length !== spans.length || model.get("text_version") !== Number(text.dataset.v)) write();
    text.dataset.v = model.get("text_version");
    read();
  };
  model.on("change:version", rewrite);
  model.on("change:selected", outline);
  rewrite();
  return () => {
    untheme();
    model.off("change:version", rewrite);
    model.off("change:selected", outline);
  };
}

export default { render };
