// The table of layers: sorting, filtering, rows that open; and the table of what was skipped.
const first = (layer, sides) => layer.factors.find((factor) => sides.includes(factor.side));
const factorText = (layer, sides) => {
  const factor = first(layer, sides);
  if (!factor) return "–";
  return (factor.side === "F" ? "F " : "") + sizeOf(factor) + (factor.shared_with ? " *" : "");
};
const factorCell = (row, sides) => {
  const texts = [...new Set(row.layers.map((layer) => factorText(layer, sides)))];
  return texts.length === 1 ? texts[0] : `${texts[0]} …`;
};
const sourceText = (source) => (source ? `${source.file}:${source.line}` : "");
const COLUMNS = [
  { name: "layer", key: (row) => row.label, text: true },
  { name: "kind", key: (row) => row.layer.kind, text: true, show: (row) => row.layer.kind },
  { name: "×", key: (row) => row.members.length, title: "layers alike", show: (row) => String(row.members.length) },
  { name: "A", key: (row) => first(row.layer, "A")?.dim ?? 0, title: "input factor; * shared with another layer",
    show: (row) => factorCell(row, "A") },
  { name: "G", key: (row) => first(row.layer, "GF")?.dim ?? 0, title: "output factor, or blocks F",
    show: (row) => factorCell(row, "GF") },
  { name: "rows", key: (row) => row.layer.rows, title: "rows of a and g in one batch",
    show: (row) => exact(row.layer.rows) },
  { name: "state", key: (row) => row.cost.bytes, title: "bytes kept",
    show: (row) => bytes(row.cost.bytes) },
  { name: "statistics", key: (row) => row.cost.flops_statistics, title: "FLOPs each time",
    show: (row) => flops(row.cost.flops_statistics) },
  { name: "refresh", key: (row) => row.cost.flops_refresh, title: "FLOPs each time",
    show: (row) => flops(row.cost.flops_refresh) },
  { name: "apply", key: (row) => row.cost.flops_apply, title: "FLOPs each step",
    show: (row) => flops(row.cost.flops_apply) },
  { name: "per step", key: (row) => row.perStep, title: "FLOPs, averaged over the schedule" },
  { name: "source", key: (row) => [row.layer.source?.file ?? "~", row.layer.source?.line ?? 0], text: true },
];
const compare = (a, b) => {
  if (Array.isArray(a)) return compare(a[0], b[0]) || compare(a[1], b[1]);
  return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
};

function layerTable(data, showLayer) {
  const layers = data.report.layers;
  const row = (label, members, cost, perStep) => ({
    label, members, cost, perStep, layer: layers[members[0]], layers: members.map((member) => layers[member]),
    open: false, member: members[0],
    words: [label, ...members.flatMap((m) => [layers[m].label, layers[m].weight, layers[m].bias ?? ""]),
      layers[members[0]].kind, sourceText(layers[members[0]].source), layers[members[0]].source?.code ?? "",
      ...layers[members[0]].factors.map((factor) => factor.form)].join("\n").toLowerCase(),
  });
  const place = new Map(layers.map((layer, index) => [layer.key, index]));
  const collapsed = data.report.rows.map((shown) =>
    row(shown.label, shown.layers.map((key) => place.get(key)), shown.cost, shown.per_step));
  const single = layers.map((layer, index) => row(layer.label, [index], layer.cost, layer.per_step));
  const state = { rows: collapsed, column: -1, descending: false, words: [] };
  const head = make("thead"), body = make("tbody"), foot = make("tfoot");
  byId("table").append(make("caption", { class: "quiet" }, "Matched layers"), head, body, foot);

  const visible = () => {
    const rows = state.rows.filter((row) => state.words.every((word) => row.words.includes(word)));
    if (state.column < 0) return rows;
    const { key } = COLUMNS[state.column];
    const sign = state.descending ? -1 : 1;
    return rows.map((row, index) => [row, index])
      .sort((a, b) => sign * compare(key(a[0]), key(b[0])) || a[1] - b[1]).map(([row]) => row);
  };
  const sort = (index) => {
    const again = state.column === index;
    const startsDown = !COLUMNS[index].text;
    if (!again) Object.assign(state, { column: index, descending: startsDown });
    else if (state.descending === startsDown) state.descending = !startsDown;
    else state.column = -1;
    draw();
    head.querySelectorAll("button")[index].focus();
  };
  const drawHead = () => head.replaceChildren(make("tr", {}, ...COLUMNS.map((column, index) => {
    const sorted = state.column === index;
    const mark = sorted ? (state.descending ? "▾" : "▴") : "";
    return make("th", { scope: "col", class: column.text ? "text" : null,
      "aria-sort": sorted ? (state.descending ? "descending" : "ascending") : "none" },
    make("button", { type: "button", title: column.title ?? null, onclick: () => sort(index) },
      column.name, make("span", { class: "mark", "aria-hidden": "true" }, mark)));
  })));
  const most = Math.max(1, ...collapsed.map((row) => row.perStep));
  const cells = (row) => COLUMNS.map((column, index) => {
    if (index === 0) {
      return make("th", { scope: "row", class: "text" }, make("button", { type: "button", class: "open",
        "aria-expanded": String(row.open) }, row.label));
    }
    if (column.name === "per step") {
      const bar = make("i", { style: `width:${Math.max(1, (100 * row.perStep) / most)}%` });
      return make("td", { class: "cost", title: `${exact(row.perStep)} FLOPs` },
        make("span", { class: "bar" }, bar), make("span", { class: "n" }, flops(row.perStep)));
    }
    if (column.name === "source") {
      return make("td", { class: "text source", title: row.layer.source?.code ?? "" },
        make("span", {}, sourceText(row.layer.source), " ", make("code", {}, row.layer.source?.code ?? "")));
    }
    const side = { A: "A", G: "G" }[column.name];
    const text = column.show(row);
    return make("td", { class: [column.text ? "text" : "", side && text !== "–" ? `side ${side}` : ""].join(" ").trim() },
      make("span", {}, text));
  });
  const draw = () => {
    drawHead();
    const rows = visible();
    body.replaceChildren(...rows.flatMap((row) => {
      const line = make("tr", { class: row.open ? "row opened" : "row", "data-key": row.layer.key,
        onclick: (event) => { if (!event.target.closest("a")) toggle(row); } }, ...cells(row));
      return row.open ? [line, detail(row)] : [line];
    }));
    if (!rows.length) {
      body.append(make("tr", {}, make("td", { colspan: COLUMNS.length, class: "text none" }, "No layer fits the filter.")));
    }
    drawFoot(rows);
    byId("shown").textContent = rows.length === state.rows.length
      ? `${counted(rows.length, "row")}, ${counted(layers.length, "layer")}`
      : `${rows.length} of ${state.rows.length} rows`;
  };
  const drawFoot = (rows) => {
    const sum = (of) => rows.reduce((total, row) => total + of(row), 0);
    const texts = ["total of these rows", "", sum((row) => row.members.length), "", "", "",
      bytes(sum((row) => row.cost.bytes)), flops(sum((row) => row.cost.flops_statistics)),
      flops(sum((row) => row.cost.flops_refresh)), flops(sum((row) => row.cost.flops_apply)),
      flops(sum((row) => row.perStep)), ""];
    foot.replaceChildren(make("tr", {}, ...texts.map((text, index) =>
      make("td", { class: COLUMNS[index].text ? "text" : null }, String(text)))));
  };
  const detail = (row) => {
    const cell = make("td", { colspan: COLUMNS.length, class: "detail" });
    const fill = () => cell.replaceChildren(showLayer(row, row.member, (member) => {
      row.member = member;
      fill();
      cell.querySelector("select").focus();
    }));
    fill();
    return make("tr", { class: "inner" }, cell);
  };
  const button = (row) => body.querySelector(`tr.row[data-key="${CSS.escape(row.layer.key)}"] button.open`);
  const toggle = (row) => { row.open = !row.open; draw(); button(row)?.focus({ preventScroll: true }); };
  const open = (key) => {
    const row = state.rows.find((row) => row.members.some((member) => layers[member].key === key));
    if (!row) return false;
    if (!state.words.every((word) => row.words.includes(word))) filter("");
    row.open = true;
    row.member = row.members.find((member) => layers[member].key === key);
    draw();
    button(row).focus({ preventScroll: true });
    button(row).closest("tr").scrollIntoView({ block: "start" });
    return true;
  };
  const filter = (text) => { state.words = text.toLowerCase().split(/\s+/).filter(Boolean); draw(); };
  body.addEventListener("keydown", (event) => {
    const buttons = [...body.querySelectorAll("button.open")];
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    buttons[Math.min(Math.max(to, 0), buttons.length - 1)].focus();
  });
  byId("alike").addEventListener("change", (event) => {
    state.rows = event.target.checked ? collapsed : single;
    draw();
  });
  draw();
  return { open, filter };
}

function skipTable(skips) {
  if (!skips.length) {
    byId("skiptable").append(make("caption", {}, "Nothing: every trainable parameter is preconditioned."));
    return () => {};
  }
  const head = make("thead", {}, make("tr", {}, ...["parameter", "elements", "reason", "what to do", "source"].map(
    (name, index) => make("th", { scope: "col", class: index === 1 ? null : "text" }, name))));
  const body = make("tbody");
  byId("skiptable").append(head, body);
  const words = skips.map((skip) => [skip.label, ...skip.members, skip.reason, skip.detail, skip.sources].join("\n").toLowerCase());
  return (text) => {
    const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = skips.filter((_, index) => wanted.every((word) => words[index].includes(word)));
    body.replaceChildren(...rows.map((skip) => make("tr", {},
      make("th", { scope: "row", class: "text" }, skip.members.length === 1 ? skip.label : make("details", {},
        make("summary", {}, `${skip.label} ×${skip.members.length}`),
        make("ul", {}, ...skip.members.map((member) => make("li", {}, member))))),
      make("td", {}, exact(skip.numel)),
      make("td", { class: "text reason" }, make("b", {}, skip.reason), " ", skip.detail),
      make("td", { class: "text" }, skip.advice), make("td", { class: "text mono" }, skip.sources))));
    if (!rows.length) body.append(make("tr", {}, make("td", { colspan: 5, class: "text none" }, "None fits the filter.")));
  };
}
