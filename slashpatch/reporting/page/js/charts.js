// Charts with Vega-Embed: drawn once, then given other rows; each with its caption and its rows as a table.

const charts = new Map(); // element of a chart → {spec, sets, view}

const dark = () => document.documentElement.dataset.theme === "dark";

const theme = () => data.themes[dark() ? "dark" : "light"];

/** Draw a chart, or give a drawn one other rows, which is much faster. */
async function draw(place, spec, sets) {
  const known = charts.get(place);
  if (known && known.spec === spec && known.view) {
    known.sets = sets;
    for (const [name, rows] of Object.entries(sets)) known.view.data(name, structuredClone(rows));
    await known.view.resize().runAsync();
    return;
  }
  const chart = { spec, sets, view: null };
  charts.set(place, chart);
  const result = await window.vegaEmbed(
    place,
    { ...data.specs[spec], datasets: structuredClone(sets) },
    {
      ast: true, // expressions are interpreted: the page's policy forbids compiling them
      renderer: "svg",
      logLevel: 1, // errors only: rows without any interval, for instance, are none
      config: theme().config,
      actions: { export: true, source: false, compiled: false, editor: false },
      i18n: { SVG_ACTION: "Save as SVG", PNG_ACTION: "Save as PNG", CLICK_TO_VIEW_ACTIONS: "Save this chart" },
      downloadFileName: `slashpatch-${spec}`,
      tooltip: { theme: dark() ? "dark" : "light" },
    });
  if (charts.get(place) !== chart) return; // drawn anew in the meantime
  place.querySelector("summary").setAttribute("aria-label", "Save this chart");
  chart.view = result.view;
  if (chart.sets !== sets) await draw(place, spec, chart.sets);
}

/** Forget charts that are no longer on the page. */
function forgetCharts() {
  for (const place of [...charts.keys()]) if (!place.isConnected) charts.delete(place);
}

/** Draw all charts again, in the colours of the theme. */
async function redraw() {
  for (const [place, { spec, sets }] of [...charts]) {
    charts.delete(place);
    if (place.isConnected) await draw(place, spec, sets);
  }
}

/** Return a figure: the chart, its caption, and its rows as a table that opens. */
function figure({ title, level = 3, spec, sets, caption, columns }) {
  const place = element("div", { class: "chart" });
  const twin = element("div");
  const details = element("details", {}, element("summary", {}, "Table of this chart"), twin);
  const made = element("figure", {}, title ? element(`h${level}`, {}, title) : null, place,
    element("figcaption", {}, caption), details);
  made.update = (newSets, newCaption) => {
    sets = newSets;
    made.querySelector("figcaption").textContent = newCaption;
    twin.replaceChildren();
    if (details.open) fill();
    draw(place, spec, sets).catch(failed);
  };
  function fill() {
    if (twin.childElementCount) return;
    for (const [name, rows] of Object.entries(sets)) {
      if (!rows.length) continue;
      const label = name === "rows" ? title || "Rows of the chart" : name;
      if (name !== "rows") twin.append(element("h4", {}, label));
      twin.append(table(columns && name === "rows" ? columns : plainColumns(rows), rows, label));
    }
  }
  details.addEventListener("toggle", fill);
  draw(place, spec, sets).catch(failed);
  return made;
}
