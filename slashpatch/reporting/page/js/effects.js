// The view of measured effects.

function resultTable(one) {
  const columns = one.columns.map(({ key, label, number, signed, share, ends }) => ({
    label, number: number && !ends,
    cell: (row) => {
      if (share) return percent(row[key]);
      if (!ends) return shown(row[key], signed);
      const range = interval(row[ends[0]], row[ends[1]], signed);
      return shown(row[key], signed) + (range === "–" ? "" : ` (${range})`);
    },
  }));
  return element("div", {}, one.title ? element("h4", {}, one.title) : null, table(columns, one.rows, one.title || "Table"),
    one.note ? element("p", { class: "dim" }, one.note) : null);
}

function buildEffects() {
  if (!data.results.length) return;
  byId("effects").replaceChildren(...data.results.map((result) => element("article", {},
    element("h3", {}, result.title), element("p", { class: "dim" }, result.about),
    ...result.charts.map((chart) => figure({ ...chart, level: 4 })),
    ...result.tables.map(resultTable),
    ...(result.remarks.length ? [element("ul", {}, ...result.remarks.map((remark) => element("li", {}, remark)))] : []))));
}
