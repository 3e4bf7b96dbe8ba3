// One layer's neighbourhood: four lanes from top to bottom; in a lane, time goes from left to right.
const BOX = { width: 156, height: 36, gapY: 10, left: 104, pad: 8, track: 7, port: 5, round: 4 };

// Column of each box in its lane: behind all that it reads there.
function columns(boxes, arrows) {
  const own = arrows.filter(([start, end]) => boxes[start][2] === boxes[end][2]);
  const column = boxes.map(() => 0);
  for (let changed = true; changed;) {
    changed = false;
    for (const [start, end] of own) {
      if (column[end] <= column[start]) { column[end] = column[start] + 1; changed = true; }
    }
  }
  // What nothing in the lane leads to stands right before its first reader.
  boxes.forEach((_, index) => {
    const readers = own.filter(([start]) => start === index).map(([, end]) => column[end]);
    if (readers.length && !own.some(([, end]) => end === index)) column[index] = Math.min(...readers) - 1;
  });
  return column;
}

// Boxes stand in columns, and between two columns is a gutter without boxes: `gutter[c]` is left of column c.
// Each lane starts with a channel without boxes. Edges run in gutters and channels, those of one box on one track.
function tracks(boxes, arrows, column) {
  const gutters = new Map(), channels = new Map();
  const add = (all, at, start) => {
    const known = all.get(at) ?? [];
    if (!known.includes(start)) known.push(start);
    all.set(at, known);
  };
  for (const [start, end] of arrows) {
    add(gutters, column[start] + 1, start);
    if (column[end] === column[start] + 1) continue;
    add(channels, boxes[end][2], start);
    add(gutters, column[end], start);
  }
  return { gutters, channels };
}

function places(boxes, arrows, lanes) {
  const column = columns(boxes, arrows);
  const first = Math.min(...column);
  column.forEach((_, index) => { column[index] -= first; });
  const { gutters, channels } = tracks(boxes, arrows, column);
  const room = (used) => (used ? (used.length + 1) * BOX.track : 0);
  const left = [];  // of each column; the one behind the last is where the drawing ends
  let x = BOX.left;
  for (let at = 0; at <= Math.max(...column) + 1; at++) {
    x += Math.max(at ? 24 : 0, room(gutters.get(at)) + (gutters.has(at) ? 8 : 0));
    left.push(x);
    x += BOX.width;
  }
  const place = [], tops = [];
  let y = 6;
  lanes.forEach((_, lane) => {
    const stacked = new Map();
    tops.push(y);
    const channel = y + BOX.pad + room(channels.get(lane));
    boxes.forEach((box, index) => {
      if (box[2] !== lane) return;
      const depth = stacked.get(column[index]) ?? 0;
      stacked.set(column[index], depth + 1);
      place[index] = { column: column[index], x: left[column[index]], y: channel + depth * (BOX.height + BOX.gapY) };
    });
    y = channel + Math.max(1, ...stacked.values()) * (BOX.height + BOX.gapY) + BOX.pad;
  });
  tops.push(y);
  const down = (at, start) => left[at] - 8 - (gutters.get(at).length - gutters.get(at).indexOf(start)) * BOX.track;
  const along = (lane, start) => tops[lane] + BOX.pad / 2 + (channels.get(lane).indexOf(start) + 1) * BOX.track;
  return { place, tops, down, along, width: left[left.length - 1] + 6, height: y + 6 };
}

// Out on the right, in on the left; in between along gutters, and along the channel of the lane that it leads to.
function route(start, end, { place, down, along }, lane) {
  const from = place[start], to = place[end];
  const x1 = from.x + BOX.width, y1 = from.y + BOX.height / 2 - BOX.port;
  const x2 = to.x - 5, y2 = to.y + BOX.height / 2 + BOX.port;
  const out = down(from.column + 1, start);
  const points = [[x1, y1], [out, y1]];
  if (to.column !== from.column + 1) {
    const over = along(lane, start), into = down(to.column, start);
    points.push([out, over], [into, over], [into, y2]);
  } else points.push([out, y2]);
  points.push([x2, y2]);
  return { line: rounded(points), tip: `M${x2 + 5} ${y2}l-6 -3v6z` };
}

// A path of level and upright pieces with round corners.
function rounded(points) {
  let path = `M${points[0].join(" ")}`;
  for (let i = 1; i < points.length - 1; i++) {
    const [before, corner, after] = points.slice(i - 1, i + 2);
    const toward = (other) => {
      const length = Math.hypot(other[0] - corner[0], other[1] - corner[1]);
      const part = length ? Math.min(BOX.round, length / 2) / length : 0;
      return corner.map((value, axis) => value + part * (other[axis] - value)).join(" ");
    };
    path += `L${toward(before)}Q${corner.join(" ")} ${toward(after)}`;
  }
  return `${path}L${points[points.length - 1].join(" ")}`;
}

// The text, or its start and an ellipsis where it is wider than a box. font: as CSS writes it, without the family.
const MONO = 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';
const ruler = document.createElement("canvas").getContext("2d");
function cut(text, font, family) {
  ruler.font = `${font} ${family}`;
  const fits = (part) => ruler.measureText(part).width <= BOX.width - 18;
  if (fits(text)) return text;
  let length = text.length - 1;
  while (length > 1 && !fits(`${text.slice(0, length)}…`)) length--;
  return `${text.slice(0, length)}…`;
}

function drawGraph(data, graph) {
  const [boxes, arrows, through] = graph;
  if (!boxes.length) return make("p", { class: "hint" }, "Nothing to draw.");
  const plan = places(boxes, [...arrows, ...through], data.lanes);
  const { place, tops, width, height } = plan;
  const svg = make("svg", { class: "graph", width, height, role: "group",
    "aria-label": "Operations around the layer, by role" });
  svg.style.minWidth = "100%";
  data.lanes.forEach((name, lane) => svg.append(
    make("rect", { class: `lane ${name}`, x: 0, y: tops[lane], width: "100%", height: tops[lane + 1] - tops[lane] - 3, rx: 4 }),
    make("text", { class: `lane ${name}`, x: 10, y: tops[lane] + 22 }, name)));
  const sans = getComputedStyle(document.body).fontFamily;
  const edges = [];
  const edge = ([start, end], hidden) => {
    const lane = boxes[end][2], crosses = boxes[start][2] !== lane;
    const { line, tip } = route(start, end, plan, lane);
    const path = make("path", { class: hidden ? "edge hidden" : "edge", d: line, "stroke-opacity": crosses ? 0.65 : 1 });
    edges.push([start, end, path]);
    svg.append(path, make("path", { class: "tip", d: tip }));
  };
  arrows.forEach((arrow) => edge(arrow, false));
  through.forEach((arrow) => edge(arrow, true));
  const last = data.programs[data.programs.length - 1].name;
  boxes.forEach((box, index) => {
    const [title, note, lane, kind] = box;
    const { x, y } = place[index];
    const kindName = ["key", "ops", "near"][kind];
    const lines = box.length > 4 ? `, line ${box[4] + 1}` : "";
    const light = (on) => {
      for (const [start, end, path] of edges) path.classList.toggle("lit", on && (start === index || end === index));
    };
    const group = svgLink(box.length > 4 ? `#program/${last}/${spanText(box)}` : null, {
      class: `box ${data.lanes[lane]} ${kindName}`, "aria-label": `${data.lanes[lane]}: ${title}, ${note}${lines}`,
      onmouseenter: () => light(true), onmouseleave: () => light(false), onfocus: () => light(true), onblur: () => light(false),
    });
    group.append(make("rect", { x, y, width: BOX.width, height: BOX.height, rx: kind === 1 ? 16 : 3 }),
      make("text", { class: "name", x: x + 10, y: y + 15 }, cut(title, kind === 0 ? "600 12px" : "12px", sans)),
      make("text", { class: "note", x: x + 10, y: y + 29 }, cut(note, "10px", MONO)));
    const tip = document.createElementNS(SVG, "title");
    tip.textContent = `${title}\n${note}${lines}`;
    group.append(tip);
    svg.append(group);
  });
  return make("div", { class: "scroll drawn", tabindex: "0", role: "region", "aria-label": "Drawing of the neighbourhood" }, svg);
}

function svgLink(href, attributes) {
  const link = document.createElementNS(SVG, "a");
  if (href) link.setAttribute("href", href);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) link.addEventListener(name.slice(2), value);
    else link.setAttribute(name, value);
  }
  return link;
}

// `12-14,20-20`: the lines of a box, counted from one.
const spanText = (box) => {
  const parts = [];
  for (let i = 4; i < box.length; i += 2) parts.push(`${box[i] + 1}-${box[i + 1] + 1}`);
  return parts.join(",");
};
