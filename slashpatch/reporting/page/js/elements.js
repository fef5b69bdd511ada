// Elements, numbers and tables. All files of this folder are joined in one function, in the order of assets.py.
// Text from models and prompts reaches the page through textContent and setAttribute alone.

const byId = (id) => document.getElementById(id);
let data; // what payload.py made


/** Return an element with attributes and children; strings become text, never markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === undefined || value === null) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const missing = (value) => value === null || value === undefined || Number.isNaN(value);

/** Return a number as text: three decimals, or an exponent where these would show nothing. */
function shown(value, signed = false) {
  if (missing(value)) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  const sign = signed && value > 0 ? "+" : "";
  if (Number.isInteger(value)) return sign + value;
  const size = Math.abs(value);
  if (size < 0.001) return (sign + value.toExponential(0)).replaceAll("-", "−");
  return (sign + value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3)).replaceAll("-", "−");
}

const percent = (share) => (missing(share) ? "–" : `${Math.round(100 * share)} %`);

const interval = (low, high, signed = false) =>
  missing(low) || missing(high) ? "–" : `${shown(low, signed)} to ${shown(high, signed)}`;

const headName = (index) => `L${Math.floor(index / data.shape[1])}H${index % data.shape[1]}`;

/** Return the index of a head's name, or -1 for a head that the model does not have. */
function headIndex(name) {
  const match = /^L(\d{1,4})H(\d{1,4})$/i.exec(name.trim());
  if (!match) return -1;
  const [layer, head] = [Number(match[1]), Number(match[2])];
  return layer < data.shape[0] && head < data.shape[1] ? layer * data.shape[1] + head : -1;
}

/** Return a table; columns are {label, cell(row), number}, and a cell is text or a node. */
function table(columns, rows, caption) {
  const cells = (row) =>
    columns.map((column) =>
      element("td", { class: column.number ? "number" : undefined }, column.cell(row)));
  const heading = (column) =>
    element("th", { scope: "col", class: column.number ? "number" : undefined }, column.label);
  return element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
    element("table", {},
      element("thead", {}, element("tr", {}, ...columns.map(heading))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row))))));
}

/** Return columns for rows of plain values, in the order of the first row's names. */
function plainColumns(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  return names.map((name) => ({
    label: name === "as_large" ? "share of draws at least as large" : name.replaceAll("_", " "),
    number: rows.some((row) => typeof row[name] === "number"),
    cell: (row) => (name === "as_large" ? percent : shown)(row[name]),
  }));
}
