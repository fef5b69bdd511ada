// The view of one head.

const slots = {}; // figures of the head view, kept so that another head only changes their rows

function headFigure(name, options) {
  if (slots[name]) slots[name].update(options.sets, options.caption);
  else slots[name] = figure(options);
  return slots[name];
}

function scoreRows(index) {
  const named = [data.scores.natural, data.scores.random].filter(Boolean).map((scores) => [scores.label, scores]);
  return named.flatMap(([tokens, scores]) =>
    data.offsets.map((offset, column) => ({
      tokens, offset, score: scores.score[index][column],
      low: scores.low[index][column], high: scores.high[index][column],
    })).filter((row) => !missing(row.score)));
}

function showHead(index) {
  const name = headName(index);
  byId("to-head-name").textContent = name;
  byId("to-head").href = `#${name}`;
  byId("head-heading").textContent = `Head ${name}`;
  byId("go").value = name;
  const layer = Math.floor(index / data.shape[1]);
  const scores = data.scores.natural.score[index];
  const column = best(scores);
  const explanation = data.explanations[name];
  const parts = [summary(index, column), verdict(name, explanation)];
  const figures = [headFigure("score", {
    title: "Score by offset", spec: "score_by_offset", sets: { rows: scoreRows(index) },
    caption: column < 0 ? "No prompt is long enough for a score." :
      `Mean attention of ${name} to the token Δ back, ${missing(data.scores.natural.low[index][column]) ? "of one prompt, so without intervals" : "with 95 % intervals over prompts"}. It is highest at `
      + `Δ=${data.offsets[column]}: ${shown(scores[column])} on ${data.scores.natural.label}`
      + (data.scores.random ? `, ${shown(data.scores.random.score[index][column])} on ${data.scores.random.label}.` : "."),
  })];
  const profile = (data.profile && data.profile.heads[index]) ?? (explanation && ownProfile(explanation));
  const notes = [];
  if (profile) figures.push(profileFigure(name, profile));
  else if (data.profile) notes.push(`No logits by offset: ${data.profile.why[layer]}.`);
  else notes.push("The scan was made without moments, so there are no ranks, profiles and rotary pairs.");
  const pairs = data.pairs && data.pairs.heads[index];
  if (pairs) figures.push(pairsFigure(name, layer, pairs));
  if (explanation) figures.push(editsFigure(name, explanation));
  const effects = data.effects[name];
  if (effects) figures.push(...effects.charts.map(figure));
  byId("head").replaceChildren(...parts, ...notes.map((note) => element("p", { class: "dim" }, note)),
    element("div", { class: "charts" }, ...figures),
    ...(effects ? effects.tables.map((one) => resultTable(one)) : []),
    ...(data.rank ? [standing(index)] : []));
  forgetCharts();
}

function summary(index, column) {
  const random = data.scores.random;
  if (column < 0) return element("p", {}, "No score.");
  const offset = data.offsets[column];
  const scores = data.scores.natural;
  const higher = scores.score.filter((row) => { const at = best(row); return at >= 0 && row[at] > scores.score[index][column]; }).length;
  return element("p", {},
    `Highest slash score${data.offsets_left_out ? " at the offsets of this page" : ""} ${shown(scores.score[index][column])} (${missing(scores.low[index][column]) ? "one prompt, so no interval" : interval(scores.low[index][column], scores.high[index][column])}) at Δ=${offset}`
    + (random ? `; ${shown(random.score[index][column])} on ${random.label}` : "")
    + `. ${higher} of ${scores.score.length} heads score higher.`);
}

/** Return the profile that an explanation measured, in the form of the scan's profiles. */
function ownProfile(explanation) {
  const of = explanation.profile;
  return of && { ...of, peaks: [of.measured_peak, of.predicted_peak] };
}

function verdict(name, explanation) {
  if (!explanation) {
    return element("div", { class: "verdict" }, element("p", {}, "No verdict: this head was not explained. "),
      element("p", { class: "dim" }, `slashpatch explain ${name} -m MODEL --out ${name}.json, then --explanation ${name}.json, adds it.`));
  }
  return element("div", { class: "verdict" },
    element("p", {}, element("strong", {}, `${explanation.verdict}`), ` at Δ=${explanation.offset}`
      + (explanation.profile ? `. Its own measurement: score ${shown(explanation.score.natural)}, ${shown(explanation.score_at_rank_one.qk)} with Q and K at rank one; `
        + `correlation of predicted and measured logits ${shown(explanation.profile.correlation)}, predicted peak at Δ=${explanation.profile.predicted_peak}; `
        + `predicted logit of this offset over all others ${shown(explanation.profile.margin, true)}.` : ".")),
    element("p", { class: "dim" }, `Rule (ours): ${data.rule}`));
}

function profileFigure(name, profile) {
  const offsets = typeof profile.offsets === "number" ? Array.from({ length: profile.offsets }, (_, at) => at) : profile.offsets;
  const rows = ["measured", "predicted"].flatMap((which) =>
    offsets.map((offset, at) => ({ offset, logit: profile[which][at], which })));
  return headFigure("profile", {
    title: "Mean logit by offset", spec: "logit_by_offset", sets: { rows },
    caption: `Logits of ${name} averaged over tokens, and what its mean query and mean key predict: `
      + `correlation ${shown(profile.correlation)}; measured peak at Δ=${profile.peaks[0]}, predicted at Δ=${profile.peaks[1]}.`,
  });
}

function pairsFigure(name, layer, pairs) {
  const { wavelength, band } = data.pairs.layers[layer];
  const rows = pairs.amplitude.map((amplitude, pair) =>
    ({ pair, wavelength: wavelength[pair], band: band[pair], amplitude, phase: pairs.phase[pair] }));
  const top = [...rows].sort((a, b) => b.amplitude - a.amplitude)[0];
  return headFigure("pairs", {
    title: "Amplitude and phase by rotary pair", spec: "pairs", sets: { rows },
    caption: `The predicted logit of ${name} is Σ A_l cos(θ_l Δ + φ_l), plus a constant from dimensions that are not rotated, if there are any. The largest amplitude, ${shown(top.amplitude)}, `
      + `is that of pair ${top.pair} (${top.band} band, wavelength ${shown(top.wavelength)} tokens).`,
  });
}

function editsFigure(name, explanation) {
  const clean = explanation.score.natural;
  const groups = [
    ["rank one", Object.entries(explanation.score_at_rank_one).map(([of, score]) => [`${of.toUpperCase().replace("QK", "Q, K")} at rank one`, score])],
    ["band dropped", Object.entries(explanation.score_with_band_dropped).map(([band, score]) => [`${band} dropped`, score])],
    ["band not rotated", Object.entries(explanation.score_with_band_frozen).map(([band, score]) => [`${band} not rotated`, score])],
  ];
  const origin = explanation.origin;
  if (origin) {
    groups.push(
      ["axis dropped", ["q", "k", "qk"].map((of) => [`axis of ${of.toUpperCase().replace("QK", "Q, K")} dropped`, origin.dropped[of]])],
      ["its controls", Object.entries(origin.controls).map(([name, draws]) =>
        [`${name.replace("_", " ")} (mean of ${draws.length})`, draws.reduce((sum, score) => sum + score, 0) / draws.length])],
    );
  }
  const rows = groups.flatMap(([group, entries]) => entries.map(([label, score]) => ({ label, group, score, clean })));
  return headFigure("edits", {
    title: "Score under the edits of explain", spec: "edits_of_explanation", sets: { rows },
    caption: `Slash score of ${name} at Δ=${explanation.offset} with one condition taken away at a time; the line is the clean run, ${shown(clean)}.`,
  });
}

function standing(index) {
  const labels = { r1_q: "r1 of Q", r95_q: "R95 of Q", cone_q: "cone of Q", r1_k: "r1 of K", r95_k: "R95 of K", cone_k: "cone of K" };
  const rows = Object.entries(labels).map(([key, label]) => {
    const values = data.rank[key].filter((value) => !missing(value));
    const value = data.rank[key][index];
    const below = values.filter((other) => other < value).length;
    return { label, value, above: missing(value) ? "–" : `${below} of ${values.length} heads` };
  });
  return element("div", {}, element("h3", {}, "Rank of queries and keys"), table([
    { label: "measure", cell: (row) => row.label },
    { label: "value", number: true, cell: (row) => shown(row.value) },
    { label: "larger than", cell: (row) => row.above },
  ], rows, "Rank of queries and keys"));
}

function otherSlashHead(step) {
  const names = [...new Set(slashHeads().map((row) => row.name))];
  if (!names.length) return;
  const at = names.indexOf(byId("to-head-name").textContent);
  location.hash = names[at < 0 ? 0 : (at + step + names.length) % names.length];
}

function buildHead() {
  byId("previous").addEventListener("click", () => otherSlashHead(-1));
  byId("next").addEventListener("click", () => otherSlashHead(1));
  byId("go").addEventListener("keydown", (event) => {
    if (event.key === "Enter") location.hash = byId("go").value.trim().toUpperCase();
  });
}
