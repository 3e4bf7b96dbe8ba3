// What opens below a row: facts, factors, the drawing, the lines of the rewritten program.
const shapeText = (shapes) => [...new Set(shapes.map((shape) => shape.join(" × ") || "scalar"))].join(", ");

function facts(layer) {
  const pairs = [
    ["weight", `${layer.weight}, ${shapeText(layer.shapes.weight)}`
      + (layer.part ? `, its rows ${layer.part[0]} to ${layer.part[1] - 1}` : "")],
    ["bias", layer.bias ?? "none"],
    ["a, input", layer.shapes.a.length ? shapeText(layer.shapes.a) : "constant"],
    ["g, output gradient", shapeText(layer.shapes.g)],
    ["curvature", `${layer.structure}, ${exact(layer.d_in)} inputs`
      + `${layer.bias && layer.structure === "kronecker" ? " (one of them for the bias)" : ""}, ${exact(layer.d_out)} outputs`
      + (layer.groups > 1 ? `, ${layer.groups} groups` : "")],
    ["rows", `${exact(layer.rows)} a batch` + (layer.uses.length > 1 ? `, of ${layer.uses.length} uses` : "")],
    ["source", layer.source ? `${layer.source.file}:${layer.source.line}` : "not known"],
  ];
  const list = make("dl", { class: "facts" });
  for (const [name, value] of pairs) list.append(make("dt", {}, name), make("dd", {}, value));
  if (layer.source) list.lastChild.append(make("code", { class: "block" }, layer.source.code));
  return list;
}

function factorTable(layer) {
  if (!layer.factors.length) return make("p", { class: "hint" }, "No factor of its own.");
  const names = ["factor", "size", "bytes", "statistics", "refresh", "apply", "how it is computed"];
  const last = names.length - 1;
  return make("table", { class: "factors" },
    make("thead", {}, make("tr", {}, ...names.map((name, index) =>
      make("th", { scope: "col", class: index === 0 || index === last ? "text" : null }, name)))),
    make("tbody", {}, ...layer.factors.map((factor) => make("tr", {},
      make("th", { scope: "row", class: `text side ${factor.side === "A" ? "A" : "G"}` }, make("span", {}, factor.side)),
      make("td", {}, sizeOf(factor)), make("td", { title: exact(factor.bytes) }, bytes(factor.bytes)),
      make("td", { title: exact(factor.flops_statistics) }, flops(factor.flops_statistics)),
      make("td", { title: exact(factor.flops_refresh) }, flops(factor.flops_refresh)),
      make("td", { title: exact(factor.flops_apply) }, flops(factor.flops_apply)),
      make("td", { class: "text form" }, factor.form + (factor.gram && !factor.form.includes(factor.gram) ? `, ${factor.gram}` : "") + (factor.shared_with ? `; shared with ${factor.shared_with}` : ""))))));
}

function memberChoice(layers, row, member, choose) {
  if (row.members.length < 2) return null;
  const choice = make("select", { onchange: (event) => choose(Number(event.target.value)) },
    ...row.members.map((index) => make("option", { value: index, selected: index === member }, layers[index].label)));
  return make("label", { class: "member" }, `${row.members.length} layers alike, showing `, choice);
}

// First and last lines of all boxes of a lane, joined where they touch.
function laneSpans(graph, lane) {
  const spans = [];
  for (const box of graph[0]) {
    if (box[2] !== lane || box[3] === 2) continue;
    for (let i = 4; i < box.length; i += 2) spans.push([box[i], box[i + 1]]);
  }
  spans.sort((a, b) => a[0] - b[0]);
  const joined = [];
  for (const [start, end] of spans) {
    const before = joined[joined.length - 1];
    if (before && start <= before[1] + 1) before[1] = Math.max(before[1], end);
    else joined.push([start, end]);
  }
  return joined;
}

function laneCode(data, graph, lines, lane) {
  const spans = laneSpans(graph, lane);
  const name = data.lanes[lane];
  const count = spans.reduce((sum, [start, end]) => sum + end - start + 1, 0);
  const last = data.programs[data.programs.length - 1].name;
  const part = make("details", { class: `part ${name}`, open: lane < 2 || count <= 40 },
    make("summary", {}, make("b", {}, name), make("span", {}, ` ${counted(count, "line")}`)));
  if (!count) return part;
  const block = make("div", { class: "code", tabindex: "0", role: "region", "aria-label": `${name}, lines of the program` });
  spans.forEach(([start, end], index) => {
    if (index) block.append(make("div", { class: "gap", "aria-hidden": "true" }, "⋯"));
    for (let n = start; n <= end; n++) {
      block.append(make("div", { class: lineClass(lines[n]) },
        make("a", { class: "n", href: `#program/${last}/${n + 1}`, tabindex: "-1" }, String(n + 1)), lines[n] || "\n"));
    }
  });
  part.append(make("a", { class: "whole", href: `#program/${last}/${spans[0][0] + 1}` }, `line ${spans[0][0] + 1} in the whole program`), block);
  return part;
}

function layerDetail(data, linesOf) {
  return (row, member, choose) => {
    const layer = data.report.layers[member];
    const graph = data.graphs[member];
    const lines = linesOf(data.programs.length - 1);
    return make("div", { class: "layer" },
      memberChoice(data.report.layers, row, member, choose),
      make("div", { class: "columns" }, facts(layer), make("div", { class: "scroll" }, factorTable(layer))),
      make("h3", {}, "Neighbourhood in the graph"), drawGraph(data, graph),
      make("h3", {}, "Its lines in the rewritten program"),
      ...data.lanes.map((_, lane) => laneCode(data, graph, lines, lane)));
  };
}
