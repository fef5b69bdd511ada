// The overview: the grid of all heads and the table of slash heads.

const view = { value: "natural", kappa: 0.1, from: 0, to: 0 }; // from, to: columns of offsets

/** Return the values of a head as the grid shows them: {value, offset, reaches}. */
function cellValue(index) {
  const natural = data.scores.natural.score[index];
  const random = data.scores.random && data.scores.random.score[index];
  if (view.value.startsWith("sweep")) {
    const found = data.sweeps[Number(view.value.slice(6))].values[index];
    return { value: found ? found.effect : null, offset: found ? found.offset : null, reaches: false };
  }
  const row = view.value === "random" ? random : natural;
  const column = best(row, view.from, view.to);
  if (column < 0) return { value: null, offset: null, reaches: false };
  const score = row[column];
  const value = view.value === "difference"
    ? (missing(random[column]) ? null : score - random[column]) : score;
  return { value, offset: data.offsets[column], reaches: score >= view.kappa };
}

/** Return the column with the highest score from one column to another; -1 if all are missing. */
function best(row, from = 0, to = data.offsets.length - 1) {
  let column = -1;
  for (let at = from; at <= to; at++) {
    if (!missing(row[at]) && (column < 0 || row[at] > row[column])) column = at;
  }
  return column;
}

const isScore = () => view.value === "natural" || view.value === "random";

function colour(value, most) {
  if (missing(value)) return null;
  const scale = isScore() ? theme().score : theme().change;
  const share = isScore() ? value : (value / most + 1) / 2;
  return scale[Math.max(0, Math.min(scale.length - 1, Math.round(share * (scale.length - 1))))];
}

/** Return black or white, whichever can be read better on a colour #rrggbb. */
function ink(hex) {
  const [red, green, blue] = [1, 3, 5].map((at) => {
    const part = parseInt(hex.slice(at, at + 2), 16) / 255;
    return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return luminance > 0.179 ? "#000000" : "#ffffff";
}

function buildGrid() {
  const [layers, heads] = data.shape;
  const step = layers > 40 ? 5 : 1;
  const top = element("tr", { role: "row" }, element("th", { role: "columnheader" }, "layer"),
    ...Array.from({ length: layers }, (_, layer) =>
      element("th", { role: "columnheader", "aria-label": `layer ${layer}` }, layer % step ? "" : String(layer))));
  const rows = Array.from({ length: heads }, (_, head) =>
    element("tr", { role: "row" }, element("th", { role: "rowheader", scope: "row" }, `H${head}`),
      ...Array.from({ length: layers }, (_, layer) =>
        element("td", { role: "gridcell" },
          element("a", { href: `#L${layer}H${head}`, tabindex: "-1", "data-head": layer * heads + head })))));
  byId("grid").append(element("thead", {}, top), element("tbody", {}, ...rows));
  gridLink(headIndex(byId("to-head-name").textContent)).tabIndex = 0;
  byId("grid").addEventListener("keydown", moveInGrid);
  byId("grid").addEventListener("focusin", (event) => {
    byId("grid").querySelector('a[tabindex="0"]').tabIndex = -1;
    event.target.tabIndex = 0;
  });
}

const gridLink = (index) => byId("grid").querySelector(`a[data-head="${index}"]`);

function moveInGrid(event) {
  const [layers, heads] = data.shape;
  const index = Number(event.target.dataset.head);
  let [layer, head] = [Math.floor(index / heads), index % heads];
  if (event.key === "ArrowRight") layer++;
  else if (event.key === "ArrowLeft") layer--;
  else if (event.key === "ArrowDown") head++;
  else if (event.key === "ArrowUp") head--;
  else if (event.key === "Home") layer = 0;
  else if (event.key === "End") layer = layers - 1;
  else if (event.key === " ") location.hash = headName(index);
  else return;
  event.preventDefault();
  if (layer >= 0 && layer < layers && head >= 0 && head < heads) gridLink(layer * heads + head).focus();
}

function showGrid() {
  const cells = Array.from({ length: data.shape[0] * data.shape[1] }, (_, index) => cellValue(index));
  const most = Math.max(1e-12, ...cells.map((cell) => Math.abs(cell.value ?? 0)));
  for (const link of byId("grid").querySelectorAll("a")) {
    const index = Number(link.dataset.head);
    const { value, offset, reaches } = cells[index];
    const back = colour(value, most);
    link.style.background = back ?? "transparent";
    link.style.color = back ? ink(back) : "inherit";
    link.textContent = reaches ? String(offset) : "\u00a0";
    const at = missing(offset) ? "" : ` at Δ=${offset}`;
    link.setAttribute("aria-label", `${headName(index)}: ${shown(value, !isScore())}${at}`);
    link.title = link.getAttribute("aria-label");
  }
  showLegend(most);
  showCounts(cells);
}

function showLegend(most) {
  const scale = isScore() ? theme().score : theme().change;
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${scale.join(", ")})`;
  const [low, high] = isScore() ? ["0", "1"] : [shown(-most), shown(most, true)];
  byId("legend").replaceChildren(low, bar, high);
  const what = byId("value").selectedOptions[0].textContent;
  const offsets = `Δ from ${data.offsets[view.from]} to ${data.offsets[view.to]}`;
  const texts = {
    natural: `Highest slash score of each head over ${offsets}. The number is that Δ, where the score is at least κ.`,
    random: `The same on ${data.scores.random ? data.scores.random.label : ""}: highest score over ${offsets}, and its Δ where the score is at least κ.`,
    difference: `Score on ${data.scores.natural.label} minus score on ${data.scores.random ? data.scores.random.label : ""}, at the Δ where the head scores highest on the former (${offsets}).`,
  };
  byId("grid-caption").textContent = (texts[view.value] ?? `${what}: the largest effect of the edit at each head.`)
    + (data.offsets_left_out ? ` ${data.offsets_left_out} more offsets of the scan, none of them the best of any head, are not on this page.` : "");
}

let reached = { key: "", rows: [] }; // the last answer of slashHeads

/** Return a row for each head and offset in the range whose score reaches κ, the highest first. */
function slashHeads() {
  const key = `${view.kappa} ${view.from} ${view.to}`;
  if (reached.key !== key) reached = { key, rows: findSlashHeads() };
  return [...reached.rows];
}

function findSlashHeads() {
  const random = data.scores.random;
  const rows = [];
  data.scores.natural.score.forEach((scores, index) => {
    for (let column = view.from; column <= view.to; column++) {
      if (missing(scores[column]) || scores[column] < view.kappa) continue;
      const name = headName(index);
      const other = random ? random.score[index][column] : null;
      rows.push({
        index, name, offset: data.offsets[column], score: scores[column],
        low: data.scores.natural.low[index][column], high: data.scores.natural.high[index][column],
        random: other, difference: missing(other) ? null : scores[column] - other,
        r1_q: data.rank ? data.rank.r1_q[index] : null, r1_k: data.rank ? data.rank.r1_k[index] : null,
        verdict: data.explanations[name] && data.explanations[name].offset === data.offsets[column]
          ? data.explanations[name].verdict : null,
      });
    }
  });
  return rows.sort((a, b) => b.score - a.score || a.index - b.index || a.offset - b.offset);
}

const kappaText = () => String(Number(view.kappa.toFixed(3)));

function showCounts(cells) {
  const rows = slashHeads();
  const byOffset = new Map();
  for (const row of rows) byOffset.set(row.offset, (byOffset.get(row.offset) ?? 0) + 1);
  const listed = [...byOffset].sort((a, b) => a[0] - b[0]).slice(0, 20)
    .map(([offset, n]) => `Δ=${offset}: ${n}`).join(", ");
  const n = new Set(rows.map((row) => row.index)).size;
  const random = data.scores.random
    ? data.scores.random.score.filter((row) => {
      const column = best(row, view.from, view.to);
      return column >= 0 && row[column] >= view.kappa;
    }).length : null;
  byId("counts").textContent =
    `${n} of ${cells.length} heads have a score of at least ${kappaText()}`
    + (random === null ? "" : `, ${random} on ${data.scores.random.label}`)
    + (listed ? ` (heads by offset: ${listed}${byOffset.size > 20 ? ", …" : ""}).` : ".");
}

// The table of slash heads: which columns, how it is sorted, how many rows it shows.
const headColumns = [
  { key: "name", label: "head", cell: (row) => element("a", { href: `#${row.name}` }, row.name), order: (row) => row.index },
  { key: "offset", label: "Δ", number: true },
  { key: "score", label: "score", number: true },
  { key: "low", label: "95 % interval", cell: (row) => interval(row.low, row.high) },
  { key: "random", label: () => data.scores.random.label, number: true, needs: () => data.scores.random },
  { key: "difference", label: "difference", number: true, cell: (row) => shown(row.difference, true), needs: () => data.scores.random },
  { key: "r1_q", label: "r1 of Q", number: true, needs: () => data.rank },
  { key: "r1_k", label: "r1 of K", number: true, needs: () => data.rank },
  { key: "verdict", label: "verdict", cell: (row) => row.verdict ?? "–", needs: () => Object.keys(data.explanations).length },
];
const list = { key: "score", down: true, all: false };
const MOST_ROWS = 60;
const ALL_ROWS = 3000; // of more, the filter finds the others

/** Return whether a row has a word: a layer (L16), a head (L16H0), an offset (Δ=1), or a verdict. */
function fits(row, word) {
  if (/^l\d+$/.test(word)) return row.name.toLowerCase().startsWith(`${word}h`);
  if (/^l\d+h\d+$/.test(word)) return row.name.toLowerCase() === word;
  if (/^(δ=)?\d+$/.test(word)) return row.offset === Number(word.replace("δ=", ""));
  return `${row.name} Δ=${row.offset} ${row.verdict ?? ""}`.toLowerCase().includes(word);
}

function showHeads() {
  const words = byId("filter").value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const chosen = slashHeads().filter((row) => words.every((word) => fits(row, word)));
  const columns = headColumns.filter((column) => !column.needs || column.needs());
  const sorted = columns.find((column) => column.key === list.key) ?? columns[0];
  const order = sorted.order ?? ((row) => row[sorted.key]);
  const sign = list.down ? -1 : 1;
  chosen.sort((a, b) => {
    const [x, y] = [order(a), order(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  });
  const rows = chosen.slice(0, list.all ? ALL_ROWS : MOST_ROWS);
  const heading = (column) => element("th",
    { scope: "col", class: column.number ? "number" : undefined,
      "aria-sort": column.key === list.key ? (list.down ? "descending" : "ascending") : undefined },
    element("button", { type: "button", "data-key": column.key },
      (typeof column.label === "function" ? column.label() : column.label) + (column.key === list.key ? (list.down ? " ↓" : " ↑") : "")));
  const focused = document.activeElement && document.activeElement.dataset.key;
  byId("heads").replaceChildren(
    element("thead", {}, element("tr", {}, ...columns.map(heading))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...columns.map((column) =>
      element("td", { class: column.number ? "number" : undefined },
        column.cell ? column.cell(row) : shown(row[column.key])))))));
  if (focused) byId("heads").querySelector(`button[data-key="${focused}"]`).focus();
  byId("more").hidden = rows.length >= Math.min(chosen.length, ALL_ROWS);
  byId("more").textContent = chosen.length > ALL_ROWS
    ? `Show ${ALL_ROWS} of ${chosen.length} rows` : `Show all ${chosen.length} rows`;
}

function buildOverview() {
  const options = [["natural", `score on ${data.scores.natural.label}`]];
  if (data.scores.random) options.push(["random", `score on ${data.scores.random.label}`], ["difference", "difference of the two"]);
  data.sweeps.forEach((sweep, index) => options.push([`sweep ${index}`, `effect: ${sweep.label}`]));
  byId("value").append(...options.map(([value, label]) => element("option", { value }, label)));
  const offsets = () => data.offsets.map((offset, column) => element("option", { value: column }, String(offset)));
  byId("from").append(...offsets());
  byId("to").append(...offsets());
  view.kappa = data.kappa;
  view.to = data.offsets.length - 1;
  byId("kappa").value = view.kappa;
  byId("kappa").dataset.shown = byId("kappa").value; // the slider rounds; the κ that was given does not
  byId("from").value = view.from;
  byId("to").value = view.to;
  const changed = () => {
    view.value = byId("value").value;
    if (byId("kappa").value !== byId("kappa").dataset.shown) view.kappa = Number(byId("kappa").value);
    byId("kappa").dataset.shown = byId("kappa").value;
    view.from = Number(byId("from").value);
    view.to = Math.max(view.from, Number(byId("to").value));
    byId("to").value = view.to;
    byId("kappa-shown").textContent = kappaText();
    showGrid();
    showHeads();
  };
  byId("controls").addEventListener("input", changed);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("filter").addEventListener("input", showHeads);
  byId("heads").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    list.down = list.key === button.dataset.key ? !list.down : button.dataset.key !== "name";
    list.key = button.dataset.key;
    showHeads();
  });
  byId("more").addEventListener("click", () => {
    list.all = true;
    showHeads();
    byId("heads").querySelectorAll("tbody a")[MOST_ROWS].focus();
  });
  const edits = data.scores.natural.edits;
  byId("edited").hidden = !edits.length;
  byId("edited").textContent = `The scan was made under edits, so all scores are of the edited model: ${edits.join(", ")}.`;
  buildGrid();
  changed();
}
