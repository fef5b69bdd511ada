// The views, the address, the theme, and the start of the page.

const built = new Set();

/** Fill a view that is filled on its first showing only. */
function build(name) {
  if (built.has(name)) return;
  built.add(name);
  if (name === "text") buildTexts();
  if (name === "effects") buildEffects();
}

/** Show the view that the address names. */
function route(focus = true) {
  let name = location.hash.slice(1) || "overview";
  const index = headIndex(name);
  const text = /^text-(\d+)-(L\d+H\d+)(?:-(\d+))?$/.exec(name);
  let complaint = "";
  if (index >= 0) { name = "head"; showHead(index); }
  else if (text && data.texts.length) {
    name = "text";
    build("text");
    complaint = openText(Number(text[1]) - 1, text[2], text[3] === undefined ? -1 : Number(text[3]));
  } else if (!byId(`view-${name}`) || name === "head") {
    complaint = /^L\d+H\d+$/i.test(name)
      ? `There is no head ${name}: the model has layers 0 to ${data.shape[0] - 1} with heads 0 to ${data.shape[1] - 1}.`
      : "The address names nothing on this page; this is the overview.";
    name = "overview";
  }
  byId("failed").textContent = complaint;
  byId("failed").hidden = !complaint;
  build(name);
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== `view-${name}`;
  for (const link of document.querySelectorAll("nav a")) {
    const target = link.id === "to-head" ? "head" : link.hash.slice(1);
    if (target === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (focus) { byId(`${name}-heading`).focus({ preventScroll: true }); window.scrollTo(0, 0); }
}

/** Open a text at a head and a token; return what is wrong with the address, or nothing. */
function openText(index, name, token) {
  const text = data.texts[index];
  if (!text) return `There is no text ${index + 1} on this page.`;
  const head = text.heads.findIndex((one) => one.name === name);
  if (head < 0) return `Text ${index + 1} has no head ${name}.`;
  if (token >= text.tokens.length) return `Text ${index + 1} has ${text.tokens.length} tokens.`;
  if (reading.text !== index) chooseText(index);
  if (reading.head !== head) chooseTextHead(head);
  chooseToken(token);
  return "";
}

function setTheme() {
  const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = byId("theme").value || system;
  if (document.documentElement.dataset.theme === theme) return;
  document.documentElement.dataset.theme = theme;
  if (byId("grid").childElementCount) showGrid();
  redraw().catch(failed);
}

function failed(error) {
  byId("failed").textContent = `Something on this page failed: ${error && error.message ? error.message : error}`;
  byId("failed").hidden = false;
  console.error(error);
}

/** Return the text that an element holds gzipped, in base64. */
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function save(text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "slashpatch-report.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser cannot decompress the data; use one of 2023 or newer");
  }
  const [text, library] = await Promise.all([unpacked("data"), unpacked("library")]);
  document.head.append(element("script", {}, library)); // the page's policy knows its checksum
  data = JSON.parse(text);
  byId("download").addEventListener("click", () => save(text));
  byId("theme").addEventListener("change", setTheme);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", setTheme);
  setTheme();
  buildOverview();
  buildHead();
  window.addEventListener("beforeprint", () => {
    for (const part of byId("view-provenance").querySelectorAll("details")) part.open = true;
  });
  window.addEventListener("hashchange", () => route());
  route(Boolean(location.hash));
  document.documentElement.dataset.ready = "yes";
  // What is printed, or looked at next, is drawn while nobody waits.
  const later = window.requestIdleCallback ?? ((run) => setTimeout(run, 50));
  later(() => {
    if (!slots.score) showHead(headIndex(byId("to-head-name").textContent));
    later(() => { build("effects"); later(() => { build("text"); document.documentElement.dataset.ready = "all"; }); });
  });
}

start().catch(failed);
