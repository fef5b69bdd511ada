// The view of a text: its tokens, and the keys that each attends to.

const reading = { text: 0, head: 0, offset: 0, token: -1 }; // offset: its column

const textNow = () => data.texts[reading.text];
const headNow = () => textNow().heads[reading.head];

function buildTexts() {
  if (!data.texts.length) return;
  byId("text-choice").append(...data.texts.map((text, index) =>
    element("option", { value: index }, `${index + 1}: ${text.source} (${text.tokens.length} tokens)`)));
  byId("text-choice").addEventListener("change", () => { chooseText(Number(byId("text-choice").value)); noteText(); });
  byId("text-head").addEventListener("change", () => { chooseTextHead(Number(byId("text-head").value)); noteText(); });
  byId("text-offset").addEventListener("change", () => { reading.offset = Number(byId("text-offset").value); shade(); showKeys(); });
  byId("tokens").addEventListener("click", (event) => {
    const span = event.target.closest("span");
    if (span) { chooseToken(Number(span.dataset.token)); noteText(); }
  });
  byId("tokens").addEventListener("keydown", (event) => {
    const last = textNow().tokens.length - 1;
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, PageDown: 100, PageUp: -100 };
    let token = reading.token;
    if (event.key in moves) token = token < 0 ? 0 : token + moves[event.key];
    else if (event.key === "Home") token = 0;
    else if (event.key === "End") token = last;
    else if (event.key === "Escape") token = -1;
    else return;
    event.preventDefault();
    chooseToken(event.key === "Escape" ? -1 : Math.max(0, Math.min(last, token)));
    noteText();
  });
  chooseText(0);
}

/** Write the choice into the address, so that a link leads to it; the view stays as it is. */
function noteText() {
  const token = reading.token < 0 ? "" : `-${reading.token}`;
  history.replaceState(null, "", `#text-${reading.text + 1}-${headNow().name}${token}`);
}

function chooseText(index) {
  reading.text = index;
  reading.token = -1;
  const text = textNow();
  byId("text-choice").value = index;
  const breaks = new Set(text.breaks);
  const pieces = [];
  text.tokens.forEach((token, at) => {
    pieces.push(element("span", { id: `token-${at}`, role: "option", "aria-selected": "false", "data-token": at }, token));
    if (breaks.has(at)) pieces.push("\n");
  });
  byId("tokens").replaceChildren(...pieces);
  byId("tokens").removeAttribute("aria-activedescendant");
  reading.spans = byId("tokens").querySelectorAll("span");
  byId("text-head").replaceChildren(...text.heads.map((head, at) => element("option", { value: at }, head.name)));
  chooseTextHead(0);
}

function chooseTextHead(index) {
  reading.head = index;
  byId("text-head").value = index;
  const head = headNow();
  const sums = textNow().offsets.map((_, column) => head.diagonals.reduce((sum, row) => sum + (row[column] ?? 0), 0));
  reading.offset = sums.indexOf(Math.max(...sums));
  byId("text-offset").replaceChildren(...textNow().offsets.map((offset, column) => element("option", { value: column }, String(offset))));
  byId("text-offset").value = reading.offset;
  shade();
  showKeys();
}

function chooseToken(token) {
  const spans = reading.spans;
  if (reading.token >= 0) spans[reading.token].setAttribute("aria-selected", "false");
  reading.token = token;
  if (token >= 0) {
    spans[token].setAttribute("aria-selected", "true");
    byId("tokens").setAttribute("aria-activedescendant", `token-${token}`);
    const [box, at] = [byId("tokens"), spans[token]];
    if (at.offsetTop < box.scrollTop || at.offsetTop > box.scrollTop + box.clientHeight - 40) {
      box.scrollTop = at.offsetTop - box.clientHeight / 2;
    }
  } else byId("tokens").removeAttribute("aria-activedescendant");
  shade();
  showKeys();
}

/** Shade tokens: by their weight on the diagonal, or, with a token chosen, the keys it reads. */
function shade() {
  const head = headNow();
  const chosen = reading.token;
  const colours = new Map();
  if (chosen < 0) {
    head.diagonals.forEach((row, at) => {
      const weight = row[reading.offset] / 1000;
      if (weight > 0.02) colours.set(at, `rgba(var(--slash), calc(var(--most) * ${Math.min(1, weight).toFixed(2)}))`);
    });
  } else {
    head.back[chosen].forEach((back, at) => {
      if (back < 0) return;
      colours.set(chosen - back, `rgba(var(--key), calc(var(--most) * ${(0.25 + 0.5 * head.weights[chosen][at] / 1000).toFixed(2)}))`);
    });
  }
  for (const at of reading.shaded ?? []) if (!colours.has(at) && reading.spans[at]) reading.spans[at].style.background = "";
  for (const [at, value] of colours) reading.spans[at].style.background = value;
  reading.shaded = [...colours.keys()];
}

/** Return the weights that shade the text as a table, which is filled when it is opened. */
function weightsTable() {
  const details = element("details", {}, element("summary", {}, "Table of these weights"));
  details.addEventListener("toggle", () => {
    if (details.childElementCount > 1) return;
    const rows = headNow().diagonals.map((row, at) => ({ at, weight: row[reading.offset] / 1000 }));
    details.append(table([
      { label: "token", number: true, cell: (row) => String(row.at) },
      { label: "text", cell: (row) => element("bdi", {}, textNow().tokens[row.at]) },
      { label: "weight", number: true, cell: (row) => row.weight.toFixed(3) },
    ], rows, "Weights on the diagonal"));
  });
  return details;
}

function showKeys() {
  const [text, head, token] = [textNow(), headNow(), reading.token];
  if (token < 0) {
    const offset = text.offsets[reading.offset];
    byId("keys").replaceChildren(element("p", {},
      `Tokens are shaded by the weight with which ${head.name} attends from them to the token Δ=${offset} back.`), weightsTable());
    return;
  }
  const bar = (weight) => {
    const made = element("span", { class: "weight", "aria-hidden": "true" });
    made.style.width = `${(6 * weight).toFixed(2)}rem`;
    return made;
  };
  const cell = (weight) => { const made = element("span", {}, weight.toFixed(3)); made.append(bar(weight)); return made; };
  const keys = head.back[token].map((back, at) => ({ back, weight: head.weights[token][at] / 1000 })).filter((row) => row.back >= 0);
  byId("keys").replaceChildren(
    element("h3", {}, `${head.name} at token ${token}: `, element("bdi", {}, text.tokens[token])),
    table([
      { label: "key", number: true, cell: (row) => String(token - row.back) },
      { label: "token", cell: (row) => element("bdi", {}, text.tokens[token - row.back]) },
      { label: "Δ", number: true, cell: (row) => String(row.back) },
      { label: "weight", cell: (row) => cell(row.weight) },
    ], keys, "Keys with the largest weights"),
    element("p", { class: "dim" }, `All other keys together (and an attention sink, where the model has one): ${Math.max(0, head.rest[token] / 1000).toFixed(3)}.`),
    element("h3", {}, "Diagonals"),
    table([
      { label: "Δ", number: true, cell: (row) => String(row.offset) },
      { label: "weight", cell: (row) => cell(row.weight) },
    ], text.offsets.map((offset, column) => ({ offset, weight: head.diagonals[token][column] / 1000 })).filter((row) => row.offset <= token && !missing(row.weight)),
    "Weights by offset"));
}
